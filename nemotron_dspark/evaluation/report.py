"""Tables of an evaluation."""

from collections.abc import Mapping

from rich.table import Table

from nemotron_dspark.evaluation.measure import Evaluation, Measurement


def acceptance_table(measurements: Mapping[str, Measurement], title: str = "Acceptance") -> Table:
    """One row per measurement: accepted length, then the share of rounds in which each position was kept."""
    slots = max(len(measurement.per_position) for measurement in measurements.values())
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = (
        "accepted length: tokens gained a round, the target's own included\n"
        "1…γ: share of rounds that kept the draft at this position"
    )
    table.add_column("", no_wrap=True)
    table.add_column("accepted\nlength", justify="right", min_width=8)
    for slot in range(1, slots + 1):
        table.add_column(str(slot), justify="right")
    for label, measurement in measurements.items():
        shares = [f"{share:.0%}" for share in measurement.per_position]
        table.add_row(label, f"[bold]{measurement.accepted_length:.2f}[/]", *shares)
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


def label_of(measurement: Measurement) -> str:
    return "greedy" if measurement.temperature == 0 else f"temperature {measurement.temperature:g}"
