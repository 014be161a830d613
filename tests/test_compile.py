"""torch.compile makes one graph, without a break, of the model, of each loss and of the sampler."""

from dataclasses import replace

import pytest
import torch

import adavid
from tests.helpers import FOUR_STEPS, random_model
from tiny_wan import WanConfig

CONFIG = WanConfig(48, 96, 4, 1, in_dim=4, out_dim=4, text_dim=15, text_len=8)


def inputs(f=5):
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, f, 4, 6, generator=g), torch.randn(2, 8, 15, generator=g)
    return x, torch.tensor([1000.0, 522.0]), text


def in_one_graph(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.fixture
def models():
    return [random_model(CONFIG) for _ in range(3)]


def test_the_model_compiles_for_any_length_and_frame_rate(models):
    model, *_ = models
    compiled = in_one_graph(model)
    for f, stride in ((5, 1), (3, 2), (9, 1), (2, 4)):
        x, t, text = inputs(f)
        wanted, got = (m(x, t, text, frame_stride=stride) for m in (model, compiled))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        gradients = []
        for v in (wanted, got):
            model.zero_grad()
            v.square().mean().backward()
            gradients.append(model.blocks[0].self_attn.q.weight.grad.clone())
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("strides, step", [((1, 1, 1, 1), 1), ((2, 2, 1, 1), 1)])
def test_a_student_step_compiles(models, strides, step):
    student, teacher, critic = models
    config, cache = replace(FOUR_STEPS, train_strides=strides), adavid.LossMeanCache(4)
    interpolator = adavid.FrameInterpolator(4, 8)
    real, _, text = inputs()

    def student_step():
        x0 = adavid.backward_simulation(student, torch.randn_like(real), text, step, config,
                                        interpolator)
        matching, _ = adavid.matching_loss(x0, teacher, critic, text, text[:1], config)
        regression, *_ = adavid.weighted_regression(student, cache, real, text, step, config,
                                                    interpolator)
        return matching + regression

    in_one_graph(student_step)().backward()
    assert student.head.head.weight.grad.isfinite().all()


def test_a_critic_step_compiles(models):
    critic, (x0, _, text) = models[0], inputs()
    in_one_graph(adavid.critic_loss)(critic, x0, text, adavid.AVDConfig()).backward()
    assert critic.head.head.weight.grad.abs().sum() > 0


def test_the_decoupled_sampler_compiles(models):
    student, *_ = models
    noise, _, text = inputs()
    config, interpolator = adavid.AVDConfig(), adavid.FrameInterpolator(4, 8)
    video = in_one_graph(adavid.sample)(student, noise, text, config, interpolator)
    assert video.shape == noise.shape and video.isfinite().all()
