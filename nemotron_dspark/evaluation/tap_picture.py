"""The picture of a tap search: what each layer explains, and what the chosen set leaves unexplained further ahead."""

from pathlib import Path
from typing import Any

from nemotron_dspark.evaluation.picture import new_figure, save_png
from nemotron_dspark.targets.spec import LayerKind
from nemotron_dspark.targets.tap_search import TapSearch

_STYLES = {"searched": ("#c0392b", "-", "o"), "default": ("#1f5aa6", "-", "s"), "even": ("#9a9a9a", "--", "^")}
_ATTENTION = ("#b58900", ":", "D")
_COLOURS = ("#2a9d8f", "#e9b93a", "#8ab17d", "#b06ab3", "#6c8ebf", "#1d6f64", "#d9743c", "#86b6d9", "#7f6a4d")


def draw_search(path: Path, found: TapSearch, labels: dict[str, str]) -> Path:
    """Draw ``found`` as a PNG at ``path``; ``labels`` says what people call a `LayerKind` by its name."""
    layers = len(found.layers)
    figure, axes = new_figure([min(14.0, max(5.2, 0.17 * layers + 2)), 4.6], height=4.2)
    _draw_layers(axes[0], found, labels)
    _draw_ahead(axes[1], found)
    return save_png(figure, path)


def _draw_layers(axis: Any, found: TapSearch, labels: dict[str, str]) -> None:
    colours = dict(zip((kind.name for kind in LayerKind), _COLOURS, strict=False))
    scores = sorted(found.layers, key=lambda score: score.layer)
    for kind in dict.fromkeys(score.kind for score in scores):
        of_kind = [score for score in scores if score.kind == kind]
        axis.bar(
            [score.layer for score in of_kind],
            [score.alone for score in of_kind],
            color=colours.get(kind, "#777777"),
            label=labels.get(kind, kind.lower()),
            zorder=2,
        )
    low = min(0.0, *(score.alone for score in scores))
    top = max(score.alone for score in scores)
    step = 0.07 * (top - low)
    for score in scores:
        if score.order is not None:
            axis.annotate(
                str(score.order),
                (score.layer, max(score.alone, 0) + step),
                ha="center",
                va="center",
                fontsize=8,
                color="white",
                bbox={"boxstyle": "circle", "facecolor": _STYLES["searched"][0], "edgecolor": "none", "pad": 0.25},
            )
    default = next(one.taps for one in found.sets if one.name == "default")
    axis.plot([], [], "o", color=_STYLES["searched"][0], label="chosen, in this order")
    axis.plot(default, [low - step / 2] * len(default), "s", color=_STYLES["default"][0], markersize=4, label="default")
    axis.set(xlabel="layer", ylabel="explained variance", title="Each layer alone")
    axis.set_ylim(low - 1.2 * step, top + 4 * step)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y", alpha=0.25, zorder=0)
    axis.legend(fontsize=7, ncols=3, loc="upper left")


def _draw_ahead(axis: Any, found: TapSearch) -> None:
    for one in found.sets:
        colour, line, marker = _STYLES.get(one.name, _ATTENTION)
        axis.plot(
            found.ahead,
            [1 - share for share in one.by_ahead],
            line,
            color=colour,
            marker=marker,
            markersize=4,
            label=f"{one.name}: {','.join(map(str, one.taps))}",
        )
    axis.set(xlabel="tokens ahead", ylabel="unexplained variance", title="Sets of layers")
    axis.set_xticks(list(found.ahead))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
