"""Walk the forward paths on fake CUDA tensors, without a GPU: no mixed devices, no new host synchronisation.

    make cuda-dry-run

Needs a CUDA build of torch (an environment of its own, some 5 GB) and nothing else. Tensors have shapes, types and a
device, and no numbers: whoever reads one (`.tolist()`, `.item()`, an `if`) gets zeros, and is listed, because there a
real run waits for the GPU. So is every blocking copy between host and device. `WANTED` says why each of them has to be;
the command fails for one that is not in it, and for one in it that is gone. Backward does not run here.
"""

import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKAGE = "nemotron_dspark/"
CUDA = torch.device("cuda", 0)

from nemotron_dspark.decoding.decoder import Decoder  # noqa: E402
from nemotron_dspark.decoding.sampling import Sampling  # noqa: E402
from nemotron_dspark.drafts.config import DraftConfig, Eagle3Config  # noqa: E402
from nemotron_dspark.drafts.dspark import DSparkDraft  # noqa: E402
from nemotron_dspark.drafts.eagle3 import Eagle3Draft  # noqa: E402
from nemotron_dspark.recipe import tiny  # noqa: E402
from nemotron_dspark.targets import Target, spec_from_config  # noqa: E402
from nemotron_dspark.training.batches import Batch, collate, collate_unrolled  # noqa: E402
from nemotron_dspark.training.eagle3_objective import Eagle3Objective  # noqa: E402
from nemotron_dspark.training.objective import DSparkObjective, LossWeights  # noqa: E402
from nemotron_dspark.training.tiling import Tiling  # noqa: E402
from tests.training.conftest import Sample  # noqa: E402

# File and function: why the host has to wait there. Nothing that every micro-batch of training does is among them.
WANTED = {
    "decoding/decoder.py _pick": "the first token is the caller's, and may end the generation",
    "decoding/decoder.py _speculate": "what survives a round decides how states are cut, and is the caller's",
    "decoding/decoder.py start": "the prompt, once",
    "decoding/decoder.py step": "the last token of every row, which the host has chosen",
    "decoding/sampling.py pick": "a generation's random numbers are the host's: they are the same on every device",
    "decoding/sampling.py probabilities": "the rows' temperatures",
    "drafts/eagle3.py _look_back": "the rows' lengths, which the host keeps",
    "drafts/eagle3.py extend": "the rows' lengths, which the host keeps",
    "drafts/layers.py _chunks": "with train.attention=dense alone: half of the scores need not be computed then",
    "drafts/layers.py tables": "the rotary tables, once",
    "targets/state.py positions": "the rows' lengths, which the host keeps",
    "targets/target.py inputs": "the samples come from the host",
    "targets/target.py read": "the prompt, a chunk at a time",
}


class Watch(TorchDispatchMode):
    """Lists where the host waits for the GPU, and gives zeros to whoever reads a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, list[str]]] = {}  # "file function" to lines to the paths they are on
        self.path = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, given = func.overloadpacket.__name__, args[0] if args else None
        on_gpu = isinstance(given, torch.Tensor) and given.device.type == "cuda"
        if name == "_local_scalar_dense":
            if on_gpu:
                self.note("is read")
            elif not isinstance(given, FakeTensor) or given.constant is not None:
                return func(*args, **kwargs)
            return False if given.dtype == torch.bool else 0.0 if given.is_floating_point() else 0
        if name in ("nonzero", "unique_consecutive", "_unique2", "masked_select", "repeat_interleave") and on_gpu:
            self.note(name)
        if name == "_to_copy" and isinstance(given, torch.Tensor):
            to = torch.device(kwargs.get("device") or given.device)
            if to.type != given.device.type and not kwargs.get("non_blocking"):
                self.note(f"is copied from {given.device.type} to {to.type}")
        if name == "copy_" and args[0].device.type != args[1].device.type and not (len(args) > 2 and args[2]):
            self.note(f"is copied from {args[1].device.type} to {args[0].device.type}")
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if PACKAGE in frame.filename]
        if not frames:
            return
        frame = frames[-1]
        file = frame.filename[frame.filename.index(PACKAGE) + len(PACKAGE) :]
        paths = self.found.setdefault(f"{file} {frame.name}", {}).setdefault(f"{frame.lineno} {what}: {frame.line}", [])
        if self.path not in paths:
            paths.append(self.path)


def on_gpu(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` with fake CUDA tensors for parameters and buffers."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            fake = torch.empty(value.shape, dtype=dtype, device=CUDA)
            part._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
    return module


def shape(**more: object) -> dict[str, object]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "num_target_layers": 8,
    } | more


def samples() -> list[Sample]:
    """On the host, of two lengths, with the hidden states of five taps."""
    return [
        Sample(
            torch.arange(length) % 384,
            torch.arange(length) > 5,
            torch.zeros(length, 5 * 64, dtype=torch.bfloat16),
            torch.zeros(length, 64, dtype=torch.bfloat16),
        )
        for length in (40, 33)
    ]


def walk(watch: Watch, target: Target, dspark: DSparkDraft, eagle3: Eagle3Draft, batches: dict[str, Batch]) -> None:
    """Every path that runs on a GPU, forward."""
    on_gpu(target.model, torch.bfloat16)
    for draft in (dspark, eagle3):
        on_gpu(draft, torch.float32)
        embedding = torch.empty(384, 64, dtype=torch.bfloat16, device=CUDA)
        draft.set_embeddings(embedding, embedding, torch.bfloat16)
    ids = torch.zeros(2, 40, dtype=torch.long)
    for mask in (None, torch.arange(40) < torch.tensor([[40], [33]])):
        watch.path = "capture"
        captured = target.capture(ids, mask, (1, 3, 5))
        assert {captured.taps.device, captured.last.device} == {CUDA}
    watch.path = "verify and commit"
    state, _ = target.prefill(list(range(1, 20)), (1, 3, 5))
    target.verify(state, torch.zeros(1, 8, dtype=torch.long, device=CUDA))
    target.commit(state, [3])
    objectives = {
        "DSpark": DSparkObjective(dspark, LossWeights(), Tiling(64, 8)),
        "EAGLE-3": Eagle3Objective(eagle3, Tiling(64, 8)),
    }
    for name, batch in batches.items():
        watch.path = f"training, {name}"
        with torch.enable_grad():  # the objective makes its gradients in the forward
            loss = objectives[name.split(",")[0]](batch.to(CUDA))
        assert {part.device for part in (loss.total, loss.sums.to_tensor())} == {CUDA}
    for draft in (dspark, eagle3):
        for temperature in (0.0, 1.0):
            watch.path = f"decoding, {type(draft).__name__}, temperature {temperature:.0f}"
            sampling = Sampling(temperature=temperature, max_new_tokens=20, seed=0)
            with torch.no_grad():
                Decoder(target, draft).generate(list(range(1, 20)), sampling)


def main() -> int:
    torch.set_grad_enabled(False)
    config = tiny.nemotron_h_config("M-*EM-*-")
    tokenizer = tiny.make_tokenizer(["some words"], 384)
    model = tiny.random_model(config)
    dspark = DSparkDraft(
        DraftConfig(
            **shape(
                num_hidden_layers=2,
                block_size=7,
                mask_token_id=31,
                target_layer_ids=(0, 1, 3, 4, 5),
                num_anchors=4,
                markov_rank=16,
            )
        ),
        seed=0,
        attention="dense",  # FlexAttention compiles, and needs a GPU for it
    )
    eagle3 = Eagle3Draft(Eagle3Config(**shape(target_layer_ids=(0, 1, 3, 4, 5), ttt_length=3)), seed=0)
    batches = {  # DSpark's packed samples go through FlexAttention; with dense masks the host reads their lengths
        "DSpark": collate(samples(), [torch.tensor([6, 9, 20]), torch.tensor([7, 8])], 7),
        "EAGLE-3": collate_unrolled(samples(), 3),
        "EAGLE-3, packed": collate_unrolled(samples(), 3, packed=True),
    }
    watch = Watch()
    capability = mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0))  # experts ask for it
    with FakeTensorMode(allow_non_fake_inputs=True), watch, capability:
        target = Target(model, tokenizer, spec_from_config(config), ROOT)
        walk(watch, target, dspark, eagle3, batches)
    new, gone = sorted(watch.found.keys() - WANTED.keys()), sorted(WANTED.keys() - watch.found.keys())
    for place, lines in sorted(watch.found.items()):
        print(f"{place}: {WANTED.get(place, 'NOT WANTED')}")
        for line, paths in sorted(lines.items()):
            print(f"    {line}\n        {'; '.join(paths)}")
    for place in gone:
        print(f"{place}: no longer there; take it out of WANTED")
    print(f"No mixed devices. The host waits for the GPU in {len(watch.found)} places, {len(new)} of them not wanted.")
    return 1 if new or gone else 0


if __name__ == "__main__":
    sys.exit(main())
