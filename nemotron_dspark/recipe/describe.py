"""Everything that follows from a target before a weight is loaded: layout, draft, chats, mask token, sizes, warnings.

A folder with nothing but a config.json is enough; what only other files can tell is then unknown, and said to be.
"""

import dataclasses
from pathlib import Path
from typing import Any

from nemotron_dspark.config import RunConfig
from nemotron_dspark.config.known import RESEARCH_ONLY, known_target
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.errors import InputError, first_line
from nemotron_dspark.files import read_json
from nemotron_dspark.targets.locate import locate
from nemotron_dspark.targets.spec import LayerKind, TargetSpec
from nemotron_dspark.targets.weights import missing_shards, parameter_count

SHORT_CONTEXT = 8192
OLDEST_RIGHT_TRANSFORMERS = (5, 15)  # earlier ones scan Nemotron-H wrongly when there are no CUDA kernels


@dataclasses.dataclass(frozen=True)
class Description:
    """What `nds inspect` shows. None means that the folder does not say."""

    spec: TargetSpec
    folder: Path
    licence: str | None
    parameters: int | None  # as transformers builds it from the config
    stored_parameters: int | None  # elements in the folder's safetensors files
    draft: DraftConfig
    draft_parameters: int  # trainable ones
    notes: tuple[str, ...]  # on values of the draft that had to be assumed
    tokens: int | None  # ids the tokenizer has
    has_chat_template: bool | None
    chat_format: str | None  # the bundled format it is recognised as
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


def describe(name: str, config: RunConfig) -> Description:
    """Describe the target ``name`` (hub id, alias or folder) as the stages would use it under ``config``.

    Raises:
        InputError: the target cannot be found, its family is not supported, or ``config`` does not fit it.
        EnvironmentFault: the hub cannot be reached.
    """
    from nemotron_dspark.drafts.builder import build_draft_config

    folder = locate(name, revision=config.target.revision)
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise InputError(f"{folder / 'config.json'} is not a JSON object.", "Restore it from the checkpoint.")
    spec = TargetSpec.from_config(values, name)
    warnings: list[str] = []

    tokenizer = _tokenizer(folder, warnings)
    mask_token, mask_reason = _mask_token(tokenizer, spec, config.draft.mask_token_id, warnings)
    draft, notes = build_draft_config(
        spec, config.draft, mask_token_id=mask_token or 0, num_anchors=config.train.num_anchors
    )
    known = known_target(name) or known_target(str(values.get("_name_or_path", "")))
    licence = known.licence if known else None
    has_template, chat_format = _chat(tokenizer, warnings)
    _warn(spec, config, folder, values, tokenizer, licence, warnings)
    parameters = _built_parameters(folder, warnings)
    return Description(
        spec=spec,
        folder=folder,
        licence=licence,
        parameters=parameters,
        stored_parameters=_stored_parameters(folder, values, parameters, warnings),
        draft=draft,
        draft_parameters=_draft_parameters(draft),
        notes=notes,
        tokens=len(tokenizer) if tokenizer is not None else None,
        has_chat_template=has_template,
        chat_format=chat_format,
        mask_token=mask_token,
        mask_reason=mask_reason,
        stop_ids=_stop_ids(folder, values, warnings),
        cache_bytes_per_token=cache_bytes_per_token(spec.hidden_size, len(draft.target_layer_ids)),
        warnings=tuple(warnings),
    )


def cache_bytes_per_token(hidden_size: int, num_taps: int) -> int:
    """Bytes of one token in DeepSpec's cache: bfloat16 taps and last hidden state, an int32 id, two mask bytes."""
    return 2 * hidden_size * (num_taps + 1) + 4 + 1 + 1


def _tokenizer(folder: Path, warnings: list[str]) -> Any | None:
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        warnings.append("There are no tokenizer files here: chats, mask token and vocabulary could not be checked.")
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever the library raises on damaged files
        warnings.append(f"The tokenizer cannot be loaded: {first_line(error)}.")
        return None


def _mask_token(tokenizer: Any, spec: TargetSpec, override: int | None, warnings: list[str]) -> tuple[int | None, str]:
    from nemotron_dspark.chat.mask_token import NEMOTRON_MASK, choose_mask_token

    if tokenizer is not None:
        try:
            chosen = choose_mask_token(tokenizer, spec, override=override)
        except InputError as error:
            warnings.append(f"{error.what} {error.do}")
            return None, "unknown"
        return chosen.id, chosen.reason
    if override is not None:
        return override, "set by draft.mask_token_id; not checked, there is no tokenizer here"
    if spec.model_type == "nemotron_h" and spec.vocab_size > NEMOTRON_MASK:
        return None, f"unknown without the tokenizer; {NEMOTRON_MASK} if it is Nemotron's"
    return None, "unknown without the tokenizer"


def _chat(tokenizer: Any, warnings: list[str]) -> tuple[bool | None, str | None]:
    from nemotron_dspark.chat.format import recognise

    if tokenizer is None:
        return None, None
    if not tokenizer.chat_template:
        warnings.append("The tokenizer has no chat template: messages are joined as plain text, as for a base model.")
        return False, "plain"
    found = recognise(tokenizer)
    return True, found.name if found else None


def _stop_ids(folder: Path, values: dict[str, Any], warnings: list[str]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.is_file() else None
    if stops is None:
        stops = values.get("eos_token_id")
        warnings.append(
            "There is no generation_config.json that names stop tokens: config.json's are used, and some checkpoints "
            "end turns with others."
        )
    return tuple(stops) if isinstance(stops, list) else () if stops is None else (int(stops),)


def _warn(
    spec: TargetSpec,
    config: RunConfig,
    folder: Path,
    values: dict[str, Any],
    tokenizer: Any,
    licence: str | None,
    warnings: list[str],
) -> None:
    if licence == RESEARCH_ONLY:
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
    if values.get("quantization_config") or (folder / "hf_quant_config.json").is_file():
        warnings.append(
            "The weights are quantised: loading them needs the matching kernels; the BF16 checkpoint does not."
        )
    if missing := missing_shards(folder):
        warnings.append(f"{len(missing)} of the shards that the index names are missing, {missing[0]} among them.")
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if LayerKind.MAMBA2 in spec.layers and version < OLDEST_RIGHT_TRANSFORMERS:
        warnings.append(
            f"transformers {transformers.__version__} computes Mamba-2 wrongly without CUDA kernels: use 5.15 or newer."
        )


def _built_parameters(folder: Path, warnings: list[str]) -> int | None:
    """Parameters of the model as transformers builds it, without memory for one of them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # whatever the library raises on a config it does not like
        warnings.append(f"transformers cannot build a model from this config: {first_line(error)}.")
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def _stored_parameters(folder: Path, values: dict[str, Any], built: int | None, warnings: list[str]) -> int | None:
    try:
        stored = parameter_count(folder)
    except InputError as error:
        warnings.append(f"{error.what} {error.do}")
        return None
    quantised = values.get("quantization_config") or (folder / "hf_quant_config.json").is_file()
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
