"""AdamW on fp32 masters of the weights, a linear warm-up and a cosine to zero.

Where the weights are fp32 already they are their own masters. Gradients of several forwards add up in fp32: summed in
bf16, the small ones of a long accumulation would be lost. Once a step the sums of all processes are added up.

Sharded weights (`sharding.shard`) are fp32 parts of the masters, whatever type their forward is in. What is kept of
them is put together, so a checkpoint is the same file however the run was spread.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.ranks import ALONE, Ranks
from nemotron_dspark.training.sharding import is_sharded, spread, whole


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Rate of optimiser step ``step`` (from 0): DeepSpec's warm-up, then half a cosine to zero."""
    warmup = int(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


class MasterAdamW:
    """AdamW over named parameters of any float type, replicated or sharded; ``dtype`` is that of their forward."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, dtype: torch.dtype | None = None):
        self._parameters = dict(parameters)
        self._sharded = any(is_sharded(parameter) for parameter in self._parameters.values())
        self._dtype = dtype or next(iter(self._parameters.values())).dtype
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

    def normalise(self, divisor: float, ranks: Ranks = ALONE) -> None:
        """Make the gradients those of all ranks, divided by ``divisor``."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        if self._sharded:
            divisor /= ranks.size  # their mean over the ranks is what a backward left
        else:
            ranks.add_up(gradients)
        for gradient in gradients:
            gradient.div_(divisor)

    def clip(self, max_norm: float) -> float:
        """Scale all gradients down to a common norm of at most ``max_norm``; returns the norm before."""
        return float(whole(nn.utils.clip_grad_norm_(self._masters.values(), max_norm)))

    def step(self, lr: float) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        self._optimiser.step()
        self._optimiser.zero_grad()
        if self._separate:
            self._copy_to_weights()

    def weights(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """The weights of a forward by name, whole; all ranks call it, and those with ``wanted`` get them."""
        return _kept(self._parameters.items(), wanted, self._dtype)

    def tensors(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """Moments, and masters where the forward is not in fp32, by name: what a checkpoint keeps. As for `weights`."""
        kept: list[tuple[str, Tensor]] = []
        for name, master in self._masters.items():
            state = self._optimiser.state.get(master, {})
            kept += [(f"{key}.{name}", state[key]) for key in ("exp_avg", "exp_avg_sq") if key in state]
            if self._dtype != torch.float32:
                kept.append((f"master.{name}", master))
        return _kept(kept, wanted)

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take back what `tensors` gave after ``steps`` steps; `InputError` when it is of another draft."""
        masters = {f"master.{name}" for name in self._masters if self._dtype != torch.float32}
        # A weight that no loss term reaches has no moments.
        moments = {f"{key}.{name}" for name in self._masters for key in ("exp_avg", "exp_avg_sq")}
        if {name for name in tensors if name.startswith("master.")} != masters or not set(tensors) <= moments | masters:
            raise InputError(
                "The checkpoint's optimiser state is not that of this draft and precision.", "Train into another --out."
            )
        state = {
            index: {
                "step": torch.tensor(float(steps)),
                "exp_avg": spread(tensors[f"exp_avg.{name}"], master),
                "exp_avg_sq": spread(tensors[f"exp_avg_sq.{name}"], master),
            }
            for index, (name, master) in enumerate(self._masters.items())
            if f"exp_avg.{name}" in tensors
        }
        self._optimiser.load_state_dict({"state": state, "param_groups": self._optimiser.state_dict()["param_groups"]})
        with torch.no_grad():
            for name in self._masters if masters else ():
                self._masters[name].copy_(spread(tensors[f"master.{name}"], self._masters[name]))
        if self._separate:
            self._copy_to_weights()

    @torch.no_grad()
    def _copy_to_weights(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._masters[name])


def _kept(tensors: Iterable[tuple[str, Tensor]], wanted: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Each put together, one after the other; those that are put together for it lie on the host."""
    kept = {}
    for name, tensor in tensors:
        complete = whole(tensor.detach())
        if wanted:
            kept[name] = complete.to("cpu" if is_sharded(tensor) else complete.device, dtype or complete.dtype)
    return kept
