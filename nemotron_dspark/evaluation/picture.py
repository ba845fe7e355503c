"""Draw a run: the loss curve, and acceptance by position."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.evaluation.measure import Measurement
from nemotron_dspark.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREEN, _BLUE, _GREY = "#3f7d20", "#1f5aa6", "#9a9a9a"
_STYLES = ((_BLUE, "-", "o"), (_GREEN, "-", "s"), (_GREY, "--", "o"), (_GREY, ":", "s"))


def draw_run(
    path: Path, measurements: Mapping[str, Measurement], metrics_file: Path | None = None, title: str = ""
) -> Path:
    """Draw ``measurements`` by label, and the loss in ``metrics_file`` (JSON lines) if given, as a PNG at ``path``.

    Raises:
        EnvironmentFault: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFault(
            "Pictures need matplotlib, which is not installed.", "Run `pip install 'nemotron-dspark[report]'`."
        ) from None
    panels = 2 if metrics_file else 1
    figure = Figure(figsize=(5.2 * panels, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if metrics_file:
        _draw_loss(axes[0], metrics_file)
    _draw_acceptance(axes[-1], measurements)
    if title:
        figure.suptitle(title, fontsize=11)
    write_whole(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    return path


def _draw_loss(axis: "Axes", metrics_file: Path) -> None:
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["loss"] for row in rows], color=_BLUE, label="loss")
    axis.set(xlabel="optimiser step", ylabel="loss", title="Training")
    axis.set_ylim(bottom=0)
    other = axis.twinx()
    other.plot(steps, [row["tau"] for row in rows], color=_GREEN, label="expected accepted length")
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
