# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # From files to tensors
#
# *How do a JPEG and a sentence become the numbers that the model was trained on?*
#
# **You build** the processor: pictures to tensors, text to token ids, and back. **You need** chapters 02 and 10.
# **Exports** the module `sigma_book.processor`.

# %%
# | export
import io
import itertools
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# %%
# | export
def load_image(source: "str | Path | bytes | np.ndarray | Image.Image") -> Image.Image:
    """Any picture as RGB: turned as its EXIF says, transparency over white, 16 bits scaled to 8.

    Parameters
    ----------
    source : path, bytes, array or PIL image
        Arrays are (H, W), (H, W, 3) or (H, W, 4); uint8, uint16, or floats from 0 to 1.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no picture, is cut off, or is too large to be safe; if an array has another shape or type.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "this picture")
    if isinstance(source, bytes | bytearray):
        return _open(io.BytesIO(source), "these bytes")
    if not isinstance(source, str | Path):
        raise ValueError(f"a picture is a path, bytes, an array or a PIL image, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the path of a picture")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        return _open(file, str(path))


def _open(file, name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                return _to_rgb(image, name)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{name} would unpack to more than {Image.MAX_IMAGE_PIXELS:,} pixels: reduce the picture first"
            ) from error
        except UnidentifiedImageError as error:
            raise ValueError(f"{name} is not a picture that can be read: give a JPEG, PNG, WebP, GIF or BMP") from error
        except (OSError, SyntaxError, EOFError, IndexError) as error:
            raise ValueError(f"{name} is damaged or cut off ({error}): get a whole copy of the picture") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} has grey values outside 0 to 65535: scale them to 8 or 16 bits first")
        scale = 1 if image.mode == "F" and values.max() <= 255 else 257
        return Image.fromarray(np.round(values / scale).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"an array of shape {array.shape} is no picture: expected (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("an array of floats must hold numbers from 0 to 1: divide by 255, or give uint8")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype} is no picture: expected uint8, uint16, or floats from 0 to 1")
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "this array")


# %%
# | export
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
    """
    square = image.resize((size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()  # (3, S, S)
    return values * (1 / 255) / 0.5 - 1.0


# %%
# | export
class Tokenizer:
    """Text to token ids and back, from `tokenizer.json`, or from `tokenizer.model` and what was added to it.

    Special tokens typed as text (`<bos>`, `<eos>`, `<pad>`) become those tokens, as in the reference.
    `<loc....>` and `<seg...>` are one token each, and are kept when ids are decoded.
    """

    def __init__(self, backend: "_Json | _Model", files: dict[str, bytes]):
        self._backend = backend
        self.files = files
        self.pad_id, self.eos_id, self.bos_id = (self.token_id(piece) for piece in ("<pad>", "<eos>", "<bos>"))
        self.image_id = self.token_id("<image>")
        self._silent = {self.pad_id, self.eos_id, self.bos_id, self.image_id}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint.

        Raises
        ------
        FileNotFoundError
            If the folder has neither `tokenizer.json` nor `tokenizer.model`.
        ValueError
            If a file cannot be read, or a token is missing that PaliGemma needs.
        """
        folder = Path(folder)
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
        files = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
        kind = next((name for name in ("tokenizer.json", "tokenizer.model") if name in files), None)
        if kind is None:
            raise FileNotFoundError(
                f"no tokenizer in {folder}: expected tokenizer.json or tokenizer.model, as the checkpoint's page has them"
            )
        try:
            backend = _Json(files[kind]) if kind == "tokenizer.json" else _Model(files[kind])
        except Exception as error:  # both libraries raise bare errors
            raise ValueError(f"{folder / kind} is not a tokenizer that can be read: {error}") from error
        added = json.loads(files["added_tokens.json"]) if "added_tokens.json" in files else {}
        # what a plain Gemma tokenizer lacks, in the order in which the reference adds it
        extra = ["<image>", *(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128))]
        backend.add([p for p in sorted(added, key=added.get) if backend.token_to_id(p) is None])
        backend.add([piece for piece in extra if backend.token_to_id(piece) is None])
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

    @property
    def vocab_size(self) -> int:
        return len(self._backend)

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands: no beginning, no end."""
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Pieces of bytes join to characters; pad, bos, eos and image tokens are left out by default."""
        ids = [int(token) for token in ids]
        if skip_special_tokens:
            ids = [token for token in ids if token not in self._silent]
        return self._backend.decode(ids)


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
        self._library.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in pieces])

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)


class _Model:
    """`tokenizer.model`, through SentencePiece; added and control pieces are cut out of the text first."""

    def __init__(self, content: bytes):
        self._library = sentencepiece.SentencePieceProcessor(model_proto=content)
        size = self._library.get_piece_size()
        if size == 0:
            raise ValueError("it holds no pieces")
        cut = [index for index in range(size) if self._library.is_control(index)]
        self._cut = {self._library.id_to_piece(index): index for index in cut}
        self._size = size

    def __len__(self) -> int:
        return self._size

    def token_to_id(self, piece: str) -> int | None:
        if piece in self._cut:
            return self._cut[piece]
        index = self._library.piece_to_id(piece)
        return index if self._library.id_to_piece(index) == piece else None

    def add(self, pieces: list[str]) -> None:
        for piece in pieces:
            self._cut[piece] = self._size
            self._size += 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, self._cut)) + ")", text):
            ids += [self._cut[part]] if part in self._cut else self._library.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        named = {index: piece for piece, index in self._cut.items()}
        runs = itertools.groupby(ids, key=lambda token: token in named)
        return "".join(
            "".join(named[token] for token in run) if is_cut else self._library.decode(list(run)) for is_cut, run in runs
        )


# %%
# | export
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


# %%
# | export
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
        """
        folder = Path(folder)
        tokenizer = Tokenizer.from_folder(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"no config.json in {folder}: expected a PaliGemma folder in the Hugging Face layout")
        vision = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vision_config") or {}
        size, patch = vision.get("image_size", 224), vision.get("patch_size", 14)
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).exists():
                settings = json.loads((folder / name).read_text(encoding="utf-8"))
                _check_settings(settings.get("image_processor", settings), folder / name, size)
        return cls(tokenizer, size, (size // patch) ** 2)

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
            If the lists differ in length, or a prompt contains `<image>`.
        """
        if len(images) != len(prompts) or (suffixes is not None and len(suffixes) != len(prompts)):
            count = "" if suffixes is None else f" and {len(suffixes)} suffixes"
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts{count}: there must be as many of each")
        tokenizer = self.tokenizer
        pictures, rows = [], []
        for index, prompt in enumerate(prompts):
            if "<image>" in prompt:
                raise ValueError(f"prompt {prompt!r} contains <image>: leave it out, the picture's place is set for you")
            shown = [images[index]] if isinstance(images[index], Image.Image) else list(images[index])
            pictures += [pixels(image, self.image_size) for image in shown]
            prefix = [tokenizer.image_id] * (self.num_image_tokens * len(shown)) + [tokenizer.bos_id]
            prefix += tokenizer.encode(f"{prompt}\n")
            suffix = [] if suffixes is None else [*tokenizer.encode(suffixes[index]), tokenizer.eos_id]
            rows.append((prefix, suffix))
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
        """Write the tokenizer's files as they were read, and how pictures are prepared, so that `transformers` reads both."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.tokenizer.files.items():
            (folder / name).write_bytes(content)
        settings = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": self.num_image_tokens,
            "processor_class": "PaliGemmaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": self.image_size, "width": self.image_size},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def _check_settings(settings: dict, path: Path, size: int) -> None:
    wanted = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "size": {"height": size, "width": size}}
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {settings[key]!r}, expected {value!r}: another way to prepare pictures is not supported")
