"""Executes runs: the method's own `main`, then a judge of what it left; many runs are done in worker processes."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import TypeVar, cast

import torch
from safetensors import safe_open
from tqdm import tqdm

from reproduction import runs
from reproduction.judging import open_judge, snapshot_steps
from reproduction.runs import METHODS, UNTRAINED, Job, Settings
from reproduction.variations import varied
from zoodip.arguments import SHARED_SETTINGS, flags_for, settings_of
from zoodip.checkpoints import checkpoint_step, list_checkpoints
from zoodip.diffusion import load_scheduler, settle_flags
from zoodip.errors import InputError, prepare_environment, quiet_libraries
from zoodip.files import write_json
from zoodip.folder import resolve_model
from zoodip.prompts import initial_token, initializer_ids, load_tokenizer, read_embedding_rows, save_embedding
from zoodip.records import ROOT

Task = TypeVar("Task")
Result = TypeVar("Result")

# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


def learn(spec: dict, settings: Settings, **flags: int) -> dict:
    """Let the method's own `main` do the run, from its checkpoint if it was interrupted -> its run.json.

    Raises KeyboardInterrupt if it is interrupted now, after it has saved. flags: output flags that replace the suite's own.
    """
    args, folder = runs.spec_args(spec, settings), settings.folder(spec)
    record, steps = folder / "run.json", args.max_train_steps
    if not record.exists() or json.loads(record.read_text())["step"] < steps:  # else only the judging was interrupted
        snapshots = 0 if runs.tunes_weights(spec["method"]) else snapshot_steps(steps)[0]
        args.eval_steps, args.save_steps, args.resume_from_checkpoint = snapshots, snapshots, "latest"
        args.checkpoints_total_limit = 0
        vars(args).update(flags)
        if hasattr(args, "tau"):  # at the refreshes of Subspace Gradient, for `seen_at_refreshes`
            args.checkpointing_steps = args.tau
        with varied(spec.get("variation", [])):
            if METHODS[spec["method"]].main(args):
                raise KeyboardInterrupt
    return json.loads(record.read_text())


def seen_at_refreshes(folder: Path, every: int) -> dict:
    """What the checkpoints at the refreshes of Subspace Gradient show: how many directions each refresh removed (Fig. 8).

    Also the share of the square of Adam's first moment that then lay in these directions, and the share of its second moments
    that was 0.
    """
    removed, shares, zeros = [], [], []
    for path in list_checkpoints(folder):
        with safe_open(path, framework="pt") as file:
            if checkpoint_step(path) % every == 0 and "subspace.projection" in file.keys():
                projection, momentum = file.get_tensor("subspace.projection"), file.get_tensor("adam.exp_avg").flatten()
                removed.append(len(projection))
                shares.append(((projection @ momentum).square().sum() / momentum.square().sum()).item())
                zeros.append((file.get_tensor("adam.exp_avg_sq") == 0).float().mean().item())
    return dict(removed=removed) | (dict(momentum_removed=mean(shares), v_zero=mean(zeros)) if zeros else {})


def leave_untrained(spec: dict, settings: Settings) -> None:
    """Write the token of a run that learns nothing, in the form that a run leaves; untuned weights leave nothing.

    A description's token has as many vectors as it has words.
    """
    if runs.tunes_weights(spec["method"]):
        return
    args = runs.spec_args(spec, settings)
    folder, args.variant = resolve_model(settings.model, args.revision, args.variant)
    tokenizer = load_tokenizer(folder, args.placeholder_token, 1)
    vars(args).update(settle_flags(folder, args.variant, torch.device("cpu"), **flags_for(settle_flags, vars(args))))
    words = read_embedding_rows(folder, args.variant, initializer_ids(tokenizer, args.initializer_token))
    theta = words if spec["method"] == "described" else initial_token(words, args.num_vectors)
    recorded = settings_of(vars(args), SHARED_SETTINGS) | {"num_vectors": len(theta)}
    save_embedding(settings.folder(spec), theta, recorded, load_scheduler(folder).config.prediction_type, 0, final=True)


def measure_cost(spec: dict, settings: Settings) -> None:
    """Measure speed and peak memory over a few steps by the method's own script, in a fresh process alone on the machine.

    The machine's load before the run is also recorded; it shows whether the process was alone. What was learned is removed: its
    size is all that tables use.
    """
    folder, load = settings.folder(spec), os.getloadavg()[0]
    argv = [*runs.spec_argv(spec, settings), "--eval_steps", "0", "--checkpointing_steps", "0"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run([sys.executable, "-m", METHODS[spec["method"]].__name__, *argv], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    if process.returncode:
        raise InputError(f"{spec['method']} ended with {process.returncode}: {(process.stderr.strip() or '-').splitlines()[-1]}")
    run = json.loads((folder / "run.json").read_text())
    names = ("steps_per_second", "peak_memory_gb", "device", "versions", "commit")
    write_json(folder / "result.json", dict(
        spec=spec, **{name: run[name] for name in names}, forwards=run["unet_forwards"],
        stored_bytes=runs.stored_bytes(spec, settings), load=load))  # fmt: skip
    learned = runs.learned_path(spec, settings)
    shutil.rmtree(learned) if learned.is_dir() else learned.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Many runs
# ---------------------------------------------------------------------------------------------------------------------


def lacks_what_to_draw(job: Job, settings: Settings) -> bool:
    """Whether a run from an archive, which lacks tuned weights and some snapshots, is to be scored by what it lacks."""
    spec, kinds = job.spec, set(job.to_score(settings))
    if not kinds or spec["method"] not in METHODS:
        return False
    snapshots = snapshot_steps(runs.spec_args(spec, settings).max_train_steps)[:-1] if kinds & {"along", "best"} else []
    needed = [settings.folder(spec) / f"learned_embeds-steps-{step}.safetensors" for step in snapshots]
    return not all(path.exists() for path in [runs.learned_path(spec, settings), *needed])


def stopped_on_the_way(job: Job, settings: Settings) -> bool:
    """Whether a run from an archive was being learned again when it was interrupted: its weights are then not the last ones."""
    return not job.spec.get("cost") and bool(job.to_score(settings) and list_checkpoints(settings.folder(job.spec)))


def do(job: Job, settings: Settings) -> None:
    """Do what is still missing of one job."""
    spec, folder = job.spec, settings.folder(job.spec)
    folder.mkdir(parents=True, exist_ok=True)
    judge = cache(lambda: open_judge(spec, settings))
    if not (folder / "result.json").exists() or lacks_what_to_draw(job, settings) or stopped_on_the_way(job, settings):
        write_json(folder / "spec.json", spec)
        if spec.get("cost"):
            measure_cost(spec, settings)
        elif spec["method"] not in METHODS:
            if spec["method"] in UNTRAINED:
                leave_untrained(spec, settings)
            write_json(folder / "result.json", judge().result(None))
        else:
            run = learn(spec, settings)
            result = judge().result(run) | seen_at_refreshes(folder, spec["flags"].get("tau", 128))
            for path in folder.glob("scores-*.json"):  # of an archive: they are of the weights that it lacked
                path.unlink()
            write_json(folder / "result.json", result)
            for path in list_checkpoints(folder):  # they were for resuming
                path.unlink()
    for kind in job.to_score(settings):
        judge().score(kind)


interrupted = False  # in this worker: the pool would still give it the job that it has already fetched


def do_in_worker(job: Job, settings: Settings, do: Callable[[Job, Settings], None] = do) -> str | None:
    """Do a job -> None, or why it failed; the log is in the job's folder."""
    global interrupted
    log = io.StringIO()  # takes progress bars too: those of several workers on one terminal are noise
    try:
        if interrupted:
            raise KeyboardInterrupt
        with redirect_stdout(log), redirect_stderr(log):
            do(job, settings)
        return None
    except KeyboardInterrupt:
        interrupted = True
        raise
    except (Exception, SystemExit) as error:  # one broken run must not end the others
        folder = settings.folder(job.spec)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.log").write_text(re.sub(r"[^\n]*\r", "", log.getvalue()) + traceback.format_exc())
        return f"{type(error).__name__}: {error}"


def share_of(jobs: list[Job], shard: tuple[int, int]) -> list[Job]:
    """The jobs of shard (I, K): every K-th from the I-th. Those that measure cost are all the first's: rounds of one machine."""
    number, count = shard
    together, alone = ([job for job in jobs if bool(job.spec.get("cost")) is cost] for cost in (False, True))
    return together[number - 1 :: count] + (alone if number == 1 else [])


def run_jobs(jobs: list[Job], settings: Settings, workers: int, do: Callable[[Job, Settings], None] = do) -> list[str]:
    """Do all unfinished jobs -> one line per failure. Runs that measure cost come last, one at a time."""
    waiting = [job for job in jobs if not job.done(settings)]
    waiting.sort(key=lambda job: (str(job.spec["flags"].get("quantization")), job.spec["subject"]))  # a worker keeps its model
    together, alone = ([job for job in waiting if bool(job.spec.get("cost")) is cost] for cost in (False, True))
    alone.sort(key=lambda job: job.spec["seed"])  # in rounds: a temporary slowdown affects all rows alike
    failures = []
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run", smoothing=0, desc="runs") as bar:

        def done(job: Job, failure: str | None) -> None:
            if failure is not None:
                of = f"{job.spec['method']} {job.spec['subject']} seed {job.spec['seed']}"
                failures.append(f"{of}: {failure} ({settings.folder(job.spec)}/error.log)")
                tqdm.write(failures[-1], file=sys.stderr)
            bar.update()

        if together:
            do_one = partial(do_in_worker, settings=settings, do=do)
            try:
                for job, failure in in_processes(do_one, together, workers, settings.threads):
                    done(job, failure)
            except KeyboardInterrupt:
                tqdm.write("interrupted: saving; the same command continues", file=sys.stderr)
                raise
        for job in alone:
            done(job, do_in_worker(job, settings, do))
    return failures


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def in_processes(do: Callable[[Task], Result], tasks: Iterable[Task], count: int, threads: int) -> Iterator[tuple[Task, Result]]:
    """(task, result of `do`) as tasks end, in `count` processes; a caller that leaves the loop waits only for those begun.

    Raises InputError if a process is killed, and whatever `do` raises.
    """
    prepare_environment()
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start_worker, (threads,)) as pool:
        futures = {pool.submit(do_for_parent, do, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise InputError("a worker was killed, perhaps because memory ran out; try fewer --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # a small model would otherwise have one
    quiet_libraries()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script starts out ignoring it
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Interrupt this worker, which then saves, if its parent has been killed: nobody waits for its work."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGINT)  # raised here, it would not wake that thread


def do_for_parent(do: Callable[[Task], Result], task: Task) -> Result:
    """Call `do`; a worker without a parent then ends here, because it would wait for the next task for ever."""
    try:
        return do(task)
    finally:
        if (parent := multiprocessing.parent_process()) is not None and not parent.is_alive():
            os._exit(1)
