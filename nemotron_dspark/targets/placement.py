"""Where a target's weights go: onto one device where it holds them, else whole layers onto several, by accelerate.

Embedding, final norm, head and whatever else belongs to no layer lie on the first device, where the draft is. A layer's
weights, its keys and values and its recurrent state lie together; hidden states, masks and positions are moved to a
layer by accelerate's hooks.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.files import size_text
from nemotron_dspark.memory import available_memory, is_unified
from nemotron_dspark.targets.checkpoint import Checkpoint
from nemotron_dspark.targets.weights import parameter_count

MOST_OF_MEMORY = 0.9  # that a target's weights may take of a device
BESIDE_DRAFT = 0.6  # of a device that holds a draft, too, with its states, or with moments and activations in training
KEPT_FREE = 8 * 10**9  # bytes of a memory that the system shares with the device: a GB10 without any left freezes

_log = logging.getLogger(__name__)


def free_memory(device: torch.device) -> int:
    """Bytes that may be taken on ``device``."""
    if device.type != "cuda":
        return available_memory()
    if is_unified(torch.cuda.get_device_properties(device)):
        return available_memory() - KEPT_FREE
    return torch.cuda.mem_get_info(device)[0]


def weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of the weights of ``checkpoint`` in ``dtype``; 0 where its files do not tell."""
    return (parameter_count(checkpoint.folder) or 0) * (4 if dtype == "float32" else 2)


def visible_devices() -> list[torch.device]:
    """The GPUs that a process has for the target; of several processes each has its own alone."""
    if not torch.cuda.is_available():
        return []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [torch.device("cuda", torch.cuda.current_device())]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def room_for_weights(free: Mapping[torch.device, int]) -> dict[torch.device, int]:
    """Bytes for weights of each of several devices with ``free`` bytes, of which the first holds the draft."""
    return {
        device: int(amount * (MOST_OF_MEMORY if at else BESIDE_DRAFT))
        for at, (device, amount) in enumerate(free.items())
    }


def room_on(count: int, free: float) -> float:
    """Bytes for weights on ``count`` devices with ``free`` bytes each."""
    return free * (MOST_OF_MEMORY if count == 1 else BESIDE_DRAFT + MOST_OF_MEMORY * (count - 1))


def place(
    model: nn.Module,  # may be on the meta device
    layers: str,  # the path of its list of layers
    room: Mapping[torch.device, int],  # bytes for weights
) -> dict[str, torch.device] | None:
    """The device of every part of ``model``, by path: whole layers, balanced; None where they do not fit."""
    accelerate = _accelerate()
    devices = list(room)
    outside = list(_outside(model, layers))
    stack = model.get_submodule(layers)
    memory: dict[int | str, int | str] = dict(enumerate(room.values()))
    memory[0] = room[devices[0]] - sum(_bytes(model, path) for path in outside)
    whole = sorted({type(layer).__name__ for layer in stack.children()})
    balanced = accelerate.utils.get_balanced_memory(stack, dict(memory), no_split_module_classes=whole)
    for limits in (balanced, memory):  # balanced limits are tight: a layer may be left over that a device has room for
        found = accelerate.infer_auto_device_map(stack, dict(limits), no_split_module_classes=whole, clean_result=False)
        at = {name.partition(".")[0]: device for name, device in found.items()}
        if all(isinstance(device, int) for device in at.values()):
            placed = {f"{layers}.{name}": devices[int(device)] for name, device in at.items()}
            return dict.fromkeys(outside, devices[0]) | placed
    return None


def too_large(name: str, needed: int, free: Mapping[torch.device, int]) -> EnvironmentFault:
    """The error that a target which needs ``needed`` bytes does not fit, and what is left to do with it."""
    where = ", ".join(f"{device} {size_text(amount)}" for device, amount in free.items())
    shares = f"; of several, {BESIDE_DRAFT:.0%} of the first and {MOST_OF_MEMORY:.0%} of the others are for weights"
    listed = "Name more GPUs (target.device=cuda:0,cuda:1); or b" if len(free) < torch.cuda.device_count() else "B"
    return EnvironmentFault(
        f"The weights of {name} take {size_text(needed)}, which does not fit into what is free ({where}"
        f"{shares if len(free) > 1 else ''}).",
        f"{listed}uild a cache of its hidden states layer by layer (`nds cache build --stream on`) and train on that; "
        "to answer let an engine serve its quantised checkpoint (`nds engine vllm`), here such weights become bf16.",
    )


def say(name: str, placed: Mapping[str, torch.device], layers: str) -> None:
    """Log how many layers lie on which device."""
    counts: dict[torch.device, int] = {}
    for path, device in placed.items():
        counts[device] = counts.get(device, 0) + path.startswith(f"{layers}.")
    parts = ", ".join(f"{count} layers on {device}" for device, count in counts.items())
    _log.info(f"{name} does not fit on one device: {parts}.")


def _outside(model: nn.Module, layers: str) -> Iterator[str]:
    """Paths of the parts of ``model`` that hold all weights and buffers outside of ``layers``."""
    inner = {".".join(layers.split(".")[:depth]) for depth in range(layers.count(".") + 2)}  # "", …, layers
    for path, module in model.named_modules():
        if path in inner and path != layers:
            own = [*module._parameters, *module._buffers]
            children = [name for name, _ in module.named_children()]
            for name in [*own, *children]:
                part = f"{path}.{name}" if path else name
                if part not in inner:
                    yield part


def _bytes(model: nn.Module, path: str) -> int:
    part: Any = model.get_submodule(path.rpartition(".")[0])
    part = getattr(part, path.rpartition(".")[2])
    tensors: Sequence[Any] = [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else [part]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _accelerate() -> Any:
    try:
        import accelerate
        import accelerate.utils
    except ImportError:
        raise EnvironmentFault(
            "A target on several devices needs the package accelerate.", "pip install 'nemotron-dspark[devices]'."
        ) from None
    return accelerate
