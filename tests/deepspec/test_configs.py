"""Configs: what `nds deepspec config` writes and the worked ones load in DeepSpec, and any value can be overridden."""

import pytest
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.drafts.config import DraftConfig, Eagle3Config
from nemotron_dspark.errors import InputError
from nemotron_dspark.resources import resource_folder
from tests.deepspec.worked import WORKED, spec_of, text_of

FOLDER = resource_folder("configs") / "deepspec"


def test_the_worked_configs_are_what_the_command_writes():
    assert {path.name for path in FOLDER.glob("*.py")} == set(WORKED)
    for file in WORKED:
        assert (FOLDER / file).read_text() == text_of(file), file


@pytest.mark.parametrize("file", WORKED)
def test_worked_configs_load_in_deepspec_and_take_opts(deepspec_on_cpu, file, monkeypatch):
    import sys

    from deepspec.utils import load_config, parse_opts_to_config

    import nemotron_dspark.deepspec as bridge

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    opts = ["train.lr=0.001", "model.target_layer_ids=[1, 2, 3, 4, 5]", "logging.checkpoint_dir=/somewhere/else"]
    cfg = parse_opts_to_config(opts, load_config(FOLDER / file))
    assert cfg.train.lr == 0.001
    assert cfg.logging.checkpoint_dir == "/somewhere/else"
    assert cfg.logging.tensorboard_dir.endswith(f"tensorboard/nemotron-dspark/{cfg.exp_name}")
    assert cfg.train.trainer_cls in (bridge.NemotronDSparkTrainer, bridge.NemotronEagle3Trainer)
    draft = cfg.train.trainer_cls.draft_config(spec_of(file), cfg.model)
    assert list(draft.target_layer_ids) == [1, 2, 3, 4, 5]
    assert draft.intermediate_size == cfg.model.intermediate_size
    with pytest.raises(KeyError):
        parse_opts_to_config(["train.learning_rate=1"], load_config(FOLDER / file))


@pytest.mark.parametrize("file", WORKED)
def test_the_draft_of_a_worked_config_is_one_of_ours(file):
    """Without a checkout: the same values through our builders and our reader of ``config.json``."""
    from nemotron_dspark.deepspec import dspark_config, eagle3_config

    values = {}
    text = (FOLDER / file).read_text()
    exec(text[text.index("\nmodel = ") : text.index("\ntrain = ")], values)
    spec = spec_of(file)
    if "eagle3" in file:
        config = Eagle3Config.from_json(eagle3_config(spec, values["model"]).to_dict())
    else:
        config = DraftConfig.from_json(dspark_config(spec, values["model"]).to_dict())
        assert config.mask_token_id == 990
    config.check_target(spec)
    assert config.head_dim == 128
    assert config.rope_theta == 10000.0


def test_the_command_writes_a_config_for_any_target(tiny_hybrid, tiny_llama, tmp_path):
    for target in (tiny_hybrid, tiny_llama):
        out = tmp_path / f"{target.parent.name}.py"
        arguments = ["deepspec", "config", "--target", str(target), "--out", str(out), "--set", "train.lr=0.5"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        text = out.read_text()
        assert '"lr": 0.5' in text
        assert '"chat_template": "chatml"' in text
        compile(text, str(out), "exec")
        assert max(map(len, text.splitlines())) <= 120 or str(target) in text


def test_eagle3_needs_five_taps(tiny_hybrid):
    result = CliRunner().invoke(
        app, ["deepspec", "config", "--target", str(tiny_hybrid), "--algorithm", "eagle3", "--set", "draft.taps=[1, 3]"]
    )
    assert isinstance(result.exception, InputError)
    assert "exactly 5 taps" in str(result.exception)


@pytest.mark.parametrize("key", ["block_size", "markov_rank", "mask_token_id", "target_layer_ids", "num_anchors"])
def test_a_missing_key_is_named(key):
    from nemotron_dspark.deepspec import dspark_config

    values = {}
    text = (FOLDER / "dspark_nemotron_h_8b.py").read_text()
    exec(text[text.index("\nmodel = ") : text.index("\ntrain = ")], values)
    del values["model"][key]
    with pytest.raises(InputError, match=f"no {key}"):
        dspark_config(spec_of("dspark_nemotron_h_8b.py"), values["model"])


def test_a_target_that_scales_its_logits_is_refused():
    import dataclasses

    from nemotron_dspark.deepspec import dspark_config

    spec = dataclasses.replace(spec_of("dspark_nemotron_h_8b.py"), logit_multiplier=0.25)
    with pytest.raises(InputError, match="scales or caps its logits"):
        dspark_config(spec, {})


def test_templates_are_registered_once_whatever_happens(deepspec_on_cpu):
    from deepspec.data.parser import TEMPLATE_REGISTRY

    import nemotron_dspark.deepspec as bridge

    names = bridge.register_templates()
    assert bridge.register_templates() == names
    assert {"nemotron_3", "nemotron_nano_v2", "nemotron_h_reasoning", "chatml"} <= set(names)
    for name in names:
        assert TEMPLATE_REGISTRY.get(name).assistant_header


def test_deepspecs_parser_finds_the_loss_tokens_of_a_registered_template(deepspec_on_cpu, target):
    """Its regex on our markers gives the mask that our generation-prompt method gives, end of turn included."""
    from deepspec.data.parser import preprocess_record

    import nemotron_dspark.deepspec as bridge
    from nemotron_dspark.chat.format import Conversation, Message
    from nemotron_dspark.chat.mask import tokenise

    bridge.register_templates()
    turns = [("user", "how does a state advance"), ("assistant", "by one step")]
    record = {"conversations": [{"role": role, "content": content} for role, content in turns]}
    theirs = preprocess_record(record, target.tokenizer, "chatml", 64)
    found = tokenise(target.tokenizer, Conversation(tuple(Message(*turn) for turn in turns)), max_length=64)
    (ours,) = found.samples
    # The newline that the template prints after the end of turn is theirs alone: the target never writes it.
    assert theirs["input_ids"].tolist()[:-1] == ours.input_ids.tolist()
    assert theirs["loss_mask"].tolist()[:-1] == ours.loss_mask.tolist()


def test_the_kind_of_draft_is_that_of_the_configuration(tiny_hybrid):
    def config(*more):
        return CliRunner().invoke(app, ["deepspec", "config", "--target", str(tiny_hybrid), *more])

    eagle3 = config("--set", "draft.kind=eagle3", "--set", "draft.taps=[1,2,3,4,5]")
    assert "NemotronEagle3Trainer" in eagle3.stdout
    assert "NemotronDSparkTrainer" in config().stdout


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("draft.kind=dflash", "DeepSpec trains no DFlash"),
        ("draft.vocabulary=100", "no draft of a part of the vocabulary"),
        ("train.window=64", "DeepSpec learns from all of a long sample"),
    ],
)
def test_what_deepspec_does_not_train_is_refused(tiny_hybrid, setting, sentence):
    refused = CliRunner().invoke(app, ["deepspec", "config", "--target", str(tiny_hybrid), "--set", setting])
    assert isinstance(refused.exception, InputError)
    assert sentence in refused.exception.what
