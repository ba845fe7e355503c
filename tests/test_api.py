"""The Python API: what `import nemotron_dspark` gives, lazily, and the recipe as docs/python.md has it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nemotron_dspark as nds

ROOT = Path(__file__).resolve().parents[1]
PROMISED = ("build_cache", "train", "evaluate", "serve", "inspect", "plan", "regenerate", "load_config", "RunConfig")
PROMISED += ("run_recipe", "load_recipe", "Recipe", "Target", "DSparkDraft", "Eagle3Draft", "Decoder", "Sampling")


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_name_is_there(name):
    assert name in dir(nds)
    assert name in nds.__all__
    assert callable(getattr(nds, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        _ = nds.evaluat


def test_the_import_alone_loads_no_heavy_library():
    code = "import sys, nemotron_dspark; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_what_the_page_shows_runs(tiny_hybrid, tmp_path, monkeypatch):
    """The page's snippets in order, with the tiny target in place of the published one and a run as small."""
    monkeypatch.chdir(tmp_path)
    rows = [{"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "state " * 20}]}] * 8
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.jsonl").write_text('{"prompt": "What is a state?"}\n')
    code = "\n".join(snippets(ROOT / "docs/python.md")).replace("nvidia/Nemotron-H-8B", str(tiny_hybrid))
    small = (
        'train={"max_steps": 2, "global_batch_size": 4, "num_anchors": 4}, draft={"num_layers": 1, "markov_rank": 8}'
    )
    small += ', eval={"max_new_tokens": 8}, data={"min_loss_tokens": 4}, serve={"port": 0}'
    changed = re.sub(r"load_config\((.*?)\)", rf"load_config(\1, {small})", code, count=1)
    assert changed != code
    monkeypatch.setattr(sys, "argv", ["recipe"])
    exec(compile(changed, "docs/python.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "runs/h8b/draft/model.safetensors").is_file()
