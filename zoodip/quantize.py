"""Weights in 4 or 8 bits: packing a weight, and the layers that hold it packed and dequantise it on use.

A backward pass through such a layer dequantises again, so that no dequantised weight is kept in between.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import nn

from zoodip.errors import notice

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def default_precision(device: torch.device) -> str:
    """Default precision of activations: fp16 halves memory on a GPU; on a CPU fp32, as bf16 measures slopes less precisely."""
    return "fp16" if device.type == "cuda" else "fp32"


@cache
def warn_of_emulation(mixed_precision: str, device_type: str) -> None:
    """Tell, once, that this processor computes in 16 bits only slowly."""
    if mixed_precision != "fp32" and emulates_16_bits(device_type):
        notice(
            f"--mixed_precision {mixed_precision}: this processor has no instructions for it; it saves memory, but fp32 is faster"
        )


def emulates_16_bits(device_type: str) -> bool:
    """Whether the device is an x86 CPU with nothing newer than AVX2; AVX-512 without bf16 is not recognised.

    With bf16 or fp16, a step of the miniature then takes about four times as long as with fp32
    (benchmarks/emulated_precision.json).
    """
    return device_type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def frozen_format(quantization: str) -> str:
    """Storage of text encoder and VAE beside a UNet in `quantization`: as many bits, in a format that is never tuned."""
    return {"affine8": "int8", "affine4": "nf4"}.get(quantization, quantization)


def pack_weight(weight: torch.Tensor, quantization: str) -> dict[str, torch.Tensor]:
    """The tensors that represent a Linear or Conv2d weight, as the layers below hold and --save_quantized writes them.

    nf4:  bitsandbytes NormalFloat4, blocks of 64, absmax itself quantised (Dettmers et al. 2023). The weight is packed
          flat, because the CPU kernel is slow or wrong for some shapes of more than one dimension; in slices, because
          quantising takes ten times a slice's memory; and, for a convolution, with the input channels last, as
          the convolution kernels read it.
    int8: one scale per output row (absolute maximum / 127), as in the paper's INT8 rows.
    affine8, affine4: a scale and a zero point per output row, from `affine_integers`; two 4-bit integers per byte.
    """
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    rows = weight.reshape(len(weight), -1)
    if quantization in ("affine8", "affine4"):
        bits = int(quantization[-1])
        integers, scale, zero = affine_integers(rows, bits)
        return {quantization: integers.flatten() if bits == 8 else two_a_byte(integers.flatten()), "scale": scale, "zero": zero}
    if quantization == "int8":
        scale = rows.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
        return dict(int8=(rows / scale).round().to(torch.int8), scale=scale)
    if quantization != "nf4":
        raise ValueError(f"unknown quantization {quantization!r}; choose nf4, int8, affine8, affine4 or none")
    from bitsandbytes import functional as bnb

    slices = [bnb.quantize_4bit(part.float(), blocksize=64, quant_type="nf4") for part in rows.flatten().split(1 << 21)]
    absmax = torch.cat([state.absmax for _, state in slices])
    offset = absmax.mean()
    quantized_absmax, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    return dict(
        nf4=torch.cat([packed.flatten() for packed, _ in slices]),
        absmax=quantized_absmax,
        absmax_scale=state.absmax,
        absmax_offset=offset,
    )


def affine_integers(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric integers per output row: weights [O, ...] -> (q int8 [O, ...], scale [O], zero point [O]); W = scale (q - zero).

    The range of a row includes 0, so that 0 is exact and the zero point is a whole number within the integers' range. Scale
    and zero point follow from minimum and maximum, without a search (PEQA, Kim et al. 2023, Eq. 1; TuneQDM, Ryu et al.
    2024). The authors of TuneQDM do not include 0 in the range, which makes a difference only for rows of one sign.
    """
    rows = rows.float()
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zero = smallest - (low / scale).round()
    integers = (rows / scale + zero).round().clamp(smallest, largest).to(torch.int8)
    return integers, scale.flatten(), zero.flatten()


def two_a_byte(integers: torch.Tensor) -> torch.Tensor:
    """Integers in [-8, 7], flat [n] -> bytes [ceil(n / 2)], the first of each pair in the lower half."""
    nibbles = F.pad((integers + 8).to(torch.uint8), (0, len(integers) % 2))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def quantized_layer(layer: nn.Module, packed: dict[str, torch.Tensor]) -> QuantizedLayer:
    """A Linear or Conv2d with its weight as `pack_weight` packed it. Raises ValueError if `packed` does not fit the layer."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"{type(layer).__name__} is never packed")
    formats = dict(nf4=NF4Layer, int8=Int8Layer, affine8=Affine8Layer, affine4=Affine4Layer)
    found = [name for name in formats if name in packed]
    if not found:
        raise ValueError(f"of a packed weight there is only {', '.join(sorted(packed)) or 'nothing'}")
    return formats[found[0]](layer, packed)


class RecomputedProduct(torch.autograd.Function):
    """A packed layer's product, whose backward pass dequantises the weight again instead of keeping it.

    Autograd keeps both factors of a product even if one is frozen: for SD v1.5 that would be 1.7 GB of dequantised
    weights in 16 bits. Only the inputs have a gradient; weight and bias are frozen.
    """

    @staticmethod
    def forward(inputs: torch.Tensor, layer: QuantizedLayer, bias: torch.Tensor | None) -> torch.Tensor:
        return layer.product(inputs, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.layer, ctx.input_shape = inputs[1], inputs[0].shape

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.layer.transposed_product(gradient, ctx.input_shape), None, None


class QuantizedLayer(nn.Module):
    """A frozen Linear or Conv2d that holds its weight packed and dequantises it on use.

    A weight of more than AT_ONCE numbers is dequantised and applied in slices of output channels. Raises ValueError if
    the packed tensors have the wrong size or type, or are not finite.
    """

    AT_ONCE = 1 << 24
    quantization: str  # nf4, int8, affine8 or affine4

    def __init__(self, layer: nn.Linear | nn.Conv2d, packed: dict[str, torch.Tensor]):
        super().__init__()
        self.shape, self.bias = layer.weight.shape, layer.bias
        self.packed_shape = rows, columns = self.shape[0], math.prod(self.shape[1:])
        expected = self.expected_tensors(rows, columns)
        found = {name: (tensor.numel(), tensor.dtype) for name, tensor in packed.items()}
        if found != expected:
            raise ValueError(f"{found} instead of {expected}")
        if not all(torch.isfinite(tensor).all() for tensor in packed.values() if tensor.is_floating_point()):
            raise ValueError("its scales are NaN or Inf")
        for name in expected:
            self.register_buffer(name, packed[name])
        self.convolution: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            self.convolution = {name: getattr(layer, name) for name in names}
        else:
            self.out_features, self.in_features = self.shape
        order = torch.channels_last if self.convolution else torch.contiguous_format  # as pack_weight packs
        self.strides = torch.empty(self.shape, device="meta", memory_format=order).stride()
        divisible = columns % 64 == 0 and not (self.convolution and self.convolution["groups"] > 1)
        self.rows_at_once = max(1, self.AT_ONCE // columns) if rows * columns > self.AT_ONCE and divisible else rows

    @staticmethod
    def expected_tensors(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        """{name: (number of elements, dtype)} of the tensors that a weight [rows, columns] is packed into."""
        raise NotImplementedError

    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Output rows first .. last of the weight in packed order, flat or [rows, columns]."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True):
        """Device moves apply, casts do not: the scales stay fp32."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in list(self.named_buffers(recurse=False)):
            if moved.dtype != kept[name].dtype:
                self._buffers[name] = kept[name].to(moved.device)
        return self

    def dequantize(self, first: int = 0, last: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Output rows first .. last of the weight, in the layer's own shape (a convolution's in channels_last order)."""
        last = self.shape[0] if last is None else last
        return self.in_layer_shape(self.unpack(first, last, dtype), last - first)

    def in_layer_shape(self, flat: torch.Tensor, rows: int) -> torch.Tensor:
        """Rows in packed order, flat or [rows, columns], in the layer's own shape."""
        return flat.as_strided((rows, *self.shape[1:]), self.strides)  # one call, as each takes as long as a small layer

    @property
    def qweight(self) -> torch.Tensor:
        """The packed weight, under the name by which peft finds a layer's device."""
        packed = self._buffers[self.quantization]
        assert packed is not None
        return packed

    def slices(self) -> list[tuple[int, int]]:
        """Ranges (first, last) of output channels that are dequantised together."""
        rows = self.shape[0]
        return [(first, min(first + self.rows_at_once, rows)) for first in range(0, rows, self.rows_at_once)]

    def factor(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Output rows first .. last of the factor in the product: the weight."""
        return self.dequantize(first, last, dtype)

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's product, plus `bias`. Under autograd it would keep the dequantised weight; see `linear`."""
        rows = self.shape[0]
        if self.rows_at_once == rows:
            return self.multiply(inputs, self.factor(0, rows, inputs.dtype), bias)
        outputs = []
        for first, last in self.slices():
            part = None if bias is None else bias[first:last]
            outputs.append(self.multiply(inputs, self.factor(first, last, inputs.dtype), part))
        return torch.cat(outputs, dim=-1 if self.convolution is None else 1)

    def multiply(self, inputs: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.convolution is None:
            return F.linear(inputs, factor, bias)
        return F.conv2d(inputs, factor, bias, **self.convolution)

    def transposed_product(self, gradient: torch.Tensor, input_shape: torch.Size) -> torch.Tensor:
        """The gradient of the inputs of `product`, of shape `input_shape`, from that of its outputs."""
        total = None
        for first, last in self.slices():
            factor = self.factor(first, last, gradient.dtype)
            if self.convolution is None:
                part = gradient[..., first:last] @ factor
            else:
                part = torch.nn.grad.conv2d_input(input_shape, factor, gradient[:, first:last], **self.convolution)
            total = part if total is None else total.add_(part)
        assert total is not None  # a layer has outputs
        return total

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`product`, differentiable in the inputs without keeping a dequantised weight."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            return RecomputedProduct.apply(inputs, self, bias)
        return self.product(inputs, bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs, self.bias)


class Int8Layer(QuantizedLayer):
    """8-bit rows with one scale each."""

    quantization = "int8"
    int8: torch.Tensor  # [rows, columns]
    scale: torch.Tensor  # [rows, 1] fp32

    @staticmethod
    def expected_tensors(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        return dict(int8=(rows * columns, torch.int8), scale=(rows, torch.float32))

    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        return (self.int8[first:last] * self.scale[first:last]).to(dtype)


class AffineLayer(QuantizedLayer):
    """Integers with a scale and a zero point for each output row (`affine_integers`), multiplied as integers.

    y = scale ((q - zero) x) + bias: the scales are applied to activations only, so that training them creates no tensor of a
    weight's size. The product is a thousand times y, which overflows fp16: so the integers are multiplied by `power`, the power
    of two nearest the median scale, and the scales are divided by it, both exactly.
    """

    scale: torch.Tensor  # [rows] fp32
    zero: torch.Tensor  # [rows] fp32, whole numbers

    def __init__(self, layer: nn.Linear | nn.Conv2d, packed: dict[str, torch.Tensor]):
        super().__init__(layer, packed)
        if self.convolution and self.convolution["groups"] > 1:
            raise ValueError("convolutions with groups have no scale for their input channels")
        self.power = 2.0 ** round(math.log2(self.scale.median().item()))

    def integers(self, first: int, last: int) -> torch.Tensor:
        """q of output rows first .. last, [rows, columns]."""
        raise NotImplementedError

    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        return (self.centred(first, last, torch.float32) * self.scale[first:last, None]).to(dtype)

    def centred(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """q - zero, at most 255 and so exact in every format, [rows, columns]."""
        return self.integers(first, last).to(dtype).sub_(self.zero[first:last, None].to(dtype))

    def factor(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        return self.in_layer_shape(self.centred(first, last, dtype).mul_(self.power), last - first)

    def along(self, scale: torch.Tensor) -> torch.Tensor:
        """Per-channel numbers [C], shaped to be multiplied with activations."""
        return scale if self.convolution is None else scale[:, None, None]

    def scaled(self, inputs: torch.Tensor, scale_out: torch.Tensor, scale_in: torch.Tensor | None) -> torch.Tensor:
        """The layer's output with other scales of its output channels [O] and, if given, of its input channels [I].

        W = scale_out (q - zero) scale_in, TuneQDM's multi-channel-wise scales. Differentiable in inputs and scales.
        """
        if scale_in is not None:
            inputs = (inputs * self.along(scale_in)).to(inputs.dtype)
        outputs = self.linear(inputs, None) * self.along(scale_out / self.power)  # in fp32, autograd keeping no second copy
        if self.bias is not None:
            outputs = outputs + self.along(self.bias)
        return outputs.to(inputs.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scaled(inputs, self.scale, None)


class Affine8Layer(AffineLayer):
    quantization = "affine8"
    affine8: torch.Tensor  # one integer per byte, flat

    @staticmethod
    def expected_tensors(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        return dict(affine8=(rows * columns, torch.int8), scale=(rows, torch.float32), zero=(rows, torch.float32))

    def integers(self, first: int, last: int) -> torch.Tensor:
        columns = self.packed_shape[1]
        return self.affine8[first * columns : last * columns].view(-1, columns)


class Affine4Layer(AffineLayer):
    quantization = "affine4"
    affine4: torch.Tensor  # two integers per byte, flat

    @staticmethod
    def expected_tensors(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        return dict(affine4=(math.ceil(rows * columns / 2), torch.uint8), scale=(rows, torch.float32),
                    zero=(rows, torch.float32))  # fmt: skip

    def integers(self, first: int, last: int) -> torch.Tensor:
        columns = self.packed_shape[1]
        start, end = first * columns, last * columns  # multiples of 64 for a slice
        packed = self.affine4[start // 2 : math.ceil(end / 2)]
        nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[: end - start]
        return (nibbles.to(torch.int8) - 8).view(-1, columns)


class NF4Layer(QuantizedLayer):
    """4-bit NormalFloat in blocks of 64, with the block scales in 8 bits, or in fp32 if the layer is small."""

    quantization = "nf4"
    nf4: torch.Tensor  # two weights per byte, flat
    absmax: torch.Tensor  # [blocks]: in 8 bits with the three below, or fp32 without them
    absmax_scale: torch.Tensor
    absmax_offset: torch.Tensor
    absmax_code: torch.Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, packed: dict[str, torch.Tensor]):
        super().__init__(layer, packed)
        from bitsandbytes.functional import create_dynamic_map

        self.register_buffer("absmax_code", create_dynamic_map().to(self.nf4.device))
        if self.absmax.numel() <= 1 << 14:  # up to 1 M weights: unpacking the scales as well would take half of the time
            self.absmax = self.block_scales()
            del self.absmax_scale, self.absmax_offset, self.absmax_code

    @staticmethod
    def expected_tensors(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        blocks = math.ceil(rows * columns / 64)
        return dict(
            nf4=(math.ceil(rows * columns / 2), torch.uint8),
            absmax=(blocks, torch.uint8),
            absmax_scale=(math.ceil(blocks / 256), torch.float32),
            absmax_offset=(1, torch.float32),
        )

    def block_scales(self) -> torch.Tensor:
        """absmax of every block of 64, fp32."""
        if self.absmax.dtype == torch.float32:
            return self.absmax
        operator = torch.ops.bitsandbytes.dequantize_blockwise.default
        return operator(self.absmax, self.absmax_scale, self.absmax_code, 256, torch.float32) + self.absmax_offset

    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.packed_shape
        packed, scales = self.nf4, self.block_scales()
        if last - first < rows:
            packed = packed[first * columns // 2 : last * columns // 2]
            scales = scales[first * columns // 64 : last * columns // 64]
        count = (last - first) * columns
        direct = packed.device.type == "cpu" and count % 2 == 0 and not torch.compiler.is_compiling()
        function = nf4_cpu_function(dtype) if direct else None
        if function is None:
            return torch.ops.bitsandbytes.dequantize_4bit.default(packed, scales, 64, "nf4", [1, count], dtype)
        weight = torch.empty(count, dtype=dtype)
        function(packed.data_ptr(), scales.data_ptr(), weight.data_ptr(), 64, 1, count)
        return weight


@cache
def nf4_cpu_function(dtype: torch.dtype):
    """The C function behind bitsandbytes' operator on a CPU, or None if this build of the library has none.

    Calling it through the torch operator takes longer than dequantising a small layer: for the miniature, 4 to 11 %
    of a step (benchmarks/NOTES.md). Arguments: packed, scales, output (addresses); block size, 1, number of weights.
    """
    from bitsandbytes.cextension import lib

    suffix = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    function = getattr(getattr(lib, "_lib", None), f"cdequantize_blockwise_cpu_nf4_{suffix}", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3, None
    return function
