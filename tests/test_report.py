"""The demo, from a teacher to a page that stands alone."""

import base64
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import imageio.v3 as iio
import pytest
import torch

from tiny_wan import checkpoint
from tools import demo, report

VOID = {"meta", "br", "img"}  # HTML tags that never close


@pytest.fixture(scope="module")
def folder(toy_folder, tmp_path_factory):
    """A whole demo, of two updates."""
    out = tmp_path_factory.mktemp("demo")
    assert demo.main(flags(toy_folder, out, "2")) == 0
    return out


def flags(toy_folder, out, steps):
    return ["--model", str(toy_folder), "--out", str(out), "--steps", steps, "--batch-size", "2"]


class Tags(HTMLParser):
    """All tags of a page with their attributes; fails where one does not close in its turn."""

    def __init__(self, page):
        super().__init__()
        self.open, self.all = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag):
        return sum(tag == name for name, _ in self.all)


def test_the_page_shows_eight_prompts_by_six_samplers_and_needs_nothing_else(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert (tags.count("img"), tags.count("svg"), tags.count("table")) == (8 * 6, 6, 3)
    assert not any(map(tags.count, ("script", "link", "iframe", "object")))
    sources = [value for _, attributes in tags.all for name, value in attributes.items()
               if name.rpartition(":")[2] in ("src", "href", "srcset", "data")]
    assert all(source.startswith(("data:image/webp;base64,", "#")) for source in sources)
    assert "@import" not in page and page.count("url(") == page.count("url(#")


def test_the_moving_picture_is_small_and_moves_for_ever(folder):
    file = folder / "demo.gif"
    assert iio.improps(file).n_images == 9 and file.stat().st_size < 400_000
    assert iio.immeta(file)["loop"] == 0


def test_moving_pictures_keep_every_pixel():
    video = torch.rand(3, 9, 16, 16)
    tag = report.moving_picture(video, "")
    data = base64.b64decode(tag.partition("base64,")[2].partition('"')[0])
    assert (iio.imread(data, extension=".webp", index=...) == report.to_frames(video)).all()


def test_prompts_are_escaped():
    column = report.Column("Real data", "", torch.rand(1, 3, 9, 16, 16))
    tags = Tags(page := report.video_table([column], ['<script> "&']))
    assert not tags.count("script") and page.count("&lt;script&gt; &quot;&amp;") == 2


def test_a_value_that_was_not_finite_is_no_point_of_a_curve():
    log = [{"step": 0, "kl": 1.0}, {"step": 1, "kl": None}, {"step": 2}, {"step": 3, "kl": 2.0}]
    assert report.curve(log, "kl") == ([0, 3], [1.0, 2.0])


@pytest.mark.parametrize("broken", ["missing", "log", "weights"])
def test_a_folder_without_a_whole_demo_is_one_line(folder, toy_folder, tmp_path, capsys, broken):
    out = tmp_path / "out"
    if broken != "missing":
        shutil.copytree(folder, out)
        file = {"log": "metrics.jsonl", "weights": checkpoint.FILE}[broken]
        (out / "avd" / file).write_text("{")
    assert report.main([str(out), "--model", str(toy_folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(out) in said


def test_a_run_that_fails_is_named_with_its_last_line(folder, toy_folder, capsys):
    assert demo.main([*flags(toy_folder, folder, "2"), "--seed", "1"]) == 2
    assert "error: DMD: " in (said := capsys.readouterr().err) and "seed was 0, now 1" in said


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C from the console alone")
def test_ctrl_c_saves_both_runs(toy_folder, tmp_path):
    command = [sys.executable, "-m", "tools.demo", *flags(toy_folder, tmp_path, "999")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / run / "times.jsonl" for run in ("dmd", "avd")]
    while not all(log.exists() and log.read_text() for log in logs):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert "resumes" in said and "resumes" in (tmp_path / "dmd.log").read_text()
    assert all(list((tmp_path / run / "checkpoints").glob("*")) for run in ("dmd", "avd"))
