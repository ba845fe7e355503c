"""A target's name finds its preset, what the user sets goes over it, and the figures in its comments are right."""

import re

import pytest
import torch

from nemotron_dspark.cache.deepspec_layout import bytes_per_token as deepspec_bytes
from nemotron_dspark.config import DraftSection, load_config
from nemotron_dspark.config.known import KNOWN, known_target, preset_for
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import spec_from_config
from nemotron_dspark.targets.families import family_for
from nemotron_dspark.targets.spec import LayerKind
from nemotron_dspark.training.tiling import objective_bytes
from tests.recipe.hybrids import HYBRIDS
from tests.recipe.nemotrons import NEMOTRONS, Nemotron

FILES = sorted(resource_folder("configs").glob("*.yaml"))
PRESETS = [path for path in FILES if not path.stem.startswith("demo")]
LABELS = (
    "Target",
    "Licence",
    "Chats",
    "Stop ids",
    "Sampling",
    "Draft",
    "Disk",
    "Memory",
    "DGX Spark",
    "8 GPUs",
    "Not run",
)
TYPICAL_TOKENS = 40_000_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_in_configs_loads(path):
    assert load_config(file=path) != load_config()


@pytest.mark.parametrize("known", [known for known in KNOWN if known.preset], ids=lambda known: known.repository)
def test_repository_alias_and_folder_find_the_same_preset(known):
    path = preset_for(known.repository)
    assert path in PRESETS
    assert {preset_for(name) for name in known.aliases} <= {path}
    assert preset_for(f"/models/{known.repository.split('/')[1]}") == path


def test_every_preset_is_some_target_s():
    assert {path.name for path in PRESETS} == {known.preset for known in KNOWN if known.preset}


def page(path) -> dict[str, str]:
    """The comment at the head of a preset: the text under each label."""
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    found: dict[str, str] = {}
    label = ""
    for line in head.splitlines():
        if match := re.match(r"# (\w[\w ]{0,9}?) {2,}(?=\S)(.*)", line):
            label = match.group(1)
            found[label] = match.group(2)
        elif label:
            found[label] += " " + line.removeprefix("#").strip()
    return found


def shape_of(path):
    """The row of a table that a preset's own target, or one of the same preset, has."""
    name = load_config(file=path).target.name
    rows = [row for row in (*NEMOTRONS, *HYBRIDS) if known_target(row.repository).preset == path.name]
    return next((row for row in rows if row.repository == name), rows[0])


def training_activations(draft, length=4096, anchors=512) -> int:
    """Bytes in bf16 of what the draft's forward keeps for its backward, with docs/recipe.md's formula."""
    slots, hidden = anchors * draft.block_size, draft.hidden_size
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    layer = slots * (6 * hidden + 4 * queries + 3 * draft.intermediate_size) + (length + slots) * (hidden + 4 * keys)
    once = length * (len(draft.target_layer_ids) + 2) * hidden + 2 * slots * hidden
    return 2 * (draft.num_hidden_layers * layer + once)


NAMES = {
    LayerKind.MAMBA2: "Mamba-2",
    LayerKind.DELTA: "gated delta nets",
    LayerKind.CONV: "short convolutions",
    LayerKind.PARALLEL: "attention and Mamba-2 side by side",
}


def drawn(spec, attention) -> tuple[str, ...]:
    """How many layers are recurrent, and which attend: what a page says of them in one go."""
    kind = next(kind for kind in NAMES if kind in spec.layers)
    texts = (f"{spec.num_layers} layers: {spec.layers.count(kind)} {NAMES[kind]}",)
    if kind is LayerKind.PARALLEL:
        return texts
    return (*texts, f"{len(attention)} attention ({', '.join(map(str, attention))})")


def attend(taps) -> str:
    if len(taps) == 1:
        return f"{taps[0]} is an attention layer"
    return f"{', '.join(map(str, taps[:-1]))} and {taps[-1]} are attention layers"


def state_bytes(config, spec) -> int:
    """Bytes of all recurrent states of one request, without the last inputs of convolutions unless these are all."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = config.pop("model_type")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    states = family_for(spec).prepare(model, spec)(torch.device("meta"), torch.bfloat16)
    conv, *others = states.tensors()
    return sum(tensor.nbytes for tensor in others or [conv])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_page_with_the_right_figures(path):
    row, said, known = shape_of(path), page(path), known_target(load_config(file=path).target.name)
    assert tuple(said) == (LABELS if isinstance(row, Nemotron) else (*LABELS, "Source"))
    spec = spec_from_config(row.config())
    draft, _ = build_draft_config(spec, DraftSection(), mask_token_id=990)

    with torch.device("meta"):
        trainable = sum(p.numel() for p in DSparkDraft(draft).trainable_parameters().values())
    embedding = spec.vocab_size * spec.hidden_size
    activations, slots = training_activations(draft), 512 * draft.block_size
    objective = objective_bytes(spec.vocab_size, spec.hidden_size, draft.markov_rank, 2, slots, slots, gpu=True)
    bytes_per_token = deepspec_bytes(len(draft.target_layer_ids), spec.hidden_size)
    attending = sum(kind.attends for kind in spec.layers)
    for label, texts in {
        "Target": (
            *drawn(spec, row.attention),
            f"Hidden {spec.hidden_size}, {spec.num_attention_heads} heads, {spec.num_key_value_heads} of keys",
            f"{spec.head_dim} wide; vocabulary {spec.vocab_size}; {spec.max_position_embeddings} positions",
            f"{row.billions:.3f} billion parameters, {2 * row.billions:.1f} GB in bf16",
        ),
        "Licence": (known.licence.removesuffix(" (research only)"),),
        "Draft": (
            f"{draft.num_hidden_layers} layers, block {draft.block_size}",
            f"{trainable / 1e9:.3f} billion trainable",
            f"SwiGLU {draft.intermediate_size}",
            f"Taps {', '.join(map(str, draft.target_layer_ids))}",
        ),
        "Disk": (
            f"{bytes_per_token:,} bytes of cache a token".replace(",", " "),
            f"{bytes_per_token * TYPICAL_TOKENS / 1e12:.2f} TB for 40 million",
            f"{3 * 12 * trainable / 1e9:.1f} GB of checkpoints",
            f"the draft itself {2 * (trainable + 2 * embedding) / 1e9:.2f} GB",
        ),
        "Memory": (
            f"{2 * row.billions:.1f} GB of target",
            f"Training: {(18 * trainable + 4 * embedding + activations + objective) / 1e9:.1f} GB",
            f"{4 * embedding / 1e9:.1f} of frozen embedding",
            f"{activations / 1e9:.1f} of activations, {objective / 1e9:.1f} of the objective",
            f"{state_bytes(row.config(), spec) / 1e6:.{1 if path.stem == 'lfm2_1b' else 0}f} MB of state a request",
            f"{4 * attending * spec.num_key_value_heads * spec.head_dim / 1e3:.1f} kB of keys",
        ),
    }.items():
        for text in texts:
            assert text in said[label], label
    on_attention = [tap for tap in row.taps if tap in row.attention]
    if len(on_attention) in (0, len(row.taps)):
        assert ("all of them attend" if on_attention else "no attention layer") in said["Draft"]
    else:
        assert attend(on_attention) in said["Draft"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_a_preset_sets_of_the_draft_is_what_the_target_would_give_anyway(path):
    """The values stand there to be read and changed; they must not drift away from the rules."""
    spec = spec_from_config(shape_of(path).config())
    preset = load_config(file=path).draft
    mask = preset.mask_token_id or 0  # a preset that names none leaves it to the tokenizer
    worked, notes = build_draft_config(spec, preset, mask_token_id=mask)
    plain, _ = build_draft_config(spec, DraftSection(), mask_token_id=mask)
    assert worked == plain
    assert not [note for note in notes if "SwiGLU" in note or "rope" in note]


def test_a_target_without_a_preset_keeps_the_defaults():
    assert preset_for("somebody/else") is None
    assert load_config(target="somebody/else") == load_config(preset=None, assignments=["target.name=somebody/else"])


def test_a_preset_applies_by_name_and_gives_way(tmp_path):
    by_name = load_config(target="nvidia/Nemotron-H-8B")
    assert by_name.draft.intermediate_size == 14336
    assert by_name.target.name == "nvidia/Nemotron-H-8B"
    file = tmp_path / "mine.yaml"
    file.write_text("target: {name: nvidia/Nemotron-H-8B}\ndraft: {intermediate_size: 12288}\ntrain: {lr: 1.0e-4}\n")
    mine = load_config(file=file, assignments=["train.lr=3e-4"])
    assert (mine.draft.intermediate_size, mine.train.lr) == (12288, 3e-4)
    assert mine.draft.mask_token_id == 990  # from the preset of the target that the file names


def test_a_fault_is_reported_with_the_file_that_holds_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {learning_rate: 1}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: there is no key train\.learning_rate"):
        load_config(file=file, target="nvidia/Nemotron-H-8B")
