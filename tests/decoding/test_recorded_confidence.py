"""Recorded confidence: one logit for every proposed draft of every round, the ones that the threshold judges."""

import torch

from nemotron_dspark.config import DraftSection
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import Threshold
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.targets import Target


def test_every_proposed_draft_has_its_logit(tiny_hybrid):
    target = Target.load(str(tiny_hybrid))
    section = DraftSection(num_layers=1, block_size=3, markov_rank=4, num_taps=2)
    draft = DSparkDraft(build_draft_config(target.spec, section, mask_token_id=31)[0], seed=1)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    with torch.no_grad():
        draft.confidence_head.proj.weight.normal_(0, 3)
    sampling = Sampling(temperature=1.0, seed=3, max_new_tokens=12)
    whole = Decoder(target, draft, record_confidence=True).generate([40, 41, 42], sampling)
    assert [len(logits) for logits in whole.confidence] == whole.proposed == [3] * whole.rounds
    assert Decoder(target, draft).generate([40, 41, 42], sampling).tokens == whole.tokens  # recording changes nothing
    cut = Decoder(target, draft, record_confidence=True, schedule=Threshold(0.5)).generate([40, 41, 42], sampling)
    assert [len(logits) for logits in cut.confidence] == cut.proposed
    assert min(cut.proposed) < 3
    assert all(logit >= 0 for logits in cut.confidence for logit in logits)
