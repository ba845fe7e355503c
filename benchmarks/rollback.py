"""What it costs to verify a block of 8 tokens and keep a prefix of it, in forwards of 8 tokens with a cache.

Random targets of 12 layers and hidden size 1024, one row, a committed prompt. Per repetition, one after the other so
that what else the machine does falls on all of them:

- forward: transformers' own forward of the block on its own cache. It commits all of it and cannot take any back.
- block: `Target.verify`, the forward that leaves the state alone. The part of the cost that is not rollback.
- keep n: `Target.verify` and `Target.commit` of the first n tokens.
- replay: copy the cache, run the block, run the kept part (here 3 tokens) again on the old cache.

Printed are medians over the repetitions of the ratios to the forward of the same repetition; and last, for the slowest
n, verify and commit as a ratio to verify alone: a figure that gains nothing from a slow forward in transformers, which
without CUDA kernels pads the block to a whole chunk. The copies that put every way into the same state are not timed.

    python benchmarks/rollback.py [--threads 2] [--repetitions 15] [--families nemotron_h,bamba] [--json]
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemotron_dspark.targets import Target, spec_from_config

BLOCK = 8
KEPT = (0, 1, 3, 5, 7, 8)
REPLAYED = 3
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 4, "intermediate_size": 4096}
MAMBA = {"mamba_n_heads": 32, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_chunk_size": 256}


def _nemotron_h() -> Any:
    from transformers import NemotronHConfig

    return NemotronHConfig(
        hybrid_override_pattern="M-M-M*-M-M*-",
        head_dim=64,
        mamba_num_heads=32,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        chunk_size=128,
        **SIZES,
        **GROUPED,
    )


def _granitemoehybrid() -> Any:
    from transformers import GraniteMoeHybridConfig

    kinds = ["attention" if layer in (5, 10) else "mamba" for layer in range(12)]
    return GraniteMoeHybridConfig(
        num_hidden_layers=12,
        layer_types=kinds,
        num_local_experts=0,
        shared_intermediate_size=2048,
        attention_multiplier=0.125,
        **SIZES,
        **GROUPED,
        **MAMBA,
    )


def _bamba() -> Any:
    from transformers import BambaConfig

    return BambaConfig(num_hidden_layers=12, attn_layer_indices=[5, 10], **SIZES, **GROUPED, **MAMBA)


def _falcon_h1() -> Any:
    from transformers import FalconH1Config

    return FalconH1Config(num_hidden_layers=12, mamba_d_ssm=2048, head_dim=64, **SIZES, **GROUPED, **MAMBA)


def _zamba2() -> Any:
    from transformers import Zamba2Config

    kinds = ["hybrid" if layer in (4, 9) else "mamba" for layer in range(12)]
    return Zamba2Config(
        num_hidden_layers=12,
        layers_block_type=kinds,
        n_mamba_heads=32,
        mamba_d_state=64,
        mamba_ngroups=2,
        num_mem_blocks=2,
        chunk_size=256,
        use_mem_rope=True,
        **SIZES,
        intermediate_size=4096,
    )


def _qwen3_next() -> Any:
    from transformers import Qwen3NextConfig

    heads = {"linear_num_key_heads": 8, "linear_num_value_heads": 16, "head_dim": 64}
    return Qwen3NextConfig(num_hidden_layers=12, num_experts=0, **heads, **SIZES, **GROUPED)


def _lfm2() -> Any:
    from transformers import Lfm2Config

    kinds = ["full_attention" if layer in (5, 10) else "conv" for layer in range(12)]
    return Lfm2Config(num_hidden_layers=12, layer_types=kinds, **SIZES, **GROUPED)


def _jamba() -> Any:
    from transformers import JambaConfig

    period = {"attn_layer_period": 5, "attn_layer_offset": 0}
    return JambaConfig(num_hidden_layers=12, num_experts=1, **period, **SIZES, **GROUPED)


FAMILIES: dict[str, Callable[[], Any]] = {
    "nemotron_h": _nemotron_h,
    "granitemoehybrid": _granitemoehybrid,
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "zamba2": _zamba2,
    "qwen3_next": _qwen3_next,
    "lfm2": _lfm2,
    "jamba": _jamba,
}


def measure(config: Any, repetitions: int, prompt: int) -> dict[str, Any]:
    """Medians of the ratios by kept tokens, and the forward's own median in milliseconds."""
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    _as_trained(model)
    spec = spec_from_config(config)
    fast = Target(model, None, spec, Path())
    replay = Target(model, None, dataclasses.replace(spec, model_type="unknown to the project"), Path())
    ids = torch.randint(0, spec.vocab_size, (1, prompt + BLOCK))
    prefix, block = ids[:, :prompt], ids[:, prompt:]
    positions = torch.arange(prompt, prompt + BLOCK)[None]
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
    fast_state, _ = fast.prefill(prefix[0].tolist())
    replay_state, _ = replay.prefill(prefix[0].tolist())

    @torch.no_grad()
    def forward(grown: Any) -> None:
        model(input_ids=block, past_key_values=grown, position_ids=positions, use_cache=True)

    def verify_and_commit(target: Target, state: Any, kept: int) -> None:
        target.verify(state, block)
        target.commit(state, [kept])

    forwards, blocks, replays = [], [], []
    ours: dict[int, list[float]] = {kept: [] for kept in KEPT}
    for _ in range(repetitions + 1):
        forwards.append(_timed(forward, copy.deepcopy(cache)))
        blocks.append(_timed(fast.verify, fast_state.select([0]), block))
        for kept in KEPT:
            ours[kept].append(_timed(verify_and_commit, fast, fast_state.select([0]), kept))
        replays.append(_timed(verify_and_commit, replay, replay_state.select([0]), REPLAYED))
    by_kept = {kept: _ratio(times, forwards) for kept, times in ours.items()}
    return {
        "layout": spec.layout,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_ms": 1000 * statistics.median(forwards[1:]),
        "block": _ratio(blocks, forwards),
        "keep": by_kept,
        "worst": max(by_kept.values()),
        "replay": _ratio(replays, forwards),
        "worst_to_block": max(_ratio(times, blocks) for times in ours.values()),
    }


def _as_trained(model: Any) -> None:
    """Step sizes and decays as Mamba-2 starts its training; with transformers' own every head forgets at once."""
    for mixer in model.modules():
        if hasattr(mixer, "dt_bias"):  # not Mamba-1, whose channels start with all rates there are
            heads = mixer.A_log.numel()
            step = torch.exp(torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)))
            mixer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # its softplus is the step
            mixer.A_log.copy_(torch.empty(heads).uniform_(1, 16).log())


def _ratio(times: list[float], to: list[float]) -> float:
    """Median of the ratios within a repetition; the first repetition only warms up."""
    return statistics.median(time / other for time, other in zip(times[1:], to[1:], strict=True))


def _timed(work: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--repetitions", type=int, default=15, help="per family and kept length (default 15)")
    parser.add_argument("--prompt", type=int, default=256, help="committed tokens before the block (default 256)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of " + ", ".join(FAMILIES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"threads": options.threads, "prompt": options.prompt, "block": BLOCK, "families": {}}
    if not options.json:
        kept = "".join(f"{f'keep {count}':>8}" for count in KEPT)
        print(f"{'family':<17}{'layout':<14}{'forward':>10}{'block':>8}{kept}{'replay':>8}{'to block':>10}")
    for name in options.families.split(","):
        found = result["families"][name] = measure(FAMILIES[name](), options.repetitions, options.prompt)
        if not options.json:
            ratios = (found["block"], *found["keep"].values(), found["replay"])
            print(
                f"{name:<17}{found['layout']:<14}{found['forward_ms']:7.0f} ms"
                + "".join(f"{ratio:8.2f}" for ratio in ratios)
                + f"{found['worst_to_block']:10.2f}",
                flush=True,
            )
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
