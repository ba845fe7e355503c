"""kill -9 anywhere in a build: the resumed cache is byte for byte the undisturbed one, and little is computed twice."""

from pathlib import Path

from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.targets import Target
from tests.cache.conftest import CACHE, DATA, TAPS, write_conversations
from tests.kill9 import apart, contents, kill_often

KILLS = 20


def build_and_kill(target_folder: str, conversations: str, folder: Path):
    target = Target.load(target_folder)

    def build(folder: Path) -> None:
        build_cache(target, conversations, folder, taps=TAPS, data=DATA, cache=CACHE)

    return kill_often(build, folder, KILLS, seed=7, look=lambda folder: tuple(sorted(contents(folder))))


def test_resumed_after_kill_9_equals_undisturbed(tiny_hybrid, tmp_path):
    data = write_conversations(tmp_path / "data.jsonl", 16)
    folders, states = apart(build_and_kill, str(tiny_hybrid), str(data), tmp_path)
    assert len(states) == KILLS
    assert len(set(states)) > 5  # the moments were really different ones
    for folder in folders[1:]:
        assert contents(folder) == contents(folders[0])
