"""Affine integers, the product whose backward dequantises again, scales with experts, Kronecker factors: against naive code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from torch import nn

from zoodip.quantize import affine_integers, pack_weight, quantized_layer
from zoodip.tuned_layers import (
    Experts,
    KroneckerLayer,
    ScaledLayer,
    add_kronecker,
    add_lora,
    add_scales,
    kronecker_shapes,
    lora_shapes,
    scale_shapes,
)

FORMATS = ["nf4", "int8", "affine8", "affine4"]
LAYERS = {  # sizes off 64 and odd counts, as packing works by 64 and by two
    "linear": (lambda: nn.Linear(30, 17, bias=False), (2, 5, 30)),
    "linear with bias": (lambda: nn.Linear(64, 24), (3, 64)),
    "conv": (lambda: nn.Conv2d(5, 7, 3, padding=1), (2, 5, 6, 6)),
    "conv, stride 2": (lambda: nn.Conv2d(6, 9, 3, stride=2, padding=1, bias=False), (1, 6, 7, 5)),
    "conv 1 x 1": (lambda: nn.Conv2d(12, 10, 1), (2, 12, 4, 3)),
}


@pytest.fixture(params=list(LAYERS), ids=list(LAYERS))
def layer_and_input(request):
    make, shape = LAYERS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = make().requires_grad_(False)
    return layer, torch.randn(shape, generator=seeded(1))


def packed_layer(layer: nn.Module, quantization: str, dtype=torch.float32):
    return quantized_layer(layer, pack_weight(layer.weight.data, quantization))


def product(layer: nn.Module, inputs: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    """F.linear or F.conv2d with an explicit weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight, bias)
    return F.conv2d(inputs, weight, bias, layer.stride, layer.padding)


# ---------------------------------------------------------------------------------------------------------------------
# The affine quantiser
# ---------------------------------------------------------------------------------------------------------------------


def naive_affine(row: list[float], bits: int) -> tuple[list[int], float, int]:
    """One output channel, in Python's double-precision numbers."""
    low, high = min(min(row), 0.0), max(max(row), 0.0)
    scale = max((high - low) / (2**bits - 1), 1e-8)
    smallest = -(2 ** (bits - 1))
    zero = smallest - round(low / scale)
    return [min(max(round(w / scale + zero), smallest), -smallest - 1) for w in row], scale, zero


@pytest.mark.parametrize("bits", [8, 4])
def test_affine_integers_are_those_of_a_loop(bits):
    rows = torch.randn(6, 35, generator=seeded(4))
    rows[1] = 0.0
    rows[2] = 0.3
    rows[3] = rows[3].abs()  # of one sign: 0 is included all the same
    rows[4] = -2.0
    integers, scale, zero = affine_integers(rows, bits)
    for row, q, s, z in zip(rows.tolist(), integers.tolist(), scale.tolist(), zero.tolist(), strict=True):
        expected, naive_scale, naive_zero = naive_affine(row, bits)
        assert s == pytest.approx(naive_scale, rel=1e-6)  # fp32 has 24 bits
        assert z == naive_zero and z == int(z) and -(2 ** (bits - 1)) <= z <= 2 ** (bits - 1) - 1  # so 0 is exact
        # a value within rounding of the middle between two integers may fall to either side in fp32
        assert sum(a != b for a, b in zip(q, expected, strict=True)) <= 1
        assert max(abs(a - b) for a, b in zip(q, expected, strict=True)) <= 1
        error = max(abs(s * (a - z) - w) for a, w in zip(q, row, strict=True))
        assert error <= s / 2 * (1 + 1e-4) + 1e-7  # half a step, up to rounding in fp32


@pytest.mark.parametrize("quantization", ["affine8", "affine4"])
def test_packing_goes_there_and_back(layer_and_input, quantization):
    layer, _ = layer_and_input
    packed = packed_layer(layer, quantization)
    weight = layer.weight.permute(0, 2, 3, 1) if layer.weight.dim() == 4 else layer.weight  # convolutions channels last
    integers, scale, zero = affine_integers(weight.reshape(len(weight), -1), int(quantization[-1]))
    assert torch.equal(packed.integers(0, len(weight)), integers)
    expected = (scale[:, None] * (integers - zero[:, None])).view(weight.shape)
    expected = expected.permute(0, 3, 1, 2) if weight.dim() == 4 else expected
    assert torch.equal(packed.dequantize(), expected)
    stored = packed.qweight
    assert stored.numel() == math.ceil(layer.weight.numel() * int(quantization[-1]) / 8)


def test_convolutions_in_groups_are_refused():
    layer = nn.Conv2d(8, 8, 3, groups=2)
    with pytest.raises(ValueError, match="groups"):
        packed_layer(layer, "affine8")


def test_fp16_does_not_overflow():
    """q - zero reaches 255: a product over 1000 inputs would leave fp16's range at 65504 without the power of two."""
    layer = nn.Linear(2000, 4, bias=False)
    layer.weight.data.fill_(-0.02)[0] = 0.02
    inputs = torch.ones(1, 2000)
    exact = F.linear(inputs, packed_layer(layer, "affine8").dequantize())
    half = packed_layer(layer, "affine8", torch.float16)(inputs.half())
    torch.testing.assert_close(half.float(), exact, rtol=2e-3, atol=0)  # fp16 has 11 bits


# ---------------------------------------------------------------------------------------------------------------------
# The product that dequantises again
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", FORMATS)
def test_backward_recomputes_what_autograd_would_have_kept(layer_and_input, quantization):
    """The gradient of the inputs, bit for bit, and no gradient of anything else."""
    layer, inputs = layer_and_input
    packed = packed_layer(layer, quantization)
    ours, stored = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    output = packed.linear(ours, packed.bias)
    reference = packed.product(stored, packed.bias)
    assert torch.equal(output, reference)
    weights = torch.randn(output.shape, generator=seeded(2))
    (output * weights).sum().backward()
    (reference * weights).sum().backward()
    assert torch.equal(ours.grad, stored.grad)


@pytest.mark.parametrize("quantization", FORMATS)
def test_slices_have_the_gradient_of_the_whole(quantization, monkeypatch):
    layer = nn.Conv2d(64, 12, 3, padding=1)
    inputs = torch.randn(1, 64, 4, 4, generator=seeded(5))
    gradients = []
    for at_once in (1 << 24, 64 * 9 * 5):
        monkeypatch.setattr("zoodip.quantize.QuantizedLayer.AT_ONCE", at_once)
        packed = packed_layer(layer, quantization)
        assert len(packed.slices()) == (1 if at_once == 1 << 24 else 3)
        leaf = inputs.clone().requires_grad_()
        packed(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)  # sums of 12 * 9 products in another order


@pytest.mark.parametrize("quantization", FORMATS)
def test_no_dequantised_weight_is_kept(layer_and_input, quantization):
    layer, inputs = layer_and_input
    packed = packed_layer(layer, quantization)
    if quantization.startswith("affine"):
        packed = ScaledLayer(packed, 1, scale_in=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        output = packed(inputs.clone().requires_grad_())
    assert output.requires_grad
    assert layer.weight.shape not in kept and layer.weight.numel() not in [shape.numel() for shape in kept]


# ---------------------------------------------------------------------------------------------------------------------
# Scales
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["affine8", "affine4"])
def test_scaled_layer_is_the_explicit_weight(layer_and_input, quantization):
    """W = s_out (q - z) s_in written out: the same outputs and, through autograd in double, the same gradients."""
    layer, inputs = layer_and_input
    base = packed_layer(layer, quantization)
    outputs, channels = base.shape[:2]
    s_out = (base.scale * (1 + 0.1 * torch.randn(outputs, generator=seeded(7)))).double().requires_grad_()
    s_in = (1 + 0.1 * torch.randn(channels, generator=seeded(8))).double().requires_grad_()
    bias = None if base.bias is None else base.bias.data.double()
    base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    x = inputs.double().requires_grad_()
    ours = base.scaled(x, s_out, s_in)

    integers = base.in_layer_shape(base.centred(0, outputs, torch.float64), outputs)
    out_shape, in_shape = (-1, *[1] * (integers.dim() - 1)), (1, -1, *[1] * (integers.dim() - 2))
    copies = [tensor.detach().clone().requires_grad_() for tensor in (x, s_out, s_in)]
    weight = copies[1].view(out_shape) * integers * copies[2].view(in_shape)
    explicit = product(layer, copies[0], weight, bias)
    torch.testing.assert_close(ours, explicit, rtol=1e-10, atol=1e-12)  # double: another order of the same sums

    weights = torch.randn(ours.shape, generator=seeded(9), dtype=torch.float64)
    gradients = torch.autograd.grad((ours * weights).sum(), [x, s_out, s_in])
    expected = torch.autograd.grad((explicit * weights).sum(), copies)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda a, b, c: base.scaled(a, b, c), (x, s_out, s_in), eps=1e-5)

    single = base.scaled(inputs, s_out.detach().float(), s_in.detach().float())
    error = (single.double() - explicit).abs().max() / explicit.abs().max()
    assert error < 2e-6  # fp32: 4e-7 at most over all these layers and five seeds, of 2^-24 a sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_scales_are_applied_in_fp32(dtype):
    """A change of s far below half a bit of bf16 (4e-3) must show in the mean over many outputs, and have its gradient."""
    layer = nn.Linear(64, 512, bias=False)
    tuned = ScaledLayer(packed_layer(layer, "affine8", dtype), 1, scale_in=False)
    inputs = torch.randn(64, 64, generator=seeded(10)).to(dtype)
    before = tuned(inputs).detach().float()
    tuned.scale_out[0].data *= 1 + 5e-4
    after = tuned(inputs).detach().float()
    growth = ((after - before) * before).sum() / before.square().sum()
    assert growth.item() == pytest.approx(5e-4, rel=0.2)  # rounding of 32768 outputs averages out to a few percent of it
    tuned(inputs.requires_grad_()).float().square().sum().backward()
    assert tuned.scale_out[0].grad.dtype == torch.float32


@pytest.mark.parametrize(("timestep", "expected"), [(0, 0), (249, 0), (250, 1), (499, 1), (500, 2), (749, 2), (750, 3), (999, 3),
                                                    (999.9, 3), (249.99, 0), (1000, 3)])  # fmt: skip
def test_expert_of_a_timestep(timestep, expected):
    experts = Experts(4)
    assert experts.of(timestep) == expected
    for form in (timestep, torch.tensor(timestep), torch.tensor([timestep, timestep])):
        assert experts.of_batch(form) == expected


def test_experts_cannot_share_a_forward():
    with pytest.raises(ValueError, match="several sets"):
        Experts(4).of_batch(torch.tensor([249, 250]))
    assert Experts(1).of_batch(torch.tensor([0, 999])) == 0


def test_outside_the_interval_the_untuned_scales_serve():
    experts = Experts(1, (500, 900))
    assert [experts.of(t) for t in (0, 499, 500, 899, 900, 999)] == [None, None, 0, 0, None, None]


@pytest.mark.parametrize(("steps", "number", "expected"), [(50, 4, [13, 12, 13, 13]), (50, 2, [25, 26]), (25, 4, [7, 6, 6, 7]),
                                                           (25, 2, [13, 13])])  # fmt: skip
def test_calls_of_each_expert(tiny_model, steps, number, expected):
    """PNDM repeats its second timestep: 51 calls for 50 steps."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler.from_pretrained(tiny_model / "scheduler")
    scheduler.set_timesteps(steps)
    experts = [Experts(number).of_batch(timestep) for timestep in scheduler.timesteps]
    assert [experts.count(e) for e in range(number)] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Kronecker factors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a1", "a2"), [(4, 16), (16, 4), (8, 8), (2, 48), (24, 2)])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96)], ids=str)
def test_kronecker_product_is_that_of_torch(a1, a2, shape):
    """In double: torch.kron's matrix times x. (4, 16) takes A first, (24, 2) B first."""
    layer = KroneckerLayer(nn.Linear(96, 48, bias=False), a1, a2).double()
    layer.lokr_w1.data = torch.randn(a1, a2, generator=seeded(11), dtype=torch.float64)
    layer.lokr_w2.data = torch.randn(48 // a1, 96 // a2, generator=seeded(12), dtype=torch.float64)
    inputs = torch.randn(shape, generator=seeded(13), dtype=torch.float64)
    expected = F.linear(inputs, torch.kron(layer.lokr_w1, layer.lokr_w2))
    torch.testing.assert_close(layer.product(inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "a1", "a2", "multiplications", "other"), [
    (1280, 4, 64, 30_720, 491_520),  # Stable Diffusion v1.5's widest, the paper's factors: A first
    (1280, 64, 8, 286_720, 35_840), (48, 24, 2, 2_304, 192),  # B first
    (64, 8, 8, 1_024, 1_024),  # a tie
])  # fmt: skip
def test_the_product_goes_the_cheaper_way(width, a1, a2, multiplications, other):
    """It takes as many multiplications per input as the cheaper of the two orders, A first or B first."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = KroneckerLayer(nn.Linear(width, width, bias=False), a1, a2)
    b1, b2 = layer.lokr_w2.shape
    assert (a1 * a2 * b2 + a1 * b2 * b1, a2 * b2 * b1 + a1 * a2 * b1) == (multiplications, other)
    with FlopCounterMode(display=False) as counter:
        layer.product(torch.ones(3, 2, width))
    assert counter.get_total_flops() == 2 * 6 * min(multiplications, other)  # a multiplication and an addition


# ---------------------------------------------------------------------------------------------------------------------
# A whole UNet
# ---------------------------------------------------------------------------------------------------------------------

INSTALLED = {
    "PEQA": ("affine4", lambda unet: add_scales(unet, Experts(1), False), lambda unet: scale_shapes(unet, 1, False)),
    "TuneQDM": ("affine8", lambda unet: add_scales(unet, Experts(4), True), lambda unet: scale_shapes(unet, 4, True)),
    "LoRA": ("nf4", lambda unet: add_lora(unet, 2, seeded()), lambda unet: lora_shapes(unet, 2)),
    "LoRA, plain": ("none", lambda unet: add_lora(unet, 2, seeded()), lambda unet: lora_shapes(unet, 2)),
    "KronA": ("nf4", lambda unet: add_kronecker(unet, 4, 8, seeded()), lambda unet: kronecker_shapes(unet, 4, 8)),
    "KronA, plain": ("none", lambda unet: add_kronecker(unet, 4, 4, seeded()), lambda unet: kronecker_shapes(unet, 4, 4)),
}


@pytest.mark.parametrize("system", list(INSTALLED))
def test_installed_in_a_unet(tiny_model, system):
    """Nothing changes at the start, bit for bit; what is trained is what the shapes promise, and nothing else has a gradient."""
    from tiny import load

    from zoodip.model import build_model

    quantization, install, shapes = INSTALLED[system]
    unet = load(tiny_model, "unet", quantization)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    inputs = torch.randn(2, 4, 8, 8, generator=seeded(1)), 300, torch.randn(2, 5, 32, generator=seeded(2))
    untuned = unet(*inputs).sample
    parameters = install(unet)
    assert {name: tuple(parameter.shape) for name, parameter in parameters.items()} == shapes(build_model(tiny_model, "unet"))
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    tuned = unet(*inputs).sample
    assert torch.equal(tuned, untuned)
    tuned.square().mean().backward()
    with_gradient = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    expected = {name for name in parameters if system != "TuneQDM" or name.endswith(".1")}  # t = 300 of N = 4
    assert with_gradient == expected
    kept = {name.replace(".base.", ".").replace(".base_layer.", "."): tensor for name, tensor in unet.state_dict().items()
            if name not in parameters}  # fmt: skip
    assert before.keys() <= kept.keys() and all(torch.equal(kept[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("add", "ending", "width"), [
    (lambda unet: add_kronecker(unet, 4, 8, seeded(6)), "lokr_w1", 1 / 4),  # a1 = 4; of a2 = 8 it would be .125 or .354
    (lambda unet: add_lora(unet, 4, seeded(6)), "lora_A.default.weight", 1 / 4),  # rank 4; its root would give .5
], ids=["KronA", "LoRA"])  # fmt: skip
def test_the_start_is_as_wide_as_published(tiny_model, add, ending, width):
    """A ~ N(0, width^2) and B = 0, over all projections together."""
    from tiny import load

    parameters = add(load(tiny_model, "unet"))
    drawn = torch.cat([parameter.detach().flatten() for name, parameter in parameters.items() if name.endswith(ending)])
    assert len(drawn) >= 1000 and not any(parameter.any() for name, parameter in parameters.items() if not name.endswith(ending))
    # five standard errors of a normal sample's deviation, width / sqrt(2 n), and of its mean: 11 and 16 % of the width at most
    assert drawn.std().item() == pytest.approx(width, rel=5 / math.sqrt(2 * len(drawn)))
    assert abs(drawn.mean().item()) < 5 * width / math.sqrt(len(drawn))


@pytest.mark.parametrize("quantization", ["affine8", "affine4"])
def test_experts_start_equal(tiny_model, quantization):
    """N = 1, 2, 4, with and without s_in, are the untuned integer model, bit for bit, at timesteps of the first and last set."""
    from tiny import load

    inputs = torch.randn(1, 4, 8, 8, generator=seeded(1)), torch.randn(1, 5, 32, generator=seeded(2))
    expected = [load(tiny_model, "unet", quantization)(inputs[0], t, inputs[1]).sample for t in (10, 990)]
    for number in (1, 2, 4):
        for scale_in in (False, True):
            unet = load(tiny_model, "unet", quantization)
            add_scales(unet, Experts(number), scale_in)
            for t, output in zip((10, 990), expected, strict=True):
                assert torch.equal(unet(inputs[0], timestep=torch.tensor(t), encoder_hidden_states=inputs[1]).sample, output)
