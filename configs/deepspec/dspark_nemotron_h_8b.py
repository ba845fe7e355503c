# DSpark for nvidia/Nemotron-H-8B-Base-8K: a config of DeepSpec's.
#
#   nds deepspec prepare dspark_nemotron_h_8b.py --data conversations.jsonl --out CACHE
#   nds deepspec train dspark_nemotron_h_8b.py --opts data.target_cache_path=CACHE
#   nds deepspec eval dspark_nemotron_h_8b.py
#
# Any value is overridden by --opts section.key=value. Written by
# `nds deepspec config --target nvidia/Nemotron-H-8B-Base-8K`.

from nemotron_dspark.deepspec import NemotronDSparkTrainer, finalize_cfg  # noqa: F401 (DeepSpec calls finalize_cfg)

project_name = "nemotron-dspark"
exp_name = "dspark_block7_nemotron_h_8b_base_8k"
seed = 42

model = {
    "target_model_name_or_path": "nvidia/Nemotron-H-8B-Base-8K",
    "block_size": 7,
    "num_draft_layers": 5,
    # of 52 layers: M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-
    "target_layer_ids": [1, 13, 25, 37, 49],
    "mask_token_id": 990,  # reserved: printed by no template, in no data
    "num_anchors": 64,
    "intermediate_size": 14336,  # SwiGLU width: about two thirds of the target's ungated 21504: as many parameters
    "rope_theta": 10000.0,  # the target has no rotary embedding; NVIDIA's drafts for such targets use 10000
    # sequential head; rank 0 is what DeepSpec calls DFlash
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    # confidence head; alpha 0 leaves it out
    "confidence_head_alpha": 1.0,
    "confidence_head_with_markov": True,
    # loss
    "loss_decay_gamma": 4.0,
    "ce_loss_alpha": 0.1,
    "l1_loss_alpha": 0.9,
}

train = {
    "trainer_cls": NemotronDSparkTrainer,
    "lr": 0.0006,
    "warmup_ratio": 0.04,
    "weight_decay": 0.0,
    "precision": "bf16",
    "local_batch_size": 1,  # samples per GPU and forward
    # Samples per optimiser step, over all GPUs of all nodes. DeepSpec's own runs: 512, lr 6e-4, 1.3 million samples.
    "global_batch_size": 64,
    "num_train_epochs": 5,
    "max_train_steps": None,  # a number replaces num_train_epochs
    "max_grad_norm": 1.0,
    "sharding_strategy": "no_shard",  # the draft fits one GPU
    "torch_compile": True,
}

logging = {
    "logging_steps": 10,
    "checkpointing_steps": 3000,
    "checkpoint_dir": None,  # ~/checkpoints/<project_name>/<exp_name>
    "tensorboard_dir": None,  # ~/tensorboard/<project_name>/<exp_name>
}

data = {
    "target_cache_path": None,  # the folder that `nds deepspec prepare` wrote
    "chat_template": "plain",  # the cache says which one it was made with
    "max_length": 4096,
    "num_workers": 4,
}
