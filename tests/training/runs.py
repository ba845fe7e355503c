"""Runs for tests whose settings name no target."""

from nemotron_dspark.training.run import train


def named(config, target):
    """``config`` for the target in the folder ``target``."""
    return config.model_copy(update={"target": config.target.model_copy(update={"name": str(target)})})


def train_run(target, cache, folder, config, *, conversations=None, **options):
    """`train` with ``config`` for the target in the folder ``target``."""
    return train(named(config, target), folder, cache=cache, data=conversations, **options)
