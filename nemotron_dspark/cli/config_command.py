"""`nds config show`: the resolved configuration, every key with what it does."""

from typing import Any

import typer
import yaml

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig, load_config

WIDTH = 44  # column of the comments


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="The configuration of a run.")
    app.add_typer(group, name="config")

    @group.callback()
    def config() -> None:
        """The configuration of a run."""

    @group.command()
    def show(
        target: str | None = typer.Option(None, "--target", "-t", help="Target whose preset is applied."),
        config_file: shell.ConfigOption = None,
        assignments: shell.SetOption = None,
        as_json: shell.JsonOption = False,
    ) -> None:
        """Print the resolved configuration as YAML that --config takes, or as JSON."""
        config = load_config(config_file, assignments or (), target=target)
        if as_json:
            shell.emit(config.model_dump(mode="json"))
        else:
            shell.out.print(commented_yaml(config), end="", markup=False, soft_wrap=True)


def commented_yaml(config: RunConfig) -> str:
    """``config`` as YAML, each key with its description as a comment."""
    lines = []
    for section, field in RunConfig.model_fields.items():
        lines.append(f"{section}:  # {field.annotation.__doc__}")
        values = getattr(config, section).model_dump(mode="json")
        for key, leaf in field.annotation.model_fields.items():
            lines.append(f"  {f'{key}: {_scalar(values[key])}':<{WIDTH}}# {leaf.description}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip()
