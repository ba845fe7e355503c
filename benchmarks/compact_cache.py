"""What a compact cache costs in accepted length, and what it saves.

    python benchmarks/compact_cache.py --demo runs/demo --out runs/compact [--steps 300] [--seeds 1,2,3] [--json]

``--demo`` is the folder of a finished `nds demo`: its target, and the cache its draft was trained on. Drafts are
trained on that cache as it is and on what every way to quantise it leaves of it, with the demo's settings and the same
steps, weights, order and anchors for one seed. Each is then measured on conversations with prompts from modules that
neither target nor draft has seen, with exact hidden states, as serving gives them: the expected accepted length of
every block that can start, over all of them. A ratio is that of two drafts of one seed.

Quantised states go through the code of the format; ways that are not formats (a piece taken out) are defined here.
Every draft leaves a file in ``--out``, so a run that was stopped goes on.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from nemotron_dspark import files
from nemotron_dspark.cache import quantise
from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.cache.deepspec_layout import bytes_per_token
from nemotron_dspark.cache.quantise import Int4
from nemotron_dspark.cache.reader import Sample, TargetCache
from nemotron_dspark.chat.mask import predicts_loss_token
from nemotron_dspark.chat.mask_token import choose_mask_token
from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.recipe.corpus import HELD_OUT, write_prompts
from nemotron_dspark.recipe.demo import Budget, Progress, answer_prompts
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import Checkpoint, Target
from nemotron_dspark.targets.weights import read_embedding_and_head
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from nemotron_dspark.training.trainer import Trainer


class Unrotated(Int4):
    """int4 without its rotation."""

    def _rotate(self, groups: Tensor) -> Tensor:
        return groups

    def _back(self) -> Tensor:
        return torch.eye(self.group)


Way = tuple[type[Int4] | None, type[Int4] | None]  # taps, last hidden states; None: exact
WAYS: dict[str, Way] = {
    "exact": (None, None),
    "int4": (Int4, Int4),
    "int4 without rotation": (Unrotated, Unrotated),
}


class InMemory:
    """The samples of a cache, as they come back from a compact one."""

    def __init__(self, cache: TargetCache, way: Way):
        self.lengths = cache.lengths
        taps, last = (_roundtrip(kind, cache.hidden_size) for kind in way)
        self._samples = []
        for sample in cache:
            used = predicts_loss_token(sample.loss_mask).nonzero()[:, 0]
            kept = torch.zeros_like(sample.last)
            kept[used] = last(sample.last[used])
            states = taps(sample.taps.view(-1, cache.hidden_size)).view_as(sample.taps)
            self._samples.append(dataclasses.replace(sample, taps=states, last=kept))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Sample:
        return self._samples[number]


def _roundtrip(kind: type[Int4] | None, width: int) -> Callable[[Tensor], Tensor]:
    if kind is None:
        return lambda states: states
    quantiser = kind(width)
    names = [part.name for part in quantiser.parts]
    return lambda states: quantiser.decode(dict(zip(names, quantiser.encode(states), strict=True)))


def held_out(demo: Path, out: Path, config: RunConfig, prompts: int) -> TargetCache:
    """An exact cache of the target's answers to prompts that no training has seen; made once."""
    folder = out / "held_out"
    target = Target.of(config.target)
    if not (folder / "conversations.jsonl").is_file():
        write_prompts(folder / "prompts.jsonl", HELD_OUT, prompts, 2)
        answer_prompts(target, folder, config, Budget(train_prompts=prompts), Progress())
    build_cache(
        target,
        folder / "conversations.jsonl",
        folder / "cache",
        taps=TargetCache(demo / "cache").taps,
        data=config.data,
        cache=config.cache,
    )
    return TargetCache(folder / "cache")


def accepted_length(draft: DSparkDraft, cache: InMemory, weights: LossWeights) -> tuple[float, int]:
    """Expected tokens of a round, averaged over every block of ``cache`` that can start; and their number."""
    objective = DSparkObjective(draft.eval(), weights)
    total, blocks = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(cache), 16):
            samples = [cache[number] for number in range(first, min(first + 16, len(cache)))]
            anchors = [(sample.loss_mask[:-1] & sample.loss_mask[1:]).nonzero()[:, 0] for sample in samples]
            batch = collate(samples, anchors, draft.config.block_size)
            loss = objective(batch)
            total, blocks = total + loss.tau.item(), blocks + int(loss.blocks)
    return total / blocks, blocks


def train_and_measure(
    demo: Path, config: RunConfig, training: InMemory, held: InMemory, taps: tuple[int, ...], seed: int
) -> dict:
    folder = demo / "target"
    checkpoint = Checkpoint.find(folder)
    spec = checkpoint.read_spec()
    mask = choose_mask_token(checkpoint.load_tokenizer(), spec).id
    settings = config.train.model_copy(update={"seed": seed})
    section = config.draft.model_copy(update={"taps": list(taps)})
    draft_config, _ = build_draft_config(spec, section, mask_token_id=mask, num_anchors=settings.num_anchors)
    draft = DSparkDraft(draft_config, seed=seed)
    embeddings = read_embedding_and_head(folder, spec)
    draft.set_embeddings(embeddings.embedding, embeddings.head)
    with tempfile.TemporaryDirectory() as run:
        Trainer(training, draft, settings, Path(run)).run()
    tau, blocks = accepted_length(draft, held, LossWeights.of(settings, draft))
    return {"accepted_length": tau, "blocks": blocks}


def size_ratio(cache: TargetCache, way: Way) -> float:
    """Bytes of a token beside those of DeepSpec's format, for the lengths and loss masks of ``cache``."""
    tokens, width = int(cache.lengths.sum()), cache.hidden_size
    whole = bytes_per_token(len(cache.taps), width)
    taps, last = (2 * width if kind is None else kind(width).state_bytes for kind in way)
    kept = sum(int(predicts_loss_token(cache.loss_mask(number)).sum()) for number in range(len(cache)))
    return (5 + 16 * len(cache) / tokens + len(cache.taps) * taps + last * kept / tokens) / whole


def error(cache: TargetCache, way: Way, samples: int = 100) -> tuple[float, float]:
    """Of taps and of last hidden states: the error's size relative to the state's, averaged over states."""
    found = []
    for kind, name in zip(way, ("taps", "last"), strict=True):
        given = torch.cat([getattr(cache[number], name) for number in range(samples)]).view(-1, cache.hidden_size)
        wrong = (_roundtrip(kind, cache.hidden_size)(given).float() - given.float()).norm(dim=1)
        found.append((wrong / given.float().norm(dim=1)).mean().item())
    return found[0], found[1]


def speeds(width: int = 4096, taps: int = 5, share: float = 0.4, tokens: int = 256) -> dict[str, float]:
    """Tokens a second of processor time, for a target of Nemotron-H-8B's shape of which ``share`` carries loss."""
    states = torch.randn(tokens, (taps + 1) * width).bfloat16().view(-1, width)[: int(tokens * (taps + share))]
    quantiser = Int4(width)
    parts = dict(zip([part.name for part in quantiser.parts], quantiser.encode(states), strict=True))
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: quantiser.encode(states),
        "decode": lambda: quantiser.decode(parts),
    }
    found = {}
    for label, call in calls.items():
        best = float("inf")
        for _ in range(5):
            began = time.thread_time()
            call()
            best = min(best, time.thread_time() - began)
        found[label] = tokens / best
    return found


def huge_channels() -> dict[str, float]:
    """Of states with a few huge channels: squared error of a channel relative to its variance, the median channel's."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(0.7 * torch.randn(2, 2048, generator=generator))
    states = torch.randn(512, 2048, generator=generator) * sizes[0] + torch.randn(2048, generator=generator) * sizes[1]
    states[:, [5, 700, 1400]] = torch.tensor([60.0, -100, 30]) + 5 * torch.randn(512, 3, generator=generator)
    states[:4, 33] = 3000
    states = states.bfloat16()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "4 bits, no rotation": lambda states: _sketch(states, 1),
        "4 bits, rotated over all channels": lambda states: _sketch(states, 2048),
        "4 bits, rotated inside groups of 128": lambda states: _sketch(states, 128),
        "int4: and the largest of each group apart": _roundtrip(Int4, 2048),
    }
    found = {}
    for name, way in ways.items():
        wrong = (way(states).float() - states.float()).square().mean(dim=0)
        found[name] = (wrong / states.float().var(dim=0)).median().item()
    return found


def _sketch(states: Tensor, rotated: int) -> Tensor:
    """int4 with nothing kept apart, rotated over that many channels at a time."""
    turn = quantise._sums(rotated) * rotated**-0.5
    signs = quantise._signs(states.shape[1])
    groups = ((states.float() * signs).view(-1, rotated) @ turn).view(-1, 128)
    scales = groups.abs().amax(dim=1, keepdim=True) * (quantise._STRETCH / quantise._LEVELS[-1])
    levels = torch.from_numpy(quantise._levels())
    nearest = torch.bucketize(groups / scales, (levels[1:] + levels[:-1]) / 2)
    return ((levels[nearest] * scales).view(-1, rotated) @ turn).view_as(states) * signs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder of a finished `nds demo`; without it only speeds and errors")
    parser.add_argument("--out", type=Path, default=Path("runs/compact"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them, separated by commas (and no space)")
    parser.add_argument("--prompts", type=int, default=600, help="held-out ones")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    given = parser.parse_args()
    shell.quiet_libraries()
    torch.set_num_threads(1)
    report = {"speeds": speeds(), "huge_channels": huge_channels()}
    if given.demo:
        report["ways"] = compare(given)
    if given.json:
        print(json.dumps(report))
        return 0
    print("| encode, tokens/s | decode, tokens/s |\n|---|---|")
    print("| {encode:,.0f} | {decode:,.0f} |".format(**report["speeds"]))
    print("\n| huge channels | error of the median channel |\n|---|---|")
    for name, value in report["huge_channels"].items():
        print(f"| {name} | {value:.4f} |")
    if given.demo:
        print("\n| | bytes | error of taps, last | accepted length | of exact | spread |\n|---|---|---|---|---|---|")
        for row in report["ways"]:
            errors = " ".join(f"{value:.1%}" for value in row["error"])
            lengths = " ".join(f"{value:.3f}" for value in row["accepted_length"])
            print(
                f"| {row['way']} | {row['size_ratio']:.3f} | {errors} | {lengths} | {row['ratio']:.2%} | "
                f"{min(row['ratios']):.2%} to {max(row['ratios']):.2%} |"
            )
    return 0


def compare(given: argparse.Namespace) -> list[dict]:
    """One row a way; drafts are trained in the order of seeds, so that an interrupted run has whole comparisons."""
    demo, seeds, ways = given.demo, [int(seed) for seed in given.seeds.split(",")], given.ways.split(",")
    config = load_config(file=resource_folder("configs") / "demo.yaml", target=str(demo / "target"))
    settings = config.train.model_copy(update={"max_steps": given.steps, "checkpoint_every": given.steps})
    config = config.model_copy(update={"train": settings})
    cache = TargetCache(demo / "cache")
    held = held_out(demo, given.out, config, given.prompts)
    exact = InMemory(held, WAYS["exact"])
    for seed in seeds:
        for way in ways:
            note = _note(given.out, way, seed, given.steps)
            if not note.is_file():
                training = InMemory(cache, WAYS[way])
                files.write_json(note, train_and_measure(demo, config, training, exact, cache.taps, seed))
                shell.err.print(f"{way}, seed {seed}: {files.read_json(note)['accepted_length']:.4f}")
    rows = []
    for way in ways:
        found = [files.read_json(_note(given.out, way, seed, given.steps))["accepted_length"] for seed in seeds]
        base = [files.read_json(_note(given.out, "exact", seed, given.steps))["accepted_length"] for seed in seeds]
        ratios = [one / other for one, other in zip(found, base, strict=True)]
        rows.append(
            {
                "way": way,
                "size_ratio": size_ratio(cache, WAYS[way]),
                "error": error(held, WAYS[way]),
                "accepted_length": found,
                "ratios": ratios,
                "ratio": statistics.fmean(ratios),
            }
        )
    return rows


def _note(out: Path, way: str, seed: int, steps: int) -> Path:
    return out / f"{way.replace(', ', '+').replace(' ', '-')}-seed{seed}-steps{steps}.json"


if __name__ == "__main__":
    sys.exit(main())
