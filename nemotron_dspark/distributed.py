"""The processes that `torchrun` starts for a run or a build: ranks, all-reduce, and that all of them end together.

What the trainer decides by (sums of metrics, whether to stop) is all-reduced over gloo, on the host, before every
micro-batch. So all processes stop at the same step, and one that dies is noticed there by its closed connection,
whatever the devices are doing. Gradients go over a group of their own: NCCL on CUDA.
"""

import contextlib
import datetime
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_dspark.errors import EnvironmentFault, InputError, NdsError
from nemotron_dspark.files import disk_errors

# A dead process is noticed by its connection; these are for one that is stuck.
_MAIN_FIRST = datetime.timedelta(days=1)  # the first rank may tokenise for hours
_STEP = datetime.timedelta(hours=1)  # load a target, write a checkpoint
_SEEN = 60.0  # seconds until a file of another machine is seen, where a network's file system remembers folders
_LOOK = 0.5  # seconds between two looks around while waiting
_FAILED = "nds/failed"
_INTERRUPTED = 130  # exit code of a command that a signal has stopped


class DistContext:
    """One process on its own: every collective operation is the identity. `TorchDist` is several of them."""

    rank = 0
    world_size = 1
    local_rank = 0  # among the processes of this machine
    local_world_size = 1  # which are so many

    @property
    def is_main(self) -> bool:
        """Rank 0, the process that prints and writes."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all ranks; fp64 on the host."""
        return values.to("cpu", torch.float64)

    def barrier(self) -> None:
        """Wait for all ranks."""

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for all ranks, for a day if need be, and call ``meanwhile`` now and then."""

    @contextlib.contextmanager
    def main_process_first(self, shared: Path | None = None) -> Iterator[None]:
        """Run the block on rank 0 first, and on the others when it has ended there.

        Raises:
            EnvironmentFault: on a rank that does not see what rank 0 writes to the folder ``shared``.
        """
        if self.is_main:
            yield
        self._wait_for_main(shared)
        if not self.is_main:
            yield

    def _wait_for_main(self, shared: Path | None) -> None: ...

    def apart(self) -> "DistContext":
        """The same ranks over a connection of its own, for another thread; all ranks call it."""
        return self

    def all_reduce_gradients(self, gradients: Iterable[Tensor]) -> None:
        """All-reduce the gradients (sum) in place; every rank has them in the same order."""

    def process_group(self, device: torch.device) -> dist.ProcessGroup:
        """The group for tensors on ``device``: NCCL on CUDA, gloo on a CPU."""
        raise NotImplementedError

    def machines(self) -> list[list[int]]:
        """The ranks of each machine."""
        return [[self.rank]]

    def part(self, ranks: Sequence[int]) -> "DistContext":
        """These ``ranks`` alone, numbered from 0; all call it. One that is not among them has rank -1 there.

        For what happens at every step; `wait` and `main_process_first` are for all.
        """
        return self

    def pair(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """A connection between two ranks, for tensors on the host; all ranks call it."""
        raise NotImplementedError


SINGLE = DistContext()


class TorchDist(DistContext):
    """Several processes under `torchrun`, over torch.distributed: all of them, or those with ``ranks``."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        local_rank: int,
        timeout: datetime.timedelta | None = None,
        ranks: Sequence[int] | None = None,
    ):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        self._ranks = ranks
        self._groups = {"cpu": _new_group("gloo", timeout or _STEP, ranks)}
        if ranks is not None and torch.cuda.is_available():  # all make it, also those that are not in it: now or never
            self._groups["cuda"] = _new_group("nccl", None, ranks)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        total = values.to("cpu", torch.float64, copy=True)
        dist.all_reduce(total, group=self._groups["cpu"])
        return total

    def barrier(self) -> None:
        self.all_reduce_sum(torch.zeros(()))

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        arrived = dist.all_reduce(torch.zeros(()), async_op=True)
        while arrived is not None and not arrived.is_completed():
            meanwhile()
            time.sleep(_LOOK)
        if arrived is not None:
            arrived.wait()

    def _wait_for_main(self, shared: Path | None) -> None:
        number = torch.tensor(secrets.randbits(60) if self.is_main and shared else 0)
        if self.is_main and shared:
            with disk_errors(shared):
                _mark(shared, number).touch()
        dist.all_reduce(number)
        if shared is None:
            return
        try:
            if not self.is_main and not _appears(_mark(shared, number)):
                raise EnvironmentFault(
                    f"Process {self.rank} on {platform.node()} does not see what the first one wrote to {shared}.",
                    "Give --out on a disk that all machines share.",
                )
            self.barrier()
        finally:
            if self.is_main:
                _mark(shared, number).unlink(missing_ok=True)

    def apart(self) -> DistContext:
        return TorchDist(self.rank, self.world_size, self.local_rank, _MAIN_FIRST, self._ranks)

    def all_reduce_gradients(self, gradients: Iterable[Tensor]) -> None:
        under_way = [
            dist.all_reduce(gradient, group=self.process_group(gradient.device), async_op=True)
            for gradient in gradients
        ]
        for work in under_way:
            if work is not None:
                work.wait()

    def process_group(self, device: torch.device) -> dist.ProcessGroup:
        if device.type not in self._groups:
            self._groups[device.type] = _new_group(dist.get_default_backend_for_device(device))
        return self._groups[device.type]

    def machines(self) -> list[list[int]]:
        firsts = torch.zeros(self.world_size)
        firsts[self.rank] = self.rank - self.local_rank  # torchrun numbers machine by machine
        by_first: dict[float, list[int]] = {}
        for rank, first in enumerate(self.all_reduce_sum(firsts).tolist()):
            by_first.setdefault(first, []).append(rank)
        return list(by_first.values())

    def part(self, ranks: Sequence[int]) -> DistContext:
        rank = ranks.index(self.rank) if self.rank in ranks else -1
        return TorchDist(rank, len(ranks), self.local_rank, ranks=ranks)

    def pair(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        return _new_group("gloo", _STEP, ranks)


def own_device(device: torch.device, key: str, context: DistContext) -> torch.device:
    """The device of this process where the setting ``key`` says ``device``: of several on a machine, a GPU each.

    Raises:
        InputError: ``device`` is one GPU, for several processes.
        EnvironmentFault: the machine has too few.
    """
    if context.world_size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise InputError(
            f"{key}={device} is one GPU, and there are {context.world_size} processes.", f"Leave {key} at auto."
        )
    if context.local_rank >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"{platform.node()} has {torch.cuda.device_count()} GPUs, too few for its processes.",
            f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}.",
        )
    return torch.device("cuda", context.local_rank)


def _mark(folder: Path, number: Tensor) -> Path:
    return folder / f".{int(number)}.tmp"


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SEEN
    while not (seen := path.is_file()) and time.monotonic() < until:
        time.sleep(_LOOK)
    return seen


def _new_group(
    backend: str, timeout: datetime.timedelta | None = None, ranks: Sequence[int] | None = None
) -> dist.ProcessGroup:
    # torch's type also covers processes that are not members; they never use it.
    group = dist.new_group(None if ranks is None else list(ranks), backend=backend, timeout=timeout)
    return cast("dist.ProcessGroup", group)


@contextlib.contextmanager
def init_distributed() -> Iterator[DistContext]:
    """Join the processes that `torchrun` started, until the block is left; `SINGLE` without `torchrun`.

    An error inside, or Ctrl-C, ends all of them. It is raised on one rank, to be printed; the others leave with its
    exit code.

    Raises:
        EnvironmentFault: a process has died, or the machines do not find each other.
        SystemExit: the error is another rank's.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield SINGLE
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # "cuda" means this one from here on
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_MAIN_FIRST)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise EnvironmentFault(
            f"The processes of the run do not find each other: {reason}.",
            "Start them with torchrun; between machines, MASTER_ADDR and the network interface (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME) must be right.",
        ) from None
    try:
        yield TorchDist(rank, size, local)
        dist.barrier()  # one that is done before the others may have to end with their error
    except KeyboardInterrupt:
        _first_to_fail(store, rank, _INTERRUPTED)  # those that were not interrupted themselves hear of it there
        raise
    except Exception as error:
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        code = error.exit_code if isinstance(error, NdsError) else EnvironmentFault.exit_code if lost else 1
        said_by, said_code = _first_to_fail(store, rank, code)
        if said_by != rank:
            raise SystemExit(said_code) from None
        if lost:
            silent = "timed out" in str(error).lower()
            raise EnvironmentFault(
                f"Another process of this run {'gives no sign of life' if silent else 'has died'}.",
                "Its output says why, or the system's log if it was killed. The same command goes on from what is "
                "saved.",
            ) from None
        raise
    # Not where it failed: a group that has lost a member may wait for it.
    dist.destroy_process_group()


def _first_to_fail(store: dist.Store, rank: int, code: int) -> tuple[int, int]:
    """Rank and exit code of the process that failed first: this one, unless another has said so before."""
    try:
        said = store.compare_set(_FAILED, "", f"{rank} {code}").decode()
    except RuntimeError:  # the process that kept the store is gone
        return rank, code
    first, its_code = said.split()
    return int(first), int(its_code)
