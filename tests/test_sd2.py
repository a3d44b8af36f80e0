"""Stable Diffusion 2.x: training on a random folder of its kind, and its prompts as diffusers encodes them.

Its differences: vectors of 1024 numbers, v-prediction, "!" for padding, linear projections, a list of head widths.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import arguments, make_model, run_cli
from safetensors import safe_open
from safetensors.torch import load_file

from zoodip.folder import native_resolution
from zoodip.model import load_text_encoder
from zoodip.prompts import build_prompts, encode_prompts, load_tokenizer


@pytest.fixture(scope="module")
def sd2(tmp_path_factory) -> Path:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTokenizer

    folder = make_model(tmp_path_factory.mktemp("sd2") / "tiny-sd2", "v_prediction", width=1024)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        UNet2DConditionModel(
            sample_size=12, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=1024, norm_num_groups=8,
            attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).save_pretrained(folder / "unet")  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def test_a_token_is_learned_and_loads_in_diffusers(sd2, subject, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    output = tmp_path / "out"
    assert native_resolution(sd2) == 24
    flags = dict(resolution=None, max_train_steps=3, num_vectors=2, final_picture=True, num_validation_images=1)
    assert run_cli(arguments(sd2, subject, output, **flags)) == 0
    assert "embedding:sks; InvokeAI: <sks>" in capsys.readouterr().out  # other programs load a token of this size
    with safe_open(output / "learned_embeds.safetensors", framework="pt") as handle:
        header = handle.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-v2/textual-inversion"
    assert header["modelspec.prediction_type"] == "v" and header["modelspec.resolution"] == "24x24"
    assert load_file(output / "sks.safetensors")["emb_params"].shape == (2, 1024)
    assert json.loads((output / "run.json").read_text())["skipped_steps"] == 0
    pipeline = StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None)
    pipeline.load_textual_inversion(output / "learned_embeds.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a photo of <sks>", num_inference_steps=2, height=24, width=24)


def test_prompts_are_padded_and_encoded_as_diffusers_does(sd2, tmp_path):
    """Short, empty and with the token; against encode_prompt of the stock pipeline, which pads with "!" too."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    theta = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    save_file({"<sks>": theta}, tmp_path / "token.safetensors")
    texts = ["a photo of a <sks> in snow", "<sks>", "", "a dog"]
    pipeline = StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None)
    pipeline.load_textual_inversion(tmp_path / "token.safetensors")
    assert pipeline.tokenizer.pad_token == "!"
    expected = torch.cat([pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in texts])

    tokenizer = load_tokenizer(sd2, "<sks>", 2)
    prompts = build_prompts(tokenizer, sd2, None, texts, "<sks>", 2)
    text_encoder = load_text_encoder(sd2, None, "none", torch.float32, "cpu")
    with torch.no_grad():
        states = encode_prompts(text_encoder, prompts.rows, prompts.ids, theta[None])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)  # fp32, two layers of sums of 1024 and 2048 terms
