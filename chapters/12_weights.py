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
# # Weights from a file
#
# *How do twelve gigabytes on a disk become a model, without ever standing in memory twice?*
#
# **You build** the loader and its opposite. **You need** chapters 10 and 11.
# **Exports** the module `sigma_book.weights`.

# %%
# | export
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import folder_beside, read_json

# %%
import shutil
import struct
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt

from transformers import AutoModelForImageTextToText, logging

import sigma_book
from sigma_book.gemma import GemmaConfig
from sigma_book.paligemma import count_parameters
from sigma_book.siglip import SiglipConfig
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style

use_style()
_ = torch.manual_seed(0)
FOLDER = Path(sigma_book.__file__).parent / "pocket_model"

# %% [markdown]
# ## The picture
#
# A model is a program and a heap of numbers. The numbers come in files of a kind called *safetensors*. Such a file is as plain
# as can be: how long the table of contents is, the table of contents, the numbers.

# %%
path = FOLDER / "model.safetensors"
with path.open("rb") as file:
    header_length = struct.unpack("<Q", file.read(8))[0]
size = path.stat().st_size
figure, axis = plt.subplots(figsize=(6.8, 1.3))
parts = (
    ("8 bytes:\na length", 1.0, GREY),
    (f"{header_length:,} bytes:\nthe table, JSON", 1.9, PROMPT),
    (f"{size - 8 - header_length:,} bytes: numbers, one tensor behind the other", 5.0, PICTURE),
)
left = 0.0
for name, width, colour in parts:
    axis.add_patch(plt.Rectangle((left, 0), width - 0.05, 1, color=colour, lw=0))
    axis.text(
        left + width / 2,
        0.5,
        name,
        ha="center",
        va="center",
        color="black" if colour == PROMPT else "white",
        fontsize=8,
    )
    left += width
axis.set(xlim=(0, left), ylim=(-0.05, 1.05))
axis.axis("off")
save(figure, "12_file")
plt.show()

# %% [markdown]
# *Figure: the file of the pocket model as a bar: eight bytes, a table, and the numbers, which are nearly all of it. Not to scale.*
#
# The older way was a *pickle*: a file that Python runs to get its numbers back. A stranger's pickle is a stranger's program on
# your machine. This code never loads one.
#
# ## First by hand
#
# We read a file with nothing but Python. Eight bytes are a number, the lowest byte first. The table is JSON. Each entry has a
# dtype, a shape, and the two places between which its bytes lie.

# %%
with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    table = json.loads(file.read(length))
    start = 8 + length
    entry = table["multi_modal_projector.linear.bias"]
    begin, end = entry["data_offsets"]
    file.seek(start + begin)
    raw = file.read(end - begin)
entry

# %% [markdown]
# The pocket's numbers are in *bfloat16*: the upper half of a float32. So two bytes of zeros put below each make it whole
# again.

# %%
by_hand = [struct.unpack("<f", b"\x00\x00" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]
with safe_open(path, framework="pt") as file:
    expected = file.get_tensor("multi_modal_projector.linear.bias")
assert by_hand == expected.float().tolist()
[round(number, 4) for number in by_hand[:4]]

# %% [markdown]
# ## The formula
#
# $$ \mathrm{end} - \mathrm{begin} = \mathrm{bytes\ of\ a\ number} \times \prod_i \mathrm{shape}_i $$
#
# $$ \mathrm{begin}_{k+1} = \mathrm{end}_k $$
#
# Tensors follow each other without a gap, from the end of the table to the end of the file. A download that broke off, or a
# table that lies, contradicts one of these, and is told apart from a good file before a single number is read.
#
# ## Reading the table, with care

# %%
# | export
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # what a model can be stored in
BYTES = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1)  # of one number; constants may have any of these
BYTES |= dict.fromkeys(("U16", "I16", "F16", "BF16"), 2) | dict.fromkeys(("U32", "I32", "F32"), 4)
BYTES |= dict.fromkeys(("U64", "I64", "F64"), 8)
LONGEST_HEADER = 100_000_000  # bytes: the format allows no more


def read_header(path: str | Path) -> dict[str, dict]:
    """The table of contents of a safetensors file: for each tensor its dtype, shape and place in the file.

    Eight bytes say how long the header is, the header is JSON, the numbers come behind it. Everything that
    the header claims is held against the size of the file.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict
        Name to {"dtype": str, "shape": list, "data_offsets": [begin, end]}, offsets counted from the header's end.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no safetensors file, is cut off, or its header contradicts itself.
    RuntimeError
        If the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    again = "download or copy the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= min(size, LONGEST_HEADER) else b""
    except OSError as error:
        raise RuntimeError(f"{path} cannot be read ({error.strerror}): check the disk and the permissions") from error
    if size < 8:
        raise ValueError(f"{path} is {size} bytes long: a safetensors file begins with 8 bytes for its header; {again}")
    if length > size - 8:
        raise ValueError(f"{path} promises a header of {length} bytes but has only {size - 8} behind it; {again}")
    if length > LONGEST_HEADER:
        raise ValueError(f"{path} promises a header of {length} bytes: expected {LONGEST_HEADER} at most; {again}")
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not JSON ({error}); {again}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is {type(header).__name__}, expected a table of tensors; {again}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(path, name, entry)
    end_of_last = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        needed = math.prod(entry["shape"]) * BYTES[entry["dtype"]]
        if begin != end_of_last or end - begin != needed:
            raise ValueError(
                f"{path}: tensor {name} ({entry['dtype']}, {entry['shape']}) should take {needed} bytes from "
                f"{end_of_last}, the header says {begin} to {end}; {again}"
            )
        end_of_last = end
    if 8 + length + end_of_last != size:
        raise ValueError(
            f"{path} should be {8 + length + end_of_last} bytes long by its header, but is {size}; {again}"
        )
    return header


def _check_entry(path: Path, name: str, entry: dict) -> None:
    """Raise a ValueError if one line of a header has not the three things that it must have."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: tensor {name} is {entry!r:.80}: expected dtype, shape and data_offsets")
    for key, length in (("shape", None), ("data_offsets", 2)):
        numbers = entry[key]
        whole = isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
        if not whole or (length is not None and len(numbers) != length):
            raise ValueError(f"{path}: tensor {name} has the {key} {numbers!r:.80}: expected whole numbers, 0 or more")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in BYTES:
        raise ValueError(
            f"{path}: tensor {name} has the dtype {entry['dtype']!r:.80}: expected one of {', '.join(BYTES)}"
        )


# %%
header = read_header(path)
assert header == {name: entry for name, entry in table.items() if name != "__metadata__"}
len(header)

# %% [markdown]
# ## Proof
#
# The library that everyone uses sees the same tensors with the same shapes. And a file cut short is found out.

# %%
with safe_open(path, framework="pt") as file:
    assert set(file.keys()) == set(header)
    assert all(list(file.get_slice(name).get_shape()) == entry["shape"] for name, entry in header.items())

here = Path(tempfile.mkdtemp())
(here / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
try:
    read_header(here / "cut.safetensors")
    raise AssertionError("a torn file was read")
except ValueError as error:
    print(str(error).replace(str(here), "..."))

# %% [markdown]
# ## Names
#
# One tensor has had several names over the years. Files on the hub say `language_model.model.layers.0…`, newer code says
# `model.language_model.layers.0…`. One small table brings all of them to ours.

# %%
# | export
# Files spell the same tensors in several ways; each pair is (how a name may begin, how it begins here), in this order.
RENAMED = (
    ("model.", ""),
    ("vision_tower.vision_model.", "vision_tower."),
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
)
# Some files also store what is not learned, or what PaliGemma never uses: constants, and the tower's pooling head.
IGNORED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$|^vision_tower\.head\.")


def our_name(name: str) -> str:
    """The name of a stored tensor in `PaliGemma`'s state dict."""
    for old, new in RENAMED:
        if name.startswith(old):
            name = new + name[len(old) :]
    return name


def hub_name(name: str) -> str:
    """The name under which files on the hub store a tensor of `PaliGemma`'s state dict."""
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("language_model.", "language_model.model.", 1)


# %%
for name in (
    "language_model.model.layers.0.mlp.up_proj.weight",
    "model.language_model.layers.0.mlp.up_proj.weight",
    "vision_tower.vision_model.post_layernorm.bias",
):
    print(f"{name:52s} -> {our_name(name)}")
assert all(our_name(hub_name(our_name(name))) == our_name(name) for name in header)

# %% [markdown]
# ## Which folder, which device, which dtype
#
# A path is a folder, or the name of a repository on the hub. There the weights of PaliGemma lie behind a licence that each
# user accepts; where that has not been done, a sentence says how. A name such as `paligemma-3b-pt-224` says size, kind and side
# of the picture. `pt` is pretrained, made to be taught further; `mix` was taught many tasks at once and answers straight away;
# `ft` was taught one.


# %%
# | export
def find_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint: one on this machine, or one that `huggingface_hub` downloads and keeps.

    The path of an `.npz` file comes back as it is.

    Raises
    ------
    FileNotFoundError
        If there is no such folder and the text is no id on the hub, or the hub does not know it.
    RuntimeError
        If `huggingface_hub` is not installed, the licence was not accepted, or the hub cannot be reached.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.is_file():
        if folder.suffix == ".npz":
            return folder
        raise ValueError(f"{name} is a file: give the folder that holds config.json and the weights, or a .npz file")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is None:
        raise FileNotFoundError(
            f"no such folder: {name}; expected a folder, or a hub id such as google/paligemma-3b-pt-224"
        )
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise RuntimeError(
            f"no such folder: {name}; to fetch it from the hub, install the extra: pip install 'sigma-book[hub]'"
        ) from error
    page = f"https://huggingface.co/{name}"
    # of the HTTP library: a proxy that refuses, a connection that breaks
    no_answer = errors.HfHubHTTPError.__bases__[0]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_NEEDED))
    except errors.GatedRepoError as error:
        raise RuntimeError(_LICENCE.format(name=name, page=page)) from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"neither a folder nor a name that the hub allows: {name}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"neither a folder nor a repository that this account can see: {name}; look at {page}, "
            "and if it is private or asks for a licence, log in with: hf auth login"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, no_answer) as error:
        answers = (getattr(cause, "response", None) for cause in (error, error.__cause__))
        if any(getattr(answer, "status_code", None) in (401, 403) for answer in answers):
            raise RuntimeError(_LICENCE.format(name=name, page=page)) from error
        raise RuntimeError(
            f"no such folder: {name}; and the hub did not give it ({type(error).__name__}): "
            "check the connection, or give a folder"
        ) from error


_NEEDED = ("*.safetensors", "*.json", "tokenizer.model")
_LICENCE = (
    "{name} is on the hub, but not open to this account: read and accept its licence at {page}, "
    "then log in here with: hf auth login"
)


def read_config(folder: str | Path) -> PaliGemmaConfig:
    """The configuration of a checkpoint.

    Raises
    ------
    FileNotFoundError
        If the folder has no `config.json`.
    ValueError
        If it is not JSON, or describes another model.
    RuntimeError
        If it cannot be opened.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    try:
        return PaliGemmaConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; expected the configuration of a PaliGemma") from error


# %% [markdown]
# A model can compute in 32 or in 16 bits. Sixteen take half the memory. But a CPU without units that multiply 16-bit numbers
# has to imitate each product with others, so on such a machine `auto` means 32. `torch` says which units a CPU has.


# %%
# | export
def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device by name; `auto` is cuda, mps or cpu, the first that is there.

    Raises
    ------
    ValueError
        If the name is unknown.
    RuntimeError
        If the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {name!r}: expected auto, cuda, cuda:0, mps or cpu") from error
    if device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device is {name!r}: expected auto, cuda, cuda:0, mps or cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise RuntimeError(
            f"device is {str(name)!r}, but torch sees {count} cuda devices here: ask for cpu, or for auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError(f"device is {str(name)!r}, but torch sees no mps device here: ask for cpu, or for auto")
    return device


def pick_dtype(name: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by name. `auto` is the stored one, with two exceptions on a CPU, both float32.

    A CPU without units for bfloat16 only imitates it, and is slower than with float32. float16 has the same fault
    on most CPUs, and its range is too small for some of Gemma's activations.

    Parameters
    ----------
    name : str or torch.dtype
        auto, float32, bfloat16 or float16.
    stored : torch.dtype
        What the file holds.
    device : torch.device

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if isinstance(name, torch.dtype) and name in names.values():
        return name
    if name == "auto":
        slow = stored == torch.float16 or (stored == torch.bfloat16 and not has_bfloat16_units())
        return torch.float32 if device.type == "cpu" and slow else stored
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"dtype is {name!r}: expected auto, {', '.join(names)}")
    return names[name]


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 numbers itself: AVX512-BF16, AMX or AVX10.2 on x86, BF16 on ARM."""
    return any(torch.cpu.get_capabilities().get(unit) for unit in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


# %%
cpu = torch.device("cpu")
print("bf16 units here:", has_bfloat16_units(), "- so auto is", pick_dtype("auto", torch.bfloat16, cpu))
assert pick_dtype("float32", torch.bfloat16, cpu) == torch.float32

# %% [markdown]
# ## Loading without a second copy
#
# The plain way: build the model with random numbers, read the file into a dictionary, copy from one to the other. At the
# worst moment everything stands in memory twice, in the function below even three times, and the random numbers were made for
# nothing.


# %%
def load_naive(folder: Path) -> PaliGemma:
    model = PaliGemma(read_config(folder))  # once, random
    raw = (folder / "model.safetensors").read_bytes()  # twice
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in read_header(folder / "model.safetensors").items():
        begin, end = entry["data_offsets"]
        numbers = torch.frombuffer(
            bytearray(raw[start + begin : start + end]), dtype=DTYPES[entry["dtype"]]
        )  # three times
        tensors[our_name(name)] = numbers.view(entry["shape"])
    model.load_state_dict(tensors)
    return model


naive = load_naive(FOLDER)

# %% [markdown]
# Two ideas do away with the copies. On the *meta* device a tensor has a shape and no numbers: a model built there weighs
# nothing. And a file can be *mapped*: the operating system pretends that it lies in memory, and fetches a page of it when
# somebody looks there.
#
# So on the CPU, in the file's own dtype, each tensor is a window into the file, and nothing is read before it is used. When
# numbers must be converted or sent to a GPU, one window is opened at a time, the largest tensor first: then the old and the
# new form of it stand side by side while the rest of the memory is still free.
#
# A module fills itself with random numbers as soon as it is made. On the meta device there is nothing to fill, but to find
# that out PyTorch wakes its compiler, which takes longer than loading the pocket model. So we tell modules not to try.


# %%
# | export
class _Unfilled(TorchFunctionMode):
    """While this is on, new modules draw no random numbers: for weights that come from a file."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return options["tensor"]
        return function(*arguments, **(options or {}))


# %%
# | export
def load_model(
    folder: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    place: Callable[[PaliGemma, str, torch.Tensor], dict[str, torch.Tensor]] | None = None,
) -> PaliGemma:
    """A checkpoint as a model that is ready to answer: in eval mode, and frozen until `model.requires_grad_(True)`.

    The modules are built without memory, on the meta device, and each tensor takes its place straight from the
    file. On the CPU, in the stored dtype, it stays a window into the file: nothing is read before it is used.
    Else it is converted or moved, the largest tensor first, and its window is closed before the next one opens.
    A file with open windows must not be written into; replacing it by another (as `save_model` does) is safe.

    Parameters
    ----------
    folder : path
        In the Hugging Face layout: one file or shards, old or new tensor names, Gemma 1 or 2. A `model.safetensors`
        goes before an index of shards.
    device, dtype
        As `pick_device` and `pick_dtype` read them; the stored dtype is the one that most bytes have.
    place : callable, optional
        Takes the model, a name and its tensor as it comes from the file, may put another module in its place, and
        gives what that module's state dict wants to have. Without it, each tensor goes where its name says.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is damaged, or its tensors are not those of the configuration.
    RuntimeError
        If the device is not there, or a file cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    device = pick_device(device)
    with torch.device("meta"), _Unfilled():
        model = PaliGemma(config)
    places = find_tensors(folder, config, model.state_dict())
    sizes = {name: math.prod(entry["shape"]) * BYTES[entry["dtype"]] for name, (_, _, entry) in places.items()}
    dtype = pick_dtype(dtype, _most_common_dtype(places, sizes), device)
    tensors, windows = {}, {}
    with tqdm(total=sum(sizes.values()), desc="loading", unit="B", unit_scale=True, delay=1.0, disable=None) as bar:
        for name in sorted(sizes, key=sizes.get, reverse=True):  # the largest while there is still room
            path, stored_name, entry = places[name]
            stays = place is None and device.type == "cpu" and DTYPES[entry["dtype"]] == dtype
            if stays and path not in windows:
                windows[path] = map_file(path)  # one window for all that stays
            tensor = _read_tensor(windows[path] if stays else map_file(path), stored_name)
            tensor = tensor.to(device=device, dtype=dtype)
            tensors |= {name: tensor} if place is None else place(model, name, tensor)
            del tensor
            bar.update(sizes[name])
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def open_tensor(folder: str | Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, by our name, as a window into its file: what is not used is not read."""
    path, stored_name, _ = _locate_tensors(Path(folder))[name]
    return _read_tensor(map_file(path), stored_name)


def map_file(path: Path) -> safe_open:
    """A window into a file of tensors: what is not looked at is not read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be opened ({error}): download or copy the file again") from error


def _read_tensor(window: safe_open, name: str) -> torch.Tensor:
    tensor = window.get_tensor(name)
    odd = tensor.data_ptr() % tensor.element_size()  # a careless writer may begin a number between two addresses
    return tensor.clone() if odd else tensor


def _most_common_dtype(places: dict, sizes: dict[str, int]) -> torch.dtype:
    totals = dict.fromkeys(DTYPES, 0)
    for name, (_, _, entry) in places.items():
        totals[entry["dtype"]] += sizes[name]
    return DTYPES[max(totals, key=totals.get)]


def _check_tie(embedding: tuple[Path, str, dict], head: tuple[Path, str, dict]) -> None:
    """A tied head is the embedding. Files that store it all the same must store the same numbers."""
    rows, columns = (_read_tensor(map_file(path), name) for path, name, _ in (embedding, head))
    if rows.dtype != columns.dtype or not torch.equal(rows, columns):
        raise ValueError(
            f"{head[0]}: tensor {head[1]} differs from {embedding[1]}, but config.json says by tie_word_embeddings "
            "(or leaves it out, which means the same) that they are one: set it to false if the head was trained apart, "
            "or remove the tensor"
        )


def find_tensors(
    folder: Path, config: PaliGemmaConfig, expected: dict[str, torch.Tensor]
) -> dict[str, tuple[Path, str, dict]]:
    """For each tensor of a checkpoint, by our name: its file, its name there, and its entry in the header.

    Parameters
    ----------
    folder : Path
    config : PaliGemmaConfig
        What the folder's `config.json` says.
    expected : dict
        The state dict that is to be filled: names and shapes are held against it.

    Raises
    ------
    FileNotFoundError, ValueError, RuntimeError
        As `load_model`.
    """
    places = _locate_tensors(folder)
    head = places.pop("lm_head.weight", None) if config.text.tie_word_embeddings else None
    _compare(folder, places, expected)
    if head is not None:
        _check_tie(places["language_model.embed_tokens.weight"], head)
    return places


def _locate_tensors(folder: Path) -> dict[str, tuple[Path, str, dict]]:
    """For each tensor, by our name: its file, its name there, and its entry in the header."""
    index = folder / "model.safetensors.index.json"
    table: dict[str, str] = {}
    if (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table or not all(_is_file_name(name) for name in table.values()):
            raise ValueError(f"{index}: weight_map should say for each tensor which file of this folder holds it")
        files = sorted(set(table.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {some_of(missing)}, which {index.name} names among {len(files)} files: download the rest"
            )
    elif pickles := sorted(path.name for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}")):
        raise FileNotFoundError(
            f"no model.safetensors in {folder}, only {some_of(pickles)}: pickle files can run code and are never loaded; "
            "save the model as safetensors"
        )
    else:
        raise FileNotFoundError(f"no weights in {folder}: expected model.safetensors, or {index.name} and its shards")
    places: dict[str, tuple[Path, str, dict]] = {}
    for file in files:
        for stored_name, entry in read_header(folder / file).items():
            name = our_name(stored_name)
            if name in places:
                other_path, other_name, _ = places[name]
                raise ValueError(
                    f"{folder / file}: tensor {stored_name} is {other_name} of {other_path.name} once more: "
                    "expected it once"
                )
            places[name] = (folder / file, stored_name, entry)
    for stored_name, file in table.items():
        if our_name(stored_name) not in places:
            raise ValueError(
                f"{folder / file} lacks the tensor {stored_name}, which {index.name} promises: download it again"
            )
    return {name: place for name, place in places.items() if not IGNORED.search(name)}


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:")


def some_of(names: list[str]) -> str:
    """The first few names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _compare(folder: Path, places: dict, expected: dict[str, torch.Tensor]) -> None:
    if missing := sorted(expected.keys() - places.keys()):
        raise ValueError(
            f"{folder}: the weights lack {some_of(missing)}, which config.json asks for: is it their config.json?"
        )
    if unknown := sorted(places.keys() - expected.keys()):
        stored = [places[name][1] for name in unknown]
        raise ValueError(
            f"{folder}: the weights hold {some_of(stored)}, for which config.json has no place: is it theirs?"
        )
    for name, tensor in expected.items():
        path, stored_name, entry = places[name]
        if entry["shape"] != list(tensor.shape):
            raise ValueError(
                f"{path}: tensor {stored_name} has the shape {entry['shape']}, "
                f"config.json asks for {list(tensor.shape)}"
            )
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: tensor {stored_name} is {entry['dtype']}: expected one of {', '.join(DTYPES)}")


# %%
config = read_config(FOLDER)
with torch.device("meta"):
    empty = PaliGemma(config)
assert next(empty.parameters()).is_meta
model = load_model(FOLDER, device="cpu", dtype="float32")
assert model.multi_modal_projector.linear.bias.tolist() == by_hand
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), naive.parameters(), strict=True))
f"{count_parameters(model):,} parameters"

# %% [markdown]
# A window has its price: whoever writes into the file changes the model. To put another file in its place is harmless, since
# the windows still look at the old one, which lives on without a name. That is how the next function works.
#
# ## Writing it back
#
# A model is written as a folder that `transformers` reads too. It is made beside its place and then moved into it, as chapter 11
# does it. A disk that is full is noticed before anything old is gone.


# %%
# | export
def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file, converting one tensor at a time.

    Parameters
    ----------
    path : path
    tensors : dict
        By the names they get in the file.
    dtype : torch.dtype
        float32, bfloat16 or float16, for all of them.
    """
    code = {value: key for key, value in DTYPES.items()}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without this format
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # so that the numbers begin at a multiple of 8
    with Path(path).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            ready = tensor.detach().to("cpu", dtype).contiguous()
            file.write(ready.flatten().view(torch.uint8).numpy())


# %%
# | export
def save_model(
    model: PaliGemma,
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model as a folder that this code and `transformers` load: the configuration and the weights.

    All files are written in a folder beside the wanted one, then moved. A new folder appears whole, or not at all;
    in one that exists, files of these names are replaced once all the new ones are written, the weights of a former
    save go, and other files stay.

    Parameters
    ----------
    model : PaliGemma
    folder : path
        Made if need be.
    dtype : str or torch.dtype, optional
        float32, bfloat16 or float16, to convert to on the way; the model's own by default.
    max_shard_bytes : int
        Tensors are spread over files of at most this many bytes each; a larger tensor has a file of its own.

    Raises
    ------
    ValueError
        If `folder` is a file, the dtype is unknown, `max_shard_bytes` is no whole number or below 1, or the model has an
        adapter beside its weights or weights in fewer bits.
    RuntimeError
        If the files cannot be written.
    """
    folder = Path(folder)
    if type(max_shard_bytes) not in (int, float) or not max_shard_bytes >= 1 or max_shard_bytes % 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes!r}: expected a whole number of bytes, 1 or more")
    with torch.device("meta"):
        plain = PaliGemma(model.config).state_dict().keys()
    if changed := sorted(model.state_dict().keys() ^ plain):
        raise ValueError(
            f"this model is not a plain PaliGemma ({some_of(changed)}): merge its adapter, or save that alone"
        )
    weight = model.language_model.embed_tokens.weight
    dtype = pick_dtype(weight.dtype if dtype is None else dtype, weight.dtype, weight.device)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][hub_name(name)] = tensor
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    ids = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if stops := getattr(model, "stop_ids", None):  # as `load` found them: an answer may end in several ways
        ids["eos_token_id"] = list(stops) if len(stops) > 1 else stops[0]
    with model_folder_beside(folder) as fresh:
        for name, shard in zip(names, shards, strict=True):
            write_tensors(fresh / name, shard, dtype)
        if len(shards) > 1:
            total = sum(tensor.numel() for shard in shards for tensor in shard.values()) * dtype.itemsize
            table = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            write_json(fresh / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": table})
        write_json(fresh / "config.json", config)
        write_json(fresh / "generation_config.json", ids)


@contextmanager
def model_folder_beside(folder: Path) -> Iterator[Path]:
    """`folder_beside` for a model: weights of a former save would contradict the new ones, so they go.

    Raises
    ------
    ValueError, RuntimeError
        As `folder_beside`.
    """
    with folder_beside(folder) as fresh:
        yield fresh
        written = {path.name for path in fresh.iterdir()}
    if any(map(_WEIGHTS.fullmatch, written)):
        for old in folder.iterdir():
            if _WEIGHTS.fullmatch(old.name) and old.name not in written:
                old.unlink()


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# %%
logging.disable_progress_bar()
save_model(model, here / "copy")
theirs = AutoModelForImageTextToText.from_pretrained(here / "copy", dtype=torch.float32).eval()
for name, tensor in theirs.state_dict().items():
    if our_name(name) != "lm_head.weight":
        assert torch.equal(tensor, model.state_dict()[our_name(name)]), name
sorted(path.name for path in (here / "copy").iterdir())

# %% [markdown]
# Large models are spread over several files, *shards*, with an index that says where each tensor lies. Writing 16 bits loses
# nothing here, because the pocket's numbers came from 16 bits.

# %%
save_model(model, here / "shards", dtype=torch.bfloat16, max_shard_bytes=2_000_000)
again = load_model(here / "shards", device="cpu", dtype="float32")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
sorted(path.name for path in (here / "shards").glob("*.safetensors"))

# %% [markdown]
# ## Proof: never two copies
#
# How much memory does loading take? We let three fresh Python processes load a model, one in the plain way, one in ours, one
# in ours with all numbers turned into bfloat16. The operating system knows the most that each ever held.

# %%
medium = PaliGemmaConfig(
    SiglipConfig(256, 512, 4, 4, image_size=28, patch_size=14),
    GemmaConfig(512, 4096, 6, 4, 1, 64, 20_000),
    image_token_id=19_999,
)
save_model(PaliGemma(medium), here / "medium")
BEGIN = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from sigma_book.paligemma import PaliGemma
from sigma_book.weights import load_model, our_name, read_config

def held(key):  # VmRSS: memory held now; VmHWM: the most so far. Linux tells both, elsewhere we know the second
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

folder, tiny = sys.argv[1:]
load_model(tiny, "cpu")  # code and buffers that every model needs
before = held("VmRSS")
"""
PLAIN = """
model = PaliGemma(read_config(folder))
tensors = {our_name(name): tensor for name, tensor in load_file(folder + "/model.safetensors").items()}
model.load_state_dict(tensors)
"""
OURS = """
model = load_model(folder, "cpu", "{}")
[parameter.sum() for parameter in model.parameters()]  # look at every number
"""
END = "print((held('VmHWM') - before) / sum(p.nbytes for p in model.parameters()))"


def peak(way: str) -> float:
    command = [sys.executable, "-c", BEGIN + way + END, str(here / "medium"), str(here / "copy")]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


ways = {"plain": PLAIN, "ours": OURS.format("float32"), "ours, to bfloat16": OURS.format("bfloat16")}
peaks = {name: peak(way) for name, way in ways.items()}
assert peaks["plain"] > 1.9 and peaks["ours"] < 1.15 and peaks["ours, to bfloat16"] < 1.15
figure, axis = plt.subplots(figsize=(5.6, 1.7))
bars = axis.barh(list(peaks), list(peaks.values()), color=[PROMPT, PICTURE, PICTURE])
axis.bar_label(bars, fmt="%.2f", padding=3)
axis.axvline(1, color=GREY, ls="--", lw=1)
axis.set(xlabel="most memory ever held / size of the weights")
axis.invert_yaxis()
save(figure, "12_peak")
plt.show()

# %% [markdown]
# *Figure: three bars. The plain way holds the weights twice, ours hardly more than once (dashed line), converted or not.*

# %% [markdown]
# ## A look inside
#
# Where do the bytes of the file lie? Each strip is a tensor, in the order of the file.

# %%
kinds = {"vision_tower": PICTURE, "multi_modal_projector": ANSWER, "language_model": PROMPT}
ends = {kind: [] for kind in kinds}
figure, axis = plt.subplots(figsize=(6.8, 1.2))
for name, entry in header.items():
    begin, end = (offset / 1e6 for offset in entry["data_offsets"])
    kind = next(kind for kind in kinds if our_name(name).startswith(kind))
    axis.barh(0, end - begin, left=begin, color=kinds[kind], edgecolor="white", linewidth=0.3)
    ends[kind] += [begin, end]
for (kind, colour), side in zip(kinds.items(), ("left", "left", "right")):
    axis.text(min(ends[kind]) if side == "left" else max(ends[kind]), 0.62, kind, color=colour, ha=side, fontsize=8)
axis.set(xlabel="megabytes", yticks=[], ylim=(-0.45, 0.85))
axis.spines["left"].set_visible(False)
save(figure, "12_map")
plt.show()

# %% [markdown]
# *Figure: the file as a strip, cut by tensor and coloured by part: most is decoder, and its single largest tensor is the table of words.*
#
# ## The bill

# %%
large = 2_923_466_480  # PaliGemma 3B, counted in chapter 10
bill = {f"3B, {bits} bits": f"{large * bits / 8 / 1e9:.2f} GB" for bits in (32, 16)}
assert bill == {"3B, 32 bits": "11.69 GB", "3B, 16 bits": "5.85 GB"}
small = count_parameters(model)
bill |= {f"pocket, {bits} bits": f"{small * bits / 8 / 1e6:.2f} MB" for bits in (32, 16)}
assert small * 2 == path.stat().st_size - 8 - header_length  # the file is the numbers, and a table
bill

# %% [markdown]
# From a disk that reads a gigabyte a second, the large model in 16 bits takes six seconds. No program can be faster than its
# disk.

# %%
shutil.rmtree(here)

# %% [markdown]
# ## Your turn
#
# **1.** ★ How many bytes does a tensor take, from its dtype and shape?


# %%
def tensor_bytes(dtype: str, shape: list) -> int: ...


check(tensor_bytes, (("F32", [2, 3]), 24), (("BF16", [257_216, 2048]), 1_053_556_736))

# %% [markdown]
# **2.** ★★ Into how many shards of at most `most` bytes do tensors of these sizes go, in order? (A tensor is never cut.)


# %%
def shard_count(sizes: list, most: int) -> int: ...


check(shard_count, (([4, 4, 4], 8), 2), (([10, 1], 8), 2), (([6, 4, 2, 4], 8), 3), (([1, 1, 1], 8), 1))

# %% [markdown]
# **3.** ★★ A float32 whose lower 16 bits are thrown away: what does 1.015 become in bfloat16, cut and not rounded?


# %%
def cut_to_bfloat16(number: float) -> float: ...


check(cut_to_bfloat16, ((1.015,), 1.0078125), ((100.3,), 100.0), ((-0.3,), -0.298828125))

# %% [markdown]
# Next: the same model, in a file of another program.
