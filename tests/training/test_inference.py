"""A target that not every process holds trains the draft that targets of their own would."""

import queue
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemotron_dspark.cache.capture import States
from nemotron_dspark.config import TargetConfig
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.training import online
from nemotron_dspark.training.inference import Roles, StateServer
from nemotron_dspark.training.metrics import read_lines
from tests.kill9 import apart
from tests.training.inference_ranks import run_all
from tests.training.test_distributed import TIMED, checkpoint
from tests.training.test_without_cache import write_conversations

HOLDS = "holds the target\n"


def runs_named(*names):
    def runs(tmp_path_factory, tiny_hybrid):
        folder = tmp_path_factory.mktemp("inference")
        conversations = write_conversations(folder / "data.jsonl", 12)
        return folder, apart(run_all, folder, tiny_hybrid, conversations, names)

    return pytest.fixture(scope="module")(runs)


runs = runs_named("each holds", "one a node", "killed, again")
more_runs = runs_named("stopped, again", "trainer stopped", "trainer killed", "wrong", "wrong, one a node")


def codes(ended):
    return [process["code"] for process in ended]


def holders(ended):
    return [rank for rank, process in enumerate(ended) if HOLDS in process["out"]]


def said(ended):
    return [process["err"] for process in ended if process["err"]]


def assert_equal(found, expected, relative):
    """Weights, moments, metrics and measurements of two runs."""
    tensors, others = (checkpoint(folder / "run", "step-00000003") for folder in (found, expected))
    assert tensors.keys() == others.keys()
    for key, value in others.items():
        assert (tensors[key].double() - value.double()).norm() <= relative * value.double().norm(), key
    for file in ("metrics.jsonl", "validation.jsonl"):
        lines, other_lines = (read_lines(folder / "run" / file) for folder in (found, expected))
        assert lines
        for here, there in zip(lines, other_lines, strict=True):
            measured = {key for key, value in there.items() if value is not None} - set(TIMED)
            assert {key for key, value in here.items() if value is not None} - set(TIMED) == measured
            for key in measured:
                assert here[key] == pytest.approx(there[key], rel=relative, abs=relative / 100), key


def test_states_of_one_target_a_node_train_what_a_target_in_every_process_does_to_the_bit(runs):
    folder, ended = runs
    assert holders(ended["each holds"][0]) == [0, 1]
    assert holders(ended["one a node"][0]) == [0]
    assert_equal(folder / "one a node", folder / "each holds", relative=0.0)


def test_inference_process_that_dies_ends_the_others_and_sharded_training_goes_on_to_the_same_draft(runs):
    folder, ended = runs
    first, again = ended["killed, again"]
    assert codes(first) == [3, 3, -9]
    (words,) = said(first)
    assert words.startswith("Another process of this run has died.")
    assert holders(first) == holders(again) == [2]
    assert again[0]["out"] == again[1]["out"] != "from step 0 to 3\n"
    assert_equal(folder / "killed, again", folder / "each holds", relative=1e-6)


@pytest.mark.slow
def test_stop_of_the_inference_process_stops_the_training_which_goes_on_to_the_same_draft(runs, more_runs):
    folder, ended = more_runs
    first, again = ended["stopped, again"]
    assert codes(first) == [130, 130]
    assert again[0]["out"] != "from step 0 to 3\n"
    assert_equal(folder / "stopped, again", runs[0] / "each holds", relative=1e-6)


@pytest.mark.slow
def test_stop_of_a_trainer_alone_stops_the_inference_process_without_a_word(more_runs):
    ended = more_runs[1]["trainer stopped"][0]
    assert codes(ended) == [130, 130]
    assert said(ended) == []


@pytest.mark.slow
def test_trainer_that_dies_ends_the_inference_process(more_runs):
    ended = more_runs[1]["trainer killed"][0]
    assert codes(ended) == [-9, 3]
    (words,) = said(ended)
    assert words.startswith("Another process of this run has died.")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrong", "wrong, one a node"])
def test_error_of_the_target_is_raised_once_where_the_draft_trains(more_runs, name):
    ended = more_runs[1][name][0]
    assert codes(ended) == [1, 1]
    (words,) = said(ended)
    assert "The target went wrong. Mend it." in words


class Target:
    """Stands in for an `OnlineSource`: two samples of one token each, computed at once."""

    lengths, widths = np.ones(2, dtype=np.int64), (4, 2)

    def open(self, step):
        pass

    def states(self, ids):
        real = torch.ones(1, 1, dtype=torch.bool)
        taps, last = (torch.ones(1, 1, width, dtype=torch.bfloat16) for width in self.widths)
        return States(taps, last, finite=real, real=real, done=None)


class Peer:
    """A link to a process that wants to train, asks for many micro-batches at once, and is gone if it ``dies``."""

    def __init__(self, peer, *, dies):
        self.peer, self._dies, self._asked = peer, dies, iter([(-2, 0), *((number, 1) for number in range(8))])

    def receive(self, into):
        asked = next(self._asked, None)
        if asked is not None:
            into[:2] = torch.tensor(asked)
        return threading.Event() if asked is None else SimpleNamespace(wait=lambda: None)

    def send(self, message, tag):
        if self._dies:
            raise RuntimeError("gloo: the connection is closed")


def test_server_of_a_process_that_is_gone_ends_and_does_not_wait_for_it():
    server = StateServer(Target(), [Peer(0, dies=True), Peer(1, dies=False)], most=1)
    failures = queue.SimpleQueue()

    def run():
        server.open()
        try:
            server.run()
        except RuntimeError as error:
            failures.put(error)

    threading.Thread(target=run, daemon=True).start()
    assert str(failures.get(timeout=10)) == "gloo: the connection is closed"


@pytest.mark.parametrize("named", ["cuda", "cuda:0"])
def test_processes_that_all_hold_the_target_have_a_gpu_each(monkeypatch, named):
    monkeypatch.setattr(online, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    third = DistContext()
    third.rank, third.local_rank, third.world_size = 2, 2, 4
    config = TargetConfig(device=named)
    assert online.on_own_device(config, SINGLE) == config
    if named == "cuda":
        assert online.on_own_device(config, third).device == "cuda:2"
    else:
        with pytest.raises(InputError, match=r"target\.device=cuda:0 is one GPU, and there are 4 processes"):
            online.on_own_device(config, third)


def test_inference_processes_are_the_last_of_each_machine_and_serve_its_own():
    machines = [[0, 1, 2, 3], [4, 5, 6, 7]]
    one, two = Roles.of(machines, 1), Roles.of(machines, 2)
    assert one.trainers == (0, 1, 2, 4, 5, 6)
    assert one.target_of == {0: 3, 1: 3, 2: 3, 4: 7, 5: 7, 6: 7}
    assert two.target_of == {0: 2, 1: 3, 4: 6, 5: 7}
    assert Roles.of(machines, shared=True).target_of == {rank: rank // 4 * 4 for rank in range(8)}
    assert Roles.of(machines).target_of == {rank: rank for rank in range(8)}


@pytest.mark.parametrize("machines", [[[0]], [[0, 1], [2]]])
def test_machine_without_a_process_that_trains_is_refused(machines):
    with pytest.raises(InputError, match=r"inference_gpus is 1, and a machine has 1 process\."):
        Roles.of(machines, 1)
