"""What the measuring scripts share: the repository on the import path, records, tables, the world as data, memory.

The scripts run as `python benchmarks/<script>.py` from the repository root.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the only place: the scripts import this module before anything of the repository

import train_zoodip as zoodip  # noqa: E402
from train_zoodip import DTYPES  # noqa: E402


def cli(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """`main` for the command line: what the user can mend is one line on stderr and exit code 2."""
    zoodip.quiet_libraries()
    try:
        main(args)
    except zoodip.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ----------------------------------------------------------------------------------------------------- records


def hardware(device: str = "cpu") -> str:
    """The class of the machine, never its name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def plain_arguments(args: argparse.Namespace) -> dict:
    """Arguments fit to be published: of a path that leads out of the repository only its last part."""

    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        if not isinstance(value, (str, Path)) or not Path(value).is_absolute():
            return str(value) if isinstance(value, Path) else value
        path = Path(value).resolve()
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return {name: plain(value) for name, value in vars(args).items()}


def environment(device: str = "cpu") -> dict:
    """Versions, commit and class of machine that a result depends on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True)
    return dict(hardware=hardware(device), python=platform.python_version(), versions=zoodip.package_versions(),
                commit=git.stdout.strip() if git.returncode == 0 else None)


def write_report(name: str, args: argparse.Namespace, results: dict, markdown: str, device: str = "cpu",
                 folder: Path | None = None, show: bool = True) -> None:
    """<name>.json (arguments, environment, results) and <name>.md (the tables, and where they come from)."""
    where = environment(device)
    record = dict(arguments=plain_arguments(args), **where, results=results)
    folder = folder or ROOT / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    zoodip.write_atomically(folder / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    foot = f"\nMeasured by `benchmarks/{name}.py` on {where['hardware']}; {versions}; commit {where['commit']}.\n"
    zoodip.write_atomically(folder / f"{name}.md", (markdown.rstrip() + "\n" + foot).encode())
    if show:
        print(markdown)


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; numbers should come formatted."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


# ----------------------------------------------------------------------------------------------------- model and data


@dataclass
class Loaded:
    """A model folder and the parts of it that a measurement holds in memory."""

    folder: Path
    tokenizer: object
    scheduler: object  # DDPMScheduler: the noise schedule
    unet: nn.Module
    text_encoder: nn.Module
    weights: str  # hash of the weight files: a refreshed model is another model

    def prompts(self, texts: list[str], args: argparse.Namespace) -> zoodip.Prompts:
        return zoodip.build_prompts(self.tokenizer, self.folder, args.variant, texts, args.placeholder_token, args.num_vectors)

    def initial_token(self, args: argparse.Namespace) -> torch.Tensor:
        """The initializer's embedding, [V, d]."""
        pieces = zoodip.initializer_ids(self.tokenizer, args.initializer_token)
        return zoodip.initial_token(zoodip.read_embedding_rows(self.folder, args.variant, pieces), args.num_vectors)

    def frozen(self, prompts: zoodip.Prompts, args: argparse.Namespace) -> zoodip.FrozenModel:
        return zoodip.FrozenModel(self.unet, self.text_encoder, prompts.rows.to(self.unet.conv_in.weight.device),
                                  args.candidates_per_forward)


def load_part(folder: Path, part: str, quantization: str, dtype: torch.dtype, device: str) -> nn.Module:
    """UNet or text encoder exactly as train_zoodip.py loads it."""
    skip = ("embeddings.token_embedding.",) if part == "text_encoder" else ()
    return zoodip.load_frozen(folder, part, None, quantization, dtype, device, skip)


def load_model(args: argparse.Namespace, device: str) -> Loaded:
    """The model of `args`, whose open defaults (precision, mu, resolution) are filled in as train_zoodip.py does."""
    from diffusers import DDPMScheduler

    folder = zoodip.find_model_folder(args.pretrained_model_name_or_path)
    zoodip.resolve_defaults(args, folder, torch.device(device))
    parts = [load_part(folder, part, args.quantization, DTYPES[args.mixed_precision], device)
             for part in ("unet", "text_encoder")]
    tokenizer = zoodip.load_tokenizer(folder, args.placeholder_token, args.num_vectors)
    digest = hashlib.sha256()
    for part in zoodip.WEIGHT_NAMES:
        for name, tensor in zoodip.read_tensors(zoodip.find_weights(folder, part, None)):
            if not (part == "vae" and name.startswith(("decoder.", "post_quant_conv."))):  # no loss depends on the decoder
                digest.update(name.encode() + tensor.numpy().tobytes())
    return Loaded(folder, tokenizer, DDPMScheduler.from_pretrained(folder / "scheduler"), *parts, digest.hexdigest()[:16])


def encode(folder: Path, images: list[Image.Image], args: argparse.Namespace, device: str) -> torch.Tensor:
    """Latent distributions [N, 2, 2, 4, h, w] by the unquantised encoder, from image files as in training."""
    vae = zoodip.load_frozen(folder, "vae", None, "none", torch.float32, device, skip=("decoder.", "post_quant_conv."))
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary) / f"{i:05}.png" for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path, compress_level=1)
        return zoodip.encode_images(vae, paths, args.resolution, args.center_crop)


def merge_batches(batches: list[zoodip.Batch], size: int) -> list[zoodip.Batch]:
    """Join batches of one into batches of `size`, so that evaluating a fixed set takes fewer forwards."""
    merged = []
    for first in range(0, len(batches), size):
        group = batches[first : first + size]
        merged.append(zoodip.Batch(*(torch.cat([getattr(batch, name) for batch in group])
                                     for name in zoodip.Batch.__dataclass_fields__)))
    return merged


# ----------------------------------------------------------------------------------------------------- statistics

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
         2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t, values taken as independent); nan for one value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    quantile = T_975[len(values) - 2] if len(values) - 2 < len(T_975) else 1.96
    return float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


# ----------------------------------------------------------------------------------------------------- memory


def process_tree(pid: int) -> list[int]:
    """`pid` and its descendants (Linux)."""
    found, open_list = [], [pid]
    while open_list:
        current = open_list.pop()
        found.append(current)
        for path in Path(f"/proc/{current}/task").glob("*/children"):
            try:
                open_list += [int(child) for child in path.read_text().split()]
            except OSError:
                continue  # the process ended between listing and reading
    return found


def resident_bytes(pid: int) -> dict[str, int]:
    """VmRSS, RssAnon, RssFile and RssShmem of a process and its descendants, summed; zeros once they are gone."""
    total = dict.fromkeys(("VmRSS", "RssAnon", "RssFile", "RssShmem"), 0)
    for each in process_tree(pid):
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in total:
                total[name] += int(value.split()[0]) * 1024
    return total


def run_watched(command: list[str], env: dict[str, str] | None = None, interval: float = 0.02) -> tuple[int, str, dict[str, int]]:
    """Run a command to its end -> (exit code, what it printed, peak bytes of `resident_bytes`).

    Samples every `interval` seconds. The peaks need not be of one moment.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    peaks, ended, pieces = {}, threading.Event(), []

    def sample() -> None:
        while not ended.wait(interval):
            for name, value in resident_bytes(process.pid).items():
                peaks[name] = max(peaks.get(name, 0), value)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    while piece := process.stdout.read(4096):
        pieces.append(piece.decode(errors="replace"))
        sys.stderr.write(pieces[-1])
    code = process.wait()
    ended.set()
    sampler.join()
    return code, "".join(pieces), peaks
