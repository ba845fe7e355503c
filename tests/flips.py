"""Single flipped bits in the files of a cache, put back afterwards."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path


def places(folder: Path, count: int, seed: int = 0) -> list[tuple[Path, int]]:
    """``count`` bits (file, number of the bit), spread alike over the files; in each half at random, half evenly."""
    files, chance, found = sorted(path for path in folder.rglob("*") if path.is_file()), random.Random(seed), []
    each = -(-count // len(files))
    for path in files:
        bits = 8 * path.stat().st_size
        even = [n * bits // (each // 2) + chance.randrange(8) for n in range(each // 2)]
        found += [(path, min(bit, bits - 1)) for bit in even]
        found += [(path, chance.randrange(bits)) for _ in range(each - each // 2)]
    return found


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        before = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([before ^ 1 << bit % 8]))
    try:
        yield
    finally:
        with open(path, "r+b") as file:
            file.seek(bit // 8)
            file.write(bytes([before]))
