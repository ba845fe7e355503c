"""DeepSpec's own entry points in a clean process, once everything that can be wrong before has been looked at.

Its scripts spawn one worker per visible GPU by themselves; RANK and WORLD_SIZE are the node's number and the number of
nodes there, not a process's.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nemotron_dspark.cache.deepspec_layout import Manifest
from nemotron_dspark.cache.reader import TargetCache, read_layout
from nemotron_dspark.cache.verify import check_mask_token
from nemotron_dspark.config import RunConfig
from nemotron_dspark.deepspec.checkout import Checkout, deepspec_module, find, put_on_path
from nemotron_dspark.deepspec.config_file import config_for
from nemotron_dspark.errors import EnvironmentFault, InputError, NdsError, first_line
from nemotron_dspark.files import write_text
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.spec import TargetSpec


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The machines of a run; None takes DeepSpec's environment variable, else a single node."""

    count: int | None = None  # WORLD_SIZE
    rank: int | None = None  # RANK, of this node
    master: str | None = None  # "host:port", MASTER_ADDR and MASTER_PORT

    def variables(self) -> dict[str, str]:
        """DeepSpec's four variables; `InputError` when they contradict one another."""
        address, _, port = (self.master or "").partition(":")
        given = {"WORLD_SIZE": self.count, "RANK": self.rank, "MASTER_ADDR": address, "MASTER_PORT": port}
        usual = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        stated = {name: str(value) for name, value in given.items() if value not in (None, "")}
        values = {name: stated.get(name) or os.environ.get(name, default) for name, default in usual.items()}
        if not all(values[name].isdecimal() for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")):
            raise InputError(f"Nodes {values} are not numbers.", "Use --nodes, --node-rank and --master host:port.")
        if int(values["RANK"]) >= int(values["WORLD_SIZE"]):
            raise InputError(
                f"Node {values['RANK']} of {values['WORLD_SIZE']} does not exist: nodes count from 0.",
                "RANK and WORLD_SIZE are the node's number and the number of nodes, not a process's.",
            )
        return values


def load_config(checkout: Checkout, path: Path, opts: Sequence[str]) -> Any:
    """The config at ``path`` with ``opts`` applied, read by DeepSpec itself.

    Raises:
        InputError: no such file, it cannot be run, or an option names no key.
        EnvironmentFault: DeepSpec cannot be imported.
    """
    if not path.is_file():
        raise InputError(
            f"The config {path} does not exist.", "Write one with `nds deepspec config --target T --out F`."
        )
    put_on_path(checkout)
    utils = deepspec_module("deepspec.utils")
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # not into the folder of a config
    try:
        cfg = utils.load_config(str(path))
    except NdsError:
        raise
    except Exception as error:  # it is Python: anything can go wrong in it
        raise InputError(f"{path} cannot be loaded: {first_line(error)}.", "Correct the file.") from None
    finally:
        sys.dont_write_bytecode = writes_bytecode
    for section in ("model", "train", "logging", "data"):
        if not isinstance(cfg.get(section), dict):
            raise InputError(f"{path} has no section {section}.", "Start from `nds deepspec config --target T`.")
    try:
        return utils.parse_opts_to_config(list(opts), cfg)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"--opts: {first_line(error).strip(chr(39))}.", "Write section.key=value with a key of the config."
        ) from None


def resource_config(given: Path | str) -> Path:
    """``given``, or the worked config of that name in `configs/deepspec/`."""
    given = Path(given)
    worked = resource_folder("configs") / "deepspec" / f"{given.stem}.py"
    return worked if not given.exists() and len(given.parts) == 1 and worked.is_file() else given


def require_gpus() -> int:
    """Number of visible CUDA devices; `EnvironmentFault` when there is none, where DeepSpec would do nothing."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise EnvironmentFault(
            "There is no CUDA device here, and DeepSpec runs on nothing else.",
            "Use the native engine (`nds train`, `nds eval`), or a machine with GPUs.",
        )
    return count


def spec_of(cfg: Mapping[str, Any]) -> TargetSpec:
    """The spec of the target that ``cfg`` names."""
    name = cfg["model"].get("target_model_name_or_path")
    if not name:
        raise InputError("The config names no target.", "Set model.target_model_name_or_path.")
    return Checkpoint.find(name).read_spec()


def check_training(cfg: Mapping[str, Any], workers: int) -> tuple[str, ...]:
    """Everything about a training run that can be known before a GPU is touched; returns notes.

    Raises:
        InputError: target, model section, cache and batch sizes do not fit together.
    """
    spec = spec_of(cfg)
    build = getattr(cfg["train"].get("trainer_cls"), "draft_config", None)
    if build is None:
        raise InputError(
            "train.trainer_cls is not one of this project's trainers.",
            "Import NemotronDSparkTrainer or NemotronEagle3Trainer from nemotron_dspark.deepspec.",
        )
    build(spec, cfg["model"])
    cache = check_cache(cfg, spec)
    if cfg["model"].get("mask_token_id") is not None:
        check_mask_token(cache, int(cfg["model"]["mask_token_id"]))
    check_batches(cfg, len(cache), workers)
    Checkpoint.find(spec.name, weights=True)  # downloaded once, not by every rank
    latest = Path(cfg["logging"]["checkpoint_dir"]) / "step_latest"
    return (f"DeepSpec goes on from {latest.resolve()}.",) if latest.exists() else ()


def check_cache(cfg: Mapping[str, Any], spec: TargetSpec) -> TargetCache:
    """The cache that ``cfg`` names, once it is certain that it was made from this target, with these taps and template.

    Raises:
        InputError: there is none, it is damaged, or it was made from something else. The message names both sides.
    """
    given = cfg["data"].get("target_cache_path")
    if not given:
        raise InputError(
            "The config names no target cache.",
            "Build one with `nds deepspec prepare`, then add --opts data.target_cache_path=FOLDER.",
        )
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"The target cache {folder} does not exist.", "Build it with `nds deepspec prepare`.")
    _check_manifest(Manifest.read(folder), cfg, spec, folder)
    return TargetCache(folder)


def _check_manifest(manifest: Manifest, cfg: Mapping[str, Any], spec: TargetSpec, folder: Path) -> None:
    do = "Give the cache that was built for this config, or build one with `nds deepspec prepare`."
    target, taps = (
        str(cfg["model"]["target_model_name_or_path"]),
        [int(tap) for tap in cfg["model"]["target_layer_ids"]],
    )
    made_with, wanted = manifest.extra.get("chat_template"), cfg["data"].get("chat_template")
    made_from = manifest.extra.get("target_model_name_or_path")
    if made_from not in (None, target):
        what = f"was made from the target {made_from}, the config says {target}."
        do += " If both are the same model, write the cache's spelling into the config."
    elif manifest.hidden_size != spec.hidden_size:
        what = f"holds hidden states of size {manifest.hidden_size}, those of {target} have {spec.hidden_size}."
    elif manifest.target_layer_ids != taps:
        what = f"holds the taps {manifest.target_layer_ids}, the config asks for {taps}."
    elif made_with is not None and wanted not in (None, made_with):
        what = f"was made with the chat template {made_with!r}, the config says {wanted!r}."
        do += f" Or set data.chat_template to {made_with!r}, if that is what the target is served with."
    else:
        return
    raise InputError(f"{folder} {what}", do)


def check_batches(cfg: Mapping[str, Any], num_samples: int, workers: int) -> None:
    """`InputError` when the batch sizes of ``cfg`` do not fit ``workers`` (GPUs of all nodes) or the cache."""
    local, whole = int(cfg["train"]["local_batch_size"]), int(cfg["train"]["global_batch_size"])
    if whole % (workers * local):
        raise InputError(
            f"train.global_batch_size {whole} is not a multiple of {workers} GPUs x train.local_batch_size {local}.",
            "Change one of them with --opts.",
        )
    if num_samples < whole:
        raise InputError(
            f"The cache has {num_samples} samples, but one optimiser step takes {whole}.",
            f"Add data, or use --opts train.global_batch_size={num_samples // (workers * local) * workers * local}.",
        )


def train(config: Path, opts: Sequence[str], nodes: Nodes, note: Callable[[str], None]) -> NoReturn:
    """Check everything that can be checked, then become DeepSpec's train.py on ``config``; ``note`` gets remarks."""
    checkout = find()
    machines = int(nodes.variables()["WORLD_SIZE"])
    gpus = require_gpus()
    remarks = check_training(load_config(checkout, config, opts), gpus * machines)
    for text in (*checkout.warnings(), *remarks):
        note(text)
    options = [part for opt in opts for part in ("--opts", opt)]
    run(checkout, [str(checkout.folder / "train.py"), "--config", str(config.absolute()), *options], nodes)


def train_on_cache(config: RunConfig, cache: Path | None, out: Path, note: Callable[[str], None]) -> NoReturn:
    """Write the same run as a DeepSpec config to ``out``, then `train` on it.

    Raises:
        InputError: there is no cache, or it does not fit.
    """
    if cache is None:
        raise InputError("DeepSpec's loop reads a cache; --data is given.", "Build one with `nds cache build`.")
    if config.draft.taps is None:  # the cache was built with some; they are the only ones there are
        taps = list(read_layout(cache).taps)
        config = config.model_copy(update={"draft": config.draft.model_copy(update={"taps": taps})})
    file = out / "deepspec_config.py"
    write_text(file, config_for(config, file=str(file)))
    options = {
        "data.target_cache_path": cache,
        "logging.checkpoint_dir": out / "checkpoints",
        "logging.tensorboard_dir": out / "tensorboard",
    }
    train(file, [f"{key}={path.absolute()}" for key, path in options.items()], Nodes(), note)


def run(checkout: Checkout, arguments: Sequence[str], nodes: Nodes, folder: Path | None = None) -> NoReturn:
    """Replace this process by ``python ARGUMENTS`` with DeepSpec and this package on the path, in ``folder``."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [str(checkout.folder), package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, **nodes.variables(), "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    if folder is not None:
        os.chdir(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def evaluation_command(
    target: str, draft: str, tasks: Sequence[tuple[str, int | None]], options: Mapping[str, Any]
) -> list[str]:
    """DeepSpec's eval.py with our evaluators in its table."""
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    named = ",".join(name if count is None else f"{name}:{count}" for name, count in tasks)
    entry = ["-m", "nemotron_dspark.deepspec.evaluators", "--tasks", named]
    return [*entry, "--target_name_or_path", target, "--draft_name_or_path", draft, *given]


def read_tasks(checkout: Checkout, text: str | None) -> list[tuple[str, int | None]]:
    """``gsm8k:100,math500`` as pairs, all of whose prompts are there; None is DeepSpec's own list, read from it.

    Raises:
        InputError: a malformed entry, or a set of prompts that the checkout does not hold.
    """
    if text is None:
        put_on_path(checkout)
        tasks = list(deepspec_module("eval").TASKS)
    else:
        tasks = []
        for part in text.split(","):
            name, colon, count = part.strip().partition(":")
            if not name or (colon and not (count.isdecimal() and int(count))):
                raise InputError(f"--tasks {text!r} is not name:prompts,….", "Write for example gsm8k:100,math500.")
            tasks.append((name, int(count) if colon else None))
    folder = checkout.folder / "eval_datasets"
    missing = [name for name, _ in tasks if not (folder / f"{name}.jsonl").is_file()]
    if missing:
        here = sorted(path.stem for path in folder.glob("*.jsonl"))
        raise InputError(
            f"{folder} has no {missing[0]}.jsonl.", f"Choose with --tasks among {', '.join(here) or 'none'}."
        )
    return tasks
