"""A damaged cache is refused with the file and the sample named; verify lists everything that is wrong."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from nemotron_dspark.cache.deepspec_layout import RECORD, DeepSpecLayout, Manifest, bytes_per_token, field_sizes
from nemotron_dspark.cache.reader import Sample, TargetCache
from nemotron_dspark.cache.verify import check_mask_token, length_bins, summarise, verify
from nemotron_dspark.cache.writer import CacheWriter
from nemotron_dspark.errors import CheckError, InputError
from tests.cache.conftest import SAMPLES
from tests.caches import write_cache


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_record(folder, sample, field, value):
    index = np.fromfile(folder / "samples.idx", dtype=RECORD)
    index[field][sample] = value
    index.tofile(folder / "samples.idx")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 3}, r"version = 3 is not accepted: input should be 2"),
        ({"hidden_dtype": "float16"}, "hidden_dtype = 'float16'"),
        ({"index_record_size": 48}, "index_record_size = 48"),
        ({"hidden_size": ...}, "has no hidden_size"),
        ({"shards": [3]}, r"shards\.0 = 3 is not accepted"),
        ({"num_shards": 1}, "num_shards = 1 is not accepted: there are 13 shards"),
        ({"target_layer_ids": [4, 1]}, "layers must ascend"),
        ({"target_layer_ids": []}, r"target_layer_ids = \[\]"),
        ({"num_samples": "9"}, "num_samples = '9' is not accepted"),
        ({"num_samples": 99}, "promises 99 samples"),
        ({"shards": [{"shard_id": 0, "file_name": "../x"}], "num_shards": 1}, r"shards\.0\.file_name = '\.\./x'"),
    ],
)
def test_a_manifest_that_cannot_be_true(copy, changes, said):
    edit_manifest(copy, **changes)
    with pytest.raises(InputError, match=said):
        TargetCache(copy)


def test_a_manifest_that_is_not_json(copy):
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is not valid JSON"):
        TargetCache(copy)
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="JSON object"):
        TargetCache(copy)


def test_a_folder_that_is_no_cache(tmp_path):
    with pytest.raises(InputError, match="not a target cache"):
        TargetCache(tmp_path)


def test_a_missing_shard_is_named(copy):
    (copy / "shard-00001.bin").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.bin is missing"):
        TargetCache(copy)
    assert any("shard-00001.bin is missing" in problem for problem in verify(copy).problems)


def test_a_truncated_shard_names_the_first_sample_it_lacks(copy):
    path = copy / "shard-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    last = int(np.flatnonzero(read_index(copy)["shard_id"] == 1)[-1])
    with pytest.raises(InputError, match=rf"shard-00001\.bin is too short for sample {last}"):
        TargetCache(copy)


def read_index(folder):
    return np.fromfile(folder / "samples.idx", dtype=RECORD)


def test_a_truncated_or_missing_index(copy):
    data = (copy / "samples.idx").read_bytes()
    (copy / "samples.idx").write_bytes(data[:-3])
    with pytest.raises(InputError, match=r"samples\.idx has"):
        TargetCache(copy)
    assert not verify(copy).whole
    (copy / "samples.idx").unlink()
    with pytest.raises(InputError, match=r"samples\.idx is missing"):
        TargetCache(copy)
    assert not verify(copy).whole


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sample_id", 9, "sample 5 has the id 9"),
        ("shard_id", 77, "sample 5 lies in shard 77"),
        ("seq_len", 0, "sample 5 is empty"),
        ("seq_len", 2**31, "too short for sample 5"),
        ("taps", 2**63, "too short for sample 5"),
    ],
)
def test_a_record_that_cannot_be_true_names_its_sample(copy, field, value, said):
    edit_record(copy, 5, field, value)
    with pytest.raises(InputError, match=said):
        TargetCache(copy)
    assert any(said in problem for problem in verify(copy).problems)


def test_a_flipped_bit_anywhere_is_found(copy):
    for name in ("shard-00000.bin", "samples.idx", "build.json"):
        flip(copy / name, 60)
    problems = verify(copy).problems
    assert sum("checksum differs" in problem for problem in problems) == 3


def test_values_are_checked_where_there_are_no_checksums(copy):
    (copy / "checksums.json").unlink()
    (copy / "samples.crc").unlink()
    assert verify(copy).whole
    assert verify(copy).files_with_checksums == 0
    record = read_index(copy)[2]
    path = copy / f"shard-{record['shard_id']:05d}.bin"
    data = bytearray(path.read_bytes())
    data[int(record["input_ids"]) + 3] = 0xFF
    data[int(record["attention_mask"])] = 0
    data[int(record["last"]) : int(record["last"]) + 2] = b"\x80\x7f"  # infinity
    path.write_bytes(data)
    problems = "\n".join(verify(copy).problems)
    assert problems.count("sample 2") == 3
    for said in ("negative token id", "mask with values", "not finite"):
        assert said in problems


def test_checksums_that_are_broken_themselves_are_a_problem(copy):
    text = (copy / "checksums.json").read_text()
    (copy / "checksums.json").write_text("{")
    assert any("checksums.json" in problem for problem in verify(copy).problems)
    (copy / "checksums.json").write_text(text.replace("sha256", "sha257"))
    assert any("does not hold" in problem for problem in verify(copy).problems)
    with pytest.raises(InputError, match=r"checksums\.json"):
        TargetCache(copy)


def test_a_damaged_sample_is_refused_when_it_is_read(copy):
    sample = 7
    record = read_index(copy)[sample]
    flip(copy / f"shard-{record['shard_id']:05d}.bin", int(record["taps"]) + 33)
    cache = TargetCache(copy)
    assert len(cache[sample - 1].input_ids)
    with pytest.raises(
        InputError, match=rf"shard-0000{record['shard_id']}\.bin: sample {sample} is not what was written"
    ):
        cache[sample]


def test_a_mask_token_in_the_data_is_found(built):
    cache = TargetCache(built)
    check_mask_token(cache, 31)
    with pytest.raises(InputError, match="Sample 0"):
        check_mask_token(cache, int(cache[0].input_ids[3]))


def test_samples_own_their_memory_and_readers_travel_to_workers(built):
    cache = TargetCache(built)
    first = cache[0]
    first.taps.zero_()
    assert cache[0].taps.any()
    copied = pickle.loads(pickle.dumps(cache))  # noqa: S301 - what a data loader's workers do
    assert torch.equal(copied[7].last, cache[7].last)
    with pytest.raises(IndexError):
        cache[SAMPLES]


def samples(lengths, taps, hidden, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        yield Sample(
            torch.randint(0, 99, (length,), generator=generator),
            torch.rand(length, generator=generator) > 0.5,
            torch.randn(length, taps * hidden, generator=generator).bfloat16(),
            torch.randn(length, hidden, generator=generator).bfloat16(),
        )


def test_what_is_written_is_what_is_read(tmp_path):
    lengths = [3, 1, 8, 5, 2]
    given = list(samples(lengths, 3, 4))
    write_cache(tmp_path / "c", given, taps=(0, 2, 5), hidden_size=4, shard_bytes=400)
    cache = TargetCache(tmp_path / "c")
    assert cache.lengths.tolist() == lengths
    assert len(cache.layout.shard_files) == 3
    for expected, found in zip(given, cache, strict=True):
        for name in ("input_ids", "loss_mask", "taps", "last"):
            assert torch.equal(getattr(expected, name), getattr(found, name))
    assert verify(tmp_path / "c").whole


def test_samples_may_be_written_in_any_order(tmp_path):
    lengths = np.asarray([3, 1, 8, 5, 2])
    given = list(samples(lengths, 1, 4))
    settings = {"taps": (0,), "hidden_size": 4, "shard_bytes": 200}
    write_cache(tmp_path / "a", given, **settings)
    with CacheWriter(tmp_path / "b", DeepSpecLayout.of(lengths, **settings)) as writer:
        for number in (4, 2, 0, 1, 3):
            sample = given[number]
            arrays = sample.input_ids.int().numpy(), sample.loss_mask.numpy(), sample.taps, sample.last
            writer.commit({number: writer.files.write(number, *arrays)})
        writer.finish()
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_incomplete_cache_cannot_be_finished(tmp_path):
    layout = DeepSpecLayout.of([2, 3], taps=(0,), hidden_size=4, shard_bytes=999)
    with CacheWriter(tmp_path / "c", layout) as writer, pytest.raises(CheckError, match="2 samples"):
        writer.finish()


def test_a_sample_larger_than_a_shard_has_one_to_itself():
    layout = DeepSpecLayout.of([2, 50, 2, 2], taps=(0,), hidden_size=4, shard_bytes=5 * bytes_per_token(1, 4))
    assert layout.shards.tolist() == [0, 1, 2, 2]
    assert sum(layout.shard_sizes) == 56 * bytes_per_token(1, 4)
    assert sum(field_sizes(1, 1, 4)) == bytes_per_token(1, 4)


def test_the_manifest_survives_its_own_writing(tmp_path):
    extra = {"target_model_name_or_path": "t", "max_length": 4}
    layout = DeepSpecLayout.of([], taps=(-1, 3), hidden_size=8, shard_bytes=9, extra=extra)
    (tmp_path / "manifest.json").write_bytes(layout.manifest())
    found = Manifest.read(tmp_path)
    assert (found.num_samples, found.target_layer_ids, found.hidden_size) == (0, [-1, 3], 8)
    assert (found.shard_files, found.extra) == ([], extra)


def test_a_cache_in_numbers(built):
    info, cache = summarise(built), TargetCache(built)
    assert info.tokens == cache.lengths.sum()
    assert info.loss_tokens == sum(int(sample.loss_mask.sum()) for sample in cache)
    assert info.bytes == info.tokens * info.bytes_per_token
    assert sum(bin_.samples for bin_ in info.lengths) == SAMPLES
    assert (info.lengths[0].first, info.lengths[-1].last) == (cache.lengths.min(), cache.lengths.max())


@pytest.mark.parametrize("lengths", [[], [5], [5, 5], [1, 100], list(range(1, 60))])
def test_bins_hold_every_sample_once(lengths):
    bins = length_bins(np.asarray(lengths, dtype=np.int64))
    assert sum(bin_.samples for bin_ in bins) == len(lengths)
    assert len(bins) <= 8
    for bin_ in bins:
        assert sum(bin_.first <= length <= bin_.last for length in lengths) == bin_.samples


@pytest.fixture
def nds():
    from nemotron_dspark.cli import cache_command

    app = typer.Typer()
    cache_command.register(app)
    return lambda *words: CliRunner().invoke(app, ["cache", *map(str, words)], catch_exceptions=False)


def test_verify_exits_with_1_and_one_line_per_problem(copy, nds):
    assert nds("verify", copy).exit_code == 0
    flip(copy / "shard-00000.bin", 9)
    edit_record(copy, 5, "sample_id", 9)
    result = nds("verify", copy)
    assert result.exit_code == 1
    assert len(result.stdout.strip().splitlines()) == 3
    assert json.loads(nds("verify", copy, "--json").stdout)["whole"] is False


def test_info_prints_numbers_and_bars(built, nds):
    found = json.loads(nds("info", built, "--json").stdout)
    assert found["samples"] == SAMPLES
    shown = nds("info", built).stdout
    assert "█" in shown
    assert f"{found['bytes_per_token']:,} bytes a token" in shown


def test_the_build_command(tiny_hybrid, conversations, tmp_path, nds):
    words = ("build", "--target", tiny_hybrid, "--data", conversations, "--out", tmp_path / "c", "--taps", "1,4")
    result = nds(*words, "--set", "data.min_loss_tokens=4", "--json")
    found = json.loads(result.stdout)
    assert (found["samples"], found["taps"], found["mask_token_id"]) == (SAMPLES, [1, 4], 31)
    shown = nds(*words, "--set", "data.min_loss_tokens=4").stdout
    assert "36 of them from an earlier run" in shown
    assert "1 skipped: not valid JSON (line 5)" in shown


def test_taps_that_are_no_list_are_refused(tiny_hybrid, conversations, tmp_path, nds):
    with pytest.raises(InputError, match=r"draft\.taps = 'many'"):
        nds("build", "--target", tiny_hybrid, "--data", conversations, "--out", tmp_path / "c", "--taps", "many")
