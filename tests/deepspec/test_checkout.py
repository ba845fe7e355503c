"""A checkout is found, cloned whole at the pinned commit, verified, and what is unusual about it is said."""

import subprocess

import pytest
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.deepspec import checkout
from nemotron_dspark.errors import EnvironmentFault, InputError


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with the two files DeepSpec is known by; its first commit counts as the pinned one."""
    folder = tmp_path / "upstream"
    (folder / "deepspec").mkdir(parents=True)
    (folder / "deepspec" / "__init__.py").write_text("")
    (folder / "train.py").write_text("first\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    pinned = git(folder, "rev-parse", "HEAD")
    (folder / "train.py").write_text("second\n")
    git(folder, "commit", "-qam", "second")
    monkeypatch.setattr(checkout, "COMMIT", pinned)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(checkout.HOME_VARIABLE, raising=False)
    return folder


def test_install_clones_the_pinned_commit_once(repository):
    pinned = checkout.COMMIT
    found = checkout.install(url=str(repository), commit=pinned)
    assert found.commit == pinned
    assert (found.folder / "train.py").read_text() == "first\n"
    assert found.warnings() == ()
    assert checkout.find() == found
    assert checkout.install(url="/nowhere", commit=pinned) == found  # there already: nothing is fetched


def test_a_repository_without_the_commit_leaves_nothing_behind(repository):
    with pytest.raises(EnvironmentFault, match="has no commit 0000000"):
        checkout.install(url=str(repository), commit="0" * 40)
    with pytest.raises(EnvironmentFault, match="cannot be cloned"):
        checkout.install(url=str(repository / "nothing"), commit=checkout.COMMIT)
    assert not checkout.install_folder().exists()
    assert list(checkout.install_folder().parent.iterdir()) == []


def test_a_folder_with_another_commit_is_not_touched(repository, tmp_path):
    subprocess.run(["git", "clone", "-q", str(repository), str(tmp_path / "mine")], check=True)
    with pytest.raises(InputError, match="holds commit"):
        checkout.install(tmp_path / "mine", commit=checkout.COMMIT)
    assert (tmp_path / "mine" / "train.py").read_text() == "second\n"


def test_another_commit_and_local_changes_are_said(repository):
    (repository / "train.py").write_text("third\n")
    found = checkout.find(repository)
    assert found.changed == ("train.py",)
    other, changes = found.warnings()
    assert "was made for" in other
    assert "local changes: train.py" in changes


def test_no_checkout_says_how_to_get_one(repository, tmp_path, monkeypatch):
    with pytest.raises(EnvironmentFault, match="There is no DeepSpec checkout") as fault:
        checkout.find()
    assert "nds deepspec install" in fault.value.do
    monkeypatch.setenv(checkout.HOME_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match="is not a DeepSpec checkout"):
        checkout.find()


def test_importing_the_bridge_needs_no_checkout_and_its_classes_say_so(monkeypatch):
    import sys

    import nemotron_dspark.deepspec as bridge

    for name in [name for name in sys.modules if name.split(".")[0] == "deepspec"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("trainers", "evaluators"):
        monkeypatch.delitem(sys.modules, f"nemotron_dspark.deepspec.{name}", raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "deepspec" not in path.lower()])
    for name in ("NemotronDSparkTrainer", "NemotronEagle3Evaluator"):
        with pytest.raises(EnvironmentFault, match="not on Python's path"):
            getattr(bridge, name)


def test_the_command_installs_and_prints_where(repository, monkeypatch):
    monkeypatch.setattr(checkout.install, "__kwdefaults__", {"url": None, "commit": checkout.COMMIT})
    monkeypatch.setenv(checkout.URL_VARIABLE, str(repository))
    result = CliRunner().invoke(app, ["deepspec", "install", "--json"])
    assert result.exit_code == 0, result.output
    assert checkout.COMMIT in result.stdout
