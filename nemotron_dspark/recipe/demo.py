"""The whole recipe on one machine in minutes: a small hybrid target, and a draft that makes it faster.

Every stage is the one a real target goes through; only the target, the budgets and the text are small.
"""

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from nemotron_dspark import files, stages
from nemotron_dspark.config import EvalConfig, RunConfig, load_config
from nemotron_dspark.data.regenerate import regenerate
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import CheckError, EnvironmentFault
from nemotron_dspark.evaluation.measure import Evaluation, Measurement, measure, prompt_ids
from nemotron_dspark.evaluation.picture import draw_run
from nemotron_dspark.recipe.corpus import HELD_OUT, MODULES, write_prompts
from nemotron_dspark.recipe.demo_target import train_target
from nemotron_dspark.recipe.progress import Progress, StepProgress
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import Target

STAGES = ("target", "answers", "cache", "train", "eval", "serve")
_SMALL_TENSORS = ("answers", "eval", "serve")  # decoding a tiny model: a second thread would only be waited for
# A draft is good at the temperatures it was trained on, and this one is measured at both.
TEMPERATURES = {"sampled": (1.0, 0.75), "greedy": (0.0, 0.25)}  # name: temperature, share of the prompts


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of each stage, counted and not timed so that machines compare; ``scaled`` makes a worse demo."""

    target_steps: int = 560
    train_steps: int = 700
    train_prompts: int = 1800
    eval_prompts: int = 32
    answer_tokens: int = 80

    def scaled(self, scale: float) -> "Budget":
        return Budget(
            max(10, round(self.target_steps * scale)),
            max(10, round(self.train_steps * scale)),
            max(24, round(self.train_prompts * scale)),
            max(4, round(self.eval_prompts * scale)),
            self.answer_tokens,
        )


@dataclasses.dataclass(frozen=True)
class DemoResult:
    run_dir: Path
    target: dict[str, Any]  # what is known of it
    evaluation: Evaluation
    measurements: dict[str, Measurement]  # greedy, sampled, and untrained_greedy and untrained_sampled if measured
    stages: dict[str, float]  # seconds by name
    served: str  # what the `openai` client got from the speculative server
    picture: Path

    def to_json(self) -> dict[str, Any]:
        return {
            "accepted_length": {name: found.accepted_length for name, found in self.measurements.items()},
            "per_position": {name: found.per_position for name, found in self.measurements.items()},
            "lossless": {
                "prompts": self.evaluation.lossless.prompts,
                "identical": self.evaluation.lossless.identical,
            },
            "tokens_per_second": {
                "plain": self.evaluation.plain_tokens_per_second,
                "speculative": self.evaluation.speculative_tokens_per_second,
            },
            "stages": self.stages,
            "target": self.target,
            "picture": str(self.picture),
            "run_dir": str(self.run_dir),
        }


def run_demo(run_dir: Path, budget: Budget, *, seed: int = 0, progress: Progress | None = None) -> DemoResult:
    """Run all stages in ``run_dir``, a new folder. Raises whatever a stage raises; what was made before stays there."""
    require_packages()
    progress = progress or Progress()
    run_dir.mkdir(parents=True)
    clock = Clock(progress, single_threaded=_SMALL_TENSORS)
    folder = run_dir / "target"
    config = load_config(file=resource_folder("configs") / "demo.yaml", target=str(folder))

    with clock("target"):
        trained = train_target(
            folder,
            budget.target_steps,
            seed=seed,
            progress=lambda done, loss: progress.update(f"loss {loss:.2f}", done, budget.target_steps),
        )
        progress.note(f"{trained.parameters / 1e6:.1f} M parameters, {trained.steps} steps, loss {trained.loss:.2f}")
    held_out = _write_prompts(run_dir, budget, seed)

    with clock("answers"):
        target = stages.load_target(config)
        answer_prompts(target, run_dir, config, budget, progress)

    with clock("cache"):
        build_demo_cache(target, run_dir, config, progress)

    with clock("train"):
        run = _train(run_dir, config, budget, progress)

    with clock("eval"):
        draft = DSparkDraft.load(run / "draft", device=target.device, dtype=target.dtype)
        evaluation, measurements = _evaluate(target, draft, held_out, config, seed, progress)

    with clock("serve"):
        served = ask_server(target, draft, held_out, config, progress)

    picture = draw_run(run_dir / "demo.png", labelled(measurements), run)
    result = DemoResult(run_dir, dataclasses.asdict(trained), evaluation, measurements, clock.seconds, served, picture)
    files.write_json(run_dir / "demo.json", result.to_json())
    return result


def require_packages() -> None:
    """Raise `EnvironmentFault` before the first minute is spent if what a later stage imports is not installed."""
    needed = ("openai", "fastapi", "uvicorn", "prometheus_client", "matplotlib")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise EnvironmentFault(
            f"The demo needs packages that are not installed: {', '.join(missing)}.",
            "Install them with `pip install 'nemotron-dspark[data,serve,report]'`.",
        )


def new_run_dir(parent: Path) -> Path:
    """``parent/demo``, or ``parent/demo-N`` with the first N that is free: no earlier demo is touched."""
    candidates = [parent / "demo", *(parent / f"demo-{number}" for number in range(2, 10_000))]
    return next(folder for folder in candidates if not folder.exists())


class Clock:
    """Seconds per stage, those of earlier calls in ``before`` included; ``save`` is called when a stage ends."""

    def __init__(
        self,
        progress: Progress,
        before: dict[str, float] | None = None,
        *,
        single_threaded: Collection[str] = (),
        save: Callable[[], None] = lambda: None,
    ):
        self.seconds = {} if before is None else before
        self._progress = progress
        self._single_threaded = single_threaded
        self._save = save
        self._name, self._began = "", 0.0

    def spent(self, name: str) -> float:
        """Seconds of the stage ``name`` so far."""
        running = time.monotonic() - self._began if name == self._name else 0.0
        return self.seconds.get(name, 0.0) + running

    def total(self) -> float:
        """Seconds of all stages so far."""
        return sum(self.spent(name) for name in {*self.seconds, self._name})

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._progress.stage(name)
        threads = torch.get_num_threads()
        if name in self._single_threaded:
            torch.set_num_threads(1)
        self._name, self._began = name, time.monotonic()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self.seconds[name] = round(self.spent(name), 1)
            self._name = ""
            self._save()


def _write_prompts(run_dir: Path, budget: Budget, seed: int) -> Path:
    """`prompts.jsonl` for training, and the file it returns: prompts from modules that no earlier stage has seen."""
    write_prompts(run_dir / "prompts.jsonl", MODULES, budget.train_prompts, seed + 1)
    return write_prompts(run_dir / "held_out.jsonl", HELD_OUT, budget.eval_prompts, seed + 2)


def answer_prompts(
    target: Target,
    run_dir: Path,
    config: RunConfig,
    budget: Budget,
    progress: Progress,
    temperatures: Mapping[str, tuple[float, float]] = TEMPERATURES,
) -> None:
    """`conversations.jsonl`: each prompt answered once, at one of the temperatures the draft will work at.

    ``temperatures`` are given by name, each with its share of the prompts.
    """
    rows = (run_dir / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    answered = []
    with stages.serve(config, target=target) as server:
        for name, (temperature, share) in temperatures.items():
            count = round(share * budget.train_prompts)
            files.write_text(run_dir / "answers" / f"prompts-{name}.jsonl", "".join(rows[:count]))
            rows = rows[count:]
            report = regenerate(
                run_dir / "answers" / f"prompts-{name}.jsonl",
                run_dir / "answers" / f"{name}.jsonl",
                base_url=server.base_url,
                model=server.model_id,
                concurrency=config.serve.max_batch_size * 2,
                temperature=temperature,
                max_tokens=budget.answer_tokens,
                progress=lambda now, label=name: progress.update(f"{now.done} {label} answers", now.done, now.total),
            )
            answered.append(report.out_file.read_text(encoding="utf-8"))
            progress.note(f"{report.answered} answers at temperature {temperature:g} through {server.base_url}")
    files.write_text(run_dir / "conversations.jsonl", "".join(answered))


def build_demo_cache(target: Target, run_dir: Path, config: RunConfig, progress: Progress) -> None:
    report = stages.build_cache(
        config,
        run_dir / "conversations.jsonl",
        run_dir / "cache",
        target=target,
        on_progress=lambda now: progress.update(f"{now.samples} samples", now.samples, now.total_samples),
    )
    built = report.build
    size = files.size_text(built.bytes)
    progress.note(f"{built.samples} samples, {built.tokens} tokens, {size}, taps {list(report.taps)}")


def _train(run_dir: Path, config: RunConfig, budget: Budget, progress: Progress) -> Path:
    run = run_dir / "run"
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": budget.train_steps})})
    report = stages.train(config, run, cache=run_dir / "cache", callbacks=[StepProgress(progress)])
    progress.note(f"{report.parameters / 1e6:.1f} M trained parameters, {report.steps} steps")
    return run


def _evaluate(
    target: Target, draft: DSparkDraft, held_out: Path, config: RunConfig, seed: int, progress: Progress
) -> tuple[Evaluation, dict[str, Measurement]]:
    tokens = config.eval.max_new_tokens
    prompts = prompt_ids(target, held_out, new_tokens=tokens)

    def show(what: str, done: int, total: int) -> None:
        progress.update(what, done, total)

    evaluation = stages.evaluate(config, draft, held_out, target=target, on_progress=show).evaluation
    untrained = DSparkDraft(draft.config, seed=seed)
    untrained.set_embeddings(draft.embed_tokens.weight, draft.lm_head.weight)
    greedy, sampled = evaluation.measurements
    measurements = {"greedy": greedy, "sampled": sampled}
    together = EvalConfig(max_new_tokens=tokens, batch_size=len(prompts))
    for name, temperature in (("untrained_greedy", 0.0), ("untrained_sampled", 1.0)):
        measurements[name] = measure(
            target,
            untrained.eval(),
            prompts,
            temperature,
            together,
            progress=lambda what, done, total: show(f"untrained, {what}", done, total),
        )
    return evaluation, measurements


def ask_server(target: Target, draft: DSparkDraft, held_out: Path, config: RunConfig, progress: Progress) -> str:
    """One request by the `openai` client to a speculative server; `CheckError` if nothing was drafted."""
    import openai

    from nemotron_dspark.data.prompts import Prompt, read_prompts

    prompt = next(prompt for prompt in read_prompts(held_out) if isinstance(prompt, Prompt))
    messages = [{"role": message.role, "content": message.content} for message in prompt.first]
    with stages.serve(config, draft, target=target) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="-")
        answer = client.chat.completions.create(
            model=server.model_id,
            messages=cast(Any, messages),  # the client's type has a class for every role
            temperature=0,
            max_tokens=config.eval.max_new_tokens,
        )
    usage = answer.usage
    speculated = (usage.model_extra or {}).get("speculative") if usage else None
    if usage is None or speculated is None:
        raise CheckError("The server answered without drafting a single token.", "Look at the log above.")
    progress.note(
        f"{usage.completion_tokens} tokens in {speculated['rounds']} rounds, "
        f"{speculated['accepted_length']:.2f} a round"
    )
    return answer.choices[0].message.content or ""


def labelled(measurements: dict[str, Measurement]) -> dict[str, Measurement]:
    """The demo's measurements under the names that people read."""
    names = {
        "greedy": "greedy",
        "sampled": "temperature 1",
        "untrained_greedy": "untrained greedy",
        "untrained_sampled": "untrained, temp. 1",
    }
    return {names[name]: found for name, found in measurements.items()}
