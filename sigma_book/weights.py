"""Weights from a file.

How do twelve gigabytes on a disk become a model, without ever standing in memory twice?

Tangled from chapters/12_weights.py: edit there, then run python -m sigma_book.tangle.
"""

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

__all__ = [
    "BYTES",
    "DTYPES",
    "IGNORED",
    "LONGEST_HEADER",
    "RENAMED",
    "find_folder",
    "find_tensors",
    "has_bfloat16_units",
    "hub_name",
    "load_model",
    "map_file",
    "model_folder_beside",
    "open_tensor",
    "our_name",
    "pick_device",
    "pick_dtype",
    "read_config",
    "read_header",
    "save_model",
    "some_of",
    "write_json",
    "write_tensors",
]

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


class _Unfilled(TorchFunctionMode):
    """While this is on, new modules draw no random numbers: for weights that come from a file."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return options["tensor"]
        return function(*arguments, **(options or {}))


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
