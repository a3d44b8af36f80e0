"""The reproduction suite: scores against plain loops, prompts, caching, statistics by hand, runs that are shared and resumed."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import MINIATURE, arguments, run_cli, seeded
from PIL import Image
from safetensors.torch import load_file, save
from test_single_file import single_file

import train_zoodip
from reproduction import (
    archives,
    controls,
    evaluate,
    judging,
    memory_claims,
    pages,
    plans,
    plots,
    prompts,
    rates,
    report,
    runs,
    scores,
    stats,
    tables,
    variations,
    workers,
    worlds,
)
from reproduction.claims import CLAIMS, OTHERS, OURS
from reproduction.declarations import CLAIM_COLUMNS, COLUMNS
from reproduction.experiments import BY_NAME, EXPERIMENTS, QUALITY_AND_MEMORY, TAUS
from reproduction.tuning_experiments import GRID_FACTORS, SYSTEMS, TUNERS
from zoodip.errors import InputError
from zoodip.model import load_unet
from zoodip.packing import save_quantized
from zoodip.prompts import read_embedding, save_embedding
from zoodip.records import ROOT
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


@pytest.fixture
def line_scorer(monkeypatch):
    monkeypatch.setattr(evaluate, "load_scorer", lambda name, device: LineScorer())


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
    """The miniature's CLIP and a DINOv2 of random weights load from folders; anything else is left out with a line."""
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
    drawer = evaluate.load_drawer(flags, torch.device("cpu"), steps=2, guidance=5.0, batch_size=2, scheduler="pndm")
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
    """Otherwise a resumed evaluation would differ from an uninterrupted one. 2 of 255: rounding of another batch size."""
    alone = scores.PictureCache(cache.drawer, cache.cache, cache.learned, ["alone"])
    texts = ["a photo of {}", "{} in the snow"]
    both = cache.pictures(texts, range(2))
    for k, prompt in enumerate(texts):
        for seed in range(2):
            path = alone.path(prompt, seed)
            (picture,) = alone.pictures([prompt], range(seed, seed + 1))[0]
            assert path.exists()
            assert np.abs(np.asarray(both[k][seed], int) - np.asarray(picture, int)).max() <= 2


@pytest.mark.usefixtures("line_scorer")
def test_evaluate_command(tiny_model, subject, tmp_path, capsys):
    """Per-subject and mean scores, a sheet, nothing drawn a second time; and a line, as the token is from an INT8 model."""
    settings = dict(placeholder_token="<rex>", initializer_token="dog", resolution=16, quantization="int8",
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
        evaluate.main(evaluate.parse_args(argv))
    assert "was learned with --quantization int8, its pictures are drawn with nf4" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(content["mean"]) == {"CLIP-T", "CLIP-I", "DINO", "CLIP_inter", "DINO_inter"}
    assert (tmp_path / "out" / "scores.csv").read_text().splitlines()[0] == "subject,CLIP-T,CLIP-I,DINO,CLIP_inter,DINO_inter"
    assert len(list((tmp_path / "out" / "dog6").glob("*.png"))) == 2 * 2 + 2
    assert Image.open(tmp_path / "out" / "dog6.png").width > 200
    earlier = {path.name for path in (tmp_path / "out" / "previous-1").iterdir()}
    assert earlier == {"scores.json", "scores.csv", "dog6.png"}  # the first command's, together
    save_quantized(tmp_path / "packed", pretrained_model_name_or_path=str(tiny_model), revision=None, variant=None,
                   model_config=None, quantization="int8")  # fmt: skip
    evaluate.main(evaluate.parse_args([*argv[:-2], str(tmp_path / "packed"), "--cpu"]))
    assert "was learned with" not in capsys.readouterr().err  # a packed folder has its own bits


@pytest.mark.parametrize(("method", "base"), [("qlora", "folder"), ("dreambooth", "folder"), ("qlora", "hub"), ("qlora", "file")])
@pytest.mark.usefixtures("line_scorer")
def test_evaluate_command_of_tuned_weights(tiny_model, hub_model, subject, tmp_path, method, base):
    """From a run's file or folder alone: with its own words, on weights as in training, found as training finds them."""
    model, more = {"folder": str(tiny_model), "hub": hub_model}.get(base), {}
    if base == "file":
        model, more = str(single_file(tiny_model, tmp_path / "tiny.safetensors")), dict(model_config=str(tiny_model))
    tuning = dict(class_word="dog", initializer_token=None, tau=None, nu=None, mu=None, max_train_steps=1, eval_steps=0)
    tuning |= dict(identifier="zwx", **more)
    assert run_cli(arguments(model, subject, tmp_path / "run", **tuning), runs.METHODS[method]) == 0
    (tmp_path / "prompts.txt").write_text("a photo of {}\n")
    tuned = tmp_path / "run" if method == "dreambooth" else tmp_path / "run" / "pytorch_lora_weights.safetensors"
    argv = ["--tuned", str(tuned), "--references", str(subject), "--class_word", "dog", "--images", "1", "--inference_steps", "2",
            "--prompts", str(tmp_path / "prompts.txt"), "--resolution", "16", "--output", str(tmp_path / "out"), "--cpu",
            "--pretrained_model_name_or_path", model, *[f"--{name}={value}" for name, value in more.items()]]  # fmt: skip
    evaluate.main(evaluate.parse_args(argv))
    assert set(json.loads((tmp_path / "out" / "scores.json").read_text())["mean"]) == {"CLIP-T", "CLIP-I", "DINO"}
    (picture,) = (tmp_path / "out" / "dog6").glob("*.png")
    pipeline = load_tuned_pipeline(model, tuned, **more)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    expected = pipeline("a photo of zwx dog", num_inference_steps=2, height=16, width=16, generator=noise).images[0]
    assert np.abs(np.asarray(Image.open(picture), int) - np.asarray(expected, int)).max() <= 2  # rounding of another batch
    argv[1] = str(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match="holds no tuned weights"):
        evaluate.main(evaluate.parse_args(argv))


TOKEN = torch.ones(1, 32)


@pytest.mark.parametrize(("content", "words"), [
    (lambda: b"", "does not hold"), (lambda: save({"<sks>": TOKEN})[:-3], "does not hold"),
    (lambda: save({"<other>": TOKEN}), "does not hold"), (lambda: save({"<sks>": TOKEN / 0}), "NaN or Inf"),
    (lambda: save({"<sks>": TOKEN.long()}), "int64"), (lambda: save({"<sks>": TOKEN[None]}), "(1, 1, 32)"),
    (lambda: save({"<sks>": TOKEN[:0]}), "(0, 32)"), (lambda: save({"<sks>": TOKEN}, {"zoodip.settings": "{"}), "does not hold"),
    (lambda: pickle.dumps({"<sks>": TOKEN}), "is a pickle"),
])  # fmt: skip
def test_damaged_embeddings(tmp_path, content, words):
    """An embedding may come from anybody: it is read as numbers, or refused by name."""
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


@pytest.mark.usefixtures("line_scorer")
def test_an_embedding_of_another_model(tiny_model, subject, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(save({"<sks>": torch.ones(1, 768)}))
    (tmp_path / "prompts.txt").write_text("a photo of {}\n")
    argv = ["--embeddings", str(tmp_path / "x.safetensors"), "--references", str(subject), "--class_word", "dog", "--cpu",
            "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out"), "--resolution", "16",
            "--pretrained_model_name_or_path", str(tiny_model)]  # fmt: skip
    with pytest.raises(InputError, match="has 768 numbers, the model's tokens have 32"):
        evaluate.main(evaluate.parse_args(argv))


# ----------------------------------------------------------------------------------------------------- the plan


def settings_of(tmp_path, *flags: str) -> runs.Settings:
    argv = ["--output", str(tmp_path), *flags]
    if "sd15" in flags:
        (tmp_path / "prompts.txt").write_text(PROMPT_FILE.replace("dog6,dog", "\n".join(f"{s},toy" for s in worlds.DREAMBOOTH)))
        argv += ["--prompts", str(tmp_path / "prompts.txt")]
    return tables.make_settings(tables.parse_args(argv))


def plan_of(settings: runs.Settings, *names: str) -> list[runs.Job]:
    return plans.plan([BY_NAME[name] for name in names or report.default_names(settings)], settings)


@pytest.mark.parametrize("flags", [(), ("--quick",), ("--dry_steps", "2"), ("--world", "sd15"),
                                   ("--world", "sd15", "--dry_steps", "2"),
                                   ("--world", "sd15", "--variant", "fp16", "--mixed_precision", "bf16")])  # fmt: skip
def test_every_run_of_every_table_has_valid_arguments(tmp_path, flags):
    """Checked by the parser of its own script; and no two runs of the plan are the same."""
    settings = settings_of(tmp_path, *flags)
    jobs = plan_of(settings)
    hashes = {runs.digest(job.spec) for job in jobs}
    assert len(hashes) == len(jobs)
    assert len({job.spec["subject"] for job in jobs}) == (
        1 if "--dry_steps" in flags else len(set(worlds.DREAMBOOTH)) if "sd15" in flags else 2 if "--quick" in flags else 12
    )
    for job in jobs:
        assert json.loads(json.dumps(job.spec)) == job.spec
        assert plans.estimated_seconds(job, settings) > 0
        if job.spec["method"] in runs.RENDERED:
            continue
        args = runs.spec_args(job.spec, settings)
        subject = job.spec["subject"]
        words = settings.world.description(subject) if job.spec["method"] == "described" else settings.world.class_word(subject)
        word = args.class_word if runs.tunes_weights(job.spec["method"]) else args.initializer_token
        assert args.seed == job.spec["seed"] and word == words
        if "--variant" in flags:
            assert args.variant == "fp16" and args.mixed_precision in ("bf16", "fp32")  # Table 2 has a row of fp32


def test_the_full_miniature_plan(tmp_path):
    """Twelve subjects for every claim except those of grids, in at most 25 core hours; tau in proportion to the token, steps to
    the paper's; runs shared between tables."""
    settings = settings_of(tmp_path)
    specs = [job.spec for job in plan_of(settings) if runs.tunes_weights(job.spec["method"]) and "cost" not in job.spec]
    steps = {spec["method"]: spec["flags"]["max_train_steps"] for spec in specs}
    assert steps == {"dreambooth": 400, "qlora": 500, "tuneqdm": 400, "diffusekrona": 500}  # as published
    assert sum(plans.estimated_seconds(job, settings) for job in plan_of(settings)) < 25 * 3600
    for claim in CLAIMS:
        experiment = BY_NAME[claim.experiment]
        four = experiment.grid or experiment.name == "Prompts"
        few = 4 if four else 1 if experiment.kind == "cost" else 12
        assert len(plans.subjects_of(experiment, settings)) == few
    default = {name: {runs.digest(job.spec) for row in BY_NAME[name].rows if row.label == label
                      for job in plans.jobs_of(BY_NAME[name], row, settings)}
               for name, label in (("1", "ZOODiP"), ("1", "ZOODiP, at its best step"), ("3", "SG and PUTS"), ("5", "PUTS"),
                                   ("Habits", "learning rate 1e-2 (the script)"), ("S4", "RGE"), ("S5", "mu = 1e-3"),
                                   ("S6", "n = 2"), ("S8", "NF4"), ("S9", "ZOODiP"), ("Gap", "ZOODiP"))}  # fmt: skip
    assert len(set(map(frozenset, default.values()))) == 1
    assert [settings.world.scaled(tau) for tau in TAUS] == [11, 21, 43, 85, 171]
    of_paper = {row.label: plans.jobs_of(BY_NAME["1"], row, settings)[0].spec["flags"] for row in BY_NAME["1"].rows}
    assert of_paper["TI, as published"]["max_train_steps"] == 167  # 5,000 of 30,000
    assert of_paper["TI, as published"]["mixed_precision"] == "fp32"  # on a GPU too
    sd15 = settings_of(tmp_path, "--world", "sd15")
    flags = plans.jobs_of(BY_NAME["1"], BY_NAME["1"].rows[1], sd15)[0].spec["flags"]
    assert flags["max_train_steps"] == 5000
    assert plans.subjects_of(BY_NAME["S6"], sd15) == ("dog6", "shiny_sneaker") and plans.seeds_of(BY_NAME["S6"], sd15) == (
        0,
        1,
        2,
    )
    assert plans.subjects_of(BY_NAME["PUTS"], sd15) == ("dog6",) and plans.seeds_of(BY_NAME["PUTS"], sd15) == (0,)
    assert plans.seeds_of(BY_NAME["1"], sd15) == (0,)


def test_the_plan_says_how_long_each_table_takes(tmp_path, capsys):
    """A run that two tables share is counted once; two jobs take half."""
    args = tables.parse_args(["--dry_run", "--jobs", "2", "--tables", "3", "5", "--output", str(tmp_path)])
    tables.main(args)
    lines = capsys.readouterr().out.splitlines()
    settings = settings_of(tmp_path)
    seconds = [plans.estimated_seconds(job, settings) for job in plan_of(settings, "3", "5")]
    assert f"about {sum(seconds) / 3600:.1f} hours of one process" in lines[-1]
    assert f"{sum(seconds) / 7200:.1f} with --jobs 2" in lines[-1]
    table_3, table_5 = (next(line.split("|") for line in lines if line.startswith(f"| Table {name}")) for name in "35")
    assert (table_3[2].strip(), table_3[4].strip()) == ("48", "48")
    assert (table_5[2].strip(), table_5[4].strip()) == ("36", "12")  # uniform and PUTS are Table 3's


TUNER_PAIRS = [{system, f"{system}, published rate"} for system in TUNERS]
OWN_RATE = [{f"{bits} bit, s_out and s_in, N = 4", f"{bits} bit, N = 4, its own rate"} for bits in (8, 4)]


@pytest.mark.parametrize(("flags", "expected"), [
    ((), {"TuneQDM": OWN_RATE[1:], "KronA": [{"KronA (4, 16)", "DiffuseKronA, 1 x KronA's rate"}]}),
    (("--world", "sd15"), {"1": TUNER_PAIRS, "S9": TUNER_PAIRS, "S10": TUNER_PAIRS, "TuneQDM": OWN_RATE,
                           "KronA": [{"LoRA r = 2", "QLoRA, 0.2 x KronA's rate"}]}),
], ids=["miniature", "sd15"])  # fmt: skip
def test_rows_of_a_table_are_different_runs(tmp_path, flags, expected):
    """Except where a rate that was chosen, or the published one, is that of another row."""
    tables_of_world = [experiment for experiment in EXPERIMENTS if ("sd15" if flags else "miniature") in experiment.worlds]
    settings = settings_of(tmp_path, *flags, "--tables", *(experiment.name for experiment in tables_of_world))
    shared = {}
    for experiment in tables_of_world:
        labels: dict[tuple, set[str]] = {}
        for row in experiment.rows:
            if not row.spread_of:
                specs = [runs.digest(job.spec) for job in plans.jobs_of(experiment, row, settings)]
                labels.setdefault((row.at, *specs), set()).add(row.label)
        if found := [names for names in labels.values() if len(names) > 1]:
            shared[experiment.name] = found
    assert shared == expected


def flags_of(table: str, settings: runs.Settings) -> dict[str, dict]:
    """{row: the flags of its first run}."""
    jobs = {row.label: plans.jobs_of(BY_NAME[table], row, settings) for row in BY_NAME[table].rows}
    return {label: of_row[0].spec["flags"] for label, of_row in jobs.items() if of_row}


def test_a_row_has_the_setting_of_its_label(tmp_path):
    """Whatever the world's default and the precision are; where it is the default, the run is that of other tables."""
    habits = flags_of("Habits", settings_of(tmp_path, "--world", "sd15"))
    assert [flags["learning_rate"] for flags in habits.values()] == [5e-3, 1e-2, 1e-2, 1e-2, 1e-2]
    assert flags_of("1", settings_of(tmp_path, "--world", "sd15"))["TI, six times the paper's share of steps"][
        "max_train_steps"] == 30000  # fmt: skip
    mus = {flags: [row.get("mu") for row in flags_of("S5", settings_of(tmp_path, *flags)).values()]
           for flags in ((), ("--mixed_precision", "fp16"), ("--mixed_precision", "bf16"), ("--mu", "1e-2"))}  # fmt: skip
    assert mus == {flags: [1e-2, 1e-3 if "bf16" in flags or "--mu" in flags else None, 1e-4] for flags in mus}


def test_kronecker_factors_of_lora_s_size_are_compared_with_it(tmp_path):
    """Of (8, 64), the nearest on the miniature; the default pair stays (4, 16), which the rates were chosen for."""
    rows = flags_of("KronA", settings_of(tmp_path))
    assert (rows["KronA (8, 64)"]["a1"], rows["KronA (8, 64)"]["a2"]) == (8, 64)
    assert {claim.a for claim in CLAIMS if claim.b == "LoRA r = 2"} == {
        f"KronA ({a1}, {a2})" for a1, a2 in ((4, 64), (4, 16), (8, 64))
    }
    assert (worlds.Miniature.methods["diffusekrona"]["a1"], worlds.Miniature.methods["diffusekrona"]["a2"]) == (4, 16)


def test_the_runs_of_an_archive_are_done_in_a_plan(tmp_path, capsys):
    """Nothing is unpacked to find out."""
    argv = ["--tables", "5", "--subjects", "furmix", "--seeds", "0"]
    settings = settings_of(tmp_path / "first", *argv)
    jobs = plan_of(settings, "5")
    (tmp_path / "report").mkdir()
    for job in jobs[:2]:
        fake_run(settings, job.spec, forwards=3, loss=0.1, scores={"CLIP-I": 0.5})
    archives.pack_runs(jobs, settings, tmp_path / "report" / archives.ARCHIVE)
    tables.main(
        tables.parse_args([*argv, "--dry_run", "--output", str(tmp_path / "second"), "--report", str(tmp_path / "report")])
    )
    assert "3 runs, 1 to do" in capsys.readouterr().out and not (tmp_path / "second").exists()


def test_the_plan_says_how_much_disk_it_takes(tmp_path, capsys):
    """Pictures, of tuned weights half as many again for the class word; of weights DreamBooth's, but not after a cost run."""
    settings = settings_of(tmp_path, "--world", "sd15")
    world = settings.world
    spec = runs.make_spec(settings, "dreambooth", "dog6", 0, {})
    pictures = 5 * len(world.prompts("dog6"))
    assert plans.estimated_bytes(runs.Job(spec, {"scores"}), settings) == world.unet_bytes + 1.5 * pictures * world.picture_bytes
    assert plans.estimated_bytes(runs.Job(spec | {"cost": True}, set()), settings) == 0
    token = runs.Job(runs.make_spec(settings, "zoodip", "dog6", 0, {}), {"scores", "inter"})
    assert plans.estimated_bytes(token, settings) == (pictures + 50) * world.picture_bytes
    tables.main(tables.parse_args(["--dry_run", "--tables", "3", "--output", str(tmp_path)]))
    assert re.search(r"pictures and weights take about \d+\.\d GB$", capsys.readouterr().out.strip())


def test_shards_together_do_every_run_once_and_one_of_them_all_that_measure_cost(tmp_path):
    """Otherwise the rows of a round would be measured beside one another, and on different machines."""
    jobs = plan_of(settings_of(tmp_path), "5", "2")
    shares = [workers.share_of(jobs, (number, 3)) for number in (1, 2, 3)]
    assert sorted(runs.digest(job.spec) for share in shares for job in share) == sorted(runs.digest(job.spec) for job in jobs)
    assert [sum(job.spec.get("cost", False) for job in share) for share in shares] == [5 * len(BY_NAME["2"].rows), 0, 0]
    assert [sum(not job.spec.get("cost") for job in share) for share in shares] == [12, 12, 12]


def test_a_grid_of_one_subject_uses_all_seeds_that_are_given(tmp_path):
    """Without them one, whose best cell nothing can judge, and the report says what would."""
    for flags, seeds in (((), (0,)), (("--seeds", "3", "4"), (3, 4))):
        settings = settings_of(tmp_path, "--world", "sd15", *flags)
        assert plans.seeds_of(BY_NAME["4"], settings) == seeds
        (claim,) = [claim for claim in CLAIMS if claim.experiment == "4"]
        assert ("one run per cell cannot decide it; give --seeds" in report.not_judged(claim, settings)) is (not flags)
    assert plans.seeds_of(BY_NAME["4"], settings_of(tmp_path, "--seeds", "3", "4")) == (3,)  # of four breeds


WAITING = """
import os, pathlib, sys, time
from reproduction.workers import in_processes

def wait(folder):
    (folder / "begun").write_text(str(os.getpid()))
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        (folder / "saved").touch()

if __name__ == "__main__":
    list(in_processes(wait, [pathlib.Path(sys.argv[1])], 1, threads=1))
"""


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background job"])
def test_a_worker_saves_and_ends_when_its_parent_is_killed(tmp_path, inherited):
    """At once, even while it waits; otherwise it would go on, and hold its run's folder, with nobody to report to."""
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    ours = signal.signal(signal.SIGINT, inherited)  # the shell makes a job that a script starts with & ignore it
    try:
        parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    finally:
        signal.signal(signal.SIGINT, ours)
    wait_until(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text())
    worker = psutil.Process(int((tmp_path / "begun").read_text()))
    parent.kill()
    parent.wait()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert (tmp_path / "saved").exists()


def wait_until(happened, seconds: float = 60) -> None:
    patience = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < patience
        time.sleep(0.05)


def test_cost_is_measured_in_rounds(tmp_path, monkeypatch):
    """One run of every row, then the next of every row; the median is printed, with the lowest and the highest."""
    settings, order = settings_of(tmp_path), []
    monkeypatch.setattr(workers, "do_in_worker", lambda job, *rest: order.append((job.spec["seed"], job.spec["method"])))
    jobs = plan_of(settings, "2")
    workers.run_jobs(jobs, settings, 1)
    rows = BY_NAME["2"].rows
    assert [turn for turn, _ in order] == [turn for turn in range(5) for _ in rows]
    assert sorted(order[: len(rows)]) == sorted((0, row.method) for row in rows)
    assert report.cell([3.0, 1.0, 2.5, 9.0, 2.0], "steps_per_second", 18.4) == "2.50 [1.00 to 9.00] (published 18.40)"
    assert report.cell([3.0, 3.0], "forwards", None) == "3"


def test_rows_of_equal_cost_share_its_runs(tmp_path):
    """Those that differ only in learning rate or number of steps; and a generation of GF-TI counts as ten steps."""
    settings, table_2 = settings_of(tmp_path), BY_NAME["2"]
    costs = {row.label: [job.spec for job in plans.cost_jobs(BY_NAME["S10"], row, settings)] for row in BY_NAME["S10"].rows}
    measured = [job.spec for row in table_2.rows for job in plans.jobs_of(table_2, row, settings)]
    assert len(costs["TI, as published"]) == 5
    assert costs["TI, as published"] == costs["TI, six times the paper's share of steps"]
    assert all(spec in measured for system in TUNERS for spec in costs[system])
    assert all(spec not in measured for spec in costs["GF-TI, fair"])
    steps = {spec["method"]: spec["flags"]["max_train_steps"] for spec in measured}
    assert steps["gf_ti"] * 10 == steps["zoodip"] == steps["dreambooth"] == 200


@pytest.mark.parametrize("flags", [(), ("--quick",), ("--quick", "--subjects", "neddom"), ("--dry_steps", "3"),
                                   ("--tables", "3", "S4", "--subjects", "meppor", "--seeds", "4", "5", "--learning_rate", "3e-3",
                                    "--no-use_cc", "--center_crop", "--n", "1", "--max_train_steps", "77"),
                                   ("--tables", "3", "S7", "--model", "a/model", "--clip", "a/clip", "--rates", "own.json"),
                                   ])  # fmt: skip
def test_the_report_names_the_command_that_makes_it(tmp_path, flags):
    """Given again, the command that the report states plans the very same runs; and the report states their steps."""
    args = tables.parse_args(list(flags))
    settings = tables.make_settings(args)
    jobs = plan_of(settings, *args.tables)
    section = report.introduction(args.tables, settings, jobs, 0)
    text = pages.render("results.md", "x", [section]).decode()
    command = re.search("`python -m reproduction.tables ([^`]*)`", text)[1].split()
    again = tables.parse_args(command)
    assert [job.spec for job in plan_of(tables.make_settings(again), *again.tables)] == [job.spec for job in jobs]
    assert (again.model, again.clip) == (args.model, args.clip)
    steps = {job.spec["flags"]["max_train_steps"] for job in jobs if job.spec["method"] == "zoodip" and "cost" not in job.spec}
    assert f"- {min(steps):,} steps at learning rate " in text
    assert steps <= {min(steps), 3 * min(steps)}  # the table Stop has three times as many


def test_the_command_names_what_replaces_the_world_s_own(tmp_path):
    """Not what is the world's own already; and of a path outside the repository only the name."""
    flags = ("--world", "sd15", "--data", "elsewhere", "--dino", "someone/dino", "--clip", worlds.CLIP, "--tables", "3")
    command = report.command_of(["3"], settings_of(tmp_path, *flags))
    assert command.endswith(" --world sd15 --tables 3 --dino someone/dino --data elsewhere --prompts prompts.txt")


def test_a_row_s_differences_are_from_the_row_that_it_names(tmp_path):
    """Captions against none within each system, whatever the systems' own levels are."""
    prompts_table = BY_NAME["Prompts"]
    level = {row.label: TUNERS.index(row.label.partition(",")[0]) / 10 + 0.03 * ("captions" in row.label)
             for row in prompts_table.rows}  # fmt: skip
    rows = {label: {("x", seed): {"CLIP-I": value + seed, "spec": {}} for seed in range(2)} for label, value in level.items()}
    differences = report.differences_of(prompts_table, rows)
    assert differences is not None
    column = differences.header.index("CLIP-I")
    found = {line[0]: line[column] for line in differences.lines}
    assert all(found[f"{system}, captions - {system}"].startswith("+.030 ") for system in TUNERS)
    assert "QLoRA, prior preservation, 500 steps - QLoRA" in found and len(found) == len(TUNERS) + 4
    settings = settings_of(tmp_path, "--tables", "Prompts", "--subjects", "furmix", "--seeds", "0", "1")
    after = report.section_of(prompts_table, lambda name: rows, settings, tmp_path).after
    assert after[-1] == "Differences between two rows, paired by seed:"


def test_a_table_prints_differences_from_the_row_it_names(tmp_path):
    """Paired by subject: .02 and .04 above, whatever the subjects' own levels are. A commit is shown by its first digits."""
    settings = settings_of(tmp_path, "--tables", "Demo", "--subjects", "furmix", "meppor", "--seeds", "0")
    demo = BY_NAME["Demo"]
    for row, levels in zip(demo.rows[1:3], ((0.4, 0.6), (0.42, 0.64)), strict=True):
        for level, job in zip(levels, plans.jobs_of(demo, row, settings), strict=True):
            fake_run(
                settings, job.spec, forwards=30, loss=0.02, loss_all=0.1, commit="0123456789-dirty", scores={"CLIP-I": level}
            )
    rows = plans.collect(demo, settings)
    differences = report.differences_of(demo, rows)
    assert differences is not None
    ((label, *cells),) = differences.lines
    seen = "+.030 ± .127 (.141 would be seen)"  # 12.706 and 1.376 x .01, of two subjects
    assert label == demo.rows[2].label and cells[differences.header.index("CLIP-I") - 1] == seen
    jobs = plan_of(settings, "Demo")
    report.write_report(["Demo"], jobs, settings, tmp_path / "report")
    text = (tmp_path / "report" / "RESULTS.md").read_text()
    assert differences.markdown() in text and "commit 0123456-dirty;" in text


def test_rates_are_chosen_by_pictures_and_read_from_their_file(tmp_path, capsys):
    """The highest sum of attributes, scenes and accessories decides, not the loss. The file belongs to the weights it names,
    and rows learn at its rates, except those of the grid and at published rates. No subject of the grid is reported on."""
    settings = settings_of(tmp_path, "--tables", "TuningRates")
    grid, path = BY_NAME["TuningRates"], tmp_path / "rates.json"
    best = {system: GRID_FACTORS[system][k % 3] for k, system in enumerate(SYSTEMS)}
    for row in grid.rows:
        for job in plans.jobs_of(grid, row, settings):
            assert job.spec["subject"] in settings.world.grid_subjects
            right = 0.7 if row.rate_factor == best[row.rate_of] else 0.6
            worst = {"attributes": right, "scene": 0.9, "accessory": 0.5, "drift": 0.2}
            fake_run(settings, job.spec, forwards=400, loss=right / 10, scores=worst)
    rates.write_rates(settings, path)
    said, notes = capsys.readouterr(), json.loads(path.read_text())
    start = settings.world.start_rates
    assert notes["chosen"] == {system: float(f"{start[system] * factor:.3g}") for system, factor in best.items()}
    at_edge = {system for system, factor in best.items() if factor in (GRID_FACTORS[system][0], GRID_FACTORS[system][-1])}
    assert set(notes["at_edge"]) == at_edge and "widened" in said.err
    assert len(notes["cells"]) == sum(map(len, GRID_FACTORS.values()))
    assert notes["cells"][0]["sum"] == pytest.approx(0.7 + 0.9 + 0.5)
    assert notes["subjects"] == list(settings.world.grid_subjects) and notes["model"] == settings.model_id

    later = settings_of(tmp_path, "--tables", "1", "--rates", str(path), "--subjects", "furmix", "ronfo")
    assert later.rates == notes["chosen"]
    rows = {row.label: row for row in BY_NAME["1"].rows}
    (job, *_) = plans.jobs_of(BY_NAME["1"], rows["QLoRA"], later)
    assert job.spec["flags"]["learning_rate"] == notes["chosen"]["QLoRA"]
    assert not set(settings.world.subjects) & set(settings.world.grid_subjects)
    published = plans.jobs_of(BY_NAME["1"], rows["QLoRA, published rate"], later)
    assert {job.spec["subject"] for job in published} == {"furmix", "ronfo"}
    assert published[0].spec["flags"]["learning_rate"] == 1e-4
    assert later.rate(grid.rows[GRID_FACTORS["DreamBooth"].index(1)]) == {
        "learning_rate": start["DreamBooth"]
    }  # the grid stays where it is

    path.write_text(json.dumps(notes | dict(model="another")))
    assert settings_of(tmp_path, "--tables", "1", "--rates", str(path)).rates == {}
    assert "was chosen for other weights" in capsys.readouterr().err
    (settings.folder(job.spec) / "result.json").unlink(missing_ok=True)
    (job, *_) = plans.jobs_of(grid, grid.rows[0], settings)
    (settings.folder(job.spec) / "result.json").unlink()
    rates.write_rates(settings, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists() and "none is chosen" in capsys.readouterr().err


@pytest.mark.parametrize("given", [(), ("--quick",), ("--subjects", "furmix"), ("--seeds", "1"), ("--n", "4")])
def test_rates_of_a_trial_do_not_replace_the_project_s(tmp_path, monkeypatch, given):
    """Chosen on reported breeds, with other seeds or other flags, they are for nobody else."""
    written = []
    monkeypatch.setattr(workers, "run_jobs", lambda *rest: [])
    monkeypatch.setattr(report, "write_report", lambda *rest: None)
    monkeypatch.setattr(worlds.Miniature, "prepare", lambda *rest: None)
    monkeypatch.setattr(rates, "write_rates", lambda settings, path: written.append(path))
    tables.main(tables.parse_args(["--tables", "TuningRates", "--output", str(tmp_path), *given]))
    assert written == [tmp_path / rates.FILE.name if given else rates.FILE]


def test_a_table_says_at_which_rates_weights_are_tuned_and_of_which_subjects(tmp_path):
    """As they are in this world and for these weights, not as they usually are."""
    (tmp_path / "none.json").write_text(json.dumps(dict(model="another", chosen={})))
    for flags, words in (((), "chosen by pictures of spare breeds (dixpi, vakvik)"),
                         (("--rates", str(tmp_path / "none.json")), "none has been chosen for these weights"),
                         (("--world", "sd15"), "learns at its published rates")):  # fmt: skip
        settings = settings_of(tmp_path, *flags, "--tables", "S7")
        empty = {row.label: {} for row in BY_NAME["S7"].rows}
        after = report.section_of(BY_NAME["S7"], lambda name, empty=empty: empty, settings, tmp_path).after
        assert [words in note for note in after] == [False, True, False][: len(after)]
        assert ("Subjects of this table: shiny_sneaker." in after) is ("sd15" in flags)
    static = " ".join(experiment.note for experiment in EXPERIMENTS if experiment.name != "TuningRates")
    assert "rates of weight tuning were chosen" not in static and "the grid chose" not in static


def test_the_spread_of_rows_is_theirs_run_by_run(tmp_path):
    """The standard deviation over four rates, for each run; in the claim's sign, what varies more beats what varies less."""
    settings = settings_of(tmp_path, "--tables", "KronA", "--subjects", "furmix", "meppor", "vaxmo")
    experiment = BY_NAME["KronA"]
    for row in sorted(experiment.rows, key=lambda row: "KronA's rate" not in row.label):  # which share runs with the others
        for job in plans.jobs_of(experiment, row, settings):
            if settings.folder(job.spec).exists():
                continue
            wide = 0.1 if row.method == "qlora" else 0.01
            shift = {"furmix": 0, "meppor": 1, "vaxmo": 2}[job.spec["subject"]] / 1000
            score = 0.5 + (wide + shift) * row.rate_factor if row.rate_of == "DiffuseKronA" else 0.5
            fake_run(settings, job.spec, forwards=400, loss=0.1, trained=47872, scores={"CLIP-I": score})
    rows = plans.collect(experiment, settings)
    spread = rows["QLoRA, spread over the four rates"]
    assert "trained" in rows["LoRA r = 2"]["meppor", 0] and "trained" not in spread["meppor", 0]  # which do not spread
    assert {run[0] for run in spread} == {"furmix", "meppor", "vaxmo"}
    assert spread["meppor", 0]["CLIP-I"] == pytest.approx(np.std([0.101 * f for f in (0.2, 0.4, 1.0, 2.0)], ddof=1))
    (claim,) = [claim for claim in CLAIMS if "varies more" in claim.text]
    finding = stats.judge(claim, rows, {})
    assert (finding.score, finding.verdict) == ("CLIP-I", "reproduced") and finding.differences["CLIP-I"][2] == 3
    assert "(the standard deviation of CLIP-I over the rates differs by +.0" in report.sentence(finding, "miniature")
    section = report.section_of(experiment, lambda name: rows, settings, tmp_path)
    assert sum("spread over the four rates" in line[0] for line in section.table.lines) == 2


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
    assert flags["quantization"] == "int8"  # what a row compares takes precedence
    assert "learning_rate" not in runs.make_spec(settings, "gf_ti", "furmix", 0, {})["flags"]  # which has none
    assert tables.parse_args([]).extra == {}


def test_what_is_declared_exists():
    """Claims, plots and gaps name rows, columns and tables that exist."""
    labels = {experiment.name: {row.label for row in report.declared_rows(experiment)} for experiment in EXPERIMENTS}
    for claim in CLAIMS:
        assert {claim.a, claim.b} - {OTHERS} <= labels[claim.experiment] and set(claim.rule.scores) <= set(CLAIM_COLUMNS)
    for experiment in EXPERIMENTS:
        assert set(experiment.columns) <= set(COLUMNS) and set(experiment.worlds) <= set(worlds.WORLDS)
        assert all(row.method in {*runs.METHODS, *runs.UNTRAINED, *runs.RENDERED} for row in experiment.rows)
        assert all(set(row.variation) <= set(variations.VARIATIONS) for row in experiment.rows)
        assert set(experiment.gap or ()) | ({experiment.against} - {None}) <= labels[experiment.name]
        assert experiment.stops in {None, *(row.label for row in experiment.rows)} - labels[experiment.name]
        assert len(labels[experiment.name]) == len(report.declared_rows(experiment))  # no two rows of the same name
        grid = experiment.plot
        if isinstance(grid, plots.HeatMaps):
            cells = {grid.label.format(x=x, y=y) for x in grid.x[1] for y in grid.y[1]}
            assert labels[experiment.name] <= cells and set(grid.scores) <= set(experiment.columns)
        if isinstance(grid, plots.PictureGrid):
            assert set(grid.columns.values()) <= labels[experiment.name] and set(grid.prompts) <= set(worlds.MINIATURE_PROMPTS)
        assert all(row.rate_of in (None, *SYSTEMS) and set(row.spread_of) <= labels[experiment.name] for row in experiment.rows)
        assert {row.against for row in experiment.rows} - {None} <= labels[experiment.name]
        assert experiment.heading.count(":") == 1 and experiment.title.split()[0].strip(":") != experiment.name  # said once
    for points in QUALITY_AND_MEMORY.values():
        for (name, quality_row), cost_row in points.values():
            assert quality_row in labels[name] and cost_row in labels["2"]
    assert set(worlds.Miniature.start_rates) == set(SYSTEMS)


# ----------------------------------------------------------------------------------------------------- statistics


def test_a_spread_keeps_the_order_of_runs():
    """It came from a set, so that results.json differed from process to process."""
    rows = [{(f"breed {k}", 0): {"CLIP-I": k * rate} for k in range(12)} for rate in (1.0, 3.0)]
    found = plans.spread(rows, ["CLIP-I"])
    assert list(found) == list(rows[0])
    # of k and 3 k: 2 k apart, divided by the root of 2
    assert [record["CLIP-I"] for record in found.values()] == pytest.approx([2**0.5 * k for k in range(12)])


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    """A misspelt folder gave a report of no runs, and exit code 0."""
    argv = ["--tables", "S4", "--report_only", "--output", str(tmp_path / "none")]
    with pytest.raises(InputError, match="no run of these tables is finished in .*none"):
        tables.main(tables.parse_args(argv))
    assert not (tmp_path / "none" / "RESULTS.md").exists()
    with pytest.raises(SystemExit):
        tables.parse_args([*argv, "--redraw"])
    assert "--report_only runs nothing" in capsys.readouterr().err


def test_intervals_and_verdicts_by_hand():
    """For one subject the seeds are the units: differences .03, .01, .02, mean .02, standard deviation .01, t(2) = 4.303, half
    width 4.303 * .01 / sqrt(3) = .0248. Of several subjects, each is one unit, whatever its seeds."""
    a = {("x", 0): {"CLIP-I": .53}, ("x", 1): {"CLIP-I": .61}, ("x", 2): {"CLIP-I": .42}, ("y", 1): {"CLIP-I": .9}}  # fmt: skip
    b = {("x", 0): {"CLIP-I": .50}, ("x", 2): {"CLIP-I": .40}, ("x", 1): {"CLIP-I": .60}}  # fmt: skip
    differences = stats.paired_differences(a, b, "CLIP-I")
    assert sorted(differences) == pytest.approx([0.01, 0.02, 0.03])
    mean, half_width = stats.mean_interval(differences)
    assert (mean, half_width) == pytest.approx((0.02, 4.303 * 0.01 / math.sqrt(3)))
    assert stats.paired_differences(a, b | {("y", 1): {"CLIP-I": 0.8}}, "CLIP-I") == pytest.approx([0.02, 0.1])
    # seeds are averaged before rows are paired: for y one row has seed 1, the other seed 7
    assert stats.paired_differences(a, b | {("y", 7): {"CLIP-I": 0.7}}, "CLIP-I") == pytest.approx([0.02, 0.2])
    control = {(stats.NO_SUBJECT, 0): {"CLIP-I": 0.4}}
    assert stats.paired_differences(a, control, "CLIP-I") == pytest.approx([0.12, 0.5])
    assert stats.verdict(mean, half_width) == "no difference found"
    assert stats.verdict(0.02, 0.01) == "reproduced" and stats.verdict(-0.02, 0.01) == "contradicted"
    assert stats.verdict(-0.02, 0.01, margin=0.04) == "reproduced"  # worse, but by less than one would give away
    assert stats.verdict(-0.06, 0.01, margin=0.04) == "contradicted"
    assert stats.verdict(-0.04, 0.01, margin=0.04) == stats.verdict(-0.03, 0.05, margin=0.04) == "not decided"  # holds -.04
    assert stats.verdict(0.02, math.nan) == "too few runs"  # one run proves nothing


def test_a_cell_against_the_best_other():
    """Each subject's rival is the row that is best on the others: for x that is c, by y alone, though b is better on x itself."""
    rows = {"ours": {("x", 0): {"CLIP-I": .9}}, "b": {("x", 0): {"CLIP-I": .8}, ("y", 0): {"CLIP-I": .1}},
            "c": {("x", 0): {"CLIP-I": .5}, ("y", 0): {"CLIP-I": .6}}}  # fmt: skip
    rivals = stats.best_of_others(rows, "ours", "CLIP-I")
    assert rivals == {("x", 0): {"CLIP-I": 0.5}, ("y", 0): {"CLIP-I": 0.1}}
    one = {name: {("x", seed): record for seed, record in enumerate(records.values())} for name, records in rows.items()}
    assert stats.best_of_others(one, "ours", "CLIP-I") == {("x", 0): {"CLIP-I": 0.5}, ("x", 1): {"CLIP-I": 0.1}}  # by seeds
    chosen = stats.best_of_others({"ours": {}, "b": {("x", 0): {"loss": 1.0}, ("y", 0): {"loss": 2.0}},
                                   "c": {("x", 0): {"loss": 3.0}, ("y", 0): {"loss": 1.0}}}, "ours", "loss")  # fmt: skip
    assert chosen["x", 0] == {"loss": 3.0}  # lower is better
    assert stats.best_of_others({"ours": {}, "b": {("x", 0): {"CLIP-I": 1.0}}}, "ours", "CLIP-I") == {}  # nothing to choose on


def test_ranks_with_ties():
    assert stats.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1, 3.5, 2]
    record = curve_of((9, .99, .5), (4, .3, .5), (3, .6, .5), (2, .5, .5), (1, .1, .5))  # fmt: skip
    assert stats.signals({("x", 0): record}, "CLIP-I") == {}  # a score that never changes says nothing about a loss


def test_seeds_beside_subjects():
    """Seeds .1, .3 of one subject and .5, .7 of the other: variances .02 within, means .2 and .6."""
    values = {("x", 0): .1, ("x", 1): .3, ("y", 0): .5, ("y", 1): .7}  # fmt: skip
    records = {run: {"CLIP-I": value} for run, value in values.items()}
    assert stats.spread_of_seeds(records, "CLIP-I") == pytest.approx((math.sqrt(0.02), 0.4 / math.sqrt(2), 4))
    assert stats.spread_of_seeds({run: record for run, record in records.items() if not run[1]}, "CLIP-I") is None


def curve_of(*points: tuple[float, float, float]) -> dict:
    """A record of (loss on the photographs, CLIP-I that chooses, CLIP-I that is scored) at steps 0, 10, 20, ..."""
    return dict(spec={}, curve=[dict(step=10 * k, unet_forwards=30 * k, loss=1.0, training_loss=0.5, eval_loss=loss, token_norm=k,
                                     choosing=choosing, **{"CLIP-I": scored})
                                for k, (loss, choosing, scored) in enumerate(points)])  # fmt: skip


def test_when_to_stop():
    """The loss falls to the end, pictures are best before; what chooses is never what is scored; the start does not count."""
    record = curve_of((9, .99, .99), (4, .3, .5), (3, .6, .55), (2, .5, .7), (1, .1, .2))  # fmt: skip
    rows = stats.stopped({("x", 0): record})
    chosen = {label: records["x", 0]["step"] for label, records in rows.items()}
    assert chosen["stopped at the end"] == 40 and chosen["stopped at the lowest loss on the photographs"] == 40
    assert chosen["stopped where other pictures are best"] == 20 == runs.best_step(record["curve"][1:])
    assert runs.best_step([dict(step=0), dict(step=7)]) == 7  # without a scorer
    assert rows["stopped where other pictures are best"]["x", 0]["CLIP-I"] == 0.55
    assert rows["stopped at the end"]["x", 0]["forwards"] == 120
    # ranks of the loss 3 2 1 0, of CLIP-I 1 2 3 0: correlation 1 - 6 * (4 + 0 + 4 + 0) / (4 * 15) = .2
    assert stats.signals({("x", 0): record}, "CLIP-I")["eval_loss"][0] == pytest.approx(0.2)


def test_likeness_is_from_floor_to_ceiling():
    rows = {"ours": {("x", 0): {"CLIP-I": .5}, ("y", 0): {"CLIP-I": .5}}}  # fmt: skip
    stats.add_likeness(rows, {("x", 0): {"CLIP-I": 0.9}}, {("x", 0): {"CLIP-I": 0.1}})
    assert rows["ours"]["x", 0]["likeness"] == pytest.approx(0.5) and "likeness" not in rows["ours"]["y", 0]


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
    """From .04 to the mean .02 of two seeds: a loss of .025 closes three quarters for one subject; the other has its own ends."""
    rows = {"start": {("x", 0): {"loss": .04}, ("y", 0): {"loss": .08}},
            "end": {("x", 0): {"loss": .019}, ("x", 1): {"loss": .021}},
            "ours": {("x", 0): {"loss": .025}, ("y", 0): {"loss": .05}}}  # fmt: skip
    stats.add_gaps(rows.values(), rows["start"], rows["end"])
    assert rows["ours"]["x", 0]["gap_closed"] == pytest.approx(0.75) and rows["start"]["x", 0]["gap_closed"] == 0
    assert "gap_closed" not in rows["ours"]["y", 0]  # its other end is unknown


def fake_run(settings, spec, **result) -> None:
    folder = settings.folder(spec)
    folder.mkdir(parents=True)
    curve = [dict(step=0, unet_forwards=0, loss=0.04), dict(step=10, unet_forwards=result["forwards"], loss=result["loss"])]
    measured = result.pop("scores")
    of_run = dict(spec=spec, stored_bytes=3000, seconds=60, steps_per_second=1.0, step=10, curve=curve, commit="c0ffee",
                  removed=[])  # fmt: skip
    workers.write_json(folder / "result.json", of_run | result)
    workers.write_json(runs.scores_path(folder, settings, "scores"), dict(scores=measured))


def fake_table_s4(settings) -> None:
    """Two subjects x two seeds per row, with known figures."""
    level = {"RGE": 0.50, "SPSA": 0.45, "one-point": 0.52, "one-point, the sign as printed": 0.1}
    for row in BY_NAME["S4"].rows:
        for k, job in enumerate(plans.jobs_of(BY_NAME["S4"], row, settings)):
            forwards = 40 if row.label == "SPSA" else 30
            wobble = 0.002 * k if row.label == "RGE" else 0
            fake_run(settings, job.spec, forwards=forwards, loss=.02, loss_all=.1,
                     scores={"CLIP-T": .3, "CLIP-I": level[row.label] + .1 * k + wobble})  # fmt: skip


RGE_CLAIM = next(claim for claim in CLAIMS if claim.a == "RGE")
SG_CLAIM = CLAIMS[0]


def test_a_table_and_its_claims_from_files(tmp_path):
    """Means, the interval of the paired difference, equal forwards, published figures, one line of plain English."""
    settings = settings_of(tmp_path, "--subjects", "furmix", "meppor", "--seeds", "0", "1")
    fake_table_s4(settings)
    rows = plans.collect(BY_NAME["S4"], settings)
    assert [record["loss_at"] for record in rows["SPSA"].values()] == pytest.approx([0.025] * 4)  # of 40 forwards the first 30
    assert [record["loss_path"] for record in rows["SPSA"].values()] == pytest.approx([(0.04 + 0.025) / 2] * 4)
    finding = stats.judge(RGE_CLAIM, rows, {})
    assert finding.differences["loss_path"][0] == pytest.approx((0.04 + 0.02) / 2 - (0.04 + 0.025) / 2)
    mean, half_width, pairs = finding.differences["CLIP-I"]
    # .05 + (0, .002) of one subject, + (.004, .006) of the other: means .051, .055, deviation .004 / sqrt(2), t(1) = 12.706
    assert (mean, pairs) == (pytest.approx(0.053), 2)
    assert half_width == pytest.approx(12.706 * 0.004 / 2)
    assert finding.verdict == "reproduced" and finding.published["CLIP-I"] == pytest.approx(0.759 - 0.732)
    assert "removed" not in finding.differences  # of runs without a refresh
    line = "Of two directions, RGE beats SPSA at equal steps (CLIP-I differs by +.053 ± .025 over 2 subjects, 2 of them above 0; "
    line += "an interval of one degree of freedom; "
    assert report.sentence(finding, "sd15") == f"**reproduced**: {line}the paper's +.027 is outside this interval)."
    assert report.sentence(finding, "miniature") == f"**reproduced**: {line}the paper: +.027)."  # another CLIP, other pictures
    beaten = stats.judge(next(claim for claim in CLAIMS if claim.a == "SPSA"), rows, {})
    assert beaten.verdict == "contradicted"  # SPSA - one-point = -.07
    assert report.sentence(beaten, "sd15").startswith(
        "**contradicted**: Of two directions, SPSA beats the one-point estimate (CLIP-I differs by -.070"
    )
    line = report.claims_table([finding]).lines[-1]
    assert line[:2] == [f"{RGE_CLAIM.text} (Table S4: RGE - SPSA)", "reproduced"]
    assert "**+.053 ± .025 (published +.027)**" in line
    table = report.table_of(BY_NAME["S4"], rows)
    (spsa,) = [line for line in table.lines if line[0] == "SPSA"]
    assert spsa[1] == "4" and spsa[table.header.index("CLIP-T")] == ".300 (published .277)"
    assert "DINO" not in table.header and spsa[table.header.index("forwards")] == "40"
    assert stats.judge(SG_CLAIM, {}, {}) is None
    report.write_report(["3", "S4"], plan_of(settings, "3", "S4"), settings, tmp_path / "report")
    lines = (tmp_path / "report" / "RESULTS.md").read_text().splitlines()
    assert f"- **not judged**, for lack of runs: {SG_CLAIM.text}." in lines


@pytest.mark.parametrize("theirs, said", [(22_000.0, "reproduced"), (1.0, "contradicted")])
def test_a_smaller_file_is_better(theirs, said):
    (claim,) = [claim for claim in CLAIMS if claim.text == "ZOODiP stores less than DreamBooth"]
    rows = {label: {("furmix", turn): dict(stored_kb=value) for turn in range(5)}
            for label, value in ((claim.a, 2.2), (claim.b, theirs))}  # fmt: skip
    assert stats.judge(claim, rows, {}).verdict == said


def test_what_would_have_been_found_stands_beside_nothing_found():
    effect = 0.008 * (1 + 0.876 / 2.201)  # t(11) at 80 % and 97.5 %
    known = f"{effect:.3f}".replace("0.", ".")
    in_it = "in this interval, but too small to be seen with these runs"
    for published, where in ((0.015, "outside this interval"), (0.002, in_it)):
        finding = stats.Finding(SG_CLAIM, "CLIP-I", stats.verdict(0.003, 0.008), None, {"CLIP-I": (0.003, 0.008, 12)},
                                {"CLIP-I": published}, above=7)  # fmt: skip
        assert report.sentence(finding, "sd15") == (
            f"**no difference found; one larger than {known} would probably have shown**: {SG_CLAIM.text}? "
            f"(CLIP-I differs by +.003 ± .008 over 12 subjects, 7 of them "
            f"above 0; the paper's +{published:.3f} is {where}).".replace("+0.", "+.")
        )
    assert report.difference(finding, "CLIP-I") == f"**+.003 ± .008, {known} would be seen (published +.002)**"


@pytest.mark.parametrize("t, freedom, p", [(12.706, 1, 0.05), (2.201, 11, 0.05), (3.106, 11, 0.01), (0.0, 11, 1.0)])
def test_p_values_are_student_s(t, freedom, p):
    """Printed tables of t, which have four digits."""
    half_width = stats.quantile(stats.T_975, 1.960, freedom)  # of a mean with standard error 1
    assert stats.p_value(t, half_width, freedom + 1) == pytest.approx(p, rel=1e-3)
    assert stats.p_value(-t, half_width, freedom + 1) == stats.p_value(t, half_width, freedom + 1)


def test_holm_s_correction_by_hand():
    """.01 < .05 / 4 and .015 < .05 / 3, .03 > .05 / 2: from there on nothing is significant, not even .04."""
    assert stats.survivors([0.03, 0.01, 0.04, 0.015]) == [False, True, False, True]
    assert stats.survivors([0.001] * 3) == [True] * 3 and stats.survivors([]) == []
    finding = stats.Finding(SG_CLAIM, "CLIP-I", "reproduced", None, {"CLIP-I": (0.010, 0.009, 12)}, {})
    sure = replace(finding, differences={"CLIP-I": (0.010, 0.002, 12)})
    assert "1 of the 1 decided verdicts" in report.several_note([sure])
    others = [
        replace(finding, claim=claim, differences={"CLIP-I": (0.010 + 0.0001 * k, 0.009, 12)})
        for k, claim in enumerate(CLAIMS[1:4])
    ]
    said = report.several_note([sure, *others])
    assert f"1 of the 4 decided verdicts would still be significant; not: {CLAIMS[1].text};" in said
    again = replace(others[0], claim=CLAIMS[5])
    assert report.same_runs([sure, *others, again]) == {CLAIMS[5].text: CLAIMS[1].text}
    assert report.several_note([sure, *others, again]) == said  # counted once
    nothing = replace(finding, verdict="no difference found", differences={"CLIP-I": (0.001, 0.009, 12)})
    assert "Holm" not in report.several_note([nothing])


def test_the_paper_s_speed_is_not_compared_with_this_machine_s():
    """Nor is another CLIP's score of other pictures (above), and a figure for another setting says so."""
    (claim,) = [claim for claim in CLAIMS if claim.a == "ZOODiP, INT8, n = 2" and claim.b == "GF-TI, INT8"]
    score = claim.rule.scores[0]
    finding = stats.Finding(claim, score, "reproduced", None, {score: (9.0, 1.0, 5)}, {score: 15.36}, "rounds")
    for world in ("miniature", "sd15"):
        assert "; the paper: +15.36). The paper's GF-TI takes 30 forwards" in report.sentence(finding, world)
    for name, label, score in (("2", "GF-TI, INT8", "steps_per_second"), ("S9", "GF-TI", "DINO_inter")):
        (line,) = [line for line in report.table_of(BY_NAME[name], {label: {("x", 0): {score: 1.0}}}).lines if line[0] == label]
        assert any(cell.endswith(", for 30 forwards a step)") for cell in line)


def test_pairs_of_two_machines_are_counted():
    """By subject or, for a single one, by seed; a score that was made elsewhere counts as the run does."""

    def records(*machines: str, subjects=("x", "y", "z")) -> dict:
        return {(subject, 0): {"CLIP-I": 0.5, "machines": list(names)} for subject, names in zip(subjects, machines, strict=True)}

    a, b = records("p", "p", "p"), records("p", "q", "pq")
    assert stats.mixed_pairs(a, b, "CLIP-I") == 2 and stats.mixed_pairs(a, b, "DINO") == 0
    one = {("x", seed): {"CLIP-I": 0.5, "machines": [name]} for seed, name in enumerate("pq")}
    assert stats.mixed_pairs(one, {run: record | {"machines": ["p"]} for run, record in one.items()}, "CLIP-I") == 1
    assert stats.mixed_pairs(a, {(stats.NO_SUBJECT, 0): {"CLIP-I": 0.5}}, "CLIP-I") == 0
    finding = stats.judge(SG_CLAIM, {"SG and PUTS": a, "PUTS": b}, {})
    assert "; 2 of 3 pairs were made on two machines)." in report.sentence(finding, "miniature")
    assert "machines" not in report.figures_of(a["x", 0])


def test_the_reason_of_a_rule_stands_alone():
    """A report may have one claim only; and no rule gives a reason that is not its claim's."""
    reasons = {claim.text: claim.rule.why for claim in CLAIMS}
    assert all(why.startswith("the claim is ") for why in reasons.values())
    assert "backward" not in reasons["Two directions are as good as eight"]


def test_claims_on_memory(tmp_path):
    """Less is less, with the ratio; what the record lacks is not reported."""
    held = {"ZOODiP, INT8": 2.0, "gradient TI, fp32": 8.0, "QLoRA, NF4": 1.6}
    systems = {name: dict(nvidia_smi=int(value * 1e9)) for name, value in held.items()}
    (tmp_path / "gpu.json").write_text(json.dumps(dict(results=dict(systems=systems))))
    first, second = memory_claims.memory_claims(tmp_path / "gpu.json")
    assert (
        first.startswith("**reproduced**: ")
        and "gradient TI, fp32 (2.00 GB of 8.00, 0.25; the paper's 2.37 of 6.75, 0.35)" in first
    )
    assert second.startswith("**contradicted**: ") and "QLoRA" in second
    assert len(memory_claims.memory_claims()) == 5  # of the record


def test_every_claim_has_one_line_whatever_comes_out():
    """Reproduced, contradicted or no difference found, with what would have shown, or yes and no to questions of our own."""
    for claim in CLAIMS:
        for mean, width in ((0.5, 0.1), (-0.5, 0.1), (0.0, 0.5)):
            score = claim.rule.scores[0]
            advantage = -mean if COLUMNS[score].lower_is_better else mean
            said = stats.verdict(advantage, width, claim.rule.margin)
            line = report.sentence(stats.Finding(claim, score, said, claim.rule.margin, {score: (mean, width, 12)}, {}), "sd15")
            decided = "yes|no" if claim.source == OURS else "reproduced|contradicted"
            nothing = r"no difference found; one larger than \.?\d+\.?\d* would probably have shown"
            assert re.match(rf"\*\*({decided}|not decided|{nothing})\*\*: [A-Z\[tm]", line)
            assert claim.text in line and "\n" not in line


def test_a_run_of_an_archive_is_done_again_where_something_is_to_be_drawn_that_it_lacks(tmp_path):
    """It lacks snapshots for pictures along the way and, as tuned weights are too large for an archive, those for any picture."""
    settings = settings_of(tmp_path)
    for seed, (method, kind, lacking) in enumerate(
        (("zoodip", "along", True), ("zoodip", "scores", True), ("qlora", "scores", True))
    ):
        job = runs.Job(runs.make_spec(settings, method, "furmix", seed, {}), {kind})
        fake_run(settings, job.spec, forwards=30, loss=0.02, scores={})
        assert workers.lacks_what_to_draw(job, settings) is lacking
        if method == "zoodip":
            runs.learned_path(job.spec, settings).write_bytes(b"")
            assert workers.lacks_what_to_draw(job, settings) is (kind == "along")
    job = runs.Job(runs.make_spec(settings, "zoodip", "furmix", 0, {}), {"along"})
    for step in judging.snapshot_steps(job.spec["flags"]["max_train_steps"])[:-1]:
        (settings.folder(job.spec) / f"learned_embeds-steps-{step}.safetensors").write_bytes(b"")
    assert not workers.lacks_what_to_draw(job, settings)
    assert not workers.lacks_what_to_draw(runs.Job(job.spec, set()), settings)


def test_a_run_that_lacks_scores_is_archived(tmp_path):
    """Other tables may have all that they need of it; the report's row has it too."""
    settings = settings_of(tmp_path, "--tables", "Demo", "--subjects", "furmix", "--seeds", "0")
    demo = BY_NAME["Demo"]
    job = plans.jobs_of(demo, demo.rows[1], settings)[0]
    fake_run(settings, job.spec, forwards=30, loss=0.02, loss_all=0.1, scores={})
    runs.scores_path(settings.folder(job.spec), settings, "scores").unlink()
    assert job.learned(settings) and not job.done(settings)
    archives.pack_runs(plan_of(settings, "Demo"), settings, tmp_path / archives.ARCHIVE)
    archives.unpack_runs(tmp_path / archives.ARCHIVE, tmp_path / "again")
    files = [path.relative_to(tmp_path / "again" / "runs") for path in (tmp_path / "again").rglob("*.*")]
    assert {str(path.parent) for path in files} == {runs.digest(job.spec)}  # and no run that has not learned
    assert (tmp_path / "again" / "runs" / runs.digest(job.spec) / "result.json").exists()


def test_a_run_of_an_archive_that_is_stopped_while_it_is_learned_again_is_not_scored_as_it_stands(tmp_path):
    """Its weights are there under their last name by then, and so is the result that the archive held."""
    settings = settings_of(tmp_path)
    job = runs.Job(runs.make_spec(settings, "qlora", "furmix", 0, {}), {"scores", "inter"})
    fake_run(settings, job.spec, forwards=400, loss=0.02, scores={})
    runs.learned_path(job.spec, settings).write_bytes(b"half of the way")
    assert not workers.lacks_what_to_draw(job, settings) and not workers.stopped_on_the_way(job, settings)
    (settings.folder(job.spec) / "checkpoint-10.safetensors").write_bytes(b"")
    assert workers.stopped_on_the_way(job, settings)
    learned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "open_judge", lambda spec, settings: SimpleNamespace(result=lambda run: {}, score=lambda kind: 0))
        patch.setattr(workers, "learn", lambda spec, settings: learned.append(spec))
        patch.setattr(workers, "seen_at_refreshes", lambda folder, tau: {})
        workers.do(job, settings)
    assert learned == [job.spec] and not workers.stopped_on_the_way(job, settings)


def test_a_run_that_is_learned_again_loses_the_scores_of_its_old_weights(tmp_path, monkeypatch):
    """Nor does the archive bring them back, as they are not of the new result; and a new report has the new run alone."""
    settings, path = settings_of(tmp_path), tmp_path / archives.ARCHIVE
    job = runs.Job(runs.make_spec(settings, "zoodip", "furmix", 0, {}), {"along"})  # whose snapshots the archive lacks
    fake_run(settings, job.spec, forwards=30, loss=0.02, scores={"CLIP-I": 0.9})
    old = runs.scores_path(settings.folder(job.spec), settings, "scores")
    archives.pack_runs([job], settings, path)
    monkeypatch.setattr(
        workers, "open_judge", lambda *_: SimpleNamespace(result=lambda run: {"loss": 0.01}, score=lambda kind: 0)
    )
    monkeypatch.setattr(workers, "learn", lambda spec, settings: {})
    workers.do(job, settings)
    assert result_of(settings, job.spec)["loss"] == 0.01 and not old.exists()
    archives.unpack_runs(path, settings.output)
    assert not old.exists()
    archives.pack_runs([job], settings, path)
    assert set(archives.read_archive(path)[runs.digest(job.spec)]) == {"spec.json", "result.json"}


def test_a_record_names_all_machines_that_made_it(tmp_path):
    """A run may be scored elsewhere than it was learned."""
    settings = settings_of(tmp_path, "--tables", "5", "--subjects", "furmix", "--seeds", "0")
    jobs = plan_of(settings, "5")
    made = dict(device="a CPU", versions=dict(torch="2"))
    fake_run(settings, jobs[0].spec, forwards=3, loss=0.1, scores={"CLIP-I": 0.5}, **made)
    assert runs.read_run(jobs[0].spec, settings)["machines"] == [json.dumps(["a CPU", dict(torch="2")])]
    path = runs.scores_path(settings.folder(jobs[0].spec), settings, "scores")
    path.write_text(json.dumps(json.loads(path.read_text()) | made | dict(device="a GPU")))
    assert len(runs.read_run(jobs[0].spec, settings)["machines"]) == 2
    assert " on a CPU and a GPU, commit" in report.introduction(["5"], settings, jobs, 1).paragraphs[0]


def test_rounds_of_several_machines_are_told(tmp_path):
    settings = settings_of(tmp_path)
    for name in ("2", "S10"):
        row = next(row for row in BY_NAME[name].rows if row.method == "ti")
        cost = plans.jobs_of if name == "2" else plans.cost_jobs
        for k, job in enumerate(cost(BY_NAME[name], row, settings)[:2]):
            assert report.machines_note(BY_NAME[name], settings) == ""
            fake_run(settings, job.spec, forwards=3, loss=0.1, scores={}, device=f"GPU {k}", versions={})
        assert "measured on 2 machines (GPU 0, GPU 1)" in report.machines_note(BY_NAME[name], settings)


def test_a_report_of_some_tables_leaves_the_others(tmp_path):
    """Their runs and the snapshots of shared ones stay in the archive, byte for byte; a sheet goes only with its own table."""
    argv = ["--tables", "3", "5", "--subjects", "furmix", "meppor", "--seeds", "0"]
    settings, folder = settings_of(tmp_path, *argv), tmp_path / "report"
    (folder / "sheets").mkdir(parents=True)
    jobs = plan_of(settings, "3", "5")
    for job in jobs:
        fake_run(settings, job.spec, forwards=3, loss=0.1, loss_all=0.1, scores={"CLIP-I": 0.5})
        for name in ("learned_embeds", "learned_embeds-steps-125"):
            (settings.folder(job.spec) / f"{name}.safetensors").write_bytes(job.spec["subject"].encode())
        job.kinds.add("along")
    archives.pack_runs(jobs, settings, folder / archives.ARCHIVE)
    before = (folder / archives.ARCHIVE).read_bytes()
    assert sum(name.startswith("learned_embeds-steps") for run in archives.read_archive(folder / archives.ARCHIVE).values()
               for name in run) == len(jobs)  # fmt: skip
    for name in ("three", "five", "both", "older"):
        (folder / "sheets" / f"{name}.jpg").touch()
    (folder / "RESULTS.md").write_text("# Results\n\n## Table 3: x\n\n[a](sheets/three.jpg); [S1 \\[b)](sheets/both.jpg)\n\n"
                                       "## Table 5: y\n\n[c](sheets/five.jpg); [d](sheets/both.jpg)\n")  # fmt: skip
    for name in ("3", "5"):  # the second is another machine's, from the archive alone
        tables.main(tables.parse_args(["--tables", name, *argv[3:], "--report_only", "--output", str(tmp_path / name),
                                       "--report", str(folder)]))  # fmt: skip
        assert (folder / archives.ARCHIVE).read_bytes() == before
        assert {path.stem for path in (folder / "sheets").iterdir()} == {"five", "both", "older"}


def test_a_sheet_is_not_replaced_by_one_of_fewer_subjects(tmp_path, monkeypatch):
    """Nor a sheet that is there forgotten, if none of its pictures is on this machine."""
    settings, drawn = settings_of(tmp_path, "--subjects", "furmix", "meppor"), Image.new("RGB", (8, 8))
    for subject in settings.subjects:
        (settings.world.data / subject).mkdir(parents=True)
        drawn.save(settings.world.data / subject / "00.png")
    there = {"furmix", "meppor"}
    monkeypatch.setattr(plots, "picture_of",
                        lambda spec, *_: settings.world.data / spec / "00.png" if spec in there else None)  # fmt: skip
    records, sheet = {(subject, 0): dict(spec=subject) for subject in settings.subjects}, tmp_path / "sheet.jpg"
    assert plots.row_sheet(records, settings, "scores", sheet)
    whole = sheet.read_bytes()
    for _ in range(2):
        there.pop()
        assert plots.row_sheet(records, settings, "scores", sheet) and sheet.read_bytes() == whole
    sheet.unlink()
    assert not plots.row_sheet(records, settings, "scores", sheet)


def test_a_report_is_made_again_from_what_it_keeps(tmp_path):
    """The packed runs hold all that tables, statistics, plots and pages are made of, and the same runs give the same bytes; from
    a stranger's archive only files with such names are written."""
    settings = settings_of(tmp_path / "first", "--subjects", "furmix", "meppor", "--seeds", "0", "1")
    fake_table_s4(settings)
    jobs = plan_of(settings, "S4")
    for name in ("a", "b"):
        report.write_report(["S4"], jobs, settings, tmp_path / name)
    kept = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert {path.name for path in kept} == {"RESULTS.md", "RESULTS.html", "results.json", archives.ARCHIVE, "curves.png"}
    before = {path: (tmp_path / "a" / path).read_bytes() for path in kept}
    assert before == {path: (tmp_path / "b" / path).read_bytes() for path in kept}
    argv = ["--tables", "S4", "--subjects", "furmix", "meppor", "--seeds", "0", "1", "--report_only", "--output",
            str(tmp_path / "second"), "--report", str(tmp_path / "a")]  # fmt: skip
    assert len(json.loads(before[Path("results.json")])["S4"]["RGE"]) == 4
    for path in kept - {Path(archives.ARCHIVE)}:
        (tmp_path / "a" / path).unlink()
    tables.main(tables.parse_args(argv))
    assert before == {path: (tmp_path / "a" / path).read_bytes() for path in kept}
    with tarfile.open(tmp_path / "evil.tar.xz", "w:xz") as archive:
        for name in ("../evil", "/tmp/evil", "0123456789ab/evil.json", "0123456789ab/result.json/../../evil",
                     "0123456789ab/learned_embeds-steps-../evil.safetensors"):  # fmt: skip
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    archives.unpack_runs(tmp_path / "evil.tar.xz", tmp_path / "third")
    assert not (tmp_path / "third").exists() and not list(tmp_path.rglob("evil*json"))
    (tmp_path / "a" / archives.ARCHIVE).write_bytes(before[Path(archives.ARCHIVE)][:-40])
    with pytest.raises(InputError, match="not a valid archive of runs"):
        tables.main(tables.parse_args(argv))


class PageReader(HTMLParser):
    """Tags that are not closed, pictures, and the text of a page."""

    def __init__(self):
        super().__init__()
        self.open, self.pictures, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        elif tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_both_pages_say_the_same(tmp_path):
    """The HTML page is whole, its pictures are there, markup in a text is text, and every cell of the Markdown is on it."""
    section = pages.Section(
        "Table <1> & 2", ["a **bold** `x < y` <script>"], ["one", "two"], pages.Table(["", "b"], [["c", "d*"]]), ["after"],
        ["three"], pages.Table(["e"], [["f"]]), [pages.Image("plot", "plots/a.png")],
        [pages.Image("row [0, 250)", "sheets/b.jpg")],
    )  # fmt: skip
    text = pages.render("results.md", "Results: x", [pages.Section("", ["first"]), section]).decode()
    paragraphs = ["# Results: x", "first", "## Table <1> & 2", "a **bold** `x < y` <script>", "- one\n- two",
                  "|  | b |\n|---|---|\n| c | d* |", "after", "- three", "| e |\n|---|\n| f |", "![plot](plots/a.png)",
                  "Pictures: [row \\[0, 250)](sheets/b.jpg)"]  # fmt: skip
    assert text == "\n\n".join(paragraphs) + "\n"
    page = pages.render("results.html", "Results: x", [pages.Section("", ["first"]), section]).decode()
    reader = PageReader()
    reader.feed(page)
    assert reader.open == [] and reader.pictures == ["plots/a.png", "sheets/b.jpg"]
    words = " ".join(" ".join(reader.words).split())
    for part in ("first", "Table <1> & 2", "bold x < y <script>", "one", "two", "c d*", "after", "three", "e f",
                 "Pictures: row [0, 250)"):  # fmt: skip
        assert part in words
    assert "<strong>bold</strong> <code>x &lt; y</code> &lt;script&gt;" in page


def test_a_missing_score_is_made_up_for_later(tmp_path):
    """DINO was not available, so its scores are missing; once it is, the run is scored again, and not before."""
    settings = settings_of(tmp_path, "--dino", "somewhere/dino")
    job = plans.jobs_of(BY_NAME["5"], BY_NAME["5"].rows[0], settings)[0]
    fake_run(settings, job.spec, forwards=3, loss=0.1, scores={"CLIP-I": 0.5})
    settings.missing = {"somewhere/dino"}
    assert job.done(settings)
    settings.missing = set()
    assert not job.done(settings)


def test_removed_share_of_controls():
    """A random walk's columns have a spectrum like 1 / k^2, whose tail carries more than 1e-3 up to nearly its end."""
    walk = controls.control_removed("walk", 43, 1e-3, 256, 5)
    assert len(walk) == 5 and all(count / 43 < 0.1 for count in walk)
    noise = controls.control_removed("noise", 43, 1e-3, 256, 8)
    for variation in ("half_adam", "momentum"):
        assert controls.control_removed("noise", 43, 1e-3, 256, 8, variation=(variation,)) != noise
    assert len(noise) == 8 and all(0.3 < count / 43 < 1 for count in noise)  # momentum smooths the walk


# ----------------------------------------------------------------------------------------------------- runs


class TinyWorld(worlds.World):
    """The tiny model on the pictures of the tests: a world takes no more than these lines."""

    name, width, subjects, images, inference_steps, guidance = "tiny", 32, ("dog6",), 1, 2, 5.0
    scheduler = "dpmsolver++"
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
        self.other_captions = output / "other_cc.json"
        self.write_other_captions()

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
    """A run of the suite leaves, byte for byte, the file that the method's command line leaves, and is judged."""
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
    assert result.get("v_zero") == (0 if method == "zoodip" else None)  # in fp32 no square of a slope is
    assert ("momentum_removed" in result) is (method == "zoodip") and 0 <= result.get("momentum_removed", 0) < 1
    assert all(point["eval_loss"] > 0 for point in result["curve"]) and result["curve"][0]["training_loss"] is None
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
    drawn = {kind: len(list(runs.pictures_path(folder, settings, kind).iterdir())) for kind in ("scores", "inter")}
    assert drawn == {"scores": 2 + 2, "inter": 2}  # of the words and of the class word; of one prompt
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
    shutil.rmtree(runs.pictures_path(folder, settings, "inter"))
    again = replace(settings, redraw=True)
    assert job.to_score(again) == ["inter"]
    (folder / "kept").mkdir()
    runs.learned_path(spec, settings).rename(folder / "kept" / "x")  # an archive has no tuned weights, so nothing draws
    assert job.to_score(again) == []


def test_a_worker_tunes_no_model_twice(tiny_settings):
    """Equal runs that the same process judges one after the other stay equal: what they share is not tuned."""
    results = []
    for seed in (0, 1, 0):
        spec = runs.make_spec(tiny_settings, "qlora", "dog6", seed, dict(learning_rate=1e-2))
        (tiny_settings.folder(spec) / "result.json").unlink(missing_ok=True)
        workers.do(runs.Job(spec, set()), tiny_settings)
        results.append(result_of(tiny_settings, spec)["loss_all"])
    assert results[0] == results[2] != results[1]


def test_an_interrupted_run_continues(tiny_settings):
    """Ctrl-C within a run, then the same again: token and curve are those of an uninterrupted run; a run that lacks only
    its judging is only judged."""
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


def test_a_new_method_is_one_line(tiny_settings):
    """Gauss-Newton's is a line of METHODS; its steps follow from the forwards that it is given."""
    spec = runs.make_spec(tiny_settings, "gauss_newton", "dog6", 0, {})
    workers.do(runs.Job(spec, {"scores"}), tiny_settings)
    result = result_of(tiny_settings, spec)
    assert result["forwards"] == 20 and [point["step"] for point in result["curve"]] == [0, 1, 2, 3, 4]


def test_pictures_along_a_run_and_the_best_of_them(tiny_settings, monkeypatch):
    """Every snapshot is drawn and scored in two sets; the token that the first set chooses is scored like a final one; what was
    scored can be drawn again from the tokens alone, and keeps its scores."""
    spec = runs.make_spec(tiny_settings, "zoodip", "dog6", 0, {"max_train_steps": 3})
    job, folder = runs.Job(spec, {"along", "best", "scores"}), tiny_settings.folder(spec)
    workers.do(job, tiny_settings)
    last, best = (runs.read_run(spec, tiny_settings, at) for at in ("last", "best"))
    assert [point["step"] for point in last["curve"] if "CLIP-I" in point] == [0, 1, 2, 3]
    assert best["step"] == max(last["curve"], key=lambda point: point["choosing"])["step"] and last["step"] == 3
    point = best["curve"][best["step"]]
    assert (best["forwards"], best["loss"]) == (point["unet_forwards"], point["loss"])
    assert (best["CLIP-I"] == last["CLIP-I"]) is (best["step"] == 3)
    along = runs.pictures_path(folder, tiny_settings, "along")
    assert len(list(along.iterdir())) == 4 * 2  # snapshots and sets, of one prompt in three
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    assert job.done(tiny_settings)
    shutil.rmtree(along)
    assert job.done(tiny_settings)
    again = replace(tiny_settings, redraw=True)
    assert job.to_score(again) == ["along"]
    workers.do(job, again)
    assert len(list(along.iterdir())) == 4 * 2 and {path: path.read_bytes() for path in folder.glob("*.json")} == before


def test_true_pictures_are_the_scale(tmp_path):
    """On a subject's own renders nearly all attributes are read right, and CLIP-I is higher than on the others'."""
    settings = settings_of(tmp_path, "--subjects", "furmix")
    settings.world.prepare(["furmix"])
    found = {}
    for row in BY_NAME["Scale"].rows:
        (job,) = plans.jobs_of(BY_NAME["Scale"], row, settings)
        workers.do(job, settings)
        assert job.done(settings)
        found[row.method] = runs.read_run(job.spec, settings)
    own, others = found["renders"], found["other_renders"]
    assert own["CLIP-I"] > others["CLIP-I"] + 0.1
    assert own["attributes"] > 0.9 > 0.6 > others["attributes"] > 0.1
    # unbiased if the classifier errs here as often as on other renders; 28 pictures x 7 attributes, a few of them wrong
    assert own["attributes_corrected"] == pytest.approx(1, abs=0.06)
    assert own["scene"] == own["accessory"] == 1


def test_classifier_errors_are_taken_out(tmp_path):
    """Half of the renders are of other animals: the corrected share is that of the attributes that they truly have. .03: of 280
    renders x 7 attributes the classifier misreads some 3 %, which has a standard error of .004, and its rates have another."""
    from miniature.critters import random_critter
    from miniature.drawing import render
    from miniature.world import scene_spec

    rng, breed = np.random.default_rng(0), worlds.breed_by_name("furmix")
    pictures, true = {}, []
    names = [name for name in worlds.ATTRIBUTES if not (name == "pattern_colour" and breed.critter.pattern == "plain")]
    for prompt, (kind, wanted) in worlds.MINIATURE_PROMPTS.items():
        animals = [breed.critter if k % 2 else random_critter(rng) for k in range(20)]
        specs = [scene_spec(animal, wanted if kind == "scene" else "grass", wanted if kind == "accessory" else "nothing", rng=rng)
                 for animal in animals]  # fmt: skip
        pictures[prompt] = [render(spec, size=64) for spec in specs]
        true += [getattr(animal, name) == getattr(breed.critter, name) for animal in animals for name in names]
    read = settings_of(tmp_path).world.picture_scores(pictures, "furmix")
    assert read["attributes_corrected"] == pytest.approx(np.mean(true), abs=0.03)


# ----------------------------------------------------------------------------------------------------- variations


def test_half_precision_adam_is_the_recurrence():
    """Against numpy's fp16, operation by operation; while gradients are below 5.4e-3 v is 0, and the update is momentum at the
    rate lr / epsilon. 1e-3: a tie may be rounded the other way, and fp16 has 11 bits."""
    theta = torch.nn.Parameter(torch.zeros(4))
    adam = variations.HalfPrecisionAdam([theta], lr=1e-2, betas=(0.9, 0.999), eps=1e-3)
    adam.state[theta] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros(4), exp_avg_sq=torch.zeros(4))
    mean, square, expected = np.zeros(4, np.float16), np.zeros(4, np.float16), np.zeros(4)
    for step in range(1, 40):
        gradient = torch.tensor([1e-3, -5e-3, 2e-2, 0.5]) * math.cos(step)
        theta.grad = gradient.clone()
        adam.step()
        g = gradient.half().numpy().astype(np.float32)
        mean = (mean.astype(np.float32) + (g - mean.astype(np.float32)) * np.float32(0.1)).astype(np.float16)
        square = (square.astype(np.float32) * np.float32(0.999)).astype(np.float16)
        square = (square.astype(np.float32) + np.float32(0.001) * g * g).astype(np.float16)
        root = (np.sqrt(square.astype(np.float32)) / (1 - 0.999**step) ** 0.5).astype(np.float16)
        denominator = (root.astype(np.float32) + np.float32(1e-3)).astype(np.float16)
        expected -= 1e-2 / (1 - 0.9**step) * mean.astype(float) / denominator.astype(float)
    moments = adam.state[theta]
    assert torch.equal(moments["exp_avg"], moments["exp_avg"].half().float())
    np.testing.assert_allclose(moments["exp_avg_sq"], square, rtol=1e-3)
    np.testing.assert_allclose(theta.detach(), expected, rtol=1e-3, atol=1e-5)
    assert (moments["exp_avg_sq"][:2] == 0).all() and (moments["exp_avg_sq"][2:] > 0).all()


def test_without_rounding_it_is_torch_s_adam(monkeypatch):
    monkeypatch.setattr(variations, "rounded", lambda tensor: tensor)
    ours, theirs = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    adam = variations.HalfPrecisionAdam([ours], lr=1e-2, betas=(0.9, 0.999), eps=1e-3)
    adam.state[ours] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros(4), exp_avg_sq=torch.zeros(4))
    reference = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-3)
    for step in range(50):
        ours.grad, theirs.grad = (torch.tensor([1e-3, -5e-3, 2e-2, 0.5]) * math.sin(step) for _ in range(2))
        adam.step(), reference.step()
    assert torch.allclose(ours, theirs, rtol=1e-5)  # another order of operations


def test_momentum_descent_is_adam_whose_epsilon_hides_v():
    """torch's Adam with an epsilon a million times larger than sqrt(v), and a learning rate larger by as much."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    adam = variations.MomentumDescent([ours], lr=1e-2, betas=(0.9, 0.999), eps=1e-3)
    adam.state[ours] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros(4), exp_avg_sq=torch.zeros(4))
    reference = torch.optim.Adam([theirs], lr=1e7, betas=(0.9, 0.999), eps=1e6)
    for step in range(50):
        ours.grad, theirs.grad = (torch.tensor([1e-3, -5e-3, 2e-2, 0.5]) * math.sin(step) for _ in range(2))
        adam.step(), reference.step()
    assert torch.allclose(ours, theirs, rtol=1e-5) and ours.abs().min() > 0  # another order of operations
    assert not adam.state[ours]["exp_avg_sq"].any()


def test_epochs_show_every_image_once(tiny_settings):
    """The order follows from the seed and the epoch alone, so that a resumed run continues it."""
    latents = torch.arange(5.0)[:, None]
    data = SimpleNamespace(latents=latents, choices=[[k] for k in range(5)], prompt_ids=None, scheduler=None)
    run = SimpleNamespace(progress=SimpleNamespace(step=0), settings=dict(seed=3))
    seen = []
    for run.progress.step in range(15):
        epochs = variations.Epochs(data, run)
        assert epochs.latents.shape == (1, 1) and epochs.choices == [[int(epochs.latents)]]
        seen.append(int(epochs.latents))
    assert all(sorted(seen[first : first + 5]) == list(range(5)) for first in (0, 5, 10))
    assert seen[:5] != seen[5:10] or seen[5:10] != seen[10:]


def test_every_variation_changes_the_run_and_is_over_with_it(tiny_settings):
    """Each gives a different token from the method as it is; afterwards the script's parts are its own again.

    Four steps, because in one or two an epoch's images may be those that are drawn anyway.
    """
    own = {name: getattr(train_zoodip, name) for name in ("ZOAdam", "train", "ESTIMATORS")}
    tokens = {}
    for flags, variation in (({}, ()), *(({}, (name,)) for name in ("half_adam", "momentum", "no_momentum", "epochs", "article")),
                             ({"estimator": "one_point"}, ()), ({"estimator": "one_point"}, ("printed_sign",))):  # fmt: skip
        spec = runs.make_spec(
            tiny_settings, "zoodip", "dog6", 0, flags | {"max_train_steps": 4, "use_cc": True}, variation=variation
        )
        workers.do(runs.Job(spec, set()), tiny_settings)
        (tokens[runs.digest(spec)],) = load_file(tiny_settings.folder(spec) / "learned_embeds.safetensors").values()
        assert {name: getattr(train_zoodip, name) for name in own} == own
    assert len({token.numpy().tobytes() for token in tokens.values()}) == len(tokens) == 8


def test_the_printed_sign_is_ascent():
    """p_i u_i of the supplement, by a plain loop, is minus the estimate with the directions in reverse."""
    losses, mu = torch.tensor([0.3, 0.1, 0.7]), 1e-2
    directions = torch.randn(3, 1, 8, generator=seeded(1))
    printed = sum((losses[i + 1] - losses[i]) / mu * directions[i] for i in range(2))
    reverse = variations.PrintedOnePoint.slopes(losses.flip(0), mu)
    ours = torch.einsum("i,ivd->vd", reverse, directions.flip(0)[-2:])
    assert torch.allclose(ours, printed, rtol=1e-5)


def test_the_other_captions(tmp_path):
    world = worlds.StableDiffusion15(tmp_path, tmp_path, tmp_path)
    world.captions = tmp_path / "cc.json"
    world.captions.write_text(json.dumps({"dog6": {"00.jpg": "a photo of {} on a mat", "01.jpg": "a {} in an {}"}}))
    world.write_other_captions()
    assert json.loads(world.other_captions.read_text()) == {"dog6": {"00.jpg": "a photo of a {} on a mat", "01.jpg": "{} in {}"}}


def test_what_a_cost_run_learned_is_measured_and_removed(tiny_settings, monkeypatch):
    """Five rounds of DreamBooth would otherwise leave 9 GB with Stable Diffusion v1.5."""
    monkeypatch.setattr(TinyWorld, "cost_steps", 3, raising=False)
    spec = runs.make_spec(tiny_settings, "dreambooth", "dog6", 0, {}, cost=True)
    unet = runs.learned_path(spec, tiny_settings)

    def script(*_, **__) -> SimpleNamespace:
        unet.mkdir(parents=True)
        (unet / "weights").write_bytes(bytes(1000))
        run = dict(steps_per_second=1.0, peak_memory_gb=1.0, device="x", versions={}, commit="y", unet_forwards=3)
        (unet.parent / "run.json").write_text(json.dumps(run))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(workers.subprocess, "run", script)
    job = runs.Job(spec, set())
    workers.do(job, tiny_settings)
    assert result_of(tiny_settings, spec)["stored_bytes"] == 1000 and not unet.exists() and job.done(tiny_settings)


@pytest.mark.slow
def test_a_cost_run_is_the_script_in_a_process_of_its_own(tiny_settings, monkeypatch, tmp_path):
    """Started anywhere, it finds the code by itself."""
    monkeypatch.setattr(TinyWorld, "cost_steps", 3, raising=False)
    monkeypatch.chdir(tmp_path)
    spec = runs.make_spec(tiny_settings, "ti", "dog6", 0, {}, cost=True)
    workers.do(runs.Job(spec, set()), tiny_settings)
    result = result_of(tiny_settings, spec)
    assert result["forwards"] == 3 and result["steps_per_second"] > 0 and result["peak_memory_gb"] > 0.1


def test_a_run_that_fails_is_told_with_its_log(tiny_settings):
    """It does not end the others."""
    settings = replace(tiny_settings, model="no/such/model")
    spec = runs.make_spec(settings, "zoodip", "dog6", 0, {})
    (line,) = [workers.do_in_worker(runs.Job(spec, set()), settings)]
    assert "there is no folder" in line or "neither a folder here" in line
    assert "Traceback" in (settings.folder(spec) / "error.log").read_text()


def test_tokens_that_nothing_is_learned_for(tmp_path):
    """The class word's embedding, and a description's with one vector for each word: a prompt with it is encoded as the prompt
    with the words written out."""
    from zoodip.folder import native_resolution
    from zoodip.model import load_text_encoder
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
    """On the miniature, two steps per run: the shards' runs together are the table's, and nothing is done twice."""
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
