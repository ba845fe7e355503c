"""Hidden states that a vLLM writes, in place of our own capture: the same cache, at an engine's speed.

vLLM keeps the outputs of chosen layers of a request's prompt in a file (``extract_hidden_states`` with a hidden-states
connector; `nds engine vllm --hidden-states` prints how it is started). Its layer id i is the output of layer i - 1, and
0 the embedding; the id after the last layer is that layer's raw output, to which the target's own final norm is applied
here. So one pass gives the taps and the last state. Rows are compared with our own capture before any is believed.
"""

import contextlib
import fcntl
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron_dspark.config import TargetConfig
from nemotron_dspark.engines.clients import VLLM, connect, post
from nemotron_dspark.errors import CheckError, EnvironmentFault, InputError
from nemotron_dspark.targets.streamed import StreamedTarget
from nemotron_dspark.targets.target import Captured, Sequences, load_arguments

_AT_ONCE = 16  # requests of one server
_TOLERANCE = {torch.float32: 1e-3}  # of a token's norm, in the median; other types as below
_ROUNDED = 0.05
_START = "Start it with what `nds engine vllm --hidden-states` prints for this target and these taps."


def layer_ids(taps: Sequence[int], num_layers: int) -> list[int]:
    """What vLLM calls the layers whose outputs a cache of ``taps`` needs, ascending."""
    return [*(tap + 1 for tap in taps), num_layers]


class EngineStates(Protocol):
    """Where hidden states come from."""

    concurrency: int

    def states(self, ids: Sequence[int]) -> Tensor:
        """Outputs [S, layer ids, H] of a prompt of ``ids``."""
        ...


class Servers:
    """Running servers of one target, on machines that share the disk which they write to."""

    def __init__(self, urls: Sequence[str]):
        """
        Raises:
            InputError: one of them is no vLLM.
            EnvironmentFault: one of them does not answer.
        """
        self._engines = [connect(url) for url in urls]
        for engine in self._engines:
            if not isinstance(engine, VLLM):
                raise InputError(f"{engine.url} is {engine.title}, which does not write hidden states.", "Use vLLM.")
        self._busy: Counter[str] = Counter()
        self._lost: dict[str, EnvironmentFault] = {}
        self._lock = threading.Lock()
        self.concurrency = _AT_ONCE * len(urls)

    def states(self, ids: Sequence[int]) -> Tensor:
        """Ask the server with the fewest requests, and another one when it does not answer.

        Raises:
            InputError: it does not write hidden states.
            EnvironmentFault: no server is left, or what it wrote is not seen here.
        """
        while True:
            with self._lock:
                left = [engine for engine in self._engines if engine.url not in self._lost]
                if not left:
                    raise next(iter(self._lost.values()))
                engine = min(left, key=lambda each: self._busy[each.url])
                self._busy[engine.url] += 1
            body = {"model": engine.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
            try:
                answer, _ = post(f"{engine.url}/v1/completions", body)
            except EnvironmentFault as fault:
                with self._lock:
                    self._lost[engine.url] = fault
                continue
            finally:
                with self._lock:
                    self._busy[engine.url] -= 1
            path = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
            if path is None:
                raise InputError(f"{engine.url} writes no hidden states.", _START)
            return _taken(Path(path), ids, engine.url)


def _taken(path: Path, ids: Sequence[int], url: str) -> Tensor:
    """The hidden states in the file ``path``, which is deleted."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        with contextlib.suppress(FileNotFoundError), open(lock) as held:  # absent where the server writes without
            fcntl.flock(held, fcntl.LOCK_SH)  # until the server has written it
        found = _read(path, ids)
    except FileNotFoundError:
        raise EnvironmentFault(
            f"{url} wrote hidden states to {path}, which is not seen here.",
            "Run the build on the server's machine, or let both share that folder.",
        ) from None
    for file in (path, lock):
        file.unlink(missing_ok=True)
    return found


def _read(path: Path, ids: Sequence[int]) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tokens, states = file.get_tensor("token_ids"), file.get_tensor("hidden_states")
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}.", "Delete it, and let the server write it again.") from None
    if tokens.tolist() != list(ids) or len(states) != len(ids):
        raise InputError(
            f"{path} holds the states of other tokens than those of the sample.",
            "Serve the target whose tokenizer this is, without a prefix cache.",
        )
    return states


class Folder:
    """Files that a vLLM has written, of any name; they stay."""

    concurrency = 2

    def __init__(self, path: Path):
        """`InputError` when ``path`` is not there or a file in it is damaged."""
        if not path.is_dir():
            raise InputError(f"There is no folder {path}.", "Give the address of a server, or a folder of its files.")
        self._path, self._files = path, dict[bytes, Path]()
        for file in sorted(path.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files[_digest(opened.get_tensor("token_ids").tolist())] = file
            except SafetensorError as error:
                raise InputError(f"{file} holds no hidden states of vLLM: {error}.", "Take it away.") from None

    def states(self, ids: Sequence[int]) -> Tensor:
        """`InputError` when there are none of a prompt of ``ids``."""
        file = self._files.get(_digest(ids))
        if file is None:
            raise InputError(
                f"{self._path} has no hidden states of one of the samples, {len(ids)} tokens that begin with "
                f"{list(ids[:8])}.",
                "Have the server read the samples whole, as this target's template renders them.",
            )
        return _read(file, ids)


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(str(list(ids)).encode()).digest()


def source_of(engines: Sequence[str]) -> EngineStates:
    """The servers at addresses, or the folder that is named."""
    if len(engines) == 1 and not engines[0].startswith(("http://", "https://")):
        return Folder(Path(engines[0]))
    return Servers(engines)


class EngineTarget(StreamedTarget):
    """A target whose `captures` are an engine's. Of its weights only embedding and final norm stay here."""

    _source: EngineStates
    _proven = False

    def pass_tokens(self, taps: Sequence[int]) -> int:
        return 0

    @torch.no_grad()
    def captures(
        self, batches: Sequence[Sequences], taps: Sequence[int], on_layer: Callable[[int], None] = lambda layer: None
    ) -> Iterator[Captured]:
        ids = layer_ids(taps, self.spec.num_layers)
        with ThreadPoolExecutor(self._source.concurrency, "ask") as pool:
            try:
                asked = [[pool.submit(self._source.states, row) for row in _rows(batch)] for batch in batches]
                for batch, futures in zip(batches, asked, strict=True):
                    rows = [self._checked(future.result(), ids) for future in futures]
                    found = self._together(rows, batch.ids.shape[1], ids, taps)
                    if not self._proven:
                        self._prove(_rows(batch), found, taps)
                    yield found
            finally:
                pool.shutdown(cancel_futures=True)

    def _checked(self, states: Tensor, ids: Sequence[int]) -> Tensor:
        if states.shape[1:] != (len(ids), self.spec.hidden_size):
            raise InputError(
                f"The engine keeps {states.shape[1]} layers of width {states.shape[2]}, and the cache takes {len(ids)} "
                f"of width {self.spec.hidden_size}.",
                _START,
            )
        if states.dtype != self.dtype:
            kinds = [str(dtype).removeprefix("torch.") for dtype in (states.dtype, self.dtype)]
            raise InputError(
                f"The engine computes in {kinds[0]}, and the cache is to hold states of {kinds[1]}.",
                f"Build it with --set target.dtype={kinds[0]}, or start the engine with --dtype {kinds[1]}.",
            )
        return states

    def _together(self, rows: Sequence[Tensor], length: int, ids: Sequence[int], taps: Sequence[int]) -> Captured:
        """Rows of [S, ids, H] as a batch, padded on the right with zeros."""
        states = torch.zeros(len(rows), length, len(ids), self.spec.hidden_size, dtype=self.dtype)
        for row, found in enumerate(rows):
            states[row, : len(found)] = found
        norm = self.model.get_submodule(self.spec.names.final_norm)
        last = norm(states[:, :, ids.index(self.spec.num_layers)].to(self.device))
        tapped = torch.cat([states[:, :, ids.index(tap + 1)] for tap in taps], dim=-1).to(self.device)
        return Captured(tapped, last)

    def _prove(self, rows: Sequence[list[int]], found: Captured, taps: Sequence[int]) -> None:
        """`CheckError` unless a few rows are what our own capture gives, to the rounding of the type."""
        chosen = sorted({0, len(rows) // 2, len(rows) - 1})
        alone = [Sequences(torch.tensor([rows[row]])) for row in chosen]
        width, most = self.spec.hidden_size, _TOLERANCE.get(self.dtype, _ROUNDED)
        names = [f"tap {tap}" for tap in taps]
        for row, own in zip(chosen, super().captures(alone, taps), strict=True):
            tapped = zip(own.taps.split(width, -1), found.taps.split(width, -1), strict=True)
            for name, (ours, theirs) in zip([*names, "the last state"], [*tapped, (own.last, found.last)], strict=True):
                ours, theirs = ours[0].float(), theirs[row, : len(rows[row])].float()
                error = float(((ours - theirs).norm(dim=-1) / ours.norm(dim=-1)).median())
                if not error <= most:
                    raise CheckError(
                        f"The engine's hidden states are not the target's: {name} differs by {error:.1%} of its norm.",
                        f"{_START} Check that it serves the same weights.",
                    )
        self._proven = True


def _rows(batch: Sequences) -> list[list[int]]:
    """The token ids of each row, without padding."""
    lengths = batch.lengths or (batch.ids.shape[1],) * len(batch.ids)
    return [row[:length] for row, length in zip(batch.ids.tolist(), lengths, strict=True)]


def load_served(config: TargetConfig, engines: Sequence[str]) -> EngineTarget:
    """The target that ``config`` names with hidden states from ``engines``: addresses of servers, or one folder.

    Raises:
        InputError: an engine writes no hidden states; and as `StreamedTarget.load`.
        EnvironmentFault: an engine does not answer.
    """
    source = source_of(engines)
    target = EngineTarget.load(config.named, **load_arguments(config))
    target._source, target._proven = source, not config.proofs
    return target
