"""Weights in 4 or 8 bits: packing a weight, and the layers that hold it packed and dequantise it at the moment of use."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def default_precision(device: torch.device) -> str:
    """Of activations, where --mixed_precision is not given: fp16 halves a GPU's memory, fp32 costs a CPU no more than bf16."""
    return "fp16" if device.type == "cuda" else "fp32"


def pack_weight(weight: torch.Tensor, quantization: str) -> dict[str, torch.Tensor]:
    """The tensors that stand for a Linear or Conv2d weight, as the layers below hold and --save_quantized writes them.

    nf4:  bitsandbytes NormalFloat4, blocks of 64, absmax itself quantised (Dettmers et al. 2023). The weight is packed
          flat, because the CPU kernel is slow or wrong for some shapes of more than one dimension, in slices, because
          quantising takes ten times a slice's memory, and a convolution's with the input channels last, as
          the convolution kernels read it.
    int8: one scale per output row (absolute maximum / 127), as in the paper's INT8 rows.
    """
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    rows = weight.reshape(len(weight), -1)
    if quantization == "int8":
        scale = rows.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
        return dict(int8=(rows / scale).round().to(torch.int8), scale=scale)
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


def quantized_layer(layer: nn.Module, packed: dict[str, torch.Tensor], dtype: torch.dtype) -> QuantizedLayer:
    """A Linear or Conv2d with its weight as `pack_weight` packed it. Raises ValueError where `packed` does not fit the layer."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"{type(layer).__name__} is never packed")
    return (NF4Layer if "nf4" in packed else Int8Layer)(layer, packed, dtype)


class QuantizedLayer(nn.Module):
    """A frozen Linear or Conv2d that holds its weight packed, and dequantises it at the moment of use.

    A weight of more than AT_ONCE numbers is dequantised and applied in slices of output channels. Raises ValueError where
    the packed tensors are not of the layer's size, of another type or not finite.
    """

    AT_ONCE = 1 << 24
    quantization: str  # nf4 or int8

    def __init__(self, layer: nn.Linear | nn.Conv2d, packed: dict[str, torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self.shape, self.bias, self.dtype = layer.weight.shape, layer.bias, dtype
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
        order = torch.channels_last if self.convolution else torch.contiguous_format  # as pack_weight packs
        self.strides = torch.empty(self.shape, device="meta", memory_format=order).stride()
        divisible = columns % 64 == 0 and not (self.convolution and self.convolution["groups"] > 1)
        self.rows_at_once = max(1, self.AT_ONCE // columns) if rows * columns > self.AT_ONCE and divisible else rows

    @staticmethod
    def expected_tensors(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        """{name: (numbers, dtype)} of the packed tensors of a weight [rows, columns]."""
        raise NotImplementedError

    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Output rows first .. last of the weight as they were packed, flat or [rows, columns]."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True):
        """Moves go through, casts do not: the scales stay fp32."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in list(self.named_buffers(recurse=False)):
            if moved.dtype != kept[name].dtype:
                self._buffers[name] = kept[name].to(moved.device)
        return self

    def dequantize(self, first: int = 0, last: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Output rows first .. last of the weight, in the layer's own shape (a convolution's in channels_last order)."""
        last = self.shape[0] if last is None else last
        flat = self.unpack(first, last, dtype or self.dtype)
        return flat.as_strided((last - first, *self.shape[1:]), self.strides)  # one call: each takes as long as a small layer

    def product(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.convolution is None:
            return F.linear(inputs, weight, bias)
        return F.conv2d(inputs, weight, bias, **self.convolution)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = self.shape[0]
        if self.rows_at_once == rows:
            return self.product(inputs, self.dequantize(dtype=inputs.dtype), self.bias)
        outputs = []
        for first in range(0, rows, self.rows_at_once):
            last = min(first + self.rows_at_once, rows)
            bias = None if self.bias is None else self.bias[first:last]
            outputs.append(self.product(inputs, self.dequantize(first, last, inputs.dtype), bias))
        return torch.cat(outputs, dim=-1 if self.convolution is None else 1)


class Int8Layer(QuantizedLayer):
    """8-bit rows, a scale each."""

    quantization = "int8"
    int8: torch.Tensor  # [rows, columns]
    scale: torch.Tensor  # [rows, 1] fp32

    @staticmethod
    def expected_tensors(rows: int, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        return dict(int8=(rows * columns, torch.int8), scale=(rows, torch.float32))

    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        return (self.int8[first:last] * self.scale[first:last]).to(dtype)


class NF4Layer(QuantizedLayer):
    """4-bit NormalFloat, blocks of 64, with the blocks' scales in 8 bits, or in fp32 where the layer is small."""

    quantization = "nf4"
    nf4: torch.Tensor  # two weights a byte, flat
    absmax: torch.Tensor  # [blocks]: in 8 bits with the three below, or fp32 without them
    absmax_scale: torch.Tensor
    absmax_offset: torch.Tensor
    absmax_code: torch.Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, packed: dict[str, torch.Tensor], dtype: torch.dtype):
        super().__init__(layer, packed, dtype)
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
    """The C function behind bitsandbytes' operator on a CPU, or None where this build of the library has none.

    Reaching it through the torch operator takes longer than a small layer takes to be dequantised: for the miniature 4 to 11 %
    of a step (benchmarks/NOTES.md). Arguments: packed, scales, output (addresses); block size, 1, number of weights.
    """
    from bitsandbytes.cextension import lib

    suffix = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    function = getattr(getattr(lib, "_lib", None), f"cdequantize_blockwise_cpu_nf4_{suffix}", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3, None
    return function
