"""The baselines: gradient textual inversion against autograd and torch's Adam, CMA-ES on known functions and through its
checkpoints, and whole runs of both, interrupted, resumed and refused."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, run_cli, seeded
from PIL import Image
from safetensors.torch import load_file

from trainers import gf_ti, textual_inversion
from zoodip.diffusion import Data, FrozenModel, uniform_timesteps
from zoodip.errors import InputError

NOT_THEIRS = dict(tau=None, nu=None, mu=None)  # flags of train_zoodip.py that `arguments` gives
TI = (textual_inversion, dict())
PUBLISHED = (gf_ti, dict(population=4, intrinsic_dim=5))
FAIR = (gf_ti, dict(population=4, intrinsic_dim=5, mode="fair", train_batch_size=2))
PCA = (gf_ti, dict(population=4, intrinsic_dim=5, mode="fair", subspace="pca", timestep_sampling="snr"))
METHODS = pytest.mark.parametrize(("script", "flags"), [TI, PUBLISHED, FAIR], ids=["ti", "published", "fair"])


@pytest.fixture
def train(tiny_model, subject, tmp_path):
    """Runs a script in this process and returns the output folder."""

    def run(script, name: str = "out", code: int = 0, **flags) -> Path:
        assert run_cli(arguments(tiny_model, subject, tmp_path / name, **NOT_THEIRS, **flags), script) == code
        return tmp_path / name

    return run


def theta(folder: Path) -> torch.Tensor:
    return load_file(folder / "learned_embeds.safetensors")["<sks>"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def same_files(one: Path, other: Path) -> None:
    """All files of two runs are the same, byte for byte, except for how long they took."""
    assert names(one) == names(other)
    for name in names(one) - {"run.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------------- gradient TI


class QuadraticModel:
    """A model of one layer: it predicts a fixed linear map of the token, so that loss and gradient are known by hand."""

    rows = torch.zeros(0)
    weight = torch.randn(16, 8, generator=seeded())

    def predict(self, batch, tokens):  # [1, V, d] -> [1, B, 4, h, w]
        return (tokens.flatten(1) @ self.weight.T).view(1, 1, 4, 2, 2)


def test_gradient_steps_are_torch_s_adam():
    """Six steps against Adam on the closed-form gradient 2 W^T (W theta - y) / 16. 1e-5: fp32 of another order of sums, which
    Adam's tiny epsilon does not let grow."""
    batch = SimpleNamespace(target=torch.randn(1, 4, 2, 2, generator=seeded(1)))
    token = torch.randn(2, 4, generator=seeded(2))
    inversion = textual_inversion.TextualInversion(token, learning_rate=0.02, adam_epsilon=1e-8)
    expected = torch.nn.Parameter(token.clone())
    adam = torch.optim.Adam([expected], lr=0.02, eps=1e-8)
    weight, y = QuadraticModel.weight, batch.target.flatten()
    for _ in range(6):
        residual = weight @ expected.detach().flatten() - y
        assert inversion.step(QuadraticModel(), batch) == pytest.approx(residual.square().mean().item(), rel=1e-5)
        expected.grad = (2 * weight.T @ residual / 16).view(2, 4)
        adam.step()
    torch.testing.assert_close(inversion.theta.detach(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_loss():
    """The closed form 2 W^T (W theta - y) / 16 itself: Adam, invariant to a factor, would not tell it from a multiple."""
    batch = SimpleNamespace(target=torch.randn(1, 4, 2, 2, generator=seeded(1)))
    theta = torch.randn(2, 4, generator=seeded(2)).requires_grad_()
    loss, gradient = textual_inversion.loss_and_gradient(QuadraticModel(), batch, theta)
    weight = QuadraticModel.weight
    residual = weight @ theta.detach().flatten() - batch.target.flatten()
    assert loss == pytest.approx(residual.square().mean().item(), rel=1e-5)
    # fp32 sums in another order
    torch.testing.assert_close(gradient, (2 * weight.T @ residual / 16).view(2, 4), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing():
    inversion = textual_inversion.TextualInversion(torch.ones(2, 4))
    before = {name: tensor.clone() for name, tensor in inversion.state_dict().items()}
    assert inversion.step(QuadraticModel(), SimpleNamespace(target=torch.full((1, 4, 2, 2), math.inf))) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in inversion.state_dict().items())


def test_training_lowers_the_loss(train):
    """On the fixed set, by more than the 1e-4 that ZOODiP's own test asks for."""
    out = train(textual_inversion, max_train_steps=60, eval_steps=60, learning_rate=0.05, num_eval_samples=16)
    first, last = (float(row["eval_loss"]) for row in csv.DictReader((out / "training_log.csv").open()))
    assert last < first - 1e-4


# ----------------------------------------------------------------------------------------------------- GF-TI


def bowl(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (tokens - target).square().flatten(1).sum(1)


@pytest.mark.parametrize("mode", ["published", "fair"])
def test_cma_es_improves_on_a_known_function(mode):
    """A quadratic bowl in a 5-dimensional subspace of 12 numbers: 60 generations of 20 come within 1 % of its bottom."""
    basis = torch.linalg.qr(torch.randn(12, 5, generator=seeded()))[0].T
    origin = torch.ones(2, 6)
    target = origin + (torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0]) @ basis).view(2, 6)
    state, learned = np.random.get_state()[1].copy(), []
    for _ in range(2):
        evolution = gf_ti.GFTI(origin, basis, mode=mode, population=20, seed=0)
        for _ in range(60):
            evolution.tell(bowl(evolution.ask(), target))
            evolution.look(bowl(evolution.mean()[None], target).item(), keep=mode == "fair")
        learned.append(evolution.theta)
    assert bowl(learned[0][None], target) < 0.01 * bowl(origin[None], target)
    assert torch.equal(*learned)  # one seed, one answer
    assert np.array_equal(state, np.random.get_state()[1])  # cma seeds numpy's global generator unless told otherwise


def test_what_is_kept():
    """published: the best of the last generation. fair: the best mean that was looked at; a look not kept is forgotten."""
    published, fair = (gf_ti.GFTI(torch.zeros(1, 4), torch.eye(4), mode=mode, population=5) for mode in ("published", "fair"))
    for losses in ([3.0, 1.0, 2.0, math.nan, 5.0], [3.0, 4.0, math.inf, 0.5, 5.0]):
        tokens = published.ask()
        assert published.tell(torch.tensor(losses)) == pytest.approx(np.mean([x for x in losses if math.isfinite(x)]))
        assert torch.equal(published.theta, tokens[int(np.nanargmin(losses))])
    kept = published.theta
    published.ask()
    assert published.tell(torch.full((5,), math.nan)) is None and torch.equal(published.theta, kept)

    fair.look(float("nan"), keep=True)  # as fp16 can give: no measure for what follows
    fair.look(1.0, keep=True)
    for loss, keep, expected in ((2.0, True, "start"), (0.5, False, "mean"), (0.9, True, "mean"), (0.95, True, "best")):
        fair.ask()
        fair.tell(torch.arange(5.0))
        if expected == "mean":
            assert not torch.equal(fair.theta, fair.mean())
        fair.look(loss, keep)
        assert torch.equal(fair.theta, {"start": torch.zeros(1, 4), "mean": fair.mean(), "best": fair.best}[expected])
    assert fair.best_loss == 0.9


def through_a_checkpoint(evolution: gf_ti.GFTI, fresh: gf_ti.GFTI) -> gf_ti.GFTI:
    """Restore a search from what a checkpoint keeps of it: tensors, and numbers as JSON."""
    state = evolution.state_dict()
    tensors = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    fresh.load_state_dict({**tensors, **json.loads(json.dumps({name: state[name] for name in state.keys() - tensors.keys()}))})
    return fresh


@pytest.mark.parametrize(("dim", "population", "kind"), [(40, 6, "noisy"), (2, 3, "noisy"), (3, 12, "axes"), (3, 12, "turned")])
def test_a_search_restored_is_the_same_search(dim, population, kind):
    """Every seventh generation goes through a checkpoint, and not a bit differs from the search that never stopped. In 40
    dimensions cma decomposes C only now and then; the ellipsoid of condition 1e16 makes it change coordinates, along the axes
    (sigma_vec) or, if it is rotated, into its main axes."""
    scale = torch.logspace(0, -8, dim) if kind != "noisy" else torch.ones(dim)
    turn = (
        torch.linalg.qr(torch.randn(dim, dim, generator=seeded(5), dtype=torch.float64))[0]
        if kind == "turned"
        else torch.eye(dim)
    )
    weights = 1 / scale.double()

    def make(seed: int) -> gf_ti.GFTI:
        return gf_ti.GFTI(torch.zeros(1, dim), torch.eye(dim), population=population, seed=seed)

    def losses(evolution: gf_ti.GFTI, generator: torch.Generator) -> torch.Tensor:
        z = torch.from_numpy(np.asarray(evolution.z)) - 1
        noise = torch.randn(len(z), generator=generator) * (kind == "noisy")
        return ((z @ turn.double()) * weights).square().sum(1) + noise

    whole, restored, draws = make(0), make(0), (seeded(), seeded())
    for generation in range(1, 401 if kind != "noisy" else 60):
        assert torch.equal(whole.ask(), restored.ask()), generation
        for evolution, generator in zip((whole, restored), draws, strict=True):
            evolution.tell(losses(evolution, generator))
        if generation % 7 == 0:
            restored = through_a_checkpoint(restored, make(99))
        assert torch.equal(whole.theta, restored.theta) and torch.equal(whole.mean(), restored.mean())
    scaled = bool((whole.search.sigma_vec.scaling != 1).any())
    turned = not whole.search.gp.isidentity
    assert (scaled or turned) == (kind != "noisy") and (turned or kind != "turned") and (scaled or kind != "axes")


def test_basis_spreads_as_wide_as_the_vocabulary():
    generator = seeded()
    table = torch.randn(400, 8, generator=generator) * torch.arange(1.0, 9.0)
    basis = gf_ti.make_basis(table, subspace="random", intrinsic_dim=6)
    z = torch.randn(20000, 6, generator=generator)
    # 25 %: A has only 48 random entries
    assert (z @ basis).std().item() == pytest.approx(table.std().item(), rel=0.25)
    pca = gf_ti.make_basis(table, subspace="pca", intrinsic_dim=3, alpha=0.5)
    values, vectors = np.linalg.eigh(np.cov(table.numpy().T))
    for k in range(3):
        expected = torch.from_numpy(0.5 * math.sqrt(values[-1 - k]) * vectors[:, -1 - k]).float()
        assert abs(torch.cosine_similarity(pca[k], expected, dim=0).item()) == pytest.approx(1, abs=1e-6)
        assert pca[k].norm().item() == pytest.approx(expected.norm().item(), rel=1e-5)
    with pytest.raises(InputError, match="--intrinsic_dim 9 is more than the token's 8"):
        gf_ti.make_basis(table, subspace="random", intrinsic_dim=9)


@pytest.mark.parametrize("mode", ["published", "fair"])
def test_common_random_numbers(mode):
    """fair: all candidates on one batch. published: each has its own noise, at one timestep per generation."""
    from diffusers import DDPMScheduler

    seen = []

    class Zero(FrozenModel):
        def predict(self, batch, tokens):
            seen.append((batch, len(tokens)))
            return torch.zeros(len(tokens), *batch.target.shape)

    model = Zero(None, None, rows=torch.zeros(0))
    data = Data(torch.rand(3, 2, 2, 4, 2, 2), [[0], [1], [0]], torch.arange(10).view(2, 5), DDPMScheduler())
    generator = seeded()
    losses = gf_ti.generation_losses(model, data, torch.zeros(4, 1, 8), mode, 2, uniform_timesteps, generator)
    assert losses.shape == (4,) and [count for _, count in seen] == ([4] if mode == "fair" else [1] * 4)
    targets = [seen[0][0].target] * 4 if mode == "fair" else [batch.target for batch, _ in seen]
    torch.testing.assert_close(losses, torch.stack([target.square().mean() for target in targets]))  # of predictions of 0
    if mode == "published":
        assert len({int(t) for batch, _ in seen for t in batch.timesteps}) == 1
        assert len({batch.target.sum().item() for batch, _ in seen}) == 4
        gf_ti.generation_losses(model, data, torch.zeros(4, 1, 8), mode, 2, uniform_timesteps, generator)
        assert seen[4][0].timesteps[0] != seen[0][0].timesteps[0]


# ----------------------------------------------------------------------------------------------------- runs


@METHODS
def test_what_a_run_leaves(train, script, flags):
    """The files of train_zoodip.py's runs, with this method's settings and forwards, and no setting of another method's."""
    out = train(script, save_steps=5, checkpointing_steps=4, validation_prompt="a photo of <sks>", validation_steps=6,
                num_validation_images=2, **flags)  # fmt: skip
    assert names(out) == {
        "learned_embeds.safetensors", "sks.safetensors", "learned_embeds-steps-5.safetensors",
        "learned_embeds-steps-10.safetensors", "checkpoint-8.safetensors", "checkpoint-12.safetensors", "training_log.csv",
        "run.json", "validation-6.png", "validation-12.png",
    }  # fmt: skip
    width, height = Image.open(out / "validation-12.png").size
    assert width == 2 * 256 and 256 < height < 320  # two pictures of 16 pixels, enlarged, and the prompt beneath
    record = json.loads((out / "run.json").read_text())
    settings = record["settings"]
    assert settings["method"] == script.__name__.split(".")[-1] and not {"n", "mu", "tau", "nu", "estimator"} & set(settings)
    population = flags.get("population", 1)
    looks = 2 if flags.get("mode") == "fair" else 0  # evaluations that the method itself makes, of 2 samples
    rows = list(csv.DictReader((out / "training_log.csv").open()))
    assert [(int(row["step"]), int(row["unet_forwards"])) for row in rows] == [
        (0, looks), (6, looks + 6 * population), (12, 3 * looks + 12 * population)]  # fmt: skip
    assert record["unet_forwards"] == 3 * looks + 12 * population
    assert torch.equal(theta(out), load_file(out / "checkpoint-12.safetensors")["theta"])


@pytest.mark.parametrize(("script", "flags"), [TI, PUBLISHED, PCA], ids=["ti", "published", "pca"])
def test_resumed_equals_uninterrupted(train, script, flags):
    """Bit for bit, every file: 10 steps, then the rest from the checkpoint; and from an older one that is named."""
    flags = dict(checkpointing_steps=5, checkpoints_total_limit=0, eval_steps=5, **flags)
    whole = train(script, "whole", max_train_steps=25, **flags)
    train(script, "parts", max_train_steps=10, **flags)
    parts = train(script, "parts", max_train_steps=25, resume_from_checkpoint="latest", **flags)
    same_files(whole, parts)
    assert json.loads((parts / "run.json").read_text())["steps_this_time"] == 15
    named = train(script, "named", max_train_steps=25, resume_from_checkpoint=whole / "checkpoint-15.safetensors", **flags)
    assert (named / "learned_embeds.safetensors").read_bytes() == (whole / "learned_embeds.safetensors").read_bytes()


def test_more_generations_after_the_end_are_those_of_a_longer_run(train):
    """fair looks at the mean once more when a run ends; that must not affect the longer run."""
    script, flags = FAIR
    whole = train(script, "whole", max_train_steps=20, **flags)
    first = theta(train(script, "parts", max_train_steps=7, **flags))
    parts = train(script, "parts", max_train_steps=7, resume_from_checkpoint="latest", **flags)
    assert torch.equal(theta(parts), first)  # a run that is over stays as it is
    train(script, "parts", max_train_steps=20, resume_from_checkpoint="latest", **flags)
    assert torch.equal(theta(whole), theta(parts))


@METHODS
def test_a_signal_between_steps(train, monkeypatch, script, flags):
    """Ctrl-C in the third step: saved after it, exit code 130, and the rest from there is what an uninterrupted run learns."""
    flags = dict(eval_steps=4, **flags)
    whole = train(script, "whole", **flags)
    draw, drawn = script.draw_batch, []

    def draw_and_interrupt(*args):
        drawn.append(args)
        if len(drawn) == 1 + 2 * (
            flags["population"] if flags.get("mode", "published") == "published" and script is gf_ti else 1
        ):
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(script, "draw_batch", draw_and_interrupt)
    parts = train(script, "parts", code=130, **flags)
    assert {"checkpoint-3.safetensors", "learned_embeds.safetensors", "run.json"} <= names(parts)
    train(script, "parts", resume_from_checkpoint="latest", **flags)
    for name in ("learned_embeds.safetensors", "training_log.csv", "checkpoint-12.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


@pytest.mark.parametrize(
    ("module", "flags", "number", "code"),
    [("textual_inversion", {}, signal.SIGINT, 130), ("gf_ti", PUBLISHED[1], signal.SIGTERM, 143)],
)
def test_a_script_that_is_stopped(tiny_model, subject, tmp_path, train, module, flags, number, code):
    """The script itself, as a process: a signal once steps are under way, a line that says how to resume, and the same token."""
    script = getattr(sys.modules[__name__], module)
    flags = dict(max_train_steps=100000, checkpointing_steps=5, eval_steps=0, **flags)
    argv = arguments(tiny_model, subject, tmp_path / "out", **NOT_THEIRS, **flags)
    command = [sys.executable, "-m", f"trainers.{module}", *argv]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 300
        while not list((tmp_path / "out").glob("checkpoint-*")) and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    line = stderr.splitlines()[-1]
    assert line.startswith("interrupted and saved at step") and "--resume_from_checkpoint latest" in line
    step = json.loads((tmp_path / "out" / "run.json").read_text())["step"]
    flags["max_train_steps"] = step
    whole = train(script, "whole", **flags)
    assert torch.equal(theta(whole), theta(tmp_path / "out"))
    train(script, **{**flags, "max_train_steps": step + 3}, resume_from_checkpoint="latest")
    assert torch.equal(theta(tmp_path / "out"), theta(train(script, "longer", **{**flags, "max_train_steps": step + 3})))


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("script", "flag"), [
    *[(script, flag) for script in (textual_inversion, gf_ti) for flag in ("--n", "--mu", "--tau", "--nu", "--estimator",
                                                                           "--save_quantized")],
    *[(textual_inversion, flag) for flag in ("--compile", "--candidates_per_forward", "--population", "--mode")],
    (gf_ti, "--learning_rate"), (gf_ti, "--adam_epsilon"),
])  # fmt: skip
def test_flags_without_meaning_do_not_exist(capsys, script, flag):
    """Even at their defaults: a flag that is read and ignored would be a false claim."""
    assert run_cli(["--train_data_dir", "x", "--initializer_token", "x", flag, "3"], script) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and flag in line  # --n and --nu could be short for several others
    assert line.startswith(("error: unrecognized arguments", "error: ambiguous option"))


@pytest.mark.parametrize(("script", "flags", "words"), [
    (textual_inversion, dict(learning_rate=0), "--learning_rate must be a positive number"),
    (textual_inversion, dict(adam_epsilon=-1), "--adam_epsilon must be a positive number"),
    (textual_inversion, dict(t_min=900), "--t_min must be below --t_max 900"),
    (textual_inversion, dict(initializer_token=None), "--initializer_token is required"),
    (textual_inversion, dict(train_data_dir="/nowhere"), "'/nowhere'"),
    (gf_ti, dict(population=2), "--population must be at least 3"), (gf_ti, dict(intrinsic_dim=0), "--intrinsic_dim must be at"),
    (gf_ti, dict(alpha="inf"), "--alpha must be a positive number"), (gf_ti, dict(alpha=0), "--alpha must be a positive number"),
    (gf_ti, dict(subspace="pca", num_vectors=2), "--num_vectors must be 1 with --subspace pca, got 2"),
    (gf_ti, dict(mode="best"), "invalid choice: 'best'"),
    (gf_ti, dict(), "--intrinsic_dim 256 is more than the token's 32 numbers"),
])  # fmt: skip
def test_wrong_flags_are_one_line(tiny_model, subject, tmp_path, capsys, script, flags, words):
    """Refused before a model is loaded: value, place and rule on one line, exit code 2."""
    assert run_cli(arguments(tiny_model, subject, tmp_path / "out", **{**NOT_THEIRS, **flags}), script) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")


def test_a_checkpoint_of_another_run_is_refused(train, capsys):
    """Of another method, or of the same with another setting."""
    script, flags = PUBLISHED
    out = train(script, **flags)
    checkpoint = out / "checkpoint-12.safetensors"
    train(script, "other", code=2, resume_from_checkpoint=checkpoint, **{**flags, "population": 5})
    assert "--population was 4, is 5" in capsys.readouterr().err
    train(textual_inversion, "other", code=2, resume_from_checkpoint=checkpoint)
    assert "is from another method or version" in capsys.readouterr().err


def test_defaults():
    """Those of the authors' script and, for mode fair, a start at a fifth of the vocabulary's width."""
    argv = ["--train_data_dir", "x", "--initializer_token", "x"]
    ti, published, fair = textual_inversion.parse_args(argv), gf_ti.parse_args(argv), gf_ti.parse_args([*argv, "--mode", "fair"])
    assert (ti.learning_rate, ti.adam_epsilon, ti.max_train_steps, ti.timestep_sampling) == (5e-3, 1e-8, 5000, "puts")
    assert (published.mode, published.subspace, published.intrinsic_dim, published.population) == ("published", "random", 256, 20)
    assert (published.max_train_steps, published.timestep_sampling) == (13000, "uniform")
    assert (published.alpha, fair.alpha) == (1, 0.2)


def test_gf_ti_takes_the_number_of_vectors_from_what_it_starts_from(train, tiny_model, subject, tmp_path):
    """An embedding file has its own number of vectors, which --subspace pca may not allow."""
    start = train(textual_inversion, "start", num_vectors=2, max_train_steps=1) / "learned_embeds.safetensors"
    out = train(gf_ti, "two", population=4, intrinsic_dim=5, max_train_steps=1, initializer_token=start)
    assert theta(out).shape[0] == 2
    train(gf_ti, "pca", code=2, population=4, intrinsic_dim=5, subspace="pca", max_train_steps=1, initializer_token=start)


def test_gf_ti_reads_the_variant_that_was_found(tiny_model, subject, tmp_path, monkeypatch):
    """A folder that has only fp16 files, as it comes from the hub."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for component in ("unet", "text_encoder", "vae"):
        for path in (model / component).glob("*.safetensors"):
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    monkeypatch.setattr("zoodip.folder.hub_variant", lambda name, revision=None: "fp16")
    flags = dict(population=4, intrinsic_dim=5, max_train_steps=1, **NOT_THEIRS)
    assert run_cli(arguments(model, subject, tmp_path / "out", **flags), gf_ti) == 0
