"""`nds serve`: the target, with a draft or without, as an OpenAI-compatible server."""

import ipaddress
import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell

if TYPE_CHECKING:
    from nemotron_dspark.config import RunConfig
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
    json: shell.JsonOption = False,
) -> None:
    from nemotron_dspark.config import load_run_config

    run = load_run_config(config, settings or (), target=target)
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    section = run.serve.model_copy(update=given)

    from nemotron_dspark.serving import listen

    bound = listen.bind(section.host, section.port)  # before minutes of loading, so that a port in use is said at once
    with bound:
        _warn_if_reachable(bound.getsockname()[0])
        shell.quiet_libraries()
        from nemotron_dspark.serving.server import Served, make_app

        served = Served.of(*_load(run, draft), section)
        url = listen.url_of(bound)
        if json:
            ready = lambda: shell.emit({"url": f"{url}/v1", "model": served.model_id})  # noqa: E731
        else:
            ready = lambda: _greet(url, served, draft)  # noqa: E731
        listen.serve(make_app(served, section), bound, ready)
    shell.err.print("Stopped.")


def _load(run: "RunConfig", draft_folder: Path | None):
    from nemotron_dspark.decoding.pair import load_draft
    from nemotron_dspark.drafts.config import DraftConfig
    from nemotron_dspark.targets import Target
    from nemotron_dspark.targets.proofs import prove

    if draft_folder is not None:
        DraftConfig.from_folder(draft_folder)  # a wrong path is said before the target is loaded
    with shell.err.status("Loading the target"):
        target = Target.load(
            run.target.name,
            dtype=run.target.dtype,
            device=run.target.device,
            trust_remote_code=run.target.trust_remote_code,
            revision=run.target.revision,
        )
        draft = load_draft(draft_folder, target) if draft_folder is not None else None
    if run.target.proofs:
        with shell.err.status("Proving it right"):
            prove(target, tuple(draft.config.target_layer_ids) if draft is not None else ())
    return target, draft


def _warn_if_reachable(address: str) -> None:
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        shell.err.print(
            f"[yellow]warning:[/] {address} can be reached by other machines, and this server asks for no password.",
            soft_wrap=True,
        )


def _greet(url: str, served: "Served", draft: Path | None) -> None:
    body = {"model": served.model_id, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}
    how = f"speculatively with {draft}" if draft is not None else "plainly, without a draft"
    shell.out.print(f"[bold]{escape(served.model_id)}[/] is served at [bold]{url}/v1[/], decoded {escape(how)}.")
    shell.out.print(f"Health and counters: {url}/health, {url}/metrics. Ctrl-C stops.\n")
    example = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json_.dumps(body)}'"
    shell.out.print(escape(example), soft_wrap=True)
