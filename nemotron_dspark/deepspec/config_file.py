"""DeepSpec's fourth extension point, the config file, for any target: every value, and why it is assumed."""

import re
from typing import TYPE_CHECKING

import jinja2

from nemotron_dspark.chat.format import recognise
from nemotron_dspark.chat.mask_token import choose_mask_token
from nemotron_dspark.config import RunConfig
from nemotron_dspark.drafts.config import EAGLE3_TAPS, DraftConfig, build_draft_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.spec import TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALGORITHMS = ("dspark", "eagle3")
UNNAMED_TEMPLATE = "the tokenizer's own"  # as `cache.build` writes it


def config_for(run: RunConfig, *, algorithm: str | None = None, file: str | None = None) -> str:
    """`config_text` for the target that ``run`` names: mask token and chat template follow from its tokenizer.

    Raises:
        InputError: no such target, or values no such draft can have.
    """
    checkpoint = Checkpoint.of(run.target)
    spec, tokenizer = checkpoint.read_spec(), checkpoint.load_tokenizer()
    mask = choose_mask_token(tokenizer, spec, override=run.draft.mask_token_id)
    return config_text(
        spec, run, mask_token_id=mask.id, template=template_name(tokenizer), algorithm=algorithm, file=file
    )


def template_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What a cache's manifest and a config call this tokenizer's chat template."""
    found = recognise(tokenizer)
    return found.name if found else UNNAMED_TEMPLATE


def config_text(
    spec: TargetSpec,
    run: RunConfig,
    *,
    mask_token_id: int | None,
    template: str,
    algorithm: str | None = None,
    file: str | None = None,
) -> str:
    """A commented DeepSpec config for ``spec``, with the values that ``run`` would train with natively.

    Raises:
        InputError: an unknown algorithm, or values no such draft can have.
    """
    algorithm = algorithm or run.draft.kind
    config = _checked_config(spec, run, algorithm, mask_token_id)
    name, dspark = exp_name(spec, run, algorithm), algorithm == "dspark"
    width = {
        "gated": "the target's own" if config.intermediate_size == spec.intermediate_size else "set",
        "plain": f"about two thirds of the target's ungated {spec.intermediate_size}: as many parameters",
        "moe": "2.25 x hidden, as NVIDIA's drafts for mixtures of experts have",
    }[spec.mlp]
    none = "the target has no rotary embedding; NVIDIA's drafts for such targets use 10000"
    file_template = (resource_folder("templates") / "deepspec_config.py.jinja").read_text(encoding="utf-8")
    return jinja2.Template(file_template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(
        title="DSpark" if dspark else "EAGLE-3",
        dspark=dspark,
        trainer="NemotronDSparkTrainer" if dspark else "NemotronEagle3Trainer",
        spec=spec,
        draft=config,
        train=run.train,
        file=file or f"{name}.py",
        exp_name=name,
        width=width,
        rope=none if spec.rope_theta is None else "rotary base",
        confidence_alpha=run.train.confidence_alpha if run.draft.confidence_head else 0.0,
        template=template,
        max_length=min(run.data.max_length, spec.max_position_embeddings),
    )


def _checked_config(spec: TargetSpec, run: RunConfig, algorithm: str, mask_token_id: int | None) -> DraftConfig:
    """The draft's config; `InputError` for one that DeepSpec does not train."""
    if algorithm == "dflash":
        raise InputError(
            "DeepSpec trains no DFlash as engines read it, whose anchor predicts nothing.",
            "Train it with --trainer native, or DeepSpec's own with draft.markov_rank=0 and draft.kind=dspark.",
        )
    if run.draft.vocabulary is not None:
        raise InputError(
            "DeepSpec trains no draft of a part of the vocabulary.",
            "Leave draft.vocabulary out, or use --trainer native.",
        )
    if run.train.window is not None:
        raise InputError(
            "DeepSpec learns from all of a long sample.", "Leave train.window out, or use --engine native."
        )
    if algorithm not in ALGORITHMS:
        raise InputError(f"There is no algorithm {algorithm!r}.", f"Use {' or '.join(ALGORITHMS)}.")
    if algorithm == "dspark" and mask_token_id is None:
        raise InputError("The draft's mask token is unknown.", "Set draft.mask_token_id.")
    config, _ = build_draft_config(
        spec, run.draft.model_copy(update={"kind": "dspark"}), mask_token_id=mask_token_id or 0
    )
    if config.beyond_deepspec:
        raise InputError(
            f"DeepSpec trains no draft with {' or '.join(config.beyond_deepspec.values())}.",
            f"Leave {' and '.join(f'draft.{key}' for key in config.beyond_deepspec)} out, or use --trainer native.",
        )
    if algorithm == "eagle3" and config.num_taps != EAGLE3_TAPS:
        raise InputError(
            f"EAGLE-3 reads exactly {EAGLE3_TAPS} taps, not {config.num_taps}.",
            "Leave draft.taps and draft.num_taps out.",
        )
    return config


def exp_name(spec: TargetSpec, run: RunConfig, algorithm: str) -> str:
    """What DeepSpec calls the run: its folders are named so."""
    last = re.sub(r"[^a-z0-9]+", "_", spec.name.rstrip("/").rsplit("/", 1)[-1].lower()).strip("_")
    return f"dspark_block{run.draft.block_size}_{last}" if algorithm == "dspark" else f"eagle3_ttt7_{last}"
