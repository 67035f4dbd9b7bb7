# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Grouped queries
#
# *Do all heads need keys and values of their own?*
#
# **You build** grouped-query attention. **You need** chapters 03 and 05.
# **Exports** the module `sigma_book.gqa`.

# %%
# | export
import torch

from sigma_book.attention import attention

# %%
import os

import matplotlib.pyplot as plt
from torch.profiler import ProfilerActivity, profile

from sigma_book import load
from sigma_book.style import HEADS, PICTURE, PROMPT, check, save, use_style

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# A model that writes keeps the keys and values of all that it has read (chapter 07 says why). With eight heads, that
# is eight sets. Queries are used once and forgotten, so they cost nothing to keep.
#
# The idea: let several query heads share one key/value head.

# %%
figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.2))
for axis, (name, kv_heads) in zip(axes, (("multi-head", 8), ("grouped", 2), ("multi-query", 1)), strict=True):
    for head in range(8):
        kv = head * kv_heads // 8
        kv_place = (kv + 0.5) * 8 / kv_heads - 0.5
        axis.plot((head, kv_place), (1, 0), color=HEADS[kv % 8], lw=1)
        axis.scatter(head, 1, color=PROMPT, s=60, zorder=3)
        axis.scatter(kv_place, 0, color=PICTURE, s=110, marker="s", zorder=3)
    axis.set_title(f"{name}: {kv_heads} key/value head{'s' if kv_heads > 1 else ''}", fontsize=9)
    axis.set(xlim=(-0.7, 7.7), ylim=(-0.4, 1.4))
    axis.axis("off")
save(figure, "06_groups")
plt.show()

# %% [markdown]
# *Figure: circles above are query heads, squares below are key/value heads, a line leads from each head to the one it
# reads. From left to right eight, two and one of them serve eight queries.* PaliGemma 3B has **8** query heads and **1**
# key/value head; PaliGemma 2 3B has 8 and 4.
#
# ## First by hand
#
# Query head $h$ reads key/value head $\lfloor h / (H / K) \rfloor$. The plain way is a loop: each query head attends, as in
# chapter 03, with the key/value head that it reads.


# %%
def grouped_naive(query, key, value):
    heads, kv_heads = query.shape[1], key.shape[1]
    outputs = []
    for h in range(heads):
        shared = h // (heads // kv_heads)
        outputs.append(attention(query[:, h : h + 1], key[:, shared : shared + 1], value[:, shared : shared + 1]))
    return torch.cat(outputs, dim=1)


query = torch.randn(2, 8, 5, 16)
key, value = torch.randn(2, 2, 2, 7, 16)
grouped_naive(query, key, value).shape

# %% [markdown]
# ## The formula
#
# $$ \mathrm{head}_h = \mathrm{attention}\big(Q_h,\; K_{\lfloor hK/H \rfloor},\; V_{\lfloor hK/H \rfloor}\big) $$
#
# ## The tensor version
#
# A loop is slow, and to copy keys until there are enough would throw away what sharing saves. There is a way without both: the
# queries of a group ask the *same* keys. So lay them one below the other, as if they were more tokens of a single head.


# %%
# | export
def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention in which H / K query heads share each key/value head, and nothing is copied.

    The queries of a group are laid one below the other, as if they were more tokens of one head.

    Parameters
    ----------
    query : torch.Tensor
        (B, H, T, Dh).
    key, value : torch.Tensor
        (B, K, S, Dh); H must be a multiple of K. Query head h reads key/value head h // (H / K).
    mask : torch.Tensor, optional
        Boolean (B, 1, T, S), True where a query may look. B and T may be 1: the same for all rows or all queries.
    scale, softcap : float, optional
        As in `attention`.

    Returns
    -------
    torch.Tensor
        (B, H, T, Dh).

    Raises
    ------
    ValueError
        If the heads do not divide into groups.

    References
    ----------
    Ainslie et al. 2023, "GQA", section 2.2; Shazeer 2019, "Fast Transformer Decoding", section 3.
    """
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} key/value heads")
    groups = num_heads // num_kv_heads
    query = query.reshape(batch, num_kv_heads, groups * length, head_dim)  # (B, K, G*T, Dh)
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.repeat(1, 1, groups, 1)  # (B, 1, G*T, S): booleans, not keys
    output = attention(query, key, value, mask, scale, softcap)  # (B, K, G*T, Dh)
    return output.reshape(batch, num_heads, length, head_dim)


# %% [markdown]
# ## Proof
#
# It equals the loop over heads, and PyTorch's own grouped attention.

# %%
torch.testing.assert_close(grouped_attention(query, key, value), grouped_naive(query, key, value))
expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
torch.testing.assert_close(grouped_attention(query, key, value), expected)

mask = torch.rand(2, 1, 5, 7) > 0.3
mask[..., 0] = True  # everyone may look somewhere
expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
torch.testing.assert_close(grouped_attention(query, key, value, mask), expected)

# %% [markdown]
# And nothing of the keys is copied on the way: we let PyTorch record the memory that each operation takes.

# %%
long_key, long_value = torch.randn(2, 1, 1, 4096, 64)
one_query = torch.randn(1, 8, 1, 64)
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
    grouped_attention(one_query, long_key, long_value)
largest = max((event.self_cpu_memory_usage for event in record.events()), default=0)
print(f"the keys take {long_key.nbytes:,} bytes; the largest piece of memory taken on the way is {largest:,}")
assert 0 < largest < long_key.nbytes

# %% [markdown]
# ## A look inside
#
# The pocket model has 4 query heads for 2 key/value heads. Its maps show it: the one for keys is half as tall.

# %%
model = load(os.environ.get("SIGMA_BOOK_MODEL"))
block = model.language_model.layers[0].self_attn
for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    weight = getattr(block, name).weight
    print(f"{name}: {tuple(weight.shape)}")
text = model.config.text
assert (
    block.k_proj.weight.shape[0] * text.num_attention_heads == block.q_proj.weight.shape[0] * text.num_key_value_heads
)

# %% [markdown]
# ## The bill
#
# What keys and values of one conversation take, all layers together.


# %%
# | export
def cache_bytes(
    num_layers: int, num_kv_heads: int, head_dim: int, length: int, batch: int = 1, bytes_per_number: int = 2
) -> int:
    """Bytes that the keys and values of `length` tokens take, all layers together."""
    return 2 * num_layers * batch * num_kv_heads * length * head_dim * bytes_per_number


# %%
heads = {"8 key/value heads": 8, "4": 4, "1 (PaliGemma 3B)": 1}
sizes = {name: cache_bytes(18, kv, 256, 8192) for name, kv in heads.items()}
assert sizes["8 key/value heads"] == 8 * sizes["1 (PaliGemma 3B)"]
assert cache_bytes(18, 1, 256, 1) == 18_432  # bytes for one token, in 16 bits
assert cache_bytes(18, 1, 256, 256) == 4_718_592  # for a picture of 224 px

figure, axis = plt.subplots(figsize=(6, 1.8))
axis.barh(list(sizes), [size / 1e6 for size in sizes.values()], color=PICTURE)
for place, size in enumerate(sizes.values()):
    axis.text(size / 1e6 + 8, place, f"{size / 1e6:,.0f} MB", va="center", fontsize=9)
axis.set(xlim=(0, 1400))
axis.invert_yaxis()
axis.xaxis.set_visible(False)
axis.spines[["bottom", "left"]].set_visible(False)
save(figure, "06_bytes")
plt.show()

# %% [markdown]
# *Figure: three bars, the bytes of keys and values for 8,192 tokens in 16 bits: 1,208 MB with eight heads, 604 with
# four, 151 with one.*
# Eight times fewer bytes to keep, and eight times fewer to read for each new word. With long texts, or many at once, that
# reading sets the speed (chapter 21).
#
# What does it cost? The keys of one head must serve eight ways of asking. Gemma's authors found that worth it for the
# 2B model, and gave the larger ones more.
#
# ## Your turn
#
# **1.** ★ Which key/value head does query head `h` read?


# %%
def shared_head(h: int, heads: int, kv_heads: int) -> int: ...


check(shared_head, ((7, 8, 1), 0), ((5, 8, 2), 1), ((3, 8, 4), 1), ((6, 8, 8), 6))

# %% [markdown]
# **2.** ★★ Parameters of the four maps of a layer of width `d`, with heads of `head_dim`.


# %%
def map_parameters(d: int, heads: int, kv_heads: int, head_dim: int) -> int: ...


check(map_parameters, ((2048, 8, 1, 256), 9_437_184), ((2304, 8, 4, 256), 14_155_776))

# %% [markdown]
# **3.** ★★ How many tokens fit into `budget` bytes of cache with 18 layers, heads of 256 and 16-bit numbers?


# %%
def tokens_in(budget: int, kv_heads: int) -> int: ...


check(tokens_in, ((10**9, 1), 54_253), ((10**9, 8), 6_781))

# %% [markdown]
# Next: what exactly is kept, and how it is kept without copying.
