"""The targets people name, as `configs/known/` lists them: aliases, licences, presets, what their files do not say."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import yaml

from nemotron_dspark.resources import resource_folder

RESEARCH_ONLY = "(research only)"  # how such a licence ends


@dataclasses.dataclass(frozen=True)
class KnownTarget:
    """A published target; `configs/known/` says what each field is."""

    repository: str
    layers: int
    billions: float
    licence: str | None = None
    chat_format: str | None = None
    mask_token: int | None = None
    aliases: tuple[str, ...] = ()
    preset: str | None = None
    weights: str = "BF16"
    stop_ids: tuple[int, ...] = ()

    @property
    def full_precision(self) -> str | None:
        """The BF16 repository of a quantised one, if it is known; None for one that is BF16 itself."""
        if self.weights == "BF16":
            return None
        stem = self.repository.removesuffix(self.weights).removesuffix("-")
        return next((other.repository for other in KNOWN if other.repository in (stem, f"{stem}-BF16")), None)


def _read(path: Path) -> list[KnownTarget]:
    rows: list[dict[str, Any]] = []
    for group in yaml.safe_load(path.read_text(encoding="utf-8")):
        rows += [{**group, **row} for row in group.pop("targets")]
    for row in rows:
        row |= {key: tuple(value) for key, value in row.items() if isinstance(value, list)}
    return [KnownTarget(**row) for row in rows]


KNOWN = tuple(row for path in sorted((resource_folder("configs") / "known").glob("*.yaml")) for row in _read(path))

ALIASES = {alias: known.repository for known in KNOWN for alias in known.aliases}

_SNAPSHOT = re.compile(r"models--[^/]+--([^/]+)/snapshots/[^/]+$")  # a folder of the hub's local cache


def known_target(name: str) -> KnownTarget | None:
    """The entry for a repository, an alias, or a folder named like one of them; None without one.

    Folders may be called owner--repository, or be a snapshot in the hub's cache. Capitals do not matter.
    """
    path = name.replace("\\", "/").rstrip("/")
    snapshot = _SNAPSHOT.search(path)
    last = snapshot.group(1) if snapshot else path.rsplit("/", 1)[-1].rsplit("--", 1)[-1]
    return _by_last_part().get(last.lower())


def preset_for(name: str) -> Path | None:
    """The worked configuration in `configs/` for a target by its name; None when there is none."""
    known = known_target(name)
    return resource_folder("configs") / known.preset if known and known.preset else None


@functools.cache
def _by_last_part() -> dict[str, KnownTarget]:
    found = {alias.rsplit("/", 1)[-1].lower(): known for known in KNOWN for alias in known.aliases}
    return found | {known.repository.rsplit("/", 1)[-1].lower(): known for known in KNOWN}
