"""What a new user does in the first hour and the first week, and what must not happen then: noise, silence, a lost result."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, notices_of, run_cli
from PIL import Image
from safetensors.torch import load_file, save_file


def pack(model: Path, target: Path, *more: str) -> int:
    return run_cli(["--pretrained_model_name_or_path", str(model), "--save_quantized", str(target), *more])


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}  # fmt: skip


def one_error(capsys) -> str:
    """The single error line of a refused command."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


# ----------------------------------------------------------------------------------------------------- packed folders


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "tiny-int8"
    assert pack(tiny_model, target, "--quantization", "int8") == 0
    return target


def old_names(packed: Path, target: Path) -> Path:
    """The folder as it was written before packed weights had names of their own."""
    shutil.copytree(packed, target)
    for component, stem in {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        for path in (target / component).glob("packed*"):
            path.write_bytes(path.read_bytes().replace(b"packed-0", stem.encode() + b"-0"))
            path.rename(path.with_name(path.name.replace("packed", stem)))
    return target


def test_plain_diffusers_stops_at_a_packed_folder_and_names_what_it_lacks(packed):
    """It used to load, with a warning, weights initialised at random."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    for load in (StableDiffusionPipeline.from_pretrained, lambda folder: UNet2DConditionModel.from_pretrained(folder / "unet"),
                 lambda folder: AutoencoderKL.from_pretrained(folder / "vae"),
                 lambda folder: CLIPTextModel.from_pretrained(folder / "text_encoder")):  # fmt: skip
        with pytest.raises(OSError, match=r"no file named (diffusion_pytorch_model|model|pytorch_model)\."):
            load(packed)
    index = json.loads((packed / "model_index.json").read_text())
    assert index["_zoodip_packed"] == "int8" and "load_pipeline" in index["_zoodip_note"]


@pytest.mark.parametrize("names", ["new", "old"])
def test_what_a_folder_is_packed_in_is_the_default(packed, subject, tmp_path, names):
    """For training and for drawing; folders with the old names still load."""
    from zoodip.model import load_pipeline

    model = packed if names == "new" else old_names(packed, tmp_path / "old")
    assert run_cli(arguments(model, subject, tmp_path / "out", max_train_steps=2, eval_steps=0)) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["quantization"] == "int8"
    assert load_pipeline(str(model)).unet.down_blocks[0].resnets[0].conv1.quantization == "int8"


def test_a_packed_folder_packed_again_stays_what_it_is(packed, tmp_path, capsys):
    assert pack(packed, tmp_path / "again") == 0
    assert "with int8 weights" in capsys.readouterr().out
    assert digests(tmp_path / "again") == digests(packed)
    assert pack(packed, tmp_path / "other", "--quantization", "nf4") == 2  # it used to call an int8 copy nf4
    assert "packed as int8" in one_error(capsys) and not (tmp_path / "other").exists()


# ----------------------------------------------------------------------------------------------------- a refused run


@pytest.fixture(scope="module")
def earlier(tiny_model, subject, tmp_path_factory) -> Path:
    """An output folder with a run's results."""
    output = tmp_path_factory.mktemp("earlier") / "out"
    assert run_cli(arguments(tiny_model, subject, output, max_train_steps=3, eval_steps=0)) == 0
    return output


def test_a_refused_run_leaves_the_last_ones_results_where_they_are(earlier, packed, tiny_model, subject, tmp_path, capsys):
    """Nothing is moved before the model is loaded and its first loss computed."""
    before = digests(earlier)
    assert run_cli(arguments(packed, subject, earlier, quantization="nf4")) == 2
    assert "--quantization nf4" in one_error(capsys)

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    last = [name for name in tensors if name.startswith("conv_out")][-1]
    save_file({**tensors, last: torch.full_like(tensors[last], torch.nan)}, weights)
    assert run_cli(arguments(damaged, subject, earlier)) == 2  # found when the weights are read
    assert "is not finite" in one_error(capsys)

    config = damaged / "unet" / "config.json"
    save_file(tensors, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "norm_eps": "small"}))
    assert run_cli(arguments(damaged, subject, earlier)) == 2  # found when the first loss is computed
    assert "cannot be loaded" in one_error(capsys)
    assert digests(earlier) == before

    # and an accepted one moves them
    assert run_cli(arguments(tiny_model, subject, earlier, max_train_steps=2, eval_steps=0)) == 0
    assert (earlier / "previous-1" / "learned_embeds.safetensors").read_bytes() == before["learned_embeds.safetensors"]


# ----------------------------------------------------------------------------------------------------- pictures


PICTURES = dict(num_validation_images=1, final_picture=True)


def interrupt_when(path: Path) -> threading.Thread:
    """Send Ctrl-C to this process as soon as a file exists."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_run_leaves_a_picture_and_embeddings_on_the_way_and_says_where(tiny_model, subject, tmp_path, capsys):
    import train_zoodip

    assert train_zoodip.build_parser().get_default("save_steps") == 1000  # 30,000 steps used to leave nothing before the end
    assert train_zoodip.build_parser().get_default("final_picture") is True
    output = tmp_path / "out"
    assert run_cli(arguments(tiny_model, subject, output, max_train_steps=3, save_steps=2, eval_steps=0, **PICTURES)) == 0
    said = capsys.readouterr().out
    for name in ("learned_embeds.safetensors", "before_after.png"):
        assert f"{output / name}: " in said and (output / name).exists()
    assert (output / "sks.safetensors").exists() and "sks.safetensors" not in said  # other programs load no token of this size
    assert (output / "learned_embeds-steps-2.safetensors").exists()
    assert "'a photo of a dog' above, with <sks> below" in said

    off = tmp_path / "off"
    assert run_cli(arguments(tiny_model, subject, off, max_train_steps=1, eval_steps=0, final_picture=False)) == 0
    assert not list(off.glob("*.png")) and ".png" not in capsys.readouterr().out


def test_the_picture_shows_the_initial_word_above_the_learned_one(tiny_model, subject, tmp_path):
    """Each row against the pictures that a pipeline draws, from the same noise, of the word and of the token in the file."""
    from zoodip.model import load_pipeline

    output = tmp_path / "out"
    flags = arguments(tiny_model, subject, output, max_train_steps=3, learning_rate=1.0, eval_steps=0, seed=3, **PICTURES)
    assert run_cli(flags) == 0
    pipeline = load_pipeline(str(tiny_model))
    pipeline.load_textual_inversion(output / "learned_embeds.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    sheet = np.asarray(Image.open(output / "before_after.png").convert("RGB"), dtype=float)
    gap, cell = 6, 256  # 16 pixels are enlarged to 256
    second_row = np.flatnonzero((sheet[cell + gap :, gap : gap + cell] < 255).any((1, 2)))[-1] + cell + gap
    for word in ("dog", "<sks>"):
        picture = pipeline(f"a photo of a {word}", generator=torch.Generator().manual_seed(3), height=16, width=16).images[0]
        expected = np.asarray(picture.resize((cell, cell), Image.Resampling.LANCZOS), dtype=float)
        found = [np.abs(sheet[top : top + cell, gap : gap + cell] - expected).mean()
                 for top in range(0, second_row - cell) if (sheet[top : top + cell].shape[0] == cell)]  # fmt: skip
        place = int(np.argmin(found))
        assert found[place] < 1  # of 255: rounding of another order of sums
        assert (place < cell) == (word == "dog")


def test_the_last_pictures_can_be_stopped_and_are_drawn_on_resuming(tiny_model, subject, tmp_path, capsys):
    """run.json is written before them; Ctrl-C stops between two denoising steps, and only the pictures are missing."""
    output = tmp_path / "out"
    flags = dict(max_train_steps=2, eval_steps=0, checkpointing_steps=0, final_picture=True)
    interrupt_when(output / "run.json")
    started = time.monotonic()
    assert run_cli(arguments(tiny_model, subject, output, num_validation_images=100_000, **flags)) == 130
    assert time.monotonic() - started < 300  # not the hours of 100,000 pictures
    said = capsys.readouterr()
    assert "drawing 'a photo of a {}'" in said.err and "interrupted while drawing" in said.err
    assert "learned_embeds.safetensors: <sks>" in said.out and "before_after" not in said.out
    assert not (output / "before_after.png").exists() and (output / "learned_embeds.safetensors").exists()

    again = arguments(tiny_model, subject, output, num_validation_images=1, resume_from_checkpoint="latest", **flags)
    assert run_cli(again) == 0 and (output / "before_after.png").exists()


def test_pictures_on_the_way_that_were_stopped_are_drawn_on_resuming(tiny_model, subject, tmp_path):
    """The resumed run ends with the same files as an uninterrupted one."""
    flags = dict(max_train_steps=4, save_steps=2, validation_steps=2, validation_prompt="a photo of {}", eval_steps=0,
                 checkpointing_steps=2, checkpoints_total_limit=1, final_picture=False)  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_cli(arguments(tiny_model, subject, whole, num_validation_images=2, **flags)) == 0
    interrupt_when(stopped / "learned_embeds-steps-2.safetensors")
    assert run_cli(arguments(tiny_model, subject, stopped, num_validation_images=2, **flags)) == 130
    assert not (stopped / "validation-2.png").exists() and not (stopped / "validation-4.png").exists()
    assert (
        run_cli(arguments(tiny_model, subject, stopped, num_validation_images=2, resume_from_checkpoint="latest", **flags)) == 0
    )
    results = [{name: content for name, content in digests(folder).items() if name != "run.json"} for folder in (whole, stopped)]
    assert results[0] == results[1]


# ----------------------------------------------------------------------------------------------------- downloads


def published(*variants: str) -> list[str]:
    """The files of a model on a hub, with its weights in these variants."""
    from zoodip.folder import WEIGHT_NAMES

    names = ["model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
    for component, stem in WEIGHT_NAMES.items():
        names += [f"{component}/config.json", *(f"{component}/{stem}{variant}.safetensors" for variant in variants)]
    return names


@pytest.mark.parametrize(("variants", "chosen"), [(("", ".fp16"), "fp16"), (("",), None), ((".fp16",), "fp16")])
def test_of_a_hub_model_the_half_precision_files_are_taken(monkeypatch, tmp_path, variants, chosen):
    """It used to download 4.3 GB in fp32 to pack them in 4 bits. A named variant is the one used."""
    import huggingface_hub

    from zoodip.folder import hub_variant

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision=None: published(*variants))
    assert hub_variant("someone/sd") == chosen
    assert hub_variant(str(tmp_path)) is None  # of a folder, `folder_variant` decides


def test_half_precision_files_in_the_cache_are_found_without_network(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants

    from zoodip.folder import hub_variant

    def offline(self, name, revision=None):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_variant("someone/sd") is None
    repository = tmp_path / "models--someone--sd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for name in published(".fp16"):
        path = repository / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert hub_variant("someone/sd") == "fp16"


# ----------------------------------------------------------------------------------------------------- flags in combination


def lines_of_flags(model: Path, flags: dict) -> list[str]:
    """The warnings about a command line's flags."""
    import train_zoodip

    return notices_of(train_zoodip, arguments(model, "x", "y", **flags))


@pytest.mark.parametrize(("flags", "said"), [
    (dict(cc_file="mine.json"), "--cc_file mine.json has no effect without --use_cc"),
    (dict(use_cc=True, learnable_property="style"), "--learnable_property style has no effect with --use_cc"),
    (dict(timestep_sampling="uniform", t_min=100), "--t_min 100 affects only the evaluation set"),
    (dict(timestep_sampling="snr", t_max=800), "--t_max 800 affects only the evaluation set"),
    (dict(num_validation_images=2), "--num_validation_images 2 has no effect"),
    (dict(validation_guidance=3), "--validation_guidance 3.0 has no effect"),
    (dict(revision="main"), "--revision main has no effect"),
    (dict(model_config="x"), "--model_config x has no effect"),
    (dict(lr_warmup_steps=5), "--lr_warmup_steps 5 has no effect"),
    (dict(nu=0), "--tau 4 has no effect with --nu 0"),
    (dict(eval_steps=0), "--num_eval_samples 2 has no effect with --eval_steps 0"),
    (dict(timestep_sampling="uniform", t_min=100, eval_steps=0, num_eval_samples=None), "--t_min 100 has no effect"),
])  # fmt: skip
def test_flags_that_do_nothing_say_so(tiny_model, flags, said):
    (line,) = lines_of_flags(tiny_model, flags)
    assert line.startswith(said)


def test_flags_that_packing_ignores_say_so():
    """Somebody who has forgotten --train_data_dir gets a packed model, and should know why."""
    import train_zoodip

    (line,) = notices_of(train_zoodip, ["--save_quantized", "x", "--quantization", "int8", "--initializer_token", "dog"])
    assert line == "--initializer_token dog has no effect without --train_data_dir: the model is only packed"


def test_a_variant_of_a_single_file_says_so(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (line,) = lines_of_flags(tmp_path / "model.safetensors", dict(variant="fp16"))
    assert line.startswith("--variant fp16 has no effect")


def test_a_template_that_only_the_picture_uses(tiny_model):
    """With captions, the pictures' default prompt still depends on what is learned."""
    assert not lines_of_flags(tiny_model, dict(use_cc=True, learnable_property="style", final_picture=True))


@pytest.mark.parametrize(("script", "given", "said"), [
    ("dreambooth", ["--num_class_images", "9"], "--num_class_images 9 has no effect without --prior_preservation"),
    ("qlora", ["--class_data_dir", "y"], "--class_data_dir y has no effect without --prior_preservation"),
    ("tuneqdm", ["--apply", "everywhere"], "--apply everywhere has no effect without --train_interval"),
    ("gauss_newton", ["--start_steps", "9"], "--start_steps 9 has no effect with --starts 1"),
    ("gf_ti", ["--candidates_per_forward", "2"], "--candidates_per_forward 2 has no effect without --mode fair"),
])  # fmt: skip
def test_flags_of_other_trainers_that_do_nothing_say_so(script, given, said):
    from importlib import import_module

    trainer = import_module(f"trainers.{script}")
    word = "--class_word" if "--class_word" in trainer.build_parser().format_help() else "--initializer_token"
    assert said in notices_of(trainer, ["--train_data_dir", "x", word, "dog", *given])


def test_help_shows_a_default_of_0():
    import train_zoodip

    text = " ".join(train_zoodip.build_parser().format_help().split())
    assert re.search(r"--seed SEED [^-]*\(default: 0\)", text), text


@pytest.mark.parametrize("flags", [
    dict(), dict(use_cc=True, cc_file="mine.json"), dict(learnable_property="style"), dict(t_min=100, t_max=800),
    dict(num_validation_images=2, validation_guidance=3, final_picture=True),
    dict(num_validation_images=2, validation_guidance=3, validation_prompt="{}"),
])  # fmt: skip
def test_flags_that_work_are_not_spoken_of(tiny_model, flags):
    assert lines_of_flags(tiny_model, flags) == []


def test_the_command_line_says_so(tiny_model):
    """On stderr, before anything is loaded; the run is refused here for its folder."""
    argv = arguments(tiny_model, "nowhere", "y", cc_file="mine.json")
    result = subprocess.run([sys.executable, "train_zoodip.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert [line[:20] for line in result.stderr.splitlines()] == ["--cc_file mine.json ", "error: --train_data_"]


def test_captions_that_are_not_used_are_spoken_of(tmp_path, subject, capsys):
    from zoodip.subject import load_subject

    folder = Path(shutil.copytree(subject, tmp_path / "mine"))
    (folder / "00.txt").write_text("a dog")
    load_subject(folder, None)
    assert "the 1 captions beside the photographs have no effect without --use_cc" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launch_that_starts_one_process_instead_of_two_is_spoken_of(tiny_model, subject, tmp_path):
    """It used to train silently in one process."""
    argv = arguments(tiny_model, subject, tmp_path / "out", max_train_steps=1, eval_steps=0)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "train_zoodip.py", *argv]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "asked for 2 processes but started 1" in result.stderr and "torchrun --nproc_per_node 2" in result.stderr


# ----------------------------------------------------------------------------------------------------- TensorBoard


def test_pictures_arrive_in_tensorboard_and_runs_are_kept_apart(tiny_model, subject, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "out"
    flags = dict(max_train_steps=3, eval_steps=3, report_to="tensorboard", num_validation_images=1, final_picture=True,
                 validation_prompt="a photo of {}", validation_steps=2)  # fmt: skip
    for _ in range(2):
        assert run_cli(arguments(tiny_model, subject, output, **flags)) == 0
    for folder in (output, output / "previous-1"):  # the second run's, and the first one's, moved aside with its other results
        steps: dict[str, list[int]] = {}
        for path in (folder / "zoodip").rglob("events.out.tfevents*"):
            log = EventAccumulator(str(path)).Reload()
            for tag in log.Tags()["images"]:
                steps.setdefault(tag, []).extend(event.step for event in log.Images(tag))
            for tag in log.Tags()["scalars"]:
                if "eval_loss" in tag:
                    assert [event.step for event in log.Scalars(tag)] == [0, 3]  # of one run only
        assert steps == {"validation": [2, 3], "before_after": [3]}
