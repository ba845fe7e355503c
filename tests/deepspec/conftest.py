"""DeepSpec's own code without CUDA: one process on gloo, dense masks, plain PyTorch in place of Triton kernels.

Only what needs a GPU is replaced, and only here. Everything in this folder that asks for `deepspec_on_cpu` is skipped
unless DEEPSPEC_HOME names a checkout.
"""

import contextlib
import importlib.machinery
import json
import os
import sys
import types

import pytest
import torch
import torch.distributed as dist

from nemotron_dspark.config.run import CacheConfig, DataConfig
from nemotron_dspark.targets import Target

HOME = os.environ.get("DEEPSPEC_HOME")
TAPS = (1, 2, 3, 4, 5)
MASK = 31


def pytest_collection_modifyitems(items):
    for item in items:
        if "deepspec_on_cpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.deepspec)


def _stand_in_for_triton():
    """Enough of triton for DeepSpec's EAGLE-3 loss to be imported; its kernels are replaced below."""
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit = lambda function: function
    triton.language, language.constexpr = language, int
    triton.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    language.__spec__ = importlib.machinery.ModuleSpec("triton.language", None)
    return {"triton": triton, "triton.language": language}


def dense_dspark_mask(*, anchor_positions, block_keep_mask, seq_len, block_size, device):
    """What DSpark's BlockMask lets a slot see: the context before its anchor, and its own block."""
    block = torch.arange(anchor_positions.shape[1] * block_size) // block_size
    context = torch.arange(seq_len) < anchor_positions[:, block][:, :, None]
    own = (block[:, None] == block).expand(len(anchor_positions), -1, -1)
    return torch.cat((context, own), dim=-1)[:, None]


def dense_eagle3_mask(*, attention_mask, q_len, kv_len, lck, device):
    """What EAGLE-3's BlockMask lets a position see at step ``lck``: step 0 causally, then only its own later keys."""
    lengths = (attention_mask.sum(-1) - lck).clamp_min(0)[:, None, None]
    query, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
    first = (key <= query) & (key < lengths)
    own = (key >= q_len) & (key % q_len == query) & (key % q_len < lengths)
    return ((first | own) & (query < lengths))[:, None]


def dense_attention(query, key, value, block_mask, enable_gqa):
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT / query.shape[-1] ** 0.5
    weights = torch.softmax(scores.masked_fill(~block_mask, -torch.inf), -1).nan_to_num()
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)


class SoftCrossEntropy:
    """The fused kernel's value and gradient in plain operations."""

    @staticmethod
    def apply(logits, target, mask, normalizer):
        losses = -(target * torch.log_softmax(logits.float(), -1)).sum(-1, keepdim=True)
        return (losses * mask.bool()).sum() / normalizer


class Unsharded(torch.nn.Module):
    """What FSDP1 does in one process without sharding: cast what comes in. It refuses to do it on a CPU."""

    def __init__(self, module, **_):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        dtype = next(self.module.parameters()).dtype
        cast = lambda value: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value  # noqa: E731
        return self.module(**{name: cast(value) for name, value in inputs.items()})

    def state_dict(self):
        return self.module.state_dict()

    def no_sync(self):
        return contextlib.nullcontext()

    @staticmethod
    def state_dict_type(*_):
        return contextlib.nullcontext()

    @staticmethod
    def clip_grad_norm_(model, max_norm):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


@pytest.fixture(scope="session")
def deepspec_on_cpu():
    """DeepSpec importable and runnable in this process; undone at the end of the session."""
    if not HOME:
        pytest.skip("DEEPSPEC_HOME names no DeepSpec checkout")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(HOME)
    try:
        import triton  # noqa: F401
    except ImportError:
        for name, module in _stand_in_for_triton().items():
            patch.setitem(sys.modules, name, module)

    from deepspec.data import cuda_prefetcher
    from deepspec.eval import base_evaluator
    from deepspec.modeling.dspark.qwen3 import modeling as dspark
    from deepspec.modeling.eagle3 import loss as eagle3_loss
    from deepspec.modeling.eagle3.qwen3 import modeling as eagle3
    from deepspec.trainer import base_trainer, ckpt_manager
    from deepspec.utils import distributed

    def one_process(local_rank):
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return torch.device("cpu"), 0, 1

    class Feed:
        def __init__(self, dataloader, device):
            self._batches = dataloader

        def __iter__(self):
            return (cuda_prefetcher.move_batch_to_device(batch, "cpu") for batch in self._batches)

    patch.setattr(base_trainer, "init_dist", one_process)
    patch.setattr(base_evaluator, "init_dist", one_process)
    patch.setattr(base_trainer, "CUDAPrefetcher", Feed)
    patch.setattr(base_trainer, "FSDP", Unsharded)
    patch.setattr(ckpt_manager, "FSDP", Unsharded)
    patch.setattr(distributed, "is_local_main_process", lambda: True)
    patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.empty(0))
    patch.setattr(dspark, "create_dspark_attention_mask", dense_dspark_mask)
    patch.setattr(eagle3, "create_eagle3_attention_mask", dense_eagle3_mask)
    patch.setattr(eagle3, "flex_attention", dense_attention)
    patch.setattr(eagle3, "compile_friendly_flex_attention", dense_attention)
    patch.setattr(eagle3_loss, "FusedLogSoftmaxLoss", SoftCrossEntropy)

    def block_attention(module, queries, keys, values, mask, **_):
        return dense_attention(queries, keys, values, mask, enable_gqa=False).transpose(1, 2), None

    attentions = {"flex_attention": block_attention, "sdpa": dspark.ALL_ATTENTION_FUNCTIONS["sdpa"]}
    patch.setattr(dspark, "ALL_ATTENTION_FUNCTIONS", attentions)
    one_process(0)
    yield types.SimpleNamespace(dspark=dspark, eagle3=eagle3, eagle3_loss=eagle3_loss, base_trainer=base_trainer)
    if dist.is_initialized():
        dist.destroy_process_group()
    patch.undo()


@pytest.fixture(scope="session")
def target(tiny_hybrid):
    return Target.load(str(tiny_hybrid))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("conversations") / "data.jsonl"
    with open(path, "w") as file:
        for n in range(12):
            turns = [("user", f"question {n}"), ("assistant", "state of a hybrid " * (1 + n * 7 % 5))]
            file.write(json.dumps({"conversations": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path


@pytest.fixture(scope="session")
def cache(target, conversations, tmp_path_factory):
    """A target cache of the tiny Nemotron-H. Read only: copy it to change it."""
    from nemotron_dspark.cache.build import build_cache

    folder = tmp_path_factory.mktemp("cache") / "built"
    build_cache(
        target,
        conversations,
        folder,
        taps=TAPS,
        data=DataConfig(min_loss_tokens=4, max_length=96),
        cache=CacheConfig(batch_tokens=256),
    )
    return folder


def config(algorithm, target_folder, cache_folder, out, **model):
    """A loaded DeepSpec config of a tiny run, as its `train.py` hands it to a trainer."""
    from deepspec.utils.config import finalize_config, to_config_node

    import nemotron_dspark.deepspec as bridge

    shared = {"target_model_name_or_path": str(target_folder), "target_layer_ids": list(TAPS), "intermediate_size": 96}
    own = {
        "dspark": {
            "block_size": 3,
            "num_draft_layers": 2,
            "mask_token_id": MASK,
            "num_anchors": 96,
            "markov_rank": 8,
            "markov_head_type": "vanilla",
            "confidence_head_alpha": 1.0,
            "confidence_head_with_markov": True,
            "loss_decay_gamma": 4.0,
            "ce_loss_alpha": 0.1,
            "l1_loss_alpha": 0.9,
        },
        "eagle3": {"ttt_length": 3, "step_loss_decay": 0.8, "draft_num_hidden_layers": 1},
    }
    trainers = {"dspark": "NemotronDSparkTrainer", "eagle3": "NemotronEagle3Trainer"}
    cfg = to_config_node(
        {
            "project_name": "tests",
            "exp_name": algorithm,
            "seed": 42,
            "model": {**shared, **own[algorithm], **model},
            "train": {
                "trainer_cls": getattr(bridge, trainers[algorithm]),
                "lr": 6e-4,
                "warmup_ratio": 0.75,  # three steps of warm-up: after it the rates differ a little, see test_training
                "weight_decay": 0.01,
                "precision": "fp32",
                "local_batch_size": 1,
                "global_batch_size": 4,
                "num_train_epochs": 1,
                "max_train_steps": 4,
                "max_grad_norm": 1.0,
                "sharding_strategy": "no_shard",
                "torch_compile": False,
            },
            "logging": {
                "logging_steps": 1,
                "checkpointing_steps": 3,
                "checkpoint_dir": str(out / "checkpoints"),
                "tensorboard_dir": str(out / "tensorboard"),
            },
            "data": {
                "target_cache_path": str(cache_folder),
                "chat_template": "chatml",
                "max_length": 96,
                "num_workers": 1,
            },
            "finalize_cfg": bridge.finalize_cfg,
        }
    )
    cfg = finalize_config(cfg)
    cfg._origin_config_path, cfg._origin_opts = __file__, []
    return cfg


@pytest.fixture
def make_config(deepspec_on_cpu, tiny_hybrid, cache, tmp_path):
    return lambda algorithm, **model: config(algorithm, tiny_hybrid, cache, tmp_path, **model)
