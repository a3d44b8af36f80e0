"""Wrong input is refused early, in one line that names the flag, the value and the remedy."""

from __future__ import annotations

import argparse
import inspect
import json
import re

import pytest
import torch
from conftest import arguments, make_subject, run_cli

from miniature.trainer import autocast
from train_zoodip import OPTIONAL_SETTINGS, SETTINGS, ZOAdam, build_parser, parse_args
from zoodip.arguments import DEFAULT_MODEL, flags_for
from zoodip.errors import InputError, memory_advice
from zoodip.files import lock_folder
from zoodip.folder import download_model
from zoodip.quantize import default_precision, warn_of_emulation


@pytest.mark.parametrize(("flag", "value", "words"), [
    ("t_min", 900, "--t_max 900"), ("t_min", 950, "--t_max 900"), ("t_min", -1, "-1"), ("t_min", 1000, "1000"),
    ("t_max", 500, "--t_min"), ("t_max", 1001, "1001"), ("t_min", 1.5, "invalid int"),
    ("tau", 1, "at least 2"), ("tau", 0, "at least 2"), ("nu", 1, "[0, 1)"), ("nu", -0.1, "-0.1"), ("nu", "nan", "nan"),
    ("n", 0, "at least 1"), ("n", -3, "-3"), ("n", "two", "'two'"), ("mu", 0, "positive"), ("mu", -1e-3, "-0.001"),
    ("mu", "nan", "nan"), ("mu", "inf", "inf"), ("learning_rate", 0, "positive"), ("learning_rate", "nan", "nan"),
    ("resolution", 0, "multiple of 8"), ("resolution", 100, "100"), ("resolution", -8, "-8"), ("num_vectors", 0, "at least 1"),
    ("train_batch_size", 0, "at least 1"), ("max_train_steps", 0, "at least 1"), ("candidates_per_forward", 0, "at least 1"),
    ("num_eval_samples", 0, "at least 1"), ("num_validation_images", 0, "at least 1"), ("save_steps", -1, "negative"),
    ("checkpointing_steps", -1, "negative"), ("checkpoints_total_limit", -1, "negative"), ("eval_steps", -1, "negative"),
    ("validation_steps", 5, "--validation_prompt"), ("validation_prompt", "a dog", "<sks>"), ("seed", -1, "-1"),
    ("seed", 2**63, "2^63"), ("quantization", "int3", "int3"), ("estimator", "exact", "exact"),
    ("timestep_sampling", "best", "best"), ("mixed_precision", "fp8", "fp8"), ("learnable_property", "mood", "mood"),
    ("report_to", "paper", "paper"), ("initializer_token", "", "''"), ("initializer_token", "  ", "word"),
    ("nonsense", 1, "nonsense"),
])  # fmt: skip
def test_values_out_of_range(refused, flag, value, words):
    """A wrong number must not surface hours later, or as NaN."""
    line = refused(**{flag: value})
    assert f"--{flag}" in line or flag == "t_max"
    assert words in line


@pytest.mark.parametrize(("token", "words"), [
    ("<a b>", "without spaces"), ("<a\tb>", "without spaces"), (" ", "without spaces"), ("", "placeholder_token"),
    ("<SKS>", "lower case"), ("<Sks>", "lower case"), ("sks", "letter or digit"), ("<sks", "letter or digit"),
    ("sks>", "letter or digit"), ("<sks2", "letter or digit"), ("<{}>", "braces"), ("<a{b>", "braces"),
    ("<|endoftext|>", "already a word"), ("-", "already a word"), ("!", "already a word"),
])  # fmt: skip
def test_placeholder(refused, token, words):
    """Each of these would silently train a token that prompts never reach. '-' is in the vocabulary as '-</w>' too."""
    line = refused(placeholder_token=token)
    assert "placeholder_token" in line and words in line and re.search(r"for example <[a-z0-9-]+>", line)


def test_folders_that_would_spoil_each_other(refused, subject, tmp_path):
    """A run among the photographs would train on its own pictures; an embedding that it replaces could not be resumed from."""
    before = sorted(path.name for path in subject.iterdir())
    assert "must not be --train_data_dir" in refused(output_dir=subject / ".." / subject.name)
    assert sorted(path.name for path in subject.iterdir()) == before
    line = refused(initializer_token=tmp_path / "out" / "learned_embeds.safetensors")
    assert "must not be in --output_dir" in line


def test_a_path_is_not_a_word(refused, tmp_path):
    """A run started from the mean of the path's letters."""
    for start in ("results/my-dog", "my-dog.safetensors", tmp_path / "before_after.png"):
        assert f"--initializer_token: there is no file {str(start)!r}" in refused(initializer_token=start)
    assert "it is a folder" in refused(initializer_token=tmp_path)


def test_what_is_required_is_said(capsys):
    assert run_cli([]) == 2
    assert capsys.readouterr().err == "error: --train_data_dir is required: a folder of photographs of the subject\n"


def test_the_new_word_as_its_own_class(refused):
    """It was reported as a damaged model."""
    assert "must be a word that the model knows, for example dog" in refused(initializer_token="<sks>")


def test_required_flags(refused):
    assert "--train_data_dir" in refused(argv=[])
    assert "--initializer_token" in refused(argv=["--train_data_dir", "x"])
    assert "--initializer_token" in refused(argv=["--train_data_dir", "x", "--save_quantized", "y"])
    assert parse_args(["--save_quantized", "y"]).train_data_dir is None  # packing alone needs no pictures
    assert "--quantization" in refused(argv=["--save_quantized", "y", "--quantization", "none"])
    both = ["--train_data_dir", "x", "--initializer_token", "dog", "--output_dir", "y/run"]
    for packed in ("y", "y/run"):  # training creates --output_dir first, and packing then finds it there
        assert "must not be, or contain, --output_dir" in refused(argv=[*both, "--save_quantized", packed])
    assert parse_args([*both, "--save_quantized", "y/packed"]).save_quantized == "y/packed"


def test_folders(refused, tmp_path):
    """Missing, empty, a file instead of a folder."""
    assert "'nowhere'" in refused(data="nowhere") and "--train_data_dir" in refused(data="nowhere")
    (tmp_path / "empty").mkdir()
    line = refused(data=tmp_path / "empty")
    assert "no images" in line and str(tmp_path / "empty") in line
    folder = make_subject(tmp_path / "dog")
    assert "is a file; give the folder that it is in" in refused(data=folder / "00.png")
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:200])
    assert "01.png" in refused(data=folder)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_output_folder_that_cannot_be(refused, tmp_path, place):
    """Found before hours of training, not when the first file is saved."""
    (tmp_path / "file").write_text("in the way")
    line = refused(output_dir=tmp_path / place)
    assert "--output_dir" in line and str(tmp_path / place) in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_output_folder_in_use(refused, tiny_model, subject, tmp_path):
    """Two runs that write the same files would spoil both; half-written files of a killed run are removed by the next run."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".run.json.123.tmp").write_text("half")
    lock = lock_folder(out)
    line = refused()
    assert "--output_dir" in line and str(out) in line
    assert (out / ".run.json.123.tmp").exists()  # the other run may be writing it
    lock.release()
    assert run_cli(arguments(tiny_model, subject, out, max_train_steps=1, eval_steps=0)) == 0
    assert not list(out.glob(".*.tmp"))
    lock_folder(out).release()  # a run that has ended does not hold it


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_model_folder_that_is_none(refused, name):
    """A misspelt path must not be looked up on the hub."""
    line = refused(model=name)
    assert "--pretrained_model_name_or_path" in line and name in line and "model_index.json" in line


def test_hub_name_without_network(refused):
    """Offline, the message says which folder to download and how."""
    line = refused(model="someone/some-model")
    assert "someone/some-model" in line and "hf download someone/some-model --local-dir" in line and "--variant" not in line
    line = refused(model=DEFAULT_MODEL)
    assert f"hf download {DEFAULT_MODEL} " in line and "'*/*.fp16.safetensors'" in line and "--variant fp16" in line
    with pytest.raises(InputError) as error:  # of a model in one file, only the configurations are needed
        download_model(DEFAULT_MODEL, None, None, weights=False)
    assert f"hf download {DEFAULT_MODEL} " in str(error.value) and "fp16" not in str(error.value)


@pytest.mark.parametrize(("flags", "on_gpu", "advice", "changed"), [
    (dict(candidates_per_forward=None, quantization="none", mixed_precision=None, resolution=512, final_picture=True), True,
     "--candidates_per_forward 1, --quantization nf4, a smaller --resolution, --no-final_picture",
     " but --candidates_per_forward or --final_picture"),
    (dict(candidates_per_forward=1, quantization=None, mixed_precision=None, train_batch_size=4), False,
     "a smaller --train_batch_size, --mixed_precision bf16", ""),
    (dict(gradient_checkpointing=False, mixed_precision="fp32", train_batch_size=1), True,
     "--gradient_checkpointing, --mixed_precision bf16", " but --gradient_checkpointing"),
])  # fmt: skip
def test_advice_when_memory_runs_out(flags, on_gpu, advice, changed):
    """Only what is not done yet; a resumed run may not change what it learns."""
    text = memory_advice(flags | dict(resume_from_checkpoint=None), on_gpu)
    assert text.startswith(f"closing other programs, {advice}. ") and text.endswith(f"if no flag{changed} is changed")


def test_captions_missing(refused, tmp_path):
    (tmp_path / "none.json").write_text("{}")
    assert "no caption for 3 of the 3 images of 'dog6'" in refused(use_cc=True, cc_file=tmp_path / "none.json")


def test_unknown_initializer(refused):
    """The end-of-text token is what an unknown word becomes."""
    assert "<|endoftext|>" in refused(initializer_token="<|endoftext|>")


def test_tracker_that_is_not_installed(refused, monkeypatch):
    """Offers the command that installs it."""
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    assert "pip install wandb" in refused(report_to="wandb")


def flags() -> list[argparse.Action]:
    return [action for action in build_parser()._actions if action.dest != "help"]


def test_every_flag_has_help():
    """test_flags.py tests that each has an effect."""
    actions = flags()
    assert len(actions) > 30
    for action in actions:
        assert action.help and len(action.help) > 10, action.dest


def test_every_setting_is_recorded():
    """A flag that affects what is learned but is not in SETTINGS could change unnoticed on resuming."""
    not_deciding = set(
        """cpu compile save_quantized train_data_dir cc_file max_train_steps candidates_per_forward output_dir
        save_steps
        checkpointing_steps checkpoints_total_limit resume_from_checkpoint eval_steps num_eval_samples validation_prompt
        validation_steps num_validation_images validation_guidance final_picture report_to""".split()
    )
    assert {action.dest for action in flags()} == set(SETTINGS) | set(OPTIONAL_SETTINGS) | not_deciding


def test_defaults_are_the_papers():
    """The commands in the README reproduce the paper only with these."""
    args = vars(parse_args(["--train_data_dir", "x", "--initializer_token", "dog"]))
    expected = dict(n=2, mu=None, tau=128, nu=1e-3, t_min=500, t_max=900, max_train_steps=30000, learning_rate=5e-3,
                    train_batch_size=1, resolution=None, timestep_sampling="puts", estimator="rge", lr_scheduler="constant",
                    quantization=None, num_vectors=1, learnable_property="object", seed=0, mixed_precision=None,
                    use_cc=False)  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    zo = ZOAdam(torch.zeros(1, 2), **flags_for(ZOAdam, {**args, "mu": 1e-3}))
    group = zo.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.9, 0.999), 1e-3, 0, 5e-3)


def test_defaults_of_functions_are_the_flags():
    """A caller of ZOAdam without the script gets the paper's method too."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(ZOAdam).parameters.items()
                if parameter.kind is parameter.KEYWORD_ONLY}  # fmt: skip
    args = vars(parse_args(["--train_data_dir", "x", "--initializer_token", "dog", "--mu", "1e-3"]))
    assert defaults == {name: args[name] for name in defaults}


def test_defaults_that_depend_on_the_device():
    """Half precision where it halves the memory."""
    assert [default_precision(torch.device(name)) for name in ("cpu", "cuda")] == ["fp32", "fp16"]


@pytest.mark.parametrize(("capability", "told"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_a_processor_that_emulates_16_bits(monkeypatch, capsys, capability, told):
    """On one from before AVX-512, bf16 made steps three times slower, without a word."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    warn_of_emulation.cache_clear()
    for _ in range(2):
        for precision, device in (("fp32", "cpu"), ("bf16", "cpu"), ("fp16", "cpu"), ("bf16", "cuda")):
            warn_of_emulation(precision, device)
    warn_of_emulation.cache_clear()
    assert capsys.readouterr().err.count("this processor has no instructions for it") == 2 * told
    assert autocast(torch.device("cpu"))._enabled != told


@pytest.mark.parametrize(("given", "expected"), [
    (dict(), ("fp32", 1e-3, 16)), (dict(mixed_precision="bf16"), ("bf16", 1e-2, 16)),
    (dict(mixed_precision="fp16"), ("fp16", 1e-3, 16)), (dict(mixed_precision="bf16", mu=0.5, resolution=24), ("bf16", 0.5, 24)),
])  # fmt: skip
def test_defaults_that_depend(tiny_model, subject, tmp_path, given, expected):
    """bf16 keeps 8 bits, in which a perturbation of 1e-3 drowns: the paper uses 1e-2. Values that are given stay.

    The model's own resolution is 16: the UNet's 8 x 8 latents times the VAE's factor of 2.
    """
    flags = dict(mu=None, resolution=None, max_train_steps=1, eval_steps=0) | given
    assert run_cli(arguments(tiny_model, subject, tmp_path / "out", **flags)) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (settings["mixed_precision"], settings["mu"], settings["resolution"]) == expected
