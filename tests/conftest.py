"""What every test shares: two small checkpoint folders, one torch thread, quiet libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported; no test may reach for the hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from transformers.utils import logging

from nemotron_dspark.recipe import tiny

torch.set_num_threads(1)
logging.disable_progress_bar()
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_hybrid(tmp_path_factory):
    """Checkpoint folder of a NemotronH with all four layer kinds, random weights. Read only: copy it to change it."""
    return tiny.random_target(tmp_path_factory.mktemp("tiny_hybrid") / "target", pattern="ME*-M*-M")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Checkpoint folder of an ordinary decoder, random weights. Read only: copy it to change it."""
    return tiny.random_target(tmp_path_factory.mktemp("tiny_llama") / "target", family="llama")
