"""The wheel is complete: installed into an empty environment, away from the checkout, `nds` works."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, folder: Path) -> str:
    """Output of a command that must succeed, run in ``folder`` and without this process's import path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """bin folder of an empty environment with the wheel in it; its dependencies are borrowed from the tests' own."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, folder=folder)
    # A path file adds that folder but not the path files inside it, so the checkout itself stays invisible.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_wheel_carries_configs_and_templates(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "templates"):
        expected = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert expected
        assert {f"nemotron_dspark/{name}" for name in expected} <= held
    assert not [name for name in held if name.startswith(("tests/", "docs/"))]


def test_the_installed_package_is_not_the_checkout(environment, tmp_path):
    code = (
        "import nemotron_dspark, nemotron_dspark.resources as r; "
        "print(nemotron_dspark.__file__, r.resource_folder('configs'), r.resource_folder('templates'), sep='\\n')"
    )
    for line in run(environment / "python", "-c", code, folder=tmp_path).split():
        assert Path(line).is_relative_to(environment.parent)


def test_nds_answers_in_an_empty_environment(environment, tmp_path):
    assert "Usage: nds" in run(environment / "nds", "--help", folder=tmp_path)


@pytest.mark.slow
def test_the_selftest_passes_in_an_empty_environment(environment, tmp_path):
    said = json.loads(run(environment / "nds", "selftest", "--json", folder=tmp_path))
    assert [check for check in said["checks"] if not check["passed"]] == []
    assert len(said["checks"]) >= 15
    assert said["passed"]
