"""Devices of our own, with numbers: what mixes two of them raises, as on GPUs; all else is computed on the CPU.

A tensor on ``device(1)`` holds one on the CPU. Inside `Devices` every operation wants its tensors on one device; one
without dimensions may come from the CPU, and `.to` and `copy_` move.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_TYPE = "privateuseone"
_MOVES = {"_to_copy", "copy_"}
_INDEXED = {"index", "index_put", "index_put_"}  # whose indices may lie on the CPU
_ready: list[bool] = []


def device(index: int) -> torch.device:
    if not _ready:
        _setup_privateuseone_for_python_backend()
        _ready.append(True)
    return torch.device(_TYPE, index)


class Placed(Tensor):
    """A tensor that says it is on a device of ours."""

    held: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, held: Tensor, where: torch.device) -> "Placed":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=where,
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.device}, {self.held})"

    def data_ptr(self) -> int:  # by which accelerate tells what is tied
        return self.held.data_ptr()

    def __deepcopy__(self, memo: Any) -> "Placed":
        return Placed(self.held.clone(), self.device)

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name = func.overloadpacket.__name__
    anywhere = name in _INDEXED
    where = {tensor.device for tensor in tensors if isinstance(tensor, Placed) or (tensor.dim() and not anywhere)}
    if len(where) > 1 and name not in _MOVES:
        raise RuntimeError(f"{name} of tensors on {' and '.join(sorted(map(str, where)))}")
    asked = kwargs.get("device")
    to = torch.device(asked) if asked is not None else args[0].device if name == "copy_" else next(iter(where), None)
    inner = tree_map_only(Placed, lambda tensor: tensor.held, (args, kwargs))
    if asked is not None:
        inner[1]["device"] = torch.device("cpu")
        inner[1].pop("pin_memory", None)
    if name == "histc" and not inner[0][0].is_floating_point():  # transformers counts whole numbers, but not on a CPU
        found = func(inner[0][0].double(), *inner[0][1:], **inner[1]).to(inner[0][0].dtype)
    else:
        found = func(*inner[0], **inner[1])
    if to is None or to.type != _TYPE:
        return found
    wrapped = tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, Placed) else Placed(tensor, to), found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class Devices(TorchDispatchMode):
    """Inside, tensors are made on the devices that are asked for."""

    def __enter__(self) -> "Devices":
        device(0)
        made = (torch.tensor, torch.as_tensor)  # these fill a tensor where it lies
        self._patches = [
            mock.patch.object(torch, each.__name__, lambda *given, each=each, **named: _made(each, given, named))
            for each in made
        ]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _made(make: Any, given: tuple, named: dict[str, Any]) -> Tensor:
    where = named.pop("device", None)
    made = make(*given, **named)
    return made if where is None else made.to(where)


def put(model: nn.Module, where: dict[str, torch.device]) -> None:
    """Lay the parts of ``model`` onto the devices that ``where`` says by path, as loading does."""
    moved: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for name, value in kind.items():
                if value is None:
                    continue
                full = f"{path}.{name}".removeprefix(".")
                to = next(each for part, each in where.items() if not part or f"{full}.".startswith(f"{part}."))
                if id(value) not in moved:
                    placed = Placed(value.detach(), to)
                    moved[id(value)] = (
                        nn.Parameter(placed, requires_grad=False) if kind is module._parameters else placed
                    )
                kind[name] = moved[id(value)]


def values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, on the CPU."""
    return tensor.held if isinstance(tensor, Placed) else tensor
