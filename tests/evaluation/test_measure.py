"""What `nds eval` reports is what the decoder did, and it says so when the output is not the same."""

import json

import pytest
import torch

from nemotron_dspark import cli
from nemotron_dspark.chat.format import Message, render_prompt
from nemotron_dspark.config import DraftSection, EvalConfig
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation.measure import evaluate, measure, prompt_ids, ratio_error, summarise
from nemotron_dspark.targets import Target


@pytest.fixture(scope="module")
def target(tiny_hybrid) -> Target:
    return Target.load(str(tiny_hybrid))


@pytest.fixture(scope="module")
def draft(target) -> DSparkDraft:
    config, _ = build_draft_config(
        target.spec, DraftSection(num_layers=1, block_size=3, taps=[0, 3], markov_rank=8), mask_token_id=5
    )
    draft = DSparkDraft(config)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.model.lm_head.weight)
    return draft.eval()


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"State {number} of the block"}) + "\n" for number in range(4)))
    return path


def test_every_turn_of_a_prompt_is_measured_after_the_targets_own_answers(target, draft, tmp_path):
    file, tokenizer = tmp_path / "prompts.jsonl", target.tokenizer
    rows = [{"turns": ["State of the block", "And then?", "So?"]}, {"prompt": "Another"}, {"prompt": "A third"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = prompt_ids(target, file, new_tokens=6, limit=2)
    messages = [Message("user", "State of the block")]
    for turn, asked in enumerate(["And then?", "So?"]):
        assert ids[turn] == render_prompt(tokenizer, messages)
        answer = Decoder(target).generate(ids[turn], Sampling(temperature=0.0, max_new_tokens=6)).tokens
        messages += [Message("assistant", tokenizer.decode(answer)), Message("user", asked)]
    assert ids[2:] == [render_prompt(tokenizer, messages), render_prompt(tokenizer, [Message("user", "Another")])]
    assert evaluate(target, draft, ids, EvalConfig(max_new_tokens=6)).lossless.prompts == 4


def finished(accepted: list[int], survived: list[int], tokens: int, seconds: float) -> Generation:
    generation = Generation(1, Sampling(), frozenset())
    generation.accepted, generation.survived, generation.proposed = accepted, survived, [3] * len(accepted)
    generation.tokens, generation.seconds, generation.finished = [7] * tokens, seconds, "length"
    return generation


def test_figures_follow_from_the_rounds():
    found = summarise(
        [finished([1, 4, 2], [0, 3, 1], 8, 2.0), finished([3], [2], 4, 1.0)], temperature=0.0, gamma=3, timed=True
    )
    assert found.accepted_length == (1 + 4 + 2 + 3) / 4
    assert found.per_position == (3 / 4, 2 / 4, 1 / 4)
    assert found.given_previous == (3 / 4, 2 / 3, 1 / 2)
    assert found.drafted == 3
    assert found.tokens_per_second == (7 + 3) / 3.0  # each answer's first token belongs to its prefill
    assert (found.prompts, found.rounds, found.tokens) == (2, 4, 12)


def test_the_standard_error_is_that_of_a_bootstrap_over_prompts():
    generator = torch.Generator().manual_seed(0)
    pairs = [(int(gained), int(rounds)) for gained, rounds in torch.randint(20, 60, (200, 2), generator=generator)]
    rows = torch.tensor(pairs, dtype=torch.float64)
    drawn = rows[torch.randint(0, 200, (4000, 200), generator=generator)].sum(1)
    assert ratio_error(pairs) == pytest.approx(float((drawn[:, 0] / drawn[:, 1]).std()), rel=0.05)
    assert ratio_error(pairs[:1]) is None


def test_a_threshold_cuts_blocks_and_not_the_output(target, draft, prompts_file):
    prompts = prompt_ids(target, prompts_file, new_tokens=12)
    whole = evaluate(target, draft, prompts, EvalConfig(max_new_tokens=12))
    with torch.no_grad():  # random weights: about a half is kept everywhere, so a half is cut by a threshold of a half
        draft.confidence_head.proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    cut = evaluate(target, draft, prompts, EvalConfig(max_new_tokens=12, schedule="threshold:0.5"))
    assert cut.lossless.identical == 4
    for before, after in zip(whole.measurements, cut.measurements, strict=True):
        assert before.drafted == 3
        assert 0 < after.drafted < 3


def test_evaluation_counts_identical_prompts_and_every_temperature(target, draft, prompts_file):
    prompts = prompt_ids(target, prompts_file, new_tokens=12)
    found = evaluate(target, draft, prompts, EvalConfig(max_new_tokens=12))
    assert (found.lossless.prompts, found.lossless.identical) == (4, 4)
    assert [measurement.temperature for measurement in found.measurements] == [0.0, 1.0]
    assert all(1 <= measurement.accepted_length <= 4 for measurement in found.measurements)
    assert found.plain_tokens_per_second > 0


def test_rows_measured_together_give_the_same_acceptance_as_alone(target, draft, prompts_file):
    prompts = prompt_ids(target, prompts_file)
    one, four = (EvalConfig(max_new_tokens=12, seed=3, batch_size=size) for size in (1, 4))
    alone = measure(target, draft, prompts, 1.0, one)
    together = measure(target, draft, prompts, 1.0, four)
    assert together.accepted_length == alone.accepted_length
    assert together.per_position == alone.per_position
    assert together.tokens_per_second is None


def test_a_difference_is_counted_and_located(target, draft, prompts_file, monkeypatch):
    """The second answer is spoilt in its fifth token, in speculative rounds only."""
    prompts = prompt_ids(target, prompts_file)
    right = Decoder._note

    def spoil(generation, proposed, new):
        at = 4 - len(generation.tokens)
        if proposed and generation.prompt_length == len(prompts[1]) and generation.prompt_ids == prompts[1]:
            new = [(token + 1) % 384 if place == at else token for place, token in enumerate(new)]
        right(generation, proposed, new)

    right_start = Decoder.start

    def start(self, ids, *arguments):
        generation = right_start(self, ids, *arguments)
        generation.prompt_ids = list(ids)
        return generation

    monkeypatch.setattr(Decoder, "start", start)
    monkeypatch.setattr(Decoder, "_note", staticmethod(spoil))
    found = evaluate(target, draft, prompts, EvalConfig(max_new_tokens=10, temperatures=(0.0,))).lossless
    assert found.identical == found.prompts - 1
    assert found.first_difference.startswith("prompt 1, token 4 ")


def test_prompts_that_leave_no_room_are_refused(target, prompts_file):
    with pytest.raises(InputError, match="leaves room"):
        prompt_ids(target, prompts_file, new_tokens=target.spec.max_position_embeddings)


def test_the_command_prints_one_json_object_and_writes_a_picture(
    target, draft, prompts_file, tmp_path, capsys, monkeypatch
):
    draft.save(tmp_path / "draft")
    arguments = ["eval", "-t", str(target.folder), "-d", str(tmp_path / "draft"), "-p", str(prompts_file), "--json"]
    arguments += ["--set", "eval.max_new_tokens=8", "--out", str(tmp_path / "out"), "--limit", "3"]
    monkeypatch.setattr("sys.argv", ["nds", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    value = json.loads(capsys.readouterr().out)
    assert value["lossless"] == {"prompts": 3, "identical": 3, "first_difference": None}
    assert set(value["tokens_per_second"]) == {"plain", "speculative", "speedup"}
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == value
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_the_target_in_half_precision_is_measured_too(tiny_hybrid, draft, prompts_file):
    half = Target.load(str(tiny_hybrid), dtype="bfloat16")
    drafting = DSparkDraft(draft.config)
    drafting.set_embeddings(half.model.get_input_embeddings().weight, half.model.lm_head.weight)
    drafting = drafting.to(torch.bfloat16).eval()
    found = evaluate(half, drafting, prompt_ids(half, prompts_file, limit=2), EvalConfig(max_new_tokens=6))
    assert found.lossless.prompts == 2
