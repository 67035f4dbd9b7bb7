"""Whole runs, put together: fine-tuning a model on a file, and evaluating one. Thin; the ideas stay in the chapters."""

import json
import math
import os
import random
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sigma_book.answers import (
    EVALUATION_TASKS,
    AnswerFile,
    answer_examples,
    answer_from,
    answer_speed,
    read_official,
    write_official,
    write_report,
)
from sigma_book.assemble import POCKET, generate, load
from sigma_book.batches import Batches
from sigma_book.data import Example, Examples, read_examples
from sigma_book.generation import Sampling, check_beams, read_stop_ids, whole_number
from sigma_book.locate import load_mask_vae
from sigma_book.lora import CONFIG_FILE, DECODER_LINEARS, LoraConfig, add_lora, find_linears, is_adapter, save_adapter
from sigma_book.npz import read_npz_config
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Batch, Processor, Tokenizer, file_beside, make_folder, read_json
from sigma_book.qlora import nf4_bytes
from sigma_book.scale import (
    RankCheckpoints,
    Ranks,
    asked_whole,
    check_parallel,
    choose_parallel,
    copy_loss,
    gather,
    join_ranks,
    load_sharded,
    never_empty,
    others_there,
    same_place,
    shape_model,
    share_of_batch,
    under_torchrun,
)
from sigma_book.training import (
    ALONE,
    AUTOCAST,
    Alone,
    Bill,
    Checkpoints,
    Progress,
    TrainingConfig,
    adamw_by_part,
    answer_loss,
    answer_tokens,
    blocks_of,
    claim_folder,
    draw_losses,
    examine,
    file_checksum,
    free_bytes,
    freeze_parts,
    recompute_activations,
    remark,
    train,
    training_bill,
)
from sigma_book.weights import (
    find_folder,
    model_folder_beside,
    pick_device,
    read_config,
    read_header,
    save_model,
)

__all__ = ["asker", "estimate", "evaluate", "file_mark", "finetune", "full_path", "held_alone", "model_mark"]


def finetune(
    data: str | Path,
    out: str | Path,
    config: TrainingConfig | None = None,
    *,
    model: str | Path | None = None,
    form: str = "auto",
    root: str | Path | None = None,
    annotations: str | Path | None = None,
    evaluate: str | Path | None = None,
    evaluate_annotations: str | Path | None = None,
    evaluate_every: int | None = None,
    evaluate_limit: int = 200,
    save_every: int = 500,
    keep: int = 3,
    workers: int = 0,
    on_error: str = "stop",
    truncate: bool = False,
    wandb: str | None = None,
    device: str | torch.device = "auto",
    parallel: str | None = None,
) -> Path:
    """Teach a model what a file of examples says; called again with the same arguments, go on where it stopped.

    Under `torchrun` all its processes take each step together. The batch is that of all ranks together, so any number
    of ranks sees the same batches, and a run may go on with another number.

    Parameters
    ----------
    data : path
        What `read_examples` takes, with `form`, `root` and `annotations`.
    out : path
        The folder of the run: `log.csv`, `checkpoints/`, `evaluations.json`, `best/`, `losses.png`, and at the end
        the model in `final/`.
    config : TrainingConfig, optional
        Everything that decides the numbers.
    model : path or hub id, optional
        What to begin from; the pocket model by default.
    evaluate : path, optional
        Examples that are not learned from, in the same form: asked before the first step, after the last, and every
        `evaluate_every` steps between; at most `evaluate_limit` of them. The best model so far stands in `best/`;
        where the limit has changed on the way, the best since.
    evaluate_annotations : path, optional
        The answers to them, where they lie in a file of their own, as in VQAv2; `annotations` by default.
    save_every, keep : int
        A checkpoint after so many steps; so many stay.
    workers, on_error, truncate
        As in `Batches`; rows that are left out are listed in `skipped.jsonl`.
    wandb : str, optional
        A project of Weights & Biases that follows the run.
    device : str or torch.device
        auto, cuda, mps or cpu.
    parallel : str, optional
        Under `torchrun`: ddp (each rank holds the whole model) or fsdp (each holds a part of every matrix). By default
        what the memory that is free allows, see `choose_parallel`.

    Returns
    -------
    Path
        The folder `final`.

    Raises
    ------
    ValueError, FileNotFoundError, RuntimeError
        As `load`, `read_examples`, `Batches`, `claim_folder` and `train`; the sentence says what to do.
    KeyboardInterrupt
        After Ctrl-C; the run is saved.
    """
    out, config = Path(out), config or TrainingConfig()
    for name, value in (("save_every", save_every), ("keep", keep), ("evaluate_limit", evaluate_limit)):
        whole_number(name, value, least=1)
    if evaluate_every is not None:
        whole_number("evaluate_every", evaluate_every, least=1)
    ranks, device = _meet(device, parallel)
    say = remark if ranks.rank == 0 else _say_nothing
    batch_size = share_of_batch(config.batch_size, ranks)
    source = {"form": form, "root": root, "annotations": annotations}
    examples = _examples(data, source, say)
    held_out = None
    if evaluate is not None:
        asked = source | {"annotations": annotations if evaluate_annotations is None else evaluate_annotations}
        held_out = _sample(_examples(evaluate, asked, say), evaluate_limit)
    config = _settled(config, device)
    base = _base_source(model)
    if isinstance(ranks, Ranks):
        parallel = _parallel(parallel, base, config, ranks)
        say(f"{ranks.size} ranks, {parallel}: {batch_size} of the {config.batch_size} examples of a batch for each")
    place = {"form": examples.form, "root": None if root is None else str(root)}
    files = {"data": data, "annotations": annotations, "evaluate": evaluate}
    files |= {"evaluate_annotations": evaluate_annotations}
    identity = {"model": model_mark(model)} | {name: file_mark(path) for name, path in files.items() if path}
    identity |= asdict(config) | place | ({} if parallel is None else {"processes": "many"})
    if config.method == "full":  # they decide nothing there
        identity = {key: value for key, value in identity.items() if key not in ("rank", "alpha", "dropout")}
    if ranks.rank == 0:
        with _held_if_ours(out):  # it may be another's, who is at work
            _same_kind(out, parallel)
            claim_folder(out, identity, later=place)
    with others_there(str(out)), held_alone(out) if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            claim_folder(out, identity, later=place)  # another may have come between
        final, steps = out / "final", _steps(config, len(examples))
        if ranks.first(ranks.rank == 0 and final.is_dir()):
            say(f"{out} is finished: the model of its last step stands in {final}; give another folder for a new run")
            ranks.leave()
            return final
        if ranks.rank == 0:
            _tidy(out)
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        learner, save, loss = _ready(model, config, device, ranks, parallel)
        optimizers = [adamw_by_part(learner, config)]
        kind = Checkpoints if parallel is None else partial(RankCheckpoints, ranks=ranks)
        checkpoints = kind(out / "checkpoints", learner, optimizers, every=save_every, keep=keep)
        follower = None if wandb is None or ranks.rank else _Follower(wandb, out, identity)
        progress = checkpoints.restore()  # last, so that the random numbers are those of the checkpoint
        if progress.step:
            say(f"going on after step {progress.step} of {steps}")
        begun = progress.step
        batches = Batches(
            examples,
            learner.processor,
            batch_size,
            config.seed,
            epochs=None if on_error == "skip" else config.epochs,  # what is left out is made up for
            rank=ranks.rank,
            world_size=ranks.size,
            workers=workers,
            on_error=on_error,
            skipped=out / "skipped.jsonl" if on_error == "skip" else None,
            max_length=learner.config.text.max_position_embeddings,
            truncate=truncate,
            start=same_place(progress.data, batch_size, ranks.size),
        )
        look = partial(_look, out, learner, held_out, config, batch_size, progress, save, follower, ranks)
        if held_out and progress.step == 0:
            found = look(0)
            say(f"before: {found}")
        train(
            learner,
            lambda one: loss(one.batch.to(device)),
            batches,
            optimizers,
            steps=steps,
            warmup=config.warmup_steps(steps),
            schedule=config.schedule,
            clip=config.clip,
            accumulate=config.accumulate,
            count=lambda one: answer_tokens(one.batch),
            autocast=AUTOCAST[config.dtype],
            log=out / "log.csv" if ranks.rank == 0 else None,
            report_every=evaluate_every or steps,
            report=look if held_out else None,
            each=None if follower is None else follower.step,
            progress=progress,
            checkpoints=checkpoints,
            ranks=ranks,
        )
        if held_out and (not progress.notes or progress.notes[-1]["step"] != steps):
            found = look(steps)
            say(f"after: {found}")
        (cut,) = ranks.sum(batches.num_truncated)
        if follower is not None:
            follower.run.finish()
        save(final)
        if ranks.rank == 0:
            _say_and_draw(out, progress, batches.num_skipped, int(cut), begun)
        ranks.leave()
        return final


def _meet(device: str | torch.device, parallel: str | None) -> tuple[Alone, torch.device]:
    """The processes that `torchrun` started, or this one alone, and where it computes."""
    if under_torchrun():
        ranks = join_ranks(device)
        return ranks, ranks.device
    if parallel is not None:
        raise ValueError(
            f"parallel is {parallel!r}, but this process is alone: start it with torchrun, or leave it out"
        )
    return ALONE, pick_device(device)


def _tidy(out: Path) -> None:
    """Remove what a run that was killed left behind. One without a checkpoint begins again, and may have been another:
    of it only `best/` stays, until the first report puts a new one in its place."""
    if not (out / "best").exists():
        for old in out.glob(".old-best-*"):  # the kill came between two renamings
            os.replace(old, out / "best")
    for rest in (*out.glob(".*best-*"), *out.glob(".*final-*")):  # save_model writes beside its folder as well
        shutil.rmtree(rest)
    if not any(out.glob("checkpoints/[!.]*")):
        for name in ("evaluations.json", "skipped.jsonl", "wandb-id.txt"):
            (out / name).unlink(missing_ok=True)


def _say_nothing(text: str) -> None:
    """What ranks beside the first have to remark."""


def _parallel(parallel: str | None, base: Path, config: TrainingConfig, ranks: Ranks) -> str:
    """ddp or fsdp, as asked or as rank 0 finds right, once it is known to go together with the rest."""
    if parallel is None:
        sizes = read_npz_config(base) if base.is_file() else read_config(base)
        chosen = choose_parallel(sizes, config, ranks.size, ranks.free_bytes())
        parallel = ("ddp", "fsdp")[int(ranks.first(chosen == "fsdp"))]
    check_parallel(parallel, config)
    if parallel == "fsdp" and base.is_file():
        raise ValueError(f"fsdp reads folders of safetensors: load {base} and save it with save_model, or take ddp")
    return parallel


def _held_if_ours(out: Path) -> AbstractContextManager:
    """`held_alone` for the folder of a run or a new one; a folder of something else is left as it is."""
    if not out.exists():
        make_folder(out)
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    return held_alone(out) if "run.json" in names or names <= {".lock", ".run.json.part"} else nullcontext()


def _same_kind(out: Path, parallel: str | None) -> None:
    """One process and many save in different forms, so a run stays what it began as."""
    path = out / "run.json"
    many = path.exists() and read_json(path).get("processes") == "many"
    if many and parallel is None:
        raise ValueError(
            f"{out} holds a run of many processes: go on with torchrun (any number of them, also 1), or give another folder"
        )


def _ready(
    model: str | Path | None, config: TrainingConfig, device: torch.device, ranks: Alone, parallel: str | None
) -> tuple[PaliGemma, Callable[[Path], None], Callable[[Batch], torch.Tensor]]:
    """A model that is ready to learn, what writes it into a new folder (all ranks call it), and its loss."""
    if parallel == "fsdp":
        folder = _model_source(model)
        learner = load_sharded(folder, config, ranks)
        learner.processor = Processor.from_folder(folder)
        learner.stop_ids = read_stop_ids(folder, learner.config.eos_token_id)
        if config.recompute:
            recompute_activations(blocks_of(learner))
        learner.train()
        save = partial(_gather_and_write, learner, config, _adapter_base(model), ranks)
    else:
        learner, write = _learner(model, config, device)
        save = partial(_write_first, write, ranks)
    if parallel is None:
        return learner, save, partial(answer_loss, learner)
    loss = copy_loss(learner, ranks) if parallel == "ddp" else partial(answer_loss, learner)
    if ranks.rank:
        torch.manual_seed(config.seed + ranks.rank)  # dropout is another on each rank
    return learner, save, lambda batch: loss(never_empty(batch))


@contextmanager
def _whole_in_place(folder: Path) -> Iterator[Path]:
    """`model_folder_beside` that puts a new model in the place of an old one as a whole, so that no kill mixes the two."""
    fresh, old = (folder.with_name(f".{age}-{folder.name}-model") for age in ("new", "old"))
    with model_folder_beside(fresh if folder.is_dir() else folder) as written:
        yield written
    if fresh.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)


def _write_first(write: Callable[[Path], None], ranks: Alone, folder: Path) -> None:
    if ranks.rank == 0:
        with _whole_in_place(folder) as fresh:
            write(fresh)


def _gather_and_write(
    learner: PaliGemma, config: TrainingConfig, base: str | Path | None, ranks: Ranks, folder: Path
) -> None:
    """Write a model that is cut over the ranks: rank 0 holds the whole of it (or of its adapter) for a moment."""
    tensors = gather(learner, ranks, learning=config.method != "full")
    if ranks.rank == 0:
        whole = shape_model(learner.config, config)
        whole.load_state_dict(tensors, strict=config.method == "full", assign=True)
        whole.processor, whole.stop_ids = learner.processor, learner.stop_ids
        with _whole_in_place(folder) as fresh:
            _write_model(whole, config, base, fresh)


def _write_model(model: PaliGemma, config: TrainingConfig, base: str | Path | None, folder: Path) -> None:
    """The model, or its adapter alone, as a folder that `load` reads."""
    if config.method == "full":
        save_model(model, folder)
        model.processor.save(folder)
    else:
        save_adapter(model, folder, base)


def _adapter_base(model: str | Path | None) -> str | Path | None:
    """What an adapter says it was made for."""
    return None if model is None else Path(model).resolve() if Path(model).exists() else model


@contextmanager
def held_alone(out: Path) -> Iterator[None]:
    """Keep a second process out of the folder of a run, as long as this one lives; a kill ends it too."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RuntimeError(f"another process is at work in {out}: wait for it, or give another folder") from error
        except OSError:
            remark(f"{out} is on a file system without locks: see to it that no second process works there")
        yield


def _say_and_draw(out: Path, progress: Progress, skipped: int, cut: int, begun: int) -> None:
    """What is left to tell of a run: rows that were left out or cut, and the picture of its losses.

    Rows that were cut are counted since the step at which this process has `begun`.
    """
    for count, what in (
        (skipped, f"left out and listed in {out / 'skipped.jsonl'}"),
        (cut, f"cut since step {begun}" if begun else "cut"),
    ):
        if count:
            remark(f"{count} rows were {what}")
    path = out / "losses.png"
    try:
        with file_beside(path) as fresh:
            draw_losses(progress, fresh)
    except ImportError:
        remark("no picture of the losses: install matplotlib (pip install 'sigma-book[book]')")
    except (OSError, RuntimeError) as error:  # the model is written, and the numbers stand in log.csv
        remark(f"no picture of the losses in {path}: {error}")


def _examples(path: str | Path, source: dict, say: Callable[[str], None] = remark) -> Examples:
    """Open a file of examples, and say what it was taken for."""
    if source["form"] == "coco-segment":
        source = source | {"encode_mask": load_mask_vae().codes_of}
    examples = read_examples(path, **source)
    for text in (f"{len(examples):,} examples of the form {examples.form}", *examples.remarks):
        say(f"{path}: {text}")
    return examples


def _sample(examples: Examples, limit: int) -> list[Example]:
    """The same few of a file each time, from all over it."""
    chosen = random.Random(0).sample(range(len(examples)), min(limit, len(examples)))
    return [examples[index] for index in chosen]


def _settled(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """The configuration with nothing left to chance or to the machine."""
    if config.method != "full":
        LoraConfig(config.rank, config.alpha, config.dropout)  # what is wrong is said before anything is written
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    epochs = 1 if config.epochs is None and config.max_steps is None else config.epochs
    return replace(config, dtype=dtype, epochs=epochs, recompute=config.recompute or config.method == "qlora")


def _steps(config: TrainingConfig, examples: int) -> int:
    """How many steps the run has."""
    if config.epochs is None:
        return config.max_steps
    batches = config.epochs * -(-examples // config.batch_size)
    steps = -(-batches // config.accumulate)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def file_mark(path: str | Path) -> str:
    """What tells a file from another: its name, its size and its checksum."""
    path = Path(path)
    return f"{path.name}, {path.stat().st_size:,} bytes, CRC-32 {file_checksum(path):08x}"


def _model_source(model: str | Path | None) -> Path:
    """The folder or file that a model is read from."""
    return POCKET if model is None else find_folder(model)


def _base_source(model: str | Path | None) -> Path:
    """What a run begins from, which is no adapter."""
    source = _model_source(model)
    if is_adapter(source):
        raise ValueError(
            f"{source} is an adapter: give the model it was made for, or first merge the two (`merge_lora`) and save them"
        )
    return source


def model_mark(model: str | Path | None) -> str:
    source = _model_source(model)
    names = (source / "config.json", source / CONFIG_FILE, *sorted(source.glob("*.safetensors")))
    files = [source] if source.is_file() else [path for path in names if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    marks = " ".join(f"{_checksum_of_begins(path):08x}" for path in files)
    return f"{source.resolve().name}, {size:,} bytes, CRC-32 {marks}"


def _checksum_of_begins(path: Path) -> int:
    """CRC-32 of a file of a model. Of a large one not all is read: the first 16 MiB, or 64 KiB of each tensor."""
    most = 1 << 24
    if path.suffix != ".safetensors" or path.stat().st_size <= most:
        return file_checksum(path, most)
    places = sorted(tuple(entry["data_offsets"]) for entry in read_header(path).values())
    with path.open("rb") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
        value = file_checksum(path, first)
        for begin, end in places:
            file.seek(first + begin)
            value = zlib.crc32(file.read(min(end - begin, 1 << 16)), value)
    return value


def _learner(
    model: str | Path | None, config: TrainingConfig, device: torch.device
) -> tuple[PaliGemma, Callable[[Path], None]]:
    """A model that is ready to learn by the method of a run, and what writes it into a folder that is there."""
    if config.method == "full":
        learner = load(model, device=device, dtype="float32")
        for parameter in learner.parameters():
            parameter.data = parameter.data.clone()  # not a window into the file
    else:
        quantize = "nf4" if config.method == "qlora" else None
        learner = load(model, device=device, dtype=config.dtype, quantize=quantize)
    _prepare(config, learner)
    if config.recompute:
        recompute_activations(blocks_of(learner))
    return learner.train(), partial(_write_model, learner, config, _adapter_base(model))


def _prepare(config: TrainingConfig, model: PaliGemma) -> None:
    """Make that learn what a method teaches, and nothing else."""
    if config.method == "full":
        freeze_parts(model, config.freeze)
    else:
        add_lora(model, LoraConfig(config.rank, config.alpha, config.dropout))


class _Follower:
    """Sends steps and evaluations to Weights & Biases, as one run even if it is started several times."""

    def __init__(self, project: str, out: Path, config: dict):
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError("--wandb needs the package wandb: pip install wandb, or leave it out") from error
        mark = out / "wandb-id.txt"
        if not mark.exists():
            with file_beside(mark) as fresh:
                fresh.write_text(uuid.uuid4().hex[:8])
        name = mark.read_text().strip()
        self.run = wandb.init(project=project, dir=str(out), id=name, name=out.name, resume="allow", config=config)

    def step(self, row: list[float]) -> None:
        step, loss, norm, rate, tokens, _ = row
        self.run.log({"loss": loss, "gradient_norm": norm, "rate": rate, "tokens": tokens}, step=int(step) + 1)

    def note(self, found: dict) -> None:
        self.run.log({"held_out/loss": found["loss"], "held_out/exact": found["exact"]}, step=found["step"])


def _look(
    out: Path,
    model: PaliGemma,
    held_out: list[Example],
    config: TrainingConfig,
    batch_size: int,
    progress: Progress,
    save: Callable[[Path], None],
    follower: _Follower | None,
    ranks: Alone,
    step: int,
) -> str:
    """Examine a model, note it, and keep it if it is the best so far; gives a line and some answers."""
    with asked_whole(model):
        settings = {"batch_size": min(32, batch_size), "autocast": AUTOCAST[config.dtype]}
        found = {"step": step} | examine(model, model.processor, held_out, **settings)
    # of other examples, where evaluate_limit has changed, a loss says nothing; nor does one that is no number
    alike = [note["loss"] for note in progress.notes if note["step"] > 0 and note["asked"] == found["asked"]]
    former = filter(math.isfinite, alike)
    if ranks.first(step > 0 and found["loss"] < min(former, default=float("inf"))):
        save(out / "best")
    progress.notes.append(found)
    if ranks.rank == 0:
        notes = [note | {"loss": note["loss"] if math.isfinite(note["loss"]) else None} for note in progress.notes]
        with file_beside(out / "evaluations.json") as fresh:  # JSON has no NaN
            fresh.write_text(json.dumps(notes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if follower is not None:
        follower.note(found)
    answers = [f"  {one['prefix']}: {one['answer']!r}, truth {one['suffix']!r}" for one in found["answers"]]
    line = f"loss {found['loss']:.4f}, {found['exact']:.1%} of {found['asked']} answers exact"
    return "\n".join([line, *answers])


def estimate(
    data: str | Path,
    config: TrainingConfig | None = None,
    *,
    model: str | Path | None = None,
    form: str = "auto",
    root: str | Path | None = None,
    annotations: str | Path | None = None,
    on_error: str = "stop",
    truncate: bool = False,
    device: str | torch.device = "auto",
) -> tuple[Bill, float | None]:
    """What `finetune` with these arguments would cost, without writing anything.

    Returns
    -------
    Bill
        Parameters, bytes and operations of a step, of the longest of the first 32 batches.
    float or None
        Seconds of a step: three are taken in memory, and the last two timed. None if the memory that is free would
        not hold them.

    Raises
    ------
    ValueError, FileNotFoundError, RuntimeError
        As `finetune`.
    """
    if under_torchrun():
        raise ValueError("a dry run counts one process: leave torchrun out (chapter 22 has the bill of many)")
    config, device = config or TrainingConfig(), pick_device(device)
    config = _settled(config, device)
    source = _base_source(model)
    if source.is_file():
        sizes, folder = read_npz_config(source), source.parent
        processor = Processor(Tokenizer.from_folder(folder), sizes.vision.image_size, sizes.vision.num_patches)
    else:
        sizes, processor = read_config(source), Processor.from_folder(source)
    examples = _examples(data, {"form": form, "root": root, "annotations": annotations})
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(
            examples,
            processor,
            config.batch_size,
            config.seed,
            epochs=None if on_error == "skip" else config.epochs,
            on_error=on_error,
            skipped=Path(folder) / "skipped.jsonl",
            max_length=sizes.text.max_position_embeddings,
            truncate=truncate,
        )
        try:
            few = [one.batch for _, one in zip(range(32), batches, strict=False)]
        except RuntimeError as error:  # the list that it names is about to go
            if not batches.num_skipped:
                raise
            first = json.loads((Path(folder) / "skipped.jsonl").read_text(encoding="utf-8").partition("\n")[0])
            raise RuntimeError(f"no row can be read; {first['where']}: {first['reason']}") from error
        if batches.num_skipped:
            remark(f"rows that cannot be read, so far: {batches.num_skipped}")
    longest = max(few, key=lambda batch: batch.input_ids.numel())
    bill = training_bill(sizes, config, longest, partial(_prepare_shapes, config), device)
    if config.method == "qlora":
        bill = _in_nf4(bill, sizes, getattr(torch, config.dtype).itemsize)
    if (free := free_bytes(device)) is not None and bill.bytes > free:
        return bill, None
    learner, _ = _learner(model, config, device)
    progress = Progress()
    train(
        learner,
        lambda batch: answer_loss(learner, batch.to(device)),
        [longest] * (3 * config.accumulate),
        [adamw_by_part(learner, config)],
        steps=3,
        warmup=1,
        accumulate=config.accumulate,
        count=answer_tokens,
        autocast=AUTOCAST[config.dtype],
        label="trial",
        progress=progress,
    )
    return bill, (progress.rows[2][-1] - progress.rows[0][-1]) / 2


def _prepare_shapes(config: TrainingConfig, model: PaliGemma) -> None:
    """The same for a model of shapes alone, which is float32 so far."""
    if config.method != "full":
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to(getattr(torch, config.dtype))))
    _prepare(config, model)


def _in_nf4(bill: Bill, sizes: PaliGemmaConfig, itemsize: int) -> Bill:
    """The bill of a LoRA run with the decoder's linear maps in four bits; one at a time is unpacked to be used."""
    with torch.device("meta"):
        linears = find_linears(PaliGemma(sizes), DECODER_LINEARS).values()
    counts = [linear.weight.numel() for linear in linears]
    saved = sum(itemsize * count - nf4_bytes(count) for count in counts)
    return replace(bill, weights=bill.weights - saved, activations=bill.activations + itemsize * max(counts))


def evaluate(
    task: str,
    data: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    form: str = "auto",
    annotations: str | Path | None = None,
    root: str | Path | None = None,
    answers: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 100,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    num_examples: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    official: bool = False,
) -> dict:
    """Ask a model a whole data set and score its answers.

    Parameters
    ----------
    task : str
        `caption`, `vqa`, `count` or `detect`.
    data : path
        What `read_examples` takes, with `form`, `annotations` and `root`.
    out : path
        A folder for this run alone: `answers.jsonl`, `scores.json`, `worst.html` and `run.json`. Called again with the
        same arguments, a run that was stopped goes on behind its last answer.
    model : path, optional
        What `load` takes, with `device` and `dtype`; the pocket model by default.
    answers : path, optional
        Score the answers in this file of the official form, and ask no model.
    batch_size : int
        Pictures that are answered together.
    max_new_tokens : int
        Longest answer.
    num_beams : int
        Width of the beam search; 1 is greedy.
    length_penalty : float
        As `generate` takes it. The published COCO scores of PaliGemma are those of two beams compared by their sums, which
        is a penalty of 0 (big_vision's `predict_fns.py`).
    num_examples : int, optional
        Take the first so many examples only.
    official : bool
        Also write `results.json`, in the official form of the task.

    Returns
    -------
    dict
        The scores, as in `scores.json`.

    Raises
    ------
    ValueError
        If an argument is out of its range, the data does not fit the task, or the folder holds another run.
    FileNotFoundError, RuntimeError
        As `load` and `read_examples`.
    """
    if task not in EVALUATION_TASKS:
        raise ValueError(f"task is {task!r}: expected one of {', '.join(EVALUATION_TASKS)}")
    whole_number("batch_size", batch_size, least=1)
    whole_number("max_new_tokens", max_new_tokens, least=1)
    check_beams(num_beams, length_penalty, Sampling())
    if num_examples is not None:
        whole_number("num_examples", num_examples, least=1)
    examples = read_examples(data, form=form, root=root, annotations=annotations, per_image=task == "caption")
    _fits_task(task, examples.form, data, annotations)
    run = {"task": task, "data": file_mark(data), "form": examples.form, "root": full_path(root)}
    run |= {"annotations": None if annotations is None else file_mark(annotations)}
    if answers is None:
        run |= {"model": model_mark(model), "dtype": str(dtype)}
        run |= {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "length_penalty": length_penalty}
    else:
        answer = answer_from(task, read_official(task, answers, examples, num_examples))
        run |= {"answers": file_mark(answers)}
    out = Path(out)
    if not out.exists():
        make_folder(out)
    with held_alone(out) if out.is_dir() else nullcontext():  # from the first look at run.json to the scores
        claim_folder(out, run, saved=("answers.jsonl",), alone=False)
        path = out / "answers.jsonl"
        if answers is None:
            waiting = AnswerFile(path).next_index() < min(len(examples), num_examples or len(examples))
            loaded = load(model, device=device, dtype=dtype) if waiting else None
            answer = asker(loaded, max_new_tokens, num_beams=num_beams, length_penalty=length_penalty)
        records = answer_examples(task, examples, answer, path, batch_size=batch_size, most=num_examples)
        if next(iter(records), None) is None:  # of the tasks, count alone leaves examples out
            path.unlink(missing_ok=True)  # it is empty: the folder is free for another task
            looked_at = "examples" if num_examples is None else f"first {num_examples} examples"
            raise ValueError(
                f"none of the {looked_at} of {data} asks for a number: count takes those whose true answer is one, and whose "
                "question_type, if there is one, says 'how many'"
            )
        if task == "vqa" and (few := sum(len(record["answers"]) in (2, 3) for record in records)):
            remark(
                f"questions with two or three true answers: {few:,}; their accuracy cannot reach 1, which takes four"
            )
        if official:
            write_official(task, records, out / "results.json")
        speed = {} if answers else answer_speed(records)
        return write_report(task, records, out, f"{task}: {Path(data).name}", speed)


def _fits_task(task: str, form: str, data: str | Path, annotations: str | Path | None) -> None:
    """Say at once what would only be seen in the scores."""
    if form == "vqav2" and annotations is None:
        raise ValueError(f"{data} holds questions only: give the file with their answers as annotations")
    words = ("vqa", "vqav2")
    fitting = {"caption": ("text", "coco-captions"), "detect": ("coco-detect",), "vqa": words, "count": words}
    if form not in (*fitting[task], "prefix"):
        raise ValueError(f"{data} is of the form {form}, which the task {task} cannot use")


def full_path(path: str | Path | None) -> str | None:
    """A path that means the same from any folder; the id of a model on the hub stays as it is."""
    return None if path is None else str(Path(path).resolve()) if Path(path).exists() else str(path)


def asker(model: PaliGemma | None, max_new_tokens: int, **beams: float) -> Callable[[list[Example]], list[str]]:
    """A function from examples to answers; `beams` as `generate` takes them, greedy without."""

    def ask(examples: list[Example]) -> list[str]:
        pictures, prompts = [example.image for example in examples], [example.prefix for example in examples]
        return generate(pictures, prompts, model=model, max_new_tokens=max_new_tokens, **beams)

    return ask
