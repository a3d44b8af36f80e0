"""What the measurements rely on: bytes counted exactly, steps timed from outside, and the trainer's own step."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import MINIATURE, ROOT, arguments, run_cli
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks import gpu, house, pictures, weight_tuning
from benchmarks.memory import count_live_bytes, gpu_bytes, largest, name_layers, peak_live_bytes, stage, tensor_names
from benchmarks.methods import METHODS, Task, ThisProject
from benchmarks.precision import tf32_convolutions, to_tf32
from benchmarks.resident import run_watched
from benchmarks.sd15_shape import shape_folder
from benchmarks.speed_memory_tables import REBASE_STEPS, gauss_newton_table, page, time_table
from benchmarks.stock_tuning import Dequantised
from trainers import gauss_newton
from zoodip.errors import InputError, run_script
from zoodip.model import is_quantized
from zoodip.prompts import read_embedding
from zoodip.quantize import pack_weight, quantized_layer
from zoodip.tuned_layers import ScaledLayer


def test_live_bytes_are_exact():
    def work() -> None:
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.empty(2000)  # 12,000 with the first: the peak
        del first
        torch.empty(500, dtype=torch.float64)  # 8,000 + 4,000: not above it
        del second
        torch.empty(2500)

    assert peak_live_bytes(work) == 12_000


def test_live_bytes_by_stage_and_layer():
    layer = nn.Linear(10, 100)
    name_layers(layer, "model")
    inputs = torch.ones(3, 10)
    kept = []

    def work() -> None:
        with stage("load"):
            kept.append(torch.empty(50))
        with stage("train"), torch.no_grad():
            layer(inputs)

    found = count_live_bytes(work)
    assert found.peak == found.stages["train"] == 200 + 1200  # [3, 100] in fp32
    assert found.stages["load"] == 200
    assert largest(found, tensor_names([("kept", kept[0])])) == {"model.: addmm": 1200, "kept": 200}


def test_resident_memory_is_seen():
    """100 MB that a process touches are found, and count as anonymous."""
    code, _, peaks = run_watched([sys.executable, "-c", "import time; held = b'x' * 100_000_000; time.sleep(0.5)"])
    assert code == 0
    assert peaks["resident"] > peaks["anonymous"] > 100_000_000


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bytes", "steps"])
def test_watched_script(tiny_model, subject, tmp_path, mode):
    """A real run seen from outside: a time for every step but the last; a peak of at least the run's own packed weights."""
    argv = arguments(tiny_model, subject, tmp_path / "out", max_train_steps=5, eval_steps=0)
    command = [sys.executable, "-m", "benchmarks.watch_script", mode, str(tmp_path / "found.json"), "train_zoodip.py", *argv]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (tmp_path / "out" / "learned_embeds.safetensors").exists()
    if mode == "steps":
        assert len(found["wall"]) == len(found["cpu"]) == 4 and min(found["wall"]) > 0
    else:
        assert 150_000 < found["peak"] < 50_000_000  # 0.3 M weights in 4 bits, and the activations of 16 pixels


def test_a_watched_script_uses_the_package_beside_it(tmp_path):
    """As `house.py` starts it: this tree on the path, for the counter, and yet the other version's own `zoodip`."""
    (tmp_path / "zoodip").mkdir()
    (tmp_path / "zoodip" / "__init__.py").write_text("")
    (tmp_path / "zoodip" / "records.py").write_text("VERSION = 'another'")
    (tmp_path / "script.py").write_text("import sys; from zoodip.records import VERSION; open(sys.argv[1], 'w').write(VERSION)")
    watcher = [sys.executable, str(ROOT / "benchmarks" / "watch_script.py"), "bytes", str(tmp_path / "found.json")]
    command = [*watcher, str(tmp_path / "script.py"), str(tmp_path / "version")]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **house.ENVIRONMENT}, check=True)
    assert (tmp_path / "version").read_text() == "another"


@pytest.fixture
def task(tiny_model, subject) -> Task:
    return Task(tiny_model, None, subject, "dog", "fp32", torch.device("cpu"), tau=4)


def test_the_step_measured_is_the_trainer_s(task, tiny_model, subject, tmp_path):
    """It gives the same token, bit for bit, as `train_zoodip.py`."""
    argv = arguments(tiny_model, subject, tmp_path, max_train_steps=6, eval_steps=0, mu=1e-3, nu=1e-3)
    assert run_cli(argv) == 0
    method = ThisProject(task)
    method.load()
    for _ in range(6):
        method.step()
    assert torch.equal(method.zo.theta.detach(), read_embedding(tmp_path / "learned_embeds.safetensors", "<sks>")[0])


def test_the_gauss_newton_step_measured_is_the_trainer_s(task, tiny_model, subject, tmp_path):
    """The same, bit for bit, over the first basis and two steps; the table of costs assumes the trainer's defaults."""
    argv = arguments(
        tiny_model, subject, tmp_path, max_train_steps=None, tau=None, nu=None, mu=None, max_forwards=18, eval_steps=0
    )
    assert run_cli(argv, gauss_newton) == 0
    method = METHODS["newton"](task)
    method.load()
    for _ in range(2):
        method.step()
    assert torch.equal(method.learner.theta, read_embedding(tmp_path / "learned_embeds.safetensors", "<sks>")[0])
    defaults = gauss_newton.build_parser().parse_args([])
    assert tuple(defaults.rebase_steps) == REBASE_STEPS and defaults.basis_size == [method.basis_size]
    assert defaults.directions + 1 == METHODS["newton"].forwards


def test_gauss_newton_s_cost_by_hand():
    """400 forwards are 44 steps and two bases: (44 x 9 + 2 x 18) / 396 seconds per forward, and ZOODiP's take one each."""
    text = gauss_newton_table({"zoodip": [3.0], "newton": [9.0], "newton_basis": [18.0]})
    rows = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| Gauss-Newton")]
    assert rows == [["100", "1", "1.18 |"], ["400", "2", "1.09 |"], ["1,500", "4", "1.05 |"]]
    assert gauss_newton_table({"zoodip": [3.0], "newton": [9.0]}) == ""


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("zoodip", "zoodip_compiled")])
def test_every_method_steps(task, name):
    """Each loads the same model; those that train a token move it."""
    method = METHODS[name](task)
    method.load()
    token = {"ti": "table", "authors": "token"}.get(name.partition("_")[0])
    before = getattr(method, token).detach().clone() if token else None
    method.step()
    if before is not None:
        moved = getattr(method, token).detach()
        assert torch.isfinite(moved).all() and not torch.equal(moved, before)


def test_time_table_compares_round_by_round():
    """Ratios are medians of the rounds' ratios, not ratios of medians."""
    text = time_table({"zoodip": [2.0, 4.0, 9.0], "floor": [1.0, 4.0, 3.0], "floor_as_loaded": [4.0, 4.0, 4.0]})
    ours = next(line for line in text.splitlines() if line.startswith("| ZOODiP")).split(" | ")
    assert ours[1] == "4" and ours[3:6] == ["2.00", "1.00", "1.00"]  # 2, 1, 3 over the floor; 0.5, 1, 2.25 over the other


def test_the_paper_s_memory_stands_beside_the_same_system():
    """Of PEQA, the paper has INT8 only."""
    same = {"qlora": "QLoRA, NF4", "krona": "DiffuseKronA, NF4", "peqa4": "PEQA, INT4", "tuneqdm8": "TuneQDM, INT8",
            "dreambooth": "DreamBooth, fp32"}  # fmt: skip
    assert {name: row.paper for name, row in weight_tuning.ROWS.items()} == {name: gpu.SYSTEMS[same[name]][2] for name in same}


@pytest.mark.parametrize("name", ["speed_memory", "weight_tuning"])
def test_a_page_is_the_record_s(name):
    """Made anew from the record's values, to the letter; no two blank lines follow each other."""
    record = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
    made = page(record["results"], "cpu") if name == "speed_memory" else weight_tuning.report(record)
    text = (ROOT / "benchmarks" / f"{name}.md").read_text()
    assert text.partition("\nMeasured by")[0] == made.rstrip() + "\n" and "\n\n\n" not in text


@pytest.mark.slow
def test_a_device_compared_with_itself():
    """`gpu.py` on the CPU: fp32 equals the reference to the last bit; bf16 does not, and stays within the stated tolerance."""
    records = gpu.compare(MINIATURE, "cpu", ["fp32", "bf16"], samples=2, directions=2)
    assert len(records) == 3 * 2 * len(gpu.SCALES)
    for record in records:
        assert record["within"]
        assert (record["loss_error"] == 0) == (record["precision"] == "fp32")
        assert record["precision"] == "bf16" or record["correlation"] > 1 - 1e-6
    text = gpu.comparison_table(records)
    assert text.count("within") == len(records) and "above" not in text


def test_gpu_without_a_gpu_is_refused_in_a_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run_script(gpu.main, gpu.parse_args([])) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda: torch sees no GPU here")


@pytest.mark.parametrize("layer", [nn.Linear(48, 32), nn.Conv2d(6, 8, 3, stride=2, padding=1)], ids=["linear", "convolution"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_stock_path_of_scales_is_the_same_layer(layer, bits):
    """The stock layer in the weight-tuning benchmark computes the same as ours, in fp32 with sums in another order."""
    packed = quantized_layer(layer, pack_weight(layer.weight.data, f"affine{bits}"))
    ours, theirs = ScaledLayer(packed, 2, True), Dequantised(layer, bits, 2, True)
    with torch.no_grad():
        for e in range(2):
            factors = 1 + torch.rand(len(ours.scale_in[e])) / 10
            ours.scale_in[e].copy_(factors)
            theirs.scale_in[e].copy_(factors)
        for e in range(2):
            ours.expert = theirs.expert = e
            inputs = torch.randn((2, 48) if isinstance(layer, nn.Linear) else (2, 6, 9, 9))
            torch.testing.assert_close(theirs(inputs), ours(inputs), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in (theirs.scale_out, theirs.scale_in)) == sum(
        p.numel() for p in (*ours.scale_out, *ours.scale_in)
    )


@pytest.mark.slow
def test_weight_tuning_is_measured_on_the_miniature(tmp_path):
    """One row, by its command: ZOODiP, ours and the stock path, which trains as many numbers; checkpointing needs fewer bytes."""
    command = [sys.executable, "-m", "benchmarks.weight_tuning", "--small", "--rows", "tuneqdm8", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "weight_tuning.json").read_text())["rows"]["tuneqdm8"]
    unet = UNet2DConditionModel.from_pretrained(MINIATURE / "unet").named_modules()
    packed = [layer.weight.shape for name, layer in unet if is_quantized("unet", name, layer)]
    trained = 4 * sum(shape[0] + shape[1] for shape in packed)  # four experts, a scale for each output and each input
    assert found["ours"]["trained"] == found["stock"]["trained"] == trained
    for path in ("ours", "stock"):
        assert 0 < found[path]["held"] < found[path]["checkpointed"]["peak"] < found[path]["plain"]["peak"]
        assert len(found[path]["plain"]["seconds"]) == 2 and min(found[path]["plain"]["seconds"]) > 0
    assert found["ours"]["plain"]["peak"] < found["stock"]["plain"]["peak"]  # the stock path keeps two weights of each layer
    assert len(found["zoodip"]["seconds"]) == 2 and 0 < found["zoodip"]["held"] < found["zoodip"]["peak"]
    text = (tmp_path / "weight_tuning.md").read_text()
    assert f"TuneQDM int8, N = 4 | {trained:,} |" in text and "as the authors' code does" in text


def test_tf32_keeps_ten_bits_and_is_undone():
    """Rounds to the nearest multiple of 2^-10 between 1 and 2, ties to even; the layer is restored afterwards."""
    values = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-12, -1.75, 0.0])
    assert to_tf32(values).tolist() == [1.0, 1 + 2**-10, 1.0, 1 + 2**-9, 1.0, -1.75, 0.0]
    layer, picture = torch.nn.Conv2d(3, 2, 3, bias=False), torch.randn(1, 3, 8, 8)
    plain = layer(picture)
    with tf32_convolutions(torch.nn.Sequential(layer)):
        rounded = layer(picture)
    exact = torch.nn.functional.conv2d(to_tf32(picture).double(), to_tf32(layer.weight.data).double())
    assert torch.equal(layer(picture), plain)
    assert (rounded - exact).abs().max() < 1e-6 < (rounded - plain).abs().max()  # 27 products, summed in fp32


def test_gpu_memory_of_a_process_on_two_gpus(tmp_path, monkeypatch):
    """nvidia-smi prints a row for each GPU of a process, and no number for some processes."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '7, 100\\n8, [N/A]\\n7, 20\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu_bytes()
    assert (found[7], found[8], found[9]) == (120 << 20, 0, 0)


@pytest.mark.slow
def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="model_index.json"), shape_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with shape_folder(MINIATURE) as folder:  # a whole model is used as it stands
        assert folder == MINIATURE


def test_pictures_are_measured_on_the_miniature():
    """Both ways draw, strips take no more memory, and the page has the figures."""
    task = Task(MINIATURE, None, ROOT / "dataset" / "furmix", "critter", "fp32", torch.device("cpu"))
    found = pictures.measure(task, 128, rounds=1)
    assert {"load", "train", *pictures.WAYS} <= set(found["bytes"])
    assert found["bytes"]["in strips"] < found["bytes"]["as the library decodes"]
    assert 0 < found["difference"]["largest"] < 1e-3 * found["difference"]["deviation"]  # another way, the same picture
    row = pictures.page({"fp32": found}).splitlines()[6]
    assert row.startswith("| fp32 | 0.0") and row.count("|") == 9
