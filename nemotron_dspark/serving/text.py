"""Turn tokens into text as they come: the texts add up to exactly what decoding all tokens at once gives.

Two things are held back until it is known what they become: the end of the text that the next token may still change (a
character whose bytes are spread over tokens), and an ending that could be the beginning of a stop string.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_WINDOW = 32  # tokens decoded again with each new one, at most, in ordinary text
_OVERLAP = 4  # tokens that stay when the window is cut
# Nemotron 3 marks these as special. They are part of what the model says: without them nobody could tell its reasoning
# from its answer, and answers regenerated for training would lack tokens that the target wrote.
_SPOKEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_SPOKEN += ("<TOOLCALL>", "</TOOLCALL>")  # Nemotron Nano v2


class Spelling:
    """How a tokenizer spells ids; made once, because reading a vocabulary takes time. Owned by one thread."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._tokens: dict[int, str] = {}
        special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        vocabulary = tokenizer.get_vocab()
        self.silent = frozenset(special - {vocabulary.get(tag) for tag in _SPOKEN})  # ids that are not written out
        # SentencePiece spells unknown characters as byte tokens and decodes a whole run of them together, so that a
        # later byte can change earlier ones: such a run (silent tokens vanish from it) is unsettled until it is over.
        bytes_ = {vocabulary[name] for name in (f"<0x{byte:02X}>" for byte in range(256)) if name in vocabulary}
        self.unsettled = frozenset(bytes_ | self.silent if bytes_ else ())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``: special tokens left out but for the tags, nothing tidied."""
        spoken = [id_ for id_ in ids if id_ not in self.silent]
        text = self._tokenizer.decode(spoken, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast("str", text)  # of one text's ids

    def token(self, id_: int) -> str:
        """How one token is spelled within a text; a special one by its name."""
        if id_ not in self._tokens:
            if id_ in self.silent or id_ >= len(self._tokenizer):
                self._tokens[id_] = str(self._tokenizer.convert_ids_to_tokens(id_) or "")
            else:  # behind another one: at the beginning of a text some tokenizers leave a space out
                before = self._tokenizer.encode("a", add_special_tokens=False)
                self._tokens[id_] = self.decode([*before, id_])[len(self.decode(before)) :]
        return self._tokens[id_]


class Detokeniser:
    """Decode one answer incrementally; the texts add up to `Spelling.decode` of all its tokens.

    Only a window of the last tokens is decoded. It is cut when nothing is held back: then the text of what follows
    depends on what stays only in whether there is any text before it. (`tokenizers.decoders.DecodeStream` gives other
    text where byte tokens follow each other: it shows a character whose run of bytes turns out invalid later.)
    """

    def __init__(self, spelling: Spelling):
        self._decode, self._unsettled = spelling.decode, spelling.unsettled
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were returned before

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        self._window.extend(ids)
        settled = len(self._window)
        while settled and self._window[settled - 1] in self._unsettled:
            settled -= 1
        text = self._decode(self._window[:settled])
        # One replacement character at most stands for an unfinished one; those before it are invalid for good.
        certain = len(text) - text.endswith(REPLACEMENT)
        new = text[self._given : certain]
        self._given = max(self._given, certain)
        if len(self._window) > _WINDOW and settled == len(self._window) and certain == len(text):
            self._cut()
        return new

    def _cut(self) -> None:
        for keep in range(_OVERLAP, _WINDOW):
            tail = self._decode(self._window[-keep:])
            if tail:  # with nothing before it the next token would be spelled as the first of a text
                self._window, self._given = self._window[-keep:], len(tail)
                return

    def finish(self) -> str:
        """The text that was held back, as the decoder spells it; nothing may be pushed afterwards."""
        return self._decode(self._window)[self._given :]


class StopScanner:
    """Let text through up to the first stop string.

    "First" is the stop string that is complete first, reading character by character; of several that end on the same
    character the longest. The result does not depend on how the text was cut up.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""  # a suffix of the text that begins a stop string
        self.stopped = False

    def push(self, new: str) -> str:
        """The part of the text that can be shown now. After ``stopped`` it is always empty."""
        if self.stopped:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text that was held back, once nothing follows it."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Detokeniser and stop scanner of one answer; ``used`` counts the tokens up to the one that ended it."""

    def __init__(self, spelling: Spelling, stops: Sequence[str] = ()):
        self._detokeniser = Detokeniser(spelling)
        self._scanner = StopScanner(stops)
        self._one_by_one = bool(stops)  # so that `used` does not depend on how many tokens a round brought
        self.used = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; what follows it never leaves this object."""
        return self._scanner.stopped

    def push(self, ids: Sequence[int]) -> str:
        """The text that can be shown after these tokens and could not before."""
        if not self._one_by_one:
            self.used += len(ids)
            return self._detokeniser.push(ids)
        return "".join(self.deltas(ids))

    def deltas(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text that `push` gives, up to the one that ends the answer."""
        shown = []
        for token in ids:
            if self.stopped:
                break
            self.used += 1
            shown.append(self._scanner.push(self._detokeniser.push((token,))))
        return shown

    def finish(self) -> str:
        """The rest of the text, once no further token comes."""
        if self.stopped:
            return ""
        shown = self._scanner.push(self._detokeniser.finish())
        return shown if self.stopped else shown + self._scanner.finish()
