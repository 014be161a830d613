"""The exercises of docs/method.md: each is unsolved, and a solution of a few lines solves it."""

from dataclasses import dataclass

import pytest
import torch

import adavid
import kernels
from tests import exercises


@dataclass(frozen=True)
class FiveSteps(adavid.AVDConfig):
    timesteps: tuple[float, ...] = (1000, 900, 757, 522, 300)
    strides: tuple[int, ...] = (2, 2, 1, 1, 1)
    train_strides: tuple[int, ...] = (1, 1, 1, 1, 1)


@dataclass(frozen=True)
class Quarter(adavid.AVDConfig):
    strides: tuple[int, ...] = (4, 2, 1, 1)


def guided_velocity(model, x_t, t, text, null_text, scale):
    null_text = null_text.expand(len(x_t), -1, -1)
    scale = torch.where(t >= 500, scale, 1.0).view(-1, 1, 1, 1, 1)
    return adavid.guide(model(x_t, t, text), model(x_t, t, null_text), scale)


def weigh(self, step, loss):
    return torch.where(self.filled[step], (loss <= self.means[step]).float(), 0.5)


def temporal_loss(x0, eps=1e-6, truncation=None, variance=None):
    contrast = x0.float().var(dim=(3, 4), correction=0).mean(dim=(1, 2))
    loss = -torch.log(kernels.temporal_variance(x0) / contrast + eps)
    return (loss if truncation is None else torch.where(loss <= truncation, 0.0, loss)).mean()


SOLUTIONS = {
    "steps": ("AVDConfig", FiveSteps),
    "quarter": ("AVDConfig", Quarter),
    "guidance": ("guided_velocity", guided_velocity),
    "weights": ("LossMeanCache.weigh", weigh),
    "contrast": ("temporal_loss", temporal_loss)}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_an_exercise_is_unsolved_until_it_is_solved(name, monkeypatch):
    exercise = getattr(exercises, f"test_{name}")
    with pytest.raises(AssertionError):
        exercise()
    where, solution = SOLUTIONS[name]
    monkeypatch.setattr(f"adavid.{where}", solution)
    exercise()
