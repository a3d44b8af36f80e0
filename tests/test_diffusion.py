"""Latents, batches and the fixed set, against formulas and the stock models."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import seeded
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from tiny import alphas_cumprod, from_pretrained, scheduler_of

from zoodip.diffusion import (
    Data,
    draw_batch,
    encode_images,
    encoder_moments,
    evaluation_batches,
    load_model,
    merge_batches,
    noise_batch,
    read_inputs,
    uniform_timesteps,
)
from zoodip.model import load_vae_encoder
from zoodip.subject import to_square


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_batch_equals_the_formulas(tiny_model, prediction_type):
    """z_t = sqrt(abar) z + sqrt(1 - abar) eps; the target is eps, or sqrt(abar) eps - sqrt(1 - abar) z."""
    scheduler = scheduler_of(tiny_model, prediction_type=prediction_type)
    latents, timesteps = torch.rand(3, 2, 4, 8, 8, generator=seeded()), torch.tensor([3, 500, 999])
    batch = noise_batch(latents, timesteps, torch.zeros(3, 5), scheduler, seeded(1))
    generator = seeded(1)
    sampled = latents[:, 0] + latents[:, 1] * torch.randn(3, 4, 8, 8, generator=generator)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    abar = torch.from_numpy(alphas_cumprod()).float()[timesteps].view(3, 1, 1, 1)
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * sampled
    # fp32: the product of up to 1000 factors, 1e-7 each at worst
    torch.testing.assert_close(batch.noisy_latents, abar.sqrt() * sampled + (1 - abar).sqrt() * noise, rtol=0, atol=2e-4)
    expected = noise if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(batch.target, expected, rtol=0, atol=2e-4)


def test_draw_batch_covers_everything_and_pairs_captions():
    """Every image, flip and caption is drawn, and an image only ever with its own captions."""
    latents = torch.zeros(3, 2, 2, 4, 1, 1)
    latents[:, :, 0] = torch.arange(6.0).view(3, 2, 1, 1, 1)  # mean = 2 image + flip, deviation 0
    choices = [[0, 1], [2], [3, 4]]
    clean = SimpleNamespace(  # a schedule without noise shows the latents themselves
        alphas_cumprod=torch.ones(1), config=SimpleNamespace(prediction_type="epsilon"), add_noise=lambda x, noise, t: x
    )
    data = Data(latents, choices, torch.arange(5)[:, None], clean)
    generator, seen = seeded(), {}
    for _ in range(600):
        batch = draw_batch(data, 2, partial(uniform_timesteps, low=0, high=1), generator)
        for value, row in zip(batch.noisy_latents[:, 0, 0, 0].tolist(), batch.prompt_ids[:, 0].tolist(), strict=True):
            key = (int(value) // 2, int(value) % 2, row)
            seen[key] = seen.get(key, 0) + 1
    pairs = {(image, flip, row) for image in range(3) for flip in range(2) for row in choices[image]}
    assert set(seen) == pairs
    # 1200 draws: 100 expected for images with two captions, 200 with one; 5 standard deviations of a Poisson count
    for (image, _, _), count in seen.items():
        expected = 100 if len(choices[image]) == 2 else 200
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_the_fixed_set_is_fixed(tiny):
    """Learning curves of different seeds and samplers must be judged on the same examples: no generator is passed in."""
    data = Data(torch.rand(3, 2, 2, 4, 8, 8, generator=seeded()), [[0], [1], [0, 1]], tiny.prompts.ids, scheduler_of(tiny.folder))
    sets = []
    for seed in (0, 9):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        sets.append(evaluation_batches(data, 8, 500, 900))
        assert torch.equal(torch.random.get_rng_state(), before)  # nor is the global one touched
    for first, second in zip(*sets, strict=True):
        for name in ("noisy_latents", "target", "timesteps", "prompt_ids"):
            assert torch.equal(getattr(first, name), getattr(second, name))
    timesteps = [int(batch.timesteps) for batch in sets[0]]
    assert sorted(timesteps) == [525, 575, 625, 675, 725, 775, 825, 875]  # the middles of eight equal parts of [500, 900)
    assert timesteps != sorted(timesteps)  # otherwise image and timestep would be correlated


@pytest.mark.parametrize("size", [1, 3, 8])
def test_merged_batches_are_the_same_examples(tiny, size):
    """Joining batches to save forwards must keep every example, in order."""
    data = Data(torch.rand(3, 2, 2, 4, 8, 8, generator=seeded()), [[0], [1], [0, 1]], tiny.prompts.ids, scheduler_of(tiny.folder))
    batches = evaluation_batches(data, 8, 0, 1000)
    merged = merge_batches(batches, size)
    assert [len(batch.timesteps) for batch in merged] == {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[size]
    for name in ("noisy_latents", "target", "timesteps", "prompt_ids"):
        assert torch.equal(*(torch.cat([getattr(batch, name) for batch in each]) for each in (batches, merged)))


@pytest.mark.parametrize("center_crop", [False, True])
def test_encode_images(tiny_model, tmp_path, center_crop):
    """Mean and deviation of the scaled latent of the picture and of its mirror image."""
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + 9 * i, 31, 3), np.uint8)) for i in range(2)]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    latents = encode_images(load_vae_encoder(tiny_model, None, "cpu"), paths, 16, center_crop)
    assert latents.shape == (2, 2, 2, 4, 8, 8) and latents.dtype == torch.float32
    vae = from_pretrained(tiny_model, "vae")
    for i, image in enumerate(images):
        for flip in range(2):
            pixels = to_square(image, 16, center_crop)[:1]
            with torch.no_grad():
                distribution = vae.encode(pixels.flip(-1) if flip else pixels).latent_dist
            # the same sums in another order, in fp32: values of size 0.1 to 1
            torch.testing.assert_close(latents[i, flip, 0], distribution.mean[0] * 0.18215, rtol=0, atol=2e-6)
            torch.testing.assert_close(latents[i, flip, 1], distribution.std[0] * 0.18215, rtol=0, atol=2e-6)


def test_an_encoder_with_attention():
    """An autoencoder that is not built like Stable Diffusion's is left to the library, and none of its layers is left out."""
    torch.manual_seed(0)
    vae = AutoencoderKL(down_block_types=("AttnDownEncoderBlock2D", "DownEncoderBlock2D"), block_out_channels=(8, 8),
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4).eval()  # fmt: skip
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder_moments(vae, pixels), vae.encode(pixels).latent_dist.parameters)


def test_a_fault_of_the_compiler_is_not_blamed_on_the_folder(tiny_model, subject, monkeypatch):
    """The first loss, which finds a damaged folder, is computed before the UNet is compiled."""

    def fault(*args, **named):
        raise RuntimeError("the compiler is broken")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda unet, dynamic: setattr(unet, "_compiled_call_impl", fault))
    folders = dict(train_data_dir=subject, pretrained_model_name_or_path=str(tiny_model))
    inputs = read_inputs(**folders, placeholder_token="<sks>", initializer_token="dog")
    how = dict(quantization="none", mixed_precision="fp32", device=torch.device("cpu"), resolution=16)
    model, data = load_model(inputs, **how, compile=True)
    with pytest.raises(RuntimeError, match="the compiler is broken"):
        model.mean_loss(evaluation_batches(data, 1, 500, 900), inputs.initial_token)
