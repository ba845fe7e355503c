"""The kinds of draft: which class is a draft of a config, and which config follows from `draft.kind` for a target."""

from pathlib import Path

import torch

from nemotron_dspark.config import DraftSection
from nemotron_dspark.config.run import DraftKind
from nemotron_dspark.drafts.config import (
    DFlashConfig,
    DraftConfig,
    Eagle3Config,
    SavedConfig,
    build_draft_config,
    build_eagle3_config,
    read_draft_config,
)
from nemotron_dspark.drafts.dspark import Draft, DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.targets.spec import TargetSpec


def draft_class(config: SavedConfig | type[SavedConfig]) -> type[Draft]:
    """What a draft with this config, or with one of this class, is."""
    kind = config if isinstance(config, type) else type(config)
    return Eagle3Draft if issubclass(kind, Eagle3Config) else DSparkDraft


def load(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Draft:
    """The draft in ``folder``, of whatever kind; arguments and errors as `Draft.load`."""
    return draft_class(read_draft_config(folder)).load(folder, device=device, dtype=dtype)


def section_kind(config: SavedConfig) -> DraftKind:
    """What `draft.kind` is for drafts with this config."""
    if isinstance(config, Eagle3Config):
        return "eagle3"
    return "dflash" if isinstance(config, DFlashConfig) else "dspark"


def has_mask_token(section: DraftSection) -> bool:
    """Whether drafts of this kind read places that are not drafted yet."""
    return section.kind != "eagle3"


def config_for(
    spec: TargetSpec, section: DraftSection, *, mask_token_id: int | None, num_anchors: int
) -> tuple[DraftConfig | Eagle3Config, tuple[str, ...]]:
    """The config of a draft of ``section.kind`` for ``spec``, and the notes on what was assumed.

    Raises:
        InputError: a combination of keys that no draft of this kind can have.
    """
    if mask_token_id is not None:
        return build_draft_config(spec, section, mask_token_id=mask_token_id, num_anchors=num_anchors)
    return build_eagle3_config(spec, section, ttt_length=section.block_size)
