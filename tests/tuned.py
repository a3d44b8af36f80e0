"""The weight-tuning systems as their scripts install them on the tiny model, for the tests that look inside."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import arguments, seeded

import trainers.diffusekrona
import trainers.dreambooth
import trainers.qlora
import trainers.tuneqdm
from trainers.diffusekrona import DiffuseKronA
from trainers.dreambooth import DreamBooth
from trainers.qlora import QLoRA
from trainers.tuneqdm import TuneQDM
from zoodip.arguments import flags_for
from zoodip.weight_tuning import Tuning, prepare

OURS = dict(
    class_word="dog", initializer_token=None, tau=None, nu=None, mu=None, learning_rate=1e-2, max_train_steps=4, eval_steps=0
)
SYSTEMS = {  # module, class, its flags, the file that it leaves
    "peqa": (trainers.tuneqdm, TuneQDM, dict(experts=1, no_scale_in=True, bits=4), "tuned_scales.safetensors"),
    "tuneqdm": (trainers.tuneqdm, TuneQDM, dict(experts=4), "tuned_scales.safetensors"),
    "s1": (trainers.tuneqdm, TuneQDM, dict(experts=1, train_interval=(500, 900)), "tuned_scales.safetensors"),
    "qlora": (trainers.qlora, QLoRA, dict(), "pytorch_lora_weights.safetensors"),
    "lora": (trainers.qlora, QLoRA, dict(base="none"), "pytorch_lora_weights.safetensors"),
    "krona": (trainers.diffusekrona, DiffuseKronA, dict(a1=2, a2=4), "pytorch_lokr_weights.safetensors"),
    "krona square": (trainers.diffusekrona, DiffuseKronA, dict(a1=4, a2=4, base="none"), "pytorch_lokr_weights.safetensors"),
    "dreambooth": (trainers.dreambooth, DreamBooth, dict(save_precision="fp32", save_pipeline=True), "unet"),
}


def command(model: Path | str, subject: Path | str, output: Path, **flags) -> list[str]:
    interval = flags.pop("train_interval", None)
    argv = arguments(model, subject, output, **{**OURS, **flags})
    return argv + ([] if interval is None else ["--train_interval", *map(str, interval)])


def prepared(name: str, model: Path, subject: Path, output: Path, **more) -> Tuning:
    module, system, own, _ = SYSTEMS[name]
    flags = vars(module.parse_args(command(model, subject, output, **{**own, **more})))
    return prepare(system(**flags_for(system, flags)), flags, module.SETTINGS)


def predict(unet, timestep: int) -> torch.Tensor:
    latents, states = torch.randn(1, 4, 8, 8, generator=seeded(1)), torch.randn(1, 77, 32, generator=seeded(2))
    latents = latents.to(memory_format=torch.channels_last)
    with torch.no_grad():
        return unet(latents, timestep, states).sample


def stock_pipeline(tiny_model: Path, unet_folder: Path | None = None):
    """As a user has it: the libraries' own loaders, no quantisation."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    more = {} if unet_folder is None else dict(unet=UNet2DConditionModel.from_pretrained(unet_folder))
    return StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, **more)
