"""Servers that answer as vLLM, SGLang and llama.cpp do: paths, fields and metric names as their code has them.

A draft of three tokens of which two are kept in every round; the ids of an answer follow from its prompt.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DRAFTED, KEPT = 3, 2


class Fake:
    """What one engine says. ``drafts`` False is one that was started without a draft."""

    def __init__(self, owner: str, *, drafts: bool = True, changed_token: int | None = None):
        self.owner, self.drafts, self.changed_token = owner, drafts, changed_token
        self.rounds = 5  # of requests before ours, to be left out
        self.requests: list[tuple[str, dict]] = []

    def get(self, path: str) -> str:
        if path == "/v1/models":
            return json.dumps({"object": "list", "data": [{"id": "served", "owned_by": self.owner}]})
        if path == "/metrics" and self.owner == "vllm":
            labels = 'engine="0",model_name="served"'
            counters = [
                ("spec_decode_num_drafts_total", labels, self.rounds),
                ("spec_decode_num_draft_tokens_total", labels, self.rounds * DRAFTED),
                ("spec_decode_num_accepted_tokens_total", labels, self.rounds * KEPT),
                *(
                    (
                        "spec_decode_num_accepted_tokens_per_pos_total",
                        f'{labels},position="{at}"',
                        self.rounds * (at < KEPT),
                    )
                    for at in range(DRAFTED)
                ),
            ]
            created = f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.7e+09\n"
            lines = [f"vllm:{name}{{{which}}} {float(count)}" for name, which, count in counters if self.drafts]
            return "# HELP vllm:spec_decode_num_drafts_total Drafts.\n" + created + "\n".join(lines) + "\n"
        if path == "/metrics" and self.owner == "llamacpp":
            counts = {"drafts": 1, "draft_tokens": DRAFTED, "accepted_tokens": KEPT}
            return "".join(
                f"# HELP llamacpp:spec_decode_num_{name}_total Speculative: …\n"
                f"# TYPE llamacpp:spec_decode_num_{name}_total counter\n"
                f"llamacpp:spec_decode_num_{name}_total {self.rounds * self.drafts * each}\n"
                for name, each in counts.items()
            )
        raise KeyError(path)

    def post(self, path: str, body: dict) -> dict:
        self.requests.append((path, body))
        if path == "/tokenize":
            chat = "content" if self.owner == "llamacpp" else "messages"
            return {"tokens": [1, 2, 3], "count": 3} if chat in body else {}
        if path == "/apply-template" and self.owner == "llamacpp":
            return {"prompt": body["messages"][0]["content"]}
        if path == "/v1/completions" and self.owner == "vllm":
            ids = self.written(body["prompt"], body["max_tokens"])
            choice = {"index": 0, "text": str(ids), "token_ids": ids, "finish_reason": "length"}
            return {"choices": [choice], "usage": {"completion_tokens": len(ids)}}
        if path == "/generate" and self.owner == "sglang":
            ids = self.written(body["input_ids"], body["sampling_params"]["max_new_tokens"])
            meta = {"completion_tokens": len(ids), "prompt_tokens": len(body["input_ids"])}
            meta |= {"spec_verify_ct": self.rounds_of(len(ids))} if self.drafts else {}
            return {"text": str(ids), "output_ids": ids, "meta_info": meta}
        if path == "/completion" and self.owner == "llamacpp":
            ids = self.written(body["prompt"], body["n_predict"])
            rounds = self.rounds_of(len(ids))
            timings = {"predicted_n": len(ids), "predicted_ms": 10.0}
            timings |= {"draft_n": rounds * DRAFTED, "draft_n_accepted": rounds * KEPT} if self.drafts else {}
            return {"content": str(ids), "tokens": ids, "timings": timings}
        raise KeyError(path)

    def written(self, prompt: list[int], length: int) -> list[int]:
        self.rounds += self.rounds_of(length)
        ids = [(sum(prompt) + at) % 97 for at in range(length)]
        if self.changed_token is not None and self.changed_token < length:
            ids[self.changed_token] += 1
        return ids

    @staticmethod
    def rounds_of(length: int) -> int:
        """The first token comes from the prompt's pass, every round adds the kept ones and one more."""
        return (length - 1) // (KEPT + 1)


@contextlib.contextmanager
def serving(fake: Fake) -> Iterator[str]:
    """The address at which ``fake`` answers while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(lambda: fake.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._say(lambda: json.dumps(fake.post(self.path, body)))

        def _say(self, make) -> None:
            try:
                status, text = 200, make()
            except KeyError as missing:
                status, text = 404, f"no {missing}"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
