"""The commands of `alpaca` around hosts: serve a model on an address, look at hosts, end them."""

import argparse
import os
import sys
from pathlib import Path

import httpx

from alpaca_core.errors import HostUnavailable, InvalidRequest
from alpaca_core.host.launcher import chosen, remote
from alpaca_core.host.neighbours import hosts, stop
from alpaca_core.host.place import is_loopback
from alpaca_core.host.protocol import Status
from prefect_alpaca.flows import terminal
from prefect_alpaca.flows.options import spec_of
from prefect_alpaca.flows.running import print_json, quiet

_SHORTEST = 16


def run_serve(options: argparse.Namespace) -> int:
    """Serve a model on TCP, or from a Ray cluster, until the process is ended."""
    token = token_of(options.address, options.token_file)
    spec = spec_of(options)
    if not options.ray and (options.replicas, options.most_replicas, options.gpus) != (1, None, None):
        raise InvalidRequest("--replicas, --most-replicas and --gpus are of a Ray cluster. Add --ray, or drop them.")
    from alpaca_core.host.cluster import replicas_of, run_ray
    from alpaca_core.host.server import run_tcp

    replicas = replicas_of(spec, options.replicas, options.most_replicas, options.gpus)
    at = f"[{options.address}]" if ":" in options.address else options.address
    asked = "with its token" if token else "without a token, from this machine alone"
    print(f"alpaca: {spec.base_model} will be served at http://{at}:{options.port}, {asked}", file=sys.stderr)
    if options.ray:
        run_ray(spec, options.address, options.port, token, replicas)
    else:
        run_tcp(spec, options.address, options.port, token)
    return 0


def run_host(options: argparse.Namespace) -> int:
    """Look at the hosts that there are, or end those of this machine."""
    if options.action == "status":
        with quiet("Looking …"):
            found = [status for _, status in hosts()]
            if (where := chosen()) not in ("off", "auto"):
                found.append(status_at(where))
        _print(options, found)
        return 0
    keys = tuple(options.keys)
    known = [(path, status) for path, status in hosts() if not keys or status.key.startswith(keys)]
    if keys and not known:
        raise InvalidRequest(
            f"no host of this machine has a key like {', '.join(keys)}. `alpaca host status` has them."
        )
    ended = [status for path, status in known if stop(path)]
    _print(options, ended)
    if clients := sum(status.clients for status in ended):
        told = f"{clients:,} clients had rows there, and start their host again. Cancel their runs to prevent that."
        print(f"alpaca: {told}", file=sys.stderr)
    return 0 if len(ended) == len(known) else 1


def status_at(url: str) -> Status:
    """Return the status of the host at a URL.

    Raises:
        HostUnavailable: If it does not answer as a host.
    """
    try:
        with remote(url) as client:
            return Status.model_validate(client.get("/v1/status", timeout=10.0).raise_for_status().json())
    except (httpx.HTTPError, ValueError) as error:
        told = str(error).partition("\n")[0]
        raise HostUnavailable(
            f"{url} does not answer as a host: {told:.200}. Check ALPACA_HOST and its token."
        ) from error


def described(status: Status) -> str:
    """Tell a host's status in a line: model, digest, memory, queue, tokens/s, uptime."""
    model = "its model"
    if (info := status.info) is not None:
        weights = f"{info.memory_gib:.2f} GiB of weights on {info.device}"
        resident = f"{status.memory_gib:.2f} GiB of main memory"
        model = f"{info.name} ({info.quantization}, {info.dtype}), digest {info.digest[:12]}, {weights}, {resident}"
    return (
        f"{status.key[:8]} {status.state}: {model}; {status.waiting:,} rows wait, {status.running:,} run, of "
        f"{status.clients:,} clients; {status.tokens_per_second:,.0f} tokens/s, {status.rows:,} rows so far; "
        f"up {_span(status.uptime)}, idle {_span(status.idle)}"
    )


def token_of(address: str, file: Path | None) -> str | None:
    """Return the token that requests have to bear: a file's, else ``$ALPACA_HOST_TOKEN``.

    Raises:
        InvalidRequest: If it is short, the file holds none, or there is none and others than this machine could ask.
    """
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
            mode = file.stat().st_mode & 0o777
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--token-file holds the token, but {file} cannot be read ({error}).") from error
        if not token:
            raise InvalidRequest(
                f"--token-file holds the token, but {file} is empty. `openssl rand -hex 32` makes one."
            )
        if mode & 0o077:  # no reason to refuse it: secrets that containers are given are such files
            print(f"alpaca: others on this machine may read {file} (mode {mode:o}); chmod 600 it.", file=sys.stderr)
    else:
        token = os.environ.get("ALPACA_HOST_TOKEN", "").strip()
    if not token and not is_loopback(address):
        raise InvalidRequest(
            f"a host that others can reach wants a token, but there is none for {address}. Set ALPACA_HOST_TOKEN or "
            "--token-file, or serve on 127.0.0.1."
        )
    if token and (len(token) < _SHORTEST or not token.isascii() or not token.isprintable()):
        raise InvalidRequest(
            f"a token has at least {_SHORTEST} ASCII characters, but this one has {len(token)}. "
            "`openssl rand -hex 32` makes one."
        )
    return token or None


def _print(options: argparse.Namespace, found: list[Status]) -> None:
    for status in found:
        if options.json:
            print_json(status.model_dump(mode="json", exclude={"info": {"chat_template"}}))
        else:
            terminal.console.print(terminal.text(described(status)))
    if not found and not options.json:
        terminal.console.print(terminal.text("There is no host on this machine.", "dim"))


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
