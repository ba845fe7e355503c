"""Prompts from real text that every machine has: the functions of Python's standard library.

Each asks for something that a chat model is asked for: to explain a function, to document or to complete it. An eighth
of the modules is held out: no stage but the evaluation sees them.
"""

import ast
import functools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nemotron_dspark.errors import EnvironmentFault

_SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "__pycache__",
    "encodings",
}
_CODE_CHARACTERS = (60, 420)  # of a function that is shown
_HELD_OUT_EVERY = 8  # modules
_FEWEST = 500  # prompts that a whole library has by far

_TASKS = (
    ("code", "Explain what this Python function does.\n\n```python\n{code}\n```"),
    ("bare", "Write a docstring for this Python function.\n\n```python\n{bare}\n```"),
    ("stub", "Complete this Python function.\n\n```python\n{stub}\n```"),
)


def instructions(count: int, seed: int, *, held_out: bool = False) -> list[str]:
    """``count`` different prompts (fewer if there are not so many), drawn with ``seed``.

    Raises:
        EnvironmentFault: Python was installed without the sources of its library.
    """
    for_training, measured_on = _prompts()
    drawn = list(measured_on if held_out else for_training)
    random.Random(seed).shuffle(drawn)
    return drawn[:count]


@functools.cache
def _prompts() -> tuple[list[str], list[str]]:
    """All prompts for training, and those of the held-out modules; reading the library takes seconds."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(
        path.relative_to(library)
        for path in library.rglob("*.py")
        if not _SKIPPED & set(path.relative_to(library).parts) and not path.name.startswith("_")
    )
    asked: dict[bool, set[str]] = {True: set(), False: set()}  # by whether the module is held out
    for at, module in enumerate(modules):
        for part in _functions((library / module).read_text(encoding="utf-8", errors="replace")):
            asked[at % _HELD_OUT_EVERY == 0] |= {text.format(**part) for needed, text in _TASKS if needed in part}
    if len(asked[False]) < _FEWEST:
        raise EnvironmentFault(
            f"The sources of Python's standard library are not in {library}.",
            "Install Python with its library sources; the demo makes its prompts from them.",
        )
    return sorted(asked[False]), sorted(asked[True] - asked[False])


def _functions(source: str) -> Iterator[dict[str, str]]:
    """What is shown of each documented function: its code, without docstring, head with docstring."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        if not ast.get_docstring(node) or len(node.body) < 2:
            continue
        part = {"code": ast.unparse(node), "stub": _without(node, keep=True), "bare": _without(node, keep=False)}
        yield {name: code for name, code in part.items() if _CODE_CHARACTERS[0] <= len(code) <= _CODE_CHARACTERS[1]}


def _without(node: ast.FunctionDef, *, keep: bool) -> str:
    """The function's head with the docstring alone, or the function without the docstring."""
    body = node.body[:1] if keep else node.body[1:]
    return ast.unparse(
        ast.FunctionDef(**{name: value for name, value in ast.iter_fields(node) if name != "body"}, body=body, lineno=0)
    )
