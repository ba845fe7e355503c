"""Taps: the target layers whose raw outputs a draft reads. Which ones by default, and which ones are allowed.

Tap i is the residual stream after layer i; tap -1 is the embedding. The last layer is never a tap: engines and
DeepSpec's evaluator read it after the final norm, so a draft trained on the raw one would see other numbers.
"""

import itertools
import operator
from collections.abc import Sequence

from nemotron_dspark.config import DraftSection
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import TargetSpec


def default_taps(spec: TargetSpec, count: int = 5) -> tuple[int, ...]:
    """``count`` layers spread evenly from layer 1 to the last but two, drawn to attention layers; ascending.

    Each is moved to the nearest attention layer at most 2 away, if that one is free; the closest pairs move first. A
    target with fewer layers between the two ends gets fewer taps, at least one.
    """
    first = min(1, spec.num_layers - 2)
    last = max(first, spec.num_layers - 3)
    count = min(count, last - first + 1)
    span, steps = last - first, count - 1
    # whole numbers, halves up: floats and banker's rounding would make the spread uneven
    spread = [first + (2 * i * span + steps) // (2 * steps) for i in range(count)] if steps else [first + span // 2]
    attention = [layer for layer, kind in enumerate(spec.layers[:-1]) if kind.attends]
    moves = sorted(
        (abs(layer - tap), tap, layer)
        for tap in spread
        if tap not in attention
        for layer in attention
        if abs(layer - tap) <= 2 and layer not in spread
    )
    moved: dict[int, int] = {}
    for _, tap, layer in moves:
        if tap not in moved and layer not in moved.values():
            moved[tap] = layer
    return tuple(sorted(moved.get(tap, tap) for tap in spread))


def check_taps(spec: TargetSpec, taps: Sequence[int]) -> tuple[int, ...]:
    """``taps`` as a tuple, once it is certain that the target has them.

    Raises:
        InputError: no taps, a layer the target does not have, its last layer, or not strictly ascending.
    """
    last = spec.num_layers - 1
    do = f"Choose ascending layers from -1 (the embedding) to {last - 1}; the default is {_listed(default_taps(spec))}."
    try:
        chosen = tuple(operator.index(tap) for tap in taps)
    except TypeError:
        raise InputError(f"Taps {list(taps)!r} are not all whole numbers.", do) from None
    if not chosen:
        raise InputError("There are no taps: a draft reads at least one layer.", do)
    for tap in chosen:
        if tap == last:
            raise InputError(f"Tap {tap} is the target's last layer, which engines read after the final norm.", do)
        if not -1 <= tap < last:
            raise InputError(f"Tap {tap} is out of range: the target has layers 0 to {last}.", do)
    if any(a >= b for a, b in itertools.pairwise(chosen)):
        raise InputError(f"Taps {_listed(chosen)} are not strictly ascending.", do)
    return chosen


def chosen_taps(spec: TargetSpec, section: DraftSection) -> tuple[int, ...]:
    """The taps that the ``draft`` section names, checked, or the default choice of ``section.num_taps``."""
    return default_taps(spec, section.num_taps) if section.taps is None else check_taps(spec, section.taps)


def _listed(taps: Sequence[int]) -> str:
    return ",".join(str(tap) for tap in taps)
