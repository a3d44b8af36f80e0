"""What a run may leave at any moment: whole files and nothing else."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load

from zoodip.checkpoints import state_digest

EMBEDDING, CHECKPOINT = r"learned_embeds(-steps-\d+)?\.safetensors|sks\.safetensors", r"checkpoint-\d+\.safetensors"


def check_file(path: Path) -> None:
    """Parse one file to its last byte. A file that is gone again, for example an old checkpoint, is no error."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    if path.suffix == ".safetensors":
        tensors = load(content)  # refuses missing and extra bytes
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        assert re.fullmatch(f"{EMBEDDING}|{CHECKPOINT}", path.name), path.name
        if re.fullmatch(CHECKPOINT, path.name):
            assert metadata["zoodip.sha256"] == state_digest(metadata["zoodip.checkpoint"], tensors)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
    elif path.suffix == ".json":
        assert json.loads(content)["step"] >= 0
    elif path.suffix == ".csv":
        text = content.decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        assert text.endswith("\n") and rows and all(None not in row and None not in row.values() for row in rows)
    elif path.suffix == ".png":
        Image.open(io.BytesIO(content)).load()
    else:
        raise AssertionError(f"{path.name}: no file of a run")


class Watch:
    """Checks every visible file of a folder, each version once."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.polls = folder, set(), 0

    def poll(self) -> None:
        self.polls += 1
        for path in self.folder.rglob("*") if self.folder.is_dir() else ():
            if path.name.startswith(".") or path.is_dir():
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            version = (path.name, status.st_ino, status.st_mtime_ns, status.st_size)
            if version not in self.seen:
                check_file(path)
                self.seen.add(version)


def newest_checkpoint(folder: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in folder.glob("checkpoint-*.safetensors")), default=0)


def last_saved_step(folder: Path) -> int:
    """The last completed step of a run with --save_steps 1."""
    return max((int(path.stem.split("-")[2]) for path in folder.glob("learned_embeds-steps-*.safetensors")), default=0)


def same_results(folder: Path, reference: Path, stopped: bool = False) -> None:
    """Every file of a finished run equals the reference's byte for byte; of run.json, which holds times, only the step.

    If the run was stopped by a signal, the checkpoint of that moment may be among the newest in place of another.
    """
    names, expected = ({path.name for path in each.iterdir() if path.is_file()} for each in (folder, reference))
    assert names == expected or (
        stopped and len(names) == len(expected) and all(name.startswith("checkpoint-") for name in names ^ expected)
    )
    for name in names & expected - {"run.json", ".lock"}:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert json.loads((folder / "run.json").read_text())["step"] == json.loads((reference / "run.json").read_text())["step"]


def step_of(path: Path) -> int:
    with safe_open(path, "pt") as handle:
        return int(handle.metadata()["zoodip.step"])
