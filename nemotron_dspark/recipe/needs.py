"""The formulas of a plan: bytes on disk, bytes of memory, seconds. docs/plan.md has them in words.

Everything follows from a target's config, a run's configuration and the lengths of its samples. Disk is exact;
memory was compared with real runs (`benchmarks/plan.py`); seconds are work divided by an assumed share of the
machine's peak, and every assumption is in `ASSUMED`.
"""

import dataclasses

import torch

from nemotron_dspark.cache.deepspec_layout import bytes_per_token
from nemotron_dspark.cache.needs import config_size
from nemotron_dspark.config import EvalConfig, TrainConfig
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.layers import activation_bytes, context_bytes, far_bytes
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json
from nemotron_dspark.recipe.describe import Description
from nemotron_dspark.recipe.machines import Machine
from nemotron_dspark.recipe.workload import Workload
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.streamed import divides, layers_room
from nemotron_dspark.training import checkpoints, optimiser
from nemotron_dspark.training.batches import batch_bytes, read_ahead_bytes
from nemotron_dspark.training.tiling import objective_bytes


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What cannot be known beforehand."""

    forward: float = 0.4  # share of the peak that a forward of the target reaches
    train: float = 0.3  # likewise a training step
    bandwidth: float = 0.6  # share of the memory's bandwidth that generation reaches
    requests: int = 64  # answered at a time by an engine on a GPU
    requests_cpu: int = 8  # likewise without one: `serve.max_batch_size`
    read: float = 3e9  # bytes a second from the disk
    write: float = 1e9  # bytes a second to it, with flush and checksum
    eval_prompts: int = 128
    accepted: float = 3.0  # tokens a round
    libraries: float = 0.5e9  # an idle process with everything imported
    cuda_libraries: float = 3e9  # likewise with CUDA's, in main memory
    cuda_context: float = 0.6e9  # and on the GPU


ASSUMED = Assumed()


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a target and its draft."""

    name: str
    spec: TargetSpec
    config: dict  # the target's config.json: sizes of its mixers
    hidden: int
    vocab: int
    taps: int
    parameters: int  # the target's
    active: int  # of them, those that one token passes through: all but the experts it is not sent to
    largest_layer: int  # parameters of it
    quantised: bool
    stored_bytes: int  # of the target's checkpoint; as in BF16 where neither files nor index are here to tell
    weights_here: bool
    trainable: int  # the draft's
    tensors: int  # trainable ones
    draft: DraftConfig
    layers: int  # the draft's, from here on
    queries: int  # heads x head size
    keys: int  # key heads x head size
    width: int  # SwiGLU
    block: int
    rank: int

    def with_layers(self, count: int) -> "Shape":
        """The same target with a draft of so many layers."""
        draft = self.draft.model_copy(update={"num_hidden_layers": count})
        with torch.device("meta"):
            parameters = DSparkDraft(draft).trainable_parameters().values()
        trainable = sum(parameter.numel() for parameter in parameters)
        return dataclasses.replace(self, draft=draft, layers=count, trainable=trainable, tensors=_tensors(count))

    @staticmethod
    def of(found: Description) -> "Shape":
        """The sizes in what `describe` says of a target; `InputError` when it cannot tell the target's."""
        spec, draft = found.spec, found.draft
        if found.parameters is None and found.stored_parameters is None:
            raise InputError(
                f"The size of {spec.name} cannot be told: {found.warnings[0]}", "Check the target's config.json."
            )
        parameters = found.parameters or found.stored_parameters or 0
        return Shape(
            name=spec.name,
            spec=spec,
            config=read_json(found.folder / "config.json"),
            hidden=spec.hidden_size,
            vocab=spec.vocab_size,
            taps=len(draft.target_layer_ids),
            parameters=parameters,
            active=found.active_parameters or parameters,
            largest_layer=found.largest_layer or parameters,
            quantised=found.quantised is not None,
            stored_bytes=found.stored_bytes or 2 * parameters,
            weights_here=found.stored_parameters is not None,
            trainable=found.draft_parameters,
            tensors=_tensors(draft.num_hidden_layers),
            draft=draft,
            layers=draft.num_hidden_layers,
            queries=draft.num_attention_heads * draft.head_dim,
            keys=draft.num_key_value_heads * draft.head_dim,
            width=draft.intermediate_size,
            block=draft.block_size,
            rank=draft.markov_rank,
        )


def _tensors(layers: int) -> int:
    """Trainable tensors of a draft."""
    return 11 * layers + 7


# --- disk ---


def checkpoint_bytes(shape: Shape) -> int:
    """A checkpoint: 12·D and headers."""
    return checkpoints.checkpoint_bytes(shape.trainable, shape.tensors)


def draft_bytes(shape: Shape, weight_bytes: int) -> int:
    """The finished draft: D trained parameters, embedding and head."""
    return weight_bytes * (shape.trainable + 2 * shape.vocab * shape.hidden) + 120 * shape.tensors


# --- memory ---


@dataclasses.dataclass(frozen=True)
class Training:
    """Bytes where the draft trains, and in main memory beside it (0 without a GPU: it is all one)."""

    device: float
    host: float
    other: float = 0.0  # in main memory, for each process beside the first


def training_bytes(
    shape: Shape, config: TrainConfig, length: int, answer_share: float, weight_bytes: int, gpu: bool
) -> Training:
    """The highest point of training on samples of ``length`` tokens.

    Fixed: parameters, gradients and moments (`optimiser.state_bytes`); the frozen embedding and head; the micro-batches
    read ahead. On top of it the larger of

    - what the forward keeps (`activation_bytes`) with the objective (`objective_bytes`) or the last layer's gradients;
    - a checkpoint being written, after the gradients were freed.
    """
    b = weight_bytes
    trained, frozen = shape.trainable, 2 * shape.vocab * shape.hidden
    rows = config.local_batch_size
    batch = batch_bytes(rows, length, bytes_per_token(shape.taps, shape.hidden))
    whole, length = length, min(length, config.window or length)
    anchors = min(config.num_anchors, max(1, round(answer_share * length)))
    slots = rows * anchors * shape.block
    saved = activation_bytes(shape.draft, rows, length, slots, answer_share, b, dense=not gpu)
    saved += far_bytes(shape.draft, whole - length, b)
    positions = rows * distinct_positions(answer_share * length, anchors, shape.block)
    objective = objective_bytes(shape.vocab, shape.hidden, shape.rank, b, slots, positions, gpu=gpu)
    top = max(objective, 3 * b * slots * shape.width + b * shape.hidden * shape.width)
    saving = checkpoints.saving_bytes(trained)
    fixed = optimiser.state_bytes(trained, b) + b * frozen
    if gpu:  # the moments come to main memory, and once more as the file's bytes
        host = 2 * saving + 2 * frozen + read_ahead_bytes(batch)
        made = 4.0 * (trained + frozen)  # in fp32, before it moves to the device
        return Training(fixed + 2 * batch + saved + top, max(host, made), max(read_ahead_bytes(batch), made))
    writing = saving - 4 * trained  # the gradients were freed
    return Training(fixed + read_ahead_bytes(batch) + max(saved + top, writing), 0.0)


def distinct_positions(eligible: float, anchors: int, block: int) -> float:
    """Positions that at least one of ``anchors`` blocks, drawn among ``eligible``, predicts from (expected)."""
    share = min(1.0, anchors / max(1.0, eligible))
    return eligible * (1 - (1 - share) ** block)


def serving_bytes(shape: Shape, weight_bytes: int, requests: int, length: int) -> float:
    """Target and draft, and per request recurrent states in fp32 and the keys and values of ``length`` tokens."""
    spec, values = shape.spec, shape.config
    heads = config_size(values, 0, "mamba_num_heads", "mamba_n_heads", "linear_num_value_heads")
    head = config_size(values, spec.head_dim, "mamba_head_dim", "mamba_d_head", "linear_value_head_dim")
    state = config_size(values, 64, "ssm_state_size", "mamba_d_state", "linear_key_head_dim")
    recurrent = 4 * sum(kind.recurrent for kind in spec.layers) * heads * head * state
    keys = 2 * weight_bytes * spec.key_channels * length
    keys += context_bytes(shape.draft, length, weight_bytes)
    draft = weight_bytes * shape.trainable
    return weight_bytes * shape.parameters + draft + requests * (recurrent + keys)


def engine_bytes(shape: Shape, weight_bytes: int) -> float:
    """The target's weights as an engine holds them: quantised ones stay so."""
    return float(shape.stored_bytes if shape.quantised else weight_bytes * shape.parameters)


def streamed_bytes(shape: Shape, weight_bytes: int, free: float) -> float:
    """What is resident of a target whose layers are streamed, with ``free`` bytes: the embedding, and two layers or
    as many of a mixture's experts as there is room for."""
    embedding, layers = weight_bytes * shape.vocab * shape.hidden, 2.0 * weight_bytes * shape.largest_layer
    return embedding + (layers_room(free - embedding) if in_groups(shape, weight_bytes, free) else layers)


def in_groups(shape: Shape, weight_bytes: int, free: float) -> bool:
    """Whether a streamed mixture's experts are read in groups, with ``free`` bytes."""
    embedding, layers = weight_bytes * shape.vocab * shape.hidden, 2.0 * weight_bytes * shape.largest_layer
    return shape.active < shape.parameters and divides(layers, free - embedding)


# --- time ---


def concurrency(machine: Machine) -> int:
    """Requests that are answered at a time on one GPU, or on the processor."""
    return ASSUMED.requests if machine.gpus else ASSUMED.requests_cpu


def forward_seconds(shape: Shape, tokens: int, machine: Machine) -> float:
    """2 operations a token and active parameter, without embedding and head, at the assumed share of the peak."""
    body = shape.active - shape.vocab * shape.hidden * (1 if shape.spec.tie_word_embeddings else 2)
    return 2 * max(body, 0) * tokens / (machine.flops * ASSUMED.forward)


def decode_seconds(shape: Shape, machine: Machine, requests: int, weights: float | None = None) -> float:
    """One token for each of ``requests``: all weights are read once, or computed with, whichever is slower.

    ``weights`` are bytes; unless given, as many as are loaded here.
    """
    weights = machine.weight_bytes * shape.parameters if weights is None else weights
    reading = weights / (machine.bandwidth * ASSUMED.bandwidth)
    if requests == 1:
        reading *= shape.active / max(1, shape.parameters)
    return max(reading, 2 * shape.active * requests / (machine.flops * ASSUMED.forward))


def answer_seconds(shape: Shape, workload: Workload, machine: Machine) -> float:
    """Every prompt read and every answer generated by an engine on each GPU, `concurrency` requests at a time."""
    requests = concurrency(machine)
    prompts = forward_seconds(shape, workload.tokens - workload.loss_tokens, machine)
    weights = engine_bytes(shape, machine.weight_bytes)
    answers = workload.loss_tokens / requests * decode_seconds(shape, machine, requests, weights)
    return (prompts + answers) / max(1, machine.gpus)


def epochs(config: TrainConfig, samples: int) -> float:
    """Times that every sample is taken."""
    if config.max_steps is None:
        return float(config.epochs)
    return config.max_steps * config.global_batch_size / samples


def training_operations(shape: Shape, config: TrainConfig, workload: Workload) -> float:
    """Operations of forward and backward over one sample of the mean length.

    Backward costs twice the forward. The head is frozen: it gives gradients to the hidden states only.
    """
    length = workload.mean
    eligible = workload.answer_share * length
    anchors = min(config.num_anchors, max(1, round(eligible)))
    slots = anchors * shape.block
    hidden, vocab = shape.hidden, shape.vocab
    per_slot = hidden * (2 * shape.queries + 3 * shape.width) + 2 * shape.queries * (length / 2 + shape.block)
    per_key = 2 * hidden * shape.keys
    body = shape.layers * (slots * per_slot + (length + slots) * per_key) + length * shape.taps * hidden * hidden
    objective = 2 * slots * vocab * hidden + 3 * slots * vocab * shape.rank
    objective += distinct_positions(eligible, anchors, shape.block) * vocab * hidden
    return 2 * (3 * body + objective)


def training_seconds(
    shape: Shape, config: TrainConfig, workload: Workload, machine: Machine, epochs_: float, processes: int = 1
) -> float:
    """Seconds of all forwards and backwards, shared by ``processes``, and of the optimiser, which moves some 40 bytes a
    parameter and step in each; what goes over the network between them is not counted."""
    computed = epochs_ * workload.samples * training_operations(shape, config, workload)
    steps = epochs_ * workload.samples / config.global_batch_size
    moved = steps * 40 * shape.trainable
    return computed / (processes * machine.flops * ASSUMED.train) + moved / (machine.bandwidth * ASSUMED.bandwidth)


def evaluation_seconds(shape: Shape, config: EvalConfig, machine: Machine) -> float:
    """Every prompt one by one, with the draft and without, at each temperature."""
    plain = _eval_tokens(config) * decode_seconds(shape, machine, 1)
    return plain + calibration_seconds(shape, config, machine)


def calibration_seconds(shape: Shape, config: EvalConfig, machine: Machine) -> float:
    """Every prompt one by one with the draft, at each temperature."""
    draft = machine.weight_bytes * (shape.trainable + shape.vocab * shape.hidden)
    drafted = decode_seconds(shape, machine, 1) + draft / (machine.bandwidth * ASSUMED.bandwidth)
    return _eval_tokens(config) * drafted / ASSUMED.accepted


def _eval_tokens(config: EvalConfig) -> int:
    return ASSUMED.eval_prompts * config.max_new_tokens * len(config.temperatures)
