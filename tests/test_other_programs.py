"""The embedding's copy for other programs, read by each program's rule; and training that starts from such a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import arguments, make_model, run_cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# Each rule as in the program's source, reduced to the case of a file with one tensor:
# {tensors} -> (vectors [V, d], the width by which the program distinguishes Stable Diffusion 1 from 2).


def automatic1111(file: dict[str, torch.Tensor]):
    """textual_inversion.py, create_embedding_from_data: one tensor whatever its key; Forge has the same function."""
    assert "string_to_param" not in file and not {"clip_g", "clip_l"} <= set(file)
    assert len(file) == 1, "embedding file has multiple terms in it"
    vectors = next(iter(file.values()))
    vectors = vectors.unsqueeze(0) if vectors.dim() == 1 else vectors
    return vectors, vectors.shape[-1]


def comfyui(file: dict[str, torch.Tensor]):
    """sd1_clip.py, load_embed: the first tensor, of one or two dimensions."""
    assert "string_to_param" not in file
    vectors = next(iter(file.values()))
    return vectors.reshape(-1, vectors.shape[-1]), vectors.shape[-1]


def invokeai(file: dict[str, torch.Tensor]):
    """model_probe.py and textual_inversion.py: the last dimension under emb_params, the first under a key it does not know."""
    if "emb_params" in file:
        return file["emb_params"], file["emb_params"].shape[-1]
    unknown = next(iter(file.values()))
    return unknown, unknown.shape[0]


def diffusers(file: dict[str, torch.Tensor]):
    """loaders/textual_inversion.py: one key, which is the token."""
    assert len(file) == 1
    (vectors,) = file.values()
    return vectors, vectors.shape[-1]


@pytest.fixture(scope="module", params=[1, 2], ids=["one_vector", "two_vectors"])
def learned(tiny_model, subject, tmp_path_factory, request) -> Path:
    output = tmp_path_factory.mktemp("learned")
    flags = dict(max_train_steps=3, eval_steps=0, num_vectors=request.param, placeholder_token="<my-dog>")
    assert run_cli(arguments(tiny_model, subject, output, **flags)) == 0
    return output


@pytest.mark.parametrize("program", [automatic1111, comfyui, invokeai, diffusers])
def test_every_program_reads_the_copy(learned, program):
    """InvokeAI used to take the number of vectors for the width."""
    theta = load_file(learned / "learned_embeds.safetensors")["<my-dog>"]
    vectors, width = program(load_file(learned / "my-dog.safetensors"))
    assert torch.equal(vectors, theta) and width == theta.shape[1] == 32


def test_keys_and_headers(learned):
    headers = []
    for name, key in (("learned_embeds", "<my-dog>"), ("my-dog", "emb_params")):
        with safe_open(learned / f"{name}.safetensors", framework="pt") as handle:
            assert list(handle.keys()) == [key]
            headers.append(handle.metadata())
    assert headers[0] == headers[1]


@pytest.mark.parametrize("token, warned", [("<dog>", True), ("<my-dog>", False), ("<sks>", False), ("<grass>", True)])
def test_a_word_that_people_write_is_warned_of(tiny_model, subject, tmp_path, capsys, token, warned):
    flags = dict(max_train_steps=1, eval_steps=0, placeholder_token=token)
    assert run_cli(arguments(tiny_model, subject, tmp_path / "out", **flags)) == 0
    said = capsys.readouterr().err
    assert (f"<my-{token[1:-1]}>" in said) == warned and ("ordinary word" in said) == warned


# ----------------------------------------------------------------------------------------------------- starting from a file


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "my-dog.safetensors"])
def test_training_starts_from_the_vectors_of_a_file(learned, tiny_model, subject, tmp_path, name):
    """Any number of vectors, any key; the record names the file without its folder."""
    from zoodip.diffusion import read_inputs

    theta = load_file(learned / "learned_embeds.safetensors")["<my-dog>"]
    start = str(learned / name)
    inputs = read_inputs(train_data_dir=subject, pretrained_model_name_or_path=str(tiny_model), placeholder_token="<sks>",
                         initializer_token=start)  # fmt: skip
    assert torch.equal(inputs.initial_token, theta)

    output = tmp_path / "out"
    flags = dict(initializer_token=start, max_train_steps=1, learning_rate=1e-30, eval_steps=0)
    assert run_cli(arguments(tiny_model, subject, output, **flags)) == 0
    assert torch.equal(load_file(output / "learned_embeds.safetensors")["<sks>"], theta)  # steps of 1e-30 round away
    settings = json.loads((output / "run.json").read_text())["settings"]
    assert settings["initializer_token"] == name and settings["num_vectors"] == len(theta)


def test_files_that_training_cannot_start_from(learned, tiny_model, subject, tmp_path, capsys):
    wide = make_model(tmp_path / "wide", width=64)
    other = tmp_path / "two.safetensors"
    save_file({"a": torch.zeros(1, 32), "b": torch.zeros(1, 32)}, other)
    pickle = tmp_path / "old.pt"
    torch.save({"x": torch.zeros(1, 32)}, pickle)
    vectors = len(load_file(learned / "my-dog.safetensors")["emb_params"])
    cases = [
        (dict(initializer_token=learned / "my-dog.safetensors"), wide, "32 numbers, but this model's words have 64"),
        (dict(initializer_token=tmp_path / "none.safetensors"), tiny_model, "there is no file"),
        (dict(initializer_token=other), tiny_model, "2 tensors"),
        (dict(initializer_token=pickle), tiny_model, "pickle"),
        (dict(initializer_token=learned / "my-dog.safetensors", num_vectors=5), tiny_model, f"holds {vectors}"),
    ]
    for flags, model, reason in cases:
        assert run_cli(arguments(model, subject, tmp_path / "out", **flags)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert reason in line and not (tmp_path / "out").exists()
