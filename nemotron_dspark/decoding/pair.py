"""A target and a saved draft, loaded, fitted to each other and proven."""

from pathlib import Path

from nemotron_dspark.config import TargetConfig
from nemotron_dspark.drafts import kinds
from nemotron_dspark.drafts.config import read_draft_config
from nemotron_dspark.drafts.costs import costs_beside
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.drafts.temperatures import read_calibration
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.packed import PackedLinear, packed
from nemotron_dspark.targets.proofs import prove


def load_draft(folder: Path, target: Target) -> Draft:
    """The draft in ``folder`` on the target's device and in its type; a slim one takes the target's embedding and head.

    A calibrated one has its `temperatures` and `lines`, a profiled one its `costs`.

    Raises:
        InputError: no whole draft there, one for another target, or a calibration or costs of another one.
    """
    draft = kinds.load(folder, device=target.device, dtype=target.dtype)
    draft.config.check_target(target.spec)
    draft.temperatures, draft.lines = read_calibration(folder, draft.config.block_size)
    draft.costs = costs_beside(folder, draft.config.block_size)
    if not draft.has_embeddings:
        own = draft.lm_head.weight  # an imported draft of a part of the vocabulary may bring its part of the head
        head = target.head.weight if own.is_meta or draft.d2t is None else own
        embedding = draft.embed_tokens if draft.config.own_embedding else target.model.get_input_embeddings()
        draft.set_embeddings(embedding.weight, head)
    same = draft.lm_head.weight.data_ptr() == target.head.weight.data_ptr()
    head = target.packed_head if same else packed(draft.lm_head)
    draft.packed_head = head.forward if isinstance(head, PackedLinear) else None
    return draft


def load_pair(config: TargetConfig, draft_folder: Path | None) -> tuple[Target, Draft | None]:
    """The target that ``config`` names and the draft for it (None: none), proven unless ``config.proofs`` is off.

    Raises:
        InputError: either cannot be loaded, or they do not fit.
        CheckError: a proof failed.
    """
    if draft_folder is not None:
        read_draft_config(draft_folder)  # a wrong path is said before the target is loaded
    target = Target.of(config)
    draft = load_draft(draft_folder, target) if draft_folder is not None else None
    if config.proofs:
        prove(target, draft.config.target_layer_ids if draft is not None else ())
    return target, draft
