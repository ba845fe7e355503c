"""The commands that look before anything is loaded, on the short names of known hybrids; the hub is replaced."""

import json

import huggingface_hub
import pytest
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.config.known import known_target
from tests.recipe.hybrids import HYBRIDS


@pytest.mark.parametrize("row", HYBRIDS, ids=lambda row: row.name)
def test_inspect_plan_and_config_take_a_hybrid_by_its_short_name(row, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(row.config()))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    known = known_target(row.repository)
    (alias,) = known.aliases

    def run(*command):
        result = CliRunner().invoke(app, [*command, "--target", alias, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    found = run("inspect")
    assert (found["known"], found["preset"]) == (row.repository, known.preset)
    assert found["draft"]["target_layer_ids"] == list(row.taps)
    assert run("plan", "--samples", "1000", "--mean-length", "800")["columns"]
    settings = run("config", "show")
    assert settings["target"]["name"] == alias
    assert settings["draft"]["intermediate_size"] in (None, row.swiglu)
    assert settings["train"]["global_batch_size"] == 64  # from the preset
    assert set(asked) == {row.repository}
