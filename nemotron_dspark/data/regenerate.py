"""Answers written by the target itself: a draft learns the target's distribution, so its data must come from there.

Every finished conversation is appended at once, in whole lines; a run that was stopped asks only for what is missing.
At the end the file is rewritten in the order of the prompts.
"""

import asyncio
import collections
import dataclasses
import json
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nemotron_dspark.chat.format import Message
from nemotron_dspark.chat.mask import with_opening_tag
from nemotron_dspark.data.conversations import RowError, Skipped, SkipTally
from nemotron_dspark.data.dialogue import Answered, Dialogue
from nemotron_dspark.data.prompts import Prompt, read_prompts
from nemotron_dspark.data.servers import Endpoint, Unavailable, serve_all
from nemotron_dspark.data.sources import Given, one_file
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.files import disk_errors, json_line, write_whole

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

_TRIES = 3  # of a request that a server answers with an error of its own, until it is left out


@dataclasses.dataclass(frozen=True)
class RegenerateProgress:
    done: int  # prompts answered or refused, reused ones included
    total: int
    tokens: int  # written by the servers in this run


@dataclasses.dataclass(frozen=True)
class RegenerateReport:
    out_file: Path
    answered: int  # prompts in the file
    reused: int  # of these, from an earlier run
    cut: int  # of these, whose last answer reached max_tokens
    branches: int  # more conversations in the file: answers that recorded results of tools do not follow from
    tokens: int  # written by the servers in this run
    skipped: SkipTally
    seconds: float
    servers: dict[str, int]  # prompts that each one finished in this run, by URL


def _run(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`; on a thread of its own where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, work).result()


def regenerate(
    prompts: Given,
    out_file: Path | str,
    *,
    base_url: str | Sequence[str],
    model: str | None = None,
    concurrency: int = 64,
    temperature: float = 0.7,
    top_p: float | None = None,
    top_k: int | None = None,
    max_tokens: int = 4096,
    thinking: bool | None = None,
    api_key: str = "none",
    progress: Callable[[RegenerateProgress], None] | None = None,
) -> RegenerateReport:
    """Have the servers at ``base_url`` answer every prompt and write conversations to ``out_file``.

    ``prompts`` names one file or several, globs or data sets (`data.sources.one_file`); ``base_url`` one server of the
    target or several (".../v1"). Each gets ``concurrency`` requests at a time; one that does not answer is left alone
    until it does, and the others do its work.

    In a prompt of several turns each answer sees the regenerated ones before it; results of tools are treated as in
    `data.dialogue`. An answer that reaches ``max_tokens`` ends its conversation, which is marked ``"finish":
    "length"``; one that calls tools ends it too, unless it makes the recorded call. ``model`` None takes the server's
    first, ``top_p`` and ``top_k`` None its own. Records carry the prompt's own ``id``, or its line number when ids are
    absent or repeat, and the token ids of the answers where the server gives them.

    Raises:
        InputError: no prompts, an output file of other prompts, a model or key that a server refuses, servers of
            different models.
        EnvironmentFault: no server can be reached, or all keep failing; what was answered is kept.
    """
    try:
        import openai
    except ImportError:
        raise EnvironmentFault(
            "The package openai is not installed.", "Run: pip install 'nemotron-dspark[data]'."
        ) from None
    started = time.monotonic()
    job = _Regeneration(one_file(prompts), Path(out_file), progress or (lambda _: None))
    body: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
    if thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": thinking}
    sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "body": body}
    sampling["top_p"] = top_p if top_p is not None else openai.omit
    urls = list(dict.fromkeys(url.rstrip("/") for url in ([base_url] if isinstance(base_url, str) else base_url)))
    if wrong := next((url for url in urls if not url.startswith(("http://", "https://"))), None):
        raise InputError(f"{wrong} is no URL.", "Give --base-url as in http://127.0.0.1:8000/v1.")
    answered: dict[str, int] = {}

    # Clients belong to the event loop that runs them, so they are made inside. Each knows the others, to tell when none
    # is left.
    async def run() -> None:
        servers: list[Endpoint] = []
        servers += [Endpoint(url, servers, model=model, api_key=api_key) for url in urls]
        try:
            await job.answer_all(servers, sampling, concurrency)
        finally:
            answered.update({server.url: server.answered for server in servers})

    if job.missing:
        with disk_errors(job.out_file):
            _run(run())
    job.sort()  # answers were appended as they came
    return RegenerateReport(
        out_file=job.out_file,
        answered=len(job.places),
        reused=job.reused,
        cut=job.cut,
        branches=job.branches,
        tokens=job.tokens,
        skipped=job.skipped,
        seconds=time.monotonic() - started,
        servers=answered,
    )


class _Regeneration:
    """The prompts, the answers so far, and the file they are appended to."""

    def __init__(self, prompts_file: Path, out_file: Path, progress: Callable[[RegenerateProgress], None]):
        self.prompts_file, self.out_file, self._progress = prompts_file, out_file, progress
        items = list(read_prompts(prompts_file))
        self.skipped = SkipTally(item for item in items if isinstance(item, Skipped))
        prompts = [item for item in items if isinstance(item, Prompt)]
        own = {prompt.id for prompt in prompts}
        unique = None not in own and len(own) == len(prompts)
        self.prompts = {(prompt.id or "") if unique else str(prompt.line): prompt for prompt in prompts}
        self.places: dict[str, tuple[int, int]] = {}  # id -> offset and length of its lines in the output
        self.tokens = self.cut = self.branches = 0
        self._dialogues: dict[str, Dialogue] = {}  # begun; those of a server that went away go on at another
        self._tries: collections.Counter[str] = collections.Counter()
        self._read_answers()
        self.reused = len(self.places)
        self.missing = [key for key in self.prompts if key not in self.places]

    def _read_answers(self) -> None:
        """Find the answers of an earlier run, and cut off a line that was not finished."""
        if not self.out_file.is_file():
            return
        offset = start = branches = 0
        with disk_errors(self.out_file), open(self.out_file, "r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                key, row = self._recognise(line)
                offset += len(line)
                if row.get("branch"):  # stands before the line of its prompt that goes on, and counts if that is there
                    branches += 1
                    continue
                self.places[key] = (start, offset - start)
                self.cut += row["finish"] == "length"
                self.branches += branches
                start, branches = offset, 0
            file.truncate(start)

    def _recognise(self, line: bytes) -> tuple[str, dict[str, Any]]:
        try:
            row = json.loads(line)
            key, finish, branch = row["id"], row["finish"], row.get("branch", False)
            asked = [turn["content"] for turn in row["conversations"] if turn["role"] != "assistant"]
            called = "tool_calls" in row["conversations"][-1]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise InputError(
                f"{self.out_file} holds lines that are not answers of an earlier run.", "Choose another --out."
            ) from None
        prompt = self.prompts.get(key)
        wanted = [message.content for turn in prompt.turns for message in turn] if prompt else []
        ended_early = finish == "length" or called or branch
        if prompt is None or wanted[: len(asked)] != asked or (not ended_early and asked != wanted):
            raise InputError(f"{self.out_file} holds answers to other prompts ({key}).", "Choose another --out.")
        return key, row

    async def answer_all(self, servers: Sequence[Endpoint], sampling: dict[str, Any], concurrency: int) -> None:
        """Answer what is missing and append it to the file."""
        self.out_file.parent.mkdir(parents=True, exist_ok=True)
        queue: asyncio.Queue[str] = asyncio.Queue()
        for key in self.missing:
            queue.put_nowait(key)
        with open(self.out_file, "ab") as file:
            self._report()

            async def work(server: Endpoint) -> None:
                while True:
                    await server.ready.wait()
                    key = await queue.get()
                    try:
                        await self._answer(key, server, sampling, file)
                    except Unavailable as error:
                        queue.put_nowait(key)  # before it counts as taken care of: the queue is never done too early
                        queue.task_done()
                        await server.rest(error)
                    else:
                        queue.task_done()
                        self._report()

            await serve_all(servers, queue, work, min(concurrency, len(self.missing)))

    async def _answer(self, key: str, server: Endpoint, sampling: dict[str, Any], file: BinaryIO) -> None:
        """Answer one prompt to its end and write it, or count it as skipped; `Unavailable` as `Endpoint.ask`."""
        import openai

        prompt = self.prompts[key]
        dialogue = self._dialogues.setdefault(key, Dialogue(prompt))
        try:
            while dialogue.ended is None:
                messages = [message.to_json() for message in dialogue.messages]
                response = await server.ask(messages=messages, tools=prompt.tools or openai.omit, **sampling)
                self.tokens += response.usage.completion_tokens if response.usage else 0
                dialogue.take(_written(response), cut=response.choices[0].finish_reason == "length")
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            self.skipped.add(Skipped(prompt.line, f"the server refuses the prompt: {error.message}"))
        except RowError as error:
            self.skipped.add(Skipped(prompt.line, str(error)))
        except Unavailable as error:
            self._tries[key] += error.by_request
            if self._tries[key] < _TRIES:
                raise
            self.skipped.add(Skipped(prompt.line, f"the server fails at the prompt: {error}"))
        else:
            lines = [self._line(key, branch, branch=True) for branch in dialogue.branches]
            lines.append(self._line(key, dialogue.ended))
            self.places[key] = (file.tell(), sum(map(len, lines)))
            file.write(b"".join(lines))
            file.flush()
            self.cut += dialogue.ended.finish == "length"
            self.branches += len(dialogue.branches)
            server.answered += 1
        del self._dialogues[key]

    def _line(self, key: str, answered: Answered, *, branch: bool = False) -> bytes:
        row: dict[str, Any] = {"id": key, "conversations": list(map(_recorded, answered.messages))}
        if tools := self.prompts[key].tools:
            row["tools"] = tools
        return json_line(row | {"finish": answered.finish} | ({"branch": True} if branch else {})).encode()

    def _report(self) -> None:
        refused = self.skipped.total
        total = len(self.prompts) + refused
        self._progress(RegenerateProgress(min(total, len(self.places) + refused), total, self.tokens))

    def sort(self) -> None:
        """Rewrite the answers in the order of the prompts."""
        if not self.places:
            raise InputError(
                f"No prompt of {self.prompts_file} was answered: {'; '.join(self.skipped.sentences())}.",
                "Look at the first lines named, and at the server's log.",
            )
        order = [self.places[key] for key in self.prompts if key in self.places]
        if order != sorted(order):
            with open(self.out_file, "rb") as source:
                lines = (os.pread(source.fileno(), length, offset) for offset, length in order)
                write_whole(self.out_file, lambda file: file.writelines(lines))


def _written(response: "ChatCompletion") -> Message:
    """What the target wrote; `RowError` when it is nothing."""
    choice = response.choices[0]
    if getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None):
        raise InputError(
            "The server splits the reasoning off its answers, so what the target wrote is lost.",
            "Start it without a reasoning parser.",
        )
    calls = [call.to_dict() for call in choice.message.tool_calls or ()]
    content = choice.message.content or ""
    if not content.strip() and not calls:
        raise RowError("empty answer")
    answer = Message("assistant", with_opening_tag(content), more={"tool_calls": calls} if calls else {})
    said, read = getattr(choice, "token_ids", None), getattr(response, "prompt_token_ids", None)
    if said and read:
        answer = dataclasses.replace(answer, token_ids=tuple(said), prompt_token_ids=tuple(read))
    return answer


def _recorded(message: Message) -> dict[str, Any]:
    row = message.to_json()
    if message.token_ids:
        row |= {"token_ids": message.token_ids, "prompt_token_ids": message.prompt_token_ids}
    return row if message.trains or message.role != "assistant" else row | {"weight": 0}
