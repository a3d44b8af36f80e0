"""The whole weight-tuning systems: their scripts on the tiny model, the files they leave, and the loaders that these are for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import draw_tuned
import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, make_subject, notices_of, run_cli, seeded
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_single_file import single_file
from tiny import PARTS, assert_same, from_pretrained, load
from torch import nn
from tuned import SYSTEMS, command, predict, prepared, stock_pipeline

import train_zoodip
import trainers.diffusekrona
import trainers.dreambooth
import trainers.qlora
import trainers.tuneqdm
import zoodip.prior
import zoodip.tuned_model
from zoodip.checkpoints import read_checkpoint
from zoodip.diffusion import Batch, noise_batch
from zoodip.errors import InputError, Interrupted
from zoodip.model import assemble_pipeline, build_model, load_pipeline
from zoodip.prior import PriorPictures
from zoodip.prompts import load_tokenizer
from zoodip.quantize import QuantizedLayer, frozen_format
from zoodip.tuned_files import load_tuned_pipeline, merged_unet, read_tuned, save_other_folders, save_unet
from zoodip.tuned_layers import KroneckerLayer, ScaledLayer, attention_projections
from zoodip.tuned_model import in_words
from zoodip.weight_tuning import System, TunedOutputs, Tuning, WeightTuner


@pytest.fixture(scope="module")
def finished(tiny_model, subject, tmp_path_factory) -> Callable[[str], tuple[str, Path, Tuning]]:
    """system -> (system, output folder, what was trained in this process) of a run of four steps, made at the first call."""

    @cache
    def run_of(name: str) -> tuple[str, Path, Tuning]:
        folder = tmp_path_factory.mktemp("tuned")
        tuning = prepared(name, tiny_model, subject, folder)
        with tuning.run as run:
            for _ in run.steps(tuning.outputs):
                run.note(*tuning.step())
        return name, folder, tuning

    return run_of


@pytest.fixture
def trained(request, finished) -> tuple[str, Path, Tuning]:
    return finished(request.param)


def each(*names: str) -> pytest.MarkDecorator:
    """A test of the finished runs of these systems."""
    return pytest.mark.parametrize("trained", names, indirect=True)


def off(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference relative to the largest output. fp32 with sums in another order stays below 1e-6 on this model."""
    return ((output - reference).abs().max() / reference.abs().max()).item()


# ---------------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------------


@each(*SYSTEMS)
def test_it_is_loaded_as_it_was_trained(trained, tiny_model):
    """A newly loaded pipeline predicts as the trained UNet does, bit for bit, at timesteps of every expert."""
    name, folder, tuning = trained
    pipeline = load_tuned_pipeline(str(tiny_model), folder if name == "dreambooth" else folder / SYSTEMS[name][3])
    untuned = load(tiny_model, "unet", tuning.outputs.system.quantization)
    changed = []
    for timestep in (100, 300, 600, 950):
        expected = predict(tuning.model.unet, timestep)
        assert torch.equal(predict(pipeline.unet, timestep), expected)
        changed.append(not torch.equal(predict(untuned, timestep), expected))
    if name == "s1":  # outside [500, 900) the untuned model, bit for bit
        assert changed == [False, False, True, False]
    elif name != "tuneqdm":  # four steps need not reach every expert
        assert all(changed)
    assert any(changed)


@each(*SYSTEMS)
def test_what_is_left(trained):
    name, folder, tuning = trained
    record = json.loads((folder / "run.json").read_text())
    assert record["step"] == 4 and record["settings"]["method"] == tuning.outputs.system.name
    assert record["settings"]["class_word"] == "dog" and "placeholder_token" not in record["settings"]
    path = folder / SYSTEMS[name][3]
    with safe_open(path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path, framework="pt") as handle:
        header = handle.metadata()
        packed = {"peqa": "4-bit integers", "tuneqdm": "8-bit integers", "s1": "8-bit integers", "qlora": "NF4", "krona": "NF4"}
        assert packed.get(name, "") in header.get("zoodip.note", "") and (name in packed) == ("zoodip.note" in header)
        assert header["format"] == "pt" and json.loads(header["zoodip.settings"])["learning_rate"] == 1e-2
        assert {str(handle.get_tensor(key).dtype) for key in handle.keys()} == {"torch.float32"}
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


@each("peqa", "tuneqdm", "s1")
def test_scales_are_stored_by_module(trained):
    name, folder, tuning = trained
    tensors = load_file(folder / "tuned_scales.safetensors")
    experts = {"peqa": 1, "tuneqdm": 4, "s1": 1}[name]
    assert {len(tensor) for tensor in tensors.values()} == {experts}
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in tuning.tuner.parameters.values())
    assert any(key.endswith(".scale_in") for key in tensors) == (name != "peqa")
    for key, tensor in tensors.items():
        module, leaf = key.rsplit(".", 1)
        for e, parameter in enumerate(getattr(tuning.model.unet.get_submodule(module), leaf)):
            assert torch.equal(tensor[e], parameter)


@each("tuneqdm")
def test_a_pipeline_from_scales_draws(tiny_model, trained):
    """`load_pipeline` needs only the file, and picks the expert of each step by itself, with guidance."""
    _, folder, _ = trained
    pipeline = load_pipeline(str(tiny_model), tuned_scales=folder / "tuned_scales.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    layer = next(module for module in pipeline.unet.modules() if hasattr(module, "expert"))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(module.expert))
    pipeline("a photo of a dog", num_inference_steps=25, height=16, width=16, output_type="latent")
    assert [seen.count(e) for e in range(4)] == [7, 6, 6, 7]


@pytest.mark.parametrize(("name", "quantization"), [("tuneqdm", "int8"), ("peqa", "nf4"), ("qlora", "nf4"), ("lora", "none")])
def test_the_other_parts_have_as_many_bits(name, quantization, finished, tiny_model, subject, tmp_path, monkeypatch):
    """Text encoder and VAE are packed like the UNet, all their layers: for the run, for its pictures, and as loaded later."""
    loaded, file = [], finished(name)[1] / SYSTEMS[name][3]
    load_text_encoder = zoodip.tuned_model.load_text_encoder
    monkeypatch.setattr(zoodip.tuned_model, "load_text_encoder", lambda *a: loaded.append(load_text_encoder(*a)) or loaded[-1])
    tuning = prepared(name, tiny_model, subject, tmp_path)
    tuning.run.lock.release()
    pipeline = load_tuned_pipeline(str(tiny_model), file)
    decoders = (tuning.outputs.drawer().pipeline.vae.decoder, pipeline.vae.decoder)
    for part in (*loaded, *decoders, pipeline.text_encoder, pipeline.vae.encoder):
        layers = [module for module in part.modules() if isinstance(module, (nn.Linear, nn.Conv2d, QuantizedLayer))]
        assert len(layers) > 10 and {getattr(layer, "quantization", "none") for layer in layers} == {quantization}
    assert len(loaded) == 1


@each("qlora", "lora")
def test_diffusers_loads_the_lora(trained, tiny_model):
    """`pipe.load_lora_weights` on the plain model gives what was trained on it, up to the order of sums."""
    name, folder, tuning = trained
    pipeline = stock_pipeline(tiny_model)
    before = predict(pipeline.unet, 300)
    pipeline.load_lora_weights(folder)
    after = predict(pipeline.unet, 300)
    assert not torch.equal(before, after)
    if name == "lora":  # on NF4 the model is another one, only near
        assert off(after, predict(tuning.model.unet, 300)) <= 1e-5
    kohya, ours = load_file(folder / "sks.safetensors"), load_file(folder / "pytorch_lora_weights.safetensors")
    for key, tensor in ours.items():
        module, matrix = key.removeprefix("unet.").removesuffix(".weight").split(".lora.")
        assert torch.equal(kohya[f"lora_unet_{module.replace('.', '_')}.lora_{matrix}.weight"], tensor)
    assert {int(tensor) for key, tensor in kohya.items() if key.endswith(".alpha")} == {2} and len(kohya) == len(ours) * 3 // 2


@each("krona", "krona square")
def test_kronecker_files(trained, tiny_model):
    """The file's LyCORIS reading, kron(w1, w2), is the change of each weight; a square A is peft's adapter as well."""
    name, folder, tuning = trained
    tensors = load_file(folder / "pytorch_lokr_weights.safetensors")
    layers = {key: module for key, module in tuning.model.unet.named_modules() if isinstance(module, KroneckerLayer)}
    assert len(tensors) == 2 * len(layers) and not [key for key in tensors if "alpha" in key]
    for key, layer in layers.items():
        stem = f"lora_unet_{key.replace('.', '_')}"
        change = torch.kron(tensors[f"{stem}.lokr_w1"], tensors[f"{stem}.lokr_w2"])
        inputs = torch.randn(3, change.shape[1], generator=seeded(4))
        assert off(layer(inputs) - layer.base(inputs), inputs @ change.T) <= 1e-5  # 1.3e-6: a small difference of two outputs
    adapter = folder / "peft_adapter"
    assert adapter.is_dir() == (name == "krona square")
    if name == "krona square":
        from peft import PeftModel

        expected = predict(tuning.model.unet, 300)
        unet = PeftModel.from_pretrained(stock_pipeline(tiny_model).unet, adapter)
        assert off(predict(unet, 300), expected) <= 1e-5
        pipeline = stock_pipeline(tiny_model)
        state = {
            key.removeprefix("base_model.model."): tensor
            for key, tensor in load_file(adapter / "adapter_model.safetensors").items()
        }
        pipeline.unet.load_lora_adapter(state, prefix=None)
        assert off(predict(pipeline.unet, 300), expected) <= 1e-5


@each("krona")
def test_a_product_is_not_merged_into_packed_weights(trained, tiny_model):
    with pytest.raises(InputError, match="--base none"):
        merged_unet(trained[2].model.unet, tiny_model, None)


@each("krona square")
def test_merged_equals_unmerged(trained, tiny_model):
    unet, tuned = stock_pipeline(tiny_model).unet, trained[2].model.unet
    unet.load_state_dict(merged_unet(tuned, tiny_model, None))
    assert off(predict(unet, 300), predict(tuned, 300)) <= 1e-5


@each("lora")
def test_fused_by_diffusers_equals_unmerged(trained, tiny_model):
    """LoRA on plain weights: added to them, and the adapter taken off, the output stays."""
    pipeline = stock_pipeline(tiny_model)
    untuned = predict(pipeline.unet, 300)
    pipeline.load_lora_weights(trained[1])
    unmerged = predict(pipeline.unet, 300)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert not [name for name, _ in pipeline.unet.named_parameters() if "lora" in name]
    fused = predict(pipeline.unet, 300)
    assert off(untuned, unmerged) > 1e-2 and off(fused, unmerged) <= 1e-5
    assert off(fused, predict(trained[2].model.unet, 300)) <= 1e-5


@each("lora")
def test_fused_by_diffusers_in_our_layers_too(trained, tiny_model):
    """Our LoRA layer adds nothing to weights that it has been fused into, and takes it out again when it is switched off."""
    unet = load_tuned_pipeline(str(tiny_model), trained[1] / SYSTEMS["lora"][3]).unet
    unmerged, untuned = predict(unet, 300), predict(stock_pipeline(tiny_model).unet, 300)
    unet.fuse_lora()
    assert off(predict(unet, 300), unmerged) <= 1e-5
    unet.disable_adapters()
    assert off(predict(unet, 300), untuned) <= 1e-5


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=["fp32", "fp16"])
def test_the_merged_unet_is_the_tuned_one(dtype, near, tiny_model, subject, tmp_path, monkeypatch):
    """diffusers' own loader gives the unmerged prediction, up to the order of sums and, in fp16, as shipped, rounding."""
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(trainers.diffusekrona, "EXPORT_DTYPE", dtype)
    again = dtype == torch.float16
    if again:
        (tmp_path / "merged" / "unet" / "mine").mkdir(parents=True)
    argv = command(tiny_model, subject, tmp_path / "out", a1=2, a2=4, base="none", export_merged=tmp_path / "merged")
    assert run_cli(argv, trainers.diffusekrona) == 0
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet")
    # what another run had exported is not overwritten, and nothing is said to be set aside where there was nothing
    assert {path.name for path in (tmp_path / "merged").iterdir()} == ({"previous-1", "unet"} if again else {"unet"})
    assert (tmp_path / "merged" / "previous-1" / "unet" / "mine").exists() == again
    assert run_cli([*argv, "--resume_from_checkpoint", "latest"], trainers.diffusekrona) == 0  # nothing to train: the same UNet
    assert {path.name for path in (tmp_path / "merged").iterdir()} == ({"previous-1", "unet"} if again else {"unet"})
    unmerged = load_tuned_pipeline(str(tiny_model), tmp_path / "out" / "pytorch_lokr_weights.safetensors").unet
    for timestep in (100, 600):
        expected = predict(unmerged, timestep)
        off, size = (predict(merged, timestep) - expected).abs().max(), expected.abs().max()
        assert off <= near * size  # 1e-6 and, of 11 bits, 9e-4 here
        assert (predict(load(tiny_model, "unet"), timestep) - expected).abs().max() > 10 * near * size  # the product matters


def test_the_merged_unet_has_the_precision_of_the_model(tiny_model, subject, tmp_path, monkeypatch):
    """Training in bf16 rounds what is frozen; the exported UNet takes it from the model's own files."""
    monkeypatch.setattr(trainers.diffusekrona, "EXPORT_DTYPE", torch.float32)
    flags = dict(a1=2, a2=4, base="none", mixed_precision="bf16", export_merged=tmp_path / "merged")
    assert run_cli(command(tiny_model, subject, tmp_path / "out", **flags), trainers.diffusekrona) == 0
    name = "diffusion_pytorch_model.safetensors"
    merged, own = (load_file(folder / "unet" / name) for folder in (tmp_path / "merged", tiny_model))
    assert {key for key in own if not torch.equal(merged[key], own[key])} == {
        f"{layer}.weight" for layer in attention_projections(load(tiny_model, "unet"))
    }


@pytest.mark.parametrize("own", [True, False], ids=["the base", "another model"])
def test_a_model_is_not_set_aside(own, copy, tiny_model, subject, tmp_path, capsys):
    """A run moves an earlier run's unet/ away; the user's model is refused as --output_dir, in one line, and stays as it is."""
    if own:
        (copy / ".lock").touch()  # as if a run had written it
    before = sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*"))
    base = copy if own else tiny_model
    runs = [(command(base, subject, copy), trainers.dreambooth), (arguments(base, subject, copy), train_zoodip)]
    for argv, script in runs:
        assert run_cli(argv, script) == 2
        error = capsys.readouterr().err
        assert "is a model's own folder" in error and error.count("\n") == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*")) == before


def test_a_killed_run_s_pipeline_is_no_model_of_the_user_s(tiny_model, subject, tmp_path):
    """run.json is written last: without it, the whole pipeline in the output folder must not stop the run from going on."""
    argv = command(tiny_model, subject, tmp_path, save_pipeline=True, checkpointing_steps=2)
    assert run_cli(argv, trainers.dreambooth) == 0
    (tmp_path / "run.json").unlink()
    assert run_cli([*argv, "--resume_from_checkpoint=latest"], trainers.dreambooth) == 0
    assert (tmp_path / "run.json").exists() and (tmp_path / "model_index.json").exists()


def test_a_folder_that_cannot_be_exported_to(copy, subject, tmp_path, capsys):
    """Reported in one line before a model is loaded or a folder made, not after the run."""
    (tmp_path / "file").touch()
    other = shutil.copytree(copy, tmp_path / "other")  # a model, though not the run's own
    for target, fault in (
        (tmp_path / "file" / "merged", "cannot be created"),
        *((each, "a model's own folder") for each in (copy, other)),
    ):
        argv = command(copy, subject, tmp_path / "out", a1=2, a2=4, base="none", export_merged=target)
        assert run_cli(argv, trainers.diffusekrona) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --export_merged") and fault in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="cannot be written"):  # if it stops being writable during the run
        save_unet(tmp_path / "file" / "unet", {}, copy, torch.float16, {})
    with pytest.raises(InputError, match="cannot be written"):
        save_other_folders(tmp_path / "file", copy, None)


@each("dreambooth")
def test_dreambooth_leaves_a_model(trained, tiny_model):
    _, folder, tuning = trained
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for (name, ours), theirs in zip(tuning.model.unet.named_parameters(), pipeline.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a photo of a dog", num_inference_steps=1, height=16, width=16, output_type="latent")


def test_dreambooth_writes_what_it_read(tiny_model, subject, tmp_path):
    tuning = prepared("dreambooth", tiny_model, subject, tmp_path)
    tuning.run.lock.release()
    tuning.outputs.save(tmp_path, 0, final=True)
    read, written = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (tiny_model, tmp_path))
    assert read.keys() == written.keys() and all(torch.equal(read[key], written[key]) for key in read)


def test_dreambooth_saves_with_the_base_that_it_read(hub_model, tiny_model, subject, tmp_path):
    """For a hub model the variant that was found, for a single file its --model_config: nothing is looked up a second time."""
    file = single_file(tiny_model, tmp_path / "tiny.safetensors")
    bases = {"folder": (tiny_model, {}), "hub": (hub_model, {}), "file": (file, dict(model_config=tiny_model))}
    for name, (base, more) in bases.items():
        argv = command(base, subject, tmp_path / name, max_train_steps=1, save_pipeline=True, **more)
        assert run_cli(argv, trainers.dreambooth) == 0
        for part in PARTS:
            assert_same(from_pretrained(tmp_path / name, part), load(tmp_path / "folder", part))


@each(*SYSTEMS)
def test_a_file_of_other_weights_is_refused(trained, copy):
    name, folder, _ = trained
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="was learned on other weights"):
        load_tuned_pipeline(str(copy), folder if name == "dreambooth" else folder / SYSTEMS[name][3])


@each("qlora")
def test_without_peft_the_error_names_it(trained, tiny_model, subject, tmp_path, monkeypatch, capsys):
    """It comes with the extra "tuning", as all scripts that need it say before a model is loaded."""
    monkeypatch.setitem(sys.modules, "peft", None)
    for module, flags in ((trainers.qlora, {}), (trainers.diffusekrona, dict(a1=4, a2=4))):
        capsys.readouterr()
        assert run_cli(command(tiny_model, subject, tmp_path / "out", **flags), module) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "peft" in error and "[tuning]" in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="needs the package peft"):
        load_tuned_pipeline(str(tiny_model), trained[1] / "pytorch_lora_weights.safetensors")
    assert run_cli(command(tiny_model, subject, tmp_path / "out", a1=2, a2=4), trainers.diffusekrona) == 0


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"\x10" + bytes(30)], ids=["empty", "pickle", "noise"])
def test_damaged_files_are_refused(content, tmp_path):
    (tmp_path / "tuned_scales.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="tuned_scales.safetensors: holds no tuned weights"):
        read_tuned(tmp_path / "tuned_scales.safetensors")


LOADED_BY = [  # (loader in a user's process, system, what it loads of the system's folder)
    ("load_lora_weights", "lora", "pytorch_lora_weights.safetensors"),
    ("load_lora_weights", "lora", "sks.safetensors"),  # A1111's and ComfyUI's copy, which diffusers reads as well
    ("peft_adapter", "krona square", "peft_adapter"),
    ("unet_from_pretrained", "dreambooth", "unet"),
    ("pipeline_from_pretrained", "dreambooth", ""),
    ("load_pipeline", "peqa", "tuned_scales.safetensors"),
    ("load_pipeline", "tuneqdm", "tuned_scales.safetensors"),
    ("load_pipeline", "s1", "tuned_scales.safetensors"),
    ("load_tuned_pipeline", "qlora", "pytorch_lora_weights.safetensors"),  # on the packed weights, which others do not have
    ("load_tuned_pipeline", "krona", "pytorch_lokr_weights.safetensors"),
]


@pytest.mark.slow  # 20 s: another process, 4 steps of 24 pictures
def test_a_process_of_its_own_draws_the_same(finished, tiny_model, tmp_path):
    """Each system's file, loaded by its ecosystem's own loader where nothing of the run is left, draws the run's own picture.

    This project's loaders give the same numbers. The libraries' own did too where this was written, except for peft's
    adapter, which multiplies by the Kronecker product as a matrix (9e-7): 1e-5 is 390 times less than a level of 8 bits.
    """
    requests = [(loader, str(finished(name)[1] / what)) for loader, name, what in LOADED_BY]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    argv = [sys.executable, draw_tuned.__file__, str(tiny_model), str(tmp_path / "requests.json"), str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    @cache
    def own_pictures(name: str) -> tuple[np.ndarray, np.ndarray]:
        """The pictures by the run's UNet and by the untuned one."""
        tuning = finished(name)[2]
        quantization = tuning.outputs.system.quantization
        parts: dict = {part: load(tiny_model, part, frozen_format(quantization)) for part in ("vae", "text_encoder")}
        parts["tokenizer"] = load_tokenizer(tiny_model)
        unets = tuning.model.unet, load(tiny_model, "unet", quantization)
        tuned, untuned = (draw_tuned.draw(assemble_pipeline(tiny_model, unet=unet, **parts)) for unet in unets)
        return tuned, untuned

    for i, (loader, name, _) in enumerate(LOADED_BY):
        picture, (tuned, untuned) = np.load(tmp_path / f"{i}.npy"), own_pictures(name)
        assert np.abs(tuned - untuned).max() > 0.01, name  # three levels: the tuning shows
        assert np.abs(picture - tuned).max() <= (0 if loader in draw_tuned.OURS else 1e-5), (loader, name)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


PRIOR = dict(prior_preservation=True, num_class_images=2)


@pytest.mark.parametrize(("name", "more"), [("tuneqdm", {}), ("qlora", {}), ("dreambooth", {}), ("qlora", PRIOR)],
                         ids=["tuneqdm", "qlora", "dreambooth", "prior"])  # fmt: skip
def test_resumed_equals_uninterrupted(name, more, tiny_model, subject, tmp_path):
    """Bit for bit, and in the files' bytes: values, both moments, step counts of each expert, generator."""
    module, _, own, file = SYSTEMS[name]
    every = dict(checkpointing_steps=2, checkpoints_total_limit=0, eval_steps=2, num_eval_samples=1, **more)
    argv = {out: command(tiny_model, subject, tmp_path / out, **own, **every) for out in "ab"}
    assert run_cli(argv["a"], module) == 0
    stopped = [*argv["b"]]
    stopped[stopped.index("--max_train_steps") + 1] = "2"
    assert run_cli(stopped, module) == 0
    assert run_cli([*argv["b"], "--resume_from_checkpoint", "latest"], module) == 0
    file = f"{file}/diffusion_pytorch_model.safetensors" if name == "dreambooth" else file
    for left in (file, "training_log.csv", "checkpoint-4.safetensors"):
        assert (tmp_path / "a" / left).read_bytes() == (tmp_path / "b" / left).read_bytes(), left


def test_a_run_is_not_resumed_on_other_class_pictures(tiny_model, subject, tmp_path, capsys):
    """Nor if one is missing: the loss would continue as a different one."""
    argv = command(tiny_model, subject, tmp_path, checkpointing_steps=4, **PRIOR)
    assert run_cli(argv, trainers.qlora) == 0
    argv += ["--resume_from_checkpoint", "latest"]
    assert run_cli(argv, trainers.qlora) == 0
    first, second = sorted((tmp_path / "class_images").glob("*.png"))
    for change in (lambda: first.write_bytes(second.read_bytes()), lambda: first.unlink()):
        change()
        capsys.readouterr()
        assert run_cli(argv, trainers.qlora) == 2
        assert "the class pictures have changed" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_checkpoints_without_a_prior_know_of_none(tiny_model, subject, tmp_path):
    """So that those of earlier versions can be resumed."""
    assert run_cli(command(tiny_model, subject, tmp_path, checkpointing_steps=4), trainers.qlora) == 0
    header, _ = read_checkpoint(tmp_path / "checkpoint-4.safetensors")
    assert header["fingerprint"].keys() == {"images or captions", "model weights"}


def test_ctrl_c_saves(tiny_model, subject, tmp_path, monkeypatch, capsys):
    steps = []
    step = Tuning.step

    def interrupted_at_the_second(self):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Tuning, "step", interrupted_at_the_second)
    assert run_cli(command(tiny_model, subject, tmp_path, checkpointing_steps=0), trainers.qlora) == 130
    assert "interrupted and saved at step 2" in capsys.readouterr().err
    assert {"pytorch_lora_weights.safetensors", "sks.safetensors", "checkpoint-2.safetensors"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_previews_before_and_after(tiny_model, subject, tmp_path, capsys):
    argv = command(tiny_model, subject, tmp_path, validation_prompt="a {} in the snow", num_validation_images=1, save_steps=2)
    assert run_cli(argv, trainers.qlora) == 0
    said = capsys.readouterr().out
    assert "validation-0.png: 'a sks dog in the snow' before training" in said and "validation-4.png: 'a sks dog in" in said
    left = {path.name for path in tmp_path.iterdir()}
    assert {"validation-0.png", "validation-4.png", "pytorch_lora_weights-steps-2.safetensors", "sks-steps-2.safetensors"} <= left
    assert run_cli(argv, trainers.qlora) == 0  # an earlier run's results are set aside
    assert {path.name for path in (tmp_path / "previous-1").iterdir()} == left - {".lock"}


def test_ctrl_c_before_the_first_step_does_not_lose_the_first_pictures(tiny_model, subject, tmp_path, monkeypatch):
    argv = command(tiny_model, subject, tmp_path, num_validation_images=1, final_picture=True)

    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)
        raise Interrupted
        yield

    with monkeypatch.context() as patch:
        patch.setattr(TunedOutputs, "draw", interrupted)
        assert run_cli(argv, trainers.qlora) == 130
    assert json.loads((tmp_path / "run.json").read_text())["step"] == 0
    assert run_cli([*argv, "--resume_from_checkpoint", "latest"], trainers.qlora) == 0
    assert {"validation-0.png", "validation-4.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_disk_too_small_for_what_is_left_is_refused(tiny_model, subject, tmp_path, monkeypatch, capsys):
    """Before a model is loaded: DreamBooth's files are gigabytes, and a full disk used to be noticed only on writing them."""
    unet = 4 * sum(parameter.numel() for parameter in build_model(tiny_model, "unet").parameters())

    def run(free: int, **flags) -> tuple[int, str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        argv = command(tiny_model, subject, tmp_path / "out", save_precision="fp32", **flags)
        return run_cli(argv, trainers.dreambooth), capsys.readouterr().err

    checkpoint = 3 * unet  # weights and two moments
    for free, flags in ((unet - 1, {}), (2 * unet, dict(save_steps=2)), (3 * unet, dict(checkpointing_steps=2))):
        code, error = run(free, **flags)
        assert code == 2 and error.startswith("error: --output_dir") and "GB free" in error and error.count("\n") == 1, error
    assert list((tmp_path / "out").iterdir()) == []
    code, error = run(unet, max_train_steps=1)  # one is written only when interrupted
    assert code == 0 and f"could not save its checkpoint of {checkpoint / 1e9:.3g} GB" in error
    assert "could not save" not in run(5 * unet, max_train_steps=1)[1]


def test_only_the_expert_of_the_timestep_moves(tiny_model, subject, tmp_path):
    """After one step at t = 300 with N = 4 expert 1 has changed, and the others are the start's, bit for bit."""
    tuning = prepared("tuneqdm", tiny_model, subject, tmp_path)
    tuning.run.lock.release()
    before = {name: parameter.detach().clone() for name, parameter in tuning.tuner.parameters.items()}
    batch = noise_batch(
        tuning.data.latents[:1, 0], torch.tensor([300]), tuning.data.prompt_ids[:1], tuning.data.scheduler, seeded()
    )
    loss, forwards = tuning.tuner.step(tuning.model, batch, None, 1.0)
    assert loss > 0 and forwards == 1
    for name, parameter in tuning.tuner.parameters.items():
        assert torch.equal(parameter, before[name]) == (not name.endswith(".1")), name
        assert tuning.tuner.optimizer.state[parameter]["step"] == (1 if name.endswith(".1") else 0)


def test_fp32_of_a_gpu_is_not_rounded_to_tf32(tiny_model, subject, tmp_path):
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    prepared("qlora", tiny_model, subject, tmp_path).run.lock.release()
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_steps_are_adamw_on_two_means(tiny_model, subject, tmp_path, checkpointing):
    """Batches over several experts and the class's loss: gradients of one plain loss, clipped, then AdamW in its textbook form.

    Three steps, as in a first one bias correction cancels the betas; each expert counts only those in which it serves.
    """
    rate = 1e-3  # about the median scale; ten times this makes the model so wild that rounding grows beyond the tolerance
    given = dict(learning_rate=rate, gradient_checkpointing=checkpointing or None)
    tuning = prepared("tuneqdm", tiny_model, subject, tmp_path, **given)
    tuning.run.lock.release()
    data, unet, tuner = tuning.data, tuning.model.unet, tuning.tuner
    leaves = list(tuner.parameters.values())
    assert all(leaf.grad is None for leaf in leaves)

    def batch(timesteps: list[int], seed: int) -> Batch:
        count = len(timesteps)
        ids = data.prompt_ids[:1].expand(count, -1)
        return noise_batch(data.latents[:count, 0], torch.tensor(timesteps), ids, data.scheduler, seeded(seed))

    def plain_gradients(parts: list[tuple[Batch, float]]) -> tuple[float, list[torch.Tensor | None]]:
        """(loss, the gradient of each trained tensor, or None), one sample after the other."""
        total, sums = 0.0, {}
        for part, weight in parts:
            for i in range(2):
                one = Batch(*(tensor[i : i + 1] for tensor in part))
                latents = one.noisy_latents.to(memory_format=torch.channels_last)
                prediction = unet(latents, one.timesteps, tuning.model.states[one.prompt_ids[:, 0]]).sample
                loss = (prediction - one.target).square().mean() / 2 * weight
                for k, gradient in enumerate(torch.autograd.grad(loss, leaves, allow_unused=True)):
                    if gradient is not None:
                        sums[k] = sums.get(k, 0) + gradient
                total += loss.item()
        return total, [sums.get(k) for k in range(len(leaves))]

    expected = {name: leaf.detach().clone() for name, leaf in tuner.parameters.items()}
    first_moments, second_moments, steps = {}, {}, dict.fromkeys(expected, 0)
    # experts 1, 3, 0; then 2, 3, 0; then 1, 2, 0
    for k, timesteps in enumerate([([300, 800], [310, 20]), ([700, 800], [810, 20]), ([300, 700], [20, 310])]):
        photographs, pictures = batch(timesteps[0], 2 * k + 1), batch(timesteps[1], 2 * k + 2)
        total, gradients = plain_gradients([(photographs, 1.0), (pictures, 0.7)])
        norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
        for name, gradient in zip(expected, gradients, strict=True):
            if gradient is not None:
                gradient = gradient * min(1.0, 1.0 / (norm + 1e-6))
                t = steps[name] = steps[name] + 1
                first_moments[name] = 0.9 * first_moments.get(name, 0) + 0.1 * gradient
                second_moments[name] = 0.999 * second_moments.get(name, 0) + 0.001 * gradient.square()
                m, v = first_moments[name] / (1 - 0.9**t), second_moments[name] / (1 - 0.999**t)  # bias-corrected
                expected[name] = expected[name] * (1 - rate * 1e-2) - rate * m / (v.sqrt() + 1e-8)
        loss, forwards = tuner.step(tuning.model, photographs, pictures, 0.7)
        assert forwards == 3
        assert loss == pytest.approx(total, rel=1e-5)
    assert set(steps.values()) == {2, 3}
    for name, parameter in tuner.parameters.items():
        # a thousandth of a step; where a gradient is near 0, its sign, and so Adam's whole first step, is a matter of rounding
        off = (parameter - expected[name]).abs() > 1e-3 * rate
        assert off.float().mean() < 0.01, name


def test_the_loss_scale_cancels_out():
    """1024 is a power of two: in fp32 the steps are those without it, bit for bit. Gradients are shorter than 1, as clipping to
    that length would hide the factor, and each has another length, as Adam would hide a common factor."""
    results = []
    for scale in (1.0, 1024.0):
        parameter = nn.Parameter(torch.ones(4, 1, 1))
        tuner = WeightTuner(System(), {"weight": (4, 1, 1)}, 1e-2, scale)
        tuner.start({"weight": parameter})
        model = SimpleNamespace(predict=lambda batch, parameter=parameter: parameter * batch.noisy_latents)
        result = []
        for seed, size in enumerate((0.1, 0.3, 0.05)):
            latents, target = (size * torch.randn(1, 4, 2, 2, generator=seeded(seed + shift)) for shift in (0, 10))
            batch = Batch(latents, target, torch.tensor([500]), torch.tensor([[0]]))
            loss, _ = tuner.step(model, batch, None, 1.0)
            result += [torch.tensor(loss), parameter.grad.clone(), parameter.detach().clone()]
        assert all(0 < gradient.norm() < 1 for gradient in result[1::3])
        results.append(result)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(("precision", "scale"), [("fp16", 1024.0), ("bf16", 1.0), ("fp32", 1.0)])
def test_the_loss_is_scaled_for_fp16(precision, scale, tiny_model, subject, tmp_path):
    """Its gradients would vanish below 6e-8; the other formats have fp32's exponents."""
    tuning = prepared("qlora", tiny_model, subject, tmp_path, mixed_precision=precision)
    tuning.run.lock.release()
    assert tuning.tuner.scale == scale


@pytest.mark.parametrize(("given", "decayed"), [({}, [True, True]), (dict(scale_in_learning_rate=2e-2), [True, False])],
                         ids=["one rate", "own rate"])  # fmt: skip
def test_scales_with_a_rate_of_their_own_do_not_decay(given, decayed, tiny_model, subject, tmp_path):
    """AdamW pulls s_in towards 0, not 1. Without a gradient the decay, (1 - rate * .01) a step, is all that it does."""
    tuning = prepared("tuneqdm", tiny_model, subject, tmp_path, **given)
    tuning.run.lock.release()
    parameters = tuning.tuner.parameters
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    tuning.tuner.optimizer.step()
    for leaf, decays in zip((".scale_out.", ".scale_in."), decayed, strict=True):
        for name in (name for name in parameters if leaf in name):
            expected = before[name] * (1 - 1e-2 * 1e-2) if decays else before[name]
            # two roundings of fp32, of 6e-8 each; the decay is 1e-4
            torch.testing.assert_close(parameters[name].detach(), expected, rtol=2e-7 if decays else 0, atol=0)


def test_class_pictures_have_the_class_s_own_prompt(tiny_model, subject, tmp_path, monkeypatch):
    """A step's photographs come with the identifier, its class pictures without: as the stock encoder encodes these words."""
    folder = make_subject(tmp_path / "class", count=2, side=16)
    prior = dict(prior_preservation=True, num_class_images=2, class_data_dir=folder, train_batch_size=3)
    tuning = prepared("lora", tiny_model, subject, tmp_path / "out", **prior)
    tuning.run.lock.release()
    seen = []
    monkeypatch.setattr(tuning.tuner, "step", lambda model, *batches_and_weight: seen.extend(batches_and_weight[:2]))
    tuning.step()
    stock = stock_pipeline(tiny_model)
    for batch, prompt in zip(seen, ("a photo of sks dog", "a photo of dog"), strict=True):
        ids = stock.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            expected = stock.text_encoder(ids).last_hidden_state
        # fp32, encoded in another batch; the two prompts' states differ by more than 1
        states = tuning.model.states[batch.prompt_ids[:, 0]]
        torch.testing.assert_close(states, expected.expand(3, -1, -1), rtol=0, atol=1e-5)


def test_class_pictures_are_drawn_once(tiny_model, subject, tmp_path, capsys):
    prior = dict(prior_preservation=True, num_class_images=2, class_data_dir=tmp_path / "class", max_train_steps=2, eval_steps=1,
                 num_eval_samples=1)  # fmt: skip
    assert run_cli(command(tiny_model, subject, tmp_path / "a", **prior), trainers.qlora) == 0
    pictures = sorted((tmp_path / "class").glob("*.png"))
    assert [path.name for path in pictures] == ["class-0000.png", "class-0001.png"]
    header = (tmp_path / "a" / "training_log.csv").read_text().splitlines()[0]
    assert header.endswith("eval_loss,class_eval_loss")  # the two losses separately
    stamps = [path.stat().st_mtime_ns for path in (*pictures, tmp_path / "class" / "class_latents.safetensors")]
    assert run_cli(command(tiny_model, subject, tmp_path / "b", **prior), trainers.qlora) == 0
    assert stamps == [path.stat().st_mtime_ns for path in (*pictures, tmp_path / "class" / "class_latents.safetensors")]
    capsys.readouterr()
    assert run_cli(command(tiny_model, subject, tmp_path / "c", **{**prior, "class_word": "cat"}), trainers.qlora) == 2
    assert "--class_data_dir" in (error := capsys.readouterr().err) and "a photo of dog" in error and error.count("\n") == 1
    assert run_cli(command(tiny_model, subject, tmp_path / "d", bits=4, **prior), trainers.tuneqdm) == 2  # NF4 is not int4
    assert "quantization was 'nf4', is 'affine4'" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_class_pictures_in_a_folder_that_may_only_be_read(tiny_model, subject, tmp_path, monkeypatch):
    """The user's own pictures are enough; that what is encoded cannot be kept beside them costs time, not the run."""
    folder = make_subject(tmp_path / "class", count=2, side=16)

    def refuse(path, content):
        raise InputError(f"{path}: cannot be written")

    monkeypatch.setattr(zoodip.prior, "write_atomically", refuse)
    prior = dict(prior_preservation=True, num_class_images=2, class_data_dir=folder, max_train_steps=1, eval_steps=0)
    assert run_cli(command(tiny_model, subject, tmp_path / "out", **prior), trainers.qlora) == 0
    assert not (folder / "class_latents.safetensors").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"prompt": "a photo'], ids=["empty", "list", "cut off"])
def test_a_damaged_record_of_class_pictures_is_no_damaged_download(content, tmp_path):
    (tmp_path / "class_pictures.json").write_text(content)
    with pytest.raises(InputError, match="class_pictures.json: is damaged.*remove it and.*--class_data_dir") as error:
        PriorPictures(tmp_path, 2, {})
    assert "download" not in str(error.value)


def test_a_class_picture_is_the_untuned_model_s(tiny_model, subject, tmp_path):
    """As the libraries' pipeline draws the class word alone in 50 steps, guided by 7.5; a record says how it was drawn."""
    from diffusers import DPMSolverMultistepScheduler

    prior = dict(prior_preservation=True, num_class_images=1, max_train_steps=1)
    assert run_cli(command(tiny_model, subject, tmp_path, **prior), trainers.qlora) == 0
    record = json.loads((tmp_path / "class_images" / "class_pictures.json").read_text())
    drawn = {name: record[name] for name in ("prompt", "steps", "scheduler", "guidance")}
    assert drawn == dict(prompt="a photo of dog", steps="50", scheduler="dpmsolver++", guidance="7.5")
    pipeline = load_pipeline(str(tiny_model), "nf4")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    size = dict(height=16, width=16)
    expected = pipeline("a photo of dog", num_inference_steps=50, guidance_scale=7.5, generator=seeded(0), **size).images[0]
    found = Image.open(tmp_path / "class_images" / "class-0000.png")
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 2  # of 255: prompts encoded in another batch


# ---------------------------------------------------------------------------------------------------------------------
# Words and flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "experts"), [
    (dict(), 4), (dict(train_interval=(500, 900)), 1), (dict(experts=2), 2), (dict(train_interval=(500, 900), experts=1), 1),
])  # fmt: skip
def test_the_number_of_experts(given, experts):
    """S1 has one set of scales: giving only its interval implies that. The number is settled, and recorded as such."""
    assert trainers.tuneqdm.parse_args(command(Path("x"), Path("y"), Path("z"), **given)).experts == experts


@pytest.mark.parametrize(("bits", "given", "rate"), [(8, None, 3e-6), (4, None, 5e-5), (4, 1e-3, 1e-3)])
def test_the_rate_is_that_of_the_bits(bits, given, rate):
    """Scales of 4 bits are 17 times as large; the published rates differ as much. The rate is settled, and recorded as such."""
    argv = command(Path("x"), Path("y"), Path("z"), bits=bits, learning_rate=given)
    assert trainers.tuneqdm.parse_args(argv).learning_rate == rate


@pytest.mark.parametrize(("interval", "more", "told"), [
    ((0, 500), {}, True), ((900, 1000), {}, True), ((0, 501), {}, False), ((0, 250), dict(t_min=0, t_max=250), False),
    ((0, 500), dict(apply="everywhere"), False), ((0, 500), dict(eval_steps=0), False),
])  # fmt: skip
def test_an_interval_that_is_never_evaluated_is_told(interval, more, told):
    """Outside its interval S1 uses the untuned scales, so that eval_loss would be a constant."""
    argv = command(Path("x"), Path("y"), Path("z"), train_interval=interval, **(dict(eval_steps=1) | more))
    lines = notices_of(trainers.tuneqdm, argv)
    assert any(line.startswith(f"--train_interval {interval[0]} {interval[1]} is outside") for line in lines) == told


@pytest.mark.parametrize(("module", "flags", "needed"), [
    (trainers.tuneqdm, {}, "8-bit integers"), (trainers.tuneqdm, dict(bits=4), "4-bit integers"),
    (trainers.qlora, dict(base="none"), "unpacked weights"), (trainers.dreambooth, {}, "unpacked weights"),
])  # fmt: skip
def test_a_model_packed_for_another_system_is_refused(module, flags, needed, packed, subject, tmp_path, capsys):
    """In one line, before anything is loaded or written; QLoRA itself trains on the packed folder."""
    assert run_cli(command(packed, subject, tmp_path / "out", **flags), module) == 2
    error = capsys.readouterr().err
    assert "are packed as nf4" in error and needed in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    if module is trainers.qlora:
        assert run_cli(command(packed, subject, tmp_path / "out"), module) == 0


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory) -> Path:
    """The tiny model as --save_quantized writes it."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    argv = ["--pretrained_model_name_or_path", str(tiny_model), "--save_quantized", str(folder), "--cpu"]
    assert run_cli(argv, train_zoodip) == 0
    return folder


@pytest.mark.parametrize("module", [trainers.tuneqdm, trainers.qlora, trainers.diffusekrona, trainers.dreambooth])
def test_help_speaks_of_the_pictures_that_are_drawn(module):
    """A weight-tuning script leaves no before_after.png, and learns no new word."""
    text = " ".join(module.build_parser().format_help().split())
    assert "validation-0.png" in text and "before_after" not in text and "new word" not in text and "initial word" not in text
    assert "before_after.png" in " ".join(train_zoodip.build_parser().format_help().split())


def test_captions_in_words():
    assert in_words("a photo of {}", "sks", "dog") == "a photo of sks dog"
    assert in_words("a {} dog in the snow", "sks", "dog") == "a sks dog in the snow"  # not "sks dog dog"
    assert in_words("a {} catching a ball", "sks", "cat") == "a sks cat catching a ball"
    assert in_words("a {} cat, asleep", "sks", "cat") == "a sks cat, asleep"
    assert in_words("two {} dogs", "sks", "dog") == "two sks dogs"
    assert in_words("a {} doghouse", "sks", "dog") == "a sks dog doghouse"


@each("tuneqdm", "s1")
def test_casting_a_pipeline_leaves_the_scales(trained, tiny_model):
    """They stay fp32 as the base's own scales do, so that `pipeline.to(torch.float16)` rounds activations only."""
    unet = load_tuned_pipeline(str(tiny_model), trained[1] / "tuned_scales.safetensors").unet
    before = {name: parameter.clone() for name, parameter in unet.named_parameters() if ".scale_" in name}
    unet.to(torch.float16)
    assert unet.conv_in.weight.dtype == torch.float16
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters() if name in before)
    layer = next(module for module in unet.modules() if isinstance(module, ScaledLayer))
    assert layer.scale_out[0].dtype == torch.float32


@each("peqa")
def test_scales_of_other_programs_need_no_interval(trained, tiny_model, tmp_path):
    """Settings without train_interval and apply, as another writer of such files may leave them, mean all timesteps."""
    file = read_tuned(trained[1] / "tuned_scales.safetensors")
    kept = {name: value for name, value in json.loads(file.header["zoodip.settings"]).items() if name == "identifier"}
    save_file(file.tensors, tmp_path / "scales.safetensors", {**file.header, "zoodip.settings": json.dumps(kept)})
    pipeline = load_tuned_pipeline(str(tiny_model), tmp_path / "scales.safetensors")
    assert torch.equal(predict(pipeline.unet, 100), predict(trained[2].model.unet, 100))


def test_class_pictures_are_drawn_in_the_precision_of_training(tiny_model, subject, tmp_path, monkeypatch):
    """DreamBooth's weights are fp32 whatever the activations are: drawing 200 pictures must use what steps and previews use."""
    seen = []

    def draw(self, *args):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return own(self, *args)

    own = PriorPictures.draw
    monkeypatch.setattr(PriorPictures, "draw", draw)
    for precision in ("bf16", "fp32"):
        flags = dict(prior_preservation=True, num_class_images=1, max_train_steps=1, mixed_precision=precision)
        assert run_cli(command(tiny_model, subject, tmp_path / precision, **flags), trainers.dreambooth) == 0
    assert seen == [torch.bfloat16, None]


WRONG = [
    (trainers.tuneqdm, dict(experts=0), "--experts"),
    (trainers.tuneqdm, dict(bits=3), "--bits"),
    (trainers.tuneqdm, dict(train_interval=(500, 1001)), "--train_interval"),
    (trainers.tuneqdm, dict(train_interval=(900, 500)), "--train_interval"),
    (trainers.tuneqdm, dict(experts=2, train_interval=(500, 900)), "--experts"),
    (trainers.tuneqdm, dict(experts=1, train_interval=(500, 900), timestep_sampling="puts"), "--train_interval"),
    (trainers.tuneqdm, dict(no_scale_in=True, scale_in_learning_rate=1e-3), "--scale_in_learning_rate"),
    (trainers.diffusekrona, dict(a1=3), "--a1 must divide"),
    (trainers.diffusekrona, dict(a1=0), "--a1"),
    (trainers.diffusekrona, dict(a1=2, a2=5), "--a2 must divide"),
    (trainers.diffusekrona, dict(export_merged="x"), "--base none"),
    (trainers.qlora, dict(rank=0), "--rank"),
    (trainers.qlora, dict(class_word=None), "--class_word is required"),
    (trainers.qlora, dict(identifier="{}"), "--identifier"),
    (trainers.qlora, dict(instance_prompt="a photo"), "--instance_prompt"),
    (trainers.qlora, dict(validation_prompt="a dog"), "--validation_prompt"),
    (trainers.qlora, dict(class_word="dog " * 80), "tokens long"),
    (trainers.qlora, dict(prior_loss_weight=0), "--prior_loss_weight"),
    (trainers.dreambooth, dict(learning_rate=-1), "--learning_rate"),
    (trainers.dreambooth, dict(num_class_images=0), "--num_class_images"),
]


def test_class_pictures_stay_apart(subject, tmp_path, capsys):
    """200 pictures of the class were drawn among the photographs, and the next run would have learned from them."""
    for name, folder in dict(train_data_dir=subject, output_dir=tmp_path / "out").items():
        argv = command(tmp_path / "model", subject, tmp_path / "out", prior_preservation=True, class_data_dir=folder)
        assert run_cli(argv, trainers.qlora) == 2
        assert f"--class_data_dir must not be --{name}" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "flags", "named"), WRONG, ids=[f"{m.__name__[9:]}-{list(f)[-1]}" for m, f, _ in WRONG])
def test_wrong_flags_are_one_line(module, flags, named, tiny_model, subject, tmp_path, capsys):
    assert run_cli(command(tiny_model, subject, tmp_path / "out", **flags), module) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error, error
    assert not (tmp_path / "out").exists()


def test_a_run_is_resumed_as_itself_alone(tiny_model, subject, tmp_path, capsys):
    assert run_cli(command(tiny_model, subject, tmp_path, checkpointing_steps=4), trainers.qlora) == 0
    for module, more, named in ((trainers.qlora, dict(rank=3), "--rank"), (trainers.diffusekrona, dict(a1=2, a2=4), "method")):
        argv = command(tiny_model, subject, tmp_path, resume_from_checkpoint="latest", **more)
        capsys.readouterr()
        assert run_cli(argv, module) == 2
        assert named in (error := capsys.readouterr().err) and "is from another" in error and error.count("\n") == 1
