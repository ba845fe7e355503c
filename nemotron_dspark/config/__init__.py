"""A run's configuration: typed, validated, documented. Each section belongs to one stage."""

from nemotron_dspark.config.run import (
    CacheConfig,
    DataConfig,
    DraftSection,
    EvalConfig,
    RunConfig,
    ServeConfig,
    TargetConfig,
    TrainConfig,
    load_config,
)

__all__ = [
    "CacheConfig",
    "DataConfig",
    "DraftSection",
    "EvalConfig",
    "RunConfig",
    "ServeConfig",
    "TargetConfig",
    "TrainConfig",
    "load_config",
]
