"""Stages find what is here for a target; `nds` alone, and a stage with nothing there, say what comes next."""

import json
import os
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from nemotron_dspark import cli
from nemotron_dspark.cli import train_command
from nemotron_dspark.config import load_config
from nemotron_dspark.engines import exchange
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import latest
from nemotron_dspark.recipe.guide import way_on

H_8B = "nvidia/Nemotron-H-8B"
REPOSITORY = "nvidia/Nemotron-H-8B-Base-8K"
OTHER = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of Nemotron-H-8B by its alias, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return load_config(H_8B)


def write(path, content, age=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(path, (1_700_000_000 - age,) * 2)


def cache(folder, target=REPOSITORY, age=0):
    write(f"{folder}/manifest.json", {"target_model_name_or_path": target}, age)


def run(folder, target=REPOSITORY, age=0, finished=True):
    write(f"{folder}/run.json", {"read_from": "caches/a"}, age)
    write(f"{folder}/config.yaml", f"target: {{name: {target}}}")
    if finished:
        write(f"{folder}/draft/config.json", "{}", age)


def test_the_newest_cache_of_the_target_is_taken_whatever_it_is_called(config):
    cache("caches/old", age=100)
    cache("caches/new", age=50)
    cache("caches/other", OTHER)
    cache("runs/x/checkpoints/step", age=-10)  # a manifest too deep to be a cache of somebody
    write("caches/broken/manifest.json", "{")
    kind, found = latest.to_train_on(config)
    assert (kind, found.path) == ("cache", Path("caches/new"))
    assert "takes caches/new, the newest cache of nvidia/Nemotron-H-8B here (2023-" in found.said


def test_without_a_cache_the_answers_of_the_target_are_taken(config):
    write(f"answers/{Path(OTHER).name}.jsonl", "")
    with pytest.raises(InputError, match="neither a cache nor answers"):
        latest.to_train_on(config)
    write("answers/nemotron-h-8b-base-8k.jsonl", "")
    kind, found = latest.to_train_on(config)
    assert (kind, found.path) == ("data", Path("answers/nemotron-h-8b-base-8k.jsonl"))


def test_answers_of_nobody_are_taken_with_a_word(config):
    write("answers.jsonl", "")
    kind, found = latest.to_train_on(config)
    assert kind == "data"
    assert "does not say whose answers" in found.said


def test_an_unfinished_cache_is_not_passed_over(config):
    write("answers.jsonl", "")
    (latest.default_cache(config) / latest.WORK).mkdir(parents=True)
    with pytest.raises(InputError, match="unfinished") as begun:
        latest.to_train_on(config)
    assert "nds cache build" in begun.value.do


def test_with_nothing_there_the_first_command_is_named_and_parses(config):
    write("my_prompts.jsonl", "")
    with pytest.raises(InputError, match="neither a cache nor answers of nvidia/Nemotron-H-8B") as missing:
        train_command._source(config, None, None, print)
    answers, everything, cached = (text for text in missing.value.do.split("`")[1::2] if text.startswith("nds"))
    assert "my_prompts.jsonl" in answers
    assert "my_prompts.jsonl" in everything
    for command in (answers, everything, cached):
        parses(command)


def test_the_newest_finished_draft_is_taken(config):
    run("runs/old", age=100)
    run("runs/new", H_8B, age=50)
    run("runs/begun", finished=False)
    run("runs/other", OTHER)
    assert latest.trained(config).path == Path("runs/new/draft")


def test_without_a_draft_the_command_that_trains_one_is_named(config):
    cache("caches/a")
    with pytest.raises(InputError, match="no trained draft") as missing:
        latest.trained(config)
    assert "`nds train --target nvidia/Nemotron-H-8B`" in missing.value.do


def test_a_command_without_a_draft_names_the_one_that_makes_it_first(config):
    for command in (["eval"], ["calibrate"], ["export", "--to", "sglang"]):
        said = CliRunner().invoke(cli.app, [*command, "--target", H_8B])
        assert isinstance(said.exception, InputError)
        assert "no trained draft" in said.exception.what
        assert "`nds data regenerate" in said.exception.do


def test_an_export_goes_where_a_recipe_puts_it(config, monkeypatch):
    asked = []
    monkeypatch.setattr(exchange, "export_draft", lambda draft, to, out, target, slim: asked.append((draft, out)))
    run("runs/a")
    CliRunner().invoke(cli.app, ["export", "--draft", "runs/a/draft", "--to", "sglang"])
    assert asked == [(Path("runs/a/draft"), Path("runs/a/export/sglang"))]
    said = CliRunner().invoke(cli.app, ["export", "--draft", "elsewhere", "--to", "sglang"])
    assert "Give --out" in said.exception.do


def test_a_folder_is_the_same_target_however_it_is_named(config, tmp_path):
    (tmp_path / "models/t").mkdir(parents=True)
    assert latest.same_target("models/t", str(tmp_path / "models/t"))
    assert not latest.same_target("models/t", "models/u")


def test_the_prompts_that_a_recipe_holds_out_are_found(config):
    assert latest.held_out() == []
    write("prompts/chat/held_out.jsonl", "")
    assert latest.held_out() == ["prompts/chat/held_out.jsonl"]  # of `nds data prompts`
    write("recipe/recipe.yaml", "target: [x]\nheld_out: [other.jsonl]\n")
    assert latest.held_out() == ["other.jsonl"]
    write("recipe/prompts/held_out.jsonl", "")
    assert latest.held_out() == ["recipe/prompts/held_out.jsonl"]


def parses(command):
    """Every command and option of ``command`` exists."""
    words = shlex.split(command)
    assert words.pop(0) == "nds"
    found = typer.main.get_command(cli.app)
    while words and hasattr(found, "commands") and words[0] in found.commands:
        found = found.commands[words.pop(0)]
    assert not hasattr(found, "commands"), command
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, command


RECIPE = f"target: {H_8B}\nprompts: prompts.jsonl\n"
FOLDERS = {
    "nothing": (lambda: None, "nds doctor"),
    "prompts": (lambda: write("prompts.jsonl", ""), "--prompts prompts.jsonl --dry-run"),
    "a set of prompts": (
        lambda: (write("prompts/chat/train.jsonl", ""), write("prompts/chat/held_out.jsonl", "")),
        "--prompts prompts/chat/train.jsonl --held-out prompts/chat/held_out.jsonl --dry-run",
    ),
    "answers": (lambda: write("answers/x.jsonl", ""), "--data answers/x.jsonl --dry-run"),
    "a cache": (lambda: cache("caches/a"), f"nds train --target {REPOSITORY}"),
    "a run that is begun": (lambda: run("runs/a", finished=False), "nds train --target"),
    "a draft": (lambda: run("runs/a"), "nds eval --target"),
    "a draft that was measured": (lambda: (run("runs/a"), write("runs/a/eval/eval.json", "{}")), "nds serve --target"),
    "a demo": (lambda: (run("runs/demo/run"), write("runs/demo/demo.json", "{}")), "nds serve --target"),
    "a recipe": (lambda: write("recipe.yaml", RECIPE), "nds recipe run --dry-run"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_nds_alone_shows_the_next_command(name, config, tmp_path):
    make, expected = FOLDERS[name]
    make()
    way = way_on()
    assert expected in way.next
    for command in (way.next, *(command for command, _ in way.others)):
        parses(command)
    said = CliRunner().invoke(cli.app, [])
    assert said.exit_code == 0
    assert way.next in said.stdout


def test_a_recipe_goes_on_and_a_finished_one_is_served(config):
    write("recipe.yaml", RECIPE)
    write("recipe/state.json", {"records": {"a": {"done": True}, "b": {"done": False}}})
    assert way_on().next == "nds recipe run"
    write("recipe/state.json", {"records": {"a": {"done": True}}})
    write("report.html", "")
    run("runs/a")
    assert way_on().next == f"nds serve --target {REPOSITORY} --draft runs/a/draft"
