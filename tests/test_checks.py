"""The two checks of a GPU."""

import re
from contextlib import redirect_stdout

import imageio.v3 as iio
import pytest
import torch

import sample
import train
from tests.helpers import complaint
from tools import encode, export, gpu_check, wan_check


def test_the_gpu_check_says_that_there_is_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "no NVIDIA or AMD GPU" in complaint(capsys, gpu_check.main([]))


def check(model, out, *flags):
    return wan_check.main(["--model", str(model), "--out", str(out), "--frames", "9", "--height",
                           "32", "--width", "48", "--steps", "2", "--device", "cpu", *flags])


def in_this_process(words, log, device):
    """`wan_check.measure` without the seconds in which a process starts."""
    program = {"sample.py": sample, "train.py": train, "-m": {
        "tools.encode": encode, "tools.export": export}.get(words[1])}[words[0]]
    with open(log, "w") as file, redirect_stdout(file):
        assert program.main(list(map(str, words[1 + (words[0] == "-m"):]))) == 0
    return 1.0, 0


@pytest.mark.parametrize("measure", [
    in_this_process, pytest.param(wan_check.measure, marks=pytest.mark.long)])
def test_every_stage_runs_from_the_teacher_to_a_sampled_student(
        measure, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wan_check, "measure", measure)
    assert check(inputs["original"], tmp_path / "out") == 0
    said = capsys.readouterr().out
    block = re.search("```\n(.*?)```", said, re.DOTALL)[1]
    for stage in ("teacher", "encode", "distil", "merge", "student"):
        assert re.search(rf"^{stage}: [\d.]+ min \([\d.]+ planned\)", block, re.MULTILINE)
    for stage in ("teacher", "student"):
        assert re.search(rf"^{stage}: .*\n  took encode prompts: .*, decode and write: [\d.]+ s\n"
                         r"  planned encode prompts: [\d.]+ s, denoise: .*, decode and write: ",
                         block, re.MULTILINE)
    assert float(re.search(r"WanPipeline's: ([\d.e-]+) relative", block)[1]) < 1e-3
    assert block.count("student_grad_norm") == 3 and "planned: 0 minutes" in said
    assert iio.imread(tmp_path / "out" / "contact_sheet.png").shape[0] == 4 * 64


def test_a_stage_that_fails_is_named_with_its_last_line(inputs, tmp_path, capsys, monkeypatch):
    measure = wan_check.measure
    monkeypatch.setattr(wan_check, "measure", lambda _, *rest: measure(["-m", "nosuch"], *rest))
    said = complaint(capsys, check(inputs["original"], tmp_path))
    assert "python -m nosuch: " in said and "No module named nosuch (more in" in said
    assert "nosuch" in complaint(capsys, check("nosuch", tmp_path / "out"))
