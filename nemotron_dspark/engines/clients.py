"""Ask a running vLLM, SGLang, llama.cpp or `nds serve`: token ids in, token ids out, and what it counts of its drafts.

Which engine answers is what it says of itself in ``/v1/models``. Prompts go in as token ids, so that every engine reads
exactly what `nds eval` reads.
"""

import dataclasses
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from nemotron_dspark.errors import EnvironmentFault, InputError, first_line

_SECONDS = 1800.0  # a long answer on a small machine is slow
_SAMPLE = re.compile(r"^(\w+:\w+?)(?:_total)?(\{[^}]*\})?\s+([-+0-9.eE]+)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What drafting did. ``rounds`` are the target's passes over a draft."""

    rounds: float = 0
    drafted: float = 0
    accepted: float = 0
    per_position: tuple[float, ...] = ()  # drafts accepted at each slot; empty where the engine does not tell

    def __add__(self, other: "Counts") -> "Counts":
        return self._joined(other, 1)

    def __sub__(self, other: "Counts") -> "Counts":
        return self._joined(other, -1)

    def _joined(self, other: "Counts", sign: int) -> "Counts":
        width = max(len(self.per_position), len(other.per_position))
        mine, its = ((*counts.per_position, *(0.0,) * width)[:width] for counts in (self, other))
        return Counts(
            self.rounds + sign * other.rounds,
            self.drafted + sign * other.drafted,
            self.accepted + sign * other.accepted,
            tuple(a + sign * b for a, b in zip(mine, its, strict=True)),
        )


@dataclasses.dataclass(frozen=True)
class EngineAnswer:
    """One answer of an engine."""

    tokens: tuple[int, ...]  # ids; empty where the engine tells text alone
    text: str
    length: int  # tokens written
    seconds: float  # from the request to the whole answer, the prompt's pass included
    counts: Counts | None  # of this request; None where the engine counts for all requests together


class EngineClient:
    """A running engine. Subclasses know one protocol each."""

    owner: ClassVar[str]  # `owned_by` in /v1/models
    title: ClassVar[str]

    def __init__(self, url: str, model: str):
        self.url, self.model = url, model

    def answer(self, ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int) -> EngineAnswer:
        """Answer one prompt.

        Raises:
            InputError: the engine refuses the request.
            EnvironmentFault: it does not answer.
        """
        raise NotImplementedError

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat and the generation prompt after it, as the engine's own template has them.

        Raises:
            InputError: the engine does not tell them.
        """
        raise InputError(f"{self.title} does not tell how it renders a chat.", "Give the target with --target.")

    def totals(self) -> Counts | None:
        """Counts of all requests since the engine was started; None where each answer has its own."""
        return None

    def plain(self) -> "EngineClient | None":
        """The same engine with its draft left out; None where no request can ask for that."""
        return None


class Nds(EngineClient):
    """`nds serve`. ``speculative`` False asks it to leave its draft out."""

    owner = "nemotron-dspark"
    title = "nds serve"

    def __init__(self, url: str, model: str, speculative: bool = True):
        super().__init__(url, model)
        self._speculative = speculative

    def answer(self, ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int) -> EngineAnswer:
        body = {"model": self.model, "prompt": list(ids), "max_tokens": max_tokens, "temperature": temperature}
        body |= {"seed": seed, "return_token_ids": True, "return_rounds": True, "speculative": self._speculative}
        found, seconds = post(f"{self.url}/v1/completions", body)
        choice = found["choices"][0]
        rounds = choice["rounds"][1:]  # the first one is the prompt's pass
        kept = [each["kept"] for each in rounds]
        drafted = [each["kept"] + len(each["refused"]) for each in rounds]
        slots = tuple(float(sum(count > slot for count in kept)) for slot in range(max(drafted, default=0)))
        counts = Counts(len(rounds) if any(drafted) else 0, sum(drafted), sum(kept), slots)
        tokens = tuple(choice["token_ids"])
        return EngineAnswer(tokens, choice["text"], len(tokens), seconds, counts)

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        body = {"model": self.model, "messages": list(messages), "max_tokens": 1, "return_token_ids": True}
        return post(f"{self.url}/v1/chat/completions", body)[0]["prompt_token_ids"]

    def totals(self) -> Counts | None:
        return None  # every answer tells its own

    def plain(self) -> "EngineClient":
        return Nds(self.url, self.model, speculative=False)


class VLLM(EngineClient):
    owner = "vllm"
    title = "vLLM"

    def answer(self, ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int) -> EngineAnswer:
        body = {"model": self.model, "prompt": list(ids), "max_tokens": max_tokens, "temperature": temperature}
        found, seconds = post(f"{self.url}/v1/completions", body | {"seed": seed, "return_token_ids": True})
        choice = found["choices"][0]
        tokens = tuple(choice.get("token_ids") or ())
        return EngineAnswer(tokens, choice["text"], found["usage"]["completion_tokens"], seconds, None)

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return post(f"{self.url}/tokenize", {"model": self.model, "messages": list(messages)})[0]["tokens"]

    def totals(self) -> Counts:
        return _spec_decode_counts(_get_text(f"{self.url}/metrics"), "vllm:")


class SGLang(EngineClient):
    owner = "sglang"
    title = "SGLang"

    def answer(self, ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int) -> EngineAnswer:
        sampling = {"max_new_tokens": max_tokens, "temperature": temperature, "sampling_seed": seed}
        found, seconds = post(f"{self.url}/generate", {"input_ids": list(ids), "sampling_params": sampling})
        meta = found["meta_info"]
        length, rounds = meta["completion_tokens"], meta.get("spec_verify_ct") or 0
        # Where accepted drafts are not told: every pass but the prompt's writes them and one more.
        accepted = meta.get("spec_accept_token_num", max(length - 1 - rounds, 0)) if rounds else 0
        counts = Counts(rounds, meta.get("spec_draft_token_num") or 0, accepted)
        return EngineAnswer(tuple(found.get("output_ids") or ()), found["text"], length, seconds, counts)


class LlamaCpp(EngineClient):
    owner = "llamacpp"
    title = "llama.cpp"

    def answer(self, ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int) -> EngineAnswer:
        body = {"prompt": list(ids), "n_predict": max_tokens, "temperature": temperature, "seed": seed}
        body |= {"return_tokens": True, "cache_prompt": False}
        # Unless told, its samplers cut the distribution that a draft has learned (top-k 40, top-p 0.95, min-p 0.05).
        body |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0} if temperature > 0 else {"top_k": 1}
        found, seconds = post(f"{self.url}/completion", body)
        timings = found["timings"]
        length, accepted = timings["predicted_n"], timings.get("draft_n_accepted", 0)
        drafted = timings.get("draft_n", 0)
        # It tells no rounds for one request; every pass but the prompt's writes the accepted tokens and one more.
        counts = Counts(max(length - 1 - accepted, 0) if drafted else 0, drafted, accepted)
        return EngineAnswer(tuple(found.get("tokens") or ()), found["content"], length, seconds, counts)

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = post(f"{self.url}/apply-template", {"messages": list(messages)})[0]["prompt"]
        return post(f"{self.url}/tokenize", {"content": text, "parse_special": True})[0]["tokens"]

    def totals(self) -> Counts | None:
        try:
            return _spec_decode_counts(_get_text(f"{self.url}/metrics"), "llamacpp:")
        except InputError:  # started without --metrics
            return None


_KINDS: dict[str, type[EngineClient]] = {kind.owner: kind for kind in (Nds, VLLM, SGLang, LlamaCpp)}


def connect(url: str) -> EngineClient:
    """The engine that listens at ``url``, with or without ``/v1`` at its end.

    Raises:
        InputError: what listens there is none of them.
        EnvironmentFault: nothing answers there.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is not the address of a server.", "Give one such as http://127.0.0.1:8000.")
    try:
        card = json.loads(_get_text(f"{url}/v1/models"))["data"][0]
        owner, model = card["owned_by"], card["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        owner, model = None, ""
    if owner not in _KINDS:
        raise InputError(
            f"{url} is no vLLM, SGLang, llama.cpp or nds serve: its /v1/models says {owner!r}.",
            "Give the address of one of them; `nds eval` without --engine measures a draft here.",
        )
    return _KINDS[owner](url, model)


def _spec_decode_counts(text: str, prefix: str) -> Counts:
    """The counters of drafting in a text of Prometheus metrics, summed over engines."""
    sums: dict[str, float] = {}
    slots: dict[int, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        short = name.removeprefix(prefix)
        if short == "spec_decode_num_accepted_tokens_per_pos" and (at := re.search(r'position="(\d+)"', labels)):
            slots[int(at[1])] = slots.get(int(at[1]), 0.0) + float(value)
        elif name.startswith(prefix):
            sums[short] = sums.get(short, 0.0) + float(value)
    rounds, drafted, accepted = (
        sums.get(f"spec_decode_num_{what}", 0.0) for what in ("drafts", "draft_tokens", "accepted_tokens")
    )
    return Counts(rounds, drafted, accepted, tuple(slots[at] for at in sorted(slots)))


def post(url: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """What ``url`` answers to ``body`` in JSON, and after how many seconds; errors as in `EngineClient.answer`."""
    began = time.perf_counter()
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    text = _read(request)
    seconds = time.perf_counter() - began
    try:
        return json.loads(text), seconds
    except ValueError:
        raise EnvironmentFault(f"{url} does not answer in JSON.", "See that it is the engine that was meant.") from None


def _get_text(url: str) -> str:
    return _read(urllib.request.Request(url))


def _read(request: urllib.request.Request) -> str:
    key = os.environ.get("NDS_API_KEY")
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # for whom it is meant, and nobody else
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            return response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
        kind = InputError if error.code < 500 or error.code == 501 else EnvironmentFault
        raise kind(
            f"{request.full_url} answers with status {error.code}: {said or error.reason}.", "See the engine's log."
        ) from None
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise EnvironmentFault(
            f"{request.full_url} does not answer: {first_line(reason) if isinstance(reason, Exception) else reason}.",
            "See that the engine is started and the address right.",
        ) from None
