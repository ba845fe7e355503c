"""A decoder without a model whose pace the test sets."""

import dataclasses
import threading
import time

SCRIPT = "Once upon a time there was a state, naïve and 🙂; it kept what was accepted.\nThen it went on. "


@dataclasses.dataclass(eq=False)
class FakeGeneration:
    script: list[int]
    limit: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    finished: str | None = None
    accepted: list[int] = dataclasses.field(default_factory=list)
    proposed: list[int] = dataclasses.field(default_factory=list)


class FakeDecoder:
    """`Decoder` without a model: writes SCRIPT again and again, three tokens a round, each round after ``go``."""

    def __init__(self, tokenizer):
        self.script = tokenizer.encode(SCRIPT)
        self.go = threading.Event()
        self.go.set()
        self.pause = 0.0  # seconds of a round
        self.together: list[int] = []  # generations of each round
        self.alive: set[int] = set()
        self.fail_start: BaseException | None = None
        self.fail_step: BaseException | None = None

    def start(self, prompt_ids, sampling, stop_ids=None):
        if self.fail_start is not None:
            error, self.fail_start = self.fail_start, None
            raise error
        generation = FakeGeneration(self.script, sampling.max_new_tokens)
        self.alive.add(id(generation))
        self._write(generation, 1)
        return generation

    def step(self, generations):
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

    def _write(self, generation, count):
        for _ in range(count):
            if generation.finished is None:
                generation.tokens.append(generation.script[len(generation.tokens) % len(generation.script)])
                if len(generation.tokens) == generation.limit:
                    generation.finished = "length"

    def drop(self, generation):
        self.alive.discard(id(generation))
