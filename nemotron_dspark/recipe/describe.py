"""Everything that follows from a target before a weight is loaded: layout, draft, chats, mask token, sizes, warnings.

A folder with nothing but a config.json is enough. What only other files can tell is then taken from what is known of a
published target, and said to be unchecked, or it is unknown, and said to be.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from nemotron_dspark.cache.deepspec_layout import bytes_per_token
from nemotron_dspark.chat.format import recognise
from nemotron_dspark.chat.mask_token import NEMOTRON_MASK, choose_mask_token, reserved_mask_token
from nemotron_dspark.config import RunConfig
from nemotron_dspark.config.known import RESEARCH_ONLY, KnownTarget, known_target, preset_for
from nemotron_dspark.drafts.config import DraftConfig, build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.gguf_checkpoint import NOTE
from nemotron_dspark.errors import InputError, first_line
from nemotron_dspark.files import read_json
from nemotron_dspark.recipe.storage import Storage, storage_of
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.schemes import scheme_of
from nemotron_dspark.targets.shards import tensors_here
from nemotron_dspark.targets.spec import TargetSpec, first_stop_ids
from nemotron_dspark.targets.weights import missing_shards, parameter_count, stored_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORT_CONTEXT = 8192
_EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
_UNCHECKED = "not checked, there is no tokenizer here"


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
    storage: Storage | None  # likewise tensor by tensor, by the weights that are here
    licence: str | None
    parameters: int | None  # as transformers builds it from the config
    active_parameters: int | None  # of them, those that one token passes through: all but experts it is not sent to
    largest_layer: int | None  # parameters of it
    stored_parameters: int | None  # weights in the folder's safetensors files
    stored_bytes: int | None  # of those files; of all that the index names where some are missing
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
    return _Inspection(config).describe()


class _Inspection:
    """One target, looked at file by file; what is odd becomes a warning."""

    def __init__(self, config: RunConfig):
        self.config, self.name = config, config.target.named
        self.checkpoint = Checkpoint.of(config.target)
        self.folder, self.values = self.checkpoint.folder, self.checkpoint.config
        self.spec = self.checkpoint.read_spec()
        self.warnings: list[str] = []

    def describe(self) -> Description:
        spec, values = self.spec, self.values
        parameters, active, largest = self.built_parameters()
        known = self.published(parameters)
        tokenizer, fault = tokenizer_in(self.checkpoint)
        self.warnings += [fault] if fault else []
        # What cannot be told without data or weights is left open: a description never fails for it.
        mask_token, mask_reason = self.mask_token(tokenizer, known)
        draft, notes = build_draft_config(
            spec, self.config.draft, mask_token_id=mask_token or 0, num_anchors=self.config.train.num_anchors
        )
        if self.config.draft.kind == "eagle3":
            self.warnings.append("what is said of the draft holds for DSpark: EAGLE-3's needs are not estimated.")
        quantised = self.quantised(known)
        has_template, chat_format, chat_reason = self.chat(tokenizer, known)
        self.warn_of_limits(tokenizer, known, quantised)
        preset = preset_for(self.name)
        with torch.device("meta"):  # counted on the model itself, so that no formula can go stale
            trainable = DSparkDraft(draft).trainable_parameters().values()
        return Description(
            spec=spec,
            folder=self.folder,
            known=known.repository if known else None,
            preset=preset.name if preset else None,
            mamba=_mamba(values),
            experts=_experts(values),
            multi_token_layers=_multi_token_layers(values),
            quantised=quantised,
            storage=self.storage(),
            licence=known.licence if known else self.stated_licence(),
            parameters=parameters,
            active_parameters=active,
            largest_layer=largest,
            stored_parameters=self.stored_parameters(quantised, parameters),
            stored_bytes=stored_size(self.folder),
            draft=draft,
            draft_parameters=sum(parameter.numel() for parameter in trainable),
            notes=notes,
            tokens=len(tokenizer) if tokenizer is not None else None,
            has_chat_template=has_template,
            chat_format=chat_format,
            chat_reason=chat_reason,
            mask_token=mask_token,
            mask_reason=mask_reason,
            stop_ids=self.stop_ids(known),
            cache_bytes_per_token=bytes_per_token(len(draft.target_layer_ids), spec.hidden_size),
            warnings=tuple(self.warnings),
        )

    def built_parameters(self) -> tuple[int | None, int | None, int | None]:
        """Parameters of the model as transformers builds it: all, active ones, the largest layer's.

        No memory is taken for one of them.
        """
        trusted = self.checkpoint.remote_code
        try:
            with torch.device("meta"):
                config = transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=trusted)
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        except Exception as error:  # whatever the library raises on a config it does not like
            self.warnings.append(f"transformers cannot build a model from this config: {first_line(error)}.")
            return None, None, None
        count, used = _first(self.values, *_EXPERT_COUNTS), _first(self.values, "num_experts_per_tok")
        idle = 1 - used / count if count and used else 0
        experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
        total = sum(parameter.numel() for parameter in model.parameters())
        layers = model.get_submodule(self.spec.names.layers).children()
        largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
        return total, total - round(idle * experts), largest

    def published(self, parameters: int | None) -> KnownTarget | None:
        """The published target that the name, or else the config, says this is, if it has that one's size."""
        known = known_target(self.name) or known_target(str(self.values.get("_name_or_path") or ""))
        if known is None:
            return None
        same = parameters is None or abs(parameters / 1e9 - known.billions) < 1e-3 * known.billions
        if same and self.spec.num_layers == known.layers:
            return known
        self.warnings.append(
            f"This is not {known.repository}, whatever it is called: its size is another one."
            + (
                f" configs/{known.preset} applies all the same: rename the folder or check the values."
                * bool(known.preset)
            )
        )
        return None

    def stated_licence(self) -> str | None:
        """What the file said that the checkpoint was imported from."""
        path = self.folder / NOTE
        return read_json(path).get("licence") if path.is_file() else None

    def mask_token(
        self, tokenizer: "PreTrainedTokenizerBase | None", known: KnownTarget | None
    ) -> tuple[int | None, str]:
        override = self.config.draft.mask_token_id
        if tokenizer is not None and override is None and not reserved_mask_token(tokenizer, self.spec):
            return None, "counted over the data: a special token that it never uses, else the rarest token"
        if tokenizer is not None:
            try:
                chosen = choose_mask_token(tokenizer, self.spec, override=override)
            except InputError as error:
                self.warnings.append(f"{error.what} {error.do}")
                return None, "unknown"
            return chosen.id, chosen.reason
        documented = known.mask_token if known else None
        if documented is not None and override in (None, documented):
            return documented, f"documented for this target; {_UNCHECKED}"
        if override is not None:
            return override, f"set by draft.mask_token_id; {_UNCHECKED}"
        if self.spec.model_type == "nemotron_h" and self.spec.vocab_size > NEMOTRON_MASK:
            return None, f"unknown without the tokenizer; {NEMOTRON_MASK} if it is Nemotron's"
        return None, "unknown without the tokenizer"

    def chat(
        self, tokenizer: "PreTrainedTokenizerBase | None", known: KnownTarget | None
    ) -> tuple[bool | None, str | None, str]:
        """Whether there is a chat template, the bundled format it is of, and how that is known."""
        if tokenizer is None:
            if known and known.chat_format:
                return None, known.chat_format, f"documented for this target; {_UNCHECKED}"
            return None, None, "unknown without the tokenizer"
        if not tokenizer.chat_template:
            self.warnings.append(
                "The tokenizer has no chat template: messages are joined as plain text, as for a base model."
            )
            return False, "plain", "the tokenizer has no template"
        found = recognise(tokenizer)
        if found is None:
            return True, None, "a template like none of the bundled formats"
        return True, found.name, "recognised by the tokenizer's template"

    def quantised(self, known: KnownTarget | None) -> str | None:
        """How the weights are stored, by the config, the quantiser's own file or the repository's name."""
        stated, path = self.values.get("quantization_config"), self.folder / "hf_quant_config.json"
        if not stated and path.is_file():
            stated = read_json(path)
            stated = stated.get("quantization") if isinstance(stated, dict) else None
        if isinstance(stated, dict) and stated:
            return str(_first(stated, "quant_algo", "quant_method") or "in a way the config does not name")
        if stated or path.is_file():
            return "in a way the config does not name"
        return known.weights if known and known.weights != "BF16" else None

    def storage(self) -> Storage | None:
        """How quantised weights that are here are stored; what cannot be read of them is warned of."""
        try:
            scheme = scheme_of(self.folder)
            stored = tensors_here(self.folder)
            return storage_of(stored, scheme) if scheme and stored else None
        except InputError as error:
            self.warnings.append(f"{error.what} {error.do}")
            return None

    def stop_ids(self, known: KnownTarget | None) -> tuple[int, ...]:
        path = self.folder / "generation_config.json"
        stops = read_json(path).get("eos_token_id") if path.is_file() else None
        if stops is None:
            ids = " and ".join(map(str, known.stop_ids)) if known else ""
            self.warnings.append(
                "There is no generation_config.json that names stop tokens: config.json's are used, and "
                + (f"{known.repository}'s names {ids}." if known and ids else "some checkpoints end turns with others.")
            )
        return first_stop_ids(stops, self.values.get("eos_token_id"))

    def stored_parameters(self, quantised: str | None, built: int | None) -> int | None:
        try:
            stored = parameter_count(self.folder)
        except InputError as error:
            self.warnings.append(f"{error.what} {error.do}")
            return None
        whole = stored is not None and built is not None and not quantised and not missing_shards(self.folder)
        if whole and abs(stored - built) > 1e-3 * built:
            self.warnings.append(
                f"The files hold {stored:,} weights, the config describes {built:,}: they do not belong together."
            )
        return stored

    def warn_of_limits(
        self, tokenizer: "PreTrainedTokenizerBase | None", known: KnownTarget | None, quantised: str | None
    ) -> None:
        """What a user should know of the target before spending anything on it."""
        spec, warn = self.spec, self.warnings.append
        if known and (known.licence or "").endswith(RESEARCH_ONLY):
            warn("The target's licence allows research only: read it before you publish or use a draft.")
        if tokenizer is not None and len(tokenizer) > spec.vocab_size:
            warn(
                f"The tokenizer has {len(tokenizer)} ids, the embedding {spec.vocab_size}: they do not belong together."
            )
        if spec.tie_word_embeddings:
            warn("Embedding and LM head are tied: a draft stores them twice unless it is exported slim.")
        limit, length = spec.max_position_embeddings, self.config.data.max_length
        if length > limit:
            warn(f"data.max_length {length} is beyond the target's {limit} positions.")
        elif limit <= SHORT_CONTEXT:
            warn(f"The target ends at {limit} positions; longer prompts are refused.")
        if quantised:
            whole = known.full_precision if known else None
            warn(
                f"The weights are quantised ({quantised}): they are read as BF16 and take its memory; "
                f"{whole or 'the BF16 checkpoint'} holds them unrounded. Activations, which a server may round too, "
                "stay BF16."
            )
        if missing := missing_shards(self.folder):
            warn(f"{len(missing)} of the shards that the index names are missing, {missing[0]} among them.")


def tokenizer_in(checkpoint: Checkpoint) -> tuple[transformers.PreTrainedTokenizerBase | None, str | None]:
    """The checkpoint's tokenizer, or None and why."""
    if not any(
        (checkpoint.folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        return None, "There are no tokenizer files here: chats, mask token and vocabulary could not be checked."
    try:
        return checkpoint.load_tokenizer(), None
    except InputError as error:
        return None, f"The tokenizer cannot be loaded: {error.what}"


def _first(values: dict[str, Any], *keys: str) -> Any:
    """What ``values``, or the language model's among them, has under the first of ``keys`` that is set."""
    parts = (values, values.get("text_config") or {})
    return next((part[key] for key in keys for part in parts if part.get(key) is not None), None)


def _mamba(values: dict[str, Any]) -> str | None:
    heads, width = _first(values, "mamba_num_heads", "mamba_n_heads"), _first(values, "mamba_head_dim", "mamba_d_head")
    state = _first(values, "ssm_state_size", "mamba_d_state")
    if None in (heads, width, state):
        return None
    chunk = _first(values, "chunk_size", "mamba_chunk_size")
    return f"{heads} heads, {width} wide, state {state}" + (f", chunk {chunk}" if chunk else "")


def _experts(values: dict[str, Any]) -> str | None:
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


def _multi_token_layers(values: dict[str, Any]) -> str | None:
    count = int(_first(values, "num_nextn_predict_layers", "mtp_num_hidden_layers") or 0)
    if not count:
        return None
    pattern = values.get("mtp_hybrid_override_pattern")
    kinds = [str(kind) for kind in values.get("mtp_layers_block_type") or ()]
    made_of = pattern or ", ".join(kinds) or "of a kind the config does not name"
    return f"{count} x ({made_of}), left out: the draft takes their place"
