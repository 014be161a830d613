"""docs/minimal.py: the training loop without anything around it."""

import runpy

import imageio.v3 as iio
import pytest
import torch

from tests.helpers import ROOT, distill, equal
from tiny_wan import WEIGHTS, WanModel

MINIMAL = ROOT / "docs" / "minimal.py"


@pytest.mark.long
def test_its_student_is_that_of_train_bit_for_bit(tmp_path):
    assert distill(WEIGHTS, tmp_path / "run", steps=3) == 0
    student = runpy.run_path(str(MINIMAL))["distil"](cycles=3, batch_size=2)
    assert equal(student.state_dict(), WanModel.from_pretrained(tmp_path / "run").state_dict())


def test_it_ends_with_a_moving_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = runpy.run_path(str(MINIMAL))
    teacher = WanModel.from_pretrained(WEIGHTS, torch.float32)
    monkeypatch.setitem(program["main"].__globals__, "distil", lambda: teacher)
    monkeypatch.setattr(program["adavid"], "sample_teacher", lambda _, noise, *args: noise)
    program["main"]()
    assert iio.imread("minimal.gif").shape == (9, 2 * 128, 8 * 128, 3)
