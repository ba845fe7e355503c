"""On a CPU a target of some size takes bf16 where that is measured to be faster, and a job keeps what it began with."""

import logging

import pytest
import torch

from nemotron_dspark import stages
from nemotron_dspark.config import load_config
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Checkpoint, Target, cpu_dtype
from tests.training import small_cache
from tests.training.test_mask_token import data  # noqa: F401  (a fixture)


@pytest.fixture
def bf16(tmp_path):
    """A tiny llama that was saved in bf16."""
    folder = tiny.random_target(tmp_path / "target", "llama")
    Target.load(str(folder), dtype="bfloat16").model.save_pretrained(folder)
    return folder


@pytest.fixture
def faster(monkeypatch):
    """Set how much faster bf16 is found to be; targets of any size are measured."""

    def set_gain(gain):
        cpu_dtype._measured.cache_clear()
        monkeypatch.setattr(cpu_dtype, "_gain", lambda hidden, rows: gain)
        monkeypatch.setattr(cpu_dtype, "MEASURED_FROM", 0)

    yield set_gain
    cpu_dtype._measured.cache_clear()


def test_it_is_measured_and_said_once(bf16, tiny_llama, faster, caplog):
    assert Target.load(str(bf16)).dtype == torch.float32  # a small target is not measured
    faster(2.0)
    with caplog.at_level(logging.INFO):
        assert Target.load(str(bf16)).dtype == torch.bfloat16
        assert Target.load(str(bf16), dtype="float32").dtype == torch.float32
        assert Target.load(str(tiny_llama)).dtype == torch.float32  # never narrower than it was saved
        Target.load(str(bf16))
    assert len(caplog.records) == 1
    assert "runs in bfloat16" in caplog.text
    assert "2.0 times" in caplog.text
    faster(1.0)
    assert cpu_dtype.cpu_dtype(Checkpoint.find(bf16)) == "float32"


def test_the_measurement_runs_here():
    assert cpu_dtype._gain(64, 4) > 0


def test_a_cache_and_a_run_go_on_in_the_type_they_were_begun_in(bf16, data, tmp_path, faster):  # noqa: F811
    config = load_config(str(bf16), assignments=[*small_cache.SETTINGS, "data.min_loss_tokens=2"])
    faster(2.0)
    built = stages.build_cache(config, data, tmp_path / "cache").build
    first = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})})
    assert stages.train(first, tmp_path / "run", data=data).steps == 4
    faster(0.5)
    assert stages.build_cache(config, data, tmp_path / "cache").build.reused_samples == built.samples
    assert stages.train(first, tmp_path / "run", data=data).resumed_from == 4
