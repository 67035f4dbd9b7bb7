"""From files to tensors.

How do a JPEG and a sentence become the numbers that the model was trained on?

Tangled from chapters/11_processor.py: edit there, then run python -m sigma_book.tangle.
"""

import io
import itertools
import json
import os
import re
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

__all__ = [
    "Batch",
    "Processor",
    "SharedContext",
    "Tokenizer",
    "encode_picture",
    "file_beside",
    "folder_beside",
    "load_image",
    "make_folder",
    "pixels",
    "read_file",
    "read_json",
    "to_disk",
]


def load_image(source: "str | Path | bytes | np.ndarray | Image.Image") -> Image.Image:
    """Any picture as RGB: turned as its EXIF says, transparency over white, 16 bits scaled to 8.

    Parameters
    ----------
    source : path, bytes, array or PIL image
        Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); uint8, uint16, or floats from 0 to 1.

    Returns
    -------
    PIL.Image.Image
        Mode RGB. Of an animation, the first frame.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no picture, is cut off, or is too large to be safe; if an array has another shape or type.
    RuntimeError
        If the file is there and cannot be opened.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(_unpack(source, "this picture"), "this picture")
    if isinstance(source, bytes | bytearray):
        return _to_rgb(_unpack(io.BytesIO(source), "this picture in bytes"), "this picture in bytes")
    if not isinstance(source, str | Path):
        raise ValueError(f"a picture is a path, bytes, an array or a PIL image, got {type(source).__name__}")
    path = Path(source)
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the path of a picture")
        if not path.exists():
            raise FileNotFoundError(f"no such file: {path}")
        if not path.is_file():  # a pipe, say, on which one may wait for ever
            raise ValueError(f"{path} is no file: give the path of a picture")
        file = path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RuntimeError(
            f"{str(path):.200} cannot be opened ({error.strerror}): check path and permissions"
        ) from error
    with file:
        return _to_rgb(_unpack(file, str(path)), str(path))


class SharedContext:
    """A context that sets something of the whole process: made when the first thread enters, undone when the last leaves.

    `make` gives the context. (Two threads that each keep what was set before, and put it back, leave the wrong one behind.)
    """

    def __init__(self, make: Callable[[], AbstractContextManager]):
        self._make, self._lock, self._threads = make, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._threads == 0:
                self._context = self._make()
                self._context.__enter__()
            self._threads += 1

    def __exit__(self, *failure) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                self._context.__exit__(None, None, None)


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_QUIET = SharedContext(_no_warnings)  # Pillow remarks on notes in files that nobody here reads


def _unpack(file: "io.BufferedIOBase | Image.Image", name: str) -> Image.Image:
    """All pixels of a picture, right side up; one sentence for whatever Pillow raises on the way."""
    with _QUIET:
        try:
            image = file if isinstance(file, Image.Image) else Image.open(file)
            if image.format == "EPS":  # a program rather than a picture: Pillow would have Ghostscript run it
                raise UnidentifiedImageError
            _refuse_bombs(image)
            stored = image.tile[0][3] if getattr(image, "tile", None) else None
            image.load()
            _refuse_bombs(image)  # of a file that holds several sizes, the true one is known now
            if stored in ("L;2", "L;4") and isinstance(image.info.get("transparency"), int):
                image.info["transparency"] *= {"L;2": 85, "L;4": 17}[stored]  # as Pillow did to the pixels
            turn = _turn(image)
            return image if turn is None else image.transpose(turn)
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"{name} would unpack to more than {Image.MAX_IMAGE_PIXELS:,} pixels: reduce the picture first"
            ) from error
        except UnidentifiedImageError as error:
            raise ValueError(f"{name} is not a picture that can be read: give a JPEG, PNG, WebP, GIF or BMP") from error
        except Exception as error:  # on damaged files Pillow raises nearly every kind there is
            raise ValueError(f"{name} is damaged or cut off ({error}): get a whole copy of the picture") from error


def _refuse_bombs(image: Image.Image) -> None:
    """Pillow only warns up to twice its limit."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What the note on turning asks for; nothing if the note cannot be read: the pixels are whole without it."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as many kinds as with damaged files
        return None


# what the note says: how the camera was held; and what undoes it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width} x {image.height} pixels: expected at least one")
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image, name)
    if image.has_transparency_data:
        try:
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        except (TypeError, ValueError):  # its note on transparency is left from another mode and says nothing here
            image = image.copy()
            image.info.pop("transparency", None)
    upright = image.convert("RGB")  # a picture of its own, whatever the mode was
    upright.info = {}  # the note on turning among it is used up: who loads this again shall not turn it again
    return upright


def _from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Whole numbers are taken for 16 bits. For floats white is 1, 255 or 65535, the first that none exceeds."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} has grey values outside 0 to 65535: scale them to 8 or 16 bits first")
    white = 65535
    if image.mode == "F":
        white = next(limit for limit in (1, 255, 65535) if values.max() <= limit)
    elif "transparency" in image.info:  # one grey value that stands for nothing
        values = np.where(values == image.info["transparency"], white, values)
    return Image.fromarray(np.round(values / (white / 255)).astype(np.uint8)).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(
            f"an array of shape {array.shape} is no picture: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    if np.issubdtype(array.dtype, np.uint16):  # of either byte order
        array = np.round(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("an array of floats must hold numbers from 0 to 1: divide by 255, or give uint8")
        array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype} is no picture: expected uint8, uint16, or floats from 0 to 1")
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "this array")


def pixels(image: Image.Image, size: int) -> torch.Tensor:
    """An RGB picture as the tower wants it: squeezed to a square, bicubic with antialiasing, from -1 to 1.

    Parameters
    ----------
    image : PIL.Image.Image
        Mode RGB, any size; its aspect ratio is not kept.
    size : int
        Side S in pixels.

    Returns
    -------
    torch.Tensor
        (3, S, S), float32.

    Raises
    ------
    ValueError
        If the picture has another mode than RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"the picture has mode {image.mode}, expected RGB: open it with load_image")
    square = image.resize((size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()  # (3, S, S)
    return values * (1 / 255) / 0.5 - 1.0


class Tokenizer:
    """Text to token ids and back, from `tokenizer.json`, or from `tokenizer.model` and what was added to it.

    Special tokens typed as text (`<bos>`, `<eos>`, `<pad>`) become those tokens, as in the reference.
    `<loc....>` and `<seg...>` are one token each, and are kept when ids are decoded.
    """

    def __init__(self, backend: "_Json | _Model", files: dict[str, bytes]):
        self._backend = backend
        self.files = files
        self.vocab_size = len(backend)
        self.pad_id, self.eos_id, self.bos_id = (self.token_id(piece) for piece in ("<pad>", "<eos>", "<bos>"))
        self.image_id = self.token_id("<image>")
        silent = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<image>")
        self._silent = {backend.token_to_id(piece) for piece in silent}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint.

        Raises
        ------
        FileNotFoundError
            If the folder has neither `tokenizer.json` nor `tokenizer.model`.
        ValueError
            If a file is damaged, or a token is missing that PaliGemma needs.
        RuntimeError
            If a file is there and cannot be opened.
        """
        folder = Path(folder)
        names = (
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
        )
        files = {name: read_file(folder / name) for name in names if (folder / name).exists()}
        kind = next((name for name in ("tokenizer.json", "tokenizer.model") if name in files), None)
        if kind is None:
            raise FileNotFoundError(
                f"no tokenizer in {folder}: expected tokenizer.json or tokenizer.model, as the checkpoint's page has them"
            )
        try:
            backend = _Json(files[kind]) if kind == "tokenizer.json" else _Model(files[kind])
        except Exception as error:  # both libraries raise bare errors
            raise ValueError(f"{folder / kind} is not a tokenizer that can be read: {error}") from error
        if "added_tokens.json" in files:
            _add_listed(backend, folder / "added_tokens.json")
        if "tokenizer_config.json" in files:
            _add_declared(backend, folder / "tokenizer_config.json")
        # in the order in which the reference adds them: a plain Gemma tokenizer lacks them, and one of PaliGemma's has them
        # in its vocabulary, where no merge leads to them
        backend.add(["<image>", *(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128))])
        for piece in ("<pad>", "<eos>", "<bos>"):
            if backend.token_to_id(piece) is None:
                raise ValueError(f"{folder / kind} has no piece {piece}: expected the tokenizer of a PaliGemma")
        return cls(backend, files)

    def token_id(self, piece: str) -> int:
        """The id of one piece, such as `<loc0001>`.

        Raises
        ------
        ValueError
            If the vocabulary has no such piece.
        """
        token = self._backend.token_to_id(piece)
        if token is None:
            raise ValueError(f"the tokenizer has no piece {piece!r}")
        return token

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands: no beginning, no end.

        Raises
        ------
        ValueError
            If the text holds lone surrogates, which are halves of characters and come of bytes that are not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {text!r:.80} has a lone surrogate at place {error.start}: expected text read as UTF-8"
            ) from error
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids.

        Pieces of bytes join to characters; where they do not, each byte is a replacement character. Pad, bos, eos, unk,
        mask and image tokens are left out by default; ids beyond the vocabulary always are, for they say nothing.

        Raises
        ------
        ValueError
            If an id is negative, such as the -100 of labels.
        """
        ids = [int(token) for token in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"{min(ids)} is no token id: expected 0 or more (take the -100 out of labels first)")
        ids = [token for token in ids if token < self.vocab_size]
        if skip_special_tokens:
            ids = [token for token in ids if token not in self._silent]
        return self._backend.decode(ids)


def _add_listed(backend: "_Json | _Model", path: Path) -> None:
    """Add the pieces that `added_tokens.json` lists, and see that they get the ids it gives."""
    added = read_json(path)
    if not all(type(token) is int for token in added.values()):
        raise ValueError(f"{path} has an id that is no whole number: expected pieces and their ids")
    backend.add(sorted(added, key=added.get))
    for piece, token in added.items():
        if backend.token_to_id(piece) != token:
            raise ValueError(
                f"{path}: {piece} is {token}, but would become {backend.token_to_id(piece)}: "
                "the file does not belong to this tokenizer"
            )


def _add_declared(backend: "_Json | _Model", path: Path) -> None:
    """Add the pieces that `tokenizer_config.json` says were added, in the order of their ids."""
    declared = read_json(path).get("added_tokens_decoder") or {}
    try:
        backend.add([one["content"] for _, one in sorted(declared.items(), key=lambda item: int(item[0]))])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path}: "added_tokens_decoder" is no table of ids and {{"content": piece}}') from error


def read_file(path: Path) -> bytes:
    """A file of a checkpoint's folder.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    RuntimeError
        If it is there and cannot be opened.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}: expected a PaliGemma folder in the Hugging Face layout"
        ) from error
    except OSError as error:
        raise RuntimeError(f"{path} cannot be read ({error.strerror}): check the disk and the permissions") from error


def read_json(path: Path) -> dict:
    """A JSON file that holds a table, with the errors of `read_file`, or a ValueError if it holds something else."""
    try:
        values = json.loads(read_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download or copy the file again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is {type(values).__name__}: expected a table of keys and values")
    return values


class _Json:
    """`tokenizer.json`, through the tokenizers library."""

    def __init__(self, content: bytes):
        self._library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self._library.no_padding()
        self._library.no_truncation()
        self.token_to_id = self._library.token_to_id

    def __len__(self) -> int:
        return self._library.get_vocab_size()

    def add(self, pieces: list[str]) -> None:
        # one that is in the vocabulary keeps its id, and is cut out whole from now on
        self._library.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in pieces])

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)


class _Model:
    """`tokenizer.model`, through SentencePiece; added, control and unknown pieces are cut out of the text first."""

    def __init__(self, content: bytes):
        self._library = sentencepiece.SentencePieceProcessor(model_proto=content)
        size = self._library.get_piece_size()
        if size == 0:
            raise ValueError("it holds no pieces")
        self._pieces = [self._library.id_to_piece(index) for index in range(size)]
        self._bytes = {index for index in range(size) if self._library.is_byte(index)}
        cut = [i for i in range(size) if self._library.is_control(i) or self._library.is_unknown(i)]
        self._cut = {self._pieces[index]: index for index in cut}

    def __len__(self) -> int:
        return len(self._pieces)

    def token_to_id(self, piece: str) -> int | None:
        if piece in self._cut:
            return self._cut[piece]
        index = self._library.piece_to_id(piece)
        return index if self._pieces[index] == piece else None

    def add(self, pieces: list[str]) -> None:
        for piece in pieces:
            token = self.token_to_id(piece)
            if token is None:
                self._cut[piece] = len(self._pieces)
                self._pieces.append(piece)
            elif self._library.encode(piece) != [token]:  # in the vocabulary, and not found whole
                self._cut[piece] = token

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        longest_first = sorted(self._cut, key=len, reverse=True)
        for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
            ids += [self._cut[part]] if part in self._cut else self._library.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        text = ""
        for is_bytes, run in itertools.groupby(ids, key=self._bytes.__contains__):
            pieces = [self._pieces[token] for token in run]
            if not is_bytes:
                text += "".join(pieces).replace("▁", " ")
                continue
            try:
                text += bytes(int(piece[3:5], 16) for piece in pieces).decode("utf-8")  # a piece reads <0x41>
            except UnicodeDecodeError:
                text += "\ufffd" * len(pieces)
        return text


@dataclass(frozen=True)
class Batch:
    """What the model reads: ids, masks and types (B, T), pictures (N, 3, S, S), and labels (B, T) for training."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    pixel_values: torch.Tensor
    labels: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """A name next to the wanted one, for a file that moves into place once it is written and on the disk.

    The name is always the same, so that what a kill leaves behind is written over by the next try.

    Raises
    ------
    RuntimeError
        If it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.part")
    try:
        yield fresh
        to_disk(fresh)
        os.replace(fresh, path)
    except OSError as error:
        raise RuntimeError(_NOT_WRITTEN.format(path, error.strerror or error)) from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


@contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder next to the wanted one. Once all in it is on the disk it moves into place.

    Where there is such a folder, the new files move into it, and others stay.

    Raises
    ------
    ValueError
        If `folder` is a file.
    RuntimeError
        If it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: expected a folder to write to, or a name that is free")
    folder = folder.resolve()
    fresh = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            to_disk(path)
        if folder.exists():
            for path in sorted(fresh.iterdir(), reverse=True):  # the weights before the configuration
                os.replace(path, folder / path.name)
        else:
            os.replace(fresh, folder)
        to_disk(folder.parent)  # the new name too
    except OSError as error:
        raise RuntimeError(_NOT_WRITTEN.format(folder, error.strerror or error)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def encode_picture(picture: Image.Image, kind: str) -> bytes:
    """A picture as the bytes of a file, such as PNG; Pillow does not notice a full disk when it writes by itself."""
    encoded = io.BytesIO()
    picture.save(encoded, kind)
    return encoded.getvalue()


def make_folder(path: Path) -> None:
    """Make a folder and those above it; one that is there stays as it is.

    Raises
    ------
    RuntimeError
        If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(_NOT_WRITTEN.format(path, error.strerror or error)) from error


_NOT_WRITTEN = "{} cannot be written ({}): check the room and the permissions, then try again"


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's table of names, is on the disk."""
    if os.name == "nt":  # Windows has no such call for folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Processor:
    """Pictures and prompts to a batch, and ids back to text.

    Parameters
    ----------
    tokenizer : Tokenizer
    image_size : int
        Side S of the square that the tower sees.
    num_image_tokens : int
        P, placeholders for each picture.
    """

    def __init__(self, tokenizer: Tokenizer, image_size: int, num_image_tokens: int):
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Processor":
        """Read a checkpoint's tokenizer, and the size of its pictures from `config.json`.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If pictures are to be prepared in a way that this code does not have.
        RuntimeError
            If a file is there and cannot be opened.
        """
        folder = Path(folder)
        tokenizer = Tokenizer.from_folder(folder)
        path = folder / "config.json"
        vision = read_json(path).get("vision_config")
        if not isinstance(vision, dict | None):
            raise ValueError(f"{path}: vision_config is {vision!r:.80}, expected a table of sizes")
        # as in chapter 10: a part left out whole means something else than a part without a size
        sizes = {"image_size": 224, "patch_size": 14 if vision is None else 16} | (vision or {})
        for key in ("image_size", "patch_size"):
            if type(sizes[key]) is not int or sizes[key] < 1:
                raise ValueError(f"{path}: {key} is {sizes[key]!r:.80}, expected a whole number, 1 or more")
        side, num_image_tokens = sizes["image_size"], (sizes["image_size"] // sizes["patch_size"]) ** 2
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).exists():
                settings = read_json(folder / name)
                _check_settings(settings.get("image_processor", settings), folder / name, side, num_image_tokens)
        return cls(tokenizer, side, num_image_tokens)

    def prepare(
        self,
        images: Sequence["Image.Image | Sequence[Image.Image]"],
        prompts: Sequence[str],
        suffixes: Sequence[str] | None = None,
    ) -> Batch:
        """Lay out `<image>` x P for each picture, bos, prompt, newline; then, for training, the answer and eos.

        Parameters
        ----------
        images : sequence
            For each prompt one RGB picture, or a sequence of them.
        prompts : sequence of str
        suffixes : sequence of str, optional
            Answers to learn. Without them rows are padded on the left, ready to go on; with them, on the right.

        Raises
        ------
        ValueError
            If the lists differ in length or are empty; if a prompt or suffix contains `<image>` or is no text; if a
            picture is not RGB.
        """
        if not len(prompts):
            raise ValueError("there are no prompts: expected one at least")
        if len(images) != len(prompts) or (suffixes is not None and len(suffixes) != len(prompts)):
            count = "" if suffixes is None else f" and {len(suffixes)} suffixes"
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts{count}: there must be as many of each")
        tokenizer = self.tokenizer
        pictures, rows = [], []
        for index, prompt in enumerate(prompts):
            suffix = "" if suffixes is None else suffixes[index]
            shown = _check_row(prompt, suffix, images[index])
            pictures += [pixels(image, self.image_size) for image in shown]
            prefix = [tokenizer.image_id] * (self.num_image_tokens * len(shown)) + [tokenizer.bos_id]
            prefix += tokenizer.encode(f"{prompt}\n")
            rows.append((prefix, [] if suffixes is None else [*tokenizer.encode(suffix), tokenizer.eos_id]))
        length = max(len(prefix) + len(suffix) for prefix, suffix in rows)
        ids, mask, types, labels = [], [], [], []
        for prefix, suffix in rows:
            row = prefix + suffix
            pad = [0] * (length - len(row))
            left, right = (pad, []) if suffixes is None else ([], pad)
            ids.append([tokenizer.pad_id] * len(left) + row + [tokenizer.pad_id] * len(right))
            mask.append(left + [1] * len(row) + right)
            types.append(left + [0] * len(prefix) + [1] * len(suffix) + right)
            labels.append([-100] * (len(left) + len(prefix)) + suffix + [-100] * len(right))
        return Batch(
            torch.tensor(ids),
            torch.tensor(mask),
            torch.tensor(types),
            torch.stack(pictures),
            None if suffixes is None else torch.tensor(labels),
        )

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files as they were read, and how pictures are prepared; `transformers` reads both.

        Raises
        ------
        ValueError
            If `folder` is a file.
        RuntimeError
            If the files cannot be written.
        """
        settings = _how_prepared(self.image_size, self.num_image_tokens)
        settings |= {"do_convert_rgb": True, "image_processor_type": "SiglipImageProcessor"}
        settings |= {"processor_class": "PaliGemmaProcessor"}
        content = json.dumps(settings, indent=2, sort_keys=True).encode()
        with folder_beside(Path(folder)) as fresh:
            for name, raw in (self.tokenizer.files | {"preprocessor_config.json": content}).items():
                (fresh / name).write_bytes(raw)


def _check_row(prompt: str, suffix: str, images: "Image.Image | Sequence[Image.Image]") -> list[Image.Image]:
    """The pictures of a row as a list, once it is sure that its texts are texts and its pictures pictures."""
    for name, text in (("prompt", prompt), ("suffix", suffix)):
        if not isinstance(text, str):
            raise ValueError(f"{name} {text!r:.80} is {type(text).__name__}: expected text")
        if "<image>" in text:
            raise ValueError(f"{name} {text!r:.80} contains <image>: leave it out, the picture's place is set for you")
    shown = [images] if isinstance(images, Image.Image) else images
    if not isinstance(shown, list | tuple) or not shown or not all(isinstance(i, Image.Image) for i in shown):
        raise ValueError(f"prompt {prompt!r:.80} has no picture: expected an RGB PIL image, or a list of them")
    return list(shown)


def _how_prepared(size: int, num_image_tokens: int) -> dict:
    """What `preprocessor_config.json` says about pictures that are prepared as above."""
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_seq_length": num_image_tokens,
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,  # Pillow's number for bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }


def _check_settings(settings: dict, path: Path, size: int, num_image_tokens: int) -> None:
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: image_processor is {settings!r:.80}, expected a table of settings")
    for key, value in _how_prepared(size, num_image_tokens).items():
        given = value if settings.get(key) is None else settings[key]
        if given != value:
            raise ValueError(
                f"{path}: {key} is {given!r:.80}, expected {value!r}: another way to prepare pictures is not supported"
            )
