"""Train beside a target that not every process holds; `run_all` tells what came of each way.

To be run in a process of its own (`tests.kill9.apart`), as `several_ranks`.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from nemotron_dspark import distributed
from nemotron_dspark.config import load_config
from nemotron_dspark.errors import CheckError
from nemotron_dspark.targets import Target
from nemotron_dspark.training import online
from nemotron_dspark.training.callbacks import Callback
from tests.training.runs import TINY, train_run
from tests.training.several_ranks import start

SETTINGS = (
    *TINY,
    "train.max_steps=3",
    "train.global_batch_size=4",
    "train.checkpoint_every=1",
    "train.validation=0.2",
)
APART, SHARDED = "train.inference_gpus=1", "train.parallel=fsdp"
LATE = 11  # th forward of twelve and those of held-out samples: a step is saved then, and the last is not trained


class Signalled(Callback):
    """Sends this process a signal in the middle of its second step."""

    number: int

    def on_micro_batch(self, step, done):
        if (step, done) == (1, 1):
            os.kill(os.getpid(), self.number)


class Killed(Signalled):
    number = signal.SIGKILL


class Stopped(Signalled):
    number = signal.SIGTERM


def act_late(act):
    """Let a late forward of this process's target call ``act`` before it begins."""
    states, done = online.OnlineSource.states, []

    def counted(self, ids):
        done.append(ids)
        if len(done) == LATE:
            act()
        return states(self, ids)

    online.OnlineSource.states = counted


def refuse():
    raise CheckError("The target went wrong.", "Mend it.")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def stopped():
    os.kill(os.getpid(), signal.SIGTERM)


def trained(size, folder, target, conversations, *settings, at=None, act=None):
    """Train in ``size`` processes; in rank ``at`` something happens."""

    def work():
        in_training = isinstance(act, type)
        if at == int(os.environ["RANK"]) and act is not None and not in_training:
            act_late(act)
        load = Target.load

        def loaded(*given, **named):
            print("holds the target", flush=True)
            return load(*given, **named)

        Target.load = loaded
        with distributed.init_distributed() as context:
            calls = [act()] if at == context.rank and in_training else []
            config = load_config(assignments=[*SETTINGS, *settings])
            options = {"conversations": conversations, "callbacks": calls, "context": context}
            report = train_run(target, None, folder / "run", config, **options)
            print(f"from step {report.resumed_from} to {report.steps}")

    return start(size, work, folder)


def run_all(folder: Path, target: Path, conversations: Path, names: Sequence[str]) -> dict[str, list[list[dict]]]:
    def run(size, *settings, **acts):
        return lambda at: trained(size, at, target, conversations, *settings, **acts)

    runs = {
        "each holds": [run(2)],
        "one a node": [run(2, "target.copies=node")],
        "killed, again": [run(3, APART, SHARDED, at=2, act=killed), run(3, APART, SHARDED)],
        "stopped, again": [run(2, APART, at=1, act=stopped), run(2, APART)],
        "trainer stopped": [run(2, APART, at=0, act=Stopped)],
        "trainer killed": [run(2, APART, at=0, act=Killed)],
        "wrong": [run(2, APART, at=1, act=refuse)],
        "wrong, one a node": [run(2, "target.copies=node", at=0, act=refuse)],
    }
    return {name: [each(folder / name) for each in runs[name]] for name in names}
