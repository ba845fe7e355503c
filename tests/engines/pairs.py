"""A target and a draft for it, without training: what `nds engine` and the engines are tried with."""

import json
from pathlib import Path

from nemotron_dspark.config import load_config
from nemotron_dspark.drafts.config import build_draft_config, build_eagle3_config
from nemotron_dspark.targets import Checkpoint


def write_draft(folder: Path, target: Path, *, eagle3: bool = False, **changes) -> Path:
    """A draft's folder for ``target``, its config.json alone; ``changes`` are of keys of that file."""
    taps = {"taps": [0, 1, 2, 3, 4]} if eagle3 else {"num_taps": 2}
    config = load_config(str(target), draft={"num_layers": 1, "markov_rank": 16, **taps})
    spec = Checkpoint.find(target).read_spec()
    if eagle3:
        made, _ = build_eagle3_config(spec, config.draft)
    else:
        made, _ = build_draft_config(spec, config.draft, mask_token_id=31)
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in (made.to_json() | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder
