"""A name becomes a folder, or one sentence on what is wrong with it. The hub itself is replaced; nothing is fetched."""

import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from nemotron_dspark.config.known import ALIASES, known_target
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets.locate import locate


class Response:
    """What hub errors want to know of an HTTP response."""

    status_code = 404
    headers = types.MappingProxyType({})
    request = None


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Answer downloads from ``tmp_path`` and record what was asked for; set ``hub.error`` to fail instead."""

    class Hub:
        folder = tmp_path / "snapshot"
        error: Exception | None = None
        asked: tuple = ()

    def download(repository, revision=None, allow_patterns=()):
        Hub.asked = (repository, revision, tuple(allow_patterns))
        if Hub.error is not None:
            raise Hub.error
        return str(Hub.folder)

    Hub.folder.mkdir()
    (Hub.folder / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return Hub


def test_a_local_folder_is_returned_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [("./no/such/folder", "no folder"), ("/no/such", "no folder"), ("a/b/c", "no folder"), ("a b", "not a hub id")],
)
def test_a_folder_that_does_not_exist_is_named(name, reason, hub):
    with pytest.raises(InputError, match=reason) as caught:
        locate(name)
    assert name in caught.value.what
    assert hub.asked == ()


def test_a_folder_without_config_or_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no safetensors"):
        locate(str(tmp_path), weights=True)
    with pytest.raises(InputError, match="is a file"):
        locate(str(tmp_path / "config.json"))


def test_an_alias_becomes_its_repository(hub):
    assert locate("nvidia/Nemotron-H-8B", revision="abc") == hub.folder
    repository, revision, patterns = hub.asked
    assert (repository, revision) == ("nvidia/Nemotron-H-8B-Base-8K", "abc")
    assert "*.safetensors" not in patterns
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in patterns)


def test_weights_are_downloaded_only_when_asked_for(hub):
    (hub.folder / "model.safetensors").write_bytes(b"")
    locate("nvidia/Nemotron-H-8B", weights=True)
    assert "*.safetensors" in hub.asked[2]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (errors.GatedRepoError("gated", response=Response()), InputError, "gated"),
        (errors.RepositoryNotFoundError("404", response=Response()), InputError, "no such model"),
        (errors.RevisionNotFoundError("404", response=Response()), InputError, "no revision"),
        (errors.LocalEntryNotFoundError("no connection"), EnvironmentFault, "could not be downloaded"),
        (errors.OfflineModeIsEnabled("offline mode"), EnvironmentFault, "offline mode"),
    ],
)
def test_hub_failures_say_whose_fault_it_is(hub, error, kind, words):
    hub.error = error
    with pytest.raises(kind, match=words):
        locate("nvidia/Nemotron-H-8B-Base-8K", revision="v9")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("nvidia/Nemotron-H-8B-Base", "nvidia/Nemotron-H-8B-Base-8K"),
        ("nvidia/nemotron-h-8b", "nvidia/Nemotron-H-8B"),
        ("nvidia/Nemotron-Nano-9b-v2", "nvidia/Nemotron-Nano-9B-v2"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8"),
    ],
)
def test_near_misses_are_suggested(hub, name, meant):
    hub.error = errors.RepositoryNotFoundError("404", response=Response())
    with pytest.raises(InputError) as caught:
        locate(name)
    assert f"Did you mean {meant}?" in caught.value.do


def test_a_missing_owner_is_suggested():
    with pytest.raises(InputError) as caught:
        locate("Nemotron-H-8B")
    assert "Did you mean nvidia/Nemotron-H-8B?" in caught.value.do


def test_every_alias_leads_to_a_known_repository():
    assert all(known_target(alias).repository == repository for alias, repository in ALIASES.items())


def test_a_folder_named_like_a_repository_is_recognised():
    assert known_target("/models/Nemotron-H-8B-Base-8K/").repository == "nvidia/Nemotron-H-8B-Base-8K"
    assert known_target("/models/mine") is None
