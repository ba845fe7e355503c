"""Only the embedding and the head leave the disk, from any layout; whatever is wrong with a file is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.weights import INDEX, parameter_count, read_embedding_and_head


@pytest.fixture(scope="module")
def model():
    return tiny.random_model(tiny.nemotron_h_config("M-*-", hidden_size=32))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def spec(folder):
    return Checkpoint.find(folder).read_spec()


def shard(folder, renamed=None):
    """Split the folder's model.safetensors in two, embedding in the first and head in the last, with an index."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {(renamed or {}).get(name, name): tensor for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: "lm_head" in name)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_single_file_and_shards_give_the_models_own_tensors(folder, spec, model):
    single = read_embedding_and_head(folder, spec)
    count = parameter_count(folder)
    shard(folder)
    sharded = read_embedding_and_head(folder, spec)
    for read in (single, sharded):
        assert torch.equal(read.embedding, model.get_input_embeddings().weight)
        assert torch.equal(read.head, model.get_output_embeddings().weight)
    assert count == parameter_count(folder) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "spelling", ["backbone.embeddings.weight", "backbone.embedding.weight", "model.embeddings.weight"]
)
def test_every_spelling_of_the_embedding_is_found(folder, spec, model, spelling):
    saved = next(name for name in load_file(folder / "model.safetensors") if "embedding" in name)
    shard(folder, {saved: spelling})
    assert torch.equal(read_embedding_and_head(folder, spec).embedding, model.get_input_embeddings().weight)


def test_a_tied_head_is_the_embedding(tmp_path):
    tied = tiny.random_model(tiny.decoder_config("llama", hidden_size=32, num_layers=2, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    read = read_embedding_and_head(tmp_path, Checkpoint.find(tmp_path).read_spec())
    assert read.head is read.embedding
    assert torch.equal(read.head, tied.get_output_embeddings().weight)
    assert parameter_count(tmp_path) == sum(p.numel() for p in tied.parameters())


def test_a_missing_shard_is_named(folder, spec):
    last = shard(folder)["lm_head.weight"]
    (folder / last).unlink()
    with pytest.raises(InputError, match=f"{last}.*lm_head.weight.*does not exist"):
        read_embedding_and_head(folder, spec)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("split", [False, True])
def test_a_truncated_file_is_named(folder, spec, keep, split):
    file = shard(folder)["lm_head.weight"] if split else "model.safetensors"
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:keep])
    with pytest.raises(InputError, match=f"{file}.*truncated"):
        read_embedding_and_head(folder, spec)
    with pytest.raises(InputError, match=f"{file}.*truncated"):
        parameter_count(folder)


def test_a_file_that_is_not_safetensors_is_named(folder, spec):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_embedding_and_head(folder, spec)


def test_a_shard_without_the_promised_tensor_is_named(folder, spec):
    file = shard(folder)["lm_head.weight"]
    tensors = load_file(folder / file)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / file)
    with pytest.raises(InputError, match=r"does not hold lm_head\.weight"):
        read_embedding_and_head(folder, spec)


def test_a_missing_tensor_is_named(folder, spec):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no tensor lm_head\.weight"):
        read_embedding_and_head(folder, spec)


def test_a_tensor_of_another_shape_or_type_is_named(folder, spec):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:-1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight.*shape \(383, 32\).*\(384, 32\)"):
        read_embedding_and_head(folder, spec)
    packed = torch.zeros(384, 32, dtype=torch.uint8)
    save_file({**tensors, "lm_head.weight": packed}, folder / "model.safetensors")
    with pytest.raises(InputError, match="uint8"):
        read_embedding_and_head(folder, spec)


def test_a_folder_without_safetensors_is_refused(folder, spec):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no safetensors"):
        read_embedding_and_head(folder, spec)
    assert parameter_count(folder) is None


@pytest.mark.parametrize("index", ["not json", "[]", "{}"])
def test_a_broken_index_is_named(folder, spec, index):
    (folder / INDEX).write_text(index)
    with pytest.raises(InputError, match=INDEX):
        read_embedding_and_head(folder, spec)
