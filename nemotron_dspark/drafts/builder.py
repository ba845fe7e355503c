"""From a target's spec to the shape of its draft, with a sentence on every value that had to be assumed."""

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.taps import chosen_taps

ASSUMED_ROPE_THETA = 10_000.0


def build_draft_config(
    spec: TargetSpec, section: DraftSection, *, mask_token_id: int, num_anchors: int = 512
) -> tuple[DraftConfig, tuple[str, ...]]:
    """The draft's config for ``spec`` and the notes on what was assumed.

    Hidden size, vocabulary, heads, head_dim and eps are the target's; the rest follows ``section``, and what it leaves
    open follows the target.

    Raises:
        InputError: taps out of range, or a combination of keys no draft can have.
    """
    notes = list(spec.assumed)
    width, note = _mlp_width(spec, section)
    notes += note
    theta = section.rope_theta if section.rope_theta is not None else spec.rope_theta
    if theta is None:
        theta = ASSUMED_ROPE_THETA
        notes.append(
            "rope theta 10000: the target has no rotary embedding, and drafts published for such targets use 10000 "
            "(draft.rope_theta sets it)."
        )
    taps = chosen_taps(spec, section)
    if not isinstance(section.taps, list):
        choice = f"the choice {section.taps!r}" if section.taps else "the default choice"
        notes.append(f"taps {', '.join(map(str, taps))}: {choice} (draft.taps sets them).")
    with_markov = section.confidence_with_markov
    if section.confidence_head and with_markov and not section.markov_rank:
        with_markov = False
        notes.append("the confidence head reads the hidden state only: with markov_rank 0 there is nothing else.")
    config = DraftConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=width,
        num_hidden_layers=section.num_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        rms_norm_eps=spec.norm_eps,
        rope_theta=theta,
        max_position_embeddings=spec.max_position_embeddings,
        block_size=section.block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=tuple(taps),
        num_target_layers=spec.num_layers,
        num_anchors=num_anchors,
        markov_rank=section.markov_rank,
        markov_head_type=section.markov_head,
        enable_confidence_head=section.confidence_head,
        confidence_head_with_markov=section.confidence_head and with_markov,
        target_logit_multiplier=spec.logit_multiplier,
        target_logit_softcap=spec.logit_softcap,
    )
    return config, tuple(notes)


def _mlp_width(spec: TargetSpec, section: DraftSection) -> tuple[int, list[str]]:
    """SwiGLU width: as set; the target's if its MLP is gated; else one of about the same parameter count."""
    if section.intermediate_size is not None:
        return section.intermediate_size, []
    if spec.mlp == "gated":
        return int(spec.intermediate_size), []
    if spec.mlp == "plain":
        width = _round_up(-(-2 * spec.intermediate_size // 3), 256)
        reason = f"two thirds of the target's ungated {spec.intermediate_size}, so as many parameters"
    else:
        width = _round_up(-(-9 * spec.hidden_size // 4), 512)
        reason = "2.25 x hidden, as NVIDIA's draft for a mixture of experts has"
    return width, [f"SwiGLU width {width}: {reason} (draft.intermediate_size sets it)."]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
