"""A loaded, frozen target: hidden states for training, and verify / commit for speculative decoding."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemotron_dspark.config import TargetConfig
from nemotron_dspark.errors import EnvironmentFault, InputError, first_line
from nemotron_dspark.targets import placement
from nemotron_dspark.targets.checkpoint import Checkpoint
from nemotron_dspark.targets.cpu_dtype import cpu_dtype
from nemotron_dspark.targets.families import family_for
from nemotron_dspark.targets.kv import RaggedKV
from nemotron_dspark.targets.mamba2 import even_chunks
from nemotron_dspark.targets.packed import pack, packed
from nemotron_dspark.targets.placement import MOST_OF_MEMORY, free_memory, weight_bytes
from nemotron_dspark.targets.quantised import Weight
from nemotron_dspark.targets.schemes import scheme_of
from nemotron_dspark.targets.shards import Stored
from nemotron_dspark.targets.spec import TargetSpec, first_stop_ids
from nemotron_dspark.targets.state import ReplayState, State, TargetState
from nemotron_dspark.targets.weights import weights_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_BLOCK = 256  # tokens of one prefill step: bounds the memory of the quadratic scan and of the attention mask


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences padded on the right, to be captured together."""

    ids: Tensor  # [B, S]
    mask: Tensor | None = None  # bool [B, S], true on tokens; None: padding may be taken for tokens, it comes last
    lengths: tuple[int, ...] | None = None  # of the rows, for who would rather not compute the padding; None: all S

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What a model's forward is given."""
        whole = self.mask is None or bool(self.mask.all())
        mask = None if self.mask is None or whole else self.mask.to(device).long()
        return {"input_ids": self.ids.to(device), "attention_mask": mask, "use_cache": False}


@dataclasses.dataclass(frozen=True)
class Captured:
    """Hidden states of whole sequences, in the weights' dtype."""

    taps: Tensor  # [B, S, T·H], raw outputs of the tapped layers, in ascending layer order
    last: Tensor  # [B, S, H], after the final norm


@dataclasses.dataclass(frozen=True)
class Verified:
    """What the target says of a block it has seen but not committed."""

    logits: Tensor  # [B, m, V] fp32; position i predicts the token after block token i
    taps: Tensor  # [B, m, T·H]


class Target:
    """A loaded target. All methods run without gradients and leave the weights alone."""

    decodes = True  # whether it can `prefill`, `verify` and `commit`

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase", spec: TargetSpec, folder: Path):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.spec = spec
        self.folder = Path(folder)
        sources = (getattr(model, "generation_config", None), model.config, tokenizer)
        self.stop_ids = frozenset(first_stop_ids(*(getattr(source, "eos_token_id", None) for source in sources)))
        self._base = model.get_submodule(spec.names.layers.rpartition(".")[0])
        self._layers = model.get_submodule(spec.names.layers)
        self.head = model.get_submodule(spec.names.head)
        # A copy beside its weight, which the embedding may be, and which drafts take.
        self.packed_head = packed(self.head)
        self._family = family_for(spec)
        self._new_recurrent = self._family.prepare(model, spec) if self._family.prepare else None

    @staticmethod
    def load(
        name: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> "Target":
        """Load a target from a hub id, an alias or a folder.

        Args:
            dtype: "auto" takes the checkpoint's own type on an accelerator, and on a CPU what `cpu_dtype` says.
            device: "auto" takes CUDA when there is any. Of several devices, as in "cuda:0,cuda:1", the first is taken
                where it holds the weights, else whole layers lie on each and the rest on the first.

        Raises:
            InputError: no such target, an unsupported family, damaged or incomplete weights, or weights that are
                quantised in a way that is not read here.
            EnvironmentFault: no such device, not enough memory, or the hub cannot be reached.
        """
        checkpoint = Checkpoint.find(name, revision=revision, weights=True, trust_remote_code=trust_remote_code)
        spec = checkpoint.read_spec()
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where, checkpoint)
        placed = _placed(checkpoint, spec, kind, resolve_devices(device))
        with loading(checkpoint):
            model, report = _load_model(checkpoint, kind, family_for(spec).attention, placed)
        tokenizer = checkpoint.load_tokenizer()
        refuse_absent(checkpoint.folder, report["missing_keys"])  # transformers would go on with random values there
        try:
            model = model if placed else model.to(where)
        except torch.OutOfMemoryError:
            raise placement.too_large(name, weight_bytes(checkpoint, kind), {where: free_memory(where)}) from None
        pack(model, keep=model.get_submodule(spec.names.head))
        return Target(model, tokenizer, spec, checkpoint.folder)

    @staticmethod
    def of(config: TargetConfig) -> "Target":
        """Load what the ``target`` section of a configuration names."""
        return Target.load(config.named, **load_arguments(config))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @torch.no_grad()
    def capture(self, input_ids: Tensor, attention_mask: Tensor | None, taps: Sequence[int]) -> Captured:
        """Hidden states of right-padded sequences ``input_ids`` [B, S]; ``attention_mask`` [B, S] is true on tokens.

        Tap i is the raw output of layer i, -1 what enters layer 0; ``last`` is after the final norm.
        """
        batch = Sequences(input_ids, attention_mask)
        with even_chunks(self.model, input_ids.shape[1]):
            last, tapped = self._hidden(taps, **batch.inputs(self.device))
        return Captured(tapped, last)

    def pass_tokens(self, taps: Sequence[int]) -> int:
        """Padded tokens that are best captured together, if a batch has fewer; 0: every batch alone."""
        return 0

    def remarks(self) -> tuple[str, ...]:
        """Sentences for the user on what was captured so far."""
        return ()

    def captures(
        self, batches: Sequence[Sequences], taps: Sequence[int], on_layer: Callable[[int], None] = lambda layer: None
    ) -> Iterator[Captured]:
        """`capture` of each of ``batches``, in their order.

        A target whose layers are streamed calls ``on_layer`` when all of them enter one.
        """
        for batch in batches:
            yield self.capture(batch.ids, batch.mask, taps)

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], taps: Sequence[int] = ()) -> tuple[State, Verified]:
        """A state of one row that has committed ``ids``, and what the target says after the last of them.

        Returns:
            the state, and a `Verified` with logits [1, 1, V] of the last position and taps [1, S, T·H] of all.
        """
        if len(ids) == 0:
            raise InputError("The prompt has no tokens.", "Give at least one token.")
        state, seen = self.new_state(tuple(taps)), []
        for start in range(0, len(ids), self.prefill_chunk or len(ids)):
            last, tapped = self.read(state, [ids[start : start + (self.prefill_chunk or len(ids))]])
            seen.append(tapped)
        return state, Verified(self.logits(last)[:, None], torch.cat(seen, dim=1))

    @property
    def prefill_chunk(self) -> int | None:
        """Tokens that are best read in one pass of a row; None: the whole prompt, and each row by itself."""
        return None if self._family.replays else PREFILL_BLOCK

    @torch.no_grad()
    def read(self, state: State, chunks: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Commit ``chunks``, a row's each, none empty and none longer than `prefill_chunk`.

        Returns hidden states [B, H] after the last token of each, and taps [B, m, T·H] up to the longest's end.
        """
        counts = [len(chunk) for chunk in chunks]
        padded = [[*chunk] + [0] * (max(counts) - len(chunk)) for chunk in chunks]
        hidden, tapped = state.run(torch.tensor(padded, dtype=torch.long, device=self.device))
        state.commit(counts)
        return hidden[torch.arange(len(counts)), torch.tensor(counts) - 1], tapped

    @torch.no_grad()
    def verify(self, state: State, ids: Tensor) -> Verified:
        """What the target says of ``ids`` [B, m] behind each row's committed tokens. Nothing is committed."""
        hidden, tapped = state.run(ids.to(self.device))
        return Verified(self.logits(hidden), tapped)

    def commit(self, state: State, kept: Sequence[int]) -> None:
        """Keep the first ``kept[b]`` tokens of the block last verified in each row and forget the rest, exactly."""
        block = state.block
        if block is None or len(kept) != state.rows or min(kept) < 0 or max(kept) > block:
            raise ValueError(f"commit of {list(kept)} tokens after a block of {block} in {state.rows} rows")
        with torch.no_grad():
            state.commit(kept)

    def _forward(self, ids: Tensor, positions: Tensor, cache: Any, *, taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Final-norm hidden states [B, m, H] and taps [B, m, T·H] of a block ``ids`` [B, m] behind ``cache``."""
        mask = self._family.block_mask(self.model, cache, ids.shape[1]) if self._family.block_mask else None
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        return self._hidden(taps, **inputs, **{self._family.cache_argument: cache})

    def _hidden(self, taps: Sequence[int], **inputs: Any) -> tuple[Tensor, Tensor]:
        with self._tapped(taps) as collected:
            last = self._base(**inputs).last_hidden_state
        return last, joined_taps(collected, taps, last)

    def new_state(self, taps: tuple[int, ...]) -> State:
        """The state of one row before any token."""
        forward = functools.partial(self._forward, taps=taps)
        if self._family.replays:
            from transformers import DynamicCache

            return ReplayState([0], forward, [DynamicCache(config=self.model.config)])
        attention = {layer: RaggedKV() for layer, kind in enumerate(self.spec.layers) if kind.attends}
        recurrent = self._new_recurrent(self.device, self.dtype) if self._new_recurrent else None
        return TargetState([0], forward, attention, recurrent)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] fp32 of hidden states [..., H] after the final norm."""
        return self.spec.finish_logits(self.packed_head(hidden).float())

    @contextlib.contextmanager
    def _tapped(self, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the outputs of tapped layers while the model runs; tap -1 is what enters layer 0.

        That is the embedding as the residual stream has it: some families scale it after looking it up.
        """
        collected: dict[int, Tensor] = {}

        def keep_input(_module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            collected[-1] = layer_input(args, kwargs)

        def keep_output(_module: Any, _inputs: Any, output: Any, *, tap: int) -> None:
            collected[tap] = layer_output(output)

        with contextlib.ExitStack() as hooks:
            for tap in taps:
                if tap == -1:
                    handle = self._layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
                else:
                    handle = self._layers[tap].register_forward_hook(functools.partial(keep_output, tap=tap))
                hooks.enter_context(handle)
            yield collected


@contextlib.contextmanager
def loading(checkpoint: Checkpoint) -> Iterator[None]:
    """What building and filling a model raises in the block becomes an `InputError` that names the folder."""
    from safetensors import SafetensorError

    folder = checkpoint.folder
    # Code of the checkpoint's own may raise anything.
    faults: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, KeyError)
    faults = (Exception,) if checkpoint.remote_code else faults
    try:
        yield
    except SafetensorError as error:
        raise InputError(
            f"The weights in {folder} are damaged: {error}.", "Download or copy the checkpoint again."
        ) from None
    except faults as error:
        raise InputError(
            f"{folder} cannot be loaded as a target: {first_line(error)}.",
            "Check that the folder holds config.json and the safetensors weights that belong to it.",
        ) from None


def refuse_absent(folder: Path, absent: Collection[str]) -> None:
    """`InputError` if there are parameters of the model that the checkpoint in ``folder`` lacks: ``absent``."""
    from transformers import __version__

    if absent:
        raise InputError(
            f"The weights in {folder} lack {len(absent)} tensors that the model has in transformers {__version__}, "
            f"among them {min(absent)}.",
            "Download or copy the checkpoint again; if it is whole, upgrade transformers: an older version may "
            "look for them elsewhere.",
        )


class _Unread:
    """What transformers takes for a tensor of a checkpoint: ``[...]`` reads it."""

    def __init__(self, read: Callable[[], Tensor]):
        self._read = read

    def __getitem__(self, _whole: Any) -> Tensor:
        return self._read()


def _placed(
    checkpoint: Checkpoint, spec: TargetSpec, kind: str, devices: Sequence[torch.device]
) -> dict[str, torch.device] | None:
    """Which of ``devices`` gets which part, by path in the model; None where the first alone holds all of it.

    Raises:
        EnvironmentFault: together they do not.
    """
    if devices[0].type != "cuda":  # main memory is lent as it is asked for
        return None
    needed, free = weight_bytes(checkpoint, kind), {devices[0]: free_memory(devices[0])}
    if needed <= (MOST_OF_MEMORY if devices[1:] else 1.0) * free[devices[0]]:
        return None
    free |= {device: free_memory(device) for device in devices[1:]}
    if not devices[1:]:
        raise placement.too_large(checkpoint.name, needed, free)
    with loading(checkpoint):
        model = _unfilled(checkpoint, kind)
    placed = placement.place(model, spec.names.layers, placement.room_for_weights(free))
    if placed is None:
        raise placement.too_large(checkpoint.name, needed, free)
    placement.say(checkpoint.name, placed, spec.names.layers)
    return placed


def _unfilled(checkpoint: Checkpoint, kind: str) -> Any:
    """The model without its weights, in the type that they are to have; quantised ones are not meant to stay so."""
    from transformers import AutoModelForCausalLM

    config = unquantised_config(checkpoint)
    own = torch.bfloat16 if scheme_of(checkpoint.folder) else config.dtype or torch.float32
    dtype = own if kind == "auto" else getattr(torch, kind)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=checkpoint.remote_code)


def _load_model(
    checkpoint: Checkpoint, kind: str, attention: str | None, placed: Mapping[str, torch.device] | None = None
) -> tuple[Any, Any]:
    """The model with its weights in the type ``kind``, and transformers' report of what it loaded.

    With ``placed`` every part is read onto its device, and moves there what its forward is given.

    Of a quantised checkpoint the plain model is built, and transformers gets the dequantised weights in place of the
    files: its own converters then rename and stack them, and each is read when it is due. Its quantisers stay out: most
    want a GPU, and a draft learns from BF16 activations anyway.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder, trusted = checkpoint.folder, checkpoint.remote_code
    options: dict[str, Any] = {"attn_implementation": attention, "output_loading_info": True}  # None: SDPA if it can
    if placed is not None:
        options["device_map"] = dict(placed)
    weights = checked_weights(folder)
    if scheme_of(folder) is None:
        dtype = kind if kind == "auto" else getattr(torch, kind)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trusted, **options)
    plain = _unfilled(checkpoint, kind)
    if (folder / "generation_config.json").is_file():
        options["generation_config"] = GenerationConfig.from_pretrained(folder)
    return type(plain).from_pretrained(
        None,
        config=plain.config,
        state_dict={name: _Unread(weight.read) for name, weight in weights.items()},
        dtype=torch.bfloat16 if kind == "auto" else getattr(torch, kind),
        **options,
    )


def unquantised_config(checkpoint: Checkpoint) -> Any:
    """The config in transformers' class, without what it says of quantised weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.remote_code)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    return config


def checked_weights(folder: Path) -> Mapping[str, Weight | Stored]:
    """The weights of the checkpoint in ``folder``.

    Raises:
        InputError: one is quantised in a way that is not read here. That is found from the files' headers: in the
            middle of its loading transformers would make a traceback of it.
    """
    weights = weights_in(folder)
    for weight in weights.values():
        weight.layout() if isinstance(weight, Weight) else _refuse_unsaid(weight)
    return weights


def _refuse_unsaid(tensor: Stored) -> None:
    """Raise `InputError` for float8 of an unknown scale, which transformers would take for the weight itself."""
    if tensor.dtype.startswith("F8"):
        raise InputError(
            f"{tensor.name} in {tensor.shard.path} is stored as {tensor.dtype}, and config.json does not say how "
            "it was quantised.",
            "Restore config.json, and hf_quant_config.json if there was one, from the checkpoint's repository.",
        )


def load_arguments(config: TargetConfig) -> dict[str, Any]:
    """What `Target.load` takes beside the name."""
    return config.model_dump(exclude={"name", "copies", "proofs", "stream"})


def layer_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states [B, S, H] in what a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def layer_output(output: Any) -> Tensor:
    """The hidden states [B, S, H] in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def joined_taps(tapped: Mapping[int, Tensor], taps: Sequence[int], last: Tensor) -> Tensor:
    """The tapped outputs [B, S, H] side by side, [B, S, T·H], on the device of ``last``; no column without ``taps``."""
    return torch.cat([tapped[tap].to(last.device) for tap in taps], dim=-1) if taps else last[..., :0]


def resolve_device(name: str, key: str = "target.device") -> torch.device:
    """Find the device called ``name``, which the setting ``key`` gave; "auto" is CUDA when there is one, else the CPU.

    Of several, as in "cuda:0,cuda:1", it is the first.

    Raises:
        InputError: it is no device's name.
        EnvironmentFault: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _device(name.partition(",")[0].strip(), key)


def resolve_devices(name: str, key: str = "target.device") -> list[torch.device]:
    """All devices that ``name`` allows: those it lists, or with "auto" the GPUs that are there.

    Raises: as `resolve_device`; `InputError` also where several are not all different GPUs.
    """
    if name == "auto":
        return placement.visible_devices() or [resolve_device(name, key)]
    devices = [_device(each.strip(), key) for each in name.split(",")]
    if len(devices) > 1 and (len({*devices}) < len(devices) or any(each.index is None for each in devices)):
        raise InputError(f"{key}={name} does not name several GPUs.", f"Set {key} to auto, or as in cuda:0,cuda:1.")
    return devices


def _device(name: str, key: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is not a device.", f"Set {key} to cpu, cuda or cuda:N.") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentFault(
            f"The device {name!r} cannot be used: {first_line(error)}.", f"Set {key} to cpu, or leave it at auto."
        ) from None
    return device


def keep_dtype(config: TargetConfig, known: str | None) -> TargetConfig:
    """``config`` with the type ``known`` in place of "auto": what was begun in a type goes on in it."""
    if config.dtype != "auto" or known is None:
        return config
    return config.model_copy(update={"dtype": known.removeprefix("torch.")})


def resolve_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> str:
    """The weights' type called ``name`` on ``device``; "auto" is `cpu_dtype` on a CPU and stays "auto" elsewhere."""
    return cpu_dtype(checkpoint) if name == "auto" and device.type == "cpu" else name
