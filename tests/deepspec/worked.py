"""How the files in `configs/deepspec/` are made: each is what `nds deepspec config` writes for its target."""

from nemotron_dspark.config import load_config
from nemotron_dspark.deepspec.config_file import config_text
from nemotron_dspark.targets import spec_from_config
from tests.recipe.nemotrons import NEMOTRONS

WORKED = {
    "dspark_nemotron_h_8b.py": ("nvidia/Nemotron-H-8B-Base-8K", "plain", "dspark"),
    "dspark_nemotron_3_nano_30b.py": ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nemotron_3", "dspark"),
    "dspark_nemotron_nano_9b_v2.py": ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "nemotron_nano_v2", "dspark"),
    "eagle3_nemotron_h_8b.py": ("nvidia/Nemotron-H-8B-Base-8K", "plain", "eagle3"),
}


def spec_of(file):
    row = next(row for row in NEMOTRONS if row.repository == WORKED[file][0])
    return spec_from_config(row.config(), row.repository)


def text_of(file):
    target, template, algorithm = WORKED[file]
    run = load_config(target=target)
    mask = run.draft.mask_token_id
    return config_text(spec_of(file), run, mask_token_id=mask, template=template, algorithm=algorithm, file=file)
