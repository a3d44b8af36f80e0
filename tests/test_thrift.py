"""What is done for speed and memory changes no number beyond rounding."""

from __future__ import annotations

import pytest
import torch
from conftest import seeded
from tiny import Tiny

from zoodip.model import load_frozen, load_text_encoder
from zoodip.prompts import encode_prompts
from zoodip.quantize import QuantizedLayer
from zoodip.thrift import modules_before_text, split_feed_forward


@pytest.mark.parametrize("first_block", ["CrossAttnDownBlock2D", "DownBlock2D"])
@pytest.mark.parametrize("linear_projection", [False, True])
def test_modules_before_the_text(first_block, linear_projection):
    """They must see the same inputs whatever the prompt, and be all the modules that do: another prompt changes what follows."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = (
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=2,
                cross_attention_dim=12,
                norm_num_groups=8,
                attention_head_dim=4,
                down_block_types=(first_block, "CrossAttnDownBlock2D"),
                use_linear_projection=linear_projection,
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            )
            .eval()
            .requires_grad_(False)
        )
    before = modules_before_text(unet)
    names = {module: name for name, module in unet.named_modules()}
    heavy = [m for m in unet.modules() if type(m).__name__ in ("ResnetBlock2D", "Downsample2D", "Attention")] + [unet.conv_in]
    outputs = {module: [] for module in {*before, *heavy}}
    for module in outputs:
        module.register_forward_hook(lambda module, args, output: outputs[module].append(output))
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([700])
    for seed in (1, 2):
        unet(latents, timesteps, torch.randn(1, 5, 12, generator=seeded(seed)))
    same = {names[module] for module, (a, b) in outputs.items() if torch.equal(a, b)}
    assert same == {names[module] for module in before}


@pytest.mark.parametrize("size", [1, 2])
def test_the_part_before_the_text_is_computed_once(tiny, size):
    """With and without it, losses are the same up to the order of sums; the shared layers see only one part of the batch."""
    batch, tokens = tiny.batch(size), tiny.tokens(3)
    shared = tiny.losses(batch, tokens)
    seen = []
    handle = tiny.unet.conv_in.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    tiny.losses(batch, tokens)
    handle.remove()
    assert seen == [size] and not tiny.unet.conv_in._forward_pre_hooks
    separate = torch.cat([tiny.losses(batch, token[None]) for token in tokens])
    torch.testing.assert_close(shared, separate, rtol=2e-6, atol=0)  # fp32 sums over 256 numbers, in another order


def test_every_default_path_agrees_with_plain_fp32(tiny_model):
    """All that is done for speed and memory (packing, slices, channels_last, one forward for all candidates, the shared part,
    split feed-forwards) against the stock UNet holding the dequantised weights, one candidate at a time.

    Tolerance: both compute in fp32 and differ only in the order of sums. A loss is a mean of 256 squares, each of a prediction
    through about 30 layers whose sums have up to 576 terms; relative rounding of 2^-24 sqrt(576 * 30) = 8e-6 is its bound.
    """
    quantised = Tiny(tiny_model, 1)
    quantised.unet = load_frozen(tiny_model, "unet", None, "nf4", torch.float32, "cpu")
    split_feed_forward(quantised.unet)
    quantised.text_encoder = load_text_encoder(tiny_model, None, "nf4", torch.float32, "cpu")
    plain = Tiny(tiny_model, 1)
    for ours, theirs in ((quantised.unet, plain.unet), (quantised.text_encoder, plain.text_encoder)):
        for name, layer in ours.named_modules():
            if isinstance(layer, QuantizedLayer):
                theirs.get_submodule(name).weight = torch.nn.Parameter(layer.dequantize().contiguous(), requires_grad=False)
    batch, tokens = plain.batch(1), plain.tokens(3)
    ours = quantised.losses(batch, tokens)
    for token, loss in zip(tokens, ours, strict=True):
        states = encode_prompts(plain.text_encoder, plain.prompts.rows, batch.prompt_ids, token[None])
        prediction = plain.unet(batch.noisy_latents, batch.timesteps, states).sample
        torch.testing.assert_close(loss, (prediction - batch.target).square().mean(), rtol=8e-6, atol=0)
