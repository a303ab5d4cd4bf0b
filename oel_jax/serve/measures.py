"""What `GET /metrics` shows, in the form of Prometheus."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
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

    def follow_policies(self, report: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        """Show what a report says of each policy when it is read: the same for all of them."""
        self.registry.register(_PolicyCollector(report))

    def written(self, success: bool) -> None:
        """Count a try to record."""
        (self.recorded if success else self.unrecorded).inc()

    def page(self) -> bytes:
        """All numbers."""
        return generate_latest(self.registry)


class _PolicyCollector:
    """Turns a report, policy -> name -> number, into gauges with the label 'policy'."""

    def __init__(self, report: Callable[[], Mapping[str, Mapping[str, float]]]):
        self._report = report

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing is asked for before there are policies."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges as they are now."""
        report = self._report()
        for name in sorted({name for numbers in report.values() for name in numbers}):
            gauge = GaugeMetricFamily(
                f"oel_policy_{name}", f"Of the answers of a policy: {name}", labels=["policy"]
            )
            for policy, numbers in report.items():
                if name in numbers:
                    gauge.add_metric([policy], numbers[name])
            yield gauge
