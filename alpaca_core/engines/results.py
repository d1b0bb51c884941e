"""Numbers on their way from the device to the host, without waiting for what was started after them."""

import torch
from torch import Tensor


class Arriving:
    """A tensor that is being copied to the host.

    Args:
        tensor: On any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def numbers(self) -> list[float]:
        """Wait for the copy; its numbers."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._copy.tolist()
        return numbers
