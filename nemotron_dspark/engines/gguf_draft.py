"""A DSpark or DFlash draft out of a GGUF file, of `gguf_export.export_draft` or of llama.cpp's converter."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.drafts.config import DFlashConfig
from nemotron_dspark.engines.exchange import Exchanged, write_imported
from nemotron_dspark.engines.gguf_export import DRAFT_NAMES, LAYER_NAMES
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Checkpoint

if TYPE_CHECKING:
    from gguf.gguf_reader import GGUFReader, ReaderTensor

ARCHITECTURE = "dflash"
_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def import_draft_gguf(reader: "GGUFReader", file: Path, out: Path, target: Checkpoint | None) -> Exchanged:
    """Write the draft that ``reader`` (a ``gguf.GGUFReader`` of ``file``) holds as a draft folder ``out``.

    ``target`` as in `exchange.import_draft`; embedding and LM head are never in such a file.

    Raises:
        InputError: one that drafts here cannot be, or for another target.
        EnvironmentFault: the disk is full.
    """
    fields = {key: field.contents() for key, field in reader.fields.items()}
    own = {key.removeprefix(f"{ARCHITECTURE}."): value for key, value in fields.items()}
    stored = {_name(tensor.name, file): _tensor(tensor) for tensor in reader.tensors}
    # Both kinds have the same architecture there: a Markov head tells DSpark from DFlash.
    dspark = "markov_head.markov_w1.weight" in stored
    anchored, window = own.get("sample_from_anchor", dspark), own.get("attention.sliding_window")
    if anchored and not dspark:
        raise InputError("The draft has sample_from_anchor = True and no Markov head.", "Serve it with llama.cpp.")
    if window and not all(own.get("attention.sliding_window_pattern", [True])):
        raise InputError(
            "Some layers of the draft have a window and others none; drafts here have one for all.",
            "Serve it with llama.cpp.",
        )
    # Keys of ours are what llama.cpp has no name for; `gguf_export` writes them for this way back.
    noted = {key.removeprefix("nds."): value for key, value in fields.items() if key.startswith("nds.")}
    flat = {
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": own["attention.key_length"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "rms_norm_eps": _decimal(own["attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(own["rope.freq_base"]),
        "max_position_embeddings": own["context_length"],
        "block_size": own["block_size"],
        "mask_token_id": fields.get("tokenizer.ggml.mask_token_id"),
        "target_layer_ids": [place - 1 for place in own["target_layers"]],
        "own_embedding": "embed_tokens.weight" in stored,
        "dflash_config": {
            "sample_from_anchor": anchored,
            "causal": own.get("attention.causal", False),
            "attention_sink_bias": "layers.0.self_attn.attention_sink_bias" in stored,
            **({"use_swa": True, "swa_window_size": window} if window else {}),
        },
    }
    if not dspark:
        return write_imported(file, "gguf", flat, stored, out, target, kind=DFlashConfig, noted=noted)
    flat |= {
        "markov_rank": stored["markov_head.markov_w1.weight"].shape[1],
        "markov_head_type": "vanilla",
        "enable_confidence_head": "confidence_head.proj.weight" in stored,
        "confidence_head_with_markov": own.get("has_confidence_head", False),
    }
    return write_imported(file, "gguf", flat, stored, out, target, noted=noted)


def _name(name: str, file: Path) -> str:
    """llama.cpp's name of a tensor as DeepSpec's."""
    for ours, theirs in DRAFT_NAMES.items():
        if name == theirs:
            return ours
    if name.startswith("blk."):
        _, number, rest = name.split(".", 2)
        stem, _, kind = rest.rpartition(".")
        for ours, theirs in LAYER_NAMES.items():
            if theirs in (rest, stem):
                return f"layers.{number}.{ours}" + (f".{kind}" if theirs == stem else "")
    raise InputError(
        f"{file} holds the tensor {name}, for which drafts here have no place.", "Serve it with llama.cpp."
    )


def _tensor(tensor: "ReaderTensor") -> Tensor:
    import gguf

    values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
    return values.to(_KINDS.get(tensor.tensor_type.name, torch.float32))


def _decimal(value: float) -> float:
    """A float32 as the shortest number that it stands for: 1e-06 and not 9.999999974752427e-07."""
    return float(str(np.float32(value)))
