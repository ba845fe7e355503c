"""Drafts side by side: what is measured adds up, prompts are made long, and what cannot be compared is refused."""

import json

import pytest
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.config import build_draft_config, build_eagle3_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation import comparison
from nemotron_dspark.evaluation.comparison import lengthened
from nemotron_dspark.targets import Checkpoint
from tests.engines.fakes import KEPT, Fake, serving

SECTION = DraftSection(num_layers=1, block_size=3, markov_rank=4, intermediate_size=32, taps=[1, 2, 3, 4, 5])


@pytest.fixture(scope="module")
def drafts(tiny_hybrid, tmp_path_factory):
    """A slim draft of each kind for the tiny hybrid."""
    spec, folder = Checkpoint.find(tiny_hybrid).read_spec(), tmp_path_factory.mktemp("runs")
    for kind in ("dspark", "dflash"):
        section = SECTION.model_copy(update={"kind": kind})
        DSparkDraft(build_draft_config(spec, section, mask_token_id=31)[0]).save(folder / kind / "draft", slim=True)
    Eagle3Draft(build_eagle3_config(spec, SECTION, ttt_length=3)[0]).save(folder / "eagle3" / "draft", slim=True)
    return [folder / kind / "draft" for kind in ("dspark", "dflash", "eagle3")]


@pytest.fixture
def prompts(tmp_path):
    for name in ("chat", "code"):
        rows = [json.dumps({"prompt": f"{name} {number}"}) for number in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return [tmp_path / "chat.jsonl", tmp_path / "code.jsonl"]


def nds(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def options(name, values):
    return [part for value in values for part in (name, value)]


def test_drafts_of_every_kind_stand_side_by_side(tiny_hybrid, drafts, prompts, tmp_path):
    common = ("--target", tiny_hybrid, *options("-d", drafts), *options("-p", prompts), "--context-lengths", "40,64")
    settings = ("--set", "eval.max_new_tokens=6", "--set", "eval.temperatures=[0.0,1.0]")
    run = nds("compare", *common, *settings, "--out", tmp_path / "out", "--json")
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert list(found["drafts"]) == ["dspark", "dflash", "eagle3"]
    assert found["drafts"]["dflash"].startswith("DFlash, ")
    rows = [(row["workload"], row["length"], row["draft"]) for row in found["rows"]]
    assert rows == [(w, n, d) for w in ("chat", "code") for n in (40, 64) for d in found["drafts"]]
    for row in found["rows"]:
        assert row["prompt_tokens"] == row["length"]
        assert row["lossless"] == {"prompts": 2, "identical": 2, "first_difference": None}
        greedy, sampled = row["measurements"]
        assert (greedy["temperature"], sampled["temperature"]) == (0.0, 1.0)
        assert row["tokens_per_second"] == pytest.approx(row["speedup"] * row["plain_tokens_per_second"])
        assert row["cost"] > 0
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found
    for name in ("compare.png", "lengths.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_an_engine_is_one_more_row(tiny_hybrid, drafts, prompts):
    common = ("compare", "--target", tiny_hybrid, "-d", drafts[0], "-p", prompts[0], "--set", "eval.temperatures=[]")
    with serving(Fake("sglang")) as url:
        run = nds(*common, "--engine", url, "--set", "eval.max_new_tokens=4", "--json")
        assert run.exit_code == 0, run.output
        found = json.loads(run.stdout)
        own, engine = found["rows"]
        assert (own["draft"], engine["draft"]) == ("dspark", url)
        assert "SGLang" in found["drafts"][url]
        assert engine["measurements"][0]["accepted_length"] == 1 + KEPT
        assert engine["lossless"]["identical"] == 0  # it makes up its answers
        assert engine["cost"] is engine["speedup"] is None
        shown = nds(*common, "--engine", url, "--set", "eval.max_new_tokens=4")
        assert shown.exit_code == 0, shown.output
        assert "3.00" in shown.stdout


def test_what_is_printed_names_every_draft_and_none(tiny_hybrid, drafts, prompts):
    settings = ("--set", "eval.max_new_tokens=4", "--set", "eval.temperatures=[]")
    run = nds("compare", "--target", tiny_hybrid, *options("-d", drafts), "-p", prompts[0], *settings)
    assert run.exit_code == 0, run.output
    for name in ("none", "dspark", "dflash", "eagle3", "2/2"):
        assert name in run.stdout


def test_nds_eval_measures_one_draft_by_context_length(tiny_hybrid, drafts, prompts, tmp_path):
    common = ("eval", "--target", tiny_hybrid, "-d", drafts[0], "-p", prompts[0], "--set", "eval.temperatures=[]")
    lengths = ("--context-lengths", "24,32", "--set", "eval.max_new_tokens=4", "--out", tmp_path)
    run = nds(*common, *lengths, "--json")
    assert run.exit_code == 0, run.output
    assert [(row["length"], row["prompt_tokens"]) for row in json.loads(run.stdout)["rows"]] == [(24, 24), (32, 32)]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    for more, said in ((("--lossless", 10), "Both"), (("--context-lengths", "24,long"), "not a list of numbers")):
        run = nds(*common, *lengths, *more)
        assert isinstance(run.exception, InputError)
        assert said in str(run.exception)


def test_prompts_are_made_long_by_others_before_them():
    prompts = [[1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11]]
    (group,) = lengthened("w", prompts, [5])
    assert group.prompts == [[3, 4, 5, 1, 2][-5:], [10, 11, 3, 4, 5]]  # the third is longer and left out
    (group,) = lengthened("w", [[1, 2]], [5])
    assert group.prompts == [[2, 1, 2, 1, 2]]
    (group,) = lengthened("w", prompts, ())
    assert (group.label, group.prompts) == ("w", prompts)
    with pytest.raises(InputError, match="longer than 1 tokens"):
        lengthened("w", prompts, [1])


def test_a_draft_that_changes_the_output_is_an_error(tiny_hybrid, drafts, prompts, monkeypatch):
    said = comparison.Lossless(2, 1, "prompt 0, token 3")
    monkeypatch.setattr(comparison, "lossless_of", lambda *_: said)
    settings = ("--set", "eval.max_new_tokens=4", "--set", "eval.temperatures=[]")
    run = nds("compare", "--target", tiny_hybrid, "-d", drafts[0], "-p", prompts[0], *settings)
    assert run.exit_code != 0
    assert "dspark on chat" in str(run.exception)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--context-lengths", 10**6], "are more than the target's"),
        (["-d", "SAME"], "given twice"),
        (["-d", "no"], "not a draft"),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny_hybrid, drafts, prompts, more, said):
    more = [drafts[0] if part == "SAME" else part for part in more]
    run = nds("compare", "--target", tiny_hybrid, "-d", drafts[0], "-p", prompts[0], *more)
    assert isinstance(run.exception, InputError)
    assert said in str(run.exception)
