"""What there is of memory, and whether a GPU shares it."""

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


def is_unified(properties: Any) -> bool:
    """Whether a GPU with torch's ``properties`` works in the processor's memory, as a GB10 does."""
    return bool(getattr(properties, "is_integrated", 0))
