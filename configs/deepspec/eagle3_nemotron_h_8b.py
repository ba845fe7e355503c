# EAGLE-3 for nvidia/Nemotron-H-8B-Base-8K: a config of DeepSpec's.
#
#   nds deepspec prepare eagle3_nemotron_h_8b.py --data conversations.jsonl --out CACHE
#   nds deepspec train eagle3_nemotron_h_8b.py --opts data.target_cache_path=CACHE
#   nds deepspec eval eagle3_nemotron_h_8b.py
#
# Any value is overridden by --opts section.key=value. Written by
# `nds deepspec config --target nvidia/Nemotron-H-8B-Base-8K --algorithm eagle3`.

from nemotron_dspark.deepspec import NemotronEagle3Trainer, finalize_cfg  # noqa: F401 (DeepSpec calls finalize_cfg)

project_name = "nemotron-dspark"
exp_name = "eagle3_ttt7_nemotron_h_8b_base_8k"
seed = 42

model = {
    "target_model_name_or_path": "nvidia/Nemotron-H-8B-Base-8K",
    # exactly five of 52 layers: M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-
    "target_layer_ids": [1, 13, 25, 37, 49],
    "ttt_length": 7,  # steps unrolled in training, tokens drafted per round
    "step_loss_decay": 0.8,
    "draft_num_hidden_layers": 1,
    "intermediate_size": 14336,  # SwiGLU width: about two thirds of the target's ungated 21504: as many parameters
    "rope_theta": 10000.0,  # the target has no rotary embedding; NVIDIA's drafts for such targets use 10000
}

train = {
    "trainer_cls": NemotronEagle3Trainer,
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
    "torch_compile": False,
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
