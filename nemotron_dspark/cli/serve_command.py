"""`nds serve`: the target, with a draft or without, as an OpenAI-compatible server."""

import ipaddress
import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell

if TYPE_CHECKING:
    from nemotron_dspark.serving.server import Served


def register(app: typer.Typer) -> None:
    app.command("serve", help="Answer OpenAI's API with the target, made faster by a draft.")(serve)


def serve(
    target: shell.TargetOption,
    draft: Annotated[
        Path | None, typer.Option("--draft", "-d", help="Folder of a trained draft; without one, plain decoding.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default serve.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on, 0 = a free one; default serve.port.")
    ] = None,
    config: shell.ConfigOption = None,
    settings: shell.SetOption = None,
    trust: shell.TrustOption = False,
    json: shell.JsonOption = False,
) -> None:
    from nemotron_dspark.config import load_config

    run = load_config(config, [*(settings or ()), *shell.trust_setting(trust)], target=target)
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    section = run.serve.model_copy(update=given)

    from nemotron_dspark.serving import listen

    bound = listen.bind(section.host, section.port)  # before minutes of loading, so that a port in use is said at once
    with bound:
        _warn_if_reachable(bound.getsockname()[0])
        shell.quiet_libraries()
        from nemotron_dspark.decoding.pair import load_pair
        from nemotron_dspark.serving.server import Served, make_app

        with shell.err.status("Loading and proving the target"):
            served = Served.of(*load_pair(run.target, draft), section)
        url = listen.url_of(bound)

        def ready() -> None:
            if json:
                shell.emit({"url": f"{url}/v1", "model": served.model_id})
            else:
                _greet(url, served, draft)

        listen.serve(make_app(served, section), bound, ready)
    shell.err.print("Stopped.")


def _warn_if_reachable(address: str) -> None:
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        shell.err.print(
            f"[yellow]warning:[/] {address} can be reached by other machines, and this server asks for no password.",
            soft_wrap=True,
        )


def _greet(url: str, served: "Served", draft: Path | None) -> None:
    body = {"model": served.model_id, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}
    how = f"speculatively with {draft}" if draft is not None else "plainly, without a draft"
    shell.out.print(
        f"[bold]{escape(served.model_id)}[/] is served at [bold]{url}/v1[/], decoded {escape(how)}.", soft_wrap=True
    )
    shell.out.print(f"Health and counters: {url}/health, {url}/metrics. Ctrl-C stops.\n", soft_wrap=True)
    example = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json_.dumps(body)}'"
    shell.out.print(escape(example), soft_wrap=True)
