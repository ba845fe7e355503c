"""Data may be given as several files, globs and data sets; a held-out part is always the same one."""

import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from nemotron_dspark.cli import data_command
from nemotron_dspark.data.check import check_data
from nemotron_dspark.data.conversations import read
from nemotron_dspark.data.sources import one_file
from nemotron_dspark.data.split import split
from nemotron_dspark.errors import EnvironmentFault, InputError


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


def row(number, **more):
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}], **more}


def write(path, *rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + end)
    return path


def asked(path):
    return [conversation.messages[0].content for conversation in read(path)]


def test_one_file_of_json_lines_is_used_where_it_lies(tmp_path, caches):
    file = write(tmp_path / "a.jsonl", row(1))
    assert one_file(file) == one_file([str(file)]) == file
    assert not caches.exists()


def test_several_files_and_globs_become_one_in_their_order(tmp_path):
    last = write(tmp_path / "z.jsonl", row(0), end="")
    write(tmp_path / "parts" / "b.jsonl", row(2))
    write(tmp_path / "parts" / "a.jsonl", row(1))
    (tmp_path / "list.json").write_text(json.dumps([row(3), row(4)]))
    joined = one_file([last, f"{tmp_path}/parts/*.jsonl", tmp_path / "list.json"])
    assert asked(joined) == ["q0", "q1", "q2", "q3", "q4"]
    assert one_file([last, f"{tmp_path}/parts/*.jsonl", tmp_path / "list.json"]) == joined
    write(last, row(9))
    assert asked(one_file([last, last])) == ["q9", "q9"]


def test_a_data_set_is_a_folder_a_table_or_a_name_with_configuration_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows = [row(1), row(2)]
    rows[1]["messages"][1]["tool_calls"] = [call]  # a table gives every turn such a field
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    assert asked(one_file(tmp_path / "table.parquet")) == ["q1", "q2"]
    (first, second) = read(one_file(tmp_path / "table.parquet"))
    assert (first.messages[1].more, second.messages[1].more["tool_calls"][0]["id"]) == ({}, "1")
    write(tmp_path / "org" / "name" / "train.jsonl", row(3))
    write(tmp_path / "org" / "name" / "test.jsonl", row(4))
    monkeypatch.chdir(tmp_path)
    assert asked(one_file("org/name")) == ["q3"]
    assert asked(one_file("org/name::test")) == ["q4"]
    assert asked(one_file("org/name:default:train")) == ["q3"]
    assert asked(one_file(["org/name", "table.parquet"])) == ["q3", "q1", "q2"]
    with pytest.raises(InputError, match="cannot be read"):
        one_file("org/name::other")


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"gone\.jsonl is not a file"):
        one_file([write(tmp_path / "a.jsonl", row(1)), tmp_path / "gone.jsonl"])
    with pytest.raises(InputError, match=r"No file matches .*x\*\.jsonl"):
        one_file(f"{tmp_path}/x*.jsonl")
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        EnvironmentFault, match="some/set is no file here, and the data set of that name cannot be reached"
    ):
        one_file("some/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"datasets is not installed.*nemotron-dspark\[data\]"):
        one_file("some/set")


def test_a_check_of_several_files_names_them(tmp_path):
    files = [write(tmp_path / name, row(1)) for name in ("a.jsonl", "b.jsonl")]
    report = check_data(files)
    assert (report.conversations, report.file) == (2, f"{files[0]}, {files[1]}")


def test_a_split_goes_by_what_is_asked(tmp_path):
    rows = [row(number, id=number) for number in range(400)]
    found = split(write(tmp_path / "data.jsonl", *rows), tmp_path / "one", 0.25)
    assert found.train + found.held_out == 400
    assert 70 < found.held_out < 130
    held = asked(found.held_out_file)
    assert not set(held) & set(asked(found.train_file))
    assert (found.train_file.read_text() + found.held_out_file.read_text()).count("\n") == 400
    # answered again, sorted otherwise, more of them, as prompts: the same side
    other = [{"prompt": f"q{number}"} for number in reversed(range(500))]
    again = split(write(tmp_path / "prompts.jsonl", *other), tmp_path / "two", 0.25)
    prompts = [json.loads(line)["prompt"] for line in again.held_out_file.read_text().splitlines()]
    assert {text for text in prompts if int(text[1:]) < 400} == set(held)


def test_a_split_loses_nothing(tmp_path):
    file = write(tmp_path / "data.jsonl", *[row(number) for number in range(40)])
    app = typer.Typer()
    data_command.register(app)
    words = ["data", "split", str(file), "--out", str(tmp_path / "s"), "--held-out", "0.5"]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert sum(json.loads(result.stdout)[side] for side in ("train", "held_out")) == 40
    with pytest.raises(InputError, match=r"train\.jsonl is there already"):
        split(file, tmp_path / "s", 0.5)
    with pytest.raises(InputError, match="40 lines, of which 0 would be held out"):
        split(file, tmp_path / "t", 0.0)
    assert not (tmp_path / "t").exists()
