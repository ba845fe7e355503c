"""Measure several drafts of one target side by side: per workload and length of the context, against no draft at all.

Plain decoding and all drafts take turns prompt by prompt, so that whatever else the machine does slows all alike. What
a draft gains has two parts: the tokens of a round (accepted length), and how much longer a round takes than a plain
step (its cost). The speedup is about the one over the other.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.markup import escape
from rich.table import Table

from nemotron_dspark import files
from nemotron_dspark.config import EvalConfig
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import schedule_for
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import CheckError, InputError
from nemotron_dspark.evaluation import picture
from nemotron_dspark.evaluation.measure import (
    Lossless,
    Progress,
    lossless_of,
    measure,
    speed_of,
    summarise,
)
from nemotron_dspark.evaluation.report import label_of
from nemotron_dspark.targets import Target

_WARM_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts that are measured together."""

    workload: str
    length: int | None  # tokens that each prompt was made to have; None: as they are
    prompts: Sequence[Sequence[int]]

    @property
    def label(self) -> str:
        return self.workload if self.length is None else f"{self.workload}, {self.length} tokens"


class Measured(Protocol):
    """What a table says of a draft at one temperature: a `Measurement`, or an engine's."""

    @property
    def temperature(self) -> float: ...
    @property
    def accepted_length(self) -> float: ...
    @property
    def standard_error(self) -> float | None: ...


@dataclasses.dataclass(frozen=True)
class Compared:
    """One draft on one group of prompts; speeds are greedy, one prompt at a time, prefill not counted.

    Of a draft in an engine ``tokens_per_second`` counts the prompt's pass and the way there too, so rounds are not
    timed and no speedup is told; its answers are compared with plain ones of this process.
    """

    draft: str
    workload: str
    length: int | None
    prompt_tokens: float  # mean of the group
    measurements: tuple[Measured, ...]  # greedy first, then the temperatures asked for
    lossless: Lossless
    plain_tokens_per_second: float
    tokens_per_second: float
    round_seconds: float | None  # of a greedy round: draft, verify, commit; None in an engine
    cost: float | None  # a round's time over a plain step's

    @property
    def speedup(self) -> float | None:
        """Speed over that of plain decoding."""
        return None if self.cost is None else self.tokens_per_second / self.plain_tokens_per_second

    @property
    def label(self) -> str:
        return self.workload if self.length is None else f"{self.workload}, {self.length} tokens"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything `nds compare` reports."""

    target: str
    dtype: str  # of the target's weights
    drafts: Mapping[str, str]  # what each draft is, by its name in the tables
    rows: tuple[Compared, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) | {"speedup": row.speedup} for row in self.rows]
        return {"target": self.target, "dtype": self.dtype, "drafts": dict(self.drafts), "rows": rows}

    def save(self, folder: Path) -> tuple[Path, ...]:
        """Write ``compare.json`` there and, if matplotlib is installed, ``compare.png`` and with several lengths of the
        context ``lengths.png``; returns their paths."""
        files.write_json(folder / "compare.json", self.to_json())
        if not picture.available():
            return (folder / "compare.json",)
        quantities: dict[str, Callable[[Compared], float | None]] = {
            "tokens a round, greedy": lambda row: row.measurements[0].accepted_length,
            "cost of a round, in plain steps": lambda row: row.cost,
            "speed over plain decoding": lambda row: row.speedup,
        }
        panels = {
            title: [(row.label, row.draft, found) for row in self.rows if (found := value(row)) is not None]
            for title, value in quantities.items()
        }
        drawn = [picture.draw_bars(folder / "compare.png", panels, title=self.target)]
        if len({row.length for row in self.rows}) > 1:
            drawn.append(picture.draw_lengths(folder / "lengths.png", self.by_length(), title=self.target))
        return folder / "compare.json", *drawn

    def by_length(self) -> dict[str, list[tuple[int, float, float | None]]]:
        """(Context length, accepted length, its standard error) of each draft, workload and temperature."""
        lines: dict[str, list[tuple[int, float, float | None]]] = {}
        for row in self.rows:
            for found in row.measurements if row.length is not None else ():
                name = f"{row.draft}, {row.workload}, {label_of(found.temperature)}"
                lines.setdefault(name, []).append((row.length or 0, found.accepted_length, found.standard_error))
        return lines

    def check_lossless(self) -> str | None:
        """A remark on outputs that differ because half precision rounds; None when all are equal.

        Raises:
            CheckError: they differ in full precision.
        """
        for row in self.rows:
            if row.lossless.identical == row.lossless.prompts:
                continue
            where = f"{row.draft} on {row.label}: output differs from plain output, first at "
            where += f"{row.lossless.first_difference}."
            if row.cost is None:
                return where + " An engine computes in its own precision, and by kernels of its own."
            if self.dtype == "torch.float32":
                raise CheckError(where, "Run `nds inspect --probe` on the target; if its proofs pass, report it.")
            return where + " Half precision rounds blocks otherwise; --set target.dtype=float32 decides."
        return None


def lengthened(workload: str, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Group]:
    """``prompts`` as they are, or for each of ``lengths`` made so long by other prompts of the workload before them.

    The prompt's own tokens stay whole at the end; of the first prompt put before them the beginning is cut off.

    Raises:
        InputError: no prompt is as short as a length.
    """
    if not lengths:
        return [Group(workload, None, prompts)]
    groups = []
    for length in lengths:
        made = []
        for at, own in enumerate(prompts):
            if len(own) > length:
                continue
            before: list[int] = []
            for other in itertools.cycle([*prompts[at + 1 :], *prompts[: at + 1]]):
                if len(before) + len(own) >= length:
                    break
                before = [*other, *before]
            made.append([*before[len(before) + len(own) - length :], *own])
        if not made:
            raise InputError(
                f"Every prompt of {workload} is longer than {length} tokens.", "Give larger --context-lengths, or none."
            )
        groups.append(Group(workload, length, made))
    return groups


def compare(
    target: Target,
    drafts: Mapping[str, Draft],
    groups: Sequence[Group],
    config: EvalConfig,
    progress: Progress | None = None,
) -> tuple[Compared, ...]:
    """Measure each of ``drafts``, by name, on each of ``groups``: greedy always, then ``config.temperatures``."""
    found = []
    for group in groups:
        found += _compare_on(target, drafts, group, config, progress)
    return tuple(found)


def plain_answers(target: Target, group: Group, config: EvalConfig) -> list[Generation]:
    """Greedy answers of ``target`` without a draft."""
    decoder, greedy = Decoder(target), Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
    return [decoder.generate(ids, greedy) for ids in group.prompts]


def _compare_on(
    target: Target, drafts: Mapping[str, Draft], group: Group, config: EvalConfig, progress: Progress | None
) -> list[Compared]:
    decoders: dict[str | None, Decoder] = {None: Decoder(target)}
    for name, draft in drafts.items():
        decoders[name] = Decoder(target, draft, schedule=schedule_for(_schedule(config, draft), draft, config.profile))
    greedy = Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens)
    answers: dict[str | None, list[Generation]] = {name: [] for name in decoders}
    for decoder in decoders.values():
        decoder.generate(group.prompts[0], Sampling(max_new_tokens=min(_WARM_TOKENS, config.max_new_tokens)))
    for at, ids in enumerate(group.prompts):
        for name, decoder in decoders.items():
            answers[name].append(decoder.generate(ids, greedy))
        if progress:
            progress(f"{group.label}, in turns", at + 1, len(group.prompts))
    plain, rows = answers[None], []
    for name, draft in drafts.items():
        fast = answers[name]
        measurements = [summarise(fast, 0.0, draft.config.block_size, timed=True)]
        for temperature in config.temperatures:
            if temperature > 0:
                own = config.model_copy(update={"schedule": _schedule(config, draft)})
                told = _told(progress, f"{group.label}, {name}, {label_of(temperature)}")
                measurements.append(measure(target, draft, group.prompts, temperature, own, told))
        rows.append(
            Compared(
                draft=name,
                workload=group.workload,
                length=group.length,
                prompt_tokens=sum(map(len, group.prompts)) / len(group.prompts),
                measurements=tuple(measurements),
                lossless=lossless_of(target, group.prompts, list(zip(plain, fast, strict=True))),
                plain_tokens_per_second=speed_of(plain),
                tokens_per_second=speed_of(fast),
                round_seconds=_round_seconds(fast),
                cost=_round_seconds(fast) / _round_seconds(plain),
            )
        )
    return rows


def _schedule(config: EvalConfig, draft: Draft) -> str:
    """A draft without a confidence head has no threshold."""
    judged = draft.confidence_head is not None or not config.schedule.startswith("threshold")
    return config.schedule if judged else "off"


def _told(progress: Progress | None, what: str) -> Progress | None:
    return (lambda _, done, total: progress(what, done, total)) if progress else None


def _round_seconds(generations: Sequence[Generation]) -> float:
    rounds = sum(generation.rounds for generation in generations)
    return sum(generation.seconds for generation in generations) / rounds if rounds else float("nan")


def names_of(folders: Sequence[Path]) -> list[str]:
    """What to call the drafts in ``folders``: the last part of the path that tells them all apart, else the path."""
    for take in range(1, 5):
        names = [_last_but(folder, take) for folder in folders]
        if len(set(names)) == len(names) and "draft" not in names:
            return names
    return [str(folder) for folder in folders]


def _last_but(folder: Path, take: int) -> str:
    parts = Path(folder).resolve().parts
    return parts[-min(take, len(parts))]


def table(found: Comparison) -> Table:
    """A row for each draft on each group, under no draft."""
    temperatures = [measurement.temperature for measurement in found.rows[0].measurements]
    made = Table(title=escape(found.target), title_justify="left", caption_justify="left")
    made.caption = (
        "tokens a round: accepted length, the target's own token included; ± standard error over prompts\n"
        "cost: time of a round over that of a plain step; speed is greedy, one request at a time"
    )
    for title in ("prompts", "draft"):
        made.add_column(title, overflow="fold")
    for temperature in temperatures:
        made.add_column(f"tokens a round,\n{label_of(temperature)}", justify="right")
    for title in ("cost", "ms a\nround", "tokens/s", "speed", "same\noutput"):
        made.add_column(title, justify="right", no_wrap=True)
    for label, group in itertools.groupby(found.rows, key=lambda row: row.label):
        rows = list(group)
        plain = rows[0].plain_tokens_per_second
        mean = f", {rows[0].prompt_tokens:.0f} tokens" if rows[0].length is None else ""
        prompts = f"{escape(label)}{mean} ({rows[0].lossless.prompts} prompts)"
        empty = ["1.00"] * len(temperatures)
        made.add_row(prompts, "none", *empty, "1.00", f"{1e3 / plain:.1f}", f"{plain:.1f}", "1.00×", "")
        for row in rows:
            same = row.lossless.identical == row.lossless.prompts
            made.add_row(
                "",
                escape(row.draft),
                *(_tokens(measurement) for measurement in row.measurements),
                _number(row.cost, ".2f"),
                _number(row.round_seconds and 1e3 * row.round_seconds, ".1f"),
                f"{row.tokens_per_second:.1f}",
                "" if row.speedup is None else f"[bold]{row.speedup:.2f}×[/]",
                f"[{'green' if same else 'red'}]{row.lossless.identical}/{row.lossless.prompts}[/]",
            )
        made.add_section()
    return made


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _tokens(measurement: Measured) -> str:
    error = f" ± {measurement.standard_error:.2f}" if measurement.standard_error is not None else ""
    return f"{measurement.accepted_length:.2f}{error}"
