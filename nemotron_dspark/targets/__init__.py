"""What a target is, and a loaded one: capture, verify, commit, and the proofs that all this is right."""

from nemotron_dspark.targets.checkpoint import Checkpoint
from nemotron_dspark.targets.families import spec_from_config
from nemotron_dspark.targets.spec import LayerKind, TargetSpec
from nemotron_dspark.targets.state import State
from nemotron_dspark.targets.target import Captured, Target, Verified

__all__ = [
    "Captured",
    "Checkpoint",
    "LayerKind",
    "State",
    "Target",
    "TargetSpec",
    "Verified",
    "spec_from_config",
]
