"""A user's own process: load each result of the weight-tuning trainers with its ecosystem's loader, and draw a picture with it.

    python tests/draw_tuned.py MODEL REQUESTS.json TARGET      # requests: [[loader, what a trainer left], ...]

The pictures, [16, 16, 3] in [0, 1], go to TARGET/0.npy and so on. The libraries' own loaders come first, in a process that has
not imported this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch


def draw(pipeline) -> np.ndarray:
    """Four denoising steps with guidance, which use the sets of scales of three quarters of the timesteps."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a photo of sks dog", num_inference_steps=4, height=16, width=16, generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]  # fmt: skip


def stock(model, **parts):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(model, safety_checker=None, **parts)


def load_lora_weights(model: str, file: Path):
    pipeline = stock(model)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return pipeline


def peft_adapter(model: str, folder: Path):
    from peft import PeftModel

    pipeline = stock(model)
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, folder)
    return pipeline


def unet_from_pretrained(model: str, folder: Path):
    from diffusers import UNet2DConditionModel

    return stock(model, unet=UNet2DConditionModel.from_pretrained(folder))


def pipeline_from_pretrained(model: str, folder: Path):
    return stock(folder)


def load_pipeline(model: str, file: Path):
    from zoodip.model import load_pipeline

    return load_pipeline(model, tuned_scales=file)


def load_tuned_pipeline(model: str, file: Path):
    from zoodip.tuned_files import load_tuned_pipeline

    return load_tuned_pipeline(model, file)


OURS = {load_pipeline.__name__, load_tuned_pipeline.__name__}

if __name__ == "__main__":
    model, requests, target = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    for i, (loader, what) in sorted(enumerate(requests), key=lambda request: request[1][0] in OURS):
        picture = draw(globals()[loader](model, Path(what)))
        assert loader in OURS or not any(name.split(".")[0] in ("zoodip", "trainers") for name in sys.modules)
        np.save(target / f"{i}.npy", picture)
