"""Strangers' files run no code and lead nowhere; what is private stays private."""

from __future__ import annotations

import ast
import http.server
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, arguments, make_subject, run_cli, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors import safe_open

from zoodip.errors import InputError
from zoodip.folder import WEIGHT_NAMES, find_weights
from zoodip.prompts import file_stem

RUN = dict(max_train_steps=2, checkpointing_steps=1, eval_steps=0, num_eval_samples=1)
SECRET = "hf_" + "Zoodip0Secret1Token2" * 2  # of the form of the hub's access tokens


class Events:
    """Audit events of this process while recording: a hook cannot be removed again."""

    def __init__(self):
        self.recording, self.opened, self.unpickled = False, [], []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.recording and event == "open":
            self.opened.append(str(arguments[0]))
        if self.recording and event == "pickle.find_class":
            self.unpickled.append(arguments)


EVENTS = Events()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickles(marker: Path) -> dict[str, bytes]:
    """The same payload as each kind of pickle that torch.load or pickle.load takes."""
    buffer = io.BytesIO()
    torch.save({"weight": Payload(marker)}, buffer)
    old = io.BytesIO()
    torch.save({"weight": Payload(marker)}, old, _use_new_zipfile_serialization=False)
    return {"torch": buffer.getvalue(), "torch of old": old.getvalue(),
            **{f"protocol {i}": pickle.dumps(Payload(marker), i) for i in range(6)}}  # fmt: skip


def attempt(argv: list[str]) -> int:
    """A run in this process; nothing may be unpickled."""
    EVENTS.opened, EVENTS.unpickled, EVENTS.recording = [], [], True
    try:
        return run_cli(argv)
    finally:
        EVENTS.recording = False
        assert not EVENTS.unpickled


@pytest.mark.parametrize("kind", sample(pickles(Path("x")), "torch", "protocol 0"))
def test_pickles_by_content(tiny_model, subject, tmp_path, capsys, kind):
    """As weights or as a checkpoint, under a name that ends in .safetensors: refused for what it is, and not run."""
    marker = tmp_path / "executed"
    content = pickles(marker)[kind]
    named = kind not in ("protocol 0", "protocol 1")  # these are bare text: no safetensors either, and refused as such
    for part, stem in WEIGHT_NAMES.items():
        model = Path(shutil.copytree(tiny_model, tmp_path / part / "model"))
        (model / part / f"{stem}.safetensors").write_bytes(content)
        assert attempt(arguments(model, subject, tmp_path / "out", **RUN)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert str(model / part) in line and (("is a pickle" in line) if named else ("not a valid safetensors file" in line))
    (tmp_path / "out").mkdir(exist_ok=True)
    checkpoint = tmp_path / "out" / "checkpoint-1.safetensors"
    checkpoint.write_bytes(content)
    assert attempt(arguments(tiny_model, subject, tmp_path / "out", resume_from_checkpoint=checkpoint, **RUN)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert str(checkpoint) in line and ("it is a pickle" in line) == named
    assert attempt(arguments(tiny_model, subject, tmp_path / "out", resume_from_checkpoint="latest", **RUN)) == 0
    assert f"skipped a broken checkpoint: --resume_from_checkpoint {checkpoint}" in capsys.readouterr().err
    assert not marker.exists()
    pickle.loads(content) if kind.startswith("protocol") else None  # the payload would have worked
    assert marker.exists() == kind.startswith("protocol")


def test_pickles_by_name_are_not_even_opened(tiny_model, subject, tmp_path):
    """*.bin and *.ckpt beside the safetensors files, and pickles of a tokenizer, are left alone."""
    model, marker = Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "executed"
    content = pickles(marker)["torch"]
    strange = [model / part / f"{stem}.bin" for part, stem in WEIGHT_NAMES.items()]
    strange += [model / "v1-5-pruned.ckpt", model / "tokenizer" / "tokenizer.pkl", model / "scheduler" / "scheduler.bin"]
    strange += [model / part / "modeling.py" for part in WEIGHT_NAMES] + [model / "pipeline.py"]
    for path in strange:
        path.write_bytes(content if path.suffix != ".py" else f"import os\nos.mkdir({str(marker)!r})\n".encode())
    assert attempt(arguments(model, subject, tmp_path / "out", validation_prompt="{}", num_validation_images=1, **RUN)) == 0
    assert not {str(path) for path in strange} & set(EVENTS.opened) and not marker.exists()
    assert any(path.endswith("merges.txt") or path.endswith("config.json") for path in EVENTS.opened)  # the hook does see files


@pytest.mark.parametrize("file", ["unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json",
                                  "scheduler/scheduler_config.json", "model_index.json"])  # fmt: skip
def test_configurations_name_no_code(tiny_model, subject, tmp_path, file):
    """The libraries can load classes that a configuration names; here the classes are the script's own choice."""
    model, marker = Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "executed"
    tree = json.loads((model / file).read_text())
    tree |= {"auto_map": {name: "evil.Evil" for name in ("AutoModel", "AutoConfig", "AutoTokenizer", "UNet2DConditionModel")},
             "_class_name": ["evil", "Evil"], "trust_remote_code": True}  # fmt: skip
    (model / file).write_text(json.dumps(tree))
    for folder in (model, (model / file).parent):
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    assert attempt(arguments(model, subject, tmp_path / "out", **RUN)) in (0, 2)
    assert not marker.exists() and not any("evil.py" in path for path in EVENTS.opened)


CALLS = {"eval", "exec", "__import__", "torch.load", "np.load", "os.system", "os.popen", "format", "string.Template"}
METHODS = {"format", "format_map", "vformat"}
KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}


SOURCES = [ROOT / "train_zoodip.py", *sorted((ROOT / "zoodip").glob("*.py")), *sorted((ROOT / "trainers").glob("*.py"))]


@pytest.mark.parametrize(
    "source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}" if path.parent != ROOT else path.name
)
def test_the_source_formats_and_executes_no_text(source):
    """No eval, no exec, no str.format or % on text, no shell, no unpickling in the package or in a training script."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS and getattr(node.func, "attr", "") not in METHODS, node.lineno
            assert not {keyword.arg for keyword in node.keywords} & KEYWORDS, node.lineno
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            assert not names & {"pickle", "marshal", "shelve", "yaml"}, node.lineno
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            assert not isinstance(node.left, ast.JoinedStr) and not isinstance(getattr(node.left, "value", 0), str), node.lineno


def test_braces_are_text_all_the_way(tiny_model, subject, tmp_path):
    """In captions, in the validation prompt and in the initializer: what is between them is never looked up."""
    text = "{} {0.__class__.__init__.__globals__} {name} {0!r:>99}"
    captions = {subject.name: {path.name: text for path in subject.glob("*.png")}}
    (tmp_path / "cc.json").write_text(json.dumps(captions))
    flags = dict(use_cc=True, cc_file=tmp_path / "cc.json", validation_prompt=text, num_validation_images=1, **RUN)
    argv = arguments(tiny_model, subject, tmp_path / "out", initializer_token="dog {0.__class__}", **flags)
    assert attempt(argv) == 0
    with safe_open(tmp_path / "out" / "learned_embeds.safetensors", "pt") as handle:
        assert "dog {0.__class__}" in handle.metadata()["modelspec.title"]


# --- file names ---


@settings(max_examples=300, derandomize=True, deadline=None)
@given(token=st.text(min_size=1, max_size=30) | st.from_regex(r"<[./\\\\:a-z-]{1,20}>", fullmatch=True))
def test_names_made_of_tokens(token):
    """Whatever the token, its file has a plain name in the output folder, and none of the script's own."""
    name = f"{file_stem(token)}.safetensors"
    assert Path(name).name == name and not name.startswith((".", "checkpoint-", "learned_embeds"))
    assert all(c.isascii() and (c.isalnum() or c in "_-.") for c in name) and name.count(".") == 1


TOKENS = ["</../../x>", "</etc/passwd>", "<..>", "<~>", "<c:\\x>", "<checkpoint-1>", "<learned_embeds>", "<$home>", "<a:b>",
          "<*>", "<`id`>"]  # fmt: skip


@pytest.mark.parametrize("token", sample(TOKENS, "</../../x>", "<learned_embeds>", "<`id`>"))
def test_tokens_stay_in_the_folder(tiny_model, subject, tmp_path, token):
    """A run writes into its output folder and nowhere else."""
    place = tmp_path / "a" / "b" / "c"
    place.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert attempt(arguments(tiny_model, subject, place / "out", placeholder_token=token, **RUN)) == 0
    new = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(path.parent == place / "out" or path == place / "out" for path in new)
    assert f"{file_stem(token)}.safetensors" in {path.name for path in new}
    with safe_open(place / "out" / "learned_embeds.safetensors", "pt") as handle:
        assert list(handle.keys()) == [token]  # the word itself is as it was given


def test_shard_names_stay_in_the_folder(tiny_model, tmp_path):
    """An index that names files elsewhere reads none of them."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    whole = model / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.move(whole, tmp_path / "elsewhere.safetensors")
    for name in ("../../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "..", "/", ""):
        (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match="missing"):
            find_weights(model, "unet", None)


def test_links_in_the_output_folder_are_not_followed(tiny_model, subject, tmp_path):
    """A link that somebody left under a name that a run writes is replaced, and its target keeps its content."""
    (tmp_path / "precious").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in (".lock", "sks.safetensors", "run.json", "checkpoint-1.safetensors"):
        (out / name).symlink_to(tmp_path / "precious")
    assert attempt(arguments(tiny_model, subject, out, **RUN)) == 0
    assert (tmp_path / "precious").read_text() == "mine"


# --- what is private ---


def test_positions_of_photographs(tiny_model, tmp_path):
    """EXIF, XMP and comments, with place, owner and serial number, are in none of the files of a run, including pictures."""
    markers = [b"GPS-MARK", b"OWNER-MARK", b"SERIAL-MARK", b"XMP-MARK", b"COMMENT-MARK"]
    folder = tmp_path / "subject"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x013B] = "OWNER-MARK"
    exif.get_ifd(0x8769)[0xA431] = "SERIAL-MARK"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 17.0), 29: "GPS-MARK"})
    picture = Image.open(next(make_subject(tmp_path / "plain", 1).iterdir()))
    picture.save(folder / "0.jpg", exif=exif, comment=b"COMMENT-MARK", xmp=b"<x:xmpmeta>XMP-MARK</x:xmpmeta>")
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "COMMENT-MARK")
    picture.save(folder / "1.png", exif=exif, pnginfo=notes)
    picture.save(folder / "2.webp", exif=exif, xmp=b"XMP-MARK")
    assert all(any(mark in path.read_bytes() for path in folder.iterdir()) for mark in markers)
    assert (
        attempt(
            arguments(
                tiny_model,
                folder,
                tmp_path / "out",
                report_to="tensorboard",
                validation_prompt="{}",
                num_validation_images=1,
                **RUN,
            )
        )
        == 0
    )
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 6 and not [path.name for path in files for mark in markers if mark in path.read_bytes()]
    with Image.open(tmp_path / "out" / "validation-2.png") as image:
        assert not image.getexif() and not image.info


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_photographs_are_not_committed(tmp_path):
    """Subjects' folders in dataset/ are ignored, with all that is in them, except the bundled one."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    assert subprocess.run(["git", "init", "-q"], cwd=tmp_path).returncode == 0
    for name, ignored in (("my-dog/0.jpg", True), ("dog6/00.jpg", True), ("README.md", False), ("furmix/00.jpg", False)):
        path = tmp_path / "dataset" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert (subprocess.run(["git", "check-ignore", "-q", path], cwd=tmp_path).returncode == 0) == ignored, name


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that answers every request with a refusal that repeats the token it was sent."""

    seen: list[str] = []

    def refuse(self) -> None:
        token = self.headers.get("Authorization", "")
        self.seen.append(token)
        body = json.dumps({"error": f"the token {token} is not valid"}).encode()
        self.send_response(401)
        self.send_header("X-Error-Message", f"the token {token} is not valid")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = refuse

    def log_message(self, *_) -> None:
        pass


def test_hub_token(subject, tmp_path):
    """It is sent to the hub, which is what it is for, and printed nowhere, not even when the hub repeats it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.seen.clear()
    environment = {**os.environ, "HF_TOKEN": SECRET, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                   "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}  # fmt: skip
    argv = arguments("someone/private-model", subject, tmp_path / "out", report_to="tensorboard")
    try:
        done = subprocess.run(
            [sys.executable, ROOT / "train_zoodip.py", *argv], env=environment, capture_output=True, text=True, timeout=300
        )
    finally:
        server.shutdown()
    assert done.returncode == 2 and "someone/private-model" in done.stderr.splitlines()[-1], done.stderr
    assert any(SECRET in token for token in Hub.seen)  # it would have leaked
    assert SECRET not in done.stderr + done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_hub_token_is_not_recorded(tiny_model, subject, tmp_path, monkeypatch, capfd):
    """Nor is it in trackers, metadata or records of a run that goes well, nor in a message about a name that holds it."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert attempt(arguments(tiny_model, subject, tmp_path / "out", report_to="tensorboard", **RUN)) == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files) and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert attempt(arguments(f"https://user:{SECRET}@huggingface.co/a/b", subject, tmp_path / "out", **RUN)) == 2
    text = capfd.readouterr().err
    assert "hf_..." in text and SECRET not in text
