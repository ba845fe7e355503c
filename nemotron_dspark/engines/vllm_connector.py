"""vLLM's hidden-states connector for a CPU, to be loaded by vLLM itself (``kv_connector_module_path``).

The one that comes with vLLM copies through pinned memory on a CUDA stream and waits for its events, which a machine
without CUDA does not have. This one writes when the request is finished. Read with vLLM 0.32.0.
"""

import os

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (  # pyrefly: ignore
    ExampleHiddenStatesConnector,
)


class _Done:
    """A copy that is finished, where vLLM asks an event."""

    def query(self) -> bool:
        return True


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    """Writes a finished request's hidden states [S, layers, H] and token ids [S], then lets go of the lock."""

    def _submit_async_write(self, pending) -> None:
        if not self._is_tp_rank_zero:
            return
        blocks = self._kv_cache[torch.tensor(pending.block_ids)]  # [blocks, layers, tokens of a block, H]
        states = blocks.transpose(1, 2).flatten(0, 1)[: len(pending.token_ids)]
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        try:
            save_file({"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}, pending.filename)
        finally:
            lock = self._lock_fds.pop(pending.req_id, None)
            if lock is not None:
                os.close(lock)
        self._req_copy_events[pending.req_id] = _Done()
