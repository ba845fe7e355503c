"""Where the files that ship with the package lie: `configs/`, `templates/` and `constraints.txt`.

A wheel carries them inside the package; a checkout keeps them at its root, where people look for them.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """Folder ``name`` ("configs" or "templates") of the installed package or of the checkout."""
    return _there(name)


def tested_versions() -> dict[str, str]:
    """What the tests ran with, by the package's name as PyPI spells it."""
    lines = _there("constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pins}


def _there(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / name
