"""How many numbers each weight-tuning system trains, and how large its files are: from the architectures, without weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import MINIATURE
from safetensors import safe_open
from torch import nn

import trainers.diffusekrona
import trainers.qlora
import trainers.tuneqdm
from benchmarks.sd15_shape import TEXT_ENCODER
from trainers.dreambooth import DreamBooth
from zoodip.arguments import settings_of
from zoodip.errors import InputError
from zoodip.tuned_files import save_lokr, save_lora, save_scales
from zoodip.tuned_layers import (
    Shapes,
    add_lora,
    attention_projections,
    integer_layers,
    kronecker_shapes,
    lora_shapes,
    scale_shapes,
)
from zoodip.weight_tuning import TunedOutputs


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def meta_unet(**config):
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        return UNet2DConditionModel(**config)


@pytest.fixture(scope="module")
def sd15():
    return meta_unet(sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768)


def test_counts_of_stable_diffusion_15(sd15):
    everything = DreamBooth().shapes(sd15)
    assert count(everything) == 859_520_964 and len(everything) == 686
    assert len(integer_layers(sd15)) == 280
    assert count(scale_shapes(sd15, 1, False)) == 318_080  # PEQA
    for number in (1, 2, 4):
        assert count(scale_shapes(sd15, number, True)) == number * 612_096  # TuneQDM
    for rank in (1, 2, 4):
        assert count(lora_shapes(sd15, rank)) == rank * 199_296
    assert count(kronecker_shapes(sd15, 4, 64)) == 398_048
    assert count(kronecker_shapes(sd15, 8, 64)) == 248_176


def test_what_stable_diffusion_15_is_made_of(sd15):
    """Weights of Linear and Conv2d, their biases, norms; and which of these are packed."""
    parts = dict.fromkeys(("linear", "convolution", "bias", "norm"), 0)
    for name, parameter in sd15.named_parameters():
        owner = sd15.get_submodule(name.rpartition(".")[0])
        kind = "norm" if isinstance(owner, (nn.GroupNorm, nn.LayerNorm)) else "bias" if name.endswith(".bias") else None
        parts[kind or {nn.Linear: "linear", nn.Conv2d: "convolution"}[type(owner)]] += parameter.numel()
    assert parts == dict(linear=270_049_280, convolution=589_027_840, bias=243_524, norm=200_320)
    assert sum(layer.weight.numel() for layer in integer_layers(sd15).values()) == 859_054_080
    shapes = [layer.weight.shape for layer in attention_projections(sd15).values()]
    assert (len(shapes), sum(map(math.prod, shapes)), sum(map(sum, shapes))) == (128, 93_511_680, 199_296)


def test_counts_with_the_text_encoder(sd15):
    """DiffuseKronA's SD figures (1.09 M, .52 M, .32 M; 982.5 M) are of UNet and text encoder, which the trainers leave alone."""
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel

    with init_empty_weights():
        encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    whole = sum(parameter.numel() for parameter in encoder.parameters())
    assert whole == 123_060_480 and 859_520_964 + whole == 982_581_444
    projections = [
        module.weight.shape for name, module in encoder.named_modules() if re.search(r"self_attn\.(q|k|v|out)_proj$", name)
    ]
    assert projections == [(768, 768)] * 48
    lora = sum(4 * (outputs + inputs) for outputs, inputs in projections)
    assert (lora, count(lora_shapes(sd15, 4)) + lora) == (294_912, 1_092_096)
    for a1, own, both in ((4, 122_880, 520_928), (8, 79_872, 328_048)):
        factors = sum(a1 * 64 + outputs // a1 * (inputs // 64) for outputs, inputs in projections)
        assert (factors, count(kronecker_shapes(sd15, a1, 64)) + factors) == (own, both)


def test_counts_that_the_papers_print(sd15):
    """TuneQDM's .33 M and .62 M are ONE expert, with conv_in and conv_out, and 12 shortcuts of Q-Diffusion cut in two."""
    edges = [sd15.conv_in.weight.shape, sd15.conv_out.weight.shape]
    outputs = count(scale_shapes(sd15, 1, False)) + sum(shape[0] for shape in edges)
    inputs = count(scale_shapes(sd15, 1, True)) - count(scale_shapes(sd15, 1, False)) + sum(shape[1] for shape in edges)
    assert (outputs, inputs) == (318_404, 294_340)
    names = [name for name, _ in sd15.named_modules() if "up_blocks" in name and name.endswith("conv_shortcut")]
    shortcuts = [sd15.get_submodule(name).weight.shape[0] for name in names]
    assert (len(shortcuts), sum(shortcuts)) == (12, 10_560)
    assert (outputs + sum(shortcuts), outputs + inputs + sum(shortcuts)) == (328_964, 623_304)


def test_counts_of_sdxl():
    sdxl = meta_unet(
        sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    printed = {2: 7_534_080, 4: 3_874_560, 8: 2_152_320, 16: 1_506_240}  # DiffuseKronA's Table 6
    assert {a1: count(kronecker_shapes(sdxl, a1, 64)) for a1 in printed} == printed
    assert count(lora_shapes(sdxl, 4)) == 5_806_080


@pytest.mark.parametrize(("a1", "a2", "flag"), [(3, 64, "--a1"), (4, 48, "--a2")])
def test_factors_that_do_not_divide(sd15, a1, a2, flag):
    with pytest.raises(InputError, match=f"{flag} must divide .* this model takes divisors of (320|64)"):
        kronecker_shapes(sd15, a1, a2)


# the first had no attention at 16 x 16; earlier records have its counts
EDITIONS = {
    "first": dict(parameters=11_155_588, tensors=326, layers=131, projections=56, peqa=28_608, tuneqdm=56_256, lora=19_712,
                  krona={(4, 64): 21_248, (4, 16): 31_232, (2, 16): 57_088}, weights=1_769_472),
    "second": dict(parameters=11_503_684, tensors=404, layers=167, projections=80, peqa=32_256, tuneqdm=63_936, lora=23_936,
                   krona={(4, 64): 28_064, (4, 16): 35_456, (2, 16): 63_232}, weights=1_941_504),
}  # fmt: skip


@pytest.mark.parametrize("edition", EDITIONS)
def test_counts_of_the_miniature(edition):
    """By the code, and again from names and shapes of the parameters alone."""
    config = json.loads((MINIATURE / "unet" / "config.json").read_text())
    if edition == "first":
        config["down_block_types"][0], config["up_block_types"][-1] = "DownBlock2D", "UpBlock2D"
    unet, expected = meta_unet(**{name: value for name, value in config.items() if name[0] != "_"}), EDITIONS[edition]
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    packed = [shape for name, shape in shapes.items() if len(shape) > 1 and not name.startswith(("conv_in", "conv_out"))]
    projections = [shape for name, shape in shapes.items() if re.search(r"attn[12]\.to_(q|k|v|out\.0)\.weight$", name)]
    found = dict(
        parameters=count(shapes), tensors=len(shapes), layers=len(packed), projections=len(projections),
        peqa=sum(o for o, *_ in packed), tuneqdm=sum(o + i for o, i, *_ in packed), lora=sum(o + i for o, i in projections),
        krona={(a1, a2): sum(a1 * a2 + o * i // (a1 * a2) for o, i in projections) for a1, a2 in expected["krona"]},
        weights=sum(o * i for o, i in projections),
    )  # fmt: skip
    assert found == expected
    assert (len(integer_layers(unet)), len(attention_projections(unet))) == (found["layers"], found["projections"])
    assert count(scale_shapes(unet, 1, False)) == found["peqa"]
    for number in (1, 2, 4):
        assert count(scale_shapes(unet, number, True)) == number * found["tuneqdm"]
        assert count(lora_shapes(unet, number)) == number * found["lora"]
    assert {factors: count(kronecker_shapes(unet, *factors)) for factors in found["krona"]} == found["krona"]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def header_of(script, method: str, quantization: str, *flags: str) -> dict[str, str]:
    """The header of a file that a run of `script` leaves on a GPU, in any folder."""
    settings = vars(script.parse_args(["--train_data_dir", "dataset/dog6", "--class_word", "dog", *flags]))
    settings |= dict(mixed_precision="fp16", resolution=512)
    outputs = SimpleNamespace(
        system=SimpleNamespace(name=method, quantization=quantization), inputs=SimpleNamespace(digest="0" * 64),
        settings={"method": method, **settings_of(settings, script.SETTINGS)},
    )  # fmt: skip
    return TunedOutputs.header(outputs, 500)


def zeros(shapes: Shapes) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def saved_scales(folder: Path, sd15, experts: int, scale_in: bool) -> Path:
    flags = ["--experts", str(experts), *([] if scale_in else ["--no_scale_in"])]
    header = header_of(trainers.tuneqdm, "TuneQDM" if scale_in else "PEQA", "affine8", *flags)
    return save_scales(folder / "tuned_scales.safetensors", zeros(scale_shapes(sd15, experts, scale_in)), header)


def saved_lora(folder: Path, sd15) -> Path:
    unet = meta_unet(**sd15.config)
    for name in add_lora(unet, 2, torch.Generator()):
        module = unet.get_submodule(name.removesuffix(".weight"))
        module.weight = nn.Parameter(torch.zeros(module.weight.shape))
    return save_lora(folder, unet, "sks", header_of(trainers.qlora, "QLoRA", "nf4"), "")


def saved_factors(folder: Path, sd15) -> Path:
    header = header_of(trainers.diffusekrona, "DiffuseKronA", "nf4")
    return save_lokr(folder, zeros(kronecker_shapes(sd15, 4, 64)), header, "")


@pytest.mark.parametrize(("save", "numbers", "megabytes"), [
    (lambda *place: saved_scales(*place, 1, False), 318_080, (1.27, 1.31)),
    (lambda *place: saved_scales(*place, 1, True), 612_096, (2.45, 2.52)),
    (lambda *place: saved_scales(*place, 2, True), 2 * 612_096, (4.90, 4.97)),
    (lambda *place: saved_scales(*place, 4, True), 4 * 612_096, (9.79, 9.86)),
    (saved_lora, 398_592, (1.59, 1.63)),  # ZOODiP's Table 1 has 1.63
    (saved_factors, 398_048, (1.59, 1.63)),
], ids=["PEQA", "N = 1", "N = 2", "N = 4", "LoRA", "KronA"])  # fmt: skip
def test_sizes_of_files(sd15, save, numbers, megabytes, tmp_path):
    """For Stable Diffusion v1.5, in MB: the trained numbers, 4 bytes each, and the whole file.

    The headers, with names and places of 256 to 560 tensors, are 36 to 71 KB. They also hold versions and settings, hence .01.
    """
    path = save(tmp_path, sd15)
    with safe_open(path, framework="pt") as handle:
        tensors = [handle.get_tensor(name) for name in handle.keys()]
    held = sum(tensor.nbytes for tensor in tensors)
    assert held == 4 * numbers
    assert round(held / 1e6, 2) == megabytes[0] and path.stat().st_size / 1e6 == pytest.approx(megabytes[1], abs=0.01)
