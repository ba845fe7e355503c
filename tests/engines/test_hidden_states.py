"""Hidden states that an engine wrote make the cache that our own capture makes, or none."""

import json
import shlex
import threading

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import nemotron_dspark as nds
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cli import app
from nemotron_dspark.config import load_config
from nemotron_dspark.engines.hidden_states import layer_ids
from nemotron_dspark.errors import CheckError, EnvironmentFault, InputError
from nemotron_dspark.targets import Target
from tests.cache.conftest import write_conversations
from tests.engines.fakes import Fake, serving

TAPS = (-1, 2, 6)  # of eight layers; -1 is the embedding
COUNT = 12
ONE_AT_A_TIME = threading.Lock()


class Writing(Fake):
    """A vLLM that writes hidden states to ``folder``. ``shift`` is by how many layers it is wrong."""

    def __init__(self, target, folder, taps=TAPS, *, shift=0, dtype=torch.float32, most=None):
        super().__init__("vllm")
        self.target, self.folder, self.shift, self.dtype, self.most = target, folder, shift, dtype, most
        self.ids = layer_ids(taps, target.spec.num_layers)

    def post(self, path, body):
        self.requests.append((path, body))
        if self.most is not None and len(self.requests) > self.most:
            raise ConnectionAbortedError  # it hangs up
        ids, file = body["prompt"], self.folder / f"{id(self)}-{len(self.requests)}.safetensors"
        assert body["max_tokens"] == 1
        write(self.target, ids, [max(0, layer - self.shift) for layer in self.ids], file, self.dtype)
        file.with_name(f"{file.name}.lock").touch()
        return {"choices": [], "kv_transfer_params": {"hidden_states_path": str(file)}}


@torch.no_grad()
def write(target, ids, layers, file, dtype=torch.float32):
    """As vLLM has it: layer id 0 is the embedding, i the raw output of layer i - 1."""
    outputs = {}
    modules = target.model.get_submodule(target.spec.names.layers)
    with ONE_AT_A_TIME:  # the hooks see every forward
        hooks = [modules[0].register_forward_pre_hook(lambda _, given: outputs.update({0: given[0]}))]
        for at, module in enumerate(modules, start=1):
            hooks.append(module.register_forward_hook(lambda *given, at=at: outputs.update({at: given[-1]})))
        target.model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
    states = torch.stack([outputs[layer][0] for layer in layers], dim=1)
    save_file({"token_ids": torch.tensor(ids), "hidden_states": states.to(dtype)}, file)


@pytest.fixture(scope="module")
def target(tiny_hybrid):
    return Target.load(str(tiny_hybrid), dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("data") / "data.jsonl", COUNT)


@pytest.fixture
def config(tiny_hybrid, tmp_path):
    (tmp_path / "shared").mkdir()
    named = {"name": str(tiny_hybrid), "dtype": "float32"}
    draft = {"taps": list(TAPS)}
    return load_config(named, draft=draft, data={"min_loss_tokens": 4, "max_length": 160}, cache={"batch_tokens": 256})


def assert_same(found, expected):
    found, expected = TargetCache(found), TargetCache(expected)
    assert len(found) == len(expected) == COUNT
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        for theirs, ours in ((one.taps, other.taps), (one.last, other.last)):
            torch.testing.assert_close(theirs.float(), ours.float(), rtol=2e-2, atol=2e-2)  # bf16, other batches


def test_the_cache_is_that_of_our_own_capture_and_nothing_stays_on_the_disk(config, target, data, tmp_path):
    nds.build_cache(config, data, tmp_path / "own")
    fake = Writing(target, tmp_path / "shared")
    with serving(fake) as url:
        nds.build_cache(config, data, tmp_path / "theirs", engines=[url])
    assert_same(tmp_path / "theirs", tmp_path / "own")
    assert not list((tmp_path / "shared").iterdir())
    assert len(fake.requests) == COUNT


def test_files_written_before_are_taken_and_stay(config, target, data, tmp_path):
    nds.build_cache(config, data, tmp_path / "own")
    for number, sample in enumerate(TargetCache(tmp_path / "own")):
        file = tmp_path / "shared" / f"{number}.safetensors"
        write(target, sample.input_ids.tolist(), layer_ids(TAPS, target.spec.num_layers), file)
    nds.build_cache(config, data, tmp_path / "theirs", engines=[str(tmp_path / "shared")])
    assert_same(tmp_path / "theirs", tmp_path / "own")
    assert len(list((tmp_path / "shared").iterdir())) == COUNT
    (tmp_path / "shared" / "3.safetensors").unlink()
    with pytest.raises(InputError, match="has no hidden states of one of the samples"):
        nds.build_cache(config, data, tmp_path / "less", engines=[str(tmp_path / "shared")])


def test_a_server_that_dies_leaves_its_work_to_the_others(config, target, data, tmp_path):
    nds.build_cache(config, data, tmp_path / "own")
    dying, other = (Writing(target, tmp_path / "shared", most=most) for most in (2, None))
    with serving(dying) as first, serving(other) as second:
        nds.build_cache(config, data, tmp_path / "theirs", engines=[first, second])
    assert_same(tmp_path / "theirs", tmp_path / "own")
    assert len(other.requests) >= COUNT - 2


def test_a_build_whose_servers_all_died_goes_on_with_what_it_lacks(config, target, data, tmp_path):
    nds.build_cache(config, data, tmp_path / "own")
    with (
        serving(Writing(target, tmp_path / "shared", most=COUNT - 2)) as url,
        pytest.raises(EnvironmentFault, match="does not answer"),
    ):
        nds.build_cache(config, data, tmp_path / "theirs", engines=[url])
    fake = Writing(target, tmp_path / "shared")
    with serving(fake) as url:
        report = nds.build_cache(config, data, tmp_path / "theirs", engines=[url])
    assert 0 < report.build.reused_samples == COUNT - len(fake.requests)
    assert_same(tmp_path / "theirs", tmp_path / "own")


def test_layers_counted_otherwise_are_found_on_the_first_sample(config, target, data, tmp_path):
    with (
        serving(Writing(target, tmp_path / "shared", shift=1)) as url,
        pytest.raises(CheckError, match=r"hidden states are not the target's: tap 2 differs by"),
    ):
        nds.build_cache(config, data, tmp_path / "cache", engines=[url])
    trusted = config.model_copy(update={"target": config.target.model_copy(update={"proofs": False})})
    with serving(Writing(target, tmp_path / "shared", shift=1)) as url:
        nds.build_cache(trusted, data, tmp_path / "unproven", engines=[url])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"taps": (2,)}, "keeps 2 layers of width 64, and the cache takes 4"),
        ({"dtype": torch.bfloat16}, "computes in bfloat16, and the cache is to hold states of float32"),
    ],
)
def test_a_server_started_for_something_else_is_refused(config, target, data, tmp_path, how, message):
    with serving(Writing(target, tmp_path / "shared", **how)) as url, pytest.raises(InputError, match=message):
        nds.build_cache(config, data, tmp_path / "cache", engines=[url])


def test_servers_that_write_none_are_refused(config, data, tmp_path):
    with serving(Fake("vllm")) as url, pytest.raises(InputError, match="writes no hidden states"):
        nds.build_cache(config, data, tmp_path / "one", engines=[url])
    with serving(Fake("sglang")) as url, pytest.raises(InputError, match="is SGLang, which does not write"):
        nds.build_cache(config, data, tmp_path / "two", engines=[url])
    with pytest.raises(InputError, match="There is no folder"):
        nds.build_cache(config, data, tmp_path / "three", engines=["no-such"])


def test_other_tokens_than_the_sample_s_are_refused(config, target, data, tmp_path):
    class Cut(Writing):
        def post(self, path, body):
            return super().post(path, body | {"prompt": body["prompt"][1:]})

    with serving(Cut(target, tmp_path / "shared")) as url, pytest.raises(InputError, match="states of other tokens"):
        nds.build_cache(config, data, tmp_path / "cache", engines=[url])


def test_a_file_that_is_not_seen_here_is_named(config, target, data, tmp_path):
    class Elsewhere(Writing):
        def post(self, path, body):
            return {"kv_transfer_params": {"hidden_states_path": "/elsewhere/1.safetensors"}}

    with (
        serving(Elsewhere(target, tmp_path / "shared")) as url,
        pytest.raises(
            EnvironmentFault, match=r"wrote hidden states to /elsewhere/1\.safetensors, which is not seen here"
        ),
    ):
        nds.build_cache(config, data, tmp_path / "cache", engines=[url])


@pytest.mark.parametrize("machine", [None, "cpu", "dgx-spark"])
def test_the_command_that_starts_the_server_asks_for_these_layers(tiny_hybrid, tmp_path, machine):
    said = ["--machine", machine] if machine else []
    arguments = ["engine", "vllm", "--target", str(tiny_hybrid), "--taps=1,4", "--hidden-states", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, *said, "--json"], catch_exceptions=False)
    argv = json.loads(result.stdout)["argv"]
    value = {flag: argv[argv.index(flag) + 1] for flag in ("--speculative-config", "--kv-transfer-config")}
    speculative, transfer = map(json.loads, value.values())
    layers = speculative["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    assert layers == [2, 5, 8]
    assert transfer["kv_connector_extra_config"]["shared_storage_path"] == str(tmp_path)
    assert ("kv_connector_module_path" in transfer) == (machine == "cpu")
    assert argv.count("--kv-transfer-config") == 1
    assert "--no-enable-prefix-caching" in argv


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("engine vllm", "serves a draft, or it writes hidden states"),
        ("engine sglang --hidden-states out", "sglang writes no hidden states"),
    ],
)
def test_bad_commands_are_refused_in_a_sentence(tiny_hybrid, arguments, message):
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, [*shlex.split(arguments), "--target", str(tiny_hybrid)], catch_exceptions=False)
