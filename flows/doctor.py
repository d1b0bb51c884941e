"""What `alpaca doctor` looks at: each thing that has to be right, what was found, and what to do."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from alpaca_core import Judgment, ModelSpec, judge, load_model
from alpaca_core.cache import cache_folder
from alpaca_core.errors import AlpacaError
from alpaca_core.host.launcher import chosen
from alpaca_core.host.neighbours import hosts
from alpaca_core.host.protocol import Status
from alpaca_core.loading import verify_checkpoint
from prefect_alpaca.flows.hosting import described, status_at

_GIB = 2**30
_POOL = "gpu"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: ``ok``, worth a ``note``, or ``broken``, and then what to do."""

    name: str
    state: Literal["ok", "note", "broken"]
    found: str
    remedy: str = ""


def examine(spec: ModelSpec, *, verify: bool = False) -> Iterator[Check]:
    """Look at Python, the libraries, the machine, the model and Prefect, one after the other.

    Args:
        spec: The model that is loaded and asked a question.
        verify: Hash all of its files again before that.
    """
    yield _look("python", _python)
    yield _look("libraries", _libraries)
    yield _look("machine", _machine)
    yield _look("gpu", _gpu, "Install torch again, in a build that fits this machine's driver.")
    if verify:
        yield _look("files", lambda: _files(spec))
    yield _look("model", lambda: _model(spec))
    yield from _hosts()
    yield from _prefect()


def _look(name: str, check: Callable[[], Check], remedy: str = "Report it, if that does not say what to do.") -> Check:
    """Check one thing; whatever is raised becomes what was found, for a doctor does not break down."""
    try:
        return check()
    except AlpacaError as error:  # whose messages hold their remedy
        return Check(name, "broken", str(error))
    except Exception as error:
        return Check(name, "broken", _told(error), remedy)


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    needed = metadata("prefect-alpaca")["Requires-Python"]
    if platform.python_version() not in SpecifierSet(needed):
        return Check("python", "broken", found, f"Use Python {needed}.")
    return Check("python", "ok", found)


def _libraries() -> Check:
    needed = [Requirement(line) for line in requires("prefect-alpaca") or []]
    wrong = []
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                if version(requirement.name) not in requirement.specifier:
                    wrong.append(f"{requirement} is needed, {version(requirement.name)} is installed")
            except PackageNotFoundError:
                wrong.append(f"{requirement} is needed, none is installed")
    if wrong:
        return Check("libraries", "broken", "; ".join(wrong), "Run `make install`, or pip with constraints.txt.")
    shown = ("prefect", "torch", "transformers", "peft", "bitsandbytes")
    return Check("libraries", "ok", ", ".join(f"{name} {version(name)}" for name in shown))


def _machine() -> Check:
    memory, folder = psutil.virtual_memory(), cache_folder()
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(home).free
    found = (
        f"{psutil.cpu_count()} cores, {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB memory free, "
        f"{free / _GIB:.1f} GiB free for {folder}"
    )
    if free < _GIB:
        return Check("machine", "broken", found, "Free 1 GiB there, or set ALPACA_CACHE to a folder with space.")
    return Check("machine", "ok", found)


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "note", "none that torch sees, so models run on the CPU")
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Check("gpu", "ok", ", ".join(f"{gpu.name} with {gpu.total_memory / _GIB:.0f} GiB" for gpu in names))


def _files(spec: ModelSpec) -> Check:
    digests = verify_checkpoint(spec)
    return Check("files", "ok", ", ".join(f"{name}: {digest[:12]} over all files" for name, digest in digests.items()))


def _model(spec: ModelSpec) -> Check:
    with load_model(spec) as model:
        row = judge(model, ["Is this a question?"])[0]
        info = model.info
    loaded = (
        f"{info.name} on {info.device}, {info.memory_gib:.2f} GiB, loaded in {info.load_seconds:.1f} s, "
        f"digest {info.digest[:12]}"
    )
    if not isinstance(row, Judgment):
        return Check("model", "broken", f"{loaded}, but {row.message}")
    return Check("model", "ok", f"{loaded}, and it judges")


def _hosts() -> Iterator[Check]:
    found = [_kept(status) for _, status in hosts()]
    yield from found or [Check("host", "ok", "none keeps a model warm; the runs of a deployment start one")]
    yield from [_look("host", _host_at)] if os.environ.get("ALPACA_HOST") else []


def _host_at() -> Check:
    where = chosen()
    if where in ("off", "auto"):
        return Check("host", "ok", f"ALPACA_HOST={where}")
    kept = _kept(status_at(where))
    return replace(kept, found=f"{where}: {kept.found}")


def _kept(status: Status) -> Check:
    if status.state == "failed":
        return Check("host", "broken", described(status), "Read its log, and `alpaca host stop` it.")
    return Check("host", "ok", described(status))


def _prefect() -> Iterator[Check]:
    api = _look("prefect api", _api, "Correct Prefect's settings: PREFECT_… variables, or ~/.prefect/profiles.toml.")
    yield api
    if api.state == "ok":
        yield _look("work pool", _work_pool, "Look into the server's log.")


def _api() -> Check:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        remedy = "Run `prefect server start` and `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`."
        return Check("prefect api", "note", "none is configured: each process starts its own, for a while", remedy)
    remedy = "Run `prefect server start`, correct PREFECT_API_URL, which ends in /api, or `prefect config unset` it."
    try:
        with get_client(sync_client=True) as client:
            answered: object = client.api_version()
        if not isinstance(answered, str):
            raise ValueError(f"a version is a text, but that service says {answered!r:.80}")
    except Exception as error:
        if isinstance(error, PrefectHTTPStatusError) and error.response.status_code in (401, 403):
            remedy = "Set PREFECT_API_AUTH_STRING as that server has it, or PREFECT_API_KEY for Prefect Cloud."
        return Check("prefect api", "broken", f"{url} does not answer as Prefect's API: {_told(error)}", remedy)
    return Check("prefect api", "ok", f"{url}, version {answered}")


def _work_pool() -> Check:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            pool = client.read_work_pool(_POOL)
    except ObjectNotFound:
        remedy = f"Run `prefect work-pool create {_POOL} --type process` before you deploy."
        return Check("work pool", "note", f"{_POOL!r} does not exist", remedy)
    return Check("work pool", "ok", f"{pool.name}, of type {pool.type}")
