"""`nds profile` measures every cell, writes tables that say what was measured, and a draft is read with them."""

import json

import pytest
import torch

from nemotron_dspark import cli, stages
from nemotron_dspark.config import DraftSection, load_config
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.costs import CostTable, read_costs
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation.expected import assumed_survival, expected, sentences
from nemotron_dspark.evaluation.profile import Profile, measure_costs
from nemotron_dspark.targets import Target

GAMMA = 3


@pytest.fixture(scope="module")
def target(tiny_hybrid):
    return Target.load(str(tiny_hybrid))


@pytest.fixture
def draft_folder(target, tmp_path):
    section = DraftSection(num_layers=1, block_size=GAMMA, markov_rank=4, num_taps=2)
    draft = DSparkDraft(build_draft_config(target.spec, section, mask_token_id=31)[0], seed=1)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    draft.save(tmp_path / "draft")
    return tmp_path / "draft"


def profile_of(rows: tuple[int, ...], cost, draft: float = 0.0) -> Profile:
    """One of a machine on which ``cost(B, tokens)`` seconds go into a pass."""
    verify = tuple(tuple(cost(count, count * (k + 1)) for k in range(GAMMA + 1)) for count in rows)
    costs = CostTable(rows, verify, ((0.0, *[draft] * GAMMA),) * len(rows))
    around = tuple(tuple((each, each) for each in line) for line in verify)
    return Profile("t", "d", "m", 1, "torch.float32", 64, 3, costs, around, around)


def test_the_command_measures_every_cell_and_the_draft_is_loaded_with_it(target, draft_folder, capsys):
    arguments = ["profile", "-t", target.folder, "-d", draft_folder, "--requests", "2,1", "--context", "20"]
    assert cli.app(list(map(str, [*arguments, "--seconds", "0", "--json"])), standalone_mode=False) in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["context"], found["repeats"]) == ([1, 2], 20, 3)
    assert all(len(line) == GAMMA + 1 and min(line) > 0 for line in found["verify_seconds"])
    assert all(line[0] == 0 and min(line[1:]) > 0 for line in found["draft_seconds"])
    for line, around in zip(found["verify_seconds"], found["verify_quartiles"], strict=True):
        assert all(low <= middle <= high for middle, (low, high) in zip(line, around, strict=True))
    written = {path.name for path in (draft_folder / "profile").iterdir()}
    assert {"profile.json", "sglang_cost_table.json", "tensorrt_llm_cost_table.json"} <= written
    assert load_draft(draft_folder, target).costs.rows == (1, 2)
    path = draft_folder / "profile" / "profile.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": [1]}))
    with pytest.raises(InputError, match="does not hold"):
        load_draft(draft_folder, target)


def test_requests_that_the_memory_does_not_hold_are_left_out(target, monkeypatch):
    monkeypatch.setattr("nemotron_dspark.evaluation.profile.available_memory", lambda: 0)
    found = measure_costs(target, None, 1, rows=(1, 2, 4), context=8, seconds=0)
    assert found.costs.rows == (1,)
    assert "2 and more" in found.left_out
    with pytest.raises(InputError, match="leaves no room"):
        measure_costs(target, None, 1, context=10**6)


def test_costs_lie_on_the_line_between_measured_numbers_of_requests():
    costs = CostTable((1, 4, 8), ((1.0, 2.0), (4.0, 8.0), (4.0, 12.0)), ((0.0, 1.0), (0.0, 1.0), (0.0, 3.0)))
    assert costs.rounds(1) == [1.0, 3.0]
    assert costs.rounds(2) == pytest.approx([2.0, 5.0])
    assert costs.rounds(6) == pytest.approx([4.0, 12.0])
    assert costs.rounds(16) == pytest.approx([4.0, 27.0])
    assert costs.speeds(4, [0.5]) == pytest.approx([1.0, 4 * 1.5 / 9])


def test_the_engines_tables_give_back_an_additive_machine():
    """SGLang adds bias, alpha and theta of the nearest probes; TensorRT-LLM three columns of milliseconds."""
    found = profile_of((1, 2, 4, 8), lambda rows, tokens: 0.010 + 0.001 * rows + 0.002 * max(tokens, 4), draft=0.003)
    sglang, tensorrt = found.sglang(), found.tensorrt_llm()
    alpha = dict(zip(sglang["bs_probes"], sglang["alpha_seconds"], strict=True))
    theta = dict(zip(sglang["m_probes"], sglang["theta_seconds"], strict=True))
    steps = dict(zip(tensorrt["token_counts"], tensorrt["step_time_ms"], strict=True))
    overhead = dict(zip(tensorrt["batch_sizes"], tensorrt["batch_overhead_ms"], strict=True))
    for rows in (1, 2, 4, 8):
        for tokens in (rows * (k + 1) for k in range(GAMMA + 1)):
            expected = 0.003 + 0.010 + 0.001 * rows + 0.002 * max(tokens, 4)
            assert sglang["bias_seconds"] + alpha[rows] + theta[tokens] == pytest.approx(expected)
            assert tensorrt["fixed_overhead_ms"] + steps[tokens] + overhead[rows] == pytest.approx(1e3 * expected)
    assert (alpha[1], theta[1]) == (0, 0)
    assert sglang["bias_seconds"] > 0
    assert min(tensorrt["step_time_ms"]) > 0
    assert sglang["m_probes"] == sorted(set(sglang["m_probes"]))


def test_a_table_of_other_blocks_is_refused(tmp_path):
    profile_of((1, 2), lambda rows, tokens: 0.1).save(tmp_path)
    assert read_costs(tmp_path, GAMMA).rows == (1, 2)
    assert read_costs(tmp_path / "profile.json").gamma == GAMMA
    with pytest.raises(InputError, match="blocks of 3 tokens, the draft's have 7"):
        read_costs(tmp_path, 7)
    with pytest.raises(InputError, match="does not exist"):
        read_costs(tmp_path / "other")


def test_the_best_length_is_the_one_with_most_tokens_a_second():
    costs = CostTable((1, 8), ((1.0, 1.2, 1.4, 1.6), (1.0, 2.0, 3.0, 4.0)), ((0.0, 0.1, 0.1, 0.1),) * 2)
    alone, together = expected(costs, {"greedy": [0.8, 0.5, 0.1]})
    assert alone.tokens_per_second == pytest.approx((1.0, 1.8 / 1.3, 2.3 / 1.5, 2.4 / 1.7))
    assert (alone.best, together.best) == (2, 0)
    assert alone.gain == pytest.approx(2.3 / 1.5)
    assert sentences([alone, together]) == ["greedy: best num_speculative_tokens by requests: 2 at 1, none at 8."]


@pytest.mark.parametrize("tokens", [1.0, 2.2, 3.9])
def test_assumed_shares_add_up_to_the_assumed_tokens(tokens):
    shares = assumed_survival(tokens, GAMMA)
    assert 1 + sum(shares) == pytest.approx(tokens)
    assert list(shares) == sorted(shares, reverse=True)


def test_an_evaluation_of_a_profiled_draft_expects_speeds_from_its_own_shares(target, draft_folder, tmp_path):
    profile = profile_of((1, 4), lambda rows, tokens: 0.1 + 0.01 * tokens)
    profile.save(draft_folder / "profile")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What?"}\n{"prompt": "State."}\n')
    settings = {"max_new_tokens": 6, "temperatures": [0.0]}
    config = load_config(str(target.folder), eval=settings)
    report = stages.evaluate(config, draft_folder, tmp_path / "prompts.jsonl", target=target)
    shares = report.evaluation.measurements[0].per_position
    assert [each.rows for each in report.expected] == [1, 4]
    assert report.expected[1].tokens_per_second == pytest.approx(profile.costs.speeds(4, shares))
    assert report.to_json()["expected"][0]["best_num_speculative_tokens"] == report.expected[0].best
    cut = load_config(str(target.folder), eval=settings | {"schedule": "cost"})
    assert stages.evaluate(cut, draft_folder, tmp_path / "prompts.jsonl", target=target).expected == ()


def test_a_plan_has_the_measured_rounds(target, tmp_path, capsys):
    profile_of((1, 8), lambda rows, tokens: 0.1 + 0.01 * tokens).save(tmp_path)
    arguments = ["plan", "-t", target.folder, "--samples", 10, "--mean-length", 20, "-m", "dgx-spark"]
    assert cli.app(list(map(str, [*arguments, "--profile", tmp_path])), standalone_mode=False) in (0, None)
    said = capsys.readouterr().out
    assert "3 tokens a round of 3: best num_speculative_tokens by requests: 3 at 1" in said
    assert cli.app(list(map(str, [*arguments, "--json"])), standalone_mode=False) in (0, None)
    assert json.loads(capsys.readouterr().out)["expected"] == []


def test_measuring_leaves_no_trace_in_the_targets_numbers(target):
    """Copies of one request are behind the same context."""
    ids = torch.tensor([[40, 41, 42]])
    before = target.capture(ids, None, ()).last
    measure_costs(target, None, 1, rows=(1, 2), context=8, seconds=0)
    assert torch.equal(target.capture(ids, None, ()).last, before)
