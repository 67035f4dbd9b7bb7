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
# # Remembering keys and values
#
# *Why does a model not read its whole text again for each new word?*
#
# **You build** the cache. **You need** chapter 06.
# **Exports** the module `sigma_book.kv_cache`.

# %%
# | export
import torch

# %%
import os

import matplotlib.pyplot as plt

from sigma_book import load
from sigma_book.attention import split_heads
from sigma_book.gqa import cache_bytes, grouped_attention
from sigma_book.rope import rotary_angles, rotate
from sigma_book.style import ANSWER, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# A model writes one token at a time. For each, the new query asks the keys of all tokens before. Keys and values of old
# tokens never change: no old token sees a newer one. So we keep them.

# %%
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.4))
for axis, name in zip(axes, ("without a cache", "with one"), strict=True):
    for step in range(6):
        for token in range(step + 1):
            fresh = name == "without a cache" or token == step
            axis.add_patch(plt.Rectangle((token, -step), 0.9, 0.9, color=ANSWER if fresh else "#d9d9d9", lw=0))
    axis.set(xlim=(-0.2, 6.2), ylim=(-5.3, 1.2), aspect="equal", title=name)
    axis.axis("off")
save(figure, "07_steps")
plt.show()

# %% [markdown]
# *Figure: two triangles of squares. Each row is a step, each square a token. Without a cache all squares are green, that
# is, computed. With one, only the last of each row is; the grey ones are remembered.*
#
# ## First by hand: counting
#
# One hundred tokens, and a counter that goes up whenever a key is made.


# %%
class Counter:
    def __init__(self):
        self.keys_made = 0

    def key(self, token: int) -> float:
        self.keys_made += 1
        return float(token)


def write_again_and_again(steps: int, counter: Counter) -> None:
    for step in range(1, steps + 1):
        [counter.key(token) for token in range(step)]  # all tokens so far


def write_with_memory(steps: int, counter: Counter) -> None:
    kept = []
    for step in range(1, steps + 1):
        kept.append(counter.key(step - 1))  # only the new one


slow, fast = Counter(), Counter()
write_again_and_again(100, slow)
write_with_memory(100, fast)
assert slow.keys_made == 5050 and fast.keys_made == 100
slow.keys_made, fast.keys_made

# %% [markdown]
# 5,050 against 100.
#
# ## The formula
#
# $$ \sum_{t=1}^{T} t = \frac{T (T + 1)}{2} \quad\text{keys against}\quad T $$
#
# ## Where to keep them
#
# The obvious way is to append: `torch.cat((old, new))`. But a tensor cannot grow. Each `cat` takes new memory and copies
# everything, so over $T$ steps we copy $T^2/2$ tokens: the waste is back through another door. Instead we take the
# memory for all tokens at once, and write each new one into its place.
#
# Gemma 2 asks for one thing more. In every other layer a token sees only the last 4,096 tokens: a *window* that slides.
# There the buffer is a ring. Token 4,096 is written over token 0.

# %%
figure, axis = plt.subplots(figsize=(6, 1.6))
window = 5
for step, height in ((4, 1.2), (7, 0)):
    for slot in range(window):
        column = step - (step - slot) % window
        axis.add_patch(plt.Rectangle((slot, height), 0.92, 0.8, color=ANSWER if column == step else "#cfe3f1", lw=0))
        axis.text(slot + 0.46, height + 0.4, str(column), ha="center", va="center")
    axis.text(-0.2, height + 0.4, f"after token {step}", ha="right", va="center", fontsize=9)
axis.set(xlim=(-2.2, 5.2), ylim=(-0.2, 2.2))
axis.axis("off")
save(figure, "07_ring")
plt.show()

# %% [markdown]
# *Figure: a ring of five slots, after token 4 and after token 7: tokens 5, 6 and 7 lie where 0, 1 and 2 were. The green
# slot is the newest.* Their order does not matter to attention, since each key already carries its rotation.
#
# ## The tensor version
#
# Texts of one batch differ in length. The short ones are filled up in front with places that mean nothing, the *padding*:
# nobody may look at them, and they do not count as positions. (Chapter 11 shows such a batch.)
#
# One cache for each layer. A *column* is a place in the padded batch, the same for all rows.


# %%
# | export
class KVCache:
    """Keys and values of one layer, in two buffers that are filled in place.

    A column is a place in the padded batch, counted from 0: the same for every row. With a window, only the
    last `window` columns stay once the prompt has been read, in a ring: column c lies in slot c % window.

    Parameters
    ----------
    batch, num_kv_heads, head_dim : int
        B, K and Dh.
    max_length : int
        Columns there is room for.
    window : int, optional
        How many columns a token sees, itself included; None for all.
    dtype, device
        Of the buffers.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.window = window
        self.max_length = max_length
        self.length = 0  # columns seen so far
        slots = max_length if window is None else min(window, max_length)
        self.key = torch.zeros(batch, num_kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)

    @property
    def slots(self) -> int:
        return self.key.shape[2]

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values (B, K, T, Dh) and return all that the new tokens may look at.

        The first call may bring any number of columns, and gets them all back: a prompt sees itself whole,
        whatever the window. Later calls get what the buffers hold, in the order that `columns` tells.

        Raises
        ------
        ValueError
            If there is no room left, or if several columns arrive at a ring that is already in use.
        """
        count = key.shape[2]
        if self.length + count > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens, {self.length + count} were written")
        if self.length and count > 1 and self.length + count > self.slots:
            raise ValueError("a sliding cache takes one token at a time once the prompt is in")
        first, self.length = self.length, self.length + count
        if first == 0:
            kept = min(count, self.slots)
            slots = torch.arange(count - kept, count, device=key.device) % self.slots
            self.key[:, :, slots] = key[:, :, -kept:].to(self.key.dtype)
            self.value[:, :, slots] = value[:, :, -kept:].to(self.value.dtype)
            return key, value
        start = first % self.slots
        self.key[:, :, start : start + count] = key
        self.value[:, :, start : start + count] = value
        filled = min(self.length, self.slots)
        return self.key[:, :, :filled], self.value[:, :, :filled]

    def columns(self, length: int | None = None) -> torch.Tensor:
        """The column that each filled slot holds once `length` columns were seen (now, by default): (C,)."""
        length = self.length if length is None else length
        slots = torch.arange(min(length, self.slots), device=self.key.device)
        return length - 1 - (length - 1 - slots) % self.slots

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be taken more than once."""
        key, value = self.key[rows], self.value[rows]
        if len(rows) == len(self.key):  # in its place: a step that was compiled for a GPU knows the address
            self.key.copy_(key)
            self.value.copy_(value)
        else:
            self.key, self.value = key, value


# %% [markdown]
# The first call is special. A prompt of PaliGemma sees itself whole, even where a window is shorter (chapter 09). So the
# first call gives back all that it was given, and only afterwards does the ring keep the last ones.
#
# ## Proof: cached equals uncached
#
# A layer of attention with random keys, two rows of different lengths. Row 1 is shorter, so it is padded on the left,
# and nobody may see the padding.

# %%
T, H, K, Dh, prompt = 24, 4, 2, 8, 6
query, key, value = torch.randn(2, H, T, Dh), torch.randn(2, K, T, Dh), torch.randn(2, K, T, Dh)
real = torch.ones(2, T, dtype=torch.bool)
real[1, :2] = False
positions = real.long().cumsum(-1)
angles = rotary_angles(positions, Dh)
query, key = rotate(query, *angles), rotate(key, *angles)


def allowed(window: int | None) -> torch.Tensor:
    column = torch.arange(T)
    back = column[:, None] - column[None, :]
    may = (back >= 0) & (back < (window or T))
    may |= (column[:, None] < prompt) & (column[None, :] < prompt)  # the prompt sees itself whole
    return may & real[:, None, None, :]  # (B, 1, T, T)


worst = {}
for window in (None, 3, 7):
    whole = grouped_attention(query, key, value, allowed(window))
    cache = KVCache(2, K, T, Dh, window=window)
    seen_keys, seen_values = cache.update(key[:, :, :prompt], value[:, :, :prompt])
    first = grouped_attention(query[:, :, :prompt], seen_keys, seen_values, allowed(window)[:, :, :prompt, :prompt])
    differences = [(first - whole[:, :, :prompt])[real[:, None, :prompt].expand(2, H, prompt)].abs().max().item()]
    for t in range(prompt, T):
        seen_keys, seen_values = cache.update(key[:, :, t : t + 1], value[:, :, t : t + 1])
        mask = real[:, cache.columns()][:, None, None, :]
        step = grouped_attention(query[:, :, t : t + 1], seen_keys, seen_values, mask)
        differences.append((step - whole[:, :, t : t + 1]).abs().max().item())
    worst[window] = max(differences)
    assert worst[window] < 1e-5
worst

# %% [markdown]
# At every step, for every window, the difference is rounding. (Chapter 10 repeats this with a whole model; `tests/parity`
# does it against `transformers`, step by step.)
#
# And the buffers never move: each write goes into the same memory.

# %%
cache = KVCache(1, 1, 100, 8)
before = cache.key.data_ptr()
for _ in range(100):
    kept, _ = cache.update(torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8))
assert cache.key.data_ptr() == before
assert kept.shape == (1, 1, 100, 8)

# %% [markdown]
# ## What appending would cost
#
# How much is copied, when we append and when we write in place? Counted in tokens, for an answer of 100 after a prompt
# of 260.

# %%
start, new = 260, 100
appended = [sum(start + i for i in range(1, step + 1)) for step in range(new)]
in_place = list(range(new))
figure, axis = plt.subplots(figsize=(5.4, 2.4))
axis.plot(appended, color=PROMPT)
axis.plot(in_place, color=ANSWER)
axis.annotate("append", (70, appended[70]), ha="right", xytext=(-6, 0), textcoords="offset points", color=PROMPT)
axis.annotate("write in place", (70, 1500), color=ANSWER)
axis.set(xlabel="new tokens", ylabel="tokens copied")
save(figure, "07_copies")
plt.show()
assert appended[-1] > 300 * in_place[-1]

# %% [markdown]
# *Figure: copied tokens against new tokens. Appending climbs to more than thirty thousand; writing in place stays at a
# hundred.*
#
# ## A look inside
#
# Nobody reads the picture twice: after the first pass only its keys and values are left. So how much of what a new word
# looks at is picture, how much is prompt, and how much is what the model has just written? We let the pocket model (or
# the one in `SIGMA_BOOK_MODEL`) write a caption, one token at a time, and ask its caches.
#
# A *hook* hands us what a layer gives while the model runs. We take the queries of the newest token, and let each ask
# the keys that are in the cache by then. (How scores become words is chapter 13.)

# %%
model = load(os.environ.get("SIGMA_BOOK_MODEL"), device="cpu", dtype="float32")
decoder, tokenizer, text = model.language_model, model.processor.tokenizer, model.config.text
batch = model.processor.prepare([draw_scene(make_scene(5))], ["caption en"])
start = batch.input_ids.shape[1]
ends = [model.config.vision.num_patches, start]  # where the picture ends, and where the prompt does
queries = []
hooks = [
    layer.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: queries.append(output[:, -1:]))
    for layer in decoder.layers
]


def looks(caches: list[KVCache]) -> torch.Tensor:
    """Shares of picture, prompt and answer in what the newest token looks at, a mean over layers and heads."""
    seen, shares = caches[0].length, []
    angles = rotary_angles(torch.tensor([[seen]]), text.head_dim, text.rope_theta)  # positions count from 1
    for layer, query, cache in zip(decoder.layers, queries, caches, strict=True):
        query = rotate(split_heads(query, text.num_attention_heads), *angles)  # (1, H, 1, Dh)
        columns = cache.columns()  # (S,): in a ring the newest may stand first
        key = cache.key[:, :, : len(columns)]
        key = key.repeat_interleave(text.num_attention_heads // text.num_key_value_heads, dim=1)
        scores = (query @ key.transpose(-2, -1) * layer.self_attn.scale)[0, :, 0]  # (H, S)
        if text.attn_logit_softcapping is not None:  # Gemma 2
            scores = text.attn_logit_softcapping * torch.tanh(scores / text.attn_logit_softcapping)
        kinds = torch.bucketize(columns, torch.tensor(ends), right=True)  # (S,): 0, 1 or 2
        shares.append(torch.zeros(3).index_add(0, kinds, scores.softmax(-1).mean(0)))
    return torch.stack(shares).mean(0)  # (3,)


words, rows, mask = [], [], batch.attention_mask
with torch.no_grad():
    caches = decoder.new_caches(1, start + 24)
    scores = model.prefill(batch.input_ids, model.encode_images(batch.pixel_values), mask, caches)
    while len(words) < 24:
        rows.append(looks(caches))
        queries.clear()
        token = scores.argmax(-1)
        words.append(tokenizer.decode([token.item()]).strip() or "(end)")
        if token.item() == tokenizer.eos_id:
            break
        mask = torch.cat((mask, mask.new_ones(1, 1)), dim=1)
        scores = model.decode(token[:, None], mask, caches)
for hook in hooks:
    hook.remove()
picture, prompt, answer = torch.stack(rows).T.tolist()
assert caches[0].length == start + len(words) - 1  # one column for each token read, and none twice
if "SIGMA_BOOK_MODEL" not in os.environ:
    assert sum(picture) > len(words) / 2 and sum(prompt) < sum(answer)

figure, axis = plt.subplots(figsize=(7.0, 2.9))
places, below = range(len(words)), [one + two for one, two in zip(picture, prompt, strict=True)]
axis.bar(places, picture, color=PICTURE, width=0.85)
axis.bar(places, prompt, bottom=picture, color=PROMPT, width=0.85)
axis.bar(places, answer, bottom=below, color=ANSWER, width=0.85)
for name, height, colour in (
    ("picture", picture[-1] / 2, PICTURE),
    ("prompt", picture[-1] + prompt[-1] / 2, PROMPT),
    ("answer", 1 - answer[-1] / 2, ANSWER),
):
    axis.text(len(words) - 0.4, height, name, va="center", color=colour)
axis.set_xticks(places, words, rotation=90)
axis.set(ylabel="share of the looks", xlim=(-0.6, len(words) + 1.6), yticks=(0, 0.5, 1))
save(figure, "07_looks")
plt.show()

# %% [markdown]
# *Figure: a bar for each token of the caption, with the shares of picture, prompt and answer in what was looked at to
# write it. The first bar has no answer in it, since nothing was written yet.*
#
# Over the whole caption the pocket model's looks go to the picture more than half of the time, and to the prompt least.
# It looks a good deal at its own words too.
#
# ## The bill
#
# What the caches take: of a picture and 20 tokens of text with the pocket model, and of a picture, 20 tokens of prompt and
# an answer of 100 tokens with the large one.

# %%
pocket = cache_bytes(4, 2, 64, 64 + 20, bytes_per_number=4)
large = cache_bytes(18, 1, 256, 256 + 20 + 100)
assert large == 18_432 * 376
{"pocket, picture and 20 tokens, 32 bits": pocket, "3B, picture, 20 tokens, answer of 100, 16 bits": large}

# %% [markdown]
# Seven megabytes for a picture and an answer with the large model: little, because it has only one key/value head.
#
# For Gemma 2, a window of 4,096 saves nothing until a text is longer than that. Every second of its 26 blocks has one.

# %%
full, sliding = cache_bytes(13, 4, 256, 8192), cache_bytes(13, 4, 256, 4096)
assert (full + sliding) / (2 * full) == 0.75  # at 8,192 tokens, three quarters of the bytes

# %% [markdown]
# ## Your turn
#
# **1.** ★ Bytes that one new token reads from the cache, all layers together, with numbers of 16 bits.


# %%
def bytes_read(layers: int, kv_heads: int, head_dim: int, length: int) -> int: ...


check(bytes_read, ((18, 1, 256, 376), large), ((1, 1, 1, 1), 4))

# %% [markdown]
# **2.** ★★ How many keys are made without a cache, for a prompt of `p` tokens and `n` new ones?


# %%
def keys_made(p: int, n: int) -> int: ...


check(keys_made, ((0, 100), 4950), ((1, 100), 5050), ((260, 100), 30_950))

# %% [markdown]
# (The first new token comes out of reading the prompt once, so step $i$ reads $p + i$ tokens, $i$ from 0.)
#
# **3.** ★★★ Which column does a slot of a full ring hold, after `seen` columns?


# %%
def column_of(slot: int, seen: int, window: int) -> int: ...


check(column_of, ((0, 8, 5), 5), ((3, 8, 5), 3), ((0, 23, 5), 20), ((4, 23, 5), 19))

# %% [markdown]
# Next: all the parts on the table become the voice.
