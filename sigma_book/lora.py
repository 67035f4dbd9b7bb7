"""A few new numbers: LoRA.

How does a large model learn something new when only a few hundredths of its numbers may change?

Tangled from chapters/18_lora.py: edit there, then run python -m sigma_book.tangle.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from sigma_book.processor import folder_beside, read_json
from sigma_book.weights import DTYPES, our_name, read_header, write_json, write_tensors

__all__ = [
    "CONFIG_FILE",
    "DECODER_LINEARS",
    "POCKET_BASE",
    "WEIGHTS_FILE",
    "LoraConfig",
    "LoraLinear",
    "MergedLinear",
    "adapter_base",
    "add_lora",
    "find_linears",
    "is_adapter",
    "load_adapter",
    "merge_lora",
    "save_adapter",
    "unmerge_lora",
]

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
