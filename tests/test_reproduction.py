"""The reproduction suite: scores against plain loops, prompts, caching, statistics by hand, runs that are shared and resumed."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import signal
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MINIATURE, arguments, run_cli, seeded
from PIL import Image
from safetensors.torch import load_file, save

import train_zoodip
from reproduction import evaluate, judging, plots, prompts, rates, report, runs, scores, stats, tables, workers, worlds
from reproduction.experiments import (
    BY_NAME,
    CLAIM_COLUMNS,
    CLAIMS,
    COLUMNS,
    EXPERIMENTS,
    GRID_FACTORS,
    QUALITY_AND_MEMORY,
    SYSTEMS,
    TAUS,
)
from trainers import gauss_newton
from zoodip.errors import InputError
from zoodip.model import load_unet
from zoodip.prompts import read_embedding, save_embedding
from zoodip.tuned_files import load_tuned_pipeline

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
    read = prompts.parse_dreambooth_prompts(PROMPT_FILE)
    assert read.of("red_vase") == ("flower vase", ["a {} in the jungle", "a cube shaped {}"])
    assert read.of("dog6") == ("dog", ["a {} wearing a red hat"])  # a live subject has its own list
    with pytest.raises(InputError, match="'cat9' is not a subject"):
        read.of("cat9")


def test_dreambooth_prompts_are_never_executed(tmp_path):
    """The file is Python; what is not a quoted prompt is skipped or refused, not run."""
    trap = f"open({str(tmp_path / 'trap')!r}, 'w').close(),\n"
    prompts.parse_dreambooth_prompts(PROMPT_FILE.replace("prompt_list = [\n", "prompt_list = [\n" + trap))
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("Object Prompts", "Objects", "under 'Object Prompts' there is no list"),
        ("a {0} {1} in", "a {0} in", "under 'Object Prompts' there is no list"),
        ("a {0} {1} wearing", "a {0} {1} {2} wearing", "under 'Live Subject Prompts' there is no list"),
        ("dog6,dog\nred_vase,flower vase", "", "no line subject_name,class"),
    ],
)
def test_damaged_dreambooth_prompts_are_refused(old, new, message):
    with pytest.raises(InputError, match=message):
        prompts.parse_dreambooth_prompts(PROMPT_FILE.replace(old, new))


def test_plain_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a {} in the snow\n\n a photo of {} \n")
    assert prompts.read_prompts(path, "mine", "dog") == ("dog", ["a {} in the snow", "a photo of {}"])
    with pytest.raises(InputError, match="--class_word is needed"):
        prompts.read_prompts(path, "mine", None)
    path.write_text("a dog\n")
    with pytest.raises(InputError, match="every line must hold one {}"):
        prompts.read_prompts(path, "mine", "dog")
    path.write_text(PROMPT_FILE)
    assert prompts.read_prompts(path, "dog6", None)[0] == "dog"


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
    measured = scores.score_pictures(drawn, references, texts, scorer, scorer)
    text = np.mean([cosine(v, [len(texts[p]), 1, 2]) for p in range(2) for v in colour[p]])
    image = np.mean([cosine(v, r) for row in colour for v in row for r in refs])
    assert measured == pytest.approx({"CLIP-T": text, "CLIP-I": image, "DINO": image}, abs=1e-12)
    inter = scores.score_diversity(drawn[0], scorer, None)
    pairs = [cosine(colour[0][i], colour[0][j]) for i in range(3) for j in range(3) if i != j]
    assert inter == pytest.approx({"CLIP_inter": np.mean(pairs)}, abs=1e-12)
    assert math.isnan(scores.mean_pairwise_cosine(torch.ones(1, 3)))
    assert scores.score_pictures(drawn, references, texts, None, None) == {}


def test_scorers_clip_and_dino(tmp_path, capsys):
    """The miniature's CLIP and a DINOv2 of random weights load from folders; what is no scorer is left out with a line."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    with torch.random.fork_rng():
        Dinov2Model(config).save_pretrained(tmp_path / "dino")
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dino")
    clip, dino = scores.load_scorer(str(MINIATURE.parent / "clip")), scores.load_scorer(str(tmp_path / "dino"))
    for vectors in (clip.images(pictures(3, 0)), clip.texts(["a critter", "a dog", "x"]), dino.images(pictures(3, 0))):
        assert vectors.shape[0] == 3 and vectors.norm(dim=-1) == pytest.approx(torch.ones(3))
    assert dino.images(pictures(3, 0)).shape[1] == 32 and clip.images(pictures(1, 0)).shape == clip.texts(["x"]).shape
    assert scores.load_scorer(None) is None
    capsys.readouterr()
    assert scores.load_scorer(str(tmp_path / "nothing")) is None
    assert "not available, its scores are left out" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def cache(tiny_model, subject, tmp_path):
    flags = train_zoodip.parse_args(arguments(tiny_model, subject, tmp_path))
    drawer = evaluate.load_drawer(flags, torch.device("cpu"), steps=2, guidance=5.0, batch_size=2)
    return scores.PictureCache(drawer, tmp_path / "cache", scores.Token(THETA, "<sks>", None), ["nf4", "fp32"])


THETA = torch.randn(1, 32, generator=seeded(0))


def test_pictures_are_drawn_once(cache):
    drawn, draw = [], cache.drawer.draw_states
    cache.drawer.draw_states = lambda states, wanted: drawn.extend(wanted) or draw(states, wanted)
    first = cache.pictures(["a photo of {}", "{} in the snow"], range(2))
    assert len(drawn) == 4 and len(list(cache.cache.iterdir())) == 4
    again = cache.pictures(["a photo of {}", "{} in the snow"], range(2))
    assert len(drawn) == 4
    assert all(np.array_equal(a, b) for row, other in zip(first, again, strict=True) for a, b in zip(row, other, strict=True))
    cache.pictures(["a photo of {}"], range(3))  # interrupted, or more wanted: only what is missing
    assert drawn[4:] == [(0, 2)]
    cache.learned = replace(cache.learned, theta=THETA + 1e-6)  # another token
    cache.pictures(["a photo of {}"], range(1))
    assert drawn[5:] == [(0, 0)]
    cache.drawer.guidance = 7.5
    cache.pictures(["a photo of {}"], range(1))
    assert drawn[6:] == [(0, 0)]


def test_a_picture_does_not_depend_on_its_batch(cache):
    """Else a resumed evaluation would differ from an uninterrupted one. 2 of 255: rounding of another batch size."""
    alone = scores.PictureCache(cache.drawer, cache.cache, cache.learned, ["alone"])
    texts = ["a photo of {}", "{} in the snow"]
    both = cache.pictures(texts, range(2))
    for k, prompt in enumerate(texts):
        for seed in range(2):
            path = alone.path(prompt, seed)
            (picture,) = alone.pictures([prompt], range(seed, seed + 1))[0]
            assert path.exists()
            assert np.abs(np.asarray(both[k][seed], int) - np.asarray(picture, int)).max() <= 2


def test_evaluate_command(tiny_model, subject, tmp_path, capsys):
    """Per-subject and mean scores, a sheet, nothing drawn a second time; a line, as the token is of an INT8 model."""
    settings = dict(placeholder_token="<sks>", initializer_token="dog", resolution=16, quantization="int8",
                    pretrained_model_name_or_path="tiny")  # fmt: skip
    save_embedding(tmp_path, torch.ones(1, 32), settings, "epsilon", 3, final=True)
    (tmp_path / "learned_embeds.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / "prompts.txt").write_text("a photo of {}\n{} in the snow\n")
    argv = [
        "--embeddings",
        str(tmp_path / "x.safetensors"),
        "--references",
        str(subject),
        "--class_word",
        "dog",
        "--images",
        "2",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--inter_images",
        "2",
        "--inference_steps",
        "2",
        "--resolution",
        "16",
        "--output",
        str(tmp_path / "out"),
        "--pretrained_model_name_or_path",
        str(tiny_model),
        "--cpu",
    ]
    for _ in range(2):
        evaluate.main(evaluate.parse_args(argv), load=lambda name, device: LineScorer())
    assert "was learned with --quantization int8, its pictures are drawn with nf4" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(content["mean"]) == {"CLIP-T", "CLIP-I", "DINO", "CLIP_inter", "DINO_inter"}
    assert (tmp_path / "out" / "scores.csv").read_text().splitlines()[0] == "subject,CLIP-T,CLIP-I,DINO,CLIP_inter,DINO_inter"
    assert len(list((tmp_path / "out" / "dog6").glob("*.png"))) == 2 * 2 + 2
    assert Image.open(tmp_path / "out" / "dog6.png").width > 200


@pytest.mark.parametrize("method", ["qlora", "dreambooth"])
def test_evaluate_command_of_tuned_weights(tiny_model, subject, tmp_path, method):
    """Of a run's file or folder alone: with its own words, on weights as they were in training."""
    tuning = dict(class_word="dog", initializer_token=None, tau=None, nu=None, mu=None, max_train_steps=1, eval_steps=0)
    assert run_cli(arguments(tiny_model, subject, tmp_path / "run", identifier="zwx", **tuning), runs.METHODS[method]) == 0
    (tmp_path / "prompts.txt").write_text("a photo of {}\n")
    tuned = tmp_path / "run" if method == "dreambooth" else tmp_path / "run" / "pytorch_lora_weights.safetensors"
    argv = ["--tuned", str(tuned), "--references", str(subject), "--class_word", "dog", "--images", "1", "--inference_steps", "2",
            "--prompts", str(tmp_path / "prompts.txt"), "--resolution", "16", "--output", str(tmp_path / "out"), "--cpu",
            "--pretrained_model_name_or_path", str(tiny_model)]  # fmt: skip
    evaluate.main(evaluate.parse_args(argv), load=lambda name, device: LineScorer())
    assert set(json.loads((tmp_path / "out" / "scores.json").read_text())["mean"]) == {"CLIP-T", "CLIP-I", "DINO"}
    (picture,) = (tmp_path / "out" / "dog6").glob("*.png")
    pipeline = load_tuned_pipeline(str(tiny_model), tuned)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    expected = pipeline("a photo of zwx dog", num_inference_steps=2, height=16, width=16, generator=noise).images[0]
    assert np.abs(np.asarray(Image.open(picture), int) - np.asarray(expected, int)).max() <= 2  # rounding of another batch
    argv[1] = str(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match="holds no tuned weights"):
        evaluate.main(evaluate.parse_args(argv), load=lambda name, device: LineScorer())


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
    with pytest.raises(InputError, match=re.escape(words)) as error:
        read_embedding(path, "<sks>")
    assert str(path) in str(error.value)


def test_embeddings_of_others(tmp_path):
    """One vector without its own dimension, in half precision, with any settings: read."""
    path = tmp_path / "learned_embeds.safetensors"
    for metadata in (None, {"zoodip.settings": "[]"}):
        path.write_bytes(save({"<sks>": TOKEN[0].half()}, metadata))
        theta, settings = read_embedding(path, "<sks>")
        assert torch.equal(theta.float(), TOKEN) and settings == {}


@pytest.mark.parametrize(("flags", "words"), [
    (["--images", "0"], "--images must be at least 1, got 0"), (["--inter_images", "1"], "got 1"),
    (["--guidance", "0.5"], "--guidance must be at least 1"), (["--references", "a", "b"], "2 folders for 1 embeddings"),
    (["--quantization", "int3"], "invalid choice: 'int3'"), (["--tuned", "z"], "--embeddings or --tuned is required, one of"),
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
    with pytest.raises(InputError, match="has 768 numbers, the model's tokens have 32"):
        evaluate.main(evaluate.parse_args(argv), load=lambda name, device: LineScorer())


# ----------------------------------------------------------------------------------------------------- the plan


def settings_of(tmp_path, *flags: str) -> runs.Settings:
    argv = ["--output", str(tmp_path), *flags]
    if "sd15" in flags:
        (tmp_path / "prompts.txt").write_text(PROMPT_FILE.replace("dog6,dog", "\n".join(f"{s},toy" for s in worlds.DREAMBOOTH)))
        argv += ["--prompts", str(tmp_path / "prompts.txt")]
    return tables.make_settings(tables.parse_args(argv))


def plan_of(settings: runs.Settings, *names: str) -> list[runs.Job]:
    return runs.plan([BY_NAME[name] for name in names or report.default_names(settings)], settings)


@pytest.mark.parametrize("flags", [(), ("--quick",), ("--dry_steps", "2"), ("--world", "sd15"),
                                   ("--world", "sd15", "--dry_steps", "2"),
                                   ("--world", "sd15", "--variant", "fp16", "--mixed_precision", "bf16")])  # fmt: skip
def test_every_run_of_every_table_has_valid_arguments(tmp_path, flags):
    """By the very parser of its script; and no two runs of the plan are the same."""
    settings = settings_of(tmp_path, *flags)
    jobs = plan_of(settings)
    hashes = {runs.digest(job.spec) for job in jobs}
    assert len(hashes) == len(jobs)
    assert len({job.spec["subject"] for job in jobs}) == (
        1 if "--dry_steps" in flags else len(set(worlds.DREAMBOOTH)) if "sd15" in flags else 2 if "--quick" in flags else 4
    )
    for job in jobs:
        args = runs.spec_args(job.spec, settings)
        subject = job.spec["subject"]
        words = settings.world.description(subject) if job.spec["method"] == "described" else settings.world.class_word(subject)
        word = args.class_word if runs.tunes_weights(job.spec["method"]) else args.initializer_token
        assert args.seed == job.spec["seed"] and word == words
        assert json.loads(json.dumps(job.spec)) == job.spec
        assert runs.estimated_seconds(job, settings) > 0
        if "--variant" in flags:
            assert args.variant == "fp16" and args.mixed_precision in ("bf16", "fp32")  # Table 2 has a row of fp32


def test_the_full_miniature_plan(tmp_path):
    """At least 3 subjects x 3 seeds, in at most 12 core hours; tau in proportion to the token; runs shared between tables."""
    settings = settings_of(tmp_path)
    specs = [job.spec for job in plan_of(settings) if runs.tunes_weights(job.spec["method"]) and "cost" not in job.spec]
    steps = {spec["method"]: spec["flags"]["max_train_steps"] for spec in specs}
    assert steps == {"dreambooth": 400, "qlora": 500, "tuneqdm": 400, "diffusekrona": 500}  # as published
    assert sum(runs.estimated_seconds(job, settings) for job in plan_of(settings)) < 12 * 3600
    for name in ("1", "3", "5", "S4", "S5", "S6"):
        assert len(runs.subjects_of(BY_NAME[name], settings)) >= 3 and len(runs.seeds_of(BY_NAME[name], settings)) >= 3
    default = {name: {runs.digest(job.spec) for row in BY_NAME[name].rows if row.label == label
                      for job in runs.jobs_of(BY_NAME[name], row, settings)}
               for name, label in (("1", "ZOODiP"), ("3", "SG and PUTS"), ("5", "PUTS"), ("S4", "RGE"), ("S5", "mu = 1e-3"),
                                   ("S6", "n = 2"), ("S9", "ZOODiP"), ("Gap", "ZOODiP"))}  # fmt: skip
    assert len(set(map(frozenset, default.values()))) == 1
    assert [settings.world.scaled(tau) for tau in TAUS] == [11, 21, 43, 85, 171]


@pytest.mark.parametrize("flags", [(), ("--quick",), ("--quick", "--subjects", "neddom"), ("--dry_steps", "3"),
                                   ("--tables", "3", "S4", "--subjects", "meppor", "--seeds", "4", "5", "--learning_rate", "3e-3",
                                    "--no-use_cc", "--center_crop", "--n", "1", "--max_train_steps", "77")])  # fmt: skip
def test_the_report_names_the_command_that_makes_it(tmp_path, flags):
    """Given again, the command that the report states plans the very same runs; and the report tells their steps."""
    args = tables.parse_args(list(flags))
    settings = tables.make_settings(args)
    jobs = plan_of(settings, *args.tables)
    text = report.introduction(args.tables, settings, jobs, 0)
    command = re.search("`python -m reproduction.tables ([^`]*)`", text)[1].split()
    again = tables.parse_args(command)
    assert [job.spec for job in plan_of(tables.make_settings(again), *again.tables)] == [job.spec for job in jobs]
    steps = {job.spec["flags"]["max_train_steps"] for job in jobs if job.spec["method"] == "zoodip" and "cost" not in job.spec}
    assert f"- {steps.pop():,} steps at learning rate " in text and not steps


def test_rates_are_chosen_by_pictures_and_read_from_their_file(tmp_path, capsys):
    """The highest sum of attributes, scenes and accessories; not the loss. The file is of the weights it names, and rows learn at
    its rates, but for those of the grid and at published rates; not on the subjects of the grid."""
    settings = settings_of(tmp_path, "--tables", "TuningRates")
    grid, path = BY_NAME["TuningRates"], tmp_path / "rates.json"
    best = {system: GRID_FACTORS[k % 3] for k, system in enumerate(SYSTEMS)}
    for row in grid.rows:
        for job in runs.jobs_of(grid, row, settings):
            assert job.spec["subject"] in settings.world.grid_subjects
            right = 0.7 if row.rate_factor == best[row.rate_of] else 0.6
            worst = {"attributes": right, "scene": 0.9, "accessory": 0.5, "drift": 0.2}
            fake_run(settings, job.spec, forwards=400, loss=right / 10, scores=worst)
    rates.write_rates(settings, path)
    said, notes = capsys.readouterr(), json.loads(path.read_text())
    start = settings.world.start_rates
    assert notes["chosen"] == {system: float(f"{start[system] * factor:.3g}") for system, factor in best.items()}
    assert set(notes["at_edge"]) == {system for system, factor in best.items() if factor != 1} and "widened" in said.err
    assert len(notes["cells"]) == 21 and notes["cells"][0]["sum"] == pytest.approx(0.7 + 0.9 + 0.5)
    assert notes["subjects"] == list(settings.world.grid_subjects) and notes["model"] == settings.model_id

    later = settings_of(tmp_path, "--tables", "1", "--rates", str(path), "--subjects", "furmix", "ronfo")
    assert later.rates == notes["chosen"]
    rows = {row.label: row for row in BY_NAME["1"].rows}
    (job, *_) = runs.jobs_of(BY_NAME["1"], rows["QLoRA"], later)
    assert job.spec["flags"]["learning_rate"] == notes["chosen"]["QLoRA"]
    assert {job.spec["subject"] for job in runs.jobs_of(BY_NAME["1"], rows["QLoRA"], later)} == {"furmix"}
    published = runs.jobs_of(BY_NAME["1"], rows["QLoRA, published rate"], later)
    assert {job.spec["subject"] for job in published} == {"furmix", "ronfo"}
    assert published[0].spec["flags"]["learning_rate"] == 1e-4
    assert later.rate(grid.rows[1]) == {"learning_rate": start["DreamBooth"]}  # the grid stays where it is

    path.write_text(json.dumps(notes | dict(model="another")))
    assert settings_of(tmp_path, "--tables", "1", "--rates", str(path)).rates == {}
    assert "of other weights" in capsys.readouterr().err
    (settings.folder(job.spec) / "result.json").unlink(missing_ok=True)
    (job, *_) = runs.jobs_of(grid, grid.rows[0], settings)
    (settings.folder(job.spec) / "result.json").unlink()
    rates.write_rates(settings, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists() and "none is chosen" in capsys.readouterr().err


def test_the_spread_of_rows_is_theirs_run_by_run(tmp_path):
    """Standard deviation over four rates, of each run; what varies more beats what varies less in the claim's sign."""
    settings = settings_of(tmp_path, "--tables", "KronA", "--subjects", "furmix", "meppor", "vaxmo")
    experiment = BY_NAME["KronA"]
    for row in sorted(experiment.rows, key=lambda row: "KronA's rate" not in row.label):  # which share runs with the others
        for job in runs.jobs_of(experiment, row, settings):
            if settings.folder(job.spec).exists():
                continue
            wide = 0.1 if row.method == "qlora" else 0.01
            shift = {"furmix": 0, "meppor": 1, "vaxmo": 2}[job.spec["subject"]] / 1000
            score = 0.5 + (wide + shift) * row.rate_factor if row.rate_of == "DiffuseKronA" else 0.5
            fake_run(settings, job.spec, forwards=400, loss=0.1, scores={"CLIP-I": score})
    rows = runs.collect(experiment, settings)
    spread = rows["QLoRA, spread over the four rates"]
    assert {run[0] for run in spread} == {"furmix", "meppor", "vaxmo"}
    assert spread["meppor", 0]["CLIP-I"] == pytest.approx(np.std([0.101 * f for f in (0.2, 0.4, 1.0, 2.0)], ddof=1))
    (claim,) = [claim for claim in CLAIMS if "varies more" in claim.text]
    finding = stats.judge(claim, rows, {})
    assert finding.verdicts == {"CLIP-I": "holds here"} and finding.differences["CLIP-I"][2] == 3


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


def test_wrong_shards_tables_and_the_suite_s_own_flags_are_refused():
    for wrong in (["--shard", "0/3"], ["--shard", "4/3"], ["--shard", "1"], ["--shard", "a/b"], ["--seed", "3"],
                  ["--world", "sd15", "--tables", "Gap"]):  # fmt: skip
        with pytest.raises(SystemExit) as error:
            tables.parse_args(wrong)
        assert error.value.code == 2


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
    assert "learning_rate" not in runs.make_spec(settings, "gf_ti", "furmix", 0, {})["flags"]  # which has none
    assert tables.parse_args([]).extra == {}


def test_what_is_declared_exists():
    """Claims, plots and gaps name rows, columns and tables that there are."""
    labels = {experiment.name: {row.label for row in experiment.rows} for experiment in EXPERIMENTS}
    for claim in CLAIMS:
        assert {claim.a, claim.b} <= labels[claim.experiment] and set(claim.rule.scores) <= set(CLAIM_COLUMNS)
    for experiment in EXPERIMENTS:
        assert set(experiment.columns) <= set(COLUMNS) and set(experiment.worlds) <= set(worlds.WORLDS)
        assert all(row.method in {*runs.METHODS, *runs.UNTRAINED} for row in experiment.rows)
        assert set(experiment.gap or ()) <= labels[experiment.name]
        grid = experiment.plot
        if isinstance(grid, plots.HeatMaps):
            cells = {grid.label.format(x=x, y=y) for x in grid.x[1] for y in grid.y[1]}
            assert labels[experiment.name] <= cells and set(grid.scores) <= set(experiment.columns)
        if isinstance(grid, plots.PictureGrid):
            assert set(grid.columns.values()) <= labels[experiment.name] and set(grid.prompts) <= set(worlds.MINIATURE_PROMPTS)
        assert all(row.rate_of in (None, *SYSTEMS) and set(row.spread_of) <= labels[experiment.name] for row in experiment.rows)
    for (name, quality_row), cost_row in QUALITY_AND_MEMORY.values():
        assert quality_row in labels[name] and cost_row in labels["2"]
    assert set(worlds.Miniature.start_rates) == set(SYSTEMS)


# ----------------------------------------------------------------------------------------------------- statistics


def test_intervals_and_verdicts_by_hand():
    """Of one subject the seeds are the units: differences .03, .01, .02, mean .02, standard deviation .01, t(2) = 4.303, half
    width 4.303 * .01 / sqrt(3) = .0248. Of several subjects each is one unit, whatever its seeds."""
    a = {("x", 0): {"CLIP-I": .53}, ("x", 1): {"CLIP-I": .61}, ("x", 2): {"CLIP-I": .42}, ("y", 1): {"CLIP-I": .9}}  # fmt: skip
    b = {("x", 0): {"CLIP-I": .50}, ("x", 2): {"CLIP-I": .40}, ("x", 1): {"CLIP-I": .60}}  # fmt: skip
    differences = stats.paired_differences(a, b, "CLIP-I")
    assert sorted(differences) == pytest.approx([0.01, 0.02, 0.03])
    mean, half_width = stats.mean_interval(differences)
    assert (mean, half_width) == pytest.approx((0.02, 4.303 * 0.01 / math.sqrt(3)))
    assert stats.paired_differences(a, b | {("y", 1): {"CLIP-I": 0.8}}, "CLIP-I") == pytest.approx([0.02, 0.1])
    assert stats.verdict(mean, half_width) == "no difference found"
    assert stats.verdict(0.02, 0.01) == "holds here" and stats.verdict(-0.02, 0.01) == "does not"
    assert stats.verdict(-0.02, 0.01, margin=0.04) == "holds here" and stats.verdict(-0.06, 0.01, margin=0.04) == "does not"
    assert stats.verdict(-0.04, 0.01, margin=0.04) == "not shown"
    assert stats.verdict(0.02, math.nan) == "too few runs"  # one run proves nothing


@pytest.mark.parametrize("count", [3, 4, 12, 40])
def test_the_smallest_effect_that_would_have_been_found(count):
    """With it as the true difference four of five tables find it: 20,000 tables of normal differences, whose share has a standard
    deviation of .003; below ten units a table's own width varies so much that the approximation is .03 off."""
    rng = np.random.default_rng(count)
    truth = stats.smallest_effect(stats.quantile(stats.T_975, 1.96, count - 1) / math.sqrt(count), count)  # deviation 1
    values = rng.standard_normal((20000, count)) + truth
    widths = stats.quantile(stats.T_975, 1.96, count - 1) * values.std(1, ddof=1) / math.sqrt(count)
    assert (values.mean(1) - widths > 0).mean() == pytest.approx(0.8, abs=0.01 if count >= 10 else 0.04)
    assert math.isnan(stats.smallest_effect(math.nan, 1))


def test_spread_of_a_grid():
    """Effects of cells 0, 1, 2 and of subjects 0, 10: no noise. With noise on one run of six, by hand."""

    def records(*values):
        return {(subject, 0): {"loss": value} for subject, value in zip("xy", values, strict=True)}

    cells = {"a": records(0, 10), "b": records(1, 11), "c": records(2, 12)}
    assert stats.spread_of_cells(cells, "loss") == pytest.approx((1, 0))
    cells["b"] = records(1, 11 + 6)
    # means 5, 9, 7; the 6 leaves 6 * (2/3 * 1/2, 1/3 * 1/2 twice) per subject: squares 2 * (4 + 1 + 1) = 12, of 2 degrees
    assert stats.spread_of_cells(cells, "loss") == pytest.approx((2, math.sqrt(12 / 2 / 2)))
    assert stats.spread_of_cells(cells | {"d": {}}, "loss") is None
    assert stats.spread_of_cells(cells, "CLIP-I") is None
    note = report.grid_note(BY_NAME["4"], cells)
    assert note.endswith("loss, t in [500, 900) 2.000000 (1.732051).")


def test_the_share_of_a_gap_that_is_closed():
    """From .04 to the mean .02 of two seeds: a loss of .025 closes three quarters, of one subject; the other has its own ends."""
    rows = {"start": {("x", 0): {"loss": .04}, ("y", 0): {"loss": .08}},
            "end": {("x", 0): {"loss": .019}, ("x", 1): {"loss": .021}},
            "ours": {("x", 0): {"loss": .025}, ("y", 0): {"loss": .05}}}  # fmt: skip
    stats.add_gaps(rows, "start", "end")
    assert rows["ours"]["x", 0]["gap_closed"] == pytest.approx(0.75) and rows["start"]["x", 0]["gap_closed"] == 0
    assert "gap_closed" not in rows["ours"]["y", 0]  # nobody knows its other end


def fake_run(settings, spec, **result) -> None:
    folder = settings.folder(spec)
    folder.mkdir(parents=True)
    curve = [dict(step=0, unet_forwards=0, loss=0.04), dict(step=10, unet_forwards=result["forwards"], loss=result["loss"])]
    measured = result.pop("scores")
    of_run = dict(spec=spec, stored_bytes=3000, seconds=60, steps_per_second=1.0, curve=curve)
    workers.write_json(folder / "result.json", of_run | result)
    workers.write_json(runs.scores_path(folder, settings, "scores"), dict(scores=measured))


def fake_table_s4(settings) -> None:
    """Two subjects x two seeds a row, with known figures."""
    level = {"RGE": 0.50, "SPSA": 0.45, "one-point": 0.52}
    for row in BY_NAME["S4"].rows:
        for k, job in enumerate(runs.jobs_of(BY_NAME["S4"], row, settings)):
            forwards = 40 if row.label == "SPSA" else 30
            wobble = 0.002 * k if row.label == "RGE" else 0
            fake_run(settings, job.spec, forwards=forwards, loss=.02, loss_all=.1,
                     scores={"CLIP-T": .3, "CLIP-I": level[row.label] + .1 * k + wobble})  # fmt: skip


def test_a_table_and_its_claims_from_files(tmp_path):
    """Means, the interval of the paired difference, equal forwards, published figures."""
    settings = settings_of(tmp_path, "--subjects", "furmix", "meppor", "--seeds", "0", "1")
    fake_table_s4(settings)
    claims = {claim.text: claim for claim in CLAIMS}
    rows = runs.collect(BY_NAME["S4"], settings)
    assert [record["loss_at"] for record in rows["SPSA"].values()] == pytest.approx([0.025] * 4)  # of 40 forwards the first 30
    assert [record["loss_path"] for record in rows["SPSA"].values()] == pytest.approx([(0.04 + 0.025) / 2] * 4)
    finding = stats.judge(claims["RGE beats SPSA at n = 2"], rows, {})
    assert finding.differences["loss_path"][0] == pytest.approx((0.04 + 0.02) / 2 - (0.04 + 0.025) / 2)
    mean, half_width, pairs = finding.differences["CLIP-I"]
    # .05 + (0, .002) of one subject, + (.004, .006) of the other: means .051, .055, deviation .004 / sqrt(2), t(1) = 12.706
    assert (mean, pairs) == (pytest.approx(0.053), 2)
    assert half_width == pytest.approx(12.706 * 0.004 / 2)
    assert finding.verdicts["CLIP-I"] == "holds here" and finding.published["CLIP-I"] == pytest.approx(0.759 - 0.732)
    beaten = stats.judge(claims["SPSA beats one-point at n = 2"], rows, {})
    assert beaten.verdicts["CLIP-I"] == "does not"  # SPSA - one-point = -.07
    line = report.claims_table([finding]).splitlines()[-1]
    assert "| **holds here** |" in line and "| +.053 ± .025 (published +.027): holds here |" in line
    finding.verdicts["DINO"] = "no difference found"
    assert finding.in_short() == "holds here"
    finding.verdicts["DINO"] = "does not"
    assert finding.in_short() == "the scores disagree"
    text = report.table_of(BY_NAME["S4"], rows)
    assert "| SPSA | 4 | .300 ± .000 (published .277, +.023) |" in text and "DINO" not in text
    assert "| 40 | .02500 ± .00000 |" in text
    assert stats.judge(claims["SG helps"], {}, {}) is None


def test_what_would_have_been_found_stands_beside_nothing_found():
    finding = stats.Finding(CLAIMS[0], {"CLIP-I": (0.003, 0.008, 12)}, {"CLIP-I": stats.verdict(0.003, 0.008)}, {})
    effect = 0.008 * (1 + 0.876 / 2.201)  # t(11) at 80 % and 97.5 %
    text = f"+.003 ± .008: no difference found, {effect:.3f} would have been".replace("0.", ".")
    assert report.difference(finding, "CLIP-I") == text
    assert finding.in_short() == "no difference found"


def test_a_report_is_made_again_from_what_it_keeps(tmp_path):
    """The packed runs hold all that the tables are made of, and the same runs give the same bytes; of a stranger's archive only
    what is named like such a file is written."""
    settings = settings_of(tmp_path / "first", "--subjects", "furmix", "meppor", "--seeds", "0", "1")
    fake_table_s4(settings)
    jobs = plan_of(settings, "S4")
    for name in ("a", "b"):
        report.write_report(["S4"], jobs, settings, tmp_path / name)
    assert (tmp_path / "a" / runs.ARCHIVE).read_bytes() == (tmp_path / "b" / runs.ARCHIVE).read_bytes()
    argv = ["--tables", "S4", "--subjects", "furmix", "meppor", "--seeds", "0", "1", "--report_only", "--output",
            str(tmp_path / "second"), "--report", str(tmp_path / "a")]  # fmt: skip
    before = (tmp_path / "a" / "results.json").read_text()
    assert len(json.loads(before)["S4"]["RGE"]) == 4
    tables.main(tables.parse_args(argv))
    assert (tmp_path / "a" / "results.json").read_text() == before
    with tarfile.open(tmp_path / "evil.tar.xz", "w:xz") as archive:
        for name in ("../evil", "/tmp/evil", "0123456789ab/evil.json", "0123456789ab/result.json/../../evil"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    runs.unpack_runs(tmp_path / "evil.tar.xz", tmp_path / "third")
    assert not (tmp_path / "third").exists() and not list(tmp_path.rglob("evil*json"))
    (tmp_path / "a" / runs.ARCHIVE).write_bytes((tmp_path / "a" / runs.ARCHIVE).read_bytes()[:-40])
    with pytest.raises(InputError, match="no whole archive of runs"):
        tables.main(tables.parse_args(argv))


def test_a_missing_score_is_made_up_for_later(tmp_path):
    """DINO was not to be had, so its scores are missing; once it is, the run is scored again, and not before."""
    settings = settings_of(tmp_path, "--dino", "somewhere/dino")
    job = runs.jobs_of(BY_NAME["5"], BY_NAME["5"].rows[0], settings)[0]
    fake_run(settings, job.spec, forwards=3, loss=0.1, scores={"CLIP-I": 0.5})
    settings.missing = {"somewhere/dino"}
    assert job.done(settings)
    settings.missing = set()
    assert not job.done(settings)


def test_removed_share_of_controls():
    """A random walk's columns have a spectrum like 1 / k^2, whose tail carries more than 1e-3 up to nearly its end."""
    walk = stats.control_removed("walk", 43, 1e-3, 256, 5)
    assert len(walk) == 5 and all(count / 43 < 0.1 for count in walk)
    noise = stats.control_removed("noise", 43, 1e-3, 256, 3)
    assert len(noise) == 3 and all(0.3 < count / 43 < 1 for count in noise)  # momentum smooths the walk


# ----------------------------------------------------------------------------------------------------- runs


class TinyWorld(worlds.World):
    """The tiny model on the pictures of the tests: a world takes nothing but these lines."""

    name, width, subjects, images, inference_steps, guidance = "tiny", 32, ("dog6",), 1, 2, 5.0
    methods = {
        "zoodip": dict(max_train_steps=12, tau=4, nu=.1, mu=1e-2), "ti": dict(max_train_steps=12),
        "gf_ti": dict(max_train_steps=4, population=4, intrinsic_dim=5, mode="fair", num_eval_samples=2),
        "gauss_newton": dict(max_forwards=20, basis_size=6, directions=4, cpu=True, resolution=16), "initial": {},
        "dreambooth": dict(max_train_steps=3), "qlora": dict(max_train_steps=3), "tuneqdm": dict(max_train_steps=3, experts=2),
        "diffusekrona": dict(max_train_steps=3, a1=2, a2=4), "untuned": {}, "untuned_integers": {},
    }  # fmt: skip

    def __init__(self, subject: Path, output: Path):
        self.data, self.captions = subject.parent, output / "cc.json"
        self.captions.parent.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in subject.iterdir()]
        self.captions.write_text(json.dumps({subject.name: {name: "a photo of {} on the grass" for name in names}}))

    def class_word(self, subject: str) -> str:
        return "dog"

    def prompts(self, subject: str) -> list[str]:
        return ["a photo of {}", "{} in the snow"]


@pytest.fixture
def tiny_settings(tiny_model, subject, tmp_path) -> runs.Settings:
    world = TinyWorld(subject, tmp_path / "suite")
    return runs.Settings(world, tmp_path / "suite", str(tiny_model), "tiny", str(MINIATURE.parent / "clip"), None, images=1,
                         inference_steps=2, eval_samples=2, extra=dict(cpu=True, resolution=16))  # fmt: skip


def result_of(settings, spec) -> dict:
    return json.loads((settings.folder(spec) / "result.json").read_text())


@pytest.mark.parametrize("method", ["zoodip", "ti", "gf_ti"])
def test_a_run_is_the_script_s_run(tiny_settings, tmp_path, method):
    """What a run of the suite leaves is, byte for byte, the file that the method's command line leaves; and it is judged."""
    spec = runs.make_spec(tiny_settings, method, "dog6", 3, {})
    job = runs.Job(spec, {"scores"})
    workers.do(job, tiny_settings)
    assert job.done(tiny_settings)
    argv = [*runs.spec_argv(spec, tiny_settings), "--output_dir", str(tmp_path / "script"), "--eval_steps", "3"]
    assert run_cli(argv, runs.METHODS[method]) == 0
    folder, name = tiny_settings.folder(spec), "learned_embeds.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "script" / name).read_bytes()
    result, run = result_of(tiny_settings, spec), json.loads((tmp_path / "script" / "run.json").read_text())
    steps = spec["flags"]["max_train_steps"]
    assert [point["step"] for point in result["curve"]] == list(range(steps + 1))  # fewer steps than twice the snapshots
    assert result["forwards"] == run["unet_forwards"] == result["curve"][-1]["unet_forwards"]
    assert result["curve"][0]["loss"] != result["curve"][-1]["loss"] == result["loss"]
    assert len(result["removed"]) == (3 if method == "zoodip" else 0) and all(0 < count < 4 for count in result["removed"])
    assert not list(folder.glob("checkpoint-*")) and (folder / "sheet.png").exists()
    assert {"CLIP-T", "CLIP-I"} == set(runs.read_run(spec, tiny_settings)) & {"CLIP-T", "CLIP-I", "DINO"}


@pytest.mark.parametrize(("method", "flags"), [
    ("dreambooth", {}), ("qlora", {}), ("tuneqdm", {}), ("tuneqdm", dict(experts=1, no_scale_in=True, bits=4)),
    ("diffusekrona", {}), ("untuned", {}), ("untuned_integers", dict(bits=4)),
], ids=["dreambooth", "qlora", "tuneqdm", "peqa", "krona", "untuned", "untuned-int4"])  # fmt: skip
def test_tuned_weights_are_judged_as_they_were_trained(tiny_settings, method, flags):
    """What a run left is loaded and drawn with: prompts with the words, one with them for diversity, and the class word alone.

    An untuned model is judged as it is."""
    spec = runs.make_spec(tiny_settings, method, "dog6", 0, flags | dict(learning_rate=1e-2))
    job = runs.Job(spec, {"scores", "inter"})
    settings = replace(tiny_settings, inter_images=2)
    workers.do(job, settings)
    assert job.done(settings)
    result, folder = result_of(settings, spec), settings.folder(spec)
    record = runs.read_run(spec, settings)
    assert {"CLIP-T", "CLIP-I", "drift_CLIP-I", "CLIP_inter"} <= set(record) and result["curve"] == []
    assert len(list((folder / "pictures").glob("*.png"))) == 2 + 2 + 2  # of the words, of the class word, of one prompt
    judge = judging.open_judge(spec, settings)
    base = {"dreambooth": "none", "tuneqdm": f"affine{flags.get('bits', 8)}", "untuned_integers": "affine4"}.get(method, "nf4")
    untuned = replace(judge.model, unet=load_unet(judge.inputs.folder, None, base, torch.float32, "cpu"))
    same = [torch.equal(judge.model.predict(batch), untuned.predict(batch)) for batch in judge.sets["loss_all"]]
    assert all(same) == (method in runs.UNTRAINED)  # three steps need not reach every expert
    if method in runs.UNTRAINED:
        assert result["stored_bytes"] == result["forwards"] == 0 and "trained" not in result
        return
    assert result["forwards"] == 3 and result["stored_bytes"] > 4 * result["trained"] * (0.5 if method == "dreambooth" else 1)
    assert ("travel" in result) == (method == "tuneqdm")
    texts = judge.inputs.prompts
    assert len(texts.ids) == 4  # caption with the words, the class, the preview's, the empty one
    digest = judge.learned.digest
    target = runs.learned_path(spec, settings)
    target = target / "diffusion_pytorch_model.safetensors" if target.is_dir() else target
    target.write_bytes(target.read_bytes()[:-1] + bytes([target.read_bytes()[-1] ^ 1]))
    assert judging.open_judge(spec, settings).learned.digest != digest


def test_a_worker_tunes_no_model_twice(tiny_settings):
    """Judged one after the other by the same process, equal runs are equal: what is shared between them is not tuned."""
    results = []
    for seed in (0, 1, 0):
        spec = runs.make_spec(tiny_settings, "qlora", "dog6", seed, dict(learning_rate=1e-2))
        (tiny_settings.folder(spec) / "result.json").unlink(missing_ok=True)
        workers.do(runs.Job(spec, set()), tiny_settings)
        results.append(result_of(tiny_settings, spec)["loss_all"])
    assert results[0] == results[2] != results[1]


def test_an_interrupted_run_continues(tiny_settings):
    """Ctrl-C within a run, then the same again: token and curve are those of an uninterrupted run; and what has learned is only
    judged where just its judging is missing."""
    whole = replace(tiny_settings, output=tiny_settings.output / "whole")
    spec = runs.make_spec(tiny_settings, "zoodip", "dog6", 0, {"max_train_steps": 120})
    folder = tiny_settings.folder(spec)

    def press_ctrl_c() -> None:
        limit = time.monotonic() + 60
        while not (folder / "learned_embeds-steps-15.safetensors").exists() and time.monotonic() < limit:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        workers.do(runs.Job(spec, set()), tiny_settings)
    thread.join()
    assert 15 <= json.loads((folder / "run.json").read_text())["step"] < 120 and not (folder / "result.json").exists()
    for settings in (tiny_settings, whole):
        workers.do(runs.Job(spec, set()), settings)
    tokens = [load_file(settings.folder(spec) / "learned_embeds.safetensors")["<sks>"] for settings in (tiny_settings, whole)]
    assert torch.equal(*tokens)
    first, second = result_of(tiny_settings, spec), result_of(whole, spec)
    assert first["curve"] == second["curve"] and len(first["curve"]) == 9
    assert first["removed"] == second["removed"] and len(first["removed"]) == 30
    stamp = (folder / "run.json").stat().st_mtime_ns
    (folder / "result.json").unlink()
    workers.do(runs.Job(spec, set()), tiny_settings)
    assert (folder / "run.json").stat().st_mtime_ns == stamp and result_of(tiny_settings, spec)["curve"] == first["curve"]


def test_a_new_method_is_one_line(tiny_settings, monkeypatch):
    monkeypatch.setitem(runs.METHODS, "gauss_newton", gauss_newton)
    spec = runs.make_spec(tiny_settings, "gauss_newton", "dog6", 0, {})
    workers.do(runs.Job(spec, {"scores"}), tiny_settings)
    result = result_of(tiny_settings, spec)
    assert result["forwards"] == 20 and [point["step"] for point in result["curve"]] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_cost_run_is_the_script_in_a_process_of_its_own(tiny_settings, monkeypatch, tmp_path):
    """Started anywhere: it finds the code by itself."""
    monkeypatch.setattr(TinyWorld, "cost_steps", 3, raising=False)
    monkeypatch.chdir(tmp_path)
    spec = runs.make_spec(tiny_settings, "ti", "dog6", 0, {}, cost=True)
    workers.do(runs.Job(spec, set()), tiny_settings)
    result = result_of(tiny_settings, spec)
    assert result["forwards"] == 3 and result["steps_per_second"] > 0 and result["peak_memory_gb"] > 0.1


def test_a_run_that_fails_is_told_with_its_log(tiny_settings):
    """And does not end the others."""
    settings = replace(tiny_settings, model="no/such/model")
    spec = runs.make_spec(settings, "zoodip", "dog6", 0, {})
    (line,) = [workers.do_in_worker(runs.Job(spec, set()), settings)]
    assert "there is no folder" in line or "neither a folder here" in line
    assert "Traceback" in (settings.folder(spec) / "error.log").read_text()


def test_tokens_that_nothing_is_learned_for(tmp_path):
    """The class word's embedding, and a description's with one vector for each word: a prompt with it is encoded as the prompt
    with the words written out."""
    from zoodip.model import load_text_encoder, native_resolution
    from zoodip.prompts import build_prompts, encode_prompts, load_tokenizer

    settings, theta = settings_of(tmp_path), {}
    for method in ("initial", "described"):
        spec = runs.make_spec(settings, method, "furmix", 0, {})
        settings.folder(spec).mkdir(parents=True)
        workers.leave_untrained(spec, settings)
        theta[method], recorded = read_embedding(settings.folder(spec) / "learned_embeds.safetensors", "<sks>")
        assert recorded["num_vectors"] == len(theta[method]) and recorded["resolution"] == native_resolution(MINIATURE)
    assert theta["initial"].shape == (1, 256) and len(theta["described"]) > 5
    text_encoder = load_text_encoder(MINIATURE, None, "none", torch.float32, "cpu")
    tokenizer = load_tokenizer(MINIATURE, "<sks>", 1)

    def states(text: str, token: torch.Tensor) -> torch.Tensor:
        prompts = build_prompts(tokenizer, MINIATURE, None, [text], "<sks>", len(token))
        return encode_prompts(text_encoder, prompts.rows, prompts.ids, token[None])

    for method, words in (("initial", "critter"), ("described", settings.world.description("furmix"))):
        written = states(f"a {words} in the snow", theta["initial"])
        assert torch.allclose(states("a {} in the snow", theta[method]), written, atol=1e-6)  # rounding of another table


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


@pytest.mark.slow
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
