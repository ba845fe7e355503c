"""`nds engine`: the command fits the pair, known failures are refused or warned of, `--run` starts what is there."""

import json
import shlex
import shutil
import socket
import stat

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from nemotron_dspark.cli import app
from nemotron_dspark.config import load_config
from nemotron_dspark.engines import commands, launch, preflight
from nemotron_dspark.engines.pair import Pair
from nemotron_dspark.errors import EnvironmentFault, InputError
from tests.engines.pairs import write_draft


def pair_of(target, draft):
    return Pair.of(load_config(str(target)).target, draft)


@pytest.fixture
def hybrid(tiny_hybrid, tmp_path):
    return pair_of(tiny_hybrid, write_draft(tmp_path / "draft", tiny_hybrid))


def found(engine, pair, **how):
    return {(finding.level, finding.what) for finding in preflight.preflight(engine, pair, **how)}


def refused(engine, pair, **how):
    return [what for level, what in found(engine, pair, **how) if level == "refuse"]


@pytest.mark.parametrize("engine", commands.ENGINES)
@pytest.mark.parametrize("machine", [None, "dgx-spark", "h100"])
def test_every_flag_has_a_reason_and_every_name_is_filled_in(engine, machine, hybrid):
    command = commands.engine_command(engine, hybrid, machine=machine)
    assert command.flags
    assert all(flag.why.strip() for flag in command.flags)
    assert "$" not in command.text + "".join(command.files.values()) + "".join(flag.why for flag in command.flags)
    assert shlex.split(command.text.replace("\\\n", " "))[-len(command.argv) :] == list(command.argv)


@pytest.mark.parametrize("engine", commands.ENGINES)
def test_no_two_flags_of_one_command_are_the_same(engine, hybrid, tiny_llama, tmp_path):
    other = pair_of(tiny_llama, write_draft(tmp_path / "eagle3", tiny_llama, eagle3=True))
    for pair in (hybrid, other) if engine == "vllm" else (hybrid,):
        for machine in (None, *commands.MACHINES):
            names = [flag.name for flag in commands.engine_command(engine, pair, machine=machine).flags]
            assert len(names) == len(set(names))


def test_a_draft_of_a_part_of_the_vocabulary_is_for_vllm_with_its_part_of_the_head(tiny_llama, tmp_path):
    pair = pair_of(tiny_llama, write_draft(tmp_path / "draft", tiny_llama, draft_vocab_size=100))
    for engine in commands.ENGINES:
        save_file({"fc.weight": torch.zeros(1)}, tmp_path / "draft" / "model.safetensors")
        said = "it is a slim copy" if engine == "vllm" else "this draft has a part of the vocabulary"
        assert any(said in what for what in refused(engine, pair))
        save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "draft" / "model.safetensors")
        assert bool(refused(engine, pair)) == (engine != "vllm")


def test_vllm_on_a_hybrid_leaves_out_the_prefix_cache_and_caps_the_requests(hybrid):
    argv = commands.engine_command("vllm", hybrid, requests=4).argv
    assert "--no-enable-prefix-caching" in argv
    assert argv[argv.index("--max-num-seqs") + 1] == "4"
    speculative = json.loads(argv[argv.index("--speculative-config") + 1])
    assert speculative["num_speculative_tokens"] == hybrid.draft.block_size
    assert speculative["method"] == "dspark"
    assert speculative["enable_adaptive_verification"] is False


def test_vllm_on_an_ordinary_decoder_keeps_the_prefix_cache(tiny_llama, tmp_path):
    pair = pair_of(tiny_llama, write_draft(tmp_path / "draft", tiny_llama))
    argv = commands.engine_command("vllm", pair).argv
    assert not [flag for flag in argv if "prefix" in flag or "mamba" in flag]
    assert "adaptive" not in argv[argv.index("--speculative-config") + 1]  # unknown to 0.25.0, which serves it
    assert commands.minimum_version("vllm", pair) == "0.25.0"


def test_a_hybrid_needs_a_newer_engine(hybrid):
    assert commands.minimum_version("vllm", hybrid) == "0.27.1"
    assert commands.minimum_version("sglang", hybrid) == "0.5.19"


def test_the_state_that_a_request_holds_is_counted(hybrid):
    """Two Mamba-2 layers of the tiny target: 8 heads of 16 x 16, convolutions over 192 channels, fp32."""
    assert hybrid.state_bytes == 3 * 4 * (8 * 16 * 16 + (8 * 16 + 2 * 2 * 16) * 3)


def test_trtllm_takes_the_draft_from_a_file(hybrid):
    command = commands.engine_command("trtllm", hybrid)
    assert "decoding_type: DSpark" in command.files["speculative.yaml"]
    assert "speculative.yaml" in command.argv


def test_llama_cpp_is_given_exported_files(hybrid, tmp_path):
    command = commands.engine_command("llamacpp", hybrid, gguf=tmp_path / "gguf")
    assert str(tmp_path / "gguf" / "draft.gguf") in command.argv
    assert [line.split()[-1] for line in command.prepare] == [command.argv[2], str(tmp_path / "gguf" / "draft.gguf")]
    assert all(line.startswith("nds export --to gguf") for line in command.prepare)


@pytest.mark.parametrize(
    ("older", "newer"), [("0.9.2", "0.27.1"), ("1.3.0rc27", "1.3.0"), ("10164", "11434"), ("1.3.0rc3", "1.3.0rc27")]
)
def test_versions_are_ordered_by_their_numbers(older, newer):
    assert commands.version_key(older) < commands.version_key(newer)


# --- preflight ---


@pytest.mark.parametrize("head", ["gated", "rnn"])
def test_other_markov_heads_than_vanilla_are_for_sglang_alone(head, tiny_hybrid, tmp_path):
    pair = pair_of(tiny_hybrid, write_draft(tmp_path / "draft", tiny_hybrid, markov_head_type=head))
    for engine in commands.ENGINES:
        assert bool(refused(engine, pair)) == (engine != "sglang")


@pytest.mark.parametrize("engine", commands.ENGINES)
def test_a_draft_without_a_markov_head_is_exported_with_one_of_zeros(engine, tiny_hybrid, tmp_path):
    changes = {"markov_rank": 0, "confidence_head_with_markov": False, "enable_confidence_head": False}
    pair = pair_of(tiny_hybrid, write_draft(tmp_path / "draft", tiny_hybrid, **changes))
    command = commands.engine_command(engine, pair)
    assert not refused(engine, pair)
    out = command.prepare[-1].split()[-1]
    assert out in command.text + "".join(command.files.values())


def test_the_embedding_as_a_tap_is_refused_by_sglang_and_read_by_llama_cpp(tiny_hybrid, tmp_path):
    pair = pair_of(tiny_hybrid, write_draft(tmp_path / "draft", tiny_hybrid, target_layer_ids=[-1, 3]))
    assert refused("sglang", pair)
    assert not refused("vllm", pair)
    assert any("tap" in what for _, what in found("vllm", pair))
    assert not any("tap" in what for _, what in found("llamacpp", pair))


def test_more_tokens_than_the_block_are_refused_and_fewer_warned_of(hybrid):
    assert refused("vllm", hybrid, tokens=8)
    assert any("garbled" in what for _, what in found("vllm", hybrid, tokens=3))
    assert not any("tokens of a block" in what for _, what in found("llamacpp", hybrid, tokens=3))


def test_eagle3_is_for_vllm_and_exported_for_it(tiny_hybrid, tmp_path):
    pair = pair_of(tiny_hybrid, write_draft(tmp_path / "draft", tiny_hybrid, eagle3=True))
    for engine in ("sglang", "trtllm", "llamacpp"):
        assert any("EAGLE-3" in what for what in refused(engine, pair))
    assert not refused("vllm", pair)
    command = commands.engine_command("vllm", pair)
    assert command.prepare[0].startswith("nds export --to vllm")
    assert json.loads(command.argv[command.argv.index("--speculative-config") + 1])["model"] in command.prepare[0]


def test_dflash_is_started_as_dflash_and_read_as_it_is(tiny_hybrid, tmp_path):
    pair = pair_of(tiny_hybrid, write_draft(tmp_path / "draft", tiny_hybrid, kind="dflash"))
    assert any("DFlash" in what for what in refused("trtllm", pair))
    for engine in ("vllm", "sglang", "llamacpp"):
        assert not refused(engine, pair)
        names = [flag.name for flag in commands.engine_command(engine, pair).flags]
        assert len(names) == len(set(names))
    vllm, sglang = (commands.engine_command(engine, pair) for engine in ("vllm", "sglang"))
    method = json.loads(vllm.argv[vllm.argv.index("--speculative-config") + 1])
    assert (method["method"], method["num_speculative_tokens"]) == ("dflash", 7)
    assert method["model"] == str(tmp_path / "draft")
    assert sglang.argv[sglang.argv.index("--speculative-dflash-block-size") + 1] == "8"
    assert vllm.prepare == sglang.prepare == ()
    llamacpp = commands.engine_command("llamacpp", pair).argv
    assert llamacpp[llamacpp.index("--spec-type") + 1] == "draft-dflash"


def test_only_llama_cpp_runs_a_draft_on_a_cpu(hybrid):
    for engine in ("vllm", "sglang", "trtllm"):
        assert refused(engine, hybrid, machine="cpu")
    assert not refused("llamacpp", hybrid, machine="cpu")
    assert "--n-gpu-layers" not in commands.engine_command("llamacpp", hybrid, machine="cpu").argv


def test_a_hybrid_on_trtllm_is_unproven(hybrid):
    assert any("Nobody has shown" in what for level, what in found("trtllm", hybrid) if level == "warn")


def test_a_draft_for_another_target_is_refused(tiny_hybrid, tiny_llama, tmp_path):
    draft = write_draft(tmp_path / "draft", tiny_hybrid)
    with pytest.raises(InputError, match="made for another target"):
        pair_of(tiny_llama, draft)


def test_another_vocabulary_is_refused(tiny_hybrid, tmp_path):
    draft = write_draft(tmp_path / "draft", tiny_hybrid, vocab_size=512)
    with pytest.raises(InputError, match="vocabulary is 512"):
        pair_of(tiny_hybrid, draft)


def test_a_tap_beyond_the_target_is_refused(tiny_hybrid, tmp_path):
    draft = write_draft(tmp_path / "draft", tiny_hybrid, target_layer_ids=[1, 40])
    with pytest.raises(InputError, match="target has layers 0 to 7"):
        pair_of(tiny_hybrid, draft)


# --- starting ---


def program(folder, name, version="", code=0):
    """An executable that prints ``version`` for any argument."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{version}'\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_an_engine_that_is_not_installed_is_said(hybrid, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match=r"vLLM is not installed here") as raised:
        launch.run(commands.engine_command("vllm", hybrid), host="127.0.0.1", port=0)
    assert "pip install vllm" in raised.value.do


def test_an_engine_that_is_too_old_is_refused(hybrid, monkeypatch, tmp_path):
    program(tmp_path / "bin", "vllm", "0.26.0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(EnvironmentFault, match=r"0\.26\.0 is installed, and this pair needs 0\.27\.1 or newer"):
        launch.run(commands.engine_command("vllm", hybrid), host="127.0.0.1", port=0)


def test_llama_cpp_is_new_enough_when_it_knows_the_kind_of_draft(hybrid, monkeypatch, tmp_path):
    command = commands.engine_command("llamacpp", hybrid)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    program(tmp_path / "bin", "llama-server", "--spec-type none,draft-simple,draft-dflash,draft-dspark")
    launch.check_version(command)
    program(tmp_path / "bin", "llama-server", "--spec-type none,draft-simple; default 0.75")
    with pytest.raises(EnvironmentFault, match="does not know draft-dspark"):
        launch.check_version(command)


def test_a_port_in_use_is_said_and_nothing_started(hybrid, monkeypatch, tmp_path):
    program(tmp_path / "bin", "vllm", "0.33.0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"Port {port} on 127.0.0.1 cannot be used"):
            launch.run(commands.engine_command("vllm", hybrid, port=port), host="127.0.0.1", port=port)


def test_what_was_not_exported_is_said(hybrid, monkeypatch, tmp_path):
    program(tmp_path / "bin", "llama-server", "--spec-type draft-dspark")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(InputError, match=r"target\.gguf is not there") as raised:
        launch.run(commands.engine_command("llamacpp", hybrid), host="127.0.0.1", port=0)
    assert "nds export --to gguf" in raised.value.do


def test_a_file_of_anothers_is_kept(hybrid, monkeypatch, tmp_path):
    program(tmp_path / "bin", "trtllm-serve", "1.4.0")
    program(tmp_path / "bin", "python3", "1.4.0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    (tmp_path / "speculative.yaml").write_text("mine: true\n")
    with pytest.raises(InputError, match="says something else"):
        launch.run(commands.engine_command("trtllm", hybrid), host="127.0.0.1", port=0, folder=tmp_path)
    assert (tmp_path / "speculative.yaml").read_text() == "mine: true\n"


def test_the_engine_takes_the_place_of_the_process(hybrid, monkeypatch, tmp_path):
    program(tmp_path / "bin", "vllm", "0.33.0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    started = []
    monkeypatch.setattr(launch.os, "execve", lambda *given: started.append(given))
    command = commands.engine_command("vllm", hybrid)
    launch.run(command, host="127.0.0.1", port=0)
    assert started[0][0] == shutil.which("vllm")
    assert started[0][1][1:] == list(command.argv[1:])


# --- the command line ---


def invoke(*arguments):
    return CliRunner().invoke(app, ["engine", *map(str, arguments)])


def test_the_printed_command_is_all_of_stdout(tiny_hybrid, tmp_path):
    draft = write_draft(tmp_path / "draft", tiny_hybrid)
    said = invoke("vllm", "--target", tiny_hybrid, "--draft", draft)
    assert said.exit_code == 0
    assert said.stdout.startswith("vllm serve")
    assert "adaptive verification" in said.stderr


def test_json_is_one_object(tiny_hybrid, tmp_path):
    draft = write_draft(tmp_path / "draft", tiny_hybrid)
    said = json.loads(invoke("trtllm", "--target", tiny_hybrid, "--draft", draft, "--json").stdout)
    assert said["engine"] == "trtllm"
    assert said["warnings"]
    assert said["flags"][0]["why"]


def test_unknown_engines_and_machines_are_refused(tiny_hybrid, tmp_path):
    draft = write_draft(tmp_path / "draft", tiny_hybrid)
    for arguments in (("ollama",), ("vllm", "--machine", "abacus")):
        error = invoke(*arguments, "--target", tiny_hybrid, "--draft", draft).exception
        assert isinstance(error, InputError)
        assert error.do.startswith("Choose one of")
