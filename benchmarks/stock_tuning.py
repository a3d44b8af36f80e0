"""Weight tuning as the libraries or a method's own code do it: the baselines that `weight_tuning.py` compares ours with.

Latents and text states are precomputed, like ours, so that a step is only the UNet's forward and backward passes and AdamW.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.methods import linear4bit
from zoodip.model import is_quantized
from zoodip.quantize import affine_integers
from zoodip.tuned_layers import PROJECTIONS

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


class Stock:
    """The UNet as diffusers loads it, frozen, plus what a system trains in it."""

    label = ""

    def __init__(self, folder: Path, variant: str | None, dtype: torch.dtype):
        from diffusers import UNet2DConditionModel

        self.dtype = dtype
        loaded = self.loaded_in()
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", variant=variant, torch_dtype=loaded)
        assert isinstance(unet, UNet2DConditionModel)
        self.unet = self.prepare(unet.requires_grad_(False))
        config = self.unet.config
        side = config["sample_size"]
        self.latents = torch.randn(1, config["in_channels"], side, side, dtype=loaded)
        self.states = torch.randn(1, 77, config["cross_attention_dim"], dtype=loaded)
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, weight_decay=1e-2)

    def loaded_in(self) -> torch.dtype:
        return self.dtype

    def prepare(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        raise NotImplementedError

    def precision(self) -> AbstractContextManager:
        return nullcontext()

    def held(self) -> list[torch.Tensor]:
        return [self.latents, self.states]

    def step(self) -> None:
        timesteps, noise = torch.randint(1000, (1,)), torch.randn_like(self.latents)
        with self.precision():
            prediction = self.unet(self.latents, timesteps, self.states).sample
        F.mse_loss(prediction.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class StockDreamBooth(Stock):
    label = "diffusers' UNet under autocast"

    def loaded_in(self) -> torch.dtype:
        return torch.float32

    def prepare(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        return unet.requires_grad_(True)

    def precision(self) -> AbstractContextManager:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)


class StockQLoRA(Stock):
    label = "peft's LoRA over bitsandbytes' Linear4bit, convolutions 16-bit"

    def prepare(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        from peft import LoraConfig

        linear4bit(unet, self.dtype, torch.device("cpu"))
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=list(PROJECTIONS)))
        return trained_in_fp32(unet)


class StockLoKr(Stock):
    label = "peft's LoKr, both factors whole, factor 8, 16-bit weights"

    def prepare(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        from peft import LoKrConfig, inject_adapter_in_model

        rank = 10_000  # larger than any factor, so that none is decomposed
        inject_adapter_in_model(LoKrConfig(r=rank, alpha=rank, decompose_factor=8, target_modules=list(PROJECTIONS)), unet)
        return trained_in_fp32(unet)


def trained_in_fp32(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet


class Dequantised(nn.Module):
    """W = s_out (q - z) s_in, computed in fp32 under autograd in every forward; 4-bit integers are stored in 8 bits, too."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, bits: int, experts: int, scale_in: bool):
        super().__init__()
        integers, scale, zero = affine_integers(layer.weight.data.flatten(1), bits)
        shape = layer.weight.shape
        self.integers = nn.Buffer(integers.to(torch.int8).view(shape))
        self.zero, self.bias = nn.Buffer(zero.view(-1, *[1] * (len(shape) - 1))), layer.bias
        self.scale_out = nn.Parameter(scale.float().repeat(experts, 1))  # slices of one tensor, like the authors'
        self.scale_in = nn.Parameter(torch.ones(experts, shape[1])) if scale_in else None
        self.convolution: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            self.convolution = dict(stride=layer.stride, padding=layer.padding)
        self.expert = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        ones = [1] * (self.integers.dim() - 1)
        weight = (self.integers.float() - self.zero) * self.scale_out[self.expert].view(-1, *ones)
        if self.scale_in is not None:
            weight = weight * self.scale_in[self.expert].view(1, -1, *ones[1:])
        weight = weight.to(inputs.dtype)
        if self.convolution is None:
            return F.linear(inputs, weight, self.bias)
        return F.conv2d(inputs, weight, self.bias, **self.convolution)


class StockScales(Stock):
    """PEQA and TuneQDM, which no library provides."""

    label, bits, experts, scale_in = "weights dequantised in autograd, as the authors' code does", 8, 4, True

    def prepare(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        for name, module in list(unet.named_modules()):
            if is_quantized("unet", name, module):
                assert isinstance(module, (nn.Linear, nn.Conv2d))
                unet.set_submodule(name, Dequantised(module, self.bits, self.experts, self.scale_in))
        return unet


class StockPEQA(StockScales):
    bits, experts, scale_in = 4, 1, False
