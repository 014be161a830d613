"""The meter of colours and motion: against the toy's oracle, and on videos made to fail."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import adavid
import kernels
from runtime.media import file_names, write_video
from runtime.models import load_config, load_interpolator
from runtime.run import make_generator
from tests.helpers import complaint
from tiny_wan import WEIGHTS, ToyCodec, WanModel, world
from tools import ablation, measure

SEED, COUNT = 5011, 32  # other videos than those with which the readings were chosen
ONE_STEP = 5  # of the samplers, draws almost the same video from any noise
ORACLE = {"saturation": "saturation", "motion": "speed", "flicker": "flicker"}


def samplers(prompts):
    """Videos of the same prompts and noise, from good and bad samplers."""
    codec, text = ToyCodec(), ToyCodec().encode_text(prompts)
    noise = torch.randn(len(prompts), *codec.latent_shape(),
                        generator=make_generator(SEED, "noise"))
    teacher, student = (WanModel.from_pretrained(path, torch.float32)
                        for path in (WEIGHTS, WEIGHTS / "student"))
    config, interpolator = load_config(WEIGHTS / "student"), load_interpolator(WEIGHTS, "cpu")
    one = replace(config, timesteps=(1000,), strides=(1,), train_strides=(1,))
    for scale in (1.0, 3.0, 8.0):
        yield codec.decode(adavid.sample_teacher(teacher, noise, text, codec.encode_text([""]), 6,
                                                 scale))
    for model, numbers, fill in [
            (student, config, interpolator), (student, config, None), (student, one, None),
            (lambda x, t, text, frame_stride=1: student(x, t, text), config, interpolator)]:
        yield codec.decode(adavid.sample(model, noise, text, numbers, fill,
                                         torch.Generator().manual_seed(SEED)))


@pytest.mark.long
def test_readings_agree_with_the_toys_oracle_over_good_and_bad_samplers():
    real, prompts = world.make(SEED, range(COUNT))
    spoilt = [ablation.spoil(kind, real, make_generator(SEED, kind))
              for kind in ("frozen", "noisy", "night", "cut")]
    ours, theirs = [], []
    for videos in (real, *spoilt, *samplers(prompts)):
        scores = world.score(videos, prompts)
        theirs.append([scores[name].nanmean() for name in (*ORACLE.values(), "speed")])
        shown = videos.clamp(0, 1).repeat_interleave(2, 3).repeat_interleave(2, 4)  # 32 high
        readings = list(map(measure.readings, shown))
        variance = kernels.temporal_variance(shown).mean()
        ours.append([*(np.mean([r[name] for r in readings]) for name in ORACLE), variance])
    alone = [0, *range(1 + len(spoilt), len(ours))]
    print("real videos and samplers (the last: temporal variance):",
          correlations(np.take(ours, alone, 0), np.take(theirs, alone, 0)))
    *ours, variance = correlations(ours, theirs)
    print("with spoilt ones:", ours, "temporal variance:", variance)
    assert min(ours) > 0.85 and variance < 0  # noise and flicker raise the temporal variance


def correlations(ours, theirs):
    """Of each column, over rows of videos."""
    return [round(np.corrcoef(a, b)[0, 1].item(), 2)
            for a, b in zip(*map(np.transpose, (ours, theirs)))]


@pytest.mark.long
def test_diversity_agrees_with_the_oracles_spread_of_places_and_velocities():
    real, prompts = world.make(SEED, range(48))
    repeated = [prompt for prompt in prompts[:6] for _ in range(8)]

    def spread(videos, prompts, groups):
        read = world.read(videos, prompts)
        return np.array([np.nanstd(read[name][:, 0].view(groups, -1).numpy(), axis=1).mean()
                         for name in ("x", "y", "vx", "vy")])

    unit, ours, theirs = spread(real, prompts, 1), [], []
    for videos in samplers(repeated):
        theirs.append([(spread(videos, repeated, 6) / unit).mean()])
        shown = videos.clamp(0, 1).repeat_interleave(2, 3).repeat_interleave(2, 4)
        ours.append([np.mean([measure.diversity(list(some)) for some in shown.split(8)])])
    others = [i for i in range(len(ours)) if i != ONE_STEP]
    print("diversity:", correlations(ours, theirs), "without the collapsed sampler:",
          correlations(np.take(ours, others, 0), np.take(theirs, others, 0)))
    assert np.argmin(ours) == np.argmin(theirs) == ONE_STEP
    assert correlations(ours, theirs)[0] > 0.85


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
    video = measure.read_video(first)
    assert measure.diversity([video, video]) == 0
    assert np.isnan(measure.diversity([video]))
    (tmp_path / "none").mkdir()
    shutil.copy(first, tmp_path / "none" / "nowhere-0.mp4")
    assert "in common" in complaint(capsys, measure.main(
        [str(tmp_path / "none"), "--against", str(folders / "real")]))


def test_motion_is_the_speed_of_a_moving_picture_within_a_quarter():
    x = torch.arange(64.0)
    for speed, contrast in ((0.5, 0.2), (1.0, 0.2), (1.0, 0.1)):
        frames = [0.5 + contrast * torch.sin(2 * np.pi * (x - speed * f) / 16) for f in range(9)]
        video = torch.stack(frames).expand(3, 32, 9, 64).transpose(1, 2)
        assert measure.readings(video)["motion"] == pytest.approx(100 * speed / 32, rel=0.25)
