"""The stages of the recipe as functions: what the commands, the demo, the selftest and a notebook call.

Each takes the run's `RunConfig` (`load_config`) and paths, loads and proves what it needs, and returns a report. A
caller that holds a loaded target gives it as ``target`` and saves the loading; it is proven all the same.
"""

import contextlib
import dataclasses
import functools
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from nemotron_dspark.cache.build import BuildProgress, BuildReport, dtype_of, helper_loads
from nemotron_dspark.cache.build import build_cache as write_cache
from nemotron_dspark.cache.capture import TargetFacts
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.chat.mask_token import MaskToken, choose_mask_token, reserved_mask_token
from nemotron_dspark.config import RunConfig, TargetConfig, TrainConfig
from nemotron_dspark.data.sources import Given, listed, named, one_file
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.pair import load_draft, load_pair
from nemotron_dspark.decoding.schedule import schedule_for
from nemotron_dspark.distributed import SINGLE, DistContext, own_device
from nemotron_dspark.drafts import costs, temperatures
from nemotron_dspark.drafts.config import read_draft_config
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.engines.clients import connect
from nemotron_dspark.engines.comparison import compare_engine
from nemotron_dspark.engines.hidden_states import load_served
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation import calibration_report, comparison, picture
from nemotron_dspark.evaluation.calibration_report import CalibrationReport
from nemotron_dspark.evaluation.expected import expected
from nemotron_dspark.evaluation.lossless import check_count, sampled_lossless
from nemotron_dspark.evaluation.measure import conversation_ids, prompt_ids
from nemotron_dspark.evaluation.measure import evaluate as measure_all
from nemotron_dspark.evaluation.profile import ROWS, Profile, measure_costs
from nemotron_dspark.evaluation.report import EvalReport
from nemotron_dspark.targets import Checkpoint, Target, proofs
from nemotron_dspark.targets.streamed import load_for_capture
from nemotron_dspark.targets.taps import chosen_taps
from nemotron_dspark.targets.target import keep_dtype, resolve_device, resolve_dtype
from nemotron_dspark.training.budget import fit as fit_to_budget
from nemotron_dspark.training.callbacks import Callback, Callbacks
from nemotron_dspark.training.run import TrainReport
from nemotron_dspark.training.run import train as train_draft
from nemotron_dspark.training.run_folder import read_run_info

if TYPE_CHECKING:
    from nemotron_dspark.serving.listen import Server


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """What a cache holds and what it was built with."""

    build: BuildReport
    taps: tuple[int, ...]
    mask_token: MaskToken | None

    def to_json(self) -> dict[str, Any]:
        mask = self.mask_token and self.mask_token.id
        return dataclasses.asdict(self.build) | {"taps": self.taps, "mask_token_id": mask}


def load_target(config: RunConfig, load: Callable[[TargetConfig], Target] = Target.of) -> Target:
    """Load the target that ``config.target`` names and prove it with the taps of ``config.draft``.

    With `load_for_capture` it may be one whose layers are streamed.

    Raises:
        InputError: it cannot be found or loaded, or has no such taps.
        CheckError: a proof failed.
    """
    target = load(config.target)
    taps = chosen_taps(target.spec, config.draft)
    if config.target.proofs:
        proofs.prove(target, taps)
    return target


def build_cache(
    config: RunConfig,
    data: Given,
    out: Path | str,
    *,
    processes: int | None = None,
    engines: Sequence[str] = (),
    target: Target | None = None,
    masked: bool = True,
    on_progress: Callable[[BuildProgress], None] | None = None,
    context: DistContext = SINGLE,
) -> CacheReport:
    """Run the target over the conversations in ``data`` and keep the hidden states that a draft trains on in ``out``.

    ``data`` here and ``prompts`` below name one file or several, globs or data sets (`data.sources.one_file`).
    An unfinished cache is continued, a finished one of the same inputs is left as it is. The target is loaded when all
    conversations are tokenised and the disk is known to suffice. ``processes`` share the work, each with the target;
    None is one a GPU. With ``engines``, addresses of vLLM's servers or a folder of their files, the states are theirs,
    compared with our own capture on a few samples. ``masked`` is False for a kind of draft that has no mask token. Each
    rank of ``context`` calls this alike, builds a part in the same ``out``, and may divide it among ``processes`` of
    its own if it is alone on its machine.

    Raises:
        InputError: unusable data, data that contains the draft's mask token, or a folder of other inputs.
        CheckError: a proof failed, or hidden states are not finite.
        EnvironmentFault: the disk is or would be full, a process died, or the machines do not share ``out``.
    """
    with contextlib.ExitStack() as prepared:
        # Rank 0 tokenises and lays the cache out; the others begin when all of that lies in the folder.
        prepared.enter_context(context.main_process_first(Path(out)))
        device = target.device if target else resolve_device(config.target.device)
        if context.local_world_size > 1:
            if processes is not None and processes > 1:
                raise InputError(
                    f"{context.local_world_size} processes share this machine, and each is to start {processes - 1} "
                    "more.",
                    "Leave --processes out, or give torchrun --nproc-per-node 1.",
                )
            processes, device = 1, own_device(device, "target.device", context)
            config = config.model_copy(update={"target": config.target.model_copy(update={"device": str(device)})})
        config = config.model_copy(update={"target": keep_dtype(config.target, dtype_of(Path(out)))})
        facts = target or _unloaded(config.target, device) or load_target(config, load_for_capture)
        taps = chosen_taps(facts.spec, config.draft)
        override, mask = config.draft.mask_token_id, None
        if masked and (override is not None or reserved_mask_token(facts.tokenizer, facts.spec)):
            mask = choose_mask_token(facts.tokenizer, facts.spec, override=override)
        load: Callable[[], Target] | None = None
        if engines:
            load = functools.partial(load_served, config.target, engines)
        elif not isinstance(facts, Target):
            load = functools.partial(load_target, config, load_for_capture)
        report = write_cache(
            facts,
            one_file(data),
            out,
            taps=taps,
            data=config.data,
            cache=config.cache,
            mask_token_id=mask.id if mask else None,
            load=load,
            helpers=helper_loads(config.target, device, processes) if not engines else [],
            on_progress=on_progress or (lambda progress: None),
            context=context,
            on_prepared=prepared.close,
        )
        if masked and mask is None and context.is_main:  # one that the samples do not use; training will find it too
            mask = choose_mask_token(facts.tokenizer, facts.spec, samples=TargetCache(report.folder).all_input_ids())
        return CacheReport(report, taps, mask)


def _unloaded(config: TargetConfig, device: torch.device) -> TargetFacts | None:
    """The target of ``config`` before it is loaded; None where its config does not tell its type."""
    checkpoint = Checkpoint.of(config, weights=True)
    spec = checkpoint.read_spec()
    kind = resolve_dtype(config.dtype, device, checkpoint)
    if kind == "auto":
        kind = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    dtype = getattr(torch, str(kind).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        return None
    return TargetFacts(checkpoint.folder, spec, checkpoint.load_tokenizer(), dtype)


def train(
    config: RunConfig,
    out: Path | str | None = None,
    *,
    cache: Path | str | None = None,
    data: Given | None = None,
    budget: float | None = None,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
    context: DistContext = SINGLE,
) -> TrainReport:
    """Train a draft in the run folder ``out`` (``runs/<target>``), on a ``cache`` or on the conversations in ``data``.

    The same call goes on where an earlier one stopped; ``callbacks`` follow it. With ``data`` the target runs beside
    the training, as ``config.cache.mode`` says. With a ``budget`` of seconds a new run takes as many steps as it holds.

    Raises:
        InputError: target, cache or data, configuration and run folder do not fit together; or ``resume`` is False and
            the folder holds a run; or the ``budget`` is too short.
        CheckError: the loss is not finite, or the target is not right.
        EnvironmentFault: no such device, or the disk is full.
    """
    check_source(config, cache, data)
    folder = Path(out) if out is not None else run_folder(config)
    given: dict[str, Any] = {
        "cache": Path(cache) if cache is not None else None,
        "data": one_file(data) if data is not None else None,
        "context": context,
    }
    if budget is not None:
        config = _within(config, folder, budget, given, Callbacks(callbacks))
    report = train_draft(config, folder, resume=resume, callbacks=callbacks, **given)
    if context.is_main and picture.available():
        picture.draw_run(folder / "training.png", {}, folder, title=config.target.named)
    return report


def _within(config: RunConfig, folder: Path, seconds: float, given: Mapping[str, Any], callback: Callback) -> RunConfig:
    """``config`` with the steps and anchors of the run in ``folder``, or as many as ``seconds`` hold."""
    context = given["context"]
    if config.train.max_steps is not None:
        raise InputError("Both a budget and train.max_steps are given.", "Give one of them.")
    if config.train.inference_gpus:
        raise InputError(
            "A budget is measured where every process trains, and train.inference_gpus is "
            f"{config.train.inference_gpus}.",
            "Leave out --budget and set train.max_steps or train.epochs.",
        )
    begun = read_run_info(folder).get("settings", {}).get("train", {})
    if begun.get("max_steps"):
        found = config.train.model_copy(update={key: begun[key] for key in ("max_steps", "num_anchors")})
        callback.on_message(f"The run goes on with the {found.max_steps} steps that it was begun with.")
    else:
        callback.on_message("Measuring how long a step takes.")
        beside = folder.with_name(f".{folder.name}.pace")

        def trial(settings: TrainConfig, pace: Callback) -> None:
            if context.is_main:
                shutil.rmtree(beside, ignore_errors=True)
            context.barrier()
            train_draft(config.model_copy(update={"train": settings}), beside, callbacks=[pace], **given)

        try:
            found = fit_to_budget(config.train, seconds, trial, context)
        finally:
            if context.is_main:
                shutil.rmtree(beside, ignore_errors=True)
        callback.on_message(f"The budget holds {found.max_steps} steps with {found.num_anchors} anchors a sample.")
    return config.model_copy(update={"train": found})


def run_folder(config: RunConfig) -> Path:
    """Where a run goes that was given no folder."""
    return Path("runs") / target_folder_name(config)


def target_folder_name(config: RunConfig) -> str:
    """The last part of the target's name."""
    return Path(config.target.named).name or "target"


def check_source(config: RunConfig, cache: Path | str | None, data: Given | None) -> None:
    """`InputError` unless hidden states come either from a cache or from the target over data."""
    if (cache is None) != (data is None):
        return
    folder = shlex.quote(f"caches/{target_folder_name(config)}")
    raise InputError(
        "Training needs the target's hidden states, and neither --cache nor --data is given."
        if cache is None
        else "Both --cache and --data are given: hidden states come from one of them.",
        "Give `--data conversations.jsonl` to run the target while the draft trains, which needs no disk; or "
        f"build a cache once with `nds cache build --target {shlex.quote(config.target.named)} "
        f"--data conversations.jsonl --out {folder}` and give `--cache {folder}`: the target runs once, not "
        "once an epoch.",
    )


def evaluate(
    config: RunConfig,
    draft: Path | str | Draft,
    prompts: Given,
    *,
    limit: int | None = None,
    lossless: int | None = None,
    target: Target | None = None,
    on_loaded: Callable[[], None] = lambda: None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EvalReport:
    """Measure ``draft`` on the (first ``limit``) prompts: accepted length, speed, and equality with plain decoding.

    With ``lossless`` so many answers to a few of them are sampled with and without the draft, at the first temperature
    of ``config.eval`` above 0, and their distributions compared (`evaluation.lossless`).

    Raises:
        InputError: no prompt fits, or draft and target do not belong together; or ``lossless`` could show nothing.
        CheckError: a proof failed.
    """
    if lossless is not None:
        check_count(lossless)
    loaded, drafting = _pair(config, draft, target)
    on_loaded()
    ids = prompt_ids(
        loaded, one_file(prompts), limit=limit, new_tokens=config.eval.max_new_tokens, thinking=config.data.thinking
    )
    found = measure_all(loaded, drafting, ids, config.eval, on_progress)
    sampled = None
    if lossless is not None:
        sampled = sampled_lossless(
            Decoder(loaded),
            Decoder(loaded, drafting, schedule=schedule_for(config.eval.schedule, drafting, config.eval.profile)),
            ids,
            lossless,
            temperature=config.eval.sampled_temperature,
            seed=config.eval.seed,
            progress=on_progress,
        )
    folder = "" if isinstance(draft, Draft) else str(draft)
    report = EvalReport(config.target.named, folder, named(prompts), len(ids), str(loaded.dtype), found, sampled)
    given = config.eval.profile
    table = costs.read_costs(Path(given), drafting.config.block_size) if given is not None else drafting.costs
    if table is None or config.eval.schedule != "off":  # cut blocks do not tell what whole ones would keep
        return report
    survival = {label: each.per_position for label, each in report.labelled.items()}
    return dataclasses.replace(report, expected=expected(table, survival))


def compare(
    config: RunConfig,
    drafts: Sequence[Path | str],
    prompts: Given,
    *,
    lengths: Sequence[int] = (),
    limit: int | None = None,
    engines: Sequence[str] = (),
    target: Target | None = None,
    on_loaded: Callable[[], None] = lambda: None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> comparison.Comparison:
    """Measure several ``drafts`` of the target side by side, against no draft: accepted length, cost, speed, equality.

    Every text that ``prompts`` consists of is a workload, of which the first ``limit`` prompts are used; with
    ``lengths`` each is made so many tokens long by others of the workload before it. Each of ``engines`` is the URL of
    one that serves the target with a draft of its own (an MTP layer, say), one row more.

    Raises:
        InputError: no draft, one for another target, no prompt that fits, a length beyond the target's, or an engine
            that does not draft.
        EnvironmentFault: an engine does not answer.
        CheckError: a proof failed.
    """
    if not drafts:
        raise InputError("There is no draft to compare.", "Give folders of trained drafts, each with --draft.")
    if len({Path(folder).resolve() for folder in drafts}) < len(drafts):
        raise InputError("The same draft is given twice.", "Give each folder once.")
    folders, new_tokens = [Path(folder) for folder in drafts], config.eval.max_new_tokens
    for folder in folders:
        read_draft_config(folder)  # a wrong path is said before the target is loaded
    connected = [connect(url) for url in engines]
    loaded = target or Target.of(config.target)
    room = loaded.spec.max_position_embeddings - new_tokens
    if lengths and max(lengths) > room:
        raise InputError(
            f"Prompts of {max(lengths)} tokens and {new_tokens} new ones are more than the target's "
            f"{loaded.spec.max_position_embeddings}.",
            "Give smaller --context-lengths, or --set eval.max_new_tokens.",
        )
    loaded_drafts = [load_draft(folder, loaded) for folder in folders]
    by_name = dict(zip(comparison.names_of(folders), loaded_drafts, strict=True))
    if config.target.proofs:
        proofs.prove(loaded, sorted({tap for draft in loaded_drafts for tap in draft.config.target_layer_ids}))
    on_loaded()
    groups, given = [], listed(prompts)
    for workload, text in zip(calibration_report.workload_names(given), given, strict=True):
        thinking = config.data.thinking
        ids = prompt_ids(loaded, one_file(text), limit=limit, new_tokens=new_tokens, thinking=thinking)
        groups += comparison.lengthened(workload, ids, lengths)
    served = [  # first: a server may fail, and then nothing else is lost
        compare_engine(engine, loaded, group, config.eval, on_progress) for engine in connected for group in groups
    ]
    rows = comparison.compare(loaded, by_name, groups, config.eval, on_progress)
    order = [group.label for group in groups]
    rows = tuple(sorted((*rows, *served), key=lambda row: order.index(row.label)))
    kinds = [f"{draft.config.kind}, {folder}" for draft, folder in zip(loaded_drafts, folders, strict=True)]
    described = dict(zip(by_name, kinds, strict=True))
    described |= {engine.url: f"the draft of {engine.title}, serving {engine.model}" for engine in connected}
    return comparison.Comparison(config.target.named, str(loaded.dtype), described, rows)


def calibrate(
    config: RunConfig,
    draft: Path | str | Draft,
    prompts: Given,
    *,
    out: Path | str | None = None,
    margin: bool = False,
    limit: int | None = None,
    target: Target | None = None,
    on_loaded: Callable[[], None] = lambda: None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[CalibrationReport, list[Path]]:
    """Make what ``draft`` foretells of its acceptance a probability, at each of ``config.eval.temperatures``.

    Every text that ``prompts`` consists of is a workload, of which the first ``limit`` prompts are used. ``margin``
    takes the margin of the draft's first two logits also where there is a confidence head. Returns the report and the
    files written to ``out``, by default the folder `calibration` in the draft's; from there a decoder's draft has its
    temperatures. Nothing is written of a draft that is given loaded without ``out``, and no picture without matplotlib.

    Raises:
        InputError: ``out`` holds a calibration, there are too few prompts or rounds, or draft and target do not fit.
        CheckError: a proof failed.
    """
    folder = None if isinstance(draft, Draft) else Path(draft)
    if out is None and folder is not None:
        out = folder / temperatures.FOLDER
    if out is not None:
        calibration_report.check_unused(Path(out))
    loaded, drafting = _pair(config, draft, target)
    on_loaded()
    given, new_tokens = listed(prompts), config.eval.max_new_tokens
    workloads = []
    for name, text in zip(calibration_report.workload_names(given), given, strict=True):
        file = one_file(text)
        ids = conversation_ids(loaded, file, limit=limit, new_tokens=new_tokens, thinking=config.data.thinking)
        workloads.append(calibration_report.CalibrationPrompts(name, ids))
    signal = calibration_report.MARGIN if margin or drafting.confidence_head is None else calibration_report.HEAD
    fits = []
    for temperature in config.eval.temperatures or (0.0,):
        halves = [
            calibration_report.gather(loaded, drafting, workload, temperature, signal, config.eval, on_progress)
            for workload in workloads
        ]
        fits.append(calibration_report.fit(halves, temperature, signal))
    named_by = (config.target.named, str(folder or ""), temperatures.digest(folder) if folder else None, named(prompts))
    report = CalibrationReport(*named_by, tuple(fits))
    return report, report.save(Path(out)) if out is not None else []


def profile(
    config: RunConfig,
    draft: Path | str | Draft | None = None,
    *,
    out: Path | str | None = None,
    rows: Sequence[int] = ROWS,
    context: int | None = None,
    seconds: float = 40.0,
    target: Target | None = None,
    on_loaded: Callable[[], None] = lambda: None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Profile, list[Path]]:
    """Measure what rounds of ``rows`` requests cost on this machine, by tokens drafted of each.

    Returns the profile and the files written to ``out``: by default the folder `profile` in the draft's, from where a
    decoder's draft has its costs, and without a draft ``profiles/<target>``. Without a draft, lengths go up to
    ``config.draft.block_size``. Nothing is written of a draft that is given loaded without ``out``.

    Raises:
        InputError: draft and target do not fit, or there is no room for ``context`` tokens.
        CheckError: a proof failed.
    """
    loaded, drafting = _pair(config, draft, target)
    on_loaded()
    folder = None if draft is None or isinstance(draft, Draft) else Path(draft)
    gamma = drafting.config.block_size if drafting is not None else config.draft.block_size
    found = measure_costs(
        loaded,
        drafting,
        gamma,
        rows=rows,
        context=context,
        seconds=seconds,
        draft_name=str(folder or ""),
        progress=on_progress,
    )
    if out is None and draft is None:
        out = Path("profiles") / target_folder_name(config)
    if out is None and folder is not None:
        out = folder / costs.FOLDER
    return found, found.save(Path(out)) if out is not None else []


def serve(
    config: RunConfig,
    draft: Path | str | Draft | None = None,
    *,
    target: Target | None = None,
    api_key: str | None = None,
) -> "Server":
    """A server with OpenAI's API for the target, made faster by ``draft`` if there is one.

    ``with serve(config, draft) as server:`` answers at ``server.base_url`` until the block is left; ``serve(config,
    draft).run()`` until the process is told to stop. The port is taken before the target is loaded. With ``api_key``
    only requests that carry it are answered.

    Raises:
        InputError: draft and target do not belong together, or other machines could ask and need no key.
        CheckError: a proof failed.
        EnvironmentFault: the port is in use, or the `serve` extra is missing.
    """
    from nemotron_dspark.serving.guard import Access
    from nemotron_dspark.serving.listen import Server, bind

    Access(api_key, config.serve.no_auth).check_host(config.serve.host)  # before the target is loaded
    bound = bind(config.serve.host, config.serve.port)
    with contextlib.ExitStack() as failed:
        failed.callback(bound.close)
        loaded, drafting = _pair(config, draft, target)
        server = Server(loaded, drafting, config.serve, bound, api_key)
        failed.pop_all()
    return server


@overload
def _pair(config: RunConfig, draft: Path | str | Draft, target: Target | None) -> tuple[Target, Draft]: ...
@overload
def _pair(
    config: RunConfig, draft: Path | str | Draft | None, target: Target | None
) -> tuple[Target, Draft | None]: ...
def _pair(config: RunConfig, draft: Path | str | Draft | None, target: Target | None) -> tuple[Target, Draft | None]:
    if isinstance(draft, Draft):
        return target or load_target(config), draft
    folder = Path(draft) if draft is not None else None
    if target is None:
        return load_pair(config.target, folder)
    return target, load_draft(folder, target) if folder is not None else None
