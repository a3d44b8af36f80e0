"""Checkpoints of other runs and damaged ones are refused in one line, or skipped."""

from __future__ import annotations

import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import arguments, make_subject, run_cli, seeded
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zoodip.checkpoints import state_digest, write_checkpoint
from zoodip.errors import InputError
from zoodip.run import Run


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A finished run of six steps, its subject and its checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    data = make_subject(folder / "dog")
    assert run_cli(arguments(tiny_model, data, folder / "out", max_train_steps=6, checkpointing_steps=3)) == 0
    return folder


@pytest.mark.parametrize(("flag", "value", "was"), [
    ("seed", 1, "was 0, is 1"), ("n", 3, "was 2, is 3"), ("tau", 5, "was 4, is 5"), ("mu", 0.02, "was 0.01, is 0.02"),
    ("learning_rate", 0.01, "was 0.005, is 0.01"), ("estimator", "spsa", "was 'rge', is 'spsa'"),
    ("quantization", "int8", "was 'nf4', is 'int8'"), ("num_vectors", 2, "was 1, is 2"),
    ("placeholder_token", "<my-x>", "was '<sks>', is '<my-x>'"), ("resolution", 24, "was 16, is 24"),
    ("lr_scheduler", "cosine", "was not set, is 'cosine'"), ("lr_warmup_steps", 2, "was not set, is 2"),
    ("learnable_property", "style", "was 'object', is 'style'"), ("mixed_precision", "bf16", "was 'fp32', is 'bf16'"),
])  # fmt: skip
def test_checkpoint_of_another_run(trained, refused, flag, value, was):
    """The error names the difference: flag, old value and new value."""
    checkpoint = trained / "out" / "checkpoint-6.safetensors"
    line = refused(data=trained / "dog", resume_from_checkpoint=checkpoint, **{flag: value})
    assert f"--{flag} {was}" in line and "checkpoint-6" in line


def test_checkpoint_of_other_images(trained, tmp_path, refused):
    folder = shutil.copytree(trained / "dog", tmp_path / "dog")
    Image.new("RGB", (24, 24)).save(folder / "01.png")
    line = refused(data=folder, resume_from_checkpoint=trained / "out" / "checkpoint-6.safetensors")
    assert "images or captions" in line and "changed" in line and "checkpoint-6" in line


def test_checkpoint_of_other_weights(trained, tmp_path, tiny_model, refused):
    """The same folder name with another model in it: a retrained one or a different variant."""
    model = shutil.copytree(tiny_model, tmp_path / tiny_model.name)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"] += 1
    save_file(tensors, path, {"format": "pt"})
    line = refused(model=model, data=trained / "dog", resume_from_checkpoint=trained / "out" / "checkpoint-6.safetensors")
    assert "model weights" in line and "changed" in line


def damage(source, target, kind: str, resigned: bool = False) -> None:
    """Write a checkpoint damaged in one way; `resigned`: with a checksum that fits the damaged content."""
    content = source.read_bytes()
    if kind == "truncated":
        return target.write_bytes(content[:-40])
    if kind in ("empty", "garbage"):
        return target.write_bytes(b"" if kind == "empty" else os.urandom(500))
    with safe_open(source, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(source)
    if kind == "nan":
        tensors["theta"][0, 0] = float("nan")
    elif kind == "infinite":
        tensors["adam.exp_avg"][0, 0] = float("inf")
    elif kind == "shape":
        tensors["adam.exp_avg"] = torch.zeros(3)
    elif kind == "rows":  # two vectors where the run has one
        tensors["theta"] = torch.zeros(2, 32)
    elif kind == "dtype":
        tensors["theta"] = tensors["theta"].double()
    elif kind == "another name":
        tensors["thetas"] = tensors.pop("theta")
    elif kind == "one too many":
        tensors["other"] = torch.zeros(2)
    elif kind == "history":
        tensors["subspace.token_history"] = torch.zeros(2, 5)
    elif kind == "generator":
        tensors["generator"] = torch.zeros(5, dtype=torch.uint8)
    elif kind == "zeroed generator":
        tensors["generator"] = torch.zeros_like(tensors["generator"])
    elif kind == "header":
        metadata = {"format": "pt"}
    elif kind == "format":
        metadata["format"] = "qt"
    elif kind == "json":
        metadata["zoodip.checkpoint"] = metadata["zoodip.checkpoint"][:-5]
    else:
        del tensors[kind]
    if resigned:
        metadata["zoodip.sha256"] = state_digest(metadata["zoodip.checkpoint"], tensors)
    save_file(tensors, target, metadata)


def test_an_embedding_is_no_checkpoint(trained, refused):
    """Named by mistake; it was reported with a fragment of Python."""
    line = refused(data=trained / "dog", resume_from_checkpoint=trained / "out" / "learned_embeds.safetensors")
    assert "it is no checkpoint of this project); use latest or an older checkpoint-N.safetensors" in line


KINDS_OF_STATE = ["nan", "infinite", "shape", "rows", "dtype", "another name", "one too many", "history", "generator",
                  "zeroed generator", "theta", "adam.step", "adam.exp_avg_sq", "subspace.projection"]  # fmt: skip


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage", "header", "json", "format", *KINDS_OF_STATE])
def test_damaged_checkpoint(trained, tmp_path, refused, kind):
    """It is named as such; a run never resumes from half a state."""
    damage(trained / "out" / "checkpoint-6.safetensors", tmp_path / "checkpoint-6.safetensors", kind)
    line = refused(data=trained / "dog", resume_from_checkpoint=tmp_path / "checkpoint-6.safetensors")
    assert "is no valid checkpoint" in line and "checkpoint-6" in line


@pytest.mark.parametrize("kind", ["json", *KINDS_OF_STATE])
def test_a_checksum_that_fits_is_not_enough(trained, tmp_path, refused, kind):
    """Names, dtypes and shapes must match a fresh state, and numbers be finite: a broadcast would go unnoticed for hours."""
    damage(trained / "out" / "checkpoint-6.safetensors", tmp_path / "checkpoint-6.safetensors", kind, resigned=True)
    line = refused(data=trained / "dog", resume_from_checkpoint=tmp_path / "checkpoint-6.safetensors")
    assert "is no valid checkpoint" in line and "checkpoint-6" in line


@pytest.mark.parametrize(("settings", "fault"), [
    ({"method": "gf_ti"}, "of gf_ti, not ZOODiP"), (7, "has another form"), (None, "NoneType"), (..., "'settings' is missing"),
])  # fmt: skip
def test_a_header_of_another_version(tmp_path, settings, fault):
    """The error says what exactly is wrong: a missing value, or one of another kind."""
    run = Run(SimpleNamespace(state_dict=dict), seeded(), SimpleNamespace(is_main_process=True), {"n": 2}, {},
              output_dir=tmp_path, max_train_steps=4, save_steps=0, checkpointing_steps=0, checkpoints_total_limit=0,
              eval_steps=0, validation_steps=0)  # fmt: skip
    header, tensors = run.state()
    header["settings"] = settings
    if settings is ...:  # of a version that does not record them
        del header["settings"]
    write_checkpoint(tmp_path / "checkpoint-1.safetensors", header, tensors)
    with pytest.raises(InputError, match=re.escape(fault)) as caught:
        run.load_checkpoint(tmp_path / "checkpoint-1.safetensors")
    assert "is from another method or version" in str(caught.value)


def test_checkpoint_that_is_not_there(trained, tmp_path, refused):
    assert "there is no file" in refused(data=trained / "dog", resume_from_checkpoint=tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", ["truncated", "nan", "generator", "adam.step"])
def test_latest_passes_over_a_damaged_checkpoint(trained, tmp_path, tiny_model, capsys, kind):
    """A full disk may leave the newest broken; the one before it is used and gives the same result."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(trained / "out" / "checkpoint-3.safetensors", out)
    damage(trained / "out" / "checkpoint-6.safetensors", out / "checkpoint-6.safetensors", kind)
    argv = arguments(tiny_model, trained / "dog", out, max_train_steps=6, resume_from_checkpoint="latest")
    assert run_cli(argv) == 0
    assert "skipped a broken checkpoint" in capsys.readouterr().err
    ours, theirs = (load_file(folder / "learned_embeds.safetensors")["<sks>"] for folder in (out, trained / "out"))
    assert torch.equal(ours, theirs)
