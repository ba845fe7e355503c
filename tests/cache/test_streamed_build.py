"""A cache built with a target whose layers are streamed is the same cache."""

import filecmp
import json

import pytest

from nemotron_dspark import stages
from nemotron_dspark.config import load_config
from nemotron_dspark.targets.streamed import StreamedTarget

SETTINGS = {"cache": {"batch_tokens": 256}, "data": {"min_loss_tokens": 2}}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    turns = [("say " * (3 + at % 40), "word " * (5 + at % 23)) for at in range(60)]
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in turns]
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(tiny_hybrid, conversations, tmp_path_factory):
    config = load_config({"name": str(tiny_hybrid), "stream": "off"}, **SETTINGS)
    return stages.build_cache(config, conversations, tmp_path_factory.mktemp("whole") / "cache").build


def same_bytes(found, expected) -> bool:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    return filecmp.cmpfiles(found, expected, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize(("processes", "most"), [(1, 10**9), (1, 700), (2, 700)])
def test_it_has_the_bytes_of_one_built_with_the_whole_target(
    tiny_hybrid, conversations, whole, tmp_path, monkeypatch, processes, most
):
    monkeypatch.setattr(StreamedTarget, "pass_tokens", lambda self, taps: most)
    config = load_config({"name": str(tiny_hybrid), "stream": "on"}, **SETTINGS)
    layers = []
    built = stages.build_cache(
        config, conversations, tmp_path / "cache", processes=processes, on_progress=lambda now: layers.append(now.layer)
    )
    assert same_bytes(built.build.folder, whole.folder)
    passes = layers.count(0)
    assert passes == 1 if most > 10**6 else passes > 2


def test_a_build_that_is_stopped_in_a_pass_does_only_that_pass_again(
    tiny_hybrid, conversations, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(StreamedTarget, "pass_tokens", lambda self, taps: 3000)
    config = load_config({"name": str(tiny_hybrid), "stream": "on"}, **SETTINGS)
    passes = []

    def stop(now):
        passes.extend([now.samples] * (now.layer == 0))
        if len(passes) == 3 and now.layer == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.build_cache(config, conversations, tmp_path / "cache", on_progress=stop)
    again = stages.build_cache(config, conversations, tmp_path / "cache").build
    assert again.reused_samples == passes[2] > 0
    assert same_bytes(again.folder, whole.folder)
