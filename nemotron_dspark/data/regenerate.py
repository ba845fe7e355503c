"""Answers written by the target itself: a draft learns the target's distribution, so its data must come from there.

Every finished conversation is appended at once as a whole line; a run that was stopped asks only for what is missing.
At the end the file is rewritten in the order of the prompts.
"""

import asyncio
import collections
import dataclasses
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from nemotron_dspark.chat.format import Message
from nemotron_dspark.chat.mask import with_opening_tag
from nemotron_dspark.data.conversations import RowError, Skipped, SkipTally
from nemotron_dspark.data.prompts import Prompt, read_prompts
from nemotron_dspark.data.sources import Given, one_file
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.files import disk_errors, json_line, write_whole

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

    Ask = Callable[[list[Message], tuple[Any, ...]], Awaitable[ChatCompletion]]  # messages, tools

_RETRIES = 5  # per request, with the client's own growing pauses
_TIMEOUT = 1800.0  # seconds; a long answer on a small machine is slow


@dataclasses.dataclass(frozen=True)
class RegenerateProgress:
    done: int  # prompts answered or refused, reused ones included
    total: int
    tokens: int  # written by the server in this run


@dataclasses.dataclass(frozen=True)
class RegenerateReport:
    out_file: Path
    answered: int  # conversations in the file
    reused: int  # of these, from an earlier run
    cut: int  # of these, whose last answer reached max_tokens
    tokens: int  # written by the server in this run
    skipped: SkipTally
    seconds: float


def regenerate(
    prompts: Given,
    out_file: Path | str,
    *,
    base_url: str,
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
    """Have the server at ``base_url`` (".../v1") answer every prompt and write conversations to ``out_file``.

    ``prompts`` names one file or several, globs or data sets (`data.sources.one_file`).

    In a prompt of several turns each answer sees the regenerated ones before it. An answer that reaches ``max_tokens``
    ends its conversation, which is marked ``"finish": "length"``; one that calls tools ends it too. ``model`` None
    takes the server's first, ``top_p`` and ``top_k`` None its own. Records carry the prompt's own ``id``, or its line
    number when ids are absent or repeat, and the token ids of the answers where the server gives them.

    Raises:
        InputError: no prompts, an output file of other prompts, a model or key that the server refuses.
        EnvironmentFault: the server cannot be reached or keeps failing; what was answered is kept.
    """
    try:
        import openai
    except ImportError:
        raise EnvironmentFault(
            "The package openai is not installed.", "Run: pip install 'nemotron-dspark[data]'."
        ) from None
    started = time.monotonic()
    job = _Job(one_file(prompts), Path(out_file), progress or (lambda _: None))
    # Reasoning tags are special tokens in some tokenizers; answers without them could not be trained on.
    optional: dict[str, Any] = {"skip_special_tokens": False, "return_token_ids": True}
    body: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
    if thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": thinking}

    async def run() -> None:
        async with openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=_RETRIES, timeout=_TIMEOUT
        ) as client:
            name = model or (await client.models.list()).data[0].id

            async def ask(messages: list[Message], tools: tuple[Any, ...]) -> "ChatCompletion":
                sent = optional | body
                try:
                    return await client.chat.completions.create(
                        model=name,
                        messages=cast("list[ChatCompletionMessageParam]", [message.to_json() for message in messages]),
                        tools=tools or openai.omit,
                        temperature=temperature,
                        top_p=top_p if top_p is not None else openai.omit,
                        max_tokens=max_tokens,
                        extra_body=sent,
                    )
                except openai.BadRequestError as error:
                    refused = next((key for key in sent if key in error.message and key not in body), None)
                    if refused is None:
                        raise
                    optional.pop(refused, None)  # a server that does not take the field
                    return await ask(messages, tools)

            await job.answer_all(ask, concurrency)

    if job.missing:
        try:
            with disk_errors(job.out_file):
                asyncio.run(run())
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise InputError(
                f"The server at {base_url} refuses: {error.message}.", "Check --base-url, --model and --api-key."
            ) from None
        except openai.OpenAIError as error:
            raise EnvironmentFault(
                f"The server at {base_url} fails: {' '.join(str(error).split())}.",
                "See that it runs, then run the same command again; answers so far are kept.",
            ) from None
    job.sort()
    return RegenerateReport(
        out_file=job.out_file,
        answered=len(job.places),
        reused=job.reused,
        cut=job.cut,
        tokens=job.tokens,
        skipped=job.skipped,
        seconds=time.monotonic() - started,
    )


class _Job:
    """The prompts, the answers so far, and the file they are appended to."""

    def __init__(self, prompts_file: Path, out_file: Path, progress: Callable[[RegenerateProgress], None]):
        self.prompts_file, self.out_file, self._progress = prompts_file, out_file, progress
        items = list(read_prompts(prompts_file))
        self.skipped = SkipTally(item for item in items if isinstance(item, Skipped))
        prompts = [item for item in items if isinstance(item, Prompt)]
        own = {prompt.id for prompt in prompts}
        unique = None not in own and len(own) == len(prompts)
        self.prompts = {(prompt.id or "") if unique else str(prompt.line): prompt for prompt in prompts}
        self.places: dict[str, tuple[int, int]] = {}  # id -> offset and length of its line in the output
        self.tokens = self.cut = 0
        self._read_answers()
        self.reused = len(self.places)
        self.missing = collections.deque(key for key in self.prompts if key not in self.places)

    def _read_answers(self) -> None:
        """Find the answers of an earlier run, and cut off a line that was not finished."""
        if not self.out_file.is_file():
            return
        offset = 0
        with disk_errors(self.out_file), open(self.out_file, "r+b") as file:
            for line in file:
                if line.endswith(b"\n"):
                    self._recognise(line, offset)
                    offset += len(line)
            file.truncate(offset)

    def _recognise(self, line: bytes, offset: int) -> None:
        try:
            row = json.loads(line)
            key, finish = row["id"], row["finish"]
            asked = [turn["content"] for turn in row["conversations"] if turn["role"] != "assistant"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.out_file} holds lines that are not answers of an earlier run.", "Choose another --out."
            ) from None
        prompt = self.prompts.get(key)
        called = "tool_calls" in row["conversations"][-1]
        wanted = [message.content for turn in prompt.turns for message in turn] if prompt else []
        if prompt is None or wanted[: len(asked)] != asked or (finish != "length" and not called and asked != wanted):
            raise InputError(f"{self.out_file} holds answers to other prompts ({key}).", "Choose another --out.")
        self.places[key] = (offset, len(line))
        self.cut += finish == "length"

    async def answer_all(self, ask: "Ask", concurrency: int) -> None:
        """Answer what is missing and append it to the file."""
        self.out_file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out_file, "ab") as file:
            self._report()
            workers = [asyncio.create_task(self._work(ask, file)) for _ in range(min(concurrency, len(self.missing)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, ask: "Ask", file: BinaryIO) -> None:
        import openai

        while self.missing:
            key = self.missing.popleft()
            try:
                messages, finish = await self._conversation(self.prompts[key], ask)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                self.skipped.add(Skipped(self.prompts[key].line, f"the server refuses the prompt: {error.message}"))
            except RowError as error:
                self.skipped.add(Skipped(self.prompts[key].line, str(error)))
            else:
                row: dict[str, Any] = {"id": key, "conversations": [_recorded(message) for message in messages]}
                if self.prompts[key].tools:
                    row["tools"] = self.prompts[key].tools
                line = json_line(row | {"finish": finish}).encode()
                self.places[key] = (file.tell(), len(line))
                file.write(line)
                file.flush()
                self.cut += finish == "length"
            self._report()

    async def _conversation(self, prompt: Prompt, ask: "Ask") -> tuple[list[Message], str]:
        """Every turn of ``prompt`` with its answer, and how the last one ended; `RowError` when one is empty."""
        messages: list[Message] = []
        for turn in prompt.turns:
            messages += turn
            response = await ask(messages, prompt.tools)
            choice = response.choices[0]
            self.tokens += response.usage.completion_tokens if response.usage else 0
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
            messages.append(answer)
            if choice.finish_reason == "length":
                return messages, "length"  # what follows would be asked after an answer that has no end
            if calls:
                break  # nobody here answers them
        return messages, "stop"

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


def _recorded(message: Message) -> dict[str, Any]:
    ids = {"token_ids": message.token_ids, "prompt_token_ids": message.prompt_token_ids} if message.token_ids else {}
    return message.to_json() | ids
