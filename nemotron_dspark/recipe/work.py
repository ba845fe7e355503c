"""The stages of a recipe, each called as its own command calls it, and what they hand on in memory: a loaded target."""

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nemotron_dspark import files, stages
from nemotron_dspark.config import RunConfig
from nemotron_dspark.config.recipe import Recipe
from nemotron_dspark.data import split as splitting
from nemotron_dspark.data.regenerate import regenerate
from nemotron_dspark.data.sources import one_file
from nemotron_dspark.engines import exchange, gguf_export
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.recipe.graph import FOLDER, Kind, Stage
from nemotron_dspark.recipe.ledger import Ledger, Record, Status, made
from nemotron_dspark.recipe.progress import Progress, StepProgress
from nemotron_dspark.targets import Checkpoint, Target
from nemotron_dspark.training.schedule import most_processes


class RecipeProgress(Progress):
    """`Progress` that is told of all stages, and when one ends; ``elsewhere`` leaves the screen to another command."""

    def begin(self, found: Sequence[Stage], ledger: Ledger) -> None: ...
    def ended(self, name: str, record: Record) -> None: ...

    def elsewhere(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Work:
    """The stages, and what they hand on in memory."""

    def __init__(self, recipe: Recipe, ledger: Ledger, tell: RecipeProgress, lock: int):
        self._recipe, self._ledger, self._tell, self._lock = recipe, ledger, tell, lock
        self._target: tuple[str, Target] | None = None
        self._said = ""
        self._do: dict[Kind, Callable[[Stage], dict[str, Any]]] = {
            "split": self._split,
            "answers": self._answer,
            "cache": self._build,
            "train": self._train,
            "eval": self._evaluate,
            "calibrate": self._calibrate,
            "export": self._export,
        }

    def do(self, stage: Stage, status: Status) -> None:
        """Do ``stage`` and record it; a recorded one that `Ledger.claim` has taken back is not done again."""
        record = self._ledger.claim(stage)
        self._tell.stage(stage.name)
        if status.why:
            self._note(f"{status.why}.")
        self._said = record.said
        if not (record.done and made(stage, record)):
            record.done = False
            started = time.monotonic()
            try:
                record.result = self._do[stage.kind](stage)
                record.done, record.said = True, self._said
            finally:
                record.seconds += time.monotonic() - started
                self._ledger.save()
        self._tell.ended(stage.name, record)

    def _split(self, stage: Stage) -> dict[str, Any]:
        shutil.rmtree(stage.place, ignore_errors=True)  # half of it, from a call that was killed
        report = splitting.split(stage.files, stage.place, float(stage.inputs["held_out"]))
        self._note(f"{report.train:,} prompts or conversations, {report.held_out:,} held out")
        return {"train": report.train, "held_out": report.held_out}

    def _answer(self, stage: Stage) -> dict[str, Any]:
        prompts, settings = _data(stage), self._recipe.answers
        with contextlib.ExitStack() as closing:
            urls, model, at_once = settings.base_url, settings.model, settings.concurrency
            if not urls:
                limits = {"port": 0, "host": "127.0.0.1", "max_new_tokens": settings.max_tokens}
                serve = stage.config.serve.model_copy(update=limits)
                config = stage.config.model_copy(update={"serve": serve})
                server = closing.enter_context(stages.serve(config, target=self._loaded(stage.config)))
                urls, model, at_once = (server.base_url,), server.model_id, 2 * serve.max_batch_size
            reports = []
            for temperature, asked, out in _parts(self._recipe, stage, prompts):
                label = f"answers at temperature {temperature:g}"
                reports.append(
                    regenerate(
                        asked,
                        out,
                        base_url=urls,
                        model=model,
                        concurrency=at_once,
                        temperature=temperature,
                        top_p=settings.top_p,
                        top_k=settings.top_k,
                        max_tokens=settings.max_tokens,
                        thinking=stage.config.data.thinking,
                        api_key=os.environ.get("OPENAI_API_KEY", "none"),
                        progress=lambda now, label=label: self._tell.update(label, now.done, now.total),
                    )
                )
        if len(reports) > 1:
            text = b"".join(report.out_file.read_bytes() for report in reports)
            if stage.place.is_file() and stage.place.read_bytes() != text:
                raise InputError(f"{stage.place} holds other answers.", "Move it away, and run the recipe again.")
            files.write_whole(stage.place, lambda file: file.write(text))
        answered, cut = sum(report.answered for report in reports), sum(report.cut for report in reports)
        self._note(f"{answered:,} answers, {cut:,} cut off at {settings.max_tokens:,} tokens")
        return {"answered": answered, "cut": cut, "tokens": sum(report.tokens for report in reports)}

    def _build(self, stage: Stage) -> dict[str, Any]:
        recipe = self._recipe
        report = stages.build_cache(
            stage.config,
            _data(stage),
            stage.place,
            processes=recipe.gpus if torch.cuda.is_available() else None,
            target=self._held(stage.config),
            on_progress=lambda now: self._tell.update(now.stage, now.samples, now.total_samples),
        )
        built = report.build
        self._note(f"{built.samples:,} samples, {built.tokens:,} tokens, {files.size_text(built.bytes)}")
        return {"samples": built.samples, "tokens": built.tokens, "bytes": built.bytes, "taps": list(report.taps)}

    def _train(self, stage: Stage) -> dict[str, Any]:
        self._release()  # its memory is the training's now
        cache = stage.get("cache")
        settings, hours = stage.config.train, self._recipe.train_hours
        gpus = self._recipe.gpus or (torch.cuda.device_count() if settings.device in ("auto", "cuda") else 1)
        processes = most_processes(settings, gpus)
        if processes > 1:
            with self._tell.elsewhere():
                said = _call(train_command(stage, self._recipe, processes), self._lock)
            report = json.loads(said.splitlines()[-1])
        else:
            trained = stages.train(
                stage.config,
                stage.place,
                cache=cache.place if cache else None,
                data=None if cache else _data(stage),
                budget=3600 * hours if hours else None,
                callbacks=[StepProgress(self._tell)],
            )
            report = {key: getattr(trained, key) for key in ("steps", "parameters", "mode")}
        self._note(f"{report['parameters'] / 1e6:,.1f} M trained parameters, {report['steps']:,} steps")
        return {key: report[key] for key in ("steps", "parameters", "mode")} | {"processes": processes}

    def _evaluate(self, stage: Stage) -> dict[str, Any]:
        report = stages.evaluate(
            stage.config,
            _draft(stage),
            _held_out(stage),
            limit=self._recipe.eval_prompts,
            target=self._loaded(stage.config),
            on_progress=self._tell.update,
        )
        report.save(stage.place)
        found = report.evaluation
        lengths = {label: measured.accepted_length for label, measured in report.labelled.items()}
        said = ", ".join(f"{label} {length:.2f}" for label, length in lengths.items())
        self._note(f"accepted length {said}; {found.speedup:.2f} times as fast as plain decoding")
        if remark := report.check_lossless():
            self._tell.note(remark)
        return {"accepted_length": lengths, "speedup": found.speedup, "remark": remark or ""}

    def _calibrate(self, stage: Stage) -> dict[str, Any]:
        shutil.rmtree(stage.place, ignore_errors=True)  # half of it, from a call that was killed
        target = self._loaded(stage.config)
        try:
            report, _ = stages.calibrate(
                stage.config,
                _draft(stage),
                _held_out(stage),
                limit=self._recipe.eval_prompts,
                target=target,
                on_progress=self._tell.update,
            )
        except InputError as error:  # too few prompts: the draft is as good without
            return self._refused(error, "or set calibrate: false")
        for fit in report.fits:
            self._note(fit.verdict)
        return {"verdicts": [fit.verdict for fit in report.fits]}

    def _export(self, stage: Stage) -> dict[str, Any]:
        if stage.place.is_dir():
            shutil.rmtree(stage.place)  # half of it, from a call that was killed
        stage.place.unlink(missing_ok=True)
        target = Checkpoint.of(stage.config.target, weights=True)
        try:
            if stage.format == "gguf":
                stage.place.parent.mkdir(parents=True, exist_ok=True)
                written = gguf_export.export(target, _draft(stage), stage.place, "bfloat16")
            else:
                written = exchange.export_draft(_draft(stage), stage.format, stage.place, target)
        except InputError as error:  # a format that cannot hold this draft
            return self._refused(error, f"or leave {stage.format} out of export")
        self._note(f"{written.format}: {files.size_text(written.bytes)}")
        return {"bytes": written.bytes, "remarks": list(written.remarks)}

    def _note(self, text: str) -> None:
        self._said = text
        self._tell.note(text)

    def _refused(self, error: InputError, otherwise: str) -> dict[str, Any]:
        text = f"{error.what} {error.do.rstrip('.')}, {otherwise}."
        self._note(text)
        return {"refused": text}

    def _loaded(self, config: RunConfig) -> Target:
        """The target, proven; the same one as long as nothing else needs its memory."""
        if (held := self._held(config)) is not None:
            return held
        self._release()
        self._tell.update("loading and proving the target", 0, 1)
        target = stages.load_target(config)
        self._target = (_key(config), target)
        return target

    def _release(self) -> None:
        self._target = None
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()  # for processes beside this one

    def _held(self, config: RunConfig) -> Target | None:
        return self._target[1] if self._target and self._target[0] == _key(config) else None


def config_file(out: Path, train: Stage) -> Path:
    """Where a run writes the whole configuration of a draft, for `--config` of any command."""
    return out / FOLDER / "configs" / f"{train.label}.yaml"


def train_command(stage: Stage, recipe: Recipe, processes: int) -> list[str]:
    """The command that trains as ``stage`` says in several processes, and prints its report as JSON."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*torchrun, "-m", "nemotron_dspark", "train", *train_options(stage, recipe), "--json"]


def train_options(stage: Stage, recipe: Recipe) -> list[str]:
    """The options of `nds train` that say what ``stage`` does."""
    cache = stage.get("cache")
    source = ["--cache", str(cache.place)] if cache else [part for text in _data(stage) for part in ("--data", text)]
    options = ["--target", stage.config.target.named, "--config", str(config_file(recipe.out, stage)), *source]
    options += ["--budget", f"{recipe.train_hours}h"] if recipe.train_hours else []
    return [*options, "--out", str(stage.place)]


def cache_options(stage: Stage, train: Stage, recipe: Recipe) -> list[str]:
    """The options of `nds cache build` that say what ``stage`` does, which ``train`` takes its cache from."""
    data = [part for text in _data(stage) for part in ("--data", text)]
    options = ["--target", stage.config.target.named, "--config", str(config_file(recipe.out, train)), *data]
    options += ["--processes", str(recipe.gpus)] if recipe.gpus else []
    return [*options, "--out", str(stage.place)]


def _call(command: list[str], lock: int) -> str:
    """What ``command`` prints. It holds the recipe's lock too: should this process be killed, no other begins."""
    with subprocess.Popen(command, pass_fds=(lock,), stdout=subprocess.PIPE, text=True) as child:
        try:
            said, _ = child.communicate()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)  # it saves, and ends
            child.communicate()
            raise
    if child.returncode:
        raise EnvironmentFault(
            f"Training in several processes ended with exit code {child.returncode}.",
            "What it said stands above; the same command goes on from the last checkpoint.",
        )
    return said


def _data(stage: Stage) -> list[str]:
    """What a stage reads: answers, the part that is not held out, or what the recipe was given."""
    if (answers := stage.get("answers")) is not None:
        return [str(answers.place)]
    if (split := stage.get("split")) is not None:
        return [str(split.place / "train.jsonl")]
    return list(stage.files)


def _held_out(stage: Stage) -> list[str]:
    split = stage.get("split")
    return [str(split.place / "held_out.jsonl")] if split else list(stage.files)


def _draft(stage: Stage) -> Path:
    return next(before for before in stage.before if before.kind == "train").place / "draft"


def _parts(recipe: Recipe, stage: Stage, prompts: list[str]) -> Iterator[tuple[float, Any, Path]]:
    """Prompts and file of answers for each temperature; of several, prompts take them in turn."""
    temperatures = recipe.answers.temperatures
    if len(temperatures) == 1:
        yield temperatures[0], prompts, stage.place
        return
    folder = recipe.out / FOLDER / "answers" / f"{stage.label}.{stage.fingerprint[:12]}"
    lines = one_file(prompts).read_bytes().splitlines(keepends=True)
    for at, temperature in enumerate(temperatures):
        asked = folder / f"prompts-{at}.jsonl"
        files.write_whole(asked, lambda file, at=at: file.writelines(lines[at :: len(temperatures)]))
        yield temperature, asked, folder / f"answers-{at}.jsonl"


def _key(config: RunConfig) -> str:
    return json.dumps(config.target.model_dump(), default=str)
