"""`nds import`: a checkpoint of another format as a folder that every command takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nemotron_dspark.cli import shell

if TYPE_CHECKING:
    from nemotron_dspark.engines.gguf_checkpoint import ImportedTarget


def register(app: typer.Typer) -> None:
    shell.command(app, "import", target="none", show=_show)(import_checkpoint)


def import_checkpoint(
    source: Annotated[
        str, typer.Argument(help="A GGUF file, or package:NAME for an installed Python package that holds one.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the checkpoint.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Type of the weights that are written.")
    ] = "bfloat16",
) -> "ImportedTarget":
    """Make a checkpoint folder of a GGUF file: config, tokenizer, chat template and safetensors."""
    shell.quiet_libraries()
    from nemotron_dspark.engines.gguf_checkpoint import import_gguf

    with shell.err.status(f"Reading {source}"):
        return import_gguf(source, out, dtype)


def _show(found: "ImportedTarget") -> None:
    from nemotron_dspark.files import size_text

    types = ", ".join(f"{count} {kind}" for kind, count in found.stored_as.items())
    rows = [
        ("checkpoint", found.out),
        ("model", f"{found.model_type}, {found.parameters / 1e6:.1f} M parameters"),
        ("stored in", f"{found.source}: tensors as {types}"),
        ("written as", f"{found.dtype}, {size_text(found.bytes)}"),
        ("chat template", "yes" if found.chat_template else "none: a base model, prompts are continued as text"),
        ("licence", found.licence),
    ]
    shell.show_rows(rows)
    shell.out.print(f"look at it    nds inspect --target {found.out} --probe", soft_wrap=True)
