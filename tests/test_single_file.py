"""Checkpoints in one .safetensors file: the same parameters, bit for bit, as the diffusers folder that they were made from."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from conftest import MINIATURE, arguments, run_cli
from safetensors.torch import load_file, save_file

import zoodip.folder
from zoodip.errors import InputError
from zoodip.folder import WEIGHT_NAMES, find_model_folder
from zoodip.model import load_frozen, load_pipeline
from zoodip.single_file import StandIn, converted

# ----------------------------------------------------------------------------------------------------- the names, backwards
# Written from the original code's structure, not from diffusers' tables: each block is `layers + 1` entries of a flat list.

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
OUTER = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
         "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def old_unet_name(name: str, config: dict) -> str:
    layers = config["layers_per_block"]
    for new, old in OUTER.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    where, rest = re.match(r"(mid_block|(?:down|up)_blocks\.\d+)\.(.*)", name).groups()
    kind, index, leaf = re.match(r"(\w+)\.(\d+)\.(.*)", rest).groups()
    index = int(index)
    if kind == "resnets":
        part, _, leaf = leaf.rpartition(".")
        leaf = f"{RESNET[part]}.{leaf}"
    if where == "mid_block":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{leaf}"
    side, _, block = where.partition("_blocks.")
    block = int(block)
    first = block * (layers + 1)
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{leaf.removeprefix('conv.')}"
        return f"input_blocks.{first + index + 1}.{int(kind == 'attentions')}.{leaf}"
    if kind == "upsamplers":
        attends = "CrossAttn" in config["up_block_types"][block]
        return f"output_blocks.{first + layers}.{2 if attends else 1}.{leaf}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{leaf}"


def old_vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for new, old in ATTENTION.items():
        name = re.sub(rf"mid_block\.attentions\.0\.{re.escape(new)}\.", f"mid.attn_1.{old}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def old_name(component: str, name: str, config: dict) -> str:
    if component == "unet":
        return "model.diffusion_model." + old_unet_name(name, config)
    if component == "vae":
        return "first_stage_model." + old_vae_name(name, len(config["block_out_channels"]))
    return "cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")


def single_file(folder: Path, target: Path) -> Path:
    """The folder's weights in one file; the VAE's attention as 1 x 1 convolutions, as in the original code."""
    tensors = {}
    for component, stem in WEIGHT_NAMES.items():
        config = json.loads((folder / component / "config.json").read_text())
        for name, tensor in load_file(folder / component / f"{stem}.safetensors").items():
            old = old_name(component, name, config)
            assert old not in tensors
            tensors[old] = tensor[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", old) else tensor
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["alphas_cumprod"] = torch.zeros(1000)  # which such files also hold
    save_file(tensors, target)
    return target


def assert_same_model(folder: Path, view: Path, quantization: str) -> None:
    for component in WEIGHT_NAMES:
        expected, found = (load_frozen(place, component, None, quantization, torch.float32, "cpu").state_dict()
                           for place in (folder, view))  # fmt: skip
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


# ----------------------------------------------------------------------------------------------------- the same bits


@pytest.fixture(scope="module")
def tiny_file(tiny_model, tmp_path_factory) -> Path:
    return single_file(tiny_model, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_tiny_model(tiny_model, tiny_file, quantization):
    view = find_model_folder(str(tiny_file), model_config=str(tiny_model))
    assert_same_model(tiny_model, view, quantization)


def test_the_miniature(tmp_path):
    view = find_model_folder(str(single_file(MINIATURE, tmp_path / "miniature.safetensors")), model_config=str(MINIATURE))
    assert_same_model(MINIATURE, view, "nf4")


def test_training_from_a_file_learns_the_same(tiny_model, tiny_file, subject, tmp_path):
    """The same token and pictures, bit for bit; the record names the file without its folder."""
    flags = dict(max_train_steps=3, eval_steps=0, final_picture=True, num_validation_images=1)
    assert run_cli(arguments(tiny_model, subject, tmp_path / "folder", **flags)) == 0
    assert run_cli(arguments(tiny_file, subject, tmp_path / "file", model_config=tiny_model, **flags)) == 0
    tokens = [load_file(tmp_path / name / "learned_embeds.safetensors")["<sks>"] for name in ("folder", "file")]
    assert torch.equal(*tokens)
    assert (tmp_path / "folder" / "before_after.png").read_bytes() == (tmp_path / "file" / "before_after.png").read_bytes()
    assert json.loads((tmp_path / "file" / "run.json").read_text())["settings"]["pretrained_model_name_or_path"] == tiny_file.name
    again = arguments(tiny_file, subject, tmp_path / "file", model_config=tiny_model, resume_from_checkpoint="latest",
                      **{**flags, "max_train_steps": 4})  # fmt: skip
    assert run_cli(again) == 0


def test_a_file_packed_is_the_folder_packed(tiny_model, tiny_file, tmp_path):
    for name, model, more in (("a", tiny_model, []), ("b", tiny_file, ["--model_config", str(tiny_model)])):
        assert run_cli(["--pretrained_model_name_or_path", str(model), "--save_quantized", str(tmp_path / name), *more]) == 0
    assert_same_model(tmp_path / "a", tmp_path / "b", "nf4")


def test_a_pipeline_from_a_file(tiny_model, tiny_file):
    pipeline = load_pipeline(str(tiny_file), "none", model_config=str(tiny_model))
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a dog", num_inference_steps=2, height=16, width=16)


def test_nothing_is_left_of_the_temporary_folder(tiny_model, tiny_file, subject, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    argv = arguments(tiny_file, subject, tmp_path / "out", model_config=tiny_model, max_train_steps=1, eval_steps=0)
    subprocess.run([sys.executable, "train_zoodip.py", *argv], check=True, env={**os.environ, "TMPDIR": str(temporary)},
                   cwd=Path(__file__).parent.parent, capture_output=True)  # fmt: skip
    assert list(temporary.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- the published shapes

UNET_15 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
UNET_21 = dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip


def shapes_of(component: str, config: dict) -> tuple[dict[str, tuple[int, ...]], dict]:
    """({parameter: shape} of a component, its whole configuration) without its memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with init_empty_weights():
        model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component](**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, dict(model.config)


@pytest.mark.parametrize(("component", "config", "count"), [("unet", UNET_15, 686), ("unet", UNET_21, 686), ("vae", VAE, 248)])
def test_every_parameter_of_the_published_shapes_is_found(component, config, count):
    """686 and 248 tensors are what the published files hold of UNet and VAE."""
    expected, config = shapes_of(component, config)
    assert len(expected) == count
    old = {name: old_name(component, name, config) for name in expected}
    file = {name: StandIn(name, expected[new]) for new, name in old.items()}
    found = converted(component, file, config)
    assert {new: part.name for new, part in found.items()} == old
    assert {new: part.shape for new, part in found.items()} == expected


def test_names_that_are_published():
    """A few names of v1-5-pruned-emaonly.safetensors, as anybody can read them there."""
    _, config = shapes_of("unet", UNET_15)
    names = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight":
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.2.downsamplers.0.conv.weight": "input_blocks.9.0.op.weight",
        "mid_block.resnets.1.conv1.weight": "middle_block.2.in_layers.2.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
    }  # fmt: skip
    for new, old in names.items():
        assert old_unet_name(new, config) == old


@pytest.mark.parametrize("layers", [2])
def test_the_text_encoder_of_version_2(tiny_model, tmp_path, layers):
    """OpenCLIP's: one matrix for query, key and value, one layer more than is used, and a projection that is unused."""
    width, stem = 32, "cond_stage_model.model."
    expected = load_file(tiny_model / "text_encoder" / "model.safetensors")
    expected = {name.removeprefix("text_model."): tensor for name, tensor in expected.items()}
    old = {"token_embedding.weight": expected["embeddings.token_embedding.weight"],
           "positional_embedding": expected["embeddings.position_embedding.weight"],
           "text_projection": torch.zeros(width, width), "logit_scale": torch.tensor(1.0)}  # fmt: skip
    for kind in ("weight", "bias"):
        old[f"ln_final.{kind}"] = expected[f"final_layer_norm.{kind}"]
        for i in range(layers):
            new, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            old[f"{block}attn.in_proj_{kind}"] = torch.cat([expected[f"{new}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            old[f"{block}attn.out_proj.{kind}"] = expected[f"{new}self_attn.out_proj.{kind}"]
            for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                old[f"{block}{a}.{kind}"] = expected[f"{new}{b}.{kind}"]
    whole = load_file(single_file(tiny_model, tmp_path / "v1.safetensors"))
    rest = {name: tensor for name, tensor in whole.items() if not name.startswith("cond_stage_model.")}
    save_file({**rest, **{stem + name: tensor for name, tensor in old.items()}}, tmp_path / "v2.safetensors")
    view = find_model_folder(str(tmp_path / "v2.safetensors"), model_config=str(tiny_model))
    assert_same_model(tiny_model, view, "none")
    from zoodip.prompts import read_embedding_rows

    assert torch.equal(read_embedding_rows(view, None, [3, 5]), expected["embeddings.token_embedding.weight"][[3, 5]])


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_pickle_is_refused_with_the_command_that_converts_it(tiny_model, tiny_file, tmp_path):
    """The command works, and runs nothing that is in the file."""
    tensors = load_file(tiny_file)
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "old.ckpt")
    for name in ("old.ckpt", "renamed.safetensors"):
        if name != "old.ckpt":
            shutil.copy(tmp_path / "old.ckpt", tmp_path / name)
        with pytest.raises(InputError, match="is a pickle, which could run code") as error:
            find_model_folder(str(tmp_path / name), model_config=str(tiny_model))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError) as error:
        find_model_folder(str(tmp_path / "old.ckpt"))
    command = str(error.value).partition(" with python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=tmp_path)
    assert load_file(tmp_path / "old.safetensors").keys() == tensors.keys()

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": tensors, "trap": Trap()}, tmp_path / "old.ckpt")
    result = subprocess.run(f"{sys.executable} {command}", shell=True, cwd=tmp_path, capture_output=True)
    assert result.returncode != 0 and not (tmp_path / "sprung").exists()


def test_files_of_other_kinds(tiny_model, tiny_file, tmp_path):
    xl = {**load_file(tiny_file), "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(2)}
    inpainting = {**load_file(tiny_file), "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
    cases = [({"lora_unet_down.weight": torch.zeros(2, 2)}, "holds no Stable Diffusion"), (xl, "kind xl_base"),
             (inpainting, "kind inpainting")]  # fmt: skip
    for tensors, reason in cases:
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=reason):
            find_model_folder(str(tmp_path / "a.safetensors"), model_config=str(tiny_model))
    (tmp_path / "a.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="not a valid safetensors file"):
        find_model_folder(str(tmp_path / "a.safetensors"), model_config=str(tiny_model))


def test_a_file_that_lacks_a_tensor(tiny_model, tiny_file, tmp_path):
    """Half a model must not be trained on silently."""
    tensors = load_file(tiny_file)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, tmp_path / "a.safetensors")
    view = find_model_folder(str(tmp_path / "a.safetensors"), model_config=str(tiny_model))
    with pytest.raises(InputError, match="lack 'conv_out.bias'"):
        load_frozen(view, "unet", None, "none", torch.float32, "cpu")


def test_without_network_the_error_says_what_is_needed(tiny_file):
    with pytest.raises(InputError, match="neither configuration nor tokenizer.*--model_config") as error:
        find_model_folder(str(tiny_file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", ["replace", "mkdir"])
def test_a_full_temporary_folder_is_reported(tiny_model, tiny_file, tmp_path, monkeypatch, call):
    """It used to pass for a model without a tokenizer."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owner = os if call == "replace" else Path

    def full(path, *args, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(owner, call, full)
    with pytest.raises(InputError, match="zoodip-.*: cannot be written .*No space left on device.*; free some space"):
        find_model_folder(str(tiny_file), model_config=str(tiny_model))


@pytest.mark.parametrize(("kind", "given", "told"), [("v2", None, True), ("v2", "model", False), ("v1", None, False)])
def test_what_a_file_of_2_x_is_taken_for_is_told(kind, given, told, tiny_model, tmp_path, monkeypatch, capsys):
    """A model of 512 pixels would otherwise train toward another target, without a word."""
    monkeypatch.setattr(zoodip.folder, "checkpoint_kind", lambda file: (kind, {}))
    monkeypatch.setattr(zoodip.folder, "download_model", lambda *args, **more: tiny_model)
    monkeypatch.setattr(zoodip.folder, "folder_of_single_file", lambda file, tensors, source: source)
    zoodip.folder.open_single_file(tmp_path / "some.safetensors", str(tiny_model) if given else None)
    assert ("taken for a 2.x of 768 pixels" in capsys.readouterr().err) == told
