"""DeepSpec's first and third extension points: our chat formats in its registry; its trainers, for any target.

Importing this module needs a checkout on Python's path. Every rank reads the target's config, its embedding and its LM
head, and nothing else of the checkpoint; whether the cache fits is settled before that.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from nemotron_dspark.chat.format import bundled_formats
from nemotron_dspark.deepspec.builders import dspark_config, eagle3_config
from nemotron_dspark.deepspec.checkout import deepspec_module
from nemotron_dspark.deepspec.launch import check_cache
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Checkpoint, spec_from_config
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.weights import read_embedding_and_head

_trainer = deepspec_module("deepspec.trainer")
_dspark = deepspec_module("deepspec.modeling.dspark.qwen3")
_eagle3 = deepspec_module("deepspec.modeling.eagle3.qwen3")


def register_templates() -> tuple[str, ...]:
    """Register every bundled format that DeepSpec's parser can handle; returns their names.

    A name that is there already is left alone, so this may be called any number of times, in any process.
    """
    parser = deepspec_module("deepspec.data.parser")
    usable = {name: found for name, found in bundled_formats().items() if found.deepspec is not None}
    for name, found in usable.items():
        try:
            parser.TEMPLATE_REGISTRY.get(name)
        except KeyError:
            parser.TEMPLATE_REGISTRY.register(name, parser.ChatTemplate(**vars(found.deepspec)))
    return tuple(usable)


register_templates()


class _FromCheckpoint:
    """`build_models` of both trainers."""

    draft_config: Callable[[TargetSpec, Any], Any]
    draft_model: Callable[[Any], Any]
    args: Any  # DeepSpec's base class makes these three
    device: torch.device
    precision_dtype: torch.dtype

    def build_models(self) -> tuple[Any, Any]:
        """The draft on this rank's device with the target's frozen embedding and head, and the tokenizer.

        Raises:
            InputError: the cache does not fit the config, or the checkpoint lacks or damages one of the two tensors.
        """
        name = self.args.model.target_model_name_or_path
        checkpoint = Checkpoint.find(name, weights=True)
        spec = checkpoint.read_spec()
        check_cache(self.args, spec)
        draft = self._build_draft_model(target_config=spec, model_args=self.args.model)
        draft = draft.to(device=self.device, dtype=self.precision_dtype)
        found = read_embedding_and_head(checkpoint.folder, spec)
        draft.initialize_embeddings_and_head(
            embed_tokens=SimpleNamespace(weight=found.embedding),
            lm_head=SimpleNamespace(weight=found.head),
            freeze=True,
        )
        return draft, checkpoint.load_tokenizer()

    def _build_draft_model(self, *, target_config: Any, model_args: Any) -> Any:
        """DeepSpec hands its hook a transformers config; `build_models` a spec."""
        if target_config is None:
            raise InputError("There is no target config.", "Set model.target_model_name_or_path.")
        spec = target_config if isinstance(target_config, TargetSpec) else spec_from_config(target_config)
        return self.draft_model(self.draft_config(spec, model_args))


class NemotronDSparkTrainer(_FromCheckpoint, _trainer.Qwen3DSparkTrainer):
    """Trains a DSpark draft for a target of any family."""

    draft_config, draft_model = staticmethod(dspark_config), _dspark.Qwen3DSparkModel


class NemotronEagle3Trainer(_FromCheckpoint, _trainer.Qwen3Eagle3Trainer):
    """Trains an EAGLE-3 draft for a target of any family."""

    draft_config, draft_model = staticmethod(eagle3_config), _eagle3.Qwen3Eagle3Model
