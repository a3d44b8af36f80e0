"""Quantised layers against dequantise-then-apply and against the 16-bit weight they came from."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from torch import nn

import zoodip.quantize
from zoodip.model import load_pipeline
from zoodip.quantize import QuantizedLayer, nf4_cpu_function, pack_weight, quantized_layer

LINEAR = [(96, 864), (7, 5), (64, 64), (3, 200), (320, 77), (1, 1)]  # (out, in); kernels go wrong at sizes off 64
CONVOLUTIONS = [  # (out, in / groups, height, width), options
    ((7, 5, 3, 3), dict(stride=1, padding=1)),
    ((32, 16, 3, 3), dict(stride=2, padding=1)),
    ((32, 64, 1, 1), dict(stride=1, padding=0)),
    ((12, 3, 3, 3), dict(stride=1, padding=1, groups=4)),
    ((8, 6, 3, 5), dict(stride=(2, 1), padding=(0, 2))),
    ((8, 6, 3, 3), dict(stride=1, padding=2, dilation=2)),
]
# |error| / |weight|, means over a normal weight: 9.1 % for NF4 (levels of equal probability), and for int8
# 1/4 of a step of max / 127 with max about 3 to 4 deviations: 0.25 * 3.5 / 127 / 0.8 = 0.9 %. Small layers vary.
EXPECTED_ERROR = {"nf4": (0.05, 0.12), "int8": (0.001, 0.015)}


def make_linear(shape, quantization: str, dtype=torch.float32, bias: bool = True):
    layer = nn.Linear(shape[1], shape[0], bias=bias).requires_grad_(False)
    weight = torch.randn(shape, generator=seeded(1)) / shape[1] ** 0.5
    layer.weight.copy_(weight)
    layer.to(dtype)
    return layer, weight, quantized_layer(layer, pack_weight(weight, quantization))


def make_convolution(shape, options: dict, quantization: str, dtype=torch.float32):
    channels = shape[1] * options.get("groups", 1)
    layer = nn.Conv2d(channels, shape[0], shape[2:], **options).requires_grad_(False)
    weight = torch.randn(shape, generator=seeded(2)) / math.prod(shape[1:]) ** 0.5
    layer.weight.copy_(weight)
    layer.to(dtype)
    return layer, weight, quantized_layer(layer, pack_weight(weight, quantization))


NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]  # Dettmers et al. 2023, appendix E  # fmt: skip


def naive_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 64 of each row, a convolution's input channels last, each scaled by its largest value and rounded to the
    nearest of the 16 levels."""
    if weight.dim() == 4:
        return naive_nf4(weight.permute(0, 2, 3, 1).flatten(1)).view(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    flat, levels = weight.flatten(), torch.tensor(NF4)
    result = torch.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = block.abs().max()
        nearest = (block[:, None] / scale - levels).abs().argmin(1)
        result[start : start + 64] = levels[nearest] * scale
    return result.view(weight.shape)


def naive_int8(weight: torch.Tensor) -> torch.Tensor:
    rows = weight.flatten(1)
    return torch.stack([(row * 127 / row.abs().max()).round() * row.abs().max() / 127 for row in rows]).view(weight.shape)


def relative_error(approximation: torch.Tensor, weight: torch.Tensor) -> float:
    return ((approximation - weight).abs().mean() / weight.abs().mean()).item()


@pytest.mark.parametrize("shape", LINEAR)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_linear(shape, quantization):
    """Packing must be the format's own rounding, whatever the shape, and the product an ordinary one."""
    layer, weight, quantized = make_linear(shape, quantization)
    check(layer, weight, quantized, torch.randn(2, 3, shape[1], generator=seeded(3)), F.linear)


@pytest.mark.parametrize(("shape", "options"), CONVOLUTIONS)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_convolution(shape, options, quantization):
    """Stride, padding, dilation and groups must survive; 3 x 3 kernels have odd sizes."""
    layer, weight, quantized = make_convolution(shape, options, quantization)
    inputs = torch.randn(2, layer.in_channels, 11, 10, generator=seeded(3))
    full = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
    check(layer, weight, quantized, inputs, lambda x, w, b: F.conv2d(x, w, b, **full))


def check(layer, weight, quantized, inputs, apply):
    restored = quantized.dequantize()
    assert restored.shape == weight.shape and restored.dtype == torch.float32
    outputs = quantized(inputs)
    assert outputs.shape == layer(inputs).shape
    assert torch.equal(outputs, apply(inputs, restored, layer.bias))
    low, high = EXPECTED_ERROR[quantized.quantization]
    if quantized.quantization == "int8":
        # the same rounding except for ties and the last bit of the division
        torch.testing.assert_close(restored, naive_int8(weight), rtol=1e-5, atol=1e-6)
    else:
        # the block scales are themselves kept in 8 bits: about 1 % of a weight, up to 4 % of the smallest scales
        assert (restored - naive_nf4(weight)).abs().max() < 0.04 * weight.abs().max()
    if weight.numel() >= 1000:  # for fewer the mean error says little
        assert low < relative_error(restored, weight) < high


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_weight_of_zeros(quantization):
    """0 / 0 in the scale must not become NaN."""
    layer = nn.Linear(70, 5).requires_grad_(False)
    quantized = quantized_layer(layer, pack_weight(torch.zeros(5, 70), quantization))
    assert torch.equal(quantized.dequantize(), torch.zeros(5, 70))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_compute_dtype(dtype, quantization):
    """Packed from any dtype, restored in the compute dtype: one more rounding and no other difference."""
    shape = (96, 200)
    _, weight, wide = make_linear(shape, quantization)
    _, _, narrow = make_linear(shape, quantization, dtype)
    restored = narrow.dequantize(dtype=dtype)
    assert restored.dtype == dtype
    torch.testing.assert_close(restored.float(), wide.dequantize(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert narrow(torch.randn(2, 200).to(dtype)).dtype == dtype


def test_packed_flat():
    """The CPU kernel of some versions is wrong by 24 % for 2-D weights such as (96, 864): they are packed as 1-D."""
    for _, weight, quantized in (make_linear((96, 864), "nf4"), make_convolution((7, 5, 3, 3), {}, "nf4")):
        assert quantized.nf4.dtype == torch.uint8 and quantized.nf4.shape == ((weight.numel() + 1) // 2,)


def test_packing_in_slices_is_packing_whole():
    """Slices keep loading small; the result must be what bitsandbytes packs at once, scales of scales included."""
    from bitsandbytes import functional as bnb

    weight = torch.randn(1100, 4096, generator=seeded())  # 4.5 M: three slices
    packed = pack_weight(weight, "nf4")
    whole, state = bnb.quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4", compress_statistics=True)
    for ours, theirs in (
        (packed["nf4"], whole.flatten()),
        (packed["absmax"], state.absmax),
        (packed["absmax_scale"], state.state2.absmax),
        (packed["absmax_offset"], state.offset),
    ):
        assert torch.equal(ours, theirs)
    layer = quantized_layer(nn.Linear(4096, 1100, device="meta"), packed)
    assert torch.equal(layer.dequantize().flatten(), bnb.dequantize_4bit(whole, state).flatten())


def test_the_two_ways_to_hold_scales_agree(monkeypatch):
    """Small layers hold the scales of the packed weight unpacked: the same numbers, not better ones."""
    layer, weight = nn.Linear(4096, 512, device="meta"), torch.randn(512, 4096, generator=seeded())  # 2 M: packed scales
    whole = quantized_layer(layer, pack_weight(weight, "nf4"))
    assert whole.absmax.dtype == torch.uint8
    packed = pack_weight(weight[:100], "nf4")  # 0.4 M: unpacked
    small = quantized_layer(nn.Linear(4096, 100, device="meta"), packed)
    assert small.absmax.dtype == torch.float32 and not hasattr(small, "absmax_scale")
    from bitsandbytes import functional as bnb

    scales = (
        bnb.dequantize_blockwise(packed["absmax"], absmax=packed["absmax_scale"], code=bnb.create_dynamic_map(), blocksize=256)
        + packed["absmax_offset"]
    )
    assert torch.equal(small.absmax, scales)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_slices_of_a_large_layer(quantization, bias, monkeypatch):
    """Slices of output rows must be the same product, the last and shorter slice included."""
    cases = ((nn.Conv2d(64, 40, 3, padding=1, stride=2, bias=bias), (2, 64, 9, 9)), (nn.Linear(128, 40, bias=bias), (2, 3, 128)))
    for layer, shape in cases:
        layer.requires_grad_(False)
        inputs = torch.randn(shape, generator=seeded())
        packed = pack_weight(layer.weight, quantization)
        whole = quantized_layer(layer, packed)
        with monkeypatch.context() as patch:
            patch.setattr(QuantizedLayer, "AT_ONCE", 7 * math.prod(layer.weight.shape[1:]))
            sliced = quantized_layer(layer, packed)
        assert sliced.rows_at_once == 7 and whole.rows_at_once == 40
        assert torch.equal(torch.cat([sliced.dequantize(0, 7), sliced.dequantize(7, 40)]), whole.dequantize())
        # sums of up to 576 terms of size 1 / 24, which the kernel may reorder for another number of rows
        torch.testing.assert_close(sliced(inputs), whole(inputs), rtol=0, atol=5e-6)


def test_layers_that_cannot_be_sliced(monkeypatch):
    """Layers with groups, or with rows that do not end where a block ends, are left whole."""
    monkeypatch.setattr(QuantizedLayer, "AT_ONCE", 10)
    for layer in (nn.Linear(65, 8), nn.Conv2d(128, 8, 3, groups=2)):
        quantized = quantized_layer(layer, pack_weight(layer.weight.detach(), "nf4"))
        assert quantized.rows_at_once == 8


@pytest.mark.parametrize(("change", "words"), [
    (lambda p: p.pop("absmax"), "instead of {"), (lambda p: p.update(nf4=p["nf4"][:-1]), "instead of {"),
    (lambda p: p.update(other=torch.zeros(3)), "instead of {"), (lambda p: p.update(nf4=p["nf4"].long()), "torch.int64"),
    (lambda p: p.update(absmax_offset=torch.tensor(torch.nan)), "NaN or Inf"), (lambda p: p.pop("nf4"), "there is only absmax"),
], ids=["missing", "short", "other", "type", "NaN", "no numbers"])  # fmt: skip
def test_packed_tensors_that_do_not_fit(change, words):
    """C code reads them by address: anything malformed is refused before that."""
    layer = nn.Linear(128, 40)
    packed = pack_weight(layer.weight.detach(), "nf4")
    change(packed)
    with pytest.raises(ValueError, match=words):
        quantized_layer(layer, packed)


def test_only_the_packed_weight_is_kept():
    """A forgotten 16-bit copy would undo the saving: 4 bits, and 32 / 64 for scales, or from 1 M weights 8 / 64 and
    32 / (64 x 256) for theirs."""
    for shape, expected in (((1024, 768), 0.5 + 4 / 64), ((2048, 768), 0.5 + 1 / 64 + 4 / (64 * 256))):
        _, weight, quantized = make_linear(shape, "nf4")
        assert [name for name, _ in quantized.named_parameters()] == ["bias"]
        per_weight = sum(tensor.nbytes for tensor in quantized.buffers()) / weight.numel()
        assert per_weight == pytest.approx(expected, rel=0.005)  # + a table of 1 KB
    _, weight, quantized = make_linear((1024, 768), "int8")
    per_weight = sum(tensor.nbytes for tensor in quantized.buffers()) / weight.numel()
    assert per_weight == pytest.approx(1.0 + 4 / 768)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    "move",
    [lambda m: m.to("cpu"), lambda m: m.float(), copy.deepcopy, lambda m: m.eval()],
    ids=["to-cpu", "float", "deepcopy", "eval"],
)
def test_moves_are_harmless(quantization, move):
    """Pipelines call .to() on their modules; a packed weight must come through unchanged."""
    _, _, quantized = make_linear((96, 200), quantization)
    inputs = torch.randn(2, 200, generator=seeded(3))
    before = quantized(inputs)
    assert torch.equal(move(quantized)(inputs), before)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_another_dtype(quantization, dtype):
    """`pipeline.to(torch.bfloat16)` casts bias and activations: the weight has to follow, and keep its precision."""
    _, _, quantized = make_linear((96, 200), quantization)
    inputs = torch.randn(2, 200, generator=seeded(3))
    before = quantized(inputs)
    outputs = quantized.to(dtype)(inputs.to(dtype))
    assert outputs.dtype == dtype
    # inputs, weights and outputs of size 1, each rounded to eps; 200 terms add up like a random walk
    torch.testing.assert_close(outputs.float(), before, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_gradients_reach_the_input():
    """Comparisons with back-propagation need it, and a frozen layer must not stop it."""
    _, _, quantized = make_linear((6, 10), "nf4")
    inputs = torch.randn(2, 10, generator=seeded(3)).requires_grad_()
    (gradient,) = torch.autograd.grad(quantized(inputs).sum(), inputs)
    torch.testing.assert_close(gradient, quantized.dequantize().sum(0).expand(2, 10), rtol=0, atol=1e-6)  # fp32 sums of 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 864), (7, 5), (1280, 1000)])
def test_the_direct_call_is_the_operator(dtype, shape, monkeypatch):
    """The library's C function, called directly for speed, and its operator give the same bits; without it, the operator."""
    _, _, quantized = make_linear(shape, "nf4", dtype)
    direct = quantized.dequantize(dtype=dtype)
    assert nf4_cpu_function(dtype) is not None, "this bitsandbytes has no such function: the layer falls back to the operator"
    monkeypatch.setattr(zoodip.quantize, "nf4_cpu_function", lambda dtype: None)
    assert torch.equal(quantized.dequantize(dtype=dtype), direct)


def test_the_miniature_is_measured_with_the_weights_that_training_packs(tiny_model):
    """`miniature/quality.py` rounds a plain pipeline's weights to the bits that `load_pipeline` computes with."""
    from diffusers import StableDiffusionPipeline

    from miniature.quality import round_weights_to_nf4

    plain, packed = StableDiffusionPipeline.from_pretrained(tiny_model), load_pipeline(str(tiny_model))
    rounded = round_weights_to_nf4(plain)
    compared = 0
    for part in ("unet", "text_encoder"):
        for name, layer in getattr(packed, part).named_modules():
            if isinstance(layer, QuantizedLayer):
                weight = getattr(plain, part).get_submodule(name).weight
                assert torch.equal(weight, layer.dequantize()), name
                compared += weight.numel()
    assert compared == rounded > 0


def test_an_unknown_format_is_refused():
    """A misspelt one is not silently packed as NF4."""
    with pytest.raises(ValueError, match="unknown quantization 'int4'"):
        pack_weight(torch.ones(4, 4), "int4")
