"""A disk that is full, again and again, at every stage that writes: exit code 3, and the same command goes on."""

import re
import shutil
from pathlib import Path

import pytest

from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.targets import Target
from tests.faults.small_disk import NoSmallDisk, SmallDisk
from tests.kill9 import Child, apart, contents
from tests.training.runs import train_run
from tests.training.test_kill import ROLLING, SMALL, result
from tests.training.test_without_cache import SETTINGS, write_conversations

STOPS = 10
CONFIGS = {
    "build": (),
    "cached": ("train.checkpoint_every=2",),
    "rolling": (*ROLLING, "cache.budget_gb=0.0006"),
}


def fill_again_and_again(stage: str, target_folder: str, conversations: Path, folder: Path, config: RunConfig):
    """What was said at every stop; the result of a small disk that grew, and of a large one."""
    target = Target.load(target_folder, device="cpu")
    outcome = contents if stage == "build" else result
    cache = folder / "cache"
    if stage == "cached":
        build_cache(target, conversations, cache, taps=(1, 4), data=config.data, cache=config.cache)

    def act(out: Path) -> None:
        if stage == "build":
            build_cache(target, conversations, out, taps=(1, 4), data=config.data, cache=config.cache)
        elif stage == "cached":
            train_run(target_folder, cache, out, config)
        else:
            train_run(target_folder, None, out, config, conversations=conversations)

    Child(lambda: act(folder / "whole")).end()
    needed = sum(path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file())
    try:
        disk = SmallDisk(folder / "disk", 8192)
    except NoSmallDisk as error:
        return str(error), None, None

    def stopped() -> None:
        said = folder / "said"
        said.write_text("")
        usage = shutil.disk_usage("/")._replace(free=1 << 40)
        shutil.disk_usage = lambda path: usage  # or it would be refused before it begins
        try:
            act(folder / "disk" / "out")
        except EnvironmentFault as error:
            said.write_text(f"{error.exit_code} {error}")

    heard, size = [], 8192
    while len(heard) < 100:
        Child(stopped).end()
        heard.append((folder / "said").read_text())
        if not heard[-1]:
            return heard[:-1], outcome(folder / "disk" / "out"), outcome(folder / "whole")
        size += needed // STOPS
        disk.grow(size)
    return heard, None, None


@pytest.mark.parametrize("stage", list(CONFIGS))
def test_a_full_disk_stops_in_a_sentence_and_loses_nothing(stage, tiny_hybrid, tmp_path):
    data = write_conversations(tmp_path / "data.jsonl")
    config = load_config(assignments=[*SETTINGS, *SMALL, *CONFIGS[stage]])
    heard, found, expected = apart(fill_again_and_again, stage, str(tiny_hybrid), data, tmp_path, config)
    if expected is None:
        pytest.skip(f"no small disk can be mounted here: {heard}")
    assert len(heard) >= STOPS // 2
    found_in = [
        re.search(r"^3 .*The disk is full: (\S+) could not be written.*same command again", said) for said in heard
    ]
    assert all(found_in), heard
    places = {Path(match[1]).name for match in found_in}
    assert len(places) > 1, places
    assert found == expected
