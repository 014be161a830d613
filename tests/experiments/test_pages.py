"""What README.md and docs/ say of the experiments, and the flags that they name."""

import re
from functools import partial
from pathlib import Path

import adavid
from experiments import ablation, baselines, bench, gallery, lesson, teacher, world
from tests.helpers import ROOT, read_lines
from tests.test_readme import PAGES, SMALL, TRAINING, code, commands, run, text_of
from tests.test_readme import PROGRAMS as PRODUCT

PROGRAMS = PRODUCT | {
    "experiments.ablation": ablation.main, "experiments.bench": bench.main,
    "experiments.gallery": gallery.main, "experiments.lesson": lesson.main,
    "experiments.teacher": teacher.main, "experiments.world": world.main,
    "experiments.baselines": baselines.main}


def test_the_training_pages_teacher_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = partial(adavid.sample_teacher, steps=2)  # for the teacher's pictures, not 50
    monkeypatch.setattr(adavid, "sample_teacher", few)
    line, = (line for line in commands(TRAINING) if "experiments.teacher" in line)
    small = {"experiments.teacher": SMALL["train.py"]}
    assert run(line.replace("--compile", "--score-prompts 4"), small, PROGRAMS)
    assert all(f"`{name}`" in text_of(TRAINING)
               for name in read_lines(Path("runs/teacher/metrics.jsonl"))[-1] if name != "step")


def test_the_page_on_other_methods_runs(toy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "baselines.md"
    small = {"train.py": SMALL["train.py"], "experiments.baselines": SMALL["train.py"],
             "sample.py": ["--device", "cpu"]}
    for line in commands(page):
        if "ablation" not in line:  # which takes an hour
            run(line if "sample.py" in line else f"{line} --model {toy_folder}", small, PROGRAMS)
    for method in baselines.METHODS:
        for name in read_lines(Path(f"runs/{method}/metrics.jsonl"))[-1]:
            said = text_of(page) + text_of(TRAINING)
            assert name == "step" or f"`{name}`" in said, f"{name} is not in the docs"


def test_flags_in_the_docs_exist(capsys):
    known = {  # of hf, VBench, torchrun, pytest and torture
        "--local-dir", "--dimension", "--max-restarts", "--shutdown-timeout", "--nnodes", "--dist",
        "--maxprocesses", "--no-loadscope-reorder", "--ranks"}
    stages = {"train.py": [["interpolator"], ["distill"]],
              "experiments.baselines": [["lcm"]], "tools.plan": [["distill"], ["sample"]]}
    for name, main in PROGRAMS.items():
        for stage in stages.get(name, [[]]):
            assert main([*stage, "--help"]) == 0
            known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for page in PAGES:
        used = re.findall(r"(?<![\w-])--[a-z][a-z-]+(?!\w)", code(page))
        assert set(used) <= known, page.name
