"""Real text that every machine has: the source and documentation of Python's standard library, as conversations.

The user gives some lines of a module, the answer is what follows, up to the end of the paragraph. Some modules are held
out: no stage but the evaluation sees them.
"""

import dataclasses
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.files import json_line, write_text

MODULES = (
    "argparse", "collections/__init__", "configparser", "contextlib", "csv", "dataclasses", "fractions", "functools",
    "gettext", "gzip", "html/parser", "pprint", "random", "shutil", "socketserver", "statistics", "tempfile",
    "textwrap", "threading", "weakref",
)  # fmt: skip
HELD_OUT = ("calendar", "cmd", "heapq", "shlex")

QUESTION_LINES = (3, 9)  # lines the user gives
ANSWER_LINES = (2, 14)  # lines of the answer; it ends sooner at an empty line


@dataclasses.dataclass(frozen=True)
class Passage:
    question: str
    answer: str


def sources(modules: tuple[str, ...]) -> list[str]:
    """Text of each module; `EnvironmentFault` when Python was installed without its sources."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [library / f"{name}.py" for name in modules]
    found = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    if len(found) < len(files) // 2:
        raise EnvironmentFault(
            f"The sources of Python's standard library are not in {library}.",
            "Install Python with its library sources; the demo trains its target on them.",
        )
    return found


def passages(texts: list[str], count: int, seed: int) -> list[Passage]:
    """``count`` passages from random places of ``texts``, longer texts more often."""
    generator = random.Random(seed)
    lines = [[line.rstrip() for line in text.splitlines()] for text in texts]
    starts = [(text, at) for text, rows in enumerate(lines) for at in range(len(rows) - sum(ANSWER_LINES))]
    found: list[Passage] = []
    while len(found) < count:
        text, at = generator.choice(starts)
        rows = lines[text]
        middle = at + generator.randint(*QUESTION_LINES)
        question = "\n".join(rows[at:middle]).strip("\n")
        answer = rows[middle : middle + ANSWER_LINES[1]]
        while answer and not answer[0]:
            answer.pop(0)
        end = next((i for i, row in enumerate(answer) if not row and i >= ANSWER_LINES[0]), len(answer))
        if question.strip() and len(answer[:end]) >= ANSWER_LINES[0]:
            found.append(Passage(question, "\n".join(answer[:end])))
    return found


def write_prompts(path: Path, modules: Sequence[str], count: int, seed: int) -> Path:
    """Write the questions of ``count`` passages of ``modules`` as JSON lines to ``path``, which is returned."""
    rows = [{"prompt": item.question} for item in passages(sources(tuple(modules)), count, seed)]
    write_text(path, "".join(map(json_line, rows)))
    return path
