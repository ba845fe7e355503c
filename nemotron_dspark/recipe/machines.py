"""What a machine has: memory, disk, speed. Published figures (`configs/machines/`), or measured here."""

import dataclasses
import difflib
import os
import shutil
import time
from pathlib import Path

import yaml

from nemotron_dspark.errors import InputError
from nemotron_dspark.memory import available_memory, is_unified
from nemotron_dspark.resources import resource_folder

GB = 1e9
_MEASURE_SECONDS = 0.4


@dataclasses.dataclass(frozen=True)
class Machine:
    """``flops`` and ``bandwidth`` are those of one GPU, or of the processor where there is none."""

    name: str
    title: str
    gpus: int  # 0: everything runs on the processor
    gpu_bytes: float  # memory of one GPU; of the whole machine where it is unified
    host_bytes: float  # main memory; 0 where it is unified
    disk_bytes: float  # that a run may fill
    flops: float  # dense matrix products a second, bf16 on a GPU, fp32 on a processor
    bandwidth: float  # bytes of memory a second
    unified: bool = False
    note: str = ""  # where the figures come from, in a few words

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in computing: bf16 on a GPU, fp32 on a processor."""
        return 2 if self.gpus else 4


def _published() -> dict[str, Machine]:
    rows = yaml.safe_load((resource_folder("configs") / "machines" / "published.yaml").read_text(encoding="utf-8"))
    return {
        name: Machine(
            name,
            row["title"],
            row["gpus"],
            gpu_bytes=row["gpu_memory"] * GB,
            host_bytes=row.get("host_memory", 0) * GB,
            disk_bytes=row["disk"] * GB,
            flops=row["flops"] * 1e12,
            bandwidth=row["bandwidth"] * GB,
            unified="host_memory" not in row,
            note=row["note"],
        )
        for name, row in rows.items()
    }


MACHINES = _published()
NAMES = (*MACHINES, "cpu", "here")


def machine(name: str, folder: Path | str = ".") -> Machine:
    """The machine called ``name``; "here" is measured, with its GPUs if any, "cpu" is measured without them.

    The disk of both is what is free where ``folder`` lies.

    Raises:
        InputError: no such machine; the nearest name is given.
    """
    if name in MACHINES:
        return MACHINES[name]
    if name not in NAMES:
        close = difflib.get_close_matches(name.lower().replace("_", "-").replace(" ", "-"), NAMES, n=1, cutoff=0.4)
        raise InputError(
            f"There is no machine {name!r}.",
            (f"Did you mean {close[0]}? " if close else "") + f"Known are {', '.join(NAMES)}.",
        )
    return measured(name, Path(folder))


def measured(name: str, folder: Path) -> Machine:
    """This machine, in about half a second a GPU kind; every GPU is taken to be like the first."""
    import torch

    gpus = torch.cuda.device_count() if name == "here" and torch.cuda.is_available() else 0
    device = torch.device("cuda" if gpus else "cpu")
    available, disk = available_memory(), shutil.disk_usage(folder.absolute()).free
    flops, bandwidth = _speed(device)
    common = {"disk_bytes": float(disk), "flops": flops, "bandwidth": bandwidth}
    if not gpus:
        title = f"this machine's processor ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
        return Machine(name, title, 0, 0.0, float(available), note="measured just now, in fp32", **common)
    properties = torch.cuda.get_device_properties(0)
    # A GPU on the processor's memory: the free-memory call leaves out what the system would give back.
    unified = is_unified(properties)
    memory = float(available if unified else properties.total_memory)
    host = 0.0 if unified else float(available)
    title = f"this machine ({gpus} x {properties.name})" if gpus > 1 else f"this machine ({properties.name})"
    return Machine(name, title, gpus, memory, host, unified=unified, note="measured just now, in bf16", **common)


def _speed(device) -> tuple[float, float]:
    """Matrix products a second and bytes copied a second, the best of a few tries."""
    import torch

    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    left = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(1 << (28 if device.type == "cuda" else 25), dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    result = torch.empty_like(left)
    flops = 2 * size**3 / _best(lambda: torch.mm(left, left, out=result), device)
    return flops, 2 * source.numel() / _best(lambda: into.copy_(source), device)  # a copy reads and writes


def _best(work, device) -> float:
    import torch

    best, end = float("inf"), time.monotonic() + _MEASURE_SECONDS / 2
    while time.monotonic() < end or best == float("inf"):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
