"""AdamW on fp32 parameters, a linear warm-up and a cosine to zero.

Parameters are fp32 whatever the draft computes in: its modules cast them where they are used, so that gradients arrive,
and add up over micro-batches, in fp32. Once a step their sums over all processes are taken.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.sharding import distribute_like, full_tensor, is_dtensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Rate of optimiser step ``step`` (from 0): DeepSpec's warm-up, then half a cosine to zero."""
    warmup = int(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def state_bytes(trained: int, compute_bytes: int) -> int:
    """Bytes of ``trained`` parameters, gradients and two moments in fp32, and of their casts to a narrower type.

    The casts of a forward live until its backward.
    """
    return (16 + (compute_bytes if compute_bytes < 4 else 0)) * trained


class Optimiser:
    """AdamW over named fp32 parameters, replicated or sharded, whose state is saved by name as full tensors."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig):
        self._parameters = dict(parameters)
        device = next(iter(self._parameters.values())).device
        self._adamw = torch.optim.AdamW(
            self._parameters.values(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )

    def normalise(self, divisor: float, context: DistContext = SINGLE) -> None:
        """All-reduce the gradients and divide them by ``divisor``."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        if any(is_dtensor(parameter) for parameter in self._parameters.values()):
            divisor /= context.world_size  # the backward has left their mean over the ranks
        else:
            context.all_reduce_gradients(gradients)
        for gradient in gradients:
            gradient.div_(divisor)

    def clip(self, max_norm: float) -> float:
        """Scale all gradients down to a common norm of at most ``max_norm``; returns the norm before."""
        return float(full_tensor(nn.utils.clip_grad_norm_(self._parameters.values(), max_norm)))

    def step(self, lr: float) -> None:
        """Update the parameters at rate ``lr`` and drop the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad()

    def parameters(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """The full parameters by name; all ranks call it, those with ``wanted`` get them."""
        return _gathered(self._parameters.items(), wanted)

    def moments(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """AdamW's full moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME``; as for `parameters`."""
        states = ((name, self._adamw.state.get(parameter, {})) for name, parameter in self._parameters.items())
        kept = ((f"{key}.{name}", state[key]) for name, state in states for key in MOMENTS if key in state)
        return _gathered(kept, wanted)

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Take back what `moments` gave after ``steps`` steps; `InputError` when it is of another draft."""
        known = {f"{key}.{name}" for name in self._parameters for key in MOMENTS}
        if not set(moments) <= known:
            raise InputError(
                "The checkpoint's optimiser state is not that of this draft, or an earlier version wrote it.",
                "Train into another --out.",
            )
        state = {  # a parameter that no loss term reaches has no moments
            index: {
                "step": torch.tensor(float(steps)),
                **{key: distribute_like(moments[f"{key}.{name}"], parameter) for key in MOMENTS},
            }
            for index, (name, parameter) in enumerate(self._parameters.items())
            if f"exp_avg.{name}" in moments
        }
        self._adamw.load_state_dict({"state": state, "param_groups": self._adamw.state_dict()["param_groups"]})


def _gathered(tensors: Iterable[tuple[str, Tensor]], wanted: bool) -> dict[str, Tensor]:
    """Each full tensor, one after the other; those that had to be gathered are moved to the host."""
    kept = {}
    for name, tensor in tensors:
        full = full_tensor(tensor.detach())
        if wanted:
            kept[name] = full.cpu() if is_dtensor(tensor) else full
    return kept
