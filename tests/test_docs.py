"""The documents say what is there: their commands parse, their settings exist, their links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml

from nemotron_dspark.cli import app
from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.config.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NDS = typer.main.get_command(app)

FILE_ENDINGS = ("py", "json", "jsonl")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(text: str, language: str = r"(?:shell|bash|sh|console)?") -> Iterator[list[str]]:
    """Lines of each code block: fenced in ``language``, or indented behind an empty line or the block's last one."""
    for fenced in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
        yield fenced[1].splitlines()
    if language.endswith("?"):
        text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        for indented in re.finditer(r"(?:^|\n\n)((?:(?: {4}.*)?\n)+)", text + "\n"):
            yield [line[4:] for line in indented[1].splitlines()]


def commands(lines: list[str]) -> Iterator[list[str]]:
    """The words of each command: continued lines joined, comments, prompts and variables before it taken off."""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        line = re.sub(r"^\s*\$ ", "", line).replace("[--", "--").replace("]", "")
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose or output with an apostrophe
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        for stop in ("|", ">", "2>", ">>", "&", "&&", ";"):
            words = words[: words.index(stop)] if stop in words else words
        if words:
            yield words


def nds_words(words: list[str]) -> list[str] | None:
    """What follows `nds` in its three spellings; None for another command."""
    if words[0] == "nds" or words[0].endswith("/nds"):
        return words[1:]
    if "nemotron_dspark" in words and words[words.index("nemotron_dspark") - 1] == "-m":
        return words[words.index("nemotron_dspark") + 1 :]
    return None


def find_command(words: list[str]):
    """The command that ``words`` begin with, its context's parent, and the words that are left for it."""
    command, context = NDS, NDS.make_context("nds", ["--help"], resilient_parsing=True)
    while words and hasattr(command, "get_command") and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        assert inner is not None, f"there is no command `{words[0]}` in `{context.command_path}`"
        command, words = inner, words[1:]
        if hasattr(command, "get_command"):
            context = command.make_context(command.name, ["--help"], parent=context, resilient_parsing=True)
    return command, context, words


def options_of(command) -> set[str]:
    return {"--help", *(name for param in command.params for name in (*param.opts, *param.secondary_opts))}


def fault(words: list[str]) -> str:
    """What `nds` would say is wrong with these words before it does anything; "" for a right command."""
    words = [re.sub(r"\$[A-Z_]+", "1", word) for word in words]
    try:
        command, parent, rest = find_command(words)
        if (
            "..." in rest or "…" in rest or command is NDS
        ):  # an excerpt, or options of `nds` itself, which act when parsed
            unknown = {word for word in rest if word.startswith("--")} - options_of(command)
            return f"no such option: {', '.join(sorted(unknown))}" if unknown else ""
        if rest and "--help" not in rest:
            command.make_context(command.name, list(rest), parent=parent)
        load_config("T", assignments=[value for name, value in pairwise(rest) if name == "--set"])
        for param in command.params:
            if "--machine" in param.opts:  # compared with the machines that are known when the command runs
                wrong = [value for name, value in pairwise(rest) if name == "--machine" and value not in param.help]
                return f"no such machine: {wrong[0]}" if wrong else ""
    except Exception as error:  # the parser's errors are of classes that typer keeps to itself
        said = getattr(error, "message", "") or str(error)
        return "" if said.endswith("does not exist.") else said  # a file that the reader has
    return ""


@each_page
def test_every_command_parses(page):
    for lines in blocks(page.read_text()):
        for words in commands(lines):
            if (rest := nds_words(words)) is not None:
                assert not fault(rest), f"{shlex.join(words)}: {fault(rest)}"


@each_page
def test_commands_in_a_sentence_exist(page):
    for code in re.findall(r"`((?:\.venv/bin/)?nds [^`]+)`", page.read_text()):
        words = shlex.split(code.replace("[", "").replace("]", ""))[1:]
        command, _, rest = find_command(words)
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0] in options_of(command), code


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("tain -t T", "no command `tain`"),
        ("cache bild", "no command `bild`"),
        ("plan --samples 5 -t", "requires an argument"),
        ("export -t T -d D", "Missing parameter"),
        ("train -t T --out O --cash C", "No such option"),
        ("train … --cash C", "no such option"),
        ("eval -t T -d D -p P --set eval.batch=3", "no key eval.batch"),
        ("train -t T -o O --set cache.mode=rotating", "cache.mode"),
        ("demo --target llama", "'hybrid'"),
        ("plan -t T --machine h1000", "no such machine"),
    ],
)
def test_a_wrong_command_is_found(wrong, said):
    assert said in fault(wrong.split())


@each_page
def test_every_setting_exists(page):
    sections = {name: field.annotation.model_fields for name, field in RunConfig.model_fields.items()}
    pattern = rf"(?<![\w./])({'|'.join(sections)})\.([a-z_]+\w*)(?=[=`, )]|$)"
    code = "\n".join(re.findall(r"`(?!--opts)[^`\n]+`", page.read_text()))
    for section, key in re.findall(pattern, code):
        assert key in sections[section] or key in FILE_ENDINGS, f"there is no setting {section}.{key}"


@each_page
def test_every_target_of_make_and_script_exists(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    text = page.read_text()
    for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, re.M):
        assert target in targets
    for script in re.findall(r"\b((?:benchmarks|docs|tests|notebooks|configs)/[\w/]+\.\w+)", text):
        assert (ROOT / script).is_file(), script


def anchors(page: Path) -> set[str]:
    """Names that a page's headings have as links, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_every_link_leads_to_something(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http", "mailto")):
            continue
        name, _, anchor = link.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    """Strictly: a link to a page or heading that is not there, or a page that is in no menu, is an error."""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exist in the docs directory, but are not included" not in done.stderr
    assert (tmp_path / "site" / "configs" / "nemotron_h_8b.html").is_file()
    assert "build_cache" in (tmp_path / "site" / "notebooks" / "tiny_recipe.html").read_text()


def test_the_table_of_the_readme_is_that_of_the_results():
    """Each target's figures in README.md stand in its row of docs/results.md."""
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines() if line[:2] == "| "]
    measured = [row for row in rows if re.match(r"\d", row[1])]
    results = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert measured
    for target, *figures, _ in measured:
        row = next(line for line in results if line.startswith(f"| {target}"))
        assert all(f"| {figure}" in row for figure in figures), target


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda form: form.stem
)
def test_the_forms_for_issues_are_whole(form):
    read = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(read)
    fields = [field for field in read["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    if form.stem != "feature":
        (doctor,) = [field for field in fields if field["id"] == "doctor"]
        assert doctor["attributes"]["label"] == "nds doctor --json"
        assert not fault(["doctor", "--json"])


def test_commands_in_messages_and_presets_exist():
    """Where the code or a preset tells somebody to run `nds …`, there is such a command with such options."""
    files = [*(ROOT / "nemotron_dspark").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    seen = 0
    for file in files:
        for code in re.findall(r"`nds ([^`\n{|]+)`", file.read_text()):
            command, _, rest = find_command(shlex.split(code))
            options = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert options <= options_of(command), f"{file.relative_to(ROOT)}: nds {code}"
            seen += 1
    assert seen > 50


@each_page
def test_every_recipe_loads(page, tmp_path):
    for number, lines in enumerate(blocks(page.read_text(), "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text("\n".join(lines))
        if "target" in yaml.safe_load(file.read_text()):
            assert load_recipe(file).asked
