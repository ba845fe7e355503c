"""A target of Nemotron-H-8B's shapes captured layer by layer: time, memory, what the disk gave.

    python benchmarks/stream.py [--layers 52] [--tokens 4096] [--length 512] [--device cpu] [--whole] [--json]

Writes a checkpoint with random weights (16 GB in BF16 at 52 layers), a layer at a time, and deletes it afterwards.
Then, each in a process of its own, hidden states of ``tokens`` random tokens are captured in one pass with three taps:

- seconds, tokens/s: of the pass, without loading what stays in memory.
- peak MB: highest memory of the process that no file backs, above what it had before the target was loaded; on CUDA the
  allocator's peak. `limit MB` is the goal: two largest layers, the embedding, and the states in flight.
- read MB/s: of the thread that reads layers; waited: the share of the pass that went by waiting for it.
- --whole: the same with all weights in memory, and whether the hidden states are the same bits.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
SHAPES = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 21504,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "chunk_size": 128,
}
HIDDEN, VOCAB = 4096, 131072


def main() -> None:
    options = arguments()
    if options.child:
        print(json.dumps(capture(options)))
        return
    folder = Path(tempfile.mkdtemp(prefix="nds-stream-", dir=options.folder))
    try:
        began = time.monotonic()
        size = write_checkpoint(folder, options.layers)
        result: dict[str, Any] = {"gigabytes": size / 1e9, "write_mb_s": size / 1e6 / (time.monotonic() - began)}
        for child in ["stream", *(["whole"] if options.whole else [])]:
            command = [sys.executable, __file__, "--child", child, "--folder", str(folder)]
            for name in ("layers", "tokens", "length", "device"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result[child] = json.loads(done.stdout.splitlines()[-1])
            print(child, result[child], file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    if options.whole:
        result["of_whole"] = result["whole"]["seconds"] / result["stream"]["seconds"]
        result["same_bits"] = result["whole"]["digest"] == result["stream"]["digest"]
    print(json.dumps(result, indent=None if options.json else 2))


def write_checkpoint(folder: Path, layers: int) -> int:
    """A NemotronH with random weights, a file a layer; its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from nemotron_dspark.recipe import tiny
    from nemotron_dspark.targets.skeleton import without_weights

    config = tiny.nemotron_h_config(PATTERN[:layers], VOCAB, HIDDEN, **SHAPES, dtype="bfloat16")
    with without_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = name.split("layers.")[-1].split(".")[0] if "layers." in name else "rest"
        groups.setdefault(f"model-{part}.safetensors", []).append(name)
    shapes, index = dict(model.named_parameters()), {}
    generator = torch.Generator().manual_seed(0)
    for file, names in groups.items():
        tensors = {name: random_weight(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    tiny.make_tokenizer(tiny._SENTENCES, 384).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def random_weight(name: str, like: Any, generator: Any) -> Any:
    """Of a size at which hidden states stay finite through all layers."""
    import torch

    if name.endswith("A_log"):
        return torch.rand(like.shape, generator=generator).to(like.dtype)
    if name.endswith(("norm.weight", ".D")) or "norm" in name:
        return torch.ones(like.shape, dtype=like.dtype)
    if like.dim() < 2:
        return torch.zeros(like.shape, dtype=like.dtype)
    block = torch.randn(1 << 20, generator=generator).to(like.dtype) / 64  # repeated: drawing 8e9 numbers takes minutes
    return block.repeat(-(-like.numel() // len(block)))[: like.numel()].view(like.shape).clone()


def capture(options: argparse.Namespace) -> dict[str, Any]:
    import hashlib

    import torch

    from nemotron_dspark.targets.streamed import StreamedTarget
    from nemotron_dspark.targets.target import Sequences, Target

    generator = torch.Generator().manual_seed(1)
    rows = max(1, (2048 if options.device == "cpu" else 4096) // options.length)
    count = max(1, options.tokens // options.length)
    ids = torch.randint(0, VOCAB, (count, options.length), generator=generator)
    batches = [Sequences(part) for part in ids.split(rows)]
    taps = tuple(options.layers * at // 4 for at in (1, 2, 3))
    before = anonymous()
    kind = StreamedTarget if options.child == "stream" else Target
    target = kind.load(str(options.folder), dtype="bfloat16", device=options.device)
    peak = Peak()
    digest = hashlib.sha256()
    list(target.captures([Sequences(ids[:1, :64])], taps))  # what is made once, kernels say
    began = time.monotonic()
    for found in target.captures(batches, taps):
        digest.update(found.last[..., :8].float().cpu().numpy().tobytes())
        digest.update(found.taps[..., :8].float().cpu().numpy().tobytes())
    seconds = time.monotonic() - began
    cuda = options.device != "cpu"
    result = {
        "seconds": seconds,
        "tokens_per_second": ids.numel() / seconds,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else (peak.stop() - before) / 1e6,
        "digest": digest.hexdigest(),
    }
    if isinstance(target, StreamedTarget):
        weights = target._weights
        largest = max(weights.bytes_of(layer) for layer in range(options.layers))
        states = ids.numel() * (len(taps) + 2) * HIDDEN * 2
        result |= {
            "limit_mb": (2 * largest + VOCAB * HIDDEN * 2 + states) / 1e6,
            "states_mb": states / 1e6,
            "read_mb_s": weights.read_bytes / 1e6 / weights.read_seconds,
            "waited": target._waited / target._captured,
        }
    return result


def anonymous() -> int:
    """Bytes of the process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")))


class Peak:
    """The highest `anonymous` from now on, looked at a hundred times a second."""

    def __init__(self) -> None:
        self._highest, self._over = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._highest = max(self._highest, anonymous())

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._highest


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=len(PATTERN), help="the first so many of the 52")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is written; default: /tmp")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=["stream", "whole"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
