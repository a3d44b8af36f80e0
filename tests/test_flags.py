"""Every flag has an effect: two runs that differ in it alone, and what must differ between them."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments, make_model, make_subject, run_cli
from PIL import Image
from safetensors.torch import load_file, save_file

import train_zoodip

LEARNING_RATE = 5e-3  # by which a step moves a coordinate of the token at most


@dataclass
class Outcome:
    """What a run left."""

    code: int
    folder: Path
    unet_batches: list[int]  # batch sizes of the UNet's forwards, in order
    calls: dict = field(default_factory=dict)  # keyword arguments of the libraries' functions that were watched

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {".lock"}

    @property
    def token(self) -> tuple[str, torch.Tensor]:
        ((name, tensor),) = load_file(self.folder / "learned_embeds.safetensors").items()
        return name, tensor

    @property
    def theta(self) -> torch.Tensor:
        assert torch.isfinite(self.token[1]).all()
        return self.token[1]

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def curve(self) -> list[dict]:
        with open(self.folder / "training_log.csv") as file:
            return list(csv.DictReader(file))

    def picture(self, step: int) -> np.ndarray:
        return np.asarray(Image.open(self.folder / f"validation-{step}.png"), dtype=int)


@pytest.fixture(scope="module")
def worlds(tiny_model, subject, tmp_path_factory) -> dict[str, Path | str]:
    """What flags can point to."""
    place = tmp_path_factory.mktemp("worlds")
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


@pytest.fixture(scope="module")
def run(worlds, tmp_path_factory):
    """A run of ten steps with some flags of its own, each combination once."""

    @functools.cache
    def run_once(**flags) -> Outcome:
        import accelerate
        import huggingface_hub
        from diffusers import UNet2DConditionModel

        folder = tmp_path_factory.mktemp("run") / "out"
        flags = {name: worlds.get(value, value) if isinstance(value, str) else value for name, value in flags.items()}
        if flags.get("resume_from_checkpoint"):  # of the folder that another run left
            folder = run_once(max_train_steps=6).folder
        for name in {"output_dir", "save_quantized"} & set(flags):
            flags[name] = folder.parent / flags[name]
        argv = arguments(worlds["model"], worlds["subject"], folder, **{**dict(max_train_steps=10, eval_steps=0), **flags})
        outcome = Outcome(0, flags.get("output_dir", folder), [])
        forward, accelerator = UNet2DConditionModel.forward, accelerate.Accelerator

        def watched_forward(unet, sample, *rest, **named):
            outcome.unet_batches.append(len(sample))
            return forward(unet, sample, *rest, **named)

        def watched_accelerator(**named):
            outcome.calls["accelerator"] = named
            return accelerator(**named)

        def hub(name, **named):
            outcome.calls["hub"] = {"name": name, **named}
            return worlds["model"]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UNet2DConditionModel, "forward", watched_forward)
            patch.setattr(accelerate, "Accelerator", watched_accelerator)
            patch.setattr(huggingface_hub, "snapshot_download", hub)
            outcome.code = run_cli(argv)
        assert outcome.code == 0, argv
        return outcome

    return run_once


def learned(outcome: Outcome) -> torch.Tensor:
    return outcome.theta


def left(outcome: Outcome) -> set[str]:
    return outcome.files


def beside(outcome: Outcome) -> list[str]:
    return sorted(path.name for path in outcome.folder.parent.iterdir())


PICTURE = dict(validation_prompt="a photo of {}", num_validation_images=1)

# flag: (flags of the first run, of the second, what must differ between them). For `learned` two tokens must differ by more than
# rounding makes of a run; for everything else the two values must not be equal.
EFFECTS: dict[str, tuple[dict, dict, Callable[[Outcome], object]]] = {
    "pretrained_model_name_or_path": ({}, dict(pretrained_model_name_or_path="velocity"), learned),
    "revision": (dict(pretrained_model_name_or_path="someone/sd", revision="main"),
                 dict(pretrained_model_name_or_path="someone/sd", revision="v2"), lambda run: run.calls["hub"]["revision"]),
    "variant": (dict(pretrained_model_name_or_path="variants"), dict(pretrained_model_name_or_path="variants", variant="fp16"),
                lambda run: run.theta.flatten().tolist()),
    "quantization": ({}, dict(quantization="int8"), learned),
    "mixed_precision": ({}, dict(mixed_precision="bf16"), learned),
    "cpu": ({}, dict(cpu=None), lambda run: run.calls["accelerator"]["cpu"]),
    "save_quantized": ({}, dict(save_quantized="packed"), beside),
    "placeholder_token": ({}, dict(placeholder_token="<cat2>"), lambda run: run.token[0]),
    "initializer_token": ({}, dict(initializer_token="cat"), learned),
    "num_vectors": ({}, dict(num_vectors=2), learned),
    "train_data_dir": ({}, dict(train_data_dir="fewer"), learned),
    "use_cc": (dict(cc_file="captions"), dict(cc_file="captions", use_cc=True), learned),
    "cc_file": (dict(cc_file="captions", use_cc=True), dict(cc_file="others", use_cc=True), learned),
    "learnable_property": ({}, dict(learnable_property="style"), learned),
    "resolution": ({}, dict(resolution=32), learned),
    "center_crop": (dict(train_data_dir="wide"), dict(train_data_dir="wide", center_crop=True), learned),
    "n": ({}, dict(n=3), learned),
    "mu": ({}, dict(mu=0.02), learned),
    "tau": ({}, dict(tau=3), learned),
    "nu": ({}, dict(nu=0.5), learned),
    "t_min": ({}, dict(t_min=890), learned),
    "t_max": ({}, dict(t_max=510), learned),
    "timestep_sampling": ({}, dict(timestep_sampling="uniform"), learned),
    "estimator": ({}, dict(estimator="spsa"), learned),
    "learning_rate": ({}, dict(learning_rate=1e-2), learned),
    "train_batch_size": ({}, dict(train_batch_size=2), learned),
    "max_train_steps": ({}, dict(max_train_steps=6), lambda run: run.record["step"]),
    "candidates_per_forward": ({}, dict(candidates_per_forward=1), lambda run: run.unet_batches),
    "lr_scheduler": ({}, dict(lr_scheduler="linear"), learned),
    "lr_warmup_steps": (dict(lr_scheduler="linear"), dict(lr_scheduler="linear", lr_warmup_steps=5), learned),
    "seed": ({}, dict(seed=1), learned),
    "output_dir": ({}, dict(output_dir="elsewhere"), beside),
    "save_steps": ({}, dict(save_steps=4), left),
    "checkpointing_steps": ({}, dict(checkpointing_steps=4), left),
    "checkpoints_total_limit": (dict(checkpointing_steps=4), dict(checkpointing_steps=4, checkpoints_total_limit=1), left),
    "resume_from_checkpoint": ({}, dict(resume_from_checkpoint="latest"), lambda run: run.record["steps_this_time"]),
    "eval_steps": (dict(eval_steps=5), dict(eval_steps=4), lambda run: [row["step"] for row in run.curve]),
    "num_eval_samples": (dict(eval_steps=5), dict(eval_steps=5, num_eval_samples=3), lambda run: run.curve[0]["eval_loss"]),
    "validation_prompt": (PICTURE, dict(PICTURE, validation_prompt="a white cat on {}"), lambda run: run.picture(10).tolist()),
    "validation_steps": (PICTURE, dict(PICTURE, validation_steps=6), left),
    "num_validation_images": (PICTURE, dict(PICTURE, num_validation_images=2), lambda run: run.picture(10).shape),
    "validation_guidance": (PICTURE, dict(PICTURE, validation_guidance=1), lambda run: run.picture(10).tolist()),
    "final_picture": (dict(num_validation_images=1), dict(num_validation_images=1, final_picture=True), left),
    "report_to": ({}, dict(report_to="tensorboard"), lambda run: any(run.folder.rglob("*tfevents*"))),
}  # fmt: skip
# refused without a compiler, and compiled in a slow test (test_run.py); for models in one file (test_single_file.py)
TESTED_ELSEWHERE = {"compile", "model_config"}


def test_no_flag_is_left_out():
    """The authors' script has about twenty flags that do nothing."""
    flags = {action.dest for action in train_zoodip.build_parser()._actions} - {"help"}
    assert len(flags) > 30 and set(EFFECTS) | TESTED_ELSEWHERE == flags


@pytest.mark.parametrize("flag", EFFECTS)
def test_every_flag_has_an_effect(run, flag):
    """A flag that is read and then ignored would leave everything as it was."""
    first, second, look = EFFECTS[flag]
    assert {name for name in {**first, **second} if first.get(name, 0) != second.get(name, 0)} == {flag}  # in it alone
    one, other = look(run(**first)), look(run(**second))
    if look is learned:
        # no two of these agree to rounding; a step moves each coordinate by up to the learning rate
        assert (one[:1] - other[:1]).abs().max() > 1e-2 * LEARNING_RATE  # the vector that both have
    else:
        assert one != other


@pytest.mark.parametrize(("flag", "value"), [
    ("estimator", "one_point"), ("timestep_sampling", "snr"), ("quantization", "none"), ("mixed_precision", "fp16"), ("nu", 0),
])  # fmt: skip
def test_every_choice_has_an_effect(run, flag, value):
    """The remaining choices of a flag are neither its default nor the one in the table."""
    table = EFFECTS[flag][1]
    theta = run(**{flag: value}).theta
    for other in (run(), run(**table)):
        assert (theta - other.theta).abs().max() > 1e-2 * LEARNING_RATE


def test_candidates_per_forward_is_obeyed(run):
    """The forwards of ten steps: three candidates at once, or one by one; and one forward that tries the model at the start."""
    assert run().unet_batches == [1] + [3] * 10
    assert run(candidates_per_forward=1).unet_batches == [1] + [1] * 30
    assert run(candidates_per_forward=2, train_batch_size=2).unet_batches == [1] + [4, 2] * 10


def test_pictures_are_asked_of_the_unet_as_the_flags_say(run):
    """Two halves of a batch with guidance, one without; 20 forwards a picture."""
    for flags, size, count in ((PICTURE, 2, 1), (dict(PICTURE, validation_guidance=1), 1, 1),
                               (dict(PICTURE, num_validation_images=2), 2, 2)):  # fmt: skip
        assert run(**flags).unet_batches[11:] == [size] * 20 * count
