"""What `GET /metrics` shows, in the form of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Measures:
    """Counters of one server; names of users and texts never become labels."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {"registry": self.registry}
        self.requests = Counter(
            "oel_requests", "Requests by route and status", ["route", "status"], **made
        )
        self.seconds = Histogram(
            "oel_request_seconds", "From request to end of answer", buckets=_SECONDS, **made
        )
        self.first_seconds = Histogram(
            "oel_first_token_seconds", "From request to first token", buckets=_SECONDS, **made
        )
        self.prompt_tokens = Counter("oel_prompt_tokens", "Tokens of prompts", **made)
        self.generated_tokens = Counter(
            "oel_generated_tokens", "Tokens of answers", ["policy"], **made
        )
        self.finishes = Counter(
            "oel_answers", "Answers by policy and how they ended", ["policy", "finish"], **made
        )
        self.recorded = Counter("oel_recorded", "Exchanges and feedback on disk", **made)
        self.unrecorded = Counter(
            "oel_record_failures", "Exchanges and feedback that could not be recorded", **made
        )
        self._gauges: list[Gauge] = []

    def follow(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Show a number that is asked for when it is read."""
        gauge = Gauge(name, what, registry=self.registry)
        gauge.set_function(value)
        self._gauges.append(gauge)

    def written(self, success: bool) -> None:
        """Count a try to record."""
        (self.recorded if success else self.unrecorded).inc()

    def page(self) -> bytes:
        """All numbers."""
        return generate_latest(self.registry)
