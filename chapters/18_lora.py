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
# # A few new numbers: LoRA
#
# *How does a large model learn something new when only a few hundredths of its numbers may change?*
#
# **You build** low-rank updates beside frozen matrices, and the file that carries them.
# **You need** chapters 12 (weights), 16 (the loop) and 17 (the pocket model).
# **Exports** the module `sigma_book.lora`.

# %%
# | export
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from sigma_book.processor import folder_beside, read_json
from sigma_book.weights import DTYPES, write_json, our_name, read_header, write_tensors

# %%
import random
import tempfile
import time

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from sigma_book import load
from sigma_book.generation import generate_answers
from sigma_book.locate import compare_boxes, parse
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig, count_parameters
from sigma_book.pocket import LOCS, Packer, answer_text, packed_loss, questions_about
from sigma_book.style import ANSWER, GREY, PROMPT, check, save, use_style
from sigma_book.training import learning_rate_factor
from sigma_book.world import COLOURS, SHAPES, TASKS, Scene, ask, caption, draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# Chapter 17 taught three million numbers. PaliGemma has three thousand million. To teach it all is dear: beside each
# number stand its gradient and the two averages that AdamW keeps, so four numbers for one.
#
# And mostly we want little. The model can see and speak; it shall learn a new word, or to answer in our style. So leave
# each matrix as it is, and put a narrow passage beside it: down to a few numbers with a matrix A, up again with a matrix
# B. Only A and B learn.

# %%
figure, axis = plt.subplots(figsize=(6.4, 2.7))
axis.add_patch(Rectangle((1.6, 1.3), 1.7, 1.3, facecolor=GREY))
axis.text(2.45, 1.95, "W\nfrozen", ha="center", va="center", color="white")
axis.add_patch(Rectangle((1.6, 0.35), 1.7, 0.22, facecolor=PROMPT))
axis.text(2.45, 0.02, "A, rank x in", ha="center", size=9)
axis.add_patch(Rectangle((3.75, -0.2), 0.22, 1.3, facecolor=PROMPT))
axis.text(4.15, 0.42, "B, out x rank", va="center", size=9)
arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
for start, end in (((0.6, 1.95), (1.5, 1.95)), ((3.4, 1.95), (5.4, 1.95)), ((3.35, 0.46), (3.7, 0.46))):
    axis.annotate("", end, start, arrowprops=arrow)
axis.plot([1.0, 1.0], [1.95, 0.46], color="0.3", lw=1)
axis.annotate("", (1.5, 0.46), (1.0, 0.46), arrowprops=arrow)
axis.plot([5.2, 5.65, 5.65], [0.46, 0.46, 1.2], color="0.3", lw=1)
axis.annotate("", (5.65, 1.75), (5.65, 1.2), arrowprops=arrow)
axis.text(5.65, 1.95, "+", ha="center", va="center", size=16)
axis.text(0.35, 1.95, "x", ha="center", va="center", size=12)
axis.annotate("", (6.4, 1.95), (5.85, 1.95), arrowprops=arrow)
axis.text(6.6, 1.95, "y", ha="center", va="center", size=12)
axis.set(xlim=(0.1, 6.9), ylim=(-0.3, 2.75))
axis.axis("off")
save(figure, "18_beside")

# %% [markdown]
# *Figure: an input x goes two ways. The upper way passes a large grey square, W, frozen. The lower way passes a flat
# orange bar, A, and an upright one, B. Both meet at a plus and leave as y.*
#
# ## By hand
#
# Take a matrix of four by four, and a passage of width one. A is a row of four numbers, B a column of four. Their product
# is a full matrix of sixteen numbers, made of eight.


# %%
def product(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    columns = list(zip(*right))
    return [[sum(a * b for a, b in zip(row, column)) for column in columns] for row in left]


def lora_naive(inputs: list[float], weight, down, up, scale: float) -> list[float]:
    column = [[number] for number in inputs]
    frozen, update = product(weight, column), product(up, product(down, column))
    return [base[0] + scale * extra[0] for base, extra in zip(frozen, update)]


down, up = [[1.0, 0.0, 2.0, 1.0]], [[1.0], [0.0], [-1.0], [3.0]]  # A and B
identity = [[float(i == j) for j in range(4)] for i in range(4)]
print(product(up, down))
lora_naive([1.0, 2.0, 3.0, 4.0], identity, down, up, scale=0.5)

# %% [markdown]
# Each row of the product is a multiple of the one row A. That is what *rank one* means: the update can act in one
# direction only. With a width of $r$ it can act in $r$ directions.
#
# The sixteen numbers are printed only to be looked at. `lora_naive` never builds them: it goes first down, then up.
#
# ## The formula
#
# $$ y = W x + \frac{\alpha}{r}\, B A x, \qquad A \in \mathbb{R}^{r \times d_{in}},\; B \in \mathbb{R}^{d_{out} \times r} $$
#
# $r$ is the rank. $\alpha$ says how loud the update is; it is divided by $r$, so that another rank hardly needs another
# learning rate. B starts at zero, so that the model starts as it was. A starts at random: were both zero, neither would get a
# gradient, since each one's gradient is a multiple of the other.
#
# Some divide by $\sqrt{r}$ instead (rank-stabilized LoRA, rsLoRA), and find that large ranks then learn better. It is one
# line below.
#
# How many numbers is that? For the widest map of the 3B model, 2,048 to 16,384:

# %%
wide, narrow = 16_384 * 2_048, 64 * (16_384 + 2_048)
assert (wide, narrow) == (33_554_432, 1_179_648)
print(f"{wide:,} numbers in the matrix, {narrow:,} in A and B of rank 64: {narrow / wide:.1%}")

# %% [markdown]
# ## The settings
#
# The names of PEFT, the library that most people use, are `r`, `lora_alpha` and so on. We write `rank` and `alpha`, and
# translate in the file. `targets` says which matrices get a passage; we come to it below.

# %%
# | export
DECODER_LINEARS = r"(.*\.)?language_model\..*\.(q|k|v|o|gate|up|down)_proj"  # one regex, as PEFT reads it too


@dataclass(frozen=True)
class LoraConfig:
    """How an adapter is made, with PEFT's meanings (in its file: r, lora_alpha, lora_dropout, target_modules).

    Parameters
    ----------
    rank : int
        Width of the passage, at least 1.
    alpha : float
        The update is scaled by alpha / rank.
    dropout : float
        Share of the inputs of the update that are zeroed while training, in [0, 1).
    targets : str or sequence of str
        Which linear maps: one regular expression for whole module names as `transformers` spells them, or the ends of
        names, such as ("q_proj", "v_proj"), which the vision tower has too. By default all seven of the decoder.
    use_rslora : bool
        Scale by alpha / sqrt(rank) (Kalajdzievski 2023).

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.0
    targets: str | tuple[str, ...] = DECODER_LINEARS
    use_rslora: bool = False

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}: expected a whole number, 1 or more")
        if not _is_number(self.alpha) or not self.alpha > 0 or math.isinf(self.alpha):
            raise ValueError(f"alpha is {self.alpha!r}: expected a number above 0")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}: expected a number from 0 to below 1")
        if type(self.use_rslora) is not bool:
            raise ValueError(f"use_rslora is {self.use_rslora!r}: expected True or False")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", _as_names(self.targets))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_names(targets: object) -> tuple[str, ...]:
    names = tuple(targets) if isinstance(targets, list | tuple | set | frozenset) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"targets is {targets!r}: expected a regular expression, or names such as ('q_proj', 'v_proj')"
        )
    return tuple(sorted(names)) if isinstance(targets, set | frozenset) else names


# %% [markdown]
# ## The module
#
# A module that holds another one. The base may be any linear map; chapter 19 puts one of four bits there.
#
# A and B are kept in float32 even if the base has 16 bits. A step of training is often too small to move a number of 16
# bits at all.


# %%
# | export
class LoraLinear(nn.Module):
    """A frozen linear map with an update of low rank beside it: base(x) + scale * B A dropout(x).

    Parameters
    ----------
    base : torch.nn.Module
        Maps (..., in_features) to (..., out_features); is left as it is.
    config : LoraConfig

    Notes
    -----
    A (rank, in_features) starts as PEFT starts it, B (out_features, rank) starts at zero, so nothing changes at first.
    Both are float32 whatever the base is, or float64 where the base is.

    References
    ----------
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    def __init__(self, base: nn.Module, config: LoraConfig):
        super().__init__()
        self.base = base
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        kind = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result = self.base(hidden_states)  # (..., out)
        narrow = F.linear(self.dropout(hidden_states.to(self.lora_A.dtype)), self.lora_A)  # (..., rank)
        return (result + F.linear(narrow, self.lora_B) * self.scale).to(result.dtype)


# %% [markdown]
# ## Proof
#
# It equals the loops, and at the start it changes nothing.

# %%
base = nn.Linear(4, 4, bias=False)
lora = LoraLinear(base, LoraConfig(rank=1, alpha=0.5))
inputs = torch.tensor([1.0, 2.0, 3.0, 4.0])
assert torch.equal(lora(inputs), base(inputs))

with torch.no_grad():
    base.weight.copy_(torch.eye(4))
    lora.lora_A.copy_(torch.tensor(down))
    lora.lora_B.copy_(torch.tensor(up))
by_hand = lora_naive(inputs.tolist(), identity, down, up, scale=0.5)
torch.testing.assert_close(lora(inputs), torch.tensor(by_hand))

# %% [markdown]
# And its gradients are those of the full matrix, seen through A and B. If $G$ is the gradient that the full update would
# get, B gets $\tfrac{\alpha}{r} G A^\top$ and A gets $\tfrac{\alpha}{r} B^\top G$. Torch computes $G$ for us.

# %%
lora = LoraLinear(nn.Linear(24, 16), LoraConfig(rank=3, alpha=6))
nn.init.normal_(lora.lora_B)
inputs, target = torch.randn(10, 24), torch.randn(10, 16)
(lora(inputs) - target).square().mean().backward()

full = (2 * lora.lora_B @ lora.lora_A).detach().requires_grad_()  # the same update as one matrix, 6 / 3 = 2
(lora.base(inputs) + inputs @ full.T - target).square().mean().backward()
torch.testing.assert_close(lora.lora_B.grad, 2 * full.grad @ lora.lora_A.T, rtol=1e-4, atol=1e-6)
torch.testing.assert_close(lora.lora_A.grad, 2 * lora.lora_B.T @ full.grad, rtol=1e-4, atol=1e-6)

# %% [markdown]
# The reference that nobody here wrote is PEFT itself: `tests/parity/test_lora.py` takes twenty steps of AdamW with both from
# the same start, in float64, and finds weights less than 1e-8 apart.
#
# ## Which matrices
#
# Targets are names. A tuple of names means: every module whose name ends so. That is a trap here, as the eyes have query,
# key and value maps too:


# %%
# | export
def find_linears(model: nn.Module, targets: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear maps that targets name, by their names in the model.

    Targets are held against the names that `transformers` gives the same modules, in PEFT's way: a string is one
    regular expression for the whole name; else each target is a whole name, or its end behind a dot. The output head
    never counts: it is used without being called.

    Raises
    ------
    ValueError
        If a target matches none, or is no regular expression.
    """
    linears = {n: module for n, module in model.named_modules() if n != "lm_head" and hasattr(module, "in_features")}
    if isinstance(targets, str):
        targets, patterns = (targets,), [targets]
    else:
        patterns = [rf"(.*\.)?{re.escape(target)}" for target in targets]
    chosen: set[str] = set()
    for target, pattern in zip(targets, patterns):
        try:
            found = {name for name in linears if re.fullmatch(pattern, _their_name(name))}
        except re.error as error:
            raise ValueError(f"the target {target!r} is not a regular expression ({error})") from error
        if not found:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise ValueError(f"the target {target!r} matches no linear map of this model: it has {ends or 'none'}")
        chosen |= found
    return {name: module for name, module in linears.items() if name in chosen}


def _their_name(name: str) -> str:
    """A module of `PaliGemma` as transformers 5 calls it."""
    return name if name.startswith("lm_head") else f"model.{name}"


# %%
model = load()
everywhere, decoder = find_linears(model, ("q_proj",)), find_linears(model, DECODER_LINEARS)
assert len(everywhere) == 8 and len(decoder) == 4 * 7
assert all(name.startswith("language_model") for name in decoder)
print(*everywhere, sep="\n")

# %% [markdown]
# So our default is a pattern that holds the word `language_model`: the seven maps of each of the decoder's blocks, and
# nothing in the tower. PEFT reads the same pattern from the file.
#
# A name that matches nothing is an error. A silent one would be a model that learns less than you think.

# %%
try:
    find_linears(model, ("q_proj", "query"))
except ValueError as error:
    print(error)

# %% [markdown]
# ## The swap
#
# All is frozen, and each target is replaced by a passage around it. That is the whole of it.


# %%
# | export
def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Put an update beside each target, in place, and freeze all else.

    Raises
    ------
    ValueError
        If a target matches nothing, or the model has an adapter already.
    """
    _refuse_second(model)
    _wrap(model, find_linears(model, config.targets), config)


def _wrap(model: nn.Module, linears: dict[str, nn.Module], config: LoraConfig) -> None:
    model.requires_grad_(False)
    for name, linear in linears.items():
        model.set_submodule(name, LoraLinear(linear, config).train(linear.training))
    model.lora_config = config


def _refuse_second(model: nn.Module) -> None:
    if any(isinstance(module, LoraLinear | MergedLinear) for module in model.modules()):
        raise ValueError("this model has an adapter already: load the model anew to give it another")


# %% [markdown]
# ## Merge, and back
#
# A taught update can be added into its matrix: then the model is as fast as before, and can be saved as a plain one. To
# undo it, PEFT subtracts. In numbers with few bits that does not lead back:

# %%
weight = torch.randn(256, 256).bfloat16()
update = 0.1 * torch.randn(256, 256).bfloat16()
kept = ((weight + update) - update == weight).float().mean().item()
assert kept < 0.9
print(f"{kept:.0%} of the numbers come back")

# %% [markdown]
# So we keep the base and put it back. It costs memory while merged, and gives the very bits.


# %%
# | export
class MergedLinear(nn.Linear):
    """One matrix for base and update. It keeps the two, out of sight of `state_dict`, for `unmerge_lora`."""

    def __init__(self, lora: LoraLinear):
        base = lora.base
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        wide = base.weight.to(lora.lora_A.dtype) + (lora.lora_B @ lora.lora_A) * lora.scale  # (out, in)
        self.weight = nn.Parameter(wide.to(base.weight.dtype), requires_grad=False)
        self.bias = base.bias
        self.parts = (lora,)  # in a tuple, so that it is no submodule


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each update to its base, in place: a plain model that `save_model` writes and any reader of PaliGemma loads.

    The sums are taken in the adapter's dtype and rounded once. The bases stay in memory until the model is dropped.

    Raises
    ------
    ValueError
        If there is no update to merge.
    """
    parts = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not parts:
        raise ValueError("this model has no adapter to merge: add_lora or load_adapter gives it one")
    for name, lora in parts.items():
        model.set_submodule(name, MergedLinear(lora).train(lora.training))


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, to the very bits: the bases were kept, nothing is subtracted.

    Raises
    ------
    ValueError
        If nothing is merged.
    """
    merged = {name: module for name, module in model.named_modules() if isinstance(module, MergedLinear)}
    if not merged:
        raise ValueError("this model has no merged adapter: nothing to undo")
    for name, linear in merged.items():
        (lora,) = linear.parts
        model.set_submodule(name, lora.to(linear.weight.device).train(linear.training))


# %%
add_lora(model, LoraConfig(rank=4))
for parameter in model.parameters():
    if parameter.requires_grad:
        nn.init.normal_(parameter, std=0.1)
bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
merge_lora(model)
assert not any("lora" in name for name in model.state_dict())  # a plain model
unmerge_lora(model)
assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())

# %% [markdown]
# ## The file
#
# An adapter's folder holds two files: the settings as JSON, and A and B for each module. `base_model.model.` in the names
# is PEFT's; the rest is how `transformers` calls the module.

# %%
# | export
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
POCKET_BASE = "sigma_book/pocket_model"  # the base's name when it is the model that comes with this package


def save_adapter(model: nn.Module, folder: str | Path, base: str | Path | None = None) -> None:
    """Write the updates, and nothing else, as a folder that `load_adapter` and `peft` read.

    Parameters
    ----------
    model : torch.nn.Module
        With an adapter that is not merged.
    folder : path
        Made if need be. Its two files are written beside it first, so a failure leaves what was there.
    base : path, optional
        What the adapter was made for: a folder, or an id on the hub. None is the pocket model.

    Raises
    ------
    ValueError
        If the model has no adapter, or a merged one.
    RuntimeError
        If the files cannot be written.
    """
    updates = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not updates:
        merged = any(isinstance(module, MergedLinear) for module in model.modules())
        raise ValueError(f"this model has no adapter to save{': it is merged, call unmerge_lora first' * merged}")
    config = model.lora_config
    tensors = {
        f"base_model.model.{_their_name(name)}.lora_{part}.weight": getattr(module, f"lora_{part}")
        for name, module in updates.items()
        for part in ("A", "B")
    }
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": POCKET_BASE if base is None else str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "inference_mode": True,
    }
    with folder_beside(Path(folder)) as fresh:
        write_tensors(fresh / WEIGHTS_FILE, tensors, torch.float32)
        write_json(fresh / CONFIG_FILE, values)


# %% [markdown]
# Reading is more work than writing, for we did not write all files. An adapter may be for another model, may be cut off,
# or may use something that PEFT can do and this chapter does not. Each gets a sentence, before anything is changed.


# %%
# | export
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Give a model the adapter of a folder in PEFT's format, in place; its updates may learn on, all else is frozen.

    Which modules it has is read from its weights; names of older and newer `transformers` are understood. A folder
    that is refused leaves the model as it was.

    Raises
    ------
    FileNotFoundError
        If the folder or one of its two files is missing.
    ValueError
        If the files are damaged, are of another kind of adapter, or of an adapter for another model.
    RuntimeError
        If a file cannot be read.
    """
    _refuse_second(model)
    folder = Path(folder)
    values = _read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    config = _lora_config(folder / CONFIG_FILE, values)
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    places = _adapter_places(path, linears, config, values.get("base_model_name_or_path"))
    chosen = {name: linears[name] for name in linears if name in places}
    named = _named_by(model, config.targets)
    narrowed = any(values.get(key) not in (None, [], "") for key in _NARROWS)  # layers_to_transform may be 0
    if missing := [] if narrowed else sorted(named - chosen.keys()):
        raise ValueError(f"{path} lacks the update of {missing[0]}, which target_modules names: copy it again")
    if named != chosen.keys():
        config = replace(config, targets=tuple(_their_name(name) for name in chosen))
    tensors = load_file(path)
    _wrap(model, chosen, config)
    with torch.no_grad():
        for name, keys in places.items():
            for part, key in keys.items():
                getattr(model.get_submodule(name), f"lora_{part}").copy_(tensors[key])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model; a configuration of its base may lie beside it."""
    return (folder / CONFIG_FILE).is_file() and not any(folder.glob("model*.safetensors"))


def adapter_base(folder: str | Path) -> str | None:
    """What an adapter says it was made for: a folder or a hub id; None if it does not say.

    Raises
    ------
    FileNotFoundError, ValueError, RuntimeError
        If its configuration cannot be read.
    """
    values = _read_adapter_config(Path(folder))
    name, revision = values.get("base_model_name_or_path") or None, values.get("revision")
    if name is not None and revision not in (None, "main") and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"{Path(folder) / CONFIG_FILE} was made for revision {revision!r:.80} of {name}: download that, then load its "
            "folder as the model, with this adapter"
        )
    return name


def _read_adapter_config(folder: Path) -> dict:
    if not (folder / CONFIG_FILE).is_file():
        what = "no such folder" if not folder.is_dir() else f"no {CONFIG_FILE} in"
        raise FileNotFoundError(
            f"{what}: {folder}; expected the folder of an adapter, as save_adapter or peft writes it"
        )
    values = read_json(folder / CONFIG_FILE)
    if not isinstance(values.get("base_model_name_or_path"), str | None):
        raise ValueError(f"{folder / CONFIG_FILE}: base_model_name_or_path is not a name")
    return values


# What PEFT can do and this book does not: an adapter that uses it would answer otherwise here, so it is refused.
_REFUSED = ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
_REFUSED += ("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens")
_REFUSED += ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config")
_NARROWS = ("exclude_modules", "layers_to_transform")  # with these, target_modules names more than there is
# How PEFT may have begun an adapter; its other ways change the base as well.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def _lora_config(path: Path, values: dict) -> LoraConfig:
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {values.get('peft_type')!r}: expected 'LORA'")
    used = [key for key in _REFUSED if values.get(key)]
    used += ["bias"] if values.get("bias", "none") != "none" else []
    used += ["init_lora_weights"] if values.get("init_lora_weights") not in _PLAIN_STARTS else []
    if used:
        raise ValueError(
            f"{path}: {used[0]} is {values[used[0]]!r:.80}: this adapter needs peft, here plain LoRA is known"
        )
    try:
        return LoraConfig(
            rank=values.get("r", 8),  # what is left out means PEFT's default
            alpha=values.get("lora_alpha", 8),
            dropout=values.get("lora_dropout", 0.0),
            targets=values.get("target_modules"),
            use_rslora=values.get("use_rslora", False),
        )
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; these are r, lora_alpha, lora_dropout, target_modules, use_rslora there"
        ) from error


def _adapter_places(path: Path, linears: dict, config: LoraConfig, base: str | None) -> dict[str, dict[str, str]]:
    """For each module of ours, the names in the file of its A and B; all shapes are held against the model's."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: an adapter has one beside its {CONFIG_FILE}")
    of = f"is the adapter for {base or 'another model'}, and this model another?"
    places: dict[str, dict[str, str]] = {}
    for key, entry in read_header(path).items():
        matched = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        name = our_name(f"{matched[1]}.")[:-1] if matched else None
        if name not in linears or name == "lm_head":
            raise ValueError(f"{path} holds {key}, for which this model has no linear map: {of}")
        wide = (
            [config.rank, linears[name].in_features] if matched[2] == "A" else [linears[name].out_features, config.rank]
        )
        if entry["shape"] != wide:
            raise ValueError(f"{path}: {key} has the shape {entry['shape']}, this model and r ask for {wide}: {of}")
        if entry["dtype"] not in (*DTYPES, "F64"):
            raise ValueError(f"{path}: {key} is {entry['dtype']}: expected one of {', '.join(DTYPES)}")
        places.setdefault(name, {})[matched[2]] = key
    for name, parts in places.items():
        if len(parts) != 2:
            raise ValueError(
                f"{path} holds only lora_{next(iter(parts))} of {name}: an update is A and B; copy it again"
            )
    if not places:
        raise ValueError(f"{path} holds no update: copy it again")
    return places


def _named_by(model: nn.Module, targets: str | tuple[str, ...]) -> set[str]:
    try:
        return set(find_linears(model, targets))
    except ValueError:  # written for other spellings of the names: the weights decide
        return set()


# %%
with tempfile.TemporaryDirectory() as work:
    save_adapter(model, work)
    print((Path(work) / CONFIG_FILE).read_text())
    header = read_header(Path(work) / WEIGHTS_FILE)
    print(next(iter(header)))
    fresh = load(adapter=work)
assert len(header) == 2 * 28
assert all(torch.equal(tensor, bits[name]) for name, tensor in fresh.state_dict().items())

# %% [markdown]
# ## A new shape and a new colour
#
# Now the story this chapter is for. The pocket model knows eight shapes and eight colours. It has never seen an arrow, nor
# anything pink. First, while the world is as it was, we write down a hundred and more questions about it.


# %%
def one_of_each(scenes: list[Scene], seed: int) -> list[tuple]:
    rng = random.Random(seed)
    asked = [(scene, ask(scene, task, rng)) for scene in scenes for task in TASKS]
    return [(scene, question) for scene, question in asked if question is not None]


old_scenes = [make_scene(seed) for seed in range(71_000_000, 71_000_024)]
old_questions = one_of_each(old_scenes, seed=1)
len(old_questions)

# %% [markdown]
# Then the world gets two words. An arrow is drawn as a triangle on a bar, so `draw_scene` can paint it as two things.

# %%
SHAPES["arrow"], COLOURS["pink"] = "arrows", (240, 120, 185)


def with_arrows(scene: Scene) -> Scene:
    """Each arrow as a triangle above and a bar below, which the painter of chapter 01 knows."""
    things = []
    for thing in scene.things:
        top, left, bottom, right = thing.box
        middle, third = top + (bottom - top) * 11 // 20, (right - left) // 3
        if thing.shape == "arrow":
            things.append(replace(thing, shape="triangle", box=(top, left, middle, right)))
            things.append(replace(thing, shape="square", box=(middle, left + third, bottom, right - third)))
        else:
            things.append(thing)
    return replace(scene, things=tuple(things))


def is_new(text: str) -> bool:
    return "arrow" in text or "pink" in text


def scenes_with(new: bool, seed: int, max_things: int):
    """Scenes for ever, all with something new in them, or all without."""
    while True:
        scene = make_scene(seed, max_things)
        if is_new(caption(scene)) == new:
            yield scene
        seed += 1


stream = scenes_with(new=True, seed=72_000_000, max_things=2)
new_scenes = [next(stream) for _ in range(32)]
new_questions = [pair for pair in one_of_each(new_scenes, seed=2) if is_new(f"{pair[1].prompt} {answer_text(pair[1])}")]
tokenizer = model.processor.tokenizer
pieces = {word: [tokenizer.decode([token]) for token in tokenizer.encode(f" {word}")] for word in ("arrow", "pink")}
len(new_questions), pieces

# %% [markdown]
# The tokenizer has no piece for either word, so it spells them. The embeddings stay frozen: no row of the table is new. The
# decoder must learn to say pieces one after the other that never stood together.
#
# What does the model say before it is taught?


# %%
def answers_of(model: PaliGemma, pairs: list[tuple]) -> list[str]:
    answers = [""] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place][1].prompt))
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        pictures = [draw_scene(with_arrows(pairs[place][0])) for place in part]
        batch = model.processor.prepare(pictures, [pairs[place][1].prompt for place in part])
        found = generate_answers(model, batch, tokenizer.decode, max_new_tokens=40)
        for place, answer in zip(part, found):
            answers[place] = answer.text
    return answers


def is_right(question, answer: str) -> bool:
    if question.task != "detect":
        return answer == question.answer
    found, _ = parse(answer, 112, 112)
    every, _ = compare_boxes([detection.box for detection in found], question.boxes)
    return every and all(detection.label == question.label for detection in found)


def shares(pairs: list[tuple], answers: list[str]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for (_, question), answer in zip(pairs, answers):
        right.setdefault(question.task, []).append(is_right(question, answer))
        right.setdefault("all", []).append(right[question.task][-1])
    return {task: sum(good) / len(good) for task, good in sorted(right.items())}


model = load()
before = {"old": answers_of(model, old_questions), "new": answers_of(model, new_questions)}
known, unknown = shares(old_questions, before["old"]), shares(new_questions, before["new"])
assert known["all"] > 0.9 and unknown["all"] < 0.4
for name, result in (("old", known), ("new", unknown)):
    print(name, {task: f"{share:.0%}" for task, share in result.items()})

# %% [markdown]
# Some new questions it answers by chance: "yes" and "no", and numbers of pink things, are old words.
#
# ## Less than a minute
#
# Rank 16, and an alpha of 64: loud, for there is little time. Two of three pictures show something new, one shows old
# things only, so that old answers stay in use. The packs are those of chapter 17: several questions behind one picture.
# The loop is that of chapter 16, at its shortest.


# %%
def lessons(seed: int, size: int):
    """Packs of pictures with questions: two of three pictures show something new."""
    packer, rng = Packer(model.processor), random.Random(seed)
    new, old = scenes_with(True, seed, 2), scenes_with(False, seed + 500_000, 5)
    plan = {"caption": 1, "colour": 2, "count": 1, "yes_no": 1, "detect": 1}
    while True:
        scenes, asked = [], []
        for _ in range(size):
            fresh = rng.random() < 0.67
            scenes.append(next(new if fresh else old))
            pairs = [(question.prompt, answer_text(question)) for question in questions_about(scenes[-1], plan, rng)]
            kept = [pair for pair in pairs if not fresh or is_new(" ".join(pair)) or rng.random() < 0.3]
            asked.append(kept[:5])
        yield packer.pack([with_arrows(scene) for scene in scenes], asked)


torch.manual_seed(0)
add_lora(model, LoraConfig(rank=16, alpha=64))
learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(learning, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
first = tokenizer.token_id(LOCS[0])
steps, losses, started = 170, [], time.perf_counter()
for step, pack in zip(range(steps), lessons(seed=73_000_000, size=4)):
    optimizer.param_groups[0]["lr"] = 3e-3 * learning_rate_factor(step, steps, warmup=10, hold=0.5)
    loss = packed_loss(model, pack, range(first, first + len(LOCS)))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(learning, 1.0)
    optimizer.step()
    losses.append(loss.item())
taught = sum(parameter.numel() for parameter in learning)
assert taught < 0.08 * count_parameters(model)
print(f"{taught:,} numbers taught in {time.perf_counter() - started:.0f} s; loss {losses[0]:.1f} to {losses[-1]:.2f}")

# %%
after = {"old": answers_of(model, old_questions), "new": answers_of(model, new_questions)}
kept, learned = shares(old_questions, after["old"]), shares(new_questions, after["new"])
print("old", {task: f"{known[task]:.0%} -> {kept[task]:.0%}" for task in known})
print("new", {task: f"{unknown[task]:.0%} -> {learned[task]:.0%}" for task in unknown})
assert learned["all"] > 0.55 and learned["all"] > unknown["all"] + 0.25
assert kept["all"] > known["all"] - 0.15

# %%
captions = [place for place, (_, question) in enumerate(new_questions) if question.task == "caption"]
arrows = [place for place in captions if "arrow" in new_questions[place][1].answer]
pink = [place for place in captions if place not in arrows]
figure, axes = plt.subplots(1, 4, figsize=(9, 3.4))
for axis, place in zip(axes, [*arrows[:2], *pink[:2]]):
    axis.imshow(draw_scene(with_arrows(new_questions[place][0])))
    for row, (said, colour) in enumerate(((before["new"][place], "0.35"), (after["new"][place], ANSWER))):
        text = f"{('before', 'after')[row]}: {said}".replace(" and ", "\nand ")
        axis.text(56, 118 + 22 * row, text, ha="center", va="top", size=8, color=colour)
    axis.set(ylim=(160, -1))
    axis.axis("off")
save(figure, "18_words")

# %% [markdown]
# *Figure: four small pictures with arrows or pink things. Under each stand two captions: before the lesson, in grey, known
# words in place of the new ones; after it, in green, captions with "arrow" or "pink". Not each of them is right yet: a plural
# may be missing, or the shape may be another.*

# %% [markdown]
# ## What was forgotten
#
# Teaching moves what was there. Which old answers were right before and are wrong now, and the other way round?

# %%
lost, won = [], []
for (_, question), early, late in zip(old_questions, before["old"], after["old"]):
    was, still = is_right(question, early), is_right(question, late)
    (lost if was and not still else won if still and not was else []).append((question, late))
print(f"of {len(old_questions)} old questions {len(lost)} were lost and {len(won)} won")
for question, late in lost[:4]:
    print(f"  {question.prompt}: {answer_text(question)!r:.60}, now {late!r:.60}")
assert len(lost) <= 0.2 * len(old_questions)

# %%
tasks = [task for task in TASKS if task in known and task in unknown]
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
results = (("old questions", known, kept), ("questions on arrows and pink", unknown, learned))
for axis, (title, early, late) in zip(axes, results):
    for place, task in enumerate(tasks):
        axis.plot([place, place], [early[task], late[task]], color="0.75", lw=2, zorder=1)
        axis.scatter([place], [early[task]], color=GREY, zorder=2, s=36, marker="s")
        axis.scatter([place], [late[task]], color=ANSWER, zorder=3, s=36)
    axis.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], rotation=25)
    axis.set_title(title, size=10)
    axis.set(ylim=(-0.05, 1.05), xlim=(-0.5, len(tasks) - 0.3))
axes[0].set_ylabel("share right")
axes[1].annotate("before", (0, unknown[tasks[0]]), xytext=(9, 2), textcoords="offset points", color="0.35", size=9)
axes[1].annotate("after", (0, learned[tasks[0]]), xytext=(9, 2), textcoords="offset points", color=ANSWER, size=9)
save(figure, "18_kept")

# %% [markdown]
# *Figure: two panels, a grey square before and a green dot after for each task. On the left, old questions, dots lie on or
# a little below their squares near the top. On the right, questions on the new words, the dots of caption, colour and
# detect lie far above their squares; counts stay about where they were, and "left of" was asked a handful of times only.*
#
# The sum of it: two words cost a few old answers. The fix is in the lessons, not in the method: more old pictures among
# them, and more time. And since the base is frozen, nothing is lost for good: take the adapter away, and every old answer
# is back.

# %%
for module in model.modules():
    if isinstance(module, LoraLinear):
        module.scale, module.taught_scale = 0.0, module.scale
assert answers_of(model, old_questions[:64]) == before["old"][:64]
for module in model.modules():
    if isinstance(module, LoraLinear):
        module.scale = module.taught_scale

# %% [markdown]
# ## A look inside
#
# Where did the lesson go? For each map, the size of its update against the size of its matrix (the root of the sum of
# squares of each).

# %%
maps = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
size = torch.zeros(4, 7)
for name, module in model.named_modules():
    if isinstance(module, LoraLinear):
        layer, column = int(name.split(".")[2]), maps.index(name.rpartition(".")[2])
        update = module.scale * (module.lora_B @ module.lora_A).detach()
        size[layer, column] = update.norm() / module.base.weight.norm()
figure, axis = plt.subplots(figsize=(6, 2.6))
axis.imshow(size, cmap="Greys", vmin=0)
for layer in range(4):
    for column in range(7):
        dark = size[layer, column] > 0.6 * size.max()
        text = f"{size[layer, column]:.2f}"
        axis.text(column, layer, text, ha="center", va="center", size=8, color="white" if dark else "black")
axis.set_xticks(range(7), [name.removesuffix("_proj") for name in maps])
axis.set_yticks(range(4), [f"block {layer + 1}" for layer in range(4)])
axis.tick_params(length=0)
assert size[3, 6] == size.max()
save(figure, "18_where")

# %% [markdown]
# *Figure: a grid of four blocks by seven maps; the darker a square, the larger the update against its matrix. The column of
# the down maps is the darkest, most of all in the last block.*
#
# The last block's down map changed most. It stands nearest to the head, and has to put together pieces of words that never
# stood together.
#
# ## The bill
#
# Rank 64 in all seven maps of the decoder, for the pocket model and for the 3B one, built without memory on the meta
# device. AdamW needs a gradient and two averages for each number that learns.


# %%
def trained_numbers(linears: dict[str, nn.Module], rank: int) -> int:
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears.values())


vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
text = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8}
text |= {"num_key_value_heads": 1, "vocab_size": 257216}
sizes = {"model_type": "paligemma", "vision_config": vision | {"patch_size": 14}, "text_config": text}
with torch.device("meta"):
    large = PaliGemma(PaliGemmaConfig.from_dict(sizes | {"image_token_index": 257152}))
for name, whole in (("pocket", load()), ("3B", large)):
    total, few = count_parameters(whole), trained_numbers(find_linears(whole, DECODER_LINEARS), 64)
    print(f"{name}: {few:,} of {total:,} learn ({few / total:.1%}), a file of {4 * few / 1e6:.1f} MB,", end=" ")
    print(f"gradients and averages {3 * 4 * few / 1e9:.2f} GB instead of {3 * 4 * total / 1e9:.2f}")
assert total == 2_923_466_480 and few == 78_446_592
assert few / total < 0.03

# %% [markdown]
# For the pocket model rank 64 is no small rank: its matrices are only 192 wide. For the 3B model less than three hundredths
# learn. The frozen matrices themselves remain to be stored; that is the next chapter's matter.
#
# ## Your turn
#
# **1.** ★ Write `numbers(rank, rows, columns)`: how many numbers has the passage beside a matrix of that size?


# %%
def numbers(rank: int, rows: int, columns: int) -> int: ...


check(numbers, ((1, 4, 4), 8), ((64, 16384, 2048), 1_179_648))

# %% [markdown]
# **2.** ★★ From which rank on is the passage as large as the matrix? Write `break_even(rows, columns)`, rounded up.


# %%
def break_even(rows: int, columns: int) -> int: ...


check(break_even, ((4, 4), 2), ((192, 192), 96), ((16384, 2048), 1821))

# %% [markdown]
# **3.** ★★ `merged(weight, down, up, scale)`: the one matrix that does what matrix and passage do together, as a tensor.


# %%
def merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor: ...


down, up = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]])
check(merged, ((torch.ones(2, 3), down, up, 2.0), torch.tensor([[3.0, 5.0, 7.0], [5.0, 11.0, 13.0]])))

# %% [markdown]
# **4.** ★★★ Which rank does an update need? Any matrix is a sum of matrices of rank one, each with a size of its own, its
# *singular value*; `torch.linalg.svdvals` gives them, largest first. To keep the r largest is the best that rank r can do,
# and the sum of their squares is the sum of squares of the matrix that is kept. Write `needed_rank(update, share)`: the
# least rank that keeps this share of it.


# %%
def needed_rank(update: torch.Tensor, share: float) -> int: ...


check(needed_rank, ((torch.diag(torch.tensor([3.0, 2.0, 1.0])), 0.9), 2), ((torch.eye(4), 0.75), 3))

# %% [markdown]
# Next: chapter 19 stores the frozen base in four bits, and teaches it all the same.
