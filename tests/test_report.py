"""The readings of a run's pictures, and the page that shows whether the run is healthy."""

import json

import numpy as np
import pytest
import torch

import adavid
from runtime import report
from runtime.media import write_video
from runtime.meter import mean_readings
from tests.helpers import distill, equal, read_lines, saved
from tests.test_demo import pictures_of_page_that_stands_alone
from tiny_wan import world
from tools import measure

READINGS = {"saturation", "contrast", "motion", "flicker"}


@pytest.mark.long
def test_a_run_logs_readings_and_writes_a_page_and_resuming_changes_neither(
        toy_folder, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert distill(toy_folder, whole, "--sample-every", 2, steps=4) == 0
    assert distill(toy_folder, broken, "--sample-every", 2, steps=2) == 0
    reference = (broken / "reference.json").read_bytes()
    monkeypatch.setattr(adavid, "sample_teacher", None)  # which is not needed again
    assert distill(toy_folder, broken, "--sample-every", 2, steps=4) == 0

    drawn = [line.keys() >= READINGS for line in read_lines(whole / "metrics.jsonl")]
    assert drawn == [False, True, False, True]
    readings = json.loads(reference)["readings"]
    assert all(readings[who].keys() == READINGS for who in ("teacher", "real"))
    assert (whole / "reference.json").read_bytes() == reference
    assert (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    assert equal(saved(whole), saved(broken))
    for out in (whole, broken):
        assert pictures_of_page_that_stands_alone(out / "report.html") == 1
        page = (out / "report.html").read_text(encoding="utf-8")
        assert page.count("<svg") == 4 + 6 and f"{out.name}: 4 updates" in page
        assert page.count("teacher</text>") == 4 and page.count("<li>") == 8


@pytest.mark.parametrize("flags, every, charts", [
    (["--lambda-reg", 0, "--critic-updates", 0], 1, 4 + 3), ([], 2, None)])
def test_a_page_has_the_charts_that_a_run_has_and_a_run_of_one_picture_has_none(
        flags, every, charts, toy_folder, tmp_path):
    assert distill(toy_folder, tmp_path, "--sample-every", every, *flags, steps=1) == 0
    file = tmp_path / "report.html"
    assert (file.read_text(encoding="utf-8").count("<svg") if file.exists() else None) == charts


def test_readings_of_a_runs_videos_are_those_that_tools_measure_takes_of_their_files(tmp_path):
    videos, _ = world.make(7, range(3))
    for i, video in enumerate(videos):
        write_video(tmp_path / f"video-{i}.mp4", video, 8)
    of_files = measure.measure_videos("", sorted(tmp_path.glob("*.mp4"))).values()
    for name, value in mean_readings(videos).items():
        assert value == pytest.approx(np.mean([one[name] for one in of_files]), rel=0.05), name


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (480, 832), (90, 7)])
def test_videos_of_any_size_and_length_have_readings(frames, size):
    values = mean_readings(torch.rand(2, 3, frames, *size) * 3 - 1)
    assert values.keys() == READINGS and all(np.isfinite(list(values.values())))
    assert values["motion"] > 0 if frames == 4 else values["motion"] >= 0


def test_the_healthy_range_lies_around_the_teachers_and_the_real_videos_readings():
    axes = report.new_chart().subplots()
    report.draw_reading(axes, [{"step": 0, "motion": 3.0}], {
        "teacher": {"motion": 2.0}, "real": {"motion": 1.0}}, "Motion", "motion")
    band, = axes.patches
    assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx([0.9, 2.2])
