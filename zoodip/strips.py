"""The VAE's decoder in half of its memory: large pictures are decoded one by one, a strip of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

STRIP = 32  # rows; of SD v1.5's widest map at 512 pixels, 17 MB in fp32
WHOLE = 256 * 256  # pixels; up to as many the library decodes a picture


class FeatureMap(NamedTuple):
    """A feature map [B, C, height, W] that is computed when its rows are asked for."""

    height: int
    rows: Callable[[int, int], Tensor]  # (a, b) -> rows [a, b), [B, C, b - a, W]


class StripDecoder(Decoder):
    """A decoder that computes its feature maps in strips, and puts a residual block's output in the place of its input.

    At 512 pixels the widest map of SD v1.5's decoder takes 268 MB in fp32, and the library holds three times as much at once. But
    a convolution needs just one row on either side of a strip, and a group normalisation needs only means and variances. The
    pictures are the same up to rounding.
    """

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] of latents [B, 4, h, w]."""
        factor = 2 ** sum(block.upsamplers is not None for block in self.up_blocks)
        if sample.shape[2] * sample.shape[3] * factor**2 <= WHOLE or torch.is_grad_enabled():
            return super().forward(sample, latent_embeds)
        return torch.cat([self.picture(latents) for latents in sample.split(1)])

    def picture(self, latents: Tensor) -> Tensor:
        """One picture [1, 3, H, W] of latents [1, 4, h, w]."""
        x = self.mid_block(self.conv_in(latents))
        block: Any
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = residual(resnet, x)
            for upsampler in block.upsamplers or []:
                x = gathered(convolved(upsampler.conv, doubled(x)))
        norm = cast(nn.GroupNorm, self.conv_norm_out)
        return gathered(convolved(self.conv_out, activated(norm, x)))


def decode_in_strips(decoder: nn.Module) -> None:
    """Make a VAE's decoder a StripDecoder if it is built like Stable Diffusion's; another one stays as it is."""
    if type(decoder) is Decoder and isinstance(decoder.conv_norm_out, nn.GroupNorm) and all(map(is_plain, decoder.up_blocks)):
        decoder.__class__ = StripDecoder


def is_plain(block: Any) -> bool:
    """Whether a block of the decoder has nothing but residual layers with SiLU and group normalisation, and upsampling."""
    return type(block) is UpDecoderBlock2D and all(
        isinstance(resnet.nonlinearity, nn.SiLU) and isinstance(resnet.norm1, nn.GroupNorm) for resnet in block.resnets
    )


def residual(resnet: Any, x: Tensor) -> Tensor:
    """What a ResnetBlock2D without time embedding makes of x [B, C, H, W]; it takes the place of x."""
    order = order_of(x)
    hidden = gathered(convolved(resnet.conv1, activated(resnet.norm1, x)))
    change = convolved(resnet.conv2, activated(resnet.norm2, hidden))
    output = x[:, : hidden.shape[1]]
    for first, last in strips(change.height):
        if resnet.conv_shortcut is not None:
            output[:, :, first:last] = resnet.conv_shortcut(x[:, :, first:last])
        output[:, :, first:last].add_(change.rows(first, last)).div_(resnet.output_scale_factor)
    del hidden, change  # before a copy without the channels that are no longer used
    return output.contiguous(memory_format=order)


def doubled(x: Tensor) -> FeatureMap:
    """A map that has every value of x [B, C, H, W] twice in both directions."""

    def rows(first: int, last: int) -> Tensor:
        both = F.interpolate(x[:, :, first // 2 : (last + 1) // 2], scale_factor=2.0, mode="nearest")
        return both[:, :, first % 2 : first % 2 + last - first]

    return FeatureMap(2 * x.shape[2], rows)


def convolved(conv: nn.Module, source: FeatureMap) -> FeatureMap:
    """A 3 x 3 convolution with zero padding: of a strip with a row more on either side, which is cut off again."""

    def rows(first: int, last: int) -> Tensor:
        above, below = max(first - 1, 0), min(last + 1, source.height)
        return conv(source.rows(above, below))[:, :, first - above : last - above]

    return FeatureMap(source.height, rows)


def activated(norm: nn.GroupNorm, x: Tensor) -> FeatureMap:
    """SiLU(norm(x)). The statistics of x [B, C, H, W] are put together from those of its strips, in fp32."""
    found = []  # (variance, mean), each [B, groups], of every strip
    for first, last in strips(x.shape[2]):
        part = x[:, :, first:last].unflatten(1, (norm.num_groups, -1)).float()
        found.append(torch.stack(torch.var_mean(part, dim=(2, 3, 4), correction=0)))
    shares = x.new_tensor([(last - first) / x.shape[2] for first, last in strips(x.shape[2])], dtype=torch.float32)
    variances, means = torch.stack(found, dim=-1)  # each [B, groups, strips]
    mean = means @ shares
    deviation = ((variances + (means - mean[..., None]).square()) @ shares + norm.eps).sqrt()
    size = norm.num_channels // norm.num_groups
    scale = norm.weight.float() / deviation.repeat_interleave(size, 1)  # [B, C]
    shift = norm.bias.float() - mean.repeat_interleave(size, 1) * scale

    def rows(first: int, last: int) -> Tensor:
        part = x[:, :, first:last] * scale[:, :, None, None] + shift[:, :, None, None]
        return F.silu(part, inplace=True).to(x.dtype)

    return FeatureMap(x.shape[2], rows)


def strips(height: int) -> list[tuple[int, int]]:
    """The first row of every strip and the one after its last."""
    return [(first, min(first + STRIP, height)) for first in range(0, height, STRIP)]


def order_of(x: Tensor) -> torch.memory_format:
    """The order of a map's values in memory, which convolutions keep."""
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def gathered(source: FeatureMap) -> Tensor:
    """The whole map [B, C, height, W], one strip after another."""
    found = None
    for first, last in strips(source.height):
        part = source.rows(first, last)
        if found is None:
            shape, order = (*part.shape[:2], source.height, part.shape[3]), order_of(part)
            found = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=order)
        found[:, :, first:last] = part
    assert found is not None
    return found
