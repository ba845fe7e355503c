"""`nds export`: a draft, or a target, in the format that another program reads."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig


def register(app: typer.Typer) -> None:
    shell.command(app)(export)


def export(
    config: RunConfig,
    out: Annotated[Path, typer.Option("--out", "-o", help="New file of the exported model.")],
    to: Annotated[Literal["gguf"], typer.Option(help="Format: gguf for llama.cpp.")],
    draft: Annotated[
        Path | None, typer.Option("--draft", "-d", help="Folder of a trained draft; without one, the target.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Type of the matrices that are written.")
    ] = "bfloat16",
) -> None:
    """Write a draft for another program, or a target as GGUF."""
    shell.quiet_libraries()
    from nemotron_dspark.drafts.config import DraftConfig
    from nemotron_dspark.engines import gguf_export
    from nemotron_dspark.targets import Checkpoint
    from nemotron_dspark.targets.weights import open_tensors

    target = Checkpoint.of(config.target, weights=draft is None)
    if draft is None:
        gguf_export.export_target(target, out, dtype)
        return
    shape = DraftConfig.from_folder(draft)
    shape.check_target(target.read_spec())
    gguf_export.export_draft(shape, open_tensors(draft), target, out, dtype)
