"""Train, measure and serve DSpark drafts for targets that are not all attention.

The stages of the recipe and the objects that they hand on; each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nemotron_dspark._version import __version__

if TYPE_CHECKING:
    from nemotron_dspark.config import RunConfig, load_config
    from nemotron_dspark.config.recipe import Recipe, load_recipe
    from nemotron_dspark.data.regenerate import regenerate
    from nemotron_dspark.decoding.decoder import Decoder
    from nemotron_dspark.decoding.sampling import Sampling
    from nemotron_dspark.drafts.dspark import DSparkDraft
    from nemotron_dspark.drafts.eagle3 import Eagle3Draft
    from nemotron_dspark.recipe.describe import inspect
    from nemotron_dspark.recipe.plan import plan
    from nemotron_dspark.recipe.run import run_recipe
    from nemotron_dspark.stages import build_cache, evaluate, serve, train
    from nemotron_dspark.targets import Target

_HOMES = {
    "Decoder": "decoding.decoder",
    "DSparkDraft": "drafts.dspark",
    "Eagle3Draft": "drafts.eagle3",
    "Recipe": "config.recipe",
    "RunConfig": "config",
    "Sampling": "decoding.sampling",
    "Target": "targets",
    "build_cache": "stages",
    "evaluate": "stages",
    "inspect": "recipe.describe",
    "load_config": "config",
    "load_recipe": "config.recipe",
    "plan": "recipe.plan",
    "regenerate": "data.regenerate",
    "run_recipe": "recipe.run",
    "serve": "stages",
    "train": "stages",
}

__all__ = [
    "DSparkDraft",
    "Decoder",
    "Eagle3Draft",
    "Recipe",
    "RunConfig",
    "Sampling",
    "Target",
    "__version__",
    "build_cache",
    "evaluate",
    "inspect",
    "load_config",
    "load_recipe",
    "plan",
    "regenerate",
    "run_recipe",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
