"""A target and its draft as a serving engine sees them: two folders and what their configs say."""

import dataclasses
from pathlib import Path
from typing import Any

from nemotron_dspark.config import TargetConfig
from nemotron_dspark.config.known import KnownTarget, known_target
from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig, Eagle3Config, read_draft_config
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.spec import LayerKind, TargetSpec


@dataclasses.dataclass(frozen=True)
class Pair:
    """A draft that was made for the target. No weight is loaded."""

    target: str  # hub id or folder, as an engine is given it
    draft_folder: Path
    spec: TargetSpec
    draft: DraftConfig | Eagle3Config
    target_config: dict[str, Any]  # the target's config.json
    known: KnownTarget | None

    @staticmethod
    def of(target: TargetConfig, draft_folder: Path) -> "Pair":
        """The pair that the configuration's target and a draft's folder make.

        Raises:
            InputError: either cannot be read, or the draft was made for another target.
        """
        draft = read_draft_config(draft_folder)
        checkpoint = Checkpoint.of(target)
        spec = checkpoint.read_spec()
        draft.check_target(spec)
        known = known_target(target.named)
        local = Path(target.named).expanduser().exists()
        name = target.named if local or known is None else known.repository
        return Pair(name, draft_folder, spec, draft, checkpoint.config, known)

    @property
    def hybrid(self) -> bool:
        """Whether a layer keeps a state that cannot be rewound by forgetting positions."""
        return any(kind.recurrent for kind in self.spec.layers)

    @property
    def kind(self) -> str:
        """The draft's, as `draft.kind` names it."""
        names = {Eagle3Config: "eagle3", DFlashConfig: "dflash", DraftConfig: "dspark"}
        return names[type(self.draft)]

    @property
    def traits(self) -> frozenset[str]:
        """What flags may depend on: the draft's kind, the target's layers and weights, its way of chatting."""
        found = {
            self.kind,
            "hybrid" if self.hybrid else "attention",
        }
        if self.known and self.known.weights == "NVFP4":
            found.add("nvfp4")
        if self.known and (self.known.chat_format or "").startswith("nemotron_3"):
            found.add("nemotron-3")
        return frozenset(found)

    @property
    def state_bytes(self) -> int | None:
        """Bytes of one request's recurrent state in fp32; None without Mamba-2 layers or their sizes."""
        layers = sum(kind is LayerKind.MAMBA2 for kind in self.spec.layers)
        try:
            heads, head_dim, state, groups, kernel = (
                int(self.target_config[key])
                for key in ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
            )
        except (KeyError, TypeError):
            return None
        convolved = heads * head_dim + 2 * groups * state  # channels of the short convolution
        return layers * 4 * (heads * head_dim * state + convolved * (kernel - 1)) or None
