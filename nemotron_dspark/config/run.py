"""The run's configuration and how it is put together: defaults, then a preset, then a file, then `--set key=value`.

A key that is not set keeps the published DeepSpec value where there is one. An unknown key is an error that names
the nearest known key; it is never ignored.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from nemotron_dspark.config.known import preset_for
from nemotron_dspark.config.validation import input_error
from nemotron_dspark.errors import InputError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, coerce_numbers_to_str=True)


MarkovHead = Literal["vanilla", "gated", "rnn"]
DraftKind = Literal["dspark", "dflash", "eagle3"]
AttentionKind = Literal["auto", "flex", "dense"]
TAP_CHOICES = ("even", "attention")  # names that stand for a list of taps; `targets.taps` knows which


def read_taps(value: Any) -> Any:
    """What ``draft.taps`` and ``--taps`` accept: a name in `TAP_CHOICES`, layers as a list or as "1,5,19", or null.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if text in TAP_CHOICES:
            return text
        parts = [part.strip() for part in text.split(",")]
        value = [int(part) if part.removeprefix("-").isdecimal() else part for part in parts]
    elif isinstance(value, int):
        value = [value]
    if value is None or (isinstance(value, list | tuple) and all(type(layer) is int for layer in value)):
        return value
    raise PydanticCustomError("taps", f"neither {' nor '.join(TAP_CHOICES)} nor a list of layers such as 1,9,17")


def _on_off(value: Any) -> Any:
    """YAML reads on and off as true and false."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _names(value: Any) -> Any:
    """A list of names, or names with commas between them."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def read_schedule(value: Any) -> Any:
    """What ``schedule`` accepts: off, cost, threshold, or threshold:NUMBER with a number from 0 to 1.

    Raises:
        ValueError: anything else.
    """
    text = str(_on_off(value)).strip().lower()
    if not re.fullmatch(r"off|cost|threshold(:(0|1|[01]?\.\d+))?", text) or float(text.partition(":")[2] or 0) > 1:
        raise PydanticCustomError("schedule", "neither off, nor cost, nor threshold, nor such as threshold:0.3")
    return text


Schedule = Annotated[str, BeforeValidator(read_schedule)]
_SCHEDULE = (
    "how much of a block is verified: off = all; threshold:P = up to the first slot of a smaller chance; cost = what "
    "gives most tokens a second by `nds profile`"
)
_PROFILE = "file or folder of `nds profile`; null = the draft's own, if it has one"


class TargetConfig(Section):
    """The frozen model that is to be made faster."""

    name: str | None = Field(None, description="hub id, local folder or alias of the target")
    revision: str | None = Field(None, description="hub revision; the default branch when not set")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="weights' type; auto = the checkpoint's own on an accelerator; on a CPU float32, or its own "
        "bfloat16 where that is measured to be faster",
    )
    device: str = Field(
        "auto",
        description="auto = cuda when there is one, else cpu; several, as cuda:0,cuda:1, or auto with several GPUs: "
        "whole layers on each where the first alone does not hold the target",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the checkpoint")
    stream: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_off)] = Field(
        "auto",
        description="read the layers one by one, each for many tokens, where hidden states are captured; auto = when "
        "the weights do not fit into the memory",
    )
    copies: Literal["auto", "process", "node"] = Field(
        "auto",
        description="of the target under torchrun, training online: process = every process holds one, node = one "
        "process of each machine does and sends the others their hidden states; auto = process where it fits",
    )
    proofs: bool = Field(True, description="prove the loaded target right before a long stage")

    @property
    def named(self) -> str:
        """The name; `InputError` when there is none."""
        if self.name is None:
            raise InputError(
                "No target is named.",
                "Give one with --target, or target.name in a configuration; `nds inspect --list` names the known ones.",
            )
        return self.name


class DraftSection(Section):
    """The draft's shape. A value left at null follows from the target."""

    kind: DraftKind = Field(
        "dspark",
        description="dspark; dflash = a block at once without a head that ties its slots; eagle3 = one layer, token by "
        "token",
    )
    num_layers: int = Field(5, ge=1, description="decoder layers of the draft; EAGLE-3 always has one")
    block_size: int = Field(7, ge=1, le=64, description="γ, tokens drafted per round")
    taps: Annotated[list[int] | Literal["even", "attention"] | None, BeforeValidator(read_taps)] = Field(
        None, description="layers the draft reads (DeepSpec ids), or even, or attention; null = the default choice"
    )
    num_taps: int = Field(5, ge=1, description="how many taps a choice takes that is not a list")
    markov_rank: int = Field(256, ge=0, description="rank of DSpark's sequential head; 0 = DeepSpec's DFlash")
    markov_head: MarkovHead = Field("vanilla", description="kind of sequential head")
    confidence_head: bool = Field(
        True, description="predict each slot's acceptance rate; left out where train.confidence_alpha is 0"
    )
    confidence_with_markov: bool = Field(True, description="the confidence head sees the previous token's embedding")
    intermediate_size: int | None = Field(None, description="SwiGLU width; null = from the target's MLP")
    rope_theta: float | None = Field(None, description="rotary base; null = the target's, else 10000")
    vocabulary: int | None = Field(
        None, ge=1, description="tokens that the draft can draft, those that the data uses most; null = all"
    )
    sliding_window: int | None = Field(
        None, ge=1, description="positions before a slot that it sees, and that decoding remembers; null = all"
    )
    causal_block: bool = Field(False, description="a slot sees those of its block before it, and not those behind")
    attention_sinks: bool = Field(False, description="a head may attend to nothing: a learned logit per head and layer")
    sample_from_anchor: bool = Field(
        True, description="DSpark: the anchor's own slot predicts; false = γ slots behind it do, as in DFlash"
    )
    mask_token_id: int | None = Field(None, description="token that fills the undrafted slots; null = chosen, and said")


class DataConfig(Section):
    """Conversations in, tokenised samples out."""

    max_length: int = Field(4096, ge=2, description="tokens kept of a conversation; the rest is cut off")
    min_loss_tokens: int = Field(14, ge=1, description="samples with fewer loss tokens are dropped and counted")
    thinking: bool | None = Field(
        None, description="passed to the chat template as enable_thinking; null = its default"
    )


class CacheConfig(Section):
    """The target's hidden states on disk."""

    mode: Literal["online", "rolling"] = Field(
        "online", description="what `nds train --data` keeps of them: online = nothing, rolling = at most budget_gb"
    )
    budget_gb: float = Field(200.0, gt=0, description="rolling: gigabytes (10^9 bytes) on the disk at any time")
    reuse: int = Field(5, ge=1, description="rolling: epochs for which a part of the data stays on the disk")
    format: Literal["deepspec", "compact"] = Field(
        "deepspec",
        description="how they are stored: deepspec = bf16, as DeepSpec reads it; compact = int4, in safetensors files",
    )
    shard_bytes: int = Field(4 * 1024**3, ge=1, description="a shard is closed when it holds this many bytes")
    batch_tokens: int = Field(16384, ge=1, description="padded tokens of one target forward")


# DeepSpec's published values, for 1.3 million samples. `train.recipe=paper` takes them instead of the defaults.
PAPER: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "global_batch_size": 512,
    "epochs": 10,
    "num_anchors": 512,
}


class TrainConfig(Section):
    """How the draft is trained. What `PAPER` does not name has DeepSpec's published value in both recipes."""

    recipe: Literal["night", "paper"] = Field(
        "night",
        description="night = what gains most in the hours of one machine; paper = DeepSpec's values of "
        + ", ".join(PAPER)
        + ", each where it is not set",
    )
    lr: float = Field(6e-4, gt=0, description="peak learning rate")
    warmup_ratio: float = Field(0.04, ge=0, le=1, description="share of the steps with a linearly rising rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment decays")
    attention: AttentionKind = Field("auto", description="auto = FlexAttention on CUDA, a dense mask elsewhere")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto = bf16 on CUDA and on CPUs where it is measured to be faster, else fp32"
    )
    device: str = Field("auto", description="auto = cuda when there is one, else cpu")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="under torchrun: ddp = every process has all weights, fsdp = each keeps a part of them"
    )
    inference_gpus: int = Field(
        0,
        ge=0,
        description="processes of each machine under torchrun that run the target while the others train; 0 = none",
    )
    activation_checkpointing: bool = Field(
        False, description="compute each layer again in the backward: less memory, a forward of the layers more"
    )
    local_batch_size: int = Field(1, ge=1, description="samples of a micro-batch")
    global_batch_size: int = Field(64, ge=1, description="samples of one optimiser step")
    epochs: int = Field(5, ge=1, description="passes over the cache")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps of the run; when set, epochs is unused")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    num_anchors: int = Field(64, ge=1, description="blocks drawn per sample")
    packed: bool = Field(
        False, description="put the samples of a forward one behind the other instead of padding them to one length"
    )
    window: int | None = Field(
        None,
        ge=2,
        description="of a longer sample draw all blocks in a stretch of so many tokens, another each epoch; what lies "
        "before it gives context and no gradient; null = learn from all of it",
    )
    validation: float = Field(
        0.0, ge=0, le=0.5, description="share of the conversations held out and measured; 0 = none"
    )
    validate_every: int | None = Field(None, ge=1, description="optimiser steps between measurements; null = an epoch")
    patience: int | None = Field(
        None, ge=1, description="end the run after so many measurements without a better one; null = never"
    )
    loss_decay_gamma: float | None = Field(4.0, gt=0, description="slot k weighs exp(-k/γ_decay); null = all alike")
    ce_alpha: float = Field(0.1, ge=0, description="weight of the cross-entropy to the token")
    l1_alpha: float = Field(0.9, ge=0, description="weight of the L1 distance to the target's distribution")
    confidence_alpha: float = Field(1.0, ge=0, description="weight of the confidence head's BCE")
    init: str = Field(
        "random",
        description="weights to begin with: random; target = copies of the target's last layers, sooner useful; or the "
        "folder of a draft, whose shape is taken too",
    )
    seed: int = Field(42, ge=0, description="seed of initialisation, order and anchors")
    log_every: int = Field(10, ge=1, description="optimiser steps between two lines of metrics")
    checkpoint_every: int = Field(500, ge=1, description="optimiser steps between two checkpoints")
    tracker: Literal["trackio", "wandb"] | None = Field(
        None, description="also send the metrics there: trackio keeps them on this machine, wandb in its cloud"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recipe(cls, given: Any) -> Any:
        return PAPER | given if isinstance(given, dict) and given.get("recipe") == "paper" else given

    @property
    def most_checkpoints(self) -> int:
        """Checkpoints on the disk at a time: the newest, the one being written and, with held-out samples, the best."""
        return self.keep_checkpoints + 1 + (self.validation > 0)


class EvalConfig(Section):
    """Accepted length and speed on prompts the draft has not seen."""

    temperatures: tuple[float, ...] = Field((0.0, 1.0), description="one measurement each; 0 = greedy")
    max_new_tokens: int = Field(2048, ge=1, description="tokens generated per prompt")
    seed: int = Field(0, ge=0, description="seed of the sampled measurements")
    batch_size: int = Field(1, ge=1, description="prompts decoded together; speed is always measured one by one")
    schedule: Schedule = Field("off", description=_SCHEDULE)
    profile: str | None = Field(None, description=_PROFILE)

    @property
    def sampled_temperature(self) -> float:
        """The first temperature at which tokens are sampled; 1 without one."""
        return next((temperature for temperature in self.temperatures if temperature > 0), 1.0)


class ServeConfig(Section):
    """The OpenAI-compatible server."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 = a free one")
    no_auth: bool = Field(False, description="answer other machines without an API key")
    aliases: Annotated[list[str], BeforeValidator(_names)] = Field(
        [], description="further names of the target, such as one that a program asks for; commas between them"
    )
    max_batch_size: int = Field(8, ge=1, description="requests decoded together; further ones wait in a queue")
    max_queue: int = Field(256, ge=0, description="waiting requests; beyond that the answer is 503")
    prefill_tokens: int | None = Field(
        None, ge=1, description="tokens of prompts read between two rounds; null = 256 on a CPU, 2048 elsewhere"
    )
    prefix_cache_gb: float = Field(
        1.0, ge=0, description="gigabytes (10^9 bytes) for what was read, so that no conversation reads its past again"
    )
    max_new_tokens: int = Field(2048, ge=1, description="default and upper limit of max_tokens")
    schedule: Schedule = Field("off", description=_SCHEDULE)
    profile: str | None = Field(None, description=_PROFILE)


class RunConfig(Section):
    """One section per stage; `nds config show` prints the resolved one."""

    target: TargetConfig = TargetConfig()
    draft: DraftSection = DraftSection()
    data: DataConfig = DataConfig()
    cache: CacheConfig = CacheConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    serve: ServeConfig = ServeConfig()


def _known_keys() -> list[str]:
    return [f"{name}.{key}" for name, section in RunConfig() for key in type(section).model_fields]


def _nearest(key: str) -> str:
    known = _known_keys()
    by_leaf = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    close = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # a bare or misplaced key: compare the last parts
        leaves = {name.split(".")[-1]: name for name in known}
        close = [leaves[m] for m in difflib.get_close_matches(key.split(".")[-1], leaves, n=1, cutoff=0.5)]
    return f"Did you mean {close[0]}?" if close else "`nds config show` lists every key."


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_yaml(path: Path, missing: str = "Check the path given to --config.") -> dict[str, Any]:
    """The mapping in ``path``; `InputError` when there is none, with what helps where the file is ``missing``."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"The file {path} does not exist.", missing) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.", "Correct the file.") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold sections of keys.", "Start from `nds config show`.")
    return value


def read_assignment(text: str) -> dict[str, Any]:
    """``train.lr=1e-4`` as a nested dict; the value is read as YAML, and what YAML takes as text by the key's type."""
    key, sign, raw = text.partition("=")
    section, dot, leaf = key.strip().partition(".")
    if not sign or not dot:
        raise InputError(f"--set {text!r} is not section.key=value.", "Write for example --set train.lr=3e-4.")
    try:
        return {section: {leaf: yaml.safe_load(raw)}}
    except yaml.YAMLError:
        raise InputError(f"The value in --set {text!r} is not valid YAML.", "Quote it, or correct it.") from None


def _validated(values: dict[str, Any], origin: str = "") -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        do = "Correct the value; `nds config show` prints every key with its default."
        raise input_error(error, origin, do, unknown=_nearest) from None


def load_config(
    target: str | Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    preset: Path | None = None,
    assignments: Iterable[str] = (),
    **sections: Mapping[str, Any],
) -> RunConfig:
    """Resolve a run's configuration: defaults < ``preset`` < ``file`` < ``assignments`` < ``sections`` < ``target``.

    An assignment is the text "section.key=value"; a section is a mapping, as in ``train={"lr": 1e-4}``, and ``target``
    may be the name alone. Without ``preset``, the target's own in `configs/` is used, if there is one.

    Raises:
        InputError: a file is missing or malformed, a key is unknown, or a value is out of range.
    """
    given = _checked_file(file) if file is not None else {}
    for text in assignments:
        given = merge(given, read_assignment(text))
        _validated(given, f"--set {text}")
    given = merge(given, sections)
    if target is not None:
        given = merge(given, {"target": {"name": target} if isinstance(target, str) else target})
    name = _validated(given).target.name
    if preset is None and name is not None:
        preset = preset_for(name)
    base = _checked_file(preset) if preset is not None else {}
    return _validated(merge(base, given))


def _checked_file(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    _validated(values, str(path))  # so that the message names the file that holds the fault
    return values
