"""Pairs of runs that differ in one flag, for the tables of test_flags.py and test_tuning_flags.py: their inputs, their outcomes,
and how far apart these are."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import make_model, make_subject, run_cli
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

LEARNED = [  # where each script leaves what is learned
    "learned_embeds.safetensors",
    "tuned_scales.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_lokr_weights.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
]


@dataclass
class Outcome:
    """What a run left."""

    code: int
    model: Path
    folder: Path
    unet_batches: list[int]  # batch sizes of the UNet's forwards, in order
    timesteps: list[list[float]] = field(default_factory=list)  # of the same forwards
    calls: dict = field(default_factory=dict)  # keyword arguments of the libraries' functions that were watched, and counts

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {".lock"}

    @property
    def file(self) -> Path:
        return next(self.folder / name for name in LEARNED if (self.folder / name).is_file())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of what is learned."""
        return load_file(self.file)

    @property
    def header(self) -> dict[str, str]:
        with safe_open(self.file, framework="pt") as handle:
            return handle.metadata()

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def curve(self) -> list[dict]:
        with open(self.folder / "training_log.csv") as file:
            return list(csv.DictReader(file))

    def picture(self, step: int) -> np.ndarray:
        return np.asarray(Image.open(self.folder / f"validation-{step}.png"), dtype=int)


def make_worlds(tiny_model: Path, subject: Path, place: Path) -> dict[str, Path | str]:
    """What flags can point to."""
    wide = place / "wide"
    wide.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 60, 3), np.uint8)).save(wide / "0.png")
    two = make_model(place / "two variants")  # the ordinary weights, and others as fp16
    for path in two.glob("*/*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    for name, colours in ("captions", ["red", "white", "grass"]), ("others", ["snow", "cat", "style"]):
        texts = {f"0{i}.png": f"a {colour} photo of {{}}" for i, colour in enumerate(colours)}
        (place / f"{name}.json").write_text(json.dumps({subject.name: texts}))
    return dict(
        model=tiny_model, velocity=make_model(place / "velocity" / tiny_model.name, prediction_type="v_prediction"), variants=two,
        subject=subject, fewer=make_subject(place / "other" / subject.name, count=2, side=20), wide=wide,
        captions=place / "captions.json", others=place / "others.json",
    )  # fmt: skip


def make_runner(
    script: ModuleType, command: Callable[..., list[str]], worlds: dict, tmp_path_factory, defaults: dict, stopped: dict
) -> Callable[..., Outcome]:
    """Runs `script` with `defaults` and the flags given, each combination once; `command(model, subject, folder, **flags)` is the
    command line. A run with --resume_from_checkpoint resumes from what a run with the flags `stopped` left."""

    @functools.cache
    def run_once(**flags) -> Outcome:
        import accelerate
        import huggingface_hub
        from diffusers import UNet2DConditionModel
        from diffusers.models.resnet import ResnetBlock2D

        folder = tmp_path_factory.mktemp("run") / "out"
        flags = {name: worlds.get(value, value) if isinstance(value, str) else value for name, value in flags.items()}
        if flags.get("resume_from_checkpoint"):
            folder = run_once.__wrapped__(**stopped).folder
        for name in {"output_dir", "save_quantized", "export_merged"} & set(flags):
            flags[name] = folder.parent / flags[name]
        argv = command(worlds["model"], worlds["subject"], folder, **{**defaults, **flags})
        outcome = Outcome(0, worlds["model"], flags.get("output_dir", folder), [], calls={"blocks": 0})
        forward, block, accelerator = UNet2DConditionModel.forward, ResnetBlock2D.forward, accelerate.Accelerator

        def watched_forward(unet, sample, timestep, *rest, **named):
            outcome.unet_batches.append(len(sample))
            outcome.timesteps.append(torch.as_tensor(timestep).flatten().tolist())
            return forward(unet, sample, timestep, *rest, **named)

        def watched_block(*inputs, **named):
            outcome.calls["blocks"] += 1
            return block(*inputs, **named)

        def watched_accelerator(**named):
            outcome.calls["accelerator"] = named
            return accelerator(**named)

        def hub(name, **named):
            outcome.calls["hub"] = {"name": name, **named}
            return worlds["model"]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UNet2DConditionModel, "forward", watched_forward)
            patch.setattr(ResnetBlock2D, "forward", watched_block)
            patch.setattr(accelerate, "Accelerator", watched_accelerator)
            patch.setattr(huggingface_hub, "snapshot_download", hub)
            outcome.code = run_cli(argv, script)
        assert outcome.code == 0, argv
        return outcome

    return run_once


# ----------------------------------------------------------------------------------------------------- what must differ


def learned(outcome: Outcome) -> dict[str, torch.Tensor]:
    assert all(torch.isfinite(tensor).all() for tensor in outcome.tensors.values())
    return outcome.tensors


def left(outcome: Outcome) -> set[str]:
    return outcome.files


def beside(outcome: Outcome) -> list[str]:
    return sorted(path.name for path in outcome.folder.parent.iterdir())


# flag: (flags of the first run, of the second, what must differ between them). For `learned` the difference must exceed that of
# rounding; for everything else the two values must not be equal.
Effects = dict[str, tuple[dict, dict, Callable[[Outcome], object]]]


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two runs' tensors, over the names and positions that both have."""
    largest = []
    for name in one.keys() & other.keys():
        common = tuple(slice(min(sizes)) for sizes in zip(one[name].shape, other[name].shape, strict=True))
        largest.append((one[name][common].float() - other[name][common].float()).abs().max().item())
    return max(largest)


def check_effect(run: Callable[..., Outcome], effects: Effects, flag: str, learning_rate: float) -> None:
    """A flag that is read and then ignored would change nothing."""
    first, second, look = effects[flag]
    assert {name for name in {**first, **second} if first.get(name, 0) != second.get(name, 0)} == {flag}  # and nothing else
    one, other = look(run(**first)), look(run(**second))
    if look is learned:
        # no two of these agree to rounding; a step moves each number by up to the learning rate
        assert apart(one, other) > 1e-2 * learning_rate, f"--{flag} has no effect"
    else:
        assert one != other, f"--{flag} has no effect"
