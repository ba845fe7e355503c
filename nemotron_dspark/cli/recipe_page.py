"""The status page of a recipe: a table of its stages that lives while it runs; elsewhere than on a terminal, lines."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.recipe.graph import Stage
from nemotron_dspark.recipe.ledger import Ledger, Record, Status
from nemotron_dspark.recipe.plan import hours
from nemotron_dspark.recipe.work import RecipeProgress

_MARKS = {"done": "[green]✓[/]", "running": "[yellow]▶[/]", "not needed": "[dim]–[/]", "refused": "[red]✗[/]"}


def under_headings(found: Sequence[Stage]) -> Iterator[tuple[str, Stage]]:
    """Each stage with its label where that is another than the one before it, else with an empty text."""
    label = ""
    for stage in found:
        yield stage.label if stage.label != label else "", stage
        label = stage.label


def indented(stage: Stage) -> str:
    return escape(f"  {stage.short}" if stage.label else stage.short)


def stage_table(
    found: Sequence[Stage],
    statuses: dict[str, Status],
    records: dict[str, Record],
    notes: dict[str, str],
    running: str = "",
) -> Table:
    """A row for each stage: where it stands, how long it took, what came out or is to come."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", "stage", "time"):
        table.add_column(name, no_wrap=True, justify="right" if name == "time" else "left")
    table.add_column("", overflow="fold")
    for heading, stage in under_headings(found):
        if heading:
            table.add_row("", f"[bold]{escape(heading)}[/]")
        status, record = statuses[stage.name], records.get(stage.name)
        mark = "running" if stage.name == running else status.state
        mark = "refused" if mark == "done" and record and "refused" in record.result else mark
        text = notes.get(stage.name) or status.why or (record.said if record and status.state == "done" else "")
        seconds = record.seconds if record and mark in ("done", "begun", "refused") else 0.0
        table.add_row(
            _MARKS.get(mark, " "),
            indented(stage),
            hours(seconds / 3600) if seconds else "",
            escape(text or (status.state if mark not in ("done", "to do", "running") else "")),
        )
    return table


class Page(RecipeProgress):
    """A context manager; on a terminal the page is there until it is left."""

    def __init__(self) -> None:
        self._found: Sequence[Stage] = ()
        self._statuses: dict[str, Status] = {}
        self._records: dict[str, Record] = {}
        self._notes: dict[str, str] = {}
        self._running, self._told = "", time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=shell.err)
        self._task = self._bar.add_task("", total=None, visible=False)
        self._live = Live(console=shell.err, get_renderable=self._page, refresh_per_second=4)
        self._shown = shell.err.is_terminal

    def __enter__(self) -> "Page":
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.update(self._task, visible=False)
        self._running = ""
        if self._shown:
            self._live.stop()

    def begin(self, found: Sequence[Stage], ledger: Ledger) -> None:
        self._found, self._statuses = found, ledger.statuses(found)
        self._records = {stage.name: record for stage in found if (record := ledger.record(stage))}
        done = sum(status.state in ("done", "not needed") for status in self._statuses.values())
        if not self._shown and done:
            shell.err.print(f"{done} of {len(found)} stages are done.")

    def stage(self, name: str) -> None:
        self._running = name
        self._bar.reset(self._task, description="", total=None, visible=False)
        if not self._shown:
            at = next(place for place, stage in enumerate(self._found, 1) if stage.name == name)
            shell.err.print(f"[bold]{at}/{len(self._found)} {escape(name)}[/]", soft_wrap=True)

    def note(self, text: str) -> None:
        self._notes[self._running] = text
        if not self._shown:
            shell.err.print(f"    {escape(text)}", soft_wrap=True)

    def update(self, text: str, done: float, total: float) -> None:
        self._bar.update(self._task, description=escape(text), completed=done, total=total or None, visible=True)
        if not self._shown and time.monotonic() - self._told > shell.LINE_SECONDS:
            self._told = time.monotonic()
            share = f": {done / total:.0%}" if total else ""
            shell.err.print(f"    {escape(text)}{share}", soft_wrap=True)

    def ended(self, name: str, record: Record) -> None:
        self._statuses[name], self._records[name], self._notes[name] = Status("done"), record, record.said
        self._running = ""

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        if self._shown:
            self._live.stop()
        try:
            yield
        finally:
            if self._shown:
                self._live.start()

    def _page(self) -> Group:
        table = stage_table(self._found, self._statuses, self._records, self._notes, self._running)
        return Group(table, self._bar)
