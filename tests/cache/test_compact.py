"""A compact cache is small, opens in every reader of safetensors, and trains exactly as what it decodes to."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from nemotron_dspark.cache import convert as room
from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.cache.compact import CompactLayout, stored_bytes
from nemotron_dspark.cache.convert import convert_cache
from nemotron_dspark.cache.deepspec_layout import Manifest, bytes_per_token
from nemotron_dspark.cache.reader import TargetCache, read_layout
from nemotron_dspark.cache.verify import verify
from nemotron_dspark.chat.mask import predicts_loss_token
from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets import Target
from nemotron_dspark.training.anchors import loss_slots
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights
from nemotron_dspark.training.trainer import Trainer
from tests.cache.conftest import CACHE, DATA, SAMPLES, TAPS, write_conversations
from tests.drafts.conftest import small_draft
from tests.kill9 import apart, contents, kill_often

COMPACT = CACHE.model_copy(update={"format": "compact", "shard_bytes": 60_000})


@pytest.fixture(scope="session")
def compact(target, conversations, tmp_path_factory):
    """An undisturbed compact cache. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("cache") / "compact"
    build_cache(target, conversations, folder, taps=TAPS, data=DATA, cache=COMPACT)
    return folder


@pytest.fixture
def copy(compact, tmp_path):
    return shutil.copytree(compact, tmp_path / "copy")


def masks(count: int):
    generator = np.random.default_rng(0)
    yield from (np.zeros(5, bool), np.ones(5, bool), np.ones(1, bool))
    for _ in range(count):
        yield np.repeat(generator.random(12) < 0.6, generator.integers(1, 5, 12))


# --- what is kept ---


@pytest.mark.parametrize("block", [1, 3, 7])
def test_last_states_are_kept_exactly_where_a_slot_can_count(block):
    for mask in masks(30):
        loss = torch.from_numpy(mask)
        anchors = (loss[:-1] & loss[1:]).nonzero()[:, 0]
        rows, slots = loss_slots(loss, anchors, block).nonzero(as_tuple=True)
        predicted_from = set((anchors[rows] + slots).tolist())
        assert predicted_from == set(np.flatnonzero(predicts_loss_token(mask)).tolist())


def new_draft(hidden: int) -> DSparkDraft:
    return small_draft(hidden_size=hidden, vocab_size=512, mask_token_id=31, target_layer_ids=TAPS)


def test_the_loss_never_looks_at_the_others(built):
    cache, draft = TargetCache(built), new_draft(TargetCache(built).hidden_size)
    whole = [cache[number] for number in (0, 5, 11)]
    holes = []
    for sample in whole:
        last = torch.full_like(sample.last, torch.nan)
        used = predicts_loss_token(sample.loss_mask).nonzero()[:, 0]
        last[used] = sample.last[used]
        holes.append(dataclasses.replace(sample, last=last))
        assert last.isnan().any()
    losses = []
    for samples in (whole, holes):
        anchors = [(sample.loss_mask[:-1] & sample.loss_mask[1:]).nonzero()[:, 0] for sample in samples]
        batch = collate(samples, anchors, 4)
        losses.append(DSparkObjective(draft, LossWeights())(batch))
    assert losses[0].sums.to_tensor().equal(losses[1].sums.to_tensor())
    assert losses[0].sums.l1 > 0


# --- the format ---


def test_samples_are_the_targets_up_to_the_quantiser(built, compact):
    exact, found = TargetCache(built), TargetCache(compact)
    assert len(found) == SAMPLES
    assert found.lengths.tolist() == exact.lengths.tolist()
    assert (found.taps, found.hidden_size, found.target_name) == (exact.taps, exact.hidden_size, exact.target_name)
    for one, other in zip(exact, found, strict=True):
        assert other.input_ids.equal(one.input_ids)
        assert other.loss_mask.equal(one.loss_mask)
        assert (other.taps - one.taps).float().norm() < 0.1 * one.taps.float().norm()
        used = torch.zeros_like(one.loss_mask)
        used[:-1] = predicts_loss_token(one.loss_mask)
        assert (other.last - one.last)[used].float().norm() < 0.1 * one.last[used].float().norm()
        assert not other.last[~used].any()


def test_every_reader_of_safetensors_opens_the_shards(built, tmp_path):
    convert_cache(built, tmp_path / "c", COMPACT)
    cache, seen = TargetCache(tmp_path / "c"), 0
    assert len(cache.layout.shard_files) > 1
    for name in cache.layout.shard_files:
        tensors = load_file(tmp_path / "c" / name)
        starts, last = tensors["cu_seqlens"], tensors["cu_last"]
        for first, stop, kept in zip(starts[:-1], starts[1:], last.diff(), strict=True):
            sample = cache[seen]
            assert tensors["input_ids"][first:stop].equal(sample.input_ids.int())
            assert tensors["loss_mask"][first:stop].equal(sample.loss_mask.to(torch.uint8))
            assert kept == predicts_loss_token(sample.loss_mask).sum()
            seen += 1
        assert {len(tensor) for key, tensor in tensors.items() if key.startswith("taps.")} == {int(starts[-1])}
        assert {len(tensor) for key, tensor in tensors.items() if key.startswith("last.")} == {int(last[-1])}
    assert seen == SAMPLES


def test_the_layout_covers_every_byte_once():
    generator = np.random.default_rng(4)
    lengths = generator.integers(1, 30, 50)
    kept = generator.integers(0, lengths)
    kept[:9] = 0
    settings = {"taps": (0, 3, 4), "hidden_size": 96}
    layout = CompactLayout.of(lengths, kept, shard_bytes=9_000, **settings)
    sizes = stored_bytes(lengths, kept, num_taps=3, hidden_size=96)
    assert len(layout.shard_files) > 3
    for shard, size in enumerate(layout.shard_sizes):
        begun = len(layout.preamble(shard))
        assert begun % 8 == 0
        samples = np.flatnonzero(layout.shards == shard)
        assert len(samples) == 1 or sizes[samples].sum() <= 9_000
        spans = sorted(field for sample in samples for field in layout.fields(int(sample)) if field[1])
        for offset, length in spans:
            assert offset == begun
            begun += length
        assert begun == size
        for sample in samples.tolist():
            assert layout.sample_bytes(sample) + 16 == sizes[sample]
    assert sum(map(layout.sample_bytes, range(50))) < sum(layout.shard_sizes) < sizes.sum() + 3_000 * (shard + 1)


def test_an_empty_cache_is_a_cache():
    layout = CompactLayout.of([], [], taps=(1,), hidden_size=64, shard_bytes=9)
    assert (layout.shard_files, len(layout.records)) == ((), 0)


def test_a_sample_is_refused_whose_last_states_were_not_laid_out(compact):
    layout = read_layout(compact)
    sample = TargetCache(compact)[0]
    with pytest.raises(ValueError, match="last states"):
        layout.encode(0, sample.input_ids.numpy(), np.zeros(len(sample.input_ids)), sample.taps, sample.last)


@pytest.mark.parametrize("hidden", [2048, 2688, 3072, 3136, 4096, 4480, 5120, 8192])
def test_at_most_030_of_deepspecs_bytes(hidden):
    """For the hidden sizes of the known targets and five taps, even where every token carries loss."""
    size = stored_bytes(1000, 999, num_taps=5, hidden_size=hidden)
    assert size <= 0.30 * 1000 * bytes_per_token(5, hidden)


# --- faults ---


def build_and_kill(target_folder: str, conversations: str, folder: Path):
    target = Target.load(target_folder)

    def build(folder: Path) -> None:
        build_cache(target, conversations, folder, taps=TAPS, data=DATA, cache=COMPACT)

    return kill_often(build, folder, 4, seed=11)[0]


def test_resumed_after_kill_9_equals_undisturbed(tiny_hybrid, tmp_path):
    data = write_conversations(tmp_path / "data.jsonl", 12)
    first, *killed = apart(build_and_kill, str(tiny_hybrid), str(data), tmp_path)
    assert any(name.endswith(".safetensors") for name in contents(first))
    for folder in killed:
        assert contents(folder) == contents(first)


def read_all(folder: Path) -> None:
    for _ in TargetCache(folder):
        pass


def test_a_flipped_bit_anywhere_is_found(copy):
    """In every file and in every tensor of a shard: when it is opened or read, and by verify."""
    read_all(copy)
    layout = read_layout(copy)
    places = [
        (name, at) for name in ("manifest.json", "samples.idx", "samples.crc", "checksums.json") for at in (3, -9)
    ]
    shard = copy / layout.shard_files[1]
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    places += [(shard.name, at) for at in (2, 9, 8 + header // 2, 8 + header + 9, len(layout.preamble(1)) - 5)]
    sample = int(np.flatnonzero(layout.shards == 1)[2])
    places += [(shard.name, offset + size // 2) for offset, size in layout.fields(sample)]
    for name, at in places:
        path = copy / name
        whole = path.read_bytes()
        data = bytearray(whole)
        data[at] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_all(copy)
        assert str(copy) in caught.value.what, (name, at)
        assert not verify(copy).whole, (name, at)
        path.write_bytes(whole)
    assert verify(copy).whole


def test_values_are_checked_where_there_are_no_checksums(copy):
    for name in ("checksums.json", "samples.crc"):
        (copy / name).unlink()
    assert verify(copy).whole
    layout = read_layout(copy)
    names = [column.name for column in layout.columns]
    path = copy / layout.shard_files[0]
    data = bytearray(path.read_bytes())
    fields = dict(zip(names, layout.fields(2), strict=True))
    data[fields["input_ids"][0] + 3] = 0xFF
    data[fields["loss_mask"][0]] = 7
    data[fields["taps.scales"][0] : fields["taps.scales"][0] + 2] = b"\x80\x7f"  # infinity
    path.write_bytes(data)
    problems = "\n".join(verify(copy).problems)
    assert problems.count("sample 2") == 3
    for said in ("negative token id", "mask with values", "not finite"):
        assert said in problems


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version = 2 is not accepted: input should be 1"),
        ({"quantisation": "int8"}, "stored as 'int8'; only int4 is read"),
        ({"hidden_size": ...}, "has no hidden_size"),
        ({"shards": [3]}, r"shards\.0 = 3 is not accepted"),
        ({"num_samples": 7}, f"num_samples = 7 .*the shards hold {SAMPLES}"),
        ({"target_layer_ids": [4, 1]}, "layers must ascend"),
        ({"format": "other"}, "format other"),
    ],
)
def test_a_manifest_that_cannot_be_true(copy, changes, said):
    path = copy / "manifest.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(InputError, match=said):
        TargetCache(copy)
    assert not verify(copy).whole


def test_an_index_that_cannot_be_true(copy):
    path = copy / "samples.idx"
    records = np.fromfile(path, dtype=read_layout(copy).records.dtype)
    for field, value, said in (("tokens", 0, "sample 4 cannot"), ("last", 999, "sample 4 cannot")):
        changed = records.copy()
        changed[field][4] = value
        changed.tofile(path)
        with pytest.raises(InputError, match=said):
            TargetCache(copy)
    path.write_bytes(records.tobytes()[:-1])
    with pytest.raises(InputError, match=r"samples\.idx has"):
        TargetCache(copy)


def test_a_missing_shard_is_named(copy):
    (copy / "shard-00001.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is missing"):
        TargetCache(copy)


def test_another_format_is_another_build(target, conversations, copy):
    again = COMPACT.model_copy(update={"format": "deepspec"})
    with pytest.raises(InputError, match=r"cache\.format was 'compact'"):
        build_cache(target, conversations, copy, taps=TAPS, data=DATA, cache=again)


def test_deepspec_is_told_to_convert(compact):
    with pytest.raises(InputError) as caught:
        Manifest.read(compact)
    assert "nds cache convert" in caught.value.do


# --- converting ---


def test_converting_there_and_back(built, compact, tmp_path):
    there = convert_cache(built, tmp_path / "there", COMPACT)
    assert there.format == "compact, int4"
    assert there.bytes < 0.4 * there.source_bytes
    for name in (path.name for path in compact.iterdir() if path.suffix in (".safetensors", ".idx", ".crc")):
        assert (tmp_path / "there" / name).read_bytes() == (compact / name).read_bytes()  # as if it had been built so
    back = convert_cache(tmp_path / "there", tmp_path / "back", CACHE)
    assert back.format == "deepspec, bf16"
    assert verify(tmp_path / "back").whole
    for one, other in zip(TargetCache(tmp_path / "there"), TargetCache(tmp_path / "back"), strict=True):
        for field in dataclasses.fields(one):
            assert getattr(one, field.name).equal(getattr(other, field.name))
    for name in ("samples.idx", "manifest.json"):
        assert (tmp_path / "back" / name).read_bytes() == (built / name).read_bytes()


def test_a_conversion_goes_on_where_it_was_stopped(built, compact, tmp_path, monkeypatch):
    def stop(progress):
        if progress.samples == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(room, "_COMMIT_BYTES", 10_000)
    with pytest.raises(KeyboardInterrupt):
        convert_cache(built, tmp_path / "c", COMPACT, on_progress=stop)
    with pytest.raises(InputError, match="unfinished"):
        TargetCache(tmp_path / "c")
    with pytest.raises(InputError, match="other settings"):
        convert_cache(built, tmp_path / "c", COMPACT.model_copy(update={"shard_bytes": 50_000}))
    report = convert_cache(built, tmp_path / "c", COMPACT)
    assert 0 < report.reused_samples <= 20
    whole = convert_cache(built, tmp_path / "whole", COMPACT)
    assert whole.reused_samples == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert convert_cache(built, tmp_path / "c", COMPACT).reused_samples == SAMPLES


def test_what_cannot_be_converted(built, compact, tmp_path, monkeypatch):
    for source, settings in ((built, CACHE), (compact, COMPACT)):
        with pytest.raises(InputError, match="already"):
            convert_cache(source, tmp_path / "c", settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="holds other files"):
        convert_cache(built, tmp_path / "full", COMPACT)
    damaged = shutil.copytree(built, tmp_path / "damaged")
    path = damaged / "shard-00001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(InputError, match="checksum differs"):
        convert_cache(damaged, tmp_path / "c", COMPACT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(EnvironmentFault, match="MB more"):
        convert_cache(built, tmp_path / "d", COMPACT)


@pytest.fixture
def nds():
    from nemotron_dspark.cli import cache_command

    app = typer.Typer()
    cache_command.register(app)
    return lambda *words: CliRunner().invoke(app, ["cache", *map(str, words)], catch_exceptions=False)


def test_the_commands_know_both_formats(nds, tiny_hybrid, conversations, compact, built, tmp_path):
    words = ("--target", tiny_hybrid, "--data", conversations, "--out", tmp_path / "c", "--taps", "1,4", "--json")
    made = json.loads(nds("build", *words, "--set", "data.min_loss_tokens=4", "--cache-format", "compact").stdout)
    assert json.loads(nds("info", tmp_path / "c", "--json").stdout)["format"] == "compact, int4"
    assert "compact, int4" in nds("info", compact).stdout
    assert nds("verify", compact).exit_code == 0
    found = json.loads(nds("convert", tmp_path / "c", "--out", tmp_path / "d", "--to", "deepspec", "--json").stdout)
    assert (found["samples"], found["source_bytes"]) == (made["samples"], made["bytes"])
    shown = nds("convert", built, "--out", tmp_path / "e", "--to", "compact").stdout
    assert "compact, int4" in shown
    with pytest.raises(InputError, match="'deepspec' or 'compact'"):
        nds("convert", built, "--out", tmp_path / "f", "--to", "tiny")


# --- training ---


def test_training_on_a_compact_cache_is_training_on_what_it_decodes_to(compact, tmp_path):
    convert_cache(compact, tmp_path / "decoded", CACHE)
    config = TrainConfig(
        local_batch_size=3, global_batch_size=6, max_steps=4, num_anchors=12, log_every=1, device="cpu", seed=5
    )
    weights = []
    for folder in (compact, tmp_path / "decoded"):
        draft = new_draft(TargetCache(folder).hidden_size)
        Trainer(TargetCache(folder), draft, config, tmp_path / f"run-{folder.name}").run()
        weights.append(draft.trainable_parameters())
    for name, value in weights[0].items():
        assert value.equal(weights[1][name]), name
