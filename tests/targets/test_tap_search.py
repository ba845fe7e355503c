"""The search solves what it says, finds the layers that carry the signal, and reports on what it did not fit."""

import dataclasses

import pytest
import torch

from nemotron_dspark.recipe.tiny import nemotron_h_config
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.tap_search import CHOOSE, FIT, REPORT, Ridge, TapData, search

ROWS, PER_CONVERSATION, LAYERS, WIDTH, AHEAD, OUT = 1200, 12, 5, 6, 3, 4


@pytest.fixture
def spec():
    return TargetSpec.from_config(nemotron_h_config("M-*-M-").to_dict())


@pytest.fixture
def noise():
    """Rows in which no layer says anything."""
    generator = torch.Generator().manual_seed(0)
    return TapData(
        torch.randn(ROWS, LAYERS, WIDTH, generator=generator) * torch.tensor([1.0, 30, 0.1, 5, 1])[:, None] + 2,
        torch.randn(ROWS, AHEAD, OUT, generator=generator) - 1,
        torch.arange(ROWS) // PER_CONVERSATION,
    )


def planted(noise: TapData, *layers: int) -> TapData:
    """``noise`` with targets that are a linear map of ``layers``, the first twice as strong, plus a tenth of noise."""
    generator = torch.Generator().manual_seed(1)
    columns = noise.features[:, list(layers)]
    columns = (columns - columns.mean(0)) / columns.std(0)
    columns[:, 0] *= 2
    columns = columns.flatten(1)
    signal = columns @ torch.randn(columns.shape[1], AHEAD * OUT, generator=generator)
    targets = signal + signal.std() * 0.1**0.5 * torch.randn(signal.shape, generator=generator)
    return dataclasses.replace(noise, targets=targets.view(ROWS, AHEAD, OUT))


@pytest.mark.parametrize("layers", [[2], [0, 3], [4, 1, 2], [0, 1, 2, 3, 4]])
def test_a_sub_block_solve_equals_a_plain_ridge_regression(noise, layers):
    data = planted(noise, 1, 3)
    fit, report = data.parts == FIT, data.parts == REPORT
    x, y = data.features[:, layers].double().flatten(1), data.targets.double().flatten(1)
    x, y = (x - x[fit].mean(0)) / x[fit].std(0, correction=0), y - y[fit].mean(0)
    found = Ridge(data).score(layers)
    strength = found.strength
    padded = torch.cat([x[fit], (strength * int(fit.sum())) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    expected = torch.linalg.lstsq(padded, torch.cat([y[fit], y.new_zeros(x.shape[1], y.shape[1])])).solution
    torch.testing.assert_close(Ridge(data).coefficients(layers, strength), expected, rtol=1e-9, atol=1e-9)
    left = (y - x @ expected)[report].square().view(-1, AHEAD, OUT)
    whole = y[report].square().view(-1, AHEAD, OUT)
    assert found.explained == pytest.approx(float(1 - left.sum() / whole.sum()), abs=1e-9)
    assert found.by_ahead == pytest.approx((1 - left.sum((0, 2)) / whole.sum((0, 2))).tolist(), abs=1e-9)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_layer_that_carries_the_signal_is_found(spec, noise, layer):
    found = search(spec, planted(noise, layer), 2)
    first = found.layers[0]
    assert (first.layer, first.order) == (layer, 1)
    assert first.alone == pytest.approx(0.9, abs=0.03)
    assert all(other.alone < 0.05 and other.gain < 0.05 for other in found.layers[1:])


def test_layers_that_complete_each_other_are_chosen_before_a_copy(spec, noise):
    features = noise.features.clone()
    features[:, 2] = features[:, 1] * 0.1 + 0.01 * features[:, 2]  # layer 2 repeats layer 1
    data = planted(dataclasses.replace(noise, features=features), 1, 4)
    found = search(spec, data, 2)
    assert {one.layer for one in found.layers[:2]} == {1, 2}  # alone, either beats layer 4
    assert found.taps in ((1, 4), (2, 4))
    gains = {one.layer: one.gain for one in found.layers if one.order is None}
    assert all(abs(gain) < 0.01 for gain in gains.values())


def test_what_is_reported_was_not_fitted(spec, noise):
    """In-sample, 18 columns of noise would explain some of the variance; held out they cannot."""
    found = search(spec, noise, 3)
    assert all(one.explained < 0.005 for one in found.sets)
    assert all(one.alone < 0.005 for one in found.layers)


def test_parts_are_split_by_conversation_and_not_by_row(noise):
    of_conversation = {}
    for conversation, part in zip(noise.conversations.tolist(), noise.parts.tolist(), strict=True):
        of_conversation.setdefault(conversation, set()).add(part)
    assert all(len(parts) == 1 for parts in of_conversation.values())
    assert {FIT, CHOOSE, REPORT} == set.union(*of_conversation.values())


def test_a_layer_that_never_changes_explains_nothing(spec, noise):
    features = planted(noise, 3).features.clone()
    features[:, 0] = 7.5
    found = search(spec, dataclasses.replace(planted(noise, 3), features=features), 1)
    dead = next(one for one in found.layers if one.layer == 0)
    assert (dead.order, dead.gain) == (None, 0.0)
    assert dead.alone == pytest.approx(0, abs=0.01)


def test_sets_are_compared_with_the_searched_one(spec, noise):
    found = search(spec, planted(noise, 0, 4), 3)
    by_name = {one.name: one for one in found.sets}
    assert list(by_name) == ["searched", "default", "even", "attention"]
    searched = by_name["searched"]
    assert (searched.taps, searched.behind, searched.behind_error) == (found.taps, 0.0, 0.0)
    assert sum(one.gain for one in found.layers if one.order) == pytest.approx(searched.explained)
    for one in found.sets:
        assert one.behind == pytest.approx(searched.explained - one.explained)
    assert by_name["even"].behind > 5 * by_name["even"].behind_error > 0  # 1, 2, 3 carry nothing
    assert found.ahead == (2, 3, 4)


def test_progress_ends_at_its_total(spec, noise):
    for count in (1, 3, LAYERS):
        seen = []
        search(spec, noise, count, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
        assert len({total for _, total in seen}) == 1
