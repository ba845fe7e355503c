"""Where a run's hidden states come from: one factory per mode, which checks them against target, settings and folder.

Nothing is written before settings and data have been found to fit, so that a refusal leaves the folder free.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from nemotron_dspark.cache.build import inputs_of
from nemotron_dspark.cache.checksums import fingerprint
from nemotron_dspark.cache.needs import stored_bytes
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import check_mask_token
from nemotron_dspark.chat.mask_token import choose_mask_token, special_ids
from nemotron_dspark.config import DraftSection, RunConfig, TargetConfig
from nemotron_dspark.data.tokens import TokenStore, read_report, samples_in, tokenise
from nemotron_dspark.distributed import DistContext
from nemotron_dspark.drafts import kinds, vocabulary
from nemotron_dspark.drafts.config import DraftConfig, Eagle3Config, read_draft_config
from nemotron_dspark.drafts.from_draft import draft_of
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.taps import chosen_taps
from nemotron_dspark.targets.target import keep_dtype, resolve_device, resolve_dtype
from nemotron_dspark.targets.weights import open_tensors
from nemotron_dspark.training import online, rolling
from nemotron_dspark.training import run_folder as folders
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.source import CacheSource, Source
from nemotron_dspark.training.validation import split


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run before its hidden states: settings, folder, and what is known of the target without its weights."""

    config: RunConfig
    out: Path
    resume: bool  # go on with a run that the folder holds
    target: Path  # its folder
    spec: TargetSpec
    tokenizer: transformers.PreTrainedTokenizerBase
    dtype: torch.dtype  # to compute in
    callback: Callback
    context: DistContext

    @property
    def name(self) -> str:
        """The target's."""
        return self.config.target.named

    def draft_config(
        self, section: DraftSection, samples: Iterable[np.ndarray | torch.Tensor]
    ) -> tuple[DraftConfig | Eagle3Config, list[str]]:
        """The draft's config, and notes on what was assumed; ids of ``samples`` are read if they must be counted."""
        train, mask, more = self.config.train, None, []
        if section.kind == "eagle3" and train.window is not None:
            raise InputError("EAGLE-3 learns from every position of a sample.", "Leave train.window out.")
        if (start := draft_of(train.init)) is not None:
            given = read_draft_config(start)
            given.check_target(self.spec)
            if isinstance(given, DraftConfig):
                given = given.model_copy(update={"num_anchors": train.num_anchors})
            return given, [f"the draft starts as the one in {start}, and has its shape."]
        if kinds.has_mask_token(section):
            found = choose_mask_token(self.tokenizer, self.spec, override=section.mask_token_id, samples=samples)
            mask, more = found.id, [f"mask token {found.id}: {found.reason} (draft.mask_token_id sets it)."]
        if section.kind == "dspark" and section.confidence_head and not train.confidence_alpha:
            section = section.model_copy(update={"confidence_head": False})
            more.append("no confidence head: train.confidence_alpha is 0, and untrained it would predict nothing.")
        if section.vocabulary is not None:
            vocabulary.check_size(section.vocabulary, self.spec.vocab_size, self._always_drafted(mask))
        draft, notes = kinds.config_for(self.spec, section, mask_token_id=mask, num_anchors=train.num_anchors)
        return draft, [*notes, *more]

    def vocabulary(
        self, draft: DraftConfig | Eagle3Config, samples: Iterable[tuple[np.ndarray | torch.Tensor, np.ndarray]]
    ) -> tuple[torch.Tensor | None, list[str]]:
        """The tokens that the draft can draft, counted over ids and loss masks of ``samples``; None: all."""
        if draft.draft_vocab_size is None:
            return None, []
        if (start := draft_of(self.config.train.init)) is not None:
            offsets = open_tensors(start)["d2t"]()
            return offsets + torch.arange(len(offsets)), []
        kept = self._always_drafted(draft.mask_token_id)
        tokens, share = vocabulary.most_used(samples, draft.draft_vocab_size, draft.vocab_size, kept)
        return tokens, [
            f"the draft can draft {len(tokens):,} of {draft.vocab_size:,} tokens, which are {share:.2%} of the answers "
            "it learns from (draft.vocabulary sets how many)."
        ]

    def _always_drafted(self, mask_token_id: int | None) -> set[int]:
        return special_ids(self.tokenizer, self.spec) | ({mask_token_id} if mask_token_id is not None else set())

    def lock(self, mode: str, draft: DraftConfig | Eagle3Config, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Take the folder for the run of these settings, which are returned; ``identity`` tells its data.

        Raises:
            InputError: the folder holds another run, or any when ``resume`` is False.
        """
        settings = {
            "target": self.name,
            "mode": mode,
            "draft": {**draft.to_json(), "dtype": str(self.dtype).removeprefix("torch.")},
            "train": self.config.train.model_dump(mode="json", exclude={*folders.FREE_KEYS, "precision"}),
            **identity,
        }
        folders.lock_run_dir(self.out, settings, self.resume)
        return settings


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """Where a run's hidden states come from, and the draft that fits them."""

    mode: str
    source: Source
    size: int  # bytes of all of them
    draft: DraftConfig | Eagle3Config
    vocabulary: torch.Tensor | None  # int64 [N], the target's ids of what it can draft; None: all
    settings: dict[str, Any]  # what the folder's run must have been begun with
    notes: list[str]


def open_cached(setup: Setup, cache_folder: Path) -> HiddenStates:
    """Hidden states of a finished cache; the target is never loaded."""
    cache = TargetCache(cache_folder)
    section = setup.config.draft
    if section.taps is None:  # it was built with some; they are the only ones there are
        section = section.model_copy(update={"taps": list(cache.taps)})
    draft, notes = setup.draft_config(section, cache.all_input_ids())
    notes += _check_cache(cache, setup.spec, draft, setup.name)
    if setup.context.is_main:
        check_mask_token(cache, draft.mask_token_id)
    source = CacheSource(cache)
    split(source, setup.config.train.validation)[0].schedule(
        setup.config.train, setup.context
    )  # refuses what does not fit before the folder is touched
    masked = ((cache.input_ids(sample), cache.loss_mask(sample)) for sample in range(len(cache)))
    tokens, more = setup.vocabulary(draft, masked)
    settings = setup.lock("cached", draft, {"cache": fingerprint(cache.folder)})
    return HiddenStates("cached", source, sum(cache.layout.shard_sizes), draft, tokens, settings, notes + more)


def open_online(setup: Setup, data: Path) -> HiddenStates:
    """Hidden states that the target computes in the training loop, never written."""
    return _beside_target(
        setup,
        data,
        "online",
        {},
        lambda tokens, taps, target: online.OnlineSource(
            tokens, target, taps, setup.spec.hidden_size, setup.callback.on_status
        ),
    )


def open_rolling(setup: Setup, data: Path) -> HiddenStates:
    """Hidden states that the target writes a segment ahead of the training."""
    config = setup.config
    return _beside_target(
        setup,
        data,
        "rolling",
        {"cache": config.cache.model_dump(exclude={"mode"})},
        lambda tokens, taps, target: rolling.RollingSource(
            setup.out / rolling.FOLDER,
            tokens,
            target,
            setup.spec,
            taps,
            config.cache,
            on_message=setup.callback.on_message,
            on_status=setup.callback.on_status,
        ),
    )


SOURCES: dict[str, Callable[[Setup, Path], HiddenStates]] = {
    "cached": open_cached,
    "online": open_online,
    "rolling": open_rolling,
}


def _beside_target(
    setup: Setup,
    data: Path,
    mode: str,
    more: Mapping[str, Any],  # what else the run is known by
    new_source: Callable[[TokenStore, tuple[int, ...], TargetConfig], Source],  # from tokens, taps and the target
) -> HiddenStates:
    """Tokenise ``data`` into the run's folder, and compute nothing yet."""
    config = setup.config
    taps = chosen_taps(setup.spec, config.draft)
    begun = folders.read_run_info(setup.out).get("settings", {}).get("source", {})
    target = keep_dtype(config.target, begun.get("dtype"))
    dtype = resolve_dtype(target.dtype, resolve_device(target.device), Checkpoint.of(target))
    made_from = {**inputs_of(setup.target, setup.tokenizer, setup.name, dtype, data, taps, config.data), **more}
    folder = setup.out / online.FOLDER
    positions = setup.spec.max_position_embeddings
    known = samples_in(folder, folder / online.REPORT, data, setup.tokenizer, config.data, positions, made_from)
    draft, notes = setup.draft_config(config.draft, known)
    settings = setup.lock(mode, draft, {"source": made_from})
    tokens = tokenise(
        folder,
        folder / online.REPORT,
        data,
        setup.tokenizer,
        config.data,
        max_positions=positions,
        mask_token_id=draft.mask_token_id,
        inputs=made_from,
        on_lines=lambda lines: setup.callback.on_status(f"tokenising, line {lines:,}"),
    )
    sizes = stored_bytes(
        config.cache,
        tokens.lengths,
        tokens.predicting,
        num_taps=len(taps),
        hidden_size=setup.spec.hidden_size,
    )
    source = new_source(tokens, taps, target.model_copy(update={"dtype": dtype}))
    split(source, config.train.validation)[0].schedule(config.train, setup.context)
    masked = ((each.input_ids, each.loss_mask) for each in map(tokens.__getitem__, range(len(tokens))))
    drafted, said = setup.vocabulary(draft, masked)
    notes += [*said, *_notes_on_data(setup.out)]
    return HiddenStates(mode, source, int(sizes.sum()), draft, drafted, settings, notes)


def _check_cache(
    cache: TargetCache, spec: TargetSpec, draft: DraftConfig | Eagle3Config, target_name: str
) -> list[str]:
    """Refuse a cache that does not fit; returns notes on what is merely odd."""
    if cache.hidden_size != spec.hidden_size:
        raise InputError(
            f"The cache was made from another target: its hidden size is {cache.hidden_size}, that of {target_name} is "
            f"{spec.hidden_size}.",
            "Give the target the cache was built from, or build a cache for this one.",
        )
    if tuple(cache.taps) != draft.target_layer_ids:
        raise InputError(
            f"draft.taps asks for layers {list(draft.target_layer_ids)}, the cache holds {list(cache.taps)}.",
            "Leave draft.taps out to use the cache's, or build a cache with these taps.",
        )
    made_from = cache.target_name
    if made_from is not None and made_from != target_name:
        return [f"the cache names another target, {made_from}; training goes on with {target_name}."]
    return []


def _notes_on_data(run_folder: Path) -> list[str]:
    tally, notes = read_report(run_folder / online.FOLDER / online.REPORT)
    cut = [f"{tally.cut} samples were cut off at the maximal length."] if tally.cut else []
    return [*notes, *cut, *tally.skipped.sentences()]
