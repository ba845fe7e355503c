"""EAGLE-3: drafting token by token gives the numbers of training; the objective; what it refuses; lossless decoding."""

import pytest
import torch

from nemotron_dspark.config import DraftSection
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import Threshold
from nemotron_dspark.drafts.config import Eagle3Config, build_eagle3_config, read_draft_config
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Target
from nemotron_dspark.training.batches import collate_unrolled
from nemotron_dspark.training.eagle3_objective import Eagle3Objective
from tests.drafts.conftest import SHAPE
from tests.rows import join_rows
from tests.training.conftest import Sample

CONFIG = SHAPE | {"target_layer_ids": (0, 1, 2, 4, 6), "ttt_length": 4}


@pytest.fixture
def draft(request):
    """With all of the vocabulary, or the part that the test asks for."""
    part = getattr(request, "param", None)
    draft = Eagle3Draft(Eagle3Config(**CONFIG, draft_vocab_size=part and len(part)), seed=0)
    if part:
        draft.set_vocabulary(torch.tensor(part))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():
            if parameter.dim() > 1:
                parameter.mul_(5)
    draft.set_embeddings(*torch.randn(2, 97, 64, generator=generator))
    return draft.eval()


def sequence(rows=1, length=20, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 97, (rows, length), generator=generator),
        torch.randn(rows, length, 5 * 64, generator=generator),
    )


def batch_of(ids, mask, lengths, taps, last, steps=4):
    rows = zip(ids, mask, taps, last, lengths, strict=True)
    return collate_unrolled([Sample(*(part[: int(length)] for part in parts)) for *parts, length in rows], steps)


def test_drafting_gives_the_numbers_of_training_for_rows_of_any_length(draft):
    ids, taps = sequence(rows=3)
    lengths = (9, 5, 13)  # verified positions
    with torch.no_grad():
        trained = [draft.logits(hidden) for hidden in draft(ids, taps)]
    contexts = []
    for row, length in enumerate(lengths):  # in two pieces; the second has positions beyond the count
        context = draft.new_context()
        draft.extend(context, taps[row : row + 1, :4], [4], ids[row : row + 1, 1:5])
        draft.extend(context, taps[row : row + 1, 4 : length + 2], [length - 4], ids[row : row + 1, 5 : length + 3])
        contexts.append(context)
    together = join_rows(contexts).select([2, 0, 1])
    block, at = draft.begin(together, torch.zeros(3, dtype=torch.long)), [lengths[2], lengths[0], lengths[1]]
    for step in range(4):
        previous = torch.stack([ids[row, length + step] for row, length in zip((2, 0, 1), at, strict=True)])
        found = block.next_logits(previous)
        expected = torch.stack([trained[step][row, length - 1] for row, length in zip((2, 0, 1), at, strict=True)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft", [None, range(2, 97, 3)], ids=["all-tokens", "a-third"], indirect=True)
def test_the_objective_is_its_formula_in_plain_loops(draft):
    ids, taps = sequence(rows=2, length=12)
    lengths = torch.tensor([12, 8])
    mask = torch.arange(12) >= torch.tensor([[3], [2]])
    mask &= torch.arange(12) < lengths[:, None]
    mask[0, 6] = False
    last = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3))
    loss = Eagle3Objective(draft)(batch_of(ids, mask, lengths, taps, last))
    expected, counted, accepted = 0.0, [0, 0, 0, 0], 0.0
    kept = torch.arange(97) if draft.vocabulary is None else draft.vocabulary
    for step, hidden in enumerate(draft(ids, taps)):
        for row in range(2):
            for position in range(12 - step):
                at = position + step
                if not mask[row, at] or at >= lengths[row] - 1:
                    continue
                q = torch.softmax(draft.target_head @ last[row, at + 1], -1)[kept]
                log_p = torch.log_softmax(draft.logits(hidden[row, position]), -1)
                expected = expected - 0.8**step * (q * log_p).sum() / 24
                counted[step] += 1
                accepted += float(torch.minimum(q, log_p.exp()).sum().detach())
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert loss.sums.slots.tolist() == counted
    assert float(loss.sums.accepted.sum()) == pytest.approx(accepted, rel=1e-4)
    parameters = draft.trainable_parameters()
    plain = torch.autograd.grad(expected, list(parameters.values()))
    loss.value.backward()
    for (name, parameter), gradient in zip(parameters.items(), plain, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_padding_and_what_lies_behind_it_change_nothing(draft):
    ids, taps = sequence(length=12)
    mask, last = torch.ones(1, 12, dtype=torch.bool), torch.randn(1, 12, 64)
    objective = Eagle3Objective(draft)
    short = objective(batch_of(ids, mask, [8], taps, last))
    ids, mask, taps, last = (part.repeat(2, *[1] * (part.dim() - 1)) for part in (ids, mask, taps, last))
    mask[1] = False
    long = objective(batch_of(ids, mask, [8, 12], taps, last))
    # A sequence is divided by all its positions, padding included, as DeepSpec's is.
    torch.testing.assert_close(long.total * 12, short.total * 8)


def test_a_folder_is_read_back_and_recognised(draft, tmp_path):
    draft.save(tmp_path)
    assert isinstance(read_draft_config(tmp_path), Eagle3Config)
    again = Eagle3Draft.load(tmp_path)
    assert again.config == draft.config
    for name, value in draft.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_layer_ids": (1, 2, 3, 4)}, "exactly five"),
        ({"target_layer_ids": (-1, 2, 3, 4, 5)}, "exactly five"),
        ({"ttt_length": 0}, "ttt_length = 0 .* greater than 0"),
        ({"step_loss_decay": 0.0}, "step_loss_decay = 0.0 .* greater than 0"),
    ],
)
def test_impossible_shapes_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        Eagle3Config(**(CONFIG | changes))


def test_greedy_decoding_with_eagle3_is_lossless_in_a_batch(tiny_hybrid, tmp_path):
    target = Target.load(str(tiny_hybrid))
    section = DraftSection(taps=[1, 2, 3, 4, 5], intermediate_size=64)
    made = Eagle3Draft(build_eagle3_config(target.spec, section, ttt_length=3)[0], seed=1)
    made.save(tmp_path, slim=True)
    draft = load_draft(tmp_path, target)
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    prompts = [list(range(40, 40 + length)) for length in (3, 40, 11)]
    plain = [Decoder(target).generate(ids, sampling).tokens for ids in prompts]
    decoder = Decoder(target, draft)
    running = [decoder.start(ids, sampling) for ids in prompts]
    while any(generation.finished is None for generation in running):
        decoder.step(running)
    assert [generation.tokens for generation in running] == plain
    with pytest.raises(InputError, match="no confidence head"):
        Decoder(target, draft, schedule=Threshold(0.5))
