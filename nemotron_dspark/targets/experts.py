"""A mixture's experts, a few in memory at a time: for layers that are too large to be there as a whole.

Which experts a token goes to is known before any is computed. So tokens are sent to those of one group, wait until the
next group is there, and what the experts made of them is weighted and summed at the end, as transformers does it. Each
expert sees the same rows in the same order, and the sum has the same order: the bits are those of the whole layer.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def mixtures(module: nn.Module) -> dict[str, Any]:
    """The experts' modules inside ``module`` by their paths: weights stacked by expert, called with a routing."""
    return {
        path: inner
        for path, inner in module.named_modules()
        if hasattr(inner, "_apply_gate") and hasattr(inner, "num_experts")
    }


class GroupedExperts:
    """Computes ``module``, a mixture's experts, in so many ``groups``; after ``pause`` the next one is to be there.

    `use` hands a group over. The module itself keeps its parameters for whoever fills them meanwhile.
    """

    def __init__(self, module: Any, groups: int, pause: Callable[[], None]):
        self._module, self._groups, self._pause = module, groups, pause
        self._now: tuple[range, Any] | None = None
        module.forward = self._forward

    def use(self, experts: range, weights: Mapping[str, Tensor]) -> None:
        """Compute with ``weights`` [experts, …] from here on, by the names that they have in the module."""
        twin = copy.copy(self._module)
        twin.__dict__["_parameters"] = {name: nn.Parameter(weights[name], False) for name in self._module._parameters}
        twin.num_experts = len(experts)
        self._now = experts, twin

    def drop(self) -> None:
        """Forget the weights in use."""
        self._now = None

    def _forward(
        self,
        hidden: Tensor,  # [tokens, H]
        routed: Tensor,  # int64 [tokens, K], the experts of each
        weights: Tensor,  # [tokens, K]
    ) -> Tensor:
        compute = type(self._module).forward
        (tokens, top_k), routed = routed.shape, routed.flatten()
        made = hidden.new_zeros(tokens * top_k, hidden.shape[-1])
        for _ in range(self._groups):
            self._pause()
            if self._now is None:
                raise RuntimeError("no experts are there")
            experts, twin = self._now
            mine = ((routed >= experts.start) & (routed < experts.stop)).nonzero().flatten()
            if len(mine):
                ones = hidden.new_ones(len(mine), 1)
                made[mine] = compute(twin, hidden[mine // top_k], routed[mine, None] - experts.start, ones)
        weighted = made * weights.reshape(-1, 1)
        return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden.dtype)
