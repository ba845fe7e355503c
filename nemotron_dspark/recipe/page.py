"""`report.html`: what a recipe has made, in one file that needs no network; pictures are in it.

Everything is read from what the stages wrote, so the page can be written again at any time.
"""

import base64
import datetime
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from nemotron_dspark import files
from nemotron_dspark._version import __version__
from nemotron_dspark.config.recipe import Recipe, as_yaml_values
from nemotron_dspark.engines.commands import ENGINES, engine_command, engine_table
from nemotron_dspark.engines.pair import Pair
from nemotron_dspark.engines.preflight import preflight
from nemotron_dspark.errors import NdsError
from nemotron_dspark.evaluation.report import label_of
from nemotron_dspark.recipe.graph import FOLDER, DraftStages, all_stages
from nemotron_dspark.recipe.ledger import Record, refusals
from nemotron_dspark.recipe.plan import hours
from nemotron_dspark.resources import resource_folder

PLAN = "plan.json"  # in the recipe's own folder: what it was to take when it began
_TEMPLATE = "recipe_report.html.jinja"
_PICTURES = (
    ("Training", "training.png"),
    ("Acceptance on held-out prompts", "eval/eval.png"),
    ("Calibration", "draft/calibration/calibration.png"),
)
_KINDS = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "EAGLE-3"}
_PACKAGES = ("torch", "transformers", "mamba-ssm", "causal-conv1d")


def write(path: Path, recipe: Recipe, drafts: Sequence[DraftStages], records: Mapping[str, Record]) -> None:
    """Write the page about ``drafts`` with the ``records`` of their stages, by name, to ``path``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("templates")), autoescape=True, trim_blocks=True
    )
    planned = files.read_json(recipe.out / FOLDER / PLAN) if (recipe.out / FOLDER / PLAN).is_file() else {}
    evaluations = {draft.label: found for draft in drafts if (found := _evaluation(draft)) is not None}
    temperatures = {each["temperature"] for found in evaluations.values() for each in found["measurements"]}
    stages = list(_stages(drafts, records, planned.get("hours", {})))
    seconds = sum(stage["seconds"] for stage in stages)
    total = {
        "seconds": seconds,
        "time": hours(seconds / 3600),
        "planned": hours(sum(planned.get("hours", {}).values())),
        "size": files.size_text(sum(stage["bytes"] for stage in stages)),
    }
    text = environment.get_template(_TEMPLATE).render(
        title=f"Drafts for {', '.join(recipe.target)}" if len(drafts) > 1 else f"A draft for {recipe.target[0]}",
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        versions=_versions(),
        machine=_machine(),
        labels=[label_of(temperature) for temperature in sorted(temperatures)],
        measured=[_row(label, found, sorted(temperatures)) for label, found in evaluations.items()],
        refused=refusals(records),
        drafts=[_about(draft, records, evaluations.get(draft.label)) for draft in drafts],
        stages=stages,
        total=total,
        planned_for=planned.get("machine", "no machine"),
        price=recipe.price,
        recipe=yaml.safe_dump(dict(as_yaml_values(recipe)), sort_keys=False),
    )
    files.write_text(path, text)


def _evaluation(draft: DraftStages) -> dict[str, Any] | None:
    stage = draft.get("eval")
    file = stage.place / "eval.json" if stage else None
    return files.read_json(file) if file and file.is_file() else None


def _row(label: str, found: dict[str, Any], temperatures: Sequence[float]) -> dict[str, Any]:
    by_temperature = {each["temperature"]: each for each in found["measurements"]}
    speed, lossless = found["tokens_per_second"], found["lossless"]
    return {
        "label": label,
        "lengths": [_length(by_temperature.get(temperature)) for temperature in temperatures],
        "plain": speed["plain"],
        "speculative": speed["speculative"],
        "speedup": speed["speedup"],
        "identical": lossless["identical"],
        "prompts": lossless["prompts"],
    }


def _length(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return ""
    error = measured["standard_error"]
    return f"{measured['accepted_length']:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def _about(draft: DraftStages, records: Mapping[str, Record], found: dict[str, Any] | None) -> dict[str, Any]:
    """What the page says of one draft."""
    trained = _result(draft, records, "train")
    shape = draft.config.draft
    layers = 1 if shape.kind == "eagle3" else shape.num_layers
    sentence = f"{_KINDS[shape.kind]}, {layers} layer{'s' * (layers != 1)}, blocks of {shape.block_size}"
    if trained:
        sentence += f", {trained['parameters'] / 1e6:,.1f} M trained parameters, {trained['steps']:,} steps"
        if cache := _result(draft, records, "cache"):
            sentence += f" on {cache['samples']:,} samples of {cache['tokens']:,} tokens"
    pictures = [
        {"title": title, "data": base64.b64encode((draft.run.place / name).read_bytes()).decode()}
        for title, name in _PICTURES
        if (draft.run.place / name).is_file()
    ]
    rows = found["measurements"] if found else []
    return {
        "label": draft.label,
        "sentence": f"{sentence}. It lies in {draft.folder}.",
        "remarks": [text for text in [_result(draft, records, "eval").get("remark")] if text],
        "pictures": pictures,
        "slots": [{"label": label_of(each["temperature"]), "kept": each["per_position"]} for each in rows],
        "verdicts": _result(draft, records, "calibrate").get("verdicts", []),
        "commands": list(_commands(draft)),
        "config": yaml.safe_dump(draft.config.model_dump(mode="json"), sort_keys=False),
    }


def _result(draft: DraftStages, records: Mapping[str, Record], kind: Any) -> dict[str, Any]:
    stage = draft.get(kind)
    record = records.get(stage.name) if stage else None
    return record.result if record else {}


def _commands(draft: DraftStages) -> Iterator[dict[str, str]]:
    """How to serve the draft, here and with each engine; a refusal where it is known not to work."""
    serve = ["nds", "serve", "--target", draft.target, "--draft", str(draft.folder)]
    yield {"title": "nds", "text": shlex.join(serve)}
    if not (draft.folder / "config.json").is_file():
        return
    try:
        pair = Pair.of(draft.config.target, draft.folder)
    except NdsError as error:
        yield {"title": "Engines", "note": str(error)}
        return
    for engine in ENGINES:
        title, findings = engine_table(engine).title, preflight(engine, pair)
        if refusals := [found.what for found in findings if found.level == "refuse"]:
            yield {"title": title, "note": refusals[0]}
            continue
        made = engine_command(engine, pair)
        files_ = [f"# {name}\n{content}" for name, content in made.files.items()]
        yield {
            "title": f"{title} {made.minimum} or later",
            "note": " ".join(found.what for found in findings),
            "text": "\n".join([*made.prepare, *files_, made.text]),
        }


def _stages(
    drafts: Sequence[DraftStages], records: Mapping[str, Record], planned: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    for stage in all_stages(tuple(drafts)):
        record = records.get(stage.name)
        size = files.size_of(stage.place) if stage.kind in ("answers", "cache", "train", "export") else 0
        if stage.kind == "train":  # what other stages put into the run's folder counts there
            size -= files.size_of(stage.place / "export")
        yield {
            "name": stage.name,
            "seconds": record.seconds if record else 0.0,
            "time": hours(record.seconds / 3600) if record else "-",
            "planned": hours(planned[stage.name]) if stage.name in planned else "-",
            "bytes": size,
            "size": files.size_text(size) if size else "-",
            "said": record.said if record else "",
            "place": str(stage.place),
        }


def _versions() -> dict[str, str]:
    found = {"nds": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})


def _machine() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}"
    return f"{platform.machine()}, {os.cpu_count()} cores"
