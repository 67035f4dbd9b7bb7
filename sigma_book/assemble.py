"""The public face: ideas of several chapters put together. Thin; the ideas stay in the chapters."""

import json
import os
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from sigma_book.data import Batches, Example, Examples, read_examples
from sigma_book.generation import (
    Answer,
    Sampling,
    answer_limits,
    generate_answers,
    read_stop_ids,
    stream_answer,
    whole_number,
)
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch, Processor, load_image
from sigma_book.training import (
    AUTOCAST,
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
    write_whole,
)
from sigma_book.weights import find_folder, load_model, pick_device, read_config, save_model

__all__ = ["estimate", "finetune", "generate", "load", "read_settings"]

POCKET = Path(__file__).parent / "pocket_model"
ROWS_AT_ONCE = 32  # longer lists are answered in several batches
WATCHED = ("*.json", "*.safetensors", "tokenizer.model")  # the files that make a model

_kept: dict[str, tuple[object, PaliGemma]] = {}  # the pocket model and the last other one, for `generate`


def load(
    path_or_hub_id: str | Path | None = None, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> PaliGemma:
    """Load a model with its processor.

    Parameters
    ----------
    path_or_hub_id : path, optional
        A PaliGemma folder in the Hugging Face layout, or the id of one on the hub; None is the pocket model that
        comes with this package.
    device : str or torch.device
        `auto` is cuda, mps or cpu, in this order.
    dtype : str or torch.dtype
        float32, bfloat16 or float16. `auto` is the file's, but float32 on a CPU without bf16 units, and for the
        pocket model.

    Returns
    -------
    PaliGemma
        In eval mode; `model.processor` is its `Processor`, `model.stop_ids` the tokens that end an answer.

    Raises
    ------
    FileNotFoundError
        If the folder or one of its files is missing.
    ValueError
        If a file is damaged, or describes another model; if device or dtype is unknown.
    RuntimeError
        If the device is not there, or the hub does not give the files.
    """
    if path_or_hub_id is None:
        folder, dtype = POCKET, "float32" if dtype == "auto" else dtype
    else:
        if not isinstance(path_or_hub_id, str | Path):
            raise ValueError(f"a model is a path or a hub id, got {type(path_or_hub_id).__name__}")
        folder = find_folder(path_or_hub_id)
    read_config(folder)  # a folder of another model is told first
    processor = Processor.from_folder(folder)
    model = load_model(folder, device, dtype)
    if processor.tokenizer.image_id != model.config.image_token_id:
        raise ValueError(
            f"{folder}: <image> is token {processor.tokenizer.image_id} for the tokenizer and "
            f"{model.config.image_token_id} in config.json: these files are not of one model"
        )
    model.processor = processor
    model.stop_ids = read_stop_ids(folder, model.config.eos_token_id)
    return model


def generate(
    image,
    prompt: str | Sequence[str],
    *,
    model: PaliGemma | str | Path | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    stream: bool = False,
    return_logprobs: bool = False,
) -> str | list[str] | Answer | list[Answer] | Iterator[str]:
    """Answer prompts about pictures.

    Parameters
    ----------
    image : path, bytes, array, PIL image, or a list
        One picture; or a list with, for each prompt, one picture or a list of pictures: `[[a, b]]` is two pictures
        for one prompt.
    prompt : str or list of str
        One prompt with a list of pictures is asked about each; one picture with a list of prompts answers each.
    model : PaliGemma or path, optional
        What `load` returned, or what it takes; the pocket model by default. Paths are loaded once and kept until
        another path is given or the files change.
    max_new_tokens : int
        At least 1. An answer ends earlier at the end-of-sequence token, at a stop string, or where prompt and answer
        together fill the model's context.
    temperature : float
        0 takes the best token always; above, tokens are drawn.
    top_p : float
        In (0, 1]: draw from the fewest tokens that have this probability together.
    top_k : int, optional
        Draw from this many tokens, at least 1.
    repetition_penalty : float
        Above 1 makes tokens of prompt and answer less likely to come again.
    stop : str or list of str, optional
        Strings that end the answer and are left out of it.
    seed : int, optional
        Row i of a list draws as a call of its own would with `seed + i`. None draws anew each time, or as
        `torch.manual_seed` says.
    stream : bool
        Give an iterator over pieces of the answer; for one picture and one prompt.
    return_logprobs : bool
        Give `Answer(text, tokens, logprobs)` in place of the text. Log-probabilities are those of the model's own
        distribution, before temperature, top-k, top-p and penalty; tokens include the one that ended the answer.

    Returns
    -------
    str, or list of str
        A list if pictures or prompts came as one.

    Raises
    ------
    ValueError
        If an argument is out of its range or of another kind; if lists differ in length or are empty; if a prompt
        contains `<image>` or is longer than the model's context; if a picture cannot be read.
    FileNotFoundError, RuntimeError
        As `load`; or if there is no such picture.

    Notes
    -----
    A list gives what one call for each row gives: in float32 token for token. In 16 bits sums round differently in
    batches of other sizes, so where two tokens are about equally good, either may come.
    """
    sampling, stop = read_settings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    pictures, prompts = _rows(image, prompt)
    if stream and (len(prompts) > 1 or return_logprobs):
        asked = "log-probabilities" if return_logprobs else f"{len(prompts)} prompts"
        raise ValueError(f"stream=True gives the text of one picture and one prompt, not {asked}: leave it out")
    model = _model(model)
    batches = _batches(model, pictures, prompts, max_new_tokens)  # all are read before the first is answered
    options = {"max_new_tokens": max_new_tokens, "stop_ids": getattr(model, "stop_ids", None), "stop": stop}
    decode = model.processor.tokenizer.decode
    if stream:
        return stream_answer(model, batches[0], decode, sampling=sampling, **options)
    answers: list[Answer] = []
    for batch in batches:
        shifted = replace(sampling, seed=sampling.seed + len(answers))
        answers += generate_answers(model, batch, decode, sampling=shifted, **options)
    results = answers if return_logprobs else [answer.text for answer in answers]
    one = not isinstance(image, list | tuple) and isinstance(prompt, str)
    return results[0] if one else results


def read_settings(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    repetition_penalty: float,
    stop: str | Sequence[str] | None,
    seed: int | None,
) -> tuple[Sampling, list[str]]:
    """Check the arguments of `generate` that need no model.

    Returns
    -------
    Sampling, list of str
        How to choose, with a seed in any case, and where to stop.

    Raises
    ------
    ValueError
        If one is out of its range or of another kind.
    """
    whole_number("max_new_tokens", max_new_tokens, least=1)
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
    if seed is None:
        sampling = replace(sampling, seed=int(torch.randint(2**62, ())))
    listed = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(listed, list | tuple) or not all(isinstance(text, str) and text for text in listed):
        raise ValueError(f"stop is {stop!r}: expected a string, or a list of strings, none of them empty")
    return sampling, list(listed)


def _rows(image, prompt) -> tuple[list, list[str]]:
    """Pictures and prompts as two lists of one length."""
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    pictures = list(image) if isinstance(image, list | tuple) else [image]
    for name, rows in (("image", pictures), ("prompt", prompts)):
        if not rows:
            raise ValueError(f"{name} is an empty list: give at least one")
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a string, got {type(text).__name__}")
    if not isinstance(image, list | tuple):
        pictures = pictures * len(prompts)
    elif isinstance(prompt, str):
        prompts = prompts * len(pictures)
    if len(pictures) != len(prompts):
        raise ValueError(
            f"{len(pictures)} pictures for {len(prompts)} prompts: give as many of each, or one picture, not in "
            "a list, for all prompts; several pictures for one prompt are a list of their own: image=[[a, b]]"
        )
    if any(isinstance(shown, list | tuple) and not shown for shown in pictures):
        raise ValueError("a prompt has an empty list of pictures: give at least one")
    return pictures, prompts


def _model(model: PaliGemma | str | Path | None) -> PaliGemma:
    if isinstance(model, PaliGemma):
        if not isinstance(getattr(model, "processor", None), Processor):
            raise ValueError("this model has no processor: take one from sigma_book.load, or set model.processor")
        return model
    if model is None:
        if "pocket" not in _kept:
            _kept["pocket"] = (None, load())
        return _kept["pocket"][1]
    if not isinstance(model, str | Path):
        raise ValueError(f"model is a path, a hub id or a loaded PaliGemma, got {type(model).__name__}")
    folder = find_folder(model)
    files = sorted(path for pattern in WATCHED for path in folder.glob(pattern))
    state = (folder.resolve(), [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    if "last" not in _kept or _kept["last"][0] != state:
        _kept.pop("last", None)  # two models may not fit into memory
        _kept["last"] = (state, load(folder))
    return _kept["last"][1]


def _batches(model: PaliGemma, pictures: list, prompts: list[str], max_new_tokens: int) -> list[Batch]:
    """Pictures and prompts as batches, each no longer than ROWS_AT_ONCE; the context is checked for all of them."""
    opened: dict[int, Image.Image] = {}
    batches = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        chunk = pictures[start : start + ROWS_AT_ONCE]
        shown = [list(row) if isinstance(row, list | tuple) else [row] for row in chunk]
        images = [[_open(source, opened) for source in row] for row in shown]
        batch = model.processor.prepare(images, prompts[start : start + ROWS_AT_ONCE])
        answer_limits(batch.attention_mask, max_new_tokens, model.config.text.max_position_embeddings)
        batches.append(batch)
        last = shown[-1][-1]
        opened = {id(last): opened[id(last)]}  # one picture may go on for thousands of prompts
    return batches


def _open(source, opened: dict[int, Image.Image]) -> Image.Image:
    """A picture, opened once even if it stands in several rows."""
    if id(source) not in opened:
        opened[id(source)] = load_image(source)
    return opened[id(source)]


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
    evaluate_every: int | None = None,
    evaluate_limit: int = 200,
    save_every: int = 500,
    keep: int = 3,
    workers: int = 0,
    on_error: str = "stop",
    truncate: bool = False,
    wandb: str | None = None,
    device: str | torch.device = "auto",
) -> Path:
    """Teach a model what a file of examples says; called again with the same arguments, go on where it stopped.

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
        `evaluate_every` steps between; at most `evaluate_limit` of them. The best model so far stands in `best/`.
    save_every, keep : int
        A checkpoint after so many steps; so many stay.
    workers, on_error, truncate
        As in `Batches`; rows that are left out are listed in `skipped.jsonl`.
    wandb : str, optional
        A project of Weights & Biases that follows the run.
    device : str or torch.device
        auto, cuda, mps or cpu.

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
    source = {"form": form, "root": root, "annotations": annotations}
    examples = _examples(data, source)
    held_out = None if evaluate is None else _sample(_examples(evaluate, source), evaluate_limit)
    device = pick_device(device)
    config = _settled(config, device)
    files = {"data": data, "annotations": annotations, "evaluate": evaluate}
    identity = {"model": _model_mark(model)} | {name: _file_mark(path) for name, path in files.items() if path}
    claim_folder(out, identity | asdict(config))
    final, steps = out / "final", _steps(config, len(examples))
    if final.is_dir():
        remark(f"{out} is finished: the model of its last step stands in {final}; give another folder for a new run")
        return final
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    learner, write = _learner(model, config, device)
    optimizers = [adamw_by_part(learner, config)]
    checkpoints = Checkpoints(out / "checkpoints", learner, optimizers, every=save_every, keep=keep)
    follower = None if wandb is None else _Follower(wandb, out, identity | asdict(config))
    progress = checkpoints.restore()  # last, so that the random numbers are those of the checkpoint
    if progress.step:
        remark(f"going on after step {progress.step} of {steps}")
    batches = Batches(
        examples,
        learner.processor,
        config.batch_size,
        config.seed,
        epochs=None if on_error == "skip" else config.epochs,  # what is left out is made up for
        workers=workers,
        on_error=on_error,
        skipped=out / "skipped.jsonl" if on_error == "skip" else None,
        max_length=learner.config.text.max_position_embeddings,
        truncate=truncate,
        start=progress.data,
    )
    look = partial(_look, out, learner, held_out, config, progress, write, follower)
    if held_out and progress.step == 0:
        remark(f"before: {look(0)}")
    train(
        learner,
        lambda one: answer_loss(learner, one.batch.to(device)),
        batches,
        optimizers,
        steps=steps,
        warmup=config.warmup_steps(steps),
        schedule=config.schedule,
        clip=config.clip,
        accumulate=config.accumulate,
        count=lambda one: answer_tokens(one.batch),
        autocast=AUTOCAST[config.dtype],
        log=out / "log.csv",
        report_every=evaluate_every or steps,
        report=look if held_out else None,
        each=None if follower is None else follower.step,
        progress=progress,
        checkpoints=checkpoints,
    )
    if held_out and progress.notes[-1]["step"] != steps:
        remark(f"after: {look(steps)}")
    for count, what in (
        (batches.num_skipped, f"left out and listed in {out / 'skipped.jsonl'}"),
        (batches.num_truncated, "cut"),
    ):
        if count:
            remark(f"{count} rows were {what}")
    try:
        draw_losses(progress, out / "losses.png")
    except ImportError:
        remark("no picture of the losses: install matplotlib (pip install 'sigma-book[book]')")
    if follower is not None:
        follower.run.finish()
    write_whole(final, write)
    return final


def _examples(path: str | Path, source: dict) -> Examples:
    """Open a file of examples, and say what it was taken for."""
    examples = read_examples(path, **source)
    for text in (f"{len(examples):,} examples of the form {examples.form}", *examples.remarks):
        remark(f"{path}: {text}")
    return examples


def _sample(examples: Examples, limit: int) -> list[Example]:
    """The same few of a file each time, from all over it."""
    chosen = random.Random(0).sample(range(len(examples)), min(limit, len(examples)))
    return [examples[index] for index in chosen]


def _settled(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """The configuration with nothing left to chance or to the machine."""
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    epochs = 1 if config.epochs is None and config.max_steps is None else config.epochs
    return replace(config, dtype=dtype, epochs=epochs)


def _steps(config: TrainingConfig, examples: int) -> int:
    """How many steps the run has."""
    if config.epochs is None:
        return config.max_steps
    batches = config.epochs * -(-examples // config.batch_size)
    steps = -(-batches // config.accumulate)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _file_mark(path: str | Path) -> str:
    """What tells a file from another: its name, its size and its checksum."""
    path = Path(path)
    return f"{path.name}, {path.stat().st_size:,} bytes, CRC-32 {file_checksum(path):08x}"


def _model_mark(model: str | Path | None) -> str:
    folder = POCKET if model is None else find_folder(model)
    weights = sorted(folder.glob("model*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    most = 1 << 24  # the first 16 MiB of each file: a large model is not read twice
    marks = [file_checksum(path, most) for path in (folder / "config.json", *weights)]
    return f"{folder.resolve().name}, {size:,} bytes, CRC-32 {' '.join(f'{mark:08x}' for mark in marks)}"


def _learner(
    model: str | Path | None, config: TrainingConfig, device: torch.device
) -> tuple[PaliGemma, Callable[[Path], None]]:
    """A model that is ready to learn by the method of a run, and what writes it into a folder that is there."""
    if config.method != "full":
        raise ValueError(f"method is {config.method!r}: this version trains with method full alone")
    learner = load(model, device=device, dtype="float32")
    for parameter in learner.parameters():
        parameter.data = parameter.data.clone()  # not a window into the file
    freeze_parts(learner, config.freeze)
    if config.recompute:
        recompute_activations(blocks_of(learner))

    def write(folder: Path) -> None:
        save_model(learner, folder)
        learner.processor.save(folder)

    return learner.train(), write


class _Follower:
    """Sends steps and evaluations to Weights & Biases, as one run even if it is started several times."""

    def __init__(self, project: str, out: Path, config: dict):
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError("--wandb needs the package wandb: pip install wandb, or leave it out") from error
        mark = out / "wandb-id.txt"
        if not mark.exists():
            mark.write_text(uuid.uuid4().hex[:8])
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
    progress: Progress,
    write: Callable[[Path], None],
    follower: _Follower | None,
    step: int,
) -> str:
    """Examine a model, note it, and keep it if it is the best so far; gives a line and some answers."""
    found = {"step": step} | examine(model, model.processor, held_out, autocast=AUTOCAST[config.dtype])
    former = [note["loss"] for note in progress.notes if note["step"] > 0]
    if step > 0 and found["loss"] < min(former, default=float("inf")):
        write_whole(out / "best", write)
    progress.notes.append(found)
    draft = out / ".evaluations.json"
    draft.write_text(json.dumps(progress.notes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, out / "evaluations.json")
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
    config, device = config or TrainingConfig(), pick_device(device)
    config = _settled(config, device)
    folder = POCKET if model is None else find_folder(model)
    sizes, processor = read_config(folder), Processor.from_folder(folder)
    examples = _examples(data, {"form": form, "root": root, "annotations": annotations})
    batches = Batches(
        examples,
        processor,
        config.batch_size,
        config.seed,
        epochs=config.epochs,
        max_length=sizes.text.max_position_embeddings,
        truncate=truncate,
    )
    few = [one.batch for _, one in zip(range(32), batches, strict=False)]
    longest = max(few, key=lambda batch: batch.input_ids.numel())
    bill = training_bill(sizes, config, longest, partial(_shape_learner, config), device)
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


def _shape_learner(config: TrainingConfig, model: PaliGemma) -> None:
    """Make a model of shapes alone learn as `_learner` would."""
    freeze_parts(model, config.freeze)
