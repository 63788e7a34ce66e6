"""Frozen linear layers in 8 or 4 bits, by bitsandbytes: which, and how each gets its weight."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardwright.train.checkpoint.read.merged import NAME
from shardwright.train.config import RunConfig
from shardwright.train.config.model import NOT_QUANTIZED, QUANTIZER, quantization_of
from shardwright.train.errors import UserError, not_installed
from shardwright.train.model import adapter, adapter_base
from shardwright.train.model.first_values import materialize
from shardwright.train.model.weights import InitialValues

BLOCK_ELEMENTS = 64
"""Of 4-bit weights, those that share a scale in fp32."""


def layers(model: nn.Module) -> dict[str, Any]:
    """Return a model's quantised layers by their names."""
    if "bitsandbytes" not in sys.modules:
        return {}
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are not the packed weight, or the bias, of a quantised layer."""
    packed = {p for layer in layers(model).values() for p in layer.parameters()}
    yield from ((name, p) for name, p in model.named_parameters() if p not in packed)


def to_be_quantised(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers of a model on the meta device that are to be quantised, by their names.

    They are those that transformers' `from_pretrained` quantises (5.23): linear ones but for the
    head and what is tied to the embedding. What an adapter trains is not among them.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = _kept_whole(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear)
        and should_convert_module(name, kept)
    }


def _kept_whole(model: PreTrainedModel) -> list[str]:
    """Return patterns of the names of layers that stay as they are."""
    from transformers.quantizers.base import get_keys_to_not_convert

    of_adapter = [f"lora_A.{NAME}", f"lora_B.{NAME}"]
    unused = [r".*\.modules_to_save", r".*\.original_module", "modules_to_save", "original_module"]
    return [*get_keys_to_not_convert(adapter.bare(model)), *of_adapter, *unused]


def scales_bytes(inputs: int, outputs: int, bits: str) -> int:
    """Return what lies beside the codes of a quantised weight. Pure.

    Source: bitsandbytes 0.50, functional.py: in 4 bits a scale of fp32 for each block, and the 16
    values that codes mean; in 8 bits one for each output.
    """
    if bits == "4bit":
        return 4 * -(-inputs * outputs // BLOCK_ELEMENTS) + 4 * 16
    return 4 * outputs


class Quantiser:
    """Takes the first values of a model's base one by one, and packs those that are quantised."""

    def __init__(
        self, model: PreTrainedModel, bits: str, compute: torch.dtype, device: torch.device | str
    ) -> None:
        """Put layers without values in the place of those that are to be quantised."""
        self._compute, self.device = compute, device
        _lay_out(model, bits, compute)
        self._layers = {f"{name}.weight": layer for name, layer in layers(model).items()}
        self._settings = {name: dict(vars(each.weight)) for name, each in self._layers.items()}
        self._plain = {name: plain for plain, name in adapter_base.left_out(model).items()}
        self._digest = adapter_base.Digest()

    def take(self, name: str, values: torch.Tensor) -> bool:
        """Take a parameter's values, flat and in fp32; return whether they have found their place.

        They may be overwritten from then on.
        """
        packed = self._taken(name, values)
        if packed is not None:
            self._layers[name].weight = packed
        return packed is not None

    def _taken(self, name: str, values: torch.Tensor) -> nn.Parameter | None:
        if (plain := self._plain.get(name)) is not None:
            self._digest.add(plain, values)
        if (layer := self._layers.get(name)) is None:
            return None
        return _packed(layer, self._settings[name], values, self._compute, self.device)

    def finish(self, model: nn.Module) -> None:
        """Note what the base was; bring the layers' biases to the dtype in which they compute.

        bitsandbytes does so itself in the first forward pass, and in place (0.50, nn/modules.py).
        """
        for layer in self._layers.values():
            if layer.bias is not None and layer.bias.dtype != self._compute:
                layer.bias.data = layer.bias.data.to(self._compute)
        model._base_digest = self._digest.hexdigest()  # type: ignore[assignment]


class DividingQuantiser(Quantiser):
    """The same for an engine that divides parameters: packed weights are plain ones to it.

    Codes are a parameter of whole numbers; scales are beside it, whole, and a layer has both
    together when its weight has been gathered.
    """

    def __init__(
        self, model: PreTrainedModel, bits: str, compute: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(model, bits, compute, device)
        self.elements = {n: p.numel() for n, p in model.named_parameters()}
        """Of each parameter, before it was packed."""
        for layer in self._layers.values():
            shape, dtype = codes(layer.in_features, layer.out_features, bits)
            empty = torch.empty(shape, dtype=dtype, device="meta")
            layer.weight = nn.Parameter(empty, requires_grad=False)
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(compute)
            layer.register_forward_pre_hook(_gathered)

    def codes_of(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return what a parameter is to hold of its values, flat; keep the scales in its layer."""
        packed: Any = self._taken(name, values)
        if packed is None:
            return values
        layer = self._layers[name]
        if hasattr(packed, "quant_state"):
            layer.quant_state = packed.quant_state
        else:
            layer.state.SCB = packed.SCB
        found: torch.Tensor = packed.data.view(-1)
        return found


def codes(inputs: int, outputs: int, bits: str) -> tuple[tuple[int, int], torch.dtype]:
    """Return shape and dtype of a packed weight without its scales. Pure."""
    if bits == "4bit":
        return (-(-inputs * outputs // 2), 1), torch.uint8
    return (outputs, inputs), torch.int8


def _gathered(layer: Any, _: tuple[Any, ...]) -> None:
    """Have a layer find its codes in a weight that has just been gathered.

    In 4 bits it does so itself (bitsandbytes 0.50, fix_4bit_weight_quant_state_from_module). What
    is gathered lies in the same memory in the backward pass.
    """
    if hasattr(layer, "state"):
        layer.weight.CB = None
        layer.state.CB = layer.weight.data


def fill(
    model: PreTrainedModel, values: InitialValues, config: RunConfig, dtype: torch.dtype
) -> None:
    """Give a model on the meta device its values in ``dtype``, those to be quantised packed.

    Collective, as `materialize` is.
    """
    bits, device = quantization_of(config.model), config.launcher.device
    if bits == NOT_QUANTIZED:
        materialize(model, values, dtype, device)
        return
    quantiser = Quantiser(model, bits, compute_dtype(config), device)
    materialize(model, values, dtype, device, quantiser.take)
    quantiser.finish(model)


def dividing(model: PreTrainedModel, config: RunConfig) -> DividingQuantiser | None:
    """Return what packs a model on the meta device that is to be divided; None for no packing."""
    bits = quantization_of(config.model)
    if bits == NOT_QUANTIZED:
        return None
    return DividingQuantiser(model, bits, compute_dtype(config), config.launcher.device)


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Return in which dtype a run's quantised layers compute."""
    found: torch.dtype = getattr(torch, config.precision.computes_in.torch_name)
    return found


def _lay_out(model: PreTrainedModel, bits: str, compute: torch.dtype) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(not_installed(f"model.quantization={bits}", QUANTIZER)) from None
    # In 8 bits it says in every forward pass that what goes in is cast to fp16 (0.50).
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    settings = BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
    )
    names = to_be_quantised(model)
    replace_with_bnb_linear(model, _kept_whole(model), settings)
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.register_forward_pre_hook(functools.partial(_in_dtype, compute))
        # Its packed weight and scales are made of the base again, and in no checkpoint.
        layer.register_state_dict_post_hook(_drop_packed)
        # In an evaluation it would repack a weight in place for inference alone (bitsandbytes
        # 0.50, nn/modules.py, Linear4bit.forward), on CPUs that have such instructions.
        layer.support_avx512bf16_for_cpu = False


def _in_dtype(compute: torch.dtype, layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Do as autocast does, of which bitsandbytes' products know nothing."""
    return (given[0].to(compute), *given[1:])


def _drop_packed(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        if key != f"{prefix}bias":
            del state[key]


def _packed(
    layer: Any,
    settings: dict[str, Any],
    values: torch.Tensor,
    compute: torch.dtype,
    device: torch.device | str,
) -> nn.Parameter:
    """Return a layer's quantised weight, as transformers makes it of values in ``compute``."""
    import bitsandbytes as bnb

    rows, columns = layer.out_features, layer.in_features
    if issubclass(layer.source_cls, Conv1D):
        weight = values.view(columns, rows).T.contiguous()
    else:
        weight = values.view(rows, columns)
    weight = weight.to(compute)
    packed: Any
    if isinstance(layer, bnb.nn.Linear4bit):
        packed = bnb.nn.Params4bit(weight, requires_grad=False, **settings)
    else:
        # It is quantised on its way from the host.
        packed = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    found: nn.Parameter = packed.to(device)
    return found


# --- what is in a live model ----------------------------------------------------------------------


def digest_of(model: nn.Module) -> str | None:
    """Return the hash of what a model's base was quantised from; None where it is not."""
    return getattr(model, "_base_digest", None)


def scales(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what lies beside the packed weights of quantised layers, each with its values."""
    for layer in layers(model).values():
        if (state := _state_of_codes(layer)) is not None:
            yield from (state.absmax, state.code)
            continue
        found = (getattr(layer.weight, "SCB", None), layer.state.SCB)
        yield from (tensor for tensor in found if tensor is not None)


def expected(config: RunConfig) -> dict[str, Any]:
    """Return what must be found of quantised layers in the live model. Pure."""
    kinds = {NOT_QUANTIZED: [], "8bit": ["int8 by rows"], "4bit": [f"nf4 by {BLOCK_ELEMENTS}"]}
    return {"packed_weights": kinds[quantization_of(config.model)], "trained_packed_weights": []}


def read_back(model: nn.Module) -> dict[str, Any]:
    """Return the same, read off the live model."""
    found = layers(model)
    return {
        "packed_weights": sorted({_kind(layer) for layer in found.values()}),
        "trained_packed_weights": [n for n, each in found.items() if each.weight.requires_grad][:3],
    }


def _state_of_codes(layer: Any) -> Any:
    """Return what 4-bit codes mean; None of 8-bit ones. A divided weight itself does not know."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _kind(layer: Any) -> str:
    state = _state_of_codes(layer)
    if state is None:
        return f"{str(layer.weight.dtype).removeprefix('torch.')} by rows"
    return f"{state.quant_type} by {state.blocksize}"
