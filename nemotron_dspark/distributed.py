"""The processes of a run that `torchrun` starts: ranks, all-reduce, and that all of them end together.

What the trainer decides by (sums of metrics, whether to stop) is all-reduced over gloo, on the host, before every
micro-batch. So all processes stop at the same step, and one that dies is noticed there by its closed connection,
whatever the devices are doing. Gradients go over a group of their own: NCCL on CUDA.
"""

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_dspark.errors import EnvironmentFault, NdsError

# A dead process is noticed by its connection; these are for one that is stuck.
_MAIN_FIRST = datetime.timedelta(days=1)  # the first rank may tokenise for hours
_STEP = datetime.timedelta(hours=1)  # load a target, write a checkpoint
_FAILED = "nds/failed"


class DistContext:
    """One process on its own: every collective operation is the identity. `TorchDist` is several of them."""

    rank = 0
    world_size = 1
    local_rank = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        """Rank 0, the process that prints and writes."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all ranks; fp64 on the host."""
        return values.to("cpu", torch.float64)

    def barrier(self) -> None:
        """Wait for all ranks."""

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, and on the others when it has ended there."""
        if not self.is_main:
            self._wait_for_main()
        yield
        if self.is_main:
            self._wait_for_main()

    def _wait_for_main(self) -> None: ...

    def all_reduce_gradients(self, gradients: Iterable[Tensor]) -> None:
        """All-reduce the gradients (sum) in place; every rank has them in the same order."""

    def process_group(self, device: torch.device) -> dist.ProcessGroup:
        """The group for tensors on ``device``: NCCL on CUDA, gloo on a CPU."""
        raise NotImplementedError


SINGLE = DistContext()


class TorchDist(DistContext):
    """Several processes under `torchrun`, over torch.distributed."""

    def __init__(self, rank: int, world_size: int, local_rank: int):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._groups = {"cpu": _new_group("gloo", _STEP)}

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        total = values.to("cpu", torch.float64, copy=True)
        dist.all_reduce(total, group=self._groups["cpu"])
        return total

    def barrier(self) -> None:
        self.all_reduce_sum(torch.zeros(()))

    def _wait_for_main(self) -> None:
        dist.barrier()

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


def _new_group(backend: str, timeout: datetime.timedelta | None = None) -> dist.ProcessGroup:
    # torch's type also covers processes that are not members; here all are.
    return cast("dist.ProcessGroup", dist.new_group(backend=backend, timeout=timeout))


@contextlib.contextmanager
def init_distributed() -> Iterator[DistContext]:
    """Join the processes that `torchrun` started, until the block is left; `SINGLE` without `torchrun`.

    An error inside ends all of them. It is raised on one rank, to be printed; the others leave with its exit code.

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
                "Its output says why, or the system's log if it was killed. The same command goes on from the newest "
                "checkpoint.",
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
