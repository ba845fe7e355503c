"""The oldest transformers that the project allows is the one that `make test-oldest` tests."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_oldest_transformers_allowed_is_tested():
    (required,) = [
        requirement
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if requirement.startswith("transformers")
    ]
    tested = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    assert required == f"transformers>={tested[1]}"
