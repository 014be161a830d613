"""The check of the real Wan2.1, on a miniature."""

import re

import imageio.v3 as iio

from tests.helpers import complaint
from tools import wan_check


def check(model, out, *flags):
    return wan_check.main(["--model", str(model), "--out", str(out), "--frames", "9", "--height",
                           "32", "--width", "48", "--steps", "2", "--device", "cpu", *flags])


def test_every_stage_runs_from_the_teacher_to_a_sampled_student(inputs, tmp_path, capsys):
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


def test_a_stage_that_fails_is_named_with_its_last_line(inputs, tmp_path, capsys):
    (tmp_path / "teacher").write_text("in the way")
    assert "sample.py" in complaint(capsys, check(inputs["original"], tmp_path))
    assert "nosuch" in complaint(capsys, check("nosuch", tmp_path / "out"))
