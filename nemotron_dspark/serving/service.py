"""What the endpoints share: the target that is served, and how a request becomes what the engine is to generate.

Prompts are rendered and tokenised on one thread, which owns the tokenizer.
"""

import asyncio
import copy
import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nemotron_dspark.chat.format import Message, RenderError, recognise, render, template_source
from nemotron_dspark.chat.tool_calls import CallFormat, call_format
from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.prefixes import Prefixes
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import schedule_for
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.serving.engine import Engine, GenerationRequest
from nemotron_dspark.serving.grammar import GrammarConstraint, Grammars
from nemotron_dspark.serving.metrics import Metrics
from nemotron_dspark.serving.parts import CLOSES, OPENS
from nemotron_dspark.serving.protocol import ApiError, ChatRequest, CompletionRequest
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.target import PREFILL_BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Served:
    """A decoder and what the server must know of its target."""

    model_id: str
    aliases: frozenset[str]  # other names under which requests may ask for it
    decoder: Decoder
    tokenizer: "PreTrainedTokenizerBase"
    vocab_size: int
    max_positions: int
    stop_ids: frozenset[int] = frozenset()
    block_size: int = 0  # tokens that the draft proposes a round; 0 without a draft
    prefill_tokens: int = PREFILL_BLOCK  # of prompts that are best read between two rounds

    @staticmethod
    def of(target: Target, draft: Draft | None = None, config: ServeConfig | None = None) -> "Served":
        """Serve ``target``, with ``draft`` when there is one; `InputError` when the two do not fit."""
        config = config or ServeConfig()
        name = target.spec.name
        prefixes = Prefixes(int(config.prefix_cache_gb * 1e9)) if config.prefix_cache_gb else None
        return Served(
            model_id=Path(name).resolve().name if Path(name).is_dir() else name,
            aliases=frozenset({name, *config.aliases}),
            decoder=Decoder(
                target, draft, schedule=schedule_for(config.schedule, draft, config.profile), prefixes=prefixes
            ),
            tokenizer=target.tokenizer,
            vocab_size=target.spec.vocab_size,
            max_positions=target.spec.max_position_embeddings,
            stop_ids=target.stop_ids,
            block_size=draft.config.block_size if draft is not None else 0,
            prefill_tokens=PREFILL_BLOCK if target.device.type == "cpu" else 8 * PREFILL_BLOCK,
        )


@dataclasses.dataclass(frozen=True)
class RenderedPrompt:
    """A prompt, and what its template makes of the answer."""

    ids: list[int]
    reasoning: Literal["open", "possible"] | None = None  # see `Splitter`
    calls: CallFormat | None = None  # how ``tools`` are called
    tools: tuple[Any, ...] = ()


class Service:
    """What the endpoints share."""

    def __init__(self, served: Served, config: ServeConfig):
        self.served = served
        self.config = config
        self.metrics = Metrics()
        # A tokenizer is not to be used by two threads: the engine decodes with a copy, `tokenising` has the original.
        self.engine = Engine(
            served.decoder,
            copy.deepcopy(served.tokenizer),
            max_batch_size=config.max_batch_size,
            max_queue=config.max_queue,
            prefill_tokens=config.prefill_tokens or served.prefill_tokens,
            metrics=self.metrics,
        )
        self.tokenising = ThreadPoolExecutor(1, "nds-tokenise")
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        """`ApiError` when a request asks for another model than the one that is served."""
        if name is not None and name != self.served.model_id and name not in self.served.aliases:
            raise ApiError(
                404,
                f"The model {name!r} is not served here.",
                f"Ask for {self.served.model_id!r}.",
                param="model",
                code="model_not_found",
            )

    async def tokenised(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """``function(*arguments)`` on the thread that owns the tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenising, function, *arguments)

    async def prompt(self, request: ChatRequest | CompletionRequest) -> RenderedPrompt:
        """The prompt's tokens; `ApiError` when the chat template refuses it."""
        if isinstance(request, ChatRequest):
            messages, tools = request.conversation(), request.offered()
            calls = await self.tokenised(lambda: self.call_format) if tools or request.speaks_of_tools else None
            if calls is None and (tools or request.speaks_of_tools):
                what = "This target's chat template prints no calls of functions that this server can read."
                raise ApiError(400, what, "Describe the functions in a message instead.", param="tools")
            try:
                return await self.tokenised(self._rendered, messages, tools, request.thinking, calls)
            except RenderError as error:
                raise ApiError(400, error.what, error.do, param="messages") from None
        prompt = request.text_or_ids(self.served.vocab_size)
        return RenderedPrompt(
            await self.tokenised(self.served.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
        )

    def _rendered(
        self, messages: list[Message], tools: tuple[Any, ...], thinking: bool | None, calls: CallFormat | None
    ) -> RenderedPrompt:
        tokenizer = self.served.tokenizer
        text = render(tokenizer, messages, generation_prompt=True, thinking=thinking, tools=tools)
        reasoning = None
        if self.thinks:
            reasoning = "open" if text.rstrip().endswith(OPENS) else "possible"
        return RenderedPrompt(
            tokenizer(text, add_special_tokens=False)["input_ids"], reasoning, calls if tools else None, tools
        )

    @functools.cached_property
    def thinks(self) -> bool:
        """Whether the target's format has reasoning."""
        known = recognise(self.served.tokenizer)
        return known.thinking is not None if known else CLOSES in template_source(self.served.tokenizer)

    @functools.cached_property
    def call_format(self) -> CallFormat | None:
        """How the target writes calls of functions, if this server can read them."""
        return call_format(self.served.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What holds answers to a schema."""
        return Grammars(self.served.tokenizer, self.served.vocab_size, sorted(self.served.stop_ids))

    def _constraint(
        self, request: ChatRequest | CompletionRequest, schema: dict[str, Any] | None, prompt: RenderedPrompt
    ) -> GrammarConstraint | None:
        """What the answer must be: JSON of ``schema``, or calls of the functions that the request demands."""
        if schema is not None:
            make = functools.partial(self.grammars.json, schema)
        elif isinstance(request, ChatRequest) and (called := request.demanded()) and prompt.calls is not None:
            make = functools.partial(self.grammars.calls, called, prompt.calls, several=request.several_calls)
        else:
            return None
        after = None
        if prompt.reasoning == "open":
            after = self.served.tokenizer.get_vocab().get(CLOSES)
            if after is None:
                what = f"The prompt opens reasoning, whose end is no token of this target ({CLOSES})."
                raise InputError(what, "Switch it off with chat_template_kwargs, or leave the answer free.")
        return make(begins_after=after)

    def max_new_tokens(self, asked: int | None, prompt_length: int) -> int:
        """What is asked for, at most the server's limit and what the model still holds; both end in "length".

        `ApiError` when the prompt leaves no room at all.
        """
        positions = self.served.max_positions
        room = positions - prompt_length
        if room < 1:
            raise ApiError(
                400,
                f"The prompt has {prompt_length} tokens; this model holds {positions} with the answer.",
                "Shorten the prompt.",
                code="context_length_exceeded",
            )
        return min(asked or room, self.config.max_new_tokens, room)

    async def checked(self, request: ChatRequest | CompletionRequest) -> tuple[RenderedPrompt, list[GenerationRequest]]:
        """What the engine is to generate, a request for each choice; `ApiError` when this server cannot do it."""
        self.check_model(request.model)
        request.refuse_unsupported()
        stops, schema, logprobs = request.stops(), request.answer_schema(), request.asked_logprobs
        prompt = await self.prompt(request)
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            max_new_tokens=self.max_new_tokens(request.asked_tokens, len(prompt.ids)),
            speculative=request.speculative is not False,
            logprobs=logprobs,
        )
        ids = tuple(prompt.ids)  # one object for all choices: the engine reads it once
        try:
            constraint = await self.tokenised(self._constraint, request, schema, prompt)
        except InputError as error:
            param = "tools" if schema is None else "response_format"
            raise ApiError(400, error.what, error.do, param=param) from None
        return prompt, [
            GenerationRequest(
                ids,
                dataclasses.replace(sampling, seed=_nth_seed(request.seed, index)),
                stops,
                stream=bool(request.stream),
                constraint=constraint.copy() if constraint else None,
                rounds=bool(request.return_rounds),
            )
            for index in range(request.n or 1)
        ]


def _nth_seed(seed: int | None, index: int) -> int | None:
    """The seed of a further choice; the first one's is the request's own."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63
