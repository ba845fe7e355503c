"""A decoder without a model whose pace the test sets."""

import dataclasses
import threading
import time

from nemotron_dspark.decoding.constraint import Likelihood

SCRIPT = "Once upon a time there was a state, naïve and 🙂; it kept what was accepted.\nThen it went on. "


@dataclasses.dataclass(eq=False)
class FakeGeneration:
    script: list[int]
    limit: int
    stop: int | None = None  # ends the answer behind the script, which is repeated without one
    tokens: list[int] = dataclasses.field(default_factory=list)
    finished: str | None = None
    accepted: list[int] = dataclasses.field(default_factory=list)
    proposed: list[int] = dataclasses.field(default_factory=list)
    drafted: list[list[int]] = dataclasses.field(default_factory=list)
    survived: list[int] = dataclasses.field(default_factory=list)
    likelihoods: list[Likelihood] = dataclasses.field(default_factory=list)
    logprobs: int | None = None


@dataclasses.dataclass
class FakePrompt:
    reused: int = 0


@dataclasses.dataclass(eq=False)
class FakeReading:
    left: int
    prompt: FakePrompt | None = None
    error: Exception | None = None


class FakeDecoder:
    """`Decoder` without a model: writes SCRIPT again and again, three tokens a round, each round after ``go``."""

    def __init__(self, tokenizer):
        self.script = tokenizer.encode(SCRIPT)
        self.go = threading.Event()
        self.go.set()
        self.stop: int | None = None
        self.pause = 0.0  # seconds of a round
        self.together: list[int] = []  # generations of each round
        self.reader = self
        self.alive: set[int] = set()
        self.fail_start: BaseException | None = None
        self.fail_step: BaseException | None = None
        self.fail_read: Exception | None = None

    def begin(self, prompt_ids):
        if self.fail_start is not None:
            error, self.fail_start = self.fail_start, None
            raise error
        return FakeReading(len(prompt_ids))

    def start(self, prompt, sampling, stop_ids=None, constraint=None):
        generation = FakeGeneration(self.script, sampling.max_new_tokens, self.stop, logprobs=sampling.logprobs)
        self.alive.add(id(generation))
        self._write(generation, 1)
        return generation

    def step(self, rows, budget=None):
        if budget is None:
            self._round(rows)
        for reading in rows if budget else ():
            read = min(reading.left, budget)
            reading.left, budget = reading.left - read, budget - read
            reading.error, self.fail_read = self.fail_read, None
            reading.prompt = None if reading.left else FakePrompt()

    def _round(self, generations):
        self.go.wait(20)
        time.sleep(self.pause)
        self.together.append(len(generations))
        if self.fail_step is not None:
            error, self.fail_step = self.fail_step, None
            raise error
        for generation in generations:
            self._write(generation, 3)
            generation.accepted.append(3)
            generation.proposed.append(4)
            generation.drafted.append([*generation.tokens[-3:-1], 7, 7])
            generation.survived.append(2)

    def _write(self, generation, count):
        for _ in range(count):
            if generation.finished is None:
                over = generation.stop is not None and len(generation.tokens) == len(generation.script)
                said = generation.script[len(generation.tokens) % len(generation.script)]
                generation.tokens.append(generation.stop if over else said)
                if generation.logprobs is not None:
                    top = tuple((id_, -2.0) for id_ in range(generation.logprobs))
                    generation.likelihoods.append(Likelihood(-1.0, top))
                if over:
                    generation.finished = "stop"
                elif len(generation.tokens) == generation.limit:
                    generation.finished = "length"

    def drop(self, generation):
        self.alive.discard(id(generation))
