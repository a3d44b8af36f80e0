"""Everything that a report's tables are made from, in one compressed file next to it."""

from __future__ import annotations

import io
import lzma
import re
import sys
import tarfile
from pathlib import Path

from reproduction.runs import Job, Settings
from zoodip.errors import InputError
from zoodip.files import write_atomically

ARCHIVE = "runs.tar.xz"  # in a report's folder: the token, curve and scores of each run; tuned weights are too large
ARCHIVED = re.compile(
    r"[0-9a-f]{12}/(?:(?:spec|result|(?:scores|points)-[0-9a-f]{12})\.json|learned_embeds(?:-steps-[0-9]+)?\.safetensors)"
)


def pack_runs(jobs: list[Job], settings: Settings, path: Path) -> None:
    """Pack all that tables are made from into one compressed file: the runs that have learned, and the scores they have so far.

    What the file already holds stays in it: other runs, and the snapshots of these. Files that a run lost when it was learned
    again are left out, and a line says how many. The same content gives the same bytes.
    """
    archived, gone = read_archive(path), 0
    for job in jobs:
        if job.learned(settings):
            folder = settings.folder(job.spec)
            before = archived.get(folder.name, {})
            found = {file.name for file in (*folder.glob("*.json"), *job.tokens(settings))}
            names = {name for name in found | set(before) if ARCHIVED.fullmatch(f"{folder.name}/{name}")}
            archived[folder.name] = {name: file.read_bytes() for name in names if (file := folder / name).exists()}
            gone += len(before.keys() - archived[folder.name].keys())
    if gone:
        print(f"{path}: {gone} files are left out, which their runs no longer have", file=sys.stderr)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for run, files in sorted(archived.items()):
            for name, data in sorted(files.items()):
                entry = tarfile.TarInfo(f"{run}/{name}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    write_atomically(path, lzma.compress(content.getvalue()))


def read_archive(path: Path) -> dict[str, dict[str, bytes]]:
    """{run: {name of a file: its content}}, and nothing with another name than `ARCHIVED`. Raises InputError."""
    runs: dict[str, dict[str, bytes]] = {}
    if not path.exists():
        return runs
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(path.read_bytes()))) as archive:
            for entry in archive:
                if ARCHIVED.fullmatch(entry.name) and entry.isfile():
                    run, _, name = entry.name.partition("/")
                    runs.setdefault(run, {})[name] = archive.extractfile(entry).read()
    except (tarfile.TarError, lzma.LZMAError, OSError) as error:
        raise InputError(f"{path}: not a valid archive of runs ({error}); restore or remove it") from error
    return runs


def unpack_runs(path: Path, output: Path) -> None:
    """Unpack the runs of `pack_runs`, if there are any, into <output>/runs; existing files are kept. Raises InputError.

    A run that has another result there was learned again, so the archive's scores are not of its weights.
    """
    for run, files in read_archive(path).items():
        folder = output / "runs" / run
        result = folder / "result.json"
        if result.exists() and result.read_bytes() != files.get(result.name):
            continue
        for name, data in files.items():
            if not (folder / name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, data)
