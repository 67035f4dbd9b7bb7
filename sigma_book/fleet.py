"""Many pictures, other engines, many replicas, put together. Thin; the ideas stay in the chapters."""

import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch

from sigma_book.assemble import POCKET, base_folder, load
from sigma_book.bulk import (
    AnswerParts,
    BulkConfig,
    EngineReport,
    answer_with_ray,
    claims,
    compare_engine,
    open_rows,
    processors,
)
from sigma_book.data import Example
from sigma_book.generation import whole_number
from sigma_book.lora import LoraLinear, is_adapter, merge_lora
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import read_json
from sigma_book.runs import asker, file_mark, full_path, held_alone, model_mark
from sigma_book.training import claim_folder, remark
from sigma_book.weights import DTYPES, find_folder, model_folder_beside, pick_device, save_model
from sigma_book.world import TASKS, ask, draw_scene, make_scene

__all__ = ["answer_file", "compare", "export_model"]


def answer_file(
    data: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    root: str | Path | None = None,
    actors: int = 1,
    batch_size: int = 16,
    max_new_tokens: int = 100,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    form: str = "jsonl",
    rows_per_part: int = 10_000,
) -> Counter:
    """Answer every row of a file of pictures and prompts, greedily, with Ray Data.

    Called again with the same arguments, a run that was stopped goes on behind its last answer.

    Parameters
    ----------
    data : path
        JSON lines `{"image": path, "prompt": text}`, or Parquet with these columns, where `image` may also hold the bytes
        of picture files.
    out : path
        A folder for this run alone: `part-00000.jsonl`, ... with a record for each row, in order, and `run.json`.
    model, adapter, device, dtype, quantize
        As `load` takes them; each actor loads the model once.
    root : path, optional
        Where relative paths of pictures begin; the file's folder by default.
    actors : int
        Processes that have the model. On GPUs, each claims one.
    batch_size : int
        Pictures that are answered together.
    max_new_tokens : int
        Longest answer.
    form : str
        `jsonl` or `parquet`.
    rows_per_part : int
        Rows in each file of the output.

    Returns
    -------
    collections.Counter
        How many rows are `answered`, and how many have an `error`.

    Raises
    ------
    ValueError
        If an argument is out of its range, the file cannot be used at all, or the folder holds another run. A single row
        that is broken does not raise: its sentence stands in its record.
    FileNotFoundError, RuntimeError
        As `load`; or if Ray is not installed, an actor fails, or the disk is full.
    """
    whole_number("max_new_tokens", max_new_tokens, least=1)
    rows = open_rows(data, root)
    config = _shared(actors, batch_size, device)
    run = {"data": file_mark(data), "root": full_path(root), "model": model_mark(model), "dtype": str(dtype)}
    run |= {"quantize": quantize, "adapter": None if adapter is None else model_mark(adapter)}
    run |= {"max_new_tokens": max_new_tokens, "form": form, "rows_per_part": rows_per_part}
    parts = AnswerParts(Path(out), len(rows), rows_per_part, form)
    begun = (parts.folder / "run.json").exists()  # it may be another's, who is at work
    with held_alone(parts.folder) if begun else nullcontext():
        claim_folder(parts.folder, run, saved=("part-*",))
    with held_alone(parts.folder):
        if (start := parts.next_index()) < len(rows):
            if start:
                remark(f"going on behind row {start:,} of {len(rows):,}")
            make_model = partial(
                load,
                full_path(model),
                device="cuda" if config.gpus else device,
                dtype=dtype,
                quantize=quantize,
                adapter=full_path(adapter),
            )
            make_answer = partial(_load_asker, max(1, processors() // actors), max_new_tokens, make_model)
            with closing(answer_with_ray(rows, start, make_answer, config)) as records:
                parts.write(records)
        return Counter("answered" if record["error"] is None else "error" for record in parts)


def _shared(actors: int, batch_size: int, device: str) -> BulkConfig:
    """Claims that leave half of this machine's processors for Ray itself."""
    whole_number("actors", actors, least=1)
    if not os.environ.get("RAY_ADDRESS"):  # on a cluster, other machines have the devices
        pick_device(device)
    return BulkConfig(actors, batch_size, *claims(2 * actors, device))


def _load_asker(
    threads: int, max_new_tokens: int, make_model: Callable[[], PaliGemma]
) -> Callable[[list[Example]], list[str]]:
    """In an actor: load the model, and give the function that asks it."""
    torch.set_num_threads(threads)
    return asker(make_model(), max_new_tokens)


def export_model(
    out: str | Path, *, model: str | Path | None = None, adapter: str | Path | None = None, dtype: str = "auto"
) -> Path:
    """Write a model as a folder that `transformers` and other engines read; an adapter is added to the weights.

    Parameters
    ----------
    out : path
        Appears whole, or not at all.
    model : path, optional
        What `load` takes: also the folder of an adapter, or big_vision's `.npz`.
    adapter : path, optional
    dtype : str
        float32, bfloat16 or float16; `auto` is what `config.json` says, or float32.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError, FileNotFoundError, RuntimeError
        As `load` and `save_model`.
    """
    out = Path(out)
    loaded = load(model, device="cpu", dtype=_stored_dtype(model) if dtype == "auto" else dtype, adapter=adapter)
    if any(isinstance(module, LoraLinear) for module in loaded.modules()):
        merge_lora(loaded)
    with model_folder_beside(out) as fresh:
        save_model(loaded, fresh)
        loaded.processor.save(fresh)
    return out


def _stored_dtype(model: str | Path | None) -> str:
    """The dtype that the configuration of a model names; of an adapter, that of its base."""
    folder = POCKET if model is None else find_folder(model)
    if is_adapter(folder):
        folder = base_folder(folder)
    if folder.is_file():
        return "float32"
    values = read_json(folder / "config.json")
    name = values.get("dtype", values.get("torch_dtype"))
    return name if name in [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()] else "float32"


def compare(
    url: str,
    *,
    model: str | Path | PaliGemma | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    questions: int = 8,
    key: str | None = None,
) -> EngineReport:
    """Ask an engine about drawn scenes, and tell from its log-probabilities whether it reads as PaliGemma must.

    Parameters
    ----------
    url : str
        Of its OpenAI-compatible interface, such as http://localhost:8000/v1.
    model, adapter, device, dtype
        As `load` takes them: the weights that the engine has.
    questions : int
    key : str, optional
        Sent as a bearer token.

    Raises
    ------
    ValueError, FileNotFoundError, RuntimeError
        As `load` and `compare_engine`.
    """
    whole_number("questions", questions, least=1)
    loaded = (
        model if isinstance(model, PaliGemma) else load(model, device=pick_device(device), dtype=dtype, adapter=adapter)
    )
    rng, asked, seed = random.Random(0), [], 0
    while len(asked) < questions:
        question = ask(make_scene(seed), TASKS[seed % len(TASKS)], rng)
        if question is not None:
            asked.append((draw_scene(make_scene(seed)), question.prompt))
        seed += 1
    return compare_engine(url, loaded, asked, key=key)
