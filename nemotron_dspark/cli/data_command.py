"""`nds data prompts|regenerate|check|split`: conversations with the target's own answers."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig
from nemotron_dspark.errors import InputError

if TYPE_CHECKING:
    from nemotron_dspark.data.check import DataReport
    from nemotron_dspark.data.presets import PromptSet, PromptsProgress, PromptsReport
    from nemotron_dspark.data.regenerate import RegenerateProgress, RegenerateReport
    from nemotron_dspark.data.split import SplitReport


@dataclasses.dataclass(frozen=True)
class PresetList:
    """What `nds data prompts` lists."""

    presets: "Mapping[str, Sequence[PromptSet]]"


def register(app: typer.Typer) -> None:
    commands = shell.group(app, "data", "Get prompts, have the target answer them; check data files.")
    shell.command(commands, show=_show_prompts)(prompts)
    shell.command(commands, show=_show_regenerated)(regenerate)
    shell.command(commands, target="optional", show=_show_checked)(check)
    shell.command(commands, show=_show_split)(split)


def prompts(
    preset: Annotated[
        Literal["chat", "code", "math", "reasoning", "agentic"] | None,
        typer.Option(help="What the draft is for; without it they are listed."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="For train.jsonl, held_out.jsonl and about.json; prompts/<preset>."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts, held-out ones included.")] = 50_000,
    held_out: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share that is kept out of training.")] = 0.05,
    against: Annotated[
        list[str] | None,
        typer.Option(help=shell.several("More evaluation prompts, which are left out if the sets have them")),
    ] = None,
    revision: Annotated[
        list[str] | None, typer.Option(help="Commit of a data set, as org/name=COMMIT; repeat it for several.")
    ] = None,
    local: Annotated[
        Path | None, typer.Option(help="Folder with copies of the data sets in org/name, in place of the hub.")
    ] = None,
) -> "PromptsReport | PresetList":
    """Take prompts from open data sets: each once, none of MT-Bench, HumanEval, GSM8K or MATH-500."""
    from nemotron_dspark.data import presets

    if preset is None:
        return PresetList(presets.PRESETS)
    wrong = next((text for text in revision or () if not all(text.partition("="))), None)
    if wrong is not None:
        raise InputError(f"--revision {wrong} does not name a data set and its commit.", "Write org/name=COMMIT.")
    with shell.bars() as bars:

        def show(now: "PromptsProgress") -> None:
            bars.update("prompts", now.kept, now.limit, text=f"prompts, of {now.read:,} rows")

        return presets.write_prompts(
            preset,
            out or Path("prompts") / preset,
            limit=limit,
            held_out=held_out,
            against=against or (),
            revisions=dict(text.split("=", 1) for text in revision or ()),
            local=local,
            progress=show,
        )


def regenerate(
    prompts: Annotated[
        list[str], typer.Option("--prompts", "-p", help=shell.several("JSON lines of prompts or conversations"))
    ],
    base_url: Annotated[
        list[str],
        typer.Option(help="OpenAI-compatible server of the target, with /v1; repeat it for several: work is shared."),
    ],
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Instead of --out: answers/<target>.jsonl, which stages find.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON lines to write; an unfinished file is continued.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name; default: the server's first.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time to each server.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature of the answers.")] = 0.7,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; default: the server's.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Most likely tokens to sample from; default: all.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; longer ones are kept, cut off.")] = 4096,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Switch reasoning; default: the template's.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Default: the variable OPENAI_API_KEY.")] = None,
) -> "RegenerateReport":
    """Replace every answer by the target's own, through a server that runs it."""
    from nemotron_dspark.data import regenerate as room

    if out is None:
        if target is None:
            raise InputError("Neither --out nor --target is given.", "Give --target, for answers/<target>.jsonl.")
        from nemotron_dspark.recipe.latest import default_answers

        out = default_answers(target)
    shell.stop_on_sigterm()
    with shell.bars() as bars:

        def show(now: "RegenerateProgress") -> None:
            bars.update("answers", now.done, now.total, tokens=now.tokens)

        return room.regenerate(
            prompts,
            out,
            base_url=base_url,
            model=model,
            concurrency=concurrency,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=max_tokens,
            thinking=thinking,
            api_key=api_key or os.environ.get("OPENAI_API_KEY", "none"),
            progress=show,
        )


def check(
    config: RunConfig, file: Annotated[list[str], typer.Argument(help=shell.several("JSON lines of conversations"))]
) -> "DataReport":
    """Say which conversations can be used, which are skipped and why, and how many tokens would train the draft.

    With --target they are also tokenised, by its tokenizer and chat format.
    """
    from nemotron_dspark.data.check import check_data
    from nemotron_dspark.targets import Checkpoint

    tokenizer = Checkpoint.of(config.target).load_tokenizer() if config.target.name else None
    with shell.err.status("reading") as status:

        def tell(line: int) -> None:
            if line % 100 == 0:
                status.update(f"line {line:,}")

        return check_data(file, tokenizer, config.data, progress=tell)


def split(
    file: Annotated[list[str], typer.Argument(help=shell.several("JSON lines of prompts or conversations"))],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for train.jsonl and held_out.jsonl.")],
    held_out: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the lines to hold out.")] = 0.05,
) -> "SplitReport":
    """Hold a share of the data out of training, for `nds eval`; by what is asked, so always the same."""
    from nemotron_dspark.data import split as room

    return room.split(file, out, held_out)


def _show_prompts(report: "PromptsReport | PresetList") -> None:
    if isinstance(report, PresetList):
        for preset, sets in report.presets.items():
            shell.out.print(f"[bold]{preset}[/]")
            shell.show_rows((f"  {known.name} {known.config or ''}", _described(known)) for known in sets)
        return
    left_out = [f"{count:,} as in {name}" for name, count in report.overlapping.items()]
    shell.show_rows(
        [
            ("train", f"{report.train_file}: {report.train:,} prompts"),
            ("held out", f"{report.held_out_file}: {report.held_out:,} prompts"),
            ("left out", ", ".join([f"{report.doubled:,} seen before", *left_out])),
            ("checked against", ", ".join(f"{name} ({count:,})" for name, count in report.checked_against.items())),
            *((s["name"], f"{s['prompts']:,} prompts, {s['licence']}, at {s['revision']}") for s in report.sources),
        ],
        report.skipped.sentences(),
    )


def _described(known: "PromptSet") -> str:
    pinned = f"pinned to {known.revision[:8]}" if known.revision else "not pinned"
    return f"{', '.join(known.splits)}: {known.rows}, {known.licence}, {pinned}; {known.what}"


def _show_split(report: "SplitReport") -> None:
    shell.show_rows(
        [
            ("train", f"{report.train_file}: {report.train:,} lines"),
            ("held out", f"{report.held_out_file}: {report.held_out:,} lines"),
        ]
    )


def _show_regenerated(report: "RegenerateReport") -> None:
    shell.show_rows(
        [
            ("file", str(report.out_file)),
            ("answered", f"{report.answered:,}, {report.reused:,} of them in an earlier run"),
            ("cut off", f"{report.cut:,} at the longest answer allowed"),
            ("tokens", f"{report.tokens:,} in {report.seconds:.1f} s"),
            (
                "branches",
                f"{report.branches:,} more conversations: other calls than recorded" if report.branches else None,
            ),
            *((url, f"{count:,} prompts") for url, count in report.servers.items() if len(report.servers) > 1),
        ],
        report.skipped.sentences(),
    )


def _show_checked(report: "DataReport") -> None:
    rows: list[tuple[str, str | None]] = [
        ("file", report.file),
        ("usable", f"{report.conversations:,} conversations with {report.answers:,} answers"),
        ("cut off", f"{report.cut_answers:,} have a last answer without an end"),
    ]
    if report.tokens is not None and report.loss_tokens is not None:
        rows += [
            ("samples", f"{report.samples:,}"),
            ("tokens", f"{report.tokens:,}, {shell.share(report.loss_tokens, report.tokens)} of them train the draft"),
            ("lengths", f"median {report.median:,}, longest {report.longest:,}"),
            ("at the maximal length", f"{report.at_max_length:,}"),
        ]
    shell.show_rows(rows, report.skipped.sentences())
