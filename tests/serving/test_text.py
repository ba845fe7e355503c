"""Streamed text: pieces add up exactly, no half character, nothing of or after a stop string."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nemotron_dspark.recipe import tiny
from nemotron_dspark.serving.text import REPLACEMENT, Detokeniser, Spelling, StopScanner, TextStream

TEXTS = (
    "The state of a hybrid model, naïve façade — “ünïcödé” 日本語 🙂🙃 and the state again.",
    "def f(x):\n    return x\n",
)


@functools.cache
def byte_level() -> Spelling:
    return Spelling(tiny.make_tokenizer(TEXTS, 340))


@functools.cache
def byte_fallback() -> Spelling:
    """Like Llama 2's: metaspace, byte tokens decoded run by run, the first space stripped."""
    words = ["<unk>", "<s>", "▁", "▁a", "b", "▁bc", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Spelling(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>"))


@pytest.mark.parametrize("spelling", [byte_level, byte_fallback])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_text_is_the_tokenizers_but_for_the_tags(spelling, data):
    size = 340 if spelling is byte_level else 263
    tags = {12, 13} if spelling is byte_level else set()  # <think> and </think>
    ids = data.draw(st.lists(st.integers(0, size - 1).filter(lambda id_: id_ not in tags), max_size=60))
    assert spelling().decode(ids) == spelling()._tokenizer.decode(ids, skip_special_tokens=True)


def test_reasoning_tags_are_text_even_where_they_are_special_tokens():
    ids = byte_level()._tokenizer.encode("<think>\nthe state</think>the model<|im_end|>")
    assert {12, 13, 11} <= set(ids)
    assert byte_level().decode(ids) == "<think>\nthe state</think>the model"


def chunked(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """``ids`` cut into rounds of the given sizes, the last size repeated."""
    chunks, start = [], 0
    while start < len(ids):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        chunks.append(ids[start : start + size])
        start += size
    return chunks


SIZES = st.lists(st.integers(1, 8), min_size=1, max_size=20)


@pytest.mark.parametrize("spelling", [byte_level, byte_fallback])
@given(data=st.data(), sizes=SIZES)
@settings(max_examples=60, deadline=None)
def test_pieces_add_up_to_the_whole_text(spelling, data, sizes):
    size = 340 if spelling is byte_level else 263
    some = st.one_of(st.integers(0, size - 1), st.integers(0, 12))  # often special tokens and (second kind) words
    ids = data.draw(st.lists(some, max_size=90))
    whole = spelling().decode(ids)
    stream, shown = Detokeniser(spelling()), ""
    for chunk in chunked(ids, sizes):
        shown += stream.push(chunk)
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole


def test_special_tokens_at_the_cut_take_no_space_away():
    inner = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "<s>": 1, "▁a": 2}, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    ids = [*[2] * 25, *[1] * 10, 2, 2]
    stream = Detokeniser(Spelling(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")))
    shown = "".join(stream.push([token]) for token in ids)
    assert shown + stream.finish() == " ".join("a" * 27)


@pytest.mark.parametrize("spelling", [byte_level, byte_fallback])
def test_no_half_character_is_shown(spelling):
    if spelling is byte_level:
        ids = spelling()._tokenizer.encode("日本 🙂🙃 é 語" * 20)
    else:  # every byte a token of its own
        ids = [7 + byte for byte in ("日本 🙂🙃 é 語" * 20).encode()]
    stream, pieces = Detokeniser(spelling()), []
    for token in ids:
        pieces.append(stream.push([token]))
    pieces.append(stream.finish())
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) == "日本 🙂🙃 é 語" * 20


def test_the_window_stays_small():
    ids = byte_level()._tokenizer.encode(TEXTS[0] * 40)
    stream, longest = Detokeniser(byte_level()), 0
    for token in ids:
        stream.push([token])
        longest = max(longest, len(stream._window))
    assert len(ids) > 1000
    assert longest < 64


def first_stop(text: str, stops: list[str]) -> str | None:
    """By definition, character by character: the text before the stop string that is complete first, or None."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


STOPS = st.lists(st.text("abé🙂", min_size=1, max_size=4), min_size=1, max_size=4)


@given(pieces=st.lists(st.text("abé🙂", max_size=5), max_size=12), stops=STOPS)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_exactly_wherever_the_pieces_end(pieces, stops):
    text = "".join(pieces)
    expected = first_stop(text, stops)
    scanner, shown = StopScanner(stops), ""
    for piece in pieces:
        shown += scanner.push(piece)
        assert (text if expected is None else expected).startswith(shown)  # nothing is ever shown that is cut later
    assert scanner.stopped == (expected is not None)
    assert shown + scanner.finish() == (text if expected is None else expected)


@given(text=st.text("the stae\n🙂é日", max_size=60), stops=STOPS | st.just(["state", "\n\n"]), sizes=SIZES)
@settings(max_examples=60, deadline=None)
def test_the_answer_and_its_length_do_not_depend_on_the_rounds(text, stops, sizes):
    ids = byte_level()._tokenizer.encode(text)
    expected = first_stop(text, stops)
    stream, shown = TextStream(byte_level(), stops), ""
    for chunk in chunked(ids, sizes):
        shown += stream.push(chunk)
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == (text if expected is None else expected)
    needed = len(ids)
    if expected is not None:
        needed = next(n for n in range(len(ids) + 1) if first_stop(byte_level().decode(ids[:n]), stops) is not None)
    assert stream.used == needed
