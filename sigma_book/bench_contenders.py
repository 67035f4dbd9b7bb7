"""What takes part in `sigma-book bench`: this package, transformers, and the machine itself, each in its own process."""

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from sigma_book import __version__
from sigma_book.assemble import load
from sigma_book.generation import generate_tokens
from sigma_book.paligemma import PaliGemma, count_parameters
from sigma_book.processor import Batch, Processor
from sigma_book.speed import measure_machine, wait_for
from sigma_book.world import draw_scene, make_scene

__all__ = ["ROLES", "Clock", "Work", "machine_facts", "make_batch", "memory_now", "serve_turns"]


@dataclass(frozen=True)
class Work:
    """What every contender is asked to do, again and again."""

    folder: str
    dtype: str = "float32"
    quantize: str | None = None
    compile: bool = False
    device: str = "cpu"
    batch: int = 1
    prompt: str = "caption en"
    prompt_tokens: int | None = None
    new_tokens: int = 16


def make_batch(processor: Processor, work: Work, turn: int) -> Batch:
    """The prompts of a turn: pictures that no earlier turn had, so that nothing kept from it can help."""
    pictures = [draw_scene(make_scene(1000 * turn + row)) for row in range(work.batch)]
    batch = processor.prepare(pictures, [work.prompt] * work.batch)
    if work.prompt_tokens is None:
        return batch
    start = processor.num_image_tokens + 1  # behind the pictures and bos
    text = batch.input_ids[:, start:-1]
    if not text.shape[1]:
        raise ValueError(f"prompt is {work.prompt!r}: expected a word or more, to be repeated to --prompt-tokens")
    text = text.repeat(1, -(-work.prompt_tokens // text.shape[1]))[:, : work.prompt_tokens]
    ids = torch.cat([batch.input_ids[:, :start], text, batch.input_ids[:, -1:]], dim=1)
    return Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), batch.pixel_values)


class Clock:
    """Seconds of the calls of some methods of an object, in order."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: dict[str, list[float]] = {}

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()

    def watch(self, thing: object, method: str, name: str) -> None:
        """Time a method of this one object from now on."""
        inner = getattr(thing, method)

        def timed(*arguments, **options):
            started = self.now()
            result = inner(*arguments, **options)
            self.times.setdefault(name, []).append(self.now() - started)
            return result

        setattr(thing, method, timed)


class Ours:
    """This package: `load`, then one token after another as `generate` takes them."""

    def __init__(self, work: Work):
        self.work = work
        compiled = {"compile": True} if work.compile else {}
        self.model = load(work.folder, device=work.device, dtype=work.dtype, quantize=work.quantize, **compiled)
        self.clock = Clock(self.model.device)
        self.clock.watch(self.model, "encode_images", "pictures")
        self.clock.watch(self.model.multi_modal_projector, "forward", "projector")
        self.clock.watch(self.model, "prefill", "prefill")
        self.clock.watch(self.model, "decode", "step")
        self.clock.watch(self.model, "next_token_logits", "head")
        with torch.device("meta"):  # prepared or in few bits, the model keeps its weights in buffers
            self.parameters = count_parameters(PaliGemma(self.model.config))

    def turn(self, number: int) -> dict:
        batch = make_batch(self.model.processor, self.work, number)
        self.clock.times.clear()
        marks, tokens = [self.clock.now()], []
        for picks in generate_tokens(self.model, batch, max_new_tokens=self.work.new_tokens, stop_ids=()):
            marks.append(self.clock.now())
            tokens.append([pick.token for pick in picks])
        return {"marks": marks, "tokens": tokens, "parts": self._parts(), "prompt_length": batch.input_ids.shape[1]}

    def _parts(self) -> dict[str, list[float]]:
        """The watched times, each without what was watched inside it; a part that was not called is left out."""
        times = self.clock.times
        heads = times.get("head", [])
        parts = {"head": heads[:1], "step head": heads[1:]}
        if "projector" in times:
            parts["projector"] = times["projector"]
            parts["vision"] = [times["pictures"][0] - times["projector"][0]]
        if heads:
            parts["prefill"] = [times["prefill"][0] - heads[0]]
            steps = times.get("step", [])
            if heads[1:]:
                parts["step"] = [step - head for step, head in zip(steps, heads[1:], strict=True)]
            else:  # a compiled step has its head inside
                parts["step and head"] = steps
        return {name: values for name, values in parts.items() if values}


class Theirs:
    """transformers: its own `generate`, greedy, with a clock where it takes each token."""

    def __init__(self, work: Work):
        from transformers import LogitsProcessorList, PaliGemmaForConditionalGeneration

        self.work = work
        self.processor = Processor.from_folder(work.folder)
        dtype = getattr(torch, work.dtype)
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(work.folder, dtype=dtype).eval().to(work.device)
        self.model.generation_config.eos_token_id = None  # every answer has the same length
        self.clock = Clock(self.model.device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.marks: list[float] = []
        self.listener = LogitsProcessorList([self._listen])  # any callable will do

    def _listen(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.marks.append(self.clock.now())
        return scores

    def turn(self, number: int) -> dict:
        batch = make_batch(self.processor, self.work, number).to(self.model.device)
        length = batch.input_ids.shape[1]
        pixels = batch.pixel_values.to(self.model.dtype)
        self.marks = [self.clock.now()]
        with torch.no_grad():
            answer = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                token_type_ids=batch.token_type_ids,
                pixel_values=pixels,
                max_new_tokens=self.work.new_tokens,
                do_sample=False,
                logits_processor=self.listener,
            )
        tokens = answer[:, length:].T.tolist()
        return {"marks": self.marks, "tokens": tokens, "parts": {}, "prompt_length": length}


class Probe:
    """The machine itself: chapter 21's measurement, of maps like those that the model will have."""

    def __init__(self, work: Work):
        self.parameters = 0
        self.make_map, self.weight_bytes = None, 4
        if work.quantize == "int8":
            from sigma_book.fast import Int8Linear, int8_levels, quantize_rows

            self.make_map = lambda inner, outer: Int8Linear(*quantize_rows(torch.randn(outer, inner), int8_levels()))
            self.weight_bytes = 1
        elif work.compile:
            from sigma_book.fast import dense_map

            self.make_map = lambda inner, outer: dense_map(torch.randn(outer, inner))

    def turn(self, number: int) -> dict:
        return asdict(measure_machine(self.make_map, machine_facts()["cpu"], self.weight_bytes))


ROLES = {"sigma_book": Ours, "transformers": Theirs, "machine": Probe}


def memory_now(device: torch.device | str) -> dict[str, int | None]:
    """Bytes of this process: its peak, what it holds of its own, and what is a window into files; the GPU's peak."""
    found: dict[str, int | None] = dict.fromkeys(("peak_resident", "anonymous", "file_mapped"))
    status = Path("/proc/self/status")
    if status.is_file():
        table = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        for key, name in zip(found, ("VmHWM", "RssAnon", "RssFile"), strict=True):
            found[key] = int(table[name].split()[0]) * 1024 if name in table else None
    if torch.device(device).type == "cuda":
        found["gpu_peak"] = torch.cuda.max_memory_allocated(device)
    return found


def serve_turns() -> None:
    """The loop of a child process: a JSON line with role and work, then a number for each turn, then `end`."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def answer(values: dict) -> None:
        reply.write(json.dumps(values) + "\n")
        reply.flush()

    order = json.loads(sys.stdin.readline())
    work = Work(**order["work"])
    try:
        started = time.perf_counter()
        runner = ROLES[order["role"]](work)
        loaded = {"load_seconds": time.perf_counter() - started, "parameters": runner.parameters}
        answer(loaded | {"threads": torch.get_num_threads(), "loaded": memory_now(work.device)})
        if torch.device(work.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(work.device)  # the peak of loading stands in `loaded`
        while (line := sys.stdin.readline().strip()) not in ("end", ""):
            answer(runner.turn(int(line)))
        answer(memory_now(work.device))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        answer({"error": " ".join(str(error).split())})


def machine_facts(device: str = "cpu") -> dict:
    """Machine, versions and date; `gpu` is the card's name, if the device is one."""
    info = Path("/proc/cpuinfo")
    named = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    versions = {"sigma_book": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers",):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": named[0] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "system": platform.platform(),
        "versions": versions,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
