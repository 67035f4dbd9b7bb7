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
# # Another house, another file
#
# *How does a file with other names, other shapes and no configuration become the very same model?*
#
# **You build** the way from big_vision's arrays to ours. **You need** chapter 12. **Exports** the module `sigma_book.npz`.

# %%
# | export
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sigma_book.gemma import GemmaConfig
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Tokenizer
from sigma_book.siglip import SiglipConfig
from sigma_book.weights import pick_device, pick_dtype, some_of

# %%
import shutil
import tempfile

import matplotlib.pyplot as plt

import sigma_book
from sigma_book.style import HEADS, check, save, use_style
from sigma_book.weights import load_model

use_style()
FOLDER = Path(sigma_book.__file__).parent / "pocket_model"

# %% [markdown]
# ## The picture
#
# PaliGemma was trained by a program called *big_vision*, in JAX, Google's counterpart of PyTorch. Its authors publish it in
# their own format too: one `.npz` file. That is a zip archive with an array of numpy in each member. Three things differ.
#
# - Names are paths: `params/llm/layers/mlp/linear`.
# - All layers of a kind lie in one array, stacked on the first axis.
# - A linear map is stored as (in, out) and the heads have an axis of their own, where we have (out, in) and all heads in
#   one row of numbers.

# %%
kernel = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], [[9.0, 10.0], [11.0, 12.0]]]  # (D, H, Dh) = (3, 2, 2)
theirs = np.array(kernel).reshape(3, 4)
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.6))
for axis, grid, turned in zip(axes, (theirs, theirs.T), (False, True)):
    for (row, column), number in np.ndenumerate(grid):
        head = (row if turned else column) // 2
        axis.add_patch(plt.Rectangle((column, -row), 0.94, -0.94, color=HEADS[head], lw=0))
        axis.text(column + 0.47, -row - 0.47, f"{number:.0f}", ha="center", va="center", color="white", fontsize=9)
    for head in range(2):
        place = (-0.15, -2 * head - 0.97) if turned else (2 * head + 0.97, 0.15)
        axis.text(
            *place, f"head {head}", ha="right" if turned else "center", va="center" if turned else "bottom", fontsize=8
        )
    axis.set(xlim=(-1.1, 4.1), ylim=(-4.1, 0.6), aspect="equal")
    axis.set_title("ours: (H Dh, D)" if turned else "theirs: (D, H, Dh)", fontsize=9)
    axis.axis("off")
save(figure, "12b_turned")
plt.show()

# %% [markdown]
# *Figure: the same twelve numbers twice. In big_vision's array the two heads, in two colours, stand side by side and each row is
# one number of the input; in ours the heads lie one below the other, and each column is one number of the input.*
#
# ## First by hand
#
# The query weights of one layer, with two heads of two numbers:

# %%
rows = [[kernel[d][h][k] for d in range(3)] for h in range(2) for k in range(2)]  # (H * Dh, D)
assert torch.tensor(kernel).permute(1, 2, 0).reshape(4, 3).tolist() == rows
rows

# %% [markdown]
# So each array needs an order of its axes, and the shape of the tensor that it becomes. One table says all of it. The
# letters name the sizes: first the tower's layers L, width D, MLP F, heads H of E numbers, patches P of side S; then the
# decoder's layers N, width W, MLP M, query heads Q and key/value heads K of A numbers, and V rows of words.

# %%
# | export
# array under params/, its axes, our tensors, and the order in which the axes of one of them become ours
_EYES, _VOICE = "img/Transformer/encoderblock/", "llm/layers/"
_BLOCK, _LAYER = "vision_tower.encoder.layers.{}.", "language_model.layers.{}."
_NPZ_TOWER = (
    ("img/embedding/kernel", "S S 3 D", ["vision_tower.embeddings.patch_embedding.weight"], (3, 2, 0, 1)),
    ("img/embedding/bias", "D", ["vision_tower.embeddings.patch_embedding.bias"], (0,)),
    ("img/pos_embedding", "1 P D", ["vision_tower.embeddings.position_embedding.weight"], (0, 1, 2)),
    (f"{_EYES}LayerNorm_0/scale", "L D", [f"{_BLOCK}layer_norm1.weight"], (0,)),
    (f"{_EYES}LayerNorm_0/bias", "L D", [f"{_BLOCK}layer_norm1.bias"], (0,)),
    (f"{_EYES}LayerNorm_1/scale", "L D", [f"{_BLOCK}layer_norm2.weight"], (0,)),
    (f"{_EYES}LayerNorm_1/bias", "L D", [f"{_BLOCK}layer_norm2.bias"], (0,)),
    (f"{_EYES}MlpBlock_0/Dense_0/kernel", "L D F", [f"{_BLOCK}mlp.fc1.weight"], (1, 0)),
    (f"{_EYES}MlpBlock_0/Dense_0/bias", "L F", [f"{_BLOCK}mlp.fc1.bias"], (0,)),
    (f"{_EYES}MlpBlock_0/Dense_1/kernel", "L F D", [f"{_BLOCK}mlp.fc2.weight"], (1, 0)),
    (f"{_EYES}MlpBlock_0/Dense_1/bias", "L D", [f"{_BLOCK}mlp.fc2.bias"], (0,)),
    *(
        row
        for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        for row in (
            (
                f"{_EYES}MultiHeadDotProductAttention_0/{theirs}/kernel",
                "L D H E",
                [f"{_BLOCK}self_attn.{ours}.weight"],
                (1, 2, 0),
            ),
            (
                f"{_EYES}MultiHeadDotProductAttention_0/{theirs}/bias",
                "L H E",
                [f"{_BLOCK}self_attn.{ours}.bias"],
                (0, 1),
            ),
        )
    ),
    (f"{_EYES}MultiHeadDotProductAttention_0/out/kernel", "L H E D", [f"{_BLOCK}self_attn.out_proj.weight"], (2, 0, 1)),
    (f"{_EYES}MultiHeadDotProductAttention_0/out/bias", "L D", [f"{_BLOCK}self_attn.out_proj.bias"], (0,)),
    ("img/Transformer/encoder_norm/scale", "D", ["vision_tower.post_layernorm.weight"], (0,)),
    ("img/Transformer/encoder_norm/bias", "D", ["vision_tower.post_layernorm.bias"], (0,)),
    ("img/head/kernel", "D W", ["multi_modal_projector.linear.weight"], (1, 0)),
    ("img/head/bias", "W", ["multi_modal_projector.linear.bias"], (0,)),
)
_NPZ_DECODER = (
    ("llm/embedder/input_embedding", "V W", ["language_model.embed_tokens.weight"], (0, 1)),
    (f"{_VOICE}attn/attn_vec_einsum/w", "N Q A W", [f"{_LAYER}self_attn.o_proj.weight"], (2, 0, 1)),
    (f"{_VOICE}mlp/gating_einsum", "N 2 W M", [f"{_LAYER}mlp.gate_proj.weight", f"{_LAYER}mlp.up_proj.weight"], (1, 0)),
    (f"{_VOICE}mlp/linear", "N M W", [f"{_LAYER}mlp.down_proj.weight"], (1, 0)),
    (f"{_VOICE}pre_attention_norm/scale", "N W", [f"{_LAYER}input_layernorm.weight"], (0,)),
    ("llm/final_norm/scale", "W", ["language_model.norm.weight"], (0,)),
)
_NPZ_QKV = {  # equal numbers of heads are stored in one array
    True: (
        (f"{_VOICE}attn/qkv_einsum/w", "N 3 Q W A", [f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv"], (0, 2, 1)),
    ),
    False: (
        (f"{_VOICE}attn/q_einsum/w", "N Q W A", [f"{_LAYER}self_attn.q_proj.weight"], (0, 2, 1)),
        (f"{_VOICE}attn/kv_einsum/w", "N 2 K W A", [f"{_LAYER}self_attn.{x}_proj.weight" for x in "kv"], (0, 2, 1)),
    ),
}
_NPZ_NORMS = {  # the name of a norm tells its place only together with the generation, see chapter 08
    False: ((f"{_VOICE}pre_ffw_norm/scale", "N W", [f"{_LAYER}post_attention_layernorm.weight"], (0,)),),
    True: (
        (f"{_VOICE}post_attention_norm/scale", "N W", [f"{_LAYER}post_attention_layernorm.weight"], (0,)),
        (f"{_VOICE}pre_ffw_norm/scale", "N W", [f"{_LAYER}pre_feedforward_layernorm.weight"], (0,)),
        (f"{_VOICE}post_ffw_norm/scale", "N W", [f"{_LAYER}post_feedforward_layernorm.weight"], (0,)),
    ),
}

# %% [markdown]
# Like a safetensors file, an `.npz` can be asked for its table of contents alone: each member begins with a line that
# says dtype and shape. numpy has no bfloat16, so an array of it appears as two bytes without a meaning, `V2`.

# %%
# | export
NPZ_DTYPES = {"float32": torch.float32, "float16": torch.float16, "void16": torch.bfloat16}  # as numpy calls them


def read_npz_header(path: str | Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The table of contents of an `.npz` file: shape and dtype of each array, without reading its numbers.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no `.npz`, is damaged, or holds an array of Python objects.
    RuntimeError
        If the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    table = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
                table[member.removesuffix(".npy")] = (shape, dtype)
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is no .npz file that can be read ({error}): download or copy it again") from error
    except OSError as error:
        raise RuntimeError(f"{path} cannot be read ({error.strerror}): check the disk and the permissions") from error
    for name, (_, dtype) in table.items():
        if dtype.hasobject:
            raise ValueError(f"{path}: array {name} holds Python objects, which can run code and are never loaded")
    return table


def read_npz_array(path: str | Path, name: str) -> torch.Tensor:
    """One array of an `.npz` file as a tensor; no pickle is read. Two bytes without a meaning are bfloat16.

    Raises
    ------
    ValueError
        If the array is damaged, or of a dtype that weights do not have.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array = arrays[name]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: array {name} is damaged ({error}): download or copy the file again") from error
    if array.dtype.name not in NPZ_DTYPES:
        raise ValueError(f"{path}: array {name} is {array.dtype.name}: expected one of {', '.join(NPZ_DTYPES)}")
    if array.dtype.name == "void16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# %% [markdown]
# An `.npz` has no `config.json`. The sizes can be read from the shapes. Some things leave no trace in any shape, and are
# filled in from what is known of the two generations: Gemma 2 has norms behind attention and MLP, and with them come
# softcaps of 50 and 30, a window of 4,096 in every other layer, and scores divided by the root of the head's width (in the
# largest model by the root of 144, which is 12). The ids of special tokens come from the tokenizer. It must lie beside the
# file, because the file has none.
#
# (The window is that of Gemma 2 and of the files on the hub. big_vision's own program has none. A row of 4,096 tokens or less
# is read alike by both: at 224 and 448 pixels nothing differs.)

# %%
# | export
_ROWS_ADDED = 64  # `<image>` and padding: 257,152 rows become 257,216


def read_npz_config(path: str | Path) -> PaliGemmaConfig:
    """The configuration of a big_vision checkpoint: sizes from its arrays, ids from the tokenizer in the same folder.

    What no array tells: the epsilons (1e-6), the rotary base (10,000), the context (8,192); and where there are norms
    behind attention and MLP, Gemma 2's softcaps (50, 30), window (4,096, every other layer, the first one slides) and
    query scale.

    Raises
    ------
    FileNotFoundError
        If the file, or a tokenizer beside it, is missing.
    ValueError
        If an array is missing, too many, or has a shape that fits no PaliGemma.
    """
    return _read_npz(Path(path))[0]


def _read_npz(path: Path) -> tuple[PaliGemmaConfig, list[tuple]]:
    """Configuration and rows of the table, each array's full name in front."""
    header = {name: shape for name, (shape, _) in read_npz_header(path).items()}
    prefix = "params/" if any(name.startswith("params/") for name in header) else ""
    stored = {name.removeprefix(prefix): shape for name, shape in header.items() if name.startswith(prefix)}
    table = _NPZ_TOWER + _NPZ_DECODER + _NPZ_QKV[f"{_VOICE}attn/qkv_einsum/w" in stored]
    gemma2 = f"{_VOICE}post_attention_norm/scale" in stored
    table += _NPZ_NORMS[gemma2]
    names = [name for name, *_ in table]
    if missing := [name for name in names if name not in stored]:
        raise ValueError(f"{path} lacks {some_of(missing)}: expected a PaliGemma checkpoint of big_vision")
    if unknown := sorted(stored.keys() - set(names)):
        raise ValueError(f"{path} holds {some_of(unknown)}, for which PaliGemma has no place")
    sizes: dict[str, int] = {}
    for name, axes, *_ in table:
        wanted = [axis if axis.isalpha() else int(axis) for axis in axes.split()]
        if len(stored[name]) == len(wanted):
            sizes = dict(zip(filter(str.isalpha, axes.split()), _lettered(stored[name], wanted))) | sizes
        expected = [sizes.get(axis, axis) for axis in wanted]
        if list(stored[name]) != expected:
            raise ValueError(f"{path}: array {prefix}{name} has the shape {list(stored[name])}, expected {expected}")
    return _npz_config(path, sizes, gemma2), [(prefix + name, *rest) for name, *rest in table]


def _lettered(shape: tuple[int, ...], wanted: list[str | int]) -> list[int]:
    return [size for size, axis in zip(shape, wanted) if isinstance(axis, str)]


def _npz_config(path: Path, sizes: dict[str, int], gemma2: bool) -> PaliGemmaConfig:
    side = math.isqrt(sizes["P"])
    if side**2 != sizes["P"]:
        raise ValueError(f"{path}: img/pos_embedding has {sizes['P']} places: expected a square, one for each patch")
    if sizes["H"] * sizes["E"] != sizes["D"]:
        raise ValueError(
            f"{path}: {sizes['H']} heads of {sizes['E']} numbers do not make up the tower's width, {sizes['D']}"
        )
    vision = SiglipConfig(sizes["D"], sizes["F"], sizes["L"], sizes["H"], side * sizes["S"], sizes["S"])
    text = GemmaConfig(
        hidden_size=sizes["W"],
        intermediate_size=sizes["M"],
        num_hidden_layers=sizes["N"],
        num_attention_heads=sizes["Q"],
        num_key_value_heads=sizes.get("K", sizes["Q"]),
        head_dim=sizes["A"],
        vocab_size=sizes["V"] + _ROWS_ADDED,
    )
    if gemma2:
        largest = (sizes["W"], sizes["Q"]) == (4608, 32)
        text = replace(
            text,
            query_pre_attn_scalar=144 if largest else sizes["A"],
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=4096,
            layer_types=tuple(("sliding_attention", "full_attention")[layer % 2] for layer in range(sizes["N"])),
            four_norms=True,
        )
    try:
        tokenizer = Tokenizer.from_folder(path.parent)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} comes without its tokenizer: put tokenizer.model or tokenizer.json of PaliGemma into {path.parent}"
        ) from error
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if tokenizer.image_id >= text.vocab_size:
        raise ValueError(
            f"{path} has {sizes['V']} rows of words, but <image> is token {tokenizer.image_id} for the tokenizer beside it: "
            "these files are not of one model"
        )
    return PaliGemmaConfig(vision, text, tokenizer.image_id, **ids)


# %% [markdown]
# Then the numbers, one array at a time, the largest first, as before. The rows that are added to the table of words need
# a value, since the table is also the head. We give them the mean of all rows. Their score is then the mean of all
# scores, and a mean is never the best.


# %%
# | export
def load_npz(path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> PaliGemma:
    """A big_vision checkpoint as a model, as `load_model` gives one: in eval mode and frozen.

    Each array is read, cut into layers, turned and converted before the next is opened.

    Parameters
    ----------
    path : path
        The `.npz` file, with `tokenizer.model` or `tokenizer.json` in the same folder.
    device, dtype
        As in `load_model`.

    Raises
    ------
    FileNotFoundError, ValueError, RuntimeError
        As `read_npz_config`; or if an array is damaged or the device is not there.
    """
    path = Path(path)
    config, table = _read_npz(path)
    header = read_npz_header(path)
    device = pick_device(device)
    sizes = {row[0]: math.prod(header[row[0]][0]) * header[row[0]][1].itemsize for row in table}
    totals = dict.fromkeys(NPZ_DTYPES, 0)
    for name, size in sizes.items():
        if header[name][1].name not in NPZ_DTYPES:
            raise ValueError(f"{path}: array {name} is {header[name][1].name}: expected {', '.join(NPZ_DTYPES)}")
        totals[header[name][1].name] += size
    dtype = pick_dtype(dtype, NPZ_DTYPES[max(totals, key=totals.get)], device)
    with torch.device("meta"):
        model = PaliGemma(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = {}
    with tqdm(total=sum(sizes.values()), desc="loading", unit="B", unit_scale=True, delay=1.0, disable=None) as bar:
        for name, _, names, order in sorted(table, key=lambda row: sizes[row[0]], reverse=True):
            array = read_npz_array(path, name)
            for ours, tensor in _layers(array, names):
                place = torch.empty(shapes[ours], dtype=dtype, device=device)
                if ours == "language_model.embed_tokens.weight":
                    place[: len(tensor)] = tensor
                    place[len(tensor) :] = tensor.mean(0, dtype=torch.float32)
                else:
                    place.copy_(tensor.permute(order).reshape(place.shape))
                tensors[ours] = place
            del array, tensor
            bar.update(sizes[name])
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _layers(array: torch.Tensor, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that an array holds, by our names: for each layer one, or for each layer two or three."""
    stacked = "{}" in names[0]
    for layer, slab in enumerate(array if stacked else [array]):
        for name, tensor in zip(names, slab if len(names) > 1 else [slab]):
            yield name.format(layer), tensor


# %% [markdown]
# ## Proof
#
# The proof goes the other way first. We write the pocket model as big_vision would have stored it, in a cell that knows
# nothing of the table, and load that file.


# %%
def as_big_vision(model: PaliGemma) -> dict[str, np.ndarray]:
    weights, eyes, voice = model.state_dict(), model.config.vision, model.config.text
    arrays = {}

    def put(name: str, ours: str, turn=lambda tensor: tensor) -> None:
        layers = range(100) if "{}" in ours else [None]
        found = [turn(weights[ours.format(n)]) for n in layers if ours.format(n) in weights]
        arrays[f"params/{name}"] = (torch.stack(found) if "{}" in ours else found[0]).numpy()

    def heads(count: int):  # (H * Dh, D) -> (D, H, Dh)
        return lambda tensor: tensor.unflatten(0, (count, -1)).permute(2, 0, 1)

    put("img/embedding/kernel", "vision_tower.embeddings.patch_embedding.weight", lambda t: t.permute(2, 3, 1, 0))
    put("img/embedding/bias", "vision_tower.embeddings.patch_embedding.bias")
    put("img/pos_embedding", "vision_tower.embeddings.position_embedding.weight", lambda t: t[None])
    block, layer = "vision_tower.encoder.layers.{}.", "language_model.layers.{}."
    for n, norm in enumerate(("layer_norm1", "layer_norm2")):
        put(f"img/Transformer/encoderblock/LayerNorm_{n}/scale", f"{block}{norm}.weight")
        put(f"img/Transformer/encoderblock/LayerNorm_{n}/bias", f"{block}{norm}.bias")
        put(f"img/Transformer/encoderblock/MlpBlock_0/Dense_{n}/kernel", f"{block}mlp.fc{n + 1}.weight", torch.t)
        put(f"img/Transformer/encoderblock/MlpBlock_0/Dense_{n}/bias", f"{block}mlp.fc{n + 1}.bias")
    attention, count = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0", eyes.num_attention_heads
    for name in ("query", "key", "value"):
        put(f"{attention}/{name}/kernel", f"{block}self_attn.{name[0]}_proj.weight", heads(count))
        put(f"{attention}/{name}/bias", f"{block}self_attn.{name[0]}_proj.bias", lambda t: t.unflatten(0, (count, -1)))
    put(f"{attention}/out/kernel", f"{block}self_attn.out_proj.weight", lambda t: t.t().unflatten(0, (count, -1)))
    put(f"{attention}/out/bias", f"{block}self_attn.out_proj.bias")
    put("img/Transformer/encoder_norm/scale", "vision_tower.post_layernorm.weight")
    put("img/Transformer/encoder_norm/bias", "vision_tower.post_layernorm.bias")
    put("img/head/kernel", "multi_modal_projector.linear.weight", torch.t)
    put("img/head/bias", "multi_modal_projector.linear.bias")
    put("llm/embedder/input_embedding", "language_model.embed_tokens.weight")
    many, few = voice.num_attention_heads, voice.num_key_value_heads
    put("q", f"{layer}self_attn.q_proj.weight", lambda t: heads(many)(t).permute(1, 0, 2))
    for name in "kv":
        put(name, f"{layer}self_attn.{name}_proj.weight", lambda t: heads(few)(t).permute(1, 0, 2))
    arrays["params/llm/layers/attn/q_einsum/w"] = arrays.pop("params/q")
    arrays["params/llm/layers/attn/kv_einsum/w"] = np.stack([arrays.pop("params/k"), arrays.pop("params/v")], axis=1)
    put(
        "llm/layers/attn/attn_vec_einsum/w", f"{layer}self_attn.o_proj.weight", lambda t: t.t().unflatten(0, (many, -1))
    )
    put("gate", f"{layer}mlp.gate_proj.weight", torch.t)
    put("up", f"{layer}mlp.up_proj.weight", torch.t)
    arrays["params/llm/layers/mlp/gating_einsum"] = np.stack(
        [arrays.pop("params/gate"), arrays.pop("params/up")], axis=1
    )
    put("llm/layers/mlp/linear", f"{layer}mlp.down_proj.weight", torch.t)
    put("llm/layers/pre_attention_norm/scale", f"{layer}input_layernorm.weight")
    put("llm/layers/pre_ffw_norm/scale", f"{layer}post_attention_layernorm.weight")
    put("llm/final_norm/scale", "language_model.norm.weight")
    return arrays


model = load_model(FOLDER, device="cpu", dtype="float32")
here = Path(tempfile.mkdtemp())
np.savez(here / "pocket.npz", **as_big_vision(model))
shutil.copy(FOLDER / "tokenizer.json", here)
carried = load_npz(here / "pocket.npz", device="cpu")
for name, tensor in model.state_dict().items():
    assert torch.equal(carried.state_dict()[name][: len(tensor)], tensor), name
rows = carried.language_model.embed_tokens.weight
assert len(rows) == len(model.language_model.embed_tokens.weight) + 64
len(read_npz_header(here / "pocket.npz")), "arrays for", len(model.state_dict()), "tensors"

# %% [markdown]
# `sigma_book.load` takes the path of such a file like that of a folder. What this page cannot show: Google's own file
# behind its licence. The names and shapes here are those of its program, the numbers are the pocket model's.

# %% [markdown]
# ## The bill
#
# One array at a time stands in memory beside the model. Which is the largest of the 3B model? Two of the three maps of the
# MLP, for all 18 layers at once.

# %%
gates, words = 18 * 2 * 2048 * 16_384, 257_152 * 2048  # numbers in `gating_einsum` and in the table of words
assert gates > 2 * words
{f"{bits} bits": f"{gates * bits / 8 / 1e9:.2f} GB" for bits in (32, 16)}

# %%
shutil.rmtree(here)

# %% [markdown]
# ## Your turn
#
# **1.** ★ Names are paths. Make one table of a tree of tables, with `/` between the names.


# %%
def flat(tree: dict) -> dict: ...


check(flat, (({"llm": {"w": 1, "norm": {"scale": 2}}},), {"llm/w": 1, "llm/norm/scale": 2}), (({},), {}))

# %% [markdown]
# **2.** ★★ A bias comes for all layers and heads at once, (L, H, Dh), as lists in lists. Give what layer `layer` wants: one
# list of H * Dh numbers.


# %%
def bias_of(stacked: list, layer: int) -> list: ...


check(bias_of, (([[[1], [2]], [[3], [4]]], 1), [3, 4]), (([[[1, 2], [3, 4]]], 0), [1, 2, 3, 4]))

# %% [markdown]
# **3.** ★★★ An output map comes as (H, Dh, D), as lists in lists. Give it as `nn.Linear` wants it: (D, H * Dh).


# %%
def turn_output(kernel: list) -> list: ...


check(turn_output, (([[[1, 2]], [[3, 4]]],), [[1, 3], [2, 4]]), (([[[1], [2]], [[3], [4]]],), [[1, 2, 3, 4]]))

# %% [markdown]
# Next: the scores become sentences.
