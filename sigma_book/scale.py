"""Many processes, one step.

How do many graphics cards teach one model together, and what does each of them keep and send?

Tangled from chapters/22_scale.py: edit there, then run python -m sigma_book.tangle.
"""

import gc
import ipaddress
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sigma_book.lora import LoraConfig, LoraLinear, add_lora
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Batch, to_disk
from sigma_book.qlora import nf4_bytes
from sigma_book.training import (
    AUTOCAST,
    Alone,
    Checkpoints,
    Progress,
    TrainingConfig,
    answer_loss,
    answer_tokens,
    blocks_of,
    file_checksum,
    free_bytes,
    freeze_parts,
    remark,
)
from sigma_book.weights import find_tensors, map_file, pick_device, read_config

__all__ = [
    "CopyLoss",
    "RankBill",
    "RankCheckpoints",
    "Ranks",
    "asked_whole",
    "check_parallel",
    "choose_parallel",
    "copy_loss",
    "gather",
    "join_ranks",
    "load_sharded",
    "never_empty",
    "others_there",
    "rank_bill",
    "ring_bytes",
    "rows_of",
    "same_place",
    "shape_model",
    "shard_model",
    "share_of_batch",
    "under_torchrun",
]


def ring_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank sends so that all have the sum of their `size` bytes: twice (N - 1) parts of N.

    References
    ----------
    Patarasuk and Yuan 2009, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations".
    """
    return 2 * (ranks - 1) / ranks * size


class Ranks(Alone):
    """Processes that `torchrun` started and that take each step together; the loop of chapter 16 asks it.

    Parameters
    ----------
    rank, size : int
        Which process this is, and of how many.
    device : torch.device
        Where this one computes.
    """

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank, self.size, self.device = rank, size, device
        self.copy: DistributedDataParallel | None = None  # once a model is spread by DDP

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each number, added up over all processes, in float64; all wait here for each other."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def first(self, number: float) -> float:
        """What rank 0 says, for all."""
        return self.sum(number if self.rank == 0 else 0.0)[0]

    def adding(self, last: bool) -> AbstractContextManager:
        """DDP adds up once a step; FSDP after each small batch, since it has no room for whole gradients."""
        return nullcontext() if self.copy is None or last else self.copy.no_sync()

    def clip(self, parameters: list[nn.Parameter], most: float) -> float:
        """Shorten the whole gradient, of which each rank may hold a part, and give the length that it had."""
        norm = nn.utils.clip_grad_norm_(parameters, most)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def free_bytes(self) -> int | None:
        """Memory that is left for this process: of its GPU, or its share of the machine's; None where nobody says."""
        free, sharing = free_bytes(self.device), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return free // sharing if free is not None and self.device.type == "cpu" else free

    def leave(self) -> None:
        """Say goodbye, when all is done."""
        # A group ends with its last owner. DDP would wait for the group's thread while it holds Python's lock, for which
        # that thread may be waiting: so DDP goes first.
        self.copy = None
        gc.collect()
        dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether this process is one of several that `torchrun`, or a launcher with the same variables, has started."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def join_ranks(device: str | torch.device = "auto") -> Ranks:
    """Meet the other processes: over NCCL where each has a GPU of its own, else over gloo on the CPU.

    Parameters
    ----------
    device : str or torch.device
        auto, cuda or cpu.

    Raises
    ------
    ValueError
        If one device is named for all, or it is mps.
    RuntimeError
        If there are more processes than GPUs.
    """
    device, local = pick_device(device), int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "mps" or device.index is not None:
        raise ValueError(f"device is {str(device)!r}: under torchrun give cuda or cpu, each rank takes one of its own")
    if device.type == "cuda":
        device = pick_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    hour = timedelta(hours=1)  # the longest that one may wait for another, as for rank 0 while it writes a model
    one = device if device.type == "cuda" else None
    board, rank, size = next(dist.rendezvous("env://", timeout=hour))
    store = _fresh_store(board, rank, hour)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=hour, device_id=one, store=store, rank=rank, world_size=size)
    return Ranks(rank, size, device)


def _fresh_store(board: dist.Store, rank: int, timeout: timedelta) -> dist.Store:
    """A store that rank 0 holds and that ends with it; `board` tells the others where it is.

    torchrun keeps its own store over restarts, and with it the addresses of processes that are gone. Nor does it number
    the starts alike on all machines.
    """
    if rank == 0:
        store = dist.TCPStore(_own_address(), 0, is_master=True, wait_for_workers=False, timeout=timeout)
        board.set("rank 0", json.dumps([store.host, store.port]))
        return store
    end = time.monotonic() + timeout.total_seconds()
    while True:
        host, port = json.loads(board.get("rank 0"))
        try:
            with socket.create_connection((host, port), timeout=10):
                pass  # only to see that somebody is there: TCPStore would complain aloud
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        except (OSError, dist.DistError) as error:  # it is that of a rank 0 that is gone
            if time.monotonic() > end:
                raise RuntimeError(f"rank 0 cannot be reached at {host}, port {port}: {error}") from error
            time.sleep(0.1)
        else:
            store.set_timeout(timeout)
            return store


def _own_address() -> str:
    """The address at which others reach this machine: that with which it reaches the one they all know."""
    known = os.environ["MASTER_ADDR"]
    with socket.create_connection((known, int(os.environ["MASTER_PORT"]))) as line:
        own = line.getsockname()[0]
    return known if ipaddress.ip_address(own).is_loopback else own


@contextmanager
def others_there(what: str) -> Iterator[None]:
    """Have it said in a sentence that another rank is gone: the network tells so, or torchrun, which then ends all ranks.

    Raises
    ------
    RuntimeError
        In place of the network's own.
    """
    advice = (
        f"torchrun --max-restarts goes on from the last checkpoint in {what}, and so does the same command given again"
    )
    with _last_words(f"this rank was told to end, as torchrun tells all once another rank is gone: {advice}"):
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
                raise
            raise RuntimeError(f"another rank is gone, so no step can be finished: {advice}") from error


@contextmanager
def _last_words(sentence: str) -> Iterator[None]:
    """Under torchrun, say this when SIGTERM comes, then end as usual: whether network or torchrun is first is chance."""
    if not under_torchrun() or threading.current_thread() is not threading.main_thread():
        yield
        return
    usual, here = signal.getsignal(signal.SIGTERM), os.getpid()

    def end(number, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() == here:  # processes that read ahead hear it too
            os.write(2, f"\n{sentence}\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


_LOST = re.compile(r"gloo/transport|NCCL|[Cc]onnection (closed|reset|refused)")


def share_of_batch(batch_size: int, ranks: Alone) -> int:
    """How many examples of a batch are for each rank.

    Raises
    ------
    ValueError
        If they cannot share it evenly.
    """
    if batch_size % ranks.size:
        raise ValueError(
            f"batch_size is {batch_size}, which {ranks.size} ranks cannot share evenly: it is the batch of all ranks "
            f"together, so give a multiple of {ranks.size}"
        )
    return batch_size // ranks.size


def same_place(place: dict | None, batch_size: int, size: int) -> dict | None:
    """A place in the data (chapter 15b), said for another number of ranks; `batch_size` is that of each.

    The whole batch has to be the same: then rank by rank it holds the same examples, and its number is the same.
    """
    if place is None or place["batch_size"] * place["world_size"] != batch_size * size:
        return place  # chapter 15b says what is wrong with it
    return place | {"batch_size": batch_size, "world_size": size}


class CopyLoss(nn.Module):
    """The loss as a module's `forward`, which is where DDP listens."""

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return answer_loss(self.model, batch)


def copy_loss(model: PaliGemma, ranks: Ranks) -> Callable[[Batch], torch.Tensor]:
    """The loss of a model that each rank holds whole; its backward pass leaves the mean of all ranks in each `.grad`.

    Weights are those of rank 0 afterwards. In a step, only gradients of weights that learn are sent.
    """
    ranks.copy = DistributedDataParallel(CopyLoss(model), forward_sync_buffers=False, gradient_as_bucket_view=True)
    return lambda batch: ranks.copy(batch)  # `Ranks.leave` lets go of it


def never_empty(batch: Batch) -> Batch:
    """The batch; if it has no label, with one made up, so that its loss is a number. That loss has the weight 0.

    A rank without labels has to take part in the step, or the others would wait for it.
    """
    if answer_tokens(batch):
        return batch
    labels = batch.labels.clone()
    labels[:, -1] = 0
    return replace(batch, labels=labels)


def rows_of(count: int, rank: int, size: int) -> slice:
    """Which of `count` rows a rank keeps: as many as any other, but for the last ranks, for which few or none are left."""
    most = -(-count // size)
    return slice(min(count, rank * most), min(count, (rank + 1) * most))


def shard_model(model: PaliGemma, ranks: Ranks, dtype: str) -> None:
    """Cut every parameter by rows over the ranks, in place (FSDP2): a block is whole only while it is at work.

    Parameters
    ----------
    model : PaliGemma
        May be on the meta device.
    ranks : Ranks
    dtype : str
        What blocks are sent and computed in: float32, or bfloat16. The parts stay in their dtype, and gradients are
        added up in float32.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=AUTOCAST[dtype], reduce_dtype=torch.float32)
    for block in blocks_of(model):  # angles of positions must stay float32 on their way into a block
        fully_shard(block, mesh=mesh, mp_policy=replace(policy, cast_forward_inputs=False))
    fully_shard(model, mesh=mesh, mp_policy=policy)  # what is in no block: embeddings, projector, last norms
    register_fsdp_forward_method(model, "loss")  # where it is entered from outside, as by `forward`


def shape_model(sizes: PaliGemmaConfig, config: TrainingConfig) -> PaliGemma:
    """A model without numbers, on the meta device, ready to learn by the method of a run: dtypes and who learns are right.

    With qlora the maps that will be in NF4 are still in the dtype of products.
    """
    with torch.device("meta"):
        model = PaliGemma(sizes)
    if config.method == "full":
        freeze_parts(model, config.freeze)
    else:
        add_lora(model.to(getattr(torch, config.dtype)), LoraConfig(config.rank, config.alpha, config.dropout))
    return model


def load_sharded(folder: str | Path, config: TrainingConfig, ranks: Ranks) -> PaliGemma:
    """A model that is cut over the ranks from the start: each reads its own rows of the files, and no other.

    Parameters
    ----------
    folder : path
        In the Hugging Face layout.
    config : TrainingConfig
        Of method full or lora, with a real dtype. Adapters begin with the numbers that `add_lora` would draw.
    ranks : Ranks

    Raises
    ------
    FileNotFoundError, ValueError, RuntimeError
        As `load_model`.
    """
    sizes = read_config(folder)
    with torch.device("meta"):
        places = find_tensors(Path(folder), sizes, PaliGemma(sizes).state_dict())
    model = shape_model(sizes, config)
    shard_model(model, ranks, config.dtype)
    model.to_empty(device=ranks.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                continue
            path, stored, _ = places[name.replace(".base.", ".")]
            rows = rows_of(parameter.shape[0], ranks.rank, ranks.size)
            parameter.to_local().copy_(map_file(path).get_slice(stored)[rows])
        for module in model.modules():
            if isinstance(module, LoraLinear):
                whole = torch.empty(module.lora_A.shape)
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
                module.lora_A.to_local().copy_(whole[rows_of(len(whole), ranks.rank, ranks.size)])
                module.lora_B.to_local().zero_()
    return model


@contextmanager
def asked_whole(model: PaliGemma) -> Iterator[None]:
    """Around an examination: what is in no block stays whole from its first loss on, and is cut again at the end.

    Between, the model may answer; its blocks are gathered for each token. All ranks have to ask the same.
    """
    yield
    if isinstance(model, FSDPModule):
        model.reshard()


def gather(model: nn.Module, ranks: Ranks, learning: bool = False) -> dict[str, torch.Tensor]:
    """All parameters, or those that learn, whole on the CPU of rank 0; the others get none. All have to call it.

    One is whole at a time on the other ranks.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not learning:
            whole = parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            if ranks.rank == 0:
                tensors[name] = whole.cpu()
    return tensors


class RankCheckpoints(Checkpoints):
    """The last few states of a run of many ranks, each a folder that appears whole or not at all.

    `step-000123/` holds `weights/` and `optimizer/`, where each rank has written its rows, in the safetensors form of
    `torch.distributed.checkpoint`; `random-RANK.safetensors`, `progress.safetensors`, `state.json`; and for each rank a
    manifest with size and checksum of what it wrote. Any number of ranks reads it, cut or not. The folder must be one
    that all ranks see.

    Parameters
    ----------
    folder, modules, optimizers, every, keep
        As in `Checkpoints`.
    ranks : Ranks
    """

    def __init__(self, folder: Path, modules: nn.Module, optimizers: list, ranks: Ranks, *, every: int, keep: int = 3):
        super().__init__(folder, modules, optimizers, every=every, keep=keep)
        self.ranks = ranks

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, each rank its part, and remove the oldest.

        Raises
        ------
        RuntimeError
            If a part cannot be written; the checkpoints before it stand.
        """
        wanted = self.folder / f"step-{progress.step:06d}"
        fresh = wanted.with_name(f".{wanted.name}")
        problem = self._make_for_all(fresh)
        if self._all_well(problem):
            try:
                self._write(fresh, progress)
            except (CheckpointException, SafetensorError, RuntimeError, OSError) as error:
                problem = error
        if not self._all_well(problem):
            if self.ranks.rank == 0:
                shutil.rmtree(fresh, ignore_errors=True)  # the disk may be full of it
            what = " ".join(str(problem or "another rank could not write its part").split())
            raise self._unwritten(progress, what) from problem
        if self.ranks.rank == 0:
            shutil.rmtree(wanted, ignore_errors=True)
            os.replace(fresh, wanted)
            to_disk(self.folder)
            for old in self._found()[self.keep :]:
                shutil.rmtree(old)

    def restore(self) -> Progress:
        """Load the newest checkpoint that is whole, whatever the number of ranks that wrote it.

        Dropout draws on as if the run had not been stopped if the number of ranks is the same.

        Returns
        -------
        Progress
            An empty one if there is no checkpoint.

        Raises
        ------
        ValueError
            If all checkpoints are damaged, or the newest is of other weights.
        RuntimeError
            If a rank does not see the folder of the others, or cannot read a checkpoint now.
        """
        if self.ranks.rank == 0:
            for rest in self.folder.glob(".step-*"):  # of a save that was killed
                shutil.rmtree(rest)
        trial = self.folder / ".step-seen"
        problem = self._make_for_all(trial)
        shared = self._all_well(problem)
        if self.ranks.rank == 0:
            shutil.rmtree(trial, ignore_errors=True)
        if not shared:
            raise RuntimeError(str(problem or f"another rank does not see {self.folder} as this one does"))
        own = self._found()  # rank 0 names them: for a while, a shared disk may show others an older list
        count = int(self.ranks.first(len(own)))
        steps = [int(self.ranks.first(int(own[n].name[5:]) if n < len(own) else 0)) for n in range(count)]
        found = [self.folder / f"step-{step:06d}" for step in steps]
        for path in found:
            problem = self._problem(path)
            refused = problem if isinstance(problem, OSError) else None
            if not self._all_well(refused):
                raise self._unreadable(path, refused or "another rank could not read it") from refused
            if problem is not None:
                remark(f"{path} is damaged ({problem})")
            if self._all_well(problem):
                return self._load_parts(path)
            if self.ranks.rank == 0:
                aside = self._set_aside(path)
                remark(f"{path} is set aside as {aside.name}, the one before it is used")
        return self._nothing_whole(found)

    def _all_well(self, problem: object) -> bool:
        return self.ranks.sum(problem is not None) == (0.0,)

    def _make_for_all(self, path: Path) -> OSError | None:
        """Rank 0 makes a folder; what is wrong with it on this rank, or None."""
        problem = None
        try:
            if self.ranks.rank == 0:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
        except OSError as error:
            problem = error
        if self._all_well(problem) and not path.is_dir():
            return OSError(
                f"{path} is not seen by rank {self.ranks.rank}: all machines must share the folder of the run"
            )
        return problem

    def _tables(self) -> dict[str, dict[str, torch.Tensor]]:
        """What each rank has a part of, by folder and name; tensors with the memory of what they are read into."""
        memory = {}
        names = {parameter: name for name, parameter in self.learning.items()}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    memory[f"{names[parameter]}.{key}"] = value.reshape(1) if value.dim() == 0 else value
        return {"weights": {name: p.detach() for name, p in self.learning.items()}, "optimizer": memory}

    def _write(self, fresh: Path, progress: Progress) -> None:
        rank, tables = self.ranks.rank, self._tables()
        for name, table in tables.items():
            dcp.save(table, storage_writer=dcp.HuggingFaceStorageWriter(str(fresh / name), save_distributed=True))
        version, numbers, _ = random.getstate()
        drawn = {"torch": torch.get_rng_state(), "python": torch.tensor([version, *numbers])}
        if self.ranks.device.type == "cuda":
            drawn["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        save_file(drawn, fresh / f"random-{rank:05d}.safetensors")
        if rank == 0:
            save_file({"rows": torch.tensor(progress.rows, dtype=torch.float64)}, fresh / "progress.safetensors")
            state = {"step": progress.step, "data": progress.data, "notes": progress.notes, "scale": progress.scale}
            state |= {"ranks": self.ranks.size, "shapes": self._shapes(), "optimizer": sorted(tables["optimizer"])}
            (fresh / "state.json").write_text(json.dumps(state))
        own = [fresh / f"random-{rank:05d}.safetensors", *fresh.glob(f"*/shard-{rank + 1:05d}-*.safetensors")]
        own += [fresh / "progress.safetensors", fresh / "state.json"] if rank == 0 else []
        manifest = {path.relative_to(fresh).as_posix(): [path.stat().st_size, file_checksum(path)] for path in own}
        own.append(fresh / f"manifest-{rank:05d}.json")
        own[-1].write_text(json.dumps(manifest))
        for path in (*own, *{path.parent for path in own}):
            to_disk(path)

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.learning.items()}

    def _problem(self, path: Path) -> str | OSError | None:
        """What is wrong with a checkpoint, or why it cannot be read: each rank looks at the files of some that wrote it."""
        try:
            writers = json.loads((path / "state.json").read_text())["ranks"]
            for writer in range(self.ranks.rank, writers, self.ranks.size):
                manifest = json.loads((path / f"manifest-{writer:05d}.json").read_text())
                for name, (size, checksum) in manifest.items():
                    if (path / name).stat().st_size != size or file_checksum(path / name) != checksum:
                        return f"{name} is not as it was written"
        except (FileNotFoundError, NotADirectoryError) as error:
            return f"{Path(error.filename or path).name} is missing"
        except OSError as error:  # no proof of damage
            return error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return str(error) or type(error).__name__
        return None

    def _load_parts(self, path: Path) -> Progress:
        state = json.loads((path / "state.json").read_text())
        self._expect_same(path, self._shapes(), state["shapes"])
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                means = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros((), device=self.ranks.device)} | means
        try:
            for name, table in self._tables().items():
                dcp.load(table, storage_reader=dcp.HuggingFaceStorageReader(str(path / name)))
        except CheckpointException as error:
            raise RuntimeError(f"{path} cannot be read ({' '.join(str(error).split())}): check the disk") from error
        drawn = path / f"random-{self.ranks.rank:05d}.safetensors"
        if state["ranks"] == self.ranks.size:
            tensors = load_file(drawn)
            version, *numbers = tensors["python"].tolist()
            random.setstate((version, tuple(numbers), None))
            torch.set_rng_state(tensors["torch"])
            if self.ranks.device.type == "cuda" and "cuda" in tensors:
                torch.cuda.set_rng_state(tensors["cuda"], self.ranks.device)
        rows = load_file(path / "progress.safetensors")["rows"]
        return Progress(rows.tolist(), state["data"], state["notes"], state["scale"])


@dataclass(frozen=True)
class RankBill:
    """What a step costs one rank, activations aside: bytes that it keeps, and bytes that it sends.

    `gathered` is what FSDP makes whole for a while: two blocks and the gradient of one, all that is in no block and its
    gradient, and a copy of a block's gradient in float32, to be added up; or at the end of the way back, where that is
    more, the gradient of what is in no block and its copy.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    sent: float

    @property
    def kept(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered


def rank_bill(model: PaliGemma, config: TrainingConfig, parallel: str, ranks: int) -> RankBill:
    """The bill of rank 0, which has the most rows, for one step of one small batch with AdamW.

    Parameters
    ----------
    model : PaliGemma
        As `shape_model` gives it.
    config : TrainingConfig
        The one it was made with.
    parallel : str
        ddp or fsdp.
    ranks : int
        How many.
    """
    item = getattr(torch, config.dtype).itemsize
    if parallel == "ddp":
        weights = sum(parameter.nbytes for parameter in model.parameters())
        if config.method == "qlora":
            codes = [m.base.weight.numel() for m in model.modules() if isinstance(m, LoraLinear)]
            weights -= sum(item * count - nf4_bytes(count) for count in codes)
        gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        return RankBill(weights, gradients, 2 * gradients, 0, ring_bytes(gradients, ranks))
    groups = _groups(model)
    learning = [[p for p in group if p.requires_grad] for group, _ in groups]
    rest, *blocks = [sum(p.numel() for p in group) for group, _ in groups]
    rest_learns, *blocks_learn = [sum(p.numel() for p in one) for one in learning]
    in_blocks = item * (rest + rest_learns + sum(sorted(blocks)[-2:])) + (item + 4) * max(blocks_learn)
    gathered = max(in_blocks, (item + 4) * rest_learns)
    gradients = sum(4 * _cut_numel(p, ranks) for one in learning for p in one)
    sent = sum(times * item * _cut_numel(p, ranks) for group, times in groups for p in group) + gradients
    weights = sum(p.element_size() * _cut_numel(p, ranks) for p in model.parameters())
    return RankBill(weights, gradients, 2 * gradients, gathered, (ranks - 1) * sent)


def _cut_numel(parameter: torch.Tensor, ranks: int) -> int:
    """Numbers of a parameter that rank 0 keeps; all send as many, filled up with zeros."""
    return -(-parameter.shape[0] // ranks) * math.prod(parameter.shape[1:])


def _groups(model: PaliGemma) -> list[tuple[list[nn.Parameter], int]]:
    """What FSDP gathers together, and how often in a step: all that is in no block, once; then each block.

    A block is gathered once forwards, and once more if a gradient comes back to it, or to the block behind it:
    FSDP fetches ahead, without asking whether that is needed.
    """
    blocks, tower = blocks_of(model), len(model.vision_tower.encoder.layers)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter not in inside]
    comes_back = [any(parameter.requires_grad for parameter in model.vision_tower.embeddings.parameters())]
    for place, block in enumerate(blocks):
        learns = any(parameter.requires_grad for parameter in block.parameters())
        between = place == tower and any(parameter.requires_grad for parameter in rest)  # projector and embedding
        comes_back.append(comes_back[-1] or between or learns)
    behind = [*comes_back[2:], comes_back[-1]]
    return [(rest, 1), *((list(block.parameters()), 1 + back) for block, back in zip(blocks, behind, strict=True))]


def check_parallel(parallel: str, config: TrainingConfig) -> None:
    """Refuse what does not go together.

    Raises
    ------
    ValueError
        Its sentence says what does.
    """
    if parallel not in ("ddp", "fsdp"):
        raise ValueError(f"parallel is {parallel!r}: expected ddp or fsdp")
    if config.optimizer != "adamw":
        raise ValueError(f"optimizer {config.optimizer} is for one process: under torchrun take adamw")
    if parallel == "fsdp" and config.method == "qlora":
        raise ValueError("fsdp cannot cut the codes of qlora by rows: take ddp, where each rank holds all of them")
    if parallel == "fsdp" and config.dtype == "float16":
        raise ValueError("fsdp goes with float32 and bfloat16: float16 would need a scale that all ranks agree on")


def choose_parallel(sizes: PaliGemmaConfig, config: TrainingConfig, ranks: int, free: int | None) -> str:
    """ddp where half of the memory that a rank has free (in bytes) holds all it would keep of the model; else fsdp.

    The other half is for activations. qlora takes ddp in any case.
    """
    if config.method == "qlora" or free is None:
        return "ddp"
    return "ddp" if rank_bill(shape_model(sizes, config), config, "ddp", ranks).kept <= free / 2 else "fsdp"
