"""Whole runs on the tiny model: what they leave behind, that it loads, and that it is the same every time."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, make_model, make_subject, run_cli, sample, torchrun
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zoodip.outputs import TokenOutputs
from zoodip.process import StopSignal
from zoodip.records import peak_memory_gb
from zoodip.run import Run, set_aside

SCRIPT = str(ROOT / "train_zoodip.py")
# The most that theta moves in these runs: the learning rate times the steps. Differences are judged against it.
LEARNING_RATE = 5e-3


def theta(folder: Path, name: str = "learned_embeds") -> torch.Tensor:
    (tensor,) = load_file(folder / f"{name}.safetensors").values()
    return tensor


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}  # which stays, so that it can be locked again


@pytest.fixture(scope="module")
def base(tiny_model, subject, tmp_path_factory) -> Path:
    """The script itself, in its own process, started from elsewhere: 24 steps."""
    out = tmp_path_factory.mktemp("base") / "out"
    argv = arguments(
        tiny_model, subject, out, max_train_steps=24, save_steps=10, checkpointing_steps=8, checkpoints_total_limit=2
    )
    done = subprocess.run([sys.executable, SCRIPT, *argv], cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{out / 'learned_embeds.safetensors'}: <sks> after 24 steps"
    return out


@pytest.fixture
def train(tiny_model, subject, tmp_path):
    """Runs in this process and returns the output folder."""

    def run(name: str = "out", code: int = 0, model: Path = tiny_model, data: Path = subject, **flags) -> Path:
        assert run_cli(arguments(model, data, tmp_path / name, **flags)) == code
        return tmp_path / name

    return run


# --- what a run leaves behind ---


def test_files(base):
    """Nothing missing, nothing temporary left, and only the newest two checkpoints."""
    assert names(base) == {
        "learned_embeds.safetensors", "sks.safetensors", "learned_embeds-steps-10.safetensors",
        "learned_embeds-steps-20.safetensors", "checkpoint-16.safetensors", "checkpoint-24.safetensors",
        "training_log.csv", "run.json",
    }  # fmt: skip
    # other programs take the file's name as the word, and this key
    assert torch.equal(load_file(base / "sks.safetensors")["emb_params"], theta(base))
    assert torch.equal(theta(base), load_file(base / "checkpoint-24.safetensors")["theta"])


def test_saved_steps_are_the_tokens_of_those_steps(base, train):
    """A file of step 10 holds what a run of 10 steps ends with."""
    assert torch.equal(theta(base, "learned_embeds-steps-10"), theta(train(max_train_steps=10)))
    assert not torch.equal(theta(base, "learned_embeds-steps-10"), theta(base))


def test_metadata(base, tiny_model):
    """The header that other programs show says what it was made with, and nothing about this machine."""
    with safe_open(base / "learned_embeds.safetensors", "pt") as handle:
        metadata, keys = handle.metadata(), list(handle.keys())
    assert keys == ["<sks>"] and metadata["format"] == "pt"
    assert metadata["zoodip.base_model"] == tiny_model.name and metadata["zoodip.step"] == "24"
    assert metadata["modelspec.trigger_phrase"] == "<sks>" and metadata["modelspec.resolution"] == "16x16"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.architecture"].endswith("/textual-inversion")
    settings = json.loads(metadata["zoodip.settings"])
    assert settings["tau"] == 4 and settings["mu"] == 1e-2 and settings["quantization"] == "nf4"
    assert json.loads(metadata["zoodip.versions"])["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__


def test_no_paths_in_the_outputs(base, tiny_model, subject):
    """Results are passed on: they must not reveal where somebody's home is."""
    for path in base.iterdir():
        content = path.read_bytes()
        for private in (str(base.parent), str(tiny_model.parent), str(subject.parent), str(ROOT)):
            assert private.encode() not in content, path.name


def test_curve_and_record(base):
    """Evaluation at the start, every eval_steps and at the end; n + 1 forwards per step."""
    rows = list(csv.DictReader((base / "training_log.csv").open()))
    assert [int(row["step"]) for row in rows] == [0, 6, 12, 18, 24]
    assert [int(row["unet_forwards"]) for row in rows] == [0, 18, 36, 54, 72]
    # predicting noise of variance 1 with a random network: a loss near 1
    assert all(0.5 < float(row["eval_loss"]) < 2 and float(row["token_norm"]) > 0 for row in rows)
    assert len({row["eval_loss"] for row in rows}) == 5
    record = json.loads((base / "run.json").read_text())
    assert record["step"] == 24 and record["unet_forwards"] == 72 and record["skipped_steps"] == 0
    assert record["peak_memory_gb"] > 0.1 and record["steps_per_second"] > 0 and record["processes"] == 1
    assert record["settings"]["n"] == 2 and set(record) >= {"versions", "commit", "device", "python"}


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_result_loads_in_a_pipeline(base, train, tiny_model, num_vectors):
    """The purpose of it all: load_textual_inversion, a prompt, a picture."""
    from diffusers import StableDiffusionPipeline

    out = base if num_vectors == 1 else train(num_vectors=2)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(out, weight_name="learned_embeds.safetensors")
    words = ["<sks>", "<sks>_1"][:num_vectors]
    ids = pipeline.tokenizer.convert_tokens_to_ids(words)
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], theta(out))
    assert theta(out).shape == (num_vectors, 32)
    tokens = pipeline.tokenizer.tokenize(pipeline.maybe_convert_prompt("a photo of <sks> on grass", pipeline.tokenizer))
    assert [token for token in tokens if "<sks>" in token] == words
    pictures = [
        pipeline(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for prompt in ("a photo of <sks>", "a photo of")
    ]
    assert pictures[0].shape == (1, 16, 16, 3) and not np.array_equal(*pictures)


def test_an_earlier_run_is_moved_aside(train):
    """A second run in the same folder must not overwrite days of work, nor touch other files."""
    out = train(validation_prompt="a photo of {}", num_validation_images=1)
    (out / "notes.txt").write_text("mine")
    first = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in ("notes.txt", ".lock")}
    assert {"validation-12.png", "sks.safetensors", "checkpoint-12.safetensors"} <= set(first)
    train(seed=1)
    assert {path.name: path.read_bytes() for path in (out / "previous-1").iterdir()} == first
    train(seed=2)
    assert names(out / "previous-2") == names(out / "previous-1") - {"validation-12.png"}
    assert (out / "notes.txt").read_text() == "mine" and "notes.txt" not in names(out / "previous-1")


def test_latest_without_a_checkpoint_overwrites_nothing(train):
    """--resume_from_checkpoint latest is always safe to give: starting at step 0 is a new run like any other."""
    out = train(checkpointing_steps=0)
    for path in out.glob("checkpoint-*"):
        path.unlink()
    first = (out / "learned_embeds.safetensors").read_bytes()
    train(seed=1, resume_from_checkpoint="latest")
    assert (out / "learned_embeds.safetensors").read_bytes() != first
    assert (out / "previous-1" / "learned_embeds.safetensors").read_bytes() == first


def test_a_checkpoint_from_another_folder_overwrites_nothing(train):
    first = train("first", max_train_steps=12, checkpointing_steps=6)
    second = train("second", max_train_steps=12, checkpointing_steps=6, seed=1, checkpoints_total_limit=1)
    kept = {path.name: path.read_bytes() for path in second.iterdir() if path.name != ".lock"}
    train("second", max_train_steps=12, checkpointing_steps=6, resume_from_checkpoint=first / "checkpoint-6.safetensors",
          checkpoints_total_limit=1)  # fmt: skip
    assert {path.name: path.read_bytes() for path in (second / "previous-1").iterdir()} == kept
    assert torch.equal(theta(second), theta(first))


@pytest.mark.parametrize("checkpointing_steps", [0, 100])
def test_going_on_from_another_folder_can_be_stopped_at_once(train, monkeypatch, checkpointing_steps):
    """Before the first step, the folder holds no checkpoint of its own; `latest`, as the last line says, must not start over."""
    first = train("first", max_train_steps=6, checkpointing_steps=3)
    flags = dict(max_train_steps=6, checkpointing_steps=checkpointing_steps, validation_prompt="a photo of {}",
                 num_validation_images=1, validation_steps=3)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", lambda run: True)
        out = train("second", code=143, resume_from_checkpoint=first / "checkpoint-3.safetensors", **flags)
    assert {name for name in names(out) if name.startswith("checkpoint")} == {"checkpoint-3.safetensors"}
    train("second", resume_from_checkpoint="latest", **flags)
    assert torch.equal(theta(out), theta(first)) and json.loads((out / "run.json").read_text())["steps_this_time"] == 3


def test_a_run_killed_on_its_way_to_another_folder_s_next_checkpoint(train, monkeypatch):
    """Killed outright, it repeats at most --checkpointing_steps steps there too."""
    first = train("first", max_train_steps=6, checkpointing_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "note", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        argument = dict(max_train_steps=9, checkpointing_steps=3, resume_from_checkpoint=first / "checkpoint-6.safetensors")
        out = train("second", code=130, **argument)
    assert "checkpoint-6.safetensors" in names(out)


@pytest.mark.parametrize("content", ["[]", "null", '{"step": 6}', ""])
def test_a_record_that_somebody_emptied(train, content):
    """A record that is damaged is written again; one that names the last step is kept."""
    out = train(max_train_steps=6, checkpointing_steps=3)
    (out / "run.json").write_text(content)
    train(max_train_steps=6, checkpointing_steps=3, resume_from_checkpoint="latest")
    text = (out / "run.json").read_text()
    assert json.loads(text)["step"] == 6 and (text == content) == (content == '{"step": 6}')


def test_drawing_what_is_missing_keeps_the_record(train):
    """A run that is resumed after its last step trains nothing; how fast it was, and in how much memory, is known already."""
    out = train(max_train_steps=6, checkpointing_steps=3)
    record = (out / "run.json").read_bytes()
    train(max_train_steps=6, checkpointing_steps=3, resume_from_checkpoint="latest", final_picture=True)
    assert (out / "run.json").read_bytes() == record and (out / "before_after.png").exists()
    train(max_train_steps=9, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert json.loads((out / "run.json").read_text())["steps_this_time"] == 3


def test_without_checkpoints(train):
    """--checkpointing_steps 0: none, unless interrupted, as its help says."""
    assert not [name for name in names(train(checkpointing_steps=0)) if name.startswith("checkpoint")]


def test_the_smoothed_loss(tmp_path):
    """An exponential mean over about a hundred steps that begins at the first loss, written out; skipped steps do not count."""
    run = Run(SimpleNamespace(), torch.Generator(), SimpleNamespace(is_main_process=True), {}, {}, output_dir=tmp_path,
              max_train_steps=4, save_steps=0, checkpointing_steps=0, checkpoints_total_limit=0, eval_steps=0,
              validation_steps=0)  # fmt: skip
    told = []
    for loss in (2.0, 1.0, None, 4.0):
        run.note(loss, forwards=3)
        told.append((run.progress.smoothed_loss, run.progress.forwards, run.progress.skipped, run.progress.skipped_in_a_row))
    assert told == [(2.0, 3, 0, 0), (pytest.approx(1.99), 6, 0, 0), (pytest.approx(1.99), 9, 1, 1),
                    (pytest.approx(0.99 * 1.99 + 0.04), 12, 1, 0)]  # fmt: skip


def test_the_curve_tells_the_smoothed_loss(train):
    """Against the losses of single steps, from runs that are one step longer each time, with the same seed."""
    curve = list(csv.DictReader((train(max_train_steps=3, eval_steps=1) / "training_log.csv").open()))
    assert curve[0]["loss"] == ""  # no step has been taken
    smoothed = [float(row["loss"]) for row in curve[1:]]
    # one of a hundred parts of a loss near 1 is new in each: it moves, and by less than a hundredth of the losses' range
    assert all(0 < abs(b - a) < 0.02 for a, b in zip(smoothed, smoothed[1:], strict=False))
    assert json.loads((train("again", max_train_steps=3, eval_steps=0) / "run.json").read_text())["smoothed_loss"] == smoothed[-1]


def test_without_git(train, monkeypatch):
    """The commit is recorded if git is available; a machine without it still finishes."""
    monkeypatch.setenv("PATH", "")
    assert json.loads((train() / "run.json").read_text())["commit"] is None


# --- the same run gives the same result ---


def test_same_seed_same_bytes(base, train):
    """Another process, folder and day: the same file, header included."""
    out = train(max_train_steps=24, save_steps=10, checkpointing_steps=8)
    for name in names(base) - {"run.json"}:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name


@pytest.mark.parametrize("chunk", [1, 2])
def test_candidates_per_forward_changes_only_rounding(train, chunk):
    """Losses agree to 1e-7; over mu = 1e-2 that is 1e-5 of a slope, next to Adam's epsilon of 1e-3 about 1 % of a step."""
    whole, parts = (theta(train(name, max_train_steps=4, candidates_per_forward=c)) for name, c in (("a", None), ("b", chunk)))
    assert (whole - parts).abs().max() < 0.05 * LEARNING_RATE


def test_v_prediction_model(train, tmp_path):
    """Stable Diffusion 2.1 (768) predicts velocities: another target, and it is recorded."""
    model = make_model(tmp_path / "tiny-sd", prediction_type="v_prediction")  # the same weights and name
    out, epsilon = train(model=model), train("epsilon")
    assert not torch.equal(theta(out), theta(epsilon))
    with safe_open(out / "learned_embeds.safetensors", "pt") as handle:
        assert handle.metadata()["modelspec.prediction_type"] == "v"


@pytest.mark.slow
def test_training_lowers_the_loss(train):
    """On its one image the token of a random network still gets better, by far more than evaluation noise (none)."""
    out = train(max_train_steps=200, eval_steps=200, n=8, learning_rate=0.05, tau=500, num_eval_samples=16, mu=0.05)
    first, last = (float(row["eval_loss"]) for row in csv.DictReader((out / "training_log.csv").open()))
    assert last < first - 1e-4


# --- interruption ---

RESUMED = {
    "defaults": dict(), "spsa": dict(estimator="spsa", num_vectors=2), "one_point": dict(estimator="one_point", nu=0.5),
    "snr": dict(timestep_sampling="snr", n=1), "batch": dict(train_batch_size=2, quantization="none"),
}  # fmt: skip


@pytest.mark.parametrize("case", sample(RESUMED, "defaults", "spsa"))
def test_resumed_equals_uninterrupted(train, case):
    """Bit for bit, from the middle of a tau window: theta, moments, history, projection, generator, curve."""
    flags = dict(max_train_steps=20, checkpointing_steps=5, checkpoints_total_limit=0, eval_steps=5, **RESUMED[case])
    whole, resumed = train("whole", **flags), train("resumed", **{**flags, "max_train_steps": 10})
    assert not torch.equal(theta(whole), theta(resumed))
    train("resumed", **flags, resume_from_checkpoint="latest")
    assert names(resumed) == names(whole)  # and nothing moved aside
    for name in names(whole) - {"run.json"}:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    record = json.loads((resumed / "run.json").read_text())
    assert record["step"] == 20 and record["steps_this_time"] == 10
    named = train("named", **flags, resume_from_checkpoint=whole / "checkpoint-5.safetensors")
    assert (named / "checkpoint-20.safetensors").read_bytes() == (whole / "checkpoint-20.safetensors").read_bytes()


def test_resuming_a_finished_run(base, train, tmp_path):
    """It changes nothing; more steps continue from its end."""
    shutil.copytree(base, tmp_path / "out")
    out = train(max_train_steps=24, save_steps=10, checkpointing_steps=8, resume_from_checkpoint="latest")
    assert (out / "learned_embeds.safetensors").read_bytes() == (base / "learned_embeds.safetensors").read_bytes()
    train(max_train_steps=30, resume_from_checkpoint="latest")
    assert json.loads((out / "run.json").read_text())["step"] == 30


def interrupt(argv: list[str], out: Path, number: int) -> tuple[int, str]:
    """Starts the script, waits for a checkpoint, sends the signal; exit code and stderr."""
    process = subprocess.Popen([sys.executable, SCRIPT, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 120
        while not list(out.glob("checkpoint-*.safetensors")) and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        return process.returncode, stderr
    finally:
        process.kill()


@pytest.mark.parametrize("number", sample([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_interrupted_run(train, tiny_model, subject, tmp_path, number):
    """It saves the step under way, says how to resume, and equals a run that was never interrupted, bit for bit."""
    out, flags = tmp_path / "out", dict(eval_steps=0, checkpointing_steps=5)
    returned, stderr = interrupt(arguments(tiny_model, subject, out, **flags, max_train_steps=100000), out, number)
    assert returned == 128 + number, stderr
    line = stderr.splitlines()[-1]
    step = max(int(path.stem.split("-")[1]) for path in out.glob("checkpoint-*.safetensors"))
    assert f"saved at step {step}" in line and "--resume_from_checkpoint latest" in line and "Traceback" not in stderr
    assert not [name for name in names(out) if "tmp" in name or name.startswith(".")]
    assert {"learned_embeds.safetensors", "run.json"} <= names(out)
    whole = train("whole", **flags, max_train_steps=step)
    name = f"checkpoint-{step}.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    train(**flags, max_train_steps=step + 7, resume_from_checkpoint="latest")
    assert torch.equal(theta(out), theta(train("longer", **flags, max_train_steps=step + 7)))


# --- pictures, trackers, several processes ---


def test_validation_pictures(base, train):
    """A grid of the right size at the right steps, and not a bit of difference in the token."""
    out = train(
        max_train_steps=24,
        validation_prompt="a photo of <sks> in the snow",
        validation_steps=16,
        num_validation_images=2,
        save_steps=10,
        checkpointing_steps=8,
    )
    assert {name for name in names(out) if name.endswith(".png")} == {"validation-16.png", "validation-24.png"}
    pictures = [Image.open(out / f"validation-{step}.png") for step in (16, 24)]
    assert all(picture.width == 512 and picture.height > 256 and picture.mode == "RGB" for picture in pictures)
    left, right = np.asarray(pictures[0])[:256, :256], np.asarray(pictures[0])[:256, 256:]
    assert left.std() > 0 and not np.array_equal(left, right)  # two pictures, from two noises
    for name in ("learned_embeds", "checkpoint-24"):
        assert (out / f"{name}.safetensors").read_bytes() == (base / f"{name}.safetensors").read_bytes()


def test_pictures_that_cannot_be_drawn_cost_no_step(train, monkeypatch):
    """Memory that runs out at step 5, before the first regular checkpoint: resuming begins at step 5."""
    flags = dict(validation_prompt="a photo of {}", num_validation_images=1, validation_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(TokenOutputs, "draw", lambda *_: (_ for _ in ()).throw(MemoryError))
        out = train(code=2, **flags)
    assert {"checkpoint-5.safetensors"} == {name for name in names(out) if name.startswith("checkpoint")}
    train(**flags, resume_from_checkpoint="latest")
    assert json.loads((out / "run.json").read_text())["steps_this_time"] == 7
    assert {"validation-5.png", "validation-10.png"} <= names(out)


def test_only_a_trackers_folder_is_moved_aside(tmp_path):
    """`--output_dir .` in the repository must not move its package, which has the name of TensorBoard's folder."""
    for folder, file in (("package", "__init__.py"), ("tracker", "events.out.tfevents.1.2")):
        inside = tmp_path / folder / "zoodip" / "x" / file
        inside.parent.mkdir(parents=True)
        inside.touch()
        set_aside(tmp_path / folder, [])
        assert inside.exists() == (folder == "package")


@pytest.mark.parametrize("place", ["unet", "class_images"])
def test_leftovers_of_a_killed_run(train, tmp_path, place):
    """Partial files are removed wherever a run writes; a folder that is being packed beside it is not its own."""
    out = tmp_path / "out"
    partial, packing, other = (out / place / ".model.1.tmp", out / ".packed.1.tmp" / "vae", out / "sub" / ".run.json.1.tmp")
    for path in (partial, packing / "config.json", other):
        path.parent.mkdir(parents=True)
        path.touch()
    mine = [out / ".notes.tmp", out / ".probe", out / place / ".draft.tmp"]
    for path in mine:
        path.write_text("the user's")
    train()
    assert not partial.exists() and (packing / "config.json").exists() and other.exists()
    assert [path.read_text() for path in mine] == ["the user's"] * 3


def test_another_start_under_the_same_name(train, refused, tmp_path, capsys):
    """A resumed run must have begun where it says: an embedding file may have been trained on since."""
    first, second = train("first", max_train_steps=2), train("second", max_train_steps=2, seed=1)
    start = Path(shutil.copy(first / "learned_embeds.safetensors", tmp_path / "start.safetensors"))
    flags = dict(initializer_token=start, checkpointing_steps=2)
    out = train(max_train_steps=4, **flags)
    shutil.copy(second / "learned_embeds.safetensors", start)
    capsys.readouterr()
    line = refused(max_train_steps=6, resume_from_checkpoint="latest", **flags)
    assert "the vectors of --initializer_token have changed" in line
    shutil.copy(first / "learned_embeds.safetensors", start)
    train(max_train_steps=6, resume_from_checkpoint="latest", **flags)
    assert torch.equal(theta(out), theta(train("whole", max_train_steps=6, **flags)))


def test_interrupted_after_going_back(base, tiny_model, subject, tmp_path, capsys, monkeypatch):
    """While later checkpoints exist, "latest" would not be the run that was interrupted."""
    out = Path(shutil.copytree(base, tmp_path / "out"))
    flags = dict(
        max_train_steps=24, save_steps=10, checkpointing_steps=8, resume_from_checkpoint=out / "checkpoint-16.safetensors"
    )
    monkeypatch.setattr(Run, "stop_requested", lambda run: run.progress.step == 18)
    run_cli(arguments(tiny_model, subject, out, **flags))
    assert f"--resume_from_checkpoint {out / 'checkpoint-19.safetensors'}" in capsys.readouterr().err


def test_a_checkpoint_beyond_the_end(train, capsys):
    train(max_train_steps=6)
    train(max_train_steps=4, resume_from_checkpoint="latest")
    assert "was saved after more steps than --max_train_steps 4; nothing is left to train" in capsys.readouterr().err


def test_processes_at_different_steps(refused, train, monkeypatch, capsys):
    """On two machines, only one of which has the checkpoints, losses of different steps would be summed."""
    train(max_train_steps=6)
    capsys.readouterr()
    monkeypatch.setattr("zoodip.run.gather_object", lambda steps: [*steps, 0])
    line = refused(resume_from_checkpoint="latest")
    assert "the processes are at different steps (6, 0)" in line


def test_a_tracker_that_refuses(train, monkeypatch, capsys):
    """W&B without a login raises an exception of its own."""

    def refuse(*given):
        raise RuntimeError("No API key configured\nUse `wandb login`")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    train(code=2, report_to="tensorboard")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: --report_to: the tracker cannot be started (No API key configured); log in to it" in line


def test_a_signal_that_the_launcher_repeats(monkeypatch):
    """torchrun passes on what its workers have received too: soon after the first, a signal is taken for its copy."""
    raised = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    for launched in (False, True):  # also of one process
        ends = not launched
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with StopSignal() as stop:
            stop.receive(signal.SIGTERM, None)
            stop.receive(signal.SIGTERM, None)
            assert stop.number == signal.SIGTERM and (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) == ends
            assert raised == [signal.SIGTERM] * ends
            stop.since -= 2.5
            stop.receive(signal.SIGTERM, None)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and len(raised) == 1 + ends
        raised.clear()


def test_tensorboard(train):
    """The curve arrives in the tracker."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(max_train_steps=20, report_to="tensorboard")
    logs = [EventAccumulator(str(path)).Reload() for path in out.rglob("events.out.tfevents*")]
    ((events, tag),) = [(log, tag) for log in logs for tag in log.Tags()["scalars"] if "eval_loss" in tag]
    rows = list(csv.DictReader((out / "training_log.csv").open()))
    assert [event.step for event in events.Scalars(tag)] == [int(row["step"]) for row in rows]
    for event, row in zip(events.Scalars(tag), rows, strict=True):
        assert event.value == pytest.approx(float(row["eval_loss"]), rel=1e-6)  # stored in fp32


def test_settings_that_are_lists_arrive_in_tensorboard(train, tiny_model, subject, tmp_path):
    from trainers import gauss_newton

    flags = dict(max_train_steps=None, max_forwards=40, report_to="tensorboard", tau=None, nu=None, mu=None, basis_size=3,
                 directions=3)  # fmt: skip
    assert run_cli(arguments(tiny_model, subject, tmp_path / "out", **flags), gauss_newton) == 0
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


# --- numbers that run away ---


@pytest.fixture(scope="module")
def overflowing(tiny_model, tmp_path_factory):
    """A model whose last layer is so strong that predictions pass 65504, the end of half precision; in 32 bits all is well."""

    def make(factor: float) -> Path:
        model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("overflow") / "tiny-sd"))
        path = model / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["conv_out.weight"] *= factor
        save_file(tensors, path, {"format": "pt"})
        return model

    return make


def test_losses_that_stay_infinite_stop_the_run(train, overflowing, capsys):
    """Twenty in a row: exit code 2 and advice, not hours of nothing; again after a resume; and the advice helps."""
    flags = dict(model=overflowing(5e5), max_train_steps=30)
    out = train(code=2, mixed_precision="fp16", **flags)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: no usable loss (not finite, or lost in rounding) for 20 steps up to step 20")
    assert all(f"--{flag}" in line for flag in ("mixed_precision fp32", "learning_rate", "mu"))
    assert "learned_embeds.safetensors" not in names(out)
    train(code=2, mixed_precision="fp16", resume_from_checkpoint="latest", **flags)
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    for precision in ("fp32", "bf16"):
        assert json.loads((train(precision, mixed_precision=precision, **flags) / "run.json").read_text())["skipped_steps"] == 0


def test_stopped_while_every_step_overflows(train, overflowing, capsys, monkeypatch):
    """A signal ends the run as it always does, saved and with the way on; that no loss was usable yet is no error then."""
    monkeypatch.setattr(Run, "stop_requested", lambda run: run.progress.step == 2)
    out = train(code=143, model=overflowing(5e5), mixed_precision="fp16", max_train_steps=30)
    assert "interrupted and saved at step 3" in capsys.readouterr().err and "checkpoint-3.safetensors" in names(out)


def test_steps_that_overflow_are_skipped_and_counted(train, overflowing, capsys):
    """Some steps of a half-precision run give Inf: they leave the token as it was and are reported at the end."""
    out = train(model=overflowing(6e4), mixed_precision="fp16", max_train_steps=40, eval_steps=0, save_steps=1)
    tokens = [theta(out, f"learned_embeds-steps-{step}") for step in range(1, 41)]
    still = sum(torch.equal(a, b) for a, b in zip(tokens, tokens[1:], strict=False))
    skipped = json.loads((out / "run.json").read_text())["skipped_steps"]
    assert 0 < skipped < 40 and still <= skipped <= still + 1  # the first step has none before it
    assert all(torch.isfinite(token).all() for token in tokens)
    assert f"after 40 steps ({skipped} skipped: no usable loss)" in capsys.readouterr().out


def test_token_that_runs_away(train, capsys):
    """Reported when its norm is ten times what it was, and again each time that doubles; not in an ordinary run."""
    train(max_train_steps=12)
    assert "norm" not in capsys.readouterr().err
    train(max_train_steps=40, learning_rate=100)
    grown = re.findall(r"norm has grown to (\S+) by step \d+; .*learning_rate", capsys.readouterr().err)
    assert 1 <= len(grown) < 8 and all(float(b) > 1.99 * float(a) for a, b in zip(grown, grown[1:], strict=False))  # 3 digits


def test_token_that_overflows(train, capsys):
    """An absurd learning rate ends in one line of error; no embedding or checkpoint with NaN or Inf is ever saved."""
    out = train(code=2, learning_rate=9e36, checkpointing_steps=1, save_steps=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the token is NaN or Inf after step") and "--learning_rate" in line
    for path in out.glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values() if tensor.is_floating_point())


@pytest.mark.slow
def test_two_processes_equal_one(train, tiny_model, subject, tmp_path):
    """Each evaluates its share of the candidates; theta is never sent, and must stay the same in both.

    Batches of other shapes sum in another order: losses agree to 1e-7, slopes (over mu = 1e-2) to 1e-5, and Adam, whose
    steps are slope / (|slope| + 1e-3), turns that into about 1 % of a step. Four steps only, as differences feed back.
    """
    flags = dict(max_train_steps=4, eval_steps=0)
    argv = [*torchrun(2, 29517), SCRIPT, *arguments(tiny_model, subject, tmp_path / "two", **flags)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert done.stdout.count("after 4 steps") == 1  # only one process prints
    one = theta(train("one", **flags))
    assert (theta(tmp_path / "two") - one).abs().max() < 0.05 * LEARNING_RATE
    assert (one - theta(train("other", **flags, seed=1))).abs().max() > LEARNING_RATE  # what a wrong share would do


@pytest.mark.slow
def test_more_processes_than_candidates(tiny_model, subject, tmp_path):
    """A process without a candidate would only wait; it is refused with the numbers."""
    argv = [*torchrun(3, 29518), SCRIPT, *arguments(tiny_model, subject, tmp_path / "out", n=1)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "3 processes share only 2 candidates" in done.stderr


def test_bundled_subject(train):
    """The pictures that come with the project are readable, captioned and trainable as the README says."""
    captions = json.loads((ROOT / "cc.json").read_text())
    for folder in sorted(path for path in (ROOT / "dataset").iterdir() if path.is_dir()):
        assert folder.name in captions
        out = train(folder.name, data=folder, use_cc=True, cc_file=ROOT / "cc.json", max_train_steps=2, eval_steps=0)
        assert torch.isfinite(theta(out)).all()


def test_subject_of_one_picture(train, tmp_path):
    """One photograph is enough to run."""
    assert torch.isfinite(theta(train(data=make_subject(tmp_path / "one", count=1)))).all()


@pytest.mark.slow  # a minute of compiling
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compiled(tiny_model, subject, tmp_path):
    """--compile changes only rounding: the first losses agree, and the UNet really was compiled."""
    import torch._dynamo.utils as dynamo

    dynamo.counters.clear()
    tokens = []
    for name, compile in ("plain", None), ("compiled", True):
        assert run_cli(arguments(tiny_model, subject, tmp_path / name, compile=compile, max_train_steps=3, eval_steps=0)) == 0
        tokens.append(load_file(tmp_path / name / "learned_embeds.safetensors")["<sks>"])
    assert dynamo.counters["stats"]["unique_graphs"] >= 1 and not dynamo.counters["graph_break"]
    # losses of size 1 differ by 1e-6, slopes by 1e-6 / mu (1e-2) = 1e-4, gradients by 1 / s (s = 4) of that; where a gradient is
    # as small as Adam's epsilon, 1e-3, that is 2 % of a step of 5e-3. (The token moves by 1.5e-2.)
    torch.testing.assert_close(*tokens, rtol=0, atol=1e-4)


def test_compile_without_a_compiler(tiny_model, subject, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run_cli(arguments(tiny_model, subject, tmp_path / "out", compile=True)) == 2
    assert "--compile needs a C++ compiler" in capsys.readouterr().err


def test_peak_memory_is_this_program_s():
    """Not that of the parent process, from which the kernel's own counter starts: here 1 GB more than the child needs."""
    code = "import torch; from zoodip.records import peak_memory_gb; print(peak_memory_gb(torch.device('cpu')))"
    held = torch.ones(1 << 28)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0.05 < float(child.stdout) < 0.9 < peak_memory_gb(torch.device("cpu")) and held.sum() > 0
