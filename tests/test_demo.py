"""The demo, from a teacher to a page that stands alone, and the parts of pages."""

import base64
import os
import re
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import pytest
import torch

from runtime import page, report
from tests.helpers import complaint
from tools import demo


@pytest.fixture(scope="module")
def folder(toy_folder, tmp_path_factory):
    """A whole demo, of two updates."""
    out = tmp_path_factory.mktemp("demo")
    assert demo.main(flags(toy_folder, out, "2")) == 0
    return out


def flags(toy_folder, out, steps):
    return ["--model", str(toy_folder), "--out", str(out), "--steps", steps, "--batch-size", "2"]


def pictures_of_page_that_stands_alone(file):
    """The number of pictures in a page; fails if it loads anything or runs a script."""
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe|object)|@import|url\((?!#)", text)
    sources = re.findall(r'[ :](?:src|href|srcset|data)="([^"]*)"', text)
    assert all(re.match("data:image/(webp|png);base64,|#", source) for source in sources)
    return text.count("<img")


def test_the_page_shows_eight_prompts_by_six_samplers_and_stands_alone(folder):
    assert pictures_of_page_that_stands_alone(folder / "report.html") == 8 * 6
    assert iio.immeta(folder / "demo.gif")["loop"] == 0  # for ever


def test_prompts_of_the_other_kinds_are_shown_where_one_kind_is_missing():
    prompts = ["a blue ball moving up", "a red ball", "a red ball beside a blue ball moving up",
               "a red ball moving up beside a blue ball moving up"]
    assert page.shown(prompts) == [1, 0, 3]


def test_moving_pictures_keep_every_pixel():
    video = torch.rand(3, 9, 16, 16)
    frames = iio.imread(base64.b64decode(page.moving_picture(video)), extension=".webp", index=...)
    assert (torch.from_numpy(frames) == (255 * video).round().byte().permute(1, 2, 3, 0)).all()


def test_prompts_and_cells_are_escaped():
    text = page.video_table(["Real data"], {'<script> "&': ["picture"]})
    text += page.table([["<script>"], ["<b>"]])
    assert "<script" not in text and text.count("&lt;script&gt; &quot;&amp;") == 2


def test_a_value_that_was_not_finite_is_no_point_of_a_curve():
    log = [{"step": 0, "reg": 1.0}, {"step": 1, "reg": None}, {"step": 2}, {"step": 3, "reg": 2.0}]
    assert report.curve(log, "reg") == ([0, 3], [1.0, 2.0])


def test_a_curve_of_the_students_videos_is_of_those_that_end_at_the_last_step():
    log = [{"step": i, "rollout_step": i % 4, "dmd": i / 10} for i in range(8)]
    assert report.curve(log, "dmd") == ([3, 7], [0.3, 0.7])


@pytest.mark.parametrize("wrong, says", [
    (["--model", "nosuch"], "nosuch"),
    pytest.param(["--seed", "1"], "seed was 0, now 1", marks=pytest.mark.long)])
def test_errors_are_one_line(folder, toy_folder, capsys, wrong, says):
    assert says in complaint(capsys, demo.main([*flags(toy_folder, folder, "2"), *wrong]))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C from the console alone")
@pytest.mark.long
@pytest.mark.parametrize("stop", [
    lambda process: os.killpg(process.pid, signal.SIGINT),  # as a terminal does
    lambda process: process.terminate()], ids=["Ctrl-C", "SIGTERM"])
def test_stopping_the_demo_saves_both_runs(stop, toy_folder, tmp_path):
    command = [sys.executable, "-m", "tools.demo", *flags(toy_folder, tmp_path, "999")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    logs = [tmp_path / run / "times.jsonl" for run in ("dmd", "avd")]
    while not all(log.exists() and log.read_text() for log in logs):
        assert process.poll() is None
        time.sleep(0.1)
    stop(process)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert "to resume" in said and "to resume" in (tmp_path / "dmd.log").read_text()
    assert all(list((tmp_path / run / "checkpoints").glob("*")) for run in ("dmd", "avd"))
