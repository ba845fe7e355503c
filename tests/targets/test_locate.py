"""A name becomes a folder, or one sentence on what is wrong with it. The hub itself is replaced; nothing is fetched."""

import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from nemotron_dspark.config.known import ALIASES, KNOWN, known_target
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets import Checkpoint


def locate(name, *, code=False, **how):
    return Checkpoint.find(name, trust_remote_code=code, **how).folder


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


NEAR_MISSES = [
    ("nvidia/nemotron-h-8b", "nvidia/Nemotron-H-8B"),
    ("NVIDIA/Nemotron-H-8B-Base-8K", "nvidia/Nemotron-H-8B-Base-8K"),
    ("nvidia/Nemotron-H-8B-Base8K", "nvidia/Nemotron-H-8B-Base-8K"),
    ("nvidea/Nemotron-H-8B", "nvidia/Nemotron-H-8B"),
    ("nvidia/Nemotron-H-8B-128K", "nvidia/Nemotron-H-8B-Reasoning-128K"),
    ("nvidia/Nemotron-Nano-9b-v2", "nvidia/Nemotron-Nano-9B-v2"),
    ("nvidia/nemotron-nano-9b", "nvidia/Nemotron-Nano-9B-v2"),
    ("nvidia/Nemotron-3-Nano-30B", "nvidia/Nemotron-3-Nano-30B-A3B"),
    ("nvidia/Nemotron-3-Nano-30B-A3B-FP8", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8"),
    ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-B16", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
    ("nvidia/Nemotron-Super-120B", "nvidia/Nemotron-3-Super-120B-A12B"),
    ("nvidia/Nemotron-3.5-Lightning", "nvidia/Nemotron-3.5-Lightning-30B-A3B"),
    ("nvidia/Nemotron-Mini-4B", "nvidia/Nemotron-Mini-4B-Instruct"),
]


@pytest.mark.parametrize(("name", "meant"), NEAR_MISSES)
def test_near_misses_are_suggested_with_and_without_the_hub(hub, name, meant):
    hub.error = errors.RepositoryNotFoundError("404", response=Response())
    with pytest.raises(InputError) as caught:
        locate(name)
    assert f"Did you mean {meant}?" in caught.value.do
    hub.error = errors.OfflineModeIsEnabled("offline mode")
    with pytest.raises(EnvironmentFault) as caught:
        locate(name)
    assert f"Did you mean {meant}?" in caught.value.do


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "nvidia/Nemotron-H-8B"])
def test_a_name_that_is_right_or_another_maker_s_gets_no_suggestion(hub, name):
    hub.error = errors.OfflineModeIsEnabled("offline mode")
    with pytest.raises(EnvironmentFault) as caught:
        locate(name)
    assert "Did you mean" not in caught.value.do


@pytest.mark.parametrize("name", ["Nemotron-H-8B", "nemotron-h-8b", "Nemotron-H-8b-Base"])
def test_a_missing_owner_is_suggested(name):
    with pytest.raises(InputError) as caught:
        locate(name)
    assert "Did you mean nvidia/Nemotron-H-8B" in caught.value.do


def test_a_name_like_none_that_is_known_points_to_the_list():
    with pytest.raises(InputError) as caught:
        locate("something else")
    assert "nds inspect --list" in caught.value.do


def test_every_alias_leads_to_a_known_repository():
    repositories = [known.repository for known in KNOWN]
    assert len(set(repositories)) == len(repositories)
    assert set(ALIASES).isdisjoint(repositories)
    assert len(ALIASES) == sum(len(known.aliases) for known in KNOWN)
    assert all(known_target(alias).repository == repository for alias, repository in ALIASES.items())


@pytest.mark.parametrize(
    "folder",
    [
        "/models/Nemotron-H-8B-Base-8K/",
        "nemotron-h-8b-base-8k",
        "/models/Nemotron-H-8B",
        "D:\\models\\nvidia--Nemotron-H-8B-Base-8K",
        "/home/me/.cache/huggingface/hub/models--nvidia--Nemotron-H-8B-Base-8K/snapshots/0123abc",
    ],
)
def test_a_folder_named_like_a_repository_is_recognised(folder):
    assert known_target(folder).repository == "nvidia/Nemotron-H-8B-Base-8K"


@pytest.mark.parametrize("folder", ["/models/mine", "/models/Nemotron-H-8B-Base-8K/checkpoint-100", "."])
def test_a_folder_of_another_name_is_not_taken_for_a_known_target(folder):
    assert known_target(folder) is None


def test_a_quantised_checkpoint_knows_its_full_precision_one():
    siblings = {known.repository: known.full_precision for known in KNOWN if known.weights != "BF16"}
    assert siblings["nvidia/NVIDIA-Nemotron-Nano-9B-v2-FP8"] == "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
    assert siblings["nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4"].endswith("-BF16")
    assert None not in siblings.values()
    assert known_target("nvidia/Nemotron-H-8B").full_precision is None


def test_code_is_downloaded_only_when_it_is_allowed(hub):
    locate("nvidia/Llama-3_3-Nemotron-Super-49B-v1")
    assert "*.py" not in hub.asked[2]
    locate("nvidia/Llama-3_3-Nemotron-Super-49B-v1", code=True)
    assert "*.py" in hub.asked[2]
