"""The wheel is complete: installed with what it requires and nothing else, away from the checkout, `nds` works."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, folder: Path) -> str:
    """Output of a command that must succeed, run in ``folder`` and without this process's import path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def nds(environment: Path, *command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [str(part) for part in (environment / "nds", *command)]
    wide = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}
    return subprocess.run(words, cwd=folder, env=wide, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


def required(names: list[str]) -> dict[str, metadata.Distribution]:
    """The distributions that ``names`` require, and what those require, extras left out."""
    found: dict[str, metadata.Distribution] = {}
    while names:
        requirement = Requirement(names.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = metadata.distribution(name)
            names += found[name].requires or []
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """bin folder of a new environment with the wheel and its dependencies, which are links to the tests' own."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, folder=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for distribution in required(base).values():
        for part in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            if not (site / part).exists():
                (site / part).symlink_to(Path(str(distribution.locate_file(part))).resolve())
    return python.parent


def test_the_wheel_carries_configs_templates_and_the_page(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"nemotron_dspark/serving/page/{name}" for name in ("index.html", "page.css", "page.js")} <= held
    for folder in ("configs", "templates"):
        expected = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert expected
        assert {f"nemotron_dspark/{name}" for name in expected} <= held
    assert "nemotron_dspark/constraints.txt" in held
    assert not [name for name in held if name.startswith(("tests/", "docs/"))]


def test_the_installed_package_is_not_the_checkout(environment, tmp_path):
    code = (
        "import nemotron_dspark, nemotron_dspark.resources as r; "
        "print(nemotron_dspark.__file__, r.resource_folder('configs'), r.resource_folder('templates'), sep='\\n')"
    )
    for line in run(environment / "python", "-c", code, folder=tmp_path).split():
        assert Path(line).is_relative_to(environment.parent)


def test_nds_answers_in_a_bare_environment(environment, tmp_path):
    assert "Usage: nds" in run(environment / "nds", "--help", folder=tmp_path)


def test_doctor_finds_no_fault_in_a_bare_environment(environment, tmp_path):
    found = json.loads(run(environment / "nds", "doctor", "--json", folder=tmp_path))
    (versions,) = [finding for finding in found["findings"] if finding["name"] == "versions"]
    assert versions["state"] == "ok"


def test_plan_runs_in_a_bare_environment(environment, tiny_hybrid, tmp_path):
    size = ("--samples", 50_000, "--mean-length", 800, "--machine", "h100x8", "--json")
    assert json.loads(run(environment / "nds", "plan", "--target", tiny_hybrid, *size, folder=tmp_path))["recommended"]


@pytest.mark.slow
def test_the_selftest_passes_in_a_bare_environment(environment, tmp_path):
    said = json.loads(run(environment / "nds", "selftest", "--json", folder=tmp_path))
    assert [check for check in said["checks"] if not check["passed"]] == []
    assert len(said["checks"]) >= 15
    assert said["passed"]


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("serve", "serve --target TINY"),
        ("data", "data regenerate --prompts prompts.jsonl --out answers.jsonl --base-url http://127.0.0.1:9/v1"),
        ("data", "data check org/name"),
    ],
)
def test_a_missing_extra_is_two_sentences(environment, tiny_hybrid, tmp_path, extra, command):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "?"}\n')
    done = nds(environment, *command.replace("TINY", str(tiny_hybrid)).split(), folder=tmp_path)
    assert done.returncode == 3
    said = done.stderr.strip().splitlines()
    assert "error:" in said[-2]
    assert "not installed" in said[-2]
    assert said[-1].strip().startswith("do:")
    assert f"pip install 'nemotron-dspark[{extra}]'" in said[-1]


def test_completion_is_installed_and_completes_in_bash(environment, tmp_path):
    """As a person does it: installed from a bash, then a new bash reads it and TAB calls its function."""
    home = {"HOME": str(tmp_path), "PATH": f"{environment}:{os.environ['PATH']}"}
    bash = partial(subprocess.run, env=os.environ | home, capture_output=True, text=True, cwd=tmp_path)
    bash(["bash", "-c", "nds --install-completion; true"], check=True)
    tab = "source ~/.bashrc; COMP_WORDS=({0}); COMP_CWORD={1}; _nds_completion nds; echo ${{COMPREPLY[@]}}"
    for words, completed in (("nds pl", "plan"), ("nds cache ver", "verify"), ("nds train --cac", "--cache")):
        done = bash(["bash", "-c", tab.format(words, len(words.split()) - 1)])
        assert completed in done.stdout.split(), done.stderr


def test_completion_tells_zsh_the_commands(environment, tmp_path):
    """What the function that zsh calls is answered; zsh itself need not be here."""
    asked = {"_NDS_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "nds pl"}
    done = subprocess.run([environment / "nds"], env=os.environ | asked, capture_output=True, text=True, cwd=tmp_path)
    assert '"plan"' in done.stdout
    assert '"train"' not in done.stdout
