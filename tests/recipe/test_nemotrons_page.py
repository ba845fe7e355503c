"""docs/nemotrons.md and docs/hybrids.md hold what `configs/known/` and the rules for drafts say; this writes them."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_dspark.cache.deepspec_layout import bytes_per_token as deepspec_bytes
from nemotron_dspark.config import DraftSection
from nemotron_dspark.config.known import KNOWN, KnownTarget
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.targets import spec_from_config
from nemotron_dspark.targets.spec import TargetSpec
from tests.recipe.hybrids import HYBRIDS
from tests.recipe.nemotrons import LLAMA_8B, MINI, NEMOTRONS

DOCS = Path(__file__).resolve().parents[2] / "docs"
LICENCES = {known.licence: (known.licence or "see the model card").split(" (")[0] for known in KNOWN}
NVIDIA = [known for known in KNOWN if known.repository.startswith("nvidia/")]
OTHERS = [known for known in KNOWN if known not in NVIDIA]


def targets_table(targets: Sequence[KnownTarget]) -> str:
    """Every known target: names, size, licence, chats, preset."""
    rows = ["| target, aliases | layers | parameters | weights | licence | chat format | preset |", "|---" * 7 + "|"]
    for known in targets:
        names = ", ".join([f"**{known.repository}**", *known.aliases])
        preset = f"[{known.preset}](../configs/{known.preset})" if known.preset else ""
        rows.append(
            f"| {names} | {known.layers} | {known.billions:.3f} billion | {known.weights} | {LICENCES[known.licence]} "
            f"| {known.chat_format or 'unknown'} | {preset} |"
        )
    return "\n".join(rows)


def drafts_table(configs: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """Every shape: layers, what its draft is by default, and what its cache costs."""
    shapes: dict[tuple, tuple[list[str], TargetSpec]] = {}
    for name, config in configs:
        spec = spec_from_config(config, name)
        shapes.setdefault((spec.layers, spec.hidden_size, spec.intermediate_size), ([], spec))[0].append(name)
    rows = [
        "| target | layers | attention layers | hidden, heads | taps | SwiGLU | trainable | cache bytes a token |",
        "|---" * 8 + "|",
    ]
    for names, spec in shapes.values():
        draft, _ = build_draft_config(spec, DraftSection(), mask_token_id=0)
        with torch.device("meta"):
            trainable = sum(p.numel() for p in DSparkDraft(draft).trainable_parameters().values())
        kinds = ", ".join(f"{spec.layers.count(kind)} {kind.value}" for kind in dict.fromkeys(spec.layers))
        attention = [str(layer) for layer, kind in enumerate(spec.layers) if kind.attends]
        taps = ", ".join(map(str, draft.target_layer_ids))
        rows.append(
            f"| {', '.join(names)} | {kinds} | {'all' if len(attention) == spec.num_layers else ', '.join(attention)} "
            f"| {spec.hidden_size}, {spec.num_attention_heads}/{spec.num_key_value_heads} × {spec.head_dim} | {taps} "
            f"| {draft.intermediate_size} | {trainable / 1e9:.3f} billion "
            f"| {deepspec_bytes(len(draft.target_layer_ids), spec.hidden_size):,} |"
        )
    return "\n".join(rows)


NEMOTRON_CONFIGS = [(row.name, row.config()) for row in NEMOTRONS]
NEMOTRON_CONFIGS += [("Llama-3.1-Nemotron-Nano-8B-v1", LLAMA_8B), ("Nemotron-Mini-4B-Instruct", MINI)]
TABLES = {
    ("nemotrons.md", "targets"): lambda: targets_table(NVIDIA),
    ("nemotrons.md", "drafts"): lambda: drafts_table(NEMOTRON_CONFIGS),
    ("hybrids.md", "targets"): lambda: targets_table(OTHERS),
    ("hybrids.md", "drafts"): lambda: drafts_table((row.name, row.config()) for row in HYBRIDS),
}


def between(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- {name} -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_the_pages_of_known_targets_are_up_to_date(page, name):
    held = between(name).search((DOCS / page).read_text(encoding="utf-8")).group(0).partition("\n")[2]
    assert held == TABLES[page, name](), f"python {Path(__file__).name} writes the table anew"


if __name__ == "__main__":
    for (page, name), table in TABLES.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        text = between(name).sub(lambda match, table=table: match.group(1) + table(), text)
        (DOCS / page).write_text(text, encoding="utf-8")
