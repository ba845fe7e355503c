"""Measure what a round costs here: drafting and verifying, by requests and by tokens of each.

Every round is a real one of a decoder's parts (draft, verify, commit, read what was verified) behind a context of
random tokens, in turns over all numbers of requests and lengths, so that whatever else the machine does slows all
alike. Given are medians, and quartiles as their spread.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from nemotron_dspark import files
from nemotron_dspark.drafts.costs import FILE, CostTable
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.drafts.layers import DraftContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation import picture
from nemotron_dspark.memory import available_memory
from nemotron_dspark.targets import State, Target

ROWS = (1, 2, 4, 8, 16, 32)
CONTEXT = 512
PICTURE = "profile.png"
SGLANG, TENSORRT_LLM = "sglang_cost_table.json", "tensorrt_llm_cost_table.json"
_FEWEST, _MOST = 3, 15  # times that each round is measured
_MEMORY_SHARE = 0.6  # of the free memory that all requests together may take

Progress = Callable[[str, int, int], None]
Cell = tuple[int, int]  # requests, tokens drafted of each


@dataclasses.dataclass(frozen=True)
class Profile:
    """A cost table and what it was measured on."""

    target: str
    draft: str  # its folder; empty without one
    machine: str
    threads: int  # of the processor
    dtype: str  # of the target's weights
    context: int  # tokens behind which a block was verified, at first
    repeats: int  # of every round
    costs: CostTable
    verify_quartiles: tuple[tuple[tuple[float, float], ...], ...]  # [rows][γ + 1]
    draft_quartiles: tuple[tuple[tuple[float, float], ...], ...]
    left_out: str | None = None  # why some numbers of requests were not measured

    def to_json(self) -> dict[str, Any]:
        """The contents of ``profile.json``; seconds, by requests and then by drafted tokens from 0 to γ."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "costs"}
        table = {"rows": self.costs.rows, "verify_seconds": self.costs.verify, "draft_seconds": self.costs.draft}
        return values | table

    def sglang(self) -> dict[str, Any]:
        """The additive table of ``--speculative-dspark-sps-table-path``; it drafts whole blocks in every step."""
        bias, alpha, tokens, theta = self._additive()
        return {
            "bias_seconds": bias,
            "bs_probes": list(self.costs.rows),
            "alpha_seconds": alpha,
            "m_probes": tokens,
            "theta_seconds": theta,
        }

    def tensorrt_llm(self) -> dict[str, Any]:
        """The table of ``confidence_sps_table_path``, in milliseconds; token counts have each request's own token."""
        bias, alpha, tokens, theta = self._additive()
        return {
            "token_counts": tokens,
            "step_time_ms": [1e3 * (bias / 2 + each) for each in theta],  # none may be 0, and only sums are read
            "fixed_overhead_ms": 1e3 * bias / 2,
            "batch_sizes": list(self.costs.rows),
            "batch_overhead_ms": [1e3 * each for each in alpha],
        }

    def save(self, folder: Path) -> list[Path]:
        """Write the three tables and, with matplotlib, the picture there; returns their paths."""
        contents = {SGLANG: self.sglang(), TENSORRT_LLM: self.tensorrt_llm(), FILE: self.to_json()}
        for name, content in contents.items():
            files.write_json(folder / name, content)
        written = [folder / name for name in contents]
        if picture.available():
            title = f"{self.target}, {self.context} tokens of context"
            written.append(picture.draw_costs(folder / PICTURE, self.costs, title))
        return written

    def _additive(self) -> tuple[float, list[float], list[int], list[float]]:
        """T(B, M) ≈ bias + α(B) + θ(M) by least squares of relative errors, M = B · (1 + drafted tokens).

        The first α and θ are 0, and neither falls.
        """
        rows = self.costs.rows
        cells = [
            (at, each * (k + 1), drafting[-1] + verifying)
            for at, (each, drafting, line) in enumerate(zip(rows, self.costs.draft, self.costs.verify, strict=True))
            for k, verifying in enumerate(line)
        ]
        tokens = sorted({count for _, count, _ in cells})
        place = {count: len(rows) + at for at, count in enumerate(tokens)}
        system = torch.zeros(len(cells) + 1, len(rows) + len(tokens), dtype=torch.float64)
        goal = torch.ones(len(cells) + 1, dtype=torch.float64)
        for line, (at, count, seconds) in enumerate(cells):
            system[line, at] = system[line, place[count]] = 1 / seconds
        system[-1, 0], goal[-1] = 1 / cells[0][2], 0.0  # one of them is free to choose
        solved = torch.linalg.lstsq(system, goal[:, None], driver="gelsd").solution[:, 0]
        alpha, theta = (part.cummax(0).values for part in (solved[: len(rows)], solved[len(rows) :]))
        bias = float(alpha[0] + theta[0])
        return bias, (alpha - alpha[0]).tolist(), tokens, (theta - theta[0]).tolist()


def measure_costs(
    target: Target,
    draft: Draft | None,
    gamma: int,
    *,
    rows: Sequence[int] = ROWS,
    context: int | None = None,
    seconds: float = 40.0,
    draft_name: str = "",
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> Profile:
    """Measure rounds of ``rows`` requests that draft 0 to ``gamma`` tokens of each, for about ``seconds``.

    Numbers of requests that the free memory does not hold are left out. ``context`` None is `CONTEXT`, or what the
    target has room for. ``clock`` tells the time: `time.thread_time`, with one thread, leaves out what others take.

    Raises:
        InputError: the target has no room for so long a context.
    """
    longest = target.spec.max_position_embeddings - (_MOST + 1) * (gamma + 1) ** 2
    if context is None:
        context = max(1, min(CONTEXT, longest))
    elif context < 1 or context > longest:
        raise InputError(
            f"A context of {context} tokens leaves no room to measure in: the target has "
            f"{target.spec.max_position_embeddings} positions.",
            f"Give --context between 1 and {longest}." if longest > 0 else "Profile a target of more positions.",
        )
    base = _TimedRequests.begin(target, draft, context, clock)
    batches, left_out = _batches(base, sorted({*rows}), gamma)
    cells = [(batch.rows, k) for batch in batches.values() for k in range(gamma + 1)]
    began = clock()
    for at, (count, k) in enumerate(cells):  # untimed: buffers, threads and kernels warm up
        batches[count].run(k)
        if progress:
            progress("warm-up", at + 1, len(cells))
    once = clock() - began
    # Every cell once a round, each time in another order: what the machine does meanwhile falls on all alike.
    repeats = min(max(int(seconds / once), _FEWEST), _MOST)
    found: dict[Cell, list[tuple[float, float]]] = {cell: [] for cell in cells}
    order = random.Random(0)
    for repeat in range(repeats):
        for count, k in order.sample(cells, len(cells)):
            found[count, k].append(batches[count].run(k))
        if progress:
            progress("rounds", repeat + 1, repeats)
    drafting, verifying = (
        {cell: _quartiles([pair[part] for pair in pairs]) for cell, pairs in found.items()} for part in (0, 1)
    )

    def lines(values: dict[Cell, tuple[float, float, float]], pick: Callable[[tuple], Any]) -> tuple:
        return tuple(tuple(pick(values[count, k]) for k in range(gamma + 1)) for count in batches)

    return Profile(
        target=target.spec.name,
        draft=draft_name,
        machine=machine_name(target.device),
        threads=torch.get_num_threads(),
        dtype=str(target.dtype),
        context=context,
        repeats=repeats,
        costs=CostTable(tuple(batches), lines(verifying, lambda q: q[1]), lines(drafting, lambda q: q[1])),
        verify_quartiles=lines(verifying, lambda q: (q[0], q[2])),
        draft_quartiles=lines(drafting, lambda q: (q[0], q[2])),
        left_out=left_out,
    )


@dataclasses.dataclass(frozen=True)
class _TimedRequests:
    """Some requests, all behind the same context."""

    target: Target
    draft: Draft | None
    state: State
    context: DraftContext | None
    generator: torch.Generator
    clock: Callable[[], float]

    @staticmethod
    def begin(target: Target, draft: Draft | None, length: int, clock: Callable[[], float]) -> "_TimedRequests":
        """One request behind ``length`` random tokens."""
        generator = torch.Generator().manual_seed(0)
        ids = _random_tokens(target, (length + 1,), generator).tolist()
        taps = tuple(draft.config.target_layer_ids) if draft is not None else ()
        state, verified = target.prefill(ids[:-1], taps)
        context = None
        if draft is not None:
            context = draft.new_context()
            draft.extend(context, verified.taps, [length], torch.tensor([ids[1:]], device=target.device))
        return _TimedRequests(target, draft, state, context, generator, clock)

    @property
    def rows(self) -> int:
        return self.state.rows

    def times(self, rows: int) -> "_TimedRequests":
        """``rows`` copies of the first request."""
        context = self.context.select([0] * rows) if self.context is not None else None
        return dataclasses.replace(self, state=self.state.select([0] * rows), context=context)

    @torch.no_grad()
    def run(self, k: int) -> tuple[float, float]:
        """Seconds of drafting ``k`` tokens and of verifying them. Half of them are kept, so the context grows."""
        tokens = _random_tokens(self.target, (self.rows, k + 1), self.generator).to(self.target.device)
        anchors, kept = tokens[:, 0], [1 + k // 2] * self.rows
        moments = [self._now()]
        if self.draft is not None and self.context is not None and k:
            block, previous = self.draft.begin(self.context, anchors), anchors
            for _ in range(k):
                if self.draft.confidence_head is not None:
                    torch.sigmoid(block.confidence(previous).float()).tolist()
                previous = block.next_logits(previous).argmax(-1)
        moments.append(self._now())
        verified = self.target.verify(self.state, tokens)
        following = verified.logits.argmax(-1)
        following[0].tolist()
        self.target.commit(self.state, kept)
        moments.append(self._now())
        if self.draft is not None and self.context is not None:
            self.draft.extend(self.context, verified.taps, kept, following)
        moments.append(self._now())
        reading = moments[3] - moments[2] if k else 0.0  # a decoder reads the tokens of plain rounds many at a time
        return moments[1] - moments[0] + reading if k else 0.0, moments[2] - moments[1]

    def _now(self) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return self.clock()


def _batches(base: _TimedRequests, rows: Sequence[int], gamma: int) -> tuple[dict[int, _TimedRequests], str | None]:
    """As many copies of ``base`` as each of ``rows`` says, as far as the memory goes, and what was left out."""
    logits = 8 * (gamma + 1) * base.target.spec.vocab_size
    each = 2 * (_bytes_of(base.state) + _bytes_of(base.context)) + logits  # buffers grow by doubling
    device = base.target.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    batches: dict[int, _TimedRequests] = {}
    for count in rows:
        if batches and each * (sum(batches) + count) > _MEMORY_SHARE * free:
            return batches, f"{count} and more requests take more than {_MEMORY_SHARE:.0%} of the free memory"
        batches[count] = base.times(count)
    return batches, None


def _bytes_of(value: Any) -> int:
    """Bytes of the tensors in ``value``, a state or what one is made of."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes_of, value))
    if hasattr(value, "__dict__") and not callable(value):
        return sum(_bytes_of(part) for name, part in vars(value).items() if name != "forward")
    return 0


def _random_tokens(target: Target, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, target.spec.vocab_size, shape, generator=generator)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


def machine_name(device: torch.device) -> str:
    """The name of what computes on ``device``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")


def tables(profile: Profile) -> Iterator[Table]:
    """What verifying and drafting take, and how many tokens a round must gain to be no slower than a plain one."""
    costs = profile.costs
    heads = [str(k) for k in range(costs.gamma + 1)]
    verify = Table(title=f"Milliseconds to verify, {escape(profile.machine)}", title_justify="left")
    verify.caption = (
        f"by tokens drafted of each request; typically quartiles within {spread(profile):.0%} of the median"
    )
    need = Table(title="Tokens a request must gain in a round to be as fast as without drafting", title_justify="left")
    need.caption = "the target's own token included; drafting is paid"
    for table in (verify, need):
        table.caption_justify = "left"
        table.add_column("requests", justify="right")
        for head in heads[table is need :]:
            table.add_column(head, justify="right")
    if any(map(any, costs.draft)):
        verify.add_column("draft", justify="right")
    for rows, line, drafting in zip(costs.rows, costs.verify, costs.draft, strict=True):
        last = [f"{1e3 * drafting[-1]:.1f}"] if any(map(any, costs.draft)) else []
        verify.add_row(str(rows), *(f"{1e3 * each:.1f}" for each in line), *last)
        whole = costs.rounds(rows)
        need.add_row(str(rows), *(f"{each / whole[0]:.2f}" for each in whole[1:]))
    yield verify
    yield need


def spread(profile: Profile) -> float:
    """Half the distance of the quartiles by the median, the median over all cells."""
    medians = [each for line in profile.costs.verify for each in line]
    quartiles = [each for line in profile.verify_quartiles for each in line]
    return statistics.median((high - low) / 2 / each for each, (low, high) in zip(medians, quartiles, strict=True))
