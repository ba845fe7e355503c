"""A checkpoint's tensors by layer: put into a model that has none, and taken out again.

Names and conversions are transformers' own (several experts' tensors become one, say), as when it loads a whole model;
here it is given one layer's tensors at a time, or some experts' of a layer that is too large. What belongs to no layer,
and what layers share, stays in the model.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nemotron_dspark.errors import InputError
from nemotron_dspark.memory import available_memory, is_unified
from nemotron_dspark.targets.experts import GroupedExperts, mixtures
from nemotron_dspark.targets.quantised import Weight
from nemotron_dspark.targets.skeleton import Skeleton
from nemotron_dspark.targets.target import checked_weights, refuse_absent
from nemotron_dspark.targets.weights import weights_in

_CACHE_LINE = 64  # bytes
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
USED_EXPERTS = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk")  # in a config


@dataclasses.dataclass(frozen=True)
class LayerPart:
    """What is loaded at a time."""

    layer: int
    experts: range | None = None  # of a layer that is divided; None: the layer, or all of it but its experts


@dataclasses.dataclass(frozen=True)
class _Divided:
    """A layer whose experts are loaded in groups."""

    parameters: dict[str, str]  # of the experts: the model's names, and those in their module
    sources: dict[str, int | None]  # the checkpoint's names, with the number of the expert; None: a stack of all
    module: Any
    groups: tuple[range, ...]
    compute: GroupedExperts


class LayerWeights:
    """Loads single layers of ``model``, built `without_weights`, from its checkpoint."""

    def __init__(self, model: Any, layers: str, folder: Path, device: torch.device):
        """
        Args:
            model: a model of transformers, in the type its weights are wanted in.
            layers: path of the list of layers in it.
            device: where layers are computed.

        Raises:
            InputError: a file of the checkpoint is missing or truncated, a tensor is missing or has another shape than
                the model wants, or its names do not tell its layer. Nothing but headers is read.
        """
        self._model, self._device, self._layers = model, device, layers
        self._skeleton = Skeleton(model)
        self._divided: dict[int, _Divided] = {}
        self.read_bytes, self.read_seconds = 0, 0.0  # of all layers so far
        self._folder = folder
        stored = checked_weights(folder)
        inside = f"{layers}."
        self._own = {name: _layer_of(name) if name.startswith(inside) else None for name in self._skeleton.parameters}
        base = layers.rpartition(".")[0]
        groups: defaultdict[int | None, dict[str, Tensor]] = defaultdict(dict)  # the checkpoint's tensors, by layer
        for name, weight in stored.items():
            groups[_layer_of(name)][name] = torch.empty(weight.shape, device="meta")
        del stored  # the files are opened again for each layer, and closed, so that they do not fill the memory
        self._stored = groups
        self._loaded: dict[int | None, set[str]] = {}  # the model's names that a group of the checkpoint's fills
        self._check(folder, groups)
        unified = device.type == "cuda" and is_unified(torch.cuda.get_device_properties(device))
        self._drops_pages = unified or self.total_bytes > available_memory()  # else a second pass finds them there
        ties = getattr(model, "all_tied_weights_keys", {})
        shared = {name for pair in ties.items() for name in pair if self._own.get(name) is not None}
        self._resident = shared | {name for name, at in self._own.items() if at is None and name.startswith(f"{base}.")}

    def load_resident(self) -> None:
        """Load what stays: embedding, final norm, and parameters that several layers share."""
        self._load_only(self._resident)

    @contextlib.contextmanager
    def loaded(self, names: Collection[str]) -> Iterator[None]:
        """The parameters ``names``, which belong to no layer, are in the model inside the block."""
        absent = {name for name in names if self._model.get_parameter(name).is_meta}
        self._load_only(absent)
        yield
        self._skeleton.clear(absent)

    def _load_only(self, names: Collection[str]) -> None:
        for layer in [layer for layer, loaded in self._loaded.items() if loaded & set(names)]:
            self.load(layer, only=names)
        self._model.tie_weights()

    @property
    def parts(self) -> list[LayerPart]:
        """What a forward goes through, in its order."""
        found = []
        for layer in range(len(self._model.get_submodule(self._layers))):
            divided = self._divided.get(layer)
            found += [LayerPart(layer), *(LayerPart(layer, group) for group in (divided.groups if divided else ()))]
        return found

    def divide(self, room: float, pause: Callable[[], None]) -> None:
        """Load the experts of a layer in groups where two such layers would take more than ``room`` bytes.

        Such a layer calls ``pause`` before each group, and goes on when that is in `use`. A layer stays whole whose
        checkpoint has its experts in another way than one by one or as a stack in the type of the file.
        """
        for layer in range(len(self._model.get_submodule(self._layers))):
            size = self.bytes_of(layer)
            found = self._mixture(layer) if 2 * size > room else None
            if found is None:
                continue
            parameters, sources, module = found
            of_experts, count = self._skeleton.bytes_of(parameters), module.num_experts
            rest = size - of_experts
            beside = min((room - rest) / 2, room - 2 * rest)  # for the next group, or the next layer but its experts
            most = max(1, int(beside / (of_experts / count)))
            cuts = [count * at // -(-count // most) for at in range(-(-count // most) + 1)]
            groups = tuple(itertools.starmap(range, itertools.pairwise(cuts)))
            compute = GroupedExperts(module, len(groups), pause)
            self._divided[layer] = _Divided(parameters, sources, module, groups, compute)

    def load(self, layer: int | None, experts: range | None = None, only: Collection[str] | None = None) -> None:
        """Load layer number ``layer``, of a divided one ``experts`` or all but them.

        With ``only``, of what its tensors fill these names.
        """
        began = time.monotonic()
        divided = self._divided.get(layer) if layer is not None else None
        fills = self._filled_by(layer, experts)

        def chosen(name: str) -> bool:
            if divided is None or name not in divided.sources:
                return experts is None
            number = divided.sources[name]
            return experts is not None and (number is None or number in experts)

        put, kept = self._skeleton.put, {name: self._skeleton.get(name) for name in fills}
        weights = weights_in(self._folder, lambda name: _layer_of(name) == layer)  # opens files, and closes them below
        weights = {name: weight for name, weight in weights.items() if chosen(name)}
        tensors = {name: weight.read() for name, weight in weights.items()}
        files = {weight.shard.path for weight in weights.values()}
        del weights
        if divided is not None and experts is not None:
            tensors = _cut(tensors, divided, experts)
            self._skeleton.make_room(divided.parameters, len(experts))
        mapped = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        self._skeleton.fill(tensors, "cpu")
        for name in fills:
            tensor = self._skeleton.get(name)
            if only is not None and name not in only:
                put(name, kept[name])
            elif tensor.untyped_storage().data_ptr() in mapped:  # a view of the file, which is read when it is touched
                put(name, _copied_to(tensor, self._device))
            else:
                put(name, tensor.to(self._device))
            del tensor  # what is mapped is not given back
        tensors.clear()
        if self._drops_pages:
            for file in files:
                _drop_pages(file)
        self.read_bytes += self.bytes_of(layer, experts)
        self.read_seconds += time.monotonic() - began

    def use(self, part: LayerPart) -> None:
        """What was loaded last, ``part``, is what is computed with; the next one may be loaded meanwhile."""
        if part.experts is None:
            return
        divided = self._divided[part.layer]
        held = {leaf: getattr(divided.module, leaf) for leaf in divided.parameters.values()}
        self._skeleton.clear(divided.parameters)
        divided.compute.use(part.experts, held)

    def free(self, part: LayerPart) -> None:
        """Take ``part`` out of the model, but for what its layer shares with others, and with the experts of a layer.

        Of a divided layer the last experts take the rest with them.
        """
        divided = self._divided.get(part.layer)
        if divided is not None:
            divided.compute.drop()
            if part.experts != divided.groups[-1]:
                return
        self._skeleton.clear(self._filled_by(part.layer, None) - self._resident)

    def bytes_of(self, layer: int | None, experts: range | None = None) -> int:
        """Bytes of what `load` puts into the model for ``layer``, or for some ``experts`` of it."""
        size = self._skeleton.bytes_of(self._filled_by(layer, experts))
        return size if experts is None else size * len(experts) // self._divided[cast(int, layer)].module.num_experts

    @property
    def peak_bytes(self) -> int:
        """The most bytes of layers that are in memory at a time: a part that runs, and the next one."""
        most, parts = 0, self.parts
        for part, following in itertools.zip_longest(parts, parts[1:]):
            held = [(part.layer, part.experts)]
            held += [(part.layer, None)] if part.experts is not None else []
            held += [(following.layer, following.experts)] if following is not None else []
            most = max(most, sum(itertools.starmap(self.bytes_of, held)))
        return most

    @property
    def used_experts(self) -> int:
        """Experts that a token goes to, where they are loaded in groups; else 0."""
        if not self._divided:
            return 0
        config = self._model.config.get_text_config()
        return int(next((getattr(config, key) for key in USED_EXPERTS if getattr(config, key, None)), 1))

    def _filled_by(self, layer: int | None, experts: range | None) -> set[str]:
        divided = self._divided.get(layer) if layer is not None else None
        if divided is None:
            return self._loaded.get(layer, set())
        return self._loaded[layer] - set(divided.parameters) if experts is None else set(divided.parameters)

    def _mixture(self, layer: int) -> tuple[dict[str, str], dict[str, int | None], Any] | None:
        """Of the experts of ``layer``: parameters and sources as `_Divided` has them, and their module.

        None where there are none, or where they cannot be loaded in groups: that is tried with shapes alone.
        """
        found = mixtures(self._model.get_submodule(f"{self._layers}.{layer}"))
        if len(found) != 1:
            return None
        ((path, module),) = found.items()
        parameters = {f"{self._layers}.{layer}.{path}.{leaf}": leaf for leaf in module._parameters}
        loaded, stored = self._loaded[layer], self._stored[layer]
        stacks = all(self._skeleton.shape(name)[:1] == (module.num_experts,) for name in parameters)
        if not stacks or not set(parameters) <= loaded - self._resident:
            return None
        sources: dict[str, int | None] = {name: int(at[1]) for name in stored if (at := _EXPERT.search(name))}
        if not sources:
            plain = weights_in(self._folder, lambda name: _layer_of(name) == layer)
            sources = dict.fromkeys(
                name
                for name, weight in plain.items()
                if weight.shape[:1] == (module.num_experts,)
                and not (isinstance(weight, Weight) and weight.layout())
                and self._tried(layer, {name: stored[name]}) <= set(parameters)
            )
        rest = {name: like for name, like in stored.items() if name not in sources}
        half = range(max(1, module.num_experts // 2))
        divided = _Divided(parameters, sources, module, (half,), cast(Any, None))
        wanted = {name: like for name, like in stored.items() if name in sources and sources[name] in (None, *half)}
        works = self._tried(layer, rest) == loaded - set(parameters)
        works = works and self._tried(layer, _cut(wanted, divided, half), half, parameters) == set(parameters)
        return (parameters, sources, module) if works else None

    def _tried(
        self, layer: int, like: dict[str, Tensor], experts: range | None = None, parameters: Collection[str] = ()
    ) -> set[str]:
        """What the meta tensors ``like`` fill, with room for ``experts`` in ``parameters``; all if they misfit."""
        if experts is not None:
            self._skeleton.make_room(parameters, len(experts))
        filled, misfits = self._skeleton.fill(like, "meta")
        self._skeleton.clear(self._loaded[layer] - self._resident)
        return set(self._model.state_dict()) if misfits else filled

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return self._skeleton.bytes_of(dict(self._model.named_parameters()))

    def _check(self, folder: Path, groups: Mapping[int | None, dict[str, Tensor]]) -> None:
        """Go through the loading with shapes alone: meta tensors in place of the checkpoint's, by layer."""
        missing = set(self._model.state_dict()) - set(getattr(self._model, "all_tied_weights_keys", {}))
        for layer, like in groups.items():
            self._loaded[layer], misfits = self._skeleton.fill(like, "meta")
            if misfits:
                raise InputError(
                    f"{misfits[0]} of the checkpoint in {folder} has not the shape that its config.json says.",
                    "Use the config.json that belongs to these weights, or download the weights again.",
                )
            strangers = [name for name in self._loaded[layer] if self._own.get(name, layer) not in (layer, None)]
            if strangers:
                raise InputError(
                    f"The names in the checkpoint {folder} do not tell which layer {strangers[0]} belongs to.",
                    "Load the target whole (--stream off).",
                )
            missing -= self._loaded[layer]
        self._skeleton.clear(self._skeleton.parameters)
        refuse_absent(folder, missing)


def _cut(tensors: dict[str, Tensor], divided: _Divided, experts: range) -> dict[str, Tensor]:
    """``tensors`` with the stacks among them cut down to some ``experts``."""
    return {
        name: tensor[experts.start : experts.stop] if divided.sources[name] is None else tensor
        for name, tensor in tensors.items()
    }


def _layer_of(name: str) -> int | None:
    """The layer that a tensor's name tells: the first number in it."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _drop_pages(file: Path) -> None:
    """Let the system forget what it keeps of ``file`` in memory."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor that lies in a file, on ``device``.

    In main memory it begins as far behind a cache line as in the file: a matrix product may round by that, and hidden
    states are to be those of a target that transformers has loaded, whose weights lie in the mapped file.
    """
    if device.type != "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    shift = tensor.data_ptr() % _CACHE_LINE // tensor.element_size()
    room = torch.empty(shift + tensor.numel(), dtype=tensor.dtype)  # torch aligns it to a cache line
    return room[shift:].view(tensor.shape).copy_(tensor)
