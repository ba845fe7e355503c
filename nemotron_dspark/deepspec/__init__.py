"""The bridge to DeepSpec: our template, builders, trainers, evaluators and configs for an unedited checkout.

Importing this package needs no checkout. Names that are subclasses of DeepSpec's own classes are made when they are
first asked for, and need the checkout on Python's path then.
"""

import importlib
from pathlib import Path
from typing import Any

from nemotron_dspark.deepspec.builders import dspark_config, eagle3_config

_FROM_CHECKOUT = {
    "NemotronDSparkTrainer": "trainers",
    "NemotronEagle3Trainer": "trainers",
    "NemotronDSparkEvaluator": "evaluators",
    "NemotronEagle3Evaluator": "evaluators",
    "register_templates": "trainers",
}

__all__ = ["dspark_config", "eagle3_config", "finalize_cfg", *_FROM_CHECKOUT]


def __getattr__(name: str) -> Any:
    if name not in _FROM_CHECKOUT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FROM_CHECKOUT[name]}"), name)


def finalize_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """DeepSpec calls this on a config after `--opts`: folders left at None become DeepSpec's usual ones.

    ``~/checkpoints/<project_name>/<exp_name>`` and ``~/tensorboard/<project_name>/<exp_name>``.
    """
    logging = dict(cfg["logging"])
    for key, root in (("checkpoint_dir", "checkpoints"), ("tensorboard_dir", "tensorboard")):
        folder = logging.get(key) or Path.home() / root / str(cfg["project_name"]) / str(cfg["exp_name"])
        logging[key] = str(Path(folder).expanduser().absolute())
    return {**cfg, "logging": logging}
