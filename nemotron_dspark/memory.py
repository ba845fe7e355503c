"""How much main memory a process may still take."""

import os
from pathlib import Path


def available_memory() -> int:
    """Bytes of main memory that a process may take, as the kernel reckons; reclaimable file pages count as free."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
