"""Show an evaluation: JSON, tables, a picture, and the verdict on equality."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from nemotron_dspark import files
from nemotron_dspark.errors import CheckError
from nemotron_dspark.evaluation import picture
from nemotron_dspark.evaluation.expected import Expected
from nemotron_dspark.evaluation.lossless import SampledLossless
from nemotron_dspark.evaluation.measure import Evaluation, Measurement


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """What was measured, and on what."""

    target: str
    draft: str  # its folder; empty for one that was given loaded
    prompts_file: str
    prompts: int
    dtype: str  # of the target's weights
    evaluation: Evaluation
    sampled: SampledLossless | None = None  # where it was asked for
    expected: tuple[Expected, ...] = ()  # by block length, where whole blocks were measured and rounds were profiled

    def to_json(self) -> dict[str, Any]:
        names = {"target": self.target, "draft": self.draft, "prompts_file": self.prompts_file}
        sampled = {"sampled_lossless": self.sampled.to_json()} if self.sampled else {}
        expected = {"expected": [each.to_json() for each in self.expected]} if self.expected else {}
        return names | self.evaluation.to_json() | sampled | expected

    @property
    def labelled(self) -> dict[str, Measurement]:
        """The measurements by what a table calls them."""
        return {label_of(measurement.temperature): measurement for measurement in self.evaluation.measurements}

    def save(self, folder: Path) -> tuple[Path, ...]:
        """Write ``eval.json`` there, and ``eval.png`` if matplotlib is installed; returns their paths."""
        files.write_json(folder / "eval.json", self.to_json())
        drawn = [picture.draw_run(folder / "eval.png", self.labelled, title=self.target)] if picture.available() else []
        return folder / "eval.json", *drawn

    def check_lossless(self) -> str | None:
        """A remark on outputs that differ because half precision rounds; None when all are equal.

        Raises:
            CheckError: they differ in full precision.
        """
        lossless = self.evaluation.lossless
        if self.sampled is not None and not self.sampled.equal:
            if self.dtype == "torch.float32":
                raise CheckError(
                    f"The draft changes the distribution of sampled answers (p = {self.sampled.p_value:.2g}).",
                    "Run `nds inspect --probe` on the target; if its proofs pass, report it.",
                )
            return (
                f"sampled answers differ in distribution (p = {self.sampled.p_value:.2g}). In half precision a block "
                "and a single token round differently; --set target.dtype=float32 decides."
            )
        if lossless.identical == lossless.prompts:
            return None
        if self.dtype == "torch.float32":
            raise CheckError(
                f"Speculative output differs from plain output, first at {lossless.first_difference}.",
                "Run `nds inspect --probe` on the target; if its proofs pass, report it.",
            )
        return (
            f"outputs differ first at {lossless.first_difference}. In half precision a block and a single token round "
            "differently, and near ties fall either way; --set target.dtype=float32 decides."
        )


def acceptance_table(measurements: Mapping[str, Measurement], title: str = "Acceptance") -> Table:
    """One row per measurement: accepted length, then the share of rounds in which each position was kept."""
    slots = max(len(measurement.per_position) for measurement in measurements.values())
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = (
        "accepted length: tokens gained a round, the target's own included; ± standard error over prompts\n"
        "1…γ: share of rounds that kept the draft at this position"
    )
    table.add_column("", no_wrap=True)
    table.add_column("accepted\nlength", justify="right", min_width=8, no_wrap=True)
    cut = any(measurement.drafted < slots for measurement in measurements.values() if measurement.rounds)
    if cut:
        table.add_column("slots\nverified", justify="right")
    for slot in range(1, slots + 1):
        table.add_column(str(slot), justify="right")
    for label, measurement in measurements.items():
        shares = [f"{share:.0%}" for share in measurement.per_position]
        error = f" ± {measurement.standard_error:.2f}" if measurement.standard_error is not None else ""
        drafted = [f"{measurement.drafted:.2f}"] if cut else []
        table.add_row(label, f"[bold]{measurement.accepted_length:.2f}[/]{error}", *drafted, *shares)
    return table


def speed_table(evaluation: Evaluation) -> Table:
    """Plain against speculative decoding, and whether they said the same."""
    table = Table(title="Greedy decoding, one request at a time", title_justify="left")
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    table.add_column("", justify="right")
    table.add_row("plain", f"{evaluation.plain_tokens_per_second:.1f}", "")
    table.add_row(
        "speculative", f"{evaluation.speculative_tokens_per_second:.1f}", f"[bold]{evaluation.speedup:.2f}×[/]"
    )
    lossless = evaluation.lossless
    colour = "green" if lossless.identical == lossless.prompts else "red"
    table.add_row("identical output", f"[{colour}]{lossless.identical}/{lossless.prompts}[/]", "prompts")
    return table


def label_of(temperature: float) -> str:
    """What tables and pictures call a temperature of sampling."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"
