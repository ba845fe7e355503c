"""`nds eval --lossless`: equal distributions pass, a wrong acceptance rule is found, and the power is as said."""

import json

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.config import load_config
from nemotron_dspark.config.run import DraftSection, ServeConfig
from nemotron_dspark.decoding import decoder as decoding
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.measure import evaluate_engine
from nemotron_dspark.errors import CheckError, InputError
from nemotron_dspark.evaluation import lossless
from nemotron_dspark.evaluation.lossless import compare, sampled_lossless
from nemotron_dspark.recipe import tiny
from nemotron_dspark.serving.listen import Server
from nemotron_dspark.targets import Target
from tests.engines.fakes import Fake, serving

PROMPTS = [[1, 4, 2], [3, 3]]
SETTINGS = {"temperature": 0.4, "seed": 0}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """One that prefers a few tokens: of evenly distributed ones none would be seen often enough."""
    model = tiny.random_model(tiny.decoder_config("llama", vocab_size=300), seed=5, spread=4.0)
    folder = tmp_path_factory.mktemp("small") / "target"
    return Target.load(str(tiny.save_target(folder, model, tiny.make_tokenizer(["a state of a block\n"] * 9, 300))))


@pytest.fixture(scope="module")
def draft(target):
    section = DraftSection(num_layers=1, block_size=3, taps=[0], markov_rank=4)
    draft = DSparkDraft(build_draft_config(target.spec, section, mask_token_id=5)[0], seed=2)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    return draft.eval()


def accept_everything(p, q, tokens, counts, uniforms, right=decoding.accept_sampled):
    return right(p, q * 0, tokens, counts, uniforms)


def test_a_right_draft_passes_and_one_that_is_believed_is_found(target, draft, monkeypatch):
    pair = Decoder(target), Decoder(target, draft)
    found = sampled_lossless(*pair, PROMPTS, 200, **SETTINGS)
    assert found.equal
    assert (found.prompts, found.answers, len(found.positions)) == (2, 200, lossless.TOKENS)
    monkeypatch.setattr(decoding, "accept_sampled", accept_everything)
    wrong = sampled_lossless(*pair, PROMPTS, 200, **SETTINGS)
    assert not wrong.equal
    assert wrong.positions[0].p_value > lossless.FALSE_ALARM  # the prompt's pass needs no draft
    assert wrong.p_value < 1e-6


def test_the_distribution_functions_are_scipys():
    for value, degrees, size in [
        (3.0, 2, 0.0),
        (40.0, 21, 0.0),
        (9.0, 1, 4.0),
        (300.0, 150, 90.0),
        (700.0, 300, 260.0),
    ]:
        expected = stats.ncx2.sf(value, degrees, size) if size else stats.chi2.sf(value, degrees)
        assert lossless._survival(value, degrees, size) == pytest.approx(float(expected), rel=1e-6)
    needed = lossless._noncentrality(12, 0.001, 0.9)
    assert stats.ncx2.sf(stats.chi2.isf(0.001, 12), 12, needed) == pytest.approx(0.9, abs=1e-6)


def samples(probabilities, count, generator):
    drawn = torch.multinomial(torch.tensor(probabilities), count * lossless.TOKENS, True, generator=generator)
    return [tuple(row) for row in drawn.view(count, lossless.TOKENS).tolist()]


def test_what_is_said_to_be_found_is_found_and_equal_ones_are_not():
    generator = torch.Generator().manual_seed(0)
    equal = [0.4, 0.3, 0.2, 0.1]
    alarms = sum(
        not compare([(samples(equal, 400, generator), samples(equal, 400, generator))], 1.0).equal for _ in range(60)
    )
    assert alarms <= 1  # one in a thousand is expected
    size = compare([(samples(equal, 400, generator), samples(equal, 400, generator))], 1.0).detectable
    moved = [0.4 + size / 2, 0.3 - size / 2, 0.2 - size / 2, 0.1 + size / 2]  # total variation of `size`
    seen = sum(
        not compare([(samples(equal, 400, generator), samples(moved, 400, generator))], 1.0).equal for _ in range(25)
    )
    assert seen >= 20  # the power is 0.9 at one position, and there are four


def test_answers_that_end_early_are_a_cell_and_rare_tokens_share_some():
    ended = [(1,)] * 50 + [(1, 2, 3, 4)] * 50
    longer = [(1, 2, 3, 4)] * 100
    found = compare([(ended, longer)], 1.0)
    assert found.positions[0].degrees == 0  # a single cell says nothing
    assert found.positions[1].p_value < 1e-6
    spread = [(token, 0, 0, 0) for token in range(400)]
    assert compare([(spread, spread)], 1.0).positions[0].degrees == 15
    odd = [(2 * token + 1, 0, 0, 0) for token in range(400)]
    assert not compare([(spread, odd)], 1.0).equal  # though no token is seen often


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_command_says_the_result_and_its_power(target, draft, tmp_path, monkeypatch):
    draft.save(tmp_path / "draft")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"State {number}"}) + "\n" for number in range(2)))
    asked = ["-t", target.folder, "-d", tmp_path / "draft", "-p", prompts, "--set", "eval.max_new_tokens=8"]
    asked += ["--set", "eval.temperatures=[0.4]"]
    told = run(*asked, "--lossless", 60)
    assert told.exit_code == 0, told.output
    assert "60 sampled answers to each of 2 prompts at temperature 0.4" in " ".join(told.stdout.split())
    assert "no difference was found" in " ".join(told.stdout.split())
    found = json.loads(run(*asked, "--lossless", 60, "--json").stdout)["sampled_lossless"]
    assert found["equal"]
    assert 0 < found["detectable"] < 1
    assert "sampled_lossless" not in json.loads(run(*asked, "--json").stdout)
    with pytest.raises(InputError, match="show nothing"):
        raise run(*asked, "--lossless", 5).exception
    monkeypatch.setattr(decoding, "accept_sampled", accept_everything)
    wrong = run(*asked, "--lossless", 120)
    assert isinstance(wrong.exception, CheckError)
    assert "distribution" in wrong.exception.what


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "What is a state?"}) + "\n")
    return path


def test_an_engines_url_is_tested_too_and_a_changed_token_is_found(prompts, tiny_llama):
    config = load_config(str(tiny_llama), eval={"max_new_tokens": 8, "temperatures": [0.0, 1.0]})
    with serving(Fake("vllm")) as url, serving(Fake("llamacpp", drafts=False)) as plain:
        found = evaluate_engine(config, url, prompts, plain_url=plain, lossless=30)
        assert found.sampled.equal
        found.check_lossless()
        with pytest.raises(InputError, match="does not leave its draft out"):
            evaluate_engine(config, url, prompts, lossless=30)
    with serving(Fake("vllm", changed_token=2)) as url, serving(Fake("llamacpp", drafts=False)) as plain:
        found = evaluate_engine(config, url, prompts, plain_url=plain, lossless=30)
        with pytest.raises(CheckError, match="not distributed"):
            found.check_lossless()


def test_nds_serve_is_measured_and_tested_by_its_url_alone(target, draft, prompts):
    config = load_config(eval={"max_new_tokens": 8, "temperatures": [0.0, 1.0]})
    with Server(target, draft, ServeConfig(port=0)) as server:
        found = evaluate_engine(config, server.base_url, prompts, lossless=40)
    assert found.sampled.equal
    assert (found.engine, found.plain.identical, found.plain.prompts) == ("nds serve", 1, 1)
    for each in found.measurements:
        assert each.rounds > 0
        assert each.accepted_length == pytest.approx(1 + sum(each.per_position))
