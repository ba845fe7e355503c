"""The objective and a whole training step on one GPU: time, peak memory and share of the matrix units, by chunk.

    python benchmarks/objective_cuda.py

One sample of random hidden states, bf16; the draft has five layers of the target's size. First the objective on the GPU
is compared with the same on the CPU in fp32, on a small vocabulary.
"""

import argparse
import collections
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.training.anchors import draw_anchors
from nemotron_dspark.training.batches import Batch, collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from nemotron_dspark.training.tiling import Tiling, choose_tiling

CHUNKS = (112, 512, 1024, 2048, 4096, 8192)


class Sample:
    """Random hidden states; every token but the first fifth is an answer's."""

    def __init__(self, length: int, hidden: int, vocabulary: int, taps: int):
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(0, vocabulary, (length,), generator=generator)
        self.loss_mask = torch.arange(length) >= length // 5
        self.taps = torch.randn(length, taps * hidden, generator=generator, dtype=torch.bfloat16)
        self.last = torch.randn(length, hidden, generator=generator, dtype=torch.bfloat16)


def make(arguments: argparse.Namespace, vocabulary: int, hidden: int, layers: int) -> tuple[DSparkDraft, Batch]:
    """A draft in fp32 without embeddings on the device to come, and its batch."""
    heads = max(1, hidden // 128)
    config = DraftConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=128,
        vocab_size=vocabulary,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=8192,
        block_size=7,
        mask_token_id=1,
        target_layer_ids=(0, 1, 2, 3, 4),
        num_target_layers=8,
        num_anchors=arguments.anchors,
        markov_rank=256,
    )
    sample = Sample(arguments.length, hidden, vocabulary, 5)
    anchors = draw_anchors(sample.loss_mask, arguments.anchors, seed=0, epoch=0, sample_id=0)
    return DSparkDraft(config, attention="auto"), collate([sample], [anchors], config.block_size)


def with_embeddings(draft: DSparkDraft, device: str, dtype: torch.dtype) -> DSparkDraft:
    generator = torch.Generator().manual_seed(1)
    shape = (draft.config.vocab_size, draft.config.hidden_size)
    matrices = [torch.randn(shape, generator=generator).to(dtype) * scale for scale in (1.0, 0.03)]
    draft.set_embeddings(*matrices, dtype=dtype)
    return draft.to(device).train()


def compare(arguments: argparse.Namespace) -> None:
    """Loss and gradients on the GPU in fp32 and bf16 against those on the CPU in fp32."""
    small = argparse.Namespace(length=256, anchors=24)
    results = {}
    for name, device, dtype in (
        ("cpu fp32", "cpu", torch.float32),
        ("cuda fp32", "cuda", torch.float32),
        ("cuda bf16", "cuda", torch.bfloat16),
    ):
        draft, batch = make(small, 4096, 256, 2)
        draft = with_embeddings(draft, device, dtype)
        loss = DSparkObjective(draft, LossWeights())(batch.to(torch.device(device)))
        loss.value.backward()
        gradients = torch.cat(
            [p.grad.float().flatten().cpu() for p in draft.trainable_parameters().values() if p.grad is not None]
        )
        results[name] = float(loss.value), gradients
    expected, reference = results["cpu fp32"]
    for name in ("cuda fp32", "cuda bf16"):
        value, gradients = results[name]
        print(
            f"{name}: loss {value:.6f} (CPU {expected:.6f}), gradients off by "
            f"{float((gradients - reference).norm() / reference.norm()):.1e} of their norm"
        )


def measure(run, repetitions: int) -> tuple[float, float]:
    """Median seconds and peak bytes."""
    seconds = []
    for _ in range(repetitions + 2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:]), torch.cuda.max_memory_allocated()


def synchronisations(run: Callable[[], object]) -> str:
    """Where ``run`` waits for the GPU, and how often, as torch reports it."""
    run()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    root = Path(__file__).resolve().parents[1]
    places: collections.Counter[str] = collections.Counter()
    for warning in found:
        path = Path(warning.filename)
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        places[f"{name}:{warning.lineno}"] += 1
    return ", ".join(f"{place} x {count}" for place, count in places.most_common()) or "none"


def decoding() -> str:
    """The same for rounds of speculative decoding on a tiny hybrid target, four requests together."""
    from nemotron_dspark.config import DraftSection
    from nemotron_dspark.decoding.decoder import Decoder
    from nemotron_dspark.decoding.sampling import Sampling
    from nemotron_dspark.drafts.config import build_draft_config
    from nemotron_dspark.recipe import tiny
    from nemotron_dspark.targets import Target

    with tempfile.TemporaryDirectory() as folder:
        target = Target.load(
            str(tiny.random_target(Path(folder) / "t", pattern="M*-M")), dtype="float32", device="cuda"
        )
    section = DraftSection(num_layers=1, taps=[0, 1], markov_rank=16)
    draft = DSparkDraft(build_draft_config(target.spec, section, mask_token_id=5)[0])
    draft.set_embeddings(target.model.get_input_embeddings().weight.cpu(), target.head.weight.cpu())
    draft = draft.to("cuda").eval()
    decoder = Decoder(target, draft)
    rows = [decoder.start(list(range(40, 60 + row)), Sampling(temperature=0.0, max_new_tokens=200)) for row in range(4)]
    return synchronisations(lambda: decoder.step(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--anchors", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    compare(arguments)
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / measure(lambda: left @ left, 10)[0]
    draft, batch = make(arguments, arguments.vocabulary, arguments.hidden, 5)
    draft, batch = with_embeddings(draft, "cuda", torch.bfloat16), batch.to(torch.device("cuda"))
    chosen = choose_tiling(draft.lm_head.weight)
    with torch.no_grad():
        hidden = draft(batch.input_ids, batch.taps, batch.anchors, batch.valid)
    slots = int(batch.counted.sum())
    rows = slots + len(batch.slots.positions)
    operations = 2 * arguments.vocabulary * (arguments.hidden * (rows + slots) + 256 * 3 * slots)
    print(f"{slots} slots, {rows - slots} positions; bf16 product of 8192: {peak / 1e12:.0f} TFLOP/s; chosen: {chosen}")
    print("| rows a chunk | objective ms | share of the product's speed | step ms | peak GB of a step |")
    print("|---|---|---|---|---|")
    for chunk in (*CHUNKS, chosen.chunk):
        objective = DSparkObjective(draft, LossWeights(), Tiling(chunk, chosen.group))

        def alone(objective=objective):
            draft.zero_grad(set_to_none=True)
            objective.loss(hidden.detach().requires_grad_(), batch).total.backward()

        def step(objective=objective):
            draft.zero_grad(set_to_none=True)
            objective(batch).total.backward()

        seconds, _ = measure(alone, arguments.repetitions)
        whole, memory = measure(step, arguments.repetitions)
        share = operations / seconds / peak
        print(f"| {chunk} | {1e3 * seconds:.1f} | {share:.0%} | {1e3 * whole:.1f} | {memory / 1e9:.1f} |")
    print(f"host synchronisations of a micro-batch's forward and backward: {synchronisations(step)}")
    print(f"of a round of decoding: {decoding()}")


if __name__ == "__main__":
    main()
