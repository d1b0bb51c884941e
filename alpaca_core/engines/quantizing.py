"""Plain weights into 8 and 4 bits while they are read, each looked at before its numbers are gone.

transformers turns a tensor that it has read onto a GPU into int8 by way of the CPU: there, back, and then bitsandbytes.
These are its quantizers, with one step of their own: the same kernel on the same numbers, where the tensor lies.

The step has both ends of the tensor beside it for `check_finite`, since no integer is NaN. They stay on the device
until all is read, and are no error here: what a step raises is only text in transformers' report.
"""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn.modules import Int8Params
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from alpaca_core.engines.recovering import Stopped, ran_out


def recipe(quantization: str, dtype: torch.dtype) -> Any:
    """Return the `BitsAndBytesConfig` that `from_pretrained` is to be given for ``int8`` or ``nf4``.

    Args:
        quantization: As in a spec.
        dtype: That the network computes in.
    """
    if quantization == "int8":
        # at bitsandbytes' default 6.0 outlier columns are picked over the batch, so a neighbour changes a row
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    ours: Any = config
    ours.quant_method = f"alpaca_{quantization}"  # by which transformers finds the quantizer
    return ours


def ends_of(network: PreTrainedModel) -> dict[str, Tensor]:
    """The least and the greatest number of each tensor that was quantized, ``(2,)``, in what it was quantized from.

    That is float16 for int8, as bitsandbytes' kernel wants it, and the network's own dtype for nf4.
    """
    quantizer: Any = network.hf_quantizer
    ends: dict[str, Tensor] = quantizer.ends
    return ends


class _Ours:
    """What both quantizers add to transformers' own."""

    def __init__(self, quantization_config: Any, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)  # type: ignore[call-arg]
        self.ends: dict[str, Tensor] = {}
        # it is found: from here on transformers and PEFT see a network of bitsandbytes, as it is
        quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES


@register_quantizer("alpaca_int8")
class _Int8(_Ours, Bnb8BitHfQuantizer):
    def get_quantize_ops(self) -> ConversionOps:
        return _Step(self.ends, _to_int8, torch.float16)


@register_quantizer("alpaca_nf4")
class _Nf4(_Ours, Bnb4BitHfQuantizer):
    def get_quantize_ops(self) -> ConversionOps:
        theirs: Any = super()  # quantizes where the tensor lies
        return _Step(self.ends, theirs.get_quantize_ops().convert)


class _Step(ConversionOps):
    """Look at the numbers of a tensor, then quantize it."""

    def __init__(
        self, ends: dict[str, Tensor], quantize: Callable[..., dict[str, Any]], dtype: torch.dtype | None = None
    ) -> None:
        self._ends, self._quantize, self._dtype = ends, quantize, dtype

    def convert(self, input_dict: dict[str, Any], *args: Any, **told: Any) -> dict[str, Any]:
        try:
            plain = {name: self._look(name, given) for name, given in input_dict.items()}
            return self._quantize(plain, *args, **told)
        except Exception as error:
            if ran_out(error):
                raise Stopped from error
            raise

    def _look(self, name: str, given: Any) -> Tensor:
        tensor: Tensor = given[0] if isinstance(given, list) else given
        plain = tensor.to(self._dtype or tensor.dtype)
        self._ends[name] = torch.stack(plain.aminmax())
        return plain


def _to_int8(plain: dict[str, Tensor], *, model: nn.Module, **_: Any) -> dict[str, Any]:
    """As bitsandbytes' `Int8Params` does on its way from a CPU to a GPU."""
    made = {}
    for name, half in plain.items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        lying = issubclass(module.source_cls, Conv1D)  # GPT-2's layers have their weights the other way
        numbers, scales, _columns = int8_vectorwise_quant((half.t() if lying else half).contiguous())
        made[name] = Int8Params(numbers, requires_grad=False, CB=numbers, SCB=scales)
    return made
