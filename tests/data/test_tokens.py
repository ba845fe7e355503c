"""Tokenised samples on the disk are those of the file from end to end, by one process or by a pool, and made once."""

import json

import pytest
from transformers import AutoTokenizer

from nemotron_dspark import processes
from nemotron_dspark.chat.mask import predicts_loss_token
from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data import tokens
from nemotron_dspark.data.conversations import Skipped
from nemotron_dspark.data.samples import read_samples
from nemotron_dspark.data.tokens import TokenStore, read_report, tokenise, tokenised_chunks
from nemotron_dspark.errors import InputError
from tests.cache.conftest import write_conversations
from tests.kill9 import prepared_forkserver

DATA = DataConfig(min_loss_tokens=4, max_length=160)


@pytest.fixture(scope="module")
def tokenizer(tiny_hybrid):
    return AutoTokenizer.from_pretrained(tiny_hybrid)


@pytest.fixture(params=["alone", "pool"])
def by(request, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_BYTES", 500)
    if request.param == "pool":
        monkeypatch.setattr(tokens, "ALONE_BYTES", 0)
        monkeypatch.setattr(tokens.os, "cpu_count", lambda: 2)
        monkeypatch.setattr(processes, "START", prepared_forkserver())
    return request.param


def write(folder, file, tokenizer, **changes):
    settings = {"max_positions": 999, "mask_token_id": None, "inputs": {"a": 1}, **changes}
    return tokenise(folder, folder / "report.json", file, tokenizer, DATA, **settings)


def test_the_store_is_the_samples_of_the_file_in_its_order(tokenizer, tmp_path, by):
    file = write_conversations(tmp_path / "data.jsonl")
    lines = []
    store = write(tmp_path / "store", file, tokenizer, on_lines=lines.append)
    assert len(lines) > 6
    assert lines == sorted(lines)
    assert lines[-1] == len(file.read_bytes().splitlines())
    expected = list(read_samples(file, tokenizer, DATA))
    samples = [item.tokens for item in expected if not isinstance(item, Skipped)]
    skipped = [item for item in expected if isinstance(item, Skipped)]
    for number, (found, wanted) in enumerate(zip(store, samples, strict=True)):
        assert found.input_ids.tolist() == wanted.input_ids.tolist()
        assert found.loss_mask.tolist() == wanted.loss_mask.tolist()
        assert store.lengths[number] == len(wanted.input_ids)
        assert store.predicting[number] == predicts_loss_token(wanted.loss_mask).sum()
    tally, notes = read_report(tmp_path / "store/report.json")
    assert (tally.samples, tally.tokens, tally.skipped.total) == (len(samples), store.lengths.sum(), len(skipped))
    assert tally.loss_tokens == sum(sample.loss_tokens for sample in samples)
    assert not notes
    some = store.select(store.ids[5:9:2])
    assert [sample.input_ids.tolist() for sample in some] == [samples[n].input_ids.tolist() for n in (5, 7)]


def test_the_mask_token_is_refused_by_line(tokenizer, tmp_path, by):
    file = write_conversations(tmp_path / "data.jsonl")
    used = int(next(iter(read_samples(file, tokenizer, DATA))).tokens.input_ids[0])
    with pytest.raises(InputError, match=rf"data\.jsonl:1 contains the draft's mask token {used}"):
        write(tmp_path / "store", file, tokenizer, mask_token_id=used)


def test_an_answer_in_which_the_target_wrote_the_mask_token_is_left_out_and_counted(tokenizer, tmp_path):
    user = {"role": "user", "content": "State the block"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    said = tokenizer("one two three four five six", add_special_tokens=False)["input_ids"]
    answers = [[*said, 31], said, [*said[:2], 31, *said[2:]]]  # text has no trace of a special token
    rows = [
        {"messages": [user, {"role": "assistant", "content": "x", "token_ids": ids, "prompt_token_ids": prompt}]}
        for ids in answers
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = write(tmp_path / "store", file, tokenizer, mask_token_id=31)
    assert [sample.input_ids.tolist()[: len(prompt) + len(said)] for sample in store] == [[*prompt, *said]]
    tally, _ = read_report(tmp_path / "store/report.json")
    assert tally.skipped.total == 2


def test_finished_samples_are_read_back_and_others_made_again(tokenizer, tmp_path, monkeypatch):
    file = write_conversations(tmp_path / "data.jsonl")
    folder = tmp_path / "store"
    write(folder, file, tokenizer)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = []
    monkeypatch.setattr(tokens, "tokenised_chunks", lambda *given: made.append(1) or tokenised_chunks(*given))
    assert len(write(folder, file, tokenizer)) == len(TokenStore(folder))
    assert not made
    (folder / "tokens.bin").write_bytes(contents["tokens.bin"][:-1])  # as a kill may leave it
    write(folder, file, tokenizer)
    assert made == [1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    write(folder, file, tokenizer, inputs={"a": 2})
    assert made == [1, 1]
