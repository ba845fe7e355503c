"""Train in several processes that meet over gloo, in many ways; prints what came of each as JSON.

A program of its own: it imports torch once and forks, which is only safe while it has run no backward itself.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import MemoryCache, new_draft, settings

from nemotron_dspark.errors import NdsError
from nemotron_dspark.training.loop import Watcher, train
from nemotron_dspark.training.plan import Plan
from nemotron_dspark.training.ranks import Ranks, joined

SETTINGS = {"max_steps": 6, "local_batch_size": 1, "global_batch_size": 8, "log_every": 2, "checkpoint_every": 2}


class Act(Watcher):
    """Calls ``act`` in the middle of the fifth step of one rank."""

    def __init__(self, act=None):
        self._act = act
        self.notes = []

    def forward(self, step, done):
        if self._act and (step, done) == (4, 1):
            self._act()

    def note(self, text):
        self.notes.append(text)


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


def one_rank(ranks: Ranks, folder: Path, *, dtype=torch.float32, poison=False, act=None, acting=1, **changes):
    config, cache = settings(**(SETTINGS | changes)), MemoryCache()
    if poison:  # a sample of rank 1 in the third step
        plan = Plan.of(config, len(cache), ranks)
        sample = cache[int(Plan.samples(plan, 2, config)[3])]
        sample.taps = torch.full_like(sample.taps, float("nan"))
    draft = new_draft(cache=cache).to(dtype)
    train(cache, draft, config, folder, watcher=Act(act if ranks.rank == acting else None), ranks=ranks)


def start(size: int, folder: Path, **options) -> list[dict]:
    """Exit code (or signal) and words of each of ``size`` processes, as `nds` would end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun keeps it, not a rank
    children = []
    for rank in range(size):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
            }
            code, words = 0, ""
            try:
                with joined() as ranks:
                    one_rank(ranks, folder, **options)
            except NdsError as error:
                code, words = error.exit_code, str(error)
            except KeyboardInterrupt:
                code = 130
            except SystemExit as leaving:
                code = leaving.code
            except BaseException as error:
                code, words = 1, repr(error)
            os.write(send, words.encode())
            os._exit(code)
        os.close(send)
        children.append((child, receive))
    ended = []
    for child, receive in children:
        with open(receive) as pipe:
            words = pipe.read()
        ended.append({"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "words": words})
    return ended


def main() -> None:
    torch.set_num_threads(1)
    for slow in ("torch._dynamo", "torch.utils.tensorboard", "torch.distributed.fsdp"):  # once, not in every child
        with contextlib.suppress(ImportError):
            importlib.import_module(slow)
    folder, bf16 = Path(sys.argv[1]), torch.bfloat16
    stop, kill = signalled(signal.SIGTERM), signalled(signal.SIGKILL)
    runs = {
        "one": lambda at: [start(1, at)],
        "two": lambda at: [start(2, at)],
        "four": lambda at: [start(4, at)],
        "one, wide": lambda at: [start(1, at, local_batch_size=4)],
        "two, sharded": lambda at: [start(2, at, parallel="fsdp", activation_checkpointing=True)],
        "two, bf16": lambda at: [start(2, at, dtype=bf16)],
        "two, sharded, bf16": lambda at: [start(2, at, dtype=bf16, parallel="fsdp")],
        "two, stopped, two": lambda at: [start(2, at, act=stop), start(2, at)],
        "two, stopped, four": lambda at: [start(2, at, act=stop), start(4, at)],
        "sharded, stopped, one": lambda at: [start(2, at, parallel="fsdp", act=stop), start(1, at)],
        "one, stopped, sharded": lambda at: [start(1, at, act=stop, acting=0), start(2, at, parallel="fsdp")],
        "two, killed, two": lambda at: [start(2, at, act=kill), start(2, at)],
        "two, first killed": lambda at: [start(2, at, act=kill, acting=0)],
        "sharded, killed": lambda at: [start(2, at, parallel="fsdp", act=kill)],
        "four, not a number": lambda at: [start(4, at, poison=True)],
        "sharded, not a number": lambda at: [start(2, at, poison=True, parallel="fsdp")],
        "three": lambda at: [start(3, at)],
    }
    wanted = sys.argv[2:] or list(runs)
    print(json.dumps({name: runs[name](folder / name) for name in wanted}))


if __name__ == "__main__":
    main()
