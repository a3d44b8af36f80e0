"""Binding: marks, states, maps, losses, and whole pictures against the stock pipeline and central differences."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, run_cli, sample, seeded
from PIL import Image
from safetensors.torch import save_file
from tiny import load, rewrite

from zoodip.attention import (
    attention_maps,
    biased_attention,
    centroid,
    cross_attentions,
    entropy,
    equal_intervals,
    grid,
    location_bias,
    map_layers,
    scaled,
    word_maps,
)  # fmt: skip
from zoodip.binding import build_parser
from zoodip.binding_drawing import Paintings, draw_bound, falling_rate, latents_step, paint, scheduler_maker, states_step
from zoodip.binding_losses import THRESHOLDS, Predictor, binding_losses, contexts, gradient_step, moved, pose_losses
from zoodip.binding_settings import CONTROL, FULL, MERGE, METHODS, PHRASE, PLAIN, PUBLISHED
from zoodip.binding_states import Encoder, bind_prompt, composite, merge_groups, substitute_end_tokens, tokens_of
from zoodip.errors import InputError
from zoodip.files import lock_folder
from zoodip.folder import WEIGHT_NAMES, resolve_model
from zoodip.marks import parse_marks
from zoodip.model import load_pipeline
from zoodip.subject import OBJECT_TEMPLATES

TWO = "a photo of a [<sks>* with a red hat] and an [orange cat*] in the snow"
SIZE = dict(height=16, width=32)
SHORT = dict(steps=3, guidance=5.0)
MODEL = "--pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """The tiny model with cross-attention that matters: a random one hardly looks at its prompt."""
    import shutil

    model = tmp_path_factory.mktemp("binding") / "model"
    shutil.copytree(tiny_model, model)
    strength = {"attn2.to_q": 3, "attn2.to_k": 3, "attn2.to_v": 10}

    def stronger(tensors: dict) -> dict:
        factors = {name: factor for name in tensors for part, factor in strength.items() if part in name}
        return {name: factors.get(name, 1) * tensor for name, tensor in tensors.items()}

    rewrite(model, "unet", stronger)
    return model


def pipeline_of(folder, tmp_path_factory, vectors: int, quantization: str = "none", dtype: torch.dtype = torch.float32):
    pipeline = load_pipeline(str(folder), quantization, dtype)
    path = tmp_path_factory.mktemp("word") / "learned_embeds.safetensors"
    save_file({"<sks>": 0.5 * torch.randn(vectors, 32, generator=seeded())}, path)
    pipeline.load_textual_inversion(str(path))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(folder, tmp_path_factory):
    return pipeline_of(folder, tmp_path_factory, 1)


def bound_of(pipeline, text=TWO, settings=MERGE):
    encode = Encoder(pipeline)
    return bind_prompt(parse_marks(text, ["<sks>"]), encode, settings, encode.mean()), encode


def noise(seed: int = 0, rows: int = 8, columns: int = 16) -> torch.Tensor:
    return torch.randn(1, 4, rows, columns, generator=seeded(seed))


def latents_of(pipeline, settings, text=TWO, **how) -> torch.Tensor:
    (picture,) = draw_bound(pipeline, [text], settings=replace(settings, **SHORT), **SIZE, **how)
    return picture.latents


# ----------------------------------------------------------------------------------------------------------------- marks


def test_what_marks_say():
    marked = parse_marks("A photo of an [orange cat* with spots] and the [<sks> in Red] on grass", ["<sks>"])
    assert marked.prompt == "A photo of an orange cat with spots and the <sks> in Red on grass"
    assert marked.clean == "A photo of a cat and the <sks> on grass"
    said = [(marked.prompt[slice(*g.phrase)], marked.prompt[slice(*g.noun)], g.anchor, g.bare) for g in marked.groups]
    assert said == [("orange cat with spots", "cat", "an orange cat with spots", "a cat"),
                    ("<sks> in Red", "<sks>", "the <sks> in Red", "the <sks>")]  # fmt: skip
    for group in marked.groups:
        assert group.anchor[slice(*group.anchor_phrase)] == marked.prompt[slice(*group.phrase)]
        assert group.bare[slice(*group.bare_noun)] == marked.prompt[slice(*group.noun)]
    assert parse_marks("An [old dog*]").clean == "A dog" and parse_marks("a [red apple*]").clean == "an apple"
    assert parse_marks("no groups at all").groups == ()


def test_a_token_of_several_vectors_is_all_noun():
    marked = parse_marks("a [red <sks>] here", ["<sks>"], lambda text: text.replace("<sks>", "<sks> <sks>_1"))
    assert marked.prompt == "a red <sks> <sks>_1 here" and marked.prompt[slice(*marked.groups[0].noun)] == "<sks> <sks>_1"


@pytest.mark.parametrize(("text", "said"), [
    ("a [red cat* and", "never closed"), ("a red cat] here", "closes nothing"), ("a [red [cat*]]", "nest"),
    ("a [] here", "empty"), ("a [red* cat*]", "2 stars"), ("a [red cat]", "put a star"), ("a [red * cat]", "whole word"),
    ("a red cat* here", "outside brackets"),
    ("a [red cat*s]", "whole word"), ("a [<sks> and <sks>]", "put a star"),
])  # fmt: skip
def test_wrong_marks_are_refused_in_one_line(text, said):
    with pytest.raises(InputError, match=said) as error:
        parse_marks(text, ["<sks>"])
    assert "\n" not in str(error.value)


def test_rows_are_those_of_the_words(pipeline):
    """Against the tokenizer's own pieces: upper case, an added word, and a word split into letters ("zq") in between."""
    encode, text = Encoder(pipeline), "a zq Dog and <sks> in Red"
    encoded = encode(text)
    pieces = ["<bos>", *pipeline.tokenizer.tokenize(text)]
    for word in ("zq", "Dog", "<sks>", "Red"):
        start = text.index(word)
        rows = encoded.rows((start, start + len(word)))
        assert "".join(pieces[row] for row in rows).replace("</w>", "") == word.lower()
    assert encoded.end == len(pieces) and len(encoded.rows((2, 4))) == 2


# ---------------------------------------------------------------------------------------------------------------- states


def test_composite(pipeline):
    states, mean = torch.randn(12, 32, generator=seeded()) + 3, torch.full((32,), 3.0)
    before, groups = states.clone(), [([2], [1, 3]), ([7, 8], [6])]
    assert torch.equal(merge_groups(states, groups[:1], erase=False, noun_weight=1.0, attribute_weight=0.0), states)
    merged = merge_groups(states, groups)
    assert torch.allclose(merged[7], 1.1 * (states[7] + states[8]) + 1.2 * states[6], atol=1e-5)  # the sum in another order
    assert not merged[[1, 3, 6, 8]].any()
    others = [0, 4, 5, 9, 10, 11]
    assert torch.equal(merged[others], states[others]) and torch.equal(states, before)
    assert torch.equal(merge_groups(states, groups[::-1]), merged)
    capped = composite(states, [2], [1, 3], mean=mean, kappa=0.7)
    total = 1.1 * (states[2] - mean) + 1.2 * (states[1] + states[3] - 2 * mean)
    assert math.isclose((capped - mean).norm(), 0.7 * max((states[i] - mean).norm() for i in (1, 2, 3)), rel_tol=1e-5)
    assert torch.cosine_similarity(capped - mean, total, dim=0) > 1 - 1e-5
    assert torch.allclose(composite(states, [2], [1], mean=mean, kappa=1e9), composite(states, [2], [1]) - 1.3 * mean, atol=1e-4)


def test_composites_are_capped_around_the_mean_of_words(pipeline):
    """What the UNet reads in a noun's row: mu + min(1, kappa r / |delta|) delta, with mu over the words of all templates. Around
    zero, states that share a large mean would be scaled as a whole."""

    def states_of(text: str) -> torch.Tensor:  # of its words
        with torch.no_grad():
            return pipeline.text_encoder(pipeline.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0, 1:-1]

    mean = torch.cat([states_of(template.replace("{}", "").strip()) for template in OBJECT_TEMPLATES]).mean(0)
    marked, read = parse_marks(TWO, ["<sks>"]), []
    handle = pipeline.unet.register_forward_pre_hook(
        lambda unet, inputs, named: read.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    draw_bound(pipeline, [TWO], settings=replace(MERGE, steps=1, guidance=1.0), **SIZE)
    handle.remove()
    whole = Encoder(pipeline)(marked.prompt)
    for group in marked.groups:
        noun, words = whole.rows(group.noun), whole.rows(group.phrase)
        apart = {row: whole.states[row] - mean for row in words}
        delta = torch.stack([(1.1 if row in noun else 1.2) * own for row, own in apart.items()]).sum(0)
        share = 1.5 * max(own.norm() for own in apart.values()) / delta.norm()
        assert share < 1 and mean.norm() > 1  # so that neither cap nor mean is idle
        # fp32 sums in another order, of states encoded at another length
        torch.testing.assert_close(read[0][0, noun[0]], mean + share * delta, rtol=0, atol=1e-4)


def test_end_tokens(pipeline):
    marked, encode = parse_marks(TWO, ["<sks>"]), Encoder(pipeline)
    whole, clean = encode(marked.prompt), encode(marked.clean)
    assert torch.equal(substitute_end_tokens(whole.states, whole.states, whole.end), whole.states)
    changed = substitute_end_tokens(whole.states, clean.states, whole.end)
    assert torch.equal(changed[: whole.end], whole.states[: whole.end])
    assert torch.equal(changed[whole.end :], clean.states[whole.end :]) and clean.end < whole.end
    first = whole.rows((marked.groups[0].noun[1], len(marked.prompt)))[0]  # the first row that differs
    # causal attention: later tokens cannot reach it; 1e-5 because the two sum over different lengths
    assert torch.allclose(whole.states[:first], clean.states[:first], atol=1e-5)
    assert not torch.allclose(whole.states[first], clean.states[first], atol=1e-2)


def test_phrase_states(pipeline):
    marked, encode = parse_marks(TWO, ["<sks>"]), Encoder(pipeline)
    bound = bind_prompt(marked, encode, PHRASE, None)
    second, whole = marked.groups[1], encode(marked.prompt)
    rows, anchor = whole.rows(second.phrase), encode("an orange cat")
    assert torch.equal(bound.states[rows], anchor.states[anchor.rows((3, 13))]) and bound.groups[1].words == rows
    only = bind_prompt(marked, encode, replace(PHRASE, states="noun"), None)
    (noun,) = whole.rows(second.noun)
    assert torch.equal(only.states[noun], bound.states[noun]) and bound.groups[1].row == noun and only.groups[1].words == [noun]
    assert not only.states[[row for row in rows if row != noun]].any()
    one = parse_marks("a [red dog*]")
    assert torch.equal(bind_prompt(one, encode, PHRASE, None).states, encode("a red dog").states)  # one phrase: itself


# ------------------------------------------------------------------------------------------------------------------ maps


def test_maps_are_read_without_a_trace(pipeline):
    """The prediction stays bit-identical, hooks are gone even after an exception, and maps are diffusers' own probabilities."""
    unet, states = pipeline.unet, torch.randn(2, 77, 32, generator=seeded())
    layers = list(cross_attentions(unet).values())
    hooks = lambda: sum(len(layer._forward_pre_hooks) for layer in layers)  # noqa: E731
    with torch.no_grad():
        plain = unet(noise().repeat(2, 1, 1, 1), 500, encoder_hidden_states=states).sample
        with attention_maps(layers, 1) as maps:
            assert torch.equal(unet(noise().repeat(2, 1, 1, 1), 500, encoder_hidden_states=states).sample, plain)
        with attention_maps(layers, 1) as alone:
            unet(noise(), 500, encoder_hidden_states=states[1:])
    assert hooks() == 0 and {tuple(each.shape) for each in maps} == {(1, 128, 77), (1, 32, 77)} and len(maps) == len(layers)
    for joint, own in zip(maps, alone, strict=True):  # only the last half is read; 1e-5: other batch sizes round differently
        assert torch.allclose(joint.sum(-1), torch.ones(()), atol=1e-5) and torch.allclose(joint, own, atol=1e-5)
    with pytest.raises(KeyError), attention_maps(layers, 1):
        raise KeyError
    assert hooks() == 0
    seen = {}
    layer = layers[0]
    handle = layer.register_forward_pre_hook(lambda m, a, k: seen.update(x=a[0], c=k["encoder_hidden_states"]), with_kwargs=True)
    with torch.no_grad(), attention_maps([layer], 2) as maps:
        unet(noise().repeat(2, 1, 1, 1), 500, encoder_hidden_states=states)
    handle.remove()
    query, key = layer.head_to_batch_dim(layer.to_q(seen["x"])), layer.head_to_batch_dim(layer.to_k(seen["c"]))
    theirs = layer.get_attention_scores(query, key).unflatten(0, (2, layer.heads)).mean(1)
    assert torch.allclose(maps[0], theirs, atol=1e-6)


def test_the_level_of_the_maps(pipeline):
    with torch.no_grad():
        assert 0 < len(map_layers(pipeline.unet, noise())) < len(cross_attentions(pipeline.unet))  # the finest level, not all
        assert len(map_layers(pipeline.unet, noise(), 32)) == 1
        with pytest.raises(InputError, match=r"choose from \[32, 128\]"):
            map_layers(pipeline.unet, noise(), 64)
    assert grid(128, 16, 32) == (8, 16) and grid(256, 64, 64) == (16, 16)


def test_entropy_and_centroid():
    uniform, one = torch.ones(8, 16), torch.zeros(8, 16)
    one[2, 13] = 1
    # the logarithm's 1e-5 takes at most 128e-5 off a uniform map's entropy
    assert math.isclose(entropy(uniform.flatten()), math.log(128), abs_tol=2e-3) and abs(entropy(one.flatten())) < 2e-5
    assert torch.allclose(centroid(one), torch.tensor([13.5 / 16, 2.5 / 8])) and torch.allclose(
        centroid(uniform), torch.tensor([0.5, 0.5])
    )
    some = torch.rand(8, 16, generator=seeded())
    fine = some.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert math.isclose(entropy(fine.flatten()) - entropy(some.flatten()), math.log(4), abs_tol=6e-3)  # 512e-5 now
    assert math.isclose(entropy(3 * some.flatten() + 7), entropy(some.flatten()), rel_tol=1e-5)
    assert scaled(some.flatten()).min() == 0 and scaled(some.flatten()).max() == 1
    # each map by itself: a flat one has a gradient, of 0, so that a loss of such maps alone moves nothing, and harms no other
    maps = torch.stack([torch.ones(128), some.flatten(), one.flatten(), torch.full((128,), torch.nan)]).requires_grad_()
    assert torch.equal(entropy(maps), torch.stack([entropy(each) for each in maps]))
    slopes = torch.autograd.grad(entropy(maps).sum() + centroid(maps.view(4, 8, 16)).sum(), maps)[0]
    assert not slopes[[0, 3]].any() and slopes[1].any() and slopes.isfinite().all()
    assert torch.equal(centroid(maps.view(4, 8, 16)), torch.stack([centroid(each.view(8, 16)) for each in maps]))


def test_pose_loss():
    """The left group's map belongs at (10, 16), the right one's at (25, 16), in 32nds of the picture: .2 of the mean square."""
    places, sides = [(3, 4), (3, 12), (6, 12), (0, 4)], [0, 1, 0, 1]  # (row, column) of 8 x 16
    maps = torch.zeros(4, 8, 16)
    expected = []
    for own, (row, column), side in zip(maps, places, sides, strict=True):
        own[row, column] = 1
        x, y = 32 * (column + 0.5) / 16, 32 * (row + 0.5) / 8
        expected.append(0.2 * ((x - (25 if side else 10)) ** 2 + (y - 16) ** 2) / 2)
    assert np.allclose(pose_losses(maps, torch.tensor(sides)), expected, rtol=1e-5)  # fp32 of numbers up to 32


def test_maps_of_words():
    """Each prompt's words compete among themselves, whatever its length, and the start and end tokens do not."""
    maps = torch.rand(2, 5, 9, generator=seeded())
    found = word_maps(maps, torch.tensor([3, 1]), torch.tensor([7, 4]))
    for own, whole, column, end in zip(found, maps, (3, 1), (7, 4), strict=True):
        assert torch.allclose(own, (2 * whole[:, 1:end]).softmax(-1)[:, column - 1])


def test_thresholds_are_the_published_ones():
    """The published test on 2 K entropies of 32 x 32 maps, L_ent < K T / 2 - 2, for the two groups that it was made for."""
    published = [26, 25, 24, 23, 22.5, 22, 21.5, 21]
    assert np.allclose([math.log(1024) - (t / 4 - 1 / 2) for t in published], THRESHOLDS, atol=6e-3)  # two decimals


# ------------------------------------------------------------------------------------------------------------------ bias


def test_location_bias():
    bias = location_bias([[2, 3], [5]], equal_intervals(2), 4, 8, 9, 6.0).view(4, 8, 9)
    assert not bias[:, :, [0, 1, 4, 6, 7, 8]].any() and not bias[:, :4, [2, 3]].any() and not bias[:, 4:, 5].any()
    expected = [-6 * min(1, ((i + 0.5) / 8 - 0.5) / 0.25) for i in range(4, 8)]
    assert np.allclose(bias[0, 4:, 2], expected) and torch.equal(bias[0, :, 5], bias[0, :, 2].flip(0))


def test_biased_attention(pipeline):
    """The unconditional half is bit-identical whatever the bias; a bias of zero changes only rounding."""
    unet, states = pipeline.unet, torch.randn(2, 77, 32, generator=seeded())
    inputs = (noise().repeat(2, 1, 1, 1), 500, states)
    before = dict(unet.attn_processors)

    def prediction(strength: float) -> torch.Tensor:
        def bias_of(cells):
            return location_bias([[2], [5]], equal_intervals(2), *grid(cells, 8, 16), 77, strength)[None]

        with biased_attention(unet, bias_of), torch.no_grad():
            return unet(*inputs).sample

    with torch.no_grad():
        plain = unet(*inputs).sample
    none, weak, strong = (prediction(strength) for strength in (0, 3, 6))
    assert torch.allclose(none, plain, atol=1e-5)  # softmax with and without a mask uses different kernels
    assert torch.equal(weak[0], none[0]) and torch.equal(strong[0], none[0])
    assert (strong[1] - none[1]).abs().max() > 1e-3 and unet.attn_processors == before
    with pytest.raises(KeyError), biased_attention(unet, lambda cells: none):
        raise KeyError
    assert unet.attn_processors == before


def test_a_bias_without_end_removes_a_word(pipeline):
    """Against the same attention with that row left out of the states."""
    layer = next(iter(cross_attentions(pipeline.unet).values()))
    hidden, states = torch.randn(1, 10, 16, generator=seeded()), torch.randn(1, 6, 32, generator=seeded(1))
    bias = torch.zeros(1, 10, 6)
    bias[:, :, 4] = -1e4
    with torch.no_grad(), biased_attention(pipeline.unet, lambda cells: bias):
        biased = layer(hidden, encoder_hidden_states=states)
    with torch.no_grad():
        assert torch.allclose(biased, layer(hidden, encoder_hidden_states=states[:, [0, 1, 2, 3, 5]]), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- losses


def test_the_semantic_loss_and_its_contexts(pipeline, folder):
    """It is zero for the anchor's own row in its own frame; keys do not matter at all for a row alone, but do in a frame."""
    bound, encode = bound_of(pipeline)
    group = bound.groups[1]
    row = encode("an orange cat").rows((10, 13))[0]
    own = SimpleNamespace(frame=group.anchor, frame_row=row)
    composite = group.anchor[[row]][None]  # [1 candidate, 1 group, d]
    with torch.no_grad():
        target = Predictor(pipeline.unet)(noise(), 500, group.anchor[None])
        loss = binding_losses(Predictor(pipeline.unet), noise(), 500, contexts(composite, [own], "framed"), target)
        assert loss.shape == (1, 1) and loss.item() == 0
        tripled = load(folder, "unet")
        for layer in cross_attentions(tripled).values():
            layer.to_k.weight.mul_(3)
        row = bound.states[[group.row]][None]
        values = {
            sem: [
                binding_losses(Predictor(unet), noise(), 500, contexts(row, [group], sem), target)
                for unet in (pipeline.unet, tripled)
            ]
            for sem in ("alone", "framed")
        }
    assert torch.equal(*values["alone"]) and not torch.isclose(*values["framed"], rtol=1e-4)
    several = contexts(torch.cat([row, row + 1]).expand(2, 2, 32), bound.groups, "framed")  # candidate by candidate
    assert several.shape == (4, 77, 32)
    for k, (candidate, of) in enumerate([(row, 0), (row, 1), (row + 1, 0), (row + 1, 1)]):
        expected = bound.groups[of].frame.clone()
        expected[bound.groups[of].frame_row] = candidate.flatten()
        assert torch.equal(several[k], expected)


def central_differences(function, point: torch.Tensor, directions: list[torch.Tensor], step: float) -> list[float]:
    with torch.no_grad():
        return [((function(point + step * u) - function(point - step * u)) / (2 * step)).item() for u in directions]


@pytest.mark.parametrize("sem", ["framed", "alone"])
def test_gradient_of_the_semantic_loss(pipeline, sem):
    bound, _ = bound_of(pipeline)
    group, predict = bound.groups[0], Predictor(pipeline.unet)
    with torch.no_grad():
        target = predict(noise(), 500, group.anchor[None])
    losses = lambda rows: binding_losses(predict, noise(), 500, contexts(rows, [group], sem), target)  # noqa: E731
    row, settings = bound.states[group.row], replace(FULL, sem_rule="plain", sem_rate=1.0)
    (after,), value = gradient_step(row[None], losses, [group], predict, settings)
    assert predict.backwards == 1 and value.item() == losses(row[None, None]).item()
    directions = [torch.randn(32, generator=seeded(k)) for k in range(4)]
    estimates = central_differences(lambda point: losses(point[None, None]).double(), row, directions, 1e-2)
    # fp32 losses of about 1e-3 over 2e-2: their rounding, 1e-10, is 1e-8 of slope; the third derivative adds parts in a thousand
    assert np.allclose(estimates, [((row - after) @ u).item() for u in directions], rtol=2e-2, atol=1e-6)
    normalised = moved(row, row - after, replace(FULL, sem_rate=0.05))
    assert math.isclose((row - normalised).norm(), 0.05 * row.norm(), rel_tol=1e-4)


def test_gradient_of_the_maps_loss(pipeline):
    """What `refine_latents` subtracts from the latents, and from the states, against central differences of the same loss."""
    bound, _ = bound_of(pipeline)
    settings = replace(FULL, map_rule="plain", map_rate=2.0, map_iterations=1, update_rows="composite", steps=3)
    make = scheduler_maker(pipeline, None, 3)
    layers = map_layers(pipeline.unet, noise())
    paintings, predict = Paintings([bound], noise(), make), Predictor(pipeline.unet)
    with torch.no_grad():
        (record,) = paintings.refine_latents(0, 500, predict, settings, layers, make())

    def loss(latents, states):
        with attention_maps(layers, 1) as maps:
            pipeline.unet(latents, 500, encoder_hidden_states=states[None])
        shares = (2 * torch.stack(maps).mean(0)[0, :, 1 : bound.end]).softmax(-1)
        words = torch.stack([shares[:, group.row - 1] for group in bound.groups])
        return 2 * entropy(words).sum() + pose_losses(words.view(-1, 8, 16), torch.tensor([0, 1])).sum()

    assert math.isclose(record["maps"][0]["loss"], loss(noise(), bound.states).item(), rel_tol=1e-5)
    directions = [torch.randn(1, 4, 8, 16, generator=seeded(k)) for k in range(3)]
    estimates = central_differences(lambda point: loss(point, bound.states), noise(), directions, 1e-3)
    slopes = [((noise() - paintings.latents) * u).sum().item() for u in directions]  # 0.5 times rate 2 is 1
    # the loss, about 20, rounds at 1e-6: 1e-3 of slope; minima and maxima that change places bend it
    assert np.allclose(estimates, slopes, rtol=5e-2, atol=5e-3) and max(map(abs, slopes)) > 0.02
    rows = [group.row for group in bound.groups]
    changed = (paintings.states[0] != bound.states).any(1).nonzero().flatten().tolist()
    assert changed == sorted(rows)  # the composites and nothing else
    along = [torch.zeros_like(bound.states) for _ in rows]
    for u, row in zip(along, rows, strict=True):
        u[row] = torch.randn(32, generator=seeded(row))
    estimates = central_differences(lambda point: loss(noise(), point), bound.states, along, 1e-3)
    assert np.allclose(
        estimates, [((bound.states - paintings.states[0]) * u).sum().item() / 2 for u in along], rtol=5e-2, atol=5e-3
    )


def test_the_published_rate_falls_to_zero():
    """s_i = 3 (1 - i / 49) in the published 50 steps."""
    assert np.allclose([falling_rate(i, PUBLISHED) for i in (0, 7, 49)], [3, 3 * (1 - 7 / 49), 0])
    assert np.allclose([falling_rate(i, replace(PUBLISHED, steps=5, map_rate=2.0)) for i in range(5)], [2, 1.5, 1, 0.5, 0])
    assert falling_rate(0, replace(PUBLISHED, steps=1)) == 3


def test_steps_of_the_maps_losses():
    """unit: each picture's latents move by a given rms, each row of its states by a share of its length. plain: as published,
    rate times the gradient, and half of that for the latents."""
    shapes = (2, 4, 8, 16), (2, 7, 32), (2, 7, 32)
    to_latents, to_states, states = (torch.randn(shape, generator=seeded(k)) for k, shape in enumerate(shapes))
    to_latents[1] *= 1e-3  # as a picture with flat maps has it
    settings = replace(FULL, map_rate=0.07, sem_rate=0.05)
    for own, gradient in zip(latents_step(to_latents, 3, settings), to_latents, strict=True):
        # fp32 of a mean of 512 squares
        torch.testing.assert_close(own, 0.07 * gradient / math.sqrt(gradient.square().sum() / 512), rtol=1e-5, atol=1e-7)
    moves = states_step(3 * states, to_states, 3, settings)
    for move, row, gradient in zip(*(each.flatten(0, 1) for each in (moves, 3 * states, to_states)), strict=True):
        torch.testing.assert_close(move, 0.05 * row.norm() * gradient / gradient.norm(), rtol=1e-5, atol=1e-7)
    plain = replace(PUBLISHED, steps=11, map_rate=2.0)  # at step 3 of 0 .. 10 the rate is 1.4
    torch.testing.assert_close(latents_step(to_latents, 3, plain), 0.7 * to_latents)
    torch.testing.assert_close(states_step(3 * states, to_states, 3, plain), 1.4 * to_states)


@pytest.mark.parametrize(("anchor_guidance", "sign"), [("toward", 1), ("away", -1)])
def test_anchors_are_guided(pipeline, anchor_guidance, sign):
    """Each phrase alone goes its own way by null + g (anchor - null); the published code has null + g (null - anchor)."""
    bound, encode = bound_of(pipeline)
    make = scheduler_maker(pipeline, None, 3)
    paintings, timestep = Paintings([bound], noise(), make), make().timesteps[0]
    settings = replace(FULL, guidance=5.0, sem_iterations=0, anchor_guidance=anchor_guidance)
    with torch.no_grad():
        paintings.improve_composites(timestep, encode("").states, Predictor(pipeline.unet), settings, gradient_step)
        for own, text in zip(paintings.anchors, ("a <sks> with a red hat", "an orange cat"), strict=True):
            null, anchor = (
                pipeline.unet(noise(), timestep, encoder_hidden_states=encode(words).states[None]).sample for words in ("", text)
            )
            expected = make().step(null + sign * 5 * (anchor - null), timestep, noise()).prev_sample
            other = make().step(null - sign * 5 * (anchor - null), timestep, noise()).prev_sample
            # two samples in a batch round differently, and guidance of 5 amplifies that
            torch.testing.assert_close(own.latents, expected, rtol=0, atol=1e-4)
            assert (expected - other).abs().max() > 1e-2


@pytest.mark.parametrize("step_from", ["refined", "old"])
def test_which_latents_the_scheduler_steps_from(pipeline, step_from):
    """The noise is predicted for refined latents; the published code then steps from those before the refinement."""
    bound, _ = bound_of(pipeline)
    settings = replace(CONTROL, steps=1, guidance=1.0, map_steps=1, map_iterations=1, step_from=step_from)
    make = scheduler_maker(pipeline, None, 1)
    predict, (timestep,) = Predictor(pipeline.unet), make().timesteps
    refined, painted = (Paintings([bound], noise(), make) for _ in range(2))
    with torch.no_grad():
        refined.refine_latents(0, timestep, predict, settings, map_layers(pipeline.unet, noise()), make())
        prediction = predict(refined.latents, timestep, refined.states)
        paint(painted, bound.clean, predict, settings, make(), None, gradient_step)  # without guidance no prompt but its own
    start = refined.latents if step_from == "refined" else noise()
    assert (refined.latents - noise()).abs().max() > 0.1
    assert torch.equal(painted.latents, make().step(prediction, timestep, start).prev_sample)


# -------------------------------------------------------------------------------------------------------------- pictures


def stock_latents(pipeline, prompt: str, seed: int = 0, negative: str | None = None) -> torch.Tensor:
    scheduler, pipeline.scheduler = pipeline.scheduler, scheduler_maker(pipeline, None, 3)()
    try:
        return pipeline(
            prompt, num_inference_steps=3, guidance_scale=5.0, output_type="latent", generator=seeded(seed),
            negative_prompt=negative, **SIZE,
        ).images[0]  # fmt: skip
    finally:
        pipeline.scheduler = scheduler


def test_without_changes_a_picture_is_the_stock_pipelines(pipeline):
    stock = stock_latents(pipeline, parse_marks(TWO, ["<sks>"]).prompt)
    nothing = dict(merge="none", ets_step=-1, sem_iterations=0, map_iterations=0, sem_steps=0)
    for settings in (
        PLAIN,
        replace(FULL, **nothing),
        replace(CONTROL, map_iterations=0),
        replace(PHRASE, states="prompt", bias=0.0),
    ):
        assert torch.equal(latents_of(pipeline, settings), stock)
    still = replace(FULL, merge="none", ets_step=-1, sem_steps=0, map_rate=0.0)  # maps read, and a step of length 0
    assert torch.equal(latents_of(pipeline, still), stock)


def test_the_methods_constants():
    """The published ones (for objects with accessories), and those that this project's trials on the miniature chose."""
    published = dict(
        steps=50, guidance=7.5, states="prompt", bias=0.0, merge="raw", noun_weight=1.1, attribute_weight=1.2, erase="zero",
        ets_step=0, sem_steps=7, sem_iterations=3, sem="alone", sem_rule="plain", sem_rate=1e4, anchor_guidance="away",
        map_steps=7, map_iterations=6, map_rule="plain", map_rate=3.0, map_cells=0, update_rows="all", pose="auto",
        threshold_on="loss", step_from="old", kappa=1.5,
    )  # fmt: skip
    assert asdict(PUBLISHED) == published
    ours = dict(
        merge="capped", sem_steps=5, sem="framed", sem_rule="normalised", sem_rate=0.05, anchor_guidance="toward", map_steps=5,
        map_iterations=4, map_rule="unit", map_rate=0.1, update_rows="none", threshold_on="entropy", step_from="refined",
    )  # fmt: skip
    assert asdict(FULL) == published | ours
    assert (PHRASE.states, PHRASE.bias, PHRASE.merge, PHRASE.ets_step) == ("phrase", 6.0, "none", -1)
    assert replace(MERGE, sem_steps=5, map_steps=5, pose="auto") == FULL  # ETS from step 0, without losses
    assert replace(CONTROL, map_steps=0, pose="off") == PLAIN and (CONTROL.map_steps, CONTROL.pose) == (5, "auto")


def test_the_negative_prompt_is_the_stock_pipelines(folder, tmp_path_factory):
    """A learned word of several vectors is written out there, too."""
    pipeline, text = pipeline_of(folder, tmp_path_factory, 3), parse_marks(TWO, ["<sks>"]).prompt
    ours = latents_of(pipeline, PLAIN, negative_prompt="a red <sks>")
    assert torch.equal(ours, stock_latents(pipeline, text, negative="a red <sks>"))


def test_half_precision(folder, tmp_path_factory, pipeline):
    """Nearly the picture in fp32, with every method whose steps have a fixed length: the published ones, 1e4 times a gradient,
    throw each rounding far."""
    half = pipeline_of(folder, tmp_path_factory, 1, dtype=torch.float16)
    for name, settings in METHODS.items():
        ours, exact = latents_of(half, settings), latents_of(pipeline, settings)
        assert ours.dtype == torch.float16 and torch.isfinite(ours).all()
        # fp16 rounds at 5e-4, and guidance of 5 and three steps amplify that: .003 to .008 of the length was seen
        assert name == "published" or (ours.float() - exact).norm() < 0.03 * exact.norm(), name


def test_small_gradients_in_half_precision():
    """At 512 pixels the losses' slopes are so small that their squares are 0 in fp16; a step still has its length."""
    latents = torch.zeros(2, 4, 8, 16, dtype=torch.float16, requires_grad=True)
    slopes = 1e-6 * torch.randn(2, 4, 8, 16, generator=seeded())
    (gradient,) = Predictor(None).gradients((slopes * latents.float()).sum(), [latents])
    for step, slope in zip(latents_step(gradient, 0, FULL), slopes, strict=True):
        # the gradient passes fp16 scaled by 1024, in which the smallest slopes have few digits
        torch.testing.assert_close(step, 0.1 * slope / slope.square().mean().sqrt(), rtol=0, atol=1e-3, check_dtype=False)


def test_every_method_changes_the_picture_and_leaves_the_pipeline(pipeline):
    processors = dict(pipeline.unet.attn_processors)
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    required = [parameter.requires_grad for module in modules for parameter in module.parameters()]
    pictures = {}
    for name, settings in METHODS.items():
        (pictures[name],) = draw_bound(pipeline, [TWO], settings=replace(settings, **SHORT), **SIZE)
        assert torch.isfinite(pictures[name].latents).all() and pictures[name].image.size == (32, 16)
    for name in METHODS.keys() - {"plain"}:
        assert not torch.allclose(pictures[name].latents, pictures["plain"].latents, atol=1e-3), name
    assert pictures["plain"].forwards == pictures["phrase"].forwards == pictures["merge"].forwards == 6
    assert {name for name, picture in pictures.items() if picture.backwards} == {"full", "control", "published"}
    parameters = [parameter for module in modules for parameter in module.parameters()]
    assert all(parameter.grad is None for parameter in parameters) and [p.requires_grad for p in parameters] == required
    assert pipeline.unet.attn_processors == processors


def test_counts_of_forwards(pipeline):
    """Full: the guided pair; per group the anchor's pair and its iterations; the maps' iterations; one to find the layers."""
    settings = replace(FULL, sem_steps=2, sem_iterations=3, map_steps=1, map_iterations=4, map_rate=0.0, **SHORT)
    (picture,) = draw_bound(pipeline, [TWO], settings=settings, **SIZE)
    refined = len(picture.steps[0]["maps"])
    assert picture.forwards == 3 * 2 + 2 * 2 * (2 + 3) + refined and picture.backwards == 2 * 2 * 3 + refined
    assert [record["step"] for record in picture.steps] == [0, 1] and "maps" not in picture.steps[1]
    assert [len(values) for values in picture.steps[1]["semantic"]] == [3, 3]


def test_the_anchors_do_not_touch_the_picture(pipeline):
    """With steps of length 0 their trajectories run alongside, and the picture is bit-identical to that of merging alone."""
    still = replace(FULL, sem_rate=0.0, map_steps=0)
    assert torch.equal(latents_of(pipeline, still), latents_of(pipeline, MERGE))


@pytest.mark.parametrize("change", [dict(step_from="old"), dict(anchor_guidance="away"), dict(update_rows="all"),
                                    dict(sem="alone"), dict(merge="raw"), dict(map_rule="plain"), dict(pose="off"),
                                    dict(ets_step=1),
                                    dict(states="phrase"), dict(erase="none"), dict(erase="mask")],
                         ids=lambda change: "".join(change))  # fmt: skip
def test_every_switch_changes_the_picture(pipeline, change):
    assert not torch.equal(latents_of(pipeline, replace(FULL, **change)), latents_of(pipeline, FULL))


def shape_of(steps: list[dict]) -> list:
    """Which updates there were in each step, without their values."""
    return [
        (
            record["step"],
            [len(values) for values in record.get("semantic", [])],
            [len(m["entropy"]) for m in record.get("maps", [])],
        )
        for record in steps
    ]


def test_alone_or_in_a_batch(folder, tmp_path_factory):
    """Prompts of one to three groups; in fp64, because other batch sizes round differently and guidance amplifies that."""
    pipeline = pipeline_of(folder, tmp_path_factory, 1, dtype=torch.float64)
    prompts = [TWO, "a [red dog*]", "a [red dog*] and a [white cat*] and a [blue bird*]"]
    for settings in (PHRASE, FULL, replace(FULL, sem_steps=2, update_rows="composite")):
        how = dict(settings=replace(settings, **SHORT), seeds=[0, 1], **SIZE)
        together, alone = draw_bound(pipeline, prompts, batch_size=6, **how), draw_bound(pipeline, prompts, **how)
        for one, other in zip(together, alone, strict=True):
            assert (one.prompt, one.seed, shape_of(one.steps)) == (other.prompt, other.seed, shape_of(other.steps))
            torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=1e-11)  # of size 17; 4e-14 was seen


def test_a_picture_with_narrow_maps_stops_while_others_go_on(pipeline, monkeypatch):
    settings = replace(CONTROL, map_steps=2, map_iterations=6, map_rate=0.01, pose="off", **SHORT)
    how = dict(settings=settings, seeds=[0, 1, 2], **SIZE)
    first = [np.mean(picture.steps[0]["maps"][0]["entropy"]) for picture in draw_bound(pipeline, [TWO], **how)]
    between = float(np.mean(sorted(first)[:2]))  # the narrowest maps' entropy is below it, the others' above
    monkeypatch.setattr("zoodip.binding_drawing.THRESHOLDS", (math.log(128) - between,))
    together, alone = draw_bound(pipeline, [TWO], batch_size=3, **how), draw_bound(pipeline, [TWO], **how)
    assert len({len(picture.steps[0]["maps"]) for picture in together}) > 1
    for one, other in zip(together, alone, strict=True):
        assert shape_of(one.steps) == shape_of(other.steps) and torch.allclose(one.latents, other.latents, atol=2e-3)


def test_seeds_of_each_prompt(pipeline):
    """Each prompt's own list gives the pictures that each prompt has by itself."""
    prompts, how = [TWO, "a [red dog*] and a [white cat*]"], dict(settings=replace(PHRASE, **SHORT), **SIZE)
    together = draw_bound(pipeline, prompts, seeds=[[3], [4, 5]], **how)
    alone = draw_bound(pipeline, prompts[:1], seeds=[3], **how) + draw_bound(pipeline, prompts[1:], seeds=[4, 5], **how)
    assert [(each.prompt, each.seed) for each in together] == [(each.prompt, each.seed) for each in alone]
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("quantization", sample(["none", "nf4"], "nf4"))
@pytest.mark.parametrize("vectors", sample([1, 3], 3))
@pytest.mark.parametrize("text", ["a [red <sks>]", "a [dog*], a [red <sks>] and a [white cat*]"])
def test_quantised_several_vectors_and_numbers_of_groups(folder, tmp_path_factory, quantization, vectors, text):
    pipeline = pipeline_of(folder, tmp_path_factory, vectors, quantization)
    for name in ("phrase", "full", "published"):
        assert torch.isfinite(latents_of(pipeline, METHODS[name], text)).all()


def test_multistep_schedulers(pipeline):
    """Each trajectory has its own scheduler, so one with a history works as in the stock pipeline."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    still = replace(FULL, sem_rate=0.0, map_steps=0)
    assert torch.equal(latents_of(pipeline, still, scheduler=scheduler), latents_of(pipeline, MERGE, scheduler=scheduler))


# --------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("text", "how", "said"), [
    ("a [dog*]", dict(settings=replace(FULL, pose="on")), "has 1 groups"), ("a dog", dict(method="phrase"), "no group"),
    (TWO, dict(width=18), "multiple of 4"), (TWO, dict(intervals=[(0, 1)]), "2 groups for 1"),
    ("a [dog*]" + " dog" * 80, {}, "tokens long"), (TWO, dict(settings=replace(PLAIN, steps=0)), "at least 1"),
    (TWO, dict(settings=replace(PLAIN, map_steps=1, update_rows="composite")), "needs --merge"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(pipeline, text, how, said):
    with pytest.raises(InputError, match=said):
        draw_bound(pipeline, [text], **{**SIZE, **how})


def test_end_is_counted_not_searched():
    """Padding may have the end token's id or, as in Stable Diffusion 2.x, another."""
    for padding in (49407, 0):
        mask, spans = [1, 1, 1, 1] + [0] * 6, [(0, 0), (0, 1), (2, 5), (0, 0)] + [(0, 0)] * 6
        found = SimpleNamespace(input_ids=[49406, 320, 2, 49407] + [padding] * 6, attention_mask=mask, offset_mapping=spans)

        class Tokenizer:
            model_max_length = 10

            def __call__(self, *args, found=found, **how):
                return found

        assert tokens_of(Tokenizer(), "a dog")[1] == [(0, 0), (0, 1), (2, 5)]


def command(*argv) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "zoodip.binding", *map(str, argv)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip


def test_the_command(folder, tmp_path):
    embedding, output = tmp_path / "learned_embeds.safetensors", tmp_path / "out"
    save_file({"<sks>": 0.5 * torch.randn(2, 32, generator=seeded())}, embedding)
    done = command(MODEL, folder, "--embedding", embedding, "--prompt", TWO, "a [dog*]", "--seeds", 0, 1, "--steps", 2,
                   "--width", 32, "--height", 16, "--output", output, "--sheet", tmp_path / "row.png",
                   "--parse", "spacy")  # fmt: skip
    assert done.returncode == 0, done.stderr  # marked prompts are not parsed, so spaCy is not needed
    assert "has no effect" not in done.stderr  # those lines are of training's flags
    record = json.loads((output / "binding.json").read_text())
    assert record["settings"]["phrase"]["states"] == "phrase" and record["settings"]["phrase"]["steps"] == 2
    assert [each["file"] for each in record["pictures"]] == [f"{k}-phrase-{seed}.png" for k in (0, 1) for seed in (0, 1)]
    for each in record["pictures"]:
        assert Image.open(output / each["file"]).size == (32, 16) and each["forwards"] == 4 and each["seconds"] > 0
    assert Image.open(tmp_path / "row.png").size[0] > 2 * 256  # two pictures twice as wide as high
    assert done.stdout == f"{tmp_path / 'row.png'}: 4 pictures, each of which is a file in {output}\n"


def test_pictures_are_written_as_they_are_drawn(folder, tmp_path, monkeypatch):
    """Ctrl-C loses only what is being drawn, and another command overwrites nothing."""
    from zoodip import binding

    def draw(pipeline, marked, **how):
        if marked == ["a [cat*]"]:
            raise KeyboardInterrupt
        return draw_bound(pipeline, marked, **how)

    argv = [MODEL, str(folder), "--prompt", "a [dog*]", "a [cat*]", "--steps", "1", "--width", "16", "--height", "16",
            "--seeds", "0", "1", "--output", str(tmp_path)]  # fmt: skip
    flags = vars(binding.parse(binding.build_parser(), binding.check_flags, argv))
    monkeypatch.setattr(binding, "draw_bound", draw)
    with pytest.raises(KeyboardInterrupt):
        binding.main(dict(flags))
    pictures = {"0-phrase-0.png", "0-phrase-1.png"}
    assert {path.name for path in tmp_path.iterdir()} == pictures | {".lock"}
    first = (tmp_path / "0-phrase-0.png").read_bytes()
    (tmp_path / "mine.png").touch()
    binding.main({**flags, "prompt": ["a [bird*]"]})
    left = {".lock", "previous-1", "mine.png", "sheet.png", "binding.json"}
    assert {path.name for path in tmp_path.iterdir()} == pictures | left
    assert {path.name for path in (tmp_path / "previous-1").iterdir()} == pictures
    assert (tmp_path / "previous-1" / "0-phrase-0.png").read_bytes() == first


def test_a_command_that_is_still_drawing_keeps_its_folder(draw, tmp_path, capsys):
    """Its pictures were moved aside while it drew."""
    (tmp_path / "out").mkdir()
    lock = lock_folder(tmp_path / "out")
    assert draw("--prompt", "a [dog*]") == 2
    assert "--output" in (error := capsys.readouterr().err) and "is in use by another run" in error
    lock.release()


def test_pictures_are_not_drawn_into_the_model(draw, folder, capsys):
    """Its lock would make the model look like a run's folder, which may be moved aside."""
    before = sorted(folder.rglob("*"))
    assert draw("--prompt", "a [dog*]", "--output", folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output ") and "is a model's own folder" in error and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_packed_folder_needs_no_flag(folder, tmp_path):
    """Weights that --save_quantized packed are used as they are; the record says how that was."""
    packed = tmp_path / "packed"
    assert run_cli(["--pretrained_model_name_or_path", str(folder), "--save_quantized", str(packed), "--cpu"]) == 0
    done = command(MODEL, packed, "--prompt", "a [dog*]", "--steps", 1, "--width", 16, "--height", 16, "--output", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o" / "binding.json").read_text())["arguments"]["quantization"] == "nf4"


@pytest.fixture
def draw(folder, tmp_path, monkeypatch):
    """Runs the command in this process, one small picture in one step unless the flags say otherwise -> its exit code."""
    from zoodip.arguments import parse
    from zoodip.binding import check_flags, main
    from zoodip.errors import run_script

    monkeypatch.setitem(sys.modules, "spacy", None)  # as if it were not installed
    defaults = {MODEL: folder, "--output": tmp_path / "out", "--steps": 1, "--width": 16, "--height": 16}

    def run(*argv) -> int | str | None:
        given = [str(each) for name, value in defaults.items() if name not in argv for each in (name, value)]
        try:
            return run_script(main, vars(parse(build_parser(), check_flags, [*given, *map(str, argv)])))
        except SystemExit as error:
            return error.code

    return run


@pytest.fixture
def word(tmp_path):
    """Writes an embedding file -> its path."""

    def write(name: str, key: str = "<sks>", vectors: int = 1, width: int = 32, seed: int = 0):
        path = tmp_path / name / "learned_embeds.safetensors"
        path.parent.mkdir()
        save_file({key: 0.5 * torch.randn(vectors, width, generator=seeded(seed))}, path)
        return path

    return write


def picture_of(folder) -> bytes:
    return Image.open(folder / "0-phrase-0.png").tobytes()


@pytest.mark.parametrize(("argv", "said"), [
    (["a [red cat"], "never closed"), ([TWO, "--steps", "0"], "--steps must be at least 1"),
    ([TWO, "--width", "18"], "--width must be a positive multiple of 4"),
    (["a [dog*]", "--embedding", "nowhere.safetensors"], "nowhere.safetensors"),
    (["a cat and a dog", "--parse", "spacy"], 'pip install -e ".[parse]"'),
    (["a [dog*]", "--embedding", "a", "b"], "its word <sks> is also that of"),
    (["a [dog*]", "--embedding", "wide"], "its vectors have 16 numbers, but this model's words have 32"),
    (["a [dog*]", "--embedding", "known"], "'dog' is already a word of this tokenizer"),
    (["a [dog*]", "--embedding", "three", "first"], "'<sks>_1' is already a word of this tokenizer"),
    (["a [dog*]", "--embedding", "copy"], "does not name its word; give the run's learned_embeds.safetensors"),
    (["a [dog*]", "--embedding", "a=<Tom>"], "'<Tom>' cannot stand in a prompt"),
    (["a [dog*]", "--embedding", "star"], "'<*>' cannot stand in a prompt"),
    (["a [<tom>*] in the snow", "--embedding", "a"], "no embedding holds <tom> (loaded: <sks>)"),
    (["a [dog*]", "--clean_prompt", "a <tom>"], "no embedding holds <tom> (loaded: none)"),
    (["a [dog*]", "--negative_prompt", "a <tom>"], "no embedding holds <tom>"),
    (["a [dog*]", "--negative_prompt", "<sks>" + " <sks>" * 30, "--embedding", "three"], "is 93 tokens long"),
    (["a [dog*]", "--sheet", "row.webp"], "--sheet must end in .png, .jpg or .jpeg, got 'row.webp'"),
    (["a [dog*]", MODEL, "no/model/here"], "--pretrained_model_name_or_path: there is no folder or file"),
    (["a [dog*]", "--variant", "fp16"], "set or drop --variant"),
    (["a [dog*] and a {}"], "{} stands for nothing here"), (["a [dog*]", "--negative_prompt", "a {}"], "{} stands for nothing"),
    (["a [dog*]", "--seeds", "0", "0"], "--seeds must differ from each other, got [0, 0]"),
    (["a [dog*]", "--embedding", "."], "it is a folder"),
    (["a [dog*]", "--sheet", "README.png"], "README.png' exists; choose another name"),
], ids=lambda each: each if isinstance(each, str) else "")  # fmt: skip
def test_the_command_refuses_in_one_line(draw, word, tmp_path, argv, said, capsys, monkeypatch):
    """Before a model is loaded, and before an earlier command's pictures are set aside."""
    monkeypatch.setattr("zoodip.model.load_pipeline", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0-phrase-0.png").touch()
    (tmp_path / "README.png").touch()
    monkeypatch.chdir(tmp_path)
    files = dict(a=word("a"), b=word("b"), wide=word("wide", width=16), known=word("known", "dog"), star=word("star", "<*>"),
                 three=word("three", vectors=3), first=word("first", "<sks>_1"), copy=word("copy", "emb_params"))  # fmt: skip
    named = ["=".join([str(files.get(name, name)), *more]) for name, *more in (each.split("=") for each in argv)]
    if "--embedding" not in argv and TWO in argv:
        named += ["--embedding", str(files["a"])]
    assert draw("--prompt", *named) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and said in captured.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0-phrase-0.png"}


def test_words_of_several_files(draw, word, tmp_path, capsys):
    """Two files with one word: the second is called otherwise and draws what it draws by itself. A path may contain =."""
    first, second = word("a"), word("run=2", vectors=2, seed=1)
    assert draw("--prompt", "a [<sks>*] and a [cat*]", "--embedding", second, "--output", tmp_path / "alone") == 0
    assert "no prompt contains" not in capsys.readouterr().err
    assert draw("--prompt", "a [<tom>*] and a [cat*]", "--embedding", first, f"{second}=<tom>") == 0
    assert picture_of(tmp_path / "out") == picture_of(tmp_path / "alone")
    assert f"--embedding {first}: no prompt contains its word <sks>" in capsys.readouterr().err
    assert draw("--prompt", "a [<sks>*] and a [<tom>*]", "--embedding", first, f"{second}=<tom>") == 0
    assert picture_of(tmp_path / "out") != picture_of(tmp_path / "alone") and "no prompt contains" not in capsys.readouterr().err
    copy = word("copy", "emb_params", vectors=2, seed=1)  # for other programs: it does not name its word
    assert draw("--prompt", "a [<tom>*] and a [cat*]", "--embedding", f"{copy}=<tom>") == 0
    assert picture_of(tmp_path / "out") == picture_of(tmp_path / "alone")


def test_a_word_that_no_embedding_holds_is_refused_in_python_too(pipeline):
    for how in ({}, dict(clean_prompts=["a <tom>"]), dict(negative_prompt="a <tom>")):
        text = "a [dog*]" if how else "a [<tom>*]"
        with pytest.raises(InputError, match=r"no embedding holds <tom> \(loaded: <sks>\)"):
            draw_bound(pipeline, [text], **SIZE, **how)


def half_precision(folder, tmp_path, keep: tuple[str, ...] = ()):
    """A copy of the model whose weights, except those of `keep`, are only in *.fp16.safetensors."""
    import shutil

    copy = shutil.copytree(folder, tmp_path / "half")
    for component, stem in WEIGHT_NAMES.items():
        move = shutil.copy if component in keep else shutil.move
        move(copy / component / f"{stem}.safetensors", copy / component / f"{stem}.fp16.safetensors")
    return copy


def test_a_folder_with_half_precision_files_only(folder, subject, draw, tmp_path):
    """They are taken without --variant, by the command, in Python and by training, which records it."""
    half = half_precision(folder, tmp_path)
    assert draw("--prompt", "a [dog*]", MODEL, half) == 0 and draw("--prompt", "a [dog*]", "--output", tmp_path / "whole") == 0
    assert picture_of(tmp_path / "out") == picture_of(tmp_path / "whole")  # the same weights under other names
    assert load_pipeline(str(half), "none").unet is not None
    assert run_cli(arguments(half, subject, tmp_path / "run", max_train_steps=1)) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["variant"] == "fp16"


@pytest.mark.parametrize(("keep", "variant"), [(tuple(WEIGHT_NAMES), None), (("unet", "vae"), "fp16"), ((), "fp16")])
def test_which_files_of_a_folder_are_read(folder, tmp_path, keep, variant):
    """Those without a variant, unless a component lacks them."""
    assert resolve_model(str(half_precision(folder, tmp_path, keep)))[1] == variant


def test_files_of_no_variant(copy):
    """A folder that is complete in neither is refused as before."""
    unet = copy / "unet" / f"{WEIGHT_NAMES['unet']}.safetensors"
    unet.rename(unet.with_suffix(".fp16.safetensors"))
    with pytest.raises(InputError, match="set or drop --variant"):
        resolve_model(str(copy))


def test_precision_of_the_command(folder, draw, tmp_path, monkeypatch):
    """fp32 on a CPU unless the flag says otherwise; fp16 on a GPU, as in training."""
    pictures = {}
    for given in ((), ("--mixed_precision", "bf16")):
        assert draw("--prompt", "a [dog*]", "--width", 32, *given) == 0
        record = json.loads((tmp_path / "out" / "binding.json").read_text())
        pictures[record["arguments"]["mixed_precision"]] = picture_of(tmp_path / "out")
    assert set(pictures) == {"fp32", "bf16"} and pictures["fp32"] != pictures["bf16"]
    asked = []

    def load(name, quantization, dtype, device, **more):
        asked.append((dtype, torch.device(device).type))
        raise InputError("no further")

    monkeypatch.setattr("zoodip.model.load_pipeline", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for given in ((), ("--mixed_precision", "fp32"), ("--cpu",)):
        assert draw("--prompt", "a [dog*]", *given) == 2
    assert asked == [(torch.float16, "cuda"), (torch.float32, "cuda"), (torch.float32, "cpu")]


def test_the_command_moves_only_its_own_files(draw, tmp_path):
    output, mine = tmp_path / "out", {"2024-05-12.png", "0-mine-1.png", "10-phrase-1.png.txt", "x0-phrase-1.png"}
    ours = {"10-phrase-123.png", "0-published-0.png", "sheet.png", "binding.json"}
    output.mkdir()
    for name in mine | ours:
        (output / name).touch()
    assert draw("--prompt", "a [dog*]") == 0
    left = {path.name for path in output.iterdir()}
    assert left == mine | {".lock", "previous-1", "0-phrase-0.png", "sheet.png", "binding.json"}
    assert {path.name for path in (output / "previous-1").iterdir()} == ours


@pytest.mark.parametrize(("name", "kind"), [("row.jpeg", "JPEG"), ("row.JPG", "JPEG"), ("row.PNG", "PNG")])
def test_the_sheet_is_what_its_name_says(draw, tmp_path, name, kind):
    assert draw("--prompt", "a [dog*]", "--sheet", tmp_path / "sheets" / name) == 0
    with Image.open(tmp_path / "sheets" / name) as sheet:
        assert sheet.format == kind


def test_steps_without_backpropagation(pipeline):
    """F1 is the gradient's projection onto its directions; F2's estimates average to the gradient."""
    from reproduction.binding_steps import coefficient_gradient, coefficient_step, estimated_step

    bound, _ = bound_of(pipeline)
    group, predict = bound.groups[0], Predictor(pipeline.unet)
    with torch.no_grad():
        target = predict(noise(), 500, group.anchor[None])
    losses = lambda rows: binding_losses(predict, noise(), 500, contexts(rows, [group], "framed"), target)  # noqa: E731
    row, plain = bound.states[[group.row]], replace(FULL, sem_rule="plain", sem_rate=1.0)
    gradient = (row - gradient_step(row, losses, [group], predict, plain)[0])[0]
    directions = torch.linalg.qr(torch.randn(32, 4, generator=seeded())).Q.T
    with torch.no_grad():
        padded = torch.cat([directions, torch.zeros(2, 32)])[:, None]  # another row may have more directions
        projected, mean = coefficient_gradient(row, losses, padded, mu=1e-2)
        assert torch.allclose(mean, coefficient_gradient(row, losses, directions[:, None], mu=1e-2)[1], rtol=1e-5)
        assert torch.allclose(projected[0], directions.T @ (directions @ gradient), rtol=5e-2, atol=1e-6)  # as for gradient_step
        estimates = []
        for k in range(20):
            after, value = estimated_step(row, losses, [group], predict, plain, n=32, mu=1e-2, generator=seeded(k))
            estimates.append((row - after)[0])
        assert value.item() == pytest.approx(losses(row[None]).item(), rel=1e-4)
        # of 640 directions in 32 dimensions: an expected error of sqrt(33 / 640) = 23 % of the length, a cosine of .97
        assert torch.cosine_similarity(torch.stack(estimates).mean(0), gradient, dim=0) > 0.9
        predict.forwards = 0
        coefficient_step(row, losses, [group], predict, FULL)
        states = torch.cat([group.within, group.anchor[group.anchor_row][None]])
        rank = int(torch.linalg.matrix_rank(states - row, rtol=1e-3))
        assert predict.forwards == 2 * rank and rank <= len(states) and predict.backwards == 1
