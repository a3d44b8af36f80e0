"""The miniature's world and training: captions are true, held-out breeds stay unseen, a stopped training resumes exactly."""

from __future__ import annotations

import dataclasses
import re
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from miniature import diffusion, judges, train, vae, world
from miniature.captions import class_caption, describe, said, sample_caption, scorer_caption, vocabulary
from miniature.critters import held_out_breeds
from miniature.diffusion import draw_timesteps
from miniature.drawing import render
from miniature.judges import contrastive_loss
from miniature.rendering import detail_mask, judge_spec, training_spec
from miniature.tokenizer import MAX_LENGTH, build_tokenizer
from miniature.trainer import Draws, Trainer
from miniature.words import ACCESSORY_PHRASES, EARS, EYES, SCENE_PHRASES, TAILS
from miniature.world import ATTRIBUTES, swapped
from zoodip.errors import InputError, run_script

CPU = torch.device("cpu")
HELD_OUT = {breed.critter.main_attributes() for breed in held_out_breeds()}
HELD_OUT_NAMES = {breed.name for breed in held_out_breeds()}


@pytest.fixture(scope="module")
def words() -> frozenset[str]:
    return frozenset(vocabulary())


# ----------------------------------------------------------------------------------------------------- held-out breeds


def test_no_training_picture_shows_a_held_out_breed():
    for index in range(4000):
        spec = training_spec(index)
        assert spec.critter.main_attributes() not in HELD_OUT and spec.breed not in HELD_OUT_NAMES


def test_no_caption_or_token_names_a_held_out_breed(words):
    assert not HELD_OUT_NAMES & words
    rng = np.random.default_rng(0)
    for index in range(2000):
        assert not HELD_OUT_NAMES & set(sample_caption(training_spec(index), rng).split())


def test_the_training_itself_draws_only_those_pictures(tiny_training, monkeypatch):
    """The VAE and UNet are given the pictures of `training_spec` and captions of only these."""
    work, drawn = tiny_training, []
    images = np.load(work / "images.npy")
    for index in range(len(images)):
        assert np.array_equal(images[index], np.asarray(render(training_spec(index), 64)))
    real = diffusion.sample_caption
    monkeypatch.setattr(diffusion, "sample_caption", lambda spec, rng: drawn.append(spec) or real(spec, rng))
    train_diffusion(work, work / "again", restart=True, until=1)
    assert drawn and set(drawn) <= {training_spec(index) for index in range(len(images))}


def test_the_judges_see_held_out_breeds():
    assert any(judge_spec(index).breed in HELD_OUT_NAMES for index in range(500))


# ----------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("caption_of", [sample_caption, scorer_caption])
def test_captions_say_what_is_true(caption_of, words):
    rng = np.random.default_rng(1)
    for index in range(1500):
        spec = training_spec(index)
        caption = caption_of(spec, rng)
        text = f" {caption.replace(',', ' ,')} "
        assert set(text.replace(",", " ").replace("-", " ").split()) <= words, caption
        for noun, values, value in (
            ("ears", EARS, spec.critter.ears),
            ("tail", TAILS, spec.critter.tail),
            ("eyes", EYES, spec.critter.eyes),
        ):
            assert not any(f" {other} {noun} " in text for other in values if other != value), caption
        for phrases, value in ((SCENE_PHRASES, spec.scene), (ACCESSORY_PHRASES, spec.accessory)):
            true = {phrase for phrase in phrases[value] if phrase}
            false = {phrase for other in phrases for phrase in phrases[other] if phrase} - true
            assert not any(f" {phrase} " in text for phrase in false), caption


def test_captions_fit_the_text_encoder_and_word_the_small_attributes(words):
    tokenizer = build_tokenizer(sorted(words))
    rng = np.random.default_rng(2)
    captions = [sample_caption(training_spec(index), rng) for index in range(2000)]
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= MAX_LENGTH
    for noun in ("ears", "tail", "eyes"):
        share = np.mean([noun in caption.replace(",", "").split() for caption in captions])
        assert share > 0.25, f"{noun}: {share}"


def test_a_scorer_caption_words_the_accessory_wherever_one_is_worn():
    rng = np.random.default_rng(3)
    for index in range(500):
        spec = training_spec(index)
        caption = scorer_caption(spec, rng)
        assert any(phrase in caption for phrase in ACCESSORY_PHRASES[spec.accessory]), caption


def test_what_a_caption_says_of_its_picture():
    bred = [spec for spec in map(training_spec, range(300)) if spec.breed and spec.accessory != "nothing"]
    for spec in bred:
        plain = spec.critter.pattern == "plain"
        whole = said(class_caption(spec, describe(spec.critter)), spec)
        assert all(told for name, told in whole.items() if name != "pattern_colour") and whole["pattern_colour"] != plain
        assert said(f"a {spec.breed}", spec) == whole | {"scene": False, "accessory": False}
        assert [name for name, told in said(class_caption(spec), spec).items() if told] == ["scene", "accessory"]
        assert not any(said("", spec).values())


def test_the_word_loss_is_zero_where_nothing_is_said_and_falls_where_states_tell():
    specs = [training_spec(index) for index in range(8)]
    ids = torch.full((8, 32), 9)
    ids[:, :3] = 1  # begin, two words; the rest is end of text
    hidden, heads = torch.randn(8, 32, 16), diffusion.build_word_heads(16)
    assert diffusion.word_loss(heads, hidden, ids, [""] * 8, specs, Draws(1, 0)) == 0
    captions = [f"a critter with {spec.critter.ears} ears" for spec in specs]
    values = torch.tensor([ATTRIBUTES["ears"].index(spec.critter.ears) for spec in specs])
    with torch.no_grad():
        heads["ears"].weight.zero_()[:, :4] = 20 * torch.eye(4)
    guess = diffusion.word_loss(heads, 0 * hidden, ids, captions, specs, Draws(1, 0))
    hidden[:, 3:] = nn.functional.one_hot(values, 16).float()[:, None]  # every state from the end of the text on
    assert diffusion.word_loss(heads, hidden, ids, captions, specs, Draws(1, 0)) < 1e-3 < guess


# ----------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_swapped_changes_one_attribute(name):
    rng = np.random.default_rng(4)
    for index in range(50):
        spec = training_spec(index)
        other = swapped(spec, rng, name)
        before, after = (dataclasses.asdict(x) | dataclasses.asdict(x.critter) for x in (spec, other))
        changed = {key for key in before if before[key] != after[key]} - {"critter", "breed", "body_rgb"}
        assert changed == {name}


@pytest.mark.parametrize("name", ["ears", "eyes", "tail"])
def test_the_detail_mask_covers_what_the_small_words_change(name):
    rng = np.random.default_rng(5)
    inside, everywhere = 0, 0
    for index in range(40):
        spec = training_spec(index)
        pair = [np.asarray(render(x, 64), float) for x in (spec, swapped(spec, rng, name))]
        changed = np.abs(pair[0] - pair[1]).max(-1) > 25
        covered = np.kron(detail_mask(spec), np.ones((4, 4))) > 0
        inside, everywhere = inside + (changed & covered).sum(), everywhere + changed.sum()
    assert inside / everywhere > 0.97


def test_the_example_in_the_world_s_docstring_runs(capsys):
    example = world.__doc__.split("many ways.\n\n")[1]
    exec(textwrap.dedent(example), {})
    assert re.fullmatch("a chubby red critter with .* \\| a critter in the snow wearing a red hat\n", capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------- training


def train_diffusion(work, output, **settings):
    settings = dict(images=40, steps=2, batch=6, peak_lr=5e-4, device=CPU) | settings
    return diffusion.train_diffusion(work, output, **settings)


@pytest.fixture(scope="module")
def tiny_training(tmp_path_factory):
    """The work folder of a VAE and a diffusion model after two steps each."""
    work = tmp_path_factory.mktemp("work")
    assert vae.train_vae(work, images=40, steps=2, device=CPU)
    assert train_diffusion(work, work / "model")
    return work


def test_a_stopped_training_goes_on_to_the_same_weights(tiny_training, tmp_path):
    assert not vae.train_vae(tmp_path, images=40, steps=2, device=CPU, until=1)
    assert vae.train_vae(tmp_path, images=40, steps=2, device=CPU)
    assert not train_diffusion(tmp_path, tmp_path / "model", until=1)
    assert train_diffusion(tmp_path, tmp_path / "model")
    for part in ("vae", "text_encoder", "unet"):
        (whole,), (stopped,) = ((root / "model" / part).glob("*.safetensors") for root in (tiny_training, tmp_path))
        assert whole.read_bytes() == stopped.read_bytes(), part


def test_a_decoder_that_goes_on_keeps_the_latents(tiny_training, tmp_path):
    """Starting from a model's VAE, only the decoder learns: the latents that its UNet was trained on stay."""
    assert vae.train_vae(tmp_path, images=40, steps=2, device=CPU, start=tiny_training / "model")
    before, after = (load_file(root / "vae" / "diffusion_pytorch_model.safetensors") for root in (tiny_training, tmp_path))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


@pytest.mark.slow
def test_judges_that_were_stopped_go_on_to_the_same_weights(tiny_training, tmp_path):
    """On 52 renders and 13 round trips: one batch."""
    work, start = tiny_training, tiny_training / "model"
    for train_judge, more in ((judges.train_classifier, {}), (judges.train_clip, {"start": start})):
        settings = dict(images=52, steps=2, device=CPU, **more)
        assert train_judge(work, tmp_path / "whole", **settings)
        assert not train_judge(work, tmp_path / "stopped", restart=True, until=1, **settings)
        assert train_judge(work, tmp_path / "stopped", **settings)
        whole, stopped = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes(), train_judge.__name__


@pytest.mark.parametrize(
    "change, named",
    [
        ({"steps": 5}, "steps = 2, not 5"),
        ({"peak_lr": 1e-3}, "learning rate = 0.0005, not 0.001"),
        ({"images": 39}, "pictures = 40, not 39"),
        ({"start": "model"}, "start = None, not "),
    ],
    ids=["steps", "rate", "pictures", "start"],
)
def test_a_checkpoint_of_another_training_is_refused(tiny_training, change, named):
    """Even a finished one: it would be returned as what the new settings gave."""
    if "start" in change:
        change = {"start": tiny_training / change["start"]}
    with pytest.raises(InputError, match=re.escape(named)):
        train_diffusion(tiny_training, tiny_training / "other", **change)


def test_a_stage_alone_takes_the_vae_of_the_model_it_starts_from(tiny_training, tmp_path):
    """Without one, it says so before it renders 26,000 pictures."""
    with pytest.raises(InputError, match="vae: is not there; train the VAE first"):
        train_diffusion(tmp_path, tmp_path / "model")
    with pytest.raises(InputError, match="vae: is not there; train the VAE first"):
        judges.judge_pictures(tmp_path, 52, CPU, None)
    assert not list(tmp_path.iterdir())
    train_diffusion(tmp_path, tmp_path / "model", start=tiny_training / "model", until=0)
    (given,), (used,) = ((root / "vae").glob("*.safetensors") for root in (tiny_training / "model", tmp_path / "model-so-far"))
    assert given.read_bytes() == used.read_bytes()
    assert len(judges.judge_pictures(tmp_path, 8, CPU, tiny_training / "model")) == 10


def test_the_scorer_s_words_are_those_of_the_model_just_trained(tmp_path, monkeypatch):
    """With --start too, unless the stage runs alone."""
    begun = {}
    for stage in train.STAGES:
        monkeypatch.setattr(
            train, f"train_{stage}", lambda *args, stage=stage, **given: begun.update({stage: given["start"]}) or 1
        )
    start = train.HERE / "model"
    argv = ["--start", str(start), "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    train.main(train.parse_args(argv))
    assert begun["vae"] == begun["diffusion"] == start and begun["clip"] == tmp_path / "model"
    train.main(train.parse_args([*argv, "--stage", "clip"]))
    assert begun["clip"] == start


@pytest.mark.parametrize("name, fault", [("other", "has no model_index.json"), ("model", "would be overwritten")])
def test_a_start_that_cannot_be_used_is_refused_in_a_line(name, fault, tmp_path, capsys):
    start = tmp_path / name
    start.mkdir()
    if name == "model":
        (start / "model_index.json").write_text("{}")
    argv = ["--start", str(start), "--output", str(tmp_path), "--work", str(tmp_path / "work"), "--images", "8"]
    assert run_script(train.main, train.parse_args(argv)) == 2
    assert capsys.readouterr().err.startswith(f"error: --start {start}: {fault}") and not (tmp_path / "work").exists()


def test_starting_from_a_model_keeps_its_predictions(tiny_training):
    """Attention that the earlier model lacked adds nothing at first."""
    model = tiny_training / "model"
    text_encoder, unet = diffusion.build_text_encoder(build_tokenizer(vocabulary())), diffusion.build_unet()
    diffusion.start_from(model, text_encoder, unet)
    earlier = diffusion.UNet2DConditionModel.from_pretrained(model / "unet")
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 32, 256))
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, earlier(*inputs).sample)


def test_a_checkpoint_killed_between_its_renames_is_found(tmp_path):
    def trainer() -> Trainer:
        torch.manual_seed(0)
        return Trainer("line", 9, {"line": nn.Linear(2, 1)}, steps=3, peak_lr=0.1, work=tmp_path, images=4)

    first = trainer()
    first.run(lambda draws: (first.modules["line"](draws.normal(4, 2)).square().mean(), {}), until=2)
    first.folder.rename(first.folder.with_name(first.folder.name + ".old"))
    second = trainer()
    assert second.resume() and second.step == 2


def test_batches_pass_over_all_pictures_in_turn():
    seen = torch.cat([Draws(1, step).batch(20, 5) for step in range(4)])
    assert sorted(seen.tolist()) == list(range(20))
    assert not torch.equal(Draws(1, 4).batch(20, 5), Draws(1, 0).batch(20, 5))


def test_timesteps_are_mostly_those_that_decide():
    timesteps = draw_timesteps(4000, Draws(1, 0))
    first, last = diffusion.DECIDING
    share = ((timesteps >= first) & (timesteps < last)).float().mean().item()
    expected = 0.5 + 0.5 * (last - first) / 1000
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5  # four standard errors
    assert timesteps.min() >= 0 and timesteps.max() < 1000


def test_a_caption_that_also_fits_is_no_rival():
    """Two pictures with the same caption: neither is penalised for matching the other's."""
    similarity = torch.tensor([[9.0, 9.0, 0.0, 0.0], [9.0, 9.0, 0.0, 0.0]])
    assert contrastive_loss(similarity, ["a", "a", "b", "c"]) < 0.01
    assert contrastive_loss(similarity, ["a", "d", "b", "c"]) > 0.5
