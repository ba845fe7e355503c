"""A data file tokenised in pieces, here and by other processes, is the file tokenised from end to end."""

import pytest

from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data import pieces
from nemotron_dspark.data.conversations import Skipped
from nemotron_dspark.data.samples import read_samples
from tests.cache.conftest import write_conversations

DATA = DataConfig(min_loss_tokens=4, max_length=160)


@pytest.mark.parametrize("own", [1 << 30, 2_000])
def test_pieces_are_the_samples_of_the_file_in_its_order(tiny_hybrid, tmp_path, monkeypatch, own):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_hybrid)
    file = write_conversations(tmp_path / "data.jsonl")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    monkeypatch.setattr(pieces, "OWN_BYTES", own)
    found = list(pieces.tokenised_pieces(file, tokenizer, DATA, processes=2))
    assert len(found) > 6
    assert [piece.read for piece in found] == sorted(piece.read for piece in found)
    assert found[-1].read == 1.0
    assert found[-1].last_line == len(file.read_bytes().splitlines())
    expected = list(read_samples(file, tokenizer, DATA))
    samples = [(item.line, item.tokens) for item in expected if not isinstance(item, Skipped)]
    for (line, tokens), (wanted_line, wanted) in zip(sum((p.samples for p in found), ()), samples, strict=True):
        assert line == wanted_line
        assert tokens.input_ids.tolist() == wanted.input_ids.tolist()
        assert tokens.loss_mask.tolist() == wanted.loss_mask.tolist()
    assert sum((p.skipped for p in found), ()) == tuple(item for item in expected if isinstance(item, Skipped))
