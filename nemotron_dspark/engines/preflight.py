"""What is known to fail when an engine serves a pair: refused before anything is started, or warned of.

A refusal is what the engine's own code rejects or gets wrong in the versions read; a warning is what people report, or
what nobody has shown to work. Where each comes from is in docs/engines.md.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from nemotron_dspark.drafts.config import DraftConfig, Eagle3Config
from nemotron_dspark.engines.commands import EngineName, engine_table
from nemotron_dspark.engines.pair import Pair
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.weights import open_tensors

# vLLM 47635: these hybrids crash at start-up with speculative decoding.
_VLLM_CRASHES = ("falcon_h1", "granitemoehybrid", "zamba2")
_READS_BLOCKS = {
    "sglang": "was read to take for NVIDIA's own drafts alone",
    "trtllm": "has not been seen to read",
}
_GGUF_TYPES = ("llama", "nemotron_h")  # targets that `nds export --to gguf` writes


@dataclasses.dataclass(frozen=True)
class Problem:
    """A thing that fails or may fail, and what to do about it."""

    level: Literal["refuse", "warn"]
    what: str
    do: str


def preflight(
    engine: EngineName, pair: Pair, *, machine: str | None = None, tokens: int | None = None
) -> list[Problem]:
    """What is known to fail, refusals first."""
    found = [
        *_drafts(engine, pair),
        *_blocks(engine, pair, tokens),
        *_targets(engine, pair),
        *_machines(engine, machine),
    ]
    return sorted(found, key=lambda finding: finding.level)


def check(engine: EngineName, pair: Pair, *, machine: str | None = None, tokens: int | None = None) -> list[Problem]:
    """The warnings of `preflight`; its first refusal is an `InputError`."""
    found = preflight(engine, pair, machine=machine, tokens=tokens)
    if found and found[0].level == "refuse":
        raise InputError(found[0].what, found[0].do)
    return found


def _drafts(engine: EngineName, pair: Pair) -> Iterator[Problem]:
    draft, title = pair.draft, engine_table(engine).title
    if draft.draft_vocab_size is not None:
        yield from _part_of_vocabulary(engine, pair)
    if isinstance(draft, Eagle3Config):
        yield from _eagle3(engine, pair)
        return
    if pair.kind == "dflash":
        yield from _dflash(engine)
    if draft.beyond_deepspec:
        yield from _beyond_deepspec(engine, draft)
    if engine != "sglang" and draft.markov_rank and draft.markov_head_type != "vanilla":
        yield Problem(
            "refuse",
            f"{title} reads vanilla Markov heads only, and this draft's is {draft.markov_head_type}.",
            "Train the draft with draft.markov_head=vanilla, or serve it with SGLang or `nds serve`.",
        )
    if draft.target_layer_ids[0] == -1 and engine != "llamacpp":
        yield Problem(
            "refuse" if engine == "sglang" else "warn",
            f"{title} {'refuses' if engine == 'sglang' else 'has not been seen to read'} the embedding as a tap (-1).",
            "Train the draft with taps from layer 0 on, or serve it with llama.cpp or `nds serve`.",
        )
    if draft.target_logit_multiplier != 1.0 or draft.target_logit_softcap is not None:
        yield Problem(
            "refuse" if engine == "llamacpp" else "warn",
            f"This target's logits are multiplied or soft-capped, and {title} "
            + ("adds the Markov head to bare ones." if engine == "llamacpp" else "has not been seen to do that here."),
            "Serve the pair with `nds serve`, or compare the accepted length with `nds eval --engine`.",
        )


def _part_of_vocabulary(engine: EngineName, pair: Pair) -> Iterator[Problem]:
    if engine != "vllm":
        yield Problem(
            "refuse",
            f"{engine_table(engine).title} takes the target's LM head, and this draft has a part of the vocabulary.",
            "Serve it with vLLM or `nds serve`, or train the draft without draft.vocabulary.",
        )
    elif "lm_head.weight" not in open_tensors(pair.draft_folder):
        yield Problem(
            "refuse",
            "vLLM needs this draft's own part of the LM head, and it is a slim copy.",
            f"Make it whole: nds export --to vllm --target {pair.target} --draft {pair.draft_folder} --out FOLDER.",
        )


def _beyond_deepspec(engine: EngineName, draft: DraftConfig) -> Iterator[Problem]:
    title, has = engine_table(engine).title, " and ".join(draft.beyond_deepspec.values())
    if engine in _READS_BLOCKS:
        yield Problem(
            "warn",
            f"The draft has {has}, which {title} {_READS_BLOCKS[engine]}.",
            "Compare the accepted length with `nds eval --engine`, or serve it with vLLM, llama.cpp or `nds serve`.",
        )
    if engine == "vllm" and draft.attention_sinks:
        yield Problem(
            "warn",
            "The draft has attention sinks, and vLLM's FLASH_ATTN has them only where FlashAttention 3 or 4 runs.",
            "Give the draft another attention_backend where vLLM says so at its start.",
        )


def _eagle3(engine: EngineName, pair: Pair) -> Iterator[Problem]:
    title = engine_table(engine).title
    if engine != "vllm":
        hybrids = ", and SGLang up to 0.5.23 none at all on a hybrid" if engine == "sglang" and pair.hybrid else ""
        yield Problem(
            "refuse",
            f"{title} reads EAGLE-3 drafts of Llama's shape with three taps, and this one is DeepSpec's, with five"
            f"{hybrids}.",
            "Serve it with vLLM or `nds serve`, or train a DSpark draft.",
        )


def _dflash(engine: EngineName) -> Iterator[Problem]:
    if engine == "trtllm":
        yield Problem(
            "refuse",
            "TensorRT-LLM has not been seen to read DFlash drafts.",
            "Serve it with vLLM, SGLang, llama.cpp or `nds serve`, or train a DSpark draft.",
        )


def _blocks(engine: EngineName, pair: Pair, tokens: int | None) -> Iterator[Problem]:
    block, title = pair.draft.block_size, engine_table(engine).title
    if tokens is None or tokens == block:
        return
    if tokens > block:
        yield Problem(
            "refuse",
            f"The draft has a block of {block}, and {tokens} tokens a round are asked for.",
            f"Give --tokens {block} or leave it out.",
        )
    elif isinstance(pair.draft, DraftConfig) and engine in ("vllm", "sglang"):
        yield Problem(
            "warn",
            f"{tokens} tokens of a block of {block}: {title} would give the draft a shorter block than it was trained "
            "on, and vLLM 0.27 gave garbled output.",
            "Leave --tokens out, or compare the output with plain decoding by `nds eval --engine --plain-engine`.",
        )


def _targets(engine: EngineName, pair: Pair) -> Iterator[Problem]:
    kind = pair.spec.model_type
    if engine == "llamacpp" and kind not in _GGUF_TYPES:
        yield Problem(
            "warn",
            f"`nds export --to gguf` writes targets of type {' and '.join(_GGUF_TYPES)}, and this one is {kind}.",
            "Convert it with llama.cpp's convert_hf_to_gguf.py; the draft is exported all the same.",
        )
    if not pair.hybrid:
        return
    if engine == "vllm" and kind in _VLLM_CRASHES:
        yield Problem(
            "warn",
            f"vLLM is reported to crash at start-up with {kind} and speculative decoding (vLLM 47635).",
            "Try a newer version, or serve the pair with `nds serve`.",
        )
    if engine == "vllm" and kind != "nemotron_h" and kind not in _VLLM_CRASHES:
        yield Problem(
            "warn",
            f"vLLM must hand out hidden states of {kind}'s layers, which was read in its code for Nemotron-H alone.",
            "Start it and see; it says so when it cannot.",
        )
    if engine == "trtllm":
        yield Problem(
            "warn",
            "Nobody has shown TensorRT-LLM to serve a hybrid with DSpark.",
            "Compare output and accepted length with `nds eval --engine --plain-engine` before you rely on it.",
        )


def _machines(engine: EngineName, machine: str | None) -> Iterator[Problem]:
    if machine == "cpu" and engine != "llamacpp":
        do = "Use llama.cpp or `nds serve`."
        reason = "has no runner for drafts on a CPU" if engine == "vllm" else "does not run on a CPU"
        yield Problem("refuse", f"{engine_table(engine).title} {reason}.", do)
