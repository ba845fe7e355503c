"""A hidden state survives its quantiser to a known error, and its bytes are its own."""

import hashlib

import numpy as np
import pytest
import torch

from nemotron_dspark.cache.quantise import Int4
from nemotron_dspark.errors import InputError

BOUND = 0.095  # error relative to the state, of normal values


def states(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def parts(quantiser: Int4, given: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip((part.name for part in quantiser.parts), quantiser.encode(given), strict=True))


def through(given: torch.Tensor) -> torch.Tensor:
    quantiser = Int4(given.shape[1])
    return quantiser.decode(parts(quantiser, given))


def error(found: torch.Tensor, given: torch.Tensor) -> torch.Tensor:  # per channel, and root mean square
    return (found.float() - given.float()).square().mean(0).sqrt()


@pytest.mark.parametrize("width", [64, 128, 4096, 2688, 3136, 48])
def test_the_error_is_bounded(width):
    given = states(40, width) * torch.linspace(0.1, 30, 40)[:, None].bfloat16()
    found = through(given)
    assert found.dtype == torch.bfloat16
    relative = (found.float() - given.float()).norm(dim=1) / given.float().norm(dim=1)
    assert relative.mean() < BOUND
    assert relative.max() < 2 * BOUND


def test_parts_are_what_they_are_said_to_be():
    quantiser = Int4(384)
    for part, tensor in zip(quantiser.parts, quantiser.encode(states(5, 384)), strict=True):
        assert tensor.dtype == part.dtype
        assert tensor.shape == (5, part.columns)
    stored = sum(tensor.nbytes for tensor in quantiser.encode(states(5, 384)))
    assert stored == 5 * quantiser.state_bytes
    assert all(len(tensor) == 0 for tensor in quantiser.encode(states(0, 384)))
    assert quantiser.decode(parts(quantiser, states(0, 384))).shape == (0, 384)


@pytest.mark.parametrize("width", [128, 4096])
def test_bytes_of_a_state_do_not_depend_on_its_company(width):
    quantiser, given = Int4(width), states(300, width, seed=3)
    together = quantiser.encode(given)
    for first, stop in ((0, 1), (7, 8), (5, 77), (299, 300)):
        alone = quantiser.encode(given[first:stop])
        for one, all_ in zip(alone, together, strict=True):
            assert one.contiguous().view(torch.uint8).equal(all_[first:stop].contiguous().view(torch.uint8))


def test_huge_channels_do_not_drown_the_others():
    """As residual streams have them: three channels a hundred times as large, and a token that is huge in one."""
    given = states(200, 2048, seed=1).float()
    given[:, [5, 700, 1400]] *= 100
    given[3, 333] = 5000
    given = given.bfloat16()
    found = through(given)
    others = np.setdiff1d(np.arange(2048), [5, 700, 1400, 333])
    assert error(found, given)[others].max() < 0.15  # of channels whose values are about 1
    assert found[3, 333] == given[3, 333]


def test_the_largest_value_of_each_group_is_kept_exactly():
    given = states(50, 512, seed=2)
    groups = given.view(50, 4, 128)
    at = groups.abs().argmax(2, keepdim=True)
    assert through(given).view(50, 4, 128).gather(2, at).equal(groups.gather(2, at))


def test_zeros_stay_zeros_and_large_numbers_finite():
    given = torch.cat(
        (torch.zeros(1, 256), torch.full((1, 256), 1e36), states(1, 256) * 1e-30, states(1, 256) * 1e-39)
    ).bfloat16()
    found = through(given)
    assert not found[0].any()
    assert found.isfinite().all()
    assert (found[2].double() - given[2].double()).norm() < 0.1 * given[2].double().norm()


def test_bytes_are_read_as_described():
    """By docs/compact.md alone: caches that exist must be read as they were written."""
    codes = np.random.default_rng(0).integers(0, 256, 128, dtype=np.uint8)
    half = [0.12911, 0.39020, 0.66035, 0.94772, 1.26214, 1.62484, 2.07682, 2.74367]
    levels = [-level for level in reversed(half)] + half
    coded = np.array([[levels[byte & 15], levels[byte >> 4]] for byte in codes]).reshape(2, 128)
    hadamard = np.array([[(-1) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    signs = np.array([1 - 2 * (byte & 1) for byte in hashlib.shake_128(b"nemotron-dspark").digest(128)])
    expected = coded * [[0.5], [2.0]] @ hadamard / np.sqrt(128) * signs
    expected[[0, 1], [3, 127]] = 9, -7
    stored = {
        "codes": torch.from_numpy(codes)[None],
        "scales": torch.tensor([[0.5, 2.0]]).bfloat16(),
        "largest": torch.tensor([[9.0, -7.0]]).bfloat16(),
        "largest_at": torch.tensor([[3, 127]], dtype=torch.uint8),
    }
    found = Int4(256).decode(stored)[0].float()
    torch.testing.assert_close(found, torch.from_numpy(expected.ravel()).float(), rtol=2**-8, atol=1e-5)


def test_a_width_without_a_power_of_two_is_refused():
    with pytest.raises(InputError, match="57 channels"):
        Int4(57)


def test_parts_that_cannot_be_decoded_are_unsound():
    quantiser = Int4(128)
    good = parts(quantiser, states(4, 128))
    assert quantiser.sound(good)
    bad = good["scales"].clone()
    bad[2, 0] = float("nan")
    assert not quantiser.sound(good | {"scales": bad})
    narrow = Int4(64)
    good = parts(narrow, states(4, 64))
    assert not narrow.sound(good | {"largest_at": good["largest_at"] + 64})
