"""`nds eval`: accepted length, acceptance by position, speed against plain decoding, and equality with it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import compare_command, shell
from nemotron_dspark.config import RunConfig
from nemotron_dspark.errors import InputError

if TYPE_CHECKING:
    from nemotron_dspark.engines.measure import EngineEvaluation
    from nemotron_dspark.evaluation.report import EvalReport


SCHEDULE = shell.KeyOption("--schedule", "eval.schedule")
PROFILE = shell.KeyOption("--profile", "eval.profile")


def register(app: typer.Typer) -> None:
    shell.command(app, "eval", target="optional", keys=[SCHEDULE, PROFILE])(evaluate)


def evaluate(
    config: RunConfig,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            "-p",
            help=shell.several("Prompts the draft has not seen; without it those held out. JSON lines"),
        ),
    ] = None,
    draft: Annotated[Path | None, shell.DRAFT] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N prompts.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for eval.json and eval.png.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Measure the draft of a running engine, or of nds serve."),
    ] = None,
    plain_engine: Annotated[
        str | None, typer.Option(metavar="URL", help="With --engine: one that serves the target without a draft.")
    ] = None,
    lossless: Annotated[
        int | None,
        typer.Option(metavar="N", help="Compare N sampled answers to each of 8 prompts, drafted and not."),
    ] = None,
    lengths: Annotated[str | None, shell.CONTEXT_LENGTHS] = None,
    confidence_threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="P", help="As --schedule threshold:P.")
    ] = None,
) -> None:
    """Measure a draft: accepted length, acceptance by position, speed, equal output."""
    if confidence_threshold is not None:
        schedule = f"threshold:{confidence_threshold:g}"
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"schedule": schedule})})
    if lengths is not None and (engine is not None or lossless is not None):
        given = "--engine" if engine is not None else "--lossless"
        raise InputError(f"Both --context-lengths and {given} are given.", "Measure one after the other.")
    if plain_engine is not None and engine is None:
        raise InputError("--plain-engine is given without --engine.", "Give a running engine with --engine.")
    if engine is not None:
        _in_engine(config, prompts or shell.held_out_prompts(), draft, limit, out, engine, plain_engine, lossless)
        return
    draft = draft or shell.newest_draft(config)
    prompts = prompts or shell.held_out_prompts()
    if lengths is not None:
        compare_command.show(compare_command.compared(config, [draft], prompts, lengths, limit), out)
        return
    from nemotron_dspark import stages

    with shell.measuring() as (on_loaded, on_progress):
        report = stages.evaluate(
            config,
            draft,
            prompts,
            limit=limit,
            lossless=lossless,
            on_loaded=on_loaded,
            on_progress=on_progress,
        )
    shell.present(report, _show, report.save(out) if out is not None else ())
    if remark := report.check_lossless():
        shell.note(remark)


def _show(found: "EvalReport") -> None:
    from nemotron_dspark.evaluation import expected, report

    shell.out.print(report.acceptance_table(found.labelled, f"{found.prompts} prompts of {escape(found.prompts_file)}"))
    shell.out.print(report.speed_table(found.evaluation))
    if found.expected:
        shell.out.print(expected.table(found.expected))
        for sentence in expected.sentences(found.expected):
            shell.out.print(sentence, soft_wrap=True)
    if found.sampled:
        shell.out.print(found.sampled.sentence(), soft_wrap=True)


def _in_engine(
    config: RunConfig,
    prompts: list[str],
    draft: Path | None,
    limit: int | None,
    out: Path | None,
    url: str,
    plain_url: str | None,
    lossless: int | None,
) -> None:
    from nemotron_dspark.engines.measure import evaluate_engine

    here = {"--draft": draft, "--schedule": config.eval.schedule != "off", "--profile": config.eval.profile}
    if given := next((name for name, value in here.items() if value), None):
        raise InputError(
            f"Both {given} and --engine are given, and an engine has a draft and settings of its own.",
            "Leave one of them out.",
        )
    with shell.bars() as bars:
        found = evaluate_engine(
            config, url, prompts, plain_url=plain_url, limit=limit, lossless=lossless, progress=bars.update
        )
    shell.present(found, _show_engine, [found.save(out)] if out is not None else ())
    found.check_lossless()


def _show_engine(found: "EngineEvaluation") -> None:
    shell.out.print(f"{found.engine}, {escape(found.model)} at {escape(found.url)}", soft_wrap=True)
    rows: list[tuple[str, str | None]] = []
    for each in found.measurements:
        error = f" ± {each.standard_error:.2f}" if each.standard_error is not None else ""
        rows.append((f"accepted length, temperature {each.temperature:g}", f"{each.accepted_length:.2f}{error}"))
        kept = " ".join(f"{share:.0%}" for share in each.per_position)
        rows.append(("  rounds that kept each slot", kept or None))
        rows.append(("  tokens/s, one request at a time", f"{each.tokens_per_second:.1f}"))
    if (plain := found.plain) is not None:
        rows.append(("plain tokens/s, greedy", f"{plain.tokens_per_second:.1f}"))
        where = f", first difference at {plain.first_difference}" if plain.first_difference else ""
        rows.append(("identical greedy answers", f"{plain.identical} of {plain.prompts}{where}"))
    shell.show_rows(rows)
    if found.sampled is not None:
        shell.out.print(found.sampled.sentence(), soft_wrap=True)
