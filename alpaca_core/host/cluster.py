"""The host's application on a Ray cluster: one replica for each GPU, one address for all of them (Ray Serve).

A replica is a host of its own, with an engine, a scheduler and a queue. Ray's proxy sends each request to a replica
that has few, and passes on what it answers as it comes; Ray replaces a replica that has died or is not well, and adds
and takes away some with the load. Nothing here imports ray before it is asked for.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from alpaca_core.errors import HostUnavailable, InvalidRequest
from alpaca_core.host.application import application
from alpaca_core.host.keeping import WarmModel
from alpaca_core.host.protocol import Status
from alpaca_core.host.settings import Settings
from alpaca_core.spec import ModelSpec

_NAME = "alpaca"
_EVERYWHERE = ("0.0.0.0", "::")
_AT_ONCE = 1024
"""Requests at one replica: more than it takes, so that rows wait in its queue, where clients take turns."""
_CHECK = 5.0
"""Seconds between two looks at a replica's health; the third that is bad, or late, ends it."""
_LATE = 30.0
_GRACE = 60.0
"""Seconds that requests get to end where a replica is taken away; rows that have not come out are asked again."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many hosts there are, and what each has.

    Args:
        least: Replicas that there always are, at least 1.
        most: Replicas that there may be; more than `least` lets Ray add and take away some.
        gpus: Of each, at least 0; parts of one are shared. 0 is one CPU core instead.
        wanted: Requests at a replica, on average, from which on more replicas are added. One call of a client keeps
            four going.
        patience: Seconds that there have to be more before one is added.

    Raises:
        InvalidRequest: For numbers out of range.
    """

    least: int = 1
    most: int = 1
    gpus: float = 1.0
    wanted: float = 4.0
    patience: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InvalidRequest(
                f"at least one replica, and no fewer at most than at least, but got {self.least} and {self.most}. "
                "Set both numbers of replicas."
            )
        if not 0 <= self.gpus < float("inf") or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise InvalidRequest(
                f"a replica has a part of a GPU, or whole ones, but got {self.gpus}. Use 1, or 0 for a CPU core."
            )


def replicas_of(spec: ModelSpec, least: int, most: int | None, gpus: float | None) -> Replicas:
    """Say how many replicas a spec gets, and of how many GPUs: as many as vLLM splits its layers over, 0 on a CPU.

    Raises:
        InvalidRequest: For numbers out of range.
    """
    each = 0.0 if spec.device == "cpu" else float(spec.tensor_parallel_size)
    return Replicas(least, least if most is None else most, each if gpus is None else gpus)


class Replica:
    """One host among others, as Ray Serve runs it: made, asked for its application, and then whether it is well.

    Args:
        spec: The model.
        settings: How the host behaves.
        token: That requests have to bear.
    """

    def __init__(self, spec: ModelSpec, settings: Settings, token: str | None) -> None:
        self._warm = WarmModel(spec, settings)
        self._token = token
        self._began = False

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray's name
        return application(self._warm, self._token)

    def status(self) -> Status:
        """Look at it."""
        return self._warm.status()

    async def check_health(self) -> None:
        """Raise where this replica has to be replaced.

        A start ends with the first check, so that one waits for the model: a replica gets no rows before it has it.

        Raises:
            LoadError: If the model cannot be loaded.
            HostUnavailable: If it has been, and cannot be again.
        """
        if not self._began:
            await self._warm.tokenizer()
            self._began = True
        status = self.status()
        if not status.well:
            raise HostUnavailable(f"a replica loads or is ready, but this one's state is {status.state!r}.")


def bound(spec: ModelSpec, token: str | None, replicas: Replicas, settings: Settings | None = None) -> Any:
    """Return the application for `ray.serve.run`.

    Args:
        spec: The model; its files have to be found on every node.
        token: That requests have to bear; None asks for none.
        replicas: How many.
        settings: How each host behaves; None reads the environment of this process.

    Raises:
        InvalidRequest: If ray is not installed.
    """
    serve = _ray()[1]
    how_many: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        bounds = {"min_replicas": replicas.least, "max_replicas": replicas.most}
        how = {"target_ongoing_requests": replicas.wanted, "upscale_delay_s": replicas.patience}
        how_many = {"autoscaling_config": {**bounds, **how}}
    made = serve.deployment(
        serve.ingress()(Replica),
        name=_NAME,
        request_router_config={"request_router_class": "alpaca_core.host.routing:FewestRequests"},
        ray_actor_options={"num_cpus": 1, "num_gpus": replicas.gpus},
        max_ongoing_requests=_AT_ONCE,
        health_check_period_s=_CHECK,
        health_check_timeout_s=_LATE,
        graceful_shutdown_timeout_s=_GRACE,
        **how_many,
    )
    return made.bind(spec, settings or Settings.from_environment().served(), token)


def run_ray(spec: ModelSpec, address: str, port: int, token: str | None, replicas: Replicas) -> None:
    """Serve a model from a Ray cluster until this process gets SIGINT or SIGTERM; then Ray Serve is ended there.

    The cluster is that of ``$RAY_ADDRESS``, else the one that was started on this machine. None is started here: a node
    of Ray listens without authentication, so where it does is its owner's to say.

    Args:
        spec: The model; its files have to be found on every node.
        address: Where Ray's proxy listens: on the head node, or on every node with a replica for ``0.0.0.0``.
        port: Likewise.
        token: That requests have to bear; checked by the caller, who knows whether it may be None.
        replicas: How many.

    Raises:
        InvalidRequest: If ray is not installed.
        HostUnavailable: If the cluster cannot be reached, or serves already, or no replica starts.
    """
    serve = _ray()[1]
    made = bound(spec, token, replicas)
    with _cluster():
        if serve.status().proxies:
            raise HostUnavailable(
                "one model is served from a cluster, at one address, but Ray Serve runs there already. "
                "End it with `serve shutdown`, or use another cluster."
            )
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            location = "EveryNode" if address in _EVERYWHERE else "HeadOnly"
            serve.start(proxy_location=location, http_options={"host": address, "port": port})
            serve.run(made, name=_NAME, route_prefix="/")
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        except RuntimeError as error:
            raise HostUnavailable(f"no replica could be started: {_why(serve) or error}") from error
        finally:
            signal.signal(signal.SIGTERM, before)
            serve.shutdown()


def _why(serve: Any) -> str:
    """What Ray Serve keeps of the failure of a start: the end of a replica's traceback."""
    found = serve.status().applications.get(_NAME)
    told = [each.message for each in found.deployments.values()] if found else []
    return "\n".join(told)[-1500:].strip()


@contextmanager
def _cluster() -> Iterator[None]:
    """Be connected to a cluster."""
    ray = _ray()[0]
    where = os.environ.get("RAY_ADDRESS", "").strip()
    try:
        ray.init(address=where or "auto", log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = f"RAY_ADDRESS is {where!r:.80}" if where else "RAY_ADDRESS is not set, and none was started here"
        raise HostUnavailable(
            f"replicas run on a Ray cluster, but {told} ({str(error)[:300]}). Start one with `ray start --head`, on an "
            "address that only trusted machines reach, or set RAY_ADDRESS to the address of its head."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _ray() -> tuple[Any, Any]:
    """Import ray, which then reports nothing to anybody."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise InvalidRequest(
            f"serving from a Ray cluster needs Ray Serve, but it cannot be imported ({error}). "
            "Run pip install 'prefect-alpaca[ray]', on every node."
        ) from error
    return ray, serve
