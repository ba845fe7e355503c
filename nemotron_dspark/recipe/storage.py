"""How a quantised checkpoint is stored, in sentences for `nds inspect`."""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Mapping

from nemotron_dspark.targets.quantised import Weight, is_running, weights_of
from nemotron_dspark.targets.schemes import Scheme
from nemotron_dspark.targets.shards import Stored

_SAMPLE = 1 << 24  # values of the weight that is looked into, at most where there is one so small


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a quantised checkpoint is stored, in sentences."""

    kinds: str  # which of its matrices are in which format
    unused: str | None  # what is stored beside weights and does not count here
    sample: str | None  # what quantising cost one of them


def storage_of(stored: Mapping[str, Stored], scheme: Scheme) -> Storage:
    """How the tensors ``stored`` are quantised, from the headers of their files and the values of one of them.

    Raises:
        InputError: as `Weight.layout`.
    """
    weights = weights_of(stored, scheme)
    matrices = {
        name: weight for name, weight in weights.items() if len(weight.shape) > 1 and min(weight.shape[-2:]) > 1
    }
    layouts = {name: layout for name, weight in matrices.items() if (layout := weight.layout())}
    counts = Counter(layout.words for layout in layouts.values()).most_common()
    rest = Counter(weights[name].values.dtype for name in matrices if name not in layouts).most_common()
    kinds = ", ".join(f"{words} in {count} of {len(matrices)} matrices" for words, count in counts)
    kinds += f", {'the rest' if counts else 'all'} {' and '.join(kind for kind, _ in rest)}" if rest else ""
    running = sum(is_running(name) for name in stored)
    return Storage(
        f"{kinds}; written by {scheme.writer}, dequantised to BF16 on reading, activations stay BF16",
        f"scales of activations and of cached keys and values ({running} tensors)" if running else None,
        _looked_into([matrices[name] for name in sorted(layouts)]),
    )


def _looked_into(weights: list[Weight]) -> str | None:
    if not weights:
        return None
    small = [weight for weight in weights if math.prod(weight.shape) <= _SAMPLE]
    weight = random.Random(0).choice(small) if small else min(weights, key=lambda one: math.prod(one.shape))
    values = weight.read().float()
    return (
        f"{weight.name}, taken at random: rms {float(values.square().mean().sqrt()):.2g}, largest "
        f"{float(values.abs().max()):.2g}; rounding has cost about {weight.rounding():.1%} of the rms, by the width of "
        "its steps (the weights before it are not here)"
    )
