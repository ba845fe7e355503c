"""`nds import`: a target or a draft of another format as a folder that every command takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

import typer

from nemotron_dspark.cli import shell
from nemotron_dspark.cli.export_command import show_exchanged
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.engines.exchange import Exchanged
    from nemotron_dspark.engines.gguf_checkpoint import ImportedTarget


def register(app: typer.Typer) -> None:
    shell.command(app, "import", target="optional", show=_show)(import_checkpoint)


def import_checkpoint(
    config: RunConfig,
    source: Annotated[
        str,
        typer.Argument(
            help="A target: a GGUF file, or package:NAME for an installed Python package that holds one. A draft: its "
            "folder, of DeepSpec, speculators, SGLang or ModelOpt, or its GGUF file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the checkpoint.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Type of a target's weights that are written.")
    ] = "bfloat16",
) -> Union["ImportedTarget", "Exchanged"]:
    """Make a folder that every command takes, of a target in a GGUF file or of another project's draft.

    --target gives a draft what its format leaves out: embedding and LM head, and the number of the target's layers.
    """
    shell.quiet_libraries()
    from nemotron_dspark.engines.exchange import import_draft
    from nemotron_dspark.engines.gguf_checkpoint import import_gguf
    from nemotron_dspark.targets import Checkpoint

    target = Checkpoint.of(config.target, weights=True) if config.target.name else None
    if Path(source).expanduser().is_dir():
        return import_draft(Path(source).expanduser(), out, target)
    with shell.err.status(f"Reading {source}"):
        return import_gguf(source, out, dtype, target)


def _show(found: "ImportedTarget | Exchanged") -> None:
    from nemotron_dspark.engines.exchange import Exchanged
    from nemotron_dspark.files import size_text

    if isinstance(found, Exchanged):
        show_exchanged(found)
        return
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
