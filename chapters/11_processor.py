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
import tempfile

import matplotlib.pyplot as plt

import sigma_book
from sigma_book.style import GREY, PICTURE, PROMPT, check, draw_tokens, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)
FOLDER = Path(sigma_book.__file__).parent / "pocket_model"

# %% [markdown]
# ## The picture
#
# A model knows only what it was trained on. If its pictures were resized in one way and ours in another, or a space is cut
# off where it was not, nothing fails. The answers get a little worse, and nobody knows why. So this chapter is about being
# exact.

# %%
figure, axis = plt.subplots(figsize=(6.8, 1.8))
for line, stages in enumerate((("file", "RGB", "square", "-1 to 1"), ("text", "pieces", "ids", "laid out"))):
    for place, name in enumerate(stages):
        colour = PICTURE if line == 0 else PROMPT
        axis.text(
            place,
            -line,
            name,
            ha="center",
            va="center",
            color="white",
            bbox={"boxstyle": "round", "fc": colour, "ec": "none"},
        )
        if place:
            axis.annotate(
                "", (place - 0.3, -line), (place - 0.7, -line), arrowprops={"arrowstyle": "->", "color": GREY}
            )
axis.annotate("", (3.62, -0.5), (3.3, -0.1), arrowprops={"arrowstyle": "->", "color": GREY})
axis.annotate("", (3.62, -0.5), (3.35, -0.9), arrowprops={"arrowstyle": "->", "color": GREY})
axis.text(3.9, -0.5, "batch", ha="center", va="center", bbox={"boxstyle": "round", "fc": "white", "ec": GREY})
axis.set(xlim=(-0.5, 4.3), ylim=(-1.4, 0.4))
axis.axis("off")
save(figure, "11_ways")
plt.show()

# %% [markdown]
# *Two ways that end in one batch: a file becomes RGB, a square, numbers from -1 to 1; a text becomes pieces, ids, a row.*
#
# ## Any picture as RGB
#
# Files come in many kinds. A telephone stores a portrait lying on its side, with a note that says "turn me". A logo has a
# transparent ground. A scan has 16 bits a pixel, a print four inks. The model wants three numbers a pixel and nothing else.
#
# Our rules: the note (EXIF) is obeyed, what is transparent lies on white, 16 bits are scaled to 8. And a file that is
# broken or dangerously large says so in a sentence.


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
scene = draw_scene(make_scene(155))
folder = Path(tempfile.mkdtemp())
turned = scene.rotate(90)
note = Image.Exif()
note[0x0112] = 6  # "turn me a quarter to the right"
turned.save(folder / "turned.jpg", exif=note, quality=95)
clear = scene.convert("RGBA")
clear.putalpha(Image.linear_gradient("L").resize(scene.size))
clear.save(folder / "clear.png")
Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
scene.convert("CMYK").save(folder / "inks.jpg")

figure, axes = plt.subplots(2, 4, figsize=(6.4, 3.5))
for column, name in zip(axes.T, ("turned.jpg", "clear.png", "deep.png", "inks.jpg"), strict=True):
    with Image.open(folder / name) as stored:
        raw = np.asarray(stored)
        column[0].imshow(raw if stored.mode != "CMYK" else raw[..., :3], cmap="Greys_r")
        column[0].set_title(f"{name}\n{stored.mode}", fontsize=8)
    column[1].imshow(load_image(folder / name))
    column[0].axis("off")
    column[1].axis("off")
save(figure, "11_modes")
plt.show()
assert load_image(folder / "turned.jpg").size == scene.size

# %% [markdown]
# *Above, the numbers as they lie in four files: lying on its side, half transparent, in 16-bit grey, in four inks (shown as if
# three of them were colours). Below, what the model gets.*

# %%
(folder / "notes.png").write_text("this is no picture")
(folder / "half.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:700])
for name in ("notes.png", "half.jpg", "nowhere.png"):
    try:
        load_image(folder / name)
    except (ValueError, FileNotFoundError) as error:
        print(type(error).__name__, "-", str(error).replace(str(folder), "..."))

# %% [markdown]
# ## A smaller square, by hand
#
# Making a row of pixels smaller means mixing. Taking every third pixel would drop the others: thin lines vanish, edges
# get stairs. Instead each new pixel is a weighted mean of those that it covers. *Bicubic* is a shape for the weights: a hump with
# a small dip on each side, which keeps edges crisp.


# %%
def hump(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def shrink_naive(row: list[float], size: int) -> list[float]:
    scale = len(row) / size
    wide = max(scale, 1.0)  # when shrinking, the hump is stretched over all pixels that melt into one
    new = []
    for place in range(size):
        centre = (place + 0.5) * scale
        weights = [hump((i + 0.5 - centre) / wide) for i in range(len(row))]
        new.append(sum(w * value for w, value in zip(weights, row, strict=True)) / sum(weights))
    return new


row = np.asarray(scene.convert("L"))[60].astype(float)
by_hand = shrink_naive(row.tolist(), 40)
by_pillow = Image.fromarray(row[None].astype(np.float32)).resize((40, 1), Image.Resampling.BICUBIC)
assert np.abs(np.array(by_hand) - np.asarray(by_pillow)[0]).max() < 0.01

figure, axis = plt.subplots(figsize=(6, 2.2))
axis.plot(np.arange(112), row, color=GREY, lw=1)
axis.plot((np.arange(40) + 0.5) * 2.8, by_hand, color=PICTURE, marker="o", ms=3, lw=1)
axis.plot((np.arange(40) + 0.5) * 2.8, row[(np.arange(40) * 2.8).astype(int)], color=PROMPT, lw=0, marker="x", ms=4)
axis.set(xlabel="place in the row", ylabel="grey")
save(figure, "11_shrink")
plt.show()

# %% [markdown]
# *One row of the picture (grey line), shrunk to 40 pixels: bicubic (blue dots) overshoots a little at edges and stays true to them;
# taking every third pixel (orange crosses) jumps.*
#
# ## The formula
#
# $$ x = \frac{\mathrm{pixel} / 255 - 0.5}{0.5} $$
#
# The square is the same for every picture: a wide one is squeezed. PaliGemma was trained so, and boxes count on it.


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


# %% [markdown]
# ## Proof
#
# The reference is the Pillow-backed image processor of `transformers`. (Its other one uses torchvision, whose bicubic
# differs by a grey level here and there.)

# %%
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

reference = SiglipImageProcessorPil(size={"height": 112, "width": 112}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
rng = np.random.default_rng(0)
worst = 0.0
for width, height in ((112, 112), (640, 480), (31, 200), (2, 2), (300, 299)):
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = reference(noise, return_tensors="pt")["pixel_values"][0]
    worst = max(worst, (pixels(noise, 112) - expected).abs().max().item())
assert worst < 1e-6
worst

# %% [markdown]
# ## Text: pieces, by hand
#
# A tokenizer cuts text into pieces from a list. It starts with single letters and joins neighbours, always the pair
# that stands first in its table of *merges*, until no pair is left in the table. A space is written as a low line, `▁`, and
# belongs to the word behind it.

# %%
table = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]
ranks = {tuple(pair): rank for rank, pair in enumerate(table["merges"])}


def cut_naive(word: str) -> list[str]:
    parts = list(word.replace(" ", "▁"))
    while True:
        pairs = [(ranks[pair], place) for place, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
        if not pairs:
            return parts
        _, place = min(pairs)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
        print("  ", " | ".join(parts))


cut_naive(" star")

# %% [markdown]
# What is not in the list at all falls back to bytes: every text can be written, if need be a byte at a time.
#
# Some pieces are never cut: `<loc0001>`, `<seg001>`, `<image>`. A tokenizer that splits `<loc0001>` into characters makes
# detection "return nothing"; it is one of the bugs that others shipped.
#
# There are two kinds of tokenizer file. `tokenizer.model` belongs to SentencePiece, `tokenizer.json` to another library.
# Checkpoints come with both or with one, so we read either. One rule to know: a special name typed by a user, such as
# `<bos>`, becomes that token, as in the reference.


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
        names = (
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
        )
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
            "".join(named[token] for token in run) if is_cut else self._library.decode(list(run))
            for is_cut, run in runs
        )


# %%
tokenizer = Tokenizer.from_folder(FOLDER)
for text in (" star", "detect red star", "<loc0001><loc1023>", "é"):
    ids = tokenizer.encode(text)
    print(f"{text!r}: {[tokenizer.decode([token]) for token in ids]}")
    assert tokenizer.decode(ids) == text
assert [table["vocab"][part] for part in cut_naive(" star")] == tokenizer.encode(" star")

# %% [markdown]
# ## Proof
#
# Three readers give the same ids: ours from `tokenizer.json`, SentencePiece itself, and `transformers`.

# %%
from transformers import AutoTokenizer

theirs = AutoTokenizer.from_pretrained(FOLDER)
library = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
texts = [
    "",
    " ",
    "caption en\n",
    "  two  spaces ",
    "a\n\nb",
    "é 漢字 🙂",
    "مرحبا",
    "<loc0001> cat ; <seg127>",
    "x" * 500,
]
for text in texts:
    assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False) == library.encode(text)

# %% [markdown]
# ## Laid out in a row
#
# The order is fixed: `<image>` as often as there are patches, then the beginning `<bos>`, the prompt, and a newline. The newline is
# the sign that the question is over. For training the answer follows, and `<eos>`.

# %%
figure, axes = plt.subplots(2, 1, figsize=(7, 1.7))
draw_tokens(axes[0], ["img", "...", "img", "bos", "caption", "en", "\\n"], ["picture"] * 3 + ["prompt"] * 4)
draw_tokens(
    axes[1],
    ["pad", "img", "...", "img", "bos", "caption", "\\n", "a", "star", "eos"],
    ["pad"] + ["picture"] * 3 + ["prompt"] * 3 + ["answer"] * 3,
)
save(figure, "11_layout")
plt.show()

# %% [markdown]
# *Above, a prompt. Below, a shorter one with padding in front and an answer behind.* Padding goes to the left for
# answering, so that all rows end together, and to the right for training.


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
            raise FileNotFoundError(
                f"no config.json in {folder}: expected a PaliGemma folder in the Hugging Face layout"
            )
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
                raise ValueError(
                    f"prompt {prompt!r} contains <image>: leave it out, the picture's place is set for you"
                )
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
            raise ValueError(
                f"{path}: {key} is {settings[key]!r}, expected {value!r}: another way to prepare pictures is not supported"
            )


# %% [markdown]
# ## Proof
#
# The whole processor of `transformers`, on a batch with prompts of different lengths.

# %%
from transformers import AutoProcessor

processor = Processor.from_folder(FOLDER)
whole = AutoProcessor.from_pretrained(FOLDER)
pictures = [draw_scene(make_scene(seed)) for seed in (1, 2, 3)]
prompts = ["caption en", "", "answer en is the star left of the ring?"]
ours = processor.prepare(pictures, prompts)
expected = whole(
    images=pictures, text=[f"<image>{p}" for p in prompts], return_tensors="pt", padding=True, padding_side="left"
)
assert torch.equal(ours.input_ids, expected["input_ids"])
assert torch.equal(ours.attention_mask, expected["attention_mask"])
torch.testing.assert_close(ours.pixel_values, expected["pixel_values"])

# %% [markdown]
# ## A look inside
#
# How long is a prompt? Letters against tokens, for words that the pocket's tokenizer knows and for some that it does not.

# %%
samples = ["caption en", "answer en how many red stars are there?", "what is the dog doing?", "encyclopaedia", "漢字"]
lengths = {text: (len(text), len(tokenizer.encode(text))) for text in samples}
for text, (letters, tokens) in lengths.items():
    print(f"{text!r:46} {letters:3d} letters, {tokens:3d} tokens")
assert lengths["caption en"][1] == 2 and lengths["漢字"][1] >= 6

# %% [markdown]
# A word of its world is one token. A word it never met is nearly one token a letter, and a Chinese sign is three bytes. The
# real tokenizer has 256,000 pieces and knows most words of many languages.
#
# ## The bill

# %%
small, large = 112 * 112 * 3 * 4, 224 * 224 * 3 * 4
assert large == 602_112
rows = {"pocket": 64 + 2 + 3, "PaliGemma 3B at 224 px": 256 + 2 + 3, "at 896 px": 4096 + 2 + 3}
{"bytes of a picture": {"pocket": small, "3B": large}, "tokens of 'caption en'": rows}

# %% [markdown]
# The picture is nearly all of the prompt.
#
# ## Your turn
#
# **1.** Bring a grey value from 0 to 255 to the range of the model.


# %%
def to_model(grey: int) -> float: ...


check(to_model, ((0,), -1.0), ((255,), 1.0), ((51,), -0.6))

# %% [markdown]
# **2.** A pixel of one colour with `alpha` from 0 to 1, over white: which grey results?


# %%
def over_white(grey: float, alpha: float) -> float: ...


check(over_white, ((0.0, 1.0), 0.0), ((0.0, 0.25), 191.25), ((100.0, 0.0), 255.0))

# %% [markdown]
# **3.** The length of the longest row, for prompts of these token counts, `n` pictures each, `p` patches a picture.


# %%
def row_length(prompts: list, n: int, p: int) -> int: ...


check(row_length, (([2, 7], 1, 256), 265), (([3], 2, 64), 133))

# %% [markdown]
# Next: twelve gigabytes of numbers, and how to read them.
