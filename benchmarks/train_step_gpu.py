"""The objective and a whole training step on one GPU: are they right, how fast, what do other chunks change.

    python benchmarks/train_step_gpu.py [--peak 989] [--compile]

- right: loss and gradients in fp32 and bf16 on the GPU against whole distributions in fp64 on the CPU.
- objective: forward and backward from given hidden states at Nemotron-H-8B's shape (vocabulary 131 072, hidden 4096,
  Markov rank 256; 512 anchors of 7 slots in 2048 tokens), for several chunks: ms, share of the bf16 matrix products'
  peak (--peak, TFLOP/s; an H100 SXM has 989), MB above what was there before.
- step: the whole draft (5 layers) with it, in fp32 parameters and bf16 arithmetic.
- synchronisations: places in a step where the host waits for the GPU.

`--device cpu` is a small trial of the script itself.
"""

import argparse
import dataclasses
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.training import objective as objectives
from nemotron_dspark.training.anchors import draw_anchors
from nemotron_dspark.training.batches import Batch, collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from nemotron_dspark.training.tiling import Tiling, choose_tiling, objective_bytes

SMALL = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 8192, "num_hidden_layers": 2, "markov_rank": 64}
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 131072,
    "num_hidden_layers": 5,
    "markov_rank": 256,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of dense bf16 products")
    parser.add_argument("--compile", action="store_true", help="also with the formula compiled into one kernel")
    parser.add_argument("--device", type=torch.device, default="cuda")
    asked = parser.parse_args()
    name = torch.cuda.get_device_name() if asked.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    faults = check(asked.device)
    measure(asked.device, asked.peak, asked.compile)
    return 1 if faults else 0


def config(hidden_size: int, **shape: int) -> DraftConfig:
    return DraftConfig(
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=max(1, hidden_size // 512),
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        block_size=7,
        mask_token_id=31,
        target_layer_ids=(1, 3, 5, 7, 9),
        num_target_layers=12,
        num_anchors=512,
        **shape,
    )


def new_draft(shape: dict[str, int], device: torch.device) -> DSparkDraft:
    """fp32 parameters on ``device``, embedding and head of a scale that makes logits of deviation 2."""
    draft = DSparkDraft(config(**shape), seed=None).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.02)
        hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
        embedding = torch.randn(vocabulary, hidden, device=device) * 2 / hidden**0.5
    draft.set_embeddings(embedding, embedding)
    return draft.train()


def new_batch(draft: DSparkDraft, length: int, anchors: int, dtype: torch.dtype) -> Batch:
    shape, generator = draft.config, torch.Generator().manual_seed(1)
    sample = types.SimpleNamespace(
        input_ids=torch.randint(32, shape.vocab_size, (length,), generator=generator),
        loss_mask=torch.arange(length) >= length // 8,
        taps=torch.randn(length, 5 * shape.hidden_size, generator=generator).to(dtype),
        last=torch.randn(length, shape.hidden_size, generator=generator).to(dtype),
    )
    drawn = draw_anchors(sample.loss_mask, anchors, seed=0, epoch=0, sample_id=0)
    return collate([sample], [drawn], shape.block_size)


def gradients(draft: DSparkDraft, hidden: Tensor, loss: Tensor) -> dict[str, Tensor]:
    wanted = {"hidden": hidden, "markov_w2": draft.markov_head.markov_w2.weight}
    found = torch.autograd.grad(loss, list(wanted.values()))
    return {"loss": loss.detach()} | dict(zip(wanted, found, strict=True))


def whole(draft: DSparkDraft, hidden: Tensor, batch: Batch) -> Tensor:
    """CE and L1 with every distribution whole, [slots, V]."""
    at = batch.slots.index
    slots = batch.anchors[..., None] + torch.arange(7)
    previous = batch.input_ids.gather(1, slots.clamp(max=batch.input_ids.shape[1] - 1).flatten(1)).view_as(slots)
    label = batch.input_ids.flatten()[batch.slots.positions + 1][batch.slots.position]
    embedded = draft.markov_head.embed(previous, hidden.dtype)
    latents = draft.markov_head.latents(hidden, embedded).flatten(0, 2)[at]
    head, markov = draft.lm_head.weight, draft.markov_head.markov_w2.weight
    logits = hidden.flatten(0, 2)[at] @ head.T + latents @ markov.T
    q = torch.softmax(batch.last.flatten(0, 1)[batch.slots.positions][batch.slots.position] @ head.T, -1)
    w = torch.exp(-(at % 7) / 4.0)
    ce = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    l1 = (torch.softmax(logits, -1) - q).abs().sum(-1)
    return (w * (0.1 * ce + 0.9 * l1)).sum()


def check(device: torch.device) -> int:
    """Compare with fp64; the number of values that are further off than their type's rounding."""
    weights = LossWeights(confidence=0.0)
    draft = new_draft(SMALL, torch.device("cpu")).double()
    batch = new_batch(draft, 256, 64, torch.float64)
    hidden = torch.randn(1, batch.anchors.shape[1], 7, 256, dtype=torch.float64, requires_grad=True)
    expected = gradients(draft, hidden, whole(draft, hidden, batch))
    faults = 0
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        for tiling in (Tiling(64, 8), Tiling(2048, 128)):
            on_gpu = DSparkDraft(draft.config, seed=None).to_empty(device=device)
            on_gpu.load_state_dict({name: tensor.float() for name, tensor in draft.state_dict().items()}, assign=False)
            on_gpu.set_embeddings(draft.embed_tokens.weight.float(), draft.lm_head.weight.float(), dtype)
            moved = dataclasses.replace(batch, taps=batch.taps.to(dtype), last=batch.last.to(dtype)).to(device)
            given = hidden.detach().to(device, dtype).requires_grad_()
            found = gradients(on_gpu, given, DSparkObjective(on_gpu, weights, tiling).loss(given, moved).total)
            errors = {
                name: float((found[name].double().cpu() - value).norm() / value.norm())
                for name, value in expected.items()
            }
            bad = [name for name, error in errors.items() if not error < most]
            faults += len(bad)
            text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            print(f"right {str(dtype)[6:]:<9} chunk {tiling.chunk:>5}: {text}", "WRONG" if bad else "", flush=True)
    return faults


def measure(device: torch.device, peak: float, compiled: bool) -> None:
    gpu = device.type == "cuda"
    shape, length, anchors = (LARGE, 2048, 512) if gpu else (SMALL, 128, 16)
    draft = new_draft(shape, device)
    draft.set_embeddings(draft.embed_tokens.weight, draft.lm_head.weight, torch.bfloat16)
    batch = new_batch(draft, length, anchors, torch.bfloat16)
    batch = batch.pinned().to(device) if gpu else batch
    slots, positions = len(batch.slots.index), len(batch.slots.positions)
    hidden, rank, vocabulary = shape["hidden_size"], shape["markov_rank"], shape["vocab_size"]
    products = 2 * vocabulary * (hidden * (2 * slots + positions) + 3 * rank * slots)
    states = torch.randn(*batch.counted.shape, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    chosen = choose_tiling(draft.lm_head.weight)
    print(f"{slots} slots, {positions} positions, {products / 1e12:.1f} TFLOP of products; chosen: {chosen}")

    def line(name: str, chunk: int, group: int) -> None:
        objective = DSparkObjective(draft, LossWeights(), Tiling(chunk, group))
        seconds, megabytes = timed(lambda: objective.loss(states, batch).value.backward(), draft)
        share = products / seconds / peak / 1e12
        text = f"{1000 * seconds:7.1f} ms, {share:.2f} of peak, {megabytes:.0f} MB"
        print(f"objective {name} chunk {chunk:>5} group {group:>4}: {text}", flush=True)

    for chunk in (112, 512, 1024, 2048, 4096, 8192) if gpu else (112, 512):
        line("eager   ", chunk, chosen.group)
    for group in (max(1, chosen.group // 4), chosen.group * 4):
        line("eager   ", chosen.chunk, group)
    if compiled:
        formula = objectives.dspark_formula
        objectives.dspark_formula = torch.compile(formula, dynamic=True)
        for chunk, group in ((2048, chosen.group), (2048, 512), (4096, 4096)):
            line("compiled", chunk, group)
        objectives.dspark_formula = formula
    predicted = objective_bytes(vocabulary, hidden, rank, 2, slots, positions, gpu=gpu)
    print(f"objective_bytes says {predicted / 1e6:.0f} MB")

    objective = DSparkObjective(draft, LossWeights(), chosen)
    for kind in ("dense", "flex") if gpu else ("dense",):
        draft.attention = kind
        try:
            seconds, megabytes = timed(lambda: objective(batch).value.backward(), draft)
            print(f"step with {kind} attention: {1000 * seconds:.1f} ms, {megabytes:.0f} MB", flush=True)
        except Exception as error:  # FlexAttention needs a compiler
            print(f"step with {kind} attention: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    if not gpu:
        return
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective(batch).value.backward()
    torch.cuda.set_sync_debug_mode("default")
    places = {f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)}
    print(f"synchronisations of a step: {sorted(places) or 'none'}")


def timed(step: Callable[[], object], draft: DSparkDraft, repetitions: int = 3) -> tuple[float, float]:
    """Seconds of the fastest of some steps after a first, and MB above what was allocated before them."""
    seconds, megabytes = [], 0.0
    for _ in range(repetitions + 1):
        draft.zero_grad(set_to_none=True)
        gpu = draft.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated() if gpu else 0, time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
            megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6
        seconds.append(time.perf_counter() - started)
    draft.zero_grad(set_to_none=True)
    return min(seconds[1:]), megabytes


if __name__ == "__main__":
    sys.exit(main())
