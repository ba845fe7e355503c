"""Named open prompt sets of the Hugging Face hub: read as a stream, without doubles and without evaluation prompts.

Of a conversation only what is asked is kept, as the target writes the answers; calls of tools stay, because their
results follow them (`data.dialogue`). Licences, splits and revisions were taken from stored copies of the sets' cards.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_dspark.data.conversations import RowError, Skipped, SkipTally, read_rows
from nemotron_dspark.data.overlap import Overlap, words_of
from nemotron_dspark.data.prompts import Prompt, parse_prompt
from nemotron_dspark.data.sources import Given, listed, load_data_set, one_file, without_nulls
from nemotron_dspark.data.split import place_of
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.files import json_line, write_json, write_whole

LIMIT = 50_000  # prompts, unless asked for more
_BUFFER = 2_000  # rows that are shuffled at a time: neighbours in a set are often variants of one prompt
_COLUMNS = ("prompt", "question", "problem", "instruction", "query")  # where a set has a text in place of messages


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """A data set of the hub, or some of its splits."""

    name: str  # org/name
    splits: tuple[str, ...]
    licence: str
    rows: str  # how many there are, as its card says
    what: str
    config: str | None = None
    revision: str | None = None  # commit that it is pinned to; None: the newest, and the report says which that was


_PERFECTBLEND = PromptSet(
    "mlabonne/open-perfectblend",
    ("train",),
    "Apache-2.0",
    "over a million",
    "chat, mathematics and code; what DeepSpec's published drafts train on",
    revision="af60f3c18201652a83a93f46fcfee1b646ba3df7",
)


def _nemotron_v1(split: str, rows: str, what: str) -> PromptSet:
    name, revision = "nvidia/Nemotron-Post-Training-Dataset-v1", "74e23eb6f830fef4a9e96a92f6f6262214cbb9a8"
    return PromptSet(name, (split,), "CC BY 4.0", rows, what, revision=revision)


PRESETS: Mapping[str, tuple[PromptSet, ...]] = {
    "chat": (
        _PERFECTBLEND,
        _nemotron_v1("chat", "746 622", "single questions of all kinds"),
        PromptSet("HuggingFaceH4/ultrachat_200k", ("train_sft",), "MIT", "207 865", "chats of several turns"),
    ),
    "code": (
        PromptSet(
            "m-a-p/CodeFeedback-Filtered-Instruction", ("train",), "Apache-2.0", "157 000", "programming questions"
        ),
        _PERFECTBLEND,
    ),
    "math": (
        PromptSet(
            "nvidia/Nemotron-Math-v2",
            ("low", "medium"),
            "CC BY 4.0, parts CC BY-SA 4.0",
            "347 000 problems",
            "competition and StackExchange problems, with and without a Python tool",
        ),
        _nemotron_v1("math", "2 044 407", "problems with a final answer"),
    ),
    "reasoning": (
        PromptSet(
            "open-thoughts/OpenThoughts3-1.2M",
            ("train",),
            "Apache-2.0",
            "1.2 million, 16 to a question",
            "mathematics, code and science questions that take long thought",
        ),
        PromptSet(
            "nvidia/Nemotron-Science-v1",
            ("MCQ", "RQA"),
            "CC BY 4.0",
            "174 155 + 52 179",
            "science, with and without choices",
        ),
        _nemotron_v1("stem", "20 662 167", "science and engineering"),
    ),
    "agentic": (
        PromptSet(
            "nvidia/Nemotron-Agentic-v1",
            ("interactive_agent", "tool_calling"),
            "CC BY 4.0",
            "19 028 + 316 094",
            "conversations of several turns with tools, their calls and results",
        ),
        PromptSet(
            "NousResearch/hermes-function-calling-v1",
            ("train",),
            "Apache-2.0",
            "1 900",
            "function calls written as text",
            config="func_calling",
        ),
    ),
}

EVALUATION = (
    PromptSet("HuggingFaceH4/mt_bench_prompts", ("train",), "Apache-2.0", "80", "MT-Bench"),
    PromptSet("openai/openai_humaneval", ("test",), "MIT", "164", "HumanEval"),
    PromptSet("openai/gsm8k", ("test",), "MIT", "1 319", "GSM8K", config="main"),
    PromptSet(
        "HuggingFaceH4/MATH-500",
        ("test",),
        "MIT",
        "500",
        "MATH-500",
        revision="ff5b20257d8185524591543f8ff5993951537bb8",
    ),
)


@dataclasses.dataclass(frozen=True)
class PromptsProgress:
    kept: int
    limit: int
    read: int


@dataclasses.dataclass(frozen=True)
class PromptsReport:
    train_file: Path
    held_out_file: Path
    train: int  # prompts
    held_out: int
    read: int  # rows
    doubled: int
    overlapping: dict[str, int]  # rows left out, by the evaluation set that they overlap with
    checked_against: dict[str, int]  # prompts of each evaluation set
    sources: tuple[dict[str, Any], ...]  # name, splits, licence, revision that was read, prompts kept
    skipped: SkipTally


def write_prompts(
    preset: str,
    out: Path | str,
    *,
    limit: int = LIMIT,
    held_out: float = 0.05,
    against: Given = (),
    revisions: Mapping[str, str] | None = None,
    local: Path | None = None,
    progress: Callable[[PromptsProgress], None] | None = None,
) -> PromptsReport:
    """Write ``limit`` prompts of ``preset`` to `train.jsonl` and `held_out.jsonl` in the folder ``out``.

    The sets of the preset take turns, so each gives the same number as long as it lasts. A prompt that was seen before
    (the same words in what system and user say) is left out, and one that overlaps with `EVALUATION` or with
    ``against`` (files or data sets, as `data.sources.one_file`). `about.json` says where all of it comes from.

    Args:
        held_out: share of the prompts in the second file, chosen as `data.split` does.
        revisions: commit by name of a data set, in place of the one it is pinned to.
        local: folder with copies of data sets in org/name, which are read in place of the hub's.

    Raises:
        InputError: no such preset or data set, or ``out`` holds prompts already.
        EnvironmentFault: the hub cannot be reached, or `datasets` is not installed.
    """
    if preset not in PRESETS:
        raise InputError(f"There is no preset {preset}.", f"Choose one of {', '.join(PRESETS)}.")
    folder = Path(out)
    train_file, held_out_file = folder / "train.jsonl", folder / "held_out.jsonl"
    for path in (train_file, held_out_file):
        if path.exists():
            raise InputError(f"{path} is there already.", "Delete it, or give another folder to --out.")
    hub = _Hub(dict(revisions or {}), local)
    hub.check_names((*PRESETS[preset], *EVALUATION))
    overlap = _evaluation_prompts(hub, against)
    kept: list[tuple[str, bool]] = []  # line, and whether it is held out
    seen: set[bytes] = set()
    overlapping: Counter[str] = Counter()
    by_set: Counter[str] = Counter()
    skipped, doubled, read = SkipTally(), 0, 0
    streams = [(known, split, hub.rows(known, split)) for known in PRESETS[preset] for split in known.splits]
    for known, split, row in _in_turn(streams):
        if len(kept) >= limit:
            break
        read += 1
        if progress and read % 100 == 0:
            progress(PromptsProgress(len(kept), limit, read))
        try:
            prompt, line_row = convert(row)
        except RowError as error:
            skipped.add(Skipped(read, str(error)))
            continue
        text = _asked(prompt)
        # Millions of prompts pass by: a digest of the words is kept of each, not the words.
        key = hashlib.blake2b(" ".join(words_of(text)).encode(), digest_size=16).digest()
        if key in seen:
            doubled += 1
        elif found := overlap.with_text(text):
            overlapping[found] += 1
        else:
            line = json_line({"id": f"{known.name}:{split}:{by_set[known.name]}"} | line_row)
            # Both files are written at the end: the share is of what is kept, and a run that fails leaves neither.
            kept.append((line, place_of(line.encode()) < held_out))
            by_set[known.name] += 1
        seen.add(key)
    if not kept:
        raise InputError(f"No prompt of {preset} can be used: {'; '.join(skipped.sentences())}.", "Look at the sets.")
    write_whole(held_out_file, lambda file: file.writelines(line.encode() for line, held in kept if held))
    write_whole(train_file, lambda file: file.writelines(line.encode() for line, held in kept if not held))
    held = sum(held for _, held in kept)
    sources = tuple(
        {
            "name": known.name,
            "config": known.config,
            "splits": known.splits,
            "licence": known.licence,
            "revision": hub.read_at[known.name],
            "prompts": by_set[known.name],
        }
        for known in PRESETS[preset]
    )
    report = PromptsReport(
        train_file,
        held_out_file,
        len(kept) - held,
        held,
        read,
        doubled,
        dict(overlapping),
        overlap.counts,
        sources,
        skipped,
    )
    about = dataclasses.asdict(report) | {"preset": preset, "skipped": skipped.to_json()}
    about |= {"train_file": train_file.name, "held_out_file": held_out_file.name}
    write_json(folder / "about.json", about)
    return report


def _evaluation_prompts(hub: "_Hub", against: Given) -> Overlap:
    """What no prompt may overlap with: `EVALUATION`, and what ``against`` names."""
    overlap = Overlap()
    for known in EVALUATION:
        overlap.add(known.what, map(_asked, _usable(hub.rows(known, shuffle=False))))
    for given in listed(against):
        rows = (row for _, row in read_rows(one_file(given)) if not isinstance(row, Skipped))
        overlap.add(given, map(_asked, _usable(rows)))
    return overlap


def convert(row: Mapping[str, Any]) -> tuple[Prompt, dict[str, Any]]:
    """A row of any of the sets as a prompt, and as a line of a prompt file; `RowError` when it cannot be used."""
    given = without_nulls(dict(row))
    if not ("messages" in given or "conversations" in given or "turns" in given):
        asked = next((given[column] for column in _COLUMNS if column in given), None)
        given = {"turns": asked if isinstance(asked, list) else [asked]} if asked else given
    prompt = parse_prompt(given, 0)
    if prompt.called:  # results of tools follow recorded calls, so all of it is needed
        line = {"messages": given.get("conversations", given.get("messages"))}
    else:
        line = {"messages": [message.to_json() for turn in prompt.turns for message in turn]}
    return prompt, line | ({"tools": prompt.tools} if prompt.tools else {})


class _Hub:
    """Data sets as streams of rows, from the hub or from copies in a folder."""

    def __init__(self, revisions: dict[str, str], local: Path | None):
        self._revisions, self._local = revisions, local
        self.read_at: dict[str, str] = {}  # commit by name

    def check_names(self, sets: Sequence[PromptSet]) -> None:
        names = {known.name for known in sets}
        for name in self._revisions:
            if name not in names:
                raise InputError(
                    f"{name} is none of the data sets that are read.", f"They are {', '.join(sorted(names))}."
                )

    def rows(self, known: PromptSet, split: str | None = None, *, shuffle: bool = True) -> Iterator[Mapping[str, Any]]:
        split = split or known.splits[0]
        copy = self._local / known.name if self._local else None
        if copy is not None:
            if not copy.is_dir():
                raise InputError(
                    f"{copy} is not there.", f"Run: hf download {known.name} --repo-type dataset --local-dir {copy}"
                )
            self.read_at[known.name] = "local copy"
            settings: dict[str, Any] = {}
        else:
            settings = {"revision": self._commit(known)}
        label = f"{known.name}:{known.config or ''}:{split}"
        found = load_data_set(label, str(copy or known.name), known.config, split=split, streaming=True, **settings)
        if shuffle:
            found = found.shuffle(seed=0, buffer_size=_BUFFER)
        try:
            yield from found
        except (*_network_errors(), ValueError) as error:  # ValueError: a file that is not what it should be
            raise EnvironmentFault(
                f"The data set {label} stopped in the middle: {' '.join(str(error).split())}.",
                "Run it again, or download the set and give its folder to --local.",
            ) from None

    def _commit(self, known: PromptSet) -> str:
        """The commit that is read: the one that is asked for, or pinned, or the newest one's own name."""
        if known.name not in self.read_at:
            revision = self._revisions.get(known.name, known.revision)
            self.read_at[known.name] = revision or _newest(known.name)
        return self.read_at[known.name]


def _network_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, HfHubHTTPError.__bases__[0]  # of httpx or of what the hub's client has in its place


def _newest(name: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(name, timeout=30).sha or "main"
    except HfHubHTTPError as error:
        raise InputError(
            f"The data set {name} is not to be had: {' '.join(str(error).split())}.",
            "Check that you may read it: huggingface.co shows its terms, `hf auth login` logs you in.",
        ) from None
    except _network_errors() as error:
        raise EnvironmentFault(
            f"The data set {name} cannot be reached: {' '.join(str(error).split())}.",
            "Check the network, or download the sets elsewhere and give their folder to --local.",
        ) from None


def _in_turn(
    streams: Sequence[tuple[PromptSet, str, Iterator[Mapping[str, Any]]]],
) -> Iterator[tuple[PromptSet, str, Mapping[str, Any]]]:
    """One row of each stream after the other, as long as they last."""
    left = list(streams)
    while left:
        for stream in list(left):
            row = next(stream[2], None)
            if row is None:
                left.remove(stream)
            else:
                yield stream[0], stream[1], row


def _usable(rows: Iterator[Mapping[str, Any]]) -> Iterator[Prompt]:
    for row in rows:
        try:
            yield convert(row)[0]
        except RowError:
            continue


def _asked(prompt: Prompt) -> str:
    """What system and user say."""
    said = (message for message in itertools.chain.from_iterable(prompt.turns) if message.role in ("system", "user"))
    return "\n".join(message.content for message in said)
