"""`nds inspect` draws the layout with the taps below it; --json prints one JSON object; --probe proves the target."""

import io
import json
import re
import shutil

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nemotron_dspark.cli import inspect_command, shell
from nemotron_dspark.config import load_config
from nemotron_dspark.config.known import ALIASES, KNOWN
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import LayerKind
from nemotron_dspark.targets.proofs import ProofResult
from tests.recipe.nemotrons import NEMOTRONS, SUPER_49B


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


def test_every_layer_kind_has_a_name_and_a_colour_of_its_own():
    assert set(inspect_command.KINDS) == {kind.name for kind in LayerKind}
    names = [name for name, _ in inspect_command.KINDS.values()]
    assert len(set(names)) == len(names)
    drawn = inspect_command.strip(tuple(LayerKind), (1,), width=80)
    assert "".join(kind.value for kind in LayerKind) in drawn.plain
    assert all(Console().get_style(colour) for _, colour in inspect_command.KINDS.values())
    assert len({kind.value for kind in LayerKind}) == len(LayerKind)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("row", [NEMOTRONS[4], NEMOTRONS[13]], ids=lambda row: row.name)
def test_the_page_of_a_large_target_fits_the_terminal(monkeypatch, tmp_path, width, row):
    """On a terminal nothing is cut off and nothing wider than it: strip, tables, notes and warnings wrap."""
    folder = tmp_path / row.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(row.config()))
    drawn = Console(width=width, force_terminal=True, record=True, highlight=False, file=io.StringIO())
    monkeypatch.setattr(shell, "out", drawn)
    monkeypatch.setattr(shell, "err", drawn)
    monkeypatch.chdir(tmp_path)
    inspect_command.inspect(load_config(f"./{row.name}"))
    text = drawn.export_text(styles=False)
    assert max(map(len, text.rstrip().splitlines())) <= width
    assert "…" not in text
    flat = re.sub(r"\s+", "", text)
    for expected in (
        row.repository,
        f"{row.billions:.3f} billion",
        f"taps {', '.join(map(str, row.taps))}",
        "990 (documented for this target; not checked, there is no tokenizer here)",
        "warning: There are no tokenizer files here",
    ):
        assert re.sub(r"\s+", "", expected) in flat


def test_a_quantised_checkpoint_is_told_by_its_tensors(nds, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "self_attn" in name]:
        scale = tensors[name].abs().max() / 448
        tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    result = nds("--target", str(folder))
    text = " ".join(result.stdout.split())
    for words in (
        "quantised (FP8)",
        "FP8 (e4m3, one scale per tensor) in 24 of 44 matrices, the rest F32; written by ModelOpt, dequantised to BF16",
        "activations stay BF16",
        "not used scales of activations and of cached keys and values (1 tensors)",
        "rounding model.layers.",
        "of the rms",
    ):
        assert words in text
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    assert "q_proj.weight in" in nds("--target", str(folder)).stderr.replace("\n", " ")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A16_AWQ"}}))
    refused = " ".join(nds("--target", str(folder)).stderr.split())
    assert "W4A16_AWQ, which is not read here. Use the target's BF16 checkpoint" in refused


def test_multi_token_layers_experts_and_preset_are_on_the_page(nds, tmp_path):
    row = next(row for row in NEMOTRONS if row.name.endswith("Super-120B-A12B-NVFP4"))
    (tmp_path / row.name).mkdir()
    (tmp_path / row.name / "config.json").write_text(json.dumps(row.config()))
    result = nds("--target", str(tmp_path / row.name))
    for words in (
        "configs/nemotron_3_super.yaml",
        "1 x (*E), left out",
        "22 a token, behind 1024 latent channels",
        "128 heads, 64 wide, state 128",
        "quantised (NVFP4)",
        "nemotron_3_super (documented",
    ):
        assert words in result.stdout
    assert "NVIDIA-Nemotron-3-Super-120B-A12B-BF16 holds them unrounded" in result.stderr


def test_list_names_every_known_target_with_size_licence_and_preset(nds):
    result = nds("--list")
    assert result.exit_code == 0
    words = result.stdout.split()
    for known in KNOWN:
        assert known.repository in words
        assert f"{known.billions:.3f}" in words
        assert known.preset is None or known.preset in words
    assert set(ALIASES) <= set(words)
    assert "research only" in result.stdout
    listed = json.loads(nds("--list", "--json").stdout)["targets"]
    assert [target["repository"] for target in listed] == [known.repository for known in KNOWN]


def test_without_a_target_the_list_is_pointed_to(nds):
    with pytest.raises(InputError, match="No target is named") as caught:
        nds()
    assert "--list" in caught.value.do


def test_remote_code_runs_only_by_flag(nds, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SUPER_49B))
    with pytest.raises(InputError, match="code that comes with its checkpoint"):
        nds("--target", str(tmp_path))
    with pytest.raises(InputError, match=r"configuration_decilm\.py"):  # it is looked for, and is not there
        nds("--target", str(tmp_path), "--trust-remote-code")
