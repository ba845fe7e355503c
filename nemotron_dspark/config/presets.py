"""Presets: worked configurations in `configs/`, one per target that people run, found by the target's name."""

from pathlib import Path

from nemotron_dspark.config.known import known_target
from nemotron_dspark.resources import resource_folder


def preset_for(name: str) -> Path | None:
    """The preset of a target given as a repository, an alias or a folder named like one; None when there is none."""
    known = known_target(name)
    return resource_folder("configs") / known.preset if known and known.preset else None
