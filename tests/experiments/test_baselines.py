"""LCM, DCM, rCM and DFD, against the Gaussian world, where the teacher's whole flow is known.

On each of the teacher's axes, with variance l: y = x_t - (1 - s) mean has variance
c(s) = (1 - s)^2 l + s^2, and the flow only stretches it, from s to e by sqrt(c(e) / c(s)).
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import adavid
import sample
from experiments import baselines
from tests.helpers import FOUR_STEPS, complaint, equal, random_model, read_lines, saved
from tests.pretended_device import pretended
from tests.test_gaussian import (
    GUIDED,
    NULL,
    SHAPE,
    D,
    assert_close,
    draw_in_turn,
    normals,
    prompts,
    teacher,
)
from tests.torture.random_numbers import without_limits
from tiny_wan import PRESETS, WEIGHTS, ToyCodec, WanModel, world
from tools import costs

METHODS = list(baselines.METHODS)
CONFIG = baselines.BaselineConfig(**vars(FOUR_STEPS))
TOY = replace(PRESETS["tiny"], dim=32, ffn_dim=64, num_heads=2, num_layers=3)


class Flow:
    """The model whose f is gain(s) y on each of the teacher's axes, plus (1 - end) mean."""

    def __init__(self, gain, end=0.0):
        self.gain, self.end = gain, end

    def __call__(self, x_t, t, text):
        s, x = t[:, None] / 1000, x_t.flatten(1)
        gain = torch.stack([self.gain(level) for level in s.flatten()])
        y = (x - (1 - s) * GUIDED.mean) @ GUIDED.axes
        f = (1 - self.end) * GUIDED.mean + (y * gain) @ GUIDED.axes.T
        return ((x - f) / (s - self.end)).nan_to_num().view_as(x_t)  # at s = end any would do


def variance(s):
    return (1 - s) ** 2 * GUIDED.variances + s**2


def perfect(end=0.0):
    end = torch.as_tensor(end, dtype=torch.float64)
    return Flow(lambda s: (variance(end) / variance(s)).sqrt(), end)


def euler(config, end=0):
    """The optimum on a grid: the product of the teacher's Euler steps, from index k to `end`."""
    sigmas = baselines.noise_levels(config, GUIDED.mean)
    rate = (sigmas[1:, None] - (1 - sigmas[1:, None]) * GUIDED.variances) / variance(
        sigmas[1:, None])
    steps = 1 - sigmas.diff()[:, None] * rate

    def gain(s):
        return steps[end:(sigmas - s).abs().argmin()].prod(0)

    return Flow(gain, sigmas[end])


def noised(seed=0, count=64):
    """Random noise levels, and the teacher's videos at these."""
    g = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, count, *SHAPE, dtype=torch.float64, generator=g)
    t = 20 + 960 * torch.rand(count, dtype=torch.float64, generator=g)
    return adavid.add_noise(GUIDED.videos(z), noise, t), t


class Smooth(torch.nn.Module):
    """A random smooth network in float64."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(D + 1, 32), torch.nn.Tanh(),
                                       torch.nn.Linear(32, D)).double()

    def forward(self, x_t, t, text):
        return self.net(torch.cat([x_t.flatten(1), t[:, None] / 1000], dim=1)).view_as(x_t)


# ---------------------------------------------------------------------------------------------
# Consistency
# ---------------------------------------------------------------------------------------------


def test_a_consistency_function_leads_to_the_end_of_the_teachers_flow():
    (z,) = normals(1)
    one = torch.full((len(z),), 1000.0, dtype=torch.float64)
    assert_close(baselines.consistency(perfect(), z, one, None), GUIDED.videos(z))
    x_t, t = noised()
    half_way = torch.full_like(t, 10)
    between = baselines.consistency(perfect(0.01), x_t, t, None, 0.01)
    assert_close(baselines.consistency(perfect(), between, half_way, None),
                 baselines.consistency(perfect(), x_t, t, None))


@pytest.mark.parametrize("grid", [50, 100, 200])
def test_lcms_optimum_is_the_product_of_the_teachers_euler_steps(grid):
    config = replace(CONFIG, grid=grid)
    x0, student = GUIDED.videos(normals(1)[0]), euler(config)
    loss = baselines.lcm_loss(student, student, teacher, x0, prompts(x0), NULL, config,
                              torch.Generator().manual_seed(0))
    assert loss < 1e-10
    misses = student.gain(torch.tensor(1.0)) - GUIDED.variances.sqrt()
    wanted = torch.tensor([-0.053, -0.047, -0.042, -0.036]) * 50 / grid  # of first order
    torch.testing.assert_close(misses.float(), wanted, atol=0.002, rtol=0)
    other = baselines.lcm_loss(perfect(), perfect(), teacher, x0, prompts(x0), NULL, config,
                               torch.Generator().manual_seed(0))
    assert other > 1e-7


def test_lcm_learns_from_the_student_alone():
    student, target, x0 = Smooth(0), Smooth(0), GUIDED.videos(normals(1)[0])
    baselines.lcm_loss(student, target, teacher, x0, prompts(x0), NULL, CONFIG).backward()
    assert all(p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in target.parameters())


def test_pseudo_huber_is_linear_far_away_and_square_nearby():
    d = torch.tensor([10.0, -10.0, 1e-5, 0.0])
    torch.testing.assert_close(baselines.pseudo_huber(d, 0.001),
                               torch.tensor([9.999, 9.999, 5e-8, 0]), atol=1e-7, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# DCM
# ---------------------------------------------------------------------------------------------


def test_both_experts_have_no_loss_where_the_teachers_euler_steps_lead():
    x0 = GUIDED.videos(normals(1)[0])
    semantic = euler(CONFIG, CONFIG.split)
    assert baselines.semantic_loss(semantic, teacher, x0, prompts(x0), NULL, CONFIG) < 1e-10
    f, wanted = baselines.neighbours(euler(CONFIG), euler(CONFIG), teacher, x0, prompts(x0), NULL,
                                     (1, CONFIG.split), CONFIG)
    assert_close(f, wanted)


def test_temporal_coherence_compares_changes_over_the_lag():
    g = torch.Generator().manual_seed(0)
    f, wanted = torch.randn(2, 3, 4, 9, 2, 2, generator=g)
    change = (f[:, :, 3:] - f[:, :, :6]) - (wanted[:, :, 3:] - wanted[:, :, :6])
    torch.testing.assert_close(baselines.temporal_coherence(f, wanted, 3), change.square().mean())
    assert baselines.temporal_coherence(f, f + f[:, :, :1], 3) < 1e-12  # the same in all frames
    assert baselines.temporal_coherence(f[:, :, :3], wanted[:, :, :3], 3) == 0


def test_dcms_sampler_leaves_the_trajectory_within_a_phase():
    """By y' = y (1 - (s - s') / (s - e) (1 - sqrt(c(e) / c(s)))), at each step that does not end
    where its expert's phase ends."""
    numbers = CONFIG.__class__(**vars(CONFIG) | baselines.NUMBERS["dcm"] | {
        "strides": (1,) * 6, "train_strides": (1,) * 6})
    split = baselines.noise_levels(numbers, GUIDED.mean)[35]
    experts = baselines.Experts.__new__(baselines.Experts)
    experts.__dict__.update(semantic=perfect(split), detail=perfect(), split=1000 * split)
    (z,) = normals(1)
    x0 = baselines.euler_steps(
        lambda *inputs: baselines.Experts.forward(experts, *inputs), z, None, numbers)
    stds = (x0.flatten(1) @ GUIDED.axes).std(0, correction=0)
    wanted = torch.tensor([1.184, 1.126, 1.076, 1.022], dtype=torch.float64)
    assert_close(stds / GUIDED.variances.sqrt(), wanted, atol=1e-3)


@pytest.fixture
def discriminator():
    """A teacher, heads that say nothing, and inputs of an awkward shape."""
    model = random_model(TOY).requires_grad_(False)
    heads = baselines.Heads(TOY.dim, 2, 32)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 3, 6, 10, generator=g)
    return model, heads, x, torch.tensor([900.0, 300.0]), torch.randn(2, 5, 34, generator=g)


def test_features_are_of_every_second_block_and_reach_the_input(discriminator):
    model, heads, x, t, text = discriminator
    x.requires_grad_()
    tokens, velocities = baselines.features(model, x, t, text)
    assert [y.shape for y in tokens] == [(2, 32, 3, 3, 5)] * 2 and len(velocities) == 2
    v = baselines.rearrange(velocities[-1], "b (f h w) (q r c) -> b c f (h q) (w r)",
                            f=3, h=3, q=2, r=2)
    torch.testing.assert_close(v, model(x, t, text))  # the third block is the last
    heads(tokens).sum().backward()
    assert x.grad.any() and all(p.grad is None for p in model.parameters())


def test_heads_that_say_nothing_cost_two_and_move_nothing(discriminator):
    model, heads, x, t, text = discriminator
    for *_, out in heads:
        torch.nn.init.zeros_(out.weight), torch.nn.init.zeros_(out.bias)
    tokens, _ = baselines.features(model, x, t, text)
    assert baselines.discriminator_loss(heads, tokens, tokens) == 2
    config = replace(CONFIG, grid=50, adversarial_weight=1.0, feature_weight=0.0, huber=1e-9)
    loss, (fake, true) = baselines.detail_loss(model, model, heads, x, text, text[:1], config,
                                               torch.Generator().manual_seed(0))
    silent, _ = baselines.detail_loss(model, model, heads, x, text, text[:1], replace(
        config, adversarial_weight=0.0), torch.Generator().manual_seed(0))
    assert (loss - silent).item() == pytest.approx(1)
    assert heads(fake).shape == heads(true).shape == (2, 6, 1, 3, 5)


def test_feature_matching_is_zero_for_a_perfect_student(discriminator, monkeypatch):
    model, heads, x, _, text = discriminator
    monkeypatch.setattr(baselines, "neighbours", lambda *_, **__: (x.requires_grad_(), x.detach()))
    loss, _ = baselines.detail_loss(model, model, heads, x, text, text[:1], replace(
        CONFIG, adversarial_weight=0.0))
    loss.backward()
    assert loss == 0 and not x.grad.any()


# ---------------------------------------------------------------------------------------------
# rCM
# ---------------------------------------------------------------------------------------------


def slope(student, x_t, t, v_teacher):
    return baselines.tangent(student, x_t, t, None, student(x_t, t, None), v_teacher)


def finite_slope(student, x_t, t, v_teacher, h):
    """The same with a difference over a step h in sigma."""
    v = student(x_t, t, None)
    derivative = (v - student(x_t - h * v_teacher, t - 1000 * h, None)) / h
    return v_teacher - v - adavid.sigma_of(t) * derivative


def test_the_tangent_is_zero_at_the_perfect_student():
    x_t, t = noised()
    v_teacher = GUIDED(x_t, t, None)
    gain = lambda s: (GUIDED.variances / variance(s)).sqrt()

    def student(x_t, t, text):
        s, x = t[:, None] / 1000, x_t.flatten(1)
        f = GUIDED.mean + ((x - (1 - s) * GUIDED.mean) @ GUIDED.axes * gain(s)) @ GUIDED.axes.T
        return ((x - f) / s).view_as(x_t)

    assert slope(student, x_t, t, v_teacher).abs().max() < 1e-10
    coarse, fine = (finite_slope(student, x_t, t, v_teacher, h).abs().max() for h in (2e-5, 1e-5))
    assert coarse < 0.02 and 1.9 < coarse / fine < 2.1


def test_the_exact_tangent_is_trigflows():
    """There x' = cos(a) x0 + sin(a) n and F = cos(a) n - sin(a) x0, and the tangent is cos(a) df/da
    along the teacher's ODE, dx'/da = F_teacher."""
    x_t, t = noised()
    student, v_teacher = Smooth(), GUIDED(x_t, t, None)
    s = adavid.sigma_of(t)
    rho = ((1 - s) ** 2 + s**2).sqrt()

    def output(x, a, velocity):
        s = a.sin() / (a.sin() + a.cos())
        rho = ((1 - s) ** 2 + s**2).sqrt()
        return (1 - 2 * s) * x + rho * velocity(x * rho, 1000 * s.flatten(), None)

    def f(x, a):
        return a.cos() * x - a.sin() * output(x, a, student)

    x, a = x_t / rho, torch.atan2(s, 1 - s)
    direction = output(x, a, lambda *_: v_teacher)
    _, derivative = torch.func.jvp(f, (x, a), (direction, torch.ones_like(a)))
    assert_close((1 - s) * rho * slope(student, x_t, t, v_teacher),
                 a.cos() * derivative, rtol=1e-9, atol=1e-9)


def test_neighbours_differ_by_the_finite_difference_times_the_step(monkeypatch):
    student, x0 = Smooth(), GUIDED.videos(normals(1)[0])
    seen = []
    step = lambda *inputs: seen.append(inputs) or teacher_step(*inputs)
    teacher_step = baselines.teacher_step
    monkeypatch.setattr(baselines, "teacher_step", step)
    f, wanted = baselines.neighbours(student, student, teacher, x0, prompts(x0), NULL, (7, 7),
                                     CONFIG, generator=torch.Generator().manual_seed(0))
    _, x_t, t, t_next, *_ = seen[0]
    h = (t - t_next)[0].item() / 1000
    v_teacher = GUIDED(x_t, t, None)
    difference = student(x_t, t, None) - student(x_t - h * v_teacher, t_next, None)
    got = finite_slope(student, x_t, t, v_teacher, h)
    assert_close(f - wanted, h * (got + difference))


def test_the_tangents_size_does_not_matter_and_the_papers_gradient_is_the_same():
    x_t, t = noised()
    g = torch.Generator().manual_seed(0)
    v, direction = torch.randn(2, *x_t.shape, dtype=torch.float64, generator=g)
    v.requires_grad_()
    gradients = []
    for size in (1000, 10_000):
        loss = baselines.tangent_loss(v, size * direction, t)
        assert loss.item() == pytest.approx(0.5, abs=0.01)
        gradients.append(torch.autograd.grad(loss, v)[0])
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-6)

    sigma = adavid.sigma_of(t)
    rho = ((1 - sigma) ** 2 + sigma**2).sqrt()
    tangent = (1 - sigma) * rho * direction
    norm = tangent.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    theirs = (rho * (v - v.detach()) - tangent / (norm + 0.1)).square().sum()
    ratio = torch.autograd.grad(theirs, v)[0] / torch.autograd.grad(
        baselines.tangent_loss(v, direction, t), v)[0]
    assert_close(ratio, torch.full_like(ratio, 2 * D**0.5 * len(v)))


def test_the_teacher_is_rcms_fixed_point():
    """A one-step student that follows the whole flow is the teacher: no term moves it."""
    real = GUIDED.videos(normals(1)[0])
    config = replace(CONFIG, tangent="jvp", timesteps=(1000,), strides=(1,), train_strides=(1,))
    flow = perfect()
    scale = torch.ones(D, dtype=torch.float64, requires_grad=True)
    gain = lambda s: (GUIDED.variances / variance(s)).sqrt()

    def student(x_t, t, text):
        s, x = t[:, None] / 1000, x_t.flatten(1)
        y = (x - (1 - s) * GUIDED.mean) @ GUIDED.axes
        return ((x - GUIDED.mean - (y * gain(s) * scale) @ GUIDED.axes.T) / s).view_as(x_t)

    noise = normals(1)[0]
    assert_close(student(noise, torch.full((len(noise),), 1000.0).double(), None),
                 flow(noise, torch.full((len(noise),), 1000.0).double(), None))
    for term, _ in baselines.rcm_losses(student, teacher, GUIDED, None, real, prompts(real), NULL,
                                        (1000.0,), config, None,
                                        torch.Generator().manual_seed(0)):
        assert torch.autograd.grad(term, scale)[0].abs().max() < 1e-6


def test_without_consistency_rcm_is_distribution_matching():
    student, real = Smooth(), GUIDED.videos(normals(1)[0])
    args = (student, teacher, Smooth(1))
    config = replace(CONFIG, consistency_weight=0.0, lambda_reg=0.0, lambda_temp=0.0)
    generator = torch.Generator()
    consistency, _ = next(baselines.rcm_losses(
        *args, None, real, prompts(real), NULL, (1000.0,), config, None, generator.manual_seed(0)))
    assert consistency == 0
    losses = baselines.rcm_losses(*args, None, real, prompts(real), NULL, (1000.0,), config, None,
                                  generator)
    next(losses)
    generator.manual_seed(1)
    dmd, _ = next(losses)
    generator.manual_seed(1)
    noise = adavid.draw(torch.randn, real.shape, real, generator)
    x0 = adavid.backward_simulation(student, noise, prompts(real), 0, config, None, generator)
    ours, _ = adavid.matching_loss(x0, *args[1:], prompts(real), NULL, config, generator)
    assert dmd == ours


def test_a_consistency_function_keeps_the_distribution_through_any_steps(monkeypatch):
    z, *renoise = normals(4)
    draw_in_turn(monkeypatch, renoise)
    config = replace(CONFIG, timesteps=baselines.NUMBERS["rcm"]["timesteps"])
    x0 = adavid.sample(perfect(), z, None, config).flatten(1)
    assert_close(x0.mean(0), GUIDED.mean)
    assert_close(x0.T.cov(correction=0), GUIDED.covariance)


def test_random_rollouts_never_rise_and_have_all_lengths():
    g, config = torch.Generator().manual_seed(0), CONFIG
    rollouts = [baselines.random_rollout(config, g) for _ in range(400)]
    assert all(times[0] == 1000 and list(times) == sorted(times, reverse=True)
               for times in rollouts)
    for length in (1, 2, 3, 4):
        assert 70 < sum(len(times) == length for times in rollouts) < 130


@pytest.mark.parametrize("queries, keys, block", [(11, 11, 4), (11, 5, 256), (8, 3, 8)])
def test_block_attention_has_the_derivative_of_softmax(queries, keys, block, monkeypatch):
    monkeypatch.setattr(baselines.BlockAttention, "block", block)
    g = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(2, 3, n, 6, dtype=torch.float64, generator=g)
    inputs, directions = ((make(queries), make(keys), make(keys)) for _ in range(2))

    def softmax(q, k, v):
        return torch.softmax(q @ k.mT / math.sqrt(6), dim=-1) @ v

    wanted = torch.func.jvp(softmax, inputs, directions)
    torch.testing.assert_close(torch.func.jvp(baselines.BlockAttention.apply, inputs, directions),
                               wanted, atol=1e-12, rtol=1e-12)
    q, k, v = inputs  # as in cross-attention, whose keys and values do not move
    torch.testing.assert_close(
        torch.func.jvp(lambda q: baselines.BlockAttention.apply(q, k, v), (q,), directions[:1]),
        torch.func.jvp(lambda q: softmax(q, k, v), (q,), directions[:1]), atol=1e-12, rtol=1e-12)


def test_the_tangent_through_wan_is_that_of_central_differences(toy_folder):
    model = WanModel.from_pretrained(toy_folder, torch.float32)
    g = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 2, 12, 5, 8, 8, generator=g)
    t, text = torch.tensor([900.0, 300.0]), torch.randn(2, 5, 34, generator=g)
    h = 1e-4
    with torch.no_grad():
        v = model(x, t, text)
        got = baselines.tangent(model, x, t, text, v, direction)
        central = (model(x + h * direction, t + 1000 * h, text)
                   - model(x - h * direction, t - 1000 * h, text)) / (2 * h)
    wanted = direction - v - adavid.sigma_of(t) * central
    assert (got - wanted).norm() < 0.01 * wanted.norm()


def test_the_exact_tangent_survives_bfloat16():
    real, prompts = world.make(0, range(4))
    x0, text = ToyCodec().encode(real), ToyCodec().encode_text(prompts)
    g = torch.Generator().manual_seed(0)
    noise, t = torch.randn(x0.shape, generator=g), torch.tensor([950.0, 800.0, 600.0, 300.0])
    x_t, tangents = adavid.add_noise(x0, noise, t), []
    for dtype in (torch.float32, torch.bfloat16):
        model = WanModel.from_pretrained(WEIGHTS, dtype)
        v = model(x_t, t, text).detach()
        tangents.append(baselines.tangent(model, x_t, t, text, v, noise - x0).flatten())
    assert torch.cosine_similarity(*tangents, dim=0) > 0.99


# ---------------------------------------------------------------------------------------------
# DFD
# ---------------------------------------------------------------------------------------------


def test_data_forcing_of_no_sample_is_distribution_matching_and_of_all_looks_at_real_videos():
    x_t, _ = noised()
    x0, real, critic = x_t.clone().requires_grad_(), noised(1)[0], Smooth()
    args = teacher, critic, prompts(x0), NULL
    g = torch.Generator()
    ours = baselines.data_forcing_loss(real, x0, *args, replace(CONFIG, share=0.0),
                                       g.manual_seed(0))
    assert ours == adavid.distribution_matching_loss(x0, *args, CONFIG, g.manual_seed(0))

    loss = baselines.data_forcing_loss(real, x0, *args, replace(CONFIG, share=1.0),
                                       g.manual_seed(0))
    gradient = x0.numel() * torch.autograd.grad(loss, x0)[0]
    t = adavid.random_timesteps(x0, CONFIG, g.manual_seed(0))
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=g)
    noisy = adavid.add_noise(real, noise, t)
    x0_real = noisy - adavid.sigma_of(t) * GUIDED(noisy, t, None)
    x0_fake = adavid.predict_x0(critic, adavid.add_noise(x0, noise, t), t, None)
    assert_close(gradient.float(), adavid.dmd_gradient(x0, x0_fake, x0_real).detach())


def test_without_forcing_dfds_terms_are_avds():
    student, real, cache = Smooth(), noised()[0], adavid.LossMeanCache(4)
    config, text, generator = replace(CONFIG, share=0.0), prompts(real), torch.Generator()
    (first, parts), (second, reg) = baselines.dfd_losses(
        student, teacher, Smooth(1), cache, real, text, NULL, (1000, 900), config, None,
        generator.manual_seed(0))
    generator.manual_seed(0)
    noise = adavid.draw(torch.randn, real.shape, real, generator)
    x0 = adavid.backward_simulation(student, noise, text, 1, config, None, generator)
    assert torch.equal(x0, parts["x0"])
    ours, _ = adavid.matching_loss(x0, teacher, Smooth(1), text, NULL, config, generator)
    assert first == ours
    adavid.draw(torch.rand, x0.shape[:1], x0, generator)  # who is forced: nobody
    ours, step, *_ = adavid.weighted_regression(student, cache, real, text, 1, config, None,
                                                generator)
    assert second == ours and torch.equal(step, reg["reg_step"])


# ---------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------


def distil(method, model, out, *flags, steps=4):
    return baselines.main([method, "--model", str(model), "--out", str(out), "--steps", str(steps),
                           "--batch-size", "2", "--heads-width", "32", "--device", "cpu",
                           *map(str, flags)])


@pytest.mark.parametrize("method, flags", [
    ("lcm", []), ("dcm", []), ("rcm", ["--tangent", "jvp"]), ("dfd", ["--lambda-reg", 2])])
def test_each_method_learns_and_resumes_bit_for_bit(method, flags, toy_folder, tmp_path,
                                                    monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert distil(method, toy_folder, whole, *flags) == 0
    end_step, stop = baselines.Setup.end_step, 3

    def stopping(self, run, step, *args, **options):
        end_step(self, run, step, *args, **options)
        if step + 1 == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(baselines.Setup, "end_step", stopping)
        assert distil(method, toy_folder, broken, *flags, "--save-every", 1) == 130
    assert distil(method, toy_folder, broken, *flags, "--save-every", 2) == 0
    assert equal(saved(whole), saved(broken))
    assert (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    if method != "dcm":  # whose discriminator is no small part of this miniature
        parameters = sum(p.numel() for p in WanModel.from_pretrained(whole).parameters())
        state = sum(tensor.nbytes for tensor in saved(whole).values()) / parameters
        assert state == pytest.approx(16 if method == "lcm" else 24, rel=0.01)

    start = WanModel.from_pretrained(toy_folder).state_dict()
    folder = whole / "detail" if method == "dcm" else whole
    learned = WanModel.from_pretrained(folder).state_dict()
    assert not torch.equal(start["head.head.weight"], learned["head.head.weight"])
    capsys.readouterr()
    code = sample.main(["a red ball", "--model", str(whole), "--out", str(tmp_path / "videos"),
                        "--device", "cpu"])
    if method == "dcm":  # sample.py must not take one of two experts for the student
        assert str(whole) in complaint(capsys, code)
    else:
        said = capsys.readouterr().out
        assert code == 0
        assert "does not seem to be distilled" not in said and "no interpolator" not in said


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_keeps_its_tensors_together(method, kind, toy_folder, tmp_path):
    with pretended(kind, baselines):
        assert baselines.main([method, "--model", str(toy_folder), "--out", str(tmp_path / "out"),
                               "--steps", "2", "--batch-size", "2", "--device", kind,
                               "--heads-width", "32", "--critic-updates", "1"]) == 0


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_each_method_makes_an_update_on_wan_and_samples(method, inputs, tmp_path):
    out = tmp_path / "out"
    assert distil(method, inputs["diffusers"], out, "--data", inputs["encoded"], steps=2) == 0
    assert read_lines(out / "metrics.jsonl")[-1]["saturation"] >= 0
    if method != "dcm":
        assert sample.main(["a cat", "--model", str(out), "--codec", str(inputs["diffusers"]),
                            "--out", str(tmp_path / "videos"), "--frames", "5", "--height", "32",
                            "--width", "48", "--device", "cpu"]) == 0


@pytest.mark.parametrize("method, flags", [
    ("lcm", []), ("dcm", []), ("dfd", []),
    pytest.param("rcm", ["--tangent", "jvp"], marks=pytest.mark.skipif(
        torch.__version__ < "2.13", reason="its derivative in bfloat16 needs torch 2.13"))])
def test_each_method_runs_in_bfloat16_and_sharded_as_on_one_gpu(method, flags, toy_folder,
                                                                tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        out = tmp_path / "out"
        assert distil(method, toy_folder, out, *flags, "--dtype", "bfloat16", steps=2) == 0
    finally:
        dist.destroy_process_group()
    assert all(step["student_grad_norm"] > 0 for step in read_lines(out / "metrics.jsonl"))


@pytest.mark.parametrize("method, numbers, wanted", [
    ("lcm", {}, 6), ("dcm", {}, 7.9), ("rcm", {}, 33),
    ("dfd", {}, 32.5), ("dfd", {"lambda_reg": 2.0}, 35.5)])
def test_an_update_takes_the_forwards_that_the_docs_name(method, numbers, wanted):
    """On the toy, whose discriminator is larger in proportion: 9.8 for DCM's detail expert."""
    wan, shape = PRESETS["tiny"], ToyCodec.latent_shape(ToyCodec)
    if method != "dcm":  # whose discriminator reads three blocks
        wan = replace(wan, num_layers=1)
    config = replace(baselines.default_numbers(method, WEIGHTS), **numbers)
    student, critic, teacher = (WanModel(wan) for _ in range(3))
    real, text = torch.zeros(1, *shape), torch.zeros(1, wan.text_len, wan.text_dim)
    teacher.requires_grad_(False)
    cache, heads = adavid.LossMeanCache(4), baselines.Heads(wan.dim, 3, config.heads_width)
    batch = real, text, text

    def flops(*parts):
        def run():
            for part in parts:
                result = part()
                if result.requires_grad:
                    result.backward()

        return costs.count_flops(run)

    def cycle(length):
        times = config.timesteps[:length]
        losses = {"rcm": baselines.rcm_losses, "dfd": baselines.dfd_losses}[method]
        terms = losses(student, teacher, critic, cache, *batch, times, config)
        rollout = torch.no_grad()(lambda: adavid.few_steps(student, real, text, times, (1,) * 4))
        learning = flops(lambda: adavid.critic_loss(critic, real, text, config))
        updates = config.critic_updates
        number = 1 if method == "dfd" and not config.lambda_reg else 2
        return (flops(*[lambda: next(terms)[0]] * number) + (updates - 1) * flops(rollout)
                + updates * learning)

    def detail():
        loss, tokens[:] = baselines.detail_loss(student, teacher, heads, *batch, config)
        return loss

    tokens = []
    if method == "lcm":
        counted = flops(lambda: baselines.lcm_loss(student, critic, teacher, *batch, config))
    elif method == "dcm":
        counted = flops(lambda: baselines.semantic_loss(student, teacher, *batch, config), detail,
                        lambda: baselines.discriminator_loss(heads, *tokens)) / 2
    else:
        counted = (cycle(1) + cycle(4)) / 2
    assert counted / costs.forward_flops(wan, shape) == pytest.approx(wanted, rel=0.02)


def test_dcm_samples_with_both_of_its_experts(toy_folder, tmp_path):
    out = tmp_path / "dcm"
    assert distil("dcm", toy_folder, out, "--lr", 1e-2, steps=2) == 0
    numbers = baselines.default_numbers("dcm", toy_folder)
    model, sampler, _ = baselines.load_student(out)
    assert sampler is baselines.euler_steps and model.split == pytest.approx(
        1000 * baselines.noise_levels(numbers, torch.zeros(1))[numbers.split].item())
    x = torch.randn(1, 12, 9, 8, 8)
    for t, expert in ((model.split + 1, out / "semantic"), (model.split, out / "detail")):
        t, text = torch.tensor([t]), torch.zeros(1, 1, 34)
        assert torch.equal(model(x, t, text), WanModel.from_pretrained(expert, torch.float32)(
            x, t, text))


def test_rcm_says_which_torch_its_derivative_needs(toy_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    code = baselines.main(["rcm", "--model", str(toy_folder), "--out", str(tmp_path), "--dtype",
                           "bfloat16", "--tangent", "jvp", "--device", "cpu"])
    assert "needs torch 2.13" in complaint(capsys, code)


@pytest.mark.parametrize("flags, says", [
    (["--model", "nosuch"], "nosuch"), (["--split", "60"], "split 60"),
    (["--heads-width", "40"], "heads_width 40"), (["--share", "2"], "share 2"),
    (["--lr", "-1"], "lr -1.0"), (["--data", "nosuch"], "nosuch")])
def test_wrong_flags_are_one_line(flags, says, toy_folder, tmp_path, capsys):
    code = baselines.main(["dcm", "--out", str(tmp_path / "out"), "--model", str(toy_folder),
                           "--device", "cpu", *flags])
    assert says in complaint(capsys, code) and not (tmp_path / "out").exists()


def test_every_number_of_a_method_has_limits():
    assert not without_limits(baselines.BaselineConfig) + without_limits(baselines.Baseline)
