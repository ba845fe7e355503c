"""The processes of one run, as `torchrun` starts them: who they are, what they agree on, and that they end together.

What the loop decides by (sums of metrics, whether to stop) goes over gloo, from host to host, and is asked before every
forward. So all processes stop at the same step, and one that dies is noticed there by its closed connection, whatever
the devices are doing. Gradients go over a group of their own: NCCL on CUDA.
"""

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_dspark.errors import EnvironmentFault, NdsError

# A dead process is noticed by its connection; these are for one that is stuck.
_TURN = datetime.timedelta(days=1)  # the first rank may tokenise for hours
_STEP = datetime.timedelta(hours=1)  # load a target, write a checkpoint
_FAILED = "nds/failed"


class Ranks:
    """This process alone; `_Several` has company."""

    rank = 0
    size = 1
    local = 0  # among those of this machine

    @property
    def first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` of all ranks added up, fp64 on the host."""
        return values.to("cpu", torch.float64)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return flag

    def wait(self) -> None:
        """Until all ranks are here."""

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank goes through the block alone; the others follow when it is through."""
        if not self.first:
            self._wait_for_turn()
        yield
        if self.first:
            self._wait_for_turn()

    def _wait_for_turn(self) -> None: ...

    def add_up(self, gradients: Iterable[Tensor]) -> None:
        """Replace each by its sum over the ranks, which all have them in the same order."""

    def device_group(self, device: torch.device) -> dist.ProcessGroup:
        """The group that tensors on ``device`` travel in."""
        raise NotImplementedError


ALONE = Ranks()


class _Several(Ranks):
    def __init__(self, rank: int, size: int, local: int):
        self.rank, self.size, self.local = rank, size, local
        self._groups = {"cpu": dist.new_group(backend="gloo", timeout=_STEP)}

    def sum(self, values: Tensor) -> Tensor:
        total = values.to("cpu", torch.float64, copy=True)
        dist.all_reduce(total, group=self._groups["cpu"])
        return total

    def any(self, flag: bool) -> bool:
        return self.sum(torch.tensor(float(flag))).item() > 0

    def wait(self) -> None:
        self.any(False)

    def _wait_for_turn(self) -> None:
        dist.barrier()

    def add_up(self, gradients: Iterable[Tensor]) -> None:
        under_way = [
            dist.all_reduce(gradient, group=self.device_group(gradient.device), async_op=True) for gradient in gradients
        ]
        for sent in under_way:
            sent.wait()

    def device_group(self, device: torch.device) -> dist.ProcessGroup:
        if device.type not in self._groups:
            self._groups[device.type] = dist.new_group(backend=dist.get_default_backend_for_device(device))
        return self._groups[device.type]


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """This process and those that `torchrun` started with it, until the block is left; `ALONE` without `torchrun`.

    An error inside ends all of them. It is raised on one rank, to be printed; the others leave with its exit code.

    Raises:
        EnvironmentFault: a process has died, or the machines do not find each other.
        SystemExit: the error is another rank's.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # "cuda" means this one from here on
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TURN)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise EnvironmentFault(
            f"The processes of the run do not find each other: {reason}.",
            "Start them with torchrun; between machines, MASTER_ADDR and the network interface (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME) must be right.",
        ) from None
    try:
        yield _Several(rank, size, local)
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
