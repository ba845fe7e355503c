"""AdamW on fp32 masters of the weights, a linear warm-up and a cosine to zero.

Where the weights are fp32 already they are their own masters. Gradients of several forwards add up in fp32: summed in
bf16, the small ones of a long accumulation would be lost.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.errors import InputError


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Rate of optimiser step ``step`` (from 0): DeepSpec's warm-up, then half a cosine to zero."""
    warmup = int(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


class MasterAdamW:
    """AdamW over named parameters of any float type."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig):
        self._parameters = dict(parameters)
        self._separate = any(parameter.dtype != torch.float32 for parameter in self._parameters.values())
        self._masters = {
            name: nn.Parameter(parameter.detach().float().clone()) if self._separate else parameter
            for name, parameter in self._parameters.items()
        }
        device = next(iter(self._parameters.values())).device
        self._optimiser = torch.optim.AdamW(
            self._masters.values(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )

    def accumulate(self) -> None:
        """Move the gradients of one forward to the masters; needed after every backward."""
        if not self._separate:
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            master = self._masters[name]
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def clip(self, max_norm: float) -> float:
        """Scale all gradients down to a common norm of at most ``max_norm``; returns the norm before."""
        return float(nn.utils.clip_grad_norm_(self._masters.values(), max_norm))

    def step(self, lr: float) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        self._optimiser.step()
        self._optimiser.zero_grad()
        if self._separate:
            self._copy_to_weights()

    def tensors(self) -> dict[str, Tensor]:
        """Moments, and masters where they are separate, by name: what a checkpoint keeps."""
        kept = {}
        for name, master in self._masters.items():
            state = self._optimiser.state.get(master, {})
            kept |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
            if self._separate:
                kept[f"master.{name}"] = master.detach()
        return kept

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take back what `tensors` gave after ``steps`` steps; `InputError` when it is of another draft."""
        masters = {f"master.{name}" for name in self._masters if self._separate}
        # A weight that no loss term reaches has no moments.
        moments = {f"{key}.{name}" for name in self._masters for key in ("exp_avg", "exp_avg_sq")}
        if {name for name in tensors if name.startswith("master.")} != masters or not set(tensors) <= moments | masters:
            raise InputError(
                "The checkpoint's optimiser state is not that of this draft and precision.", "Train into another --out."
            )
        state = {
            index: {
                "step": torch.tensor(float(steps)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
            for index, name in enumerate(self._masters)
            if f"exp_avg.{name}" in tensors
        }
        self._optimiser.load_state_dict({"state": state, "param_groups": self._optimiser.state_dict()["param_groups"]})
        if self._separate:
            with torch.no_grad():
                for name, master in self._masters.items():
                    master.copy_(tensors[f"master.{name}"])
            self._copy_to_weights()

    @torch.no_grad()
    def _copy_to_weights(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._masters[name])
