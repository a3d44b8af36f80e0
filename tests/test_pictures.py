"""The drawer draws what a stock pipeline draws from the same word, prompt, guidance and noise."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments, run_cli, sample
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from PIL import Image, ImageDraw, ImageFont
from tiny import Tiny, rewrite

from benchmarks.memory import peak_live_bytes
from zoodip.diffusion import FrozenModel
from zoodip.model import load_pipeline
from zoodip.pictures import Drawer, picture_sheet, wrap
from zoodip.prompts import build_prompts
from zoodip.strips import StripDecoder, decode_in_strips

TEXTS = ["a photo of {} in the snow", "{} on the grass with a cat", ""]  # the last is the negative prompt


@pytest.fixture(scope="module")
def attentive(tiny_model, tmp_path_factory):
    """The tiny model with cross-attention ten times as strong: a random one hardly looks at its prompt."""
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("attentive") / "model"))
    rewrite(model, "unet", lambda tensors: {name: 10 * t if "attn2.to_v" in name else t for name, t in tensors.items()})
    return model


@pytest.fixture(scope="module")
def drawing(attentive):
    """Draws with few steps; keeps the batch sizes of the UNet's forwards."""
    tiny = Tiny(attentive, 1)
    prompts = build_prompts(tiny.tokenizer, attentive, None, TEXTS, "<sks>", 1)
    sizes = []
    tiny.unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(output[0])))

    def draw(theta=None, wanted=((0, 0),), guidance: float = 5.0, batch_size: int = 1) -> list[np.ndarray]:
        sizes.clear()
        model = FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows)
        drawer = Drawer(model, attentive, None, "none", 16, steps=4, guidance=guidance, batch_size=batch_size, scheduler="pndm")
        theta = tiny.tokens(1)[0] if theta is None else theta
        return [np.asarray(picture, dtype=int) for picture in drawer.draw(prompts, theta, list(wanted))]

    draw.sizes, draw.tokens = sizes, tiny.tokens
    return draw


def test_a_picture_depends_on_all_that_it_should(drawing):
    """The learned word, the prompt, the noise and the guidance: each alone changes the picture; nothing else does."""
    (first,) = drawing()
    assert first.shape == (16, 16, 3) and first.std() > 0
    (again,) = drawing()
    assert np.array_equal(first, again)
    others = dict(word=drawing(theta=2 * drawing.tokens(1, seed=8)[0]), prompt=drawing(wanted=[(1, 0)]),
                  noise=drawing(wanted=[(0, 1)]), no_guidance=drawing(guidance=1.0), guidance=drawing(guidance=7.5))  # fmt: skip
    for name, (other,) in others.items():
        assert np.abs(first - other).max() > 3, name  # 8-bit colours; rounding would be 1


def test_pictures_of_the_empty_prompt_do_not_know_the_word(drawing):
    """The prompt that guidance leads away from is the empty one, whatever was learned."""
    (empty,), (with_another_word,) = drawing(wanted=[(2, 0)]), drawing(wanted=[(2, 0)], theta=drawing.tokens(1, seed=8)[0])
    assert np.array_equal(empty, with_another_word)
    (strong,) = drawing(wanted=[(2, 0)], guidance=50.0)  # away from itself leads nowhere
    assert np.abs(empty - strong).max() <= 1


def test_batches_of_pictures(drawing):
    """Pictures are the same one by one and together; PNDM takes one forward more than steps, each of two halves with guidance."""
    wanted = [(0, 0), (1, 1), (0, 2)]
    alone = drawing(wanted=wanted)
    assert drawing.sizes == [2] * 3 * 5
    together = drawing(wanted=wanted, batch_size=2)
    assert drawing.sizes == [4] * 5 + [2] * 5
    drawing(guidance=1.0)
    assert drawing.sizes == [1] * 5
    for a, b in zip(alone, together, strict=True):
        assert np.abs(a - b).max() <= 1  # sums in another order, in 8-bit colours


@pytest.mark.parametrize("case", sample([(4.0, "fp32"), (1.0, "fp32"), (4.0, "bf16")], (4.0, "fp32")), ids=str)
def test_validation_pictures_are_the_pipelines(attentive, subject, tmp_path, case):
    """What a run draws is what a user gets from its file: the word just learned, the prompt, an empty negative prompt, the
    guidance asked for, the noises of seed and seed + 1."""
    guidance, precision = case
    prompt, precisions = "a photo of <sks> in the snow", {"fp32": torch.float32, "bf16": torch.bfloat16}
    flags = dict(learning_rate=0.5, max_train_steps=4, eval_steps=0, seed=7, validation_prompt=prompt, num_validation_images=2,
                 validation_guidance=guidance, mixed_precision=precision)  # fmt: skip
    assert run_cli(arguments(attentive, subject, tmp_path / "out", **flags)) == 0
    sheet = np.asarray(Image.open(tmp_path / "out" / "validation-4.png"), dtype=int)
    pipeline = load_pipeline(str(attentive), "nf4", precisions[precision])
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(tmp_path / "out" / "learned_embeds.safetensors")

    def distance(i: int, text: str = prompt, scale: float = guidance, seed: int = 7, negative: str = "") -> float:
        picture = pipeline(text, negative_prompt=negative, guidance_scale=scale, num_inference_steps=20, height=16, width=16,
                           generator=torch.Generator().manual_seed(seed)).images[0]  # fmt: skip
        enlarged = picture.resize((256, 256), Image.Resampling.LANCZOS)  # as on the sheet, with the prompt beneath
        return np.abs(sheet[:256, 256 * i : 256 * (i + 1)] - np.asarray(enlarged, dtype=int)).mean()

    # the same sums in the same order, so the same 8-bit colours here; elsewhere one in twenty may be rounded the other way
    assert distance(0) < 0.05 and distance(1, seed=8) < 0.05
    if case == (4.0, "fp32"):  # and pictures drawn otherwise are far away
        word, scale = distance(0, "a photo of dog in the snow"), distance(0, scale=7.5)
        noise, exchanged = distance(0, seed=8), distance(0, "", negative=prompt)
        assert min(word, scale, noise, exchanged) > 0.5, (word, scale, noise, exchanged)


@pytest.mark.parametrize(("cell", "gap", "columns"), [(192, 6, 3), (64, 3, 2), (256, 0, 1)])
def test_captions_are_whole(cell, gap, columns):
    """All of their ink is on the sheet, none of it in the gap before the next picture, no two lines touch."""
    captions = [
        "a chubby blue critter with brown stripes, long ears, a puffy tail and amber eyes with a city at night in the "
        "background wearing a rainbow scarf",
        "WWWWWW mmmmmm wwwwww MMMMMM",
        "gyp qjy " + "Incomprehensibilities" * 3,
    ]
    blank = Image.new("RGB", (cell, cell), "white")
    font = ImageFont.load_default(max(10, cell // 10))
    sheet = 255 - np.asarray(picture_sheet([([blank], caption) for caption in captions], columns, cell, gap).convert("L"), int)
    lines = [wrap(caption, cell, font) for caption in captions]
    for caption, own in zip(captions, lines, strict=True):
        assert "".join(own).replace(" ", "") == caption.replace(" ", "") and max(map(font.getlength, own)) <= cell

    def ink(text: str) -> int:
        free = Image.new("L", (3 * cell, 3 * cell), "white")
        ImageDraw.Draw(free).text((cell, cell), text, fill="black", font=font)
        return int((255 - np.asarray(free, int)).sum())

    assert sheet.sum() == sum(ink(line) for own in lines for line in own)
    for column in range(columns if gap else 0):  # a letter may reach one pixel to the left of its place
        start = column * (cell + 2 * gap)
        assert not sheet[:, start : start + gap - 1].any()


def test_picture_sheet():
    """Rows of squares, with whole captions below them and headings above; without captions or gaps, nothing but the pictures."""
    colours = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue", "white")]
    plain = np.asarray(picture_sheet([(colours, "")], cell=16, gap=0))
    assert plain.shape == (16, 64, 3)
    for i, colour in enumerate(colours):
        assert np.array_equal(plain[:, 16 * i : 16 * (i + 1)], np.asarray(colour))
    blocks = [(colours[:2], "one"), (colours[2:], "a caption of many words that takes several lines")]
    captioned = picture_sheet(blocks, columns=2, cell=32, gap=4, headings=["a", "b"])
    pixels = np.asarray(captioned)
    assert captioned.width > 4 * 32 and captioned.height > 32 + 4
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (pixels == colour).all(-1).sum() >= 32 * 32
    assert (pixels.max(-1) < 100).any()  # the captions' black


def small_decoder(**config) -> AutoencoderKL:
    """A VAE built like Stable Diffusion's but smaller, with 4 pixels for each latent in height and width; its decoder."""
    torch.manual_seed(0)
    shape = dict(block_out_channels=(32, 64, 96), down_block_types=("DownEncoderBlock2D",) * 3,
                 up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, norm_num_groups=8)  # fmt: skip
    vae = AutoencoderKL(**(shape | config)).double().eval()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    return vae


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("strip", [1, 5, 32])
def test_a_picture_decoded_in_strips_is_the_same(monkeypatch, order, strip):
    """Heights that strips do not divide, two pictures at once, and maps with more channels than their successors. The statistics
    are in fp32, everything else here in fp64. Small pictures are the library's, bit for bit."""
    vae = small_decoder().to(memory_format=order)
    latents = 3 * torch.randn(2, 4, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        whole = vae.decode(latents).sample
        decode_in_strips(vae.decoder)
        assert type(vae.decoder) is StripDecoder and torch.equal(vae.decode(latents).sample, whole)
        monkeypatch.setattr("zoodip.strips.WHOLE", 0)
        monkeypatch.setattr("zoodip.strips.STRIP", strip)
        kept = latents.clone()
        in_strips = vae.decode(latents).sample
    assert torch.equal(latents, kept)
    assert not torch.equal(in_strips, whole)  # it was another way
    torch.testing.assert_close(in_strips, whole, atol=1e-5 * whole.std().item(), rtol=0)  # measured: 6e-7


def test_strips_need_less_memory():
    vae = small_decoder(norm_num_groups=4).float()
    latents = torch.randn(1, 4, 128, 64)
    with torch.no_grad():
        whole = peak_live_bytes(lambda: vae.decode(latents))
        decode_in_strips(vae.decoder)
        in_strips = peak_live_bytes(lambda: vae.decode(latents))
    assert in_strips < 0.55 * whole  # measured: .47


def test_another_decoder_is_left_alone():
    vae = small_decoder(up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"))
    decode_in_strips(vae.decoder)
    assert type(vae.decoder) is not StripDecoder


def test_pipelines_and_the_drawer_decode_in_strips(tiny_model):
    assert type(load_pipeline(str(tiny_model), "nf4").vae.decoder) is StripDecoder
    tiny = Tiny(tiny_model, 1)
    model = FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows)
    assert type(Drawer(model, tiny_model, None, "nf4", 64).pipeline.vae.decoder) is StripDecoder
