"""`nds inspect` draws the layout with the taps below it; --json prints one JSON object; --probe proves the target."""

import json

import pytest
import typer
from typer.testing import CliRunner

from nemotron_dspark.cli import inspect_command, shell
from nemotron_dspark.targets import LayerKind
from nemotron_dspark.targets.proofs import ProofResult


@pytest.fixture
def nds(monkeypatch):
    """Run `nds inspect` with ``arguments``; the result has exit_code, stdout and stderr."""
    app = typer.Typer()
    app.callback()(lambda: None)
    inspect_command.register(app)
    monkeypatch.setattr(shell.out, "_width", 100)
    return lambda *arguments: CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=False)


def test_the_strip_marks_every_tap_below_its_layer():
    layout = "ME*-M*-M" * 4
    taps = (1, 12, 19, 20, 29)
    drawn = inspect_command.strip([LayerKind(kind) for kind in layout], taps, width=23).plain.splitlines()
    numbers, layers, marks = drawn[0::3], drawn[1::3], drawn[2::3]
    assert "".join(row[2:] for row in layers) == layout
    assert [numbers[0].split(), numbers[1].split()] == [["0", "10"], ["20", "30"]]
    marked = [20 * row + at - 2 for row, line in enumerate(marks) for at, mark in enumerate(line) if mark == "^"]
    assert tuple(marked) == taps
    assert all(len(row) <= 23 for row in drawn)


def test_inspect_prints_tables_for_people(nds, tiny_hybrid):
    result = nds("--target", str(tiny_hybrid))
    assert result.exit_code == 0
    for words in ("ME*-M*-M", "^^^^^", "Mamba-2 x 3", "774 bytes a token", "chatml", "31 (the highest reserved token"):
        assert words in result.stdout


def test_json_is_one_object_and_probe_adds_the_proofs(nds, tiny_hybrid):
    result = nds("--target", str(tiny_hybrid), "--json", "--probe")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["spec"]["layers"] == "ME*-M*-M"
    assert found["draft"]["target_layer_ids"] == [1, 2, 3, 4, 5]
    assert {proof["name"] for proof in found["proofs"]} >= {"causality", "taps", "head", "padding", "rollback"}
    assert all(proof["passed"] for proof in found["proofs"])


def test_a_failed_proof_is_told_with_its_cure_and_exits_1(nds, tiny_hybrid, monkeypatch):
    failed = ProofResult("rollback", False, 0.5, 1e-4, 0.1, "the state is wrong", "Do not serve.")
    monkeypatch.setattr("nemotron_dspark.targets.proofs.run_proofs", lambda target, taps: [failed])
    result = nds("--target", str(tiny_hybrid), "--probe")
    assert result.exit_code == 1
    assert "the state is wrong" in result.stderr
    assert "Do not serve." in result.stderr
