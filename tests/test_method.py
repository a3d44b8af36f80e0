"""The mathematics of the method, against references written out plainly (numpy, loops, the stock models)."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import arguments, run_cli, seeded, shares_of
from tiny import alphas_cumprod, scheduler_of

import trainers.qlora
from train_zoodip import (
    ESTIMATORS,
    SubspaceGradient,
    ZOAdam,
    candidate_losses,
    low_variance_directions,
    partial_uniform_timesteps,
    shared_losses,
    train,
    zeroth_order_gradient,
)
from zoodip.checkpoints import read_checkpoint, write_checkpoint
from zoodip.diffusion import Batch, Data, FrozenModel, load_scheduler, timestep_sampler
from zoodip.errors import InputError

NAMES = ["rge", "spsa", "one_point"]
MU = 1e-2


# --- timesteps (Eq. 9, Table 5) ---


def chi_square(draws: torch.Tensor, probabilities: np.ndarray) -> float:
    """Pearson's statistic in standard deviations from its mean (dof, 2 dof)."""
    expected = probabilities * len(draws)
    counts = np.bincount(draws.numpy(), minlength=len(probabilities))
    used = expected > 0
    assert counts[~used].sum() == 0
    statistic = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    dof = used.sum() - 1
    return (statistic - dof) / math.sqrt(2 * dof)


def sampler_of(kind: str, t_min: int, t_max: int):
    data = SimpleNamespace(scheduler=SimpleNamespace(alphas_cumprod=torch.from_numpy(alphas_cumprod()).float()))
    return timestep_sampler(data, timestep_sampling=kind, t_min=t_min, t_max=t_max)


@pytest.mark.parametrize(
    ("kind", "t_min", "t_max"),
    [("puts", 500, 900), ("puts", 0, 1000), ("puts", 700, 707), ("uniform", 500, 900), ("snr", 500, 900)],
)
def test_timestep_distribution(kind, t_min, t_max):
    """A bound off by one, or any preference among timesteps, shows in the statistic."""
    abar = alphas_cumprod()
    draws = sampler_of(kind, t_min, t_max)(200000, seeded())
    weights = np.zeros(1000)
    if kind == "puts":
        weights[t_min:t_max] = 1
        assert draws.min() == t_min and draws.max() == t_max - 1
    elif kind == "uniform":
        weights[:] = 1
    else:  # TextBoost: log SNR(0) - log SNR(t), which grows as the signal-to-noise ratio falls
        log_snr = np.log(abar) - np.log(1 - abar)
        weights = log_snr[0] - log_snr
        assert (np.diff(weights) > 0).all()
    # 5 standard deviations: one seed in a million fails by chance, and the seed is fixed
    assert chi_square(draws, weights / weights.sum()) < 5


@pytest.mark.parametrize("kind", ["snr", "puts", "uniform"])
def test_snr_needs_signal_at_every_timestep(copy, kind):
    """With zero terminal SNR the last logarithm is infinite, which used to end the first step in a traceback."""
    scheduler_of(copy, rescale_betas_zero_snr=True).save_pretrained(copy / "scheduler")
    if kind == "snr":
        with pytest.raises(InputError, match="--timestep_sampling snr: .*zero terminal SNR.* puts or uniform"):
            load_scheduler(copy, kind)
    else:
        data = SimpleNamespace(scheduler=load_scheduler(copy, kind))
        timestep_sampler(data, timestep_sampling=kind, t_min=500, t_max=900)(4, seeded())


def test_snr_is_refused_before_photographs_are_encoded(copy, subject, refused, monkeypatch, tmp_path, capsys):
    """On the way of token trainers to their model, and on that of weight tuning."""
    scheduler_of(copy, rescale_betas_zero_snr=True).save_pretrained(copy / "scheduler")
    for loader in ("diffusion", "tuned_model"):
        monkeypatch.setattr(f"zoodip.{loader}.encode_photographs", lambda *given: pytest.fail("photographs were encoded"))
    assert "zero terminal SNR" in refused(model=copy, timestep_sampling="snr")
    argv = ["--pretrained_model_name_or_path", copy, "--train_data_dir", subject, "--output_dir", tmp_path / "tuned", "--cpu"]
    argv += ["--class_word", "dog", "--timestep_sampling", "snr", "--resolution", 16]
    assert run_cli(list(map(str, argv)), trainers.qlora) == 2
    assert "zero terminal SNR" in capsys.readouterr().err


def test_timestep_puts_of_one_value():
    """t_max = t_min + 1 is allowed and leaves a single timestep."""
    assert set(sampler_of("puts", 42, 43)(50, seeded()).tolist()) == {42}


def test_the_script_s_own_timesteps_are_those_that_other_trainers_draw():
    """Eq. 9 is written in the script; of the package's samplers, whose distribution is tested above, it equals `puts`."""
    ours = partial_uniform_timesteps(1000, seeded(), 500, 900)
    assert torch.equal(ours, sampler_of("puts", 500, 900)(1000, seeded()))
    assert ours.min() >= 500 and ours.max() < 900


# --- the gradient estimate (Eq. 3) ---


class Quadratic:
    """L(x) = x A x / 2 + b x over [V, d] points, fp64, with its gradient."""

    def __init__(self, vectors: int, width: int):
        generator, size = seeded(1), vectors * width
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.matrix, self.linear = root @ root.T / size, torch.randn(size, generator=generator, dtype=torch.float64)
        self.theta = torch.randn(vectors, width, generator=generator, dtype=torch.float64)

    def loss(self, point: torch.Tensor) -> torch.Tensor:
        flat = point.flatten()
        return flat @ self.matrix @ flat / 2 + self.linear @ flat

    def gradient(self) -> torch.Tensor:
        return (self.matrix @ self.theta.flatten() + self.linear).view_as(self.theta)

    def estimate(self, name: str, n: int, mu: float, generator: torch.Generator, effective_dim: int):
        estimator = ESTIMATORS[name]
        directions = torch.randn(estimator.num_directions(n), *self.theta.shape, generator=generator, dtype=torch.float64)
        points = self.theta + mu * estimator.candidate_offsets(directions)
        losses = torch.stack([self.loss(point) for point in points])
        return directions, losses, zeroth_order_gradient(estimator.slopes(losses, mu), directions[-n:], effective_dim)


@pytest.mark.parametrize("estimator", NAMES)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("effective_dim", [12, 9])
def test_gradient_equals_a_naive_loop(estimator, n, effective_dim):
    """A wrong order of candidates, a missing 1/n, 1/mu or s would differ by whole factors."""
    problem, mu = Quadratic(2, 6), 1e-2
    directions, losses, gradient = problem.estimate(estimator, n, mu, seeded(2), effective_dim)
    total = torch.zeros_like(problem.theta)
    for i in range(n):
        u = directions[i]
        if estimator == "rge":
            p = (problem.loss(problem.theta + mu * u) - problem.loss(problem.theta)) / mu
        elif estimator == "spsa":
            p = (problem.loss(problem.theta + mu * u) - problem.loss(problem.theta - mu * u)) / (2 * mu)
        else:
            u = directions[i + 1]
            p = (problem.loss(problem.theta + mu * u) - problem.loss(problem.theta + mu * directions[i])) / mu
        total += p * u
    expected = total / (n * math.sqrt((effective_dim + n - 1) / n))
    assert len(losses) == ESTIMATORS[estimator].num_candidates(n) == {"rge": n + 1, "spsa": 2 * n, "one_point": n + 1}[estimator]
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)  # fp64, the same differences over mu


@pytest.mark.parametrize("estimator", NAMES)
def test_expectation_is_the_gradient(estimator):
    """With very many directions (s -> 1) the estimate is the gradient: a wrong sign or multiplier shows."""
    problem = Quadratic(2, 3)
    _, _, gradient = problem.estimate(estimator, 40000, 1e-4, seeded(3), 6)
    error = (gradient - problem.gradient()).norm() / problem.gradient().norm()
    assert error < 0.06  # sampling error sqrt(2 d / n) = 1.7 % for one_point, the noisiest


@pytest.mark.parametrize(("estimator", "ratio"), [("rge", 1.0), ("spsa", 1.0), ("one_point", math.sqrt(2))])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_scale_brings_the_norm_to_the_gradients(estimator, ratio, n):
    """Without s the norm would be sqrt(65 / 2) = 6 times the gradient's. one_point differences two draws: variance 2."""
    problem, trials, generator = Quadratic(2, 32), 1500, seeded(4)
    norms = [problem.estimate(estimator, n, 1e-5, generator, 64)[2].norm() for _ in range(trials)]
    measured = torch.stack(norms).square().mean().sqrt() / problem.gradient().norm()
    # relative error of the mean square is about sqrt(2 / trials) = 3.7 % (n = 1), of its root half of that; the
    # expectation itself is sqrt((d + n + 1) / (d + n - 1)) = 1.016
    assert measured / ratio == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("estimator", NAMES)
def test_candidates_are_new_tensors_around_theta(estimator):
    """theta must not be perturbed in place, and directions belong to their candidates."""
    zo = ZOAdam(torch.randn(2, 8, generator=seeded()), estimator=estimator, n=3, mu=MU)
    before = zo.theta.detach().clone()
    directions, candidates = zo.candidates(seeded(1))
    assert torch.equal(zo.theta, before)
    assert candidates.data_ptr() != zo.theta.data_ptr()
    offsets = (candidates - before) / MU
    expected = {"rge": [torch.zeros(2, 8), *directions], "spsa": [*directions, *(-directions)], "one_point": list(directions)}[
        estimator
    ]
    # fp32 theta of size 1 keeps 1e-7 of it; divided by mu = 1e-2 that is 1e-5
    torch.testing.assert_close(offsets, torch.stack(expected), rtol=0, atol=1e-4)


# --- Adam ---


def drive(zo: ZOAdam, steps: int, seed: int = 5):
    """Steps on a bowl; yields (directions, losses, projection before the step, theta after it)."""
    generator, centre = seeded(seed), torch.full_like(zo.theta, 0.3)
    for _ in range(steps):
        directions, candidates = zo.candidates(generator)
        losses = (candidates - centre).square().flatten(1).sum(1)
        projection = zo.subspace.projection
        assert zo.step(directions, losses) is not None
        yield directions, losses, projection, zo.theta.detach().clone()


@pytest.mark.parametrize("estimator", NAMES)
def test_steps_equal_torch_adam_on_the_projected_gradient(estimator):
    """Same class, same numbers: bit for bit. Catches a wrong epsilon, betas, effective dimension or projection."""
    zo = ZOAdam(torch.zeros(2, 6), estimator=estimator, mu=MU, tau=5, nu=0.2, learning_rate=0.02)
    theta = torch.nn.Parameter(torch.zeros(2, 6))
    adam = torch.optim.Adam([theta], lr=0.02, betas=(0.9, 0.999), eps=1e-3)
    projected_steps = 0
    for directions, losses, projection, reached in drive(zo, 23):
        slopes = ESTIMATORS[estimator].slopes(losses, MU)
        gradient = zeroth_order_gradient(slopes, directions[-2:], 12 - len(projection))
        flat = gradient.flatten()
        theta.grad = (flat - (flat @ projection.T) @ projection).view(2, 6)
        adam.step()
        assert torch.equal(theta, reached)
        projected_steps += len(projection) > 0
    assert projected_steps == 18  # all but the first tau


def test_steps_equal_adam_written_out():
    """Adam of the paper in numpy, fp64: bias-corrected moments, epsilon 1e-3 outside the root, constant rate."""
    zo = ZOAdam(torch.zeros(1, 10), mu=MU, nu=0.0, learning_rate=0.01)
    theta, m, v = np.zeros(10), np.zeros(10), np.zeros(10)
    for t, (_, _, _, reached) in enumerate(drive(zo, 40), start=1):
        g = zo.theta.grad.double().numpy().ravel()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        theta = theta - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-3)
        # fp32 against fp64: 40 steps of at most 0.01, each right to a few 1e-7 of itself
        np.testing.assert_allclose(reached.numpy().ravel(), theta, rtol=0, atol=1e-6)
    assert np.abs(theta).max() > 0.05  # it moved


def test_a_loss_that_is_not_finite_changes_nothing():
    """One NaN in the moments would spoil every later step."""
    zo = ZOAdam(torch.zeros(1, 4), mu=MU, tau=3)
    directions, _ = zo.candidates(seeded())
    before = {name: tensor.clone() for name, tensor in zo.state_dict().items()}
    assert zo.step(directions, torch.tensor([1.0, math.nan, 1.0])) is None
    assert zo.step(directions, torch.tensor([math.inf, 1.0, 1.0])) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in zo.state_dict().items())
    assert zo.theta.abs().max() == 0 and len(zo.subspace.token_history) == 0
    assert zo.step(directions, torch.tensor([1.0, 1.1, 0.9])) == 1.0
    assert len(zo.subspace.token_history) == 1 and zo.theta.abs().max() > 0


@pytest.mark.parametrize("estimator", NAMES)
def test_the_loss_of_a_step(estimator):
    """The loss at theta if it is evaluated there; else the mean over the candidates, which equals it to the order of mu."""
    zo = ZOAdam(torch.zeros(1, 4), estimator=estimator, n=2, mu=MU)
    directions, candidates = zo.candidates(seeded())
    losses = torch.arange(1.0, len(candidates) + 1)
    assert zo.step(directions, losses) == {"rge": 1.0, "spsa": 2.5, "one_point": 2.0}[estimator]


# --- Subspace Gradient (Eqs. 4-8) ---


def standardise(history: np.ndarray) -> np.ndarray:
    history = history.astype(np.float64)
    deviation = history.std(0)
    deviation[deviation == 0] = 1
    return (history - history.mean(0)) / deviation


def plain_low_variance(history: np.ndarray, nu: float) -> np.ndarray:
    """Eqs. 4 to 7 and Algorithm 2, without regard to speed."""
    _, singular, right = np.linalg.svd(standardise(history), full_matrices=False)
    eigenvalues = singular**2
    i_star = len(eigenvalues)
    for i in range(1, len(eigenvalues) + 1):
        if eigenvalues[:i].sum() / eigenvalues.sum() > 1 - nu:
            i_star = i
            break
    return right[i_star:]


def low_rank(tau: int = 30, dim: int = 40, rank: int = 3, noise: float = 1e-3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(tau, rank)) @ rng.normal(size=(rank, dim)) + noise * rng.normal(size=(tau, dim))


def random_walk(tau: int, dim: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(tau, dim)).cumsum(0)


@pytest.mark.parametrize("nu", [1e-3, 0.05, 0.3, 0.99])
@pytest.mark.parametrize("history", [low_rank(), random_walk(30, 40), random_walk(50, 8)],
                         ids=["low-rank", "walk", "tau-above-D"])  # fmt: skip
def test_low_variance_directions_equal_the_plain_form(history, nu):
    """Off by one in i*, or variances summed from the wrong end, changes the number of rows or the span."""
    history = history.astype(np.float32)
    found, expected = low_variance_directions(torch.from_numpy(history), nu), plain_low_variance(history, nu)
    assert found.shape == expected.shape and found.dtype == torch.float32
    found = found.numpy().astype(np.float64)
    np.testing.assert_allclose(found @ found.T, np.eye(len(found)), rtol=0, atol=1e-5)  # orthonormal to fp32 storage
    if len(history) <= history.shape[1]:  # centring leaves rank tau - 1: the last right vector is then arbitrary
        found, expected = found[:-1], expected[:-1]
    # signs are free, so projectors are compared; neighbouring eigenvalues at the cut differ by > 1 %: vectors to 1e-5
    np.testing.assert_allclose(found.T @ found, expected.T @ expected, rtol=0, atol=1e-4)
    variance = standardise(history)
    assert np.square(variance @ expected.T).sum() <= nu * np.square(variance).sum()  # the share removed is at most nu


def test_the_moving_subspace_is_kept():
    """On a trajectory of rank 3 the noise is projected out and the motion is not."""
    history = low_rank()
    removed = low_variance_directions(torch.from_numpy(history), 1e-3).numpy()
    assert len(removed) == 30 - 3  # i* = 3: three directions hold 1 - 1e-6 of the variance
    _, _, right = np.linalg.svd(standardise(history), full_matrices=False)
    assert np.abs(right[:3] @ removed.T).max() < 1e-5  # orthogonal to the motion, to fp32 storage


def test_no_projection_without_nu():
    """nu = 0 must switch Subspace Gradient off entirely."""
    assert low_variance_directions(torch.from_numpy(random_walk(20, 30)), 0.0).shape == (0, 30)
    assert low_variance_directions(torch.from_numpy(low_rank()), 0.0).shape == (0, 40)


def test_columns_that_never_moved():
    """A zero deviation divides by one, not by zero; such a column holds no variance."""
    history = random_walk(20, 12).astype(np.float32)
    history[:, [2, 7]] = [0.1, -3.7]  # not exactly representable
    found = low_variance_directions(torch.from_numpy(history), 0.05)
    assert torch.isfinite(found).all()
    expected = plain_low_variance(history, 0.05)
    assert found.shape == expected.shape
    ordinary = [i for i in range(12) if i not in (2, 7)]
    kept = np.linalg.svd(standardise(history))[2][: 12 - len(found)]
    assert np.abs(kept[:, [2, 7]]).max() < 1e-9  # the kept directions have no part of those columns
    assert np.abs(kept[:, ordinary]).max() > 0.1
    assert (found @ torch.from_numpy(kept.T).float()).abs().max() < 1e-5  # fp32 storage


def test_a_token_that_never_moved_projects_nothing():
    """0 / 0 in the explained share must not become a projection or a NaN."""
    assert low_variance_directions(torch.full((6, 9), 0.1), 1e-3).shape == (0, 9)


def test_subspace_bookkeeping():
    """tau unprojected steps, a refresh every tau, a buffer that starts over and holds UPDATED tokens."""
    zo = ZOAdam(torch.zeros(2, 6), mu=MU, tau=5, nu=0.2)
    window, previous = [], zo.subspace.projection
    for step, (_, _, _, reached) in enumerate(drive(zo, 17), start=1):
        window.append(reached.flatten())
        projection = zo.subspace.projection
        if step % 5:
            assert torch.equal(zo.subspace.token_history, torch.stack(window))
            assert projection is previous
        else:
            assert len(zo.subspace.token_history) == 0
            assert torch.equal(projection, low_variance_directions(torch.stack(window), 0.2))
            assert 1 <= len(projection) <= 4
            window, previous = [], projection
        if step < 5:
            assert len(projection) == 0


@pytest.mark.parametrize("estimator", NAMES)
@pytest.mark.parametrize("saved_at", [3, 16, 25])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, estimator, saved_at):
    """At a real token's size: the memory layout of a restored projection must not change the last bit of a product."""
    path, start = tmp_path / "checkpoint-1.safetensors", torch.zeros(2, 384)
    whole, restored = (ZOAdam(start, estimator=estimator, mu=MU, tau=8, nu=0.2) for _ in range(2))
    generator, again = seeded(1), seeded(2)

    def step(zo, source):
        directions, candidates = zo.candidates(source)
        zo.step(directions, (candidates - 0.3).square().flatten(1).mean(1))

    for _ in range(saved_at):
        step(whole, generator)
    write_checkpoint(path, {"step": saved_at}, {**whole.state_dict(), "generator": generator.get_state()})
    header, tensors = read_checkpoint(path)
    assert header == {"step": saved_at}
    again.set_state(tensors.pop("generator"))
    restored.load_state_dict(tensors)
    for _ in range(30):
        assert torch.equal(whole.theta, restored.theta)
        step(whole, generator)
        step(restored, again)
    assert torch.equal(whole.theta, restored.theta) and len(whole.subspace.projection) > 0


def test_project_removes_exactly_the_projection():
    """g - g P^T P: nothing left along P, all else untouched, the shape kept."""
    subspace = SubspaceGradient(4, 0.3, 12)
    gradient = torch.randn(3, 4, generator=seeded())
    assert torch.equal(subspace.project(gradient), gradient)
    subspace.projection = torch.linalg.qr(torch.randn(12, 3, generator=seeded(1)))[0].T.contiguous()
    projected = subspace.project(gradient)
    assert projected.shape == (3, 4)
    assert (subspace.projection @ projected.flatten()).abs().max() < 1e-6  # fp32 of values of size 1
    removed = (gradient - projected).flatten()
    torch.testing.assert_close(removed, subspace.projection.T @ (subspace.projection @ removed), rtol=0, atol=1e-6)
    torch.testing.assert_close(subspace.project(projected), projected, rtol=0, atol=1e-6)


# --- the whole chain, model included ---


def test_losses_equal_one_candidate_and_one_image_at_a_time(tiny):
    """Mean over ALL elements of a candidate's images, and no mixing of candidates with images."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny.folder / "unet")
    batch, tokens = tiny.batch(3), tiny.tokens(4)
    losses = tiny.losses(batch, tokens)
    assert losses.shape == (4,) and losses.dtype == torch.float32
    for c in range(4):
        squares = []
        for b in range(3):
            states = tiny.stock_states(tiny.texts[b % 2], tokens[c])[None]
            with torch.no_grad():
                prediction = unet(batch.noisy_latents[b : b + 1], batch.timesteps[b], states).sample
            squares.append((prediction - batch.target[b]).double().square().flatten())
        # fp32 sums in another order: 1e-6 of the loss; candidates differ by more, see the assertion below
        assert losses[c].item() == pytest.approx(torch.cat(squares).mean().item(), rel=1e-6)
    assert losses.max() - losses.min() > 1e-5 * losses.mean()


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 9])
def test_candidates_per_forward_changes_only_rounding(tiny, chunk):
    """A chunk boundary must not drop, repeat or reorder a candidate; and the forwards must be as large as asked for."""
    batch, tokens = tiny.batch(2), tiny.tokens(4)
    model = FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows, chunk)
    with torch.no_grad():
        whole = tiny.losses(batch, tokens)
    seen = []
    handle = tiny.unet.conv_out.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    losses = candidate_losses(model, batch, tokens)
    handle.remove()
    assert seen == {1: [2] * 4, 2: [4] * 2, 3: [6, 2], 4: [8], 9: [8]}[chunk]  # 4 candidates of 2 images
    torch.testing.assert_close(losses, whole, rtol=1e-6, atol=0)  # summation order only
    assert (whole.diff().abs() > 3e-6 * whole.mean()).all()  # so that a wrong order would be seen


def test_fp32_of_a_gpu_is_not_rounded_to_tf32(tiny_model, subject, tmp_path):
    """Ten bits are too few for differences between candidates; PyTorch's default gives convolutions no more."""
    torch.backends.cudnn.allow_tf32 = True
    assert run_cli(arguments(tiny_model, subject, tmp_path, max_train_steps=1, eval_steps=0)) == 0
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"  # PyTorch's default, which nothing here may change


def test_candidates_share_every_random_draw(tiny):
    """Common random numbers: equal candidates get equal losses, and evaluating them draws nothing."""
    model = FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    losses = candidate_losses(model, tiny.batch(2), tiny.tokens(1).repeat(3, 1, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (losses - losses[0]).abs().max() < 1e-6 * losses[0]  # the place in the batch only changes rounding
    other = candidate_losses(model, tiny.batch(2, seed=4), tiny.tokens(1))
    assert abs(other[0] - losses[0]) > 1e-3  # while another draw gives another loss


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_candidates(tiny, processes):
    """Each process evaluates every processes-th candidate; their sum has every loss once and in its place."""
    batch, tokens = tiny.batch(1), tiny.tokens(5)
    model = FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows)
    shares = shares_of(processes, lambda accelerator: shared_losses(accelerator, model, batch, tokens))
    assert [int((share != 0).sum()) for share in shares] == [len(range(rank, 5, processes)) for rank in range(processes)]
    # the same sums in batches of another size
    torch.testing.assert_close(sum(shares), candidate_losses(model, batch, tokens), rtol=1e-6, atol=0)


class Watched(FrozenModel):
    """Keeps what it is asked to predict."""

    def predict(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), (batch, tokens)]
        return super().predict(batch, tokens)


def test_every_estimator_sees_the_same_batches(tiny):
    """The batch is drawn before the directions, so that step 1 has the same image and noise for all estimators."""
    data = Data(torch.rand(3, 2, 2, 4, 8, 8, generator=seeded()), [[0], [1], [0, 1]], tiny.prompts.ids, scheduler_of(tiny.folder))
    sample = partial(partial_uniform_timesteps, t_min=500, t_max=900)
    model, forwards = Watched(tiny.unet, tiny.text_encoder, tiny.prompts.rows), []
    run = SimpleNamespace(
        steps=lambda outputs: [1],
        note=lambda loss, **of_step: forwards.append(of_step["forwards"]),
        accelerator=SimpleNamespace(num_processes=1, process_index=0),
    )
    for estimator in NAMES:
        zo = ZOAdam(tiny.tokens(1)[0], estimator=estimator)
        train(run, None, zo, model, data, sample, 2, seeded())
    assert [len(tokens) for _, tokens in model.seen] == forwards == [3, 4, 3]
    first = model.seen[0][0]
    for other, _ in model.seen[1:]:
        assert torch.equal(first.noisy_latents, other.noisy_latents)
        assert torch.equal(first.prompt_ids, other.prompt_ids)


@pytest.mark.parametrize("estimator", ["rge", "spsa", "one_point"])
def test_the_estimate_points_along_the_true_gradient(tiny, estimator):
    """The whole chain, model included, against back-propagation."""
    batch, token, mu = tiny.batch(1), tiny.tokens(1).requires_grad_(), 0.05
    (gradient,) = torch.autograd.grad(tiny.losses(batch, token)[0], token)
    n, dim = 800, token.numel()
    estimator = ESTIMATORS[estimator]
    directions = torch.randn(estimator.num_directions(n), *token.shape[1:], generator=seeded(5))
    candidates = token.detach() + mu * estimator.candidate_offsets(directions)
    model = FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows, 100)
    slopes = estimator.slopes(candidate_losses(model, batch, candidates), mu)
    estimate = zeroth_order_gradient(slopes, directions[-n:], dim)
    cosine = torch.cosine_similarity(estimate.flatten(), gradient.flatten(), dim=0)
    # sqrt(n / (n + 2 d)) = .90 is expected of the noisiest (one_point, d = 96); curvature over mu costs a little
    assert cosine > 0.8
