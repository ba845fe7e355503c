"""A target larger than the memory: weights come to the data, one layer at a time.

A forward over many batches reads every weight once if all of them go through layer i before any enters layer i + 1.
Each batch's forward is the model's own, unmodified, in a greenlet that pauses before every layer; so masks, rotary
tables and what layers hand on stay the model's business, and the hidden states are those of a whole forward, bit for
bit. A thread reads the next layer while this one runs. Of a mixture whose layers are too large, the experts of a layer
go by in groups, and the forwards pause before each as well.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from nemotron_dspark.config import TargetConfig
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.targets.checkpoint import Checkpoint
from nemotron_dspark.targets.families import family_for
from nemotron_dspark.targets.layer_weights import LayerWeights
from nemotron_dspark.targets.mamba2 import even_chunks
from nemotron_dspark.targets.placement import MOST_OF_MEMORY, free_memory, weight_bytes
from nemotron_dspark.targets.schemes import scheme_of
from nemotron_dspark.targets.skeleton import without_weights
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.target import (
    Captured,
    Sequences,
    Target,
    Verified,
    joined_taps,
    layer_input,
    layer_output,
    load_arguments,
    loading,
    resolve_device,
    resolve_dtype,
    unquantised_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAYERS_SHARE = 0.5  # of what is free, for two layers; of larger ones the experts are read in groups
_STATES_SHARE = 0.5  # of what is free beside the weights, for the states of a pass; the rest is one batch's activations
_LONG_WAIT = 0.1  # of the time


def load_for_capture(config: TargetConfig) -> Target:
    """Load the target that ``config`` names: streamed when it says so, or when the weights do not fit.

    Raises: as `Target.load`.
    """
    if _streams(config):
        return StreamedTarget.load(config.named, **load_arguments(config))
    return Target.of(config)


def streams(stream: str, weights: float, memory: float) -> bool:
    """Whether a target's layers are streamed.

    ``stream`` is `TargetConfig.stream`; with "auto" they are when ``weights`` bytes leave too little of ``memory``.
    """
    return stream == "on" or (stream == "auto" and not weights < MOST_OF_MEMORY * memory)


def divides(two_layers: float, memory: float) -> bool:
    """Whether the experts of a layer are read in groups, with ``memory`` bytes free and two layers of that size."""
    return two_layers > layers_room(memory)


def layers_room(memory: float) -> float:
    """Bytes of ``memory`` for two layers."""
    return _LAYERS_SHARE * memory


def token_bytes(num_taps: int, hidden_size: int, itemsize: int, used_experts: int = 0) -> int:
    """Bytes that a token in flight holds: its hidden state, what a layer makes of it, its taps, the last state.

    Where experts are read in groups, also what each of its ``used_experts`` has made of it, and what they are given.
    """
    inside = used_experts + 2 if used_experts else 0
    return (num_taps + 3 + inside) * hidden_size * itemsize


def pass_tokens(memory: float, of_a_token: int) -> int:
    """Tokens of a pass, with ``memory`` bytes free beside the weights; the rest is for one batch's activations."""
    return max(0, int(_STATES_SHARE * memory / of_a_token))


def _streams(config: TargetConfig) -> bool:
    """As `streams`, on this machine; a target without weights on the disk, of no known size, is not."""
    if config.stream != "auto":
        return config.stream == "on"
    checkpoint, device = Checkpoint.of(config, weights=True), resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device, checkpoint)
    return streams(config.stream, weight_bytes(checkpoint, dtype), free_memory(device))


class _Run(greenlet):
    """One batch's forward. It returns to whoever started it before every layer, and at its end."""

    def __init__(self, inputs: dict[str, Any], taps: Sequence[int], forward: Any):
        super().__init__(lambda: forward(**inputs).last_hidden_state)
        self.length = inputs["input_ids"].shape[1]
        self.taps = frozenset(taps)
        self.tapped: dict[int, Tensor] = {}


def _pause() -> None:
    """Let the other batches come as far as this one, if there are any."""
    run = getcurrent()
    if isinstance(run, _Run):
        cast(greenlet, run.parent).switch()


class StreamedTarget(Target):
    """A `Target` for `captures`, whose layers are read when they run. It does not decode."""

    decodes = False

    def __init__(
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", spec: TargetSpec, folder: Path, weights: LayerWeights
    ):
        super().__init__(model, tokenizer, spec, folder)
        self._weights = weights
        self._waited, self._captured = 0.0, 0.0  # seconds: for layers, and in all passes
        weights.divide(layers_room(free_memory(self.device)), _pause)
        for at, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._keep(at))

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> Self:
        """As `Target.load`; of the weights only what belongs to no layer is read.

        Raises:
            InputError: also when a tensor is missing or has another shape, which is known before any layer is read.
        """
        from transformers import AutoModelForCausalLM

        checkpoint = Checkpoint.find(name, revision=revision, weights=True, trust_remote_code=trust_remote_code)
        folder, spec, trusted = checkpoint.folder, checkpoint.read_spec(), checkpoint.remote_code
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where, checkpoint)
        with loading(checkpoint):
            config = unquantised_config(checkpoint)
            own = torch.bfloat16 if scheme_of(folder) else config.dtype or torch.float32
            wanted = own if kind == "auto" else getattr(torch, kind)
            with without_weights():
                model = AutoModelForCausalLM.from_config(
                    config,
                    dtype=wanted,
                    attn_implementation=family_for(spec).attention,
                    trust_remote_code=trusted,
                )
        for module in model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = buffer if buffer is None else buffer.to(where)
        weights = LayerWeights(model, spec.names.layers, folder, where)
        try:
            weights.load_resident()
        except torch.OutOfMemoryError:
            raise EnvironmentFault(
                f"The embedding of {name} does not fit into the memory of {where}.", "Use a device with more memory."
            ) from None
        return cls(model, checkpoint.load_tokenizer(), spec, folder, weights)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def pass_tokens(self, taps: Sequence[int]) -> int:
        """Tokens whose states fit into the memory beside two layers."""
        used = self._weights.used_experts
        of_a_token = token_bytes(len(taps), self.spec.hidden_size, self.dtype.itemsize, used)
        return pass_tokens(free_memory(self.device) - self._weights.peak_bytes, of_a_token)

    def capture(self, input_ids: Tensor, attention_mask: Tensor | None, taps: Sequence[int]) -> Captured:
        (captured,) = self.captures([Sequences(input_ids, attention_mask)], taps)
        return captured

    def captures(
        self, batches: Sequence[Sequences], taps: Sequence[int], on_layer: Callable[[int], None] = lambda layer: None
    ) -> Iterator[Captured]:
        began = time.monotonic()
        runs: list[_Run | None] = [_Run(batch.inputs(self.device), taps, self._base) for batch in batches]
        parts = self._weights.parts
        with ThreadPoolExecutor(1, "read") as reader:
            try:
                reading = reader.submit(self._weights.load, 0)
                for run in runs:
                    self._go_on(run, 0)
                for part, following in itertools.zip_longest(parts, parts[1:]):
                    waited = time.monotonic()
                    reading.result()
                    self._waited += time.monotonic() - waited
                    self._weights.use(part)
                    if part.experts is None:
                        on_layer(part.layer)
                    if following is not None:
                        reading = reader.submit(self._weights.load, following.layer, following.experts)
                    for at, run in enumerate(runs):
                        last = self._go_on(run, part.layer)
                        if following is None and run is not None:
                            runs[at] = None  # its states are free as soon as whoever gets them is done
                            yield Captured(joined_taps(run.tapped, taps, last), last)
                            del last
                    if self.device.type == "cuda":
                        torch.cuda.current_stream(self.device).synchronize()  # the layer is in use until then
                    self._weights.free(part)
            finally:
                self._captured += time.monotonic() - began
                for run in runs:
                    if run is not None and not run.dead:
                        run.throw()

    def remarks(self) -> tuple[str, ...]:
        """What a user should know of the passes so far."""
        if self._waited <= _LONG_WAIT * self._captured:
            return ()
        rate = self._weights.read_bytes / max(self._weights.read_seconds, 1e-9)
        return (
            f"Of the target's time {self._waited / self._captured:.0%} went by waiting for its layers, which come at "
            f"{rate / 1e6:.0f} MB/s: a faster disk, or more memory for longer passes, would save it.",
        )

    def logits(self, hidden: Tensor) -> Tensor:
        with self._weights.loaded([f"{self.spec.names.head}.weight"]):
            return super().logits(hidden)

    def prefill(self, ids: Sequence[int], taps: Sequence[int] = ()) -> tuple[Any, Verified]:
        raise InputError("A streamed target does not decode.", "Load it whole (--stream off) on a larger device.")

    @torch.no_grad()
    def _go_on(self, run: Any, layer: int) -> Any:
        """Let ``run`` compute up to its next pause, in which number ``layer`` is the layer that runs."""
        with even_chunks(self._layers[layer], run.length):
            return run.switch()

    def _enter(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        run = getcurrent()
        if isinstance(run, _Run) and layer is self._layers[0] and -1 in run.taps:
            run.tapped[-1] = layer_input(args, kwargs)
        _pause()

    def _keep(self, at: int) -> Any:
        def keep(_layer: Any, _inputs: Any, output: Any) -> None:
            run = getcurrent()
            if isinstance(run, _Run) and at in run.taps:
                run.tapped[at] = layer_output(output)

        return keep
