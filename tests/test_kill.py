"""A run that is killed, interrupted or loses its disk at any moment is not lost: nothing is half written, nothing differs."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MINIATURE, ROOT, arguments, sample
from watching import Watch, last_saved_step, newest_checkpoint, same_results, step_of

CHECKPOINTING = 2
RUN = dict(max_train_steps=6, save_steps=1, checkpointing_steps=CHECKPOINTING, eval_steps=3, num_eval_samples=1, tau=4)
PICTURES = dict(validation_prompt="a photo of {}", num_validation_images=1, validation_steps=4)
ENDLESS = dict(max_train_steps=10**6, save_steps=0, eval_steps=0)
PATIENCE = 300  # seconds; a run takes less than one, but machines are shared


class Run:
    """A run in its own process, started by fork_server.py."""

    def __init__(self, server: subprocess.Popen, place: Path, output: Path, argv: list[str], **options):
        self.place, self.watch, self.started = place, Watch(output), time.monotonic()
        place.mkdir()
        server.stdin.write(json.dumps(dict(argv=argv, place=str(place), output=str(output), **options)) + "\n")
        server.stdin.flush()
        self.pid = int(self.read("pid"))
        self.started = time.monotonic()  # not before: the server may have been importing

    def read(self, name: str) -> str:
        while not (self.place / name).exists():
            assert time.monotonic() < self.started + PATIENCE, "the run hangs"
            time.sleep(0.002)
        return (self.place / name).read_text()

    def ended(self) -> bool:
        return (self.place / "status").exists()

    def wait(self, until=lambda: False) -> int | None:
        """Watch the folder until the run ends (its exit code) or `until()` (None)."""
        while not self.ended() and not until():
            assert time.monotonic() < self.started + PATIENCE, "the run hangs"
            self.watch.poll()
            time.sleep(0.001)
        self.watch.poll()
        return int(self.read("status")) if self.ended() else None

    def send(self, number: int) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:  # it has just ended
            pass

    def error(self) -> str:
        """Its single error line."""
        lines = re.split(r"[\r\n]+", (self.place / "stderr").read_text())
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in "".join(lines), lines
        return errors[0]


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "fork_server.py"],
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def start(server, tiny_model, subject, tmp_path_factory):
    """Starts a run with the flags of RUN in the folder `output`."""
    places = tmp_path_factory.mktemp("places")
    count = iter(range(10**6))

    def start_run(output: Path, options: dict | None = None, **flags) -> Run:
        argv = arguments(tiny_model, subject, output, **{**RUN, **flags})
        return Run(server, places / str(next(count)), output, argv, **(options or {}))

    return start_run


@dataclass
class Reference:
    """An undisturbed run."""

    output: Path
    changes: list[str]  # to its folder, in order
    seconds: float

    @property
    def embedding(self) -> bytes:
        return (self.output / "learned_embeds.safetensors").read_bytes()


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """The reference for some flags, run once."""

    @functools.cache
    def run_reference(**flags) -> Reference:
        output = tmp_path_factory.mktemp("reference") / "out"
        run = start(output, **flags)
        assert run.wait() == 0, (run.place / "stderr").read_text()
        return Reference(output, (run.place / "changes").read_text().splitlines(), time.monotonic() - run.started)

    return run_reference


@pytest.fixture
def finish(start, reference):
    """Resumes a run to its end and compares its files with the reference of the same flags, byte for byte."""

    def check(output: Path, stopped: bool = False, **flags) -> None:
        run = start(output, resume_from_checkpoint="latest", **flags)
        assert run.wait() == 0, (run.place / "stderr").read_text()
        for earlier in output.glob("previous-*"):  # of a run that was killed before its first checkpoint
            shutil.rmtree(earlier)
        same_results(output, reference(**flags).output, stopped)

    return check


# --- SIGKILL ---


def kill_before(change: int, start, finish, output: Path, **flags) -> None:
    run = start(output, dict(die_at=change), **flags)
    assert run.wait() == -signal.SIGKILL, change
    assert last_saved_step(output) - newest_checkpoint(output) <= CHECKPOINTING
    finish(output, **flags)
    shutil.rmtree(output)


@pytest.mark.parametrize("every", sample([1, 7], 7))
def test_killed_before_every_change_to_the_folder(start, reference, finish, tmp_path, every):
    """A run is killed just before each open, rename and removal in the output folder, from the lock to run.json.

    By then it is at most --checkpointing_steps steps ahead of the newest checkpoint, all files are whole, and the resumed run
    leaves the same bytes as an undisturbed one.
    """
    changes = len(reference().changes)
    assert changes > 30  # an open and a rename for each of 6 + 2 embeddings, 3 checkpoints, 3 curves, run.json ...
    for change in range(0, changes, every):
        kill_before(change, start, finish, tmp_path / str(change))


@pytest.mark.slow
def test_killed_while_drawing(start, reference, finish, tmp_path):
    """No picture is missing after a resume; nor is the embedding if the run dies while writing its last picture."""
    changes = reference(**PICTURES).changes
    drawn = [i for i, change in enumerate(changes) if change.startswith("os.rename") and "validation-" in change]
    (saved,) = [i for i, change in enumerate(changes) if change.startswith("os.rename") and "checkpoint-4" in change]
    assert len(drawn) == 2 and saved < drawn[0]  # a picture that cannot be drawn costs no step
    for change in (saved, drawn[0], drawn[0] + 1, drawn[1]):
        kill_before(change, start, finish, tmp_path / str(change), **PICTURES)
    run = start(tmp_path / "last", dict(die_at=drawn[1]), **PICTURES)
    run.wait()
    assert (tmp_path / "last" / "learned_embeds.safetensors").read_bytes() == reference().embedding


@pytest.mark.parametrize("number", sample([20, 4], 4))
def test_killed_at_random_moments(start, reference, finish, tmp_path, number):
    """SIGKILLs spread over a run's life, several on the same run, with the folder watched throughout."""
    life, rng, kills, polls = reference().seconds, random.Random(0), 0, 0
    output = tmp_path / "out"
    while kills < number:
        moment = time.monotonic() + rng.uniform(0, life)
        run = start(output, resume_from_checkpoint="latest")
        code = run.wait(until=lambda moment=moment: time.monotonic() > moment)
        if code is None:
            run.send(signal.SIGKILL)
            code = run.wait()
        assert code in (0, -signal.SIGKILL)
        polls += run.watch.polls
        assert last_saved_step(output) - newest_checkpoint(output) <= CHECKPOINTING
        kills += code != 0
        if code == 0 or kills == number:
            finish(output)
            shutil.rmtree(output)
    assert polls > number  # it was watched


# --- SIGINT and SIGTERM ---


@pytest.mark.parametrize("runs", sample([range(6), (0, 4)], (0, 4)), ids=["all", "some"])
@pytest.mark.parametrize("number", sample([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_signals_at_random_moments(start, reference, finish, tmp_path, number, runs):
    """A run that is asked to stop says how to resume and ends with the code a shell gives; no completed step is repeated."""
    life, rng, stepping = reference().seconds, random.Random(int(number)), 0
    for i in runs:
        output = tmp_path / str(i)
        run = start(output)
        if i < 3:
            moment = time.monotonic() + rng.uniform(0, life)
            run.wait(until=lambda moment=moment: time.monotonic() > moment)
        else:  # surely among the steps
            run.wait(until=lambda output=output, i=i: last_saved_step(output) >= i)
        run.send(number)
        code = run.wait()
        assert code in (0, 128 + number)
        text = (run.place / "stderr").read_text()
        assert "Traceback" not in text
        if code:
            line = text.splitlines()[-1]
            assert line.startswith("interrupted") and "--resume_from_checkpoint latest" in line
            if "saved at step" in line:
                stepping += 1
                assert last_saved_step(output) == newest_checkpoint(output) == step_of(output / "learned_embeds.safetensors")
        finish(output, stopped=True)
    assert stepping >= 1


def test_signals_while_the_script_starts(tiny_model, subject, tmp_path):
    """Ctrl-C while torch is imported gives one line, not a traceback through a hundred modules."""
    script = [sys.executable, ROOT / "train_zoodip.py", *arguments(tiny_model, subject, tmp_path / "out")]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + PATIENCE
    while sys.platform == "linux" and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and stderr.startswith("\ninterrupted") and stderr.count("\n") == 2, stderr


def test_interrupted_while_packing(server, tmp_path):
    """Ctrl-C during --save_quantized leaves no hundreds of useless megabytes behind."""
    argv = ["--pretrained_model_name_or_path", str(MINIATURE), "--save_quantized", str(tmp_path / "packed")]
    run = Run(server, tmp_path / "place", tmp_path / "none", argv)
    run.wait(until=lambda: any(tmp_path.glob(".packed.*.tmp/unet/*.safetensors")))
    run.send(signal.SIGINT)
    assert run.wait() == 128 + signal.SIGINT
    assert "interrupted" in (run.place / "stderr").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"place"}


# --- memory ---


def test_out_of_memory(start, tmp_path):
    """Pictures of 64 million pixels in 1 GB: one line says what to change, and a damaged folder is not blamed."""
    run = start(tmp_path / "out", dict(memory=1 << 30), resolution=8000)
    assert run.wait() == 2
    line = "out of memory; try closing other programs, --candidates_per_forward 1, --mixed_precision bf16, a smaller --resolution"
    assert line in run.error()


# --- the disk ---


def stopped_by(run: Run, output: Path, fault, mended, finish, words: str, **flags) -> None:
    """Have `fault()` strike after the first checkpoint; the run must stop with one line, and resume once `mended()`."""
    run.wait(until=lambda: newest_checkpoint(output) > 0)
    fault()
    try:
        assert run.wait() == 2
        line = run.error()
        assert str(output) in line and words in line
        run.watch.poll()
        assert not list(output.glob(".*.tmp"))
        assert newest_checkpoint(output) > 0
        assert last_saved_step(output) - newest_checkpoint(output) <= CHECKPOINTING
    finally:
        mended()
    finish(output, **{**flags, "max_train_steps": newest_checkpoint(output) + 5})


def test_file_size_limit(start, finish, tmp_path):
    """A quota on file sizes fails, like a full disk, in the middle of a write: the partial file is not left behind."""
    output = tmp_path / "out"
    run = start(output, **ENDLESS)
    stopped_by(
        run,
        output,
        lambda: resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (3000, 3000)),
        lambda: None,
        finish,
        "cannot be written (File too large)",
        **ENDLESS,
    )


def test_disk_full(start, finish, tmp_path):
    """A file system of 6 MB that something else fills during the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")

    def fill():
        with open(disk / "films", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    try:
        output = disk / "out"
        flags = {**ENDLESS, "save_steps": 1}
        run = start(output, **flags)
        stopped_by(run, output, fill, (disk / "films").unlink, finish, "No space left on device); free some space", **flags)
        fill()
        run = start(disk / "other")  # and one that begins on a full disk
        assert run.wait() == 2 and "free some space" in run.error()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets root give up writing anywhere")
def test_read_only_folder(start, finish, tmp_path):
    """Refused at the start, before a model is loaded; if it becomes read-only later, the last checkpoint stays good."""
    output = tmp_path / "out"
    output.mkdir(mode=0o555)
    for target in (output, output / "below"):
        run = start(target, dict(powerless=True))
        assert run.wait() == 2 and "Permission denied" in run.error() and "--output_dir" in run.error()
    assert list(output.iterdir()) == []
    output.chmod(0o755)
    run = start(output, dict(powerless=True), **ENDLESS)
    stopped_by(run, output, lambda: output.chmod(0o555), lambda: output.chmod(0o755), finish, "Permission denied", **ENDLESS)


# --- two runs ---


def test_two_runs_in_one_folder(start, reference, tmp_path):
    """The second is refused and touches nothing; the first does not notice."""
    output = tmp_path / "out"
    first = start(output, **ENDLESS, checkpoints_total_limit=0)
    first.wait(until=lambda: newest_checkpoint(output) > 0)
    for resume in (None, "latest"):
        second = start(output, **ENDLESS, resume_from_checkpoint=resume)
        assert second.wait() == 2 and "in use by another run" in second.error()
    assert not list(output.glob("previous-*")) and not first.ended()
    first.send(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    shutil.rmtree(output)
    pair = [start(output), start(output)]  # at the same moment: one wins, or one after the other
    codes = sorted(run.wait() for run in pair)
    assert codes in ([0, 2], [0, 0])
    assert (output / "learned_embeds.safetensors").read_bytes() == reference().embedding


def test_a_killed_run_does_not_keep_the_folder(start, reference, tmp_path):
    """The lock dies with its holder: no file to remove by hand after a power cut."""
    output = tmp_path / "out"
    run = start(output, **ENDLESS)
    run.wait(until=lambda: newest_checkpoint(output) > 0)
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert start(output).wait() == 0
    assert (output / "learned_embeds.safetensors").read_bytes() == reference().embedding and (output / "previous-1").is_dir()


# --- the demo ---

DEMO_STEPS, DEMO_CHECKPOINTING = 300, 30  # instead of 500 and 500: twenty kills take minutes, and most fall among the steps


def demo(output: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["sh", ROOT / "train_zoodip.sh", "demo", "--max_train_steps", str(DEMO_STEPS),
         "--checkpointing_steps", str(DEMO_CHECKPOINTING), *flags], stdout=subprocess.DEVNULL,
        stderr=open(output.parent / "stderr", "a"), env={**os.environ, "OUTPUT_DIR": str(output), "PYTHON": sys.executable},
    )  # fmt: skip


def steps_shown(text: str) -> int:
    """The last step shown by the progress bar, which is refreshed twice a second."""
    return max((int(step) for step in re.findall(rf"(\d+)/{DEMO_STEPS} \[", text)), default=0)


@pytest.mark.slow
def test_the_demo_killed_twenty_times(tmp_path):
    """`sh train_zoodip.sh demo` as it is, but shorter and with more checkpoints: SIGKILL at 20 random moments of its life.

    Each run is killed and resumed until it finishes, and must end with the same embedding as the one that was left alone.
    """
    started = time.monotonic()
    assert demo(tmp_path / "reference").wait() == 0
    life, rng, kills, finished, repeated = time.monotonic() - started, random.Random(0), [], 0, []
    output = tmp_path / "out"
    watch = Watch(output)
    while len(kills) < 20 or output.exists():
        (tmp_path / "stderr").write_text("")
        begun = time.monotonic()
        moment = begun + rng.uniform(0, life) if len(kills) < 20 else float("inf")
        process = demo(output, "--resume_from_checkpoint", "latest")
        while process.poll() is None and time.monotonic() < moment:
            watch.poll()
            time.sleep(0.002)
        process.kill()
        process.wait()
        watch.poll()
        if process.returncode != 0:
            assert process.returncode == -signal.SIGKILL
            kills.append(round(time.monotonic() - begun, 1))
            repeated.append(max(0, steps_shown((tmp_path / "stderr").read_text()) - newest_checkpoint(output)))
            assert repeated[-1] <= DEMO_CHECKPOINTING
        else:
            for name in ("learned_embeds", "sks", f"checkpoint-{DEMO_STEPS}"):
                assert (output / f"{name}.safetensors").read_bytes() == (tmp_path / f"reference/{name}.safetensors").read_bytes()
            for name in ("training_log.csv", f"validation-{DEMO_STEPS}.png"):
                assert (output / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
            shutil.rmtree(output)
            finished += 1
            life = min(life, max(5.0, time.monotonic() - begun))  # shorter if the reference had to share the machine
    print(
        f"\nlife of the demo {life:.0f} s; killed after {kills} s; steps repeated {repeated}; {finished} runs finished; "
        f"{watch.polls} polls of the folder, {len(watch.seen)} versions of files, all whole"
    )
