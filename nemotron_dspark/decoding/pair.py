"""A saved draft, made ready to decode with a loaded target."""

from pathlib import Path

from nemotron_dspark.decoding.decoder import check_fit
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.targets import Target


def load_draft(folder: Path, target: Target) -> DSparkDraft:
    """The draft in ``folder`` on the target's device and in its type; a slim one takes the target's embedding and head.

    Raises:
        InputError: no whole draft there, or one for another target.
    """
    draft = DSparkDraft.load(folder, device=target.device, dtype=target.dtype)
    check_fit(target, draft)
    if not draft.has_embeddings:
        head = target.model.get_submodule(target.spec.names.head)
        draft.set_embeddings(target.model.get_input_embeddings().weight, head.weight)
    return draft
