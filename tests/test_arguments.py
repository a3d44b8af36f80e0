"""What the user gives: refused early, in one line that names the flag, the value and the remedy."""

from __future__ import annotations

import argparse
import errno
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, arguments, make_subject, run_cli
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_zoodip as z


@pytest.fixture
def refused(capsys, tiny_model, subject, tmp_path):
    """Runs a command line and checks that it is refused in the house's manner; returns the line."""

    def check(*, argv: list[str] | None = None, model=tiny_model, data=subject, output_dir=tmp_path / "out", **flags) -> str:
        code = run_cli(arguments(model, data, output_dir, **flags) if argv is None else argv)
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == "" and "Traceback" not in captured.err
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return check


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


def test_placeholder_that_is_a_word_ending(tiny_model, refused):
    """A token of the vocabulary in its word-ending form only is the same word to the tokenizer."""
    vocabulary = z.load_tokenizer(tiny_model, "<sks>", 1).get_vocab()
    assert "€</w>" not in vocabulary  # while byte symbols exist in both forms:
    assert "£</w>" in vocabulary
    assert "already a word" in refused(placeholder_token="£")


def test_required_flags(refused):
    assert "--train_data_dir" in refused(argv=[])
    assert "--initializer_token" in refused(argv=["--train_data_dir", "x"])
    assert "--initializer_token" in refused(argv=["--train_data_dir", "x", "--save_quantized", "y"])
    assert z.parse_args(["--save_quantized", "y"]).train_data_dir is None  # packing alone needs no pictures
    assert "--quantization" in refused(argv=["--save_quantized", "y", "--quantization", "none"])


def test_folders(refused, tmp_path):
    """Missing, empty, a file instead of a folder."""
    assert "'nowhere'" in refused(data="nowhere") and "--train_data_dir" in refused(data="nowhere")
    (tmp_path / "empty").mkdir()
    line = refused(data=tmp_path / "empty")
    assert "no images" in line and str(tmp_path / "empty") in line
    folder = make_subject(tmp_path / "dog")
    assert "there is no folder" in refused(data=folder / "00.png")
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:200])
    assert "01.png" in refused(data=folder)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_output_folder_that_cannot_be(refused, tmp_path, place):
    """Found before hours of training, not when the first file is saved."""
    (tmp_path / "file").write_text("in the way")
    line = refused(output_dir=tmp_path / place)
    assert "--output_dir" in line and str(tmp_path / place) in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_output_folder_in_use(refused, tmp_path):
    """Two runs that write the same files would spoil both; what a killed run left half written is removed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".run.json.123.tmp").write_text("half")
    args = z.parse_args(arguments("model", "data", tmp_path / "out"))
    lock = z.prepare_output(args)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    line = refused()
    assert "--output_dir" in line and str(tmp_path / "out") in line
    lock.close()
    z.prepare_output(args).close()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_model_folder_that_is_none(refused, name):
    """A misspelt path must not be looked up on the hub."""
    line = refused(model=name)
    assert "--pretrained_model_name_or_path" in line and name in line and "model_index.json" in line


def test_hub_name_without_network(refused):
    """Offline, the message says which folder to download and how."""
    line = refused(model="someone/some-model")
    assert "someone/some-model" in line and "hf download someone/some-model --local-dir" in line


def test_captions_missing(refused, tmp_path):
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


@pytest.mark.parametrize("argv", [["--help"], ["--n", "0", "--train_data_dir", "x", "--initializer_token", "dog"]])
def test_help_and_errors_are_quick(argv):
    """argparse takes 0.05 s of CPU; torch would add 0.7, diffusers and transformers 4: none is imported for this."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, ROOT / "train_zoodip.py", *argv], capture_output=True, text=True)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == (0 if argv == ["--help"] else 2)
    assert ("--train_data_dir" in done.stdout) if argv == ["--help"] else done.stderr.count("\n") == 1
    assert spent < 0.5


def flags() -> list[argparse.Action]:
    return [action for action in z.build_parser()._actions if action.dest != "help"]


def test_every_flag_has_help_and_an_effect():
    """The authors' script has about twenty flags that do nothing."""
    source = (ROOT / "train_zoodip.py").read_text()
    for function in ("build_parser", "parse_args", "check_args"):  # being read and checked is no effect
        source = re.sub(rf"^def {function}\(.*?(?=^\S)", "", source, count=1, flags=re.DOTALL | re.MULTILINE)
    actions = flags()
    assert len(actions) > 30 and "def check_args" not in source
    for action in actions:
        assert action.help and len(action.help) > 10, action.dest
        assert re.search(rf"\bargs\.{action.dest}\b", source), f"--{action.dest} is not used"


def test_every_setting_is_recorded():
    """A flag that decides what is learned and is not in SETTINGS could change at a resume unseen."""
    not_deciding = set("""cpu compile save_quantized train_data_dir cc_file max_train_steps candidates_per_forward output_dir
        save_steps
        checkpointing_steps checkpoints_total_limit resume_from_checkpoint eval_steps num_eval_samples validation_prompt
        validation_steps num_validation_images validation_guidance report_to""".split())
    assert {action.dest for action in flags()} == set(z.SETTINGS) | not_deciding


def test_defaults_are_the_papers():
    """The commands in the README reproduce the paper only with these."""
    args = vars(z.parse_args(["--train_data_dir", "x", "--initializer_token", "dog"]))
    expected = dict(n=2, mu=None, tau=128, nu=1e-3, t_min=500, t_max=900, max_train_steps=30000, learning_rate=5e-3,
                    train_batch_size=1, resolution=None, timestep_sampling="puts", estimator="rge", quantization="nf4",
                    num_vectors=1, learnable_property="object", seed=0, mixed_precision=None, use_cc=False)  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    zo = z.ZOAdam(torch.zeros(1, 2), argparse.Namespace(**{**args, "mu": 1e-3}))
    group = zo.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.9, 0.999), 1e-3, 0, 5e-3)


@pytest.mark.parametrize(("device", "precision", "expected"), [
    ("cpu", None, ("fp32", 1e-3)), ("cuda", None, ("fp16", 1e-3)), ("cpu", "bf16", ("bf16", 1e-2)),
    ("cuda", "bf16", ("bf16", 1e-2)), ("cuda", "fp32", ("fp32", 1e-3))])
def test_defaults_that_depend(tiny_model, device, precision, expected):
    """bf16 keeps 8 bits, in which a perturbation of 1e-3 drowns: the paper uses 1e-2."""
    args = z.parse_args(["--train_data_dir", "x", "--initializer_token", "dog"])
    args.mixed_precision = precision
    z.resolve_defaults(args, tiny_model, torch.device(device))
    assert (args.mixed_precision, args.mu) == expected
    assert args.resolution == 16  # the UNet's 8 x 8 latents times the VAE's factor of 2
    args = z.parse_args(["--train_data_dir", "x", "--initializer_token", "dog", "--mu", "0.5", "--resolution", "24"])
    args.mixed_precision = precision
    z.resolve_defaults(args, tiny_model, torch.device(device))
    assert (args.mu, args.resolution) == (0.5, 24)  # what is given stays


# --- tokens ---


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return z.load_tokenizer(tiny_model, "<sks>", 3)


def test_initializer(tokenizer, tiny_model):
    """One vector starts from the mean of several pieces; as many vectors as pieces start from one each."""
    assert len(z.initializer_ids(tokenizer, "dog")) == 1
    ids = z.initializer_ids(tokenizer, "dog cat snow")
    rows = z.read_embedding_rows(tiny_model, None, ids)
    assert torch.equal(z.initial_token(rows, 3), rows)
    assert torch.equal(z.initial_token(rows, 1), rows.mean(0, keepdim=True))
    assert torch.equal(z.initial_token(rows, 2), rows.mean(0).expand(2, -1))
    assert len(z.initializer_ids(tokenizer, "zebra")) == 5  # no word here: spelled out in bytes, which is fine
    again = z.initial_token(rows, 3)
    again += 1
    assert not torch.equal(again, rows)  # a tensor of its own


def test_tokenize_expands_the_placeholder(tokenizer):
    """Several vectors stand where the one word was; begin, end and padding as the stock tokenizer has them."""
    plain = tokenizer("a photo of <sks> on the grass", padding="max_length", max_length=77).input_ids
    placeholder = tokenizer.convert_tokens_to_ids("<sks>")
    assert plain.count(placeholder) == 1
    assert z.tokenize(tokenizer, "a photo of <sks> on the grass", placeholder, 1, 77) == plain
    at = plain.index(placeholder)
    expanded = [*plain[:at], placeholder, placeholder + 1, placeholder + 2, *plain[at + 1 :]][:77]
    assert z.tokenize(tokenizer, "a photo of <sks> on the grass", placeholder, 3, 77) == expanded
    for text in ("<sks>'s dog", "my<sks>dog", "<SKS>", "a <sks>."):  # however it is attached
        assert z.tokenize(tokenizer, text, placeholder, 1, 77).count(placeholder) == 1


def test_a_caption_that_is_too_long(tokenizer, refused, tmp_path, subject):
    """Cut off in silence, the end of a caption would teach the token what it should have named. 75 just fit."""
    placeholder = tokenizer.convert_tokens_to_ids("<sks>")
    assert len(z.tokenize(tokenizer, "<sks>" + " dog" * 74, placeholder, 1, 77)) == 77
    with pytest.raises(z.InputError, match="76 tokens long, .* takes 75"):
        z.tokenize(tokenizer, "<sks>" + " dog" * 75, placeholder, 1, 77)
    with pytest.raises(z.InputError, match="77 tokens long"):
        z.tokenize(tokenizer, "<sks>" + " dog" * 74, placeholder, 3, 77)
    captions = {"dog6": {f"0{i}.png": "{}" + " dog" * 75 for i in range(3)}}
    (tmp_path / "cc.json").write_text(str(captions).replace("'", '"'))
    line = refused(use_cc=True, cc_file=tmp_path / "cc.json")
    assert "shorten" in line and "dog dog" in line


# --- checkpoints ---


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
    ("placeholder_token", "<x>", "was '<sks>', is '<x>'"), ("resolution", 24, "was 16, is 24"),
    ("learnable_property", "style", "was 'object', is 'style'"), ("mixed_precision", "bf16", "was 'fp32', is 'bf16'"),
])  # fmt: skip
def test_checkpoint_of_another_run(trained, refused, flag, value, was):
    """The difference is named, flag, old and new."""
    checkpoint = trained / "out" / "checkpoint-6.safetensors"
    line = refused(data=trained / "dog", resume_from_checkpoint=checkpoint, **{flag: value})
    assert f"--{flag} {was}" in line and "checkpoint-6" in line


def test_checkpoint_of_other_images(trained, tmp_path, refused):
    folder = shutil.copytree(trained / "dog", tmp_path / "dog")
    Image.new("RGB", (24, 24)).save(folder / "01.png")
    line = refused(data=folder, resume_from_checkpoint=trained / "out" / "checkpoint-6.safetensors")
    assert "images or captions" in line and "changed" in line and "checkpoint-6" in line


def test_checkpoint_of_other_weights(trained, tmp_path, tiny_model, refused):
    """The same folder's name, another model in it: a retrained or a different variant."""
    model = shutil.copytree(tiny_model, tmp_path / tiny_model.name)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"] += 1
    save_file(tensors, path, {"format": "pt"})
    line = refused(model=model, data=trained / "dog", resume_from_checkpoint=trained / "out" / "checkpoint-6.safetensors")
    assert "model weights" in line and "changed" in line


def damage(source, target, kind: str) -> None:
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
    elif kind == "shape":
        tensors["adam.exp_avg"] = torch.zeros(3)
    elif kind == "history":
        tensors["subspace.token_history"] = torch.zeros(2, 5)
    elif kind == "generator":
        tensors["generator"] = torch.zeros(5, dtype=torch.uint8)
    elif kind == "header":
        metadata = {"format": "pt"}
    elif kind == "json":
        metadata["zoodip.checkpoint"] = metadata["zoodip.checkpoint"][:-5]
    else:
        del tensors[kind]
    save_file(tensors, target, metadata)


DAMAGES = ["truncated", "empty", "garbage", "nan", "shape", "history", "generator", "header", "json", "theta", "adam.step",
           "adam.exp_avg_sq", "subspace.projection"]  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint(trained, tmp_path, refused, kind):
    """Named as such; a run never goes on from half a state."""
    damage(trained / "out" / "checkpoint-6.safetensors", tmp_path / "checkpoint-6.safetensors", kind)
    line = refused(data=trained / "dog", resume_from_checkpoint=tmp_path / "checkpoint-6.safetensors")
    assert "is not a whole checkpoint" in line and "checkpoint-6" in line


def test_checkpoint_that_is_not_there(trained, tmp_path, refused):
    assert "there is no file" in refused(data=trained / "dog", resume_from_checkpoint=tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", ["truncated", "nan", "generator", "adam.step"])
def test_latest_passes_over_a_damaged_checkpoint(trained, tmp_path, tiny_model, capsys, kind):
    """A full disk may leave the newest broken; the one before it is taken, and gives the same result."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(trained / "out" / "checkpoint-3.safetensors", out)
    damage(trained / "out" / "checkpoint-6.safetensors", out / "checkpoint-6.safetensors", kind)
    argv = arguments(tiny_model, trained / "dog", out, max_train_steps=6, resume_from_checkpoint="latest")
    assert run_cli(argv) == 0
    assert "skipped a broken checkpoint" in capsys.readouterr().err
    ours, theirs = (load_file(folder / "learned_embeds.safetensors")["<sks>"] for folder in (out, trained / "out"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EIO, "another folder")])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, number, remedy):
    """A full disk at step 20000 must not cost the checkpoint of step 19500."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(z.InputError, match=rf"x.safetensors: cannot be written \(.*\).*{remedy}"):
        z.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
