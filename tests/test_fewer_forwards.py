"""The search for fewer forwards: what is run and read where, the rule of its verdicts, and runs that are scored along the way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import MINIATURE, ROOT, run_cli
from PIL import Image
from test_reproduction import TinyWorld
from tiny import scheduler_of

from miniature.critters import all_breeds, held_out_breeds, spare_breeds
from reproduction import archives, fewer_forwards, runs
from reproduction.fewer_forwards_forms import (
    BESIDE,
    BUDGETS,
    DEFAULT,
    END,
    ENDS,
    FORMS,
    GRADIENTS,
    IN_TABLES,
    RIVALS,
    SECOND_ROUND,
    START,
    Form,
)
from reproduction.fewer_forwards_tables import (
    LOSES,
    TIES,
    UNKNOWN,
    WINS,
    aims,
    best_rivals,
    chosen_form,
    fill,
    gap_at,
    in_pictures,
    measured_tables,
    pooled,
    read_found,
    search_notes,
    second_notes,
    stopping_notes,
    third_notes,
    verdict,
    write_found,
)
from reproduction.worlds import Miniature
from trainers import gauss_newton
from zoodip.errors import InputError
from zoodip.prompts import read_embedding

SMALL = Form("small", dict(basis_size=[6], directions=4, rebase_steps=[10]), budgets=(100, 200))  # 20 and 40 steps


@pytest.fixture
def settings(tiny_model, subject, tmp_path) -> runs.Settings:
    world = TinyWorld(subject, tmp_path / "suite")
    return runs.Settings(world, tmp_path / "suite", str(tiny_model), "tiny", str(MINIATURE.parent / "clip"), None, images=1,
                         inference_steps=2, eval_samples=2, extra=dict(cpu=True, resolution=16))  # fmt: skip


# ----------------------------------------------------------------------------------------------------- what is run


def test_spare_breeds_are_others():
    """They share neither names nor looks with the breeds that results are reported on."""
    looks = {breed.critter.main_attributes() for breed in held_out_breeds()}
    assert len({breed.name for breed in spare_breeds()}) == 6
    assert not {breed.name for breed in all_breeds()} & {breed.name for breed in spare_breeds()}
    assert not looks & {breed.critter.main_attributes() for breed in spare_breeds()}


@pytest.mark.parametrize("form", [*FORMS, *RIVALS, *SECOND_ROUND], ids=lambda form: form.label)
def test_a_form_s_tokens_are_kept_and_paid_for(form, tmp_path):
    """At each budget the judged token is one that the run keeps, and it cost at most the budget and little less."""
    settings = runs.Settings(Miniature(tmp_path, tmp_path, tmp_path), tmp_path, "model", "id", None, None)
    job = fewer_forwards.job_of(form, held_out_breeds()[0].name, 0, settings)
    args = runs.spec_args(job.spec, settings)
    assert args.max_train_steps == max(job.points.values()) == form.step(max(form.budgets))
    for budget, step in job.points.items():
        spent = form.before + step * form.per_step
        assert 0.98 * budget - form.per_step < spent <= budget
        assert step == args.max_train_steps or step % job.save_steps == 0
    assert json.loads(json.dumps(job.spec)) == job.spec
    if form.after:
        assert args.initializer_token.endswith(f"learned_embeds-steps-{DEFAULT.step(form.after)}.safetensors")
        assert DEFAULT.step(form.after) % DEFAULT.save_steps == 0


def test_labels_are_names():
    for forms in ((*FORMS, *RIVALS, *ENDS), (*SECOND_ROUND, *ENDS)):
        labels = [form.label for form in forms]
        assert len(set(labels)) == len(labels)
    flags = {form.label: form.flags for form in FORMS}
    assert all(flags.get(form.label, form.flags) == form.flags for form in SECOND_ROUND)  # the same name, the same form


def test_plan_and_hours(capsys, tmp_path):
    """Nothing is run, and both parts say how long they would take; a run that two rows share is made once."""
    args = fewer_forwards.parse_args(["--dry_run", "--output", str(tmp_path / "runs"), "--jobs", "2"])
    fewer_forwards.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["search", "measures"] and all("hours" in line for line in lines)
    assert not (tmp_path / "runs").exists()
    best = {budget: {"loss": RIVALS[1], "attributes": RIVALS[-1]} for budget in BUDGETS}
    jobs = fewer_forwards.measures_of(args, best).jobs()
    assert len({runs.digest(job.spec) for job in jobs}) == len(jobs) == 12 * 8  # two ends, ours, its neighbour, TI, loop, rivals


@pytest.mark.parametrize("argv, says", [
    (["--jobs", "0"], "--jobs must be at least 1"), (["--spare", "7"], "--spare must be at most 6"),
    (["--flags", "--clip 0"], "--clip must be a positive number"), (["--flags", "--nonsense 1"], "unrecognized arguments"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        fewer_forwards.parse_args(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and says in error and error.count("\n") == 1


def test_flags_of_the_measures():
    args = fewer_forwards.parse_args(["--flags", "--starts 2 --inflation auto --basis_size 16 24"])
    assert args.trainer_flags == dict(starts=2, inflation="auto", basis_size=[16, 24])


# ----------------------------------------------------------------------------------------------------- runs


def test_scored_along_the_way(settings, tmp_path):
    """A token scored along the way equals, to the bit, the one that a run of that length ends with; it is scored only once, even
    by a command that resumes after an interruption."""
    job = fewer_forwards.job_of(SMALL, "dog6", 0, settings)
    assert isinstance(job, fewer_forwards.FormJob) and not job.done(settings)
    fewer_forwards.do(job, settings)
    assert job.done(settings)
    folder, points = settings.folder(job.spec), fewer_forwards.read_points(job, settings)
    argv = [*runs.spec_argv(job.spec, settings), "--output_dir", str(tmp_path / "short"), "--max_forwards", "100"]
    assert run_cli(argv, gauss_newton) == 0
    short, on_the_way = (read_embedding(path, "<sks>")[0] for path in (
        tmp_path / "short" / "learned_embeds.safetensors", folder / "learned_embeds-steps-20.safetensors"))  # fmt: skip
    assert torch.equal(short, on_the_way)
    assert points["100"]["step"] == 20 and points["200"]["step"] == 40 and points["100"]["loss"] != points["200"]["loss"]
    for point in points.values():
        assert {"loss", "token_norm", "contrast", "CLIP-I", "CLIP-T"} <= set(point)
    path = fewer_forwards.points_path(job, settings)
    record = json.loads(path.read_text())
    first = record["points"]["100"] | {"loss": 7.0}  # it would not stay if it were scored again
    path.write_text(json.dumps(record | {"points": {"100": first}}))
    fewer_forwards.do(job, settings)
    again = fewer_forwards.read_points(job, settings)
    assert again["100"]["loss"] == 7.0 and again["200"] == points["200"]
    assert (folder / "sheet-100.png").exists() and not list(folder.glob("checkpoint-*"))

    spec = runs.make_spec(settings, "zoodip", "dog6", 0, dict(max_train_steps=4))  # the loop goes on from the token at 100
    spec["after"] = f"{folder.name}/learned_embeds-steps-20.safetensors"
    late = fewer_forwards.FormJob(spec, {"scores"}, {112: 4}, 0)
    fewer_forwards.do(late, settings)
    began = fewer_forwards.read_points(late, settings)["112"]["token_norm"]
    assert began == pytest.approx(on_the_way.norm().item(), rel=0.2) and late.done(settings)


def test_sheet_and_archive(settings, tmp_path):
    """One line for each breed that is done; the archive holds the tokens that were judged and their scores, and no others."""
    form = replace(SMALL, label=DEFAULT.label)
    measures = fewer_forwards.Part([form], ["dog6"], [0], settings)
    assert not fewer_forwards.write_sheet(measures, tmp_path / "none.jpg", 200, {})
    (job,) = (job for job in measures.jobs() if isinstance(job, fewer_forwards.FormJob))
    fewer_forwards.do(job, settings)
    assert fewer_forwards.write_sheet(measures, tmp_path / "sheet.jpg", 200, {})
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 3 * 96 and sheet.height < 2 * 128  # a photograph and two pictures in one line
    job = replace(job, points={200: 40})
    archives.pack_runs([job], settings, tmp_path / "runs.tar.xz")
    archives.unpack_runs(tmp_path / "runs.tar.xz", tmp_path / "other")
    name = settings.folder(job.spec).name
    assert {path.name for path in (tmp_path / "other" / "runs" / name).iterdir()} == {
        "spec.json", fewer_forwards.points_path(job, settings).name, "learned_embeds.safetensors",
        "learned_embeds-steps-40.safetensors"}  # fmt: skip
    assert job.done(replace(settings, output=tmp_path / "other"))


def test_contrast(tiny):
    """For a model that predicts that its input is all noise, the expected picture is flat: the initial noise is all gone."""
    scheduler, token = scheduler_of(tiny.folder), tiny.tokens(1)[0]

    class Echo:
        unet = tiny.unet

        def __init__(self, share: float):
            self.share = share

        def predict(self, batch, tokens):
            return self.share * batch.noisy_latents[None]

    a = scheduler.alphas_cumprod[900]
    values = [fewer_forwards.contrast(Echo(float(share)), tiny.prompts, token, scheduler)
              for share in (1 / (1 - a).sqrt(), 0.5, 0.0)]  # fmt: skip
    assert values[0] == pytest.approx(0, abs=1e-5) and values[1] < values[2]
    assert values[2] == pytest.approx(1 / a.sqrt().item(), rel=0.1)  # 4 noises of 4 x 8 x 8: 3 % of the deviation


# ----------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("differences, lower, said", [
    ([0.1, 0.2, 0.3], False, TIES),  # .2 +- .25
    ([0.1, 0.12, 0.11], False, WINS), ([0.1, 0.12, 0.11], True, LOSES), ([-0.1, -0.12, -0.11], False, LOSES),
    ([-0.1, -0.12, -0.11], True, WINS), ([0.0, 0.0, 0.0], False, TIES), ([0.3], False, UNKNOWN),
])  # fmt: skip
def test_verdict(differences, lower, said):
    assert verdict(differences, lower) == said


@pytest.mark.parametrize("attributes, clip, said", [
    (WINS, TIES, WINS), (TIES, LOSES, LOSES), (WINS, LOSES, "the scores disagree"), (TIES, TIES, TIES), (WINS, WINS, WINS),
])  # fmt: skip
def test_verdict_in_pictures(attributes, clip, said):
    assert in_pictures({"attributes": attributes, "CLIP-I": clip, "loss": LOSES}) == said


def invented(better: float = 0.0, breeds: int = 3) -> dict:
    """For every row, a curve that closes half of the remaining gap at every budget; ours closes `better` of it besides."""
    found = {}
    for form in (*FORMS, *RIVALS, Form(GRADIENTS, method="ti"), BESIDE):
        of = {}
        for number, budget in enumerate(sorted((*BUDGETS, 300, 600))):
            records = {}
            for breed in range(breeds):
                gap = min(1.0, 1 - 0.5 ** (number + 1) + better * (form is DEFAULT) - 0.01 * breed)
                pictures = {"attributes": gap, "CLIP-I": gap / 2, "CLIP-T": 0.6, "scene": 1.0, "accessory": 0.9}
                records[f"breed{breed}", 0] = dict(
                    step=form.step(budget), gap=gap, loss=0.04 - 0.01 * gap, token_norm=1 + number, contrast=1 / (1 + number)
                ) | (pictures if budget in BUDGETS else {})  # fmt: skip
            if budget in form.points():
                of[budget] = records
        found[form.label] = of
    return found | {START: {}, END: {}}


def test_gap_between_budgets():
    curve = {100: {("a", 0): {"gap": 0.4}}, 300: {("a", 0): {"gap": 0.8}, ("b", 0): {"gap": 0.1}}}
    assert gap_at(curve, 250) == pytest.approx({("a", 0): 0.7, ("b", 0): 0.1 * 250 / 300})
    assert gap_at(curve, 301) == {}  # nothing was scored there


def test_aims():
    reached = {aim: is_so for aim, _, is_so in aims(invented(better=0.1), DEFAULT.label)}
    assert reached["80 % of the gap at 250 forwards"] and reached["90 % of the gap at 600 forwards"]
    assert (
        reached["no breed under 60 % of the gap at 400"] and reached["accessory at 400 not more than .02 below the paper's loop"]
    )
    found = invented()
    found[DEFAULT.label][400]["breed1", 0].update(gap=0.5)
    by_aim = {aim: (said, is_so) for aim, said, is_so in aims(found, DEFAULT.label)}
    assert by_aim["no breed under 60 % of the gap at 400"] == ("50 %, breed1", False)
    assert all(is_so is None for *_, is_so in aims({DEFAULT.label: {}, IN_TABLES.label: {}}, DEFAULT.label))  # nothing is claimed


def test_best_rivals_are_those_that_every_breed_has():
    found = invented()
    label = RIVALS[2].label
    for budget in (400, 800):
        for record in found[label][budget].values():
            record.update(loss=0.001)
    del found[label][800]["breed0", 0]
    best = best_rivals(found)
    assert best[400]["loss"].label == label and best[800]["loss"].label != label
    assert best_rivals({form.label: {} for form in RIVALS}) == {}


def shift(found: dict, label: str, budgets: tuple[int, ...], score: str, by: float) -> None:
    for budget in budgets:
        for record in found[label][budget].values():
            record[score] += by


def test_choice_of_a_form():
    """Only a form that wins at two budgets in one score and loses nowhere replaces the trainer as it is."""
    found = invented()
    clip, basis, vectors = "clip 0.1", "basis 24", "two vectors"
    assert chosen_form(found, FORMS) is DEFAULT  # all alike
    shift(found, clip, (200,), "attributes", 0.1)
    shift(found, clip, (400,), "gap", 0.1)
    shift(found, vectors, (200, 400, 1500), "attributes", 0.5)
    assert chosen_form(found, FORMS) is DEFAULT  # one budget of each score; and another number of vectors
    shift(found, clip, (1500,), "attributes", 0.1)
    assert chosen_form(found, FORMS).label == clip
    shift(found, basis, (200, 400), "attributes", 0.2)
    assert chosen_form(found, FORMS).label == basis  # more attributes
    shift(found, basis, (1500,), "gap", -0.1)
    assert chosen_form(found, FORMS).label == clip  # the other loses somewhere
    assert chosen_form({form.label: {} for form in FORMS}, FORMS) is DEFAULT


def test_third_round():
    """The rule that the new seed alone cannot satisfy is satisfied by all rounds together; the search's shorter name counts."""
    first, third = invented(), {label: invented()[label] for label in (DEFAULT.label, BESIDE.label)}
    for budget in (200, 400):
        for breed, record in enumerate(first["basis 24"][budget].values()):
            record["attributes"] += 0.1 + 0.01 * breed
    del first[BESIDE.label]
    for records in (*third[DEFAULT.label].values(), *third[BESIDE.label].values()):
        for seed_0 in list(records):
            records[seed_0[0], 1] = records.pop(seed_0)
    alone, together = third_notes(third, [first]).split("# All rounds together")
    assert "Chosen: Gauss-Newton.\n" in alone and f"Chosen: {BESIDE.label}.\n" in together
    assert len(pooled([first, third])[BESIDE.label][200]) == 6 and "3 breeds, each the mean" in together


def test_tables_and_page():
    """Our row wins if it is better on every breed, also in loss, where lower is better; filling a page twice changes nothing."""
    found = invented(better=0.1)
    tables = measured_tables(found, DEFAULT.label, best_rivals(found))
    first = tables["verdicts"].lines[0]
    assert first[0] == "100" and first[2:] == ["wins", "wins"]
    assert len(tables["verdicts"].lines) == 4 * len(BUDGETS)
    page = (ROOT / "docs/gauss_newton.md").read_text()
    filled = fill(page, tables)
    assert fill(filled, tables) == filled and all(table.markdown() in filled for table in tables.values())
    assert "Not measured yet.\n" not in filled


def test_records_are_read_as_they_were_written(tmp_path):
    found = invented()
    write_found(tmp_path / "results.json", found, ["0123456"])
    assert read_found(tmp_path / "results.json") == (
        {label: {budget: {key: dict(record, subject=key[0], seed=key[1]) for key, record in records.items()}
                 for budget, records in of.items()} for label, of in found.items()}, ["0123456"])  # fmt: skip
    assert fewer_forwards.searched_rivals(tmp_path) == {}  # there was no search
    write_found(tmp_path / "search.json", found, ["0123456"])
    assert fewer_forwards.searched_rivals(tmp_path) == best_rivals(found) != {}


def test_a_report_does_not_replace_one_of_more_runs(tmp_path):
    """--report_only on a fresh clone finds few runs or none; the record that came with it stays."""
    found = invented()
    fewer_forwards.write_report(tmp_path, "SEARCH", "all", found, ["0123456"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fewer = found | {RIVALS[0].label: {}}
    with pytest.raises(InputError, match="search.json has [0-9]+ scored tokens and the runs here only [0-9]+; give another"):
        fewer_forwards.write_report(tmp_path, "SEARCH", "fewer", fewer, [])
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fewer_forwards.write_report(tmp_path, "SEARCH", "the same runs", found, ["0123456"])
    assert "the same runs" in (tmp_path / "SEARCH.md").read_text()


def test_the_page_and_the_report_have_the_tables_of_their_record():
    """Their tables are those that the record makes now; only the sheets need the runs."""
    report = ROOT / "reproduction/fewer_forwards"
    found, _ = read_found(report / "results.json")
    tables = measured_tables(found, DEFAULT.label, fewer_forwards.searched_rivals(report))
    page = (ROOT / "docs/gauss_newton.md").read_text()
    assert fill(page, tables) == page
    text = (report / "RESULTS.md").read_text()
    assert all(table.lines and table.markdown() in text for table in tables.values())


def test_search_notes():
    found = invented()
    text = search_notes(found, FORMS, 3)
    assert all(form.label in text for form in (*FORMS, *RIVALS))
    stopping = stopping_notes([found[DEFAULT.label]])
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in stopping.splitlines() if line.startswith("|")}
    assert float(rows["the last budget"][1].strip(" |")) > 0.5 > -0.5 > float(rows["highest contrast"][1].strip(" |"))
    assert float(rows["highest contrast"][0]) < float(rows["most attributes: the best that a signal could do"][0])
    assert search_notes(invented() | {form.label: {} for form in FORMS}, FORMS, 3)  # before anything is done
    second = second_notes({form.label: found[DEFAULT.label] for form in SECOND_ROUND}, SECOND_ROUND, 3, 2)
    assert all(form.label in second for form in SECOND_ROUND) and "Chosen: Gauss-Newton." in second
    assert "|  | 200 | 400 | 1500 |" in second and "The paper's loop" not in second


def test_runs_done_are_collected(settings):
    """A form's points with the gap that they close: 0 at the class word's loss, 1 at that of converged gradients."""
    end = replace(ENDS[1], flags=dict(max_train_steps=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewer_forwards, "ENDS", (ENDS[0], end))
        for form in (ENDS[0], end, SMALL):
            fewer_forwards.do(fewer_forwards.job_of(form, "dog6", 0, settings), settings)
        found = fewer_forwards.collect([SMALL], ["dog6", "absent"], [0], settings)
    start, last = found[START][0]["dog6", 0], found[END][0]["dog6", 0]
    assert start["gap"] == 0 and last["gap"] == pytest.approx(1)
    point = found["small"][200]["dog6", 0]
    assert point["gap"] == pytest.approx((start["loss"] - point["loss"]) / (start["loss"] - last["loss"]))
    assert set(found["small"]) == {100, 200}
