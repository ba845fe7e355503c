"""Code that comes with a checkpoint runs only when it is allowed, and its model then takes the general path."""

import json
import os
import shutil
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from nemotron_dspark import cli
from nemotron_dspark.cli import inspect_command, shell
from nemotron_dspark.config import load_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint, Target
from nemotron_dspark.targets.proofs import prove
from tests.targets.tiny_families import IDS, VOCAB

RAN = "NDS_TEST_CODE_RAN"  # set by the checkpoint's code when it is imported

CONFIGURATION = f"""
import os
from transformers import LlamaConfig

os.environ[{RAN!r}] = "1"


class TinyNasConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = block_configs
"""

MODELING = """
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_tiny_nas import TinyNasConfig


class NoAttention(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None


class TinyNasForCausalLM(LlamaForCausalLM):
    config_class = TinyNasConfig

    def __init__(self, config):
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs):
            narrow = TinyNasConfig(**{**config.to_dict(), "intermediate_size": block["width"]})
            layer.mlp = LlamaMLP(narrow)
            if block["no_attention"]:
                layer.self_attn = NoAttention()
"""

CONFIG = {
    "model_type": "nemotron-nas",
    "architectures": ["TinyNasForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_tiny_nas.TinyNasConfig",
        "AutoModelForCausalLM": "modeling_tiny_nas.TinyNasForCausalLM",
    },
    "block_configs": [{"width": 32 * (layer + 1), "no_attention": layer in (1, 3)} for layer in range(5)],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    **IDS,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole checkpoint of a type that only its own code builds."""
    from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

    folder = tmp_path_factory.mktemp("nas")
    (folder / "configuration_tiny_nas.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny_nas.py").write_text(MODELING)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        patch.delitem(sys.modules, "transformers_modules", raising=False)  # another test's, of another folder
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        model.save_pretrained(folder / "saved")
        shutil.move(folder / "saved" / "model.safetensors", folder)
        shutil.rmtree(folder / "saved")
        tiny.make_tokenizer(tiny._SENTENCES, VOCAB).save_pretrained(folder)
        yield folder


@pytest.fixture(autouse=True)
def nothing_ran(checkpoint, monkeypatch):
    monkeypatch.delenv(RAN, raising=False)
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        monkeypatch.delitem(sys.modules, name)


def test_without_the_flag_it_is_refused_before_any_of_its_code_runs(checkpoint):
    for refused in (
        lambda: Checkpoint.find(checkpoint).read_spec(),
        lambda: Target.load(str(checkpoint)),
        lambda: inspect_command.inspect(load_config(str(checkpoint))),
    ):
        with pytest.raises(InputError, match=r"'nemotron-nas'.*code that comes with its checkpoint") as caught:
            refused()
        assert "--trust-remote-code" in caught.value.do
    assert RAN not in os.environ


def test_with_the_flag_it_takes_the_general_path_and_every_proof_passes(checkpoint):
    target = Target.load(str(checkpoint), trust_remote_code=True)
    assert RAN in os.environ
    assert target.spec == Checkpoint.find(checkpoint, trust_remote_code=True).read_spec()
    assert (target.spec.model_type, target.spec.layout) == ("nemotron-nas", "DDDDD")
    assert "general path" in target.spec.assumed[0]
    prove(target, (1, 3))


def test_inspect_proves_it_by_the_same_flag(checkpoint):
    arguments = ["inspect", "--target", str(checkpoint), "--trust-remote-code", "--probe", "--json"]
    found = json.loads(CliRunner().invoke(cli.app, arguments).stdout)
    assert found["spec"]["model_type"] == "nemotron-nas"
    assert all(proof["passed"] for proof in found["proofs"])


def test_a_type_that_transformers_knows_never_runs_its_checkpoints_code(checkpoint, tmp_path):
    folder = shutil.copytree(tiny.random_target(tmp_path / "llama", "llama"), tmp_path / "with_code")
    for file in ("configuration_tiny_nas.py", "modeling_tiny_nas.py"):
        shutil.copy(checkpoint / file, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": CONFIG["auto_map"]}))
    Target.load(str(folder), trust_remote_code=True)
    assert RAN not in os.environ


def test_a_fault_in_its_code_is_two_sentences(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    with open(folder / "modeling_tiny_nas.py", "a") as code:
        code.write("\nimport a_package_that_is_not_there\n")
    with pytest.raises(InputError, match="a_package_that_is_not_there"):
        Target.load(str(folder), trust_remote_code=True)


def test_every_command_that_loads_a_target_has_the_flag():
    commands = typer.main.get_command(cli.app).commands
    loading = [commands[name] for name in ("inspect", "train", "eval", "serve")]
    loading += [commands["cache"].commands["build"], commands["chat"]]
    loading += [commands["data"].commands["check"], commands["deepspec"].commands["config"], commands["plan"]]
    for command in loading:
        assert "--trust-remote-code" in {text for option in command.params for text in option.opts}, command.name
    assert load_config(**shell.nested({shell.TRUST.key: True})).target.trust_remote_code
    assert not load_config().target.trust_remote_code


def test_what_its_config_leaves_null_is_read_off_the_layers(checkpoint, tmp_path):
    """Llama-3.3-Nemotron-Super-49B's file has null for both, since its blocks differ; the widest one counts."""
    folder = shutil.copytree(checkpoint, tmp_path / "nulls")
    (folder / "configuration_tiny_nas.py").write_text(
        "from transformers import PreTrainedConfig\n\n\n"
        "class TinyNasConfig(PreTrainedConfig):\n    model_type = 'nemotron-nas'\n"
    )
    (folder / "modeling_tiny_nas.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.models.llama.modeling_llama import LlamaMLP\n\n"
        "from .configuration_tiny_nas import TinyNasConfig\n\n\n"
        "class TinyNasForCausalLM(LlamaForCausalLM):\n"
        "    config_class = TinyNasConfig\n\n"
        "    def __init__(self, config):\n"
        "        values = config.to_dict() | {'num_key_value_heads': 2}\n"
        "        super().__init__(LlamaConfig(**values | {'intermediate_size': 32}))\n"
        "        for layer, block in zip(self.model.layers, config.block_configs):\n"
        "            layer.mlp = LlamaMLP(LlamaConfig(**values | {'intermediate_size': block['width']}))\n"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": None, "num_key_value_heads": None}))
    spec = Checkpoint.find(folder, trust_remote_code=True).read_spec()
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (4, 2, 16)
    assert (spec.mlp, spec.intermediate_size) == ("gated", 32 * 5)
