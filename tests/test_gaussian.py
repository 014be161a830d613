"""The method's mathematics, in a world where all of it is known: every distribution is a Gaussian.

A video has D = 4 numbers, x0 ~ N(mean, S). Noised, x_t = (1 - sigma) x0 + sigma noise is

    p_sigma = N((1 - sigma) mean, C),    C = (1 - sigma)^2 S + sigma^2 I

so scores, posterior means, KL divergences and even the end of a distillation have closed forms.
A prompt's embedding is the mean of its videos. The teacher N(text, S) under guidance of scale s
is then exactly N(null + s (text - null), S): guidance moves its mean and keeps its covariance.

Expectations are sums, not estimates: the points of `normals` have the exact moments of noise, and
all that meets them here is affine in the noise, or a product of two such.
"""

from functools import partial
from itertools import cycle

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import adavid

SHAPE, D = (1, 2, 1, 2), 4  # c f h w
SIGMAS = (0.05, 0.2, 0.5, 0.8, 0.95)
tensor = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # dmd_gradient is float32


def rotation(n, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=random)).Q


def covariance(variances, seed):
    """A full matrix that has these variances along the axes of a rotation."""
    return rotation(D, seed) @ torch.diag(tensor(variances)) @ rotation(D, seed).T


def normals(k):
    """k independent N(0, I) videos, each `[2kD, *SHAPE]`, of exact mean and joint covariance:
    +- sqrt(n) times each row of a rotation in n = kD dimensions."""
    points = (k * D) ** 0.5 * rotation(k * D, seed=k)
    return torch.cat([points, -points]).view(-1, k, *SHAPE).unbind(1)


def moments(x0):
    """Mean and covariance over the points of `normals`."""
    x0 = x0.flatten(1)
    return x0.mean(0), x0.T.cov(correction=0)


class Gaussian:
    """N(mean, S), and the model that predicts its exact velocity. mean: `[D]` or `[b, D]`."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, covariance
        self.variances, self.axes = torch.linalg.eigh(covariance)
        self.root = self.axes * self.variances.clamp(min=0).sqrt() @ self.axes.T

    def videos(self, z):
        return (self.mean + z.flatten(1) @ self.root).view_as(z)

    def noised(self, sigma):
        """p_sigma by its definition; `sigma` `[b, 1]` or a number."""
        sigma = torch.as_tensor(sigma)
        C = (1 - sigma[..., None])**2 * self.covariance + sigma[..., None]**2 * torch.eye(D)
        return MultivariateNormal((1 - sigma) * self.mean, C)

    def __call__(self, x_t, t, text):
        """v = (x_t - E[x0 | x_t]) / sigma. The posterior mean is a Wiener filter on each axis:
        E[x0 | x_t] = mean + (1 - sigma) S C^-1 (x_t - (1 - sigma) mean)."""
        x, sigma = x_t.flatten(1), t[:, None] / 1000
        gain = (1 - sigma) * self.variances / ((1 - sigma)**2 * self.variances + sigma**2)
        x0 = self.mean + ((x - (1 - sigma) * self.mean) @ self.axes * gain) @ self.axes.T
        return ((x - x0) / sigma).view_as(x_t)


class LinearStudent(nn.Module):
    """x0 = m + A z from pure noise z: as a model, its velocity z - x0 at sigma = 1."""

    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(tensor([2, 0, 1, -1]))
        self.A = nn.Parameter(tensor([[1, 0, .5, 0], [0, .3, 0, 0], [0, -.4, .6, .2], [.2, 0, 0, 1]]))

    def forward(self, x_t, t, text):
        return x_t - (self.m + x_t.flatten(1) @ self.A.T).view_as(x_t)

    def distribution(self):
        return Gaussian(self.m, self.A @ self.A.T)

    def critic(self, x_t, t, text):
        """An ideal one, that has learned all about the student of this moment."""
        return self.distribution()(x_t, t, text)


TEXT, NULL = tensor([[[.5, -1, .2, 1]]]), tensor([[[.4, -.9, .3, .9]]])  # [1, l = 1, d = D]
GUIDED = Gaussian(tensor([.9, -1.4, -.2, 1.4]), covariance([1.5, .6, .2, .015], seed=1))
REAL = Gaussian(tensor([-1, 1.5, .5, 0]), covariance([2, 1.6, 1.2, 1.5], seed=2))


def teacher(x_t, t, text):
    """N(text, S), which guidance of scale 5 turns into GUIDED: null + 5 (text - null)."""
    return Gaussian(text[:, 0], GUIDED.covariance)(x_t, t, text)


def one_step(sigma, **numbers):
    """A student of one step, and L_KL at one sigma only."""
    t_range = 1000 * sigma, 1000 * sigma
    return adavid.AVDConfig((1000,), (1,), (1,), t_range=t_range, lambda_temp=0, **numbers)


def draw_in_turn(monkeypatch, noises):
    """adavid's next random noises are these."""
    noises = cycle(noises)
    monkeypatch.setattr(adavid, "draw", lambda random, shape, like, generator=None:
                        next(noises) if random is torch.randn else torch.zeros(shape))


# ---------------------------------------------------------------------------------------------
# L_KL (eq. 4) is what its name says
#
# Tweedie:         x0_fake - x0_real = sigma^2 / (1 - sigma) (score_fake - score_real)(x_t)
# The chain rule:  d KL(p_fake,sigma || p_real,sigma) = E[(score_fake - score_real)(x_t) dx_t],
#                  dx_t = (1 - sigma) dx0; what p_fake's own change adds is E[d log p_fake] = 0
# Together:        grad_x0 KL = (1 - sigma) E_noise[score_fake - score_real]
#                             = ((1 - sigma) / sigma)^2 E_noise[x0_fake - x0_real]
# and dmd_gradient is that difference over each sample's own normaliser, multiplied back here.
# ---------------------------------------------------------------------------------------------


def normaliser(x0, x0_real):
    return (x0 - x0_real).abs().mean((1, 2, 3, 4), keepdim=True)


def undo_normaliser(monkeypatch, sigma):
    def kl_gradient(x0, x0_fake, x0_real):
        gradient = normaliser(x0, x0_real) * dmd_gradient(x0, x0_fake, x0_real)
        return ((1 - sigma) / sigma)**2 * gradient

    dmd_gradient = adavid.dmd_gradient
    monkeypatch.setattr(adavid, "dmd_gradient", kl_gradient)


def score(distribution, x):
    x = x.flatten(1).requires_grad_()
    return torch.autograd.grad(distribution.log_prob(x).sum(), x)[0]


def test_each_sample_is_moved_along_the_difference_of_its_scores():
    critic, seen = LinearStudent().distribution(), []
    recording_critic = lambda *inputs: seen.append(inputs) or critic(*inputs)
    random = torch.Generator().manual_seed(0)
    x0 = critic.videos(torch.randn(64, *SHAPE, dtype=torch.float64, generator=random)).detach()
    loss = adavid.distribution_matching_loss(
        x0.requires_grad_(), teacher, recording_critic, TEXT.expand(64, 1, D), NULL,
        adavid.AVDConfig(), random)
    gradient = torch.autograd.grad(loss, x0)[0] * x0.numel()

    (x_t, t, text), sigma = seen[0], adavid.sigma_of(seen[0][1])
    score_fake, score_real = (score(p.noised(t[:, None] / 1000), x_t) for p in (critic, GUIDED))
    x0_real = x_t - sigma * GUIDED(x_t, t, text)
    moved = ((1 - sigma) / sigma)**2 * normaliser(x0, x0_real) * gradient
    assert_close(moved, (1 - sigma) * (score_fake - score_real).view_as(x_t))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_without_normaliser_it_is_the_gradient_of_the_kl_divergence(sigma, monkeypatch):
    undo_normaliser(monkeypatch, sigma)
    student, (z, noise) = LinearStudent(), normals(2)
    text, parameters = TEXT.expand(len(z), 1, D), list(student.parameters())
    draw_in_turn(monkeypatch, [noise])
    x0 = adavid.backward_simulation(student, z, text, 0, one_step(sigma))
    loss = D * adavid.distribution_matching_loss(x0, teacher, student.critic, text, NULL,
                                                 one_step(sigma))  # mean over D numbers -> sum
    kl = kl_divergence(student.distribution().noised(sigma), GUIDED.noised(sigma))
    assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(kl, parameters))


def test_distribution_matching_alone_recovers_the_guided_teacher():
    """Normalised, at random times: the fixed point stays, for there both scores are the same."""
    student, config = LinearStudent(), adavid.AVDConfig()
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(400):
        z = torch.randn(512, *SHAPE, dtype=torch.float64, generator=random)
        text = TEXT.expand(len(z), 1, D)
        x0 = adavid.backward_simulation(student, z, text, 0, config)
        loss = adavid.distribution_matching_loss(x0, teacher, student.critic, text, NULL, config,
                                                 random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print((student.m-GUIDED.mean).abs().max(), (student.A@student.A.T-GUIDED.covariance).abs().max())
    print(torch.linalg.eigvalsh(student.A@student.A.T))
    assert_close(student.m, GUIDED.mean, rtol=0, atol=1e-3)
    assert_close(student.A @ student.A.T, GUIDED.covariance, rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Adaptive regression (eqs. 5-7): a middle between two distributions
#
# From pure noise a student cannot know which real video is meant. The mean squared error of its
# velocity, E|x0_real - (m + A z)|^2 = |m - mean_real|^2 + tr A A^T + constant, pulls it towards
# one video, the real mean. With p = 2 lambda_reg w the sum KL + p/2 (...) is stationary where
#
#     m:    (1 - sigma)^2 C_T^-1 (m - mean_T) + p (m - mean_real) = 0
#     A:    ((1 - sigma)^2 (C_T^-1 - C^-1) + p I) A = 0
#
# (T: the guided teacher). Along each of the teacher's axes: the student's mean lies between the
# two, its noised precision 1/c is the teacher's plus p / (1 - sigma)^2, and an axis for which
# that exceeds noise's own, 1 / sigma^2, is lost: A = 0.
# ---------------------------------------------------------------------------------------------


def middle(sigma, weight):
    """The predicted student."""
    p, a2, axes = 2 * adavid.AVDConfig().lambda_reg * weight, (1 - sigma)**2, GUIDED.axes
    precision = 1 / (a2 * GUIDED.variances + sigma**2)
    mean = (a2 * precision * (GUIDED.mean @ axes) + p * (REAL.mean @ axes)) / (a2 * precision + p)
    variances = (1 / (precision + p / a2) - sigma**2) / a2
    return Gaussian(axes @ mean, axes * variances.clamp(min=0) @ axes.T)


def distil(monkeypatch, sigma, weight):
    """The student that descent on `student_loss` (eq. 9) ends at, if every sample has this w."""
    undo_normaliser(monkeypatch, sigma)
    *noises, real = normals(4)
    draw_in_turn(monkeypatch, noises)
    student, real, text = LinearStudent(), REAL.videos(real), TEXT.expand(len(real), 1, D)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    for _ in range(300):
        loss, _ = adavid.student_loss(student, teacher, student.critic,
                                      lambda step, loss: torch.full_like(loss, weight),
                                      real, text, NULL, 0, one_step(sigma))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.distribution()


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.5, 1.0])
def test_regression_ends_in_the_predicted_middle(weight, monkeypatch):
    student, predicted = distil(monkeypatch, 0.2, weight), middle(0.2, weight)
    print((student.mean-predicted.mean).abs().max(), (student.covariance-predicted.covariance).abs().max())
    print(predicted.variances, student.variances)
    assert_close(student.mean, predicted.mean, rtol=0, atol=1e-4)
    assert_close(student.covariance, predicted.covariance, rtol=0, atol=1e-4)
