"""Every flag of the trainers that tune weights has an effect: like test_flags.py, for each of the four scripts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from conftest import make_subject
from flag_runs import Effects, Outcome, apart, beside, check_effect, learned, left, make_runner, make_worlds
from test_single_file import single_file
from tuned import command, predict

import trainers.diffusekrona
import trainers.dreambooth
import trainers.qlora
import trainers.tuneqdm
from zoodip.tuned_files import load_tuned_unet

LEARNING_RATE = 1e-2  # the most that a step moves a trained number
SCRIPTS = {  # with flags for each run: fp32 files, as fp16 hides small differences, and factors that the tiny model takes
    "dreambooth": (trainers.dreambooth, dict(save_precision="fp32")),
    "qlora": (trainers.qlora, dict()),
    "tuneqdm": (trainers.tuneqdm, dict(experts=2)),
    "diffusekrona": (trainers.diffusekrona, dict(a1=2, a2=4)),
}


@pytest.fixture(scope="module")
def run_of(tiny_model, subject, tmp_path_factory) -> Callable[[str], Callable[..., Outcome]]:
    """script -> a function that runs it for two steps with the flags given, each combination once."""
    worlds = make_worlds(tiny_model, subject, place := tmp_path_factory.mktemp("worlds"))
    worlds["file"] = single_file(tiny_model, place / "tiny.safetensors")
    worlds |= {"class": make_subject(place / "class", count=3, side=16), "pets": make_subject(place / "pets", count=4, side=30)}

    @cache
    def runner(name: str) -> Callable[..., Outcome]:
        script, own = SCRIPTS[name]
        defaults, stopped = dict(max_train_steps=2, checkpointing_steps=0, **own), dict(max_train_steps=1, checkpointing_steps=1)
        return make_runner(script, command, worlds, tmp_path_factory, defaults, stopped)

    return runner


def drawn(outcome: Outcome) -> list:
    return outcome.picture(2).tolist()


def steps_of_curve(outcome: Outcome) -> list[str]:
    return [row["step"] for row in outcome.curve]


def first_loss(outcome: Outcome) -> str:
    return outcome.curve[0]["eval_loss"]


def reloaded_prediction(outcome: Outcome) -> list:
    """The prediction at t = 100, outside S1's interval."""
    return predict(load_tuned_unet(outcome.model, None, outcome.file, torch.float32, "cpu")[0], 100).tolist()


PICTURE = dict(validation_prompt="a photo of {}", num_validation_images=1)
CLASS = dict(class_data_dir="class", num_class_images=3)
PRIOR = dict(CLASS, prior_preservation=True)
PUTS = dict(timestep_sampling="puts")
FILE = dict(pretrained_model_name_or_path="file")
HUB, VARIANTS = dict(pretrained_model_name_or_path="someone/sd"), dict(pretrained_model_name_or_path="variants")
CAPTIONS = dict(cc_file="captions")

SHARED: Effects = {
    "pretrained_model_name_or_path": ({}, dict(pretrained_model_name_or_path="velocity"), learned),
    "model_config": (dict(FILE, model_config="model"), dict(FILE, model_config="velocity"), learned),
    "revision": (dict(HUB, revision="main"), dict(HUB, revision="v2"), lambda run: run.calls["hub"]["revision"]),
    "variant": (VARIANTS, dict(VARIANTS, variant="fp16"), lambda run: run.header["zoodip.model_digest"]),
    "mixed_precision": ({}, dict(mixed_precision="bf16"), learned),
    "cpu": ({}, dict(cpu=None), lambda run: run.calls["accelerator"]["cpu"]),
    "identifier": ({}, dict(identifier="cat"), learned),
    "class_word": ({}, dict(class_word="cat"), learned),
    "instance_prompt": ({}, dict(instance_prompt="a painting of {} in snow"), learned),
    "train_data_dir": ({}, dict(train_data_dir="fewer"), learned),
    "use_cc": (CAPTIONS, dict(CAPTIONS, use_cc=True), learned),
    "cc_file": (dict(CAPTIONS, use_cc=True), dict(cc_file="others", use_cc=True), learned),
    "resolution": ({}, dict(resolution=32), learned),
    "center_crop": (dict(train_data_dir="wide"), dict(train_data_dir="wide", center_crop=True), learned),
    "prior_preservation": (CLASS, PRIOR, learned),
    "prior_loss_weight": (PRIOR, dict(PRIOR, prior_loss_weight=5), learned),
    "num_class_images": (PRIOR, dict(PRIOR, num_class_images=1), learned),
    "class_data_dir": (PRIOR, dict(PRIOR, class_data_dir="pets"), learned),
    "learning_rate": ({}, dict(learning_rate=3e-2), learned),
    "max_train_steps": ({}, dict(max_train_steps=1), lambda run: run.record["step"]),
    "train_batch_size": ({}, dict(train_batch_size=2), learned),
    "seed": ({}, dict(seed=1), learned),
    "gradient_checkpointing": ({}, dict(gradient_checkpointing=True), lambda run: run.calls["blocks"]),
    "t_min": (PUTS, dict(PUTS, t_min=890), learned),
    "t_max": (PUTS, dict(PUTS, t_max=510), learned),
    "timestep_sampling": ({}, PUTS, learned),
    "output_dir": ({}, dict(output_dir="elsewhere"), beside),
    "save_steps": ({}, dict(save_steps=1), left),
    "checkpointing_steps": ({}, dict(checkpointing_steps=1), left),
    "checkpoints_total_limit": (dict(checkpointing_steps=1), dict(checkpointing_steps=1, checkpoints_total_limit=1), left),
    "resume_from_checkpoint": ({}, dict(resume_from_checkpoint="latest"), lambda run: run.record["steps_this_time"]),
    "eval_steps": (dict(eval_steps=1), dict(eval_steps=2), steps_of_curve),
    "num_eval_samples": (dict(eval_steps=2), dict(eval_steps=2, num_eval_samples=3), first_loss),
    "validation_prompt": (PICTURE, dict(PICTURE, validation_prompt="a white cat on {}"), drawn),
    "validation_steps": (PICTURE, dict(PICTURE, validation_steps=1), left),
    "num_validation_images": (PICTURE, dict(PICTURE, num_validation_images=2), lambda run: run.picture(2).shape),
    "validation_guidance": (PICTURE, dict(PICTURE, validation_guidance=1), drawn),
    "final_picture": (dict(num_validation_images=1), dict(num_validation_images=1, final_picture=True), left),
    "report_to": ({}, dict(report_to="tensorboard"), lambda run: any(run.folder.rglob("*tfevents*"))),
}

ONE_SET = dict(experts=1)
OWN: dict[str, Effects] = {
    "dreambooth": {
        "save_precision": ({}, dict(save_precision="fp16"), lambda run: {str(t.dtype) for t in run.tensors.values()}),
        "save_pipeline": ({}, dict(save_pipeline=True), left),
    },
    "qlora": {"rank": ({}, dict(rank=3), learned), "base": ({}, dict(base="none"), learned)},
    "tuneqdm": {
        "bits": ({}, dict(bits=4), learned),
        "experts": ({}, dict(experts=1), learned),
        "no_scale_in": ({}, dict(no_scale_in=True), lambda run: run.tensors.keys()),
        "scale_in_learning_rate": ({}, dict(scale_in_learning_rate=3e-2), learned),
        "train_interval": (ONE_SET, dict(ONE_SET, train_interval=(0, 50)), learned),
        "apply": (dict(ONE_SET, train_interval=(500, 900)), dict(ONE_SET, train_interval=(500, 900), apply="everywhere"),
                  reloaded_prediction),
    },
    "diffusekrona": {
        "a1": ({}, dict(a1=4), learned),
        "a2": ({}, dict(a2=8), learned),
        "base": ({}, dict(base="none"), learned),
        "export_merged": (dict(base="none"), dict(base="none", export_merged="merged"), beside),
    },
}  # fmt: skip
BY_DEFAULT = ["timestep_sampling", "gradient_checkpointing", "class_word", "prior_preservation"]


def cases() -> list:
    """By default, each script's own flags and one of those that all share; the other shared flags, which are one piece of code,
    are slow and take the scripts in turn."""
    names = list(SCRIPTS)
    own = [(name, flag) for name in names for flag in OWN[name]]
    others = [flag for flag in SHARED if flag not in BY_DEFAULT]
    in_turn = [pytest.param(names[k % len(names)], flag, marks=pytest.mark.slow) for k, flag in enumerate(others)]
    return [*own, *zip(names, BY_DEFAULT, strict=True), *in_turn]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_flag_is_left_out(name):
    flags = {action.dest for action in SCRIPTS[name][0].build_parser()._actions} - {"help"}
    assert set(SHARED) | set(OWN[name]) == flags


@pytest.mark.parametrize(("name", "flag"), cases())
def test_every_flag_has_an_effect(run_of, name, flag):
    check_effect(run_of(name), SHARED | OWN[name], flag, LEARNING_RATE)


@pytest.mark.parametrize(("flag", "value"), [
    ("timestep_sampling", "snr"), pytest.param("mixed_precision", "fp16", marks=pytest.mark.slow),
])  # fmt: skip
def test_every_choice_has_an_effect(run_of, flag, value):
    """The remaining choices of a flag give neither the default's result nor that of the choice in the table."""
    run, table = run_of("dreambooth"), SHARED[flag][1]
    for other in (run(), run(**table)):
        assert apart(learned(run(**{flag: value})), learned(other)) > 1e-2 * LEARNING_RATE


@pytest.mark.parametrize(("name", "again"), [
    ("dreambooth", 7), pytest.param("qlora", 6, marks=pytest.mark.slow), pytest.param("tuneqdm", 7, marks=pytest.mark.slow),
    pytest.param("diffusekrona", 6, marks=pytest.mark.slow),
])  # fmt: skip
def test_gradient_checkpointing_changes_no_bit(run_of, name, again):
    """The same is learned, though residual blocks are recomputed in each of two backward passes: of the tiny UNet's 8, all except
    one in the middle and, if nothing before it is trained, the first."""
    run = run_of(name)
    plain, checkpointed = run(), run(gradient_checkpointing=True)
    assert plain.unet_batches == checkpointed.unet_batches == [1] * 3  # one forward checks the model at the start
    assert checkpointed.calls["blocks"] - plain.calls["blocks"] == 2 * again
    assert plain.file.read_bytes() == checkpointed.file.read_bytes()


@pytest.mark.parametrize(("name", "flags", "low", "high"), [
    ("tuneqdm", dict(ONE_SET, train_interval=(0, 50)), 0, 50), ("tuneqdm", dict(PUTS, t_max=510), 500, 510),
    ("dreambooth", dict(PUTS, t_min=890), 890, 900),
])  # fmt: skip
def test_timesteps_are_those_asked_for(run_of, name, flags, low, high):
    """Those of the steps, not of the forward that checks the model. Two uniform ones would fit at most once in 400 runs."""
    drawn = [timestep for forward in run_of(name)(**flags).timesteps[1:] for timestep in forward]
    assert len(drawn) == 2 and all(low <= timestep < high for timestep in drawn)


@pytest.mark.parametrize(("name", "leaf"), [("qlora", ".lora.down.weight"), ("diffusekrona", ".lokr_w1")])
def test_the_start_is_drawn_by_the_seed(run_of, name, leaf):
    """This is A: two steps move each of its numbers by at most .02, and it starts with a deviation of .5."""
    starts = [{key: tensor for key, tensor in run_of(name)(seed=seed).tensors.items() if key.endswith(leaf)} for seed in (2, 3)]
    assert len(starts[0]) > 20
    for key, one in starts[0].items():
        assert (one - starts[1][key]).abs().max() > 10 * 2 * LEARNING_RATE, key
