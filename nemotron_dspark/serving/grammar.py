"""Answers that are JSON of a given schema, or calls of given functions: which tokens may follow, by llguidance.

The library is the one that vLLM, SGLang and llama.cpp use, too. It is asked for the tokens that may follow the answer
and each prefix of a drafted block; how that keeps the answer the constrained target's is said in `decoding.constraint`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.chat.tool_calls import CallFormat
from nemotron_dspark.decoding.constraint import Constraint
from nemotron_dspark.errors import InputError
from nemotron_dspark.serving import needs_extra
from nemotron_dspark.serving.call_grammar import SPACE, grammar_of_calls

with needs_extra():
    import llguidance
    import llguidance.hf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Grammars:
    """Makes the constraints of one target's answers; made once, because reading a vocabulary takes a second."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, stop_ids: Sequence[int]):
        """
        Raises:
            InputError: the library cannot read this tokenizer.
        """
        self._vocab_size = vocab_size
        self._stop_ids = list(stop_ids)
        self._vocabulary = tokenizer.get_vocab()
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer,  # type: ignore[bad-argument-type]  # it checks the type itself
                n_vocab=vocab_size,
                eos_token=self._stop_ids or None,
            )
        except Exception as error:  # whatever a Rust library raises
            raise InputError(
                f"This target's tokenizer cannot be held to a schema: {' '.join(str(error).split())[:200]}.",
                'Ask without response_format, and with tool_choice "auto".',
            ) from None

    def json(self, schema: dict[str, Any], *, begins_after: int | None = None) -> "GrammarConstraint":
        """JSON that ``schema`` allows; with ``begins_after`` anything up to this token comes before it.

        Raises:
            InputError: the schema is none, or uses what the library does not know.
        """
        what = "The schema of response_format cannot be kept exactly"
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": SPACE})
        except (ValueError, RecursionError) as error:
            raise _unkept(what, str(error)) from None
        return self._constraint(grammar, what, begins_after)

    def calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        form: CallFormat,
        *,
        several: bool,
        begins_after: int | None = None,
    ) -> "GrammarConstraint":
        """A call of one of ``tools``, or with ``several`` one or more, and nothing else; otherwise as `json`."""

        def spell(tag: str) -> str | None:
            return f"<[{self._vocabulary[tag]}]>" if tag in self._vocabulary else None

        grammar = grammar_of_calls(tools, form, spell, several=several)
        return self._constraint(grammar, "The parameters of tools cannot be kept exactly", begins_after)

    def _constraint(self, grammar: str, what: str, begins_after: int | None) -> "GrammarConstraint":
        try:
            failed, said = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
            matcher = None if failed else llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        except (ValueError, RecursionError) as error:
            matcher, said = None, [str(error)]
        if matcher is None or said or matcher.is_error():
            raise _unkept(what, said[0] if said else matcher.get_error() if matcher else "")
        return GrammarConstraint(matcher, self._vocab_size, self._stop_ids, begins_after)


def _unkept(what: str, why: str) -> InputError:
    return InputError(f"{what}: {' '.join(why.split())[:300].rstrip('.')}.", "Correct it, or leave it out.")


class GrammarConstraint(Constraint):
    """One answer's way through its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, stop_ids: Sequence[int], begins_after: int | None):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(stop_ids)
        self._begins_after = begins_after  # None once the grammar has begun

    def copy(self) -> "GrammarConstraint":
        """The same way, for another answer."""
        return GrammarConstraint(
            self._matcher.deep_copy(), self._vocab_size, sorted(self._stop_ids), self._begins_after
        )

    def forbidden(self, drafted: Sequence[int]) -> Tensor:
        """See `Constraint`. An answer that is complete may only end."""
        rows, consumed = [], 0
        waiting = self._begins_after
        for token in [*drafted, None]:
            rows.append(self._row() if waiting is None else self._reasoning())
            if token is None or rows[-1][token]:
                break
            if waiting is not None:
                waiting = None if token == waiting else waiting
            elif token in self._stop_ids or not self._matcher.consume_token(token):
                break
            else:
                consumed += 1
        if consumed:
            self._matcher.rollback(consumed)
        return torch.stack(rows)

    def advance(self, tokens: Sequence[int]) -> None:
        """See `Constraint`."""
        for token in tokens:
            if self._begins_after is not None:
                self._begins_after = None if token == self._begins_after else self._begins_after
            elif token not in self._stop_ids:
                self._matcher.consume_token(token)

    def _reasoning(self) -> Tensor:
        """Reasoning must come to its end before the answer does."""
        row = torch.zeros(self._vocab_size, dtype=torch.bool)
        row[list(self._stop_ids)] = True
        return row

    def _row(self) -> Tensor:
        words = np.zeros((self._vocab_size + 31) // 32, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        allowed = np.unpackbits(words.view(np.uint8), count=self._vocab_size, bitorder="little").astype(bool)
        if not allowed.any():  # nothing may follow: the end may
            allowed[list(self._stop_ids)] = True
        return torch.from_numpy(~allowed)
