"""`sigma-book bench`: how fast a model answers, beside transformers and beside the prediction of chapter 21.

Each contender runs in a process of its own, so that its memory is its own. They take turns where memory allows.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from sigma_book.assemble import POCKET, check_quantize
from sigma_book.bench_contenders import Work, machine_facts, make_batch
from sigma_book.bench_report import bench_lines, draw_bench, draw_growth, growth_lines
from sigma_book.fast import wants_shortlist
from sigma_book.generation import generate_tokens, whole_number
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Batch, Processor, make_folder
from sigma_book.speed import (
    InferenceBill,
    Machine,
    Part,
    gpu_machine,
    inference_bill,
    median_machine,
)
from sigma_book.training import free_bytes
from sigma_book.weights import find_folder, folder_beside, hub_name, pick_device, read_config, write_json, write_tensors

__all__ = ["SIZES", "Work", "bench", "growth", "random_folder", "write_random_model"]

CACHE = "SIGMA_BOOK_CACHE"
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
# text: width, inner, layers, heads, key/value heads, vocabulary rows; heads are 256 wide
SIZES = {
    "300m": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        (1024, 4096, 12, 4, 1, 32_768),
    ),
    "1b": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        (1536, 8192, 14, 6, 1, 65_536),
    ),
    "3b": (SO400M, (2048, 16_384, 18, 8, 1, 257_216)),
}
SHARD = 2_500_000_000  # bytes of a random file, so that one at a time is in memory
LAW = 2  # of random weights: one more when what `write_random_model` draws changes, so that older folders are not taken


def size_config(size: str, image_size: int = 224) -> PaliGemmaConfig:
    """The configuration of a named size, with the pocket's tokenizer.

    Raises
    ------
    ValueError
        If there is no such size.
    """
    if size == "pocket":
        return read_config(POCKET)
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: expected one of pocket, {', '.join(SIZES)}")
    vision, text = SIZES[size]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = dict(zip((*keys, "vocab_size"), text, strict=True)) | {"model_type": "gemma", "head_dim": 256}
    vision = vision | {"image_size": image_size, "patch_size": 14}
    image_id = read_config(POCKET).image_token_id
    return PaliGemmaConfig.from_dict(
        {"model_type": "paligemma", "image_token_index": image_id, "text_config": text, "vision_config": vision}
    )


def write_random_model(folder: str | Path, config: PaliGemmaConfig, dtype: torch.dtype = torch.float32) -> None:
    """Write random weights of a configuration, in shards, one shard in memory at a time, with the pocket's tokenizer.

    The folder appears whole or not at all.

    Raises
    ------
    RuntimeError
        If the files cannot be written.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in PaliGemma(config).state_dict().items()}
    names, table, number = list(shapes), {}, 0
    generator = torch.Generator().manual_seed(0)
    with folder_beside(Path(folder)) as fresh:
        while names:
            shard, size = {}, 0
            while names and size < SHARD:
                name = names.pop(0)
                spread = _spread(name) / shapes[name][-1] ** 0.5
                tensor = torch.empty(shapes[name]).normal_(0, spread, generator=generator).to(dtype)
                shard[hub_name(name)] = tensor
                size += tensor.nbytes
            number += 1
            write_tensors(fresh / f"model-{number:05d}.safetensors", shard, dtype)
            table |= dict.fromkeys(shard, f"model-{number:05d}.safetensors")
        write_json(fresh / "model.safetensors.index.json", {"metadata": {}, "weight_map": table})
        write_json(fresh / "config.json", config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")})
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            shutil.copy(POCKET / name, fresh / name)


def _spread(name: str) -> float:
    """How wide the numbers of a tensor lie, so that picture and prompt decide which token is best.

    If all lay alike, the head, which is the table, would find the last token again, whatever the blocks did; and
    attention would take the mean of all places, which is nearly the same for all pictures.
    """
    if "embed_tokens" in name:
        return 0.1
    return 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0


def random_folder(size: str, dtype: str = "float32") -> Path:
    """A folder with random weights of a named size, written once and kept in `SIGMA_BOOK_CACHE` or ~/.cache/sigma_book.

    Raises
    ------
    ValueError
        If there is no such size.
    RuntimeError
        If it does not fit on the disk.
    """
    config = size_config(size)
    home = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "sigma_book")
    folder = home / f"random-{size}-{dtype}-{LAW}"
    if (folder / "config.json").is_file():
        return folder
    needed = inference_bill(config, 1, config.num_image_tokens + 8, 1, dtype).weights_held
    make_folder(home)
    if (free := shutil.disk_usage(home).free) < 1.05 * needed:
        raise RuntimeError(
            f"random weights of size {size} take {needed / 1e9:.1f} GB and {home} has {free / 1e9:.1f} GB free: make "
            f"room, or set {CACHE} to a folder elsewhere"
        )
    print(
        f"writing {needed / 1e9:.1f} GB of random weights once to {folder}; delete that folder to free them",
        file=sys.stderr,
    )
    write_random_model(folder, config, getattr(torch, dtype))
    return folder


class Child:
    """A contender in its own process."""

    def __init__(self, role: str, work: Work):
        self.role = role
        command = [sys.executable, "-c", "from sigma_book.bench_contenders import serve_turns; serve_turns()"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns: list[dict] = []
        self.facts = self._ask(json.dumps({"role": role, "work": asdict(work)}))

    def _ask(self, line: str) -> dict:
        with suppress(BrokenPipeError):  # its last words say why
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        words = self.process.stdout.readline()
        if not words:
            code = self.process.wait()
            why = "killed, for want of memory most likely" if code == -9 else f"exit code {code}"
            raise RuntimeError(f"the process of {self.role} ended early ({why}): try a smaller size or batch")
        reply = json.loads(words)
        if "error" in reply:
            raise RuntimeError(f"{self.role}: {reply['error']}")
        return reply

    def turn(self, number: int, counts: bool = True) -> dict:
        reply = self._ask(str(number))
        if counts:
            self.turns.append(reply)
        return reply

    def end(self) -> dict:
        """Its memory, and its end."""
        memory = self._ask("end")
        self.process.wait(timeout=60)
        return memory

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # what it no longer read is still on its way
            self.process.stdin.close()
        self.process.stdout.close()


def spread(values: Sequence[float]) -> dict[str, float]:
    """The least, the median, and what 95 of 100 stay at or below."""
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "p95": ordered[max(0, -(-95 * len(ordered) // 100) - 1)],
    }


def summary(child: Child, memory: dict, work: Work) -> dict:
    """What a contender's turns come to; seconds, bytes, tokens."""
    firsts = [turn["marks"][1] - turn["marks"][0] for turn in child.turns]
    steps = [b - a for turn in child.turns for a, b in zip(turn["marks"][1:], turn["marks"][2:], strict=False)]
    parts: dict[str, list[float]] = {}
    for turn in child.turns:
        for name, seconds in turn["parts"].items():
            parts.setdefault(name, []).extend(seconds)
    return {
        "first_token": spread(firsts),
        "next_token": spread(steps) if steps else None,
        "tokens_per_second": work.batch / statistics.median(steps) if steps else None,
        "tokens_per_second_whole": work.batch * work.new_tokens / statistics.median(whole_turns(child)),
        "memory": memory,
        "load": child.facts,
        "parts": {name: spread(seconds) for name, seconds in parts.items()},
    }


def whole_turns(child: Child) -> list[float]:
    """Seconds from the prompt to the last token, turn by turn."""
    return [turn["marks"][-1] - turn["marks"][0] for turn in child.turns]


def equal_tokens(children: Sequence[Child]) -> bool | None:
    """Whether all contenders took the same tokens in all turns; None with one contender."""
    if len(children) < 2:
        return None
    return all(
        one["tokens"] == other["tokens"]
        for child in children[1:]
        for one, other in zip(children[0].turns, child.turns, strict=True)
    )


def bench(work: Work, *, against: Sequence[str] = (), warmup: int = 1, repeat: int = 5, bill: bool = False) -> dict:
    """Run all contenders and say how they did.

    Parameters
    ----------
    work : Work
    against : sequence of str
        Others beside this package: transformers.
    warmup, repeat : int
        Turns that are not counted, and turns that are; each turn has its own picture, the same for all contenders.
    bill : bool
        Also predict each part, on a CPU from its own measured limits, on a card from its published ones (chapter 21).
        A card whose peaks are not known gets a remark on standard error and no predictions.

    Returns
    -------
    dict
        Ready for JSON: machine, work, contenders, whether tokens were equal, ratios, and the bill.

    Raises
    ------
    ValueError, FileNotFoundError, RuntimeError
        If an argument is out of its range; as `load`; or if a contender's process fails.
    """
    check_work(work, against, warmup, repeat)
    config = read_config(work.folder)
    prompt_length = make_batch(Processor.from_folder(work.folder), replace(work, batch=1), 0).input_ids.shape[1]
    if prompt_length + work.new_tokens > config.text.max_position_embeddings:
        raise ValueError(
            f"a prompt of {prompt_length} tokens, pictures included, and {work.new_tokens} new ones do not fit the "
            f"model's context of {config.text.max_position_embeddings}: ask for fewer"
        )
    precision, exact = work.quantize or work.dtype, getattr(torch, work.dtype).itemsize
    sizes = config.text.vocab_size, config.text.hidden_size
    plain = work.compile and work.quantize is None
    short = plain and wants_shortlist(*sizes, getattr(torch, work.dtype), torch.device(work.device))
    head = "int8" if short else None
    costs = inference_bill(config, work.batch, prompt_length, work.new_tokens, precision, exact=exact, head=head)
    facts = machine_facts(work.device)
    machine = None
    if bill and work.device != "cpu":
        try:
            machine = gpu_machine(facts["gpu"] or work.device, work.dtype)
        except ValueError as error:
            bill = False
            print(f"{error}; the table has no predictions", file=sys.stderr)
    names = ("sigma_book", *against)
    theirs = inference_bill(config, work.batch, prompt_length, work.new_tokens, work.dtype)  # in none of our few bits
    held = costs.held + len(against) * theirs.held
    children, memories, looks = _take_turns(names, work, warmup, repeat, held, probe=bill and work.device == "cpu")
    contenders = {child.role: summary(child, memories[child.role], work) for child in children}
    found = {
        "machine": facts | {"threads": children[0].facts["threads"]},
        "work": asdict(work) | {"warmup": warmup, "repeat": repeat, "prompt_length": prompt_length},
        "contenders": contenders,
        "tokens_equal": equal_tokens(children),
        "held": {"weights": costs.weights_held, "cache": costs.cache_held, "activations": costs.activations_held},
    }
    if len(contenders) > 1:
        found["ratios"] = _ratios(contenders)
    if bill:
        machine = machine or _limits(work, looks)
        found["bill"] = compare(costs, machine, contenders["sigma_book"]["parts"])
        found["limits"] = asdict(machine)
    return found


def check_work(work: Work, against: Sequence[str], warmup: int, repeat: int) -> None:
    """Raise a ValueError that names the argument if one cannot be, or a RuntimeError that names a package that it lacks."""
    whole_number("batch", work.batch, least=1)
    whole_number("new_tokens", work.new_tokens, least=1)
    whole_number("warmup", warmup, least=0)
    whole_number("repeat", repeat, least=1)
    if work.prompt_tokens is not None:
        whole_number("prompt_tokens", work.prompt_tokens, least=1)
    check_quantize(work.quantize)
    if work.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {work.dtype!r}: expected float32, bfloat16 or float16")
    for name in against:
        if name != "transformers":
            raise ValueError(f"--against is {name!r}: expected transformers")
    if len(set(against)) < len(against):
        raise ValueError(f"--against names {against[0]} twice: once is enough")
    if against and find_spec("transformers") is None:
        raise RuntimeError("--against transformers needs that package: pip install transformers")
    pick_device(work.device)


def _take_turns(
    names: Sequence[str], work: Work, warmup: int, repeat: int, held: int, probe: bool
) -> tuple[list[Child], dict[str, dict], list[dict]]:
    """All contenders in turn, or one after the other where memory does not hold all, which are `held` bytes.

    The machine takes a turn behind ours each time, so that it is measured in the same weather.
    """
    free = free_bytes(torch.device("cpu"))
    together = work.device == "cpu" and (free is None or 1.1 * held + 1e9 * len(names) < free)
    groups = [list(names)] if together else [[name] for name in names]
    if probe:
        groups[0].insert(1, "machine")
    children, memories, looks = [], {}, []
    for group in groups:
        with ExitStack() as stack:
            running = [stack.enter_context(Child(name, work)) for name in group]
            for number in range(warmup + repeat):
                for child in running:
                    if child.role != "machine" or number >= warmup:
                        child.turn(number, counts=number >= warmup)
            for child in running:
                memory = child.end()
                if child.role == "machine":
                    looks = child.turns
                else:
                    memories[child.role] = memory
                    children.append(child)
    return children, memories, looks


def _ratios(contenders: dict) -> dict[str, float]:
    ours, theirs = contenders["sigma_book"], contenders["transformers"]
    ratios = {"first_token": ours["first_token"]["median"] / theirs["first_token"]["median"]}
    if ours["next_token"]:
        ratios["next_token"] = ours["next_token"]["median"] / theirs["next_token"]["median"]
    peak = "gpu_peak" if "gpu_peak" in ours["memory"] else "peak_resident"
    peaks = ours["memory"][peak], theirs["memory"][peak]
    if all(peaks):
        ratios[peak] = peaks[0] / peaks[1]
    return ratios


def _limits(work: Work, looks: Sequence[dict]) -> Machine:
    """This CPU's limits from measurements of it."""
    machine = median_machine([Machine(**look | {"rates": tuple(map(tuple, look["rates"]))}) for look in looks])
    known = work.dtype == "float32" and work.quantize in (None, "int8")
    return machine if known else replace(machine, rates=())  # its rates are those of other maps


def compare(costs: InferenceBill, machine: Machine, parts: dict[str, dict]) -> list[dict]:
    """Predicted beside measured, part by part; then the first token and a next one."""
    rows = []
    step = costs.step()
    other = costs.head_precision == "int8" and costs.precision != "int8"  # the rates are those of the blocks' maps
    limits = dict.fromkeys(("head", "step head"), replace(machine, rates=()) if other else machine)

    def line(name: str, of: Sequence[Part], names: Sequence[str]) -> None:
        predicted = sum(limits.get(part.name, machine).seconds(part) for part in of)
        known = all(one in parts for one in names)
        measured = sum(parts[one]["median"] for one in names) if known else None
        flops, moved = sum(part.flops for part in of), sum(part.bytes for part in of)
        ratio = measured / predicted if known else None
        rows.append(
            {"part": name, "flops": flops, "bytes": moved, "predicted": predicted, "measured": measured, "ratio": ratio}
        )

    for part in (*costs.first, *step):
        line(part.name, [part], [part.name])
    line("first token", costs.first, [part.name for part in costs.first])
    line("next token", step, ["step and head"] if "step and head" in parts else [part.name for part in step])
    return rows


PIXELS = (224, 448, 896)
PICTURES = (1, 2, 4, 8, 16, 32)
TOKENS = (16, 64, 256, 1024)


def growth(size: str, *, most_seconds: float = 60.0) -> dict:
    """How the time of an answer grows with the picture's side, with the pictures of a batch, and with the answer.

    A model of random numbers in float32 on this CPU; a point that would take longer than `most_seconds` is predicted
    and not measured.

    Returns
    -------
    dict
        For pixels, pictures and tokens a list of points: value, predicted and measured seconds (None: not measured).
    """
    if not most_seconds > 0:
        raise ValueError(f"most_seconds is {most_seconds}: expected a number above 0")
    config, work = size_config(size), Work(str(POCKET))
    with Child("machine", work) as child:
        machine = _limits(work, [child.turn(number) for number in range(2)])
    config = replace(config, text=replace(config.text, max_position_embeddings=2**16))  # random numbers, no context
    found: dict = {"machine": machine_facts(), "size": size, "pixels": [], "pictures": [], "tokens": []}

    def point(kind: str, value: int, sizes: PaliGemmaConfig, batch: int, new_tokens: int, model: PaliGemma) -> None:
        costs = inference_bill(sizes, batch, sizes.num_image_tokens + 8, new_tokens)
        steps = (new_tokens - 1) * sum(map(machine.seconds, costs.step()))
        predicted = sum(map(machine.seconds, costs.first)) + steps
        measured = time_answer(model, batch, new_tokens) if predicted < most_seconds else None
        found[kind].append({"value": value, "predicted": predicted, "measured": measured})

    for side in PIXELS:
        larger = replace(config, vision=replace(config.vision, image_size=side))
        point("pixels", side, larger, 1, 1, PaliGemma(larger).eval())
    model = PaliGemma(config).eval()
    for pictures in PICTURES:
        point("pictures", pictures, config, pictures, 1, model)
    for tokens in TOKENS:
        point("tokens", tokens, config, 1, tokens, model)
    return found


@torch.no_grad()
def time_answer(model: PaliGemma, batch: int, new_tokens: int) -> float:
    """Seconds of an answer to random pixels, after one token that warms up."""
    config = model.config
    ids = torch.tensor([[config.image_token_id] * config.num_image_tokens + [config.bos_token_id] * 8] * batch)
    side = config.vision.image_size
    pixels = torch.rand(batch, 3, side, side) * 2 - 1
    ones = torch.ones_like(ids)
    asked = Batch(ids, ones, torch.zeros_like(ids), pixels)
    one = Batch(ids[:1], ones[:1], torch.zeros_like(ids[:1]), pixels[:1])
    list(generate_tokens(model, one, max_new_tokens=1, stop_ids=()))
    started = time.perf_counter()
    list(generate_tokens(model, asked, max_new_tokens=new_tokens, stop_ids=()))
    return time.perf_counter() - started


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file next to its place, then move it there."""
    fresh = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(fresh)
        os.replace(fresh, path)
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be written ({error.strerror}): check the room and the permissions"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def run_bench(
    *,
    model: str | None = None,
    size: str | None = None,
    random: bool = False,
    against: Sequence[str] = (),
    quantize: str | None = None,
    compile: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    batch: int = 1,
    prompt: str = "caption en",
    prompt_tokens: int | None = None,
    new_tokens: int = 16,
    warmup: int = 1,
    repeat: int = 5,
    bill: bool = False,
    grow: bool = False,
    json_file: Path | None = None,
    picture: Path | None = None,
) -> list[str]:
    """The command: run, write what was asked for, and give the table's lines.

    Raises
    ------
    ValueError, FileNotFoundError, RuntimeError
        As `bench`; or if options contradict each other.
    """
    for path, ending in ((json_file, ".json"), (picture, ".png")):
        if path is not None and (path.suffix.lower() != ending or path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{path}: expected the name of a file that ends in {ending}, in a folder that is there")
    if picture is not None and find_spec("matplotlib") is None:  # said before the measurement, not after it
        raise RuntimeError("--save draws with matplotlib: pip install matplotlib, or leave it out")
    if model is not None and size is not None:
        raise ValueError(f"both --model {model} and --size {size}: give one of them")
    if size is not None:
        size_config(size)  # an unknown size is told first
    if (size in SIZES) != random:
        raise ValueError(
            f"--random goes with --size {', '.join(SIZES)}, whose weights are random numbers, and with nothing else"
        )
    on_cpu = pick_device(device).type == "cpu"
    work = Work(
        folder="",
        dtype=dtype or ("float32" if on_cpu else "bfloat16"),
        quantize=quantize,
        compile=compile,
        device=str(pick_device(device)),
        batch=batch,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    if grow and (bill or model is not None or against or work != Work(folder="") or (warmup, repeat) != (1, 5)):
        raise ValueError("--growth times random numbers in float32 on this CPU: it goes with --size, --json and --save")
    if grow:
        found = growth(size or "pocket")
        lines, draw = growth_lines(found), draw_growth
    else:
        check_work(work, against, warmup, repeat)
        if size in SIZES:
            folder = random_folder(size, "float32" if work.dtype == "float32" else "bfloat16")
        else:
            folder = POCKET if model is None else find_folder(model)
        work, bill = replace(work, folder=str(folder)), bill or not on_cpu  # a card's limits need no measurement
        found = bench(work, against=against, warmup=warmup, repeat=repeat, bill=bill)
        lines, draw = bench_lines(found), draw_bench
    try:
        if json_file is not None:
            write_beside(json_file, lambda path: write_json(path, found))
        if picture is not None:
            write_beside(picture, draw(found).savefig)
    except Exception:
        print("\n".join(lines), file=sys.stderr)  # what took so long is not lost with a file
        raise
    return lines
