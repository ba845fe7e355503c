"""Run by vLLM's own Python: its config for a pair, and its draft model on given hidden states, without its runner.

    python vllm_draft.py TARGET DRAFT STATES OUT

STATES is a safetensors file of `ids` [block] (anchor and masks), `taps` [S, T·H] and the anchor's `position`. OUT gets
the base logits [block, V], and logits and confidences of the block that is drafted greedily from them.

vLLM's runner for such drafts wants Triton, which CPUs do not have. So the check that refuses the pair is left out
once its sentence is kept, and plain torch stands in for the attention kernel and its paged cache.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs


class PlainAttention(torch.nn.Module):
    """Attention of a block over what was written before it and over itself, in both directions."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.shape = heads, kv_heads, head_dim
        self.impl = self
        self.kv_cache = None

    def do_kv_cache_update(self, layer, keys, values, cache, slots) -> None:
        self.written = keys, values  # [S, kv_heads, d]

    def forward(self, q, k, v):
        heads, kv_heads, head_dim = self.shape
        keys = torch.cat((self.written[0], k.view(-1, kv_heads, head_dim))).transpose(0, 1)
        values = torch.cat((self.written[1], v.view(-1, kv_heads, head_dim))).transpose(0, 1)
        queries = q.view(-1, heads, head_dim).transpose(0, 1)
        out = F.scaled_dot_product_attention(queries[None], keys[None], values[None], enable_gqa=True)
        return out[0].transpose(0, 1).reshape(q.shape)


def engine_config(target: str, draft: str) -> tuple[VllmConfig, str]:
    """vLLM's config for the pair, and the sentence with which it refuses to run it here."""
    with open(os.path.join(draft, "config.json")) as file:
        block = json.load(file)["block_size"]
    speculative = {"method": "dspark", "model": draft, "num_speculative_tokens": block}
    arguments = EngineArgs(
        model=target, dtype="float32", max_model_len=256, enforce_eager=True, speculative_config=speculative
    )
    refused = ""
    try:
        return arguments.create_engine_config(), refused
    except ValueError as error:
        refused = str(error)
    VllmConfig._validate_v1_model_runner = lambda self: None
    return arguments.create_engine_config(), refused


@torch.inference_mode()
def main(target: str, draft: str, states: str, out: str) -> None:
    config, refused = engine_config(target, draft)
    speculative = config.speculative_config
    resolved = speculative.draft_model_config
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

    said = {
        "refused": refused,
        "method": speculative.method,
        "architectures": resolved.architectures,
        "layers": list(get_eagle3_aux_layers_from_config(speculative)),
    }
    torch.set_default_dtype(torch.float32)
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{out}.store", 0, "gloo")
        initialize_model_parallel(1, 1)
        from vllm.model_executor.model_loader.utils import process_weights_after_loading
        from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM

        model = Qwen3DSparkForCausalLM(vllm_config=config)
        model.load_weights(load_file(os.path.join(draft, "model.safetensors")).items())
        process_weights_after_loading(model, resolved, torch.device("cpu"))
        for layer in model.model.layers:
            own = layer.self_attn
            own.attn = PlainAttention(own.num_heads, own.num_kv_heads, own.head_dim)
        # Its own norm of all layers' keys at once takes the first layer's weights for all of them on a CPU.
        norms = [layer.self_attn.k_norm for layer in model.model.layers]
        model.model._normalize_context_k = lambda keys: torch.stack([n(k) for n, k in zip(norms, keys, strict=True)])
        model.model._attn_layers = [layer.self_attn.attn for layer in model.model.layers]

        given = load_file(states)
        position = int(given["position"])
        context = model.model.fc(given["taps"])
        model.precompute_and_store_context_kv(context, torch.arange(position), torch.arange(position))
        hidden = model(given["ids"], position + torch.arange(len(given["ids"])))
        base = model.compute_draft_logits(hidden)
        previous, logits, confidences = given["ids"][:1], [], []
        for slot in range(len(hidden)):
            embedded = model.markov_embed(previous)
            logits.append(base[slot] + model.markov_bias(embedded)[0])
            if model.model.confidence_head is not None:
                confidences.append(model.compute_confidence(hidden[slot : slot + 1], embedded)[0])
            previous = logits[-1].argmax()[None]
    found = {"base": base, "logits": torch.stack(logits)}
    if confidences:
        found["confidences"] = torch.stack(confidences)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
