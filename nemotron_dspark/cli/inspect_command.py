"""`nds inspect`: what a target is and what its draft would be, from a config.json alone; `--probe` proves it loaded.

`--list` names the targets that have an alias, a licence or a preset here.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.recipe.describe import Description
    from nemotron_dspark.targets.proofs import ProofResult
    from nemotron_dspark.targets.spec import LayerKind

KINDS = {  # LayerKind name: what people call it, its colour
    "MAMBA2": ("Mamba-2", "cyan"),
    "ATTENTION": ("attention", "bold yellow"),
    "MLP": ("MLP", "green"),
    "MOE": ("mixture of experts", "magenta"),
    "DECODER": ("attention + MLP", "bold yellow"),
    "MAMBA1": ("Mamba-1", "blue"),
    "DELTA": ("gated delta net", "bright_cyan"),
    "CONV": ("short convolution", "bright_blue"),
    "PARALLEL": ("attention + Mamba-2", "bold bright_yellow"),
    "RECURRENT": ("another recurrence", "bright_blue"),
}
MARGIN = 2


def register(app: typer.Typer) -> None:
    shell.command(app, target="optional", keys=[shell.TAPS, shell.STREAM])(inspect)


def inspect(
    config: RunConfig,
    probe: Annotated[bool, typer.Option("--probe", help="Load the model and run the proofs.")] = False,
    known: Annotated[bool, typer.Option("--list", help="List the known targets and stop.")] = False,
) -> None:
    """Show what a target is, its taps, and the draft it would get."""
    if known:
        _list()
        return
    from nemotron_dspark.recipe.describe import inspect as describe

    found = describe(config)
    if not shell.state.json:
        _print(found)
    proofs = None
    if probe:
        from nemotron_dspark.targets.proofs import run_proofs
        from nemotron_dspark.targets.streamed import load_for_capture
        from nemotron_dspark.targets.target import keep_dtype, resolve_device

        on_cpu = resolve_device(config.target.device).type == "cpu"  # float32 proves more, and this is not done often
        with shell.err.status("Loading the target and running the proofs"):
            target = load_for_capture(keep_dtype(config.target, "float32" if on_cpu else None))
            proofs = run_proofs(target, found.draft.target_layer_ids)
    if shell.state.json:
        shell.emit(found.to_json() | {"proofs": proofs and [_proof_json(proof) for proof in proofs]})
    elif proofs is not None:
        _print_proofs(proofs)
    if proofs and not all(proof.passed for proof in proofs):
        raise typer.Exit(1)


def strip(layers: Sequence["LayerKind"], taps: Sequence[int], width: int) -> Text:
    """The layers as coloured characters under their numbers, with ``^`` below each tap, wrapped to ``width``."""
    per_row = max(10, (width - MARGIN) // 10 * 10)
    drawn = Text()
    for start in range(0, len(layers), per_row):
        row = range(start, min(start + per_row, len(layers)))
        drawn.append(" " * MARGIN + "".join(f"{number:<10}" for number in row[::10]).rstrip() + "\n", "dim")
        drawn.append(" " * MARGIN)
        for number in row:
            colour = KINDS[layers[number].name][1]
            drawn.append(layers[number].value, f"{colour} reverse" if number in taps else colour)
        marks = "".join("^" if number in taps else " " for number in row).rstrip()
        drawn.append("\n" + " " * MARGIN + marks + "\n", "bold")
    return drawn


def _list() -> None:
    """The known targets, one a row."""
    from nemotron_dspark.config.known import KNOWN

    if shell.state.json:
        shell.emit({"targets": [dataclasses.asdict(known) for known in KNOWN]})
        return
    licence: str | None = ""
    for shape, family in itertools.groupby(KNOWN, key=lambda known: (known.licence, known.billions, known.preset)):
        members = list(family)
        if shape[0] != licence:
            licence = shape[0]
            shell.out.print(f"\n[bold]{escape(licence or 'Licence not looked up: see the model card')}[/]")
        preset = f", preset {members[0].preset}" if members[0].preset else ""
        shell.out.print(f"  {members[0].layers} layers, {members[0].billions:.3f} billion parameters{preset}")
        for known in members:
            shell.out.print(f"    [cyan]{escape(known.repository)}[/]")
            for alias in known.aliases:
                shell.out.print(f"      [dim]also[/] {escape(alias)}")


def _print(found: "Description") -> None:
    spec, draft = found.spec, found.draft
    size = "" if found.parameters is None else f", {_count(found.parameters)} parameters"
    shell.out.print(f"[bold]{escape(spec.name)}[/]\n{spec.model_type}, {spec.num_layers} layers{size}\n")
    shell.out.print(strip(spec.layers, draft.target_layer_ids, shell.out.width), end="")
    shell.out.print(_legend(spec.layers, draft.target_layer_ids))
    shell.out.print(_target_table(found))
    shell.out.print(_draft_table(found))
    for note in found.notes:
        shell.remark(shell.out, "note", note, "dim")
    for warning in found.warnings:
        shell.remark(shell.err, "warning", warning, "yellow")


def _legend(layers: Sequence["LayerKind"], taps: Sequence[int]) -> Text:
    legend = Text(" " * MARGIN)
    for place, kind in enumerate(dict.fromkeys(layers)):
        name, colour = KINDS[kind.name]
        legend.append("   " if place else "")
        legend.append(kind.value, colour)
        legend.append(f" {name} x {layers.count(kind)}")
    legend.append("\n" + " " * MARGIN)
    legend.append("^", "bold")
    legend.append(f" taps {', '.join(map(str, taps))}\n")
    return legend


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3f} {unit}"
    return f"{number:,}"


def _target_table(found: "Description") -> Table:
    spec = found.spec
    mlp = {"gated": "gated", "plain": "no gate", "moe": "experts only", "none": "none"}[spec.mlp]
    stored = "no weights here" if found.stored_parameters is None else f"{_count(found.stored_parameters)} elements"
    vocabulary = f"{spec.vocab_size}" + ("" if found.tokens is None else f" (tokenizer {found.tokens})")
    chats = found.chat_format or ("of its own" if found.has_chat_template else None)
    rows = [
        ("known as", found.known),
        ("preset", found.preset and f"configs/{found.preset}"),
        ("licence", found.licence or "unknown: see the model card"),
        ("hidden size", str(spec.hidden_size)),
        ("heads", _heads(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim)),
        ("MLP", mlp if spec.intermediate_size is None else f"{spec.intermediate_size}, {mlp}"),
        ("experts", found.experts),
        ("Mamba", found.mamba),
        ("multi-token", found.multi_token_layers),
        ("vocabulary", vocabulary + (", tied" if spec.tie_word_embeddings else "")),
        ("positions", f"{spec.max_position_embeddings}, rope {f'{spec.rope_theta:g}' if spec.rope_theta else 'none'}"),
        ("weights stored", stored + (f", quantised ({found.quantised})" if found.quantised else "")),
        ("quantised", found.storage.kinds if found.storage else None),
        ("not used", found.storage.unused if found.storage else None),
        ("rounding", found.storage.sample if found.storage else None),
        ("chat format", _or_reason(chats, found.chat_reason)),
        ("mask token", _or_reason(found.mask_token, found.mask_reason)),
        ("stop tokens", ", ".join(map(str, found.stop_ids)) or "unknown"),
        (
            "cache",
            f"{found.cache_bytes_per_token:,} bytes a token, {found.cache_bytes_per_token / 1000:,.1f} GB a million",
        ),
    ]
    return _table("Target", rows)


def _or_reason(value: object, reason: str) -> str:
    return reason if value is None else f"{value} ({reason})"


def _heads(heads: int, of_keys: int, width: int) -> str:
    return f"{heads}, {of_keys} of keys and values, {width} wide" if heads else "none: no layer attends"


def _draft_table(found: "Description") -> Table:
    draft = found.draft
    head = f"{draft.markov_head_type}, rank {draft.markov_rank}" if draft.markov_rank else "none"
    rows = [
        ("layers", f"{draft.num_hidden_layers}, block {draft.block_size}"),
        ("heads", _heads(draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim)),
        ("SwiGLU", str(draft.intermediate_size)),
        ("rope theta", f"{draft.rope_theta:g}"),
        ("norm eps", f"{draft.rms_norm_eps:g}"),
        ("sequential head", head),
        ("confidence head", "yes" if draft.enable_confidence_head else "no"),
        ("trainable", f"{_count(found.draft_parameters)} parameters"),
    ]
    return _table("Draft", rows)


def _table(title: str, rows: Sequence[tuple[str, str | None]]) -> Table:
    """Labels and values; a row without a value is left out."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True, min_width=15)
    table.add_column()
    for label, value in rows:
        if value is not None:
            table.add_row(label, escape(value))
    return table


def _proof_json(proof: "ProofResult") -> dict[str, Any]:
    """The result's fields; an error that is no number is null, as JSON has no infinity."""
    return dataclasses.asdict(proof) | {"error": proof.error if math.isfinite(proof.error) else None}


def _print_proofs(proofs: Sequence["ProofResult"]) -> None:
    for proof in proofs:
        verdict = "[green]proved[/]" if proof.passed else "[bold red]failed[/]"
        line = f"{verdict}  {proof.name:<10} error {proof.error:.1e} of {proof.tolerance:g} allowed"
        shell.out.print(f"{line}, {proof.seconds:.2f} s" + (f"; {proof.note}" if proof.note else ""))
        if not proof.passed:
            shell.err.print(f"[bold red]error:[/] {escape(proof.cause)}\n  [bold]do:[/] {escape(proof.cure)}")
