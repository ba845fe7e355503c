"""Presets read open data sets in the shapes they have on the hub; here, folders of the same layout and columns."""

import json

import pytest
import typer
from typer.testing import CliRunner

from nemotron_dspark.data.overlap import Overlap
from nemotron_dspark.data.presets import EVALUATION, PRESETS, convert, write_prompts
from nemotron_dspark.data.prompts import Prompt, read_prompts
from nemotron_dspark.errors import EnvironmentFault, InputError

NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def said(role, content, **more):
    return {"role": role, "content": content} | more


def shared(value):
    return {"from": value[0], "value": value[1]}


def row_of(name, split, n):
    """A row with the columns of the data set."""
    text = f"{name} {split} asks number {n}"
    if "perfectblend" in name or "OpenThoughts" in name:
        return {"conversations": [shared(("human", text)), shared(("gpt", "Answer."))], "source": "s"}
    if "hermes" in name:
        turns = [("system", "Call <tools>."), ("human", text), ("gpt", "<tool_call>"), ("tool", "5"), ("gpt", "Five.")]
        return {"id": str(n), "conversations": [*map(shared, turns)], "tools": json.dumps([{"name": "f"}]), "task": "t"}
    if "Agentic" in name:
        arguments = {"city": "Rome"} if n % 2 else {"n": n, "deep": [1]}
        call = {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [said("user", text), said("assistant", None, tool_calls=[call], reasoning_content="hm")]
        turns += [said("tool", "5", tool_call_id=f"c{n}"), said("assistant", "Five.")]
        return {"uuid": str(n), "messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}
    if "CodeFeedback" in name:
        return {"query": text, "answer": "Answer.", "resource": "r", "lang": "python"}
    if "mt_bench" in name:
        return {"category": "writing", "prompt": [text, "And now?"], "prompt_id": n, "reference": []}
    if "humaneval" in name:
        return {"task_id": str(n), "prompt": text, "canonical_solution": "", "test": ""}
    if "gsm8k" in name:
        return {"question": f"{text}: {NUMBERS}", "answer": "#### 5"}
    if "MATH-500" in name:
        return {"problem": text, "solution": "", "answer": "5", "level": 1}
    return {"messages": [said("user", text), said("assistant", "Answer.")], "category": "chat", "metadata": "{}"}


@pytest.fixture
def hub(tmp_path):
    """Folders as `hf download` makes them of every set, with 12 rows in each split."""

    def change(known, split, rows):
        folder = tmp_path / "hub" / known.name
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for known in [known for sets in (*PRESETS.values(), EVALUATION) for known in sets]:
        folder = tmp_path / "hub" / known.name
        for split in known.splits:
            change(known, split, [row_of(known.name, split, n) for n in range(12)])
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        files = "".join(f"  - split: {split}\n    path: {split}/*.jsonl\n" for split in splits)
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {known.config or 'default'}\n  data_files:\n{files}---\n"
        )
    change.folder = tmp_path / "hub"
    return change


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_becomes_prompts_of_all_its_sets(hub, tmp_path, preset):
    report = write_prompts(preset, tmp_path / "out", held_out=0.2, local=hub.folder)
    total = 12 * sum(len(known.splits) for known in PRESETS[preset])
    assert (report.train + report.held_out, report.doubled, report.skipped.total) == (total, 0, 0)
    assert report.train > report.held_out > 0
    found = [prompt for file in (report.train_file, report.held_out_file) for prompt in read_prompts(file)]
    assert all(isinstance(prompt, Prompt) for prompt in found)
    assert len({prompt.id for prompt in found}) == total
    assert bool(found[0].called) == bool(found[0].tools) == (preset == "agentic")
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert [source["licence"] for source in about["sources"]] == [known.licence for known in PRESETS[preset]]


def test_answers_are_left_out_and_calls_with_results_stay():
    prompt, line = convert(row_of("mlabonne/open-perfectblend", "train", 1))
    assert line == {"messages": [{"role": "user", "content": prompt.first[0].content}]}
    _, line = convert(row_of("nvidia/Nemotron-Agentic-v1", "tool_calling", 1))
    assert [turn["role"] for turn in line["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert line["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert line["tools"][0]["function"]["name"] == "f"


def test_doubles_and_evaluation_prompts_are_left_out(hub, tmp_path):
    known = PRESETS["code"][0]
    texts = ["How do I sort?", "how do I   SORT", f"Tell me: {NUMBERS}!", f"Tell me: {NUMBERS[:40]}", "my own secret"]
    hub(known, "train", [{"query": text, "answer": "a"} for text in texts])
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"prompt": "My own secret?"}) + "\n")
    report = write_prompts("code", tmp_path / "out", held_out=0.0, against=str(mine), local=hub.folder)
    assert report.doubled == 1
    assert report.overlapping == {"GSM8K": 1, str(mine): 1}
    assert report.checked_against == {"MT-Bench": 12, "HumanEval": 12, "GSM8K": 12, "MATH-500": 12, str(mine): 1}
    assert [source["prompts"] for source in report.sources] == [2, 12]


def test_a_limit_is_shared_by_the_sets(hub, tmp_path):
    report = write_prompts("chat", tmp_path / "out", limit=9, local=hub.folder)
    assert [source["prompts"] for source in report.sources] == [3, 3, 3]


def test_an_overlap_is_thirteen_words_in_a_row_or_a_whole_short_prompt():
    overlap = Overlap()
    overlap.add("set", [NUMBERS, "What is two plus two?"])
    assert overlap.with_text(f"zero, {NUMBERS.upper()}...") == "set"
    assert overlap.with_text(" ".join(NUMBERS.split()[:12])) is None
    assert overlap.with_text("what is two plus two") == "set"
    assert overlap.with_text("First: what is two plus two?") is None


def test_what_is_wrong_is_said(hub, tmp_path):
    with pytest.raises(InputError, match="no preset poems"):
        write_prompts("poems", tmp_path / "out", local=hub.folder)
    with pytest.raises(InputError, match="none of the data sets"):
        write_prompts("chat", tmp_path / "out", revisions={"a/b": "c"}, local=hub.folder)
    with pytest.raises(InputError, match="mt_bench_prompts is not there"):
        write_prompts("chat", tmp_path / "out", local=tmp_path)
    write_prompts("chat", tmp_path / "out", limit=9, local=hub.folder)
    with pytest.raises(InputError, match="there already"):
        write_prompts("chat", tmp_path / "out", local=hub.folder)


def test_a_commit_that_is_asked_for_is_the_one_that_is_read(monkeypatch, tmp_path):
    from nemotron_dspark.data import presets

    asked = {}

    def load(text, name, config, *, split, streaming, revision):
        asked[name] = revision
        rows = [row_of(name, split, n) for n in range(3)]
        return type("Rows", (list,), {"shuffle": lambda self, seed, buffer_size: self})(rows)

    monkeypatch.setattr(presets, "load_data_set", load)
    monkeypatch.setattr(presets, "_newest", lambda name: "newest")
    report = write_prompts("code", tmp_path / "out", revisions={"mlabonne/open-perfectblend": "mine"})
    assert asked["mlabonne/open-perfectblend"] == "mine"
    assert asked["m-a-p/CodeFeedback-Filtered-Instruction"] == "newest"
    assert asked["HuggingFaceH4/MATH-500"] == EVALUATION[-1].revision
    assert [source["revision"] for source in report.sources] == ["newest", "mine"]


def test_the_command_lists_the_presets_and_writes_one(hub, tmp_path):
    from nemotron_dspark.cli import data_command

    app = typer.Typer()
    data_command.register(app)

    def nds(*words):
        return CliRunner().invoke(app, ["data", "prompts", *map(str, words)])

    listed = nds().stdout
    assert all(preset in listed for preset in PRESETS)
    assert "not pinned" in listed
    result = nds("--preset", "chat", "--out", tmp_path / "out", "--local", hub.folder, "--json")
    assert json.loads(result.stdout)["train"] > 0


def test_a_hub_that_cannot_be_reached_is_an_environment_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="cannot be reached"):
        write_prompts("chat", tmp_path / "out")
