"""`recipe.yaml` and its dry run: what is read and refused, what drafts share, what a change touches."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from nemotron_dspark import cli
from nemotron_dspark.config.recipe import load_recipe
from nemotron_dspark.errors import InputError, NdsError
from nemotron_dspark.recipe.dry_run import dry_run
from nemotron_dspark.recipe.graph import all_stages, drafts_of

SMALL = """
held_out: 0.2
eval_prompts: 4
answers: {max_tokens: 24, expected_tokens: 20}
set:
  draft: {num_layers: 1, markov_rank: 8, num_taps: 2, block_size: 3}
  data: {max_length: 96, min_loss_tokens: 4}
"""


@pytest.fixture
def folder(tmp_path, tiny_hybrid, monkeypatch):
    """A folder with a recipe of a tiny target, and in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "state {i} ?"}}\n' for i in range(40)))
    (tmp_path / "recipe.yaml").write_text(f"target: {tiny_hybrid}\nprompts: prompts.jsonl\n{SMALL}")
    return tmp_path


def kinds(found):
    return [stage.name for stage in all_stages(found)]


def fingerprints(recipe):
    return {stage.name: stage.fingerprint for stage in all_stages(drafts_of(recipe))}


def test_a_recipe_goes_through_every_stage_in_order(folder):
    found = drafts_of(load_recipe(folder / "recipe.yaml"))
    assert [name.split()[0] for name in kinds(found)] == [
        "split", "answers", "cache", "train", "eval", "calibrate", "export",
    ]  # fmt: skip


def test_drafts_of_the_same_hidden_states_share_a_cache(folder):
    drafts = {
        "one": {"draft": {"num_layers": 1}},
        "two": {"draft": {"num_layers": 2}},
        "taps": {"draft": {"num_taps": 1}},
    }
    found = drafts_of(load_recipe(folder / "recipe.yaml", drafts=drafts))
    caches = [draft.get("cache").place.name for draft in found]
    assert caches == ["target", "target", "target-taps"]
    assert [draft.get("train").place.name for draft in found] == ["target-one", "target-two", "target-taps"]
    assert len(kinds(found)) == len(set(kinds(found))) == 2 + 2 + 3 * 4


def test_prompts_of_ones_own_to_measure_on_need_no_split(folder):
    (folder / "own.jsonl").write_text('{"prompt": "?"}\n')
    command = ["recipe", "run", "--held-out", "own.jsonl", "--dry-run", "--json"]
    said = json.loads(CliRunner().invoke(cli.app, command, catch_exceptions=False).stdout)
    assert [stage["kind"] for stage in said["stages"]] == ["answers", "cache", "train", "eval", "calibrate", "export"]


def test_answers_that_are_there_need_no_answering(folder):
    found = drafts_of(load_recipe(folder / "recipe.yaml", data=["prompts.jsonl"]))
    assert "answers target" not in kinds(found)


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"set.train.lr": 1e-3}, {"train", "eval", "calibrate", "export"}),
        ({"set.eval.seed": 3}, {"eval", "calibrate"}),
        ({"set.draft.num_taps": 1}, {"cache", "train", "eval", "calibrate", "export"}),
        ({"set.train.log_every": 3}, set()),
        ({"set.serve.port": 3}, set()),
    ],
)
def test_a_setting_touches_exactly_what_depends_on_it(folder, change, touched):
    before = fingerprints(load_recipe(folder / "recipe.yaml"))
    texts = [f"{key.removeprefix('set.')}={value}" for key, value in change.items()]
    after = fingerprints(load_recipe(folder / "recipe.yaml", assignments=texts))
    assert {name.split()[0] for name in after if after[name] != before[name]} == touched


def test_other_prompts_touch_everything_and_the_server_nothing(folder):
    before = fingerprints(load_recipe(folder / "recipe.yaml"))
    served = load_recipe(folder / "recipe.yaml", answers={"base_url": "http://x/v1", "max_tokens": 24})
    assert fingerprints(served) == before
    with open(folder / "prompts.jsonl", "a") as file:
        file.write('{"prompt": "one more ?"}\n')
    after = fingerprints(load_recipe(folder / "recipe.yaml"))
    assert all(after[name] != before[name] for name in before)


def test_other_weights_of_a_local_target_touch_all_but_the_split(folder, tiny_hybrid):
    copy = shutil.copytree(tiny_hybrid, folder / "copy")
    before = fingerprints(load_recipe(folder / "recipe.yaml", target="copy"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    after = fingerprints(load_recipe(folder / "recipe.yaml", target="copy"))
    assert [name for name in after if after[name] == before[name]] == ["split"]


def test_the_dry_run_plans_every_stage_and_makes_nothing(folder):
    there = set(folder.rglob("*"))
    found = CliRunner().invoke(cli.app, ["recipe", "run", "--dry-run", "--json"], catch_exceptions=False)
    said = json.loads(found.stdout)
    assert set(folder.rglob("*")) == there
    assert said["fits"] is True
    assert [stage["state"] for stage in said["stages"]] == ["to do"] * 7
    assert said["total_disk"] == pytest.approx(sum(said["disk"].values())) == pytest.approx(said["missing_disk"])
    assert said["total_hours"] == pytest.approx(sum(stage["hours"] for stage in said["stages"]))
    assert {"caches", "checkpoints", "drafts", "exports"} == set(said["disk"])


def test_what_drafts_share_is_counted_once(folder):
    one = dry_run(load_recipe(folder / "recipe.yaml"))
    two = dry_run(load_recipe(folder / "recipe.yaml", drafts={"a": {}, "b": {"train": {"lr": 1e-3}}}))
    assert two.disk["caches"] == one.disk["caches"]
    assert two.disk["checkpoints"] == 2 * one.disk["checkpoints"]


@pytest.mark.parametrize(
    ("text", "what", "do"),
    [
        ("traget: x", "there is no key traget", "Did you mean target"),
        ("target: x\nprompts: p\ntrain: {lr: 1}", "there is no key train", "below `set:`"),
        ("target: x\nprompts: p\nanswers: {max_token: 3}", "there is no key answers.max_token", "max_tokens"),
        ("target: x\nprompts: p\nset: {train: {lrr: 1}}", "here is no key train.lrr", "train.lr"),
        ("target: x", "neither prompts nor data", "answers"),
        ("target: x\nprompts: p\ndata: d", "both prompts and data", "answers"),
        ("target: [x, y]\ndata: d", "data to 2 targets", "prompts"),
        ("target: x\nprompts: p\nheld_out: 2.0", "held_out", "Correct"),
        ("target: x\nprompts: p\ndrafts: {a/b: {}}", "drafts", "Correct"),
        ("target: x\nprompts: p\nexport: onnx", "export", "Correct"),
        ("prompts: p", "has no target", "Correct"),
        ("target: x\nprompts: p\ntrain_hours: 2\nset: {train: {max_steps: 2}}", "both train_hours and", "one of them"),
    ],
)
def test_bad_recipes_are_refused_in_two_sentences(folder, text, what, do):
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=what) as refused:
        load_recipe(folder / "bad.yaml")
    assert do in refused.value.do


def test_a_draft_that_cannot_be_is_said_in_the_plan(folder):
    with pytest.raises(InputError, match="EAGLE-3"):  # it takes five taps, and the recipe says two
        dry_run(load_recipe(folder / "recipe.yaml", drafts={"a": {}, "b": {"draft": {"kind": "eagle3"}}}))


def test_missing_prompts_are_named(folder):
    with pytest.raises(NdsError, match=r"gone\.jsonl is not a file"):
        dry_run(load_recipe(folder / "recipe.yaml", prompts=["gone.jsonl"]))


def test_a_disk_too_small_is_said_in_the_plan(folder, monkeypatch):
    free = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    found = dry_run(load_recipe(folder / "recipe.yaml"))
    assert any("The recipe needs" in problem for problem in found.problems)
