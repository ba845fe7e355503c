"""Draw a run: loss and expected accepted length over its steps, acceptance by position; a calibration; costs.

Every picture is a PNG at the path that is given and returned; `EnvironmentFault` where matplotlib is not installed.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_dspark.drafts.costs import CostTable
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.evaluation.calibration import ReliabilityBin
from nemotron_dspark.evaluation.measure import Measurement
from nemotron_dspark.files import write_whole
from nemotron_dspark.training import validation
from nemotron_dspark.training.metrics import read_lines, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREEN, _BLUE, _GREY, _ORANGE = "#3f7d20", "#1f5aa6", "#9a9a9a", "#d9822b"
_BARS = (_BLUE, _GREEN, _ORANGE, _GREY, "#7a4fa3", "#b03a48")
_STYLES = ((_BLUE, "-", "o"), (_GREEN, "-", "s"), (_GREY, "--", "o"), (_GREY, ":", "s"))


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How often survived what was foretold to, before and after a calibration."""

    title: str
    error_before: float
    error_after: float
    before: Sequence[ReliabilityBin]
    after: Sequence[ReliabilityBin]


def draw_run(
    path: Path, measurements: Mapping[str, Measurement], run_folder: Path | None = None, title: str = ""
) -> Path:
    """Draw ``measurements`` by label, if any, and the training in ``run_folder`` if given."""
    panels = bool(measurements) + (run_folder is not None)
    figure = _new_figure(5.2 * panels, 3.9)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if run_folder is not None:
        _draw_training(axes[0], run_folder)
    if measurements:
        _draw_acceptance(axes[-1], measurements)
    return _save(figure, path, title)


def draw_reliability(path: Path, rows: Sequence[Sequence[Reliability]], title: str = "") -> Path:
    """Draw ``rows`` of reliability diagrams."""
    columns = max(map(len, rows))
    figure = _new_figure(3.0 * columns, 3.2 * len(rows) + 0.5)
    axes = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    for line, panels in zip(axes, rows, strict=True):
        for axis, panel in zip(line, panels, strict=False):
            _draw_curves(axis, panel)
    figure.supxlabel("chance foretold that the draft is kept up to a slot", fontsize=10)
    figure.supylabel("share of held-out rounds that kept it", fontsize=10)
    return _save(figure, path, title)


def draw_bars(path: Path, panels: Mapping[str, Sequence[tuple[str, str, float]]], title: str = "") -> Path:
    """Draw a panel of bars for each quantity in ``panels``, of (group, series, value)."""
    rows = next(iter(panels.values()))
    groups, series = (list(dict.fromkeys(row[at] for row in rows)) for at in (0, 1))
    figure = _new_figure(max(7.0, 1.6 + 0.34 * len(groups) * (len(series) + 1)), 2.3 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    width = 0.8 / len(series)
    for axis, (quantity, values) in zip(axes, panels.items(), strict=True):
        for at, name in enumerate(series):
            heights = {group: value for group, which, value in values if which == name}
            places = [groups.index(group) + width * (at - (len(series) - 1) / 2) for group in heights]
            bars = axis.bar(places, heights.values(), 0.92 * width, label=name, color=_BARS[at % len(_BARS)])
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.axhline(1, color="0.4", linewidth=1, linestyle=":")
        axis.set_title(quantity, fontsize=10)
        axis.margins(y=0.15)
        axis.grid(axis="y", alpha=0.25)
    axes[-1].set_xticks(range(len(groups)), groups, fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=len(series), loc="outside lower center")
    return _save(figure, path, title)


def draw_lengths(path: Path, lines: Mapping[str, Sequence[tuple[int, float, float | None]]], title: str = "") -> Path:
    """Draw accepted length over the length of the context, a line for each series in ``lines``.

    A point is (tokens, accepted length, its standard error or None).
    """
    figure = _new_figure(7.2, 4.2)
    axis = figure.subplots()
    for at, (name, points) in enumerate(lines.items()):
        lengths, values, errors = zip(*sorted(points), strict=True)
        errors = [error or 0.0 for error in errors]
        axis.errorbar(
            lengths, values, errors, fmt="o-", markersize=4, capsize=2, color=_BARS[at % len(_BARS)], label=name
        )
    every = sorted({tokens for points in lines.values() for tokens, *_ in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(every, [f"{tokens:,}" for tokens in every], fontsize=8)
    axis.minorticks_off()
    axis.set(xlabel="tokens of the prompt", ylabel="tokens a round")
    axis.set_ylim(bottom=1)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    if title:
        axis.set_title(title, fontsize=11)
    return _save(figure, path)


def draw_costs(path: Path, costs: CostTable, title: str = "") -> Path:
    """Draw what verifying and drafting cost by tokens drafted, a line a number of requests."""
    figure = _new_figure(10.0, 4.2)
    whole, relative = figure.subplots(1, 2)
    lengths = range(costs.gamma + 1)
    for at, (rows, verify, draft) in enumerate(zip(costs.rows, costs.verify, costs.draft, strict=True)):
        color = _BARS[at % len(_BARS)]
        label = f"{rows} request{'s' * (rows > 1)}"
        whole.plot(lengths, [1e3 * each for each in verify], "-o", markersize=4, color=color, label=label)
        if any(draft):
            whole.plot(lengths[1:], [1e3 * each for each in draft[1:]], ":", color=color)
        rounds = costs.rounds(rows)
        relative.plot(lengths, [each / rounds[0] for each in rounds], "-o", markersize=4, color=color, label=label)
    whole.set(title="verify (dotted: draft)", ylabel="milliseconds", yscale="log")
    relative.plot(lengths, [1 + k for k in lengths], color="0.6", linewidth=1, linestyle="--", label="all kept")
    relative.set(title="a round, in plain rounds of as many requests", ylabel="tokens to gain to be no slower")
    relative.set_ylim(bottom=0)
    for axis in (whole, relative):
        axis.set(xlabel="tokens drafted of each request")
        axis.set_xticks(list(lengths))
        axis.grid(alpha=0.25)
    figure.legend(*relative.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return _save(figure, path, title)


def _new_figure(width: float, height: float) -> "Figure":
    """A figure of a size in inches; it does not reach for a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFault(
            "Pictures need matplotlib, which is not installed.", "Run `pip install 'nemotron-dspark[report]'`."
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path, title: str = "") -> Path:
    if title:
        figure.suptitle(title, fontsize=11)
    write_whole(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    return path


def _draw_curves(axis: "Axes", panel: Reliability) -> None:
    """Share kept over chance foretold, a point a bin, its area by the share of rounds in it; right is the diagonal."""
    axis.plot((0, 1), (0, 1), color="0.6", linewidth=1, linestyle=":")
    for label, error, bins, color in (
        ("before", panel.error_before, panel.before, _ORANGE),
        ("after", panel.error_after, panel.after, _BLUE),
    ):
        foretold, kept = [each.foretold for each in bins], [each.kept for each in bins]
        axis.plot(foretold, kept, color=color, linewidth=1, alpha=0.5)
        sizes = [6 + 150 * each.share for each in bins]
        axis.scatter(foretold, kept, sizes, color=color, alpha=0.85, linewidths=0, label=f"{label}: error {error:.3f}")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.25)
    legend = axis.legend(fontsize=8, loc="upper left", framealpha=0.6)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_sizes([20])  # pyrefly: ignore[missing-attribute]


def _draw_training(axis: "Axes", run_folder: Path) -> None:
    """Loss and expected accepted length over steps; of held-out samples dotted, with a line where they were best."""
    axis.set(xlabel="optimiser step", ylabel="loss", title="Training")
    other = axis.twinx()
    held_out = read_lines(run_folder / validation.FILE)
    for rows, style, where in ((read_metrics(run_folder), "-", ""), (held_out, "o:", ", held out")):
        steps = [row["step"] for row in rows]
        if rows:
            axis.plot(steps, [row["loss"] for row in rows], style, color=_BLUE, markersize=3, label=f"loss{where}")
        if rows and rows[0]["tau"] is not None:
            taus = [row["tau"] for row in rows]
            other.plot(steps, taus, style, color=_GREEN, markersize=3, label=f"expected accepted length{where}")
    if held_out:
        axis.axvline(max(held_out, key=validation.score)["step"], color="0.6", linewidth=1, label="best")
    axis.set_ylim(bottom=0)
    other.set_ylabel("expected accepted length")
    other.set_ylim(bottom=1)
    lines = [*axis.get_lines(), *other.get_lines()]
    axis.legend(lines, [str(line.get_label()) for line in lines], loc="lower right", fontsize=8)
    axis.grid(alpha=0.25)


def _draw_acceptance(axis: "Axes", measurements: Mapping[str, Measurement]) -> None:
    slots: Sequence[int] = ()
    for (label, measurement), (color, line, marker) in zip(measurements.items(), _STYLES, strict=False):
        slots = range(1, len(measurement.per_position) + 1)
        axis.plot(
            slots,
            measurement.per_position,
            line,
            color=color,
            marker=marker,
            markersize=4,
            label=f"{label}: {measurement.accepted_length:.2f} tokens a round",
        )
    axis.set(xlabel="position in the block", ylabel="share of rounds kept", title="Acceptance by position")
    axis.set_ylim(0, 1)
    axis.set_xticks(list(slots))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
