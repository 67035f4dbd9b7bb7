"""Weights from a file.

How do twelve gigabytes on a disk become a model, without ever standing in memory twice?

Tangled from chapters/12_weights.py: edit there, then run python -m sigma_book.tangle.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from sigma_book.paligemma import PaliGemma, PaliGemmaConfig

__all__ = [
    "BYTES",
    "DTYPES",
    "RENAMED",
    "find_folder",
    "hub_name",
    "load_model",
    "our_name",
    "pick_device",
    "pick_dtype",
    "read_config",
    "read_header",
    "save_model",
]

# Files spell the same tensors in several ways; each pair is (how a name may begin, how it begins here), in this order.
RENAMED = (
    ("model.", ""),
    ("vision_tower.vision_model.", "vision_tower."),
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


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
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    again = "download or copy the file again"
    if size < 8:
        raise ValueError(f"{path} is {size} bytes long: a safetensors file begins with 8 bytes for its header; {again}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path} promises a header of {length} bytes but has only {size - 8} behind it; {again}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}: the header is not JSON ({error}); {again}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a table of tensors; {again}")
    header.pop("__metadata__", None)
    end_of_last = 0
    for name, entry in sorted(header.items(), key=_begin):
        dtype, shape, (begin, end) = _entry(path, name, entry)
        if dtype not in BYTES:
            raise ValueError(f"{path}: tensor {name} has the dtype {dtype!r}, which this code does not know")
        count = 1
        for extent in shape:
            count *= extent
        if begin != end_of_last or end - begin != count * BYTES[dtype]:
            raise ValueError(
                f"{path}: tensor {name} ({dtype}, {shape}) should take {count * BYTES[dtype]} bytes from {end_of_last}, "
                f"the header says {begin} to {end}; {again}"
            )
        end_of_last = end
    if 8 + length + end_of_last != size:
        raise ValueError(
            f"{path} should be {8 + length + end_of_last} bytes long by its header, but is {size}; {again}"
        )
    return header


def _begin(item: tuple[str, dict]) -> int:
    try:
        return int(item[1]["data_offsets"][0])
    except (KeyError, TypeError, ValueError, IndexError):
        return -1


def _entry(path: Path, name: str, entry: dict) -> tuple[str, list[int], tuple[int, int]]:
    try:
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        whole = [begin, end, *shape]
        if not all(type(number) is int and number >= 0 for number in whole):
            raise ValueError("a negative or broken number")
        return entry["dtype"], shape, (begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the header's entry for {name} cannot be read ({error})") from error


def find_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint: one on this machine, or one that `huggingface_hub` downloads and keeps.

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
        raise ValueError(f"{name} is a file: give the folder that holds config.json and the weights")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such folder: {name}")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise RuntimeError(
            f"no such folder: {name}; to fetch it from the hub, install the extra: pip install 'sigma-book[hub]'"
        ) from error
    try:
        patterns = ["*.safetensors", "*.json", "tokenizer.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise RuntimeError(
            f"{name} is there, but its licence was not accepted by this account: open https://huggingface.co/{name}, "
            "accept it, then log in here with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"neither a folder nor a repository that this account can see: {name}; for a private one, `hf auth login`"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise RuntimeError(
            f"{name} could not be fetched from the hub ({type(error).__name__}): try again later"
        ) from error


def read_config(folder: str | Path) -> PaliGemmaConfig:
    """The configuration of a checkpoint.

    Raises
    ------
    FileNotFoundError
        If the folder has no `config.json`.
    ValueError
        If it is not JSON, or describes another model.
    """
    path = Path(folder) / "config.json"
    values = _read_json(path)
    try:
        return PaliGemmaConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:  # the last two: a list or a number where a table belongs
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}: expected a PaliGemma folder in the Hugging Face layout"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a table of keys and values")
    return values


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
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: expected auto, cuda, cuda:0, mps or cpu") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"device {name} was asked for, but torch sees {torch.cuda.device_count()} of them: use cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError("device mps was asked for, but this machine has none: use cpu")
    return device


def pick_dtype(name: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by name; `auto` is the file's, but float32 on a processor that has no units for 16 bits.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in names.values():
        return name
    if name != "auto":
        if name not in names:
            raise ValueError(f"dtype is {name!r}: expected auto, {', '.join(names)}")
        return names[name]
    if device.type == "cpu" and (stored == torch.float16 or not _has_bfloat16_units()):
        return torch.float32
    return stored


def _has_bfloat16_units() -> bool:
    """Whether products of bfloat16 matrices are fast here: on x86 AVX512-BF16 or AMX, on ARM not asked for."""
    asked = (getattr(torch.cpu, f"_is_{unit}_supported", None) for unit in ("avx512_bf16", "amx_tile"))
    return any(question is not None and question() for question in asked)


def load_model(folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> PaliGemma:
    """A checkpoint as a model that is ready to answer (in eval mode).

    The modules are built without memory, on the meta device; each tensor is then mapped from its file, converted
    and moved, and takes its place: never are there two copies of the model.

    Parameters
    ----------
    folder : path
        In the Hugging Face layout: one file or shards, old or new tensor names, Gemma 1 or 2.
    device, dtype
        As `pick_device` and `pick_dtype` read them.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is damaged, or its tensors are not those of the configuration.
    """
    folder = Path(folder)
    config = read_config(folder)
    device = pick_device(device)
    places = _locate_tensors(folder)
    if config.text.tie_word_embeddings:
        places.pop("lm_head.weight", None)  # a tied head is the embedding; some files store it twice
    with torch.device("meta"):
        model = PaliGemma(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _compare(folder, places, expected)
    stored = DTYPES[places["language_model.embed_tokens.weight"][2]["dtype"]]
    dtype = pick_dtype(dtype, stored, device)
    tensors = {}
    by_file: dict[Path, list[str]] = {}
    for name, (path, _, _) in places.items():
        by_file.setdefault(path, []).append(name)
    with tqdm(total=len(places), desc="loading", unit="tensor", delay=1.0) as bar:
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    tensor = file.get_tensor(places[name][1])
                    tensors[name] = tensor.to(device=device, dtype=dtype)
                    bar.update()
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _locate_tensors(folder: Path) -> dict[str, tuple[Path, str, dict]]:
    """For each tensor, by our name: its file, its name there, and its entry in the header."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = _read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{index} has no weight_map: expected a table of tensors and their files")
        files = sorted(set(table.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: {', '.join(missing)} of {len(files)} shards missing, which {index.name} names"
            )
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise FileNotFoundError(
            f"no model.safetensors in {folder}: the .bin, .pt and .pth files there are pickles, which can run code and are "
            "never loaded; convert them to safetensors first"
        )
    else:
        raise FileNotFoundError(f"no weights in {folder}: expected model.safetensors, or model.safetensors.index.json")
    places: dict[str, tuple[Path, str, dict]] = {}
    for file in files:
        for name, entry in read_header(folder / file).items():
            if name.endswith("position_ids"):  # older files store these constants
                continue
            if our_name(name) in places:
                raise ValueError(f"{folder}: tensor {name} stands in {places[our_name(name)][0].name} and in {file}")
            places[our_name(name)] = (folder / file, name, entry)
    if index.exists():
        lost = [name for name in table if our_name(name) not in places and not name.endswith("position_ids")]
        if lost:
            raise ValueError(f"{folder}: tensor {lost[0]} is named by {index.name}, but is not in {table[lost[0]]}")
    return places


def _compare(folder: Path, places: dict, expected: dict[str, tuple[int, ...]]) -> None:
    def some(names: set[str]) -> str:
        names = sorted(names)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    if missing := expected.keys() - places.keys():
        raise ValueError(f"{folder}: the weights lack {some(missing)}, which config.json asks for")
    if unknown := places.keys() - expected.keys():
        raise ValueError(f"{folder}: the weights hold {some(unknown)}, which the model of config.json does not have")
    for name, shape in expected.items():
        path, stored_name, entry = places[name]
        if tuple(entry["shape"]) != shape:
            raise ValueError(
                f"{path}: tensor {stored_name} has the shape {entry['shape']}, config.json asks for {list(shape)}"
            )
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: tensor {stored_name} is {entry['dtype']}, expected one of {', '.join(DTYPES)}")


def save_model(
    model: PaliGemma, folder: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a model as a folder that this code and `transformers` load. Each file is written beside its place, then moved.

    Parameters
    ----------
    model : PaliGemma
    folder : path
        Made if need be; files of the same names are replaced.
    dtype : torch.dtype, optional
        To convert to on the way; the model's own by default.
    max_shard_bytes : int
        Tensors are spread over files of at most this size each.
    """
    folder = Path(folder)
    weight = model.language_model.embed_tokens.weight
    dtype = weight.dtype if dtype is None else dtype
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][hub_name(name)] = tensor
        room -= size
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    ids = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with _beside(folder) as fresh:
        (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        (fresh / "generation_config.json").write_text(json.dumps(ids, indent=2))
        table = {}
        for number, shard in enumerate(shards, start=1):
            many = len(shards) > 1
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
            tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in shard.items()}
            save_file(tensors, fresh / name, metadata={"format": "pt"})
            table |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            total = sum(tensor.numel() for tensor in model.state_dict().values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": table}
            (fresh / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder next to the wanted one, whose files move into it once all are written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield fresh
        folder.mkdir(exist_ok=True)
        written = {path.name for path in fresh.iterdir()}
        for path in sorted(fresh.iterdir()):
            os.replace(path, folder / path.name)
        for old in folder.glob("model*.safetensors*"):  # shards of a former shape would contradict the new ones
            if old.name not in written:
                old.unlink()
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
