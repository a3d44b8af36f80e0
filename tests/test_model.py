"""Reading a model folder: equal to from_pretrained, in every published layout, with clear errors if it cannot be read."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments, run_cli
from safetensors.torch import load_file, save_file
from tiny import PARTS, assert_same, from_pretrained, load, rewrite, weights_of
from torch import nn

from zoodip.errors import DamagedModel, InputError, damaged_model
from zoodip.folder import WEIGHT_NAMES, download_model, find_model_folder
from zoodip.model import load_pipeline, settle_threads
from zoodip.prompts import build_prompts, encode_prompts, load_tokenizer, read_embedding_rows
from zoodip.quantize import QuantizedLayer


@pytest.mark.parametrize("part", PARTS)
def test_unquantised_equals_from_pretrained(tiny_model, part):
    """Bit for bit, frozen, without dropout, including the buffers that no file holds."""
    model = load(tiny_model, part)
    assert_same(model, from_pretrained(tiny_model, part))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_every_linear_and_convolution_is_quantised(tiny_model, part, quantization):
    """diffusers' own quantiser leaves every convolution, two thirds of the UNet, in 16 bits."""
    model, reference = load(tiny_model, part, quantization, torch.float16), from_pretrained(tiny_model, part)
    expected = {name: module for name, module in reference.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if part == "unet":
        del expected["conv_in"], expected["conv_out"]
        assert isinstance(model.conv_in, nn.Conv2d) and isinstance(model.conv_out, nn.Conv2d)
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    assert set(found) == set(expected)
    assert any(isinstance(module, nn.Conv2d) for module in expected.values()) or part == "text_encoder"
    assert all(parameter.dtype == torch.float16 for parameter in model.parameters())  # biases, norms, embeddings
    assert not any(parameter.requires_grad for parameter in model.parameters())
    low, high = (0.05, 0.12) if quantization == "nf4" else (0.001, 0.015)  # 9.1 % and 0.9 % for normal weights
    for name, layer in found.items():
        weight = expected[name].weight
        error = (layer.dequantize().float() - weight).abs().mean() / weight.abs().mean()
        assert low < error < high or weight.numel() < 300, name
        bias = expected[name].bias
        assert (bias is None) == (layer.bias is None)
        assert bias is None or torch.equal(layer.bias, bias.half())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_bytes_of_the_packed_unet(tiny_model, quantization):
    """Weights left in 16 bits or packed badly show in the bytes per weight: 4 bits, and a scale of 32 bits for each 64."""
    model, packed, weights = load(tiny_model, "unet", quantization, torch.float16), 0, 0
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            weights += layer.shape.numel()
            packed += sum(buffer.nbytes for buffer in layer.buffers())
    assert weights > 0.9 * sum(parameter.numel() for parameter in from_pretrained(tiny_model, "unet").parameters())
    # 4.5 bits; small layers waste part of a block of 64. int8: rows of 16 and up
    low, high = (0.5624, 0.58) if quantization == "nf4" else (1.0, 1.1)
    assert low < packed / weights < high


@pytest.mark.parametrize("part", PARTS)
def test_quantised_output_is_near(tiny_model, part):
    """A layer replaced by the wrong one would not compute nearly the same."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "unet": (torch.randn(2, 4, 8, 8, generator=generator), 500, torch.randn(2, 77, 32, generator=generator)),
        "vae": (torch.randn(1, 3, 16, 16, generator=generator),),
        "text_encoder": (torch.arange(77)[None],),
    }[part]
    with torch.no_grad():
        exact, int8, nf4 = (load(tiny_model, part, q)(*inputs)[0] for q in ("none", "int8", "nf4"))
    # relative to the output's size: 0.9 % and 9 % per layer, adding up over some tens of layers
    assert (int8 - exact).norm() < 0.05 * exact.norm()
    assert (nf4 - exact).norm() < 0.4 * exact.norm()
    assert (int8 - exact).norm() < (nf4 - exact).norm()


def test_skip_leaves_out_exactly_the_named(tiny_model):
    """Training holds neither the decoder nor the table of 49408 words."""
    vae = load(tiny_model, "vae", skip=("decoder.", "post_quant_conv."))
    for name, parameter in vae.named_parameters():
        assert (parameter.numel() == 0) == name.startswith(("decoder.", "post_quant_conv.")), name


# --- published layouts ---


def old_text_names(tensors):
    renamed = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    return {**renamed, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def old_vae_names(tensors, convolutions: bool):
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            if new in name:
                name = name.replace(new, old)
                tensor = tensor[:, :, None, None] if convolutions and tensor.ndim == 2 else tensor
        renamed[name] = tensor
    assert sum(".query." in name for name in renamed) == 4  # weight and bias, encoder and decoder
    return renamed


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("part", "change"), [
    ("text_encoder", old_text_names),
    ("text_encoder", lambda tensors: {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}),
    ("vae", lambda tensors: old_vae_names(tensors, False)),
    ("vae", lambda tensors: old_vae_names(tensors, True)),
], ids=["text_model.", "bare", "query", "query-1x1"])  # fmt: skip
def test_old_names(tiny_model, copy, part, change, quantization):
    """Stable Diffusion v1.5 is published under names that the installed libraries no longer use."""
    rewrite(copy, part, change)
    assert_same(load(copy, part, quantization), load(tiny_model, part, quantization))
    if part == "text_encoder":
        assert torch.equal(read_embedding_rows(copy, None, [5, 2]), read_embedding_rows(tiny_model, None, [5, 2]))


@pytest.mark.parametrize("part", PARTS)
def test_fp16_variant(tiny_model, copy, part):
    """--variant fp16 reads *.fp16.safetensors; without it that folder is refused with a hint."""
    rewrite(copy, part, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    path = weights_of(copy, part)
    path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    model = load(copy, part, dtype=torch.float16, variant="fp16")
    assert_same(model, from_pretrained(tiny_model, part).half())
    with pytest.raises(InputError, match=rf"{part}: {path.stem}.safetensors is missing .*fp16.*--variant"):
        load(copy, part)


def shard(folder: Path, part: str, variant: str | None = None) -> list[Path]:
    """Split the weights into two files with an index, under the libraries' own names."""
    path, stem = weights_of(folder, part), WEIGHT_NAMES[part]
    tensors = load_file(path)
    path.unlink()
    middle = f".{variant}" if variant else ""
    names, index, shards = sorted(tensors), {}, []
    for i in range(2):
        shards.append(folder / part / f"{stem}{middle}-0000{i + 1}-of-00002.safetensors")
        chosen = {name: tensors[name] for name in names[i::2]}
        save_file(chosen, shards[-1], {"format": "pt"})
        index |= dict.fromkeys(chosen, shards[-1].name)
    index_name = f"{stem}.safetensors.index{middle}.json"
    (folder / part / index_name).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return shards


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("part", PARTS)
def test_shards(tiny_model, copy, part, variant):
    """Large models come in several files with an index."""
    shards = shard(copy, part, variant)
    assert_same(load(copy, part, variant=variant), from_pretrained(tiny_model, part))
    if part == "text_encoder":
        assert read_embedding_rows(copy, variant, [3]).shape == (1, 32)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"{part}: the shards {shards[1].name} are missing"):
        load(copy, part, variant=variant)


PUBLISHED = [f"{part}/{name}" for part in PARTS for stem in [WEIGHT_NAMES[part]] for name in (
    f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin", f"{stem}.fp16.bin",
    f"{stem}-00001-of-00002.safetensors", f"{stem}.safetensors.index.json",
    f"{stem}.fp16-00001-of-00002.safetensors", f"{stem}.safetensors.index.fp16.json",
)] + ["v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "safety_checker/model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_is_downloaded(monkeypatch, tmp_path, variant):
    """Everything that is read, including a variant's shards, but neither pickles nor gigabytes that are not needed."""
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or tmp_path)
    assert download_model("someone/sd", "main", variant) == tmp_path
    assert asked["name"] == "someone/sd" and asked["revision"] == "main"
    got = {name for name in PUBLISHED if any(fnmatch.fnmatch(name, p) for p in asked["allow_patterns"])}
    middle = f".{variant}" if variant else ""
    needed = {
        f"{part}/{name}"
        for part in PARTS
        for stem in [WEIGHT_NAMES[part]]
        for name in (
            f"{stem}{middle}.safetensors",
            f"{stem}{middle}-00001-of-00002.safetensors",
            f"{stem}.safetensors.index{middle}.json",
        )
    }
    assert needed <= got
    assert not any(name.endswith((".bin", ".ckpt")) or "/" not in name or "safety" in name for name in got)


# --- what cannot be read ---


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("part", "change", "message"), [
    ("unet", lambda t: {k: v for k, v in t.items() if k != "conv_in.bias"}, "lack 'conv_in.bias'"),
    ("unet", lambda t: {k: v for k, v in t.items() if not k.endswith("attn2.to_k.weight")}, "lack .*to_k.weight"),
    ("unet", lambda t: {**t, "extra.weight": torch.zeros(2)}, "hold 'extra.weight', which config.json does not"),
    ("unet", lambda t: {**t, "conv_in.more": torch.zeros(2)}, "hold 'conv_in.more'"),
    ("unet", lambda t: {**t, "conv_out.bias": torch.zeros(5)}, r"conv_out.bias is \(5,\), but config.json says \(4,\)"),
    ("vae", lambda t: {**t, "decoder.conv_out.weight": torch.zeros(3)}, "decoder.conv_out.weight is"),
    ("text_encoder", lambda t: {k: v for k, v in t.items() if "final_layer_norm" not in k}, "lack .*final_layer_norm"),
], ids=["missing", "missing-many", "unexpected", "unexpected-leaf", "shape", "shape-vae", "missing-text"])  # fmt: skip
def test_configuration_and_weights_that_disagree(copy, part, change, message, quantization):
    """Half a model must not be trained on silently."""
    rewrite(copy, part, change)
    with pytest.raises(InputError, match=rf"{part}: .*{message}"):
        load(copy, part, quantization)


def test_a_transposed_matrix_is_not_reshaped(copy):
    """Only trailing 1 x 1 axes may differ: the same number of values in another shape is another layer."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"  # (16, 32)
    rewrite(copy, "unet", lambda t: {**t, name: t[name].T})
    with pytest.raises(InputError, match=r"to_k.weight is \(32, 16\), but config.json says \(16, 32\)"):
        load(copy, "unet")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", [0, 5, 3000, -100])
def test_truncated_file(copy, part, size):
    """An interrupted download; the text encoder's table is read on another path, with the same message."""
    path = weights_of(copy, part)
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(InputError, match=f"{path.name}.*download"):
        load(copy, part)
    if part == "text_encoder":
        with pytest.raises(InputError, match=f"{path.name}.*download"):
            read_embedding_rows(copy, None, [1])


@pytest.mark.parametrize("part", PARTS)
def test_a_pickle_is_never_read(copy, part, tmp_path):
    """A .bin can run code when loaded; it is refused by name, with the remedy."""
    path = weights_of(copy, part)
    path.unlink()
    marker = tmp_path / "executed"
    path.with_suffix(".bin").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(InputError, match=f"{part}: .*{path.stem}.bin.*only safetensors is read, never a pickle"):
        find_model_folder(str(copy))
    assert not marker.exists()


@pytest.mark.parametrize("missing", ["model_index.json", "tokenizer", "unet/config.json", "vae", "scheduler",
                                     "text_encoder/model.safetensors"])  # fmt: skip
def test_incomplete_folder(copy, missing):
    """Found before anything is loaded, and named."""
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=rf"{missing.split('/')[-1]}.* is missing"):
        find_model_folder(str(copy))


@pytest.mark.parametrize("file", ["unet/config.json", "text_encoder/config.json", "vae/config.json",
                                  "unet/diffusion_pytorch_model.safetensors.index.json"])  # fmt: skip
def test_broken_json(copy, file):
    """Truncated JSON of a download must not be a traceback."""
    if "index" in file:
        weights_of(copy, "unet").unlink()
    (copy / file).write_text('{"a": ')
    with pytest.raises(InputError, match=file.split("/")[-1]):
        find_model_folder(str(copy))
        load(copy, file.split("/")[0])


@pytest.mark.parametrize("kind", ["inpainting", "sdxl"])
def test_models_of_another_kind(copy, subject, tmp_path, capsys, kind):
    """Nine input channels, or a second text encoder: refused by name, not with a traceback from the first forward."""
    if kind == "inpainting":
        config = json.loads((copy / "unet" / "config.json").read_text())
        (copy / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
        rewrite(copy, "unet", lambda t: {**t, "conv_in.weight": torch.zeros(16, 9, 3, 3)})
    else:
        shutil.copytree(copy / "text_encoder", copy / "text_encoder_2")
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    assert run_cli(arguments(copy, subject, tmp_path / "out")) == 2
    assert str(copy) in capsys.readouterr().err.splitlines()[-1]


# --- what is made of it ---


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_load_pipeline_takes_a_textual_inversion(tiny_model, tmp_path, quantization):
    """The quantised pipeline must draw, and give the learned word the states that training gave it."""
    token = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    save_file({"<sks>": token}, tmp_path / "x.safetensors")
    pipeline = load_pipeline(str(tiny_model), quantization)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(tmp_path / "x.safetensors")
    states, _ = pipeline.encode_prompt("a photo of <sks>", "cpu", 1, False)
    tokenizer = load_tokenizer(tiny_model, "<sks>", 2)
    prompts = build_prompts(tokenizer, tiny_model, None, ["a photo of {}"], "<sks>", 2)
    encoder = load(tiny_model, "text_encoder", quantization)
    with torch.no_grad():
        expected = encode_prompts(encoder, prompts.rows, prompts.ids, token[None])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)  # fp32, the same sums
    pictures = [
        pipeline(text, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for text in ("a photo of <sks>", "a photo of dog")
    ]
    assert pictures[0].shape == (1, 16, 16, 3) and not np.array_equal(*pictures)


def test_a_small_model_on_a_cpu_has_one_thread(monkeypatch):
    """Unless the environment asks for more; a large model, or one on a GPU, keeps the threads it has."""
    before = torch.get_num_threads()
    small, large = nn.Linear(10, 10, device="meta"), nn.Linear(20_000, 20_000, device="meta")
    try:
        for unet, device, wanted, expected in (
            (small, "cpu", None, 1), (small, "cpu", "2", 2), (large, "cpu", None, 2), (small, "cuda", None, 2),
        ):  # fmt: skip
            torch.set_num_threads(2)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if wanted is not None:
                monkeypatch.setenv("OMP_NUM_THREADS", wanted)
            settle_threads(unet, device)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_fault_of_the_gpu_is_not_told_by_the_folder_s_name(tmp_path):
    """A driver's error is no fault of the files, but a folder may well be called after a GPU."""
    folder = tmp_path / "cuda" / "sd"
    with pytest.raises(DamagedModel, match="cuda/sd"), damaged_model(folder):
        raise OSError(f"Can't load tokenizer for '{folder}'")
    with pytest.raises(RuntimeError, match="illegal memory access"), damaged_model(folder):
        raise RuntimeError(f"CUDA error: an illegal memory access was encountered, loading {folder}")
