"""A draft of whatever kind its folder says."""

from pathlib import Path

import torch

from nemotron_dspark.drafts import eagle3_config
from nemotron_dspark.drafts.base import Draft
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.drafts.eagle3_config import Eagle3Config
from nemotron_dspark.files import read_json


def read_draft_config(folder: Path) -> DraftConfig | Eagle3Config:
    """The config of the draft in ``folder``; `InputError` when it is no draft we know."""
    path = Path(folder) / "config.json"
    values = read_json(path) if path.is_file() else {}
    architectures = values.get("architectures") if isinstance(values, dict) else None
    kind = Eagle3Config if architectures == [eagle3_config.ARCHITECTURE] else DraftConfig
    return kind.from_folder(Path(folder))


def load_any_draft(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Draft:
    """The draft in ``folder``, in eval mode; errors as `Draft.load`."""
    kind = Eagle3Draft if isinstance(read_draft_config(folder), Eagle3Config) else DSparkDraft
    return kind.load(folder, device=device, dtype=dtype)
