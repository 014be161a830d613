"""The method's mathematics, in a world where all of it is known: every distribution is a Gaussian.

A video has D = 4 numbers, x0 ~ N(mean, S). Noised, x_t = (1 - sigma) x0 + sigma noise is

    p_sigma = N((1 - sigma) mean, C),    C = (1 - sigma)^2 S + sigma^2 I

so scores, posterior means, KL divergences and even the end of a distillation have closed forms.
A prompt's embedding is the mean of its videos. The teacher N(text, S) under guidance of scale s
is then exactly N(null + s (text - null), S): guidance moves its mean and keeps its covariance.

Expectations are sums, not estimates: the points of `normals` have noise's exact mean and
covariance, and all that is averaged over them is affine in the noise, or a product of two such.
"""

from functools import partial
from itertools import cycle, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import adavid
from tests.helpers import FOUR_STEPS

SHAPE, D = (1, 2, 1, 2), 4  # c f h w
SIGMA = 0.2  # where a whole distillation is predicted
tensor = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # dmd_gradient is float32


def rotation(n, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=random)).Q


def normals(k):
    """k independent N(0, I) videos, each `[2kD, *SHAPE]`, of exact mean and joint covariance:
    +- sqrt(n) times each row of a rotation in n = kD dimensions."""
    points = (k * D)**0.5 * rotation(k * D, seed=k)
    return torch.cat([points, -points]).view(-1, k, *SHAPE).unbind(1)


def draw_in_turn(monkeypatch, noises):
    """Give adavid these instead of random noise, and times at the low end of their range."""
    noises = cycle(noises)
    monkeypatch.setattr(adavid, "draw", lambda random, shape, like, generator=None:
                        next(noises) if random is torch.randn else like.new_zeros(shape))


class Gaussian:
    """N(mean, S) with S = axes diag(variances) axes^T, and the model of its exact velocity."""

    def __init__(self, mean, variances, axes):
        self.mean, self.variances, self.axes = mean, variances, axes
        self.covariance = axes * variances @ axes.T

    def videos(self, z):
        """mean + S^1/2 z."""
        root = self.axes * self.variances.sqrt() @ self.axes.T
        return (self.mean + z.flatten(1) @ root).view_as(z)

    def noised(self, sigma):
        """p_sigma by its definition; `sigma` is a number or `[b, 1]`."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        C = (1 - sigma[..., None])**2 * self.covariance + sigma[..., None]**2 * torch.eye(D)
        return MultivariateNormal((1 - sigma) * self.mean, C)

    def __call__(self, x_t, t, text):
        """v = (x_t - E[x0 | x_t]) / sigma. The posterior mean is a Wiener filter on each axis:
        E[x0 | x_t] = mean + (1 - sigma) S C^-1 (x_t - (1 - sigma) mean)."""
        x, sigma = x_t.flatten(1), t[:, None] / 1000
        gain = (1 - sigma) * self.variances / ((1 - sigma)**2 * self.variances + sigma**2)
        x0 = self.mean + ((x - (1 - sigma) * self.mean) @ self.axes * gain) @ self.axes.T
        return ((x - x0) / sigma).view_as(x_t)


class LinearStudent:
    """x0 = m + A z from pure noise z: as a model, its velocity z - x0 at sigma = 1."""

    def __init__(self):
        self.m = tensor([2, 0, 1, -1]).requires_grad_()
        self.A = tensor([[1, 0, .5, 0], [0, .3, 0, 0], [0, -.4, .6, 0], [.2, 0, 0, 1]])
        self.A.requires_grad_()

    def __call__(self, x_t, t, text):
        return x_t - (self.m + x_t.flatten(1) @ self.A.T).view_as(x_t)

    def distribution(self):
        return Gaussian(self.m, *torch.linalg.eigh(self.A @ self.A.T))

    def critic(self, x_t, t, text):
        """An ideal one, which has learned all about the student of this moment."""
        return self.distribution()(x_t, t, text)

    def learn(self, loss, updates, lr):
        optimizer = torch.optim.SGD([self.m, self.A], lr)
        for _ in range(updates):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return self.distribution()


TEXT, NULL = tensor([[[.5, -1, .2, 1]]]), tensor([[[.4, -.9, .3, .9]]])  # [1, l = 1, d = D]
GUIDED = Gaussian(tensor([.9, -1.4, -.2, 1.4]), tensor([1.5, .6, .2, .015]), rotation(D, seed=1))
REAL = Gaussian(tensor([-1, 1.5, .5, 0]), tensor([2, 1.6, 1.8, 1.7]), rotation(D, seed=2))


def prompts(x):
    return TEXT.expand(len(x), 1, D)


def teacher(x_t, t, text):
    """N(text, S), which guidance of scale 5 turns into GUIDED: null + 5 (text - null)."""
    return Gaussian(text[:, 0], GUIDED.variances, GUIDED.axes)(x_t, t, text)


def at(sigma, timestep=1000):
    """A student of one step, and DMD and its critic at one sigma only."""
    return adavid.AVDConfig((timestep,), (1,), (1,), t_range=(1000 * sigma,) * 2, lambda_temp=0)


# ---------------------------------------------------------------------------------------------
# L_KL (eq. 4) is what its name says
#
# Tweedie:         x0_fake - x0_real = sigma^2 / (1 - sigma) (score_fake - score_real)(x_t)
# The chain rule:  d KL(p_fake,sigma || p_real,sigma) = E[(score_fake - score_real)(x_t) . dx_t],
#                  dx_t = (1 - sigma) dx0; what p_fake's own change adds is E[d log p_fake] = 0
# Together:        grad_x0 KL = (1 - sigma) E_noise[score_fake - score_real]
#                             = ((1 - sigma) / sigma)^2 E_noise[x0_fake - x0_real]
# and dmd_gradient is that difference over each sample's own normaliser, multiplied back here.
# ---------------------------------------------------------------------------------------------


def normaliser(x0, x0_real):
    return (x0 - x0_real).abs().mean((1, 2, 3, 4), keepdim=True)


def undo_normaliser(monkeypatch, sigma):
    def kl_gradient(x0, x0_fake, x0_real):
        difference = normaliser(x0, x0_real) * dmd_gradient(x0, x0_fake, x0_real)
        return (((1 - sigma) / sigma)**2 * difference).float()  # as dmd_gradient

    dmd_gradient = adavid.dmd_gradient
    monkeypatch.setattr(adavid, "dmd_gradient", kl_gradient)


def score(distribution, x):
    x = x.flatten(1).requires_grad_()
    return torch.autograd.grad(distribution.log_prob(x).sum(), x)[0]


def test_each_sample_is_moved_along_the_difference_of_its_scores():
    fake, seen, random = LinearStudent().distribution(), [], torch.Generator().manual_seed(0)
    critic = lambda *inputs: seen.append(inputs) or fake(*inputs)
    x0 = fake.videos(torch.randn(64, *SHAPE, dtype=torch.float64, generator=random)).detach()
    loss = adavid.distribution_matching_loss(x0.requires_grad_(), teacher, critic, prompts(x0),
                                             NULL, adavid.AVDConfig(), random)
    gradient = x0.numel() * torch.autograd.grad(loss, x0)[0]

    (x_t, t, text), sigma = seen[0], adavid.sigma_of(seen[0][1])
    x0_real = x_t - sigma * GUIDED(x_t, t, text)
    score_fake, score_real = (score(p.noised(t[:, None] / 1000), x_t) for p in (fake, GUIDED))
    assert_close(normaliser(x0, x0_real) * gradient,
                 sigma**2 / (1 - sigma) * (score_fake - score_real).view_as(x_t))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.8, 0.98])
def test_without_normaliser_the_student_descends_the_kl_divergence(sigma, monkeypatch):
    undo_normaliser(monkeypatch, sigma)
    student, (z, noise) = LinearStudent(), normals(2)
    draw_in_turn(monkeypatch, [noise])
    x0 = adavid.backward_simulation(student, z, prompts(z), 0, at(sigma))
    loss = adavid.distribution_matching_loss(x0, teacher, student.critic, prompts(z), NULL,
                                             at(sigma))
    kl = kl_divergence(student.distribution().noised(sigma), GUIDED.noised(sigma))
    parameters = student.m, student.A
    assert_close(torch.autograd.grad(D * loss, parameters),  # the loss is a mean over D numbers
                 torch.autograd.grad(kl, parameters))


def test_distribution_matching_alone_recovers_the_guided_teacher():
    """With random times and noise, and normalised: where the scores agree, nothing moves."""
    student, config, random = LinearStudent(), adavid.AVDConfig(), torch.Generator().manual_seed(0)

    def loss():
        z = torch.randn(512, *SHAPE, dtype=torch.float64, generator=random)
        x0 = adavid.backward_simulation(student, z, prompts(z), 0, config)
        return adavid.distribution_matching_loss(x0, teacher, student.critic, prompts(z), NULL,
                                                 config, random)

    learned = student.learn(loss, updates=400, lr=0.5)
    assert_close(learned.mean, GUIDED.mean)
    assert_close(learned.covariance, GUIDED.covariance)


# ---------------------------------------------------------------------------------------------
# Regression (eqs. 5-7) pulls the student between two distributions; a small weight lets go
#
# From pure noise a student cannot know which real video is meant. Its velocity's squared error,
# E|x0_real - (m + A z)|^2 = |m - mean_real|^2 + tr A A^T + constant, always asks for their mean.
# With C_T the noised teacher's covariance, KL + lambda_reg w E|...|^2 is least where
#
#     C_T^-1 (m - mean_T) + p (m - mean_real) = 0
#     (C_T^-1 - C^-1 + p I) A = 0                     p = 2 lambda_reg w / (1 - sigma)^2
#
# On each of the teacher's axes m lies between the two means, and p adds to the noised precision
# 1/c, which no video can push above the noise's own 1/sigma^2: where p asks for that, A is 0.
# ---------------------------------------------------------------------------------------------


def middle(weight):
    """The student that theory predicts, with L_KL at SIGMA."""
    p, axes = 2 * adavid.AVDConfig().lambda_reg * weight / (1 - SIGMA)**2, GUIDED.axes
    precision = 1 / ((1 - SIGMA)**2 * GUIDED.variances + SIGMA**2)
    mean = (precision * (GUIDED.mean @ axes) + p * (REAL.mean @ axes)) / (precision + p)
    variances = (1 / (precision + p) - SIGMA**2) / (1 - SIGMA)**2
    return Gaussian(axes @ mean, variances.clamp(min=0), axes)


def weight_of(reg):
    """The weight of a video with this L_reg, where its mean is 1."""
    cache, step = adavid.LossMeanCache(1), torch.tensor([0])
    cache.update(step, tensor([1]))
    return cache.weigh(step, tensor([reg])).item()


@pytest.mark.parametrize("reg", [2, 1, 0], ids=["mistrusted", "typical", "trusted"])
def test_the_students_loss_ends_in_the_predicted_middle(reg, monkeypatch):
    undo_normaliser(monkeypatch, SIGMA)
    *noises, z = normals(4)
    draw_in_turn(monkeypatch, noises)
    student, real, weight = LinearStudent(), REAL.videos(z), weight_of(reg)
    cache = SimpleNamespace(weigh=lambda step, loss: torch.full_like(loss, weight))
    config, text = at(SIGMA), prompts(z)

    def loss():
        noise = adavid.draw(torch.randn, real.shape, real)
        x0 = adavid.backward_simulation(student, noise, text, 0, config)
        first, _ = adavid.matching_loss(x0, teacher, student.critic, text, NULL, config)
        second, *_ = adavid.weighted_regression(student, cache, real, text, 0, config)
        return first + second

    learned = student.learn(loss, updates=300, lr=0.3)
    assert_close(learned.mean, middle(weight).mean)
    assert_close(learned.covariance, middle(weight).covariance)

    start, between, end = (p.mean @ GUIDED.axes for p in (GUIDED, learned, REAL))
    assert ((start - between) * (between - end) > 0).all()
    for wider in (GUIDED, REAL):
        assert (torch.linalg.eigvalsh(wider.covariance - learned.covariance) > 0).all()


def test_mistrust_leads_back_to_the_teacher_and_trust_loses_the_finest_axis():
    kl = [kl_divergence(middle(weight_of(reg)).noised(SIGMA), GUIDED.noised(SIGMA)).item()
          for reg in (10, 2, 1, 0)]
    assert kl[0] < 1e-6 and kl == sorted(kl) and kl[1] < 0.1 * kl[2]
    typical, trusted = (middle(weight_of(reg)).variances for reg in (1, 0))
    assert (typical > 0).all() and (trusted == 0).sum() == 1


# ---------------------------------------------------------------------------------------------
# What models learn, and where the samplers arrive
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.522, 1])
def test_no_affine_change_improves_the_exact_velocity(sigma, monkeypatch):
    """What remains of both losses is the variance of (x_t - x0) / sigma, given x_t: on each axis
    variance / c."""
    z, noise = normals(2)
    draw_in_turn(monkeypatch, [noise])
    W, bias = (torch.zeros(n, D, dtype=torch.float64, requires_grad=True) for n in (D, 1))
    model = lambda x, t, text: REAL(x, t, text) + (x.flatten(1) @ W + bias).view_as(x)
    x0, step, config = REAL.videos(z), torch.zeros(len(z)).long(), at(sigma, 1000 * sigma)
    remains = (REAL.variances / ((1 - sigma)**2 * REAL.variances + sigma**2)).mean()
    for loss in (adavid.critic_loss(model, x0, None, config),
                 adavid.regression_loss(model, x0, None, step, config).mean()):
        assert_close(loss.double(), remains)
        gradients = torch.autograd.grad(loss, (W, bias))
        assert_close(gradients, tuple(map(torch.zeros_like, gradients)))


def test_the_teachers_euler_steps_end_in_its_guided_distribution():
    """On each axis the flow stretches x_t - E[x_t] as sqrt(c), from noise z to mean + S^1/2 z."""
    (z,) = normals(1)
    steps = [50, 100, 200, 400]
    ends = [adavid.sample_teacher(teacher, z, prompts(z), NULL, n) for n in steps]
    errors = [(end - GUIDED.videos(z)).abs().max() for end in ends]
    assert all(1.9 < coarse / fine < 2.1 for coarse, fine in pairwise(errors))
    limit = 2 * ends[-1] - ends[-2]
    assert_close(limit, GUIDED.videos(z), rtol=0, atol=1e-3)


def test_four_steps_of_posterior_means_lose_two_thirds_of_the_variance(monkeypatch):
    """Where regression ends without distribution matching."""
    z, *renoise = normals(4)
    draw_in_turn(monkeypatch, renoise)
    variances = torch.zeros(D)
    x0 = adavid.sample(REAL, z, prompts(z), FOUR_STEPS).flatten(1)
    for sigma in (t / 1000 for t in FOUR_STEPS.timesteps):
        gain = (1 - sigma) * REAL.variances / ((1 - sigma)**2 * REAL.variances + sigma**2)
        variances = gain**2 * ((1 - sigma)**2 * variances + sigma**2)
    assert_close(x0.mean(0), REAL.mean)
    assert_close(x0.T.cov(correction=0), Gaussian(REAL.mean, variances, REAL.axes).covariance)
    assert (variances < REAL.variances / 3).all()
