"""The loss of a step (Eq. 1): timesteps, noise, prompts under candidate tokens, against formulas and the stock models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import train_zoodip as z

TOKEN = "<sks>"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scheduler_of(folder, **changes):
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_pretrained(folder / "scheduler", **changes)


def alphas_cumprod() -> np.ndarray:
    """Stable Diffusion's schedule, "scaled_linear", written out."""
    return np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)


class Tiny:
    """The tiny model, frozen in fp32 without quantisation, and prompts over two texts with one or more vectors."""

    def __init__(self, folder, num_vectors: int):
        self.folder, self.num_vectors = folder, num_vectors
        self.unet = z.load_frozen(folder, "unet", None, "none", torch.float32, "cpu")
        self.text_encoder = z.load_frozen(folder, "text_encoder", None, "none", torch.float32, "cpu",
                                          skip=("embeddings.token_embedding.",))
        self.tokenizer = z.load_tokenizer(folder, TOKEN, num_vectors)
        self.texts = ["a photo of {} in the snow", "{} on the grass with a cat"]
        self.prompts = z.build_prompts(self.tokenizer, folder, None, self.texts, TOKEN, num_vectors)
        self.width = self.prompts.rows.shape[1]

    def tokens(self, count: int, seed: int = 7) -> torch.Tensor:
        return 0.5 * torch.randn(count, self.num_vectors, self.width, generator=seeded(seed))

    def batch(self, size: int, seed: int = 3) -> z.Batch:
        generator = seeded(seed)
        latents = torch.rand(size, 2, 4, 8, 8, generator=generator)
        timesteps = torch.randint(500, 900, (size,), generator=generator)
        ids = self.prompts.ids[torch.arange(size) % 2]
        return z.noise_batch(latents, timesteps, ids, scheduler_of(self.folder), generator)

    def losses(self, batch: z.Batch, tokens: torch.Tensor) -> torch.Tensor:
        return z.denoising_losses(self.unet, self.text_encoder, self.prompts.rows, batch, tokens)

    def stock_states(self, text: str, token: torch.Tensor) -> torch.Tensor:
        """[L, d] as a user gets it: the stock encoder, the vectors as new rows of its table, one word per vector."""
        from transformers import CLIPTextModel, CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        names = [TOKEN] + [f"{TOKEN}_{i}" for i in range(1, self.num_vectors)]
        tokenizer.add_tokens(names)
        encoder = CLIPTextModel.from_pretrained(self.folder / "text_encoder")
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[-self.num_vectors :] = token
        ids = tokenizer(text.replace("{}", " ".join(names)), padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(ids).last_hidden_state[0]


@pytest.fixture(scope="module", params=[1, 3], ids=["1-vector", "3-vectors"])
def tiny(request, tiny_model) -> Tiny:
    return Tiny(tiny_model, request.param)


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


@pytest.mark.parametrize(("kind", "t_min", "t_max"), [
    ("puts", 500, 900), ("puts", 0, 1000), ("puts", 700, 707), ("uniform", 500, 900), ("snr", 500, 900)])
def test_timestep_distribution(kind, t_min, t_max):
    """A bound off by one, or any preference among timesteps, shows in the statistic."""
    abar = alphas_cumprod()
    draws = z.sample_timesteps(kind, 200000, seeded(), t_min, t_max, torch.from_numpy(abar).float())
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


def test_timestep_puts_of_one_value():
    """t_max = t_min + 1 is allowed and leaves a single timestep."""
    assert set(z.sample_timesteps("puts", 50, seeded(), 42, 43, None).tolist()) == {42}


# --- noise and target ---


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_batch_equals_the_formulas(tiny_model, prediction_type):
    """z_t = sqrt(abar) z + sqrt(1 - abar) eps; the target is eps, or sqrt(abar) eps - sqrt(1 - abar) z."""
    scheduler = scheduler_of(tiny_model, prediction_type=prediction_type)
    latents, timesteps = torch.rand(3, 2, 4, 8, 8, generator=seeded()), torch.tensor([3, 500, 999])
    batch = z.noise_batch(latents, timesteps, torch.zeros(3, 5), scheduler, seeded(1))
    generator = seeded(1)
    sampled = latents[:, 0] + latents[:, 1] * torch.randn(3, 4, 8, 8, generator=generator)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    abar = torch.from_numpy(alphas_cumprod()).float()[timesteps].view(3, 1, 1, 1)
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * sampled
    # fp32: the product of up to 1000 factors, 1e-7 each at worst
    torch.testing.assert_close(batch.noisy_latents, abar.sqrt() * sampled + (1 - abar).sqrt() * noise, rtol=0, atol=2e-4)
    expected = noise if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(batch.target, expected, rtol=0, atol=2e-4)


def test_draw_batch_covers_everything_and_pairs_captions():
    """Every image, flip and caption is drawn, and an image only ever with its own captions."""
    from types import SimpleNamespace

    latents = torch.zeros(3, 2, 2, 4, 1, 1)
    latents[:, :, 0] = torch.arange(6.0).view(3, 2, 1, 1, 1)  # mean = 2 image + flip, deviation 0
    prompts = z.Prompts(torch.arange(5)[:, None], torch.zeros(5, 2))
    choices = [[0, 1], [2], [3, 4]]
    args = SimpleNamespace(train_batch_size=2, timestep_sampling="puts", t_min=0, t_max=1)
    clean = SimpleNamespace(  # a schedule without noise shows the latents themselves
        alphas_cumprod=torch.ones(1), config=SimpleNamespace(prediction_type="epsilon"), add_noise=lambda x, noise, t: x)
    generator, seen = seeded(), {}
    for _ in range(600):
        batch = z.draw_batch(latents, choices, prompts, clean, args, generator)
        for value, row in zip(batch.noisy_latents[:, 0, 0, 0].tolist(), batch.prompt_ids[:, 0].tolist(), strict=True):
            key = (int(value) // 2, int(value) % 2, row)
            seen[key] = seen.get(key, 0) + 1
    pairs = {(image, flip, row) for image in range(3) for flip in range(2) for row in choices[image]}
    assert set(seen) == pairs
    # 1200 draws: 100 expected for images of two captions, 200 for one; 5 standard deviations of a Poisson count
    for (image, _, _), count in seen.items():
        expected = 100 if len(choices[image]) == 2 else 200
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_the_fixed_set_is_fixed(tiny):
    """Learning curves of different seeds and samplers must be judged on the same examples."""
    latents, scheduler = torch.rand(3, 2, 2, 4, 8, 8, generator=seeded()), scheduler_of(tiny.folder)
    sets = []
    for flags in (["--seed", "0"], ["--seed", "9", "--timestep_sampling", "uniform", "--estimator", "spsa"]):
        args = z.parse_args(["--train_data_dir", "x", "--initializer_token", "dog", "--num_eval_samples", "8", *flags])
        sets.append(z.evaluation_batches(latents, [[0], [1], [0, 1]], tiny.prompts, scheduler, args))
    for first, second in zip(*sets, strict=True):
        for name in ("noisy_latents", "target", "timesteps", "prompt_ids"):
            assert torch.equal(getattr(first, name), getattr(second, name))
    timesteps = sorted(int(batch.timesteps) for batch in sets[0])
    assert timesteps == [525, 575, 625, 675, 725, 775, 825, 875]  # the middles of eight equal parts of [500, 900)


# --- prompts under candidate tokens ---


def test_encode_prompts_equals_the_stock_encoder(tiny):
    """What is trained must be what a pipeline later computes with the token in its table."""
    tokens = tiny.tokens(2)
    states = z.encode_prompts(tiny.text_encoder, tiny.prompts.rows, tiny.prompts.ids, tokens)
    assert states.shape == (4, 77, tiny.width)
    for c in range(2):
        for p, text in enumerate(tiny.texts):
            # the same fp32 sums in another batch shape; states are of size 1
            torch.testing.assert_close(states[2 * c + p], tiny.stock_states(text, tokens[c]), rtol=0, atol=2e-5)


def test_every_vector_is_used_and_differentiable(tiny):
    """The authors' script trains only the first of several vectors."""
    batch, token = tiny.batch(1), tiny.tokens(1).requires_grad_()
    loss = tiny.losses(batch, token)[0]
    (gradient,) = torch.autograd.grad(loss, token)
    assert (gradient.norm(dim=-1) > 1e-7).all()
    for v in range(tiny.num_vectors):
        changed = token.detach().clone()
        changed[0, v] += torch.randn(tiny.width, generator=seeded(v))  # a constant would be lost in the layer norm
        assert abs(tiny.losses(batch, changed)[0] - loss) > 1e-6  # rounding of a loss near 1 is 1e-7


# --- the loss ---


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
    """A chunk boundary must not drop, repeat or reorder a candidate."""
    batch, tokens = tiny.batch(2), tiny.tokens(4)
    model = z.FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows, chunk)
    with torch.no_grad():
        whole = tiny.losses(batch, tokens)
    torch.testing.assert_close(model.losses(batch, tokens), whole, rtol=1e-6, atol=0)  # summation order only
    assert (whole.diff().abs() > 3e-6 * whole.mean()).all()  # so that a wrong order would be seen


def test_candidates_share_every_random_draw(tiny):
    """Common random numbers: equal candidates get equal losses, and evaluating them draws nothing."""
    model = z.FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    losses = model.losses(tiny.batch(2), tiny.tokens(1).repeat(3, 1, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (losses - losses[0]).abs().max() < 1e-6 * losses[0]  # place in the batch: rounding
    other = model.losses(tiny.batch(2, seed=4), tiny.tokens(1))
    assert abs(other[0] - losses[0]) > 1e-3  # while another draw is another loss


def test_every_estimator_sees_the_same_batches(tiny):
    """The batch is drawn before the directions, so that step 1 has the same image and noise for all estimators."""
    latents, scheduler = torch.rand(3, 2, 2, 4, 8, 8, generator=seeded()), scheduler_of(tiny.folder)
    first = []
    for estimator in ("rge", "spsa", "one_point"):
        args = z.parse_args(["--train_data_dir", "x", "--initializer_token", "dog", "--estimator", estimator])
        first.append(z.draw_batch(latents, [[0], [1], [0, 1]], tiny.prompts, scheduler, args, seeded()))
    for other in first[1:]:
        assert torch.equal(first[0].noisy_latents, other.noisy_latents)
        assert torch.equal(first[0].prompt_ids, other.prompt_ids)


@pytest.mark.parametrize("estimator", ["rge", "spsa", "one_point"])
def test_the_estimate_points_along_the_true_gradient(tiny, estimator):
    """The whole chain, model included, against back-propagation."""
    batch, token, mu = tiny.batch(1), tiny.tokens(1).requires_grad_(), 0.05
    (gradient,) = torch.autograd.grad(tiny.losses(batch, token)[0], token)
    n, dim = 800, token.numel()
    directions = torch.randn(z.num_directions(estimator, n), *token.shape[1:], generator=seeded(5))
    candidates = token.detach() + mu * z.candidate_offsets(estimator, directions)
    model = z.FrozenModel(tiny.unet, tiny.text_encoder, tiny.prompts.rows, 100)
    estimate = z.zeroth_order_gradient(estimator, directions, model.losses(batch, candidates), mu, dim)
    cosine = torch.cosine_similarity(estimate.flatten(), gradient.flatten(), dim=0)
    # sqrt(n / (n + 2 d)) = .90 is expected of the noisiest (one_point, d = 96); curvature over mu takes a little
    assert cosine > 0.8


@pytest.mark.parametrize("first_block", ["CrossAttnDownBlock2D", "DownBlock2D"])
@pytest.mark.parametrize("linear_projection", [False, True])
def test_modules_before_the_text(first_block, linear_projection):
    """They must see the same inputs whatever the prompt, and be all that does: another prompt changes what follows."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=2, cross_attention_dim=12, norm_num_groups=8,
            attention_head_dim=4, down_block_types=(first_block, "CrossAttnDownBlock2D"), use_linear_projection=linear_projection,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval().requires_grad_(False)
    before = z.modules_before_text(unet)
    names = {module: name for name, module in unet.named_modules()}
    heavy = [m for m in unet.modules() if type(m).__name__ in ("ResnetBlock2D", "Downsample2D", "Attention")] + [unet.conv_in]
    outputs = {module: [] for module in {*before, *heavy}}
    for module in outputs:
        module.register_forward_hook(lambda module, args, output: outputs[module].append(output))
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([700])
    for seed in (1, 2):
        unet(latents, timesteps, torch.randn(1, 5, 12, generator=seeded(seed)))
    same = {names[module] for module, (a, b) in outputs.items() if torch.equal(a, b)}
    assert same == {names[module] for module in before}


@pytest.mark.parametrize("size", [1, 2])
def test_the_part_before_the_text_is_computed_once(tiny, size):
    """With and without: the same losses up to the order of sums; and the shared layers see one part of the batch only."""
    batch, tokens = tiny.batch(size), tiny.tokens(3)
    shared = tiny.losses(batch, tokens)
    seen = []
    handle = tiny.unet.conv_in.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    tiny.losses(batch, tokens)
    handle.remove()
    assert seen == [size] and not tiny.unet.conv_in._forward_pre_hooks
    separate = torch.cat([tiny.losses(batch, token[None]) for token in tokens])
    torch.testing.assert_close(shared, separate, rtol=2e-6, atol=0)  # fp32 sums over 256 numbers, in another order


def test_every_default_path_agrees_with_plain_fp32(tiny_model):
    """All that is done for speed and memory (packing, slices, channels_last, one forward for all candidates, the shared part,
    split feed-forwards) against the stock UNet holding the dequantised weights, one candidate at a time.

    Tolerance: both compute in fp32 what differs only in the order of sums. A loss is a mean of 256 squares, each of a prediction
    through about 30 layers whose sums have up to 576 terms; relative rounding of 2^-24 sqrt(576 * 30) = 8e-6 is its bound.
    """
    quantised = Tiny(tiny_model, 1)
    quantised.unet = z.load_frozen(tiny_model, "unet", None, "nf4", torch.float32, "cpu")
    z.split_feed_forward(quantised.unet)
    quantised.text_encoder = z.load_frozen(tiny_model, "text_encoder", None, "nf4", torch.float32, "cpu",
                                           skip=("embeddings.token_embedding.",))
    plain = Tiny(tiny_model, 1)
    for ours, theirs in ((quantised.unet, plain.unet), (quantised.text_encoder, plain.text_encoder)):
        for name, layer in ours.named_modules():
            if isinstance(layer, z.QuantizedLayer):
                theirs.get_submodule(name).weight = torch.nn.Parameter(layer.dequantize().contiguous(), requires_grad=False)
    batch, tokens = plain.batch(1), plain.tokens(3)
    ours = quantised.losses(batch, tokens)
    for token, loss in zip(tokens, ours, strict=True):
        states = z.encode_prompts(plain.text_encoder, plain.prompts.rows, batch.prompt_ids, token[None])
        prediction = plain.unet(batch.noisy_latents, batch.timesteps, states).sample
        torch.testing.assert_close(loss, (prediction - batch.target).square().mean(), rtol=8e-6, atol=0)
