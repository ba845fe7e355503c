"""The table of families in docs/targets.md lists the registry, and what it claims is what the tests demand."""

import importlib.util
from pathlib import Path

import pytest

from nemotron_dspark.targets.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("make_families", ROOT / "docs" / "make_families.py")
make_families = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make_families)

REPORT = """
{"model_type": "bamba", "layout": "MD", "general": false}
{"model_type": "bamba", "taps_error": 0.0}
{"model_type": "bamba", "rollback_error": 2.5e-07}
{"model_type": "bamba", "prompts": 10, "identical": 10}
"""


@pytest.fixture
def rows() -> list[list[str]]:
    page = (ROOT / "docs" / "targets.md").read_text()
    table = page.partition(make_families.BEGIN)[2].partition(make_families.END)[0]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def test_the_table_lists_exactly_the_registry(rows):
    assert sorted(row[0] for row in rows if row[5] == "family") == sorted(FAMILIES)


def test_every_row_keeps_every_promise(rows):
    for row in rows:
        assert row[3] == "equal" or float(row[3]) < 1e-5
        assert float(row[4]) < 1e-5
        identical, prompts = row[6].split("/")
        assert identical == prompts


def test_a_row_is_what_was_measured(tmp_path):
    (tmp_path / "report").write_text(REPORT.strip())
    (row,) = make_families.table(make_families.read(tmp_path / "report")).splitlines()[2:]
    assert row == "| `bamba` | Bamba | `MD` | equal | 2.5e-07 | family | 10/10 | unknown |"


def test_a_report_of_a_part_of_the_tests_is_refused(tmp_path):
    (tmp_path / "report").write_text("\n".join(REPORT.strip().splitlines()[:2]))
    with pytest.raises(SystemExit, match="rollback_error of bamba"):
        make_families.read(tmp_path / "report")
