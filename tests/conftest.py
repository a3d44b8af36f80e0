"""Shared fixtures: a tiny Stable Diffusion of random weights in the published folder format, and a subject."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network would be a mistake
# one thread for each of pytest's workers, and for the runs they start: read when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "miniature" / "model"
WORDS = "a photo of the in on with dog cat grass snow painting style my good close - up picture white red".split()


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def make_model(folder: Path, prediction_type: str = "epsilon", width: int = 32, length: int = 77) -> Path:
    """Write a Stable Diffusion with random weights (about 0.3 M) to `folder`, as save_pretrained would."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols]
    merges = []
    for word in WORDS:  # left to right: every prefix becomes a symbol, the whole word one token
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if pieces[0] not in tokens:
                tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "tokenizer" / "vocab.json"),
        merges=str(folder / "tokenizer" / "merges.txt"),
        model_max_length=length,
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    # the default initialisation is by fan-in for some layers and 0.02 for others: seeded, because tests compare numbers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokens),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=length,
                bos_token_id=len(tokens) - 2,
                eos_token_id=len(tokens) - 1,
                pad_token_id=len(tokens) - 1,
            )
        )
        torch.nn.init.normal_(text_encoder.embeddings.token_embedding.weight, std=0.5)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=width,
            norm_num_groups=8,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_subject(folder: Path, count: int = 3, side: int = 24) -> Path:
    """A folder of `count` pictures with low-frequency content, and no captions."""
    folder.mkdir(parents=True)
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def subject(tmp_path_factory) -> Path:
    return make_subject(tmp_path_factory.mktemp("data") / "dog6")


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    """A run installs its own; left in place, they would swallow a Ctrl-C that is meant for pytest."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def arguments(model: Path | str, subject: Path | str, output: Path | str, **flags) -> list[str]:
    """A command line for a short run; flags are name=value, True or False for a switch, None to leave one out."""
    flags = {
        "pretrained_model_name_or_path": model, "train_data_dir": subject, "output_dir": output,
        "initializer_token": "dog", "cpu": True, "resolution": 16, "max_train_steps": 12, "eval_steps": 6,
        "num_eval_samples": 2, "tau": 4, "nu": 0.1, "mu": 1e-2, "final_picture": False, **flags,
    }  # fmt: skip
    argv = []
    for name, value in flags.items():
        if value is not None:
            argv += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return argv


def run_cli(argv: list[str], script=None) -> int:
    """Run a training script's command line in this process -> its exit code. The script is train_zoodip or the given module."""
    import train_zoodip
    from zoodip.errors import run_script

    script = script or train_zoodip
    try:
        return run_script(script.main, script.parse_args(argv))
    except SystemExit as exit_:
        return exit_.code


def notices_of(script, argv: list[str]) -> list[str]:
    """What a script says of a command line's flags before it does anything."""
    said: list[str] = []
    with patch("sys.argv", ["script.py", *argv]), patch("zoodip.arguments.notice", said.append):
        script.parse_args()
    return said


def sample(cases, *kept) -> list:
    """Parameters of a test: the cases `kept` run by default, the others are slow."""
    cases = list(cases)
    assert set(kept) <= set(cases)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def shares_of(processes: int, evaluate) -> list[torch.Tensor]:
    """evaluate(accelerator) in each of several processes, without the sum over them."""

    def own_share(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return tensor

    shared = dict(num_processes=processes, device="cpu", reduce=own_share)
    return [evaluate(SimpleNamespace(process_index=rank, **shared)) for rank in range(processes)]


def torchrun(processes: int, port: int) -> list[str]:
    """Without the -- it takes the script's --n and --nu for its own. (accelerate launch starts one process on CPUs.)"""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port), "--"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def copy(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def hub_model(copy, monkeypatch) -> str:
    """The name of the tiny model on a hub that has its weights only in half precision, as *.fp16.safetensors."""
    import huggingface_hub

    import zoodip.folder
    from zoodip.errors import InputError

    for component, stem in zoodip.folder.WEIGHT_NAMES.items():
        (copy / component / f"{stem}.safetensors").rename(copy / component / f"{stem}.fp16.safetensors")
    names = [str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()]

    def download(name: str, revision: str | None, variant: str | None, weights: bool = True) -> Path:
        if variant != "fp16":
            raise InputError(f"{name}: the full weights were asked for, got variant {variant}")
        return copy

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision=None: names)
    monkeypatch.setattr(zoodip.folder, "download_model", download)
    return "someone/tiny"


@pytest.fixture(scope="module", params=[1, 3], ids=["1-vector", "3-vectors"])
def tiny(request, tiny_model):
    from tiny import Tiny

    return Tiny(tiny_model, request.param)


@pytest.fixture
def refused(capsys, tiny_model, subject, tmp_path):
    """Runs a command line and checks that it is refused as every wrong one is, in one line; returns the line."""

    def check(*, argv: list[str] | None = None, model=tiny_model, data=subject, output_dir=tmp_path / "out", **flags) -> str:
        code = run_cli(arguments(model, data, output_dir, **flags) if argv is None else argv)
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == "" and "Traceback" not in captured.err
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return check
