"""What /metrics shows, for Prometheus: under the names that autoscalers read of vLLM, and more under our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maxlm.serving.served import Served

_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960)


class _Engines(Collector):
    """What the engines count themselves, asked for when somebody looks."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """As the library wants it."""
        loops = {id(served.loop): served for served in reversed([*self._models.values()])}  # adapters share the first's
        stats = {served.name: served.loop.stats for served in loops.values()}
        used = lambda s: (s.blocks - s.free_blocks) / s.blocks if s.blocks else 0.0
        gauges = (
            ("vllm:num_requests_running", "Texts that are being decoded", lambda s: s.running),
            ("vllm:num_requests_waiting", "Requests that wait for their turn", lambda s: s.waiting),
            ("vllm:kv_cache_usage_perc", "Part of the cache's blocks in use, 1 is all", used),
            ("maxlm:cache_blocks", "Blocks of the cache", lambda s: s.blocks),
        )
        counters = (
            ("vllm:prompt_tokens", "Tokens of prompts", lambda s: s.prompt_tokens),
            ("vllm:generation_tokens", "Tokens made", lambda s: s.generated_tokens),
            ("vllm:num_preemptions", "Texts that were put back for want of blocks", lambda s: s.preemptions),
            ("vllm:spec_decode_num_draft_tokens", "Tokens that were guessed", lambda s: s.drafted_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Guesses that came true", lambda s: s.accepted_tokens),
            ("maxlm:cached_prompt_tokens", "Tokens of prompts found in the cache", lambda s: s.cached_tokens),
            ("maxlm:steps", "Steps of the engine", lambda s: s.steps),
        )
        for kind, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, words, value in rows:
                family = kind(name, words, labels=["model_name"])
                for model, now in stats.items():
                    family.add_metric([model], float(value(now)))
                yield family


class ServerMetrics:
    """The server's own counts, and those of the engines."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(models))
        label = ["model_name"]
        histogram = lambda name, words, buckets: Histogram(name, words, label, buckets=buckets, registry=self._registry)
        self._first = histogram("vllm:time_to_first_token_seconds", "From the request to its first token", _FIRST_S)
        self._between = histogram("vllm:inter_token_latency_seconds", "From a token to the next", _BETWEEN_S)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From the request to its end", _WHOLE_S)
        self._answers = Counter("maxlm:answers", "Answers by status", ["status"], registry=self._registry)
        self._left = Counter("maxlm:clients_left", "Clients that left before their answer", registry=self._registry)

    def tokens(self, model: str, n: int, seconds: float, *, first: bool) -> None:
        """So many came, so long after the last, or, the first, after the request."""
        if first:
            self._first.labels(model).observe(seconds)
        else:
            for _ in range(n):
                self._between.labels(model).observe(seconds / n)

    def ended(self, model: str, seconds: float) -> None:
        """A request, so long after it came."""
        self._whole.labels(model).observe(seconds)

    def answered(self, status: int) -> None:
        """With this status."""
        self._answers.labels(str(status)).inc()

    def left(self) -> None:
        """A client."""
        self._left.inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        found: bytes = generate_latest(self._registry)
        return found
