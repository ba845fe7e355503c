"""In which type a target computes on this CPU: bf16 is twice as fast on some processors, and emulated on others.

So it is measured, in under a second, on products as decoding (one row) and capture (many rows) have them. A small
target stays in fp32, which costs it nothing, and so does one that was saved in fp32.
"""

import functools
import logging
import time

import torch

from nemotron_dspark.targets.checkpoint import Checkpoint

MEASURED_FROM = 100e6  # bytes of weights
GAIN = 1.2  # how much faster bf16 must be, in the geometric mean of both products, to be worth its rounding
_ROWS = (1, 256)
_WEIGHT_BYTES = 1 << 25  # in fp32: more than a cache holds, as a target's weights are
_ROUNDS = 4

_log = logging.getLogger(__name__)


def cpu_dtype(checkpoint: Checkpoint) -> str:
    """`bfloat16` for a checkpoint of that type and some size where this CPU is faster with it, else `float32`."""
    kind = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    size = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    if kind != "bfloat16" or size < MEASURED_FROM:
        return "float32"
    return _measured(checkpoint.read_spec().hidden_size)


@functools.cache
def _measured(hidden: int) -> str:
    """The faster type for a model of this width; said once."""
    one, many = (_gain(hidden, rows) for rows in _ROWS)
    faster = "bfloat16" if one * many >= GAIN**2 else "float32"
    _log.info(
        f"the target runs in {faster}: in bfloat16 this CPU multiplies {one:.1f} times as fast for one row, "
        f"{many:.1f} times for {_ROWS[1]} (target.dtype sets the type)."
    )
    return faster


def _gain(hidden: int, rows: int) -> float:
    """How much faster bf16 is for products of ``rows`` with square matrices that fill `_WEIGHT_BYTES`."""
    count = max(2, _WEIGHT_BYTES // (4 * hidden * hidden))
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    cases = {
        dtype: (torch.randn(rows, hidden).to(dtype), torch.randn(hidden, hidden).to(dtype).repeat(count, 1, 1))
        for dtype in best
    }
    with torch.no_grad():
        for _ in range(_ROUNDS):  # in turns: what else the machine does slows both alike
            for dtype, (states, weights) in cases.items():
                began = time.perf_counter()
                for weight in weights:
                    torch.nn.functional.linear(states, weight)
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]
