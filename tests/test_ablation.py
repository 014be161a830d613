"""The ablation on a small scale: what it trains, measures, keeps and concludes."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
import tyro

import adavid
import train
from tests.test_report import Tags
from tests.test_train import complaint
from tiny_wan import ToyCodec, world
from tools import ablation, ablation_report
from runtime.data import Shards

CONDITIONS = """
seeds = [0, 1]
prompt_seed = 3000
prompts = 12
flags = "--steps 1 --batch-size 2"
development = [10, 1010]

[data.spoilt]
count = 30
share = 0.5
kinds = ["cut", "night"]

[students]
dmd = { flags = "--lambda-reg 0 --lambda-temp 0" }
avd = { data = "spoilt", replace = ["temporal_loss"] }

[rows]
real = { title = "real videos", sampler = "real" }
teacher = { title = "teacher", steps = 2 }
dmd = { title = "DMD", student = "dmd", strides = [1, 1, 1, 1] }
avd = { title = "AVD", student = "avd" }
renumbered = { title = "AVD <renumbered>", student = "avd", renumbered = true }
mean = { title = "AVD, plain mean", student = "avd", interpolator = "mean", seeds = 1 }

[[questions]]
asks = "Which loss cures what?"
rows = ["real", "teacher", "dmd", "avd"]
columns = ["instance", "saturation"]
differences = [["avd", "dmd"]]
plots = ["instance", "saturation"]
answer = "None, after one update."

[[questions]]
asks = "Where do frames stand?"
rows = ["avd", "renumbered", "mean"]
columns = ["motion", "motion_open"]
plots = ["motion"]
x = "gflops"
answer = "Where they were."

[[claims]]
says = "DMD oversaturates"
tests = [{ row = "dmd", against = "real", column = "saturation", sign = 1 },
         { row = "real", against = "dmd", column = "saturation", sign = 1, when = "it is <not>" }]
"""


def flags(folder):
    return ["--conditions", str(folder / "conditions.toml"), "--results", str(folder / "results"),
            "--out", str(folder / "out")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "conditions.toml").write_text(CONDITIONS)
    assert ablation.main(flags(folder)) == 0
    return folder


def test_all_rows_and_seeds_are_measured_on_the_same_prompts_and_nothing_twice(
        folder, tmp_path, capsys):
    files = sorted(f.name for f in (folder / "results").glob("*.json"))
    assert files == sorted(f"{row}-{seed}.json" for row in (
        "real", "teacher", "dmd", "avd", "renumbered", "mean") for seed in (0, 1)
        if (row, seed) != ("mean", 1))
    results = {f: json.loads((folder / "results" / f).read_text()) for f in files}
    assert all(len(r["scores"]["instance"]) == 12 for r in results.values())
    assert len({tuple(r["scores"]["flicker"]) for r in results.values()}) == len(files)
    assert results["real-0.json"]["frechet"] == pytest.approx(0, abs=1e-9)
    assert results["teacher-0.json"]["gflops"] == pytest.approx(
        results["dmd-0.json"]["gflops"], rel=1e-3)  # two guided steps are four forwards
    assert results["avd-0.json"]["gflops"] < 0.9 * results["dmd-0.json"]["gflops"]
    assert results["avd-0.json"]["weights"]["cut"]["weight"][0] < 0.5

    table = ablation.Measurements(ablation.read_conditions(folder / "conditions.toml"),
                                  folder / "results")
    for column, (_, is_share) in ablation.COLUMNS.items():
        mean, low, high = table.difference("mean", "avd", column)  # over the seed that both have
        assert low <= high and (mean == pytest.approx(0, abs=1e-9) or low < high or not is_share)

    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "out")
    assert ablation.main([*flags(copy), "--rows", "real", "dmd"]) == 0
    assert "| DMD |" in capsys.readouterr().out and not list((copy / "out").iterdir())


def test_spoilt_videos_are_in_the_shards(folder):
    data = Shards(folder / "out" / "data-spoilt-0", 0)
    latents, _, prompts = data.batch(range(30))
    real, real_prompts = world.make(ablation.DATA_SEED, range(30))
    assert sorted(prompts) == sorted(real_prompts)
    real = {tuple(v.flatten()[:50].tolist()) for v in ToyCodec().encode(real).half().float()}
    same = sum(tuple(v.flatten()[:50].tolist()) in real for v in latents)
    assert 8 <= same <= 28  # night changes all pixels, cut the last four frames


@pytest.mark.parametrize("kind", ablation.KINDS)
def test_each_kind_of_spoilt_video_is_what_its_name_says(kind):
    real, prompts = world.make(0, range(64))
    spoilt = ablation.spoil(kind, real, torch.Generator().manual_seed(0))
    assert spoilt.shape == real.shape and 0 <= spoilt.min() and spoilt.max() <= 1
    score, read = world.score(spoilt, prompts), world.read(spoilt)
    right = {"mislabelled": score["prompt"], "cut": score["instance"],
             "frozen": score["dynamic"], "noisy": score["instance"]}
    if kind == "night":
        assert (read["ground"] < 0.2).all() and score["prompt"].mean() > 0.9
    else:
        assert right[kind].mean() < 0.35


def test_the_frechet_distance_is_that_of_normal_distributions(monkeypatch):
    (real, _), (other, _) = (world.make(seed, range(500)) for seed in (0, 1))
    assert ablation.frechet(real, real) == pytest.approx(0, abs=1e-9)
    assert 0 < ablation.frechet(other, real) < 0.3  # what chance makes of 500 videos
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=g).double())[0]
    normals = {"a": (torch.tensor([1., 2, 3]).double(), turn.T @ torch.diag(
        torch.tensor([4., 9, 0]).double()) @ turn),
        "b": (torch.tensor([1., 0, 3]).double(), turn.T @ torch.diag(
            torch.tensor([1., 1, 4]).double()) @ turn)}
    monkeypatch.setattr(ablation, "moments", lambda name, _: normals[name])
    assert ablation.frechet("a", "b") == pytest.approx(4 + 1 + 4 + 4)


def test_the_relative_temporal_loss_sees_through_contrast():
    video, _ = world.make(0, range(4))
    x0 = ToyCodec().encode(video)
    x0 = x0 - x0.mean()
    plain, relative = adavid.temporal_loss, ablation.relative_temporal_loss
    assert relative(3 * x0).item() == pytest.approx(relative(x0).item(), abs=1e-4)
    assert plain(3 * x0) < plain(x0) - 2
    assert relative(x0, truncation=100.0) == 0


def measured(tmp_path, scores):
    """A row for each entry of `scores`, `[seeds, prompts]` of "saturation"."""
    conditions = {"seeds": [0, 1, 2], "prompts": 200, "prompt_seed": 3000, "flags": "",
                  "students": {}, "data": {}, "rows": {name: {"title": name} for name in scores}}
    for name, values in scores.items():
        for seed, row in zip(conditions["seeds"], values):
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps({
                "definition": ablation.definition(conditions, name),
                "scores": {"saturation": row.tolist(), "direction": [None] * 200}}))
    return ablation.Measurements(conditions, tmp_path)


def test_intervals_cover_seeds_as_well_as_prompts_and_differences_are_paired(tmp_path):
    rng = np.random.default_rng(0)
    luck = np.array([[0.2], [0.5], [0.8]]) + 0.1 * rng.normal(size=(3, 200))
    table = measured(tmp_path, {
        "real": np.ones((3, 200)), "a": luck, "b": luck + 0.02 + 0.01 * rng.normal(size=(3, 200))})
    mean, low, high = table.of("a", "saturation")
    assert mean == pytest.approx(0.5, abs=0.02) and low < 0.31 and high > 0.69
    mean, low, high = table.difference("b", "a", "saturation")
    assert 0.015 < low < 0.02 < high < 0.025

    def says(*tests):
        claim = {"says": "so", "tests": [test | {"column": "saturation"} for test in tests]}
        table.conditions["claims"] = [claim]
        return ablation.verdicts(table)[1][1:]

    up = {"row": "b", "against": "a", "sign": 1}
    down = {"row": "b", "against": "a", "sign": -1}
    assert says(up)[0] == "reproduced" and says(down)[0] == "not reproduced"
    verdict, shown = says(down, up | {"when": "turned"})
    assert verdict == "reproduced when turned" and shown.count("saturation, b − a: +0.02") == 2
    assert says(up | {"sign": 0, "margin": 0.03})[0] == "reproduced"
    assert says(up | {"sign": 0, "margin": 0.01})[0] == "not reproduced"


def test_the_page_stands_alone_and_the_readme_gets_its_tables(folder):
    readme = folder / "README.md"
    readme.write_text("# Toy\n<!-- ablation: table -->\n<!-- end -->\nand\n"
                      "<!-- ablation: answers -->\nold\n<!-- end -->\n")
    for _ in range(2):
        assert ablation_report.main([*flags(folder), "--readme", str(readme)]) == 0
    page = (folder / "results" / "report.html").read_text(encoding="utf-8")
    elsewhere = [*flags(folder), "--readme", str(readme), "--out", "nowhere"]
    assert ablation_report.main(elsewhere) == 0  # without the students: their videos are kept
    assert (folder / "results" / "report.html").read_text(encoding="utf-8") == page
    tags = Tags(page)
    assert tags.count("img") in range(8, 33) and tags.count("svg") == 3 and tags.count("table") == 5
    assert not any(map(tags.count, ("script", "link", "iframe", "object")))
    assert "reproduced" in page and "AVD &lt;renumbered&gt;" in page and "<renumbered>" not in page
    assert (folder / "results" / "figure.png").stat().st_size > 5000
    table, answers = readme.read_text(encoding="utf-8").split("and\n")
    assert [line.split(" | ")[0] for line in table.splitlines()[3:-2]] == [
        "| ", "|---|---|---|", "| real videos", "| teacher", "| DMD", "| AVD", "| AVD − DMD"]
    assert "- **Where do frames stand?** Where they were." in answers and "old" not in answers


def test_a_page_without_its_main_rows_gets_one_line(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "results" / "dmd-1.json").unlink()
    readme = copy / "README.md"
    readme.write_text("as it was")
    code = ablation_report.main([*flags(copy), "--readme", str(readme)])
    assert "python -m tools.ablation" in complaint(capsys, code)
    assert readme.read_text() == "as it was"


def test_the_readme_says_what_the_committed_measurements_say():
    """`python -m tools.ablation_report` would change nothing."""
    measured = ablation.Measurements(ablation.read_conditions(ablation.CONDITIONS),
                                     ablation.RESULTS)
    readme = ablation_report.Page.readme.read_text(encoding="utf-8")
    assert measured.has(measured.conditions["rows"]) and readme.count("<!-- ablation: ") == 3
    assert ablation_report.filled(readme, measured) == readme


def test_the_full_method_takes_a_thirtieth_of_the_teachers_flops():
    measured = ablation.Measurements(ablation.read_conditions(ablation.CONDITIONS),
                                     ablation.RESULTS)
    teacher, avd = (measured.of(row, "gflops")[0] for row in ("teacher-50", "avd"))
    assert teacher > 30 * avd


def test_the_committed_conditions_name_what_there_is():
    conditions = ablation.read_conditions(ablation.CONDITIONS)
    students, rows, data = (conditions[part] for part in ("students", "rows", "data"))
    assert {row["student"] for row in rows.values() if "student" in row} == set(students)
    assert {student["data"] for student in students.values() if "data" in student} == set(data)
    assert all("title" in row for row in rows.values())
    questions, tests = conditions["questions"], sum((c["tests"] for c in conditions["claims"]), [])
    named = [row for q in questions for row in sum(q.get("differences", []), q["rows"])]
    assert {*named, *(test[side] for test in tests for side in ("row", "against"))} == set(rows)
    columns = [column for q in questions for column in (*q["columns"], *q["plots"])]
    assert {*columns, *(test["column"] for test in tests)} <= set(ablation.COLUMNS)
    for student in students.values():
        flags = shlex.split(student.get("flags", ""))
        tyro.cli(train.Distill, args=["--out", "x", *flags])


@pytest.mark.parametrize("old, new, says", [
    ("seeds = [0, 1]", "seeds = [0, 10]", "share a random stream"),
    ("prompt_seed = 3000", "prompt_seed = 1000", "share a random stream"),
    ("prompts = 12", "prompts =", "conditions.toml")])
def test_conditions_that_are_wrong_get_one_line(old, new, says, tmp_path, capsys):
    (tmp_path / "conditions.toml").write_text(CONDITIONS.replace(old, new))
    assert says in complaint(capsys, ablation.main(flags(tmp_path)))


def test_rows_that_are_unknown_and_students_that_fail_get_one_line(tmp_path, capsys):
    (tmp_path / "conditions.toml").write_text(CONDITIONS.replace("--steps", "--stepz"))
    assert "nosuch" in complaint(capsys, ablation.main([*flags(tmp_path), "--rows", "nosuch"]))
    assert "stepz" in complaint(capsys, ablation.main([*flags(tmp_path), "--rows", "dmd"]))
