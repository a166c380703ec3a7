"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from finetune.inference.server import Server

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # edges of the histograms


class Metrics:
    """Prometheus' text: what the requests did, and the state of the engine when it is asked for."""

    def __init__(self, server: Server) -> None:
        self.server, self.registry = server, CollectorRegistry()
        self.requests = Counter("finetune_requests", "Requests answered to their end", registry=self.registry)
        self.tokens = Counter("finetune_generated_tokens", "Tokens generated", registry=self.registry)
        self.first = Histogram(
            "finetune_time_to_first_token_seconds",
            "From request to first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.between = Histogram(
            "finetune_time_per_token_seconds", "Between two tokens", buckets=SECONDS, registry=self.registry
        )
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Any:
        engine = self.server.worker.engine
        scheduler = engine.scheduler
        for name, text, value in (
            ("running_sequences", "Sequences in work", len(scheduler.running)),
            ("waiting_sequences", "Sequences that wait", len(scheduler.waiting)),
            ("used_blocks", "Cache blocks in use", engine.pool.used),
            ("blocks", "Cache blocks", engine.pool.count),
            ("preemptions", "Preemptions since the start", scheduler.preemptions),
            ("prefix_hit_tokens", "Prompt tokens found in the prefix cache", scheduler.hits),
            ("prefix_miss_tokens", "Prompt tokens computed", scheduler.misses),
            ("guessed_tokens", "Guesses of the drafter", engine.proposed),
            ("accepted_tokens", "Guesses accepted", engine.accepted),
        ):
            yield GaugeMetricFamily(f"finetune_{name}", text, value)

    async def page(self, _: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")
