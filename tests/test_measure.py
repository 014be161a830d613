"""The meter of colours and motion, on videos made to fail."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from runtime.media import file_names, read_video, write_video
from runtime.meter import HEIGHT, diversity, readings
from tests.helpers import complaint
from tiny_wan import world
from tools import measure

SEED = 5011  # other videos than those with which the readings were chosen


def shaken(video):
    """Every second frame a little further to the right."""
    moved = video.roll(8, -1)
    return torch.stack([moved[:, i] if i % 2 else video[:, i] for i in range(video.shape[1])], 1)


def strong(video):
    """With chroma doubled."""
    grey = video.mean(0, keepdim=True)
    return (grey + 2 * (video - grey)).clamp(0, 1)


FAULTS = {  # what is done to a video, and the reading that tells, with its sign
    "grey": (lambda v: v.mean(0, keepdim=True).expand_as(v), "saturation", -1),
    "strong": (strong, "saturation", 1),
    "frozen": (lambda v: v[:, :1].expand_as(v), "still", 1),
    "slower": (lambda v: v.repeat_interleave(2, 1)[:, :v.shape[1]], "motion", -1),
    "shaken": (shaken, "flicker", 1),
    "pale": (lambda v: 0.5 + (v - 0.5) / 2, "contrast", -1)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Toy videos as mp4s, two of each prompt, and a folder for each fault."""
    root = tmp_path_factory.mktemp("measure")
    _, prompts = world.make(SEED, range(4))
    real, _ = world.make(SEED, range(8))
    for fault, (change, *_) in {"real": (lambda v: v,), **FAULTS}.items():
        (root / fault).mkdir()
        for name, video in zip(file_names(np.repeat(prompts, 2).tolist()), real):
            big = video.repeat_interleave(4, 2).repeat_interleave(4, 3)
            write_video(root / fault / name, change(big), fps=8)
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_from_the_original_by_its_reading(fault, folders, tmp_path, capsys):
    _, column, sign = FAULTS[fault]
    assert measure.main([str(folders / fault), "--against", str(folders / "real"),
                         "--out", str(tmp_path / "out.json")]) == 0
    means = json.loads((tmp_path / "out.json").read_text())["means"]["difference"][column]
    assert (means["low"] if sign > 0 else -means["high"]) > 0
    heads, *_, last = capsys.readouterr().out.splitlines()
    assert heads.split() == ["prompts", *measure.COLUMNS]
    assert last.startswith("difference") and last.split()[1] == "4"


def test_prompts_are_matched_by_name_and_a_single_video_has_no_diversity(folders, tmp_path, capsys):
    first, *_ = sorted((folders / "real").iterdir())
    shutil.copy(first, tmp_path / first.name)
    for name in ("other", "other-7"):
        shutil.copy(first, tmp_path / f"{name}.mp4")
    assert measure.main([str(tmp_path), "--against", str(folders / "real")]) == 0
    ours, _, difference = capsys.readouterr().out.splitlines()[1:]
    assert re.findall(r"\s(\d+) ", ours)[0] == "2" and re.findall(r"\s(\d+) ", difference)[0] == "1"
    video = read_video(first, height=HEIGHT)
    assert diversity([video, video]) == 0
    assert np.isnan(diversity([video]))
    (tmp_path / "none").mkdir()
    shutil.copy(first, tmp_path / "none" / "nowhere-0.mp4")
    assert "in common" in complaint(capsys, measure.main(
        [str(tmp_path / "none"), "--against", str(folders / "real")]))


def test_motion_is_the_speed_of_a_moving_picture_within_a_quarter():
    x = torch.arange(64.0)
    for speed, contrast in ((0.5, 0.2), (1.0, 0.2), (1.0, 0.1)):
        frames = [0.5 + contrast * torch.sin(2 * np.pi * (x - speed * f) / 16) for f in range(9)]
        video = torch.stack(frames).expand(3, 32, 9, 64).transpose(1, 2)
        assert readings(video)["motion"] == pytest.approx(100 * speed / 32, rel=0.25)
