"""How much of a device's memory a model may take: the share that its spec states."""

import math
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_FILES = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))


def room(device: torch.device, share: float) -> float:
    """Return how many bytes this process may still take on a device.

    It is what is free there, and no more than keeps all that the process takes within the share. On a CPU that is
    of the machine's memory, or of a container's limit, and the program itself counts; on a GPU what torch has handed
    out counts, and what others take is not free.

    Args:
        device: A CPU or a GPU.
        share: Above 0, at most 1.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return min(free + idle, share * total - torch.cuda.memory_allocated(device))
    memory = psutil.virtual_memory()
    taken: int = psutil.Process().memory_info().rss
    return min(memory.available, container_room(), share * min(memory.total, _container_limit()) - taken)


def keep(device: torch.device, share: float) -> None:
    """Let torch hand out no more of a GPU's memory to this process than its share; the last call counts."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


def container_room(cgroups: Path = _CGROUPS) -> float:
    """Return what a container's limit leaves, in bytes; infinity where there is no limit.

    The kernel's copies of files count as used there, but give way.
    """
    for folder, limit, used in _FILES:
        try:
            numbers = dict(line.split() for line in (cgroups / folder / "memory.stat").read_text().splitlines())
            files = int(numbers["active_file"]) + int(numbers["inactive_file"])
            return int((cgroups / folder / limit).read_text()) - int((cgroups / folder / used).read_text()) + files
        except (OSError, ValueError, KeyError):  # cgroups of the other version, or no number but "max"
            continue
    return math.inf


def _container_limit(cgroups: Path = _CGROUPS) -> float:
    for folder, limit, _ in _FILES:
        try:
            return int((cgroups / folder / limit).read_text())
        except (OSError, ValueError):
            continue
    return math.inf
