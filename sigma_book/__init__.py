"""PaliGemma, built in the chapters of a book.

The public names are imported when they are first asked for: `import sigma_book` alone is quick and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sigma_book.assemble import generate, load
    from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
    from sigma_book.processor import Processor
    from sigma_book.runs import evaluate, finetune
    from sigma_book.training import TrainingConfig

__version__ = "0.1.0"
__all__ = [
    "PaliGemma",
    "PaliGemmaConfig",
    "Processor",
    "TrainingConfig",
    "__version__",
    "evaluate",
    "finetune",
    "generate",
    "load",
]

_MODULES = {
    "load": "assemble",
    "generate": "assemble",
    "evaluate": "runs",
    "finetune": "runs",
    "PaliGemma": "paligemma",
    "PaliGemmaConfig": "paligemma",
    "Processor": "processor",
    "TrainingConfig": "training",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
