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
# # Many processes, one step
#
# *How do many graphics cards teach one model together, and what does each of them keep and send?*
#
# **You build** training on any number of processes: with a copy of the model on each, or with a part of it on each.
# **You need** chapters 15b (batches by rank), 16 (the loop), 18 and 19 (adapters).
# **Exports** the module `sigma_book.scale`.

# %%
# | export
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
    free_bytes,
    file_checksum,
    freeze_parts,
    remark,
)
from sigma_book.weights import find_tensors, map_file, pick_device, read_config


# %%
import csv
import os
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt

from sigma_book import finetune
from sigma_book.gemma import GemmaConfig
from sigma_book.siglip import SiglipConfig
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import caption, draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# Teaching takes four numbers for each number of the model: the weight, its gradient, and AdamW's two means (chapter 16).
# Four processes can share the work in two ways. Each has its own examples in both.
#
# In the first, *distributed data parallel* (DDP), every process keeps all four numbers of the whole model. In the second,
# *fully sharded data parallel* (FSDP), each keeps a quarter of the model, and borrows the rest, one block at a time. A
# process is called a *rank*, and has a number, from 0.

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.5), sharey=True)
parts = (("weights", 1, PICTURE), ("gradients", 1, PROMPT), ("two means", 2, ANSWER))
for axis, share, title in zip(axes, (1.0, 0.25), ("a copy on each", "a quarter on each")):
    for rank in range(4):
        floor = 0.0
        for name, height, colour in parts:
            axis.bar(rank, share * height, bottom=floor, color=colour, width=0.7)
            if share == 1.0 and rank == 0:
                axis.annotate(name, (-0.5, floor + height / 2), ha="right", va="center", annotation_clip=False)
            floor += share * height
    if share < 1:
        axis.bar(range(4), 0.12, bottom=1.0, color="white", edgecolor=GREY, hatch="////", width=0.7)
        axis.annotate("a block, borrowed", (1.5, 1.2), ha="center", va="bottom")
    axis.set_xticks(range(4), [f"rank {rank}" for rank in range(4)])
    axis.set_title(title, fontsize=10)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
save(figure, "22_keep")

# %% [markdown]
# *Figure: two groups of four bars. On the left each rank has a full bar of weights, gradients and two means. On the right
# each has a quarter of it, and a small hatched piece on top, a block that is borrowed.*
#
# ## First by hand
#
# Take the first way. Each rank has a gradient of its own examples. All of them want the sum. How does everybody get it?
#
# One could send everything to rank 0, which adds up and sends the sum back. Then rank 0 alone sends N - 1 times the gradient,
# and all wait for it.
#
# There is a better way. The ranks sit in a ring and talk to the right neighbour only. Each cuts its numbers into as many pieces
# as there are ranks. In the first round, pieces travel and grow: what comes from the left is added to one's own, and sent on.
# After N - 1 steps each rank has one piece that is complete. In the second round the complete pieces travel once around.


# %%
def all_reduce_naive(numbers: list[list[float]]) -> tuple[list[list[float]], int]:
    """A ring of ranks, where each number is a piece: what each rank has at the end, and how many numbers each has sent."""
    held, ranks, sent = [list(row) for row in numbers], len(numbers), 0
    for step in range(ranks - 1):  # first round: pieces grow
        moving = [((rank - step) % ranks, held[rank][(rank - step) % ranks]) for rank in range(ranks)]
        for rank, (piece, number) in enumerate(moving):
            held[(rank + 1) % ranks][piece] += number
        sent += 1
    for step in range(ranks - 1):  # second round: complete pieces go around
        moving = [((rank + 1 - step) % ranks, held[rank][(rank + 1 - step) % ranks]) for rank in range(ranks)]
        for rank, (piece, number) in enumerate(moving):
            held[(rank + 1) % ranks][piece] = number
        sent += 1
    return held, sent


numbers = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [100.0, 200.0, 300.0, 400.0], [0.5, 0.5, 0.5, 0.5]]
summed, sent = all_reduce_naive(numbers)
assert summed == [[111.5, 222.5, 333.5, 444.5]] * 4 and sent == 6
summed[0], sent

# %% [markdown]
# Each rank has 4 numbers and sent 6. The first round alone is called *reduce-scatter*: everybody ends with one piece of the
# sum. The second is called *all-gather*: everybody gets all pieces. Both together are *all-reduce*. Remember the two halves:
# the second way of sharing takes them apart.
#
# ## The formula
#
# A piece is $1/N$ of the whole. Each round sends $N - 1$ of them. For $S$ bytes, each rank sends
#
# $$ \underbrace{\tfrac{N-1}{N} S}_{\text{reduce-scatter}} + \underbrace{\tfrac{N-1}{N} S}_{\text{all-gather}}
# = \frac{2 (N - 1)}{N} S. $$


# %%
# | export
def ring_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank sends so that all have the sum of their `size` bytes: twice (N - 1) parts of N.

    References
    ----------
    Patarasuk and Yuan 2009, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations".
    """
    return 2 * (ranks - 1) / ranks * size


# %% [markdown]
# Two ranks send $S$ each. The more ranks, the nearer it comes to $2S$, and it never gets there.

# %%
assert ring_bytes(4, 4) == sent  # as by hand
assert ring_bytes(1, 2) == 1 and 1.99 < ring_bytes(1, 1000) < 2
counts = [2, 4, 8, 16, 32, 64]
figure, axis = plt.subplots(figsize=(5.6, 2.5))
axis.plot(counts, [n - 1 for n in counts], color=PROMPT, marker="s", ms=4)
axis.plot(counts, [ring_bytes(1, n) for n in counts], color=PICTURE, marker="o", ms=4)
axis.annotate(
    "rank 0, if it does it all", (16, 15), xytext=(-8, 4), textcoords="offset points", ha="right", color="0.3"
)
axis.annotate("any rank of a ring", (64, ring_bytes(1, 64)), xytext=(0, 6), textcoords="offset points", ha="right")
axis.set_xscale("log", base=2)
axis.set_xticks(counts, counts)
axis.set(xlabel="ranks", ylabel="gradients sent", ylim=(0, 20))
save(figure, "22_ring")

# %% [markdown]
# *Figure: how often a rank sends the whole gradient, against the number of ranks. The line of a rank 0 that does it all
# climbs out of the picture; the line of the ring starts at 1 and levels off just under 2.*
#
# ## Meeting each other
#
# PyTorch's launcher, `torchrun`, starts the processes and tells each its number, how many there are, and where they meet.
# Tensors then travel by one of two libraries: NCCL between graphics cards, gloo between CPUs.
#
# The loop of chapter 16 asks for the others through a small object. `Alone` answers for one process, `Ranks` for many.


# %%
# | export
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


# %% [markdown]
# Two methods need a word. A step may have several small batches (chapter 16). With DDP, `adding` lets each rank collect its
# own gradients, and puts off adding them up over the ranks until the last small batch of the step.
#
# `sum` is there for the trap of chapter 16: the mean of means is not the mean. It comes back here, since ranks have answers
# of different lengths. So the tokens of *all* ranks are counted before the first gradient, and each token weighs one over
# that count, whoever has it.
#
# Libraries take the mean of the ranks' gradients. We want the sum of shares, so the loss is multiplied by the number of
# ranks; that is the factor `ranks.size` in `add_gradients`.
#
# Take two ranks, one with 2 tokens and one with 8. The library's mean is then the mean of all ten tokens, 1.8, and not the
# mean of the two means, 3.

# %%
short, long = [4.0, 6.0], [1.0] * 8  # losses of the tokens on two ranks
total = len(short) + len(long)
means = [sum(losses) / len(losses) for losses in (short, long)]
shares = [mean * (len(losses) / total) * 2 for mean, losses in zip(means, (short, long))]
assert sum(means) / 2 == 3.0
assert sum(shares) / 2 == sum(short + long) / total == 1.8

# %% [markdown]
# Rank 0 alone writes the log, the remarks and the pictures. But all ranks ask the held-out examples alike: where each has
# only a part of the model, it answers only if all take part.
#
# How do the processes meet? `torchrun` keeps a board that all can read, and does not wipe it when it starts them anew. So
# rank 0 opens a store of its own and writes its address on the board. Where nobody answers, the address is that of a rank
# that is gone, and one looks again.
#
# And if one dies? The network says things like "connection closed by peer", in all the others. We put a sentence in its
# place.


# %%
# | export
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


# %% [markdown]
# ## The same batch, whatever the number
#
# `--batch-size 32` is the batch of all ranks together: 32 on one, 16 on each of two, 8 on each of four. So one command gives
# the same run on any number of them. Chapter 15b deals the examples out like cards, one to each rank in turn. Whatever
# the number of ranks, batch 7 then holds the same examples.


# %%
# | export
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


# %%
order = list(range(24))
for size in (1, 2, 4):
    each = 8 // size
    batch = [order[rank::size][each : 2 * each] for rank in range(size)]  # of batch 1
    assert sorted(sum(batch, [])) == list(range(8, 16))

# %% [markdown]
# ## A copy on each: DDP
#
# PyTorch's `DistributedDataParallel` does what we did by hand, and does it early: the gradients of the last blocks are on
# their way while those of the first are still being computed. It listens to a module's `forward`, so we wrap the loss in a
# module.


# %%
# | export
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


# %% [markdown]
# A rank may have nothing to learn from, as at the end of an epoch. It cannot sit the step out, since the others wait for its
# gradient. So it takes part with a loss of weight zero.


# %%
# | export
def never_empty(batch: Batch) -> Batch:
    """The batch; if it has no label, with one made up, so that its loss is a number. That loss has the weight 0.

    A rank without labels has to take part in the step, or the others would wait for it.
    """
    if answer_tokens(batch):
        return batch
    labels = batch.labels.clone()
    labels[:, -1] = 0
    return replace(batch, labels=labels)


# %% [markdown]
# DDP fits adapters best: in a step of QLoRA, only the adapters' gradients are sent, and the NF4 codes stay where they are.
#
# ## A part on each: FSDP
#
# Now the second way, again by hand. A linear map with 8 rows on four ranks, two rows each. Every rank has its own examples.
# Forwards, all gather the whole matrix, use it, and drop it. Backwards, each gets a gradient for the whole matrix, of its own
# examples. A reduce-scatter adds them up and leaves each rank the two rows that it keeps.

# %%
whole = torch.randn(8, 6)
own = list(whole.chunk(4))  # what each rank keeps
examples = torch.randn(4, 5, 6)  # five for each
gradients = []
for rank in range(4):
    gathered = torch.cat(own).requires_grad_()  # all-gather
    (examples[rank] @ gathered.T).square().sum().backward()
    gradients.append(gathered.grad)
kept = [sum(gradient.chunk(4)[rank] for gradient in gradients) for rank in range(4)]  # reduce-scatter

reference = whole.clone().requires_grad_()
(examples.flatten(0, 1) @ reference.T).square().sum().backward()
torch.testing.assert_close(torch.cat(kept), reference.grad)

# %% [markdown]
# Each rank then lets AdamW step on its two rows alone, with means for two rows alone. Nobody ever has the means of the
# whole matrix.
#
# Where the number of rows is not a multiple of the ranks, the last ranks have fewer rows, or none.


# %%
# | export
def rows_of(count: int, rank: int, size: int) -> slice:
    """Which of `count` rows a rank keeps: as many as any other, but for the last ranks, for which few or none are left."""
    most = -(-count // size)
    return slice(min(count, rank * most), min(count, (rank + 1) * most))


# %%
assert [len(range(10)[rows_of(10, rank, 4)]) for rank in range(4)] == [3, 3, 3, 1]
assert [len(range(5)[rows_of(5, rank, 4)]) for rank in range(4)] == [2, 2, 1, 0]

# %% [markdown]
# PyTorch has this as `fully_shard`, also called FSDP2. We say what is gathered together: each block of tower and decoder, and
# then all the rest. While one block is at work, the next is already on its way.
#
# In bfloat16, blocks are sent and computed in 16 bits. So is what flows between them, which autocast (chapter 16) leaves in
# 32: FSDP and DDP round at other places. The rows that a rank keeps stay in 32 bits, and so do the sums of gradients: a sum
# of 512 small numbers in 8 binary digits would lose many of them.

# %%
small = torch.full((512,), 1 / 512)
assert small.sum() == 1
running = torch.tensor(0.0, dtype=torch.bfloat16)
for number in small.bfloat16():
    running += number
assert running < 0.6
running.item()


# %%
# | export
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


# %% [markdown]
# ## Starting without the whole
#
# A model that fits on no card must not be built on one. So it begins on the meta device, where tensors have shapes and no
# numbers. It is cut there. Only then does each rank ask for memory, for its rows, and reads just these rows from the
# safetensors files. At the end, rank 0 gathers the model one tensor after another and writes the same folder as ever.
#
# A parameter that has been cut is a `DTensor`, which stands for the whole: its `to_local()` gives the rows of this rank, and
# its `full_tensor()` gathers all rows.


# %%
# | export
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


# %% [markdown]
# ## If one dies
#
# With more machines, it is more likely that one fails. A rank that is gone leaves the others waiting for its part of
# the sum. They notice, say a sentence, and end. With `--max-restarts 3`, torchrun then starts all of them again, and they go
# on from the last checkpoint.
#
# So the checkpoint has to be written by all: no rank has the whole. Each writes its rows, as safetensors, with
# `torch.distributed.checkpoint`. The rules are those of chapter 16: a folder beside, checksums, then one renaming. That
# library's own table of contents is a pickle, which can run code when it is read; its Hugging Face form has none, as each file
# says in its head which rows it holds. Any number of ranks can put them together again.


# %%
# | export
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


# %% [markdown]
# Two limits. All ranks must see one folder, so several machines need a shared disk; a run looks whether they have one before
# its first step. And while ranks agree on who writes what, that library sends small pickles between them: in memory, between
# processes of one run, never on disk.
#
# ## What each rank keeps and sends
#
# | | kept by each | sent by each in a step |
# |---|---|---|
# | DDP | everything | $\frac{2(N-1)}{N}$ of the gradients |
# | FSDP | $\frac1N$ of everything, and what is borrowed | $\frac{N-1}{N}$ of blocks twice, of the rest once, and of gradients |
#
# The rest is what is in no block, the embedding above all. The weights of the blocks FSDP sends twice, in 16 bits, and the
# gradients once, in 32. That is $2 \cdot 2 + 4 = 8$ bytes a number, just what DDP sends: $2 \cdot 4$. So in bfloat16 the saved
# memory costs no extra traffic, for weights travel in half the bits. In float32 it costs half as much again:
# $2 \cdot 4 + 4 = 12$. And ranks wait for weights in the middle of a step.
#
# A frozen block through which no gradient comes back is gathered once: the tower, when adapters of the decoder learn. Its last
# block is the exception. FSDP fetches ahead, and gathers that one in vain.


# %%
# | export
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


# %%
# | export
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


# %% [markdown]
# ## Proof
#
# Now for real: two processes and gloo, each with its part of the pocket model, against one process that has all of it. Three
# steps of four captions.

# %%
folder = Path(tempfile.mkdtemp())
lines = []
for seed in range(12):
    scene = make_scene(seed)
    draw_scene(scene).save(folder / f"{seed}.png")
    lines.append(json.dumps({"image": f"{seed}.png", "prefix": "caption en", "suffix": caption(scene)}))
(folder / "train.jsonl").write_text("\n".join(lines))
config = TrainingConfig(max_steps=3, batch_size=4, learning_rate=1e-4, dtype="float32")
finetune(folder / "train.jsonl", folder / "one", config, device="cpu")

command = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "sigma_book.cli",
]
command += ["train", "--data", folder / "train.jsonl", "--out", folder / "two", "--max-steps", "3", "--batch-size", "4"]
command += ["--learning-rate", "1e-4", "--dtype", "float32", "--device", "cpu", "--parallel", "fsdp"]
one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=one_thread, timeout=120)
assert done.returncode == 0, done.stderr


def losses(run: Path) -> list[float]:
    with (run / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


apart = max(abs(a - b) for a, b in zip(losses(folder / "one"), losses(folder / "two"), strict=True))
print(f"losses {apart:.1e} apart at most")
assert apart < 1e-5

# %% [markdown]
# And the bill, against what the second run has written: its checkpoint has the rows of each rank in a file of their own.

# %%
written = [
    sum(tensor.nbytes for tensor in load_file(path).values())
    for path in sorted((folder / "two/checkpoints/step-000003/weights").iterdir())
]
pocket = shape_model(read_config(folder / "two" / "final"), config)
bill = rank_bill(pocket, config, "fsdp", 2)
assert written[0] == bill.weights and sum(written) == rank_bill(pocket, config, "ddp", 2).weights
print(f"{written[0]:,} and {written[1]:,} bytes of weights; on the bill {bill.weights:,}")
shutil.rmtree(folder)

# %% [markdown]
# `tests/test_scale.py` compares the same for DDP, LoRA and QLoRA, with four ranks, after a rank was killed in the middle of a
# step, and for a run that four ranks begin and two finish. A test marked `slow` also counts the bytes that cross the wire, in
# a network that the two processes have for themselves. Over gloo, FSDP sends more than the bill says: torch has no
# reduce-scatter for it, so it adds up whole gradients by an all-reduce and keeps a part. NCCL has one.
#
# ## The bill
#
# The pocket model needs none of this. Here are the large ones, computed in bfloat16, without activations. Where everything
# learns, all four numbers are kept in 32 bits, 16 bytes together. With adapters, frozen weights are in 16 bits, or for QLoRA
# in NF4. These numbers are calculated, not measured.


# %%
def paligemma(vision_to: int, mlp: int, layers: int, heads: int, kv_heads: int, head: int, four_norms: bool = True):
    tower = SiglipConfig(1152, 4304, 27, 16, image_size=224, patch_size=14)
    text = GemmaConfig(vision_to, mlp, layers, heads, kv_heads, head, 257_216, four_norms=four_norms)
    return PaliGemmaConfig(tower, text)


sizes = {
    "3B": paligemma(2048, 16384, 18, 8, 1, 256, four_norms=False),
    "10B": paligemma(3584, 14336, 42, 16, 8, 256),
    "28B": paligemma(4608, 36864, 46, 32, 16, 128),
}
ways = {"DDP": ("full", "ddp"), "FSDP": ("full", "fsdp"), "LoRA, DDP": ("lora", "ddp"), "QLoRA, DDP": ("qlora", "ddp")}
gpus = (1, 8, 64, 512)
table = {}
for name, one in sizes.items():
    for way, (method, parallel) in ways.items():
        settings = TrainingConfig(method=method, dtype="bfloat16")
        shapes = shape_model(one, settings)
        table[name, way] = [rank_bill(shapes, settings, parallel, count) for count in gpus]
print(f"{'':16}{'kept by each, GB':^36}{'sent by each in a step, GB':^36}")
print(f"{'GPUs':16}" + "".join(f"{count:>9}" for count in gpus) * 2)
for (name, way), bills in table.items():
    kept = "".join(f"{bill.kept / 1e9:>9.1f}" for bill in bills)
    print(f"{name + ' ' + way:16}{kept}" + "".join(f"{bill.sent / 1e9:>9.2f}" for bill in bills))

# %%
everything = table["3B", "DDP"][0]
assert everything.kept == 16 * 2_923_466_480
assert abs(table["3B", "FSDP"][2].sent / table["3B", "DDP"][2].sent - 1) < 0.12  # no extra traffic
assert table["28B", "DDP"][3].kept > 400e9 and table["28B", "FSDP"][2].kept < 40e9
assert table["28B", "QLoRA, DDP"][3].sent < 0.05 * table["28B", "DDP"][3].sent

# %%
figure, axis = plt.subplots(figsize=(6.6, 3.2))
marks = {"DDP": ("s", PROMPT), "FSDP": ("o", PICTURE), "LoRA, DDP": ("^", ANSWER), "QLoRA, DDP": ("v", GREY)}
for way, (mark, colour) in marks.items():
    kept = [bill.kept / 1e9 for bill in table["28B", way]]
    axis.loglog(gpus, kept, color=colour, marker=mark, ms=5)
    axis.annotate(way, (gpus[-1], kept[-1]), xytext=(8, 0), textcoords="offset points", va="center")
axis.axhline(80, color="0.6", lw=1, ls=":")
axis.annotate("a card of 80 GB", (1, 80), xytext=(0, 3), textcoords="offset points", size=8, color="0.4")
axis.set_xticks(gpus, gpus)
axis.minorticks_off()
axis.set(xlabel="GPUs", ylabel="GB on each, 28B", xlim=(0.8, 2500))
save(figure, "22_bill")

# %% [markdown]
# *Figure: memory on each GPU for the 28B model, with 1 to 512 GPUs, both axes logarithmic. DDP stays flat, far above a dotted
# line of 80 GB. LoRA and QLoRA are flat lines below it. FSDP starts beside DDP, is under the dotted line at 8 GPUs, and under
# all others at 64.*
#
# With FSDP a part does not shrink with more GPUs: what is borrowed. That is two blocks and what is in no block (the embedding
# above all), the gradients of one block and of that rest, and a copy of the block's gradient in 32 bits: torch makes it to add
# up in, and frees the one in 16 bits only then. And a rank with one example sends as much as a rank with a hundred, so with few
# examples each, ranks spend more of a step waiting.
#
# ## Commands
#
#     torchrun --nproc-per-node 4 -m sigma_book.cli train --data train.jsonl --out runs/first --batch-size 32
#     torchrun --nproc-per-node 8 --max-restarts 3 -m sigma_book.cli train ... --parallel fsdp
#     torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sigma_book.cli train ...
#
# Without `--parallel`, it is DDP where half of the free memory holds what a rank would keep, else FSDP, and the run says
# which. The same command with another number of processes goes on with the same run.
#
# ## Your turn
#
# **1.** ★ Write `sent_by_scatter(size, ranks)`: the bytes that a rank sends in a reduce-scatter of `size` bytes.


# %%
def sent_by_scatter(size: float, ranks: int) -> float: ...


check(sent_by_scatter, ((8.0, 4), 6.0), ((10.0, 1), 0.0), ((6.0, 2), 3.0))

# %% [markdown]
# **2.** ★ Losses summed over each rank's tokens, and how many tokens each has: the loss of the step.


# %%
def loss_of_step(sums: list[float], tokens: list[int]) -> float: ...


check(loss_of_step, (([10.0, 8.0], [2, 8]), 1.8), (([3.0, 0.0], [2, 0]), 1.5))

# %% [markdown]
# **3.** ★★ `fewest(numbers, card)`: on how many ranks must a model of so many numbers be cut, so that 16 bytes for each
# fit into `card` bytes, with nothing borrowed?


# %%
def fewest(numbers: int, card: float) -> int: ...


check(fewest, ((2_923_466_480, 80e9), 1), ((28_000_000_000, 80e9), 6), ((26_000_000_000, 80e9), 6), ((10, 160.0), 1))

# %% [markdown]
# **4.** ★★★ A reduce-scatter without a ring: in each of $\log_2 N$ rounds, a rank and a partner split what both still have to
# add up. Each sends the other one half of its numbers, and adds what it gets to the half that it keeps. Write
# `halving(ranks, size)`: how many numbers does a rank send in all, of `size` at the start? (`ranks` is a power of two.)


# %%
def halving(ranks: int, size: float) -> float: ...


check(halving, ((2, 8.0), 4.0), ((8, 8.0), 7.0), ((4, 100.0), 75.0))

# %% [markdown]
# Next: millions of pictures through a model that has learned.
