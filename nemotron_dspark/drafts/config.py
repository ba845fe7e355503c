"""The draft's shape, as DeepSpec's `Qwen3DSparkModel` writes it in ``config.json`` and as the engines read it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json
from nemotron_dspark.targets.spec import TargetSpec

ARCHITECTURE = "Qwen3DSparkModel"
SEQUENTIAL_HEADS = ("vanilla", "gated", "rnn")
_OPTIONAL = (
    "max_position_embeddings", "num_anchors", "head_dim", "target_logit_multiplier", "target_logit_softcap"
)  # fmt: skip
_RESTORE = "Use the config.json that was saved with the draft."


class SavedConfig:
    """What the configs of every kind of draft share: their spelling in ``config.json`` and the target they are for."""

    @property
    def num_taps(self) -> int:
        return len(self.target_layer_ids)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The config of a draft's folder."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError(f"{folder} is not a draft: it has no config.json.", "Give the folder that training made.")
        return cls.from_json(read_json(path), str(path))

    def check_target(self, spec: TargetSpec) -> None:
        """`InputError` when this draft was made for a target of another shape than ``spec``."""
        for what, mine, its in (
            ("hidden size", self.hidden_size, spec.hidden_size),
            ("vocabulary", self.vocab_size, spec.vocab_size),
            ("number of target layers", self.num_target_layers, spec.num_layers),
        ):
            if mine != its:
                raise InputError(
                    f"The draft was made for another target: its {what} is {mine}, that of {spec.name} is {its}.",
                    "Give the target the draft was trained for, or train a draft for this target.",
                )

    def _json_keys(self, architecture: str, num_layers: int) -> dict[str, Any]:
        """The fields, and what makes transformers and engines read a Qwen3 in them."""
        values = {
            "architectures": [architecture],
            "model_type": "qwen3",
            "layer_types": ["full_attention"] * num_layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "use_sliding_window": False,
            "sliding_window": None,
            **dataclasses.asdict(self),
            "target_layer_ids": list(self.target_layer_ids),
        }
        if self.target_logit_multiplier == 1.0:  # DeepSpec does not know these two keys
            del values["target_logit_multiplier"]
        if self.target_logit_softcap is None:
            del values["target_logit_softcap"]
        return values


@dataclasses.dataclass(frozen=True)
class DraftConfig(SavedConfig):
    """Shape of a DSpark draft. The field names are the keys of ``config.json``."""

    hidden_size: int  # H, the target's
    intermediate_size: int  # SwiGLU width
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # heads * head_dim need not be H
    vocab_size: int  # V, the target's
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    block_size: int  # γ, tokens drafted per round
    mask_token_id: int  # fills the slots after the anchor
    target_layer_ids: tuple[int, ...]  # taps, ascending
    num_target_layers: int
    num_anchors: int = 512  # blocks drawn per sample in training
    markov_rank: int = 256  # r; 0 = no sequential head (DeepSpec's DFlash)
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    target_logit_multiplier: float = 1.0  # from the bare output of the target's LM head to its logits
    target_logit_softcap: float | None = None
    dtype: str = "float32"  # of the saved weights

    def __post_init__(self) -> None:
        if not self.enable_confidence_head:  # the key says nothing then, and is not written
            object.__setattr__(self, "confidence_head_with_markov", False)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            _at_least_one(key, getattr(self, key))
        for key in ("num_key_value_heads", "vocab_size", "max_position_embeddings", "block_size", "num_anchors"):
            _at_least_one(key, getattr(self, key))
        if self.num_attention_heads % self.num_key_value_heads:
            raise wrong(
                "num_key_value_heads", self.num_key_value_heads, f"it must divide {self.num_attention_heads} heads"
            )
        if self.head_dim % 2:
            raise wrong("head_dim", self.head_dim, "rotary embedding needs an even size")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise wrong("mask_token_id", self.mask_token_id, f"the vocabulary has {self.vocab_size} ids")
        taps = self.target_layer_ids
        if not taps or list(taps) != sorted(set(taps)):
            raise wrong("target_layer_ids", list(taps), "taps must be given in ascending order, each once")
        if taps[0] < -1 or taps[-1] >= self.num_target_layers:
            raise wrong("target_layer_ids", list(taps), f"the target has layers 0 to {self.num_target_layers - 1}")
        if self.markov_rank < 0:
            raise wrong("markov_rank", self.markov_rank, "it cannot be negative")
        if self.markov_rank and self.markov_head_type not in SEQUENTIAL_HEADS:
            raise wrong("markov_head_type", self.markov_head_type, f"known are {', '.join(SEQUENTIAL_HEADS)}")
        if self.enable_confidence_head and self.confidence_head_with_markov and not self.markov_rank:
            raise wrong("confidence_head_with_markov", True, "with markov_rank 0 no token is embedded")

    def to_json(self) -> dict[str, Any]:
        """The contents of ``config.json``: DeepSpec's keys and the Qwen3 keys that engines read."""
        values = self._json_keys(ARCHITECTURE, self.num_hidden_layers)
        if not self.markov_rank:
            del values["markov_head_type"]
        if not self.enable_confidence_head:
            del values["confidence_head_with_markov"]
        return values

    @staticmethod
    def from_json(values: Mapping[str, Any], origin: str = "config.json") -> "DraftConfig":
        """The config from a parsed ``config.json``; ``origin`` names the file in messages.

        Raises:
            InputError: another architecture, a missing key, or a value this draft cannot have.
        """
        architectures = values.get("architectures") or ["nothing"]
        if architectures[0] != ARCHITECTURE:
            raise InputError(
                f"{origin} describes a {architectures[0]}, not a DSpark draft.",
                f"Give a folder whose config.json has architectures [{ARCHITECTURE!r}].",
            )
        _refuse_unlike_qwen3(values, origin)
        rope = values.get("rope_parameters") or {}
        rank = int(_need(values, "markov_rank", origin))
        confident = bool(_need(values, "enable_confidence_head", origin))
        given = {
            **{key: values[key] for key in _OPTIONAL if key in values},
            "rope_theta": values.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            "markov_rank": rank,
            "markov_head_type": _need(values, "markov_head_type", origin) if rank else "vanilla",
            "enable_confidence_head": confident,
            "confidence_head_with_markov": bool(confident and _need(values, "confidence_head_with_markov", origin)),
            "dtype": str(values.get("dtype") or values.get("torch_dtype") or "float32"),
        }
        fields = {
            field.name: given[field.name] if field.name in given else _need(values, field.name, origin)
            for field in dataclasses.fields(DraftConfig)
            if field.name in given or field.default is dataclasses.MISSING
        }
        try:
            fields["target_layer_ids"] = tuple(int(tap) for tap in fields["target_layer_ids"])
            return DraftConfig(**fields)
        except (TypeError, ValueError) as error:
            raise InputError(f"{origin} holds a value of the wrong type: {error}.", _RESTORE) from None


def _refuse_unlike_qwen3(values: Mapping[str, Any], origin: str) -> None:
    rope_type = (values.get("rope_parameters") or values.get("rope_scaling") or {}).get("rope_type", "default")
    for key, value, only in (
        ("hidden_act", values.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(values.get("attention_bias", False)), False),
        ("rope_type", rope_type, "default"),
        ("layer_types", sorted(set(values.get("layer_types") or ["full_attention"])), ["full_attention"]),
    ):
        if value != only:
            raise InputError(f"{origin}: {key} is {value!r}; drafts here only have {only!r}.", _RESTORE)


def _need(values: Mapping[str, Any], key: str, origin: str) -> Any:
    if values.get(key) is None:
        raise InputError(f"{origin} has no {key}.", _RESTORE)
    return values[key]


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise wrong(key, value, "it must be at least 1")


def wrong(key: str, value: Any, why: str) -> InputError:
    """That ``key`` of a draft cannot be ``value``."""
    return InputError(f"The draft cannot have {key} = {value!r}: {why}.", f"Correct {key}.")
