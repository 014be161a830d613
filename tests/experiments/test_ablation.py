"""The ablation on a small scale: what it trains, measures, keeps and concludes."""

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import adavid
import train
from experiments import ablation, baselines, bench
from runtime import page, pictures
from runtime.data import Shards
from tests.helpers import complaint, weigh_and_update
from tiny_wan import PRESETS, WEIGHTS, ToyCodec, world
from tools import demo

CONDITIONS = """
prompt_seed = 3000
prompts = 12
taken = [10, 1010]

[data.spoilt]
count = 30
share = 0.5
kinds = ["cut", "night"]

[regimes.four]
seeds = [0, 1]
flags = "--steps 1 --batch-size 2 --critic-updates 1"

[regimes.four.students]
dmd = { flags = "--lambda-reg 0 --lambda-temp 0", forwards = 3 }
avd = { data = "spoilt", flags = "", forwards = 3 }
late = { cache = "late", flags = "", forwards = 3 }

[regimes.four.rows]
real = { title = "real videos", sampler = "real" }
teacher = { title = "teacher", steps = 2 }
dmd = { title = "DMD", student = "dmd", strides = [1, 1, 1, 1] }
avd = { title = "AVD", student = "avd" }
renumbered = { title = "AVD, renumbered", student = "avd", renumbered = true }
mean = { title = "AVD, plain mean", student = "avd", interpolator = "mean", seeds = 1 }
late = { title = "AVD, late", student = "late", seeds = 1 }

[regimes.two]
seeds = [5]
flags = "--steps 1 --batch-size 2 --timesteps 1000 757 --strides 1 1 --train-strides 1 1"

[regimes.two.students]
guidance = { critic = "teacher", flags = "--lambda-reg 0 --lambda-temp 0", forwards = 3 }

[regimes.two.rows]
two-real = { title = "real videos", sampler = "real" }
two-teacher = { title = "teacher, 2 steps", timesteps = [1000, 757], strides = [1, 1] }
guidance = { title = "guidance alone", student = "guidance" }

[summary]
rows = ["real", "dmd", "avd"]
columns = ["instance"]

[figures.training]
x = "forwards"
columns = ["instance"]
lines = { DMD = ["dmd"], AVD = ["avd"] }

[[questions]]
asks = "Which loss cures what?"
rows = ["real", "teacher", "dmd", "avd"]
columns = ["instance", "saturation", "forwards"]
differences = [["avd", "dmd"]]
plots = ["instance", "saturation"]

[[questions]]
asks = "Where do frames stand?"
rows = ["avd", "renumbered", "mean", "late"]
columns = ["motion", "motion_open"]
plots = ["motion"]

[[claims]]
says = "DMD oversaturates"
tests = [{ row = "dmd", against = "real", column = "saturation", sign = 1 }]
"""


def flags(folder):
    return ["--conditions", str(folder / "conditions.toml"), "--docs", str(folder / "docs"),
            "--out", str(folder / "out")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole ablation, after one update of each student."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "conditions.toml").write_text(CONDITIONS)
    assert ablation.main(flags(folder)) == 0
    return folder


def read_measurements(docs):
    text = gzip.decompress((docs / "measurements.jsonl.gz").read_bytes()).decode()
    return list(map(json.loads, text.splitlines()))


def measurements(folder):
    lines = read_measurements(folder / "docs")
    return {(line["row"], line["seed"]): line for line in lines}


@pytest.mark.long
def test_all_rows_and_seeds_are_measured_on_the_same_prompts_and_nothing_twice(folder, tmp_path):
    lines = measurements(folder)
    assert lines.keys() == {(row, seed) for row in (
        "real", "teacher", "dmd", "avd", "renumbered", "mean", "late") for seed in (0, 1)} - {
        ("mean", 1), ("late", 1)} | {
        (row, 5) for row in ("two-real", "two-teacher", "guidance")}
    assert all(len(line["scores"]["instance"]) == 12 for line in lines.values())
    assert len({tuple(line["scores"]["flicker"]) for line in lines.values()}) == len(lines)
    assert lines["avd", 0]["gflops"] < 0.9 * lines["dmd", 0]["gflops"]
    assert lines["avd", 0]["weights"]["cut"][0] < 0.5
    assert lines["avd", 0]["weights"]["correlation with grain"][1] < -0.5
    assert "weights" not in lines["late", 0]  # whose cache is another
    assert lines["two-teacher", 5]["gflops"] == pytest.approx(lines["guidance", 5]["gflops"])
    assert lines["guidance", 5]["steps"] == 2 < lines["dmd", 0]["steps"]

    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "out")
    (copy / "conditions.toml").write_text(CONDITIONS.replace("steps = 2", "steps = 1"))
    assert ablation.main(flags(copy)) == 0  # measures the teacher again, and trains nothing
    assert not list((copy / "out").iterdir())
    again = measurements(copy)
    assert {key for key in lines if lines[key] != again[key]} == {("teacher", 0), ("teacher", 1)}


@pytest.mark.long
def test_pages_leave_out_what_is_not_measured_yet(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    lines = [json.dumps(line) for line in read_measurements(copy / "docs") if line["row"] != "dmd"]
    (copy / "docs" / "measurements.jsonl.gz").write_bytes(
        gzip.compress("\n".join(lines).encode()))
    (copy / "docs" / "results.md").write_text("<!-- results -->\n<!-- end -->\n"
                                              "<!-- answers -->\n<!-- end -->\n")
    assert ablation.main([*flags(copy), "--pages"]) == 0
    text = (copy / "docs" / "results.md").read_text()
    assert "real videos" in text and "DMD" not in text
    assert "Where do frames stand?" in text and "Which loss cures what?" not in text


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C from the console alone")
def test_ctrl_c_saves_the_students_and_starts_no_others(tmp_path):
    (tmp_path / "conditions.toml").write_text(CONDITIONS.replace("--steps 1 ", "--steps 999 "))
    process = subprocess.Popen([sys.executable, "-m", "experiments.ablation", *flags(tmp_path)],
                               stderr=subprocess.PIPE, text=True)
    students = tmp_path / "out"
    while not (logs := list(students.glob("*/times.jsonl"))) or not logs[0].read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in said
    started = list(students.glob("*/log.txt"))
    assert len(started) <= os.cpu_count() and any(
        "to resume" in log.read_text() for log in started)


def test_spoilt_videos_are_in_the_shards(tmp_path):
    ablation.write_shards(tmp_path, 0, count=30, share=0.5, kinds=["cut", "night"])
    data = Shards(tmp_path, 0)
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
    assert spoilt.shape == real.shape and spoilt.min() >= 0 and spoilt.max() <= 1
    score = world.score(spoilt, prompts)
    right = {"mislabelled": score["prompt"], "cut": score["instance"],
             "frozen": score["dynamic"], "noisy": score["instance"]}
    if kind == "night":
        assert (score["ground"] < 0.2).all() and score["prompt"].mean() > 0.9
    else:
        assert right[kind].mean() < 0.35


def test_the_frechet_distance_is_that_of_normal_distributions(monkeypatch):
    size = len(ablation.READINGS)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size, 500, generator=g).double()
    x = x - x.mean(1, keepdim=True)
    x = torch.linalg.inv(torch.linalg.cholesky(x.cov())) @ x  # covariance: exactly the identity
    turn = torch.linalg.qr(torch.randn(size, size, generator=g).double())[0]
    spread = torch.tensor([2.0, 3.0, 0.0] + [1.0] * (size - 3)).double()
    readings = {"real": 5 * x + 7, "other": 5 * (turn * spread @ turn.T @ x + 2) + 7}
    monkeypatch.setattr(world, "read", lambda name, prompts: {
        reading: values[:, None] for reading, values in zip(ablation.READINGS, readings[name])})
    assert ablation.frechet("other", "real", []) == pytest.approx(size * 2**2 + 1 + 2**2 + 1)


def test_the_late_cache_gives_no_weight_at_the_first_step():
    cache, plain = ablation.LateCache(3), adavid.LossMeanCache(3)
    step, loss = torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0])
    for more in (0.0, 1.0):
        weights, whole = (weigh_and_update(c, step, loss + more) for c in (cache, plain))
        assert weights.tolist() == [0, *whole[1:].tolist()]
    assert torch.equal(cache.means, plain.means)


def test_matching_and_guidance_add_up_to_eq_4():
    """With the normaliser of eq. 4, which all three share here."""
    g = torch.Generator().manual_seed(0)
    x0, text = torch.randn(2, 12, 3, 4, 4, generator=g), torch.zeros(2, 1, 1)
    null_text = torch.ones(1, 1, 1)
    config = adavid.AVDConfig(guidance_scale=3.0)

    def teacher(x, t, text):
        return x * (1 + text.view(-1, 1, 1, 1, 1)) ** 2 / 4

    def critic(x, t, text):
        return x / 3

    def gradient(loss):
        """Of the loss of `x0`, times the normaliser."""
        x = x0.clone().requires_grad_()
        loss(x, teacher, critic, text, null_text, config,
             torch.Generator().manual_seed(1)).backward()
        return x.grad * x0.numel() * normaliser

    generator = torch.Generator().manual_seed(1)
    t = adavid.random_timesteps(x0, config, generator)
    x_t = adavid.add_noise(x0, adavid.draw(torch.randn, x0.shape, x0, generator), t)
    v = adavid.guided_velocity(teacher, x_t, t, text, null_text, 3.0)
    normaliser = (x0 - adavid.velocity_to_x0(v, x_t, t)).abs().mean((1, 2, 3, 4), keepdim=True)
    matching = (adavid.predict_x0(critic, x_t, t, text) - adavid.predict_x0(teacher, x_t, t, text))
    torch.testing.assert_close(gradient(adavid.distribution_matching_loss),
                               matching + gradient(ablation.guidance_loss))


def measured(tmp_path, scores):
    """A row for each entry of `scores`, `[seeds, prompts]` of "saturation"."""
    conditions = {"prompts": 200, "prompt_seed": 3000,
                  "students": {}, "data": {},
                  "rows": {name: {"title": name, "seeds": [0, 1, 2], "real": "real"}
                           for name in scores}}
    result = ablation.Measurements(conditions, tmp_path / "measurements.jsonl.gz")
    result.save([{"row": name, "seed": seed, "definition": ablation.definition(conditions, name),
                  "scores": {"saturation": row.tolist(), **{
                      failure: (0 * row + i / 10).tolist()
                      for i, failure in enumerate(world.FAILURES)}}}
                 for name, values in scores.items() for seed, row in enumerate(values)])
    return ablation.Measurements(conditions, result.file)


@pytest.mark.parametrize("spread", [0.01, 0.02, 0.03, 0.06])
def test_a_95_percent_interval_of_ten_seeds_covers_the_truth_in_93_to_97_percent(spread):
    """Made-up instance preservation, with 512 prompts for each seed, and seeds that differ."""
    rng, truth, covered = np.random.default_rng(0), 0.8, 0
    for _ in range(4000):
        rates = rng.normal(truth, spread, size=10).clip(0, 1)
        _, low, high = ablation.mean_and_interval(rng.binomial(512, rates) / 512)
        covered += low <= truth <= high
    assert 0.93 <= covered / 4000 <= 0.97


def test_a_seed_is_one_observation_and_differences_are_paired(tmp_path):
    rng = np.random.default_rng(0)
    luck = np.array([[0.2], [0.5], [0.8]]) + 0.1 * rng.normal(size=(3, 200))
    other = luck + np.array([[0.09], [0.10], [0.11]]) + 0.001 * rng.normal(size=(3, 200))
    table = measured(tmp_path, {"real": np.ones((3, 200)), "a": luck, "b": other})
    mean, low, high = table.interval("saturation", "a")
    half = 4.303 * luck.mean(1).std(ddof=1) / 3**0.5  # Student's t with two degrees of freedom
    assert mean == pytest.approx(luck.mean()) and high - low == pytest.approx(2 * half)
    mean, low, high = table.interval("saturation", "b", "a")
    assert mean == pytest.approx(0.1, abs=1e-3) and high - mean == pytest.approx(
        4.303 * 0.01 / 3**0.5, rel=0.05)
    assert np.isnan(ablation.mean_and_interval(np.ones(1))[1])

    def says(*tests):
        claim = {"says": "so", "tests": [test | {"column": "saturation"} for test in tests]}
        table.conditions["claims"] = [claim]
        return ablation.verdicts(table)[1][1:]

    up = {"row": "b", "against": "a", "sign": 1}
    down = {"row": "b", "against": "a", "sign": -1}
    assert says(up)[0] == "reproduced" and says(down)[0] == "contradicted"
    assert says(up | {"row": "a"})[0] == says(down | {"row": "a"})[0] == "not reproduced"
    verdict, shown = says(down, up | {"when": "turned"})
    assert verdict == "reproduced when turned" and shown.count("saturation, b − a: +0.1") == 2
    assert says(up | {"sign": 0, "margin": 0.13})[0] == "reproduced"
    assert says(up | {"sign": 0, "margin": 0.1})[0] == "not decided"
    assert says(up | {"sign": 0, "margin": 0.07})[0] == "contradicted"


def test_the_memory_to_train_is_that_of_models_gradients_and_moments():
    lcm, avd = (ablation.training_memory(student) for student in ({"method": "lcm"}, {}))
    assert lcm / avd == pytest.approx(24 / 32)  # bytes a parameter, as in test_baselines.py
    assert round(avd) == 45


def test_what_a_student_starts_from_is_trained_even_if_its_own_rows_are_measured(tmp_path):
    table = measured(tmp_path, {"real": np.ones((3, 200)), "dmd": np.ones((3, 200))})
    table.conditions["rows"] |= {"dmd": {"student": "dmd", "seeds": [0]},
                                 "dfd": {"student": "dfd", "seeds": [0, 1]}}
    table.conditions["students"] = {"dmd": {}, "dfd": {"init": "dmd"}}
    assert ablation.missing(table.conditions, table) == {
        ("dfd", 0): ["dfd"], ("dfd", 1): ["dfd"], ("dmd", 0): [], ("dmd", 1): []}


@pytest.mark.long
def test_a_row_measured_again_is_printed_beside_its_first_measurement(folder, tmp_path, capsys):
    again = [*flags(folder)[:4], "--out", str(tmp_path), "--row"]
    assert ablation.main([*again, "teacher"]) == 0
    heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.split() == ["teacher,", "seed", "0", "again", "first"]
    assert {line.split()[0] for line in lines} >= {"instance", "saturation", "frechet"}
    assert all(line.split()[1] == line.split()[2] for line in lines)
    assert "rows real, teacher" in complaint(capsys, ablation.main([*again, "nosuch"]))


@pytest.mark.long
def test_quick_draws_the_main_rows_in_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conditions.toml").write_text(CONDITIONS)
    assert ablation.main(["--conditions", "conditions.toml", "--quick"]) == 0
    lines = read_measurements(Path("runs/ablation-quick"))
    assert {(line["row"], line["seed"], len(line["scores"]["prompt"])) for line in lines} == {
        (row, 0, 64) for row in ("real", "teacher", "dmd", "avd")}
    assert (tmp_path / "runs" / "ablation-quick" / "figures" / "ablation.png").exists()
    assert "| DMD |" in capsys.readouterr().out


# --- what is committed -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return ablation.Measurements(ablation.read_conditions(ablation.CONDITIONS),
                                 ablation.DOCS / "measurements.jsonl.gz")


@pytest.fixture(scope="module")
def blocks(committed):
    return ablation.blocks(committed.finished())


@pytest.mark.parametrize("file, names", [
    ("README.md", ["results"]),
    ("docs/results.md", ["methods", "claims", "answers", "weights"]),
    ("docs/costs.md", ["recipes"])])
def test_the_pages_say_what_the_measurements_say(blocks, file, names, tmp_path):
    text = (ablation.DOCS.parent / file).read_text(encoding="utf-8")
    assert all(text.count(f"<!-- {name} -->\n") == 1 for name in names)
    copy = tmp_path / "page.md"
    copy.write_text(text, encoding="utf-8")
    page.fill(copy, blocks)
    assert copy.read_text(encoding="utf-8") == text


def sign(measured, column, row, other):
    """Of a difference, or 0 if its interval includes 0."""
    _, low, high = measured.interval(column, row, other)
    return int(low > 0) - int(high < 0)


def test_the_answers_follow_from_the_measurements(committed):
    for question in committed.finished().conditions["questions"]:
        for column, row, other, expected in question.get("holds", ()):
            assert sign(committed, column, row, other) == expected, question["answer"]


def test_what_results_md_says_in_words_follows_from_the_measurements(committed):
    def order(column):
        real = committed.interval(column, "real")[0]
        return sorted(committed.conditions["tables"]["methods"]["rows"][1:],
                      key=lambda row: abs(committed.interval(column, row)[0] - real))

    for column in ("instance", "saturation"):
        assert order(column)[:2] == ["lcm", "avd"]
    assert {*order("saturation")[-2:]} == {"dmd", "dfd"}
    assert sign(committed, "instance", "lcm-60", "lcm") == 0
    for row in ("avd-full", "cheap-half"):
        assert sign(committed, "saturation", row, "avd") == 1
    for column in ("instance", "motion_open", "saturation"):
        assert abs(committed.interval(column, "plain-mean", "avd")[0]) < 0.02
    assert sign(committed, "saturation", "avd-full", "temp") == 0
    assert sign(committed, "saturation", "avd-strong", "temp") == -1
    assert committed.interval("saturation", "avd-strong")[0] < 1.1  # "almost natural"
    late, strong = (ablation.said(*committed.interval("instance", *rows), sign="+") for rows in (
        ("late", "avd-full"), ("late-strong", "avd-strong")))
    assert f"changes by {late}, and with eight times the regression by {strong}" in (
        ablation.DOCS / "method.md").read_text(encoding="utf-8")
    for row, other in (("late", "avd-full"), ("late-strong", "avd-strong")):
        for column in ("instance", "saturation"):
            assert abs(committed.interval(column, row, other)[0]) < 0.02  # "little difference"
    for row, other in (("avd-full", "dmd"), ("dfd-avd", "dfd")):
        assert sign(committed, "instance", row, other) == 0  # "just include zero"
        assert committed.interval("instance", row, other)[1] > -0.003
        assert sign(committed, "flicker", row, other) == -1
    assert sign(committed, "instance", "dcm-plain", "dmd") == 0
    spread = {row: committed.values(row, "instance").mean(1).std() for row in order("instance")}
    assert sorted(spread, key=spread.get)[-2:] == ["rcm", "dcm"]
    assert all(committed.interval("instance", row)[0] > 0.9
               for row in order("instance") if row != "dcm")


def test_costs_md_names_the_cheapest_recipe_that_is_not_worse(committed):
    """A reading is worse if it is measurably farther from that of real videos."""
    first, *cheaper = committed.conditions["tables"]["recipes"]["rows"]
    worse = {}
    for row in cheaper:
        worse[row] = []
        for column in ("instance", "prompt", "motion_open", "saturation", "flicker"):
            mean, low, high = committed.interval(column, row, first)
            usual, real = (committed.interval(column, name)[0] for name in (first, "real"))
            if not low <= 0 <= high and abs(usual + mean - real) > abs(usual - real):
                worse[row].append(column)
    assert worse.pop("cheap-half") == ["saturation", "flicker"] and not any(worse.values())
    cheapest = min(worse, key=lambda row: committed.interval("per_cycle", row)[0])
    flags = committed.conditions["students"][cheapest]["flags"]
    steps, rest = re.fullmatch(r"(--steps \d+) (.*)", flags).groups()
    text = (ablation.DOCS / "costs.md").read_text(encoding="utf-8")
    assert f"\npython train.py distill {rest} {steps} --out" in text


def test_the_full_method_takes_a_thirtieth_of_the_teachers_flops(committed):
    teacher, avd = (committed.interval("gflops", row)[0] for row in ("teacher-50", "avd"))
    assert teacher > 30 * avd


def test_the_conditions_are_flags_of_train_and_share_no_random_stream(committed):
    assert {pictures.GRID_SEED, demo.DEMO_SEED} <= set(committed.conditions["taken"])
    for student in committed.conditions["students"].values():
        flags = tyro.cli(train.Distill, args=["--out", "x"])
        if method := student.get("method"):
            numbers = baselines.default_numbers(method, WEIGHTS)
            flags = baselines.Baseline(Path("x"), numbers=numbers)
        flags = tyro.cli(type(flags), default=flags, args=shlex.split(student["flags"]))
        assert student["forwards"] == pytest.approx(forwards(student, flags), rel=0.01)


def forwards(student, flags):
    """What a student's training takes, from its flags. test_baselines.py counts an update."""
    per_update = {"lcm": 6, "dcm": 7.88, "rcm": 33}
    if (method := student.get("method")) in per_update:
        return per_update[method] * flags.steps
    numbers = flags.numbers if method else flags.avd
    shape = ToyCodec.latent_shape(ToyCodec)
    cost, strides = bench.forward_costs(PRESETS["tiny"], shape), numbers.train_strides
    served = numbers.critic_updates if not method and flags.one_rollout else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adavid, "AVDConfig", lambda: numbers)
        cycle = bench.forwards(cost, True, served, strides)
    cycle -= 0 if numbers.lambda_reg else 3
    return cycle * flags.steps + (30 * 32.5 if student.get("init") == "dmd-30" else 0)


@pytest.mark.parametrize("old, new, says", [
    ("seeds = [0, 1]", "seeds = [0, 10]", "share a random stream"),
    ("prompt_seed = 3000", "prompt_seed = 1010", "share a random stream"),
    ("prompts = 12", "prompts =", "conditions.toml"),
    pytest.param("--steps", "--stepz", "stepz", marks=pytest.mark.long)])  # a student that fails
def test_wrong_conditions_are_one_line(old, new, says, tmp_path, capsys):
    (tmp_path / "conditions.toml").write_text(CONDITIONS.replace(old, new))
    assert says in complaint(capsys, ablation.main(flags(tmp_path)))
