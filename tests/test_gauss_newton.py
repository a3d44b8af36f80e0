"""trainers/gauss_newton.py: its mathematics against dense references, and a run that resumes to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import MINIATURE, ROOT, arguments, seeded, shares_of, torchrun
from safetensors.torch import load_file

from trainers import gauss_newton
from zoodip.diffusion import FrozenModel
from zoodip.errors import run_script


def run(argv: list[str]) -> int:
    try:
        return run_script(gauss_newton.main, gauss_newton.parse_args(argv))
    except SystemExit as exit_:
        return exit_.code


def flags(model, subject, output, **changes) -> list[str]:
    """A short run on the tiny model: four steps of three forwards."""
    given = dict(max_train_steps=None, tau=None, nu=None, mu=None, max_forwards=12, basis_size=6, directions=2, eval_steps=2,
                 rebase_steps=2)  # fmt: skip
    given |= changes
    sizes = given.pop("basis_size")
    argv = arguments(model, subject, output, **given)
    return [*argv, "--basis_size", *map(str, sizes if isinstance(sizes, list) else [sizes])]


class Linear:
    """A world in which predictions are linear in the token: eps(theta) = M theta + b, so that the solution is known."""

    def __init__(self, dim: int = 12, numbers: int = 40):
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(numbers, dim, generator=generator, dtype=torch.float64)
        self.bias = torch.randn(numbers, generator=generator, dtype=torch.float64)
        self.target = torch.randn(numbers, generator=generator, dtype=torch.float64)
        self.token = torch.randn(1, dim, generator=generator)

    def predict(self, tokens: torch.Tensor) -> torch.Tensor:  # [C, 1, D] -> [C, N]
        return tokens.double().flatten(1) @ self.matrix.T + self.bias

    def learner(self, basis_size: int, **settings) -> gauss_newton.GaussNewton:
        learner = gauss_newton.GaussNewton(self.token, **settings)
        gram = self.matrix.T @ self.matrix
        learner.rebase(gauss_newton.sensitive_directions(gram, basis_size))
        return learner


def test_matrix_and_gradient_are_those_of_the_dense_problem():
    """With as many mixtures as basis vectors, A and g are J^T J and J^T r in the basis, whatever the mixtures are."""
    world = Linear()
    learner = world.learner(5, directions=5, rho=0.5)
    mixtures, tokens = learner.candidates(torch.Generator().manual_seed(1))
    matrix, gradient, loss, seen_variance = gauss_newton.gauss_newton(world.predict(tokens), world.target, mixtures, 0.5)
    jacobian = world.matrix @ learner.basis
    residual = world.predict(world.token[None])[0] - world.target
    # tokens are fp32: differences of length .5 keep six digits
    torch.testing.assert_close(matrix, jacobian.T @ jacobian, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, jacobian.T @ residual, rtol=1e-5, atol=1e-4)
    assert loss == pytest.approx(residual.square().mean().item(), rel=1e-6)
    within = jacobian @ torch.linalg.lstsq(jacobian, residual[:, None]).solution
    assert seen_variance == pytest.approx(within.square().sum().item() / 5, rel=1e-4)


def test_what_few_mixtures_see_is_the_projection():
    world = Linear()
    learner = world.learner(6, directions=2, rho=0.5)
    mixtures, tokens = learner.candidates(torch.Generator().manual_seed(1))
    matrix, gradient, *_ = gauss_newton.gauss_newton(world.predict(tokens), world.target, mixtures, 0.5)
    jacobian, seen = world.matrix @ learner.basis, mixtures @ mixtures.T
    residual = world.predict(world.token[None])[0] - world.target
    torch.testing.assert_close(matrix, seen @ jacobian.T @ jacobian @ seen, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, seen @ (jacobian.T @ residual), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("directions, steps, tolerance", [
    (12, 1, 1e-4),  # the rest is fp32 rounding of the candidates
    (3, 400, 1e-2),  # a step sees a quarter of the space: the memory still holds a little of the way
])  # fmt: skip
def test_a_quadratic_is_solved(directions, steps, tolerance):
    """The whole space as basis, no clip, hardly any prior: this gives the least-squares solution, 4 away from the start."""
    world = Linear()
    memory = 1e6 if steps == 1 else 20.0
    learner = world.learner(12, directions=directions, rho=0.5, prior=1e4, clip=1e4, memory=memory, inflation=1e-6)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        mixtures, tokens = learner.candidates(generator)
        learner.step(mixtures, world.predict(tokens), world.target)
    solution = torch.linalg.lstsq(world.matrix, world.target - world.bias).solution
    torch.testing.assert_close(learner.theta.flatten().double(), solution, rtol=0, atol=tolerance)


def test_the_update_is_the_one_written_down():
    """Two steps against the formulas in the head of the script, written with dense matrices and an explicit inverse."""
    world = Linear()
    settings = dict(rho=0.5, inflation=2.0, prior=0.3, clip=0.05, memory=4.0)
    learner = world.learner(6, directions=3, **settings)
    length, basis = world.token.norm().item(), learner.basis.clone()
    generator, reference = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    weights, precision, moment = torch.zeros(6).double(), torch.zeros(6, 6).double(), torch.zeros(6).double()
    variance = None
    for t in range(2):
        mixtures, tokens = learner.candidates(generator)
        loss = learner.step(mixtures, world.predict(tokens), world.target)

        c = torch.linalg.qr(torch.randn(6, 3, generator=reference, dtype=torch.float64))[0]
        residual = world.matrix @ (world.token.flatten().double() + basis @ weights) + world.bias - world.target
        y = (world.matrix @ basis @ c).T
        variance = residual.square().mean() if variance is None else 0.9 * variance + 0.1 * residual.square().mean()
        alpha, gamma = 1 / (2.0 * variance), 1 - 1 / (4.0 + t / 2)
        a = c @ y @ y.T @ c.T
        precision, moment = gamma * precision + alpha * a, gamma * moment + alpha * (a @ weights - c @ y @ residual)
        step = torch.inverse(precision + torch.eye(6) / (0.3 * length) ** 2) @ moment - weights
        weights = weights + step * min(1.0, 0.05 * length / step.norm().item())
        assert loss == pytest.approx(residual.square().mean().item(), rel=1e-5)
    torch.testing.assert_close(learner.weights, weights, rtol=1e-4, atol=1e-6)  # the learner's candidates are fp32


def test_a_larger_basis_keeps_what_was_learned():
    """Six of twelve directions become ten: same token, same aim; in the new directions nothing is known yet."""
    world = Linear()
    learner, generator = world.learner(6, directions=3, rho=0.5, clip=1e4), torch.Generator().manual_seed(4)
    for _ in range(5):
        mixtures, tokens = learner.candidates(generator)
        learner.step(mixtures, world.predict(tokens), world.target)
    token, former, precision, moment = learner.theta, learner.basis, learner.precision, learner.moment
    ahead = moment - precision @ learner.weights  # minus the gradient of the quadratic that was learned, at the token
    learner.rebase(gauss_newton.sensitive_directions(world.matrix.T @ world.matrix, 10))
    torch.testing.assert_close(learner.theta, token)
    turn = former.T @ learner.basis
    torch.testing.assert_close(turn @ turn.T, torch.eye(6, dtype=torch.float64))  # the six best are among the ten best
    torch.testing.assert_close(turn @ learner.precision @ turn.T, precision)
    torch.testing.assert_close(turn @ learner.moment, ahead)
    assert torch.linalg.matrix_rank(learner.precision, rtol=1e-9) == 6


def test_variance_from_the_data():
    """For residuals that are white noise, their variance; for residuals that repeat each number four times, four times that."""
    generator = torch.Generator().manual_seed(8)
    found = []
    for repeats in (1, 4):
        seen = []
        for _ in range(400):
            noise = torch.randn(64 // repeats, generator=generator, dtype=torch.float64).repeat_interleave(repeats)
            slopes = torch.randn(4, 64 // repeats, generator=generator, dtype=torch.float64).repeat_interleave(repeats, 1)
            predictions = torch.cat([torch.zeros(1, 64, dtype=torch.float64), 0.1 * slopes])
            seen.append(gauss_newton.gauss_newton(predictions, noise, torch.eye(4, dtype=torch.float64), 0.1).seen_variance)
        found.append(sum(seen) / len(seen))
    # chi-square of 4 x 400: a standard error of 3.5 %
    assert found == pytest.approx([1.0, 4.0], rel=0.12)


def test_the_learner_takes_the_variance_from_the_data():
    """--inflation auto: 1 / alpha is the variance of the residual in the span of the slopes, not that of the whole residual."""
    world = Linear()
    learner = world.learner(6, directions=3, rho=0.5, inflation=None)
    mixtures, tokens = learner.candidates(torch.Generator().manual_seed(2))
    found = gauss_newton.gauss_newton(world.predict(tokens), world.target, mixtures, 0.5)
    learner.step(mixtures, world.predict(tokens), world.target)
    assert abs(found.seen_variance - found.loss) > 0.1 * found.loss
    torch.testing.assert_close(learner.precision, found.matrix / found.seen_variance)


@pytest.mark.parametrize("growth, spans", [(0.0, [5, 5, 5]), (0.5, [5, 5.5, 6])])
def test_memory(growth, spans):
    """Each later step keeps 1 - 1 / span of what a step added."""
    world = Linear()
    learner, kept = world.learner(4, directions=4, memory=5.0, memory_growth=growth), []
    for _ in spans:
        before = torch.trace(learner.precision)
        mixtures, tokens = learner.candidates(torch.Generator().manual_seed(9))
        matrix = gauss_newton.gauss_newton(world.predict(tokens), world.target, mixtures, learner.rho).matrix
        learner.step(mixtures, world.predict(tokens), world.target)
        kept.append((torch.trace(learner.precision) - torch.trace(matrix) / learner.variance) / before)
    assert kept[1:] == pytest.approx([1 - 1 / span for span in spans[1:]], rel=1e-4)


def test_sizes_of_new_bases():
    sizes = [gauss_newton.size_of_new_basis(done, [4, 6], [2, 3, 5]) for done in range(7)]
    assert sizes == [4, None, 6, 6, None, 6, None]
    assert [gauss_newton.size_of_new_basis(done, [4], []) for done in range(3)] == [4, None, None]


def test_the_best_start_goes_on():
    starts = gauss_newton.Starts([gauss_newton.GaussNewton(torch.full((1, 4), float(i))) for i in range(3)], start_steps=2)
    order = []
    for step in range(1, 9):
        if starts.begin(step):
            assert step == 7
            starts.choose(torch.tensor([2.0, 1.0, float("nan")]))
        order.append(int(starts.active))
    assert order == [0, 0, 1, 1, 2, 2, 1, 1] and starts.theta[0, 0] == 1
    assert not any(gauss_newton.Starts([starts.learner], 2).begin(step) for step in range(1, 9))


def test_a_rotated_basis_changes_nothing():
    """Rebasing to a rotation of the same directions keeps the token, and the solution that past steps point to."""
    world = Linear()
    learner, generator = world.learner(6, directions=3, rho=0.5, clip=1e4), torch.Generator().manual_seed(4)
    for _ in range(5):
        mixtures, tokens = learner.candidates(generator)
        learner.step(mixtures, world.predict(tokens), world.target)
    token = learner.theta
    aim = learner.basis @ torch.linalg.solve(learner.precision, learner.moment - learner.precision @ learner.weights)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    learner.rebase(learner.basis @ rotation)
    torch.testing.assert_close(learner.theta, token)
    torch.testing.assert_close(learner.basis @ torch.linalg.solve(learner.precision, learner.moment), aim)


@pytest.mark.parametrize("inflation", [3.0, None])
@pytest.mark.parametrize("fault", ["not finite", "all equal"])
def test_a_step_that_says_nothing_changes_nothing(fault, inflation):
    """Predictions are all equal where the difference of the tokens is lost in rounding."""
    world = Linear()
    learner = world.learner(6, directions=3, inflation=inflation)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    mixtures, tokens = learner.candidates(torch.Generator().manual_seed(6))
    predictions = world.predict(tokens)
    predictions = predictions * torch.nan if fault == "not finite" else predictions[:1].expand_as(predictions)
    assert learner.step(mixtures, predictions, world.target) is None
    for name, value in learner.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_text_sensitivity_is_autograds(tiny_model):
    """Forward differences of the text encoder against its exact Jacobian, for a token of two vectors and two prompts."""
    from zoodip.model import load_text_encoder
    from zoodip.prompts import encode_prompts

    text_encoder = load_text_encoder(tiny_model, None, "nf4", torch.float32, "cpu")
    generator = torch.Generator().manual_seed(7)
    rows, theta = 0.5 * torch.randn(5, 32, generator=generator), 0.5 * torch.randn(2, 32, generator=generator)
    ids = torch.randint(5, (2, 77), generator=generator)
    ids[0, 3:5] = ids[1, 7:9] = torch.tensor([5, 6])  # the placeholder's two vectors
    found = gauss_newton.text_sensitivity(text_encoder, rows, ids, theta, delta=1e-3, at_once=10)

    def states(token):
        return encode_prompts(text_encoder, rows, ids, token[None])

    jacobian = torch.autograd.functional.jacobian(states, theta).flatten(0, 2).flatten(1)  # [2 * 77 * 32, 64]
    exact = jacobian.T @ jacobian
    # an error of first order in delta: the states' curvature times .001
    assert (found - exact).norm() < 0.01 * exact.norm()
    directions = gauss_newton.sensitive_directions(found, 4)
    torch.testing.assert_close(directions.T @ directions, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    captured = torch.trace(directions.T @ exact.double() @ directions) / torch.linalg.eigvalsh(exact.double())[-4:].sum()
    assert captured > 0.999  # of what the best four directions hold


@pytest.mark.slow
def test_one_prompt_is_enough():
    """On the miniature the 16 directions of one caption of the demo's subject hold nearly all that the best 16 of all captions
    hold. The share was .998 of three captions."""
    from zoodip.diffusion import read_inputs
    from zoodip.model import load_text_encoder

    subject = dict(train_data_dir=ROOT / "dataset/furmix", cc_file=ROOT / "cc.json", use_cc=True)
    inputs = read_inputs(
        **subject, pretrained_model_name_or_path=str(MINIATURE), placeholder_token="<sks>", initializer_token="critter"
    )
    text_encoder = load_text_encoder(MINIATURE, None, "nf4", torch.float32, "cpu")
    ids, rows, token = inputs.prompts.ids, inputs.prompts.rows, inputs.initial_token
    grams = [gauss_newton.text_sensitivity(text_encoder, rows, prompt[None], token) for prompt in ids]
    one = gauss_newton.sensitive_directions(grams[0], 16)
    held = torch.trace(one.T @ sum(grams).double() @ one)
    assert held > 0.95 * torch.linalg.eigvalsh(sum(grams).double())[-16:].sum()


def test_sixteen_bit_encoder_is_given_back(tiny_model):
    from zoodip.model import load_text_encoder

    text_encoder = load_text_encoder(tiny_model, None, "nf4", torch.bfloat16, "cpu")
    before = {name: value.clone() for name, value in text_encoder.named_parameters() if value.numel()}
    inputs = torch.randn(2, 32, generator=seeded(1)), torch.tensor([[0, 2, 1]]), torch.randn(1, 32, generator=seeded(2))
    gram = gauss_newton.text_sensitivity(text_encoder, *inputs)
    for name, value in text_encoder.named_parameters():
        assert not value.numel() or (value.dtype == torch.bfloat16 and torch.equal(value, before[name])), name
    exact = gauss_newton.text_sensitivity(text_encoder.float(), *inputs)
    assert torch.equal(gram, exact) and gram.norm() > 0  # computed in fp32; differences of bf16 states would be rounding errors


@pytest.mark.parametrize("form", [
    {}, dict(basis_size=[4, 6], inflation="auto", memory_growth=0),
    dict(starts=2, start_steps=1, max_forwards=44, rebase_steps=1),
], ids=["default", "growing", "two starts"])  # fmt: skip
def test_run_and_resume(form, tiny_model, subject, tmp_path):
    """An interrupted run resumes to the same bits, across a change of basis and a choice of starts."""
    assert run(flags(tiny_model, subject, tmp_path / "whole", checkpointing_steps=1, checkpoints_total_limit=0, **form)) == 0
    for step in (1, 2, 3):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}.safetensors"
        output = tmp_path / f"from-{step}"
        assert run(flags(tiny_model, subject, output, resume_from_checkpoint=checkpoint, **form)) == 0
        for name in ("learned_embeds.safetensors", "training_log.csv"):
            assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (step, name)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["unet_forwards"] == int(form.get("max_forwards", 12))
    (token,) = load_file(tmp_path / "whole" / "learned_embeds.safetensors").values()
    assert token.shape == (1, 32) and token.dtype == torch.float32


def test_bases_and_starts_of_a_run(tiny_model, subject, tmp_path, monkeypatch):
    """Each start has a basis at the initial token; the best of their tokens goes on, with a new one at its own."""
    bases, judged = [], []
    take_basis, mean_loss, choose = gauss_newton.take_basis, FrozenModel.mean_loss, gauss_newton.Starts.choose

    def watch_basis(learner, model, data, size):
        at = learner.theta.clone()
        take_basis(learner, model, data, size)
        gram = gauss_newton.text_sensitivity(model.text_encoder, model.rows, data.prompt_ids[:1], at, delta=1e-2)
        torch.testing.assert_close(learner.basis, gauss_newton.sensitive_directions(gram, size))
        bases.append((learner, at))

    def watch_loss(model, batches, theta):
        judged.append(theta.clone())
        return mean_loss(model, batches, theta)

    def watch_choice(starts, losses):
        tokens = [learner.theta for learner in starts.learners]
        assert all(torch.equal(*pair) for pair in zip(judged[-2:], tokens, strict=True)) and not torch.equal(*tokens)
        choose(starts, losses)
        assert int(starts.active) == int(losses.argmin())

    monkeypatch.setattr(gauss_newton, "take_basis", watch_basis)
    monkeypatch.setattr(FrozenModel, "mean_loss", watch_loss)
    monkeypatch.setattr(gauss_newton.Starts, "choose", watch_choice)
    # two starts of two steps, then three of the best: its fifth step is in a new basis
    form = dict(starts=2, start_steps=2, max_forwards=7 * 3 + 32, rebase_steps=4, eval_steps=0)
    assert run(flags(tiny_model, subject, tmp_path, **form)) == 0
    (one, initial), (two, again), (best, later) = bases
    assert torch.equal(initial, again) and not torch.equal(initial, later) and best in (one, two) and one is not two
    assert int(best.steps) == 5 and len(bases) == 3


@pytest.mark.slow
def test_two_processes_equal_one(tiny_model, subject, tmp_path):
    """The predictions, the bases and the choice of a start are shared.

    Predictions in batches of another size differ by 1e-6, slopes therefore by 1e-5, and the steps that follow from them by more.
    """
    form = dict(starts=2, start_steps=2, max_forwards=7 * 3 + 32, rebase_steps=4, eval_steps=0, rho=0.1)
    argv = [*torchrun(2, 29519), "trainers/gauss_newton.py", *flags(tiny_model, subject, tmp_path / "two", **form)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert run(flags(tiny_model, subject, tmp_path / "one", **form)) == 0
    assert run(flags(tiny_model, subject, tmp_path / "other", **form, seed=1)) == 0
    one, two, other = (load_file(tmp_path / name / "learned_embeds.safetensors")["<sks>"] for name in ("one", "two", "other"))
    assert (one - two).norm() < 0.01 * (one - other).norm()


@pytest.mark.parametrize("precision, rho", [("fp32", 1e-2), ("bf16", 0.2), ("fp16", 5e-2)])
def test_the_finite_difference_is_as_long_as_the_precision_needs(precision, rho, tiny_model, subject, tmp_path):
    """bf16 has 8 bits: a token changed by .01 gives a difference of rounding errors. The trial chose .2."""
    given = dict(max_forwards=3, eval_steps=0, checkpointing_steps=0)
    assert run(flags(tiny_model, subject, tmp_path, mixed_precision=precision, **given)) == 0
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["rho"] == rho


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_predictions(tiny, processes):
    """Each process predicts for every processes-th candidate; their sum has every prediction once and in its place."""
    batch, tokens = tiny.batch(2), tiny.tokens(5)
    model = FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows)
    shares = shares_of(processes, lambda accelerator: gauss_newton.shared_predictions(accelerator, model, batch, tokens))
    for rank, share in enumerate(shares):
        assert [c for c in range(5) if share[c].any()] == list(range(rank, 5, processes))
    alone = SimpleNamespace(num_processes=1, process_index=0)
    whole = gauss_newton.shared_predictions(alone, model, batch, tokens)
    # predictions of size 1 in batches of another size; those of two candidates differ by more
    torch.testing.assert_close(sum(shares), whole, rtol=0, atol=1e-5)
    assert (whole.diff(dim=0).flatten(1).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("change, says", [
    (dict(directions=7), "--directions must be at most --basis_size 6"),
    (dict(max_forwards=2), "--max_forwards must be at least 3"),
    (dict(rho=0), "--rho must be a positive number"), (dict(memory=1), "--memory must be more than 1"),
    (dict(t_min=950), "--t_min must be below --t_max"), (dict(basis_size=99), "--basis_size 99 is more than the token's 32"),
    (dict(basis_size=[6, 1]), "--directions must be at most --basis_size 1"),
    (dict(inflation="some"), "--inflation: must be a number or auto, got 'some'"),
    (dict(starts=2, start_steps=1), "--max_forwards must be at least 41, enough for one step with the best of"),
    (dict(memory_growth=-1), "--memory_growth must not be negative"), (dict(start_steps=0), "--start_steps must be at least 1"),
])  # fmt: skip
def test_wrong_flags_are_one_line(change, says, tiny_model, subject, tmp_path, capsys):
    assert run(flags(tiny_model, subject, tmp_path / "run", **change)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
