"""Every flag has an effect: two runs that differ only in it, and what must differ between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from conftest import arguments
from flag_runs import Effects, Outcome, apart, beside, check_effect, learned, left, make_runner, make_worlds

import train_zoodip
from trainers import gauss_newton, gf_ti, textual_inversion

LEARNING_RATE = 5e-3  # the most that a step moves a coordinate of the token


@pytest.fixture(scope="module")
def run(tiny_model, subject, tmp_path_factory):
    """Runs ten steps with the flags given, each combination once."""
    worlds = make_worlds(tiny_model, subject, tmp_path_factory.mktemp("worlds"))
    defaults, stopped = dict(max_train_steps=10, eval_steps=0), dict(max_train_steps=6)
    return make_runner(train_zoodip, arguments, worlds, tmp_path_factory, defaults, stopped)


PICTURE = dict(validation_prompt="a photo of {}", num_validation_images=1)

EFFECTS: Effects = {
    "pretrained_model_name_or_path": ({}, dict(pretrained_model_name_or_path="velocity"), learned),
    "revision": (dict(pretrained_model_name_or_path="someone/sd", revision="main"),
                 dict(pretrained_model_name_or_path="someone/sd", revision="v2"), lambda run: run.calls["hub"]["revision"]),
    "variant": (dict(pretrained_model_name_or_path="variants"), dict(pretrained_model_name_or_path="variants", variant="fp16"),
                lambda run: run.tensors["<sks>"].tolist()),
    "quantization": ({}, dict(quantization="int8"), learned),
    "mixed_precision": ({}, dict(mixed_precision="bf16"), learned),
    "cpu": ({}, dict(cpu=None), lambda run: run.calls["accelerator"]["cpu"]),
    "save_quantized": ({}, dict(save_quantized="packed"), beside),
    "placeholder_token": ({}, dict(placeholder_token="<cat2>"), lambda run: list(run.tensors)),
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
    check_effect(run, EFFECTS, flag, LEARNING_RATE)


@pytest.mark.parametrize(("flag", "value"), [
    ("estimator", "one_point"), ("timestep_sampling", "snr"), ("quantization", "none"), ("mixed_precision", "fp16"), ("nu", 0),
])  # fmt: skip
def test_every_choice_has_an_effect(run, flag, value):
    """The remaining choices of a flag give neither the default's result nor that of the choice in the table."""
    table = EFFECTS[flag][1]
    for other in (run(), run(**table)):
        assert apart(learned(run(**{flag: value})), learned(other)) > 1e-2 * LEARNING_RATE


def test_candidates_per_forward_is_obeyed(run):
    """The forwards of ten steps: three candidates at once, or one by one; and one forward that checks the model at the start."""
    assert run().unet_batches == [1] + [3] * 10
    assert run(candidates_per_forward=1).unet_batches == [1] + [1] * 30
    assert run(candidates_per_forward=2, train_batch_size=2).unet_batches == [1] + [4, 2] * 10


def test_pictures_are_asked_of_the_unet_as_the_flags_say(run):
    """Two halves of a batch with guidance, one without; 20 forwards per picture."""
    for flags, size, count in ((PICTURE, 2, 1), (dict(PICTURE, validation_guidance=1), 1, 1),
                               (dict(PICTURE, num_validation_images=2), 2, 2)):  # fmt: skip
        assert run(**flags).unet_batches[11:] == [size] * 20 * count


# ----------------------------------------------------------------------------------------------------- the other trainers

TRAINERS = {  # script, flags of each run, and the size of its moves: more than a hundredth of it is an effect
    "textual_inversion": (textual_inversion, dict(max_train_steps=3), 5e-3),  # the most that a step moves a coordinate
    "gf_ti": (gf_ti, dict(max_train_steps=3, population=4, intrinsic_dim=5), 1.0),  # the effects below are .37 to 2.4
    "gauss_newton": (gauss_newton, dict(max_train_steps=None, max_forwards=9, basis_size=(6,), directions=2), 1e-2),  # .002-.05
}


def command(model: Path, subject: Path, folder: Path, **flags) -> list[str]:
    """As `arguments`, for scripts without ZOODiP's own flags; a tuple is a flag's several values."""
    several = [(name, value) for name, value in flags.items() if isinstance(value, tuple)]
    single = {name: value for name, value in flags.items() if not isinstance(value, tuple)}
    argv = arguments(model, subject, folder, tau=None, nu=None, mu=None, **single)
    return argv + [word for name, values in several for word in (f"--{name}", *map(str, values))]


@pytest.fixture(scope="module")
def run_of(tiny_model, subject, tmp_path_factory) -> Callable[[str], Callable[..., Outcome]]:
    """script -> a function that runs it for three steps with the flags given, each combination once."""
    worlds = dict(model=tiny_model, subject=subject)

    @cache
    def runner(name: str) -> Callable[..., Outcome]:
        script, own, _ = TRAINERS[name]
        return make_runner(script, command, worlds, tmp_path_factory, dict(eval_steps=0, checkpointing_steps=0, **own), {})

    return runner


def forwards(outcome: Outcome) -> list[int]:
    return outcome.unet_batches


def timesteps(outcome: Outcome) -> list[list[float]]:
    return outcome.timesteps[1:]  # after the forward that checks the model


STEPS: Effects = {
    "train_batch_size": ({}, dict(train_batch_size=2), learned),
    "seed": ({}, dict(seed=1), learned),
    "max_train_steps": ({}, dict(max_train_steps=2), lambda run: run.record["step"]),
    "t_min": ({}, dict(t_min=890), learned),
    "t_max": ({}, dict(t_max=510), learned),
}
PUTS, FAIR, TWO_STARTS = dict(timestep_sampling="puts"), dict(mode="fair"), dict(max_forwards=47, starts=2, start_steps=1)
OWN: dict[str, Effects] = {
    "textual_inversion": STEPS | {
        "learning_rate": ({}, dict(learning_rate=1e-2), learned),
        "adam_epsilon": ({}, dict(adam_epsilon=1), learned),
        "timestep_sampling": ({}, dict(timestep_sampling="uniform"), learned),
    },
    "gf_ti": STEPS | {
        "mode": (dict(alpha=0.2), dict(FAIR, alpha=0.2), learned),
        "subspace": ({}, dict(subspace="pca"), learned),
        "intrinsic_dim": ({}, dict(intrinsic_dim=6), learned),
        "population": ({}, dict(population=5), learned),
        "alpha": ({}, dict(alpha=0.5), learned),
        "candidates_per_forward": (FAIR, dict(FAIR, candidates_per_forward=1), forwards),
        # of losses, only the order matters, which is often the same at other timesteps
        "t_min": (PUTS, dict(PUTS, t_min=890), timesteps),
        "t_max": (PUTS, dict(PUTS, t_max=510), timesteps),
        "timestep_sampling": ({}, PUTS, timesteps),
    },
    "gauss_newton": {name: effect for name, effect in STEPS.items() if name != "max_train_steps"} | {
        "max_forwards": ({}, dict(max_forwards=6), lambda run: run.record["unet_forwards"]),
        "basis_size": ({}, dict(basis_size=(5,)), learned),
        "directions": ({}, dict(directions=3), forwards),
        "rho": ({}, dict(rho=0.5), learned),
        "inflation": ({}, dict(inflation=30), learned),
        "prior": ({}, dict(prior=0.1), learned),
        "clip": ({}, dict(clip=1e-3), learned),
        "memory": ({}, dict(memory=2), learned),
        "memory_growth": (dict(memory=2), dict(memory=2, memory_growth=10), learned),
        "rebase_steps": ({}, dict(rebase_steps=(1,)), learned),
        "starts": (dict(TWO_STARTS, starts=1), TWO_STARTS, forwards),
        "start_steps": (TWO_STARTS, dict(TWO_STARTS, start_steps=2), learned),
        "candidates_per_forward": ({}, dict(candidates_per_forward=1), forwards),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_no_flag_of_a_method_is_left_out(name):
    """The other groups of flags are those of train_zoodip.py, in the table above."""
    groups = {group.title: group for group in TRAINERS[name][0].build_parser()._action_groups}
    assert {action.dest for action in groups["method"]._group_actions} == set(OWN[name])
    others = {action.dest for title, group in groups.items() if title != "method" for action in group._group_actions}
    assert others - {"help"} <= set(EFFECTS) | TESTED_ELSEWHERE


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name in TRAINERS for flag in OWN[name]])
def test_every_flag_of_a_method_has_an_effect(run_of, name, flag):
    check_effect(run_of(name), OWN[name], flag, TRAINERS[name][2])
