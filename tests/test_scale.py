"""`sigma-book train` under torchrun: real processes over gloo, killed and started again, in other numbers."""

import csv
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from sigma_book import load, scale
from sigma_book.batches import epoch_order
from sigma_book.cli import main
from sigma_book.paligemma import PaliGemmaConfig
from sigma_book.processor import Batch
from sigma_book.qlora import NF4Linear
from sigma_book.runs import _learner
from sigma_book.scale import (
    RankCheckpoints,
    Ranks,
    check_parallel,
    choose_parallel,
    never_empty,
    rank_bill,
    ring_bytes,
    rows_of,
    same_place,
    shape_model,
    share_of_batch,
)
from sigma_book.training import ALONE, Progress, TrainingConfig, adamw_by_part, answer_loss, answer_tokens
from sigma_book.weights import read_config
from sigma_book.world import draw_scene, make_scene

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
LIMIT = 100  # seconds for one job


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_questions) -> Path:
    """A folder with `train.jsonl`, 30 questions about drawn scenes, and `test.jsonl`, 5 of them."""
    return write_questions(tmp_path_factory.mktemp("data"), train=30, test=5)


@pytest.fixture(scope="module")
def arguments(data, tiny_folder):
    """The arguments of a run of some steps; 30 examples in batches of 4 leave 2 for the last. `more` wins."""

    def build(out: Path, *more, steps: int = 6) -> list[str]:
        given = ["train", "--data", data / "train.jsonl", "--out", out, "--model", tiny_folder, "--max-steps", steps]
        given += ["--batch-size", 4, "--accumulate", 2, "--learning-rate", 3e-3, "--save-every", 2, "--device", "cpu"]
        return [str(part) for part in (*given, *more)]

    return build


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The folder of the same run in one process, made once for each set of arguments."""
    folders: dict[tuple, Path] = {}

    def run(*more, steps: int = 6) -> Path:
        if (more, steps) not in folders:
            folders[more, steps] = tmp_path_factory.mktemp("alone") / "run"
            assert main(arguments(folders[more, steps], *more, steps=steps)) == 0
        return folders[more, steps]

    return run


class Job:
    """`torchrun`, its processes, and what they say; all of them are ended at the end, whatever happens."""

    def __init__(self, ranks: int, command: list[str], restarts: int = 0, meet: Sequence[str] = ("--standalone",)):
        launcher = [sys.executable, "-m", "torch.distributed.run", *meet, "--nproc-per-node", str(ranks)]
        launcher += ["--max-restarts", str(restarts)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([*launcher, *command], text=True, env=ONE_THREAD, **pipes)

    def workers(self) -> dict[int, int]:
        """Process ids by rank."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for pid in pids:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")}
        return found

    def finish(self) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        finally:
            self.end()
        return self.process.returncode, out, err

    def end(self) -> None:
        if self.process.poll() is None:
            for pid in (*self.workers().values(), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.communicate()


def torchrun(ranks: int, arguments: list[str], restarts: int = 0) -> tuple[int, str, str]:
    return Job(ranks, ["-m", "sigma_book.cli", *arguments], restarts).finish()


def rows(out: Path) -> list[list[float]]:
    """Step, loss, gradient norm, rate, tokens."""
    with (out / "log.csv").open() as file:
        return [[float(cell) for cell in row[:-1]] for row in list(csv.reader(file))[1:]]


def weights(out: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(out / "final" / name)


def assert_same_run(out: Path, expected: Path, name: str = "model.safetensors") -> None:
    """Losses to 1e-5. Weights to a 50th of what a rate of 3e-3 moves in a step: AdamW divides by the size of a gradient,
    so where one is nothing but rounding (k_proj.bias), it steps at random, by a rate at most."""
    ours, theirs = torch.tensor(rows(out), dtype=torch.float64), torch.tensor(rows(expected), dtype=torch.float64)
    torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[:, 2], theirs[:, 2], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours[:, [0, 3, 4]], theirs[:, [0, 3, 4]])
    assert_same_weights(weights(out, name), weights(expected, name))


def assert_same_weights(ours: dict, theirs: dict, most: float = 6e-5) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        if not key.endswith("k_proj.bias"):
            torch.testing.assert_close(
                ours[key], theirs[key], rtol=0, atol=most, msg=lambda text, key=key: f"{key}: {text}"
            )


def kill_a_rank(job: Job, out: Path, after: int, rank: int | None = 1) -> None:
    """kill -9 once so many steps are logged, a moment into the next; without a rank, whichever the job has."""
    limit = time.monotonic() + LIMIT
    log = out / "log.csv"
    while not log.exists() or log.read_bytes().count(b"\n") <= after:
        assert time.monotonic() < limit and job.process.poll() is None, "the run makes no progress"
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.03))
    workers = job.workers()
    os.kill(max(workers.values()) if rank is None else workers[rank], signal.SIGKILL)


@pytest.mark.slow  # chapter 22 runs both schemes each time
def test_fsdp_on_two_ranks_is_the_run_of_one(arguments, alone, tmp_path):
    out, more = tmp_path / "run", ("--dtype", "float32")
    code, printed, err = torchrun(2, arguments(out, *more, "--parallel", "fsdp"))
    assert (code, printed) == (0, f"{out / 'final'}\n"), err
    assert "2 ranks, fsdp: 2 of the 4 examples of a batch for each" in err
    assert err.count("30 examples of the form prefix") == 1, "one rank speaks for all"
    assert_same_run(out, alone(*more))
    assert {path.name for path in out.iterdir()} == {path.name for path in alone(*more).iterdir()}
    for folder in ("final", "checkpoints"):
        assert {path.name for path in (out / folder).iterdir()} == {p.name for p in (alone(*more) / folder).iterdir()}
    theirs = AutoModelForImageTextToText.from_pretrained(out / "final").eval()
    ours = load(out / "final", device="cpu")
    batch = ours.processor.prepare([draw_scene(make_scene(3))], ["caption en"])
    with torch.no_grad():
        scores = ours(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids)
        expected = theirs(**{name: value for name, value in vars(batch).items() if value is not None}).logits
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    files = [path for path in (out / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}, "no pickle is written"
    shards = sorted((out / "checkpoints" / "step-000006" / "weights").iterdir())
    held = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in shards]
    config = TrainingConfig(dtype="float32")
    sizes = shape_model(read_config(out / "final"), config)
    assert held[0] == rank_bill(sizes, config, "fsdp", 2).weights and held[1] < 1.001 * held[0]
    assert sum(held) == rank_bill(sizes, config, "ddp", 2).weights


@pytest.mark.slow
def test_a_rank_killed_in_a_step_is_no_loss(arguments, alone, tmp_path):
    """torchrun starts all ranks again, they go on from the last checkpoint, and end where the run of one ends."""
    out = tmp_path / "run"
    job = Job(2, ["-m", "sigma_book.cli", *arguments(out, "--parallel", "ddp", steps=14)], restarts=1)
    try:
        kill_a_rank(job, out, after=5)
        code, printed, err = job.finish()
    finally:
        job.end()
    assert (code, printed) == (0, f"{out / 'final'}\n"), err
    assert "another rank is gone" in err, err
    assert re.search(r"going on after step (4|6|8|10|12) of 14", err), err
    assert_same_run(out, alone(steps=14))
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_two_machines_meet_again(arguments, alone, tmp_path):
    """Two torchruns, as on two machines. They number their starts differently: one restarts since its rank was killed,
    which counts, the other because the first did, which as a rule does not."""
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "x"]
        meet += ["--rdzv-endpoint", f"localhost:{free.getsockname()[1]}"]
    given = ["-m", "sigma_book.cli", *arguments(out, "--parallel", "ddp", steps=14)]
    jobs = [Job(1, given, restarts=1, meet=meet) for _ in range(2)]
    try:
        kill_a_rank(jobs[1], out, after=5, rank=None)
        ends = [job.finish() for job in jobs]
    finally:
        for job in jobs:
            job.end()
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sorted(printed for _, printed, _ in ends) == ["", f"{out / 'final'}\n"]
    assert re.search(r"going on after step (4|6|8|10|12) of 14", "".join(err for _, _, err in ends))
    assert_same_run(out, alone(steps=14))


LEAVE = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from sigma_book.scale import Ranks

def meet(time):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(f"{sys.argv[1]}-{time}", 2), rank=rank, world_size=2)
    ranks = Ranks(rank, 2, torch.device("cpu"))
    ranks.copy = DistributedDataParallel(torch.nn.Linear(4, 4))
    ranks.copy(torch.ones(2, 4)).sum().backward()
    ranks.sum(1)
    ranks.leave()

for time in range(100):
    meet(time)
"""


@pytest.mark.slow
def test_ranks_leave_without_waiting_for_themselves(tmp_path):
    """DDP, the last owner of a group, would end it while it holds the lock that the group's thread waits for: in torch
    2.13 that took less than a hundred meetings, three times of three."""
    (tmp_path / "leave.py").write_text(LEAVE)
    code, _, err = Job(2, [str(tmp_path / "leave.py"), str(tmp_path / "store")]).finish()
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_without_restarts_it_stops_with_a_sentence_and_goes_on_by_hand(arguments, alone, tmp_path, parallel):
    out = tmp_path / "run"
    given = arguments(out, "--parallel", parallel, steps=14)
    job = Job(2, ["-m", "sigma_book.cli", *given])
    try:
        kill_a_rank(job, out, after=5, rank=0 if parallel == "fsdp" else 1)
        code, printed, err = job.finish()
    finally:
        job.end()
    assert (code, printed) == (1, "") and re.search(
        "another rank is gone(, so no step can be finished)?: torchrun", err
    ), err
    code, _, err = torchrun(2, given)
    assert code == 0 and "going on after step" in err, err
    assert_same_run(out, alone(steps=14))


@pytest.mark.slow
@pytest.mark.parametrize(
    "first,then", [((4, "fsdp"), (2, "fsdp")), ((4, "fsdp"), (2, "ddp")), ((2, "ddp"), (4, "fsdp"))]
)
def test_another_number_of_ranks_goes_on(arguments, alone, tmp_path, first, then):
    out = tmp_path / "run"
    code, _, err = torchrun(first[0], arguments(out, "--parallel", first[1]))
    assert code == 0, err
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    code, _, err = torchrun(then[0], arguments(out, "--parallel", then[1]))
    assert code == 0 and "going on after step 4 of 6" in err, err
    assert_same_run(out, alone())


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--recompute", "--schedule", "linear", "--weight-decay", 0.1),
        ("--freeze", "vision", "--decoder-rate", 1e-3),
        ("--freeze", "decoder"),
        ("--epochs", 1, "--accumulate", 3),
    ],
    ids=lambda more: " ".join(map(str, more)),
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_way_of_learning_is_the_run_of_one(arguments, alone, tmp_path, parallel, more):
    out = tmp_path / "run"
    code, _, err = torchrun(2, arguments(out, *more, "--parallel", parallel))
    assert code == 0, err
    assert_same_run(out, alone(*more))


@pytest.mark.slow
@pytest.mark.parametrize("way", [("lora", "ddp", 2), ("lora", "fsdp", 4), ("qlora", "ddp", 2)], ids=str)
def test_adapters_are_those_of_one(arguments, alone, tmp_path, way):
    method, parallel, ranks = way
    out, more = tmp_path / "run", ("--method", method, "--rank", 4)
    code, _, err = torchrun(ranks, arguments(out, *more, "--parallel", parallel))
    assert code == 0, err
    assert_same_run(out, alone(*more), "adapter_model.safetensors")
    ours, theirs = (json.loads((one / "final" / "adapter_config.json").read_text()) for one in (out, alone(*more)))
    assert ours == theirs
    load(out / "final", device="cpu")


@pytest.mark.slow
def test_evaluation_in_bfloat16_is_that_of_one_up_to_rounding(arguments, alone, data, tmp_path):
    more = ("--evaluate", data / "test.jsonl", "--evaluate-every", 2, "--dtype", "bfloat16")
    out = tmp_path / "run"
    code, _, err = torchrun(2, arguments(out, *more, "--parallel", "fsdp", steps=2))
    assert code == 0, err
    ours, theirs = (json.loads((one / "evaluations.json").read_text()) for one in (out, alone(*more, steps=2)))
    assert [note["step"] for note in ours] == [note["step"] for note in theirs] == [0, 2]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    load(out / "best", device="cpu")


@pytest.mark.slow
def test_evaluation_and_the_best_are_those_of_one(arguments, alone, data, tmp_path):
    out, more = tmp_path / "run", ("--evaluate", data / "test.jsonl", "--evaluate-every", 2)
    code, _, err = torchrun(2, arguments(out, *more, "--parallel", "fsdp"))
    assert code == 0, err
    assert_same_run(out, alone(*more))
    ours, theirs = (json.loads((one / "evaluations.json").read_text()) for one in (out, alone(*more)))
    assert [note["step"] for note in ours] == [0, 2, 4, 6]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["exact"] == other["exact"]
    assert_same_weights(load_file(out / "best/model.safetensors"), load_file(alone(*more) / "best/model.safetensors"))


@pytest.mark.slow
def test_a_broken_row_that_leaves_a_rank_without_work(arguments, data, tmp_path):
    """Rank 1 has no row in the last batch, and one row that cannot be read: the others do not wait for ever."""
    lines = (data / "train.jsonl").read_text().splitlines()[:9]
    rows_ = [json.loads(line) for line in lines]
    rows_[4]["image"] = "absent.png"
    path = data / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    out = tmp_path / "run"
    more = ("--data", path, "--batch-size", 2, "--accumulate", 1, "--on-error", "skip", "--parallel", "ddp")
    code, _, err = torchrun(2, arguments(out, *more, steps=12))
    assert code == 0 and "1 rows were left out" in err, err
    assert all(math.isfinite(row[1]) for row in rows(out)) and len(rows(out)) == 12
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_nobody_can_read_is_no_step(arguments, data, tmp_path, accumulate):
    """Rows 0 and 2 of four pairs are broken: one process leaves such a batch out, and so do two together."""
    rows_ = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:8]]
    order = epoch_order(8, 0, 0)
    for place in (0, 1, 4, 5):
        rows_[order[place]]["image"] = "absent.png"
    path = data / f"half{accumulate}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    more = ("--data", path, "--batch-size", 2, "--accumulate", accumulate, "--on-error", "skip")
    steps = 2 // accumulate
    assert main(arguments(tmp_path / "one", *more, steps=steps)) == 0
    code, _, err = torchrun(2, arguments(tmp_path / "two", *more, "--parallel", "ddp", steps=steps))
    assert code == 0 and "4 rows were left out" in err, err
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_control_c_saves_on_all_ranks(arguments, alone, tmp_path):
    out = tmp_path / "run"
    given = arguments(out, "--parallel", "fsdp", "--save-every", 1000, steps=60)
    job = Job(2, ["-m", "sigma_book.cli", *given])
    try:
        while not (out / "log.csv").exists() or len(rows(out)) < 3:
            assert job.process.poll() is None
            time.sleep(0.02)
        job.process.send_signal(signal.SIGINT)
        code, printed, err = job.finish()
    finally:
        job.end()
    assert code != 0 and printed == "" and "which is saved: give the same command again to go on" in err, err
    assert len(list((out / "checkpoints").iterdir())) == 1
    code, _, err = torchrun(2, given)
    assert code == 0 and "going on after step" in err, err
    assert_same_run(out, alone("--save-every", 1000, steps=60))


PROGRAM = """
import sys, torch
from pathlib import Path
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from sigma_book.processor import Batch
from sigma_book.scale import join_ranks, load_sharded, never_empty, rank_bill, rows_of, shape_model
from sigma_book.training import TrainingConfig, adamw_by_part, answer_loss

folder, method, dtype = sys.argv[1:]
torch.manual_seed(0)
ranks = join_ranks("cpu")
config = TrainingConfig(method=method, dtype=dtype, **({} if method == "full" else {"rank": 3}))
model = load_sharded(folder, config, ranks)
optimizer = adamw_by_part(model, config)
seen = {}
for name in ("vision_tower.encoder.layers.0.mlp.fc1", "language_model.layers.1.mlp.down_proj"):
    module = model.get_submodule(name)
    module.register_forward_hook(lambda module, given, result, name=name: seen.update({name: (module.weight.dtype, result.dtype)}))
ids = torch.full((2, 9), model.config.image_token_id)
ids[:, 4:] = torch.arange(5) + 10 * ranks.rank
ones = torch.ones_like(ids)
batch = Batch(ids, ones, (torch.arange(9) > 6).long() * ones, torch.randn(2, 3, 28, 28), torch.where(torch.arange(9) > 6, ids, -100))
gathered, reduced = [], []
allocate = _fsdp_collectives.DefaultAllocMixin.allocate

def recorded(self, *given, **settings):
    found = allocate(self, *given, **settings)
    (reduced if isinstance(self, _fsdp_collectives.ReduceScatter) else gathered).append(found.nbytes)
    return found

_fsdp_collectives.DefaultAllocMixin.allocate = recorded
with CommDebugMode() as calls:
    loss = answer_loss(model, never_empty(batch))
    loss.backward()
optimizer.step()
bill = rank_bill(shape_model(model.config, config), config, "fsdp", ranks.size)
held = lambda tensors: sum(tensor.to_local().nbytes for tensor in tensors if isinstance(tensor, DTensor))
learning = [p for p in model.parameters() if p.requires_grad]
assert all(isinstance(p, DTensor) for p in model.parameters())
for p in model.parameters():
    rows = rows_of(p.shape[0], ranks.rank, ranks.size)
    assert len(p.to_local()) == rows.stop - rows.start
memory = [value for state in optimizer.state.values() for value in state.values()]
found = held(model.parameters()), held(p.grad for p in learning), held(memory)
if ranks.rank == 0:
    assert found == (bill.weights, bill.gradients, bill.optimizer), (found, bill)
assert {p.dtype for p in learning} == {p.grad.dtype for p in learning} == {torch.float32}
assert {kind for kinds in seen.values() for kind in kinds} == {getattr(torch, dtype)}, seen
blocks = len(model.vision_tower.encoder.layers) + len(model.language_model.layers)
gathers = sum(count for call, count in calls.get_comm_counts().items() if "all_gather" in str(call) or "allgather" in str(call))
scatters = sum(count for call, count in calls.get_comm_counts().items() if "reduce_scatter" in str(call))
backs = blocks if method == "full" else len(model.language_model.layers)
vain = method != "full"  # FSDP fetches ahead: the frozen block before the first that a gradient comes back to
assert gathers == 1 + blocks + backs + vain and scatters == (1 if method == "full" else 0) + backs, calls.get_comm_counts()
# of each group the weights that were made whole, and the copy of their gradient that was added up: first and last, the rest
in_blocks, copies = gathered[1 : 1 + blocks], reduced[::2]
rest_copy = copies.pop() if method == "full" else 0
share = getattr(torch, dtype).itemsize / 4  # of a gradient in its copy
borrowed = gathered[0] + sum(sorted(in_blocks)[-2:]) + share * (rest_copy + max(copies)) + max(copies)
borrowed = max(borrowed, (1 + share) * rest_copy)
assert 0 <= borrowed - bill.gathered < 0.02 * borrowed, (borrowed, bill)  # rows are filled up to a multiple of the ranks
assert torch.isfinite(loss)
print("well", flush=True)
ranks.leave()
"""


def run_program(tmp_path: Path, ranks: int, *given) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    code, printed, err = Job(ranks, [str(tmp_path / "program.py"), *map(str, given)]).finish()
    assert code == 0 and printed.count("well") == ranks, err


@pytest.mark.slow
def test_each_rank_holds_its_rows_and_computes_in_bfloat16(tiny_folder, tmp_path):
    """What rank 0 holds is what its bill says, to the byte; FSDP gathers and reduces as often as the bill counts."""
    run_program(tmp_path, 2, tiny_folder, "full", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,dtype,ranks", [("full", "float32", 3), ("lora", "float32", 2), ("lora", "bfloat16", 4)]
)
def test_other_methods_hold_what_their_bill_says(tiny_folder, tmp_path, method, dtype, ranks):
    run_program(tmp_path, ranks, tiny_folder, method, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("parallel,room", [("ddp", 1.05), ("fsdp", 1.05)])
def test_what_crosses_the_wire(make_tiny, tmp_path, data, parallel, room):
    """In a network of their own, two ranks send what the bill says: counted by the kernel, headers included.

    Two runs of different length are compared, so that meeting each other and writing files do not count."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody have a network of his own")
    folder = make_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512)
    given = ["train", "--data", data / "train.jsonl", "--model", folder, "--batch-size", 2, "--device", "cpu"]
    given += ["--parallel", parallel, "--save-every", 1000, "--out"]
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m sigma_book.cli"
    count = "grep lo: /proc/net/dev"
    sent = []
    for steps in (2, 12):
        command = " ".join(map(str, [launcher, *given, tmp_path / f"run-{steps}", "--max-steps", steps]))
        shell = f"ip link set lo up && {command} && {count}"
        done = subprocess.run(
            ["unshare", "-rn", "sh", "-c", shell], capture_output=True, text=True, env=ONE_THREAD, timeout=LIMIT
        )
        assert done.returncode == 0, done.stderr
        sent.append(int(done.stdout.split("lo:")[1].split()[0]))
    step = (sent[1] - sent[0]) / 10 / 2  # each rank
    config = TrainingConfig(dtype="float32")
    bill = rank_bill(shape_model(read_config(folder), config), config, parallel, 2)
    # gloo has no reduce-scatter of its own: torch sends an all-reduce, which is twice as much, and keeps a part of it
    billed = bill.sent + (bill.gradients if parallel == "fsdp" else 0)
    assert 1 <= step / billed < room, f"{step:,.0f} bytes a step and rank, {billed:,.0f} on the bill"


# In one process: what needs no second.


@pytest.fixture
def one_rank(tmp_path):
    """A group of a single process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def state(folder: Path, ranks: Ranks, seed: int = 0):
    """A small model with an optimizer that has taken two steps, and its checkpoints."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer, RankCheckpoints(folder / "checkpoints", model, [optimizer], ranks, every=1, keep=2)


def progress(steps: int) -> Progress:
    rows = [[float(step), 1 / 3, 0.1, 1.0, 7.0, 0.5] for step in range(steps)]
    return Progress(rows, {"next": steps}, [{"step": steps, "loss": 0.1}], None)


def test_what_is_saved_comes_back_bit_by_bit(tmp_path, one_rank):
    model, optimizer, checkpoints = state(tmp_path, one_rank)
    for steps in (1, 2, 3):
        checkpoints.save(progress(steps))
    assert [path.name for path in checkpoints._found()] == ["step-000003", "step-000002"]
    drawn = torch.rand(3), random.random()
    other, fresh, again = state(tmp_path, one_rank, seed=1)
    fresh.state.clear()
    assert again.restore() == progress(3)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert all(torch.equal(optimizer.state[one][key], fresh.state[two][key]) for key in optimizer.state[one])
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]


@pytest.mark.parametrize(
    "name", ["state.json", "manifest-00000.json", "progress.safetensors", "random-00000.safetensors", "*/shard-*"]
)
@pytest.mark.parametrize("how", ["cut", "turned", "gone"])
def test_a_damaged_checkpoint_is_set_aside(tmp_path, one_rank, capsys, name, how):
    model, _, checkpoints = state(tmp_path, one_rank)
    for steps in (1, 2):
        checkpoints.save(progress(steps))
    path = next(checkpoints._found()[0].glob(name))
    raw = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    assert checkpoints.restore() == progress(1)
    err = capsys.readouterr().err
    assert "is damaged" in err and "set aside as damaged-step-000002, the one before it is used" in err
    shutil.rmtree(checkpoints._found()[0])
    with pytest.raises(
        ValueError, match="is whole: rename damaged-step-N back to step-N .*, or remove the folder to begin anew"
    ):
        checkpoints.restore()


def test_a_checkpoint_of_another_model_is_refused(tmp_path, one_rank):
    _, _, checkpoints = state(tmp_path, one_rank)
    checkpoints.save(progress(1))
    other = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    wrong = RankCheckpoints(tmp_path / "checkpoints", other, [torch.optim.AdamW(other.parameters())], one_rank, every=1)
    with pytest.raises(ValueError, match=r"another configuration: 1.bias is \[1\] there and \[2\] here"):
        wrong.restore()


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path, one_rank):
    _, _, checkpoints = state(tmp_path, one_rank)
    checkpoints.save(progress(1))
    (tmp_path / "checkpoints" / ".step-000002").write_text("a file in the way of the folder")
    with pytest.raises(RuntimeError, match="the checkpoint of step 2 cannot be written .*; those before it stand"):
        checkpoints.save(progress(2))
    assert [path.name for path in checkpoints._found()] == ["step-000001"]


def test_a_full_disk_is_not_kept_full(tmp_path, one_rank, monkeypatch):
    """What was written of the checkpoint goes, so that there is room again."""
    _, _, checkpoints = state(tmp_path, one_rank)
    checkpoints.save(progress(1))

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(scale, "to_disk", full)
    with pytest.raises(RuntimeError, match="the checkpoint of step 2 cannot be written .*No space left"):
        checkpoints.save(progress(2))
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000001"]


class Threads(Ranks):
    """Two ranks that are threads of this process."""

    def __init__(self, rank: int, slots: list, barrier: threading.Barrier):
        super().__init__(rank, 2, torch.device("cpu"))
        self.slots, self.barrier = slots, barrier

    def sum(self, *numbers: float) -> tuple[float, ...]:
        self.barrier.wait()
        self.slots[self.rank] = numbers
        self.barrier.wait()
        return tuple(float(sum(column)) for column in zip(*self.slots, strict=True))


@pytest.mark.parametrize("act", ["save", "restore"])
def test_ranks_without_one_folder_stop_with_a_sentence(tmp_path, act):
    """As on two machines that share no disk: neither saves, nor waits for the other."""
    slots, barrier = [None, None], threading.Barrier(2, timeout=20)

    def rank(number: int) -> str:
        _, _, checkpoints = state(tmp_path / f"machine-{number}", Threads(number, slots, barrier))
        (checkpoints.folder / "step-000001").mkdir(parents=True)  # of a run before
        with pytest.raises(RuntimeError) as caught:
            checkpoints.save(progress(2)) if act == "save" else checkpoints.restore()
        assert [path.name for path in checkpoints._found()] == ["step-000001"]
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(rank, range(2)))
    assert "another rank" in said[0]
    assert "is not seen by rank 1: all machines must share the folder of the run" in said[1]


def test_a_checkpoint_that_one_rank_cannot_read_now_stays(tmp_path, one_rank, monkeypatch):
    """Both ranks stop with a sentence, and nothing is set aside."""
    state(tmp_path, one_rank)[2].save(progress(1))
    slots, barrier = [None, None], threading.Barrier(2, timeout=20)

    def fails(path):  # only rank 0 has files to look at
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(scale, "file_checksum", fails)

    def rank(number: int) -> str:
        _, _, checkpoints = state(tmp_path, Threads(number, slots, barrier))
        with pytest.raises(RuntimeError, match="step-000001 cannot be read now .*: nothing was changed") as caught:
            checkpoints.restore()
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000001"]
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(rank, range(2)))
    assert "Input/output error" in said[0] and "another rank could not read it" in said[1]


@given(count=st.integers(1, 60), size=st.integers(1, 12))
def test_rows_are_cut_as_torch_cuts_them(count, size):
    whole = torch.arange(count)
    chunks = list(whole.chunk(size))
    for rank in range(size):
        expected = chunks[rank] if rank < len(chunks) else whole[:0]
        assert torch.equal(whole[rows_of(count, rank, size)], expected)


@given(size=st.integers(1, 6), each=st.integers(1, 5), other=st.integers(1, 6))
def test_a_place_in_the_data_for_other_ranks(size, each, other):
    place = {"seed": 1, "examples": 50, "batch_size": each, "world_size": size, "next": 3}
    if each * size % other:
        assert same_place(place, 1, each * size + 1) == place
        with pytest.raises(ValueError, match="cannot share evenly"):
            share_of_batch(each * size, Ranks(0, other, torch.device("cpu")))
    else:
        share = share_of_batch(each * size, Ranks(0, other, torch.device("cpu")))
        assert same_place(place, share, other) == place | {"batch_size": share, "world_size": other}
    assert same_place(None, 1, 1) is None


def test_a_batch_that_teaches_nothing_has_a_loss_all_the_same(tiny_model):
    ids = torch.full((1, 9), tiny_model.config.image_token_id)
    ids[:, 4:] = 5
    ones = torch.ones_like(ids)
    batch = Batch(ids, ones, ones * 0, torch.zeros(1, 3, 28, 28), torch.full_like(ids, -100))
    assert torch.isnan(answer_loss(tiny_model, batch))
    assert torch.isfinite(answer_loss(tiny_model, never_empty(batch)))
    full = replace(batch, labels=ids)
    assert never_empty(full) is full and answer_tokens(batch) == 0


def test_the_bill_of_ddp_is_what_a_process_holds(tiny_folder):
    sizes = read_config(tiny_folder)
    for method, dtype in (("full", "float32"), ("lora", "bfloat16"), ("qlora", "bfloat16")):
        config = TrainingConfig(method=method, dtype=dtype, **({} if method == "full" else {"rank": 3}))
        bill = rank_bill(shape_model(sizes, config), config, "ddp", 4)
        model, _ = _learner(tiny_folder, config, torch.device("cpu"))
        held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = adamw_by_part(model, config)
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        memory = [value for values in optimizer.state.values() for value in values.values() if value.dim()]
        assert (bill.weights, bill.gradients) == (held, sum(p.nbytes for p in learning)), method
        assert bill.optimizer == sum(value.nbytes for value in memory)
        assert bill.sent == ring_bytes(bill.gradients, 4) == 1.5 * bill.gradients
        assert any(isinstance(module, NF4Linear) for module in model.modules()) == (method == "qlora")


@pytest.mark.parametrize(
    "parallel,values,named",
    [
        ("zero", {}, "parallel is 'zero': expected ddp or fsdp"),
        ("fsdp", {"method": "qlora"}, "fsdp cannot cut the codes of qlora by rows: take ddp"),
        ("fsdp", {"dtype": "float16"}, "fsdp goes with float32 and bfloat16"),
        ("ddp", {"optimizer": "adamw8bit"}, "optimizer adamw8bit is for one process"),
    ],
)
def test_what_does_not_go_together_is_refused(parallel, values, named):
    with pytest.raises(ValueError, match=named):
        check_parallel(parallel, TrainingConfig(**values))


def test_the_way_is_chosen_by_what_is_free():
    large = PaliGemmaConfig.from_dict({"model_type": "paligemma"})
    config = TrainingConfig(dtype="bfloat16")
    kept = rank_bill(shape_model(large, config), config, "ddp", 8).kept
    assert choose_parallel(large, config, 8, 2 * kept) == "ddp" == choose_parallel(large, config, 8, None)
    assert choose_parallel(large, config, 8, 2 * kept - 2) == "fsdp"
    assert choose_parallel(large, replace(config, method="qlora"), 8, 1) == "ddp"


def test_alone_parallel_is_told_to_start_with_torchrun(arguments, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", "--parallel", "ddp")) == 2
    assert "parallel is 'ddp', but this process is alone: start it with torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_under_torchrun_is_refused(arguments, tmp_path, capsys, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(arguments(tmp_path / "run", "--dry-run")) == 2
    assert capsys.readouterr().err.startswith("sigma-book, rank 1: a dry run counts one process: leave torchrun out")


def test_a_run_of_many_is_not_taken_on_by_one(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "checkpoints" / "step-000002").mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"processes": "many"}))
    assert main(arguments(out)) == 2
    assert "holds a run of many processes: go on with torchrun" in capsys.readouterr().err
    assert (out / "checkpoints" / "step-000002").is_dir()


def test_alone_is_alone():
    assert ALONE.sum(1, 2.5) == (1, 2.5) and ALONE.first(3) == 3 and (ALONE.rank, ALONE.size) == (0, 1)
