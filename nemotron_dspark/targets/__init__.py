"""What a target is, and a loaded one: capture, verify, commit, and the proofs that all this is right."""

from nemotron_dspark.targets.spec import LayerKind, TargetSpec
from nemotron_dspark.targets.state import TargetState
from nemotron_dspark.targets.target import Captured, Target, Verified

__all__ = ["Captured", "LayerKind", "Target", "TargetSpec", "TargetState", "Verified"]
