"""What every kind of draft is to the rest of the project: weights around the target's frozen embedding and head.

On disk it is ``config.json`` and ``model.safetensors``, keys and names as DeepSpec writes them; a slim copy leaves out
the target's two matrices.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nemotron_dspark import files
from nemotron_dspark.drafts.context import DraftContext
from nemotron_dspark.drafts.layers import Rotary
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import finish_logits

WEIGHTS_FILE = "model.safetensors"
SHARED = ("embed_tokens.weight", "lm_head.weight")  # the target's own, frozen; a slim copy leaves them out
INITIAL_STD = 0.02


class Draft(nn.Module):
    """A draft with random weights (normal 0.02, norms 1, biases 0) and, until `set_embeddings`, no embedding or head.

    ``seed`` None leaves all weights unset, for a caller that fills them.
    """

    Config: Any  # the class of its config; set by the kind of draft

    def __init__(self, config: Any, seed: int | None = 0):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            # From an empty tensor: nn.Embedding would draw numbers, which on "meta" imports torch's compiler (seconds).
            self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
            self._build(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        self._rotary = Rotary(config.head_dim, config.rope_theta)
        if seed is not None:
            self._initialise(seed)

    def _build(self, config: Any) -> None:
        """Make every module but the embedding and the head; among them ``fc`` and the last ``norm``."""
        raise NotImplementedError

    @property
    def has_embeddings(self) -> bool:
        """False for a new draft or a slim copy until `set_embeddings`."""
        return not (self.embed_tokens.weight.is_meta or self.lm_head.weight.is_meta)

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.fc.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the arithmetic: that in which the draft holds the target's embedding and head."""
        return self.embed_tokens.weight.dtype if self.has_embeddings else self.dtype

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every weight that training changes, by name, in a fixed order: all but the target's embedding and head."""
        return {name: parameter for name, parameter in self.named_parameters() if name not in SHARED}

    def set_embeddings(self, embedding: Tensor, head: Tensor, dtype: torch.dtype | None = None) -> None:
        """Take the target's ``embedding`` and ``head`` (both [V, H]), frozen; memory is shared where types agree.

        ``dtype`` is what the draft then computes in; None: the parameters' own. Parameters of another type are cast
        where they are used: fp32 ones with bf16 here give the numbers of bf16 ones, and gradients in fp32.

        Raises:
            InputError: another vocabulary or hidden size than the draft's.
        """
        expected = (self.config.vocab_size, self.config.hidden_size)
        for name, given in (("embedding", embedding), ("LM head", head)):
            if tuple(given.shape) != expected:
                raise InputError(
                    f"The draft was made for another target: it needs an {name} of {expected}, "
                    f"the target's is {tuple(given.shape)}.",
                    "Give the target the draft was trained for.",
                )
        for module, given in ((self.embed_tokens, embedding), (self.lm_head, head)):
            weight = given.detach().to(self.device, dtype or self.dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)

    def save(self, folder: Path, *, slim: bool = False) -> None:
        """Write ``model.safetensors`` and ``config.json`` in the type that is computed in; ``slim`` leaves out the
        target's two matrices."""
        if not slim:
            self._require_embeddings()
        kept = {name: tensor for name, tensor in self.state_dict().items() if not (slim and name in SHARED)}
        tensors = {name: tensor.detach().to(self.compute_dtype) for name, tensor in kept.items()}
        if not slim and tensors[SHARED[0]].data_ptr() == tensors[SHARED[1]].data_ptr():  # a target that ties them
            tensors[SHARED[1]] = tensors[SHARED[1]].clone()
        write_draft(folder, self.config, tensors)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> "Draft":
        """The draft in ``folder``, in eval mode; ``dtype`` None keeps the saved one.

        Raises:
            InputError: no draft there, a truncated file, missing or unknown tensors, or other shapes than the config's.
        """
        path = Path(folder) / WEIGHTS_FILE
        config = cls.Config.from_folder(folder)
        if not path.is_file():
            raise InputError(f"{folder} has no {WEIGHTS_FILE}.", "Give a folder that training or export finished.")
        draft = cls(config, seed=None)
        again = "Copy the file again, or export the draft again from its run folder."
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                _check_tensors(file, draft.state_dict(), path, again)
                tensors = {name: file.get_tensor(name).to(dtype=dtype) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path} is damaged: {error}.", again) from None
        draft.load_state_dict(tensors, strict=False, assign=True)
        draft.embed_tokens.requires_grad_(False)
        draft.lm_head.requires_grad_(False)
        return draft.eval()

    def target_logits(self, last: Tensor) -> Tensor:
        """The target's logits [..., V] from its last hidden states [..., H], with its multiplier and its soft cap."""
        return finish_logits(self.lm_head(last), self.config.target_logit_multiplier, self.config.target_logit_softcap)

    # --- decoding ---

    def new_context(self, rows: int = 1) -> DraftContext:
        """An empty context of ``rows`` rows."""
        raise NotImplementedError

    def extend(self, context: DraftContext, taps: Tensor, counts: Sequence[int], following: Tensor) -> None:
        """Append the first ``counts[b]`` of ``taps`` [B, n, T·H]; ``following`` [B, n] is the token after each."""
        raise NotImplementedError

    def begin(self, context: DraftContext, anchor_tokens: Tensor) -> Any:
        """The next block of each row behind ``context``: an object with ``next_logits(previous)`` per slot."""
        raise NotImplementedError

    # --- parts ---

    def _rotation(self, starts: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Tables [B or 1, 1, count, d] for ``count`` positions from each of ``starts``."""
        first, last = min(starts), max(starts)
        cosines, sines = self._rotary.tables(last + count, self.device, self.compute_dtype)
        if first == last:
            return cosines[first : first + count], sines[first : first + count]
        at = torch.tensor(starts, device=self.device)[:, None] + torch.arange(count, device=self.device)
        return cosines[at][:, None], sines[at][:, None]

    def _require_embeddings(self) -> None:
        if not self.has_embeddings:
            raise InputError(
                "The draft has no embedding and LM head of its own.",
                "It is a slim copy: use it together with its target, or give a full copy.",
            )

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in list(self.named_parameters()):
            if name in SHARED:
                continue
            if parameter.dim() >= 2:
                value = torch.empty(parameter.shape).normal_(0.0, INITIAL_STD, generator=generator)
            else:
                value = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(value))
        # The LM head is the target's and is not multiplied here: the last norm gives its logits the target's scale.
        self.norm.weight.data.mul_(self.config.target_logit_multiplier)


def write_draft(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write a draft's ``model.safetensors`` and ``config.json``; a slim copy without `SHARED` among ``tensors``."""
    config = dataclasses.replace(config, dtype=str(tensors["fc.weight"].dtype).removeprefix("torch."))
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    files.write_whole(Path(folder) / WEIGHTS_FILE, lambda file: file.write(content))
    files.write_json(Path(folder) / "config.json", config.to_json())


def _check_tensors(file: safe_open, expected: dict[str, Tensor], path: Path, do: str) -> None:
    found = set(file.keys())
    missing = sorted(set(expected) - found - set(SHARED))
    unknown = sorted(found - set(expected))
    if missing:
        raise InputError(f"{path} lacks the tensor {missing[0]}" + _others(missing), do)
    if unknown:
        raise InputError(f"{path} holds a tensor this draft has not: {unknown[0]}" + _others(unknown), do)
    for name in sorted(found):
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(expected[name].shape):
            raise InputError(
                f"{path}: {name} has shape {shape}, its config.json asks for {tuple(expected[name].shape)}.", do
            )


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more." if len(names) > 1 else "."
