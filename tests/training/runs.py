"""Runs for tests whose settings name no target."""

from nemotron_dspark.training.run import train

# Of a small draft whose target runs beside it.
TINY = (
    "target.device=cpu",
    "target.proofs=false",
    "draft.taps=[1,4]",
    "draft.num_layers=1",
    "draft.block_size=3",
    "draft.markov_rank=4",
    "data.min_loss_tokens=4",
    "train.device=cpu",
    "train.log_every=1",
    "train.num_anchors=8",
)


def named(config, target):
    """``config`` for the target in the folder ``target``."""
    return config.model_copy(update={"target": config.target.model_copy(update={"name": str(target)})})


def train_run(target, cache, folder, config, *, conversations=None, **options):
    """`train` with ``config`` for the target in the folder ``target``."""
    return train(named(config, target), folder, cache=cache, data=conversations, **options)
