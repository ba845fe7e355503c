"""What there is of memory, whether a GPU shares it, and how what is freed goes back."""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any


def meminfo() -> dict[str, int]:
    """`/proc/meminfo`, in bytes; empty where there is none."""
    file = Path("/proc/meminfo")
    rows = (line.split() for line in (file.read_text().splitlines() if file.is_file() else ()))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[2:] == ["kB"]}


def available_memory() -> int:
    """Bytes of main memory that a process may take, as the kernel reckons; reclaimable file pages count as free."""
    available = meminfo().get("MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if available is None else available


def give_back() -> None:
    """Give main memory that was freed, and that the C library keeps for this process, back to the system.

    glibc keeps blocks of up to 32 MiB; where there is another library nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_unified(properties: Any) -> bool:
    """Whether a GPU with torch's ``properties`` works in the processor's memory, as a GB10 does."""
    return bool(getattr(properties, "is_integrated", 0))
