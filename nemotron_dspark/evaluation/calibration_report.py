"""Calibrate a draft on prompts: decode, fit on one half of the conversations, measure on the other, and say so.

A workload is what one `--prompts` names. All of them share a fit, because an engine reads one file; each has figures of
its own. Each temperature of sampling has a fit of its own: what is kept at temperature 0 is another question than what
is kept at 1, which is what a confidence head learns.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.markup import escape
from rich.table import Table

from nemotron_dspark import files
from nemotron_dspark.config import EvalConfig
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.drafts.temperatures import FILE, engine_file
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation import picture
from nemotron_dspark.evaluation.calibration import (
    BINS,
    Calibration,
    Rounds,
    calibration_error,
    chance_error,
    fit_margins,
    fit_temperatures,
    reliability,
)
from nemotron_dspark.evaluation.measure import Progress, decode
from nemotron_dspark.evaluation.picture import Reliability
from nemotron_dspark.evaluation.report import label_of
from nemotron_dspark.targets import Target

Signal = Literal["confidence head", "margin"]
HEAD: Signal = "confidence head"
MARGIN: Signal = "margin"

MIN_ROUNDS = 10 * BINS  # in each half: fewer than ten a bin say nothing of its share
PICTURE = "calibration.png"
ALL = "all"


@dataclasses.dataclass(frozen=True)
class CalibrationPrompts:
    """The conversations of one `--prompts`."""

    name: str
    conversations: Sequence[Sequence[Sequence[int]]]  # token ids before each answer, a list for each conversation


@dataclasses.dataclass(frozen=True)
class Halves:
    """The rounds of one workload."""

    name: str
    conversations: tuple[int, int]  # of the half that is fitted to, and of the half held out
    fit: Rounds
    held_out: Rounds


@dataclasses.dataclass(frozen=True)
class Figures:
    """Calibration errors of survival at every slot, on held-out rounds of one workload."""

    name: str
    conversations: tuple[int, int]  # fitted to, held out
    rounds: tuple[int, int]
    before: tuple[float, ...]
    after: tuple[float, ...]
    chance: tuple[float, ...]  # what a right one is expected to show on as many rounds

    @property
    def means(self) -> tuple[float, float, float]:
        """Means over the slots: before, after, by chance."""
        return _mean(self.before), _mean(self.after), _mean(self.chance)

    def to_json(self) -> dict[str, Any]:
        names = ("mean_before", "mean_after", "mean_chance")
        return dataclasses.asdict(self) | dict(zip(names, self.means, strict=True))


@dataclasses.dataclass(frozen=True)
class Fit:
    """The calibration for one temperature of sampling."""

    sampled_at: float
    signal: Signal
    calibration: Calibration
    figures: tuple[Figures, ...]  # all workloads together, and, of several, each
    # Of a head: a fit of weights and biases, which no engine reads but this, and its mean error.
    biased: Calibration | None
    with_bias: float | None
    panels: tuple[Reliability, ...]  # for the picture

    @property
    def whole(self) -> Figures:
        return self.figures[0]

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """One a slot; None where there is no head to scale."""
        return self.calibration.temperatures if self.signal == HEAD else None

    @property
    def verdict(self) -> str:
        """Whether the error fell to a third, in a sentence, and if not, why that may be."""
        before, after, chance = self.whole.means
        said = f"{label_of(self.sampled_at)}: held-out calibration error {before:.3f} before, {after:.3f} after"
        if after <= before / 3:
            return f"{said}."
        if before < 3 * chance:
            rounds = self.whole.rounds[1]
            return f"{said}, more than a third. It was small: a right one shows {chance:.3f} on {rounds} rounds."
        why = "the numbers do not tell rounds apart well enough"
        if self.with_bias is not None and self.with_bias < after / 2:
            why = "a temperature moves no chance across a half; a weight and a bias a slot would leave "
            why += f"{self.with_bias:.3f}"
        return f"{said}, more than a third: {why}."

    def to_json(self) -> dict[str, Any]:
        """Lists are by slot."""
        return {
            "sampled_at": self.sampled_at,
            "temperatures": self.temperatures,
            "weights": self.calibration.weights,
            "biases": self.calibration.biases,
            "workloads": [each.to_json() for each in self.figures],
            "with_bias": dataclasses.asdict(self.biased) if self.biased else None,
            "mean_with_bias": self.with_bias,
            "verdict": self.verdict,
        }


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `nds calibrate` found."""

    target: str
    draft: str  # its folder; empty for one that was given loaded
    draft_digest: str | None
    prompts_file: str
    fits: tuple[Fit, ...]  # one for each temperature of sampling

    def to_json(self) -> dict[str, Any]:
        """The contents of ``calibration.json``."""
        return {
            "target": self.target,
            "draft": self.draft,
            "draft_digest": self.draft_digest,
            "prompts_file": self.prompts_file,
            "signal": self.fits[0].signal,
            "bins": BINS,
            "fits": [fit.to_json() for fit in self.fits],
        }

    def engine_file(self, fit: Fit) -> dict[str, Any]:
        """What SGLang and TensorRT-LLM read of ``fit``: the keys that SGLang's own fit writes."""
        return {
            "temperatures": fit.temperatures,
            "dataset": self.prompts_file,
            "num_samples": fit.whole.rounds[0],
            "ece_before": fit.whole.before,
            "ece_after": fit.whole.after,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write the files there; returns their paths. Of margins there is nothing that the engines would read."""
        contents = {engine_file(fit.sampled_at): self.engine_file(fit) for fit in self.fits if fit.temperatures}
        contents |= {FILE: self.to_json()}  # last: it says that all is there
        for name, content in contents.items():
            files.write_json(folder / name, content)
        written = [folder / name for name in contents]
        if picture.available():
            rows = [fit.panels for fit in self.fits]
            written.append(picture.draw_reliability(folder / PICTURE, rows, f"{self.target}, {self.fits[0].signal}"))
        return written


def check_unused(folder: Path) -> None:
    """`InputError` if there is a calibration in ``folder`` already."""
    for path in (folder / FILE, folder / PICTURE):
        if path.exists():
            raise InputError(f"{path} is there already.", "Delete its folder, or give another one to --out.")


def gather(
    target: Target,
    draft: Draft,
    workload: CalibrationPrompts,
    temperature: float,
    signal: Signal,
    config: EvalConfig,
    progress: Progress | None = None,
) -> Halves:
    """Decode both halves of ``workload`` at ``temperature``, whole blocks.

    Every other conversation is held out, counting those with the same first prompt as one.

    Raises:
        InputError: the workload has only one conversation.
    """
    places: dict[tuple[int, ...], int] = {}
    halves: tuple[list[Sequence[Sequence[int]]], ...] = ([], [])
    for turns in workload.conversations:
        halves[places.setdefault(tuple(turns[0]), len(places)) % 2].append(turns)
    if not halves[1]:
        raise InputError(
            f"{workload.name} has one prompt that fits, and none is left for the held-out half.", "Give more prompts."
        )
    decoder = Decoder(target, draft, record_confidence=signal == HEAD, record_margins=signal == MARGIN)
    rounds = []
    for label, half in zip(("fitting half", "held-out half"), halves, strict=True):
        prompts = [ids for turns in half for ids in turns]
        what = f"{workload.name}, {label}, {label_of(temperature)}"
        rounds.append(Rounds.of(decode(decoder, prompts, temperature, config, progress, what), draft.config.block_size))
    return Halves(workload.name, (len(halves[0]), len(halves[1])), *rounds)


def fit(workloads: Sequence[Halves], sampled_at: float, signal: Signal) -> Fit:
    """One fit to all ``workloads``, with figures and pictures of all together and of each.

    Raises:
        InputError: too few rounds to fit or to measure.
    """
    together = Halves(
        ALL,
        (sum(each.conversations[0] for each in workloads), sum(each.conversations[1] for each in workloads)),
        Rounds.cat([each.fit for each in workloads]),
        Rounds.cat([each.held_out for each in workloads]),
    )
    short = min(len(together.fit), len(together.held_out))
    if short < MIN_ROUNDS:
        raise InputError(
            f"The prompts give {len(together.fit)} rounds to fit and {len(together.held_out)} to measure, and "
            f"{MIN_ROUNDS} of each are needed.",
            f"Give about {math.ceil(MIN_ROUNDS / max(short, 1))} times as many prompts, or a larger "
            "eval.max_new_tokens.",
        )
    fitted = fit_temperatures(together.fit) if signal == HEAD else fit_margins(together.fit)
    shown = [together, *(workloads if len(workloads) > 1 else ())]
    figures = tuple(_figures(each, fitted) for each in shown)
    gamma = len(fitted.weights)
    pairs = zip(figures, shown, strict=True)
    panels = [_panel(found.name, found, each.held_out, fitted, range(gamma)) for found, each in pairs]
    panels += [
        _panel(f"slot {slot + 1}", figures[0], together.held_out, fitted, [slot]) for slot in sorted({0, gamma - 1})
    ]
    biased = fit_margins(together.fit) if signal == HEAD else None
    with_bias = _figures(together, biased).means[1] if biased else None
    titled = [dataclasses.replace(each, title=f"{label_of(sampled_at)}: {each.title}") for each in panels]
    return Fit(sampled_at, signal, fitted, figures, biased, with_bias, tuple(titled))


def _figures(workload: Halves, fitted: Calibration) -> Figures:
    held_out = workload.held_out
    none = Calibration.none(len(fitted.weights))
    errors: list[list[float]] = [[], [], []]
    for slot in range(len(fitted.weights)):
        known, outcome = held_out.outcome(slot)
        before, after = (each.survival(held_out.logits)[known, slot] for each in (none, fitted))
        for values, error in zip(
            errors,
            (calibration_error(before, outcome[known]), calibration_error(after, outcome[known]), chance_error(after)),
            strict=True,
        ):
            values.append(error)
    sizes = len(workload.fit), len(held_out)
    return Figures(workload.name, workload.conversations, sizes, *map(tuple, errors))


def _panel(title: str, found: Figures, rounds: Rounds, fitted: Calibration, slots: Sequence[int]) -> Reliability:
    """The reliability of the rounds' ``slots``, before and after, in the same bins."""
    errors = [_mean([values[slot] for slot in slots]) for values in (found.before, found.after)]
    known, outcome = (torch.stack(part, 1) for part in zip(*(rounds.outcome(slot) for slot in slots), strict=True))
    curves = []
    for each in (Calibration.none(len(fitted.weights)), fitted):
        survival = each.survival(rounds.logits)[:, list(slots)]
        curves.append(reliability(survival[known], outcome[known]))
    return Reliability(title, errors[0], errors[1], curves[0], curves[1])


def slot_table(fit: Fit) -> Table:
    """A row a slot, of all workloads together."""
    found = fit.whole
    table = Table(
        title=f"{label_of(fit.sampled_at)}: {found.rounds[1]} held-out rounds",
        title_justify="left",
        caption_justify="left",
        caption=f"calibration error of what the {fit.signal} foretells\n"
        "by chance: what a right one shows on as many rounds",
    )
    fitted = fit.calibration
    own = {"temperature": fit.temperatures} if fit.temperatures else {"weight": fitted.weights, "bias": fitted.biases}
    for name in ("slot", "before", "after", "by chance", *own):
        table.add_column(name, justify="right", no_wrap=True)
    for slot, errors in enumerate(zip(found.before, found.after, found.chance, strict=True)):
        values = [f"{each[slot]:.2f}" for each in own.values()]
        table.add_row(str(slot + 1), *(f"{error:.3f}" for error in errors), *values)
    table.add_row("mean", *(f"[bold]{error:.3f}[/]" for error in found.means))
    return table


def workload_table(report: CalibrationReport) -> Table | None:
    """A row for each workload and temperature of sampling, means of the slots; None where there is one workload."""
    if len(report.fits[0].figures) == 1:
        return None
    table = Table(title="By workload, mean of the slots", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("sampled at", "prompts", "rounds", "before", "after", "by chance"):
        table.add_column(name, justify="right")
    for fit in report.fits:
        for each in fit.figures:
            errors = [f"{error:.3f}" for error in each.means]
            sizes = str(each.conversations[1]), str(each.rounds[1])
            table.add_row(escape(each.name), f"{fit.sampled_at:g}", *sizes, *errors)
    return table


def workload_names(prompts: Sequence[str]) -> list[str]:
    """What to call each of ``prompts``: the file's name without its end, where that tells them apart."""
    short = [Path(text).stem if Path(text).is_file() else text for text in prompts]
    return [name if short.count(name) == 1 else text for name, text in zip(short, prompts, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
