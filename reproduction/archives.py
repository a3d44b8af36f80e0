"""Everything that a report's tables are made from, in one compressed file next to it."""

from __future__ import annotations

import io
import lzma
import re
import tarfile
from pathlib import Path

from reproduction.runs import Job, Settings, digest
from zoodip.errors import InputError
from zoodip.files import write_atomically

ARCHIVE = "runs.tar.xz"  # in a report's folder: the token, curve and scores of each run; tuned weights are too large
ARCHIVED = re.compile(
    r"[0-9a-f]{12}/(?:(?:spec|result|(?:scores|points)-[0-9a-f]{12})\.json|learned_embeds(?:-steps-[0-9]+)?\.safetensors)"
)


def pack_runs(jobs: list[Job], settings: Settings, path: Path) -> None:
    """Pack all that tables are made from into one compressed file: the runs that have learned, and the scores they have so far.

    The same runs give the same bytes.
    """
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for job in sorted((job for job in jobs if job.learned(settings)), key=lambda job: digest(job.spec)):
            folder = settings.folder(job.spec)
            for file in sorted([*folder.glob("*.json"), *job.tokens(settings)]):
                if ARCHIVED.fullmatch(name := f"{folder.name}/{file.name}"):
                    entry = tarfile.TarInfo(name)
                    entry.size = file.stat().st_size
                    archive.addfile(entry, io.BytesIO(file.read_bytes()))
    write_atomically(path, lzma.compress(content.getvalue()))


def unpack_runs(path: Path, output: Path) -> None:
    """Unpack the runs of `pack_runs`, if there are any, into <output>/runs; existing files are kept. Raises InputError."""
    if not path.exists():
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(path.read_bytes()))) as archive:
            for entry in archive:
                target = output / "runs" / entry.name
                if ARCHIVED.fullmatch(entry.name) and entry.isfile() and not target.exists():  # nothing else is written
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(target, archive.extractfile(entry).read())
    except (tarfile.TarError, lzma.LZMAError, OSError) as error:
        raise InputError(f"{path}: not a valid archive of runs ({error}); restore or remove it") from error
