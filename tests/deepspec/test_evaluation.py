"""DeepSpec's evaluator loop with our evaluators gives the accepted lengths of `nds eval`."""

import json
import types

import pytest
import torch

from nemotron_dspark.cache.reader import Sample
from nemotron_dspark.config import DraftSection, EvalConfig
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.config import build_draft_config, build_eagle3_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.evaluation.measure import conversation_ids, evaluate
from nemotron_dspark.training.batches import collate, collate_unrolled
from nemotron_dspark.training.eagle3_objective import Eagle3Objective
from nemotron_dspark.training.objective import DSparkObjective, LossWeights

TAPS = (1, 2, 3, 4, 5)
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with `eval_datasets/`, as DeepSpec looks for it in the working directory."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "eval_datasets").mkdir()
    rows = [{"turns": [f"state number {n}", "never asked"]} for n in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "eval_datasets" / "tiny.jsonl").write_text(text)
    return folder


def first_turns(target, datasets):
    """DeepSpec asks no others."""
    turns = conversation_ids(target, datasets / "eval_datasets" / "tiny.jsonl", new_tokens=NEW_TOKENS)
    return [each[0] for each in turns]


@pytest.fixture(scope="module")
def answers(target, datasets):
    """Prompts with the target's own greedy answers, and their hidden states: what a draft can learn by heart."""
    prompts = first_turns(target, datasets)
    plain, sampling = Decoder(target), Sampling(max_new_tokens=NEW_TOKENS)
    samples = []
    for ids in prompts:
        whole = torch.tensor([*ids, *plain.generate(ids, sampling).tokens])
        captured = target.capture(whole[None], None, TAPS)
        mask = torch.arange(len(whole)) >= len(ids) - 1
        samples.append(Sample(whole, mask, captured.taps[0], captured.last[0]))
    return samples


def dspark_step(draft, sample):
    anchors = torch.arange(len(sample.input_ids) - 1)[sample.loss_mask[:-1]]
    batch = collate([sample], [anchors], draft.config.block_size)
    return DSparkObjective(draft, LossWeights())(batch).value


def eagle3_step(draft, sample):
    return Eagle3Objective(draft)(collate_unrolled([sample], draft.config.ttt_length)).value


@pytest.fixture(scope="module", params=["dspark", "eagle3"])
def drafted(request, target, answers, tmp_path_factory):
    """Kind and folder of a draft that has learnt some of the answers."""
    section = DraftSection(taps=list(TAPS), num_layers=1, block_size=3, markov_rank=8, intermediate_size=64)
    if request.param == "dspark":
        draft, step = DSparkDraft(build_draft_config(target.spec, section, mask_token_id=31)[0]), dspark_step
    else:
        draft, step = Eagle3Draft(build_eagle3_config(target.spec, section, ttt_length=3)[0]), eagle3_step
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    optimiser = torch.optim.AdamW(draft.trainable_parameters().values(), lr=3e-3)
    for _ in range(15):
        for sample in answers:
            step(draft, sample).backward()
            optimiser.step()
            optimiser.zero_grad()
    folder = tmp_path_factory.mktemp(request.param) / "draft"
    draft.save(folder)
    return request.param, folder


def arguments(target, draft, tmp_path, temperature):
    return types.SimpleNamespace(
        target_name_or_path=str(target.folder),
        draft_name_or_path=str(draft),
        max_new_tokens=NEW_TOKENS,
        temperature=temperature,
        confidence_threshold=0.0,
        tensorboard_dir=str(tmp_path / "tensorboard"),
        step=7,
        seed=5,
        tasks=[("tiny", 500)],
    )


def test_accepted_lengths_are_those_of_nds_eval(
    deepspec_on_cpu, target, datasets, tmp_path, monkeypatch, capsys, drafted
):
    import nemotron_dspark.deepspec as bridge

    kind, folder = drafted
    monkeypatch.chdir(datasets)
    classes = {"dspark": "NemotronDSparkEvaluator", "eagle3": "NemotronEagle3Evaluator"}
    theirs = getattr(bridge, classes[kind])(0, arguments(target, folder, tmp_path, 0.0))
    theirs.evaluate()
    theirs.args.temperature = 1.0
    theirs.evaluate()

    prompts = first_turns(target, datasets)
    config = EvalConfig(temperatures=(0.0, 1.0), max_new_tokens=NEW_TOKENS, seed=5)
    found = evaluate(target, load_draft(folder, target), prompts, config)
    printed = capsys.readouterr().out
    assert found.lossless.identical == found.lossless.prompts
    assert found.measurements[0].accepted_length > 1.2  # rounds of different lengths are really counted
    for row, ours in zip(theirs.metrics_rows, found.measurements, strict=True):
        assert row["acceptance_length"] == pytest.approx(ours.accepted_length, abs=1e-12)
        assert f"{row['acceptance_length']:.2f}" in printed
    assert ("Confidence head reliability" in printed) == (kind == "dspark")
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_round_that_an_accepted_stop_token_ends_is_counted_as_deepspec_counts_it(deepspec_on_cpu):
    """Drafts behind an accepted stop token were not proposed, and such a round gains no token of the target's own."""
    from nemotron_dspark.deepspec.evaluators import _proposed

    generation = Generation(3, Sampling(max_new_tokens=99), frozenset({7}))
    Decoder._note(generation, 4, [1, 2, 3])  # two drafts kept of four, then the target's own
    Decoder._note(generation, 4, [1, 2, 3, 4, 7])  # all four kept; the stop token is the target's own
    assert (generation.accepted, generation.survived, _proposed(generation)) == ([3, 5], [2, 4], [4, 4])
    ended = Generation(3, Sampling(max_new_tokens=99), frozenset({7}))
    Decoder._note(ended, 4, [1, 7, 3, 4])  # the second draft is the stop token
    assert (ended.accepted, ended.survived, _proposed(ended)) == ([2], [2], [2])
