"""Another house, another file.

How does a file with other names, other shapes and no configuration become the very same model?

Tangled from chapters/12b_npz.py: edit there, then run python -m sigma_book.tangle.
"""

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

__all__ = ["NPZ_DTYPES", "load_npz", "read_npz_array", "read_npz_config", "read_npz_header"]

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
