"""A target and a draft for it, without training: what `nds engine` and the engines are tried with."""

import json
from pathlib import Path

import torch

from nemotron_dspark.config import load_config
from nemotron_dspark.drafts.config import DraftConfig, build_draft_config, build_eagle3_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.targets import Checkpoint, Target


def write_draft(folder: Path, target: Path, *, eagle3: bool = False, kind: str = "dspark", **changes) -> Path:
    """A draft's folder for ``target``, its config.json alone; ``changes`` are of keys of that file."""
    taps = {"taps": [0, 1, 2, 3, 4]} if eagle3 else {"num_taps": 2}
    config = load_config(str(target), draft={"num_layers": 2, "markov_rank": 16, "kind": kind, **taps})
    spec = Checkpoint.find(target).read_spec()
    if eagle3:
        made, _ = build_eagle3_config(spec, config.draft)
    else:
        made, _ = build_draft_config(spec, config.draft, mask_token_id=31)
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in (made.to_json() | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_random_draft(folder: Path, target: Path) -> Path:
    """A draft's folder for ``target`` with random weights that are far from their initial ones."""
    draft = DSparkDraft(DraftConfig.from_folder(write_draft(folder, target)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    loaded = Target.of(load_config(str(target)).target)
    draft.set_embeddings(loaded.model.get_input_embeddings().weight, loaded.head.weight)
    draft.save(folder)
    return folder
