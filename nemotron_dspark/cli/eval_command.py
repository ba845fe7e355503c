"""`nds eval`: accepted length, acceptance by position, speed against plain decoding, and equality with it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from nemotron_dspark.cli import shell


def register(app: typer.Typer) -> None:
    app.command("eval", help="Measure a draft: accepted length, acceptance by position, speed, equal output.")(run)


def run(
    target: shell.TargetOption,
    draft: Annotated[Path, typer.Option("--draft", "-d", help="Folder of a trained draft.")],
    prompts: Annotated[Path, typer.Option("--prompts", "-p", help="JSON lines of prompts the draft has not seen.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N prompts.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for eval.json and eval.png.")] = None,
    config: shell.ConfigOption = None,
    settings: shell.SetOption = None,
    trust: shell.TrustOption = False,
    json: shell.JsonOption = False,
) -> None:
    from nemotron_dspark.config import load_config

    resolved = load_config(config, [*(settings or ()), *shell.trust_setting(trust)], target=target)
    shell.quiet_libraries()
    from nemotron_dspark import files
    from nemotron_dspark.decoding.pair import load_pair
    from nemotron_dspark.errors import CheckError
    from nemotron_dspark.evaluation import report
    from nemotron_dspark.evaluation.measure import evaluate, prompt_ids
    from nemotron_dspark.evaluation.picture import draw_run

    with shell.err.status("Loading and proving the target"):
        loaded, drafting = load_pair(resolved.target, draft)
    ids = prompt_ids(
        loaded, prompts, limit=limit, new_tokens=resolved.eval.max_new_tokens, thinking=resolved.data.thinking
    )
    with shell.progress_bar() as bar:
        tasks: dict[str, object] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        found = evaluate(loaded, drafting, ids, resolved.eval, show)
    labelled = {report.label_of(measurement): measurement for measurement in found.measurements}
    value = {"target": target, "draft": str(draft), "prompts_file": str(prompts), **found.to_json()}
    if out is not None:
        files.write_json(out / "eval.json", value)
        draw_run(out / "eval.png", labelled, title=f"{target}")
    if json:
        shell.emit(value)
    else:
        shell.out.print(report.acceptance_table(labelled, f"{len(ids)} prompts of {escape(str(prompts))}"))
        shell.out.print(report.speed_table(found))
        if out is not None:
            shell.out.print(f"Written: {out / 'eval.json'}, {out / 'eval.png'}")
    lossless = found.lossless
    if lossless.identical < lossless.prompts:
        if str(loaded.dtype) == "torch.float32":
            raise CheckError(
                f"Speculative output differs from plain output, first at {lossless.first_difference}.",
                "Run `nds inspect --probe` on the target; if its proofs pass, report it.",
            )
        shell.err.print(
            f"[yellow]note:[/] outputs differ first at {lossless.first_difference}. In half precision a block and a "
            "single token round differently, and near ties fall either way; --set target.dtype=float32 decides.",
            soft_wrap=True,
        )
