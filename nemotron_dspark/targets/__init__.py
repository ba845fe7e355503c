"""What a target is, and a loaded one: capture, verify, commit, and the proofs that all this is right."""

from nemotron_dspark.targets.spec import LayerKind, TargetSpec

__all__ = ["LayerKind", "TargetSpec"]
