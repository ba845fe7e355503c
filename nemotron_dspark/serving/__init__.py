"""The OpenAI-compatible server: one thread decodes, one event loop talks to clients."""

import contextlib
from collections.abc import Iterator

from nemotron_dspark.errors import EnvironmentFault


@contextlib.contextmanager
def needs_extra() -> Iterator[None]:
    """Around imports that only the `serve` extra brings: a missing one is said in a sentence, not in a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"The server needs the package {error.name}, which is not installed.",
            "Install it with `pip install 'nemotron-dspark[serve]'`.",
        ) from error
