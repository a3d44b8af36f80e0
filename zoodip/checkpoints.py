"""Checkpoints: a trainer's tensors and a JSON header in one safetensors file, with a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zoodip.errors import BrokenCheckpoint, InputError
from zoodip.files import why_unreadable, write_tensors


def state_digest(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of everything a checkpoint holds: a number with a flipped bit is still a number, which no other check notices."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def metadata_of(text: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """All metadata of a checkpoint with this header."""
    return {"format": "pt", "zoodip.checkpoint": text, "zoodip.sha256": state_digest(text, tensors)}


def write_checkpoint(path: Path, header: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors and a JSON header with their checksum, as safetensors. Raises InputError."""
    write_tensors(path, tensors, metadata_of(json.dumps(header, sort_keys=True), tensors))


def read_checkpoint(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(header, tensors) of a checkpoint. Raises BrokenCheckpoint, or InputError if there is no such file."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if "zoodip.checkpoint" not in metadata:
                raise ValueError("it is no checkpoint of this project")
            tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # copied out of the memory map
        if metadata != metadata_of(metadata["zoodip.checkpoint"], tensors):
            raise ValueError("its contents do not match its checksum")
        return json.loads(metadata["zoodip.checkpoint"]), tensors
    except FileNotFoundError:
        raise InputError(
            f"--resume_from_checkpoint: there is no file {str(path)!r}; give a checkpoint-N.safetensors or latest"
        ) from None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise BrokenCheckpoint(path, why_unreadable(path, error)) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a folder, newest last."""
    checkpoints = [
        path
        for path in folder.glob("checkpoint-*.safetensors")
        if re.fullmatch(r"checkpoint-[0-9]+\.safetensors", path.name) and path.is_file()
    ]
    return sorted(checkpoints, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def can_follow(tensors: dict[str, torch.Tensor], fresh: dict[str, torch.Tensor]) -> bool:
    """Whether `tensors` can be the state of a run that began as `fresh`: the same names, dtypes and shapes, finite numbers.

    Only tensors that begin without rows, such as a history, may have grown longer.
    """

    def same_kind(tensor: torch.Tensor, first: torch.Tensor) -> bool:
        from_row = 1 if first.dim() and len(first) == 0 else 0
        return (tensor.dtype, tensor.dim(), tensor.shape[from_row:]) == (first.dtype, first.dim(), first.shape[from_row:])

    same_names = tensors.keys() == fresh.keys()
    return same_names and all(same_kind(tensors[name], fresh[name]) and tensors[name].isfinite().all() for name in fresh)
