"""DeepSpec's evaluators for any target: its prompts, loop, tables and TensorBoard around our decoding.

DeepSpec's own decoding rewinds a cache of keys and values, which leaves a hybrid's recurrent state behind, and newer
transformers refuse its calls. Here a round is one `Decoder.step`; what DeepSpec counts is read from it.
Importing this module needs a checkout on Python's path. Run as one it is DeepSpec's eval.py with these in its table: it
takes eval.py's own options and ``--tasks name:prompts,…``, and spawns one worker per visible GPU as eval.py does.
"""

import argparse
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch

from nemotron_dspark.chat.format import template_source
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import Threshold
from nemotron_dspark.deepspec.checkout import deepspec_module
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.proofs import prove

_eval = deepspec_module("deepspec.eval")


class _OurDecoding:
    """What both evaluators replace: loading the pair, and decoding one prompt."""

    _decoder: Decoder
    args: Any  # DeepSpec's base class makes these three
    device: torch.device
    draft_model: Draft

    @property
    def max_proposal_tokens(self) -> int:
        return self.draft_model.config.block_size

    def build_models(self) -> tuple[Any, Draft, Any]:
        """The target's model, the draft and the tokenizer, on this rank's device; the target is proven first.

        Raises:
            InputError: either cannot be loaded, or the draft was made for another target.
            CheckError: a proof failed.
        """
        target = Target.load(self.args.target_name_or_path, device=str(self.device))
        draft = load_draft(self.args.draft_name_or_path, target)
        prove(target, draft.config.target_layer_ids)
        self._decoder = self._new_decoder(target, draft)
        tokenizer = target.tokenizer
        tokenizer.chat_template = template_source(tokenizer)  # base checkpoints ship none
        return target.model, draft, tokenizer

    def _new_decoder(self, target: Target, draft: Draft) -> Decoder:
        return Decoder(target, draft)

    def generate_one_sample(self, *, input_ids: torch.Tensor, stop_token_ids: list[int] | None) -> SimpleNamespace:
        """Decode behind ``input_ids`` [1, S]; the counts of every round, as DeepSpec sums them up."""
        sampling = Sampling(
            temperature=float(self.args.temperature),
            max_new_tokens=int(self.args.max_new_tokens),
            seed=torch.initial_seed(),  # DeepSpec has just seeded torch with its seed and the prompt's number
        )
        prompt = input_ids[0].tolist()
        generation = self._decoder.generate(prompt, sampling, frozenset(stop_token_ids or ()))
        self._observe(generation)
        return SimpleNamespace(
            output_ids=torch.tensor([prompt + generation.tokens]),
            num_input_tokens=len(prompt),
            num_output_tokens=len(generation.tokens),
            acceptance_lengths=generation.accepted,
            proposal_lengths=_proposed(generation),
            accepted_draft_lengths=generation.survived,
            verify_count=generation.rounds,
        )

    def _observe(self, generation: Generation) -> None:
        """Take note of a finished generation; a subclass records what DeepSpec's sums leave out."""


class NemotronDSparkEvaluator(_OurDecoding, _eval.Qwen3DSparkEvaluator):
    """Measures a DSpark draft on a target of any family."""

    def _new_decoder(self, target: Target, draft: Draft) -> Decoder:
        threshold = float(self.args.confidence_threshold)
        record = draft.confidence_head is not None and threshold == 0.0
        return Decoder(target, draft, schedule=Threshold(threshold) if threshold else None, record_confidence=record)

    def _observe(self, generation: Generation) -> None:
        if self.confidence_head_recorder is None:
            return
        for logits, proposed, survived in zip(
            generation.confidence, _proposed(generation), generation.survived, strict=True
        ):
            kept = torch.arange(len(logits), device=self.device) < survived
            self.confidence_head_recorder.observe(
                proposal=SimpleNamespace(
                    draft_token_count=len(logits), confidence_logits=torch.tensor([logits], device=self.device)
                ),
                verification=SimpleNamespace(
                    effective_proposal_length=proposed, accept_prefix_mask=kept[None].to(torch.int64)
                ),
            )


class NemotronEagle3Evaluator(_OurDecoding, _eval.Qwen3Eagle3Evaluator):
    """Measures an EAGLE-3 draft on a target of any family."""

    def __init__(self, local_rank: int, args: Any):
        # DeepSpec's own __init__ asks the draft's config for a number of layers; ours are always one.
        _eval.BaseEvaluator.__init__(self, local_rank, args)


def _proposed(generation: Generation) -> list[int]:
    """Drafts per round, as DeepSpec counts them: up to the stop token where one was accepted among them.

    A round that ends so gains no token of the target's own, which is how it is told from the others.
    """
    return [
        survived if survived == gained else proposed
        for proposed, survived, gained in zip(
            generation.proposed, generation.survived, generation.accepted, strict=True
        )
    ]


EVALUATORS = {"Qwen3DSparkModel": NemotronDSparkEvaluator, "Qwen3Eagle3Model": NemotronEagle3Evaluator}


def parse() -> argparse.Namespace:
    """eval.py's arguments, with its tasks replaced where ``--tasks`` is given."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--tasks")
    given, rest = own.parse_known_args()
    sys.argv[1:] = rest
    args = importlib.import_module("eval").parse_args()
    if given.tasks:
        pairs = (part.partition(":") for part in given.tasks.split(","))
        args.tasks = [(name, int(count) if count else None) for name, _, count in pairs]
    return args


def worker(local_rank: int, args: argparse.Namespace) -> None:
    """What every process runs: eval.py with our evaluators."""
    entry = importlib.import_module("eval")
    entry.EVALUATORS.update(EVALUATORS)
    entry.main(local_rank, args)


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, args=(parse(),), nprocs=torch.cuda.device_count())
