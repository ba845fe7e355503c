"""Drafts to and from the layouts of `draft_formats`, tensor by tensor, without loading a target or changing a bit.

A full draft has the target's embedding and LM head, a slim one takes them from the target when it is loaded.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from nemotron_dspark import files
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import SHARED, WEIGHTS_FILE, DSparkDraft
from nemotron_dspark.engines.draft_formats import FORMATS, Verifier, recognise
from nemotron_dspark.errors import InputError
from nemotron_dspark.folders import check_claim
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.weights import open_tensors, read_embedding_and_head


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """A draft that was written."""

    source: str
    out: str
    format: str  # that was read or written
    tensors: int
    bytes: int
    embeddings: bool  # whether the target's embedding and LM head are in it
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def export_draft(
    folder: Path, format_name: str, out: Path, target: Checkpoint | None = None, *, slim: bool = False
) -> Exchanged:
    """Write the draft in ``folder`` in another project's layout into the new folder ``out``.

    Args:
        format_name: a key of `FORMATS`.
        target: its name goes into formats that name it; its embedding and LM head into a full draft of a slim one.
        slim: leave embedding and LM head out although the format may hold them.

    Raises:
        InputError: no draft there, one for another target, heads that the format has not, or ``out`` is not empty.
        EnvironmentFault: the disk is full.
    """
    config, form = DraftConfig.from_folder(folder), FORMATS[format_name]
    check_claim(out, "an exported draft", None, {})
    if config.markov_head_type not in form.heads:
        raise InputError(f"{form.name} has no {config.markov_head_type} head.", "Train with draft.markov_head=vanilla.")
    if form.name == "sglang" and not config.markov_rank:
        raise InputError("SGLang serves no DSpark draft without a Markov head.", "Train with draft.markov_rank > 0.")
    if form.name == "sglang" and config.target_layer_ids[0] < 0:
        raise InputError("SGLang cannot tap the embedding (tap -1).", "Train with draft.taps from layer 0 on.")
    verifier = Verifier(config.architecture, ())
    if target is not None:
        config.check_target(target.read_spec())
        verifier = Verifier(target.name, tuple(target.config.get("architectures") or ()))
    elif form.name == "speculators":
        raise InputError("A speculators config names its target.", "Give it with --target.")
    tensors = _with_embeddings(_read(folder, config), target, keep=form.embeddings and not slim)
    named = {form.tensor_name(name): tensor for name, tensor in tensors.items()}
    _write(out, form.write(_typed(config, tensors), verifier), named)
    return _report(folder, out, form.name, named)


def import_draft(folder: Path, out: Path, target: Checkpoint | None = None) -> Exchanged:
    """Write a draft of another project's layout as a draft of ours (DeepSpec's layout) into the new folder ``out``.

    ``target`` gives what the layout leaves out: its number of layers, and embedding and LM head, without which the
    draft stays slim.

    Raises:
        InputError: no DSpark draft there, one that drafts here cannot be, or for another target; ``out`` is not empty.
        EnvironmentFault: the disk is full.
    """
    values = files.read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise InputError(f"{folder / 'config.json'} is not a JSON object.", "Restore it from the draft's repository.")
    form = recognise(values, str(folder / "config.json"))
    check_claim(out, "an imported draft", None, {})
    stored = open_tensors(folder)
    for reduced in ("d2t", "draft_id_to_target_id"):
        if reduced in stored:
            raise InputError(
                f"{folder} drafts from a part of the vocabulary ({reduced}), and drafts here from all of it.",
                "Serve it with the engine it is for.",
            )
    named = {form.tensor_name(name.removeprefix("model."), back=True): read() for name, read in stored.items()}
    return write_imported(folder, form.name, form.read(values), named, out, target)


def write_imported(
    source: Path,
    format_name: str,
    flat: dict[str, Any],
    named: Mapping[str, Tensor],
    out: Path,
    target: Checkpoint | None,
) -> Exchanged:
    """Write a draft whose config ``flat`` and tensors ``named`` have DeepSpec's keys; errors as `import_draft`."""
    remarks = []
    if not flat.get("num_target_layers"):
        if target is None:
            raise InputError(f"{source} does not say how many layers its target has.", "Give it with --target.")
        flat["num_target_layers"] = target.read_spec().num_layers
        remarks.append(f"The target's number of layers is that of {target.name}.")
    flat["architectures"] = [DraftConfig.architecture]
    config = DraftConfig.from_json(flat, str(source))
    if target is not None:
        config.check_target(target.read_spec())
    expected = DSparkDraft(config, seed=None).state_dict()
    unknown, missing = sorted(named.keys() - expected), sorted(expected.keys() - named.keys() - set(SHARED))
    wrong = [name for name in named.keys() & expected.keys() if named[name].shape != expected[name].shape]
    if unknown or missing or wrong:
        which = [f"holds {unknown[0]}"] if unknown else [f"lacks {missing[0]}"] if missing else []
        which = which or [f"has {wrong[0]} of shape {tuple(named[wrong[0]].shape)}"]
        raise InputError(f"{source} {which[0]}, which is not what its config describes.", "Download the draft again.")
    tensors = _with_embeddings(named, target, keep=True)
    _write(out, _typed(config, tensors).to_json(), tensors)
    return _report(source, out, format_name, tensors, tuple(remarks))


def _read(folder: Path, config: DraftConfig) -> dict[str, Tensor]:
    draft = DSparkDraft.load(folder)  # checks names and shapes
    held = open_tensors(folder)
    return {name: tensor for name, tensor in draft.state_dict().items() if name in held}


def _typed(config: DraftConfig, tensors: Mapping[str, Tensor]) -> DraftConfig:
    return config.model_copy(update={"dtype": str(tensors["fc.weight"].dtype).removeprefix("torch.")})


def _with_embeddings(tensors: Mapping[str, Tensor], target: Checkpoint | None, *, keep: bool) -> dict[str, Tensor]:
    """The tensors with the target's embedding and head, if they are to be ``keep``-t and can be had."""
    bare = {name: tensor for name, tensor in tensors.items() if keep or name not in SHARED}
    if not keep or target is None or set(SHARED) <= bare.keys():
        return bare
    found = read_embedding_and_head(target.folder, target.read_spec())
    kind = tensors["fc.weight"].dtype
    return bare | {SHARED[0]: found.embedding.to(kind), SHARED[1]: found.head.to(kind, copy=True)}


def _write(out: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        content = save({name: one.contiguous() for name, one in tensors.items()}, metadata={"format": "pt"})
    files.write_whole(out / WEIGHTS_FILE, lambda file: file.write(content))
    files.write_json(out / "config.json", config)


def _report(
    source: Path, out: Path, format_name: str, tensors: Mapping[str, Tensor], notes: tuple[str, ...] = ()
) -> Exchanged:
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Exchanged(str(source), str(out), format_name, len(tensors), size, SHARED[0] in tensors, notes)
