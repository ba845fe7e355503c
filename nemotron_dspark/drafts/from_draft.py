"""A draft that starts where another one for the same target, or for what the target was before, has ended."""

from pathlib import Path

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts import kinds
from nemotron_dspark.drafts.config import SavedConfig
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import InputError

RANDOM, TARGET = "random", "target"


def draft_of(init: str) -> Path | None:
    """The draft that the setting `train.init` names; None where it is no draft that a run starts from."""
    return None if init in (RANDOM, TARGET) else Path(init).expanduser()


def section_like(config: SavedConfig, section: DraftSection) -> DraftSection:
    """``section`` with what is known of a draft's ``config`` before there is data: its kind, its taps, its mask token.

    Raises:
        InputError: ``section`` was asked for another kind.
    """
    kind = kinds.section_kind(config)
    if "kind" in section.model_fields_set and section.kind != kind:
        raise InputError(
            f"The draft to start from is of the kind {kind}, and draft.kind is {section.kind}.",
            "Leave draft.kind out, or train this kind from random weights.",
        )
    mask = getattr(config, "mask_token_id", None)
    return section.model_copy(update={"kind": kind, "taps": list(config.target_layer_ids), "mask_token_id": mask})


def start_from_draft(draft: Draft, folder: Path) -> None:
    """Copy all that is trained from the draft in ``folder``, whose config ``draft`` has; also an own embedding."""
    given = kinds.load(folder)
    trained = given.trainable_parameters()
    for name, parameter in draft.trainable_parameters().items():
        parameter.data.copy_(trained[name].data)
    if draft.config.own_embedding:
        draft.set_embeddings(given.embed_tokens.weight, draft.target_head)
