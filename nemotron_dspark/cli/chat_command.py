"""`nds chat`: what of each conversation trains the draft, to look at."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemotron_dspark.chat.mask import Stretch
    from nemotron_dspark.data.conversations import Skipped
    from nemotron_dspark.data.samples import LinedSample

TRAINED, TRAINED_SPECIAL, SPECIAL = "black on green", "bold white on dark_green", "cyan"
OPENS, CLOSES = "⟦", "⟧"  # around what trains, where there is no colour


def register(app: typer.Typer) -> None:
    shell.command(app)(chat)


def chat(
    config: RunConfig,
    data: Annotated[list[str], typer.Option("--data", "-d", help=shell.several("JSON lines of conversations"))],
    limit: Annotated[int, typer.Option(min=1, help="Show this many conversations.")] = 5,
) -> None:
    """Show each conversation as the tokens of its samples, coloured by what trains the draft.

    Needs the target's tokenizer and config only. Settings such as data.thinking are those of `nds cache build`.
    """
    from nemotron_dspark.chat.format import recognise
    from nemotron_dspark.data.samples import read_samples
    from nemotron_dspark.data.sources import one_file
    from nemotron_dspark.targets import Checkpoint

    tokenizer = Checkpoint.of(config.target).load_tokenizer()
    chat_format = recognise(tokenizer)
    items = read_samples(one_file(data), tokenizer, config.data)
    shown, skipped, more = _first(items, limit)  # it stops reading there: a data file may be large
    samples = [sample.tokens for conversation, _ in shown for sample in conversation]
    counts = {
        "samples": len(samples),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "loss_tokens": sum(sample.loss_tokens for sample in samples),
    }
    if shell.state.json:
        shell.emit(
            {
                "target": config.target.name,
                "format": chat_format and chat_format.name,
                "conversations": [_as_json(tokenizer, *conversation) for conversation in shown],
                "skipped": [{"line": item.line, "reason": item.reason} for item in skipped],
                "more": more,
                **counts,
            }
        )
        return
    described = chat_format.description if chat_format else "a chat template of no bundled format"
    shell.out.print(f"[bold]{chat_format.name if chat_format else 'unknown'}[/]  {escape(described)}")
    shell.out.print(_legend(), end="\n\n")
    for conversation, left_out in shown:
        _print(tokenizer, conversation, left_out)
    for item in skipped:
        shell.out.print(f"[yellow]line {item.line} skipped: {escape(item.reason)}[/]", soft_wrap=True)
    shell.out.print(
        f"conversations {len(shown):,}, samples {counts['samples']:,}, tokens {counts['tokens']:,}, "
        f"of which train {counts['loss_tokens']:,}",
        soft_wrap=True,
    )
    if more:
        shell.out.print("[dim]There are more conversations: --limit shows them.[/]")


Shown = tuple[list["LinedSample"], list["Skipped"]]  # the samples of a conversation, and what of it is left out


def _first(items: Iterable["LinedSample | Skipped"], limit: int) -> tuple[list[Shown], list["Skipped"], bool]:
    """The first conversations that train, the lines on the way that do not, and whether there are more."""
    from nemotron_dspark.data.conversations import Skipped

    shown: list[Shown] = []
    skipped: list[Skipped] = []
    for _line, group in itertools.groupby(items, key=lambda item: item.line):
        found = list(group)
        left_out = [item for item in found if isinstance(item, Skipped)]
        samples = [item for item in found if not isinstance(item, Skipped)]
        if not samples:
            skipped += left_out
        elif len(shown) == limit:
            return shown, skipped, True
        else:
            shown.append((samples, left_out))
    return shown, skipped, False


def _as_json(
    tokenizer: "PreTrainedTokenizerBase", samples: Sequence["LinedSample"], left_out: Sequence["Skipped"]
) -> dict[str, Any]:
    return {
        "line": samples[0].line,
        "samples": [
            {
                "ids": sample.tokens.input_ids.tolist(),
                "tokens": [tokenizer.decode([index]) for index in sample.tokens.input_ids.tolist()],
                "mask": sample.tokens.loss_mask.tolist(),
            }
            for sample in samples
        ],
        "left_out": [item.reason for item in left_out],
    }


def _print(
    tokenizer: "PreTrainedTokenizerBase", samples: Sequence["LinedSample"], left_out: Sequence["Skipped"]
) -> None:
    from nemotron_dspark.chat.mask import stretches

    parts = f", {len(samples)} samples: the template rewrites its history" if len(samples) > 1 else ""
    for number, sample in enumerate(samples, start=1):
        tokens = sample.tokens
        place = (
            f"[bold]line {sample.line}[/]{parts}" if number == 1 else f"[bold]line {sample.line}[/], sample {number}"
        )
        share = f"{tokens.loss_tokens:,} of {len(tokens.input_ids):,} tokens train"
        cut = "" if sample.conversation.complete else "; the last answer was cut off and has no end"
        shell.out.print(f"{place}: {share}{cut}", soft_wrap=True)
        shell.out.print(_coloured(stretches(tokenizer, tokens)), soft_wrap=True, end="\n\n")
    for item in left_out:
        shell.out.print(f"[yellow]line {item.line}: {escape(item.reason)}[/]", soft_wrap=True)


def _coloured(found: Sequence["Stretch"]) -> Text:
    """Line breaks are shown, as a break may train or not; without colours brackets stand around what trains."""
    text = Text()
    for trained, group in itertools.groupby(found, key=lambda stretch: stretch.trained):
        text.append(OPENS if trained and _plain() else "")
        for stretch in group:
            style = (TRAINED_SPECIAL if stretch.special else TRAINED) if trained else SPECIAL if stretch.special else ""
            text.append(stretch.text.replace("\n", "↵\n"), style)
        text.append(CLOSES if trained and _plain() else "")
    return text


def _plain() -> bool:
    return shell.out.color_system is None or shell.out.no_color


def _legend() -> Text:
    if _plain():
        return Text(f"{OPENS}what trains{CLOSES}   the rest is context   ↵ line break")
    return Text.assemble(
        (" trains ", TRAINED),
        (" trains, special ", TRAINED_SPECIAL),
        ("   special", SPECIAL),
        "   context   ↵ line break",
    )
