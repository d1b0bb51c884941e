"""A causal language model in two parts: its body gives states, and its head reads logits from them.

Logits are larger than states by the vocabulary over the width, 85 times with the embedded model: so who wants
them of many tokens reads the tokens at once, and the logits of a few at a time.
"""

from copy import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


def split(network: PreTrainedModel) -> tuple[nn.Module, PreTrainedModel]:
    """Cut a network where its body ends; the parts share its weights.

    The head is the network itself, as transformers runs it, around a body that gives out what it is given. So
    whatever a family does to its logits is done: scaled in Granite and Cohere, capped in Gemma.

    Args:
        network: With its adapters in place, but without the `PeftModel` around it.

    Returns:
        The body, and the head, to be called with the states as ``inputs_embeds``.
    """
    ((name, body),) = [part for part in network.named_children() if isinstance(part[1], PreTrainedModel)]
    head = copy(network)
    head._modules = {**network._modules, name: _Given()}
    head.__dict__.pop("forward", None)  # accelerate's hook, which would run the network and its body
    return body, head


class _Given(nn.Module):
    """Stands where the body stood."""

    @property
    def decoder(self) -> "_Given":
        """What OPT calls of its body."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return _Output(last_hidden_state=inputs_embeds)


class _Output(BaseModelOutputWithPast):
    """Of any family: what else a head hands on, such as the logits of a router, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
