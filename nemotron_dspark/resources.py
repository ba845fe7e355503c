"""Where the files that ship with the package lie: `configs/` and `templates/`.

A wheel carries both folders inside the package; a checkout keeps them at its root, where people look for them.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """Folder ``name`` ("configs" or "templates") of the installed package or of the checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
