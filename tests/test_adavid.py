"""The method's functions, each against its equation and its contract."""

import math
from dataclasses import replace

import pytest
import torch

import adavid
from adavid import AVDConfig, FrameInterpolator, LossMeanCache
from tests.helpers import FOUR_STEPS, random_model, weigh_and_update
from tiny_wan import PRESETS


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A model that notes its calls and answers with a fixed function of its input."""

    def __init__(self, answer=lambda x: 0.1 * x):
        self.calls, self.answer = [], answer

    def __call__(self, x, t, text, **kwargs):
        self.calls.append((x, t, kwargs))
        return self.answer(x)


# --- distribution matching ---------------------------------------------------------------------

def test_dmd_gradient_of_zero_by_zero_is_zero_and_nothing_else_is_hidden():
    x = randn(1, 2, 3, 2, 2)
    assert adavid.dmd_gradient(x, x, x).eq(0).all()
    assert adavid.dmd_gradient(x, x + 1, x).isinf().all()
    assert adavid.dmd_gradient(x, x * math.nan, x).isnan().all()
    assert adavid.dmd_gradient(x * math.nan, x, x).isnan().all()


def test_dmd_loss_keeps_in_bf16_a_gradient_that_bf16_would_round_away():
    x0 = torch.full((1, 1, 1, 1, 4), 100.0, dtype=torch.bfloat16, requires_grad=True)
    adavid.dmd_loss(x0, torch.full(x0.shape, 1e-2)).backward()
    torch.testing.assert_close(x0.grad.float(), torch.full(x0.shape, 1e-2 / 4), rtol=1e-2, atol=0)
    assert adavid.dmd_gradient(x0, x0, x0 + 1).dtype == torch.float32


def test_timesteps_are_shifted_towards_noise_and_clamped():
    t = adavid.random_timesteps(torch.zeros(20_000, 1, 1, 1, 1), AVDConfig(),
                              torch.Generator().manual_seed(0))
    assert t.min() == 20 and t.max() == 980
    assert t.median() == pytest.approx(1000 * 5 * 0.5 / 3, rel=0.01)


# --- adaptive regression -----------------------------------------------------------------------

def test_cache_weighs_by_the_means_before_their_one_ema_step_for_each_timestep():
    cache = LossMeanCache(4)
    empty = weigh_and_update(cache, torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    assert empty.tolist() == [0.5, 0.5]
    loss = torch.tensor([2.0, 4.0, 2.0, math.nan], requires_grad=True)
    weight = weigh_and_update(cache, torch.tensor([0, 0, 1, 3]), loss)
    expected = [1 - 1 / (1 + math.exp(-3.0 * excess)) for excess in (1, 3, 0)]
    assert weight.tolist() == pytest.approx([*expected, 0.5], abs=1e-6)
    assert not weight.requires_grad
    assert cache.means.tolist() == pytest.approx([0.95 + 0.05 * 3, 2, 0, math.nan], nan_ok=True)


def test_accumulated_batches_are_weighed_exactly_as_one_large_batch():
    step, loss = torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    whole, parts = LossMeanCache(4), LossMeanCache(4)
    for scale in (1, 2):
        weight = weigh_and_update(whole, step, scale * loss)
        weighed = [parts.weigh(*batch) for batch in zip(step.split(2), (scale * loss).split(2))]
        parts.update(step, scale * loss)  # once for all batches, after the optimizer's step
        assert torch.equal(weight, torch.cat(weighed)) and torch.equal(whole.means, parts.means)
    assert weight.unique().numel() > 3


def test_regression_at_a_rate_sees_every_second_frame_and_is_told_so():
    student, steps = Recorder(), torch.tensor([0, 1])
    adavid.regression_loss(student, randn(2, 3, 5, 2, 2), None, steps, AVDConfig(), stride=2)
    (x_t, _, kwargs), = student.calls
    assert x_t.shape[2] == 3 and kwargs == {"frame_stride": 2}


def test_bf16_latents_do_not_round_the_timesteps():
    """bfloat16 has no 757: the student would learn at 756 and sample at 757."""
    student, real = Recorder(), randn(4, 3, 5, 2, 2).bfloat16()
    adavid.regression_loss(student, real, None, torch.arange(4), FOUR_STEPS)
    adavid.sample(student, real, None, FOUR_STEPS)
    assert student.calls[0][1].tolist() == [1000, 900, 757, 522]
    assert [call[1][0].item() for call in student.calls[1:]] == [1000, 900, 757, 522]
    assert len(adavid.random_timesteps(real.repeat(64, 1, 1, 1, 1), AVDConfig()).unique()) > 200


def test_regression_steps_are_uniform_whatever_the_strides():
    real = torch.zeros(1000, 1, 1, 1, 1)
    for strides in ((1, 1, 1, 1), (2, 2, 1, 1), (4, 2, 1, 1)):
        steps = torch.cat([adavid.random_regression_steps(
            real, i, strides, torch.Generator().manual_seed(i)) for i in range(4)])
        shares = steps.bincount(minlength=4) / len(steps)
        assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.03)


# --- temporal regularisation -------------------------------------------------------------------

def test_temporal_loss_is_equation_8():
    x0 = randn(3, 2, 5, 4, 4).bfloat16()
    exact = x0.double()
    variance = (exact - exact.mean(2, keepdim=True)).square().mean((1, 2, 3, 4))
    wanted = -torch.log(variance + 1e-6).mean().float()
    torch.testing.assert_close(adavid.temporal_loss(x0), wanted)
    assert adavid.temporal_loss(torch.ones(1, 2, 5, 4, 4)).item() == pytest.approx(-math.log(1e-6))


def test_truncation_is_per_sample_and_removes_value_and_gradient():
    x0 = torch.stack([randn(2, 5, 4, 4), 0.01 * randn(2, 5, 4, 4, seed=1)]).requires_grad_()
    loss = adavid.temporal_loss(x0, truncation=0.6)
    loss.backward()
    torch.testing.assert_close(loss, adavid.temporal_loss(x0[1:]) / 2)
    assert x0.grad[0].eq(0).all() and x0.grad[1].ne(0).any()
    assert adavid.temporal_loss(x0 * math.nan, truncation=0.6).isnan()


# --- interpolator ------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(2, 16, 3, 7, 5), (1, 12, 1, 8, 8), (1, 4, 5, 1, 1)])
def test_untrained_interpolator_is_the_mean_of_the_neighbours_and_keeps_given_frames(shape):
    x0 = randn(*shape)
    full = FrameInterpolator(shape[1])(x0)
    assert full.shape[2] == 2 * shape[2] - 1
    assert torch.equal(full[:, :, ::2], x0)
    torch.testing.assert_close(full[:, :, 1::2], (x0[:, :, 1:] + x0[:, :, :-1]) / 2)


# --- samplers ----------------------------------------------------------------------------------

def reference_sampler(model, noise, text, config, interpolator, generator):
    """The decoupled sampler for strides (2, 2, 1, 1), written out."""
    def x0_at(x, t, **rate):
        return x - t / 1000 * model(x, torch.full((len(x),), float(t)), text, **rate)

    def again(x0, t):
        sigma = t / 1000
        return (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=generator)

    x0 = x0_at(noise[:, :, ::2], 1000, frame_stride=2)
    x0 = interpolator(x0_at(again(x0, 900), 900, frame_stride=2))
    x0 = x0_at(again(x0, 757), 757)
    return x0_at(again(x0, 522), 522)


def test_decoupled_sampler_equals_its_steps_written_out():
    torch.manual_seed(0)
    model, interpolator = random_model(PRESETS["tiny"]), FrameInterpolator(12, width=16)
    torch.nn.init.normal_(interpolator.out.weight, std=0.1)
    noise, text = randn(2, 12, 9, 4, 4), randn(2, 6, PRESETS["tiny"].text_dim, seed=1)
    ours = adavid.sample(model, noise, text, FOUR_STEPS, interpolator,
                         torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = reference_sampler(model, noise, text, FOUR_STEPS, interpolator,
                                   torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strides, frames", [
    ((2, 2, 1, 1), [11, 11, 21, 21]), ((4, 2, 1, 1), [6, 11, 21, 21]),
    ((4, 4, 1, 1), [6, 6, 21, 21]), ((4, 4, 4, 4), [6, 6, 6, 6]), ((1, 1, 1, 1), [21] * 4)])
def test_each_step_runs_at_its_own_rate_and_the_video_is_full_rate(strides, frames):
    student = Recorder()
    video = adavid.sample(student, randn(1, 4, 21, 2, 2), None,
                          replace(FOUR_STEPS, strides=strides), FrameInterpolator(4, width=16))
    assert [call[0].shape[2] for call in student.calls] == frames
    assert [call[2].get("frame_stride", 1) for call in student.calls] == list(strides)
    assert video.shape[2] == 21


def test_frames_that_do_not_fit_the_stride_are_refused():
    with pytest.raises(ValueError, match="1 modulo 2"):
        adavid.sample(Recorder(), randn(1, 4, 8, 2, 2), None, FOUR_STEPS, FrameInterpolator(4))


def test_a_model_of_any_dtype_gets_its_own_dtype_at_every_step():
    """bf16 latents stay bf16 for the model; the times stay exact."""
    for dtype in (torch.bfloat16, torch.float64):
        model, noise = Recorder(), randn(2, 4, 5, 2, 2).to(dtype)
        out = adavid.sample(model, noise, None, AVDConfig(), FrameInterpolator(4).to(dtype))
        assert out.dtype == dtype and {call[0].dtype for call in model.calls} == {dtype}
        assert adavid.sample_teacher(model, noise, None, randn(1, 2, 4), steps=2).dtype == dtype
        assert {call[0].dtype for call in model.calls} == {dtype}


def test_teacher_sampler_takes_guided_euler_steps_on_the_shifted_grid():
    calls = Recorder(lambda x: torch.ones_like(x))
    noise = randn(2, 3, 5, 2, 2)
    out = adavid.sample_teacher(calls, noise, randn(2, 3, 4), randn(1, 2, 4), steps=4)
    torch.testing.assert_close(out, noise - 1)  # the whole way down a constant velocity
    times = [call[1][0].item() for call in calls.calls[::2]]
    assert times == pytest.approx([1000 * 5 * u / (1 + 4 * u) for u in (1, 0.75, 0.5, 0.25)])


# --- backward simulation, the whole losses -----------------------------------------------------

def test_half_rate_training_scores_full_videos_and_its_gradient_passes_the_interpolator():
    weight = torch.ones((), requires_grad=True)
    config = replace(FOUR_STEPS, train_strides=(2, 2, 1, 1))
    net = FrameInterpolator(4).requires_grad_(False)
    x0 = adavid.backward_simulation(lambda x, t, text, frame_stride=1: weight * x,
                                    randn(1, 4, 5, 2, 2), None, 1, config, net)
    assert x0.shape[2] == 5
    assert torch.autograd.grad(x0[:, :, 1].sum(), weight)[0] != 0


def test_critic_loss_is_flow_matching_and_never_reaches_the_student():
    x0 = randn(2, 4, 5, 2, 2).requires_grad_()
    weight = torch.ones((), requires_grad=True)
    adavid.critic_loss(lambda x, t, text: weight * x, x0, None, AVDConfig()).backward()
    assert x0.grad is None and weight.grad != 0


def test_the_two_terms_add_up_to_equation_9():
    scale = torch.ones((), requires_grad=True)
    student, teacher, critic = lambda x, t, text: scale * x, Recorder(), Recorder(torch.sin)
    config, cache = replace(FOUR_STEPS, temporal_truncation=-100.0), LossMeanCache(4)
    real, text = randn(4, 4, 5, 4, 4), randn(4, 3, 6)
    x0 = adavid.backward_simulation(student, randn(4, 4, 5, 4, 4), text, 1, config)
    first, parts = adavid.matching_loss(x0, teacher, critic, text, torch.zeros(1, 0, 6), config)
    torch.testing.assert_close(first, parts["dmd"] + 0.05 * parts["temp"])
    torch.testing.assert_close(parts["temp"], adavid.temporal_loss(x0.detach()))
    torch.testing.assert_close(parts["variance"], x0.detach().var(2, correction=0).mean())

    cache.update(torch.arange(4), torch.ones(4))
    second, step, reg, weight = adavid.weighted_regression(student, cache, real, text, 1, config)
    torch.testing.assert_close(second, 2.0 * (weight * reg).mean())
    torch.testing.assert_close(weight, cache.weigh(step, reg))
    assert all(torch.autograd.grad(term, scale)[0] != 0 for term in (first, second))


# --- configuration -----------------------------------------------------------------------------

def test_config_has_the_papers_values():
    c = AVDConfig()
    assert c.timesteps == (1000, 900, 757, 522)
    assert (c.strides, c.train_strides) == ((2, 2, 1, 1), (1, 1, 1, 1))
    assert (c.guidance_scale, c.shift, c.t_range) == (5.0, 5.0, (20, 980))
    assert (c.lambda_reg, c.k, c.ema_decay) == (2.0, 3.0, 0.95)
    assert (c.lambda_temp, c.temporal_eps, c.temporal_truncation) == (0.05, 1e-6, 0.6)
    assert (c.critic_updates, c.lr, c.critic_lr) == (5, 2e-6, 2e-6)
    assert (c.betas, c.weight_decay, c.grad_clip) == ((0.9, 0.999), 0.01, 10.0)


@pytest.mark.parametrize("wrong", [
    {"strides": (2, 1)}, {"strides": (1, 2, 1, 1)}, {"train_strides": (3, 1, 1, 1)},
    {"timesteps": (522, 757, 900, 1000)}, {"timesteps": (1000, 900, 757, 0)}, {"timesteps": ()},
    {"t_range": (980, 20)}, {"ema_decay": 7.0}, {"k": -3.0}, {"critic_updates": -1}])
def test_config_refuses_schedules_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(FOUR_STEPS, **wrong)
