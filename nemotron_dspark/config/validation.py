"""What pydantic says of a value, in two sentences that name the file and the key."""

from collections.abc import Callable

from pydantic import ValidationError

from nemotron_dspark.errors import InputError


def input_error(
    error: ValidationError,
    origin: str = "",
    do: str = "Correct the value.",
    unknown: Callable[[str], str] | None = None,
) -> InputError:
    """A key that does not exist, which explains others that are missing; or the first fault of ``error``.

    Args:
        origin: what holds it, a file or an option.
        do: what helps.
        unknown: from a key that does not exist to what helps there.
    """
    faults = error.errors()
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    key = ".".join(map(str, first["loc"]))
    prefix = f"{origin}: " if origin else ""
    if first["type"] == "missing":
        return InputError(f"{origin or 'The config'} has no {key}.", do)
    if first["type"] == "extra_forbidden":
        return InputError(f"{prefix}{'t' if prefix else 'T'}here is no key {key}.", unknown(key) if unknown else do)
    why = first["msg"].removeprefix("Value error, ")
    why = why[:1].lower() + why[1:]
    return InputError(f"{prefix}{key} = {first['input']!r} is not accepted: {why}.", do)
