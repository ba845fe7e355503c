"""What Prometheus sees. Each server has a registry of its own, so that two in one process do not collide."""

from collections.abc import Callable
from functools import partial

from nemotron_dspark.serving import needs_extra

with needs_extra():
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    """Counters of one server; every method of theirs is thread-safe."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        count, spread = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self.requests = count(
            "nds_requests",
            "requests by endpoint and outcome: ok, cancelled (client gone), rejected (4xx), failed (5xx)",
            ["endpoint", "outcome"],
        )
        self.prompt_tokens = count("nds_prompt_tokens", "tokens of prompts that are answered")
        self.reused_tokens = count("nds_reused_tokens", "of these, tokens that had been read before")
        self.generated_tokens = count("nds_generated_tokens", "tokens generated")
        self.rounds = count("nds_rounds", "rounds of the decoder, each for all active requests")
        self.round_requests = spread(
            "nds_round_requests", "requests that shared a round", buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.accepted_length = spread(
            "nds_accepted_length",
            "tokens a request gained in a round, the target's own included",
            buckets=(*range(1, 10), 12, 16, 24, 32),
        )
        self.first_token_seconds = spread(
            "nds_first_token_seconds", "seconds from a request's arrival to its first token", buckets=_SECONDS
        )
        self.request_seconds = spread(
            "nds_request_seconds", "seconds from a request's arrival to its end", buckets=_SECONDS
        )

    def watch(self, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        """Gauges that are read when they are asked for."""
        Gauge("nds_waiting_requests", "requests in the queue", registry=self._registry).set_function(waiting)
        Gauge("nds_active_requests", "requests being decoded", registry=self._registry).set_function(active)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)
