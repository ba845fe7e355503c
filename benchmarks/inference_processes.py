"""Whether hidden states arrive as fast as the slower of target and draft, where these are different processes.

    python benchmarks/inference_processes.py

Two processes over gloo, as `torchrun` with train.inference_gpus=1 starts them. Messages are real; target and draft are
waits of known length, so that neither has this machine's cores to itself or takes them from the copies. A row tells
seconds a micro-batch beside the longer of the two waits.
"""

import multiprocessing
import os
import time

import numpy as np
import torch

from nemotron_dspark.cache.capture import States
from nemotron_dspark.cache.reader import Sample
from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import init_distributed
from nemotron_dspark.training.batches import Loader, batches
from nemotron_dspark.training.inference import RemoteSource, Roles, StateServer, connect
from nemotron_dspark.training.online import OnlineSource

HIDDEN, TAPS, LENGTH = 2048, 5, 1024  # a sample is 25 MB
WARM, STEPS = 5, 40
WAITS = [(0.2, 0.05), (0.05, 0.2), (0.2, 0.2), (0.1, 0.1)]  # seconds of target and draft


class Waiting(OnlineSource):
    """A source whose target takes ``seconds`` for a micro-batch, and computes nothing."""

    def __init__(self, seconds: float):
        self.lengths = np.full(STEPS + WARM, LENGTH)
        self.widths = (TAPS * HIDDEN, HIDDEN)
        self.on_status = lambda text: None
        self._seconds = seconds
        self._states = [torch.zeros(1, LENGTH, width, dtype=torch.bfloat16) for width in self.widths]

    def open(self, step):
        pass

    def states(self, ids):
        time.sleep(self._seconds)
        real = torch.ones(1, LENGTH, dtype=torch.bool)
        return States(*self._states, finite=real, real=real, done=None)

    def samples_with(self, ids, taps, last):
        ones = torch.ones(LENGTH, dtype=torch.bool)
        return [Sample(torch.ones(LENGTH, dtype=torch.long), ones, taps[row], last[row]) for row in range(len(ids))]


def process(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = "2"
    torch.set_num_threads(1)
    with init_distributed() as context:
        for target, draft in WAITS:
            source = Waiting(target)
            (link,) = connect(Roles.of(context.machines(), 1), context)
            if rank == 1:
                server = StateServer(source, [link], 1)
                server.open()
                server.run()
                continue
            remote = RemoteSource(source, link, 1)
            config = TrainConfig(device="cpu", local_batch_size=1, global_batch_size=1, max_steps=STEPS + WARM)
            load = Loader(remote, remote.schedule(config), 0, 64, 7, with_last=True)
            arrived = []
            for _ in batches(load, config, first_step=0):
                arrived.append(time.monotonic())
                time.sleep(draft)
            seconds = (arrived[-1] - arrived[WARM]) / (len(arrived) - 1 - WARM)
            slower = max(target, draft)
            print(f"target {target:.2f} s, draft {draft:.2f} s: {seconds:.3f} s, {seconds / slower:.2f} of the slower")
            remote.close()


def main() -> None:
    start = multiprocessing.get_context("spawn")
    size = 2 * LENGTH * (TAPS + 1) * HIDDEN
    print(f"messages of {size / 1e6:.0f} MB")
    processes = [start.Process(target=process, args=(rank, 29437)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()


if __name__ == "__main__":
    main()
