"""How the objective cuts slots x vocabulary for the device it runs on, and in which precision a CPU trains.

On a GPU a chunk has rows enough for the matrix units. On a CPU its logits have a fixed size in memory, and into how
many tiles the vocabulary is best cut depends on the processor and its BLAS; so does what bf16 gains. Both are measured,
in under a second. Another tiling sums in another order: a run records what was chosen, and keeps it when it goes on.
"""

import dataclasses
import time
from typing import TypeVar

import torch
from torch import Tensor

GPU_ROWS = 2048  # a product of n rows does n bf16 operations per byte of weights it reads; an H100 needs some 300
GPU_SHARE = 0.25  # of the free memory, at most
GPU_GROUP_BYTES = 1 << 26  # kernels long enough to hide their launches
CPU_CHUNK_BYTES = 7 << 23
CPU_GROUP_BYTES = 1 << 19  # for each thread: what its core's cache holds beside the formula's other operands
TILE_TOKENS = (16384, 4096, 1024)  # of the vocabulary in a tile, tried on a CPU
SAMPLE_TOKENS = 32768  # a part of the head is enough to compare them
MEASURED_FROM = 1 << 24  # weights of the head; a smaller one is one tile, and fp32
BF16_GAIN = 1.3  # how much faster bf16 must be to be worth its rounding

_Case = TypeVar("_Case")
_TRIES = 4  # of each case that is timed


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How slots x vocabulary is cut."""

    chunk: int  # rows (slots, and positions they predict from) whose logits are held at a time
    group: int  # slots that the formula gets at a time
    tiles: int = 1  # equal parts of the vocabulary, the batch of every product

    @staticmethod
    def of(vocabulary: int, itemsize: int, *, gpu: bool, free: int | None = None) -> "Tiling":
        """The cut for a head of so many tokens and bytes a weight, ``free`` bytes of GPU memory, and one tile."""
        if gpu:
            chunk = GPU_ROWS if free is None else min(GPU_ROWS, int(GPU_SHARE * free) // (vocabulary * itemsize))
            return Tiling(max(16, chunk), max(1, GPU_GROUP_BYTES // (4 * vocabulary)))
        group = max(1, CPU_GROUP_BYTES // (4 * vocabulary)) * torch.get_num_threads()
        return Tiling(max(2, CPU_CHUNK_BYTES // (vocabulary * itemsize)), group)


def choose_tiling(head: Tensor) -> Tiling:
    """The fastest cut for the LM head ``head`` [V, H] where it lies."""
    vocabulary = len(head)
    free = torch.cuda.mem_get_info(head.device)[0] if head.is_cuda else None
    tiling = Tiling.of(vocabulary, head.element_size(), gpu=head.device.type != "cpu", free=free)
    if head.device.type != "cpu" or head.numel() < MEASURED_FROM:
        return tiling
    sample = head[:SAMPLE_TOKENS]
    sizes = {tokens: _Product(sample, tiling.chunk, _tiles(len(sample), tokens)) for tokens in TILE_TOKENS}
    return dataclasses.replace(tiling, tiles=_tiles(vocabulary, _fastest(sizes)[0]))


def choose_precision(vocabulary: int, hidden: int) -> tuple[torch.dtype, str]:
    """bf16 where this CPU multiplies by an LM head [V, H] faster by `BF16_GAIN`, else fp32; and why, in a few words."""
    if vocabulary * hidden < MEASURED_FROM:
        return torch.float32, "the vocabulary is too small to gain from bf16"
    sample = torch.randn(min(vocabulary, SAMPLE_TOKENS), hidden)
    rows, tiles = Tiling.of(vocabulary, 4, gpu=False).chunk, _tiles(len(sample), TILE_TOKENS[1])
    _, seconds = _fastest({dtype: _Product(sample.to(dtype), rows, tiles) for dtype in (torch.float32, torch.bfloat16)})
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    return torch.bfloat16 if gain >= BF16_GAIN else torch.float32, f"bf16 products are {gain:.1f} times as fast here"


def objective_bytes(
    vocabulary: int, hidden: int, rank: int, itemsize: int, slots: float, positions: float, *, gpu: bool
) -> float:
    """Memory of `fused.chunked_losses` at its highest, its results included.

    Logits of a chunk in the weights' type; what the formula makes of a group, five times in fp32; fp32 gradients of
    hidden states, latents and the sequential head's weight, those of the first two once more in their own type; the
    gathered hidden states.
    """
    tiling = Tiling.of(vocabulary, itemsize, gpu=gpu)
    logits = itemsize * min(tiling.chunk, slots + positions) + 5 * 4 * min(tiling.group, slots)
    narrow = itemsize if itemsize < 4 else 0
    gradients = 4 * vocabulary * rank + (4 + narrow) * slots * (hidden + rank)
    weight = 2 * narrow * vocabulary * rank  # its copy in the type of the products, and one product to be added up
    return vocabulary * logits + gradients + weight + itemsize * (slots * (hidden + 2 * rank) + positions * hidden)


class _Product:
    """The objective's two largest products: logits of ``rows`` states, and gradients of the states."""

    def __init__(self, head: Tensor, rows: int, tiles: int):
        self._head = head.unflatten(0, (tiles, -1))
        self._states = head[:rows].expand(tiles, -1, -1)
        self._logits = head.new_empty(tiles, self._states.shape[1], len(head) // tiles)

    def __call__(self) -> None:
        torch.bmm(self._states, self._head.mT, out=self._logits)
        torch.sum(self._logits @ self._head, 0)


def _fastest(cases: dict[_Case, _Product]) -> tuple[_Case, dict[_Case, float]]:
    """The case that takes the least time, and the time of each: the best of `_TRIES`, taken in turn."""
    seconds = dict.fromkeys(cases, float("inf"))
    with torch.no_grad():
        for _ in range(_TRIES):
            for case, product in cases.items():
                started = time.perf_counter()
                product()
                seconds[case] = min(seconds[case], time.perf_counter() - started)
    return min(cases, key=seconds.__getitem__), seconds


def _tiles(vocabulary: int, tokens: int) -> int:
    """Into how many equal parts of at least ``tokens`` a vocabulary can be cut."""
    return next((count for count in range(vocabulary // tokens, 1, -1) if vocabulary % count == 0), 1)
