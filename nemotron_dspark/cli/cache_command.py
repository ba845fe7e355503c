"""`nds cache build|info|verify|convert`: the target's hidden states on disk."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig
from nemotron_dspark.files import size_text

if TYPE_CHECKING:
    from nemotron_dspark.cache.convert import ConvertReport
    from nemotron_dspark.cache.verify import CacheInfo, VerifyReport
    from nemotron_dspark.stages import CacheReport

_BAR = 40
_FORMAT, _TO = shell.KeyOption("--cache-format", "cache.format"), shell.KeyOption("--to", "cache.format")

FolderArgument = Annotated[Path, typer.Argument(help="Cache folder, as given to `cache build --out`.")]


def register(app: typer.Typer) -> None:
    commands = shell.group(app, "cache", "Build, describe and check target caches.")
    shell.command(commands, keys=[shell.TAPS, _FORMAT, shell.STREAM], show=show_built)(build)
    shell.command(commands, show=_show_info)(info)
    shell.command(commands, show=_show_verified, failed=lambda report: not report.whole)(verify)
    shell.command(commands, target="none", keys=[_TO], show=_show_converted)(convert)


def build(
    read_config: Callable[[], RunConfig],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help=shell.several("Conversations with the target's answers; without it the newest here. JSON lines"),
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the cache, caches/<target>; an unfinished one is continued."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share the work, each with the target; default: one a GPU."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="Take the hidden states from a vLLM that `nds engine vllm --hidden-states` started, at this address "
            "(several: repeat it), or from a folder of its files.",
        ),
    ] = None,
) -> "CacheReport | None":
    """Run the target over conversations and keep the hidden states a draft trains on.

    Under torchrun every process builds a part of the samples, in a folder that all machines share.
    """
    shell.stop_on_sigterm()
    from nemotron_dspark.distributed import init_distributed

    with init_distributed() as context:
        config = read_config()
        from nemotron_dspark.recipe import latest
        from nemotron_dspark.stages import build_cache

        if not data:
            found = latest.answered(config)
            if context.is_main:
                shell.note(f"--data is not given: {found.said}.")
            data = [str(found.path)]
        with shell.bars() if context.is_main else contextlib.nullcontext() as bars:
            report = build_cache(
                config,
                data,
                out or latest.default_cache(config),
                processes=processes,
                engines=engine or (),
                on_progress=(lambda now: shell.show_build(bars, now)) if bars else None,
                context=context,
            )
    return report if context.is_main else None


def info(folder: FolderArgument) -> "CacheInfo":
    """Say what a cache holds."""
    from nemotron_dspark.cache.verify import summarise

    return summarise(folder)


def verify(
    folder: FolderArgument,
    write_checksums: Annotated[
        bool, typer.Option(help="First write the checksums that a cache of DeepSpec's does not have.")
    ] = False,
) -> "VerifyReport":
    """Check every checksum, record and value; exit code 1 and one line per problem if anything is wrong."""
    from nemotron_dspark.cache import verify as checking

    with shell.err.status("reading") as status:
        check = checking.write_missing_checksums if write_checksums else checking.verify
        return check(folder, progress=lambda name: status.update(f"reading {escape(name)}"))


def convert(
    config: RunConfig,
    source: FolderArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new cache; an unfinished one is continued.")],
) -> "ConvertReport":
    """Write a cache in the other format: compact for less disk, deepspec for DeepSpec's own trainer."""
    from nemotron_dspark.cache.convert import convert_cache

    shell.stop_on_sigterm()
    with shell.bars() as bars:
        return convert_cache(source, out, config.cache, on_progress=lambda now: shell.show_build(bars, now))


def show_built(report: "CacheReport") -> None:
    built, mask = report.build, report.mask_token
    shell.show_rows(
        [
            ("cache", str(built.folder)),
            ("samples", f"{built.samples:,}, {built.reused_samples:,} of them from an earlier run"),
            ("tokens", f"{built.tokens:,}, {shell.share(built.loss_tokens, built.tokens)} of them train the draft"),
            ("size", f"{size_text(built.bytes)} in {built.shards} shard{'s' * (built.shards != 1)}"),
            ("taps", ", ".join(map(str, report.taps))),
            ("mask token", f"{mask.id} ({mask.reason}); the data does not use it" if mask else None),
            ("time", f"{built.seconds:.1f} s"),
        ],
        [
            *([f"{built.cut} samples were cut off at the maximal length."] if built.cut else []),
            *built.notes,
            *built.skipped.sentences(),
        ],
    )


def _show_verified(report: "VerifyReport") -> None:
    for problem in report.problems:
        shell.out.print(f"[red]✗[/] {escape(problem)}", soft_wrap=True)
    if report.whole:
        count = report.files_with_checksums
        checked = f"{count} checksums" if count else "no checksums to compare"
        shell.out.print(
            f"[green]✓[/] {escape(str(report.folder))}: {report.samples} samples, {checked}", soft_wrap=True
        )


def _show_converted(report: "ConvertReport") -> None:
    shell.show_rows(
        [
            ("from", f"{report.source}: {report.source_format}, {size_text(report.source_bytes)}"),
            ("to", f"{report.folder}: {report.format}, {size_text(report.bytes)}"),
            ("samples", f"{report.samples:,}, {report.reused_samples:,} of them from an earlier run"),
            ("time", f"{report.seconds:.1f} s"),
        ]
    )


def _show_info(found: "CacheInfo") -> None:
    train = "" if found.loss_tokens is None else f", {shell.share(found.loss_tokens, found.tokens)} of them train"
    shards = f"{found.shards} shard{'s' * (found.shards != 1)}"
    shell.show_rows(
        [
            ("cache", str(found.folder)),
            ("target", found.target or "not recorded"),
            ("format", found.format),
            ("chat format", found.chat_template or "not recorded"),
            ("taps", f"{', '.join(map(str, found.taps))}, each {found.hidden_size} wide"),
            ("samples", f"{found.samples:,}"),
            ("tokens", f"{found.tokens:,}{train and train + ' the draft'}"),
            ("size", f"{size_text(found.bytes)} in {shards}, {found.bytes_per_token:,} bytes a token"),
        ]
    )
    most = max((bin_.samples for bin_ in found.lengths), default=1)
    lengths = Table("tokens", "samples", "", title="Lengths", title_justify="left", box=None)
    lengths.columns[1].justify = "right"
    for bin_ in found.lengths:
        bar = "█" * -(-_BAR * bin_.samples // most)
        lengths.add_row(f"{bin_.first}-{bin_.last}", f"{bin_.samples:,}", f"[cyan]{bar}[/]")
    shell.out.print(lengths)
