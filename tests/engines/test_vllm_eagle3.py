"""vLLM serves an exported EAGLE-3 draft on a CPU, and keeps the tokens that our decoder keeps.

NDS_VLLM_PYTHON is its interpreter.
"""

import json
import os
import subprocess
from collections import Counter

import pytest
import torch

from nemotron_dspark import Decoder, Sampling, Target, load_config
from nemotron_dspark.drafts.config import build_eagle3_config
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.engines.exchange import export_draft
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint

PYTHON = os.environ.get("NDS_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="NDS_VLLM_PYTHON is not set; make test-engines sets it"),
]
STEPS = 3
PROMPTS = [list(range(40, 60)), list(range(300, 330))]
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
target, draft, steps, prompts = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
speculative = {"method": "eagle3", "model": draft, "num_speculative_tokens": steps}
model = LLM(
    target, dtype="float32", max_model_len=128, enforce_eager=True, max_num_seqs=2, disable_log_stats=False,
    speculative_config=speculative,
)
how = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
answers = model.generate([{"prompt_token_ids": ids} for ids in prompts], how)
found = {metric.name: metric for metric in model.get_metrics()}
print(json.dumps({
    "tokens": [answer.outputs[0].token_ids for answer in answers],
    "rounds": found["vllm:spec_decode_num_drafts"].value,
    "kept": found["vllm:spec_decode_num_accepted_tokens_per_pos"].values,
}))
"""


@torch.no_grad()
def draft_of_the_token_before(target: Target) -> Eagle3Draft:
    """A draft that mostly says the token it reads again: a target with random weights repeats itself."""
    taps = list(range(target.spec.num_layers - 6, target.spec.num_layers - 1))
    section = load_config(str(target.spec.name), draft={"taps": taps}).draft
    draft = Eagle3Draft(build_eagle3_config(target.spec, section, ttt_length=STEPS)[0])
    generator = torch.Generator().manual_seed(1)
    for parameter in draft.trainable_parameters().values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    attention, width = draft.layers[0].self_attn, draft.config.head_dim
    groups = attention.heads // attention.kv_heads
    for at in range(min(attention.kv_heads * width, draft.config.hidden_size)):
        attention.v_proj.weight[at, at] += 1  # of the embedding, which is the first half of what is read
        for group in range(groups):
            attention.o_proj.weight[at, (at // width * groups + group) * width + at % width] += 4 / groups
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    return draft.eval()


def test_vllm_keeps_the_tokens_of_an_eagle3_draft_that_we_keep(tmp_path):
    # vLLM's attention on a CPU has no heads of 16
    shape = {"num_hidden_layers": 7, "head_dim": 32, "tie_word_embeddings": True}
    folder = tiny.random_target(tmp_path / "target", family="llama", **shape)
    target = Target.of(load_config(str(folder)).target)
    draft = draft_of_the_token_before(target)
    draft.save(tmp_path / "draft", slim=True)
    export_draft(tmp_path / "draft", "vllm", tmp_path / "exported", Checkpoint.find(folder))
    decoder, how = Decoder(target, draft), Sampling(temperature=0.0, max_new_tokens=40)
    ours = [decoder.generate(ids, how) for ids in PROMPTS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, "-c", SERVE, str(folder), str(tmp_path / "exported"), str(STEPS), json.dumps(PROMPTS)],
        env=environment
        | {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["tokens"] == [one.tokens for one in ours]
    survived = Counter(count for one in ours for count in one.survived)
    kept = [sum(survived[count] for count in range(slot + 1, STEPS + 1)) for slot in range(STEPS)]
    assert sum(kept) > 20
    assert theirs["kept"] == kept
    assert theirs["rounds"] == sum(one.rounds for one in ours)
