"""Drafts in the layouts of other projects: one pair of functions a format, config to config and name to name.

DSpark:
- deepspec: flat, architecture `Qwen3DSparkModel`; tap i is the output of layer i; with or without the target's
  embedding and LM head. DeepSpec and NeMo AutoModel read it.
- vllm: the same, always with a Markov head. What DeepSpec's blocks have not (`DraftConfig.beyond_deepspec`) stands in a
  `dflash_config`, as in NVIDIA's draft for Nemotron 3.5 Lightning.
- sglang: as vllm, always without embedding and head.
- speculators: a Qwen3 config nested in it; taps count from the embedding, so i + 1. speculators, vLLM and llama.cpp's
  converter read it.
- modelopt: flat with a `dflash_config`; heads without `markov_head.`, and `confidence_proj`. ModelOpt and vLLM read it.
- specforge: flat with a `dflash_config`, architecture `DSparkDraftModel`; DeepSpec's names. SpecForge reads it.

DFlash:
- vllm, sglang, modelopt, specforge: one layout, that of its authors: flat with a `dflash_config`, architecture
  `DFlashDraftModel`, never embedding and head. A draft of ours has it too, with both. llama.cpp's converter reads it.
- speculators: nested as its DSpark.

EAGLE-3:
- deepspec: flat, architecture `Qwen3Eagle3Model`.
- vllm: the same as `Eagle3Qwen3ForCausalLM`, whose taps count from the embedding.
- speculators: nested as its DSpark, with a Qwen3 layer.

A draft of a part of the vocabulary brings that part of the LM head and `d2t` in every format that has it (vllm,
speculators), and `t2d` too in speculators.

Facts are of speculators 0.9.0 (`models/{dspark,dflash,eagle3}/config.py`), ModelOpt 0.47.0
(`export/plugins/hf_spec_export.py`), SpecForge 0.2.0 (`modeling/draft/{dspark,dflash}.py`), vLLM 0.32.0
(`models/qwen3_{dspark,dflash,eagle3}.py`).
Keys that a format has no place for (``num_anchors``) are kept beside its own, which all of these readers ignore.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig, Eagle3Config, SavedConfig
from nemotron_dspark.errors import InputError

Json = dict[str, Any]
_KEPT = ("num_anchors", "num_target_layers", "dtype", "target_logit_multiplier", "target_logit_softcap")
_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
_LAYERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "hidden_act",
    "attention_bias",
    "layer_types",
)
_BLOCKS = ("dflash_config", "sliding_window", "is_causal", "attention_sink_bias", "sample_from_anchor")
_WINDOWED = frozenset(("sliding_window", "causal_block", "attention_sinks"))
_BEHIND_ANCHOR = frozenset(("sample_from_anchor",))
_ANY_BLOCK = _WINDOWED | _BEHIND_ANCHOR
_DEFAULTS: Json = {"markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True}


@dataclasses.dataclass(frozen=True)
class Verifier:
    """The target as a format may name it."""

    name: str
    architectures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Format:
    """How one project lays out a draft of one kind."""

    name: str
    embeddings: bool  # may hold the target's embedding and LM head
    write: Callable[[Any, Verifier], Json]  # its config.json, of a ``config``
    read: Callable[[Json], Json]  # DeepSpec's config.json of its own
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # beginnings of tensor names: DeepSpec's, its
    needs_head: bool = False  # a DSpark draft always has a Markov head
    reads_token: bool = False  # and its confidence head reads the previous token
    heads: tuple[str, ...] = ("vanilla", "gated", "rnn")
    config: type[SavedConfig] = DraftConfig
    own_embedding: bool = False  # an embedding that is not the target's may be there where ``embeddings`` may not
    reduced: bool = False  # may hold a draft of a part of the vocabulary
    blocks: frozenset[str] = frozenset()  # of `DraftConfig.beyond_deepspec`, what it can say

    def tensor_name(self, name: str, *, back: bool = False) -> str:
        """A tensor's name in this format, or ``back``: DeepSpec's."""
        for ours, theirs in self.names.items():
            old, new = (theirs, ours) if back else (ours, theirs)
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


def _deepspec(config: SavedConfig, verifier: Verifier) -> Json:
    return config.to_json()


def _from_deepspec(values: Json) -> Json:
    """What others leave out where it is off, and quantised weights refused."""
    if values.get("quantization_config"):
        raise InputError(
            "The draft's weights are quantised, and drafts here are not.",
            "Import the one in bfloat16, which their makers publish beside it.",
        )
    off: Json = {"enable_confidence_head": False, "markov_rank": 0, "markov_head_type": "vanilla"}
    return off | {"confidence_head_with_markov": False} | values


def _speculator(algorithm: str, class_name: str, config: SavedConfig, tokens: int, verifier: Verifier) -> Json:
    """What speculators writes for every kind of draft."""
    flat = config.to_json()
    return {
        "architectures": [class_name],
        "speculators_model_type": algorithm,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": algorithm,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier.name, "architectures": list(verifier.architectures)},
        },
        "transformer_layer_config": {"model_type": "qwen3"} | {key: flat[key] for key in _LAYERS},
        "draft_vocab_size": config.num_drafted,
        "target_hidden_size": config.hidden_size,
        **_present(flat, _KEPT),
        "tie_word_embeddings": False,
    }


def _to_speculators(config: DraftConfig, verifier: Verifier) -> Json:
    flat, dflash = config.to_json(), isinstance(config, DFlashConfig)
    if config.markov_head_type == "rnn" and not config.sample_from_anchor:
        raise InputError(
            "speculators begins an rnn head at the anchor's slot, and this draft one behind it.",
            "Train with draft.sample_from_anchor=true, or export it for SGLang.",
        )
    kind = ("dflash", "DFlashSpeculator") if dflash else ("dspark", "DSparkSpeculator")
    return {
        **_speculator(*kind, config, config.block_size, verifier),
        "block_size": config.block_width,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": False,
        **_present(flat, _HEADS),
    }


def _from_speculators(values: Json) -> Json:
    return _block_of_speculators(values) | _heads(values) | _present(values, ("sample_from_anchor",))


def _dflash_from_speculators(values: Json) -> Json:
    _refuse("sample_from_anchor", values.get("sample_from_anchor", False), False)
    return _block_of_speculators(values)


def _block_of_speculators(values: Json) -> Json:
    layers = values.get("transformer_layer_config") or {}
    if "sliding_attention" in (layers.get("layer_types") or ()):
        raise InputError(
            "speculators counts a window from the anchor, and drafts here from each slot, as vLLM does.",
            "Serve it with vLLM.",
        )
    return {
        **_present(layers, (*_LAYERS, "rope_theta")),
        **_present(values, ("block_size", "mask_token_id", "draft_vocab_size", *_KEPT)),
        "target_layer_ids": [tap - 1 for tap in values.get("aux_hidden_state_layer_ids") or []],
    }


def _from_dflash(values: Json) -> Json:
    nested = values.get("dflash_config") or {}
    _refuse("dflash_config.sample_from_anchor", nested.get("sample_from_anchor", False), False)
    return values


def _to_modelopt(config: DraftConfig, verifier: Verifier) -> Json:
    flat = config.to_json()
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": config.block_size,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            "causal": False,
            **config.attention_keys,
            "projector_type": "dspark",
            "shift_label": True,
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov_head_type,
            "use_confidence_head": config.enable_confidence_head,
        },
        **_present(flat, (*_LAYERS, "sliding_window", "attention_sink_bias")),
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        **_present(flat, _KEPT),
    }


def _from_modelopt(values: Json) -> Json:
    nested = values.get("dflash_config") or {}
    _refuse("dflash_config.shift_label", nested.get("shift_label", True), True)
    _refuse("dflash_config.sample_from_anchor", nested.get("sample_from_anchor", True), True)
    confident = nested.get("use_confidence_head", nested.get("enable_confidence_head", False))
    return {
        **_present(values, (*_LAYERS, *_BLOCKS, "rope_theta", "block_size", *_KEPT)),
        **_present(nested, ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")),
        "dtype": values.get("dtype") or values.get("torch_dtype") or "float32",
        "enable_confidence_head": confident,
        "confidence_head_with_markov": confident and nested.get("confidence_head_with_markov", True),
    }


def _to_specforge(config: DraftConfig, verifier: Verifier) -> Json:
    flat = config.to_json()
    grouped = config.num_key_value_heads < config.num_attention_heads
    return {
        "architectures": [_SPECFORGE],
        "model_type": "qwen3",
        "block_size": config.block_size,
        "dflash_config": {
            "projector_type": "dspark",
            "attention_mode": "gqa" if grouped else "mha",
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            **_present(flat, _HEADS),
        },
        **_present(flat, _LAYERS),
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        **_present(flat, _KEPT),
    }


def _from_specforge(values: Json) -> Json:
    nested = values.get("dflash_config") or {}
    confident = nested.get("enable_confidence_head", (nested.get("confidence_head_alpha") or 0) > 0)
    return {
        **_present(values, (*_LAYERS, "rope_theta", "block_size", *_KEPT)),
        **_present(nested, ("mask_token_id", "target_layer_ids")),
        "markov_rank": nested.get("markov_rank") or 0,
        "markov_head_type": nested.get("markov_head_type", "vanilla"),
        "dtype": values.get("dtype") or values.get("torch_dtype") or "float32",
        "enable_confidence_head": confident,
        "confidence_head_with_markov": confident and nested.get("confidence_head_with_markov", False),
    }


def _eagle3_to_vllm(config: Eagle3Config, verifier: Verifier) -> Json:
    return config.to_json() | {
        "architectures": [_VLLM_EAGLE3],
        "draft_vocab_size": config.num_drafted,
        "target_hidden_size": config.hidden_size,
        "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in config.target_layer_ids],
        "norm_before_residual": False,
    }


def _eagle3_from_vllm(values: Json) -> Json:
    for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        _refuse(key, bool(values.get(key)), False)
    taps = values.get("eagle_aux_hidden_state_layer_ids") or []
    return values | {"target_layer_ids": [tap - 1 for tap in taps]}


def _eagle3_to_speculators(config: Eagle3Config, verifier: Verifier) -> Json:
    return {
        **_speculator("eagle3", "Eagle3Speculator", config, config.ttt_length, verifier),
        "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in config.target_layer_ids],
        "norm_before_residual": False,
        "norm_before_fc": False,
        "ttt_length": config.ttt_length,
        "step_loss_decay": config.step_loss_decay,
    }


def _eagle3_from_speculators(values: Json) -> Json:
    layers = values.get("transformer_layer_config") or {}
    methods = (values.get("speculators_config") or {}).get("proposal_methods") or [{}]
    flat = {
        **_present(layers, (*_LAYERS, "rope_theta")),
        "ttt_length": methods[0].get("speculative_tokens"),
        **_present(values, ("ttt_length", "step_loss_decay", *_KEPT)),
    }
    _refuse("transformer_layer_config.model_type", layers.get("model_type"), "qwen3")
    return _eagle3_from_vllm({**values, **flat})


def _heads(values: Json) -> Json:
    found = _DEFAULTS | _present(values, _HEADS)
    found.setdefault("confidence_head_with_markov", found["enable_confidence_head"] and found["markov_rank"] > 0)
    return found


def _present(values: Mapping[str, Any], keys: tuple[str, ...]) -> Json:
    return {key: values[key] for key in keys if values.get(key) is not None}


def _refuse(key: str, value: Any, only: Any) -> None:
    if value != only:
        raise InputError(
            f"The draft has {key} = {value!r}, and drafts here only {only!r}.", "Serve it with the engine it is for."
        )


_VLLM_EAGLE3 = "Eagle3Qwen3ForCausalLM"
_SPECFORGE = "DSparkDraftModel"
_BARE_HEADS = {f"markov_head.{part}.": f"{part}." for part in ("markov_w1", "markov_w2", "gate_proj", "joint_proj")}
_BARE_HEADS["confidence_head.proj."] = "confidence_proj."
FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        Format("deepspec", True, _deepspec, _from_deepspec),
        Format("vllm", True, _deepspec, dict, needs_head=True, heads=("vanilla",), reduced=True, blocks=_ANY_BLOCK),
        Format("sglang", False, _deepspec, dict, needs_head=True, blocks=_ANY_BLOCK, own_embedding=True),
        Format(
            "speculators",
            False,
            _to_speculators,
            _from_speculators,
            needs_head=True,
            reduced=True,
            blocks=_BEHIND_ANCHOR,
        ),
        Format(
            "modelopt",
            False,
            _to_modelopt,
            _from_modelopt,
            _BARE_HEADS,
            needs_head=True,
            reads_token=True,
            blocks=_WINDOWED,
        ),
        Format("specforge", False, _to_specforge, _from_specforge),
    )
}
DFLASH_FORMATS: dict[str, Format] = {
    name: Format(name, False, _deepspec, _from_dflash, config=DFlashConfig, reduced=name == "vllm", blocks=blocks)
    for name, blocks in {
        "vllm": _ANY_BLOCK,
        "sglang": _ANY_BLOCK,
        "modelopt": _ANY_BLOCK,
        "specforge": _BEHIND_ANCHOR,
    }.items()
}
DFLASH_FORMATS["speculators"] = Format(
    "speculators",
    False,
    _to_speculators,
    _dflash_from_speculators,
    config=DFlashConfig,
    reduced=True,
    blocks=_BEHIND_ANCHOR,
)
EAGLE3_FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        Format("deepspec", True, _deepspec, dict, config=Eagle3Config),
        Format("vllm", True, _eagle3_to_vllm, _eagle3_from_vllm, config=Eagle3Config, reduced=True),
        Format(
            "speculators",
            False,
            _eagle3_to_speculators,
            _eagle3_from_speculators,
            config=Eagle3Config,
            reduced=True,
        ),
    )
}


def recognise(values: Json, origin: str) -> Format:
    """The format that a draft's ``config.json`` is in; deepspec for those that have its config.

    Raises:
        InputError: none of those known.
    """
    architectures = values.get("architectures") or ()
    speculator = {"dspark": FORMATS, "dflash": DFLASH_FORMATS, "eagle3": EAGLE3_FORMATS}
    if values.get("speculators_model_type") in speculator:
        return speculator[values["speculators_model_type"]]["speculators"]
    if DFlashConfig.describes(values):
        return DFLASH_FORMATS["vllm"]
    if (values.get("dflash_config") or {}).get("projector_type") == "dspark":
        return FORMATS["specforge" if _SPECFORGE in architectures else "modelopt"]
    if DraftConfig.architecture in architectures:
        return FORMATS["deepspec"]
    if Eagle3Config.architecture in architectures:
        return EAGLE3_FORMATS["deepspec"]
    if _VLLM_EAGLE3 in architectures and not values.get("speculators_model_type"):
        return EAGLE3_FORMATS["vllm"]
    kind = values.get("speculators_model_type") or (architectures or ["nothing known"])[0]
    raise InputError(
        f"{origin} describes {kind}, not a draft that drafts here can be.",
        "Give a DSpark or DFlash draft of DeepSpec, vLLM, speculators, SGLang, ModelOpt or SpecForge, or an EAGLE-3 of "
        "DeepSpec or speculators.",
    )
