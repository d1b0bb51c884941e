"""Every exception of the project, in one tree.

    AlpacaError
    ├── InvalidRequest          the call is wrong: settings, labels, arguments (also a ValueError)
    │   └── InvalidLabels       labels that cannot be told apart, or cannot be spelt
    ├── RowRejected             one row is wrong; verbs turn it into a `RowError` in the row's place
    ├── HostError               the host of a model cannot do it now
    │   ├── HostBusy            its queue is full; try again later
    │   └── HostUnavailable     it cannot be reached or started, or does not come back
    └── LoadError               the model cannot be loaded
        ├── ModelNotFound       no such folder, file or hub repository
        ├── DeviceUnavailable   the asked-for device is not on this machine
        ├── EngineUnavailable   the asked-for engine is not installed here
        ├── NotEnoughMemory     the weights do not fit
        ├── UnsafeCheckpoint    only a pickle is there, or code would have to be run
        ├── InvalidCheckpoint   missing, unexpected or non-finite tensors; unreadable files; another family
        │   └── DigestMismatch  the bytes are not those that were prepared
        └── InvalidAdapter      made for another base, or without any effect

Messages state the rule, the value that broke it, and the remedy.
"""

__all__ = [
    "AlpacaError",
    "DeviceUnavailable",
    "DigestMismatch",
    "EngineUnavailable",
    "HostBusy",
    "HostError",
    "HostUnavailable",
    "InvalidAdapter",
    "InvalidCheckpoint",
    "InvalidLabels",
    "InvalidRequest",
    "LoadError",
    "ModelNotFound",
    "NotEnoughMemory",
    "RowRejected",
    "UnsafeCheckpoint",
    "brief",
]


def brief(value: object, most: int = 80) -> str:
    """Write a value for a message, and no more than so many characters of it.

    Python refuses to write whole numbers of more than 4,300 digits, so long ones are told by their length.

    Example:
        >>> brief(0), brief("x" * 9, 5), brief(10**5000)
        ('0', "'xxxx", 'a whole number of 16,610 bits')
    """
    if isinstance(value, int) and value.bit_length() > 3 * most:
        return f"{'a negative' if value < 0 else 'a'} whole number of {value.bit_length():,} bits"
    return repr(value)[:most]


class AlpacaError(Exception):
    """Base of every error that this project raises on purpose."""


class InvalidRequest(AlpacaError, ValueError):
    """The call itself is wrong, whatever its rows hold."""


class InvalidLabels(InvalidRequest):
    """The labels cannot be told apart, or one of them cannot be spelt."""


class RowRejected(AlpacaError):
    """One row is wrong. Verbs catch it and put a `RowError` in the row's place.

    Args:
        code: One of `alpaca_core.model.ERROR_CODES`.
        message: Rule, value, remedy.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class HostError(AlpacaError):
    """The host of a model cannot do now what it was asked for."""


class HostBusy(HostError):
    """The host's queue is full; the same call may succeed later."""


class HostUnavailable(HostError):
    """The host cannot be reached or started, or did not come back."""


class LoadError(AlpacaError):
    """The model cannot be loaded."""


class ModelNotFound(LoadError):
    """No such folder, file or hub repository."""


class DeviceUnavailable(LoadError):
    """The device that was asked for is not on this machine."""


class EngineUnavailable(LoadError):
    """The engine that was asked for is not installed here."""


class NotEnoughMemory(LoadError):
    """The weights need more memory than the device has free."""


class UnsafeCheckpoint(LoadError):
    """Loading would unpickle a file or run a repository's code."""


class InvalidCheckpoint(LoadError):
    """Tensors are missing, unexpected, misshapen or not finite, a file cannot be read, or the family is another."""


class DigestMismatch(InvalidCheckpoint):
    """The bytes on the disk are not those that were prepared."""


class InvalidAdapter(LoadError):
    """The adapter belongs to another base, or changes nothing."""
