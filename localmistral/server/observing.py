"""What a server counts, in Prometheus's form: requests, tokens, waiting, times.

One registry a server. Knows nothing of routes.
"""

from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from localmistral.answer import ChatItem, ChatResult, ChatStream
from localmistral.server.serving import Serving

_FIRST_TOKEN_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Observer:
    """The counters of one server; `render` gives what /metrics shows."""

    def __init__(self, serving: Serving) -> None:
        self._registry = CollectorRegistry()
        self.responses = Counter(
            "localmistral_http_responses",
            "Responses by route and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self.first_token_s = Histogram(
            "localmistral_time_to_first_token_seconds",
            "From the request to its first token, waiting included.",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self.per_token_s = Histogram(
            "localmistral_time_per_output_token_seconds",
            "Mean time between the tokens of one answer.",
            buckets=_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(serving))

    def observe(self, first_token_s: float, decode_s: float, tokens: int) -> None:
        """One answer has ended."""
        if tokens:
            self.first_token_s.observe(first_token_s)
        if tokens > 1:
            self.per_token_s.observe(decode_s / (tokens - 1))

    def render(self) -> bytes:
        return generate_latest(self._registry)


async def observed(stream: ChatStream, observer: Observer) -> AsyncIterator[ChatItem]:
    """The items of `stream`; its result is counted as it passes."""
    async for item in stream:
        if isinstance(item, ChatResult):
            observer.observe(item.time_to_first_token_s, item.decode_s, item.completion_tokens)
        yield item


class _EngineCollector:
    """The engine's own totals, read when somebody asks."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        chat = self._serving.chat
        ready = GaugeMetricFamily(
            "localmistral_ready", "1 when the model is loaded and the engine lives."
        )
        alive = chat is not None and chat.engine.is_alive
        ready.add_metric([], float(alive))
        if chat is None or not alive:
            return [ready]
        now = chat.engine.metrics()
        requests = CounterMetricFamily(
            "localmistral_requests", "Generations by how they ended.", labels=["outcome"]
        )
        for outcome in ("finished", "cancelled", "failed"):
            requests.add_metric([outcome], getattr(now, outcome))
        tokens = CounterMetricFamily("localmistral_tokens", "Tokens by kind.", labels=["kind"])
        kinds = {
            "prompt": now.prompt_tokens,
            "prompt_cached": now.cached_tokens,
            "generated": now.generated_tokens,
        }
        for kind, count in kinds.items():
            tokens.add_metric([kind], count)
        settings = chat.engine.settings
        gauges = {
            "running": ("Generations under way.", now.running),
            "waiting": ("Generations in the queue.", now.waiting),
            "kv_tokens": ("Tokens in the KV cache.", now.stored_tokens),
            "kv_capacity_tokens": (
                "Tokens the KV cache holds.",
                settings.context * settings.parallel,
            ),
        }
        return [ready, requests, tokens, *(_gauge(name, *of) for name, of in gauges.items())]


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"localmistral_{name}", text)
    gauge.add_metric([], value)
    return gauge
