"""The shape of an EAGLE-3 draft, as DeepSpec's `Qwen3Eagle3Model` writes it in ``config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.builder import build_draft_config
from nemotron_dspark.drafts.config import SavedConfig, wrong
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import TargetSpec

ARCHITECTURE = "Qwen3Eagle3Model"
NUM_TAPS = 5  # DeepSpec's class takes exactly these


@dataclasses.dataclass(frozen=True)
class Eagle3Config(SavedConfig):
    """Shape of an EAGLE-3 draft: one decoder layer. The field names are the keys of ``config.json``."""

    hidden_size: int  # H, the target's
    intermediate_size: int  # SwiGLU width
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # V, the target's
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    target_layer_ids: tuple[int, ...]  # taps, ascending, exactly five
    num_target_layers: int
    ttt_length: int = 7  # steps unrolled in training, tokens drafted per round in decoding
    step_loss_decay: float = 0.8  # step i of the unrolling weighs this to the power of i
    dtype: str = "float32"  # of the saved weights
    target_logit_multiplier: float = 1.0  # from the bare output of the target's LM head to its logits
    target_logit_softcap: float | None = None

    def __post_init__(self) -> None:
        taps = self.target_layer_ids
        if len(taps) != NUM_TAPS or list(taps) != sorted(set(taps)) or taps[0] < 0:
            raise wrong("target_layer_ids", list(taps), "EAGLE-3 reads exactly five ascending layers, from 0 on")
        if self.ttt_length < 1:
            raise wrong("ttt_length", self.ttt_length, "it must be at least 1")
        if self.step_loss_decay <= 0:
            raise wrong("step_loss_decay", self.step_loss_decay, "it must be positive")

    @property
    def block_size(self) -> int:
        """γ, tokens drafted per round."""
        return self.ttt_length

    def to_json(self) -> dict[str, Any]:
        """The contents of ``config.json``: DeepSpec's keys and the Qwen3 keys that engines read."""
        values = self._json_keys(ARCHITECTURE, num_layers=1)
        return values | {"num_hidden_layers": 1, "draft_num_hidden_layers": 1}

    @staticmethod
    def from_json(values: Mapping[str, Any], origin: str = "config.json") -> "Eagle3Config":
        """The config from a parsed ``config.json``; ``origin`` names the file in messages.

        Raises:
            InputError: another architecture, more than one layer, a missing key, or a value this draft cannot have.
        """
        architectures = values.get("architectures") or ["nothing"]
        if architectures[0] != ARCHITECTURE:
            raise InputError(
                f"{origin} describes a {architectures[0]}, not an EAGLE-3 draft.",
                f"Give a folder whose config.json has architectures [{ARCHITECTURE!r}].",
            )
        if values.get("num_hidden_layers", 1) != 1:
            raise InputError(f"{origin}: num_hidden_layers is {values['num_hidden_layers']}.", "Only 1 can be decoded.")
        rope = values.get("rope_parameters") or {}
        given = {
            **values,
            "rope_theta": values.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            "dtype": str(values.get("dtype") or values.get("torch_dtype") or "float32"),
        }
        fields = {}
        for field in dataclasses.fields(Eagle3Config):
            if given.get(field.name) is None and field.default is dataclasses.MISSING:
                raise InputError(f"{origin} has no {field.name}.", "Use the config.json that was saved with the draft.")
            fields[field.name] = given.get(field.name, field.default)
        return Eagle3Config(**fields | {"target_layer_ids": tuple(int(tap) for tap in fields["target_layer_ids"])})


def build_eagle3_config(
    spec: TargetSpec, section: DraftSection, *, ttt_length: int = 7, step_loss_decay: float = 0.8
) -> tuple[Eagle3Config, tuple[str, ...]]:
    """The config of an EAGLE-3 draft for ``spec`` and the notes on what was assumed; shapes as `build_draft_config`."""
    like, notes = build_draft_config(spec, section, mask_token_id=0)
    shared = {field.name for field in dataclasses.fields(Eagle3Config)} & {f.name for f in dataclasses.fields(like)}
    values = {name: getattr(like, name) for name in shared}
    return Eagle3Config(**values, ttt_length=ttt_length, step_loss_decay=step_loss_decay), notes
