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


def even_taps(spec: TargetSpec, count: int = 5) -> tuple[int, ...]:
    """``count`` layers spread evenly from layer 1 to the last but two; ascending.

    A target with fewer layers between the two ends gets fewer taps, at least one.
    """
    first, last = _ends(spec)
    return tuple(first + at for at in _spread(last - first + 1, count))


def default_taps(spec: TargetSpec, count: int = 5) -> tuple[int, ...]:
    """`even_taps`, drawn to attention layers; ascending.

    Each is moved to the nearest attention layer at most 2 away, if that one is free; the closest pairs move first.
    """
    spread = even_taps(spec, count)
    attention = _attention(spec)
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


def attention_taps(spec: TargetSpec, count: int = 5) -> tuple[int, ...]:
    """As many taps as `even_taps` has, on attention layers; ascending.

    More attention layers than taps: spread evenly over those from layer 1 to the last but two, or over all if these are
    too few. Fewer: all of them, and then one by one the layer between the two ends that is farthest from every tap, the
    later of equals. Where every layer attends this is `even_taps`.

    Raises:
        InputError: no layer but the last attends.
    """
    first, last = _ends(spec)
    count = min(count, last - first + 1)
    attention = _attention(spec)
    if not attention:
        raise InputError(
            f"No layer of {spec.name} that may be a tap has attention.", "Use --taps even, or leave the option out."
        )
    inner = [layer for layer in attention if first <= layer <= last]
    pool = inner if len(inner) >= count else attention
    taps = [pool[at] for at in _spread(len(pool), count)]
    while len(taps) < count:
        free = [layer for layer in range(first, last + 1) if layer not in taps]
        taps.append(max(free, key=lambda layer: (min(abs(layer - tap) for tap in taps), layer)))
    return tuple(sorted(taps))


def _ends(spec: TargetSpec) -> tuple[int, int]:
    """The first and the last layer that a spread of taps reaches: 1 and the last but two, if there are so many."""
    first = min(1, spec.num_layers - 2)
    return first, max(first, spec.num_layers - 3)


def _spread(size: int, count: int) -> list[int]:
    """``count`` of ``size`` places, both ends among them, evenly; all of them if there are fewer."""
    span, steps = size - 1, min(count, size) - 1
    # whole numbers, halves up: floats and banker's rounding would make the spread uneven
    return [(2 * at * span + steps) // (2 * steps) for at in range(steps + 1)] if steps else [span // 2]


def _attention(spec: TargetSpec) -> list[int]:
    return [layer for layer, kind in enumerate(spec.layers[:-1]) if kind.attends]


def check_taps(spec: TargetSpec, taps: Sequence[int]) -> tuple[int, ...]:
    """``taps`` as a tuple, once it is certain that the target has them.

    Raises:
        InputError: no taps, a layer the target does not have, its last layer, or not strictly ascending.
    """
    last, default = spec.num_layers - 1, ",".join(map(str, default_taps(spec)))
    do = f"Choose ascending layers from -1 (the embedding) to {last - 1}; the default is {default}."
    try:
        chosen = tuple(operator.index(tap) for tap in taps)
    except TypeError:
        raise InputError(f"Taps {list(taps)!r} are not all whole numbers.", do) from None
    if not chosen:
        raise InputError("There are no taps: a draft reads at least one layer.", do)
    if last in chosen:
        raise InputError(f"Tap {last} is the target's last layer, which engines read after the final norm.", do)
    for tap in chosen:
        if not -1 <= tap < last:
            raise InputError(f"Tap {tap} is out of range: the target has layers 0 to {last}.", do)
    if any(a >= b for a, b in itertools.pairwise(chosen)):
        raise InputError(f"Taps {','.join(map(str, chosen))} are not strictly ascending.", do)
    return chosen


def chosen_taps(spec: TargetSpec, section: DraftSection) -> tuple[int, ...]:
    """The taps that ``section.taps`` lists, checked, or ``section.num_taps`` of the choice it names."""
    if isinstance(section.taps, list):
        return check_taps(spec, section.taps)
    return CHOICES[section.taps](spec, section.num_taps)


CHOICES = {None: default_taps, "even": even_taps, "attention": attention_taps}  # by what `draft.taps` may name
