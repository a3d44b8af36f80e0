"""The long run's harness: what it would report of a leak, and a short run through it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import long_run
from zoodip.records import ROOT


def samples(steps: int, leak: float) -> list[dict]:
    """Samples of a run at 20 ms per step whose memory grows by `leak` MB, and its open files by one, every 10,000 steps."""
    rng = np.random.default_rng(0)
    return [dict(seconds=step * 0.02, cpu=step * 0.015, step=step, open_files=4 + step // 10000, checkpoints=2, kilobytes=100,
                 resident=500 + leak * step / 1e4 + rng.normal(), anonymous=400 + rng.normal())
            for step in range(0, steps, 25)]  # fmt: skip


@pytest.mark.parametrize("leak", [0.0, 1.0])
def test_a_leak_is_found(leak):
    """1 MB in 10,000 steps is seen under noise of 1 MB per sample, and none is seen where there is none."""
    parts = long_run.part_means(samples(30000, leak), 30000)
    assert len(parts) == long_run.PARTS
    steps = [part["step"] for part in parts]
    slope, error = long_run.line(steps, [part["resident"] for part in parts])
    # 1080 samples of deviation 1 over 2.7e4 steps: an error of 1 / sqrt(1080) / (2.7 / sqrt(12)) = 0.039
    assert 0.02 < error < 0.06 and abs(slope - leak) < 4 * error
    assert long_run.line(steps, [part["open_files"] for part in parts])[0] > 0.5
    slope, error = long_run.line(steps, [part["wall_ms_per_step"] for part in parts])
    assert parts[0]["wall_ms_per_step"] == pytest.approx(20) and abs(slope) < 1e-6


@pytest.mark.slow
def test_short_run(tmp_path):
    """1,500 steps: no file stays open, checkpoints stay limited, memory grows by no more than 20 MB in 10,000 steps.

    The bound is loose because caches still fill up in so short a run (+5.6 MB measured); 30,000 steps say more (README.md).
    """
    argv = [sys.executable, "-m", "benchmarks.long_run", "--steps", "1500", "--output", tmp_path]
    assert subprocess.run(argv, cwd=ROOT, timeout=3600).returncode == 0
    results = json.loads((tmp_path / "long_run.json").read_text())["results"]
    fits, most = results["fits"], results["most"]
    # a sample may catch a file that is being written; one left open at each checkpoint would be 20
    assert fits["open_files"]["slope_per_10000_steps"] + 3 * fits["open_files"]["standard_error"] < 2
    assert most["checkpoints"] <= 3  # one is written before one is removed
    assert results["checkpoints_left"] == ["checkpoint-1000.safetensors", "checkpoint-1500.safetensors"]
    assert fits["resident"]["slope_per_10000_steps"] - 3 * fits["resident"]["standard_error"] < 20
