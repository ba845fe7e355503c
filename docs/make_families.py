"""Write the table of families in docs/targets.md from what the tests measured.

NDS_FAMILY_REPORT=families.jsonl python -m pytest tests/targets/test_families.py
python docs/make_families.py families.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "targets.md"
BEGIN, END = "<!-- families: written by docs/make_families.py -->", "<!-- end of families -->"
MEASURED = ("layout", "taps_error", "rollback_error", "identical")

MODELS = {
    "nemotron_h": "Nemotron-H, Nano v2, Nemotron 3",
    "nemotron": "Minitron, Nemotron-Mini",
    "llama": "Llama, Llama-Nemotron Nano",
    "mistral": "Mistral",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 MoE",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text",
    "gemma4_text": "Gemma 4, text",
    "gemma4": "Gemma 4",
    "gpt_oss": "gpt-oss",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 MoE",
    "granitemoehybrid": "Granite 4.0",
    "bamba": "Bamba",
    "falcon_h1": "Falcon-H1",
    "zamba2": "Zamba2",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 MoE",
    "qwen3_5_text": "Qwen3.5, text",
    "qwen3_5_moe_text": "Qwen3.5 MoE, text",
    "jamba": "Jamba",
    "mamba": "Mamba",
    "falcon_mamba": "Falcon-Mamba",
    "mamba2": "Mamba-2, Codestral Mamba",
    "olmo2": "OLMo 2",
    "olmo_hybrid": "OLMo Hybrid",
    "zaya": "Zaya",
}
# Engines in whose code a DSpark draft was seen to work with that target; nothing was looked up for the others.
ENGINES = {
    "nemotron_h": "vLLM ≥ 0.28, SGLang ≥ 0.5.19",
    "qwen3": "vLLM ≥ 0.25, SGLang ≥ 0.5.16",
}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured of each model type; later lines replace earlier ones."""
    results: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        results.setdefault(values["model_type"], {}).update(values)
    for model_type, values in results.items():
        if absent := [key for key in MEASURED if key not in values]:
            sys.exit(f"{path} has no {absent[0]} of {model_type}: run the whole of tests/targets/test_families.py.")
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per model type, those with a family module first."""
    lines = [
        "| model type | models | layers as tested | taps | rollback | by | lossless | engines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model_type, values in sorted(results.items(), key=lambda item: item[1]["general"]):
        by = "replay" if values["general"] else "family"
        cells = (
            f"`{model_type}`",
            MODELS.get(model_type, ""),
            f"`{values['layout']}`",
            f"{values['taps_error']:.0e}" if values["taps_error"] else "equal",
            f"{values['rollback_error']:.1e}",
            by,
            f"{values['identical']}/{values['prompts']}",
            ENGINES.get(model_type, "unknown"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(report: Path) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(read(report))}\n{END}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
