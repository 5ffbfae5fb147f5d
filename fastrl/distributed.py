"""Processes that train one model together: `torchrun --nproc-per-node N -m fastrl train RECIPE`.

Every process has the whole model and the whole batch: groups are small, so they are exchanged as JSON. What is split is
the work: prompts to sample and score, and micro-batches to run. Normalisers, baselines and sorting are computed on the
whole batch by each process, exactly as by a single one, and gradients, which lie in one flat float32 buffer, are summed
in one call. So the number of processes changes a step by rounding alone.

Nothing that crosses between processes is pickled.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastrl import env
from fastrl.check import require
from fastrl.progress import Progress, tracked, unseen
from fastrl.types import MicroBatch

OP = "distributed"
CPU = torch.device("cpu")


class PeerFailed(RuntimeError):
    """Another process of the run has failed or is gone."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is. Alone, every method is the identity.

    Methods that exchange something must be called by all processes in the same order.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU  # of tensors that are exchanged

    @property
    def first(self) -> bool:
        """Whether this process writes files and the screen."""
        return self.rank == 0

    def places(self, number: int) -> list[int]:
        """Which of `number` equal parts of the work are this process's."""
        return list(range(self.rank, number, self.size))

    def owners(self, batches: Sequence[MicroBatch]) -> list[int]:
        """The rank that runs each micro-batch: the largest go first, each to the rank with the least tokens so far."""
        loads, found = [0] * self.size, [0] * len(batches)
        for place in sorted(range(len(batches)), key=lambda place: -batches[place].num_tokens):
            rank = loads.index(min(loads))
            loads[rank] += batches[place].num_tokens
            found[place] = rank
        return found

    def share(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """This process's micro-batches, in order."""
        if self.size == 1:
            return list(batches)
        return [batch for batch, rank in zip(batches, self.owners(batches), strict=True) if rank == self.rank]

    def map(
        self,
        batches: Sequence[MicroBatch],
        run: Callable[[MicroBatch], Mapping[str, torch.Tensor]],
        progress: Progress = unseen,
    ) -> list[dict[str, torch.Tensor]]:
        """`run` of every micro-batch, each by its owner: named (N,) float32 vectors, one number per target.

        `progress` counts this process's micro-batches, before each.
        """
        with self.together("a forward pass"):
            mine = [dict(run(batch)) for batch in tracked(self.share(batches), progress)]
        if self.size == 1:
            return mine
        owners, lengths = self.owners(batches), [len(batch.targets) for batch in batches]
        of = [[place for place, owner in enumerate(owners) if owner == rank] for rank in range(self.size)]
        found: list[dict[str, torch.Tensor]] = [{} for _ in batches]
        for name in self.agree_on([*mine[0]] if mine else None) or ():
            flat = torch.cat([one[name].float() for one in mine]) if mine else torch.zeros(0)
            sizes = [sum(lengths[place] for place in places) for places in of]
            for places, vector in zip(of, self.gather_vectors(flat.to(self.device), sizes), strict=True):
                parts = vector.split([lengths[place] for place in places])
                for place, part in zip(places, parts, strict=True):
                    found[place][name] = part.to(batches[place].targets.device)
        return found

    def gather_vectors(self, own: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """All processes' vectors, of known sizes, in the order of ranks."""
        longest = max(sizes)
        padded = torch.zeros(longest, dtype=own.dtype, device=own.device)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in sizes]
        self._call(dist.all_gather, found, padded)
        return [one[:size] for one, size in zip(found, sizes, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, in the order of ranks. What JSON cannot hold arrives as text, as in checkpoints."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        self._call(dist.all_gather, sizes, torch.tensor([len(data)], device=self.device))
        found = self.gather_vectors(data, [int(size) for size in sizes])
        return [json.loads(one.cpu().numpy().tobytes()) for one in found]

    def agree_on(self, value: Any) -> Any:
        """The first value that is not None, in the order of ranks."""
        return next((one for one in self.gather(value) if one is not None), None)

    def from_first(self, value: Any) -> Any:
        """The value of rank 0."""
        return self.gather(value if self.first else None)[0]

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replaces each tensor by the sum over all processes, which is the same on all of them to the bit."""
        if self.size > 1:
            for tensor in tensors:
                self._call(dist.all_reduce, tensor)

    @contextmanager
    def together(self, what: str) -> Generator[None]:
        """A block that one process may leave with an exception: then all of them raise at its end.

        A second signal, which stops at once, is not waited for: the others lose this process.
        """
        try:
            yield
        except PeerFailed:
            raise
        except Exception as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, told in enumerate(self.gather(None)):
            if told is not None:
                raise PeerFailed(f"{what} failed on rank {rank}: {told}")

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Refuses to go on where processes differ.

        Raises:
            ValueError: on every process, with the first name that differs and two values.
        """
        every = self.gather(dict(values))
        for name, one in every[0].items():
            other = next((rank for rank, given in enumerate(every) if given.get(name) != one), 0)
            got = f"{every[other].get(name)!r} on rank {other}"
            require(other == 0, OP, name, f"the same on all {self.size} processes, {one!r} as on rank 0", got)

    def _call(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments)
        except RuntimeError as error:
            raise PeerFailed(f"rank {self.rank} lost the others: {' '.join(str(error).split())[:300]}") from error


ALONE = World()


def join(timeout: float = 1800.0) -> World:
    """The processes that torchrun started, or a `World` of this process alone.

    On GPUs the backend is nccl, and each process takes the device of its local rank; else gloo.

    Args:
        timeout: seconds that a process waits for the others before it gives up; they wait while the first one saves.
    """
    rank, local, size = env.ranks()
    if size == 1:
        return ALONE
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else CPU
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Imported later, its default arguments would keep the group, and gloo's threads, past `leave`.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    return World(rank, size, device)


def leave(well: bool = True) -> None:
    """Ends the process group, so that no thread of gloo frees a tensor after Python has ended: that aborts the process.

    NCCL may wait for work that another process never began, so unless all went `well` its group is left to the end.
    """
    if dist.is_initialized() and (well or dist.get_backend() == "gloo"):
        dist.destroy_process_group()
