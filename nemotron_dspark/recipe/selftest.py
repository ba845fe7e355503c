"""Every stage once on tiny random models: no GPU, no network, under a minute.

Random weights say nothing about acceptance; they test plumbing and exactness. Each check returns a sentence on what it
saw and raises when it saw something else.
"""

import contextlib
import dataclasses
import json
import struct
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from nemotron_dspark.cache.build import BuildProgress, build_cache
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import verify
from nemotron_dspark.chat.format import Conversation, Message
from nemotron_dspark.chat.mask import tokenise
from nemotron_dspark.chat.mask_token import choose_mask_token
from nemotron_dspark.config import CacheConfig, DataConfig, DraftSection, RunConfig, ServeConfig, TrainConfig
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import CheckError, InputError
from nemotron_dspark.files import json_line, sha256
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.mamba2 import Mamba2States
from nemotron_dspark.targets.proofs import prove, run_proofs
from nemotron_dspark.training.loop import Watcher
from nemotron_dspark.training.metrics import StepMetrics
from nemotron_dspark.training.run import train_run

TAPS = (1, 4)
_WORDS = ("state", "block", "draft", "token", "verify", "accept", "commit", "layer", "anchor", "context", "shard")
_CONFIG = RunConfig(
    draft=DraftSection(num_layers=1, block_size=4, taps=list(TAPS), markov_rank=16),
    data=DataConfig(max_length=96, min_loss_tokens=4),
    cache=CacheConfig(shard_bytes=40_000, batch_tokens=256),
    train=TrainConfig(
        lr=3e-3, local_batch_size=2, global_batch_size=4, num_anchors=8, max_steps=8, log_every=2, checkpoint_every=3
    ),
)


@dataclasses.dataclass(frozen=True)
class CheckResult:
    name: str
    passed: bool
    detail: str
    seconds: float


def run_selftest(folder: Path | None = None) -> Iterator[CheckResult]:
    """Run every check, one result after the other; later checks use what earlier ones made."""
    torch.set_num_threads(1)  # tiny tensors; more threads only wait for each other
    with tempfile.TemporaryDirectory(prefix="nds-selftest-") as temporary:
        bench = _Bench(Path(folder or temporary))
        for name, check in _CHECKS.items():
            began = time.perf_counter()
            try:
                passed, detail = True, check(bench)
            except Exception as error:  # a check may fail in any way, and the next ones still tell something
                passed, detail = False, f"{type(error).__name__}: {error}"
            yield CheckResult(name, passed, detail, time.perf_counter() - began)


class _Bench:
    """What the checks share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.target: Target
        self.conversations = folder / "conversations.jsonl"

    @property
    def name(self) -> str:
        return str(self.folder / "target")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise CheckError(f"{what}.", "Report it with the output of `nds selftest --json`.")


def _checkpoint(bench: _Bench) -> str:
    tiny.random_target(Path(bench.name), pattern="ME*-M*-M")
    bench.target = Target.load(bench.name)
    return f"layers {bench.target.spec.layout}, {bench.target.spec.vocab_size} tokens"


def _proofs(bench: _Bench) -> str:
    results = prove(bench.target, TAPS)
    return f"{', '.join(result.name for result in results)}; worst error {max(r.error for r in results):.0e}"


def _proofs_fail(bench: _Bench) -> str:
    """The two faults that cost people most: a state that is not rolled back, taps one layer off."""

    def keep_everything(self: Mamba2States, kept: list[int]) -> None:
        block = next(iter(self._records.values())).dt.shape[1]
        commit(self, [block] * len(kept))

    def one_off(self: Target, taps: tuple[int, ...]):
        hooks = tapped(self, [tap + 1 for tap in taps])
        hooks._modules = {tap - 1: module for tap, module in hooks._modules.items()}
        return hooks

    commit, tapped = Mamba2States.commit, Target._tapped
    found = []
    for owner, name, wrong in ((Mamba2States, "commit", keep_everything), (Target, "_tapped", one_off)):
        with mock.patch.object(owner, name, wrong):
            failed = [result.name for result in run_proofs(bench.target, TAPS) if not result.passed]
        _require(len(failed) == 1, f"A deliberate fault in {name} failed {failed or 'nothing'}")
        found += failed
    return f"a state kept after rejection fails {found[0]!r}, shifted taps fail {found[1]!r}"


def _families(bench: _Bench) -> str:
    for family in ("llama", "qwen3"):
        prove(Target.load(str(tiny.random_target(bench.folder / family, family))), (0, 2))
    return "llama and qwen3 pass the same proofs"


def _mask(bench: _Bench) -> str:
    messages = (Message("user", "Is it exact?"), Message("assistant", "Yes, it is."), Message("user", "Sure?"))
    conversation = Conversation((*messages, Message("assistant", "Quite sure.")), "selftest")
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


def _build(bench: _Bench, folder: Path, progress: Callable[[BuildProgress], None] | None = None):
    return build_cache(
        bench.target,
        bench.conversations,
        folder,
        taps=TAPS,
        data=_CONFIG.data,
        cache=_CONFIG.cache,
        mask_token_id=choose_mask_token(bench.target.tokenizer, bench.target.spec).id,
        progress=progress,
    )


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
    for offset, expected in ((at_taps, captured.taps), (at_last, captured.last)):
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
    names = sorted(path.name for path in (bench.folder / "cache").iterdir() if path.suffix in (".bin", ".idx"))
    for name in names:
        same = sha256(folder / name) == sha256(bench.folder / "cache" / name)
        _require(same, f"{name} of an interrupted build differs from the undisturbed one")
    return f"interrupted after {report.reused_samples} samples and resumed: {len(names)} files byte-equal"


def _mask_token_in_data(bench: _Bench) -> str:
    try:
        build_cache(
            bench.target,
            bench.conversations,
            bench.folder / "refused",
            taps=TAPS,
            data=_CONFIG.data,
            cache=_CONFIG.cache,
            mask_token_id=int(TargetCache(bench.folder / "cache")[0].input_ids[0]),
        )
    except InputError as error:
        _require("mask token" in error.what, f"Data with the mask token is refused for a wrong reason: {error}")
        return "refused, with the file and the line"
    raise CheckError("Data that uses the draft's mask token was accepted.", "Report it.")


def _train(bench: _Bench) -> str:
    report = train_run(bench.name, bench.folder / "cache", bench.folder / "run", _CONFIG)
    losses = [json.loads(line)["loss"] for line in (bench.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    _require(losses[-1] < losses[0], f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"{report.steps} steps, loss {losses[0]:.3f} → {losses[-1]:.3f}"


def _train_resume(bench: _Bench) -> str:
    class Interrupted(Exception):
        pass

    class Stop(Watcher):
        def metrics(self, metrics: StepMetrics) -> None:
            if metrics.step >= 4:
                raise Interrupted

    run = bench.folder / "resumed-run"
    with contextlib.suppress(Interrupted):
        train_run(bench.name, bench.folder / "cache", run, _CONFIG, watcher=Stop())
    report = train_run(bench.name, bench.folder / "cache", run, _CONFIG)
    _require(report.resumed_from == 3, f"Training went on from step {report.resumed_from}, not 3")
    whole, resumed = (folder / "draft" / "model.safetensors" for folder in (bench.folder / "run", run))
    _require(sha256(whole) == sha256(resumed), "A resumed run ends in other weights than an undisturbed one")
    return "stopped after step 4, resumed from 3: the same weights, bit for bit"


def _prompts(bench: _Bench, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(32, bench.target.spec.vocab_size, (4 + n,), generator=generator).tolist() for n in range(count)
    ]


def _lossless(bench: _Bench) -> str:
    draft = load_draft(bench.folder / "run" / "draft", bench.target)
    plain, fast = Decoder(bench.target), Decoder(bench.target, draft)
    prompts, rounds, tokens = _prompts(bench, 12), 0, 0
    for prompt in prompts:
        sampling = Sampling(temperature=0.0, max_new_tokens=24)
        slow, quick = plain.generate(prompt, sampling), fast.generate(prompt, sampling)
        _require(slow.tokens == quick.tokens, "Greedy speculative output differs from plain output")
        rounds, tokens = rounds + quick.rounds, tokens + sum(quick.accepted)
    return f"{len(prompts)}/{len(prompts)} prompts identical at {tokens / rounds:.2f} tokens a round"


def _sampled(bench: _Bench) -> str:
    draft = load_draft(bench.folder / "run" / "draft", bench.target)
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
    other = Target.load(str(tiny.random_target(bench.folder / "other", pattern="M*-M", hidden_size=32)))
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
        from nemotron_dspark.serving.background import ServerThread

        draft = load_draft(bench.folder / "run" / "draft", bench.target)
        with ServerThread(bench.target, draft, ServeConfig(port=0)) as server:
            body = {"model": server.model_id, "prompt": "def advance", "max_tokens": 16, "temperature": 0}
            request = urllib.request.Request(
                f"{server.base_url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as reply:
                usage = json.load(reply)["usage"]
    except ImportError as error:
        return f"skipped: {error.name} is not installed (extra serve)"
    _require(1 <= usage["completion_tokens"] <= 16, f"The server counted {usage['completion_tokens']} tokens")
    return f"{usage['completion_tokens']} tokens over HTTP"


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
}
