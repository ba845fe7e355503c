"""The shapes of drafts as DeepSpec writes them in ``config.json`` and engines read them, and how they follow from a
target: with a sentence on every value that had to be assumed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from nemotron_dspark.config import DraftSection
from nemotron_dspark.config.run import MarkovHead
from nemotron_dspark.config.validation import input_error
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.taps import chosen_taps

ASSUMED_ROPE_THETA = 10_000.0
EAGLE3_TAPS = 5  # DeepSpec's class takes exactly these
EvenInt = Annotated[PositiveInt, Field(multiple_of=2)]  # rotary embedding pairs the halves
_NESTED = ("block_size", "mask_token_id", "target_layer_ids")  # of `dflash_config`
_SLIDING = "sliding_attention"  # a layer's type
_RESTORE = "Use the config.json that was saved with the draft."


class SavedConfig(BaseModel):
    """What the configs of all kinds of drafts share. Their field names are the keys of ``config.json``.

    A value that no draft can have is an `InputError`, wherever it comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    architecture: ClassVar[str]  # DeepSpec's class
    kind: ClassVar[str]

    hidden_size: PositiveInt  # H, the target's
    intermediate_size: PositiveInt  # SwiGLU width
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: EvenInt  # heads * head_dim need not be H
    vocab_size: PositiveInt  # V, the target's
    draft_vocab_size: PositiveInt | None = None  # N, tokens that it can draft; None: all V
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: PositiveInt
    target_layer_ids: tuple[int, ...]  # taps, ascending
    num_target_layers: int
    target_logit_multiplier: float = 1.0  # from the bare output of the target's LM head to its logits
    target_logit_softcap: float | None = None
    own_embedding: bool = False  # its embedding is not the target's, so that no slim copy leaves it out
    dtype: str = "float32"  # of the saved weights

    @model_validator(mode="wrap")
    @classmethod
    def _in_two_sentences(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        origin, do = info.context or (f"The {cls.kind} draft's config", "Correct the value.")
        try:
            config = handler(values)
        except ValidationError as error:
            raise input_error(error, origin, do) from None
        for key, why in config._misfits():
            raise InputError(f"{origin}: {key} = {getattr(config, key)!r} is not accepted: {why}.", do)
        return config

    def _misfits(self) -> Iterator[tuple[str, str]]:
        """Keys whose value does not fit the others', and why."""
        if self.draft_vocab_size is not None and self.draft_vocab_size >= self.vocab_size:
            yield "draft_vocab_size", f"the target has {self.vocab_size} tokens, and a part of them is fewer"

    @property
    def num_taps(self) -> int:
        return len(self.target_layer_ids)

    @property
    def num_drafted(self) -> int:
        """Tokens that it can draft: the rows of its LM head."""
        return self.draft_vocab_size or self.vocab_size

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The config of a draft's folder; errors as `from_json`."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError(f"{folder} is not a draft: it has no config.json.", "Give the folder that training made.")
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], origin: str = "config.json") -> Self:
        """The config from a parsed ``config.json``; ``origin`` names the file in messages.

        Raises:
            InputError: another architecture, a missing key, or a value this draft cannot have.
        """
        architecture = (values.get("architectures") or ["nothing"])[0]
        if architecture != cls.architecture:
            raise InputError(
                f"{origin} describes a {architecture}, not a {cls.kind} draft.",
                f"Give a folder whose config.json has architectures [{cls.architecture!r}].",
            )
        for key in cls._needed(values):
            if values.get(key) is None:
                raise InputError(f"{origin} has no {key}.", _RESTORE)
        _refuse_unlike_qwen3(values, origin)
        rope = values.get("rope_parameters") or {}
        known = {key: values[key] for key in cls.model_fields if values.get(key) is not None}
        if known.get("draft_vocab_size") == known.get("vocab_size"):  # engines' way to say all of it
            known.pop("draft_vocab_size", None)
        known["rope_theta"] = values.get("rope_theta") or rope.get("rope_theta") or ASSUMED_ROPE_THETA
        known["dtype"] = str(values.get("dtype") or values.get("torch_dtype") or "float32")
        return cls.model_validate(known, context=(origin, _RESTORE))

    @classmethod
    def _needed(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Keys that a file must have although they have a default."""
        return ()

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

    def to_json(self) -> dict[str, Any]:
        """The contents of ``config.json``: DeepSpec's keys, and what makes engines read a Qwen3 in them."""
        values = {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "use_sliding_window": False,
            "sliding_window": None,
            **self.model_dump(mode="json"),
        }
        if self.target_logit_multiplier == 1.0:  # DeepSpec does not know these four keys
            del values["target_logit_multiplier"]
        if not self.own_embedding:
            del values["own_embedding"]
        if self.target_logit_softcap is None:
            del values["target_logit_softcap"]
        if self.draft_vocab_size is None:
            del values["draft_vocab_size"]
        return values


class DraftConfig(SavedConfig):
    """Shape of a DSpark draft."""

    architecture = "Qwen3DSparkModel"
    kind = "DSpark"
    _anchored: ClassVar[bool] = True  # what a config that does not say it means

    block_size: PositiveInt  # γ, tokens drafted per round
    mask_token_id: int  # fills the slots after the anchor
    num_anchors: PositiveInt = 512  # blocks drawn per sample in training
    sample_from_anchor: bool = True  # the anchor's own slot predicts; False: the γ slots behind it do
    sliding_window: PositiveInt | None = None  # a slot sees positions fewer than this before it; None: all
    causal_block: bool = False  # a slot sees its block up to itself
    attention_sinks: bool = False  # a logit per head and layer that takes part in the softmax without a value
    markov_rank: int = Field(256, ge=0)  # r; 0 = no sequential head (DeepSpec's DFlash)
    markov_head_type: MarkovHead = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_off(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The kind of a head that is off says nothing, and is not written."""
        if values.get("markov_rank") == 0:
            values = values | {"markov_head_type": "vanilla"}
        if not values.get("enable_confidence_head", True):
            values = values | {"confidence_head_with_markov": False}
        return values

    def _misfits(self) -> Iterator[tuple[str, str]]:
        yield from super()._misfits()
        taps = self.target_layer_ids
        if self.num_attention_heads % self.num_key_value_heads:
            yield "num_key_value_heads", f"it must divide {self.num_attention_heads} heads"
        if not 0 <= self.mask_token_id < self.vocab_size:
            yield "mask_token_id", f"the vocabulary has {self.vocab_size} ids"
        if not taps or list(taps) != sorted(set(taps)):
            yield "target_layer_ids", "taps must be given in ascending order, each once"
        elif taps[0] < -1 or taps[-1] >= self.num_target_layers:
            yield "target_layer_ids", f"the target has layers 0 to {self.num_target_layers - 1}"
        if self.confidence_head_with_markov and not self.markov_rank:
            yield "confidence_head_with_markov", "with markov_rank 0 no token is embedded"
        if self.sliding_window is not None and self.sliding_window <= self.block_width:
            yield "sliding_window", f"a block has {self.block_width} positions, and a window must hold more"

    @property
    def block_width(self) -> int:
        """Positions that pass through the layers for a block, the anchor among them."""
        return self.block_size + (not self.sample_from_anchor)

    @property
    def beyond_deepspec(self) -> dict[str, str]:
        """What its attention and its blocks have that DeepSpec's have not: fields, and in words."""
        found = {
            "sliding_window": (self.sliding_window is not None, "a sliding window"),
            "causal_block": (self.causal_block, "a causal block"),
            "attention_sinks": (self.attention_sinks, "attention sinks"),
            "sample_from_anchor": (not self.sample_from_anchor, "a slot 0 that is not sampled from the anchor"),
        }
        return {field: words for field, (has, words) in found.items() if has}

    @property
    def attention_keys(self) -> dict[str, Any]:
        """What of its attention is not DeepSpec's, in the keys of a ``dflash_config``."""
        found: dict[str, Any] = {"causal": True} if self.causal_block else {}
        if self.sliding_window is not None:
            # Without the first key readers would take layers with a window for causal ones.
            found = {"causal": self.causal_block, "use_swa": True, "swa_window_size": self.sliding_window}
        return found | ({"attention_sink_bias": True} if self.attention_sinks else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any], origin: str = "config.json") -> Self:
        if cls is DraftConfig and DFlashConfig.describes(values):
            return cast("Self", DFlashConfig.from_json(values, origin))
        nested = values.get("dflash_config") or {}
        flat = {**values, **{key: nested[key] for key in _NESTED if nested.get(key) is not None}}
        flat |= _read_attention(values, origin)
        bonus = values.get("dspark_bonus_anchor", not cls._anchored)  # the older key; the other says the opposite
        anchored = nested.get("sample_from_anchor", values.get("sample_from_anchor", not bonus))
        flat["sample_from_anchor"] = anchored
        if not anchored:
            size = flat.get("block_size")
            if not isinstance(size, int) or size < 2:
                raise InputError(f"{origin}: block_size is {size!r}, and it counts the anchor and γ more.", _RESTORE)
            flat["block_size"] = size - 1
        return super().from_json(flat, origin)

    @classmethod
    def _needed(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        rank = ("markov_head_type",) if values.get("markov_rank") else ()
        confident = ("confidence_head_with_markov",) if values.get("enable_confidence_head") else ()
        return ("markov_rank", "enable_confidence_head", *rank, *confident)

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        del values["causal_block"], values["attention_sinks"]
        if self.sample_from_anchor:  # DeepSpec does not know another
            del values["sample_from_anchor"]
        else:
            values["block_size"] = self.block_width
        if self.beyond_deepspec:
            values["dflash_config"] = {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.target_layer_ids),
                **self.attention_keys,
            }
            if not self.sample_from_anchor:
                values["dflash_config"]["sample_from_anchor"] = False
                values["dspark_bonus_anchor"] = True
            if self.attention_sinks:
                values["attention_sink_bias"] = True
        if not self.markov_rank:
            del values["markov_head_type"]
        if not self.enable_confidence_head:
            del values["confidence_head_with_markov"]
        return values


class DFlashConfig(DraftConfig):
    """Shape of a DFlash draft as its authors and the engines have it: the anchor's slot predicts nothing."""

    architecture = "DFlashDraftModel"
    kind = "DFlash"
    _anchored = False

    sample_from_anchor: Literal[False] = False
    markov_rank: Literal[0] = 0
    enable_confidence_head: Literal[False] = False
    confidence_head_with_markov: Literal[False] = False

    @classmethod
    def describes(cls, values: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of this kind; ModelOpt's DSpark drafts have its architecture too."""
        nested = values.get("dflash_config") or {}
        return values.get("architectures") == [cls.architecture] and "projector_type" not in nested

    @classmethod
    def _needed(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        return ("mask_token_id", "target_layer_ids")

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        for key in ("sample_from_anchor", "dspark_bonus_anchor", "markov_rank", "enable_confidence_head"):
            del values[key]
        del values["dflash_config"]["sample_from_anchor"]
        return values


class Eagle3Config(SavedConfig):
    """Shape of an EAGLE-3 draft: one decoder layer."""

    architecture = "Qwen3Eagle3Model"
    kind = "EAGLE-3"

    num_hidden_layers: Literal[1] = 1
    ttt_length: PositiveInt = 7  # steps unrolled in training, tokens drafted per round in decoding
    step_loss_decay: PositiveFloat = 0.8  # step i of the unrolling weighs this to the power of i

    def _misfits(self) -> Iterator[tuple[str, str]]:
        yield from super()._misfits()
        taps = self.target_layer_ids
        if len(taps) != EAGLE3_TAPS or list(taps) != sorted(set(taps)) or taps[0] < 0:
            yield "target_layer_ids", "EAGLE-3 reads exactly five ascending layers, from 0 on"

    @property
    def block_size(self) -> int:
        """γ, tokens drafted per round."""
        return self.ttt_length

    @property
    def mask_token_id(self) -> None:
        """There is none: no slot is read before it is drafted."""
        return None

    @classmethod
    def from_json(cls, values: Mapping[str, Any], origin: str = "config.json") -> Self:
        if values.get("num_hidden_layers", 1) != 1:
            raise InputError(f"{origin}: num_hidden_layers is {values['num_hidden_layers']}.", "Only 1 can be decoded.")
        return super().from_json(values, origin)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"draft_num_hidden_layers": 1}


def read_draft_config(folder: Path) -> DraftConfig | Eagle3Config:
    """The config of the draft in ``folder``, of whatever kind; errors as `SavedConfig.from_folder`."""
    path = Path(folder) / "config.json"
    values = read_json(path) if path.is_file() else {}
    architectures = values.get("architectures") if isinstance(values, dict) else None
    return (Eagle3Config if architectures == [Eagle3Config.architecture] else DraftConfig).from_folder(folder)


def _read_attention(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`DraftConfig`'s keys of attention, out of a ``config.json`` as vLLM reads it; `InputError` for mixed layers."""
    nested = values.get("dflash_config") or {}
    types = set(values.get("layer_types") or ())
    if len(types) > 1:
        raise InputError(
            f"{origin}: its layers are of different types, {' and '.join(sorted(types))}; here all have one.",
            "Serve it with the engine it is for.",
        )
    sliding = nested.get("use_swa", False) or types == {_SLIDING}
    window = nested.get("swa_window_size") or values.get("sliding_window")
    causal = next(
        (said for said in (values.get("is_causal"), nested.get("causal")) if said is not None), types == {_SLIDING}
    )
    sinks = nested.get("attention_sink_bias", values.get("attention_sink_bias", False))
    if sliding and window is None:
        raise InputError(f"{origin}: its layers have a window, and it does not say how long.", _RESTORE)
    return {
        "sliding_window": window if sliding else None,
        "causal_block": bool(causal),
        "attention_sinks": bool(sinks),
        "layer_types": None if types == {_SLIDING} else values.get("layer_types"),
    }


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


# --- from a target ---


def build_draft_config(
    spec: TargetSpec, section: DraftSection, *, mask_token_id: int, num_anchors: int = 512
) -> tuple[DraftConfig, tuple[str, ...]]:
    """The config of a DSpark or DFlash draft for ``spec`` and the notes on what was assumed.

    Hidden size, vocabulary, heads, head_dim and eps are the target's; the rest follows ``section``, and what it leaves
    open follows the target.

    Raises:
        InputError: taps out of range, or a combination of keys no draft can have.
    """
    shape, notes = _shape_for(spec, section)
    attention = {key: getattr(section, key) for key in ("sliding_window", "causal_block", "attention_sinks")}
    if section.kind == "dflash":
        return DFlashConfig(
            **shape,
            num_hidden_layers=section.num_layers,
            block_size=section.block_size,
            mask_token_id=mask_token_id,
            num_anchors=num_anchors,
            **attention,
        ), notes
    with_markov = section.confidence_with_markov
    if section.confidence_head and with_markov and not section.markov_rank:
        with_markov = False
        notes += ("the confidence head reads the hidden state only: with markov_rank 0 there is nothing else.",)
    config = DraftConfig(
        **shape,
        num_hidden_layers=section.num_layers,
        block_size=section.block_size,
        mask_token_id=mask_token_id,
        num_anchors=num_anchors,
        sample_from_anchor=section.sample_from_anchor,
        **attention,
        markov_rank=section.markov_rank,
        markov_head_type=section.markov_head,
        enable_confidence_head=section.confidence_head,
        confidence_head_with_markov=section.confidence_head and with_markov,
    )
    return config, notes


def build_eagle3_config(
    spec: TargetSpec, section: DraftSection, *, ttt_length: int = 7, step_loss_decay: float = 0.8
) -> tuple[Eagle3Config, tuple[str, ...]]:
    """The config of an EAGLE-3 draft for ``spec`` and the notes on what was assumed; shapes as `build_draft_config`."""
    for key in ("sliding_window", "causal_block", "attention_sinks"):
        if getattr(section, key):
            raise InputError(f"EAGLE-3 drafts have no {key}.", f"Leave draft.{key} out, or train another kind.")
    shape, notes = _shape_for(spec, section)
    return Eagle3Config(**shape, ttt_length=ttt_length, step_loss_decay=step_loss_decay), notes


def _shape_for(spec: TargetSpec, section: DraftSection) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What follows from the target for every kind of draft, and the notes on what was assumed."""
    width, width_notes = _mlp_width(spec, section)
    notes = [*spec.assumed, *width_notes]
    theta = section.rope_theta if section.rope_theta is not None else spec.rope_theta
    if theta is None:
        theta = ASSUMED_ROPE_THETA
        notes.append(
            "rope theta 10000: the target has no rotary embedding, and drafts published for such targets use 10000 "
            "(draft.rope_theta sets it)."
        )
    heads, heads_kv, head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    if not heads:
        heads, head_dim = max(1, spec.hidden_size // 128), 128
        heads_kv = max(count for count in range(1, 9) if heads % count == 0)
        notes.append(
            f"{heads} heads of {head_dim}, {heads_kv} of keys and values: the target has no attention to take them "
            "from; the default is hidden / 128 heads, and 8 of keys and values or the most below that divide them."
        )
    taps = chosen_taps(spec, section)
    if not isinstance(section.taps, list):
        choice = f"the choice {section.taps!r}" if section.taps else "the default choice"
        notes.append(f"taps {', '.join(map(str, taps))}: {choice} (draft.taps sets them).")
    shape = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads_kv,
        "head_dim": head_dim,
        "vocab_size": spec.vocab_size,
        "draft_vocab_size": None if section.vocabulary == spec.vocab_size else section.vocabulary,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": theta,
        "max_position_embeddings": spec.max_position_embeddings,
        "target_layer_ids": tuple(taps),
        "num_target_layers": spec.num_layers,
        "target_logit_multiplier": spec.logit_multiplier,
        "target_logit_softcap": spec.logit_softcap,
    }
    return shape, tuple(notes)


def _mlp_width(spec: TargetSpec, section: DraftSection) -> tuple[int, list[str]]:
    """SwiGLU width: as set; the target's if its MLP is gated; else one of about the same parameter count."""
    theirs = spec.intermediate_size
    if section.intermediate_size is not None:
        return section.intermediate_size, []
    if spec.mlp == "gated" and theirs is not None:
        return theirs, []
    if spec.mlp == "plain" and theirs is not None:
        width = _round_up(-(-2 * theirs // 3), 256)
        reason = f"two thirds of the target's ungated {theirs}, so as many parameters"
    else:
        width = _round_up(-(-9 * spec.hidden_size // 4), 512)
        reason = "2.25 x hidden, as NVIDIA's draft for a mixture of experts has"
    return width, [f"SwiGLU width {width}: {reason} (draft.intermediate_size sets it)."]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
