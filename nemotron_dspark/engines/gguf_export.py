"""GGUF files for llama.cpp: a DSpark draft, and targets of type llama and nemotron_h as far as llama.cpp reads them.

Keys, tensor names and what is done to a tensor on the way are llama.cpp's: its loaders `src/models/dflash.cpp`,
`llama.cpp` and `nemotron-h.cpp`. Tensors are read and written one at a time. Vectors and what the scan uses are always
float32, matrices ``dtype``.

A draft has architecture ``dflash`` with the tensors of a Markov head. It brings the target's tokenizer but not its
embedding and LM head: llama.cpp takes these from the target.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig
from nemotron_dspark.drafts.dspark import SHARED
from nemotron_dspark.engines import gguf_tokenizer
from nemotron_dspark.engines.exchange import Exchanged, with_markov_head
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.files import disk_errors, fsync_folder
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.spec import LayerKind
from nemotron_dspark.targets.weights import open_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

Outtype = Literal["bfloat16", "float16", "float32"]
LAYER_NAMES = {  # of a draft and of a llama, behind layers.N
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attention_sink_bias": "attn_sinks.weight",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DRAFT_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
}
_NEMOTRON_H = {  # behind layers.N
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.up_proj.weight": "ffn_up.weight",
    "mixer.down_proj.weight": "ffn_down.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    "mixer.experts.down_proj": "ffn_down_exps.weight",
}
_SHARED = {
    "embed_tokens.weight": "token_embd.weight",
    "embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_FLOAT32 = ("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight", "ffn_gate_inp.weight")

Tensors = Mapping[str, Callable[[], Tensor]]


def export(target: Checkpoint, draft: Path | None, out: Path, outtype: Outtype) -> Exchanged:
    """Write the draft in the folder ``draft``, or without one the target; errors as the two functions below."""
    if draft is None:
        export_target(target, out, outtype)
    else:
        config = DraftConfig.from_folder(draft)
        config.check_target(target.read_spec())
        export_draft(config, open_tensors(draft), target, out, outtype)
    import gguf

    tensors = len(gguf.GGUFReader(out).tensors)
    return Exchanged(str(draft or target.folder), str(out), "gguf", tensors, out.stat().st_size, draft is None)


def export_draft(config: DraftConfig, tensors: Tensors, target: Checkpoint, out: Path, outtype: Outtype) -> None:
    """Write a DSpark or DFlash draft, whose tensors have DeepSpec's names, for llama.cpp's ``--spec-type draft-dspark``
    or ``draft-dflash``.

    Raises:
        InputError: a sequential head that llama.cpp does not have, a target whose logits are scaled, a tokenizer that
            it does not know, or ``out`` exists.
        EnvironmentFault: no `gguf` package, or the disk is full.
    """
    if config.markov_head_type != "vanilla":
        raise InputError(
            f"llama.cpp has no {config.markov_head_type} Markov head.",
            "Train the draft with draft.markov_head = vanilla to serve it there.",
        )
    if config.draft_vocab_size is not None:
        raise InputError(
            "llama.cpp has no DSpark or DFlash draft of a part of the vocabulary.",
            "Train the draft without draft.vocabulary, or serve it with vLLM or `nds serve`.",
        )
    if config.target_logit_multiplier != 1.0 or config.target_logit_softcap is not None:
        raise InputError(
            "llama.cpp adds a Markov head to unscaled logits, and this target scales or caps its own.",
            "Serve the pair with `nds serve`.",
        )
    # Embedding and LM head are the target's own in llama.cpp, unless the draft has an embedding of its own.
    left = SHARED[1:] if config.own_embedding else SHARED
    own = {name: read() for name, read in tensors.items() if name not in left}
    dspark = not isinstance(config, DFlashConfig)
    full = with_markov_head(config, own, reads_token=True)[1] if dspark else own
    written = {_draft_name(name): (lambda tensor=tensor: tensor) for name, tensor in full.items()}

    def describe(writer: "GGUFWriter", arch: str) -> None:
        _describe_attention(writer, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_vocab_size(config.vocab_size)
        writer.add_uint32(f"{arch}.block_size", config.block_width)
        writer.add_array(f"{arch}.target_layers", [tap + 1 for tap in config.target_layer_ids])
        writer.add_bool(f"{arch}.sample_from_anchor", config.sample_from_anchor)
        writer.add_bool(f"{arch}.has_confidence_head", config.enable_confidence_head)
        ours = ("num_target_layers", "num_anchors", "markov_rank")  # nobody's but ours: for the way back
        if config.causal_block:
            writer.add_bool(f"{arch}.attention.causal", True)
        if config.sliding_window is not None:
            writer.add_sliding_window(config.sliding_window)
            writer.add_sliding_window_pattern([True] * config.num_hidden_layers)
        for key in ours if dspark else ours[:2]:
            writer.add_uint32(f"nds.{key}", getattr(config, key))
        if dspark:
            writer.add_bool("nds.confidence_head_with_markov", config.confidence_head_with_markov)
        gguf_tokenizer.write(writer, target, config.vocab_size)
        writer.add_uint32("tokenizer.ggml.mask_token_id", config.mask_token_id)

    _write(out, "dflash", f"{config.kind} draft for {target.name}", describe, written, outtype)


def _draft_name(name: str) -> str:
    return DRAFT_NAMES[name] if name in DRAFT_NAMES else _layer_name(name, LAYER_NAMES)


def export_target(target: Checkpoint, out: Path, outtype: Outtype) -> None:
    """Write a target of type llama or nemotron_h.

    Raises:
        InputError: another type, a layer that llama.cpp does not have, an unknown tokenizer, or ``out`` exists.
        EnvironmentFault: no `gguf` package, or the disk is full.
    """
    config = target.config
    writers = {"llama": _llama, "nemotron_h": _nemotron_h}
    if config.get("model_type") not in writers:
        raise InputError(
            f"A target of type {config.get('model_type')} is not written as GGUF here.",
            "Convert it with llama.cpp's convert_hf_to_gguf.py; the draft can be exported all the same.",
        )
    arch, describe, tensors = writers[config["model_type"]](target, open_tensors(target.folder))

    def describe_all(writer: "GGUFWriter", arch: str) -> None:
        describe(writer)
        writer.add_vocab_size(config["vocab_size"])
        gguf_tokenizer.write(writer, target, config["vocab_size"])

    _write(out, arch, target.name, describe_all, tensors, outtype)


_Parts = tuple[str, Callable[["GGUFWriter"], None], dict[str, Callable[[], Tensor]]]


def _llama(target: Checkpoint, tensors: Tensors) -> _Parts:
    spec = target.read_spec()
    config = target.config
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError("A llama with biases is not written as GGUF here.", "Use llama.cpp's convert_hf_to_gguf.py.")
    if spec.rope_theta is None or (config.get("rope_parameters") or {}).get("rope_type", "default") != "default":
        raise InputError(
            "Only the default rotary embedding is written as GGUF here.", "Use llama.cpp's convert_hf_to_gguf.py."
        )

    def describe(writer: "GGUFWriter") -> None:
        _describe_attention(writer, spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim)
        writer.add_block_count(spec.num_layers)
        writer.add_context_length(spec.max_position_embeddings)
        writer.add_embedding_length(spec.hidden_size)
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_layer_norm_rms_eps(spec.norm_eps)
        writer.add_rope_dimension_count(spec.head_dim)
        writer.add_rope_freq_base(spec.rope_theta or 0.0)

    found = {}
    for name, read in tensors.items():
        bare = name.removeprefix("model.")
        if (bare == "lm_head.weight" and spec.tie_word_embeddings) or bare.endswith("rotary_emb.inv_freq"):
            continue
        there = _SHARED[bare] if bare in _SHARED else _layer_name(bare, LAYER_NAMES)
        heads = {"attn_q.weight": spec.num_attention_heads, "attn_k.weight": spec.num_key_value_heads}
        kind = there.split(".", 2)[-1]
        found[there] = _interleaved(read, heads[kind]) if kind in heads else read
    return "llama", describe, found


def _interleaved(read: Callable[[], Tensor], heads: int) -> Callable[[], Tensor]:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding: pairs beside each other."""
    return lambda: (weight := read()).view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _nemotron_h(target: Checkpoint, tensors: Tensors) -> _Parts:
    spec, config = target.read_spec(), target.config
    experts = any(kind is LayerKind.MOE for kind in spec.layers)
    if experts and any(kind is LayerKind.MLP for kind in spec.layers):
        raise InputError(
            "llama.cpp has no Nemotron-H with both mixtures of experts and plain MLPs.", "Serve it with `nds serve`."
        )
    attends = [kind.attends for kind in spec.layers]
    width = config["moe_intermediate_size"] if experts else config["intermediate_size"]

    def describe(writer: "GGUFWriter") -> None:
        heads_kv = [spec.num_key_value_heads if attention else 0 for attention in attends]
        _describe_attention(writer, spec.num_attention_heads, heads_kv, spec.head_dim)
        writer.add_block_count(spec.num_layers)
        writer.add_context_length(spec.max_position_embeddings)
        writer.add_embedding_length(spec.hidden_size)
        # Per layer: llama.cpp tells the kinds of layers by which of heads and feed-forward widths are 0.
        feeds = [kind in (LayerKind.MLP, LayerKind.MOE) for kind in spec.layers]
        writer.add_feed_forward_length([width if feed else 0 for feed in feeds])
        writer.add_layer_norm_rms_eps(spec.norm_eps)
        writer.add_layer_norm_eps(spec.norm_eps)
        writer.add_rope_dimension_count(spec.head_dim)
        writer.add_ssm_conv_kernel(config["conv_kernel"])
        writer.add_ssm_state_size(config["ssm_state_size"])
        writer.add_ssm_group_count(config["n_groups"])
        writer.add_ssm_inner_size(config["mamba_num_heads"] * config["mamba_head_dim"])
        writer.add_ssm_time_step_rank(config["mamba_num_heads"])
        if experts:
            writer.add_expert_count(config["n_routed_experts"])
            writer.add_expert_used_count(config["num_experts_per_tok"])
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
            writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
            writer.add_expert_shared_count(config["n_shared_experts"])
            writer.add_expert_weights_norm(config["norm_topk_prob"])
            writer.add_expert_weights_scale(config["routed_scaling_factor"])
            writer.add_uint32("nemotron_h_moe.expert_group_count", config["n_group"])
            if config.get("moe_latent_size"):
                writer.add_uint32("nemotron_h_moe.moe_latent_size", config["moe_latent_size"])

    def prepared(name: str, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The scan's parameters as llama.cpp stores them: A itself, one column a head, the norm by group."""
        if name.endswith("ssm_a"):
            return lambda: -read().float().exp()[:, None]
        if name.endswith("ssm_d"):
            return lambda: read()[:, None]
        if name.endswith("ssm_norm.weight"):
            return lambda: read().reshape(config["n_groups"], -1)
        return (lambda: read().squeeze(1)) if name.endswith("ssm_conv1d.weight") else read

    # Tensors are read when they are written: a target need not fit into the memory.
    found: dict[str, Callable[[], Tensor]] = {}
    for name, read in _stacked_experts(tensors, config.get("n_routed_experts") or 0).items():
        bare = name.removeprefix("backbone.").removeprefix("model.")
        if bare.startswith("mtp."):  # multi-token prediction, which transformers ignores too
            continue
        there = _SHARED[bare] if bare in _SHARED else _layer_name(bare, _NEMOTRON_H)
        found[there] = prepared(there, read)
    return "nemotron_h_moe" if experts else "nemotron_h", describe, found


def _stacked_experts(tensors: Tensors, experts: int) -> dict[str, Callable[[], Tensor]]:
    """``experts.E.up_proj.weight`` of all E as one tensor ``experts.up_proj`` [E, …]."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, read in tensors.items():
        before, inside, after = name.partition(".mixer.experts.0.")
        if inside:
            kind = after.removesuffix(".weight")
            each = [tensors[f"{before}.mixer.experts.{expert}.{after}"] for expert in range(experts)]
            found[f"{before}.mixer.experts.{kind}"] = lambda each=each: torch.stack([one() for one in each])
        elif ".mixer.experts." not in name or name.endswith((".experts.up_proj", ".experts.down_proj")):
            found[name] = read
    return found


def _layer_name(name: str, names: Mapping[str, str]) -> str:
    """llama.cpp's name of a layer's tensor: ``blk.3.ffn_up.weight`` for ``layers.3.mlp.up_proj.weight``."""
    _, number, rest = name.split(".", 2)
    stem, _, kind = rest.rpartition(".")
    if rest in names:
        return f"blk.{number}.{names[rest]}"
    if stem not in names:
        raise InputError(f"llama.cpp has no place for the tensor {name}.", "Use llama.cpp's convert_hf_to_gguf.py.")
    return f"blk.{number}.{names[stem]}.{kind}"


def _describe_attention(writer: "GGUFWriter", heads: int, heads_kv: int | list[int], head_dim: int) -> None:
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _write(
    out: Path,
    arch: str,
    name: str,
    describe: Callable[["GGUFWriter", str], None],
    tensors: Tensors,
    outtype: Outtype,
) -> None:
    """Header and tensors into a temporary file that then takes the name ``out``: whole or absent."""
    try:
        import gguf
    except ImportError:
        raise EnvironmentFault(
            "Writing a GGUF file needs the package gguf.", "pip install 'nemotron-dspark[gguf]'."
        ) from None
    if out.exists():
        raise InputError(f"{out} exists.", "Give another file to --out, or move this one away.")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with disk_errors(out), _removed(temporary):
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(temporary, arch)
        writer.add_name(name)
        kinds = gguf.GGMLQuantizationType
        matrix = {"bfloat16": kinds.BF16, "float16": kinds.F16, "float32": kinds.F32}[outtype]
        file_types = gguf.LlamaFileType
        writer.add_file_type(
            {kinds.BF16: file_types.MOSTLY_BF16, kinds.F16: file_types.MOSTLY_F16}.get(matrix, file_types.ALL_F32)
        )
        describe(writer, arch)
        for there, read in tensors.items():  # once for the header and once for the data: never two in memory
            data, kind = _stored(there, read(), matrix, kinds)
            writer.add_tensor_info(there, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for there, read in tensors.items():
            writer.write_tensor_data(_stored(there, read(), matrix, kinds)[0])
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out)
        fsync_folder(out.absolute().parent)


def _stored(name: str, tensor: Tensor, matrix: Any, kinds: Any) -> tuple[np.ndarray, Any]:
    """The tensor's elements in its type in the file, and that type; numpy has no bfloat16, so its bits go as uint16."""
    kind = kinds.F32 if tensor.ndim == 1 or name.split(".", 2)[-1] in _FLOAT32 else matrix
    if kind is kinds.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy(), kind
    return tensor.to(torch.float16 if kind is kinds.F16 else torch.float32).contiguous().numpy(), kind


@contextlib.contextmanager
def _removed(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
