"""Train in several processes that meet over gloo, in many ways; `run_all` tells what came of each.

To be run in a process of its own (`tests.kill9.apart`): it forks, which is only safe while it has no threads. So it
runs no backward and keeps no store: a child that is forked while a store's thread holds a lock waits for it for ever.
"""

import datetime
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from nemotron_dspark import cli, distributed
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.schedule import SampleSchedule
from nemotron_dspark.training.sharding import is_dtensor
from nemotron_dspark.training.trainer import Trainer
from tests.training.conftest import MemoryCache, new_draft, settings

SETTINGS = {"max_steps": 6, "local_batch_size": 1, "global_batch_size": 8, "log_every": 2, "checkpoint_every": 2}


class Act(Callback):
    """Calls ``act`` in the middle of the fifth step of one rank."""

    def __init__(self, act=None):
        self._act = act

    def on_micro_batch(self, step, done):
        if self._act and (step, done) == (4, 1):
            self._act()


def not_a_number(cache, sample_id):
    cache[sample_id].taps.fill_(float("nan"))


def damaged(cache, sample_id):
    class Damaged(MemoryCache):
        def __getitem__(self, index):
            if index == sample_id:
                raise InputError(f"Sample {sample_id} is damaged.", "Restore it.")
            return super().__getitem__(index)

    cache.__class__ = Damaged


def stuck():
    time.sleep(6)


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


def one_rank(
    together: distributed.DistContext,
    folder: Path,
    *,
    dtype=torch.float32,
    fault=None,
    act=None,
    acting=1,
    device="cpu",
    **changes,
):
    config, cache = settings(**(SETTINGS | changes)), MemoryCache()
    if fault:
        third_step = SampleSchedule.of(config, len(cache), together).samples(2, config)
        fault(cache, int(third_step[3]))
    # Dense on CUDA too, where these heads are too small for FlexAttention.
    draft = new_draft(cache=cache, attention="dense", recompute_layers=config.activation_checkpointing)
    acts = [Act(act if together.rank == acting else None)]
    Trainer(cache, draft.to(device, dtype), config, folder, callbacks=acts, context=together).run()
    weights = draft.trainable_parameters().values()
    print(sum((weight.to_local() if is_dtensor(weight) else weight).numel() for weight in weights))


def start(size: int, work: Callable[[], None], folder: Path) -> list[dict]:
    """Run ``work`` in ``size`` processes that find each other as torchrun's do; how each has ended and what it said."""
    keeper, port = keep_store()
    folder.mkdir(parents=True, exist_ok=True)
    children = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f".{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
            }
            code = 0
            try:
                work()
            except KeyboardInterrupt:
                code = 130
            except SystemExit as leaving:
                code = leaving.code
            except BaseException as error:
                print(error, file=sys.stderr)
                code = getattr(error, "exit_code", 1)
            sys.stdout.flush()
            os._exit(code)
        children[rank] = child
    ended = [
        {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
        | {name: (folder / f".{name}-{rank}").read_text() for name in ("out", "err")}
        for rank, child in children.items()
    ]
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    return ended


def keep_store() -> tuple[int, str]:
    """A process that keeps a store, as torchrun does, not a rank; its id, and the store's port."""
    read, write = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        while True:
            signal.pause()
    os.close(write)
    port = os.read(read, 16).decode()
    os.close(read)
    return keeper, port


def trained(size: int, folder: Path, **options) -> list[dict]:
    def work() -> None:
        if options.get("act") is stuck:
            distributed._STEP = datetime.timedelta(seconds=2)
        with distributed.init_distributed() as together:
            one_rank(together, folder, **options)

    return start(size, work, folder)


def command(size: int, folder: Path, *words: str) -> list[dict]:
    sys.argv = ["nds", *words, "--out", str(folder / "run")]
    return start(size, cli.main, folder)


def run_all(folder: Path, words: Sequence[str]) -> dict[str, list[list[dict]]]:
    """Every way, in a folder of its own; ``words`` of the train command are used where the command is run."""
    bf16 = torch.bfloat16
    stop, kill = signalled(signal.SIGTERM), signalled(signal.SIGKILL)
    train_it = ["train", *words]
    packed = {"parallel": "fsdp", "local_batch_size": 2, "packed": True}
    runs = {
        "one": lambda at: [trained(1, at)],
        "two": lambda at: [trained(2, at)],
        "four": lambda at: [trained(4, at)],
        "one, wide": lambda at: [trained(1, at, local_batch_size=4)],
        "two, bf16": lambda at: [trained(2, at, dtype=bf16)],
        "two, bf16, sharded": lambda at: [trained(2, at, dtype=bf16, parallel="fsdp", activation_checkpointing=True)],
        "two, stopped, two": lambda at: [trained(2, at, act=stop), trained(2, at)],
        "two, stopped, four": lambda at: [trained(2, at, act=stop), trained(4, at)],
        "sharded, stopped, one": lambda at: [trained(2, at, parallel="fsdp", act=stop), trained(1, at)],
        "one, stopped, sharded": lambda at: [trained(1, at, act=stop, acting=0), trained(2, at, **packed)],
        "two, killed, two": lambda at: [trained(2, at, act=kill), trained(2, at)],
        "two, one stuck": lambda at: [trained(2, at, act=stuck)],
        "two, first killed": lambda at: [trained(2, at, act=kill, acting=0)],
        "four, not a number": lambda at: [trained(4, at, fault=not_a_number)],
        "sharded, not a number": lambda at: [trained(2, at, fault=not_a_number, parallel="fsdp")],
        "two, one damaged sample": lambda at: [trained(2, at, fault=damaged)],
        "three": lambda at: [trained(3, at)],
        "command": lambda at: [
            command(1, at / "alone", *train_it, "--json"),
            command(2, at, *train_it, "--json"),
            command(2, at, *train_it, "--fresh"),
        ],
    }
    if torch.cuda.device_count() > 1:
        runs |= {
            "two, cuda": lambda at: [trained(2, at, device="cuda")],
            "two, cuda, sharded": lambda at: [trained(2, at, device="cuda", parallel="fsdp")],
        }
    return {name: run(folder / name) for name, run in runs.items()}
