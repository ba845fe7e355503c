"""A single flipped bit anywhere in a cache is found: by verify, which names the file, and when the cache is read."""

import re

import pytest
import typer
from typer.testing import CliRunner

from nemotron_dspark.cache.convert import convert_cache
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.cache.verify import verify, write_missing_checksums
from nemotron_dspark.cli import cache_command
from nemotron_dspark.config import CacheConfig
from nemotron_dspark.errors import InputError
from tests.cache.test_reader import samples
from tests.caches import write_cache
from tests.flips import flipped, places

FLIPS = 240


@pytest.fixture(scope="module", params=["deepspec", "compact"])
def cache(request, tmp_path_factory):
    """A few shards of short samples, so that a bit of each of their parts is flipped."""
    folder = tmp_path_factory.mktemp("flips") / "cache"
    write_cache(folder, samples([5, 9, 4, 7, 12, 3], 2, 8), taps=(0, 2), hidden_size=8, shard_bytes=900)
    if request.param == "deepspec":
        return folder
    convert_cache(folder, folder.with_name("compact"), CacheConfig(format="compact"))
    return folder.with_name("compact")


def read_all(folder):
    return [sample for sample in TargetCache(folder)]


def test_a_flipped_bit_anywhere_is_found_by_verify_and_when_it_is_read(cache):
    files = {path.name for path in cache.iterdir()}
    assert files >= {"manifest.json", "samples.idx", "samples.crc", "checksums.json"}
    found = places(cache, FLIPS)
    assert len(found) >= 200
    for path, bit in found:
        with flipped(path, bit):
            problems = verify(cache).problems
            assert any(path.name in problem for problem in problems), (path, bit, problems)
            with pytest.raises(InputError):
                read_all(cache)
    assert verify(cache).whole
    assert len(read_all(cache)) == 6


def test_a_file_that_is_gone_or_cut_off_is_found(cache):
    for path in sorted(cache.iterdir()):
        content = path.read_bytes()
        for change in (path.unlink, lambda path=path, content=content: path.write_bytes(content[:-2])):
            change()
            try:
                with pytest.raises(InputError, match=re.escape(path.name)):
                    read_all(cache)
                if path.is_file() or path.name != "manifest.json":
                    assert any(path.name in problem for problem in verify(cache).problems), path
            finally:
                path.write_bytes(content)
    assert verify(cache).whole


def test_a_shard_that_goes_while_the_cache_is_open_is_an_error_with_the_sample_in_it(cache):
    opened = TargetCache(cache)
    shard = cache / opened.layout.shard_files[-1]
    content = shard.read_bytes()
    last = len(opened) - 1
    shard.write_bytes(content[:20])
    with pytest.raises(InputError, match=rf"{shard.name}: sample {last} is cut off"):
        opened[last]
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: sample {last} cannot be read: No such file"):
        opened[last]
    shard.write_bytes(content)
    assert len(opened[last].input_ids) == 3


def test_a_cache_without_checksums_is_given_them_once(tmp_path):
    folder = tmp_path / "theirs"
    write_cache(folder, samples([5, 9, 4], 2, 8), taps=(0, 2), hidden_size=8, shard_bytes=900)
    ours = (folder / "samples.crc").read_bytes()
    for name in ("checksums.json", "samples.crc"):
        (folder / name).unlink()
    state = folder / TargetCache(folder).layout.shard_files[0], 8 * 100
    with flipped(*state):
        assert verify(folder).whole
        read_all(folder)  # nobody can tell
    nds = typer.Typer()
    cache_command.register(nds)
    said = CliRunner().invoke(nds, ["cache", "verify", str(folder), "--write-checksums"], catch_exceptions=False)
    assert "5 checksums" in said.stdout
    assert (folder / "samples.crc").read_bytes() == ours
    with flipped(*state), pytest.raises(InputError, match="sample 0 is not what was written"):
        read_all(folder)
    with pytest.raises(InputError, match="has checksums already"):
        write_missing_checksums(folder)
    (folder / "checksums.json").unlink()
    with flipped(*state), pytest.raises(InputError, match="sample 0 is not what was written"):
        write_missing_checksums(folder)
    write_missing_checksums(folder)
    assert verify(folder).whole
