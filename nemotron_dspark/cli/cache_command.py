"""`nds cache build|info|verify|convert`: the target's hidden states on disk."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.files import size_text

if TYPE_CHECKING:
    from nemotron_dspark.cache.build import BuildProgress, BuildReport
    from nemotron_dspark.cache.info import CacheInfo

_BAR = 40

FolderArgument = Annotated[Path, typer.Argument(help="Cache folder, as given to `cache build --out`.")]


def register(app: typer.Typer) -> None:
    commands = typer.Typer(no_args_is_help=True, help="Build, describe and check target caches.")
    commands.command()(build)
    commands.command()(info)
    commands.command()(verify)
    commands.command()(convert)
    app.add_typer(commands, name="cache")


def build(
    target: shell.TargetOption,
    data: Annotated[Path, typer.Option("--data", "-d", help="JSON lines of conversations with the target's answers.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache; an unfinished one is continued.")],
    taps: shell.TapsOption = None,
    cache_format: Annotated[
        str | None, typer.Option("--cache-format", help="deepspec, or compact: quantised (cache.format).")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share the work, each with the target; default: one a GPU."),
    ] = None,
    config: shell.ConfigOption = None,
    set_: shell.SetOption = None,
    trust: shell.TrustOption = False,
    as_json: shell.JsonOption = False,
) -> None:
    """Run the target over conversations and keep the hidden states a draft trains on."""
    from nemotron_dspark.config.run import load_config

    assignments = [*(set_ or []), *shell.taps_setting(taps), *shell.trust_setting(trust)]
    assignments += [f"cache.format={cache_format}"] if cache_format else []
    settings = load_config(config, assignments, target=target)
    shell.quiet_libraries()
    from nemotron_dspark.cache.build import build_cache, helping_targets
    from nemotron_dspark.chat.mask_token import choose_mask_token
    from nemotron_dspark.targets import Target, proofs
    from nemotron_dspark.targets.taps import chosen_taps

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wanted = settings.target
    loaded = Target.of(wanted)
    helpers = helping_targets(wanted, loaded.device, processes)
    layers = chosen_taps(loaded.spec, settings.draft)
    if wanted.proofs:
        proofs.prove(loaded, layers)
    mask = choose_mask_token(loaded.tokenizer, loaded.spec, override=settings.draft.mask_token_id)
    with _BuildDisplay() as display:
        report = build_cache(
            loaded,
            data,
            out,
            taps=layers,
            data=settings.data,
            cache=settings.cache,
            mask_token_id=mask.id,
            helpers=helpers,
            progress=display.update,
        )
    if as_json:
        shell.emit(report.to_json() | {"taps": list(layers), "mask_token_id": mask.id})
    else:
        _print_report(report, layers)
        shell.out.print(f"mask token   {mask.id} ({escape(mask.reason)}); the data does not use it")


def info(folder: FolderArgument, as_json: shell.JsonOption = False) -> None:
    """Say what a cache holds."""
    from nemotron_dspark.cache.info import summarise

    found = summarise(folder)
    if as_json:
        shell.emit(found.to_json())
    else:
        _print_info(found)


def verify(
    folder: FolderArgument,
    write_checksums: Annotated[
        bool, typer.Option(help="First write the checksums that a cache of DeepSpec's does not have.")
    ] = False,
    as_json: shell.JsonOption = False,
) -> None:
    """Check every checksum, record and value; exit code 1 and one line per problem if anything is wrong."""
    from nemotron_dspark.cache.verify import verify as check
    from nemotron_dspark.cache.verify import write_missing_checksums

    with shell.err.status("reading") as status:
        if write_checksums:
            write_missing_checksums(folder)
        report = check(folder, progress=lambda name: status.update(f"reading {escape(name)}"))
    if as_json:
        shell.emit(
            {
                "folder": str(folder),
                "whole": report.whole,
                "samples": report.samples,
                "files_with_checksums": report.files,
                "problems": list(report.problems),
            }
        )
    else:
        for problem in report.problems:
            shell.out.print(f"[red]✗[/] {escape(problem)}", soft_wrap=True)
        if report.whole:
            checked = f"{report.files} checksums" if report.files else "no checksums to compare"
            shell.out.print(f"[green]✓[/] {escape(str(folder))}: {report.samples} samples, {checked}", soft_wrap=True)
    if not report.whole:
        raise typer.Exit(1)


def convert(
    source: FolderArgument,
    out: Annotated[Path, typer.Argument(help="Folder of the new cache; an unfinished one is continued.")],
    to: Annotated[str, typer.Option("--to", help="compact or deepspec.")],
    quantisation: Annotated[
        str | None, typer.Option(help="How a compact cache stores hidden states (cache.quantisation).")
    ] = None,
    config: shell.ConfigOption = None,
    set_: shell.SetOption = None,
    as_json: shell.JsonOption = False,
) -> None:
    """Write a cache in the other format: compact for less disk, deepspec for DeepSpec's own trainer."""
    from nemotron_dspark.config.run import load_config

    assignments = [*(set_ or []), f"cache.format={to}"]
    assignments += [f"cache.quantisation={quantisation}"] if quantisation else []
    settings = load_config(config, assignments)
    from nemotron_dspark.cache.convert import convert_cache

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _BuildDisplay() as display:
        report = convert_cache(source, out, settings.cache, progress=display.update)
    if as_json:
        shell.emit(report.to_json())
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("from", f"{escape(str(report.source))}: {report.source_format}, {size_text(report.source_bytes)}")
    table.add_row("to", f"{escape(str(report.folder))}: {report.format}, {size_text(report.bytes)}")
    table.add_row("samples", f"{report.samples:,}, {report.reused_samples:,} of them from an earlier run")
    table.add_row("time", f"{report.seconds:.1f} s")
    shell.out.print(table)


class _BuildDisplay:
    """A progress bar on stderr: samples, useful tokens per second, time left."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=shell.err,
            disable=not shell.err.is_terminal,
        )
        self._tasks: dict[str, int] = {}
        self._reused = 0

    def __enter__(self) -> "_BuildDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, progress: "BuildProgress") -> None:
        if progress.stage not in self._tasks:
            label = {"tokenise": "tokenise", "capture": "target", "convert": "convert"}[progress.stage]
            self._tasks[progress.stage] = self._bar.add_task(label, total=progress.total_samples or None, rate="")
            self._reused = progress.tokens
        task = self._tasks[progress.stage]
        seconds = self._bar.tasks[task].elapsed or 0.0
        rate = (
            f"{(progress.tokens - self._reused) / seconds:,.0f} tokens/s" if progress.tokens and seconds > 0.5 else ""
        )
        self._bar.update(task, completed=progress.samples, total=progress.total_samples or None, rate=rate)


def _print_report(report: "BuildReport", layers: tuple[int, ...]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("cache", escape(str(report.folder)))
    table.add_row("samples", f"{report.samples:,}, {report.reused_samples:,} of them from an earlier run")
    table.add_row("tokens", f"{report.tokens:,}, {_share(report.loss_tokens, report.tokens)} of them train the draft")
    table.add_row("size", f"{size_text(report.bytes)} in {report.shards} shard{'s' * (report.shards != 1)}")
    table.add_row("taps", ", ".join(map(str, layers)))
    table.add_row("time", f"{report.seconds:.1f} s")
    shell.out.print(table)
    if report.cut:
        shell.out.print(f"[yellow]{report.cut} samples were cut off at the maximal length.[/]")
    for sentence in (*report.notes, *report.skipped.sentences()):
        shell.out.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True)


def _print_info(found: "CacheInfo") -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("cache", escape(str(found.folder)))
    table.add_row("target", escape(found.target or "not recorded"))
    table.add_row("format", found.format)
    table.add_row("chat format", escape(found.chat_template or "not recorded"))
    table.add_row("taps", f"{', '.join(map(str, found.taps))}, each {found.hidden_size} wide")
    table.add_row("samples", f"{found.samples:,}")
    share = "" if found.loss_tokens is None else f", {_share(found.loss_tokens, found.tokens)} of them train the draft"
    table.add_row("tokens", f"{found.tokens:,}{share}")
    shards = f"{found.shards} shard{'s' * (found.shards != 1)}"
    table.add_row("size", f"{size_text(found.bytes)} in {shards}, {found.bytes_per_token:,} bytes a token")
    shell.out.print(table)
    most = max((bin_.samples for bin_ in found.lengths), default=1)
    lengths = Table("tokens", "samples", "", title="Lengths", title_justify="left", box=None)
    lengths.columns[1].justify = "right"
    for bin_ in found.lengths:
        bar = "█" * -(-_BAR * bin_.samples // most)
        lengths.add_row(f"{bin_.first}-{bin_.last}", f"{bin_.samples:,}", f"[cyan]{bar}[/]")
    shell.out.print(lengths)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"
