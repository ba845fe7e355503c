"""What is freed goes back to the system."""

import ctypes
from pathlib import Path

import pytest
import torch

from nemotron_dspark.memory import give_back


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_what_was_freed_goes_back_although_something_behind_it_stays():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    blocks = [torch.ones(16_000) for _ in range(1000)]  # 64 MB, each too small for a mapping of its own
    before = resident()
    del blocks[:-1]
    give_back()
    assert resident() < before - 40e6
