"""Binding's evaluation: prompts, ceiling, judges, scores and tables; and a small run of the whole command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import seeded
from PIL import ImageOps

from miniature.drawing import render
from miniature.words import ACCESSORIES
from miniature.world import random_spec
from reproduction import binding, binding_judges, binding_report
from reproduction.binding_judges import SIDE, counted_picture, load_counter, middles_of, read_halves, score, train_counter
from reproduction.binding_report import (
    LEGEND,
    Table,
    above_control,
    aims,
    cost_ratios,
    introduction,
    tables_of,
    verdict,
    write_report,
)
from reproduction.binding_rows import ROWS, SWEEP, ceiling_latents, join_windows, passes, rows_of, settings_of, split_windows
from reproduction.binding_sets import SEED, SETS, Task, Wanted, tasks_of
from reproduction.binding_steps import left_at
from zoodip.attention import map_layers
from zoodip.binding_drawing import draw_bound
from zoodip.binding_settings import METHODS, check_settings
from zoodip.errors import InputError
from zoodip.marks import parse_marks
from zoodip.model import load_pipeline

TWO = "a [red dog*] and a [white cat*] in the snow"
SIZE = dict(height=16, width=32)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return load_pipeline(str(tiny_model), "none")


# ---------------------------------------------------------------------------------------------------------- prompts and rows


def test_sets_of_prompts():
    """Every set has 96 test prompts, none also used for development, all with marks, within the miniature's 30 tokens."""
    for name in SETS:
        test, development = tasks_of(name, "test"), tasks_of(name, "development")
        known = {task.prompt for task in test}
        assert len(test) == 96 == len(known) and len(development) >= 10
        assert not known & {task.prompt for task in development}
        for task in [*test, *development]:
            breeds = {f"<{each.breed}>" for each in task.creatures}
            marked = parse_marks(task.prompt, sorted(breeds))
            assert len(marked.groups) == len(task.creatures) == (1 if name == "S5" else 2)
            assert len(marked.prompt.replace(",", " ,").split()) <= 30
        assert len({task.unit for task in test}) == (12 if name in ("S2", "S4") else 96)


def test_rows_have_settings_that_are_allowed():
    for settings in (ROWS | SWEEP).values():
        check_settings(settings)
    assert [row for row in ROWS if row not in rows_of("S1", "none", "test")] == ["published"]  # of objects: on S4
    assert "published" in rows_of("S4", "none", "test") and rows_of("S4", "nf4", "development") == list(SWEEP)
    assert "ceiling" not in rows_of("S5", "none", "test") and "phrase" in rows_of("S2", "nf4", "test")
    full = settings_of("full", 25, 5.0)
    assert full == replace(METHODS["full"], steps=25, guidance=5.0)
    assert settings_of("full", 15, 5.0).map_steps == 3  # the same share of the steps


def test_every_prompt_has_its_own_noises_and_every_row_the_same():
    """So that breeds and prompts are independent; and the maps that the losses see are of one level in every set."""
    jobs = binding.jobs_of(binding.parse_args(["--quantization", "none"]), {})
    noises: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for job in jobs:
        for task, seeds in zip(job.tasks, job.seeds, strict=True):
            noises.setdefault((job.set_name, task.prompt), {})[job.row] = seeds
        cells = binding.MAP_CELLS * len(job.tasks[0].creatures) if job.settings.map_steps else 0
        assert job.settings.map_cells == cells
    for name in SETS:
        rows_of_set = [rows for (set_name, _), rows in noises.items() if set_name == name]
        assert len({rows["plain"] for rows in rows_of_set}) == len(rows_of_set) == 96
        assert len({seed for rows in rows_of_set for seed in rows["plain"]}) == 192
        for rows in rows_of_set:
            assert all(seeds in (rows["plain"], rows["plain"][:1]) for seeds in rows.values())


def test_the_maps_level_on_both_canvases():
    """8 x 8 for one creature and 8 x 16 for two: the same layers of the miniature."""
    unet = load_pipeline(str(binding.MODEL), "none").unet
    one, two = (map_layers(unet, torch.zeros(1, 4, 16, 16 * k), binding.MAP_CELLS * k) for k in (1, 2))
    assert one == two and len(one) == 3


@pytest.mark.parametrize("row", ["phrase", "F: merge + semantic", "D: semantic + entropy, not merged"])
def test_passes_of_a_picture(pipeline, row):
    """They equal those counted while drawing; thresholds, which only rows with maps have, may save some."""
    settings = replace(settings_of(row, 3, 5.0), sem_steps=min(1, ROWS[row].sem_steps), map_steps=min(1, ROWS[row].map_steps))
    (picture,) = draw_bound(pipeline, [TWO], settings=settings, **SIZE)
    expected = passes(settings, 2)
    counted = picture.forwards, picture.backwards
    if settings.map_steps:
        assert counted[0] - expected[0] == counted[1] - expected[1] <= 0 and counted[1] > settings.sem_iterations
    else:
        assert counted == expected


def test_the_semantic_loss_without_merging_improves_the_nouns(pipeline):
    """The ablation's row D: without a composite the noun's own row is moved, and only while there are steps for it."""
    unmerged = replace(METHODS["plain"], steps=2, guidance=5.0)
    latents = [draw_bound(pipeline, [TWO], settings=replace(unmerged, sem_steps=steps), **SIZE)[0].latents for steps in (0, 1)]
    assert not torch.equal(*latents)


# --------------------------------------------------------------------------------------------------------------- ceiling


def test_windows_of_the_ceiling():
    whole = torch.randn(3, 4, 16, 32, generator=seeded())
    windows = split_windows(whole)
    assert windows.shape == (6, 4, 16, 20) and torch.equal(windows[0], whole[0, ..., :20])
    assert torch.equal(windows[3], whole[1, ..., 12:])
    assert torch.allclose(join_windows(windows, 32), whole, atol=1e-6)  # shares that add up to 1, to fp32 rounding
    left, right = torch.ones(1, 1, 1, 20), torch.zeros(1, 1, 1, 20)
    joined = join_windows(torch.cat([left, right]), 32)[0, 0, 0]
    assert torch.equal(joined[:12], torch.ones(12)) and torch.equal(joined[20:], torch.zeros(12))
    assert (joined[12:20].diff() < 0).all()  # a ramp between them


def test_each_side_of_the_ceiling_is_its_own_groups(pipeline):
    """In one step, the part to the left of the overlap does not depend on the right group at all."""
    how = dict(settings=replace(METHODS["plain"], steps=1, guidance=5.0), seeds=[0, 1], height=16, width=64)
    prompts = [TWO, TWO.replace("white cat", "grass dog")]
    first, again, other, _ = ceiling_latents(pipeline, prompts, **how)
    left, right = slice(0, 12), slice(20, 32)  # of 32 columns, with an overlap of 8 in the middle
    assert torch.equal(first[..., left], other[..., left]) and not torch.equal(first[..., right], other[..., right])
    assert not torch.equal(first, again)  # another seed
    own = ceiling_latents(pipeline, prompts, **{**how, "seeds": [[1], [0]]})  # of each prompt its own
    assert torch.allclose(own, torch.stack([again, other]), atol=1e-4)
    (alone,) = ceiling_latents(pipeline, prompts[:1], **{**how, "seeds": [0]})
    assert torch.allclose(alone, first, atol=1e-4)  # other batch sizes round differently


# ----------------------------------------------------------------------------------------------------- judges and scores


@pytest.mark.parametrize("middles, counts", [
    ([], (0, 0)), ([32, 96], (1, 1)), ([20, 44], (2, 0)), ([20, 44, 60], (2, 0)), ([58], (1, 0)),
])  # fmt: skip
def test_pictures_to_count_on(middles, counts, monkeypatch):
    """A half counts the creatures whose middle is in it, with 2 for two or more; without any it shows only the scene."""
    monkeypatch.setattr(binding_judges, "middles_of", lambda rng, count: middles)
    picture, found = counted_picture(index := len(middles))
    scene = render(replace(random_spec(np.random.default_rng([SEED, index]), held_out=True), x=-2.0), SIDE)
    assert found == counts and picture.size == (2 * SIDE, SIDE)
    for left, side, count in zip((0, SIDE), (scene, ImageOps.mirror(scene)), counts, strict=True):
        alone = np.array_equal(picture.crop((left, 0, left + SIDE, SIDE)), side)
        assert not (alone and count) and (alone or middles)


def test_creatures_stand_apart_and_off_the_middle():
    for seed in range(50):
        found = middles_of(np.random.default_rng(seed), 4)
        gaps = np.diff(sorted(found))
        assert len(found) == 4 and gaps.min() >= 20 and min(abs(middle - SIDE) for middle in found) > 3


def halves(*colours: str, accessory=("nothing", "nothing"), chances=(1e-3, 1e-3), count=(1, 1), **more) -> list[dict]:
    """Readings in the form of `read_halves`; `chances` are those of a red hat."""
    rows = []
    for k, colour in enumerate(colours):
        likely = [-10.0] * len(ACCESSORIES)
        likely[ACCESSORIES.index("red hat")] = math.log(chances[k])
        rows.append(dict(colour=colour, scene="snow", accessory=accessory[k], log_chances=likely, count=count[k], **more))
    return rows


def test_scores_by_hand():
    task = Task("", (Wanted("red"), Wanted("blue")), "snow")
    right = score(task, halves("blue", "red"))
    assert (
        right["right"] == 1
        and right["in_order"] == 0
        and right["leak"] == 0
        and right["one_each"] == 1 == right["right_one_each"]
    )
    leaked = score(task, halves("red", "red", accessory=("red hat", "nothing"), count=(2, 0)))
    assert leaked["right"] == 0 and leaked["leak"] == 1 and (leaked["first"], leaked["second"]) == (1, 0)
    assert (leaked["uninvited"], leaked["several"], leaked["empty"], leaked["one_each"]) == (0.5, 0.5, 0.5, 0)
    assert leaked["empty_left"] == 0 and score(task, halves("red", "red", count=(0, 1)))["empty_left"] == 1
    worn = Task("", (Wanted("red"), Wanted("blue", "red hat")), "beach")
    scores = score(worn, halves("red", "blue", accessory=("red hat", "nothing"), chances=(0.75, 0.5)))
    assert scores["owner"] == 0 and scores["margin"] == pytest.approx(-0.25) and scores["uninvited"] == scores["scene"] == 0
    both, own = (score(worn, halves("red", "blue", accessory=(other, "red hat"))) for other in ("red hat", "nothing"))
    assert (scores["alone"], both["alone"], own["alone"]) == (0, 0, 1)
    assert score(worn, halves("red", "blue", chances=(1e-6, 2e-6)))["owner"] == 1  # small on both, and still more likely on one
    assert score(worn, halves("red", "blue"))["owner"] == 0.5  # a tie
    looks = (("colour", "red"), ("pattern", "spotted"), ("ears", "long"), ("shape", "tall"))
    breed = Task("", (Wanted("red", None, "meppor", looks), Wanted("blue")), "snow")
    scores = score(breed, halves("red", "blue", pattern="spotted", ears="long", shape="boxy"))
    assert scores["looks"] == 0.75 and scores["other"] == 1 and scores["pattern_leak"] == 1
    plain = replace(breed, creatures=(replace(breed.creatures[0], looks=(("pattern", "plain"),)), breed.creatures[1]))
    assert "pattern_leak" not in score(plain, halves("red", "blue", pattern="plain"))  # none to leak


@pytest.mark.slow
def test_counter_learns_and_is_read_back(tmp_path):
    """Better than chance (a third) after few renders: with 150 fresh halves, .5 is four standard deviations above it."""
    train_counter(tmp_path, 300)
    counter, known = load_counter(tmp_path)
    assert np.mean(list(known["right"].values())) > 0.5 and known["fresh"] == 150
    assert min(known["classifier"].values()) > 0.8
    assert {label: of for label, (_, of) in known["drawn"].items()} == {"0": 6, "1": 98, "2": 4}  # as they were labelled
    picture, _ = counted_picture(1)
    for read in read_halves(picture, counter):
        assert read["count"] == int(np.argmax(read["counts"])) and math.isclose(sum(read["counts"]), 1, abs_tol=0.01)
        assert math.isclose(sum(map(math.exp, read["log_chances"])), 1, abs_tol=0.01)


# ---------------------------------------------------------------------------------------------------------------- report


def records_of(**right: list[bool]) -> list[dict]:
    """Records of S1's first prompts, in rows that are right or have the first colour twice."""
    found = []
    for row, values in right.items():
        for task, value in zip(tasks_of("S1", "test"), values, strict=False):
            colours = [each.colour for each in task.creatures] if value else [task.creatures[0].colour] * 2
            about = dict(set="S1", quantization="none", row=row, prompt=task.prompt, seed=0, forwards=50, backwards=0)
            found.append(dict(about, halves=halves(*colours)))
    return found


def test_tables_are_of_the_prompts_that_every_row_has():
    table = Table("S1", records_of(plain=[False, True, False, True], phrase=[True, True, True]))
    assert len(table.common) == 3 and list(table.means("plain", "right").values()) == [0, 1, 0]
    assert table.difference("phrase", "plain", "right") == [1, 0, 1]
    text = table.text()
    assert text.startswith("3 prompts, 3 pictures a row.") and "| phrase | 100 ± 0 |" in text
    assert "| minus plain | right_one_each |" in text and "| phrase | +67 ± 143 | +0 ± 0 |" in text  # 4.303 x sqrt(1 / 9)
    assert table.alike("phrase", "plain") == (1, 3)
    with pytest.raises(InputError, match="another version"):
        Table("S1", [dict(records_of(plain=[True])[0], prompt="a [green cat*]")])
    assert tables_of(records_of(plain=[True], phrase=[])[:0]) == {}


def test_verdicts_and_aims():
    assert verdict([1.0] * 12, 0.85) == "yes" and verdict([0.1, 0.1, 0.2] * 4, 0.85) == "no"
    assert verdict([1.0, 0.5, 1.0] * 4, 0.85).startswith("cannot be told, the mean")
    assert verdict([1.0] * 11, 0.85) == "cannot be told from 11 values" == above_control([1.0] * 11)  # none differs by chance
    costs = dict(pictures=[dict(row=row, prompt=prompt, seconds=seconds, forwards=50, backwards=0)
                           for row, times in (("plain", (2.0, 4.0)), ("phrase", (2.2, 4.4)))
                           for prompt, seconds in zip("ab", times, strict=True)])  # fmt: skip
    assert cost_ratios(costs)["phrase"] == pytest.approx([1.1, 1.1])
    found = tables_of(records_of(phrase=[True] * 12, full=[True] * 12, control=[False] * 12))
    said = {line[0]: line[3] for line in aims(found, costs)}
    assert set(said.values()) == {"yes"} and len(said) == 3
    assert above_control([0.1, -0.1, 0.0] * 4).startswith("it was not shown to be")
    assert above_control([0.1, 0.1, 0.12] * 4) == "yes"


def test_what_is_left_of_a_loss():
    curves = [[[0, 1.0], [10, 0.5], [20, 0.25]], [[0, 1.0], [15, 0.5]]]
    assert left_at(curves, 9)[0] == 1 and left_at(curves, 10)[0] == pytest.approx(math.sqrt(0.5))
    assert left_at(curves, 40)[0] == pytest.approx(math.sqrt(0.125))


def test_tables_come_from_the_records_alone(tmp_path):
    """Written compressed and read again, they give the same report."""
    counter = dict(
        pictures=6,
        fresh=3,
        right={"0": 1.0, "1": 0.9, "2": 0.8},
        drawn={"0": [5, 6], "1": [89, 98]},
        classifier=dict(colour=0.97),
    )
    costs = dict(pictures=[dict(row="plain", prompt=prompt, seconds=2.0, forwards=50, backwards=0) for prompt in "ab"])
    steps = dict(budget=8, curves=dict(gradient=[[[0, 1.0], [3, 0.5]], [[0, 1.0], [3, 0.4]]]), phrase=[0.1, 0.2])
    arguments = dict(split="test", steps=25, scheduler="ddim", guidance=5.0, seeds=[0])
    pictures = records_of(plain=[False, True], phrase=[True, True])
    records = dict(
        arguments=arguments, device="a CPU", commit="abc", counter=counter, costs=costs, steps=steps, pictures=pictures
    )
    write_report(records, tmp_path)
    report = (tmp_path / "RESULTS.md").read_bytes()
    binding_report.write_records(tmp_path / "records.json.xz", records)
    (tmp_path / "RESULTS.md").unlink()
    binding.main(binding.parse_args(["--report_only", "--report", str(tmp_path)]))
    assert (tmp_path / "RESULTS.md").read_bytes() == report and (tmp_path / "steps.png").stat().st_size > 1000
    (tmp_path / "records.json.xz").write_bytes(b"torn")
    with pytest.raises(InputError, match="not a valid file of records"):
        binding.main(binding.parse_args(["--report_only", "--report", str(tmp_path)]))


def test_the_report_on_test_prompts_says_what_its_words_mean():
    """Every set, and every abbreviation in the names of rows; the page has the texts that the code writes."""
    folder = binding.ROOT / "reproduction" / "binding"
    said, page = introduction(binding_report.read_records(folder / "records.json.xz")), (folder / "RESULTS.md").read_text()
    assert "99 % of halves without a creature" in said and "3 of 6 without a creature, 93 of 98 with one" in said
    assert all(f"- {name}: " in LEGEND for name in SETS) and all(word in LEGEND for word in ("ETS", "Noun, losses for bias"))
    assert said in page and LEGEND in page


# --------------------------------------------------------------------------------------------------------------- command


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(tmp_path):
    """Stopped after its first job, it reports what is there; run again, it draws the rest and leaves earlier pictures alone."""
    argv = ["--split", "development", "--sets", "S1", "--rows", "plain", "phrase", "ceiling",
            "--prompts", "2", "--seeds", "0", "--batch_size", "1",
            "--steps", "2", "--quantization", "none", "--counter_pictures", "60", "--jobs", "1",
            "--forwards", "16", "--output", str(tmp_path)]  # fmt: skip
    binding.main(binding.parse_args([*argv, "--hours", "0"]))
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").glob("*.png")}
    assert 0 < len(first) < 6
    binding.main(binding.parse_args(argv))
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6
    assert all(path.stat().st_mtime_ns == moment for path, moment in first.items())
    records = binding_report.read_records(tmp_path / "records.json.xz")
    assert len(records["pictures"]) == 6 and {len(each["halves"]) for each in records["pictures"]} == {2}
    text = (tmp_path / "RESULTS.md").read_text()
    assert "### S1, unquantised" in text and "2 prompts, 2 pictures a row." in text
    assert json.loads((tmp_path / "counter.json").read_text())["pictures"] == 60 and (tmp_path / "S1-none.png").exists()
