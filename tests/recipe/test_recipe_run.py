"""A recipe runs to its report, skips what is there, makes again what depends on a change, and loses nothing."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_dspark import cli, stages
from nemotron_dspark.config.recipe import load_recipe
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.evaluation import calibration_report
from nemotron_dspark.folders import locked
from nemotron_dspark.recipe import run as driver
from nemotron_dspark.recipe import work
from nemotron_dspark.recipe.clean import clean
from nemotron_dspark.recipe.run import recipe_status, run_recipe
from nemotron_dspark.recipe.work import RecipeProgress
from tests.kill9 import apart, kill_often

RECIPE = """
target: {target}
prompts: prompts.jsonl
held_out: 0.3
eval_prompts: 2
answers: {{max_tokens: 12, temperatures: 0.0}}
calibrate: false
export: sglang
price: 0.5
set:
  draft: {{num_layers: 1, markov_rank: 8, num_taps: 2, block_size: 3}}
  data: {{max_length: 64, min_loss_tokens: 4}}
  train: {{max_steps: 2, global_batch_size: 2, num_anchors: 4, log_every: 1}}
  eval: {{max_new_tokens: 8, temperatures: [0.0]}}
"""


def write_recipe(folder, target):
    words = ("state", "block", "draft", "token", "verify", "accept", "commit")
    rows = [{"prompt": f"{words[at % 7]} {words[at % 5]} {at} ?"} for at in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(target=target))


class Seen(RecipeProgress):
    """Which stages were begun."""

    def __init__(self):
        self.names, self.notes = [], []

    def stage(self, name):
        self.names.append(name.split()[0])

    def note(self, text):
        self.notes.append(text)


def run(*assignments, **given):
    """Kinds of the stages that were begun, and the result; in the present folder."""
    seen = Seen()
    result = run_recipe(load_recipe(Path("recipe.yaml"), assignments=assignments, **given), progress=seen)
    return seen, result


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_hybrid):
    """A recipe that was run with the command; what it printed lies in `stdout`."""
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder, tiny_hybrid)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(cli.app, ["recipe", "run", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of the finished recipe, and in it."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def draft_bytes(folder=Path()):
    return (folder / "runs/target/draft/model.safetensors").read_bytes()


def test_one_command_makes_everything_and_says_what(finished):
    said = json.loads((finished / "stdout").read_text())
    (draft,) = said["drafts"]
    assert draft["draft"] == "runs/target/draft"
    assert draft["evaluation"]["accepted_length"]["greedy"] >= 1
    assert said["report"] == "report.html"
    for made in (
        "answers/target.jsonl",
        "caches/target/manifest.json",
        "runs/target/draft/config.json",
        "runs/target/eval/eval.json",
        "runs/target/export/sglang/config.json",
    ):
        assert (finished / made).is_file(), made


def test_the_report_is_one_file_with_pictures_figures_and_commands(finished):
    page = (finished / "report.html").read_text()
    evaluation = json.loads((finished / "runs/target/eval/eval.json").read_text())
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:image/png;base64,)", page)
    assert page.count("data:image/png;base64,") == 2
    assert f"{evaluation['measurements'][0]['accepted_length']:.2f}" in page
    assert "nds serve --target" in page
    assert "vllm serve" in page
    assert "sglang.launch_server" in page
    assert "transformers" in page
    assert "dollars" in page
    for stage in ("answers target", "cache target", "train target", "eval target", "export target sglang"):
        assert stage in page


def test_the_command_ends_with_each_draft_its_figures_and_how_to_serve_it(folder):
    said = CliRunner().invoke(cli.app, ["recipe", "run"], catch_exceptions=False).stdout
    assert re.search(r"target  accepted length greedy \d.*\n  nds serve --target \S+ --draft runs/target/draft\n", said)
    assert "report   report.html" in said
    shutil.rmtree("runs")
    said = CliRunner().invoke(cli.app, ["recipe", "run", "--until", "cache"], catch_exceptions=False).stdout
    assert "nds serve" not in said
    assert "goes on" in said


def test_a_finished_recipe_begins_nothing(folder):
    before = draft_bytes()
    seen, _ = run()
    assert seen.names == []
    assert draft_bytes() == before


def test_a_changed_setting_makes_again_what_depends_on_it_and_back_takes_back_what_was_there(folder):
    before = draft_bytes()
    seen, _ = run("train.lr=0.01")
    assert seen.names == ["train", "eval", "export"]
    assert seen.notes[0] == "train.lr was the default, now it is 0.01; what is there is set aside."
    changed = draft_bytes()
    assert changed != before
    shutil.rmtree("caches")  # so that nothing could be trained
    seen, _ = run()
    assert not [note for note in seen.notes if "steps" in note]
    assert draft_bytes() == before
    assert Path("runs/target/eval/eval.json").is_file()
    assert run()[0].names == []
    run("train.lr=0.01")
    assert draft_bytes() == changed


def test_status_tells_what_came_out_of_each_stage(folder):
    done = CliRunner().invoke(cli.app, ["recipe", "status"], catch_exceptions=False)
    assert "6 of 6 stages are done. The report is report.html." in done.stdout
    assert "accepted length greedy" in " ".join(done.stdout.split())
    listed = json.loads(CliRunner().invoke(cli.app, ["recipe", "status", "--json"]).stdout)
    assert [row["state"] for row in listed["stages"]] == ["done"] * 6
    assert listed["running"] is False


def test_more_prompts_make_everything_again_and_status_says_why(folder):
    with open("prompts.jsonl", "a") as file:
        file.write('{"prompt": "one more of them ?"}\n')
    found = recipe_status(load_recipe(Path("recipe.yaml")))
    assert {status.state for status in found.statuses.values()} == {"again"}
    assert found.statuses["split"].why.startswith("the prompts or conversations have changed")
    assert found.statuses["cache target"].why.startswith("answers is made again")
    assert "0 of 6 stages are done" in found.sentence


def test_until_ends_after_that_stage_and_the_next_call_goes_on(folder):
    shutil.rmtree("runs")
    shutil.rmtree("recipe")
    shutil.rmtree("caches")
    report = Path("report.html")
    report.unlink()
    seen = Seen()
    run_recipe(load_recipe(Path("recipe.yaml")), until="cache", progress=seen)
    assert seen.names == ["split", "answers", "cache"]
    assert "made by another command." in seen.notes  # the answers, which are those of the same prompts
    assert not report.exists()
    assert run()[0].names == ["train", "eval", "export"]


def test_two_drafts_share_a_cache_and_stand_side_by_side(folder):
    seen, result = run(drafts={"a": {}, "b": {"train": {"lr": 0.01}}})
    assert seen.names == ["train", "eval", "export"] * 2
    assert [draft.folder.parent.name for draft in result.drafts] == ["target-a", "target-b"]
    page = Path("report.html").read_text()
    assert "target-a" in page
    assert "target-b" in page
    assert Path("runs/target/draft").is_dir()  # of the recipe that was run before


def test_a_draft_is_calibrated_on_the_held_out_prompts(folder, monkeypatch):
    monkeypatch.setattr(calibration_report, "MIN_ROUNDS", 5)
    seen, result = run(calibrate=True)
    assert seen.names == ["calibrate"]
    assert Path("runs/target/draft/calibration/calibration.json").is_file()
    assert result.refused == ()
    assert Path("report.html").read_text().count("data:image/png;base64,") == 3


def test_too_few_prompts_to_calibrate_are_said_and_the_rest_is_done(folder):
    Path("calibrated.yaml").write_text(Path("recipe.yaml").read_text().replace("calibrate: false", "calibrate: true"))
    done = CliRunner().invoke(cli.app, ["recipe", "run", "calibrated.yaml", "--json"], catch_exceptions=False)
    said = json.loads(done.stdout)
    assert done.exit_code == 1
    assert said["refused"][0].startswith("calibrate target: The prompts give")
    assert "or set calibrate: false" in said["refused"][0]
    assert said["report"] == "report.html"
    assert "or set calibrate: false" in Path("report.html").read_text()
    until = CliRunner().invoke(cli.app, ["recipe", "run", "calibrated.yaml", "--until", "eval"], catch_exceptions=False)
    assert until.exit_code == 0  # what was asked for is there


def test_prompts_take_several_temperatures_in_turn(folder):
    asked = []
    real = work.regenerate

    def regenerate(prompts, out, **given):
        asked.append((given["temperature"], len(Path(str(prompts)).read_text().splitlines())))
        return real(prompts, out, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "regenerate", regenerate)
        recipe = load_recipe(Path("recipe.yaml"), answers={"temperatures": [0.0, 1.0], "max_tokens": 12})
        run_recipe(recipe, until="answers")
    prompts = len(Path("recipe/prompts/train.jsonl").read_text().splitlines())
    assert asked == [(0.0, (prompts + 1) // 2), (1.0, prompts // 2)]
    assert len(Path("answers/target.jsonl").read_text().splitlines()) == prompts


def test_a_server_answers_where_there_is_one(folder, tiny_hybrid, monkeypatch):
    recipe = load_recipe(Path("recipe.yaml"))
    config = recipe.run_config(str(tiny_hybrid))
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"port": 0})})
    shutil.rmtree("answers")
    shutil.rmtree("recipe")
    with stages.serve(config) as server:
        monkeypatch.setattr(stages, "serve", None)  # none of its own
        answers = recipe.answers.model_copy(update={"base_url": (server.base_url,)})
        run_recipe(recipe.model_copy(update={"answers": answers}), until="answers")
    assert Path("answers/target.jsonl").is_file()


def test_several_gpus_train_through_torchrun_with_the_same_configuration(folder, monkeypatch):
    commands = []

    def call(command, lock):
        commands.append(command)
        done = CliRunner().invoke(cli.app, command[command.index("train") :], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    monkeypatch.setattr(work, "most_processes", lambda settings, gpus: 2)
    monkeypatch.setattr(work, "_call", call)
    before = draft_bytes()
    shutil.rmtree("runs")
    assert run()[0].names == ["train", "eval", "export"]
    assert commands[0][1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    assert draft_bytes() == before


def test_a_process_that_was_started_keeps_the_lock_when_the_recipe_dies(tmp_path):
    code = f"""
import subprocess, sys
from pathlib import Path
from nemotron_dspark.folders import locked
with locked(Path({str(tmp_path)!r})) as lock:
    print(subprocess.Popen(["sleep", "60"], pass_fds=(lock,), stdout=-3, stderr=-3).pid)  # /dev/null
"""
    sleeper = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    with pytest.raises(EnvironmentFault, match="Another process"), locked(tmp_path):
        pass
    os.kill(sleeper, signal.SIGKILL)


def test_clean_removes_what_can_be_made_again_and_only_that(folder):
    run("train.lr=0.01")
    recipe = load_recipe(Path("recipe.yaml"), assignments=["train.lr=0.01"])
    listed = clean(recipe)
    names = {each.path.as_posix().split(".")[0] for each in listed.found}
    assert names == {"caches/target", "runs/target/checkpoints", "recipe/aside/runs"}
    assert all(each.path.exists() for each in listed.found)
    removed = clean(recipe, remove=True)
    assert removed.bytes == listed.bytes > 0
    assert not any(each.path.exists() for each in listed.found)
    assert Path("answers/target.jsonl").is_file()
    assert draft_bytes()
    assert run("train.lr=0.01")[0].names == []
    assert run("train.lr=0.02")[0].names == ["cache", "train", "eval", "export"]


def test_a_second_process_in_the_folder_is_refused(folder):
    with locked(Path("recipe")):
        assert recipe_status(load_recipe(Path("recipe.yaml"))).running
        with pytest.raises(EnvironmentFault, match="Another process is writing"):
            run()


def test_more_gpus_than_there_are_are_refused_before_anything_runs(folder):
    with pytest.raises(EnvironmentFault, match="asks for 64 GPUs"):
        run("train.lr=0.01", gpus=64)
    assert run()[0].names == []


def test_a_missing_extra_is_said_before_anything_runs(folder, monkeypatch):
    find = driver.importlib.util.find_spec
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    with pytest.raises(EnvironmentFault, match="The stage answers needs the package openai") as missing:
        run(held_out=0.4)
    assert "nemotron-dspark[data]" in missing.value.do
    assert run()[0].names == []  # which needs none


def test_a_disk_too_small_by_the_plan_is_said_before_anything_runs(folder, monkeypatch):
    free = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(EnvironmentFault, match=r"By the plan the recipe needs .* more on the disk") as full:
        run("train.lr=0.01")
    assert "nds recipe clean" in full.value.do
    assert Path("runs/target/draft").is_dir()


def test_what_no_recipe_made_is_never_moved(folder):
    shutil.rmtree("recipe")
    seen = Seen()
    with pytest.raises(InputError, match="runs/target/eval is there already"):
        run_recipe(load_recipe(Path("recipe.yaml")), progress=seen)
    assert seen.names == []  # it is said before hours of the stages before it
    assert Path("runs/target/eval/eval.json").is_file()


def test_train_works_as_written_after_a_recipe(folder, tiny_hybrid):
    """With the recipe's settings it goes on with the recipe's run: the same cache, folder and configuration."""
    text = Path("recipe.yaml").read_text()
    Path("settings.yaml").write_text("\n".join(line[2:] for line in text[text.index("set:") :].splitlines()[1:]))
    before = draft_bytes()
    command = ["train", "--target", str(tiny_hybrid), "--config", "settings.yaml"]
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "neither --cache nor --data is given: takes caches/target, the newest cache" in done.stderr
    assert draft_bytes() == before


def _whole(target, folder):
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if not Path("recipe.yaml").is_file():
        write_recipe(folder, target)
    run_recipe("recipe.yaml")


def _kill_a_recipe(target, folder, kills):
    folders, _ = kill_often(functools.partial(_whole, target), Path(folder), kills, seed=1)
    return [
        (
            (each / "answers/target.jsonl").read_bytes(),
            draft_bytes(each),
            (each / "runs/target/export/sglang/model.safetensors").read_bytes(),
            json.loads((each / "runs/target/eval/eval.json").read_text())["measurements"][0]["accepted_length"],
            (each / "report.html").is_file(),
        )
        for each in folders
    ]


@pytest.mark.slow
def test_a_recipe_killed_anywhere_goes_on_to_the_same_result(tmp_path, tiny_hybrid):
    undisturbed, *killed = apart(_kill_a_recipe, str(tiny_hybrid), str(tmp_path), 4)
    assert killed
    assert all(each == undisturbed for each in killed)
