"""`nds inspect`: what a target is and what its draft would be, from a config.json alone; `--probe` proves it loaded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nemotron_dspark.cli import shell

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
}
MARGIN = 2


def register(app: typer.Typer) -> None:
    app.command("inspect", help="Show what a target is, its taps, and the draft it would get.")(inspect)


def inspect(
    target: shell.TargetOption,
    config: shell.ConfigOption = None,
    settings: shell.SetOption = None,
    probe: Annotated[bool, typer.Option("--probe", help="Load the model and run the proofs.")] = False,
    json: shell.JsonOption = False,
) -> None:
    from nemotron_dspark.config import load_run_config

    run = load_run_config(config, settings or (), target=target)
    shell.quiet_libraries()
    from nemotron_dspark.recipe.describe import describe

    description = describe(target, run)
    if not json:
        _print(description)
    proofs = None
    if probe:
        from nemotron_dspark.targets.proofs import run_proofs
        from nemotron_dspark.targets.target import Target

        with shell.err.status("Loading the target and running the proofs"):
            loaded = Target.of(run.target)
            proofs = run_proofs(loaded, description.draft.target_layer_ids)
    if json:
        import dataclasses

        shell.emit(description.to_json() | {"proofs": proofs and [dataclasses.asdict(proof) for proof in proofs]})
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


def _print(found: "Description") -> None:
    spec, draft = found.spec, found.draft
    shell.out.print(f"[bold]{escape(spec.name)}[/]  {spec.model_type}, {spec.num_layers} layers{_billions(found)}\n")
    shell.out.print(strip(spec.layers, draft.target_layer_ids, shell.out.width), end="")
    legend = Text(" " * MARGIN)
    for kind in dict.fromkeys(spec.layers):
        name, colour = KINDS[kind.name]
        legend.append(kind.value, colour)
        legend.append(f" {name} x {spec.layers.count(kind)}   ")
    legend.append("^", "bold")
    legend.append(f" taps {', '.join(map(str, draft.target_layer_ids))}\n")
    shell.out.print(legend)
    shell.out.print(_target_table(found))
    shell.out.print(_draft_table(found))
    for note in found.notes:
        shell.out.print(f"[dim]note:[/] {escape(note)}", soft_wrap=True)
    for warning in found.warnings:
        shell.err.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


def _billions(found: "Description") -> str:
    return "" if found.parameters is None else f", {_count(found.parameters)} parameters"


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3f} {unit}"
    return f"{number:,}"


def _target_table(found: "Description") -> Table:
    spec = found.spec
    mlp = {"gated": "gated", "plain": "no gate", "moe": "experts only"}[spec.mlp]
    template = {None: "unknown: no tokenizer here", False: "none, plain text", True: "yes"}[found.has_chat_template]
    if found.has_chat_template:
        template += f", recognised as {found.chat_format}" if found.chat_format else ", of no bundled format"
    stored = "no weights here" if found.stored_parameters is None else _count(found.stored_parameters)
    vocabulary = f"{spec.vocab_size}" + ("" if found.tokens is None else f" (tokenizer {found.tokens})")
    mask = f"{found.mask_token} ({found.mask_reason})" if found.mask_token is not None else found.mask_reason
    return _table(
        "Target",
        ("hidden size", str(spec.hidden_size)),
        ("heads", f"{spec.num_attention_heads}, {spec.num_key_value_heads} of keys and values, {spec.head_dim} wide"),
        ("MLP", mlp if spec.intermediate_size is None else f"{spec.intermediate_size}, {mlp}"),
        ("vocabulary", vocabulary + (", tied" if spec.tie_word_embeddings else "")),
        ("positions", f"{spec.max_position_embeddings}, rope {spec.rope_theta or 'none'}"),
        ("weights stored", stored),
        ("licence", found.licence or "unknown: see the model card"),
        ("chat template", template),
        ("mask token", mask),
        ("stop tokens", ", ".join(map(str, found.stop_ids)) or "unknown"),
        (
            "cache",
            f"{found.cache_bytes_per_token:,} bytes a token, {found.cache_bytes_per_token / 1000:,.1f} GB a million",
        ),
    )


def _draft_table(found: "Description") -> Table:
    draft = found.draft
    head = f"{draft.markov_head_type}, rank {draft.markov_rank}" if draft.markov_rank else "none"
    return _table(
        "Draft",
        ("layers", f"{draft.num_hidden_layers}, block {draft.block_size}"),
        ("SwiGLU", str(draft.intermediate_size)),
        ("rope theta", f"{draft.rope_theta:g}"),
        ("norm eps", f"{draft.rms_norm_eps:g}"),
        ("sequential head", head),
        ("confidence head", "yes" if draft.enable_confidence_head else "no"),
        ("trainable", _count(found.draft_parameters)),
    )


def _table(title: str, *rows: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True, min_width=15)
    table.add_column()
    for label, value in rows:
        table.add_row(label, escape(value))
    return table


def _print_proofs(proofs: Sequence["ProofResult"]) -> None:
    for proof in proofs:
        verdict = "[green]proved[/]" if proof.passed else "[bold red]failed[/]"
        line = f"{verdict}  {proof.name:<10} error {proof.error:.1e} of {proof.tolerance:g} allowed"
        shell.out.print(f"{line}, {proof.seconds:.2f} s")
        if not proof.passed:
            shell.err.print(f"[bold red]error:[/] {escape(proof.cause)}\n  [bold]do:[/] {escape(proof.cure)}")
