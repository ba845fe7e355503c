"""Drafts to and from the layouts of `draft_formats`, tensor by tensor, without loading a target or changing a bit.

A full draft has the target's embedding and LM head, a slim one takes them from the target when it is loaded. A draft of
a part of the vocabulary always brings its part of the head to others: engines cannot cut the target's.

A DSpark draft of Markov rank 0 (DeepSpec's DFlash) goes to readers that always expect a Markov head with one of zeros,
which adds nothing: without it they would take it for the engines' DFlash, whose slots mean other tokens. What was
added is noted, and left out again on import.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from nemotron_dspark import files
from nemotron_dspark.drafts.config import DFlashConfig, DraftConfig, Eagle3Config, SavedConfig, read_draft_config
from nemotron_dspark.drafts.dspark import SHARED, WEIGHTS_FILE
from nemotron_dspark.drafts.kinds import draft_class
from nemotron_dspark.engines.draft_formats import DFLASH_FORMATS, EAGLE3_FORMATS, FORMATS, Format, Verifier, recognise
from nemotron_dspark.errors import InputError
from nemotron_dspark.folders import check_claim
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.weights import open_tensors, read_embedding_and_head

ADDED_RANK = 32  # of a Markov head of zeros
_NOTED = "nds"  # key of config.json
_CONFIDENCE = "confidence_head.proj.weight"


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
    config = read_draft_config(folder)
    form = _format(config, format_name)
    check_claim(out, "an exported draft", None, {})
    verifier = Verifier(config.architecture, ())
    if target is not None:
        config.check_target(target.read_spec())
        verifier = Verifier(target.name, tuple(target.config.get("architectures") or ()))
    elif form.name == "speculators":
        raise InputError("A speculators config names its target.", "Give it with --target.")
    keep = set(SHARED) if form.embeddings and not slim else {SHARED[1]} if config.draft_vocab_size else set()
    keep |= {SHARED[0]} if config.own_embedding else set()
    tensors = _with_embeddings(_read(folder, config), target, keep)
    if config.draft_vocab_size and SHARED[1] not in tensors:
        raise InputError("The draft is a slim copy, and engines need its part of the LM head.", "Give --target.")
    noted: dict[str, Any] = {}
    if isinstance(config, DraftConfig) and form.needs_head:
        config, tensors, noted = with_markov_head(config, tensors, reads_token=form.reads_token)
    named = {form.tensor_name(name): tensor for name, tensor in tensors.items()}
    if config.draft_vocab_size and form.name == "speculators":
        drafted = named["d2t"] + torch.arange(config.draft_vocab_size)
        named["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, drafted, True)
    _write(out, form.write(_typed(config, tensors), verifier) | ({_NOTED: noted} if noted else {}), named)
    remarks = ("It has a Markov head of zeros, which adds nothing: without one it would be read as another kind.",)
    return _report(folder, out, form.name, named, remarks if "markov_rank" in noted else ())


def _format(config: DraftConfig | Eagle3Config, name: str) -> Format:
    """The format of that name for a draft of this config; `InputError` when it cannot hold it."""
    known = EAGLE3_FORMATS if isinstance(config, Eagle3Config) else FORMATS
    known = DFLASH_FORMATS if isinstance(config, DFlashConfig) else known
    if name not in known:
        raise InputError(f"{name} has no {config.kind} draft.", f"Formats that hold one are {', '.join(known)}.")
    form = known[name]
    if config.own_embedding and not (form.embeddings or form.own_embedding):
        holding = ", ".join(each.name for each in known.values() if each.embeddings or each.own_embedding)
        raise InputError(
            f"{name} takes the target's embedding, and this draft has its own.", f"Formats that hold it are {holding}."
        )
    if config.draft_vocab_size and not form.reduced:
        holding = ", ".join(each.name for each in known.values() if each.reduced)
        raise InputError(f"{name} has no draft of a part of the vocabulary.", f"Formats that hold one are {holding}.")
    if isinstance(config, Eagle3Config):
        return form
    beyond = [words for field, words in config.beyond_deepspec.items() if field not in form.blocks]
    if beyond:
        others = [other.name for other in known.values() if other.blocks >= config.beyond_deepspec.keys()]
        raise InputError(
            f"{name} has no {config.kind} draft with {' or '.join(beyond)}.",
            f"Formats that hold this one are {', '.join(others)}." if others else "Serve it with `nds serve`.",
        )
    if config.markov_head_type not in form.heads:
        raise InputError(
            f"{name} reads no {config.markov_head_type} Markov head, only {', '.join(form.heads)}.",
            "Train the draft with draft.markov_head=vanilla, or export it for SGLang.",
        )
    if name == "sglang" and config.target_layer_ids[0] < 0:
        raise InputError("SGLang cannot tap the embedding (tap -1).", "Train with draft.taps from layer 0 on.")
    return form


def with_markov_head(
    config: DraftConfig, tensors: Mapping[str, Tensor], *, reads_token: bool
) -> tuple[DraftConfig, dict[str, Tensor], dict[str, Any]]:
    """The draft for a reader that always expects a Markov head: config, tensors, and what they were where it was added.

    ``reads_token``: also that the confidence head reads the previous token's embedding. All that is added is zero.
    """
    full, noted = dict(tensors), {}
    if not config.markov_rank:
        sizes = {1: config.vocab_size, 2: config.num_drafted}
        zeros = tensors["fc.weight"].new_zeros
        full |= {f"markov_head.markov_w{at}.weight": zeros(size, ADDED_RANK) for at, size in sizes.items()}
        config = config.model_copy(update={"markov_rank": ADDED_RANK})
        noted["markov_rank"] = 0
    if reads_token and config.enable_confidence_head and not config.confidence_head_with_markov:
        full[_CONFIDENCE] = functional.pad(tensors[_CONFIDENCE], (0, config.markov_rank))
        config = config.model_copy(update={"confidence_head_with_markov": True})
        noted["confidence_head_with_markov"] = False
    return config, full, noted


def _without_added(
    flat: dict[str, Any], named: Mapping[str, Tensor], noted: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `with_markov_head`."""
    named = dict(named)
    if noted.get("confidence_head_with_markov") is False and _CONFIDENCE in named:
        named[_CONFIDENCE] = named[_CONFIDENCE][:, : flat["hidden_size"]].contiguous()
    if noted.get("markov_rank") == 0:
        named = {name: tensor for name, tensor in named.items() if not name.startswith("markov_head.")}
    return {**flat, **noted}, named


def import_draft(folder: Path, out: Path, target: Checkpoint | None = None) -> Exchanged:
    """Write a draft of another project's layout as a draft of ours (DeepSpec's layout) into the new folder ``out``.

    ``target`` gives what the layout leaves out: its number of layers, and embedding and LM head, without which the
    draft stays slim.

    Raises:
        InputError: no draft there, one that drafts here cannot be, or for another target; ``out`` is not empty.
        EnvironmentFault: the disk is full.
    """
    values = files.read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise InputError(f"{folder / 'config.json'} is not a JSON object.", "Restore it from the draft's repository.")
    form = recognise(values, str(folder / "config.json"))
    check_claim(out, "an imported draft", None, {})
    stored = open_tensors(folder)
    stored.pop("t2d", None)  # says nothing that d2t does not
    named = {form.tensor_name(name.removeprefix("model."), back=True): read() for name, read in stored.items()}
    noted = values.get(_NOTED) or {}
    return write_imported(folder, form.name, form.read(values), named, out, target, kind=form.config, noted=noted)


def write_imported(
    source: Path,
    format_name: str,
    flat: dict[str, Any],
    named: Mapping[str, Tensor],
    out: Path,
    target: Checkpoint | None,
    *,
    kind: type[SavedConfig] = DraftConfig,
    noted: Mapping[str, Any],
) -> Exchanged:
    """Write a draft whose config ``flat`` and tensors ``named`` have DeepSpec's keys; errors as `import_draft`.

    ``noted`` is what `with_markov_head` said.
    """
    remarks = []
    flat, named = _without_added(flat, named, noted)
    if target is not None and SHARED[0] in named:
        its = read_embedding_and_head(target.folder, target.read_spec()).embedding
        flat["own_embedding"] = not torch.equal(named[SHARED[0]], its.to(named[SHARED[0]].dtype))
        if flat["own_embedding"]:
            remarks.append("Its embedding is not the target's, and stays with it.")
    elif SHARED[0] in named and SHARED[1] not in named:  # what the target's is like is not known here
        flat["own_embedding"] = True
    if not flat.get("num_target_layers"):
        if target is None:
            raise InputError(f"{source} does not say how many layers its target has.", "Give it with --target.")
        flat["num_target_layers"] = target.read_spec().num_layers
        remarks.append(f"The target's number of layers is that of {target.name}.")
    flat["architectures"] = [kind.architecture]
    config = kind.from_json(flat, str(source))
    if target is not None:
        config.check_target(target.read_spec())
    expected = draft_class(config)(config, seed=None).state_dict()
    unknown, missing = sorted(named.keys() - expected), sorted(expected.keys() - named.keys() - set(SHARED))
    wrong = [name for name in named.keys() & expected.keys() if named[name].shape != expected[name].shape]
    if unknown or missing or wrong:
        which = [f"holds {unknown[0]}"] if unknown else [f"lacks {missing[0]}"] if missing else []
        which = which or [f"has {wrong[0]} of shape {tuple(named[wrong[0]].shape)}"]
        raise InputError(f"{source} {which[0]}, which is not what its config describes.", "Download the draft again.")
    tensors = _with_embeddings(named, target, set(SHARED))
    _write(out, _typed(config, tensors).to_json(), tensors)
    return _report(source, out, format_name, tensors, tuple(remarks))


def _read(folder: Path, config: SavedConfig) -> dict[str, Tensor]:
    draft = draft_class(config).load(folder)  # checks names and shapes
    held = open_tensors(folder)
    return {name: tensor for name, tensor in draft.state_dict().items() if name in held}


def _typed(config: SavedConfig, tensors: Mapping[str, Tensor]) -> SavedConfig:
    return config.model_copy(update={"dtype": str(tensors["fc.weight"].dtype).removeprefix("torch.")})


def _with_embeddings(tensors: Mapping[str, Tensor], target: Checkpoint | None, keep: set[str]) -> dict[str, Tensor]:
    """The tensors, with those of `SHARED` that are to be ``keep``-t: their own, or the target's where it is given."""
    bare = {name: tensor for name, tensor in tensors.items() if name in keep or name not in SHARED}
    if keep <= bare.keys() or target is None:
        return bare
    found = read_embedding_and_head(target.folder, target.read_spec())
    kind = tensors["fc.weight"].dtype
    head = found.head
    if (offsets := tensors.get("d2t")) is not None:
        head = head[offsets + torch.arange(len(offsets))]
    its = {SHARED[0]: found.embedding.to(kind), SHARED[1]: head.to(kind, copy=True)}
    return {name: tensor for name, tensor in its.items() if name in keep} | bare


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
