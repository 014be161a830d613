"""The check of a GPU: all of its stages, on the CPU and on miniatures."""

import re
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

import kernels
import sample
import train
from runtime import cli
from tests import miniature_wan
from tests.helpers import complaint
from tools import encode, export, gpu_check

SMALL = ["--frames", "9", "--height", "32", "--width", "48", "--device", "cpu"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(cli, "pick_device", lambda name: torch.device("cpu"))
    assert "no GPU" in complaint(capsys, gpu_check.main([]))


def test_a_stage_that_does_not_exist_is_named(capsys):
    code = gpu_check.main(["--only", "toys", "--device", "cpu"])
    assert "--only toys: choose from kernels, speed, toy, video" in complaint(capsys, code)


def in_this_process(words, log):
    """`gpu_check.python` without the seconds in which a process starts."""
    if words[1] == "pytest":
        return 1.0, ["1 passed"]
    program = {"sample.py": sample, "train.py": train, "-m": {
        "tools.encode": encode, "tools.export": export}.get(words[1])}[words[0]]
    said = StringIO()
    words = [{10: 2, 8: 1}.get(word, word) for word in words]  # the toy's cycles and batches
    with redirect_stdout(said), redirect_stderr(StringIO()):
        assert program.main(list(map(str, words[1 + (words[0] == "-m"):]))) == 0
    return 1.0, said.getvalue().splitlines()


def lines_of(block):
    """{stage: its lines} of a printed block."""
    found = re.findall(r"^(\w+): (\d+ s.*(?:\n  .*)*)", block, re.MULTILINE)
    return {name: text.splitlines()[1:] for name, text in found}


@pytest.mark.parametrize("python", [
    in_this_process, pytest.param(gpu_check.python, marks=pytest.mark.long)])
def test_every_stage_runs_on_miniatures(python, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "python", python)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # takes a minute
    monkeypatch.setattr(gpu_check, "random_vae", miniature_wan.vae)
    assert gpu_check.main(["--model", str(inputs["original"]), "--out", str(tmp_path), "--wan",
                           "--preset", "tiny", "--steps", "2", *SMALL]) == 0
    block = re.search("```\n(.*?)```", capsys.readouterr().out, re.DOTALL)[1]
    assert "FAILED" not in block
    said = lines_of(block)
    assert list(said) == [*gpu_check.TOY, *gpu_check.WAN, *gpu_check.REAL]
    assert said.pop("speed") == ["  skipped: the kernels need a GPU with Triton"]
    assert not any("skipped" in line for lines in said.values() for line in lines)
    assert said["toy"][-1].startswith("  critic, here beside the CPU: 0 apart")
    for stage, count in (("sampling", 3), ("vae", 2), ("lora", 1), ("whole", 1)):
        assert sum("planned" in line for line in said[stage]) == count
    for stage in ("teacher", "student"):
        assert said[stage][1].startswith("  took encode prompts: ")
        assert said[stage][2].startswith("  planned encode prompts: ")
    assert float(re.search(r"WanPipeline's: ([\d.e-]+) relative", block)[1]) < 1e-3
    assert sum("student_grad_norm" in line for line in said["distil"]) == 3
    assert iio.imread(tmp_path / "contact_sheet.png").shape[0] == 4 * 128


def check_one(stage, tmp_path, monkeypatch, capsys, **stages):
    monkeypatch.setattr(gpu_check, "TOY", gpu_check.TOY | stages)
    code = gpu_check.main(["--only", stage, "--out", str(tmp_path), "--device", "cpu"])
    return code, lines_of(capsys.readouterr().out)[stage]


def test_a_stage_that_fails_is_named_with_its_last_line(tmp_path, monkeypatch, capsys):
    stage = lambda args, device: gpu_check.python(["-m", "no"], tmp_path / "log")
    code, lines = check_one("video", tmp_path, monkeypatch, capsys, video=stage)
    assert code == 1 and "FAILED" in lines[0] and "No module named no" in lines[0]


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError(), "does not fit"),
    (ModuleNotFoundError(name="diffusers"), "diffusers"),
    (gpu_check.Skipped("why"), "skipped: why")])
def test_a_stage_that_cannot_run_is_skipped_by_name(error, says, tmp_path, monkeypatch, capsys):
    def stage(args, device):
        raise error

    code, lines = check_one("video", tmp_path, monkeypatch, capsys, video=stage)
    assert code == 0 and says in lines[0] and "skipped" in lines[0]


def test_without_triton_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "import_error", ModuleNotFoundError(name="triton"))
    monkeypatch.setattr(kernels.sys, "platform", "win32")
    _, lines = check_one("kernels", tmp_path, monkeypatch, capsys)
    assert "pip install triton-windows" in lines[0]


def test_it_works_in_a_folder_with_spaces(monkeypatch, tmp_path):
    folder, commands = tmp_path / "Ann Lee", []
    folder.mkdir()
    monkeypatch.setattr(gpu_check.tempfile, "tempdir", str(folder))
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda words, **_: commands.append(
        words) or subprocess.CompletedProcess(words, 1, ""))
    assert gpu_check.main(["--device", "cpu", "--only", "video"]) == 1
    assert Path(commands[-1][-1]).parent.parent == folder
