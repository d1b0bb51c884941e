"""What Prometheus reads of a host."""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from alpaca_core.host.protocol import Status

_GIB = 2**30


def exposition(status: Status) -> tuple[bytes, str]:
    """Write a host's status in Prometheus' text format; also return its content type."""
    registry = CollectorRegistry()
    registry.register(_Told(status))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Told(Collector):
    """What was counted elsewhere."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Give each metric."""
        status, info = self._status, self._status.info
        model = GaugeMetricFamily("alpaca_model", "The model that is kept; 1.", labels=["model", "digest"])
        if info:
            model.add_metric([info.name, info.digest[:12]], 1)
        yield model
        gauges = {
            "alpaca_ready": ("Whether the model is loaded.", status.state == "ready"),
            "alpaca_rows_waiting": ("Rows that the engine has not.", status.waiting),
            "alpaca_rows_running": ("Rows that the engine has.", status.running),
            "alpaca_rows_waiting_limit": ("Rows that may wait; more are refused.", status.queue_limit),
            "alpaca_clients": ("Clients whose rows wait or run.", status.clients),
            "alpaca_tokens_per_second": ("Tokens generated, of the last ten seconds.", status.tokens_per_second),
            "alpaca_weights_bytes": ("Of the weights on their device.", info.memory_gib * _GIB if info else 0),
            "alpaca_engine_resident_bytes": ("Main memory of the engine's process.", status.memory_gib * _GIB),
            "alpaca_uptime_seconds": ("Since the host began.", status.uptime),
        }
        counters = {
            "alpaca_rows": ("Rows that have come out.", status.rows),
            "alpaca_tokens": ("Tokens that have been generated.", status.tokens),
            "alpaca_engine_restarts": ("Engines that died and were replaced.", status.restarts),
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(name, about, value=float(value))
        for name, (about, value) in counters.items():
            yield CounterMetricFamily(name, about, value=float(value))
