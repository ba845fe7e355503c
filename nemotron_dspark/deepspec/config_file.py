"""DeepSpec's fourth extension point, the config file, for any target: every value, and why it is assumed."""

import re
from typing import Any

from nemotron_dspark.chat.format import recognise
from nemotron_dspark.chat.mask_token import choose_mask_token
from nemotron_dspark.config import RunConfig
from nemotron_dspark.drafts.config import EAGLE3_TAPS, DraftConfig, build_draft_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.locate import locate
from nemotron_dspark.targets.spec import TargetSpec

ALGORITHMS = ("dspark", "eagle3")
UNNAMED_TEMPLATE = "the tokenizer's own"  # as `cache.build` writes it

_HEAD = """\
# {title} for {target}: a config of DeepSpec's.
#
#   nds deepspec prepare {file} --data conversations.jsonl --out CACHE
#   nds deepspec train {file} --opts data.target_cache_path=CACHE
#   nds deepspec eval {file}
#
# Any value is overridden by --opts section.key=value. Written by
# `nds deepspec config --target {target}{flags}`.
{assumed}
from nemotron_dspark.deepspec import {trainer}, finalize_cfg  # noqa: F401 (DeepSpec calls finalize_cfg)

project_name = "nemotron-dspark"
exp_name = "{exp_name}"
seed = {seed}
"""

_TRAIN = """
train = {{
    "trainer_cls": {trainer},
    "lr": {lr},
    "warmup_ratio": {warmup_ratio},
    "weight_decay": {weight_decay},
    "precision": "bf16",
    "local_batch_size": {local_batch_size},  # samples per GPU and forward
    # Samples per optimiser step, over all GPUs of all nodes. DeepSpec's own runs: 512, lr 6e-4, 1.3 million samples.
    "global_batch_size": {global_batch_size},
    "num_train_epochs": {epochs},
    "max_train_steps": {max_steps},  # a number replaces num_train_epochs
    "max_grad_norm": {max_grad_norm},
    "sharding_strategy": "no_shard",  # the draft fits one GPU
    "torch_compile": {compile},
}}

logging = {{
    "logging_steps": {log_every},
    "checkpointing_steps": 3000,
    "checkpoint_dir": None,  # ~/checkpoints/<project_name>/<exp_name>
    "tensorboard_dir": None,  # ~/tensorboard/<project_name>/<exp_name>
}}

data = {{
    "target_cache_path": None,  # the folder that `nds deepspec prepare` wrote
    "chat_template": "{template}",  # the cache says which one it was made with
    "max_length": {max_length},
    "num_workers": 4,
}}
"""


def config_for(run: RunConfig, *, algorithm: str = "dspark", file: str | None = None) -> str:
    """`config_text` for the target that ``run`` names: mask token and chat template follow from its tokenizer.

    Raises:
        InputError: no such target, or values no such draft can have.
    """
    from transformers import AutoTokenizer

    target = run.target.named
    folder = locate(target, revision=run.target.revision)
    spec = TargetSpec.from_folder(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mask = choose_mask_token(tokenizer, spec, override=run.draft.mask_token_id)
    return config_text(
        spec, run, mask_token_id=mask.id, template=template_name(tokenizer), algorithm=algorithm, file=file
    )


def template_name(tokenizer: Any) -> str:
    """What a cache's manifest and a config call this tokenizer's chat template."""
    found = recognise(tokenizer)
    return found.name if found else UNNAMED_TEMPLATE


def config_text(
    spec: TargetSpec,
    run: RunConfig,
    *,
    mask_token_id: int | None,
    template: str,
    algorithm: str = "dspark",
    file: str | None = None,
) -> str:
    """A commented DeepSpec config for ``spec``, with the values that ``run`` would train with natively.

    Raises:
        InputError: an unknown algorithm, or values no such draft can have.
    """
    if algorithm not in ALGORITHMS:
        raise InputError(f"There is no algorithm {algorithm!r}.", f"Use {' or '.join(ALGORITHMS)}.")
    if algorithm == "dspark" and mask_token_id is None:
        raise InputError("The draft's mask token is unknown.", "Set draft.mask_token_id.")
    config, _ = build_draft_config(spec, run.draft, mask_token_id=mask_token_id or 0)
    if algorithm == "eagle3" and config.num_taps != EAGLE3_TAPS:
        raise InputError(
            f"EAGLE-3 reads exactly {EAGLE3_TAPS} taps, not {config.num_taps}.",
            "Leave draft.taps and draft.num_taps out.",
        )
    name = exp_name(spec, run, algorithm)
    trainer = {"dspark": "NemotronDSparkTrainer", "eagle3": "NemotronEagle3Trainer"}[algorithm]
    train = run.train.model_dump()
    head = _HEAD.format(
        title={"dspark": "DSpark", "eagle3": "EAGLE-3"}[algorithm],
        target=spec.name,
        file=file or f"{name}.py",
        flags="" if algorithm == "dspark" else " --algorithm eagle3",
        assumed="".join(f"# Assumed: {note}\n" for note in spec.assumed),
        trainer=trainer,
        exp_name=name,
        seed=run.train.seed,
    )
    model = _dspark_model if algorithm == "dspark" else _eagle3_model
    tail = _TRAIN.format(
        **train,
        trainer=trainer,
        compile=algorithm == "dspark",
        template=template,
        max_length=min(run.data.max_length, spec.max_position_embeddings),
    )
    return head + model(spec, run, config) + tail


def exp_name(spec: TargetSpec, run: RunConfig, algorithm: str) -> str:
    """What DeepSpec calls the run: its folders are named so."""
    last = re.sub(r"[^a-z0-9]+", "_", spec.name.rstrip("/").rsplit("/", 1)[-1].lower()).strip("_")
    return f"dspark_block{run.draft.block_size}_{last}" if algorithm == "dspark" else f"eagle3_ttt7_{last}"


def _dspark_model(spec: TargetSpec, run: RunConfig, config: DraftConfig) -> str:
    train = run.train
    return f'''
model = {{
    "target_model_name_or_path": "{spec.name}",
    "block_size": {config.block_size},
    "num_draft_layers": {config.num_hidden_layers},
    # of {spec.num_layers} layers: {spec.layout}
    "target_layer_ids": {list(config.target_layer_ids)},
    "mask_token_id": {config.mask_token_id},  # reserved: printed by no template, in no data
    "num_anchors": {train.num_anchors},
    {_shape(spec, config)}
    # sequential head; rank 0 is what DeepSpec calls DFlash
    "markov_rank": {config.markov_rank},
    "markov_head_type": "{config.markov_head_type}",
    # confidence head; alpha 0 leaves it out
    "confidence_head_alpha": {train.confidence_alpha if run.draft.confidence_head else 0.0},
    "confidence_head_with_markov": {config.confidence_head_with_markov},
    # loss
    "loss_decay_gamma": {train.loss_decay_gamma},
    "ce_loss_alpha": {train.ce_alpha},
    "l1_loss_alpha": {train.l1_alpha},
}}
'''


def _eagle3_model(spec: TargetSpec, run: RunConfig, config: DraftConfig) -> str:
    return f'''
model = {{
    "target_model_name_or_path": "{spec.name}",
    # exactly five of {spec.num_layers} layers: {spec.layout}
    "target_layer_ids": {list(config.target_layer_ids)},
    "ttt_length": 7,  # steps unrolled in training, tokens drafted per round
    "step_loss_decay": 0.8,
    "draft_num_hidden_layers": 1,
    {_shape(spec, config)}
}}
'''


def _shape(spec: TargetSpec, config: DraftConfig) -> str:
    """The two keys that DeepSpec's own builders take from the target's config, and why they are what they are."""
    width = {
        "gated": "the target's own" if config.intermediate_size == spec.intermediate_size else "set",
        "plain": f"about two thirds of the target's ungated {spec.intermediate_size}: as many parameters",
        "moe": "2.25 x hidden, as NVIDIA's drafts for mixtures of experts have",
    }[spec.mlp]
    none = "the target has no rotary embedding; NVIDIA's drafts for such targets use 10000"
    return (
        f'"intermediate_size": {config.intermediate_size},  # SwiGLU width: {width}\n'
        f'    "rope_theta": {config.rope_theta},  # {none if spec.rope_theta is None else "rotary base"}'
    )
