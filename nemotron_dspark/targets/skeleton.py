"""A model without weights, which gets some at a time, by the names and conversions that transformers loads it with."""

import contextlib
import copy
import inspect
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn


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


class Skeleton:
    """A model of transformers that was built `without_weights`, in the type that its weights are wanted in."""

    def __init__(self, model: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model = model
        self._conversions = get_model_conversion_mapping(model)
        self._empty = dict(model.named_parameters(remove_duplicate=False))

    @property
    def parameters(self) -> Collection[str]:
        """Names of all parameters."""
        return self._empty.keys()

    def bytes_of(self, names: Collection[str]) -> int:
        """What these take when they are there; buffers are always there."""
        return sum(self._empty[name].nbytes for name in names if name in self._empty)

    def shape(self, name: str) -> torch.Size:
        return self._empty[name].shape

    def fill(self, tensors: dict[str, Tensor], device: str) -> tuple[set[str], list[str]]:
        """Put a checkpoint's ``tensors`` into the model as transformers does.

        Returns the model's names that they fill, and those that they do not fit.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model as load
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        dtype, bars = self.model.dtype, logging.is_progress_bar_enabled()
        how = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=cast(Any, copy.deepcopy(self._conversions)),  # they hold what they convert
            ignore_mismatched_sizes=True,
        )
        parallel = {"tp_plan": None} if "tp_plan" in inspect.signature(load).parameters else {}  # until 5.2x
        logging.disable_progress_bar()  # one a layer would say nothing
        try:
            report, _ = load(model=self.model, state_dict=tensors, load_config=how, **parallel)
        finally:
            if bars:
                logging.enable_progress_bar()
        wrong = [*report.mismatched_keys, *report.conversion_errors]  # some come with their shapes
        filled = set(self.model.state_dict()) - set(report.missing_keys)
        return filled, [name if isinstance(name, str) else name[0] for name in wrong]

    def get(self, name: str) -> Any:
        module, leaf = self._owner(name)
        return getattr(module, leaf)

    def put(self, name: str, tensor: Tensor) -> None:
        module, leaf = self._owner(name)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def clear(self, names: Collection[str]) -> None:
        """Take these out of the model again; a buffer stays."""
        for name in names:
            if name in self._empty:
                self.put(name, self._empty[name])

    def make_room(self, names: Collection[str], experts: int) -> None:
        """Let these parameters, stacks of all experts, take so many ``experts``, until they are cleared."""
        for name in names:
            empty = self._empty[name]
            self.put(name, torch.empty((experts, *empty.shape[1:]), dtype=empty.dtype, device="meta"))

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf
