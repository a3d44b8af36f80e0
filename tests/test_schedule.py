"""Schedules of the learning rate: the values against formulas, and resuming to the last bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import arguments, run_cli
from safetensors import safe_open

from train_zoodip import ZOAdam

STEPS, WARMUP = 20, 4


def decay(kind: str, updates: int) -> float:
    """The factor after so many updates, by hand."""
    if kind == "constant":
        return 1.0
    if updates < WARMUP:
        return updates / WARMUP
    done = (updates - WARMUP) / (STEPS - WARMUP)
    return {
        "constant_with_warmup": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_the_rate_of_every_update(kind):
    """A step that is skipped does not count."""
    zo = ZOAdam(torch.ones(1, 8), n=2, learning_rate=0.5, lr_scheduler=kind, lr_warmup_steps=WARMUP, max_train_steps=STEPS)
    generator, rates = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        directions, candidates = zo.candidates(generator)
        assert zo.step(directions, torch.full((len(candidates),), torch.nan)) is None
        zo.step(directions, candidates.square().sum((1, 2)))
        rates.append(zo.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5 * decay(kind, step) for step in range(STEPS)], abs=1e-6)


def test_a_schedule_is_resumed_to_the_last_bit(tiny_model, subject, tmp_path, capsys):
    flags = dict(max_train_steps=6, eval_steps=0, checkpointing_steps=3, checkpoints_total_limit=0, lr_scheduler="cosine",
                 lr_warmup_steps=2, learning_rate=0.1)  # fmt: skip
    out = tmp_path / "out"
    assert run_cli(arguments(tiny_model, subject, out, **flags)) == 0
    whole = (out / "learned_embeds.safetensors").read_bytes()
    again = dict(flags, resume_from_checkpoint=out / "checkpoint-3.safetensors")
    assert run_cli(arguments(tiny_model, subject, out, **again)) == 0
    assert (out / "learned_embeds.safetensors").read_bytes() == whole
    for other in (dict(max_train_steps=7), dict(lr_scheduler="linear"), dict(lr_scheduler="constant"), dict(lr_warmup_steps=1)):
        assert run_cli(arguments(tiny_model, subject, out, **{**again, **other})) == 2
        assert "is from another run (--" in capsys.readouterr().err
    constant = tmp_path / "constant"
    assert run_cli(arguments(tiny_model, subject, constant, max_train_steps=6, eval_steps=0, learning_rate=0.1)) == 0
    assert (constant / "learned_embeds.safetensors").read_bytes() != whole


def test_a_constant_rate_leaves_no_trace(tiny_model, subject, tmp_path):
    """Files and checkpoints of such a run are as they were before there were schedules."""
    out = tmp_path / "out"
    assert run_cli(arguments(tiny_model, subject, out, max_train_steps=1, eval_steps=0)) == 0
    with safe_open(out / "learned_embeds.safetensors", framework="pt") as handle:
        assert not {"lr_scheduler", "lr_warmup_steps", "max_train_steps"} & set(json.loads(handle.metadata()["zoodip.settings"]))
