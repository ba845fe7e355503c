"""A hook of mkdocs: what the documents link to outside of docs/ becomes a page of the site.

On the disk and on a code host `../configs/x.yaml` leads to the file. A site has docs/ alone, so the file is shown as a
page, `configs/x.md`, and the link is led there: so for presets, folders of them, the notebook and the changelog.
"""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````\n"


def _cell(cell: dict) -> str:
    text = "".join(cell["source"]).replace("](../docs/", "](../")
    return text if cell["cell_type"] == "markdown" else _fenced(text, "python")


def _page(path: Path) -> str:
    """A file, or the list of a folder's YAML files, as Markdown."""
    if path.is_dir():
        return f"# {path.name}\n\n" + "".join(f"- [{file.stem}]({file.stem}.md)\n" for file in _listed(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    if path.suffix == ".md":  # its links begin at the repository's root, where docs/ lies
        return re.sub(r"\]\(docs/", "](", text)
    return f"# {path.name}\n\n{_fenced(text, path.suffix.removeprefix('.'))}"


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"))


def _site_name(name: str) -> str:
    """`configs/x.yaml` is shown as `configs/x.md`, a folder as its `index.md`."""
    path = ROOT / name
    return f"{name}/index.md" if path.is_dir() else str(Path(name).with_suffix(".md"))


def on_files(files, config):
    """Add a page for everything that a page links to outside of docs/, if it is there."""
    wanted = {"CHANGELOG.md", "CONTRIBUTING.md", "notebooks/tiny_recipe.ipynb"}
    for page in files.documentation_pages():
        wanted.update(_OUTSIDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")))
    wanted |= {str(file.relative_to(ROOT)) for name in wanted for file in _listed(ROOT / name)}
    for name in sorted({name.rstrip("/") for name in wanted}):
        if (ROOT / name).exists():
            files.append(File.generated(config, _site_name(name), content=_page(ROOT / name)))
    return files


def on_page_markdown(markdown, **_):
    """Lead links out of docs/ to those pages; one to nothing stays as it is, and mkdocs complains of it."""
    return _OUTSIDE.sub(lambda link: f"]({_site_name(link[1])}" if (ROOT / link[1]).exists() else link[0], markdown)
