"""The layout of the code: which way imports go, where `args` stops, and what is loaded when."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = {"zoodip", "train_zoodip", "trainers", "reproduction", "benchmarks", "miniature"}
FOLDERS = sorted(OURS - {"train_zoodip"})
SCRIPTS = ["train_zoodip.py", *(f"trainers/{path.name}" for path in sorted((ROOT / "trainers").glob("[!_]*.py")))]
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "bitsandbytes", "PIL"}


def trees(*places: str) -> dict[Path, ast.Module]:
    """{file: parsed source} of files, and of all Python files in folders."""
    files = [file for place in places for file in (sorted((ROOT / place).rglob("*.py")) if place in FOLDERS else [ROOT / place])]
    assert len(files) >= len(places)
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imported(tree: ast.Module) -> set[str]:
    """Our own modules imported anywhere in a file, including in functions: "zoodip.run", "trainers.gf_ti"."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in OURS}


@pytest.mark.parametrize(("place", "allowed"), [
    ("zoodip", {"zoodip"}), ("train_zoodip.py", {"zoodip"}), ("trainers", {"zoodip"}), ("miniature", {"zoodip", "miniature"}),
    ("reproduction", OURS - {"benchmarks"}), ("benchmarks", OURS),
])  # fmt: skip
def test_arrows(place, allowed):
    """Scripts import the package and never each other: what two of them need lives in the package."""
    for file, tree in trees(place).items():
        wrong = {name for name in imported(tree) if name.split(".")[0] not in allowed}
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_package_takes_values():
    """`args` stays within the scripts: no function of the package takes a Namespace."""
    for file, tree in trees("zoodip").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                named = [parameter for parameter in parameters if parameter.arg == "args"]
                where = f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
                assert not named, where
                annotations = [ast.unparse(parameter.annotation) for parameter in parameters if parameter.annotation]
                assert not [text for text in annotations if "Namespace" in text], where


def test_no_folder_in_the_package():
    """The package is flat: files are organised by topic alone."""
    assert not [path.name for path in (ROOT / "zoodip").iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("module", ["zoodip", "zoodip.errors", "zoodip.arguments"])
def test_what_is_loaded_with_the_package(module):
    """A script parses its flags before it imports torch."""
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def cpu_seconds(*argv: str) -> tuple[float, subprocess.CompletedProcess]:
    """Processor time of a Python process, which other programs do not inflate as they do wall time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


WRONG = ["--seed", "-1", "--train_data_dir", "x"]
TUNERS = {f"trainers/{name}.py" for name in ("dreambooth", "qlora", "tuneqdm", "diffusekrona")}  # they learn no token


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("argv", [["--help"], WRONG], ids=["help", "error"])
def test_help_and_errors_are_quick(script, argv):
    """Half a second at most, and no library loaded: argparse and our flags take 0.07 s of CPU here, torch alone takes 1.8.

    Machines differ threefold, and more under load, so the bound is also given in starts of a bare interpreter (0.013 s here):
    five of them are measured, and 150 for torch's import. The best of three counts, as caches may be cold.
    """
    if argv == WRONG:
        argv = [*WRONG, "--class_word" if script in TUNERS else "--initializer_token", "dog"]
    command = ["-m", script.removesuffix(".py").replace("/", ".")] if "/" in script else [script]
    spent, done = min((cpu_seconds("-X", "importtime", *command, *argv) for _ in range(3)), key=lambda result: result[0])
    bare = min(cpu_seconds("-c", "pass")[0] for _ in range(3))
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert "argparse" in loaded and not loaded & HEAVY
    if argv == ["--help"]:
        assert done.returncode == 0 and "--train_data_dir" in done.stdout and errors == []
    else:
        assert done.returncode == 2 and done.stdout == "" and errors == ["error: --seed must be in [0, 2^63), got -1"]
    assert spent < 0.5 and spent < 30 * bare, (spent, bare)
