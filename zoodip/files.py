"""Files that are complete or absent: safetensors and JSON, written under a temporary name first, and validated on reading."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError, safe_open

from zoodip.errors import DamagedModel, InputError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager: turns an OSError from writing to `path` into an InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
        remedy = "free some space" if full else "choose another folder"
        raise InputError(f"{path}: cannot be written ({reason}); {remedy}") from error


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write under a temporary name, then rename: `path` is the old file or the complete new one. Raises InputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):  # this fails too if the file system has become read-only
                temporary.unlink(missing_ok=True)
            raise


def copy_whole(source: str | Path, target: str | Path) -> None:
    """Copy a small file: `target` is the old one or the complete new one. Raises InputError."""
    write_atomically(Path(target), Path(source).read_bytes())


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder, each whole or not at all, without its modes: a shared model is often read-only, and its copy
    must not be. Raises InputError."""
    with writing(target):
        target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.is_file():
            copy_whole(path, target / path.name)


def digest_of(paths: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 of each file."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_image(path: Path, image: Image.Image) -> None:
    """Write a PNG, or a JPEG if the name ends in .jpg or .jpeg, whole or not at all. Raises InputError."""
    content = io.BytesIO()
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    image.save(content, kind, quality=85)  # PNG ignores the quality
    write_atomically(path, content.getvalue())


def write_json(path: Path, content: dict, indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all. Raises InputError."""
    write_atomically(path, (json.dumps(content, indent=indent) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read a JSON object from the model folder. Raises DamagedModel."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedModel(path, f"cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedModel(path, "is not a JSON object")
    return content


SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def safetensors_parts(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file in parts, one tensor at a time, as the library writes it but with a sorted header.

    The library's order of metadata differs between processes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned
    header: dict = {"__metadata__": metadata}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = dict(dtype=SAFETENSORS_DTYPES[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def serialize(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file, for small ones."""
    return b"".join(safetensors_parts(tensors, metadata))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all, with at most one serialised tensor in memory. Raises InputError."""
    write_atomically(path, safetensors_parts(tensors, metadata))


def read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in the files, one at a time. Raises InputError if one is not a whole safetensors file.

    The file is reopened for each tensor, so that its memory map, and with it the pages that count as this process's
    memory, is released together with the tensor.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                names = list(handle.keys())
            for name in names:
                with safe_open(path, framework="pt") as handle:
                    tensor = handle.get_tensor(name)
                yield name, tensor
        except (SafetensorError, OSError) as error:
            raise not_safetensors(path, error) from error


def is_pickle(path: Path) -> bool:
    """Whether a file begins like a torch.save or pickle file, whatever its name. (safetensors begins with a length.)"""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError:
        return False
    return start == b"PK\3\4" or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def why_unreadable(path: Path, error: Exception) -> str:
    """What to say about one of our own files that safetensors cannot read."""
    if not path.is_file():
        return "it is a folder" if path.is_dir() else "there is no such file"
    return "it is a pickle, which could run code, so it is not read" if is_pickle(path) else str(error)


def not_safetensors(path: Path, error: Exception) -> InputError:
    """What to say about a weight file that safetensors cannot read."""
    if is_pickle(path):
        return InputError(
            f"{path}: is a pickle under another name, which could run code, so it is not read; save the model with "
            "save_pretrained(safe_serialization=True)"
        )
    return InputError(f"{path}: is not a valid safetensors file ({error}); download it again")


def ensure_writable(folder: Path, flag: str, size: int) -> None:
    """Create the folder that a flag names, and check that it is writable and has room for `size` bytes. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--{flag} {str(folder)!r} cannot be created ({error.strerror}); choose another") from error
    try:
        probe = folder / f".probe.{os.getpid()}.tmp"  # the form of a temporary file: the next run removes what a killed one left
        write_atomically(probe, bytes(4 << 20))  # a quota shows only on writing
    except InputError as error:
        raise InputError(f"--{flag} {error}") from error
    probe.unlink(missing_ok=True)
    if (free := shutil.disk_usage(folder).free) < size:
        raise InputError(f"--{flag} {str(folder)!r} has {free / 1e9:.3g} GB free, but the run writes at least {size / 1e9:.3g} "
                         "GB there; free some space, or choose another")  # fmt: skip


def lock_folder(folder: Path, flag: str = "output_dir") -> FileLock:
    """Lock the output folder, which is writable, for this process alone -> the lock, to be released when the run ends.

    Raises InputError if another run holds it.
    """
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        if path.is_symlink():  # someone else's: a run follows no links
            path.unlink()
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"--{flag} {str(folder)!r} is in use by another run; choose another") from None
    except OSError as error:
        raise InputError(f"--{flag} {str(folder)!r} cannot be written ({error.strerror}); choose another") from error
    return lock
