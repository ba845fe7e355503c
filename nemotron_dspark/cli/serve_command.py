"""`nds serve`: the target, with a draft or without, as an OpenAI-compatible server."""

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell
from nemotron_dspark.config import RunConfig

if TYPE_CHECKING:
    from nemotron_dspark.serving.listen import Server

_KEYS = [
    shell.KeyOption("--host", "serve.host"),
    shell.KeyOption("--port", "serve.port"),
    shell.KeyOption("--no-auth", "serve.no_auth"),
    shell.KeyOption("--alias", "serve.aliases"),
    shell.KeyOption("--schedule", "serve.schedule"),
    shell.KeyOption("--profile", "serve.profile"),
]


def register(app: typer.Typer) -> None:
    shell.command(app, keys=_KEYS)(serve)


def serve(
    config: RunConfig,
    draft: Annotated[
        Path | None, typer.Option("--draft", "-d", help="Folder of a trained draft; without one, plain decoding.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="NDS_API_KEY",
            help="Answer only requests that carry this key. Better in the environment: others see a command line.",
        ),
    ] = None,
) -> None:
    """Answer OpenAI's API with the target, made faster by a draft."""
    # OpenMP's threads would else spin where they wait for one that HTTP or a client has taken the core from: read when
    # PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from nemotron_dspark import stages
    from nemotron_dspark.serving.guard import reachable_by_others

    if reachable_by_others(config.serve.host) and api_key is None and config.serve.no_auth:
        shell.err.print(
            f"[yellow]warning:[/] {config.serve.host} can be reached by other machines, which need no key.",
            soft_wrap=True,
        )
    with shell.err.status("Loading and proving the target"):
        server = stages.serve(config, draft, api_key=api_key)
    server.run(lambda: _greet(server, draft, api_key is not None))
    for number in (signal.SIGINT, signal.SIGTERM):  # Python still takes its time to end, and would print a traceback
        signal.signal(number, signal.SIG_IGN)
    shell.err.print("Stopped.")


def _greet(server: "Server", draft: Path | None, keyed: bool) -> None:
    if shell.state.json:
        shell.emit({"url": server.base_url, "model": server.model_id})
        return
    body = {"model": server.model_id, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}
    how = f"speculatively with {draft}" if draft is not None else "plainly, without a draft"
    shell.out.print(
        f"[bold]{escape(server.model_id)}[/] is served at [bold]{server.base_url}[/], decoded {escape(how)}.",
        soft_wrap=True,
    )
    shell.out.print(f"A page to look at: {server.url}/", soft_wrap=True)
    shell.out.print(f"Health and counters: {server.url}/health, {server.url}/metrics. Ctrl-C stops.\n", soft_wrap=True)
    key = ' -H "Authorization: Bearer $NDS_API_KEY"' if keyed else ""
    sent = f"-H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
    example = f"curl {server.base_url}/chat/completions {sent}"
    shell.out.print(escape(example), soft_wrap=True)
