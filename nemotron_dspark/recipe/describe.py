"""Everything that follows from a target before a weight is loaded: layout, draft, chats, mask token, sizes, warnings.

A folder with nothing but a config.json is enough. What only other files can tell is then taken from what is known of a
published target, and said to be unchecked, or it is unknown, and said to be.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_dspark.config import RunConfig
from nemotron_dspark.config.known import RESEARCH_ONLY, KnownTarget, known_target, preset_for
from nemotron_dspark.drafts.config import DraftConfig, build_draft_config
from nemotron_dspark.errors import InputError, first_line
from nemotron_dspark.files import read_json
from nemotron_dspark.targets.families import needs_remote_code
from nemotron_dspark.targets.locate import locate
from nemotron_dspark.targets.spec import LayerKind, TargetSpec
from nemotron_dspark.targets.weights import missing_shards, parameter_count

SHORT_CONTEXT = 8192
_EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
_UNCHECKED = "not checked, there is no tokenizer here"
OLDEST_RIGHT_TRANSFORMERS = (5, 15)  # earlier ones scan Nemotron-H wrongly when there are no CUDA kernels


@dataclasses.dataclass(frozen=True)
class Description:
    """What `nds inspect` shows. None means that the folder does not say."""

    spec: TargetSpec
    folder: Path
    known: str | None  # repository whose published facts were used
    preset: str | None  # file in configs/ that applies by the target's name
    mamba: str | None  # sizes of its Mamba layers, in words
    experts: str | None  # sizes of its experts, in words
    multi_token_layers: str | None  # layers for multi-token prediction in the checkpoint; a draft takes their place
    quantised: str | None  # how the weights are stored when not in full precision
    licence: str | None
    parameters: int | None  # as transformers builds it from the config
    active_parameters: int | None  # of them, those that one token passes through: all but experts it is not sent to
    stored_parameters: int | None  # elements in the folder's safetensors files
    draft: DraftConfig
    draft_parameters: int  # trainable ones
    notes: tuple[str, ...]  # on values of the draft that had to be assumed
    tokens: int | None  # ids the tokenizer has
    has_chat_template: bool | None
    chat_format: str | None  # the bundled format it is recognised as, or known to have
    chat_reason: str
    mask_token: int | None
    mask_reason: str
    stop_ids: tuple[int, ...]
    cache_bytes_per_token: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, as `nds inspect --json` prints it."""
        spec = dataclasses.asdict(self.spec) | {"layers": self.spec.layout, "num_layers": self.spec.num_layers}
        del spec["names"]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        draft = self.draft.to_json() | {"mask_token_id": self.mask_token}
        return values | {"spec": spec, "folder": str(self.folder), "draft": draft}


def inspect(config: RunConfig) -> Description:
    """Describe the target that ``config.target`` names as the stages would use it.

    Raises:
        InputError: the target cannot be found, its family is not supported, or ``config`` does not fit it.
        EnvironmentFault: the hub cannot be reached.
    """
    name = config.target.named
    folder = locate(name, revision=config.target.revision, code=config.target.trust_remote_code)
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise InputError(f"{folder / 'config.json'} is not a JSON object.", "Restore it from the checkpoint.")
    trusted = config.target.trust_remote_code and needs_remote_code(values)
    spec = TargetSpec.from_folder(folder, name, trust_remote_code=trusted)
    warnings: list[str] = []

    parameters, active = _built_parameters(folder, values, trusted, warnings)
    known = _known(name, values, spec, parameters, warnings)
    tokenizer = _tokenizer(folder, trusted, warnings)
    mask_token, mask_reason = _mask_token(tokenizer, spec, config.draft.mask_token_id, known, warnings)
    draft, notes = build_draft_config(
        spec, config.draft, mask_token_id=mask_token or 0, num_anchors=config.train.num_anchors
    )
    quantised = _quantised(folder, values, known)
    has_template, chat_format, chat_reason = _chat(tokenizer, known, warnings)
    _warn(spec, config, folder, tokenizer, known, quantised, warnings)
    preset = preset_for(name)
    return Description(
        spec=spec,
        folder=folder,
        known=known.repository if known else None,
        preset=preset.name if preset else None,
        mamba=_mamba(values),
        experts=_experts(values),
        multi_token_layers=_multi_token_layers(values),
        quantised=quantised,
        licence=known.licence if known else None,
        parameters=parameters,
        active_parameters=active,
        stored_parameters=_stored_parameters(folder, quantised, parameters, warnings),
        draft=draft,
        draft_parameters=_draft_parameters(draft),
        notes=notes,
        tokens=len(tokenizer) if tokenizer is not None else None,
        has_chat_template=has_template,
        chat_format=chat_format,
        chat_reason=chat_reason,
        mask_token=mask_token,
        mask_reason=mask_reason,
        stop_ids=_stop_ids(folder, values, known, warnings),
        cache_bytes_per_token=cache_bytes_per_token(spec.hidden_size, len(draft.target_layer_ids)),
        warnings=tuple(warnings),
    )


def cache_bytes_per_token(hidden_size: int, num_taps: int) -> int:
    """Bytes of one token in DeepSpec's cache: bfloat16 taps and last hidden state, an int32 id, two mask bytes."""
    return 2 * hidden_size * (num_taps + 1) + 4 + 1 + 1


def _known(
    name: str, values: Mapping[str, Any], spec: TargetSpec, parameters: int | None, warnings: list[str]
) -> KnownTarget | None:
    """The published target that ``name``, or else the config, says this is, if it has that one's size."""
    known = known_target(name) or known_target(str(values.get("_name_or_path") or ""))
    if known is None:
        return None
    same = parameters is None or abs(parameters / 1e9 - known.billions) < 1e-3 * known.billions
    if same and spec.num_layers == known.layers:
        return known
    warnings.append(
        f"This is not {known.repository}, whatever it is called: its size is another one."
        + (f" configs/{known.preset} applies all the same: rename the folder or check the values." * bool(known.preset))
    )
    return None


def tokenizer_in(found: Description, *, trusted: bool = False) -> Any | None:
    """The described target's tokenizer, or None where its folder has none that loads."""
    return _tokenizer(found.folder, trusted, [])


def _tokenizer(folder: Path, trusted: bool, warnings: list[str]) -> Any | None:
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        warnings.append("There are no tokenizer files here: chats, mask token and vocabulary could not be checked.")
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # whatever the library raises on damaged files
        warnings.append(f"The tokenizer cannot be loaded: {first_line(error)}.")
        return None


def _mask_token(
    tokenizer: Any, spec: TargetSpec, override: int | None, known: KnownTarget | None, warnings: list[str]
) -> tuple[int | None, str]:
    from nemotron_dspark.chat.mask_token import NEMOTRON_MASK, choose_mask_token

    if tokenizer is not None:
        try:
            chosen = choose_mask_token(tokenizer, spec, override=override)
        except InputError as error:
            warnings.append(f"{error.what} {error.do}")
            return None, "unknown"
        return chosen.id, chosen.reason
    documented = known.mask_token if known else None
    if documented is not None and override in (None, documented):
        return documented, f"documented for this target; {_UNCHECKED}"
    if override is not None:
        return override, f"set by draft.mask_token_id; {_UNCHECKED}"
    if spec.model_type == "nemotron_h" and spec.vocab_size > NEMOTRON_MASK:
        return None, f"unknown without the tokenizer; {NEMOTRON_MASK} if it is Nemotron's"
    return None, "unknown without the tokenizer"


def _chat(tokenizer: Any, known: KnownTarget | None, warnings: list[str]) -> tuple[bool | None, str | None, str]:
    """Whether there is a chat template, the bundled format it is of, and how that is known."""
    from nemotron_dspark.chat.format import recognise

    if tokenizer is None:
        if known and known.chat_format:
            return None, known.chat_format, f"documented for this target; {_UNCHECKED}"
        return None, None, "unknown without the tokenizer"
    if not tokenizer.chat_template:
        warnings.append("The tokenizer has no chat template: messages are joined as plain text, as for a base model.")
        return False, "plain", "the tokenizer has no template"
    found = recognise(tokenizer)
    if found is None:
        return True, None, "a template like none of the bundled formats"
    return True, found.name, "recognised by the tokenizer's template"


def _stop_ids(
    folder: Path, values: Mapping[str, Any], known: KnownTarget | None, warnings: list[str]
) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.is_file() else None
    if stops is None:
        stops = values.get("eos_token_id")
        published = f"{known.repository}'s names {_listed(known.stop_ids)}" if known and known.stop_ids else None
        warnings.append(
            "There is no generation_config.json that names stop tokens: config.json's are used, and "
            + (f"{published}." if published else "some checkpoints end turns with others.")
        )
    return tuple(stops) if isinstance(stops, list) else () if stops is None else (int(stops),)


def _listed(ids: tuple[int, ...]) -> str:
    return " and ".join(map(str, ids))


def _first(values: Mapping[str, Any], *keys: str) -> Any:
    """What ``values`` has under the first of ``keys`` that is set: families spell the same size differently."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _mamba(values: Mapping[str, Any]) -> str | None:
    heads, width = _first(values, "mamba_num_heads", "mamba_n_heads"), _first(values, "mamba_head_dim", "mamba_d_head")
    state = _first(values, "ssm_state_size", "mamba_d_state")
    if None in (heads, width, state):
        return None
    chunk = _first(values, "chunk_size", "mamba_chunk_size")
    return f"{heads} heads, {width} wide, state {state}" + (f", chunk {chunk}" if chunk else "")


def _experts(values: Mapping[str, Any]) -> str | None:
    count = _first(values, *_EXPERT_COUNTS)
    width = _first(values, "moe_intermediate_size", "intermediate_size")
    if not count or count == 1:
        return None
    text = f"{count}, {width} wide"
    if used := _first(values, "num_experts_per_tok"):
        text += f", {used} a token"
    if latent := values.get("moe_latent_size"):
        text += f", behind {latent} latent channels"
    if shared := _first(values, "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"):
        text += f", and one for all, {shared} wide"
    return text


def _multi_token_layers(values: Mapping[str, Any]) -> str | None:
    count = int(values.get("num_nextn_predict_layers") or 0)
    if not count:
        return None
    pattern = values.get("mtp_hybrid_override_pattern")
    kinds = [str(kind) for kind in values.get("mtp_layers_block_type") or ()]
    made_of = pattern or ", ".join(kinds) or "of a kind the config does not name"
    return f"{count} x ({made_of}), left out: the draft takes their place"


def _quantised(folder: Path, values: Mapping[str, Any], known: KnownTarget | None) -> str | None:
    """How the weights are stored, by the config, the quantiser's own file or the repository's name."""
    stated = values.get("quantization_config")
    path = folder / "hf_quant_config.json"
    if not stated and path.is_file():
        stated = read_json(path)
        stated = stated.get("quantization") if isinstance(stated, dict) else None
    if isinstance(stated, dict) and stated:
        return str(_first(stated, "quant_algo", "quant_method") or "in a way the config does not name")
    if stated or path.is_file():
        return "in a way the config does not name"
    return known.weights if known and known.weights != "BF16" else None


def _warn(
    spec: TargetSpec,
    config: RunConfig,
    folder: Path,
    tokenizer: Any,
    known: KnownTarget | None,
    quantised: str | None,
    warnings: list[str],
) -> None:
    if known and (known.licence or "").endswith(RESEARCH_ONLY):
        warnings.append("The target's licence allows research only: read it before you publish or use a draft.")
    if tokenizer is not None and len(tokenizer) > spec.vocab_size:
        warnings.append(
            f"The tokenizer has {len(tokenizer)} ids, the embedding {spec.vocab_size}: they do not belong together."
        )
    if spec.tie_word_embeddings:
        warnings.append("Embedding and LM head are tied: a draft stores them twice unless it is exported slim.")
    limit = spec.max_position_embeddings
    if config.data.max_length > limit:
        warnings.append(f"data.max_length {config.data.max_length} is beyond the target's {limit} positions.")
    elif limit <= SHORT_CONTEXT:
        warnings.append(f"The target ends at {limit} positions; longer prompts are refused.")
    if quantised:
        whole = (
            f"the full-precision {known.full_precision}" if known and known.full_precision else "the BF16 checkpoint"
        )
        warnings.append(
            f"The weights are quantised ({quantised}): loading them needs the matching kernels; {whole} does not."
        )
    if missing := missing_shards(folder):
        warnings.append(f"{len(missing)} of the shards that the index names are missing, {missing[0]} among them.")
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if LayerKind.MAMBA2 in spec.layers and version < OLDEST_RIGHT_TRANSFORMERS:
        warnings.append(
            f"transformers {transformers.__version__} computes Mamba-2 wrongly without CUDA kernels: use 5.15 or newer."
        )


def _built_parameters(
    folder: Path, values: Mapping[str, Any], trusted: bool, warnings: list[str]
) -> tuple[int | None, int | None]:
    """Parameters of the model as transformers builds it, all and active ones, without memory for one of them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except Exception as error:  # whatever the library raises on a config it does not like
        warnings.append(f"transformers cannot build a model from this config: {first_line(error)}.")
        return None, None
    count, used = _first(values, *_EXPERT_COUNTS), _first(values, "num_experts_per_tok")
    idle = 1 - used / count if count and used else 0
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - round(idle * experts)


def _stored_parameters(folder: Path, quantised: str | None, built: int | None, warnings: list[str]) -> int | None:
    try:
        stored = parameter_count(folder)
    except InputError as error:
        warnings.append(f"{error.what} {error.do}")
        return None
    whole = stored is not None and built is not None and not quantised and not missing_shards(folder)
    if whole and abs(stored - built) > 1e-3 * built:
        warnings.append(
            f"The files hold {stored:,} weights, the config describes {built:,}: they do not belong together."
        )
    return stored


def _draft_parameters(config: DraftConfig) -> int:
    import torch

    from nemotron_dspark.drafts.dspark import DSparkDraft

    with torch.device("meta"):
        draft = DSparkDraft(config)
    return sum(parameter.numel() for parameter in draft.trainable_parameters().values())
