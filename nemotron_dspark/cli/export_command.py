"""`nds export`: a draft, or a target, in the format that another program reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig
from nemotron_dspark.errors import InputError

if TYPE_CHECKING:
    from nemotron_dspark.engines.exchange import Exchanged


def register(app: typer.Typer) -> None:
    shell.command(app, target="optional", show=show_exchanged)(export)


def export(
    config: RunConfig,
    to: Annotated[
        Literal["deepspec", "vllm", "sglang", "speculators", "modelopt", "specforge", "gguf"],
        typer.Option(
            help="Who is to read it; gguf is for llama.cpp. DFlash: all but deepspec; EAGLE-3: deepspec, vllm or "
            "speculators."
        ),
    ],
    draft: Annotated[
        Path | None,
        typer.Option(
            "--draft",
            "-d",
            help="Folder of a trained draft; the target's newest here, but --to gguf then writes the target.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="New folder, or new file of --to gguf; export/ in the run's folder."),
    ] = None,
    slim: Annotated[
        bool, typer.Option("--slim", help="Leave out the target's embedding and LM head, which engines share.")
    ] = False,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Type of the matrices in a GGUF file.")
    ] = "bfloat16",
) -> "Exchanged":
    """Write a draft for another program, or a target as GGUF."""
    shell.quiet_libraries()
    from nemotron_dspark.engines import exchange, gguf_export
    from nemotron_dspark.targets import Checkpoint

    if to != "gguf":
        draft = draft or shell.newest_draft(config)
    target = Checkpoint.of(config.target, weights=to != "gguf" or draft is None) if config.target.name else None
    out = out or _place(draft, to)
    if to != "gguf" and draft is not None:
        return exchange.export_draft(draft, to, out, target, slim=slim)
    if target is None:
        raise InputError("A GGUF file holds the target's tokenizer.", "Give the target with --target.")
    return gguf_export.export(target, draft, out, dtype)


def _place(draft: Path | None, to: str) -> Path:
    """Where a recipe puts the export of a run's draft."""
    from nemotron_dspark.recipe.graph import export_place
    from nemotron_dspark.training.run_folder import RUN_FILE

    if draft is None or not (draft.parent / RUN_FILE).is_file():
        raise InputError(
            "There is nothing to write to, and no run of the draft whose folder could be taken.",
            "Give --out.",
        )
    return export_place(draft.parent, to)


def show_exchanged(found: "Exchanged") -> None:
    """What was written, of an export or of an import."""
    from nemotron_dspark.files import size_text

    rows = [
        ("from", found.source),
        ("written", f"{found.out}, {found.tensors} tensors, {size_text(found.bytes)}"),
        ("format", found.format),
        ("embedding and LM head", "in it" if found.embeddings else "not in it: taken from the target"),
    ]
    shell.show_rows(rows, found.remarks)
