"""Where hosts of this machine live, and which of them a spec means. Nothing here imports torch.

Files of a host, in a folder that its user alone may enter, by the host's key: ``.sock`` (where it listens), ``.lock``
(held as long as it or its engine lives), ``.start`` (held by whoever starts it), ``.log``, and ``.log.1`` of the host
before it.
"""

import ipaddress
import os
import stat
import subprocess
import sys
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

from alpaca_core.adapters import find_adapters
from alpaca_core.checkpoints import Checkpoint, Convert, find_base, local_path
from alpaca_core.errors import HostUnavailable, InvalidCheckpoint
from alpaca_core.host.protocol import VERSION
from alpaca_core.spec import EMBEDDED_MODEL, ModelSpec, digest_of

_TEMPORARY = Path("/tmp")
"""Where everybody may make folders, and nobody may take another's; ``$TMPDIR`` may be one job's, or one login's."""
_DRIVER = Path("/dev/nvidiactl")
_GPUS = Path("/dev")
"""Where each GPU has a file, ``nvidia0`` and so on."""
_LONGEST = 100
"""Bytes of a Unix socket's path; systems refuse a little more than that."""


def runtime_folder() -> Path:
    """Return the folder of this user's hosts, made where it is not there.

    It is ``$ALPACA_RUNTIME``, else ``/tmp/alpaca-<user id>``: the same for all logins and services of a user, on this
    machine alone, and there until it is shut down. ``$XDG_RUNTIME_DIR`` goes with the login, and a host outlives that;
    a home may be several machines'. Somebody else may have taken the name in ``/tmp``: then it is refused.

    Raises:
        HostUnavailable: If it cannot be made, belongs to somebody else, or others may enter it.
    """
    folder = Path(os.environ.get("ALPACA_RUNTIME") or _TEMPORARY / f"alpaca-{os.getuid()}")
    remedy = "Set ALPACA_RUNTIME to a folder of your own on this machine, or ALPACA_HOST=off to load models here."
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise HostUnavailable(f"hosts live in {folder}, but it cannot be made ({error.strerror}). {remedy}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise HostUnavailable(
            f"hosts live in a folder that its user alone may enter (mode 700), but {folder} has mode "
            f"{stat.S_IMODE(found.st_mode):o} and user {found.st_uid}. {remedy}"
        )
    if len(os.fsencode(folder)) + len("/0123456789abcdef.start") > _LONGEST:
        raise HostUnavailable(f"a socket's path has at most {_LONGEST} bytes, but {folder} is too long. {remedy}")
    return folder


def absolute(spec: ModelSpec) -> ModelSpec:
    """Write a spec's paths so that they mean the same in a process that works in another folder."""

    def whole(source: str) -> str:
        path = local_path(source)
        return str(path.absolute()) if source != EMBEDDED_MODEL and path.exists() else source

    adapters = [each.model_copy(update={"source": whole(each.source)}) for each in spec.adapters]
    own = whole(spec.adapter) if spec.adapter else spec.adapter
    return spec.model_copy(update={"base_model": whole(spec.base_model), "adapter": own, "adapters": tuple(adapters)})


def find_base_apart(spec: ModelSpec) -> Checkpoint:
    """Find a spec's base model, which the engine will read and check.

    What has to be converted first is converted by a process of its own.

    Raises:
        LoadError: As `alpaca_core.checkpoints.find_base`.
    """
    return find_base(spec, _apart("unpack_gguf"), _apart("convert_tokenizer"), check=False)


def device_of(spec: ModelSpec) -> str:
    """Name the device that a spec means on this machine, without asking torch: two names of one device are one.

    A model that is spread has several, as in ``cuda:0+cuda:1``.
    """
    shown = _shown()
    if spec.device == "cpu" or (spec.device == "auto" and (shown == [] or not _DRIVER.exists())):
        return "cpu"
    first = int(spec.device.partition(":")[2] or 0)
    wanted = range(first, first + spec.tensor_parallel_size)
    if spec.device_map is not None:
        wanted = range(len(shown) if shown else max(1, len(list(_GPUS.glob("nvidia[0-9]*")))))
    if shown is None:
        return "+".join(f"cuda:{number}" for number in wanted)
    if wanted[-1] >= len(shown):
        return f"no. {wanted[-1]} of {len(shown)} GPUs"
    return "+".join(f"cuda:{shown[number]}" for number in wanted)


def meet(one: str, other: str) -> bool:
    """Say whether two models, with devices as `device_of` names them, have one in common."""
    return not set(one.split("+")).isdisjoint(other.split("+"))


def is_loopback(address: str) -> bool:
    """Say whether only this machine reaches an address: ``localhost``, or a number, perhaps IPv4 written as IPv6."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return address == "localhost"
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return (mapped or number).is_loopback


def _shown() -> list[str] | None:
    """Return the GPUs that this process is shown; None is all. CUDA looks no further than at a name that means none."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return None
    named = (name.strip() for name in told.split(","))
    return list(takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), named))


def key_of(spec: ModelSpec, base: Checkpoint) -> str:
    """Return the key of the host that a spec means: one for each base, its bits, engine and device.

    Adapters are not part of it, unless they are merged into the base; nor are sizes of batches or shares of memory.
    """
    merged = [adapter.info.digest for adapter in find_adapters(spec)] if spec.merge_adapter else []
    device = device_of(spec)
    auto = "float32" if device == "cpu" else "bfloat16"
    dtype = auto if spec.dtype == "auto" else spec.dtype
    place = [device, spec.device_map, spec.tensor_parallel_size]
    told = [base.digest, merged, spec.quantization, dtype, place, spec.engine]
    return digest_of([VERSION, version("prefect-alpaca"), *told])[:16]


def _apart(name: str) -> Convert:
    program = (
        "import sys, pathlib; from alpaca_core.engines import conversion; "
        f"conversion.{name}(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )

    def convert(source: Path, folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, str(source), str(folder)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            if why.startswith(f"{InvalidCheckpoint.__module__}.InvalidCheckpoint: "):
                raise InvalidCheckpoint(why.partition(": ")[2])
            raise InvalidCheckpoint(f"{source} cannot be converted ({why:.300}). Fetch the model again.")

    return convert
