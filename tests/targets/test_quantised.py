"""A draft learns from the weights that are served: quantised checkpoints are read as what they stand for, to the bit.

No published one is at hand, so tiny ones are made here in each writer's layout, by loops written from the formats'
definitions. The writers' own code is asked too, where it runs on a CPU.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.recipe.storage import storage_of
from nemotron_dspark.targets import Checkpoint, Target
from nemotron_dspark.targets.quantised import weights_of
from nemotron_dspark.targets.schemes import scheme_of
from nemotron_dspark.targets.shards import INDEX, stored_tensors, tensors_here
from nemotron_dspark.targets.streamed import StreamedTarget
from nemotron_dspark.targets.weights import open_tensors, parameter_count, read_embedding_and_head, stored_size
from tests.targets.tiny_families import TINY

# --- the formats, from their definitions ---


def minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """What the bits sign, exponent, mantissa say; no infinities."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


E4M3 = torch.tensor([float("nan") if code & 127 == 127 else minifloat(code, 4, 3, 7) for code in range(256)])
E2M1 = torch.tensor([minifloat(code, 2, 1, 1) for code in range(16)])


def nearest(values, table):
    """The code of the entry of ``table`` that is nearest to each value."""
    return (values.flatten()[:, None] - table).abs().nan_to_num(float("inf")).argmin(1).view(values.shape)


@dataclasses.dataclass
class Made:
    """A quantised weight: its codes, its scales, and what they stand for, in BF16."""

    codes: torch.Tensor
    scales: torch.Tensor  # fp32, one for each block
    plain: torch.Tensor
    exponents: torch.Tensor | None = None
    second: torch.Tensor | None = None

    @property
    def float8(self):
        return self.codes.to(torch.uint8).view(torch.float8_e4m3fn)

    @property
    def packed(self):
        """Two codes in a byte, the first in its low half."""
        byte = torch.zeros(*self.codes.shape[:-1], self.codes.shape[-1] // 2, dtype=torch.uint8)
        for column in range(byte.shape[-1]):
            byte[..., column] = self.codes[..., 2 * column] + 16 * self.codes[..., 2 * column + 1]
        return byte


def blocks_of(weight, high, wide):
    for row in range(0, weight.shape[0], high):
        for column in range(0, weight.shape[1], wide):
            yield row // high, column // wide, (slice(row, row + high), slice(column, column + wide))


def fp8(weight, high=None, wide=None, kind=torch.float32) -> Made:
    """Blocks of ``high`` x ``wide`` under a scale of the type ``kind``; None is the whole length."""
    high, wide = high or weight.shape[0], wide or weight.shape[1]
    scales = torch.zeros(-(-weight.shape[0] // high), -(-weight.shape[1] // wide))
    codes, plain = torch.zeros(weight.shape, dtype=torch.long), torch.zeros(weight.shape)
    for i, j, block in blocks_of(weight, high, wide):
        scales[i, j] = (weight[block].abs().max() / 448).to(kind).float()
        codes[block] = nearest(weight[block] / scales[i, j], E4M3)
        plain[block] = E4M3[codes[block]] * scales[i, j]
    return Made(codes, scales, plain.bfloat16())


def shared_powers(weight, table, largest) -> Made:
    """MX formats: 32 values of a row under a power of two."""
    scales = torch.zeros(weight.shape[0], weight.shape[1] // 32)
    codes, plain = torch.zeros(weight.shape, dtype=torch.long), torch.zeros(weight.shape)
    for i, j, block in blocks_of(weight, 1, 32):
        scales[i, j] = 2.0 ** float(torch.ceil(torch.log2(weight[block].abs().max() / largest)))
        codes[block] = nearest(weight[block] / scales[i, j], table)
        plain[block] = table[codes[block]] * scales[i, j]
    return Made(codes, scales, plain.bfloat16(), exponents=(scales.log2() + 127).to(torch.uint8))


def nvfp4(weight, divides: bool) -> Made:
    """16 values of a row under an e4m3 scale, all of those under a second one, which multiplies or ``divides``."""
    second = weight.abs().max() / (6 * 448)
    second = 1 / second if divides else second
    scales = torch.zeros(weight.shape[0], weight.shape[1] // 16)
    codes, plain = torch.zeros(weight.shape, dtype=torch.long), torch.zeros(weight.shape)
    for i, j, block in blocks_of(weight, 1, 16):
        wanted = weight[block].abs().max() / 6
        scales[i, j] = E4M3[nearest(wanted * second if divides else wanted / second, E4M3)]
        scale = scales[i, j] / second if divides else scales[i, j] * second
        codes[block] = nearest(weight[block] / scale, E2M1)
        plain[block] = E2M1[codes[block]] * scale
    return Made(codes, scales, plain.bfloat16(), second=second)


# --- the layouts of the writers: a weight's tensors, by what their names add to the weight's ---

Layout = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def transformers_block(weight):
    made = fp8(weight, 32, 48)
    return {"": made.float8, "_scale_inv": made.scales}, made.plain


def transformers_tensor(weight):
    made = fp8(weight)
    return {"": made.float8, "_scale_inv": made.scales.reshape(())}, made.plain


def compressed_tensor(weight):
    made = fp8(weight, kind=torch.bfloat16)
    return {"": made.float8, "_scale": made.scales.reshape(1).bfloat16()}, made.plain


def compressed_channel(weight):
    made = fp8(weight, 1, kind=torch.bfloat16)
    return {"": made.float8, "_scale": made.scales.bfloat16()}, made.plain


def compressed_block(weight):
    made = fp8(weight, 32, 48)
    return {"": made.float8, "_scale": made.scales}, made.plain


def compressed_nvfp4(weight):
    made = nvfp4(weight, divides=True)
    scales = made.scales.to(torch.float8_e4m3fn)
    return {"_packed": made.packed, "_scale": scales, "_global_scale": made.second.reshape(1)}, made.plain


def compressed_mxfp4(weight):
    made = shared_powers(weight, E2M1, 6)
    return {"_packed": made.packed, "_scale": made.exponents}, made.plain


def compressed_mxfp8(weight):
    made = shared_powers(weight, E4M3, 448)
    return {"": made.float8, "_scale": made.exponents}, made.plain


def modelopt_fp8(weight):
    made = fp8(weight)
    return {"": made.float8, "_scale": made.scales.reshape(())}, made.plain


def modelopt_channel(weight):
    made = fp8(weight, 1)
    return {"": made.float8, "_scale": made.scales[:, 0].clone()}, made.plain


def modelopt_block(weight):
    made = fp8(weight, 128, 128)
    return {"": made.float8, "_scale": made.scales[:, None, :, None].clone()}, made.plain


def modelopt_nvfp4(weight):
    made = nvfp4(weight, divides=False)
    return {"": made.packed, "_scale": made.scales.to(torch.float8_e4m3fn), "_scale_2": made.second}, made.plain


def modelopt_mxfp4(weight):
    made = shared_powers(weight, E2M1, 6)
    return {"": made.packed, "_scale": made.exponents}, made.plain


def compressed_config(form, **weights):
    weights = {"type": "float", "num_bits": 8, "symmetric": True} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def modelopt_config(algorithm, **more):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


FP8_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 48]}
SCHEMES: dict[str, tuple[Layout, dict]] = {
    "transformers fp8, block": (transformers_block, FP8_BLOCK),
    "transformers fp8, tensor": (transformers_tensor, FP8_BLOCK | {"weight_block_size": None}),
    "compressed fp8, tensor": (compressed_tensor, compressed_config("float-quantized", strategy="tensor")),
    "compressed fp8, channel": (compressed_channel, compressed_config("float-quantized", strategy="channel")),
    "compressed fp8, block": (
        compressed_block,
        compressed_config("naive-quantized", strategy="block", block_structure=[32, 48]),
    ),
    "compressed nvfp4": (compressed_nvfp4, compressed_config("nvfp4-pack-quantized", num_bits=4, group_size=16)),
    "compressed mxfp4": (compressed_mxfp4, compressed_config("mxfp4-pack-quantized", num_bits=4, group_size=32)),
    "compressed mxfp8": (compressed_mxfp8, compressed_config("mxfp8-quantized", group_size=32)),
    "modelopt fp8": (modelopt_fp8, modelopt_config("FP8")),
    "modelopt fp8, channel": (modelopt_channel, modelopt_config("FP8_PER_CHANNEL_PER_TOKEN")),
    "modelopt fp8, block": (modelopt_block, modelopt_config("fp8_pb_wo")),
    "modelopt nvfp4": (modelopt_nvfp4, modelopt_config("NVFP4", kv_cache_scheme={"num_bits": 8, "type": "float"})),
    "modelopt mxfp4": (modelopt_mxfp4, modelopt_config("W4A8_MXFP4_FP8")),
    "modelopt mxfp8": (compressed_mxfp8, modelopt_config("MXFP8")),
}


def is_linear(name: str, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and not re.search("embed|lm_head|gate.weight|A_log", name)


@pytest.fixture(scope="module", params=["nemotron_h", "llama"])
def original(request, tmp_path_factory):
    """A checkpoint in full precision, with a tokenizer."""
    folder = tmp_path_factory.mktemp("original") / request.param
    changes = {"num_layers": 2} if request.param == "llama" else {"pattern": "ME*-"}
    return tiny.random_target(folder, request.param, **changes)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return tiny.random_target(tmp_path_factory.mktemp("original") / "hybrid", pattern="ME*-")


def write(source: Path, folder: Path, tensors, config) -> Path:
    """The checkpoint in ``source`` with other tensors and with ``config`` added to its config.json."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    written = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(written | config))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def quantise(source: Path, folder: Path, layout_of, config) -> tuple[Path, Path]:
    """A quantised copy of ``source``, and a plain one of what it stands for.

    ``layout_of(name, weight)`` is the layout that a weight gets, or None.
    """
    folder.mkdir(exist_ok=True)
    stored, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        layout = layout_of(name, weight)
        if layout is None:
            stored[name] = plain[name] = weight.bfloat16() if weight.dim() == 2 else weight
            continue
        parts, plain[name] = layout(weight)
        stored |= {name + ending: part for ending, part in parts.items()}
    return write(source, folder / "quantised", stored, config), write(source, folder / "plain", plain, {})


def uniform(layout):
    return lambda name, weight: layout if is_linear(name, weight) else None


def assert_same_target(quantised: Path, plain: Path):
    """The same weights to the bit, and the same hidden states."""
    ours, theirs = Target.load(str(quantised), dtype="bfloat16"), Target.load(str(plain), dtype="bfloat16")
    weights = ours.model.state_dict()
    for name, expected in theirs.model.state_dict().items():
        assert weights[name].dtype == expected.dtype
        assert torch.equal(weights[name], expected), name
    ids = torch.arange(40, 60)[None]
    one, other = (target.capture(ids, None, [0, 1]) for target in (ours, theirs))
    assert torch.equal(one.taps, other.taps)
    assert torch.equal(one.last, other.last)
    assert ours.stop_ids == theirs.stop_ids
    return ours


# --- promises ---


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_target_has_the_weights_that_its_codes_and_scales_stand_for(original, tmp_path, scheme):
    layout, config = SCHEMES[scheme]
    quantised, plain = quantise(original, tmp_path, uniform(layout), {"quantization_config": config})
    target = assert_same_target(quantised, plain)
    changed = 0.0
    for name, tensor in load_file(original / "model.safetensors").items():
        if is_linear(name, tensor):
            read = open_tensors(quantised)[name]()
            assert read.dtype == torch.bfloat16
            error = (read.float() - tensor).norm() / tensor.norm()
            assert error < (0.05 if "8" in scheme else 0.2), name
            changed = max(changed, float(error))
    assert changed > 0.01  # it was quantised
    assert not hasattr(target.model.config, "quantization_config")
    assert parameter_count(quantised) == parameter_count(plain) == parameter_count(original)


def test_a_layer_that_was_left_alone_is_read_as_it_is(hybrid, tmp_path):
    ignored = "layers.3.mixer"
    config = compressed_config("nvfp4-pack-quantized", num_bits=4, group_size=16) | {"ignore": ["lm_head", ignored]}
    quantised, plain = quantise(
        hybrid,
        tmp_path,
        lambda name, weight: compressed_nvfp4 if is_linear(name, weight) and ignored not in name else None,
        {"quantization_config": config},
    )
    assert_same_target(quantised, plain)
    stored = load_file(hybrid / "model.safetensors")
    alone = [name for name in stored if ignored in name and stored[name].dim() == 2]
    assert len(alone) == 2
    for name in alone:
        assert torch.equal(open_tensors(quantised)[name](), stored[name].bfloat16())


def test_layers_may_differ_in_their_formats_and_modelopts_own_file_is_enough(hybrid, tmp_path):
    def layout_of(name, weight):
        if not is_linear(name, weight):
            return None
        return modelopt_nvfp4 if "experts" in name else modelopt_fp8

    layers = {"backbone.layers.1.mixer.experts.0.up_proj": {"quant_algo": "NVFP4", "group_size": 16}}
    layers |= {"backbone.layers.2.mixer.q_proj": {"quant_algo": "FP8"}}
    quantised, plain = quantise(hybrid, tmp_path, layout_of, {})
    with pytest.raises(InputError, match=r"stored as F8_E4M3, and config\.json does not say how"):
        Target.load(str(quantised))  # the values would be taken for weights, without their scales
    (quantised / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}})
    )
    assert_same_target(quantised, plain)
    said = storage_of(stored_tensors(quantised), scheme_of(quantised)).kinds
    assert "NVFP4 (e2m1, one e4m3 scale per 16 values and one more per tensor) in 10 of" in said
    assert "FP8 (e4m3, one scale per tensor) in 8 of" in said
    assert "the rest BF16" in said
    assert "activations stay BF16" in said


def test_scales_of_activations_and_of_the_cache_are_left_alone_and_said(hybrid, tmp_path):
    quantised, plain = quantise(
        hybrid, tmp_path, uniform(modelopt_fp8), {"quantization_config": modelopt_config("FP8")}
    )
    tensors = load_file(quantised / "model.safetensors")
    attention = "backbone.layers.2.mixer"
    tensors |= {f"{attention}.k_proj.k_scale": torch.tensor(0.1), f"{attention}.v_proj.v_scale": torch.tensor(0.1)}
    tensors |= {f"{attention}.q_proj.input_scale": torch.tensor(0.1)}
    save_file(tensors, quantised / "model.safetensors")
    for folder in (quantised, plain):  # these are its stop tokens, not config.json's
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    assert assert_same_target(quantised, plain).stop_ids == {2, 11}
    assert storage_of(stored_tensors(quantised), scheme_of(quantised)).unused.endswith("(3 tensors)")
    assert not any("_scale" in name for name in open_tensors(quantised))


@pytest.mark.parametrize("scheme", ["modelopt fp8", "compressed nvfp4", "transformers fp8, block"])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_read_dequantised(tmp_path, scheme, tied):
    changes = {"num_layers": 2, "tie_word_embeddings": tied}
    source = tiny.random_target(tmp_path / "source", "llama", **changes)
    layout, config = SCHEMES[scheme]
    quantised, plain = quantise(
        source,
        tmp_path,
        lambda name, weight: layout if weight.dim() == 2 and re.search("embed|lm_head", name) else None,
        {"quantization_config": config},
    )
    spec = Checkpoint.find(quantised).read_spec()
    read, expected = read_embedding_and_head(quantised, spec), read_embedding_and_head(plain, spec)
    assert torch.equal(read.embedding, expected.embedding)
    assert torch.equal(read.head, expected.head)
    assert read.embedding.dtype == torch.bfloat16
    assert (read.head is read.embedding) == tied
    assert_same_target(quantised, plain)


def test_the_embedding_is_read_while_other_shards_are_missing(hybrid, tmp_path):
    quantised, plain = quantise(hybrid, tmp_path, lambda name, weight: modelopt_fp8 if weight.dim() == 2 else None, {})
    (quantised / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    tensors = load_file(quantised / "model.safetensors")
    here = {name: tensor for name, tensor in tensors.items() if "embed" in name or "lm_head" in name}
    save_file(here, quantised / "a.safetensors")
    (quantised / "model.safetensors").unlink()
    weight_map = {name: "a.safetensors" if name in here else "b.safetensors" for name in tensors}
    (quantised / INDEX).write_text(json.dumps({"metadata": {"total_size": 12345}, "weight_map": weight_map}))
    spec = Checkpoint.find(quantised).read_spec()
    assert torch.equal(read_embedding_and_head(quantised, spec).head, read_embedding_and_head(plain, spec).head)
    assert stored_size(quantised) == 12345
    with pytest.raises(InputError, match="does not exist"):
        Target.load(str(quantised))


def test_gpt_oss_experts_in_mxfp4_are_read_as_transformers_has_them(tmp_path):
    config = TINY["gpt_oss"]()
    source = tmp_path / "source"
    tiny.save_target(source, tiny.random_model(config), tiny.make_tokenizer(["a b c"], 384))
    stored, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not re.search(r"experts\.(down|gate_up)_proj$", name):
            stored[name] = plain[name] = weight.bfloat16()
            continue
        made = [shared_powers(expert.T, E2M1, 6) for expert in weight]  # stored by rows of outputs
        packed = torch.stack([one.packed for one in made])
        stored[name + "_blocks"] = packed.view(*packed.shape[:-1], -1, 16)
        stored[name + "_scales"] = torch.stack([one.exponents for one in made])
        plain[name] = torch.stack([one.plain.T for one in made])
    quantised = write(source, tmp_path / "quantised", stored, {"quantization_config": {"quant_method": "mxfp4"}})
    assert_same_target(quantised, write(source, tmp_path / "plain", plain, {}))
    assert parameter_count(quantised) == parameter_count(source)


STACKS = {
    "a scale for each expert": ("_weight_scale", lambda made: made.scales.reshape(()), (None, None)),
    "rows": ("_weight_scale", lambda made: made.scales[:, 0], (1, None)),
    "blocks": ("_scale_inv", lambda made: made.scales, (32, 48)),
}


@pytest.mark.parametrize("how", STACKS)
def test_experts_in_one_tensor_are_read_with_their_scales(tmp_path, how):
    """As transformers stores a stack in FP8, and as ModelOpt names the scales of one."""
    ending, scale_of, block = STACKS[how]
    made = [fp8(expert, *block) for expert in torch.randn(3, 64, 96)]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: torch.stack([one.float8 for one in made])}
    tensors[name + ending] = torch.stack([scale_of(one) for one in made])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8_BLOCK}))
    found = open_tensors(tmp_path)
    assert list(found) == [name]
    assert torch.equal(found[name](), torch.stack([one.plain for one in made]))


def test_a_stack_of_experts_in_nvfp4_may_have_a_second_scale_for_each(tmp_path):
    made = [nvfp4(expert, divides=False) for expert in torch.randn(3, 32, 64)]
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        name: torch.stack([one.packed for one in made]),
        name + "_weight_scale": torch.stack([one.scales.to(torch.float8_e4m3fn) for one in made]),
        name + "_weight_scale_2": torch.stack([one.second for one in made]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": modelopt_config("NVFP4")}))
    found = open_tensors(tmp_path)
    assert list(found) == [name]
    assert torch.equal(found[name](), torch.stack([one.plain for one in made]))


def test_a_large_weight_is_read_in_pieces_that_join(tmp_path, monkeypatch):
    made = fp8(torch.randn(200, 100), 32, 48)
    save_file({"w.weight": made.float8, "w.weight_scale_inv": made.scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8_BLOCK}))
    monkeypatch.setattr("nemotron_dspark.targets.quantised._CHUNK", 700)
    assert torch.equal(open_tensors(tmp_path)["w.weight"](), made.plain)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"bits": 4}, "does not name"),
        (modelopt_config("W4A16_AWQ"), "W4A16_AWQ"),
        (modelopt_config("NVFP4_SVD"), "NVFP4_SVD"),
        (modelopt_config("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "W8A16"}}), "W8A16"),
        (compressed_config("pack-quantized", type="int", num_bits=4), "pack-quantized"),
        (compressed_config("naive-quantized", type="int"), "8 bits int"),
        (compressed_config("float-quantized") | {"transform_config": {"config_groups": {"a": {}}}}, "rotations"),
        (compressed_config("float-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_scheme_that_is_not_read_is_refused_in_two_sentences(hybrid, tmp_path, config, words):
    tensors = load_file(hybrid / "model.safetensors")
    folder = write(hybrid, tmp_path / "target", tensors, {"quantization_config": config})
    for use in (Target.load, open_tensors, lambda folder: scheme_of(Path(folder))):
        with pytest.raises(InputError, match=words) as refused:
            use(str(folder))
        assert "FP8, NVFP4 or MXFP4" in refused.value.do
    assert parameter_count(folder) == sum(tensor.numel() for tensor in tensors.values())


UP = "backbone.layers.3.mixer.up_proj.weight"


def damaged(hybrid, folder, scheme, change):
    """A quantised checkpoint whose tensors ``change`` was let at."""
    layout, config = SCHEMES[scheme]
    quantised, _ = quantise(hybrid, folder, uniform(layout), {"quantization_config": config})
    tensors = load_file(quantised / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, quantised / "model.safetensors")
    return str(quantised)


def read_all(folder):
    return [read() for read in open_tensors(Path(folder)).values()]


def without(*endings):
    def change(tensors):
        for ending in endings:
            del tensors[UP + ending]

    return change


def cut(ending):
    def change(tensors):
        tensors[UP + ending] = tensors[UP + ending][:-1]

    return change


def changed(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        ("modelopt fp8", without("_scale"), f"{UP} .*quantised, and its scale is missing"),
        ("modelopt nvfp4", without("_scale_2"), f"{UP} .*its second scale is missing"),
        ("compressed nvfp4", without("_global_scale"), f"{UP}_packed .*its second scale is missing"),
        ("compressed nvfp4", without("_scale", "_global_scale"), f"{UP}_packed .*its scale is missing"),
        ("transformers fp8, block", cut("_scale_inv"), r"_scale_inv of shape \(7, 2\) do not fit"),
        ("compressed fp8, channel", cut("_scale"), r"_scale of shape \(255, 1\) do not fit"),
        ("compressed mxfp4", cut("_scale"), r"_scale of shape \(255, 2\) do not fit"),
        ("modelopt nvfp4", changed(f"{UP}_scale_2", torch.ones(3)), "do not fit"),
        ("modelopt mxfp4", changed(f"{UP}_scale_2", torch.ones(())), "do not fit"),
        ("modelopt fp8", changed(UP, torch.ones(256, 64)), "stored as F32 with scales beside it"),
        ("modelopt fp8", changed(UP, torch.ones(256, 64, dtype=torch.int8)), "stored as I8"),
        ("modelopt fp8", changed(UP, torch.ones(256, 64).to(torch.float8_e5m2)), "stored as F8_E5M2"),
        ("modelopt nvfp4", changed("backbone.layers.3.mixer.up_proj.pre_quant_scale", torch.ones(64)), "pre_quant"),
        ("compressed fp8, channel", changed(f"{UP}_zero_point", torch.ones(256, 1)), "zero_point"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_dequantised_is_named_in_two_sentences(hybrid, tmp_path, scheme, change, words):
    folder = damaged(hybrid, tmp_path, scheme, change)
    with pytest.raises(InputError, match=words) as refused:
        Target.load(folder)
    assert len(refused.value.do) > 20
    with pytest.raises(InputError, match=words):
        read_all(folder)


@pytest.mark.parametrize("scheme", ["modelopt fp8", "transformers fp8, block", "modelopt nvfp4", "compressed mxfp4"])
def test_the_estimated_cost_of_quantising_is_the_real_one(hybrid, tmp_path, scheme):
    """Within a fifth: what was rounded is not known to the reader, only how wide the steps are."""
    layout, config = SCHEMES[scheme]
    quantised, plain = quantise(hybrid, tmp_path, uniform(layout), {"quantization_config": config})
    before, after = load_file(hybrid / "model.safetensors"), load_file(plain / "model.safetensors")
    weights = weights_of(tensors_here(quantised), scheme_of(quantised))
    for name in (UP, "backbone.layers.0.mixer.in_proj.weight"):
        real = float((after[name].float() - before[name]).norm() / after[name].float().norm())
        assert weights[name].rounding() == pytest.approx(real, rel=0.2)
    said = storage_of(tensors_here(quantised), scheme_of(quantised)).sample
    name, cost = re.match(r"(\S+), taken at random: .* about ([\d.]+)% of the rms", said).groups()
    real = float((after[name].float() - before[name]).norm() / after[name].float().norm())
    assert float(cost) / 100 == pytest.approx(real, rel=0.25)


# --- the writers' own code ---


def test_transformers_dequantises_the_same():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = fp8(torch.randn(96, 96), 32, 48)
    theirs = Fp8Dequantize(None)._dequantize_one(made.float8, made.scales, output_dtype=torch.bfloat16)
    assert torch.equal(theirs, made.plain)
    made = shared_powers(torch.randn(64, 96), E2M1, 6)
    blocks = made.packed.view(1, 64, 3, 16)
    assert torch.equal(convert_moe_packed_tensors(blocks, made.exponents[None])[0], made.plain.T)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.startswith("compressed")])
def test_compressed_tensors_dequantises_the_same(scheme):
    pytest.importorskip("compressed_tensors", reason="`pip install compressed-tensors` runs this")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    layout, config = SCHEMES[scheme]
    group = config["config_groups"]["group_0"]
    strategy = {"nvfp4": "tensor_group", "mxfp": "group"}.get(re.search(r"nvfp4|mxfp|$", scheme).group())
    weights = group["weights"] | ({"strategy": strategy} if strategy else {})
    parts, plain = layout(torch.randn(64, 96))
    state = {f"weight{ending}": part for ending, part in parts.items()}
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    found = compressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=weights))
    assert torch.equal(found["weight"].bfloat16(), plain)


def test_modelopt_dequantises_the_same():
    pytest.importorskip("modelopt", reason="`pip install nvidia-modelopt` runs this")
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, NVFP4QTensor

    weight, shape, kind = torch.randn(64, 96), torch.Size((64, 96)), torch.float32
    made = nvfp4(weight, divides=False)
    scales = {"scale": made.scales.to(torch.float8_e4m3fn), "double_scale": made.second, "block_sizes": {-1: 16}}
    assert torch.equal(NVFP4QTensor(shape, kind, made.packed).dequantize(kind, **scales).bfloat16(), made.plain)
    made = shared_powers(weight, E2M1, 6)
    found = MXFP4QTensor(shape, kind, made.packed).dequantize(kind, scale=made.exponents, block_sizes={-1: 32})
    assert torch.equal(found.bfloat16(), made.plain)
    made = fp8(weight)
    assert torch.equal(FP8QTensor(shape, kind, made.float8).dequantize(kind, scale=made.scales).bfloat16(), made.plain)


def test_a_quantised_target_is_streamed_with_the_same_bits(hybrid, tmp_path):
    config, layout_of = {"quantization_config": modelopt_config("NVFP4")}, uniform(modelopt_nvfp4)
    quantised, _ = quantise(hybrid, tmp_path, layout_of, config)
    whole, streamed = Target.load(str(quantised), dtype="float32"), StreamedTarget.load(str(quantised), dtype="float32")
    ids = torch.randint(32, 384, (2, 50), generator=torch.Generator().manual_seed(2))
    expected, found = whole.capture(ids, None, (0, 1)), streamed.capture(ids, None, (0, 1))
    assert torch.equal(found.taps, expected.taps)
    assert torch.equal(found.last, expected.last)
