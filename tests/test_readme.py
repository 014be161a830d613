"""README.md, CONTRIBUTING.md and docs/: their commands run, their links lead somewhere.

Commands run word for word, but on a miniature of Wan2.1, for a step or two, and on CPUs.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from tests import miniature_wan
from tests.helpers import ROOT, read_lines, torchrun, write_clips
from tiny_wan.checkpoint import read_json
from tools import demo, encode, export, gpu_check, measure, plan

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
TRAINING, WAN = ROOT / "docs" / "training.md", ROOT / "docs" / "wan.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"sample.py": sample.main, "train.py": train.main, "tools.demo": demo.main,
            "tools.encode": encode.main, "tools.export": export.main,
            "tools.gpu_check": gpu_check.main, "tools.measure": measure.main,
            "tools.plan": plan.main}
SIZE = ["--frames", "9", "--height", "32", "--width", "32", "--device", "cpu"]
SMALL = {"sample.py": SIZE, "tools.encode": SIZE,
         "train.py": ["--steps", "1", "--batch-size", "1", "--device", "cpu"]}


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def commands(page):
    """The lines of a page's shell blocks."""
    return [line for block in blocks(page, "sh") for line in block.splitlines()]


def code(page):
    """All that a page shows as a command, in blocks and within its sentences."""
    return "\n".join([*commands(page), *re.findall(r"`[^`\n]+`", text_of(page))])


def run(line, small=SMALL, programs=PROGRAMS):
    """Run a command of the docs at a small size -> the name of the program, or None if not ours."""
    words = shlex.split(line)
    program = next((word for word in words if word in programs), None)
    if program is None:
        assert words[0] in (".", "cp", "hf", "make", "python", "python3"), line
        if words[0] == "cp":
            shutil.copy(*words[1:])
        return None
    start, args = words[1:words.index(program)], words[words.index(program) + 1:]
    args += small.get(program, [])
    if args[0] == "distill" and program == "train.py" and "--critic-updates" not in args:
        args += ["--critic-updates", "1"]
    if words[0] == "python" or program == "sample.py":  # tests/test_ranks.py has it on two ranks
        assert programs[program](args) == 0, line
    else:  # on two CPUs, however many GPUs and nodes the docs name
        here = {"8": "2", "3": "1", "HOST:29500": "localhost:0"}
        start = [here.get(word, word) for word in start]
        if torch.__version__ < "2.12":  # which has no such flag
            start = [word for word in start if word not in ("--shutdown-timeout", "3600")]
        result = torchrun(*start, ROOT / program, *args, cwd=".")
        assert result.returncode == 0, (line, result.stderr)
    return program


def run_python(code):
    """Run Python of the docs at a small size, in this folder -> the lines that it prints."""
    small = {"torch.bfloat16": "torch.float32", '"cuda"': '"cpu"', "21, 60, 104": "3, 4, 6",
             "guidance_scale=1.0": "guidance_scale=1.0, num_frames=5, height=32, width=48",
             ".cuda()": ""}
    for theirs, tiny in small.items():
        code = code.replace(theirs, tiny)
    result = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


def test_the_wan_page_runs_from_videos_to_a_student_in_stock_diffusers(
        inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    miniature_wan.make("Wan2.1-T2V-1.3B", "original")
    miniature_wan.make("Wan2.1-T2V-1.3B-Diffusers", "diffusers")
    write_clips(Path("clips"), 4, frames=17)
    for file in ("prompts.txt", "captions.jsonl"):
        shutil.copy(inputs[file], file)
    Path("own-prompts.txt").write_text("a red kite\na blue kite\n")
    originals = Path("prompts.txt").read_text().splitlines()
    Path("extended.txt").write_text("\n".join(f"{line}, in detail" for line in originals))
    for line in commands(WAN):
        if "gpu_check" in line:  # tests/test_checks.py
            continue
        line = re.sub(r"--accumulate \d+", "--accumulate 1", line)
        # This run has a report, with the teacher's videos; the others are too short for one.
        run(line + " --sample-every 1" * line.endswith("--out runs/student"))
        said = capsys.readouterr().out
        assert "--memory 12" not in line or "fits 12 GB" in said
    for name in ("lora", "student", "three-nodes"):
        assert "saturation" in read_lines(Path(f"runs/{name}/metrics.jsonl"))[-1]
    assert Path("runs/student/interpolator.safetensors").exists()
    reference = read_json(Path("runs/student/reference.json"))
    assert reference["readings"].keys() == {"teacher", "real"} and len(reference["prompts"]) == 4
    assert Path("runs/student/report.html").exists()
    assert not Path("runs/lora/report.html").exists()
    stock, ours = blocks(WAN, "python")
    shapes = run_python(f"{stock}\nprint(*video.shape)\n{ours}\nprint(*latents.shape)")
    assert shapes[-2:] == ["5 32 48 3", "1 16 3 4 6"]


def test_the_training_page_runs_and_describes_every_metric(toy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = text_of(TRAINING)
    small = {"train.py": SMALL["train.py"], "sample.py": ["--device", "cpu"]}
    for line in commands(TRAINING):
        if "experiments" in line:  # tests/experiments/
            continue
        if "train.py distill" in line:
            line += f" --model {toy_folder} --batch-size 4"
        run(line.replace("--steps 50", "--steps 2").replace("000120", "000001"), small)
    named = re.findall(r"^python (?!-m experiments).*--out runs/(\S+)", page, re.MULTILINE)
    assert {p.name for p in Path("runs").iterdir()} == set(named)
    for log in Path("runs").glob("*/metrics.jsonl"):
        for name in read_lines(log)[-1]:
            name = re.sub(r"_(1000|900|757|522)$", "_T", name)
            assert name == "step" or f"`{name}`" in page, f"{name} is not in docs/training.md"
    for file in re.findall(r"`(.*?)`", re.search(r"that they produce \((.*?)\)", page)[1]):
        assert list(Path("runs").glob(f"*/{file}")), file


def test_the_readmes_commands_are_those_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy, *wan = [line for line in commands(README) if not line.startswith((".", "make"))]
    assert run(toy, {}) == "sample.py"
    assert len(wan) == 4 and set(wan) < set(commands(WAN))


def test_every_make_target_has_its_plain_commands():
    makefile, page = text_of(ROOT / "Makefile"), text_of(CONTRIBUTING)
    recipes = re.findall(r"^([a-z][\w.-]*):.*## .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    rows = dict(re.findall(r"^\| `make ([\w.-]+)` \| (.*) \|$", page, re.MULTILINE))
    assert {name for name, _ in recipes} - {"help"} == set(rows)
    for name, recipe in recipes:
        for command in re.findall(r"\$\(RUN\) (.*)", recipe):
            command = re.sub(r"\$\(if .*", "", command)  # flags that may be given
            assert f"`python {command}`" in rows[name], name
    for doc in PAGES:
        named = re.findall(r"\bmake ([a-z][\w.-]*)", code(doc))
        assert set(named) <= {name for name, _ in recipes}, doc.name


# ---------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------


def anchors(page):
    """The fragments that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        if "experiments/" in target and not (ROOT / "experiments").exists():
            continue  # nothing depends on that folder
        assert file.exists(), target
        if fragment and file.suffix == ".md":
            assert fragment in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_to_a_line_leads_to_the_definition_that_it_names(page):
    links = re.findall(r"\[`?([^\]`]*)`?\]\(([^)]+\.py)#L(\d+)\)", text_of(page))
    assert len(links) == text_of(page).count(".py#L")
    for name, file, number in links:
        if "experiments/" in file and not (ROOT / "experiments").exists():
            continue
        lines = text_of(page.parent / file).splitlines()
        found = [i for i, line in enumerate(lines, 1)
                 if re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", line)]
        assert int(number) in found, f"{name} is in {file} at line {found}, not {number}"
