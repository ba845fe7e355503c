"""A checkpoint's tensors by layer: put into a model that has none, and taken out again.

Names and conversions are transformers' own (several experts' tensors become one, say), as when it loads a whole model;
here it is given one layer's tensors at a time. What belongs to no layer, and what layers share, stays in the model.
"""

import contextlib
import copy
import inspect
import os
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nemotron_dspark.errors import InputError
from nemotron_dspark.memory import available_memory, is_unified
from nemotron_dspark.targets.target import checked_weights, refuse_absent
from nemotron_dspark.targets.weights import weights_in

_CACHE_LINE = 64  # bytes
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Models built in the block have their parameters on the meta device, and their buffers as they are."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # pyrefly: ignore[bad-assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


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
        self._model, self._device = model, device
        self.read_bytes, self.read_seconds = 0, 0.0  # of all layers so far
        self._folder = folder
        stored = checked_weights(folder)
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._own = {name: _layer_of(name) if name.startswith(f"{layers}.") else None for name in self._empty}
        base = layers.rpartition(".")[0]
        groups: defaultdict[int | None, dict[str, Tensor]] = defaultdict(dict)  # the checkpoint's tensors, by layer
        for name, weight in stored.items():
            groups[_layer_of(name)][name] = torch.empty(weight.shape, device="meta")
        del stored  # the files are opened again for each layer, and closed, so that they do not fill the memory
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
        for name in absent:
            self._put(name, self._empty[name])

    def _load_only(self, names: Collection[str]) -> None:
        for layer in [layer for layer, loaded in self._loaded.items() if loaded & set(names)]:
            self.load(layer, only=names)
        self._model.tie_weights()

    def load(self, layer: int | None, only: Collection[str] | None = None) -> None:
        """Load layer number ``layer``, or of what its tensors fill the names in ``only``."""
        began = time.monotonic()
        kept = {name: getattr(*_owner(self._model, name)) for name in self._loaded[layer]}
        weights = weights_in(self._folder, lambda name: _layer_of(name) == layer)  # opens files, and closes them below
        tensors = {name: weight.read() for name, weight in weights.items()}
        files = {weight.shard.path for weight in weights.values()}
        del weights
        mapped = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        self._fill(tensors, "cpu")
        for name in self._loaded[layer]:
            module, leaf = _owner(self._model, name)
            tensor = getattr(module, leaf)
            if only is not None and name not in only:
                self._put(name, kept.get(name, tensor))
            elif tensor.untyped_storage().data_ptr() in mapped:  # a view of the file, which is read when it is touched
                self._put(name, _copied_to(tensor, self._device))
            else:
                self._put(name, tensor.to(self._device))
        tensors.clear()
        if self._drops_pages:
            for file in files:
                _drop_pages(file)
        self.read_bytes += self.bytes_of(layer)
        self.read_seconds += time.monotonic() - began

    def free(self, layer: int) -> None:
        """Take layer number ``layer`` out of the model, but for what it shares with others."""
        for name in self._loaded[layer] - self._resident:
            if name in self._empty:  # a buffer stays
                self._put(name, self._empty[name])

    def bytes_of(self, layer: int | None) -> int:
        """Bytes of what `load` puts into the model for ``layer``."""
        return sum(_bytes(self._empty[name]) for name in self._loaded.get(layer, ()) if name in self._empty)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(_bytes(parameter) for parameter in dict(self._model.named_parameters()).values())

    def _check(self, folder: Path, groups: Mapping[int | None, dict[str, Tensor]]) -> None:
        """Go through the loading with shapes alone: meta tensors in place of the checkpoint's, by layer."""
        missing = set(self._model.state_dict()) - set(getattr(self._model, "all_tied_weights_keys", {}))
        for layer, like in groups.items():
            report = self._fill(like, "meta")
            self._loaded[layer] = set(self._model.state_dict()) - set(report.missing_keys)
            wrong = [*report.mismatched_keys, *report.conversion_errors]
            if wrong:
                name = wrong[0] if isinstance(wrong[0], str) else wrong[0][0]  # some come with their shapes
                raise InputError(
                    f"{name} of the checkpoint in {folder} has not the shape that its config.json says.",
                    "Use the config.json that belongs to these weights, or download the weights again.",
                )
            strangers = [name for name in self._loaded[layer] if self._own.get(name, layer) not in (layer, None)]
            if strangers:
                raise InputError(
                    f"The names in the checkpoint {folder} do not tell which layer {strangers[0]} belongs to.",
                    "Load the target whole (--stream off).",
                )
            missing -= self._loaded[layer]
        for name, empty in self._empty.items():
            self._put(name, empty)
        refuse_absent(folder, missing)

    def _fill(self, tensors: dict[str, Tensor], device: str) -> Any:
        """Put ``tensors`` into the model as transformers does; its report."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model as fill
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        dtype, bars = self._model.dtype, logging.is_progress_bar_enabled()
        how = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self._model._get_dtype_plan(dtype),
            weight_mapping=cast(Any, copy.deepcopy(get_model_conversion_mapping(self._model))),
            ignore_mismatched_sizes=True,
        )
        parallel = {"tp_plan": None} if "tp_plan" in inspect.signature(fill).parameters else {}  # until 5.2x
        logging.disable_progress_bar()  # one a layer would say nothing
        try:
            report, _ = fill(model=self._model, state_dict=tensors, load_config=how, **parallel)
        finally:
            if bars:
                logging.enable_progress_bar()
        return report

    def _put(self, name: str, tensor: Tensor) -> None:
        module, leaf = _owner(self._model, name)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _layer_of(name: str) -> int | None:
    """The layer that a tensor's name tells: the first number in it."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _drop_pages(file: Path) -> None:
    """Let the system forget what it keeps of ``file`` in memory."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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
