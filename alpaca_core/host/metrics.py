"""What Prometheus reads of a host."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

from alpaca_core.host.protocol import Status

_GIB = 2**30


def exposition(status: Status) -> tuple[bytes, str]:
    """Write a host's status in Prometheus' text format; also return its content type."""
    registry = CollectorRegistry()
    labels = {"model": status.info.name, "digest": status.info.digest[:12]} if status.info else {}

    def gauge(name: str, about: str, value: float) -> None:
        Gauge(name, about, registry=registry).set(value)

    def counter(name: str, about: str, value: float) -> None:
        Counter(name, about, registry=registry).inc(value)

    about = Gauge("alpaca_model", "The model that is kept; 1.", ["model", "digest"], registry=registry)
    if labels:
        about.labels(**labels).set(1)
    gauge("alpaca_ready", "Whether the model is loaded.", float(status.state == "ready"))
    gauge("alpaca_rows_waiting", "Rows that the engine has not.", status.waiting)
    gauge("alpaca_rows_running", "Rows that the engine has.", status.running)
    gauge("alpaca_rows_waiting_limit", "Rows that may wait; more are refused.", status.queue_limit)
    gauge("alpaca_clients", "Clients whose rows wait or run.", status.clients)
    gauge("alpaca_tokens_per_second", "Tokens generated a second, of the last ten seconds.", status.tokens_per_second)
    gauge("alpaca_weights_bytes", "Of the model's weights on their device.", _weights(status))
    gauge("alpaca_engine_resident_bytes", "Main memory of the engine's process.", status.memory_gib * _GIB)
    gauge("alpaca_uptime_seconds", "Since the host began.", status.uptime)
    counter("alpaca_rows", "Rows that have come out.", status.rows)
    counter("alpaca_tokens", "Tokens that have been generated.", status.tokens)
    counter("alpaca_engine_restarts", "Engines that died and were replaced.", status.restarts)
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _weights(status: Status) -> float:
    return status.info.memory_gib * _GIB if status.info else 0.0
