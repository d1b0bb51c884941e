"""Implementations of `LanguageModel`: the only rooms that import torch.

bitsandbytes says in the log at each int8 product that it casts, and at import that an optional kernel is
absent; neither is anything a user can act on. Its other messages come through.
"""

import logging

_CHATTER = ("MatMul8bitLt: inputs will be cast", "Failed to load CPU gemm_4bit_forward from kernels-community")


def _worth_reading(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CHATTER)


for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).addFilter(_worth_reading)
