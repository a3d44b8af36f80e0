"""Layers that tune a frozen UNet: scales of its integers, with experts over timesteps; Kronecker factors; LoRA.

Each kind consists of two functions: `..._shapes(unet, ...)` gives the trained tensors {name: shape} of an architecture (the
UNet may be on the meta device), and `add_...(unet, ...)` puts the layers into a loaded UNet and returns the trained
parameters, fp32, under the same names. Nothing is trained here. Until its parameters are changed, the tuned UNet computes
what the untuned one does, bit for bit.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from zoodip.arguments import NUM_TRAIN_TIMESTEPS
from zoodip.errors import InputError
from zoodip.model import is_quantized
from zoodip.quantize import AffineLayer, QuantizedLayer

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of both attentions; to_out.1 is a dropout
Shapes = dict[str, tuple[int, ...]]
Parameters = dict[str, nn.Parameter]


def num_parameters(shapes: Shapes) -> int:
    """Total number of elements in tensors of these shapes."""
    return sum(map(math.prod, shapes.values()))


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """(O, I) of a Linear, (O, I, height, width) of a Conv2d, packed or not."""
    if isinstance(layer, QuantizedLayer):
        return tuple(layer.shape)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    return tuple(layer.weight.shape)


def attention_projections(unet: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of the query, key, value and output projections of every attention."""
    endings = tuple(f"{attention}.{projection}" for attention in ("attn1", "attn2") for projection in PROJECTIONS)
    return {name: module for name, module in unet.named_modules() if name.endswith(endings)}


# ----------------------------------------------------------------------------------------------------- scales


def integer_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of the layers whose weights are, or will be, packed as integers."""
    return {name: module for name, module in unet.named_modules()
            if isinstance(module, AffineLayer) or is_quantized("unet", name, module)}  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """Which set of scales is used at a timestep: set e of N for those in [e T / N, (e + 1) T / N), T = 1000.

    With an interval [low, high) there is one set, and the untuned scales are used outside the interval (TuneQDM's S1).
    """

    number: int = 1
    interval: tuple[int, int] | None = None

    def of(self, timestep: float) -> int | None:
        """The set for a timestep; None for the untuned scales."""
        if self.interval is not None and not self.interval[0] <= timestep < self.interval[1]:
            return None
        return min(self.number - 1, math.floor(timestep * self.number / NUM_TRAIN_TIMESTEPS))

    def of_batch(self, timesteps: torch.Tensor | float) -> int | None:
        """The set for all `timesteps`. Raises ValueError if they would need several in one forward."""
        experts = {self.of(timestep) for timestep in torch.as_tensor(timesteps).flatten().tolist()}
        if len(experts) > 1:
            raise ValueError(f"one forward cannot use several sets of scales, as timesteps {timesteps} would need")
        return experts.pop()


class ScaledLayer(nn.Module):
    """An integer layer with N trained sets of scales: W = scale_out (q - zero) scale_in (TuneQDM; PEQA without scale_in).

    Each set is a Parameter of its own: as slices of one tensor, the idle sets would get zero gradients, to which AdamW
    still applies weight decay and stale momentum. `expert` is the set in use, None for the layer's own scales.
    """

    def __init__(self, base: AffineLayer, experts: int, scale_in: bool):
        super().__init__()
        self.base = base
        self.expert: int | None = 0
        self.scale_out = nn.ParameterList(nn.Parameter(base.scale.clone()) for _ in range(experts))  # [O] each
        ones = torch.ones(base.shape[1], device=base.scale.device)
        self.scale_in = nn.ParameterList(nn.Parameter(ones.clone()) for _ in range(experts if scale_in else 0))  # [I] each

    def _apply(self, fn, recurse: bool = True):
        """Device moves apply, casts do not: like the base's own, the scales stay fp32."""
        kept = [(parameter, parameter.data) for parameter in (*self.scale_out, *self.scale_in)]
        super()._apply(fn, recurse)
        for parameter, before in kept:
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.expert is None:
            return self.base(inputs)
        return self.base.scaled(inputs, self.scale_out[self.expert], self.scale_in[self.expert] if self.scale_in else None)


def scale_shapes(unet: nn.Module, experts: int, scale_in: bool) -> Shapes:
    """N (O + I) numbers per layer, N O without `scale_in`."""
    shapes = {}
    for name, layer in integer_layers(unet).items():
        outputs, inputs = weight_shape(layer)[:2]
        shapes |= {f"{name}.scale_out.{e}": (outputs,) for e in range(experts)}
        shapes |= {f"{name}.scale_in.{e}": (inputs,) for e in range(experts if scale_in else 0)}
    return shapes


def add_scales(unet: nn.Module, experts: Experts, scale_in: bool) -> Parameters:
    """Add trained scales to an integer UNet (affine8, affine4), which then picks the set for each denoising step by itself."""
    for name, layer in integer_layers(unet).items():
        assert isinstance(layer, AffineLayer), "a UNet of integers is loaded with all of them packed"
        unet.set_submodule(name, ScaledLayer(layer, experts.number, scale_in))
    layers = [module for module in unet.modules() if isinstance(module, ScaledLayer)]
    if experts.number > 1 or experts.interval is not None:

        def choose(unet: nn.Module, positional: tuple, named: dict) -> None:
            expert = experts.of_batch(named["timestep"] if "timestep" in named else positional[1])
            for layer in layers:
                layer.expert = expert

        unet.register_forward_pre_hook(choose, with_kwargs=True)
    return trained(unet, "scale_out", "scale_in")


# ----------------------------------------------------------------------------------------------------- Kronecker factors


class KroneckerLayer(nn.Module):
    """A frozen Linear, packed or not, plus a Kronecker product: W + A kron B (DiffuseKronA, Eq. 5).

    A [a1, a2] and B [b1, b2], a1 b1 = O, a2 b2 = I, are named as in LyCORIS files, lokr_w1 and lokr_w2. The product is never
    formed: with the input as X [a2, b2] in row-major order, the output is A X B^T [a1, b1] in row-major order.
    """

    def __init__(self, base: nn.Module, a1: int, a2: int):
        super().__init__()
        outputs, inputs = weight_shape(base)
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.base = base
        self.lokr_w1 = nn.Parameter(torch.zeros(a1, a2, device=device))
        self.lokr_w2 = nn.Parameter(torch.zeros(outputs // a1, inputs // a2, device=device))

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """(A kron B) x for inputs [..., I] -> [..., O], in the cheaper order."""
        first, second = self.lokr_w1.to(inputs.dtype), self.lokr_w2.to(inputs.dtype)
        (a1, a2), (b1, b2) = first.shape, second.shape
        matrix = inputs.reshape(-1, a2, b2)
        if a1 * a2 * b2 + a1 * b2 * b1 <= a2 * b2 * b1 + a1 * a2 * b1:
            matrix = F.linear(torch.bmm(first.expand(len(matrix), a1, a2), matrix), second)
        else:
            matrix = torch.bmm(first.expand(len(matrix), a1, a2), F.linear(matrix, second))
        return matrix.view(*inputs.shape[:-1], a1 * b1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base(inputs) + self.product(inputs)


def kronecker_shapes(unet: nn.Module, a1: int, a2: int) -> Shapes:
    """a1 a2 + O I / (a1 a2) numbers per projection. Raises InputError if a1 or a2 does not divide a width."""
    shapes = {}
    for name, layer in attention_projections(unet).items():
        outputs, inputs = weight_shape(layer)
        for flag, value, size, side in ("a1", a1, outputs, "outputs"), ("a2", a2, inputs, "inputs"):
            if size % value:
                divisor = common_divisor(unet, 0 if flag == "a1" else 1)
                raise InputError(
                    f"--{flag} must divide the {side} of every projection, got {value}: {name} has {size}; this "
                    f"model takes divisors of {divisor}"
                )
        shapes |= {f"{name}.lokr_w1": (a1, a2), f"{name}.lokr_w2": (outputs // a1, inputs // a2)}
    return shapes


def common_divisor(unet: nn.Module, side: int) -> int:
    """Greatest common divisor of the widths of all projections: of outputs (side 0) or inputs (side 1)."""
    return math.gcd(*(weight_shape(layer)[side] for layer in attention_projections(unet).values()))


def add_kronecker(unet: nn.Module, a1: int, a2: int, generator: torch.Generator) -> Parameters:
    """Add Kronecker factors to every projection: B = 0, A ~ N(0, (1 / a1)^2), as in the authors' code."""
    for name, layer in attention_projections(unet).items():
        tuned = KroneckerLayer(layer, a1, a2)
        tuned.lokr_w1.data.copy_(torch.randn(a1, a2, generator=generator) / a1)
        unet.set_submodule(name, tuned)
    return trained(unet, "lokr_w1", "lokr_w2")


# ----------------------------------------------------------------------------------------------------- LoRA


def lora_shapes(unet: nn.Module, rank: int) -> Shapes:
    """rank (I + O) numbers per projection."""
    shapes = {}
    for name, layer in attention_projections(unet).items():
        outputs, inputs = weight_shape(layer)
        shapes |= {f"{name}.lora_A.default.weight": (rank, inputs), f"{name}.lora_B.default.weight": (outputs, rank)}
    return shapes


def lora_config(rank: int):
    """peft's configuration: alpha = rank, no dropout, no bias, on the projections of packed or unpacked attentions."""
    from peft import LoraConfig
    from peft.tuners import lora

    class LoraLayer(lora.Linear):
        """peft's layer over a packed one. It computes in the precision of the activations, so that no fp32 copy is kept."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.disable_adapters and self.merged:
                self.unmerge()
            outputs = self.base_layer(inputs)
            if self.disable_adapters or self.merged:
                return outputs
            for name in self.active_adapters:
                if name not in self.lora_A:
                    continue
                lora_a, lora_b = self.lora_A[name], self.lora_B[name]
                assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear)
                down, up = lora_a.weight.to(inputs.dtype), lora_b.weight.to(inputs.dtype)
                outputs = outputs + F.linear(F.linear(inputs, down), up) * self.scaling[name]
            return outputs

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(PROJECTIONS))
    config._register_custom_module({QuantizedLayer: LoraLayer, nn.Linear: LoraLayer})
    return config


def add_lora(unet: nn.Module, rank: int, generator: torch.Generator) -> Parameters:
    """Add LoRA to every projection: B = 0, A ~ N(0, (1 / rank)^2), initialised as in diffusers' example."""
    from diffusers.loaders.peft import PeftAdapterMixin

    assert isinstance(unet, PeftAdapterMixin)  # as is every UNet of diffusers
    with torch.random.fork_rng(), warnings.catch_warnings():  # peft draws from the global generator; A is redrawn below
        warnings.filterwarnings("ignore", "Unsupported layer type")  # ours, registered in `lora_config`
        unet.add_adapter(lora_config(rank))
    parameters = trained(unet, "lora_A.default.weight", "lora_B.default.weight")
    for name, parameter in parameters.items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
    return parameters


# ----------------------------------------------------------------------------------------------------- all


def trained(unet: nn.Module, *leaves: str) -> Parameters:
    """Enable gradients for the parameters whose names end in one of `leaves`, or in one and a number -> those parameters."""
    ending = re.compile(rf"\.({'|'.join(map(re.escape, leaves))})(\.\d+)?$")
    parameters = {name: parameter for name, parameter in unet.named_parameters() if ending.search(name)}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters
