"""Where data comes from: files, globs and data sets of the Hugging Face hub, as one file of JSON lines."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron_dspark import files
from nemotron_dspark.errors import EnvironmentFault, InputError

Given = Path | str | Sequence[Path | str]

_TABLES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
}  # as `datasets` calls them
_DATA_SET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.\[\]:%+-]+))?")


def one_file(given: Given) -> Path:
    """The file of JSON lines that ``given`` names, or one with the rows of all that it names, in that order.

    A text names a file, a glob (its files by name), or a data set: `org/name[:config][:split]`, a folder or a file that
    `datasets` reads. One file of JSON lines is used where it lies, all else is written once to the user's cache folder.

    Raises:
        InputError: there is no such file or data set.
        EnvironmentFault: the hub cannot be reached, or the package `datasets` is not installed.
    """
    found = [source for text in listed(given) for source in _sources(text)]
    if len(found) == 1 and isinstance(found[0], Path) and not _is_list(found[0]):
        return found[0]
    marks = [
        [str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns]
        if isinstance(source, Path)
        else [source._fingerprint, len(source)]
        for source in found
    ]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    file = caches / "nemotron-dspark" / f"{hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]}.jsonl"
    if not file.is_file():
        files.write_whole(file, lambda out: out.writelines(line for source in found for line in _lines(source)))
    return file


def listed(given: Given) -> list[str]:
    """Each text that ``given`` consists of."""
    return [str(given)] if isinstance(given, Path | str) else list(map(str, given))


def named(given: Given) -> str:
    """``given`` for people and reports."""
    return ", ".join(listed(given))


def _sources(text: str) -> Iterator[Any]:
    """Paths of files, and loaded data sets."""
    path, data_set = Path(text), _DATA_SET.fullmatch(text)
    if path.is_dir():
        yield load_data_set(text, text)
    elif path.is_file() and path.suffix in _TABLES:
        yield load_data_set(text, _TABLES[path.suffix], data_files=text)
    elif path.is_file():
        yield path
    elif data_set and path.suffix not in (".json", ".jsonl", *_TABLES):
        yield load_data_set(text, data_set["name"], data_set["config"] or None, split=data_set["split"])
    elif any(letter in text for letter in "*?["):
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise InputError(f"No file matches {text}.", "Check the pattern.")
        for match in matches:
            yield from _sources(match)
    else:
        raise InputError(f"{path} is not a file.", "Check the path of the data file.")


def load_data_set(text: str, name: str, config: str | None = None, **settings: Any) -> Any:
    """A `datasets.Dataset` (with ``streaming`` an `IterableDataset`): the split asked for, or `train`, or the only."""
    try:
        import datasets
    except ImportError:
        raise EnvironmentFault(
            "The package datasets is not installed.", "Run: pip install 'nemotron-dspark[data]'."
        ) from None
    try:
        found = datasets.load_dataset(name, config, **settings)
    except ConnectionError as error:
        raise EnvironmentFault(
            f"{text} is no file here, and the data set of that name cannot be reached: {_one_line(error)}.",
            "Check the path and the network, or download the data set and give its files.",
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"The data set {text} cannot be read: {_one_line(error)}.",
            "Check its name, configuration and split (org/name:config:split), or give its files.",
        ) from None
    if not isinstance(found, dict):
        return found
    if len(found) > 1 and "train" not in found:
        first = next(iter(found))
        raise InputError(
            f"The data set {text} has the splits {', '.join(found)}.", f"Name one: {name}:{config or ''}:{first}."
        )
    return found["train"] if "train" in found else next(iter(found.values()))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _is_list(path: Path) -> bool:
    """Whether a `.json` file is one list of all rows."""
    if path.suffix != ".json":
        return False
    with open(path, "rb") as file:
        return file.read(1024).lstrip()[:1] == b"["


def _lines(source: Any) -> Iterator[bytes]:
    if isinstance(source, Path) and not _is_list(source):
        with open(source, "rb") as file:
            yield from (line if line.endswith(b"\n") else line + b"\n" for line in file)
        return
    rows: Iterable[Any] = files.read_json(source) if isinstance(source, Path) else map(without_nulls, source)
    yield from (json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n" for row in rows)


def without_nulls(value: Any) -> Any:
    """``value`` without the keys that a table has only because another of its rows has them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
