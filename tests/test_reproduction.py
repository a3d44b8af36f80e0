"""The reproduction suite: scores against plain loops, prompts, caching, CMA-ES, statistics by hand, runs that are shared."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MINIATURE, arguments, run_cli
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

import train_zoodip as z
from reproduction import evaluate, gf_ti, runs, tables, textual_inversion

PROMPT_FILE = """Classes

subject_name,class
dog6,dog
red_vase,flower vase

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


# ----------------------------------------------------------------------------------------------------- prompts


def test_dreambooth_prompts():
    prompts = evaluate.parse_dreambooth_prompts(PROMPT_FILE)
    assert prompts.of("red_vase") == ("flower vase", ["a {} in the jungle", "a cube shaped {}"])
    assert prompts.of("dog6") == ("dog", ["a {} wearing a red hat"])  # a live subject has its own list
    with pytest.raises(z.InputError, match="'cat9' is not a subject"):
        prompts.of("cat9")


def test_dreambooth_prompts_are_never_executed(tmp_path):
    """The file is Python; what is not a quoted prompt is skipped or refused, not run."""
    trap = f"open({str(tmp_path / 'trap')!r}, 'w').close(),\n"
    evaluate.parse_dreambooth_prompts(PROMPT_FILE.replace("prompt_list = [\n", "prompt_list = [\n" + trap))
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("old, new, message", [
    ("Object Prompts", "Objects", "under 'Object Prompts' there is no list"),
    ("a {0} {1} in", "a {0} in", "under 'Object Prompts' there is no list"),
    ("a {0} {1} wearing", "a {0} {1} {2} wearing", "under 'Live Subject Prompts' there is no list"),
    ("dog6,dog\nred_vase,flower vase", "", "no line subject_name,class"),
])
def test_damaged_dreambooth_prompts_are_refused(old, new, message):
    with pytest.raises(z.InputError, match=message):
        evaluate.parse_dreambooth_prompts(PROMPT_FILE.replace(old, new))


def test_plain_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a {} in the snow\n\n a photo of {} \n")
    assert evaluate.read_prompts(path, "mine", "dog") == ("dog", ["a {} in the snow", "a photo of {}"])
    with pytest.raises(z.InputError, match="--class_word is needed"):
        evaluate.read_prompts(path, "mine", None)
    path.write_text("a dog\n")
    with pytest.raises(z.InputError, match="every line must hold one {}"):
        evaluate.read_prompts(path, "mine", "dog")
    path.write_text(PROMPT_FILE)
    assert evaluate.read_prompts(path, "dog6", None)[0] == "dog"


# ----------------------------------------------------------------------------------------------------- scores


class LineScorer:
    """A scorer whose vectors are known: of a picture its mean colour, of a text from its length."""

    def images(self, images):
        return torch.nn.functional.normalize(torch.tensor(np.array([np.asarray(i, float).mean((0, 1)) for i in images])), dim=-1)

    def texts(self, texts):
        return torch.nn.functional.normalize(torch.tensor([[len(text), 1.0, 2.0] for text in texts]).double(), dim=-1)


def pictures(count: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]


def cosine(a, b) -> float:
    a, b = np.asarray(a, float), np.asarray(b, float)
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def test_scores_are_the_formulas():
    """CLIP-T over (picture, its prompt); CLIP-I, DINO over all (picture, reference); inter over all pairs. 1e-12: fp64."""
    scorer, texts = LineScorer(), ["a dog", "a dog on the beach"]
    drawn, references = [pictures(3, 0), pictures(3, 1)], pictures(4, 2)
    colour = [[np.asarray(image, float).mean((0, 1)) for image in row] for row in drawn]
    refs = [np.asarray(image, float).mean((0, 1)) for image in references]
    scores = evaluate.score_pictures(drawn, references, texts, scorer, scorer)
    text = np.mean([cosine(v, [len(texts[p]), 1, 2]) for p in range(2) for v in colour[p]])
    image = np.mean([cosine(v, r) for row in colour for v in row for r in refs])
    assert scores == pytest.approx({"CLIP-T": text, "CLIP-I": image, "DINO": image}, abs=1e-12)
    inter = evaluate.score_diversity(drawn[0], scorer, None)
    pairs = [cosine(colour[0][i], colour[0][j]) for i in range(3) for j in range(3) if i != j]
    assert inter == pytest.approx({"CLIP_inter": np.mean(pairs)}, abs=1e-12)
    assert math.isnan(evaluate.mean_pairwise_cosine(torch.ones(1, 3)))
    assert evaluate.score_pictures(drawn, references, texts, None, None) == {}


def test_scorers_clip_and_dino(tmp_path, capsys):
    """The miniature's CLIP and a DINOv2 of random weights load from folders; what is no scorer is left out with a line."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    with torch.random.fork_rng():
        Dinov2Model(config).save_pretrained(tmp_path / "dino")
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dino")
    clip, dino = evaluate.load_scorer(MINIATURE.parent / "clip"), evaluate.load_scorer(tmp_path / "dino")
    for vectors in (clip.images(pictures(3, 0)), clip.texts(["a critter", "a dog", "x"]), dino.images(pictures(3, 0))):
        assert vectors.shape[0] == 3 and vectors.norm(dim=-1) == pytest.approx(torch.ones(3))
    assert dino.images(pictures(3, 0)).shape[1] == 32 and clip.images(pictures(1, 0)).shape == clip.texts(["x"]).shape
    assert evaluate.load_scorer(None) is None
    capsys.readouterr()
    assert evaluate.load_scorer(tmp_path / "nothing") is None
    assert "not available, its scores are left out" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def drawer(tiny_model, subject, tmp_path):
    args = z.parse_args(arguments(tiny_model, subject, tmp_path))
    model, folder = evaluate.load_frozen_model(args, torch.device("cpu"))
    return evaluate.Drawer(args, model, folder, steps=2, guidance=5.0, batch_size=2)


def test_pictures_are_drawn_once(drawer, tmp_path):
    theta, drawn = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), []
    draw = drawer.draw
    drawer.draw = lambda theta, wanted: drawn.extend(wanted) or draw(theta, wanted)
    first = drawer.pictures(theta, ["a photo of {}", "{} in the snow"], range(2), tmp_path / "cache")
    assert len(drawn) == 4 and len(list((tmp_path / "cache").iterdir())) == 4
    again = drawer.pictures(theta, ["a photo of {}", "{} in the snow"], range(2), tmp_path / "cache")
    assert len(drawn) == 4
    assert all(np.array_equal(a, b) for row, other in zip(first, again, strict=True) for a, b in zip(row, other, strict=True))
    drawer.pictures(theta, ["a photo of {}"], range(3), tmp_path / "cache")  # interrupted, or more wanted: only what is missing
    assert drawn[4:] == [("a photo of {}", 2)]
    drawer.pictures(theta + 1e-6, ["a photo of {}"], range(1), tmp_path / "cache")  # another token
    drawer.guidance = 7.5
    assert drawn[5:] == [("a photo of {}", 0)]


def test_a_picture_does_not_depend_on_its_batch(drawer):
    """Else a resumed evaluation would differ from an uninterrupted one. 2 of 255: rounding of another batch size."""
    theta = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    both = drawer.draw(theta, [("a photo of {}", 0), ("{} in the snow", 1)])
    alone = [drawer.draw(theta, [wanted])[0] for wanted in (("a photo of {}", 0), ("{} in the snow", 1))]
    for a, b in zip(both, alone, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2


def test_evaluate_command(tiny_model, subject, tmp_path, capsys):
    """Per-subject and mean scores, a sheet, nothing drawn a second time; a line, as the token is of an INT8 model."""
    z.save_embedding(tmp_path / "x.safetensors", argparse.Namespace(placeholder_token="<sks>"), torch.ones(1, 32),
                     {"zoodip.settings": json.dumps({"quantization": "int8"})})
    (tmp_path / "prompts.txt").write_text("a photo of {}\n{} in the snow\n")
    argv = ["--embeddings", str(tmp_path / "x.safetensors"), "--references", str(subject), "--class_word", "dog", "--images", "2",
            "--prompts", str(tmp_path / "prompts.txt"), "--inter_images", "2", "--inference_steps", "2", "--resolution", "16",
            "--output", str(tmp_path / "out"), "--pretrained_model_name_or_path", str(tiny_model), "--cpu"]
    for _ in range(2):
        evaluate.main(evaluate.parse_args(argv), load=lambda name, device: LineScorer())
    assert "was learned with --quantization int8, its pictures are drawn with nf4" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(content["mean"]) == {"CLIP-T", "CLIP-I", "DINO", "CLIP_inter", "DINO_inter"}
    assert (tmp_path / "out" / "scores.csv").read_text().splitlines()[0] == "subject,CLIP-T,CLIP-I,DINO,CLIP_inter,DINO_inter"
    assert len(list((tmp_path / "out" / "dog6").glob("*.png"))) == 2 * 2 + 2
    assert Image.open(tmp_path / "out" / "dog6.png").width > 200


TOKEN = torch.ones(1, 32)


@pytest.mark.parametrize(("content", "words"), [
    (lambda: b"", "does not hold"), (lambda: save({"<sks>": TOKEN})[:-3], "does not hold"),
    (lambda: save({"<other>": TOKEN}), "does not hold"), (lambda: save({"<sks>": TOKEN / 0}), "NaN or Inf"),
    (lambda: save({"<sks>": TOKEN.long()}), "int64"), (lambda: save({"<sks>": TOKEN[None]}), "(1, 1, 32)"),
    (lambda: save({"<sks>": TOKEN[:0]}), "(0, 32)"), (lambda: save({"<sks>": TOKEN}, {"zoodip.settings": "{"}), "does not hold"),
    (lambda: pickle.dumps({"<sks>": TOKEN}), "is a pickle"),
])  # fmt: skip
def test_damaged_embeddings(tmp_path, content, words):
    """An embedding comes from anybody: it is read as numbers, or refused by name."""
    path = tmp_path / "learned_embeds.safetensors"
    path.write_bytes(content())
    with pytest.raises(z.InputError, match=re.escape(words)) as error:
        evaluate.read_token(path, "<sks>")
    assert str(path) in str(error.value)


def test_embeddings_of_others(tmp_path):
    """One vector without its own dimension, in half precision, with any settings: read."""
    path = tmp_path / "learned_embeds.safetensors"
    for metadata in (None, {"zoodip.settings": "[]"}):
        path.write_bytes(save({"<sks>": TOKEN[0].half()}, metadata))
        assert torch.equal(evaluate.read_token(path, "<sks>", "nf4"), TOKEN)


@pytest.mark.parametrize(("flags", "words"), [
    (["--images", "0"], "--images must be at least 1, got 0"), (["--inter_images", "1"], "got 1"),
    (["--guidance", "0.5"], "--guidance must be at least 1"), (["--references", "a", "b"], "2 folders for 1 embeddings"),
    (["--quantization", "int3"], "invalid choice: 'int3'"),
])  # fmt: skip
def test_wrong_flags_of_an_evaluation(capsys, flags, words):
    """Refused in one line, before anything is read."""
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(["--embeddings", "x", "--references", "y", "--prompts", "z", *flags])
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1


def test_an_embedding_of_another_model(tiny_model, subject, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(save({"<sks>": torch.ones(1, 768)}))
    (tmp_path / "prompts.txt").write_text("a photo of {}\n")
    argv = ["--embeddings", str(tmp_path / "x.safetensors"), "--references", str(subject), "--class_word", "dog", "--cpu",
            "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out"), "--resolution", "16",
            "--pretrained_model_name_or_path", str(tiny_model)]  # fmt: skip
    with pytest.raises(z.InputError, match="has 768 numbers, the model's tokens have 32"):
        evaluate.main(evaluate.parse_args(argv), load=lambda name, device: LineScorer())


# ----------------------------------------------------------------------------------------------------- GF-TI


def evolution(**flags) -> argparse.Namespace:
    argv = ["--train_data_dir", "x", "--initializer_token", "x"]
    return gf_ti.parse_args(argv + [part for name, value in flags.items() for part in (f"--{name}", str(value))])


@pytest.mark.parametrize("mode", ["published", "fair"])
def test_cma_es_improves_on_a_known_function(mode):
    """A quadratic bowl in a 5-dimensional subspace of 12 numbers: 60 generations of 20 come within 1 % of its bottom."""
    args = evolution(mode=mode, intrinsic_dim=5, max_train_steps=60, num_eval_samples=3)
    basis = torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))[0].T
    theta0 = torch.ones(2, 6)
    target = theta0 + (torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0]) @ basis).view(2, 6)

    def objective(tokens):
        return (tokens - target).square().flatten(1).sum(1)

    seen, state = [], np.random.get_state()[1].copy()
    run = [gf_ti.evolve(objective, theta0, basis, args, lambda token: objective(token[None]).item(),
                        lambda *told: seen.append(told), show_bar=False) for _ in range(2)]
    (theta, generations, forwards), (again, _, _) = run
    assert generations == 60
    assert objective(theta[None]).item() < 0.01 * objective(theta0[None]).item()
    assert torch.equal(theta, again)  # one seed, one answer
    assert np.array_equal(state, np.random.get_state()[1])  # cma seeds numpy's global generator unless told otherwise
    assert forwards == 60 * 20 + (7 * 3 if mode == "fair" else 0)  # six checks and the start
    assert [told[0] for told in seen[:61]] == list(range(61))


def test_fair_mode_keeps_the_best():
    """Where nothing is better than the start, the start is returned."""
    args = evolution(mode="fair", intrinsic_dim=4, max_train_steps=20, population=4)
    theta0 = torch.zeros(1, 4)
    theta, _, _ = gf_ti.evolve(lambda tokens: -tokens.square().flatten(1).sum(1), theta0, torch.eye(4), args,
                            lambda token: token.square().sum().item(), show_bar=False)
    assert torch.equal(theta, theta0)


def test_basis_spreads_as_wide_as_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(400, 8, generator=generator) * torch.arange(1.0, 9.0)
    random = gf_ti.make_basis(table, evolution(intrinsic_dim=6, sigma=2.0))
    z_ = 2.0 * torch.randn(20000, 6, generator=generator)
    # 25 %: A has only 48 random entries
    assert (z_ @ random).std().item() == pytest.approx(table.std().item(), rel=0.25)
    pca = gf_ti.make_basis(table, evolution(intrinsic_dim=3, subspace="pca", alpha=0.5))
    values, vectors = np.linalg.eigh(np.cov(table.numpy().T))
    for k in range(3):
        expected = 0.5 * math.sqrt(values[-1 - k]) * vectors[:, -1 - k]
        assert abs(cosine(pca[k], expected)) == pytest.approx(1, abs=1e-6)
        assert pca[k].norm().item() == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    with pytest.raises(z.InputError, match="--intrinsic_dim 9 is more than the token's 8"):
        gf_ti.make_basis(table, evolution(intrinsic_dim=9))


@pytest.mark.parametrize("mode", ["published", "fair"])
def test_common_random_numbers(mode):
    """fair: all candidates on one batch. published: each its own noise, at one timestep per generation."""
    seen = []

    def losses(batch, tokens):
        seen.append((batch, len(tokens)))
        return torch.zeros(len(tokens))

    from diffusers import DDPMScheduler

    data = z.Data(torch.rand(3, 2, 2, 4, 2, 2), [[0], [1], [0]], z.Prompts(torch.arange(10).view(2, 5), None), DDPMScheduler())
    objective = gf_ti.noisy_losses(SimpleNamespace(losses=losses), data, evolution(mode=mode))
    assert objective(torch.zeros(4, 1, 8)).shape == (4,)
    assert [count for _, count in seen] == ([4] if mode == "fair" else [1] * 4)
    if mode == "published":
        assert len({batch.timesteps.item() for batch, _ in seen}) == 1
        assert len({batch.target.sum().item() for batch, _ in seen}) == 4
        objective(torch.zeros(4, 1, 8))
        assert seen[4][0].timesteps != seen[0][0].timesteps


@pytest.mark.parametrize("script, flags", [
    (textual_inversion, dict(max_train_steps=6)), (textual_inversion, dict(max_train_steps=6, quantization="none")),
    (gf_ti, dict(max_train_steps=3, population=4, intrinsic_dim=5)),
    (gf_ti, dict(max_train_steps=3, population=4, intrinsic_dim=5, mode="fair", subspace="pca")),
])  # fmt: skip
def test_baseline_scripts_leave_what_train_zoodip_leaves(tiny_model, subject, tmp_path, script, flags):
    argv = arguments(tiny_model, subject, tmp_path, tau=None, nu=None, mu=None, eval_steps=3, **flags)
    script.main(script.parse_args(argv))
    with safe_open(tmp_path / "learned_embeds.safetensors", framework="pt") as file:
        assert file.get_tensor("<sks>").shape == (1, 32)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["n"] is None and record["settings"]["estimator"] not in ("rge", "spsa", "one_point")
    rows = (tmp_path / "training_log.csv").read_text().splitlines()
    assert len(rows) == 2 + flags["max_train_steps"] // 3


@pytest.mark.parametrize("script, flags", [(textual_inversion, {}), (gf_ti, dict(population=4, intrinsic_dim=5)),
                                           (gf_ti, dict(population=4, intrinsic_dim=5, mode="fair"))])  # fmt: skip
def test_an_interrupted_baseline_saves_its_token(tiny_model, subject, tmp_path, capsys, script, flags):
    """Ctrl-C: the step under way is the last, and what is left is what a run of so many steps leaves."""
    out, common = tmp_path / "out", dict(tau=None, nu=None, mu=None, eval_steps=2)

    def press_ctrl_c() -> None:
        limit = time.monotonic() + 60
        while not (out / "training_log.csv").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        script.main(script.parse_args(arguments(tiny_model, subject, out, **common, **flags, max_train_steps=100000)))
    thread.join()
    step = json.loads((out / "run.json").read_text())["step"]
    assert 0 < step < 100000 and f"{step} steps of 100000, as it stood when interrupted" in capsys.readouterr().out
    assert int((out / "training_log.csv").read_text().splitlines()[-1].split(",")[0]) == step
    whole = tmp_path / "whole"
    script.main(script.parse_args(arguments(tiny_model, subject, whole, **common, **flags, max_train_steps=step)))
    tokens = [evaluate.read_token(folder / "learned_embeds.safetensors", "<sks>") for folder in (out, whole)]
    assert torch.equal(*tokens)


def test_baselines_refuse_flags_without_meaning(capsys):
    for parse, flag in ((textual_inversion.parse_args, "--mu"), (gf_ti.parse_args, "--nu")):
        with pytest.raises(SystemExit):
            parse(["--train_data_dir", "x", "--initializer_token", "x", flag, "0.5"])
        assert f"{flag} has no meaning" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evolution(population=1)
    assert "--population must be at least 2, got 1" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- the plan


def settings_of(tmp_path, *flags: str) -> runs.Settings:
    argv = ["--output", str(tmp_path), *flags]
    if "sd15" in flags:
        (tmp_path / "prompts.txt").write_text(PROMPT_FILE.replace("dog6,dog", "\n".join(f"{s},toy" for s in runs.DREAMBOOTH)))
        argv += ["--prompts", str(tmp_path / "prompts.txt")]
    return tables.make_settings(tables.parse_args(argv))


@pytest.mark.parametrize("flags", [(), ("--quick",), ("--dry_steps", "2"), ("--world", "sd15"),
                                   ("--world", "sd15", "--variant", "fp16", "--mixed_precision", "bf16")])  # fmt: skip
def test_every_run_of_every_table_has_valid_arguments(tmp_path, flags):
    """By the very parser of its script; and no two runs of the plan are the same."""
    settings = settings_of(tmp_path, *flags)
    jobs = tables.plan(list(tables.BY_NAME), settings)
    hashes = {runs.digest(job.spec) for job in jobs}
    assert len(hashes) == len(jobs)
    for job in jobs:
        args = runs.spec_args(job.spec, settings)
        assert args.seed == job.spec["seed"] and args.initializer_token == settings.class_word(job.spec["subject"])
        assert json.loads(json.dumps(job.spec)) == job.spec
        assert runs.estimated_seconds(job, settings) > 0
        if "--variant" in flags:
            assert args.variant == "fp16" and args.mixed_precision in ("bf16", "fp32")  # Table 2 has a row of fp32


def test_the_full_miniature_plan(tmp_path):
    """At least 3 subjects x 3 seeds, in at most 12 core hours; tau in proportion to the token; runs shared between tables."""
    settings = settings_of(tmp_path)
    jobs = tables.plan(list(tables.BY_NAME), settings)
    assert sum(runs.estimated_seconds(job, settings) for job in jobs) < 12 * 3600
    for name in ("1", "3", "5", "S4", "S5", "S6"):
        experiment = tables.BY_NAME[name]
        assert len(experiment.subjects(settings)) >= 3 and len(experiment.seeds(settings)) >= 3
    default = {name: {runs.digest(job.spec) for row in tables.BY_NAME[name].rows if row.label == label
                      for job in tables.BY_NAME[name].jobs(row, settings)}
               for name, label in (("1", "ZOODiP"), ("3", "SG and PUTS"), ("5", "PUTS"), ("S4", "RGE"), ("S5", "mu = 1e-3"),
                                   ("S6", "n = 2"), ("S9", "ZOODiP"))}  # fmt: skip
    assert len(set(map(frozenset, default.values()))) == 1
    assert [settings.world.scaled(tau) for tau in tables.TAUS] == [11, 21, 43, 85, 171]


@pytest.mark.parametrize("flags", [(), ("--quick",), ("--quick", "--subjects", "neddom"), ("--dry_steps", "3"),
                                   ("--tables", "3", "S4", "--subjects", "meppor", "--seeds", "4", "5", "--learning_rate", "3e-3",
                                    "--no-use_cc", "--center_crop", "--n", "1", "--max_train_steps", "77")])  # fmt: skip
def test_the_report_names_the_command_that_makes_it(tmp_path, flags):
    """Given again, the command that the report states plans the very same runs; and the report tells their steps."""
    args = tables.parse_args(list(flags))
    jobs = tables.plan(args.tables, tables.make_settings(args))
    text = tables.introduction(args.tables, tables.make_settings(args), jobs, 0)
    command = re.search("`python reproduction/tables.py ([^`]*)`", text)[1].split()
    again = tables.parse_args(command)
    assert [job.spec for job in tables.plan(again.tables, tables.make_settings(again))] == [job.spec for job in jobs]
    steps = {job.spec["flags"]["max_train_steps"] for job in jobs if job.spec["method"] == "zoodip" and "cost" not in job.spec}
    assert f"- {steps.pop():,} steps at learning rate " in text and not steps


def test_settings_that_matter_change_the_hash(tmp_path):
    settings = settings_of(tmp_path)
    base = runs.make_spec(settings, "zoodip", "furmix", 0, {})
    others = [runs.make_spec(settings, "ti", "furmix", 0, {}), runs.make_spec(settings, "zoodip", "meppor", 0, {}),
              runs.make_spec(settings, "zoodip", "furmix", 1, {}), runs.make_spec(settings, "zoodip", "furmix", 0, {"n": 3}),
              runs.make_spec(settings, "zoodip", "furmix", 0, {}, cost=True)]  # fmt: skip
    assert len({runs.digest(spec) for spec in [base, *others]}) == 6
    assert runs.digest(base) == runs.digest(dict(reversed(list(base.items()))))
    assert str(tmp_path) not in json.dumps(base)  # the same on another machine
    for kind in ("scores", "inter"):
        path = runs.scores_path(tmp_path, settings, kind)
        settings.images += 1
        assert (runs.scores_path(tmp_path, settings, kind) == path) is (kind == "inter")


def test_wrong_shards_and_the_suite_s_own_flags_are_refused():
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(SystemExit):
            tables.parse_args(["--shard", wrong])
    with pytest.raises(SystemExit):
        tables.parse_args(["--seed", "3"])  # the suite's own


def test_a_flag_given_at_its_default_still_replaces_the_suite_s_setting(tmp_path):
    """5e-3 and nf4 are train_zoodip.py's defaults; the miniature's suite learns at 1e-2, Stable Diffusion's with int8."""
    args = tables.parse_args(["--learning_rate", "5e-3", "--quantization", "nf4", "--no-use_cc", "--tables", "3"])
    assert args.extra == {"learning_rate": 5e-3, "quantization": "nf4", "use_cc": False}
    settings = settings_of(tmp_path)
    assert runs.make_spec(settings, "zoodip", "furmix", 0, {})["flags"]["learning_rate"] == 1e-2
    settings.extra = args.extra
    flags = runs.make_spec(settings, "zoodip", "furmix", 0, {"quantization": "int8"})["flags"]
    assert (flags["learning_rate"], flags["use_cc"]) == (5e-3, False)
    assert flags["quantization"] == "int8"  # what a row compares comes before
    assert tables.parse_args([]).extra == {}


def test_every_claim_is_of_rows_that_exist():
    for claim in tables.CLAIMS:
        labels = {row.label for row in tables.BY_NAME[claim.experiment].rows}
        assert {claim.a, claim.b} <= labels and set(claim.scores) <= set(tables.CLAIM_COLUMNS)
    for name, quality_row, cost_row in tables.QUALITY_AND_MEMORY.values():
        assert quality_row in {row.label for row in tables.BY_NAME[name].rows}
        assert cost_row in {row.label for row in tables.BY_NAME["2"].rows}


# ----------------------------------------------------------------------------------------------------- statistics


def test_intervals_and_verdicts_by_hand():
    """Differences .03, .01, .02: mean .02, standard deviation .01, t(2) = 4.303, half width 4.303 * .01 / sqrt(3) = .0248."""
    a = {("x", 0): {"CLIP-I": .53}, ("x", 1): {"CLIP-I": .61}, ("y", 0): {"CLIP-I": .42}, ("y", 1): {"CLIP-I": .9}}  # fmt: skip
    b = {("x", 0): {"CLIP-I": .50}, ("y", 0): {"CLIP-I": .40}, ("x", 1): {"CLIP-I": .60}}  # fmt: skip
    differences = tables.paired_differences(a, b, "CLIP-I")
    assert sorted(differences) == pytest.approx([.01, .02, .03])
    mean, half_width = tables.mean_interval(differences)
    assert (mean, half_width) == pytest.approx((.02, 4.303 * .01 / math.sqrt(3)))
    assert tables.verdict(mean, half_width) == "cannot be told"
    assert tables.verdict(.02, .01) == "holds here" and tables.verdict(-.02, .01) == "does not"
    assert tables.verdict(-.02, .01, margin=.04) == "holds here" and tables.verdict(-.06, .01, margin=.04) == "does not"
    assert tables.verdict(-.04, .01, margin=.04) == "cannot be told"
    assert tables.verdict(.02, math.nan) == "cannot be told"  # one run proves nothing


def test_spread_of_a_grid():
    """Effects of cells 0, 1, 2 and of subjects 0, 10: no noise. With noise on one run of six, by hand."""
    def records(*values):
        return {(subject, 0): {"loss": value} for subject, value in zip("xy", values, strict=True)}

    cells = {"a": records(0, 10), "b": records(1, 11), "c": records(2, 12)}
    assert tables.spread_of_cells(cells, "loss") == pytest.approx((1, 0))
    cells["b"] = records(1, 11 + 6)
    # means 5, 9, 7; the 6 leaves 6 * (2/3 * 1/2, 1/3 * 1/2 twice) per subject: squares 2 * (4 + 1 + 1) = 12, of 2 degrees
    assert tables.spread_of_cells(cells, "loss") == pytest.approx((2, math.sqrt(12 / 2 / 2)))
    assert tables.spread_of_cells(cells | {"d": {}}, "loss") is None
    assert tables.spread_of_cells(cells, "CLIP-I") is None
    note = tables.grid_note(tables.BY_NAME["4"], cells)
    assert note.endswith("loss, t in [500, 900) 2.000000 (1.732051).")


def fake_run(settings, spec, **result) -> None:
    folder = settings.folder(spec)
    folder.mkdir(parents=True)
    curve = [dict(step=0, unet_forwards=0, loss=.04), dict(step=10, unet_forwards=result["forwards"], loss=result["loss"])]
    scores = result.pop("scores")
    measured = dict(spec=spec, stored_bytes=3000, seconds=60, steps_per_second=1.0, curve=curve)
    runs.write_json(folder / "result.json", measured | result)
    runs.write_json(runs.scores_path(folder, settings, "scores"), dict(scores=scores))


def test_a_table_and_its_claims_from_files(tmp_path):
    """Four runs a row with known figures: means, the interval of the paired difference, equal forwards, published figures."""
    settings = settings_of(tmp_path, "--subjects", "furmix", "meppor", "--seeds", "0", "1")
    level = {"RGE": .50, "SPSA": .45, "one-point": .52}
    for row in tables.BY_NAME["S4"].rows:
        for k, job in enumerate(tables.BY_NAME["S4"].jobs(row, settings)):
            forwards = 40 if row.label == "SPSA" else 30
            wobble = .002 * k if row.label == "RGE" else 0
            fake_run(settings, job.spec, forwards=forwards, loss=.02, loss_all=.1,
                     scores={"CLIP-T": .3, "CLIP-I": level[row.label] + .1 * k + wobble})  # fmt: skip
    collected = {"S4": tables.collect(tables.BY_NAME["S4"], settings)}
    records = collected["S4"]["SPSA"]
    assert [record["loss_at"] for record in records.values()] == pytest.approx([.025] * 4)  # of 40 forwards the first 30
    assert [record["loss_path"] for record in records.values()] == pytest.approx([(.04 + .025) / 2] * 4)
    finding = tables.judge(tables.CLAIMS[4], settings, collected)
    assert finding.differences["loss_path"][0] == pytest.approx((.04 + .02) / 2 - (.04 + .025) / 2)
    mean, half_width, pairs = finding.differences["CLIP-I"]
    # differences .05 + (0, .002, .004, .006): mean .053, deviation sqrt(5 / 3) * .002, t(3) = 3.182
    assert (mean, pairs) == (pytest.approx(.053), 4)
    assert half_width == pytest.approx(3.182 * math.sqrt(5 / 3) * .002 / 2)
    assert finding.verdicts["CLIP-I"] == "holds here" and finding.published["CLIP-I"] == pytest.approx(.759 - .732)
    assert tables.judge(tables.CLAIMS[5], settings, collected).verdicts["CLIP-I"] == "does not"  # SPSA - one-point = -.07
    line = tables.claims_table([finding]).splitlines()[-1]
    assert "| **holds here** |" in line and "| +.053 ± .004 (published +.027): holds here |" in line
    finding.verdicts["DINO"] = "cannot be told"
    assert finding.in_short() == "holds here"
    finding.verdicts["DINO"] = "does not"
    assert finding.in_short() == "the scores disagree"
    text = tables.table_of(tables.BY_NAME["S4"], collected["S4"])
    assert "| SPSA | 4 | .300 ± .000 (published .277, +.023) |" in text and "DINO" not in text
    assert "| 40 | .02500 ± .00000 |" in text
    assert tables.judge(tables.CLAIMS[0], settings, {}) is None


def test_a_missing_score_is_made_up_for_later(tmp_path):
    """DINO was not to be had, so its scores are missing; once it is, the run is scored again, and not before."""
    settings = settings_of(tmp_path, "--dino", "somewhere/dino")
    job = tables.BY_NAME["5"].jobs(tables.BY_NAME["5"].rows[0], settings)[0]
    fake_run(settings, job.spec, forwards=3, loss=.1, scores={"CLIP-I": .5})
    settings.missing = {"somewhere/dino"}
    assert job.done(settings)
    settings.missing = set()
    assert not job.done(settings)


def test_removed_share_of_controls():
    """A random walk's columns have a spectrum like 1 / k^2, whose tail carries more than 1e-3 up to nearly its end."""
    walk = tables.control_fractions("walk", 43, 1e-3, 256, 5)
    assert len(walk) == 5 and all(share < 0.1 for share in walk)
    noise = tables.control_fractions("adam", 43, 1e-3, 256, 3)
    assert len(noise) == 3 and all(0.3 < share < 1 for share in noise)  # momentum smooths the walk


# ----------------------------------------------------------------------------------------------------- runs


def test_an_interrupted_run_continues(tiny_model, subject, tmp_path):
    """Six steps, then the rest from the checkpoint: the token and its snapshots are those of an uninterrupted run."""
    from accelerate import Accelerator

    learned, stamps = {}, {}
    for name, steps in (("whole", (12, 12)), ("parts", (6, 12))):  # whole: the second time only reads what the first left
        for k, last in enumerate(steps):
            argv = arguments(tiny_model, subject, tmp_path / name, max_train_steps=last, checkpointing_steps=6)
            args = z.parse_args(argv)
            (tmp_path / name).mkdir(exist_ok=True)
            inputs, model, data = runs.load(args, torch.device("cpu"))
            learned[name] = runs.learn_zoodip(args, Accelerator(cpu=True), inputs, model, data)
            stamps[name, k] = (tmp_path / name / "run.json").stat().st_mtime_ns
    whole, parts = learned["whole"].snapshots, learned["parts"].snapshots
    assert [s.step for s in whole] == [s.step for s in parts] == list(range(13)) and whole[-1].forwards == 36
    assert all(torch.equal(a.theta, b.theta) for a, b in zip(whole, parts, strict=True))
    assert (tmp_path / "whole" / "run.json").stat().st_mtime_ns == stamps["whole", 0] == stamps["whole", 1]
    assert stamps["parts", 0] < stamps["parts", 1] and len(learned["parts"].details["removed"]) == 2  # at steps 8 and 12


def test_a_run_is_the_script_s_run(tiny_model, subject, tmp_path):
    """A worker's token is, bit for bit, the one that the command line learns."""
    from accelerate import Accelerator

    assert run_cli(arguments(tiny_model, subject, tmp_path / "script")) == 0
    args = z.parse_args(arguments(tiny_model, subject, tmp_path / "worker"))
    (tmp_path / "worker").mkdir()
    inputs, model, data = runs.load(args, torch.device("cpu"))
    runs.learn_zoodip(args, Accelerator(cpu=True), inputs, model, data)
    tokens = [evaluate.read_token(tmp_path / name / "learned_embeds.safetensors", "<sks>") for name in ("script", "worker")]
    assert torch.equal(*tokens)


def test_a_launcher_s_processes_are_shards(monkeypatch):
    """`accelerate launch` sets these; each process must not think itself part of one distributed run."""
    for name, value in dict(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8, MASTER_ADDR="x", TORCHELASTIC_RUN_ID="y").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    args = tables.parse_args([])
    tables.take_shard_of_launcher(args)
    assert args.shard == (6, 8) and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(os.environ)
    args = tables.parse_args([])
    tables.take_shard_of_launcher(args)
    assert args.shard is None


def test_two_shards_then_the_report(tmp_path):
    """On the miniature, two steps a run: the shards' runs together are the table's, and nothing is done twice."""
    argv = ["--tables", "5", "--dry_steps", "2", "--output", str(tmp_path)]
    for shard in ("1/2", "2/2"):
        tables.main(tables.parse_args([*argv, "--shard", shard]))
        assert not (tmp_path / "RESULTS.md").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*")}
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 3
    tables.main(tables.parse_args(argv))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*")} == done
    text = (tmp_path / "RESULTS.md").read_text()
    assert "3 of 3 runs" in text and "| SNR-based | 1 |" in text and str(tmp_path) not in text
    assert (tmp_path / "plots" / "curves.png").exists()
    records = json.loads((tmp_path / "results.json").read_text())["5"]["PUTS"]
    assert records[0]["forwards"] == 6 and {"CLIP-T", "CLIP-I", "attributes", "loss", "loss_all"} <= set(records[0])
