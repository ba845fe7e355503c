"""How one training step is entered, in this project and in the others that train DSpark drafts.

Each function here takes the same `Case` and returns the step: a function that runs forward and loss and returns the
scalar to differentiate. Nothing of the others is changed but the draw of anchors, so that all train on the same ones,
and what asks for a GPU. `ImportError` says that one is not installed.
"""

import contextlib
import copy
import dataclasses
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights

Step = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One sequence with its target states, its anchors, and the weights of the draft under DeepSpec's names."""

    folder: Path  # draft/ (config.json, safetensors with embedding and head) and batch.safetensors
    input_ids: Tensor  # [S]
    loss_mask: Tensor  # [S] bool
    taps: Tensor  # [S, T·H]
    last: Tensor  # [S, H], of norm √H, after the target's final norm
    anchors: Tensor  # [A], ascending, every slot counts

    @staticmethod
    def load(folder: Path) -> "Case":
        batch = load_file(folder / "batch.safetensors")
        return Case(folder, loss_mask=batch.pop("loss_mask").bool(), **batch)

    def config(self) -> Any:
        """The draft's config.json as a `Qwen3Config`."""
        from transformers import Qwen3Config

        config = Qwen3Config(**json.loads((self.folder / "draft" / "config.json").read_text()))
        config._attn_implementation = "sdpa"
        return config

    def fill(self, module: nn.Module, also: dict[str, str] | None = None) -> nn.Module:
        """``module`` with the draft's weights, embedding and head frozen; ``also`` copies one name to another."""
        weights = load_file(self.folder / "draft" / "model.safetensors")
        weights |= {new: weights[name] for new, name in (also or {}).items()}
        known = module.state_dict()
        module.load_state_dict({name: value for name, value in weights.items() if name in known}, strict=False)
        left_out = set(weights) - set(known)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in weights and not name.startswith(("embed_tokens", "lm_head", "verifier_")))
        if left_out - {"embed_tokens.weight", "lm_head.weight"}:
            raise RuntimeError(f"no place for {sorted(left_out)}")
        return module

    def drawn(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """In place of a peer's draw of anchors: [1, A] positions, [1, A] which count."""
        return self.anchors[None], torch.ones(1, len(self.anchors), dtype=torch.bool)


def nds(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Step]:
    draft = DSparkDraft.load(case.folder / "draft").train()
    draft.set_embeddings(draft.embed_tokens.weight, draft.lm_head.weight, dtype)
    batch = collate([case], [case.anchors], draft.config.block_size)
    objective = DSparkObjective(draft, LossWeights())
    return draft, lambda: objective(batch).value


def nds_part(case: Case, part: int) -> tuple[nn.Module, Step]:
    """The same draft where it can draft ``part`` of the tokens only."""
    whole = DSparkDraft.load(case.folder / "draft")
    config = whole.config.model_copy(update={"draft_vocab_size": part})
    tokens = torch.arange(0, config.vocab_size, config.vocab_size // part)[:part]
    draft = DSparkDraft(config, seed=None)
    weights = whole.state_dict() | {"d2t": tokens - torch.arange(part)}
    for name in ("lm_head.weight", "markov_head.markov_w2.weight"):
        weights[name] = weights[name][tokens]
    draft.load_state_dict(weights, assign=True)
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(name in whole.trainable_parameters())
    draft.set_embeddings(whole.embed_tokens.weight, whole.lm_head.weight)
    batch = collate([case], [case.anchors], config.block_size)
    objective = DSparkObjective(draft, LossWeights())
    return draft.train(), lambda: objective(batch).value


def nds_bf16(case: Case) -> tuple[nn.Module, Step]:
    return nds(case, torch.bfloat16)


def nemo_automodel(case: Case) -> tuple[nn.Module, Step]:
    from nemo_automodel.components.speculative.dspark import core, draft_qwen3

    draft_qwen3.sample_anchor_positions = case.drawn
    trainer = core.DSparkTrainerModule(case.fill(draft_qwen3.Qwen3DSparkModel(case.config())), loss_decay_gamma=4.0)
    arguments = (case.input_ids[None], case.taps[None], case.loss_mask[None].float(), case.last[None])
    return trainer.train(), lambda: trainer(*arguments).loss


def specforge(case: Case) -> tuple[nn.Module, Step]:
    from specforge.algorithms.common.dflash_family_model import OnlineDSparkModel
    from specforge.modeling.draft.dspark import DSparkDraftModel

    config = case.config()
    names = ("target_layer_ids", "mask_token_id", "markov_rank", "markov_head_type", "enable_confidence_head")
    config.dflash_config = {name: getattr(config, name) for name in (*names, "confidence_head_with_markov")}
    weights = load_file(case.folder / "draft" / "model.safetensors")
    embedding = nn.Embedding.from_pretrained(weights["embed_tokens.weight"])
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    head.weight = nn.Parameter(weights["lm_head.weight"], requires_grad=False)
    model = OnlineDSparkModel(
        case.fill(DSparkDraftModel(config)),
        head,
        embedding,
        config.mask_token_id,
        block_size=config.block_size,
        attention_backend="sdpa",
        num_anchors=len(case.anchors),
        loss_decay_gamma=4.0,
        objective_chunk_blocks=16,
    )
    model._sample_anchor_positions = case.drawn
    arguments = (case.input_ids[None], case.taps[None], case.loss_mask[None].float(), case.last[None])
    return model.train(), lambda: model(*arguments)[0]


def speculators(case: Case) -> tuple[nn.Module, Step]:
    """Its loss is another: cross-entropy to the target's most likely token, and TV, which is half of L1."""
    with _stand_ins("datasets", "hs_connectors"):  # imported for its data pipeline, which no step runs
        from speculators.models.dflash import core as dflash
        from speculators.models.dspark.core import DSparkDraftModel

    config = case.config()
    target = copy.deepcopy(config)  # stands for the target, of which only the number of layers is looked at
    target.num_hidden_layers, target.layer_types = config.num_target_layers, None
    target.save_pretrained(case.folder / "target")
    dflash.select_anchors = lambda *_: tuple(part[0] for part in case.drawn())
    DSparkDraftModel.load_verifier_weights = lambda self: None
    model = DSparkDraftModel.from_training_args(
        config,
        verifier_name_or_path=str(case.folder / "target"),
        target_layer_ids=[layer + 1 for layer in config.target_layer_ids],
        draft_vocab_size=config.vocab_size,
        block_size=config.block_size,
        mask_token_id=config.mask_token_id,
        markov_rank=config.markov_rank,
        draft_attn_impl="sdpa",
    )
    case.fill(model, {"verifier_lm_head.weight": "lm_head.weight"})
    nn.init.ones_(model.verifier_norm.weight)  # the last states are of unit size already
    keywords, _ = DSparkDraftModel.get_trainer_kwargs(
        loss_fn='{"ce": 0.1, "tv": 1.8}', loss_implementation="eager", max_anchors=len(case.anchors)
    )
    batch = {
        "hidden_states": case.taps[None],
        "input_ids": case.input_ids[None],
        "loss_mask": case.loss_mask[None],
        "verifier_last_hidden_states": case.last[None],
        "document_ids": torch.zeros(1, len(case.input_ids), dtype=torch.long),
    }
    return model.train(), lambda: model(**batch, **keywords)[1]


def deepspec(case: Case) -> tuple[nn.Module, Step]:
    from deepspec.modeling.dspark import loss
    from deepspec.modeling.dspark.qwen3 import modeling

    def dense_mask(*, anchor_positions, block_keep_mask, seq_len, block_size, device):
        """In place of a BlockMask, which has no backward on a CPU: [B, 1, A·γ, S + A·γ]."""
        block = torch.arange(anchor_positions.shape[1] * block_size) // block_size
        context = torch.arange(seq_len) < anchor_positions[:, block][:, :, None]
        own = (block[:, None] == block).expand(len(anchor_positions), -1, -1)
        return torch.cat((context, own), dim=-1)[:, None]

    modeling.create_dspark_attention_mask = dense_mask
    modeling.sample_anchor_positions = case.drawn
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = case.fill(modeling.Qwen3DSparkModel(case.config()))
    batch = {
        "input_ids": case.input_ids[None],
        "target_hidden_states": case.taps[None],
        "loss_mask": case.loss_mask[None].float(),
        "target_last_hidden_states": case.last[None],
    }
    alphas = {"ce_loss_alpha": 0.1, "l1_loss_alpha": 0.9, "confidence_head_alpha": 1.0}

    def step() -> Tensor:
        found = loss.compute_dspark_loss(outputs=model(**batch), loss_decay_gamma=4.0, **alphas)
        return found[0] if isinstance(found, tuple) else found

    return model.train(), step


ENTRIES = {entry.__name__: entry for entry in (nds, nds_bf16, nemo_automodel, deepspec, specforge, speculators)}
OTHER_LOSS = ("speculators", "nds_bf16")


@contextlib.contextmanager
def _stand_ins(*names: str):
    """Empty modules under ``names`` where there are none, whose every attribute is some class."""

    class Empty(types.ModuleType):
        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    import transformers  # noqa: F401  looks for installed packages when it is imported; must not find these

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    for name in missing:
        sys.modules[name] = Empty(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
