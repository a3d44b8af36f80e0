"""A run that is recorded, and can be interrupted and resumed exactly, whatever is trained.

A trainer has `state_dict`, `load_state_dict` and `remedy` (what to try if its numbers diverge); its outputs have
`evaluate`, `draw`, `check`, `save`, `result` and `guide`, `files` (patterns of what they write) and `draws_before` (whether they
draw the untrained model), like `TokenOutputs`. Every training script then has the same form:

    run = Run(trainer, generator, accelerator, settings, fingerprint, ...)
    run.resume(checkpoint), run.claim(base)        # errors are reported here, before a model is loaded
    with run:
        for step in run.steps(outputs):            # bar, curve, checkpoints, pictures, Ctrl-C
            run.note(loss of the step, forwards)
    sys.exit(run.finish(outputs))
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from zoodip.checkpoints import can_follow, checkpoint_step, list_checkpoints, read_checkpoint, write_checkpoint
from zoodip.errors import BrokenCheckpoint, InputError, Interrupted, notice
from zoodip.files import ensure_writable, lock_folder, write_atomically, write_image, write_json
from zoodip.folder import refuse_model_folder
from zoodip.process import StopSignal
from zoodip.records import environment, peak_memory_gb

TRACKER = "zoodip"  # the project in W&B, and TensorBoard's folder in the output folder
# folders of the output folder in which a run writes
WRITTEN_IN = ("", "unet*/", "vae/", "text_encoder/", "tokenizer/", "scheduler/", "peft_adapter*/", "class_images/")
LEFTOVER = re.compile(r"\..+\.[0-9]+\.tmp")  # as `write_atomically` names them; other .tmp files are the user's
MOST_SKIPPED = 20  # consecutive steps without a usable loss


@dataclass
class Progress:
    """How far a run has got; with the trainer's state and the generator's, everything that a checkpoint holds."""

    step: int = 0
    forwards: int = 0  # UNet forwards of one batch, evaluation not counted
    skipped: int = 0  # steps without a usable loss: not finite or, of Gauss-Newton, lost in rounding
    smoothed_loss: float | None = None  # exponential mean of the steps' reported losses, horizon about 100 steps
    curve: list[dict] = field(default_factory=list)  # rows of training_log.csv
    skipped_in_a_row: int = 0


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Run:
    """One run of a trainer in its output folder. Flags as in `zoodip.arguments.add_run_flags`; files are written by the main
    process only.

    settings: what affects the result, as recorded; fingerprint: {what: SHA-256} of the inputs. Resuming with others is refused.
    """

    def __init__(
        self,
        trainer,
        generator: torch.Generator,
        accelerator,
        settings: dict,
        fingerprint: dict[str, str],
        *,
        output_dir: str | Path,
        max_train_steps: int,
        save_steps: int,
        checkpointing_steps: int,
        checkpoints_total_limit: int,
        eval_steps: int,
        validation_steps: int,
        unit: str = "step",
    ):
        self.trainer, self.generator, self.accelerator = trainer, generator, accelerator
        self.settings, self.fingerprint, self.folder = settings, fingerprint, Path(output_dir)
        self.max_train_steps, self.save_steps, self.eval_steps = max_train_steps, save_steps, eval_steps
        self.checkpointing_steps, self.checkpoints_total_limit = checkpointing_steps, checkpoints_total_limit
        self.validation_steps, self.unit = validation_steps, unit
        self.progress, self.seconds, self.stop, self.lock, self.bar = Progress(), 0.0, StopSignal(), None, None
        self.first_step, self.resumed_from = 0, None
        self.produced = {}  # {name: description} of the other files written at the end

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    # --- before the model is loaded

    def resume(self, checkpoint: str | None) -> None:
        """Restore a checkpoint's state: from the given file or, for "latest", from the newest whole one. Raises InputError."""
        if checkpoint is None:
            return
        if checkpoint == "latest":
            self.load_latest()
        else:
            self.load_checkpoint(Path(checkpoint))
        steps = gather_object([self.progress.step])  # of all processes
        if len(set(steps)) > 1:
            raise InputError(
                f"--resume_from_checkpoint {checkpoint}: the processes are at different steps ({', '.join(map(str, steps))}); "
                "give an --output_dir that all of them share, or copy the checkpoint to every machine"
            )
        if self.progress.step > self.max_train_steps:
            notice(f"{self.resumed_from}: was saved after more steps than --max_train_steps {self.max_train_steps}; nothing is "
                   "left to train")  # fmt: skip

    def load_latest(self) -> None:
        for path in reversed(list_checkpoints(self.folder)):
            try:
                self.load_checkpoint(path)
                return
            except BrokenCheckpoint as error:
                notice(f"skipped a broken checkpoint: {error}")
        notice(f"{self.folder}: no checkpoint to continue from, starting at step 0")

    def load_checkpoint(self, path: Path) -> None:
        """Raises BrokenCheckpoint, or InputError if it is from another run."""
        header, tensors = read_checkpoint(path)

        def from_elsewhere(fault: str) -> InputError:
            return InputError(
                f"--resume_from_checkpoint {path}: is from another method or version ({fault}); start over "
                "without --resume_from_checkpoint"
            )

        try:
            saved, ours = header["settings"], self.settings
            if saved.get("method") != ours.get("method"):
                raise from_elsewhere(f"of {saved.get('method', 'ZOODiP')}, not {ours.get('method', 'ZOODiP')}")
            different = []
            for name in dict.fromkeys([*saved, *ours]):  # an optional setting is recorded only if it is not at its default
                was, now = (repr(settings[name]) if name in settings else "not set" for settings in (saved, ours))
                if saved.get(name) != ours.get(name) or (name in saved) != (name in ours):
                    different.append(f"--{name} was {was}, is {now}")
            if different:
                raise InputError(
                    f"--resume_from_checkpoint {path}: is from another run ({'; '.join(different)}); use the same "
                    "settings, or start over without --resume_from_checkpoint"
                )
            for what, digest in self.fingerprint.items():
                if header["fingerprint"][what] != digest:
                    raise InputError(
                        f"--resume_from_checkpoint {path}: the {what} have changed since it was saved; restore "
                        "them, or start over without --resume_from_checkpoint"
                    )
            progress = Progress(**{name: header["progress"][name] for name in vars(Progress())})
        except (LookupError, TypeError, AttributeError) as error:
            fault = f"{error} is missing" if isinstance(error, LookupError) else f"its header has another form: {error}"
            raise from_elsewhere(fault) from error
        if not can_follow(tensors, self.state()[1]):
            raise BrokenCheckpoint(path, "its tensors do not match this run")
        try:
            self.generator.set_state(tensors.pop("generator"))
        except RuntimeError as error:
            raise BrokenCheckpoint(path, f"its generator: {error}") from error
        self.trainer.load_state_dict({**tensors, **header.get("state", {})})
        self.progress, self.first_step, self.resumed_from = progress, progress.step, path

    def state(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """What a checkpoint holds: (header, tensors). Non-tensor parts of the trainer's state go into the header."""
        state = self.trainer.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        header = dict(
            settings=self.settings,
            fingerprint=self.fingerprint,
            progress=vars(self.progress),
            state={name: value for name, value in state.items() if name not in tensors},
        )
        return header, {**tensors, "generator": self.generator.get_state()}

    def claim(self, base: Path, saved: int = 0) -> None:
        """Create the output folder, check that it can hold the run's files, lock it, remove partial files of a killed run.

        base: the model's folder; saved: size in bytes of what is learned, if that is large. Raises InputError.
        """
        if self.is_main:
            refuse_model_folder("output_dir", self.folder, base)
            checkpoint = sum(tensor.nbytes for tensor in self.state()[1].values())
            copies = self.max_train_steps // self.save_steps - self.progress.step // self.save_steps if self.save_steps else 0
            regular = checkpoint if self.checkpointing_steps else 0
            ensure_writable(self.folder, "output_dir", saved * (copies + 1) + regular)
            if (free := shutil.disk_usage(self.folder).free) < checkpoint:
                notice(f"{self.folder}: has {free / 1e9:.3g} GB free; if interrupted, the run could not save its checkpoint of "
                       f"{checkpoint / 1e9:.3g} GB")  # fmt: skip
            self.lock = lock_folder(self.folder)
            try:
                hidden = [path for folder in WRITTEN_IN for path in self.folder.glob(f"{folder}.*.tmp")]
                for path in hidden:
                    if LEFTOVER.fullmatch(path.name) and path.is_file():
                        path.unlink()
            except OSError as error:
                raise cannot_be_moved(error) from error
        self.accelerator.wait_for_everyone()

    # --- the steps

    def __enter__(self) -> Run:
        self.stop.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.stop.__exit__()
        if self.bar is not None:
            self.bar.close()
        self.accelerator.end_training()
        if self.lock is not None:
            self.lock.release()

    def steps(self, outputs) -> Iterator[int]:
        """Yield the number of each step, from the current one to the last or to a signal; in between, and at the end, write all
        that the run leaves. The caller trains one step and calls `note`. Raises InputError if the run cannot continue."""
        progress, stopped = self.progress, False
        elsewhere = self.resumed_from is not None and self.resumed_from.resolve().parent != self.folder.resolve()
        if self.is_main and (progress.step == 0 or elsewhere):
            set_aside(self.folder, outputs.files)  # before a tracker opens its folder, which is moved too
        if elsewhere and self.checkpointing_steps:
            self.write_checkpoint()  # this folder's first, from which `latest` goes on
        given = {name: value for name, value in self.settings.items() if value is not None}
        plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in given.items()}
        self.start_trackers(plain)
        self.limit_checkpoints()  # a run killed between writing and removing leaves one too many
        if self.eval_steps and not progress.curve:
            self.evaluate(outputs)
        if progress.step:  # the run may have stopped before this step's pictures were drawn
            stopped = self.draw_if_due(outputs, unless_drawn=True)
            if stopped and elsewhere and not self.checkpointing_steps:
                self.write_checkpoint()
        if outputs.draws_before and progress.step == 0:
            if self.is_main:
                self.draw(outputs, final=False)
            stopped = self.stop_requested()
        self.bar = tqdm(
            total=self.max_train_steps,
            initial=progress.step,
            unit=self.unit,
            smoothing=0.05,
            mininterval=0.5,
            disable=not self.is_main or progress.step >= self.max_train_steps,
        )
        while progress.step < self.max_train_steps and not stopped:
            started = time.perf_counter()
            yield progress.step + 1
            self.seconds += time.perf_counter() - started
            stopped = self.stop_requested()
            progress.step += 1
            stopped = self.after_step(outputs, stopped)
        if progress.step == progress.skipped > 0 and not stopped:
            raise InputError("no step had a usable loss; try --mixed_precision fp32, or another model")
        self.bar.close()
        if self.is_main:
            outputs.save(self.folder, progress.step, final=True)
            self.write_record()
            if not self.interrupted:  # after saving: hours of training must not depend on a picture
                self.draw(outputs, final=True)
                if self.stop.number and not self.checkpointing_steps:  # so that the pictures are drawn on resuming
                    self.write_checkpoint()
                self.produced = {name: what for name, what in outputs.guide().items() if (self.folder / name).exists()}
        self.accelerator.wait_for_everyone()

    def start_trackers(self, settings: dict) -> None:
        """Raises InputError if a tracker refuses, for example W&B without a login."""
        try:
            self.accelerator.init_trackers(TRACKER, settings)
        except Exception as error:  # each tracker raises its own types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"--report_to: the tracker cannot be started ({reason}); log in to it, or leave the flag out"
            ) from error

    def note(self, loss: float | None, forwards: int) -> None:
        """Record the current step: its loss, None if it was not usable and the step was skipped, and its UNet forwards."""
        progress = self.progress
        progress.forwards += forwards
        if loss is None:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        else:
            previous = loss if progress.smoothed_loss is None else progress.smoothed_loss
            progress.smoothed_loss = 0.99 * previous + 0.01 * loss
            progress.skipped_in_a_row = 0

    def stop_requested(self) -> bool:
        """Whether any process has been told to stop; all processes stop at the same step."""
        requested = self.stop.number != 0
        if self.accelerator.num_processes == 1:
            return requested
        flag = torch.tensor([float(requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def after_step(self, outputs, stopped: bool) -> bool:
        """Write what the finished step leaves -> whether the run is to stop."""
        progress, step = self.progress, self.progress.step
        if progress.skipped_in_a_row >= MOST_SKIPPED:
            self.write_checkpoint()
            raise InputError(
                f"no usable loss (not finite, or lost in rounding) for {MOST_SKIPPED} steps up to step {step}; try "
                f"--mixed_precision fp32, or {self.trainer.remedy}"
            )
        assert self.bar is not None  # set in `steps`
        warning = outputs.check(step)
        if warning and self.is_main:
            self.bar.write(warning, file=sys.stderr)
        self.bar.update()
        loss = progress.smoothed_loss or math.nan
        self.bar.set_postfix_str(f"loss {loss:.4f}, {peak_memory_gb(self.accelerator.device):.2f} GB", refresh=False)
        if due(step, 10):
            self.accelerator.log({"train/loss": loss}, step=step)
        last = step == self.max_train_steps
        if self.eval_steps and (due(step, self.eval_steps) or last):
            self.evaluate(outputs)
        if due(step, self.save_steps) and self.is_main:
            outputs.save(self.folder, step, final=False)
        # what a step leaves comes before its checkpoint, so that a run killed in between repeats all of it; but pictures come
        # after it, because steps must not depend on them
        saved = due(step, self.checkpointing_steps) or stopped or (last and self.checkpointing_steps)
        if saved:
            self.write_checkpoint()
        if stopped:
            return True
        ends = True  # stays True if drawing raises (out of memory, for example): then save first
        try:
            ends = self.draw_if_due(outputs)
        finally:
            if ends and not saved:
                self.write_checkpoint()
        return ends

    def evaluate(self, outputs) -> None:
        """Add a row of the curve to training_log.csv and the tracker."""
        progress = self.progress
        row = dict(step=progress.step, unet_forwards=progress.forwards, loss=progress.smoothed_loss, **outputs.evaluate())
        progress.curve.append(row)
        if self.is_main:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(progress.curve)
            write_atomically(self.folder / "training_log.csv", text.getvalue().encode())
        logged = {f"eval/{name}": value for name, value in row.items() if name != "step" and value is not None}
        self.accelerator.log(logged, step=row["step"])

    def draw_if_due(self, outputs, unless_drawn: bool = False) -> bool:
        """Draw the pictures due at this step, if any -> whether the run is to stop. A run that is told to stop draws none, and
        begins with them when it is resumed. All processes call this, because they agree on stopping."""
        if not due(self.progress.step, self.validation_steps) or self.progress.step == self.max_train_steps:
            return False
        if self.is_main and not (unless_drawn and (self.folder / f"validation-{self.progress.step}.png").exists()):
            self.draw(outputs, final=False)
        return self.stop_requested()

    def draw(self, outputs, final: bool) -> None:
        """Write the pictures of this step, until a signal arrives."""
        with suppress(Interrupted):
            for name, picture in outputs.draw(self.progress.step, final, lambda: self.stop.number != 0):
                write_image(self.folder / name, picture)
                for tracker in self.accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images(
                        {Path(name).stem.partition("-")[0]: np.asarray(picture)[None]}, self.progress.step, **layout
                    )

    def write_checkpoint(self) -> None:
        if self.is_main:
            write_checkpoint(self.folder / f"checkpoint-{self.progress.step}.safetensors", *self.state())
            self.limit_checkpoints()

    def limit_checkpoints(self) -> None:
        """Remove all but the newest up to this step; later ones exist after going back to an older one, and are kept."""
        if self.checkpoints_total_limit and self.is_main:
            older = [path for path in list_checkpoints(self.folder) if checkpoint_step(path) <= self.progress.step]
            for path in older[: -self.checkpoints_total_limit]:
                path.unlink(missing_ok=True)

    # --- the end

    @property
    def interrupted(self) -> bool:
        return self.progress.step < self.max_train_steps

    def write_record(self) -> None:
        """Write run.json: what was run, on what, how fast (without evaluation and pictures) and in how much memory.

        If this process only drew what was missing, the record of the one that trained is kept.
        """
        progress, steps = self.progress, self.progress.step - self.first_step
        if steps == 0:
            with suppress(OSError, ValueError, LookupError, TypeError):
                if json.loads((self.folder / "run.json").read_text())["step"] == progress.step:
                    return
        write_json(
            self.folder / "run.json",
            dict(
                settings=self.settings,
                step=progress.step,
                unet_forwards=progress.forwards,
                skipped_steps=progress.skipped,
                smoothed_loss=progress.smoothed_loss,
                steps_this_time=steps,
                seconds_this_time=round(self.seconds, 2),
                steps_per_second=round(steps / self.seconds, 3) if self.seconds else None,
                peak_memory_gb=round(peak_memory_gb(self.accelerator.device), 3),
                processes=self.accelerator.num_processes,
                **environment(self.accelerator.device),
            ),
            indent=2,
        )

    def finish(self, outputs) -> int:
        """Report where the run stands -> exit code: 0, or 128 + signal if it was interrupted (and saved)."""
        step, skipped, signalled = self.progress.step, self.progress.skipped, self.interrupted or self.stop.number != 0
        # after going back to an older checkpoint, there may be later ones
        latest = max(map(checkpoint_step, list_checkpoints(self.folder)), default=step) == step
        checkpoint = "latest" if latest else str(self.folder / f"checkpoint-{step}.safetensors")
        if self.is_main and self.interrupted:
            print(
                f"interrupted and saved at step {step}; to continue, run the same command with "
                f"--resume_from_checkpoint {checkpoint}",
                file=sys.stderr,
            )
        elif self.is_main:
            print(
                f"{outputs.result(self.folder)} after {step} {self.unit}s"
                + (f" ({skipped} skipped: no usable loss)" if skipped else "")
            )
            for name, what in self.produced.items():
                print(f"{self.folder / name}: {what}")
            if signalled:
                print(
                    "interrupted while drawing; everything but the pictures is saved, and the same command with "
                    f"--resume_from_checkpoint {checkpoint} draws them",
                    file=sys.stderr,
                )
        return 128 + (self.stop.number or signal.SIGTERM) if signalled else 0


def set_aside(folder: Path, results: Sequence[str]) -> None:
    """Move an earlier run's `results` (patterns) and what every run leaves to previous-N. Raises InputError."""
    patterns = (
        *results,
        "checkpoint-*.safetensors",
        "training_log.csv",
        "run.json",
        "validation-*.png",
        "before_after.png",
        TRACKER,
    )
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    move_aside(folder, [path for path in found if path.name != TRACKER or any(path.rglob("events.out.tfevents*"))])


def move_aside(folder: Path, earlier: list[Path]) -> None:
    """Move files and folders within `folder` to its previous-N. Raises InputError."""
    if not earlier:
        return
    try:
        number = 1
        while (folder / f"previous-{number}").exists():
            number += 1
        (folder / f"previous-{number}").mkdir()
        for path in earlier:
            path.rename(folder / f"previous-{number}" / path.name)
    except OSError as error:
        raise cannot_be_moved(error) from error
    notice(f"{folder}: moved {len(earlier)} files of an earlier run to {folder / f'previous-{number}'}")


def cannot_be_moved(error: OSError) -> InputError:
    return InputError(f"{error.filename}: cannot be moved or removed ({error.strerror}); choose another folder")
