"""Calibrate a draft on prompts: decode, fit on one half of the conversations, measure on the other, and say so.

A workload is what one `--prompts` names. All of them share one fit, because an engine reads one file; each has figures
of its own.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from nemotron_dspark import files
from nemotron_dspark.config import EvalConfig
from nemotron_dspark.data.sources import named
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.drafts import temperatures
from nemotron_dspark.drafts.dspark import Draft
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
from nemotron_dspark.targets import Target

MIN_ROUNDS = 10 * BINS  # in each half: fewer than ten a bin say nothing of its share
PICTURE = "calibration.png"
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Workload:
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

    def to_json(self) -> dict[str, Any]:
        means = {f"mean_{name}": mean(getattr(self, name)) for name in ("before", "after", "chance")}
        return dataclasses.asdict(self) | means


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `nds calibrate` found."""

    target: str
    draft: str  # its folder; empty for one that was given loaded
    draft_digest: str | None
    prompts_file: str
    signal: str  # "confidence head" or "margin"
    decoded_at: tuple[float, ...]  # temperatures of sampling
    calibration: Calibration
    figures: tuple[Figures, ...]  # all workloads together, and, of several, each
    panels: tuple[Reliability, ...]  # for the picture

    @property
    def whole(self) -> Figures:
        return self.figures[0]

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """One a slot; None where there is no head to scale."""
        return self.calibration.temperatures if self.signal == "confidence head" else None

    @property
    def verdict(self) -> str:
        """Whether the error fell to a third, in a sentence, and if not, why that may be."""
        before, after, chance = (mean(getattr(self.whole, name)) for name in ("before", "after", "chance"))
        said = f"Held-out calibration error, mean of the slots: {before:.3f} before, {after:.3f} after"
        if after <= before / 3:
            return f"{said}."
        if before < 3 * chance:
            return (
                f"{said}, more than a third; it was small already: on {self.whole.rounds[1]} rounds a right one shows "
                f"{chance:.3f}."
            )
        return f"{said}, more than a third: the fit does not carry over, or one number a slot is not enough."

    def to_json(self) -> dict[str, Any]:
        """The contents of ``calibration.json``; lists are by slot."""
        return {
            "target": self.target,
            "draft": self.draft,
            "draft_digest": self.draft_digest,
            "prompts_file": self.prompts_file,
            "signal": self.signal,
            "decoded_at": self.decoded_at,
            "temperatures": self.temperatures,
            "weights": self.calibration.weights,
            "biases": self.calibration.biases,
            "bins": BINS,
            "workloads": [each.to_json() for each in self.figures],
            "verdict": self.verdict,
        }

    def engine_file(self) -> dict[str, Any]:
        """The contents of the file that SGLang and TensorRT-LLM read, keys as SGLang's own fit writes them."""
        return {
            "temperatures": self.temperatures,
            "dataset": self.prompts_file,
            "num_samples": self.whole.rounds[0],
            "ece_before": self.whole.before,
            "ece_after": self.whole.after,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write the files there; returns their paths. Without a confidence head there is nothing for the engines."""
        contents = {temperatures.ENGINES: self.engine_file()} if self.temperatures else {}
        for name, content in (contents | {temperatures.OURS: self.to_json()}).items():
            files.write_json(folder / name, content)
        written = [*(folder / name for name in contents), folder / temperatures.OURS]
        if picture.available():
            title = f"{self.target}: survival foretold by the draft"
            written.append(picture.draw_reliability(folder / PICTURE, self.panels, title))
        return written


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def check_unused(folder: Path) -> None:
    """`InputError` if there is a calibration in ``folder`` already."""
    for name in (temperatures.OURS, temperatures.ENGINES, PICTURE):
        if (folder / name).exists():
            raise InputError(f"{folder / name} is there already.", "Delete it, or give another folder to --out.")


def gather(
    target: Target, draft: Draft, workload: Workload, config: EvalConfig, progress: Progress | None = None
) -> Halves:
    """Decode both halves of ``workload`` at every temperature of ``config``, whole blocks.

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
    with_head = draft.confidence_head is not None
    decoder = Decoder(target, draft, record_confidence=with_head, record_margins=not with_head)
    rounds = []
    for label, half in zip(("fitting half", "held-out half"), halves, strict=True):
        prompts = [ids for turns in half for ids in turns]
        found = []
        for temperature in config.temperatures:
            what = f"{workload.name}, {label}, temperature {temperature:g}"
            found += decode(decoder, prompts, temperature, config, progress, what)
        rounds.append(Rounds.of(found, draft.config.block_size))
    return Halves(workload.name, (len(halves[0]), len(halves[1])), *rounds)


def calibrate(draft: Draft, workloads: Sequence[Halves]) -> tuple[Calibration, tuple[Figures, ...], list[Reliability]]:
    """One fit to all ``workloads``; its figures and pictures, of all together first.

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
            f"Give about {-(-MIN_ROUNDS // max(short, 1))} times as many prompts, or a larger eval.max_new_tokens.",
        )
    fitted = (fit_margins if draft.confidence_head is None else fit_temperatures)(together.fit)
    shown = [together, *(workloads if len(workloads) > 1 else ())]
    figures = tuple(_figures(each, fitted) for each in shown)
    panels = [_panel(each.name, found, each.held_out, fitted) for each, found in zip(shown, figures, strict=True)]
    for slot in range(draft.config.block_size):
        panels.append(_panel(f"slot {slot + 1}", figures[0], together.held_out, fitted, slot))
    return fitted, figures, panels


def _figures(workload: Halves, fitted: Calibration) -> Figures:
    held_out = workload.held_out
    none = Calibration.none(len(fitted.weights))
    errors: list[list[float]] = [[], [], []]
    for slot in range(len(fitted.weights)):
        known, outcome = held_out.outcome(slot)
        before, after = (each.survival(held_out.logits)[known, slot] for each in (none, fitted))
        errors[0].append(calibration_error(before, outcome[known]))
        errors[1].append(calibration_error(after, outcome[known]))
        errors[2].append(chance_error(after))
    sizes = len(workload.fit), len(held_out)
    return Figures(workload.name, workload.conversations, sizes, *map(tuple, errors))


def _panel(name: str, found: Figures, rounds: Rounds, fitted: Calibration, slot: int | None = None) -> Reliability:
    """Of one slot, or of the bins of all slots together."""
    slots = range(len(fitted.weights)) if slot is None else [slot]
    errors = [mean([values[each] for each in slots]) for values in (found.before, found.after)]
    curves = []
    for each in (Calibration.none(len(fitted.weights)), fitted):
        survival = each.survival(rounds.logits)
        outcomes = [rounds.outcome(at) for at in slots]
        foretold = torch.cat([survival[known, at] for at, (known, _) in zip(slots, outcomes, strict=True)])
        curves.append(reliability(foretold, torch.cat([outcome[known] for known, outcome in outcomes])))
    return Reliability(name, errors[0], errors[1], curves[0], curves[1])


def slot_table(report: CalibrationReport) -> Table:
    """A row a slot, of all workloads together."""
    found = report.whole
    table = Table(
        title=f"{found.rounds[1]} held-out rounds of {escape(report.prompts_file)}, fitted to {found.rounds[0]} others",
        title_justify="left",
        caption_justify="left",
        caption="calibration error of the chance that all slots up to this one are kept, as foretold by the "
        f"{report.signal}\nby chance: what a right one would show on as many rounds",
    )
    names = ("temperature",) if report.temperatures else ("weight", "bias")
    for name in ("slot", "before", "after", "by chance", *names):
        table.add_column(name, justify="right")
    coefficients = (
        [report.temperatures] if report.temperatures else [report.calibration.weights, report.calibration.biases]
    )
    for slot, errors in enumerate(zip(found.before, found.after, found.chance, strict=True)):
        own = [f"{values[slot]:.2f}" for values in coefficients]
        table.add_row(str(slot + 1), *(f"{error:.3f}" for error in errors), *own)
    means = [f"[bold]{mean(errors):.3f}[/]" for errors in (found.before, found.after, found.chance)]
    table.add_row("mean", *means)
    return table


def workload_table(report: CalibrationReport) -> Table | None:
    """A row for each workload, means of its slots; None where there is one."""
    if len(report.figures) == 1:
        return None
    table = Table(title="By workload, mean of the slots", title_justify="left")
    table.add_column("")
    for name in ("conversations", "rounds", "before", "after", "by chance"):
        table.add_column(name, justify="right")
    for each in report.figures:
        errors = [f"{mean(values):.3f}" for values in (each.before, each.after, each.chance)]
        table.add_row(escape(each.name), str(each.conversations[1]), str(each.rounds[1]), *errors)
    return table


def workload_names(prompts: Sequence[str]) -> list[str]:
    """What to call each of ``prompts``: the file's name without its end, where that tells them apart."""
    short = [Path(text).stem if Path(text).is_file() else text for text in prompts]
    return [name if short.count(name) == 1 else named(text) for name, text in zip(short, prompts, strict=True)]
