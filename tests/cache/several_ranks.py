"""Build caches in several processes that meet over gloo, in many ways; `run_all` tells what came of each.

To be run in a process of its own, as `tests.training.several_ranks`.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nemotron_dspark import cli, distributed
from nemotron_dspark.targets.streamed import StreamedTarget
from tests.training.several_ranks import start


def in_short_passes() -> None:
    StreamedTarget.pass_tokens = lambda self, taps: 700


def killed_in_a_pass() -> None:
    """Kills the second process in the middle of its second pass."""
    in_short_passes()
    captures, passes = StreamedTarget.captures, []

    def counted(self, batches, taps, on_layer):
        passes.append(batches)

        def entered(layer: int) -> None:
            if (os.environ["RANK"], len(passes), layer) == ("1", 2, 5):
                os.kill(os.getpid(), signal.SIGKILL)
            on_layer(layer)

        return captures(self, batches, taps, entered)

    StreamedTarget.captures = counted


def own_folder() -> None:
    """Each rank has a disk of its own."""
    distributed._SEEN = 0.2
    sys.argv[-1] = f"{sys.argv[-1]}-{os.environ['RANK']}"


def run_all(folder: Path, words: Sequence[str]) -> dict[str, list[list[dict]]]:
    """Every way, in a folder of its own; ``words`` are those of the command but for its last, the cache's folder."""

    def built(name: str, size: int, *more: str, arrange: Callable[[], None] = lambda: None) -> list[dict]:
        def work() -> None:
            arrange()
            cli.main()

        sys.argv = ["nds", *words, *more, "--out", str(folder / name / "cache")]
        return start(size, work, folder / name)

    return {
        "one": [built("one", 1)],
        "three": [built("three", 3), built("three", 2)],
        "streamed, killed, two": [
            built("streamed, killed, two", 2, "--stream", "on", arrange=killed_in_a_pass),
            built("streamed, killed, two", 2, "--stream", "on", arrange=in_short_passes),
        ],
        "two disks": [built("two disks", 2, arrange=own_folder)],
        "two, helped": [built("two, helped", 2, "--processes", "3")],
    }
