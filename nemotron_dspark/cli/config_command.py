"""`nds config show`: the resolved configuration, every key with what it does."""

from typing import Any

import typer
import yaml

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

WIDTH = 44  # column of the comments


def register(app: typer.Typer) -> None:
    commands = shell.group(app, "config", "The configuration of a run.")
    shell.command(commands, target="optional")(show)


def show(config: RunConfig) -> None:
    """Print the resolved configuration as YAML that --config takes, or as JSON."""
    if shell.state.json:
        shell.emit(config.model_dump(mode="json"))
    else:
        shell.out.print(commented_yaml(config), end="", markup=False, soft_wrap=True)


def commented_yaml(config: RunConfig) -> str:
    """``config`` as YAML, each key with its description as a comment."""
    lines = []
    for name, section in config:
        lines.append(f"{name}:  # {type(section).__doc__}")
        values = section.model_dump(mode="json")
        for key, field in type(section).model_fields.items():
            lines.append(f"  {f'{key}: {_scalar(values[key])}':<{WIDTH}}# {field.description}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip()
