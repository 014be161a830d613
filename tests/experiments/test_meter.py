"""The meter of colours and motion, against the toy's oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import adavid
import kernels
from experiments import ablation
from runtime.meter import diversity, readings
from runtime.models import load_config, load_interpolator
from runtime.run import make_generator
from tiny_wan import WEIGHTS, ToyCodec, WanModel, world

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
        read = list(map(readings, shown))
        variance = kernels.temporal_variance(shown).mean()
        ours.append([*(np.mean([r[name] for r in read]) for name in ORACLE), variance])
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
        ours.append([np.mean([diversity(list(some)) for some in shown.split(8)])])
    others = [i for i in range(len(ours)) if i != ONE_STEP]
    print("diversity:", correlations(ours, theirs), "without the collapsed sampler:",
          correlations(np.take(ours, others, 0), np.take(theirs, others, 0)))
    assert np.argmin(ours) == np.argmin(theirs) == ONE_STEP
    assert correlations(ours, theirs)[0] > 0.85
