"""Every stage once on tiny random models: no network, under a minute, on the CPU or on the device that is asked for.

Random weights say nothing about acceptance; they test plumbing and exactness. Each check returns a sentence on what it
saw and raises when it saw something else. What is equal to the bit on a CPU is equal to rounding on a GPU, whose
kernels add up in an order of their own.
"""

import contextlib
import dataclasses
import json
import struct
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from nemotron_dspark import stages
from nemotron_dspark.cache.build import BuildProgress
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import verify
from nemotron_dspark.chat.format import Conversation, Message
from nemotron_dspark.chat.mask import tokenise
from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.dspark import Draft, DSparkDraft
from nemotron_dspark.errors import CheckError, EnvironmentFault, InputError
from nemotron_dspark.files import json_line, sha256
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Captured, Target
from nemotron_dspark.targets.proofs import prove, run_proofs
from nemotron_dspark.targets.state import State
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.metrics import StepMetrics

TAPS = (1, 4)
_WORDS = ("state", "block", "draft", "token", "verify", "accept", "commit", "layer", "anchor", "context", "shard")
_SETTINGS: dict[str, dict[str, Any]] = {
    "draft": {"num_layers": 1, "block_size": 4, "taps": list(TAPS), "markov_rank": 16},
    "data": {"max_length": 96, "min_loss_tokens": 4},
    "cache": {"shard_bytes": 40_000, "batch_tokens": 256},
    "train": {
        "lr": 3e-3,
        "local_batch_size": 2,
        "global_batch_size": 4,
        "num_anchors": 8,
        "max_steps": 8,
        "log_every": 2,
        "checkpoint_every": 3,
        "precision": "fp32",
        "attention": "dense",  # FlexAttention would be compiled, which takes longer than everything else
    },
    "serve": {"port": 0},
}


@dataclasses.dataclass(frozen=True)
class CheckResult:
    name: str
    passed: bool
    detail: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class SelftestReport:
    checks: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def seconds(self) -> float:
        return sum(check.seconds for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        checks = [dataclasses.asdict(check) for check in self.checks]
        return {"passed": self.passed, "seconds": round(self.seconds, 2), "checks": checks}


def run_selftest(*, device: str = "cpu") -> Iterator[CheckResult]:
    """Run every check, one result after the other; later checks use what earlier ones made."""
    torch.set_num_threads(1)  # tiny tensors; more threads only wait for each other
    with tempfile.TemporaryDirectory(prefix="nds-selftest-") as temporary:
        bench = _Bench(Path(temporary), device)
        for name, check in _CHECKS.items():
            began = time.perf_counter()
            try:
                passed, detail = True, check(bench)
            except Exception as error:  # a check may fail in any way, and the next ones still tell something
                passed, detail = False, f"{type(error).__name__}: {error}"
            yield CheckResult(name, passed, detail, time.perf_counter() - began)


class _Bench:
    """What the checks share: a folder, a device, a tiny target."""

    def __init__(self, folder: Path, device: str):
        self.folder = folder
        self.name = str(folder / "target")
        self.device = device
        self.target: Target
        self.conversations = folder / "conversations.jsonl"

    def config(self, **changes: dict[str, Any]) -> RunConfig:
        """The settings of all checks; ``changes`` by section."""
        sections: dict[str, Any] = {
            name: {**_SETTINGS.get(name, {}), **changes.get(name, {})} for name in {*_SETTINGS, *changes}
        }
        sections["target"] = {"name": self.name, "device": self.device}
        sections["train"]["device"] = self.device
        return load_config(**sections)

    def load(self, folder: Path) -> Target:
        return Target.load(str(folder), dtype="float32", device=self.device)

    def draft(self) -> Draft:
        return load_draft(self.folder / "run" / "draft", self.target)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise CheckError(f"{what}.", "Report it with the output of `nds selftest --json`.")


def _checkpoint(bench: _Bench) -> str:
    bench.target = bench.load(tiny.random_target(Path(bench.name), pattern="ME*-M*-M"))
    return f"layers {bench.target.spec.layout}, {bench.target.spec.vocab_size} tokens, on {bench.target.device}"


def _proofs(bench: _Bench) -> str:
    results = prove(bench.target, TAPS)
    return f"{', '.join(result.name for result in results)}; worst error {max(r.error for r in results):.0e}"


class _KeepsAll(Target):
    """A target with a deliberate fault: rejected tokens stay in its state."""

    proof = "rollback"

    def commit(self, state: State, kept: Sequence[int]) -> None:
        super().commit(state, [state.block or 0] * len(kept))


class _OneOff(Target):
    """A target with a deliberate fault: each tap is the layer behind the one that is asked for."""

    proof = "taps"

    def capture(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, taps: Sequence[int]) -> Captured:
        return super().capture(input_ids, attention_mask, [tap + 1 for tap in taps])


def _proofs_fail(bench: _Bench) -> str:
    """The two faults that cost people most: a state that is not rolled back, taps one layer off."""
    found = []
    for kind in (_KeepsAll, _OneOff):
        target = bench.target
        broken = kind(target.model, target.tokenizer, target.spec, target.folder)
        failed = [result.name for result in run_proofs(broken, TAPS) if not result.passed]
        _require(failed[:1] == [kind.proof], f"The deliberate fault {kind.__name__} failed {failed or 'nothing'}")
        found += failed[:1]
    return f"a state kept after rejection fails {found[0]!r}, shifted taps fail {found[1]!r}"


def _families(bench: _Bench) -> str:
    for family in ("llama", "qwen3"):
        prove(bench.load(tiny.random_target(bench.folder / family, family)), (0, 2))
    return "llama and qwen3 pass the same proofs"


def _mask(bench: _Bench) -> str:
    messages = (Message("user", "Is it exact?"), Message("assistant", "Yes, it is."), Message("user", "Sure?"))
    conversation = Conversation((*messages, Message("assistant", "Quite sure.")))
    (found,) = tokenise(bench.target.tokenizer, conversation, max_length=96).samples
    text = bench.target.tokenizer.decode(found.input_ids[found.loss_mask.astype(bool)])
    _require(text == "Yes, it is.<|im_end|>Quite sure.<|im_end|>", f"The loss mask covers {text!r}")
    return "covers both answers with their end of turn, and nothing else"


def _write_conversations(bench: _Bench) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(24):
        answer = " ".join(generator.choice(_WORDS, size=int(generator.integers(12, 40))))
        rows.append(
            {"conversations": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": answer}]}
        )
    bench.conversations.write_text("".join(json_line(row) for row in rows) + "{broken\n")


def _build(bench: _Bench, folder: Path, on_progress: Callable[[BuildProgress], None] | None = None):
    return stages.build_cache(
        bench.config(), bench.conversations, folder, target=bench.target, on_progress=on_progress
    ).build


def _cache(bench: _Bench) -> str:
    """The first record read with nothing but `struct`, against a fresh capture."""
    _write_conversations(bench)
    folder = bench.folder / "cache"
    report = _build(bench, folder)
    _require(verify(folder).whole, "A cache just written does not verify")
    fields = struct.unpack("<QIIQQQQQ", (folder / "samples.idx").read_bytes()[: struct.calcsize("<QIIQQQQQ")])
    _, shard, length, at_ids, _, _, at_taps, at_last = fields
    content = (folder / f"shard-{shard:05d}.bin").read_bytes()
    ids = torch.tensor(np.frombuffer(content, "<i4", length, at_ids).astype(np.int64))[None]
    captured = bench.target.capture(ids, None, TAPS)
    for offset, expected in ((at_taps, captured.taps.cpu()), (at_last, captured.last.cpu())):
        stored = np.frombuffer(content, "<u2", expected.numel(), offset)
        found = torch.tensor(stored.view(np.int16)).view(torch.bfloat16).reshape(expected.shape)
        error = (found.float() - expected).abs().max() / expected.abs().max()
        _require(float(error) < 1e-2, f"Hidden states in the cache are off by {float(error):.1e}")
    return f"{report.samples} samples, {report.shards} shards, {report.skipped.total} malformed line skipped"


def _cache_resume(bench: _Bench) -> str:
    class Interrupted(Exception):
        pass

    def stop(now: BuildProgress) -> None:
        if now.stage == "capture" and now.samples >= 10:
            raise Interrupted

    folder = bench.folder / "resumed-cache"
    with contextlib.suppress(Interrupted):
        _build(bench, folder, stop)
    report = _build(bench, folder)
    _require(report.reused_samples > 0, "The resumed build began again")
    whole, resumed = TargetCache(bench.folder / "cache"), TargetCache(folder)
    _require(len(whole) == len(resumed), "The resumed cache has another number of samples")
    for at in range(len(whole)):
        left, right = whole[at], resumed[at]
        for name in ("input_ids", "loss_mask", "taps", "last"):
            same = _same(bench, getattr(left, name), getattr(right, name), 1e-2)
            _require(same, f"{name} of an interrupted build differs from the undisturbed one")
    if bench.device == "cpu":
        for path in (bench.folder / "cache").glob("s*.*"):
            if path.suffix in (".bin", ".idx"):
                _require(sha256(path) == sha256(folder / path.name), f"{path.name} of the two builds differs")
    return f"interrupted after {report.reused_samples} samples and resumed: {len(whole)} samples are the same"


def _same(bench: _Bench, left: torch.Tensor, right: torch.Tensor, tolerance: float) -> bool:
    """Equal to the bit on a CPU, to ``tolerance`` of the largest value elsewhere."""
    if bench.device == "cpu":
        return torch.equal(left, right)
    left, right = left.float(), right.float()
    return bool((left - right).abs().max() <= tolerance * left.abs().max())


def _mask_token_in_data(bench: _Bench) -> str:
    used = int(TargetCache(bench.folder / "cache")[0].input_ids[0])
    try:
        stages.build_cache(
            bench.config(draft={"mask_token_id": used}),
            bench.conversations,
            bench.folder / "refused",
            target=bench.target,
        )
    except InputError as error:
        _require("mask token" in error.what, f"Data with the mask token is refused for a wrong reason: {error}")
        return "refused, with the file and the line"
    raise CheckError("Data that uses the draft's mask token was accepted.", "Report it.")


def _train(bench: _Bench) -> str:
    report = stages.train(bench.config(), bench.folder / "run", cache=bench.folder / "cache")
    losses = [json.loads(line)["loss"] for line in (bench.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    _require(losses[-1] < losses[0], f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"{report.steps} steps, loss {losses[0]:.3f} → {losses[-1]:.3f}"


def _train_resume(bench: _Bench) -> str:
    class Interrupted(Exception):
        pass

    class Stop(Callback):
        def on_metrics(self, metrics: StepMetrics) -> None:
            if metrics.step >= 4:
                raise Interrupted

    run = bench.folder / "resumed-run"
    with contextlib.suppress(Interrupted):
        stages.train(bench.config(), run, cache=bench.folder / "cache", callbacks=[Stop()])
    report = stages.train(bench.config(), run, cache=bench.folder / "cache")
    _require(report.resumed_from == 3, f"Training went on from step {report.resumed_from}, not 3")
    whole, resumed = (load_file(folder / "draft" / "model.safetensors") for folder in (bench.folder / "run", run))
    for name, weight in whole.items():
        same = _same(bench, weight, resumed[name], 1e-3)
        _require(same, f"A resumed run ends in another {name} than an undisturbed one")
    return "stopped after step 4, resumed from 3: the same weights" + (", bit for bit" * (bench.device == "cpu"))


def _prompts(bench: _Bench, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(32, bench.target.spec.vocab_size, (4 + n,), generator=generator).tolist() for n in range(count)
    ]


def _lossless(bench: _Bench) -> str:
    draft = bench.draft()
    plain, fast = Decoder(bench.target), Decoder(bench.target, draft)
    prompts, rounds, tokens = _prompts(bench, 12), 0, 0
    for prompt in prompts:
        sampling = Sampling(temperature=0.0, max_new_tokens=24)
        slow, quick = plain.generate(prompt, sampling), fast.generate(prompt, sampling)
        _require(slow.tokens == quick.tokens, "Greedy speculative output differs from plain output")
        rounds, tokens = rounds + quick.rounds, tokens + sum(quick.accepted)
    return f"{len(prompts)}/{len(prompts)} prompts identical at {tokens / rounds:.2f} tokens a round"


def _sampled(bench: _Bench) -> str:
    draft = bench.draft()
    sampling = Sampling(temperature=1.0, seed=3, max_new_tokens=24)
    prompts = _prompts(bench, 3)
    alone = [Decoder(bench.target, draft).generate(prompt, sampling).tokens for prompt in prompts]
    decoder = Decoder(bench.target, draft)
    together = [decoder.start(prompt, sampling) for prompt in prompts]
    while any(generation.finished is None for generation in together):
        decoder.step(together)
    _require([generation.tokens for generation in together] == alone, "A seed gives another answer in company")
    return "a seed gives the same answer alone and in a batch"


def _wrong_draft(bench: _Bench) -> str:
    other = bench.load(tiny.random_target(bench.folder / "other", pattern="M*-M", hidden_size=32))
    try:
        load_draft(bench.folder / "run" / "draft", other)
    except InputError as error:
        _require("another target" in error.what, f"A draft for another target is refused for a wrong reason: {error}")
        return "refused: its hidden size differs"
    raise CheckError("A draft for another target was accepted.", "Report it.")


def _truncated(bench: _Bench) -> str:
    draft = DSparkDraft.load(bench.folder / "run" / "draft")
    folder = bench.folder / "truncated"
    draft.save(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    try:
        DSparkDraft.load(folder)
    except InputError as error:
        _require("damaged" in error.what, f"A truncated draft is refused for a wrong reason: {error}")
        return "refused as damaged"
    raise CheckError("A truncated draft was loaded.", "Report it.")


def _server(bench: _Bench) -> str:
    try:
        running = stages.serve(bench.config(), bench.draft(), target=bench.target)
    except EnvironmentFault as error:
        if "which is not installed" not in error.what:
            raise
        return f"skipped: {error.what}"
    with running as server:
        body = {"model": server.model_id, "prompt": "def advance", "max_tokens": 16, "temperature": 0}
        request = urllib.request.Request(
            f"{server.base_url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            usage = json.load(reply)["usage"]
    _require(1 <= usage["completion_tokens"] <= 16, f"The server counted {usage['completion_tokens']} tokens")
    return f"{usage['completion_tokens']} tokens over HTTP"


def _bridge(bench: _Bench) -> str:
    """DeepSpec reads the config that is written for the target, the draft and the cache."""
    from nemotron_dspark.deepspec import checkout, launch
    from nemotron_dspark.deepspec.config_file import config_for

    try:
        home = checkout.find()
    except EnvironmentFault:
        return "skipped: there is no DeepSpec checkout (`nds deepspec install`)"
    file = bench.folder / "deepspec_config.py"
    file.write_text(config_for(bench.config(draft={"taps": [1, 2, 3, 4, 5]})))
    try:
        config = launch.load_config(home, file, [])
    except EnvironmentFault as error:
        return f"skipped: {error.what}"
    built = config["train"]["trainer_cls"].draft_config(bench.target.spec, config["model"])
    for key, expected in (("block_size", 4), ("target_layer_ids", [1, 2, 3, 4, 5]), ("hidden_size", 64)):
        found = getattr(built, key)
        _require(found == expected, f"The bridge's draft config has {key} {found}, not {expected}")
    return f"DeepSpec {(home.commit or 'of unknown commit')[:7]} reads the config that is written for this target"


_CHECKS: dict[str, Callable[[_Bench], str]] = {
    "a tiny hybrid checkpoint": _checkpoint,
    "proofs pass": _proofs,
    "proofs fail when they should": _proofs_fail,
    "ordinary decoders": _families,
    "loss mask": _mask,
    "cache bytes": _cache,
    "cache resumed = undisturbed": _cache_resume,
    "mask token in the data": _mask_token_in_data,
    "training": _train,
    "training resumed = undisturbed": _train_resume,
    "greedy decoding is lossless": _lossless,
    "sampling is reproducible": _sampled,
    "a draft for another target": _wrong_draft,
    "a truncated draft": _truncated,
    "server": _server,
    "bridge to DeepSpec": _bridge,
}
