"""The files that a measurement writes: a record of all values and a page of tables."""

from __future__ import annotations

from pathlib import Path

from zoodip.files import write_atomically, write_json
from zoodip.records import ROOT, environment, plain_arguments

FOLDER = ROOT / "benchmarks"


def write_report(name: str, arguments: dict, results: dict, markdown: str, device: str = "cpu", folder: Path = FOLDER,
                 command: str | None = None) -> None:  # fmt: skip
    """<name>.json (arguments, environment, results) and <name>.md (tables, with the command and machine that produced them)."""
    where = environment(device)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", dict(arguments=plain_arguments(arguments), **where, results=results), indent=1)
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    command = command or f"python -m benchmarks.{name}"
    foot = f"\nMeasured by `{command}` on {where['device']}; {versions}; commit {where['commit']}.\n"
    write_atomically(folder / f"{name}.md", (markdown.rstrip() + "\n" + foot).encode())
