"""The demo, from a teacher to a page that stands alone, and the parts of pages."""

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

from tests.helpers import complaint
from tools import demo, page

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
    """All tags of a page with their attributes; fails where one is not closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.all = [], []
        self.feed(text)
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


def tags_of_page_that_stands_alone(text):
    tags = Tags(text)
    assert not any(map(tags.count, ("script", "link", "iframe", "object")))
    sources = [value for _, attributes in tags.all for name, value in attributes.items()
               if name.rpartition(":")[2] in ("src", "href", "srcset", "data")]
    assert all(source.startswith(("data:image/webp;base64,", "#")) for source in sources)
    assert "@import" not in text and text.count("url(") == text.count("url(#")
    return tags


def test_the_page_shows_eight_prompts_by_six_samplers_and_stands_alone(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    tags = tags_of_page_that_stands_alone(text)
    assert (tags.count("img"), tags.count("svg"), tags.count("table")) == (8 * 6, 6, 3)
    assert (folder / "curves.png").stat().st_size > 5000


def test_the_moving_picture_is_small_and_moves_for_ever(folder):
    file = folder / "demo.gif"
    assert iio.improps(file).n_images == 9 and file.stat().st_size < 400_000
    assert iio.immeta(file)["loop"] == 0


def test_finished_runs_only_get_their_page_again(folder, toy_folder):
    log = (folder / "avd" / "metrics.jsonl").read_text()
    (folder / "report.html").unlink()
    assert demo.main(flags(toy_folder, folder, "2")) == 0
    assert (folder / "report.html").exists()
    assert (folder / "avd" / "metrics.jsonl").read_text() == log


def test_moving_pictures_keep_every_pixel():
    video = torch.rand(3, 9, 16, 16)
    frames = iio.imread(base64.b64decode(page.moving_picture(video)), extension=".webp", index=...)
    assert (torch.from_numpy(frames) == (255 * video).round().byte().permute(1, 2, 3, 0)).all()


def test_prompts_and_cells_are_escaped():
    text = page.video_table(["Real data"], {'<script> "&': ["picture"]})
    text += page.table([["<script>"], ["<b>"]])
    assert not Tags(text).count("script") and text.count("&lt;script&gt; &quot;&amp;") == 2


def test_blocks_of_a_markdown_page_are_replaced_and_the_rest_stays(tmp_path):
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    file = tmp_path / "page.md"
    file.write_text(text)
    page.fill(file, {"one": page.markdown([["x", "y"], ["1", "2"]]), "three": "no"})
    assert file.read_text() == text.replace("old\n", "\n| x | y |\n|---|---|\n| 1 | 2 |\n\n")
    page.fill(file, {"one": "new"})
    assert file.read_text() == text.replace("old\n", "\nnew\n\n")


def test_a_value_that_was_not_finite_is_no_point_of_a_curve():
    log = [{"step": 0, "dmd": 1.0}, {"step": 1, "dmd": None}, {"step": 2}, {"step": 3, "dmd": 2.0}]
    assert demo.curve(log, "dmd") == ([0, 3], [1.0, 2.0])


@pytest.mark.parametrize("broken, says", [
    ("teacher", "nosuch"), ("log", "metrics.jsonl"), ("seed", "seed was 0, now 1")])
def test_errors_are_one_line(folder, toy_folder, tmp_path, capsys, broken, says):
    out = shutil.copytree(folder, tmp_path / "out")
    argv = flags(toy_folder, out, "2")
    if broken == "teacher":
        argv += ["--model", "nosuch"]
    elif broken == "log":
        (out / "dmd" / "metrics.jsonl").write_text("{")
    else:
        argv += ["--seed", "1"]
    said = complaint(capsys, demo.main(argv))
    assert says in said and (broken == "teacher" or said.startswith("error: DMD: "))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C from the console alone")
def test_ctrl_c_saves_both_runs(toy_folder, tmp_path):
    command = [sys.executable, "-m", "tools.demo", *flags(toy_folder, tmp_path, "999")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    logs = [tmp_path / run / "times.jsonl" for run in ("dmd", "avd")]
    while not all(log.exists() and log.read_text() for log in logs):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert "to resume" in said and "to resume" in (tmp_path / "dmd.log").read_text()
    assert all(list((tmp_path / run / "checkpoints").glob("*")) for run in ("dmd", "avd"))
