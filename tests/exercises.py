"""Whether an exercise of docs/method.md is solved. They all change adavid.py.

    python -m pytest tests/exercises.py -k steps
"""

import math

import torch

import adavid


def calls(config, frames=9):
    """What the student is asked for in sampling: the timestep and number of frames of each call."""
    seen = []

    def student(x_t, t, text, frame_stride=1):
        seen.append((t[0].item(), x_t.shape[2]))
        return torch.zeros_like(x_t)

    video = adavid.sample(student, torch.zeros(1, 4, frames, 8, 8), None, config,
                          adavid.FrameInterpolator(4, 8))
    assert video.shape[2] == frames
    return seen


def test_steps():
    """A fifth step, at t = 300 and at the full frame rate."""
    config = adavid.AVDConfig()
    assert calls(config) == [(1000, 5), (900, 5), (757, 9), (522, 9), (300, 9)]
    assert config.train_strides == (1, 1, 1, 1, 1)


def test_quarter():
    """The first step runs at a quarter of the frame rate."""
    assert [frames for _, frames in calls(adavid.AVDConfig())][:3] == [3, 5, 9]


def test_guidance():
    """The teacher is guided at t = 500 and above only."""
    model = lambda x, t, text: text.mean() * torch.ones_like(x)
    x, text, null_text = torch.zeros(3, 1, 1, 1, 1), torch.ones(3, 2, 2), torch.zeros(1, 2, 2)
    v = adavid.guided_velocity(model, x, torch.tensor([900.0, 500.0, 499.0]), text, null_text, 5.0)
    assert v.flatten().tolist() == [5, 5, 1]


def test_weights():
    """A weight is 1 if the loss is at most the mean, else 0. Without a mean it is one half."""
    cache, step = adavid.LossMeanCache(2), torch.tensor([0, 0, 1])
    cache.update(step[:2], torch.tensor([1.0, 3.0]))
    assert cache.weigh(step, torch.tensor([1.9, 2.1, 9.0])).tolist() == [1, 0, 0.5]


def test_contrast():
    """The temporal loss is of the variance over frames divided by that over height and width, so
    that stronger colours do not pass for motion. It still has a gradient, and its gate."""
    x0 = torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = adavid.temporal_loss(x0)
    torch.testing.assert_close(adavid.temporal_loss(3 * x0), loss, atol=1e-4, rtol=0)
    assert torch.autograd.grad(loss, x0)[0].any()
    board = (torch.arange(8) + torch.arange(8)[:, None]) % 2 * 2 - 1.0  # of -1 and 1
    waves = 2 * board + torch.tensor([-1.0, 1, -1, 1]).view(1, 1, 4, 1, 1)  # variances 4 and 1
    assert abs(adavid.temporal_loss(waves).item() - math.log(4)) < 1e-4
    still = x0[:, :, :1].expand_as(x0)
    assert adavid.temporal_loss(still) > loss + 5 and adavid.temporal_loss(x0, truncation=99) == 0
