"""Whether a prompt repeats one of an evaluation set: measured on what it was trained on, a draft looks too good."""

import re
from collections.abc import Iterable

WORDS = 13  # a run of so many words in common is an overlap, as in GPT-3's report (Brown et al. 2020, appendix C)
_FEWEST = 8  # shorter evaluation prompts are only found whole: "What is 2 + 2?" is in many prompts
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation and layout."""
    return _WORD.findall(text.lower())


class Overlap:
    """The prompts of evaluation sets, by name; `with_text` says which of them a text overlaps with."""

    def __init__(self) -> None:
        self._runs: dict[int, dict[str, str]] = {}  # by length: run of words -> name of its set
        self._whole: dict[str, str] = {}
        self.counts: dict[str, int] = {}  # prompts of each set

    def add(self, name: str, texts: Iterable[str]) -> None:
        for text in texts:
            words = words_of(text)
            self.counts[name] = self.counts.get(name, 0) + bool(words)
            if len(words) < _FEWEST:
                self._whole.setdefault(" ".join(words), name)
                continue
            length = min(WORDS, len(words))
            for run in _runs(words, length):
                self._runs.setdefault(length, {}).setdefault(run, name)

    def with_text(self, text: str) -> str | None:
        """The name of a set that has a prompt, or 13 words of one, in common with ``text``."""
        words = words_of(text)
        if words and (name := self._whole.get(" ".join(words))):
            return name
        for length, known in self._runs.items():
            for run in _runs(words, length):
                if name := known.get(run):
                    return name
        return None


def _runs(words: list[str], length: int) -> Iterable[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
