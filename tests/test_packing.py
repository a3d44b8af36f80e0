"""--save_quantized: the same model, in less space, and whole or not at all."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from conftest import arguments, run_cli
from safetensors.torch import load_file, save_file
from tiny import PARTS, assert_same, load

import zoodip.packing
from zoodip.errors import InputError
from zoodip.packing import save_quantized, write_shards
from zoodip.quantize import QuantizedLayer


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_packed_folder_is_the_same_model(tiny_model, subject, tmp_path, capsys, monkeypatch, quantization):
    """--save_quantized, then that folder: the same bits in every part, in less space, in shards as well as in one file."""
    monkeypatch.chdir(tmp_path)
    argv = ["--pretrained_model_name_or_path", str(tiny_model), "--quantization", quantization, "--save_quantized", "packed"]
    assert run_cli(argv) == 0
    assert "packed: the model with" in capsys.readouterr().out
    packed = tmp_path / "packed"
    assert not list(tmp_path.glob(".packed*"))  # nothing unfinished is left
    for part in PARTS:
        for dtype in (torch.float32, torch.bfloat16):
            skip = ("encoder.", "quant_conv.") if part == "vae" else ()
            from_original, from_packed = (load(folder, part, quantization, dtype, skip=skip) for folder in (tiny_model, packed))
            assert_same(from_packed, from_original)
            found = {name for name, module in from_packed.named_modules() if isinstance(module, QuantizedLayer)}
            assert found == {name for name, module in from_original.named_modules() if isinstance(module, QuantizedLayer)}
    encoder = ("decoder.", "post_quant_conv.")
    assert_same(load(packed, "vae", skip=encoder), load(tiny_model, "vae", skip=encoder))  # which training uses unpacked
    runs = [tmp_path / "a", tmp_path / "b"]
    for model, output in zip((tiny_model, packed), runs, strict=True):
        assert run_cli(arguments(model, subject, output, quantization=quantization)) == 0
    tokens = [load_file(output / "learned_embeds.safetensors")["<sks>"] for output in runs]
    assert torch.equal(*tokens)
    assert run_cli(argv) == 2 and "exists" in capsys.readouterr().err
    assert run_cli(arguments(packed, subject, tmp_path / "c", quantization="none")) == 2
    assert f"packed as {quantization}" in capsys.readouterr().err
    again = [*argv[:1], str(packed), *argv[2:5], "repacked"]  # packing a packed folder gives the same again
    assert run_cli(again) == 0
    for path in packed.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "repacked" / path.relative_to(packed)).read_bytes()


def test_packing_and_training_in_one(tiny_model, subject, tmp_path):
    argv = arguments(tiny_model, subject, tmp_path / "out", save_quantized=tmp_path / "packed")
    assert run_cli(argv) == 0
    assert (tmp_path / "packed" / "model_index.json").exists() and (tmp_path / "out" / "learned_embeds.safetensors").exists()
    resumed = dict(save_quantized=tmp_path / "packed", max_train_steps=14, resume_from_checkpoint="latest")
    assert run_cli(argv) == 2  # it exists: a new run does not train on a folder that may be another model's
    argv = arguments(tiny_model, subject, tmp_path / "out", **resumed)
    assert run_cli(argv) == 0  # the same command, as an interrupted run says
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps_this_time"] == 2


@pytest.mark.parametrize("there", ["another model's", "another packing", "of something else"])
def test_a_resumed_run_takes_only_the_folder_that_it_packed(copy, subject, tmp_path, there, capsys):
    """It trained one model's token on another's UNet."""
    packed = tmp_path / "packed"
    if there == "of something else":
        packed.mkdir()
    else:
        save_quantized(packed, pretrained_model_name_or_path=str(copy), quantization="nf4")
    if there == "another model's":
        path = copy / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    flags = dict(save_quantized=packed, resume_from_checkpoint="latest")
    if there == "another packing":
        flags["quantization"] = "int8"
    assert run_cli(arguments(copy, subject, tmp_path / "out", **flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "already exists" in error and "choose a new folder" in error


def test_shards_keep_packing_small(tmp_path):
    """Shards hold disjoint sets of tensors, and the index names each tensor once."""
    tensors = [(f"t{i}", torch.full((5 << 20,), float(i))) for i in range(8)]  # 20 MB each
    write_shards(tmp_path, "model", iter(tensors))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == [name for name, _ in tensors]
    assert len(set(index.values())) == 2  # four reach 64 MB
    for name, tensor in tensors:
        assert torch.equal(load_file(tmp_path / index[name])[name], tensor)


@pytest.mark.parametrize("change", ["missing", "short"])
def test_a_damaged_packed_folder(tiny_model, tmp_path, capsys, change):
    packed = tmp_path / "packed"
    run_cli(["--pretrained_model_name_or_path", str(tiny_model), "--save_quantized", str(packed)])
    path = next((packed / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".weight.absmax"))
    tensors[name] = tensors[name][:-1]
    if change == "missing":
        del tensors[name]
    save_file(tensors, path)
    with pytest.raises(InputError, match="does not fit config.json"):
        load(packed, "unet", "nf4")
    capsys.readouterr()


def test_save_quantized_leaves_nothing_behind_when_it_fails(tiny_model, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise InputError(f"{path}: cannot be written (No space left on device); free some space")

    monkeypatch.setattr(zoodip.packing, "write_atomically", full)
    assert run_cli(["--pretrained_model_name_or_path", str(tiny_model), "--save_quantized", str(tmp_path / "packed")]) == 2
    assert "free some space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EIO, "choose another folder")])
def test_what_stops_the_copy_of_a_folder_is_named(tiny_model, tmp_path, monkeypatch, capsys, number, remedy):
    """The file, the system's reason and a remedy, and nothing half-written stays."""

    def fail(source, target):  # only the tokenizer's folder does not fit
        if "tokenizer" in str(target):
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", fail)
    assert run_cli(["--pretrained_model_name_or_path", str(tiny_model), "--save_quantized", str(tmp_path / "packed")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "/tokenizer/" in error and f"cannot be written ({os.strerror(number)}); {remedy}" in error
    assert list(tmp_path.iterdir()) == []
