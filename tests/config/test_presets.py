"""A target's name finds its preset, every file in configs/ loads, and what the user sets goes over it."""

import pytest

from nemotron_dspark.config import load_run_config
from nemotron_dspark.config.known import KNOWN
from nemotron_dspark.config.presets import preset_for
from nemotron_dspark.errors import InputError
from nemotron_dspark.resources import resource_folder

FILES = sorted(resource_folder("configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_in_configs_loads(path):
    assert load_run_config(path) != load_run_config()


@pytest.mark.parametrize("known", [known for known in KNOWN if known.preset], ids=lambda known: known.repository)
def test_repository_alias_and_folder_find_the_same_preset(known):
    path = preset_for(known.repository)
    assert path in FILES
    assert {preset_for(name) for name in known.aliases} <= {path}
    assert preset_for(f"/models/{known.repository.split('/')[1]}") == path


def test_a_target_without_a_preset_keeps_the_defaults():
    assert preset_for("somebody/else") is None
    assert load_run_config(target="somebody/else") == load_run_config(
        preset=None, assignments=["target.name=somebody/else"]
    )


def test_a_preset_applies_by_name_and_gives_way(tmp_path):
    by_name = load_run_config(target="nvidia/Nemotron-H-8B")
    assert by_name.draft.intermediate_size == 14336
    assert by_name.target.name == "nvidia/Nemotron-H-8B"
    file = tmp_path / "mine.yaml"
    file.write_text("target: {name: nvidia/Nemotron-H-8B}\ndraft: {intermediate_size: 12288}\ntrain: {lr: 1.0e-4}\n")
    mine = load_run_config(file, ["train.lr=3e-4"])
    assert (mine.draft.intermediate_size, mine.train.lr) == (12288, 3e-4)
    assert mine.draft.mask_token_id == 990  # from the preset of the target that the file names


def test_a_fault_is_reported_with_the_file_that_holds_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {learning_rate: 1}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: there is no key train\.learning_rate"):
        load_run_config(file, target="nvidia/Nemotron-H-8B")
