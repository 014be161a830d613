"""LCM, DCM, rCM and DFD: four methods to compare AVD with, built from the parts of adavid.py.

    python -m experiments.baselines lcm --out runs/lcm
    python -m experiments.baselines dcm --out runs/dcm
    python -m experiments.baselines rcm --out runs/rcm
    python -m experiments.baselines dfd --out runs/dfd --init-student runs/dmd

Each takes `--model DIR --data SHARDS` for Wan2.1, on one GPU, and resumes like train.py. Shapes,
noise levels and randomness are those of adavid.py.

The teacher's guided velocity defines an ODE, dx/dsigma = v, that leads from noise to a video. The
first three methods learn where it leads. A consistency model follows its own velocity in one
straight line from x_t to the noise level `end`, and should arrive where the ODE does:

    f(x_t, sigma) = x_t - (sigma - end) v(x_t, sigma)

So two neighbours on one trajectory of the ODE must have the same f. `target` is what the second
one's f is taken from: a copy of the student that gets no gradient.

LCM: arXiv 2310.04378. DCM: arXiv 2506.03123. rCM: arXiv 2510.08431. DFD: arXiv 2606.18478.
"""

import math
import shutil
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, Union

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import nn
from torch.overrides import TorchFunctionMode

import adavid
import kernels
from adavid import AnyNumber, AVDConfig, Fraction, Limits, NotNegative
from runtime import cli
from runtime.data import Prefetch, open_data, sample_indices
from runtime.distributed import init_distributed, mean_metrics
from runtime.models import check_fit, load_config, load_interpolator, load_trainable, save_student
from runtime.pictures import open_pictures
from runtime.run import Flags, Run, adamw, clip_and_step, make_generator, make_generators
from tiny_wan import WEIGHTS, ToyCodec, WanConfig, WanModel, checkpoint

# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaselineConfig(AVDConfig):
    """The numbers that AVD does not have. All are of the papers, or of the released code."""

    grid: Annotated[int, Limits(2, 10_000)] = 50
    """LCM, DCM, discrete rCM: intervals between noise levels (N), shifted by `shift`"""
    huber: Annotated[float, Limits(1e-15, 1e30)] = 0.001
    """LCM, DCM: width of the rounded tip of the pseudo-Huber loss (c)"""
    target_ema: Fraction = 0.95
    """LCM: decay of the target, an average of the student's weights (mu)"""
    split: cli.Count = 35
    """DCM: index of the level below which the detail expert takes over (kappa): there, the
    predictions of the teacher's sampler have settled"""
    lag: cli.Count = 3
    """DCM: the temporal coherence loss compares latent frames this far apart"""
    adversarial_weight: NotNegative = 0.5
    """DCM: weight of the discriminator's verdict (0.1 x 5)"""
    feature_weight: NotNegative = 1.0
    """DCM: weight of feature matching (0.1 x 10)"""
    heads_width: cli.Size = 1024
    """DCM: channels of the discriminator's heads; their learning rate is `critic_lr`"""
    tangent: Literal["jvp", "discrete"] = "jvp"
    """rCM: exact derivative along the ODE, or steps of the grid"""
    consistency_weight: NotNegative = 0.07
    """rCM: weight of L_sCM, 1 / (lambda sqrt(N)): lambda is 0.01, and a video has N = 2,096,640
    latent numbers. As losses are means here and not sums, this holds for any N"""
    discrete_weight: NotNegative = 50.0
    """rCM: the same for steps of the grid (the released code's 100 x 1/2)"""
    time_mean: AnyNumber = 0.72
    """rCM: random noise levels are sigmoid(time_mean + time_std z): -0.8 + log(21 frames) / 2"""
    time_std: NotNegative = 1.6
    share: Fraction = 0.5
    """DFD: share of the samples for which the teacher looks at a real video"""

    def __post_init__(self):
        super().__post_init__()
        if self.split >= self.grid or self.heads_width % 32:
            raise ValueError(f"split {self.split} must be less than grid {self.grid}, and "
                             f"heads_width {self.heads_width} a multiple of 32")


NUMBERS = {  # of Wan2.1-1.3B
    "lcm": {"timesteps": (1000, 963.3, 914.0, 833.3, 720.3, 523.3), "lr": 1e-6, "grad_clip": 1.0},
    "dcm": {"timesteps": (1000, 992, 982, 949, 905, 810), "shift": 17.0, "lr": 1e-6,
            "critic_lr": 1e-5, "weight_decay": 0.001, "grad_clip": 1.0},
    "rcm": {"timesteps": (1000, 933.8, 852.9, 609.0), "grid": 48, "critic_updates": 4,
            "critic_lr": 4e-7, "betas": (0.0, 0.999), "grad_clip": 1e30},
    "dfd": {"lambda_reg": 0.0, "lambda_temp": 0.0}}
TOY_NUMBERS = {
    "lcm": {"lr": 2e-4, "betas": (0.9, 0.999)},
    "dcm": {"lr": 5e-5, "critic_lr": 1e-3, "betas": (0.9, 0.999), "shift": 5.0, "split": 20,
            "timesteps": (1000, 952.4, 882.4, 769.2, 645.2, 434.8), "heads_width": 96},
    "rcm": {"lr": 2e-4, "critic_lr": 4e-4, "tangent": "discrete", "time_mean": 0.3},
    "dfd": {"lr": 5e-5}}


def default_numbers(method, model):
    """A method's BaselineConfig for a teacher: guidance and the like are those of its own file."""
    toy = WanConfig.from_pretrained(model).text_dim == ToyCodec.text_dim
    numbers = vars(load_config(model)) | NUMBERS[method] | (TOY_NUMBERS[method] if toy else {})
    if method != "dfd":  # only AVD's sampler has steps at half rate
        numbers |= dict.fromkeys(("strides", "train_strides"), (1,) * len(numbers["timesteps"]))
    return BaselineConfig(**numbers)


# ---------------------------------------------------------------------------------------------
# What the consistency methods share
# ---------------------------------------------------------------------------------------------


def noise_levels(config, like):
    """The grid: sigma `[N + 1]`, from 0 to 1."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    k = torch.arange(config.grid + 1, dtype=dtype, device=like.device)
    return adavid.shifted(k / config.grid, config.shift)


def consistency(model, x_t, t, text, end=0.0):
    """f: where the model's velocity leads in one straight line, at noise level `end`."""
    v = adavid.predict_velocity(model, x_t, t, text)
    return (x_t - (adavid.sigma_of(t) - end) * v).to(x_t.dtype)


@torch.no_grad()
def teacher_step(teacher, x_t, t, t_next, text, null_text, scale):
    """One Euler step along the guided teacher's ODE. (For a straight flow DDIM is the same.)"""
    v = adavid.guided_velocity(teacher, x_t, t, text, null_text, scale)
    return (x_t + (adavid.sigma_of(t_next) - adavid.sigma_of(t)) * v).to(x_t.dtype)


def neighbours(student, target, teacher, real, text, null_text, levels, config, end=0.0,
               generator=None):
    """f of real videos at random noise levels, and the target's f one step of the teacher further.

    levels: first and last index of the grid, both included. At the neighbour's level `end`, its f
        is the teacher's own step.
    """
    first, last = levels
    sigmas = noise_levels(config, real)
    u = adavid.draw(torch.rand, real.shape[:1], real, generator)
    k = first + (u * (last - first + 1)).long()
    t, t_next = 1000 * sigmas[k], 1000 * sigmas[k - 1]
    x_t = adavid.add_noise(real, adavid.draw(torch.randn, real.shape, real, generator), t)
    x_next = teacher_step(teacher, x_t, t, t_next, text, null_text, config.guidance_scale)
    with torch.no_grad():
        wanted = consistency(target, x_next, t_next, text, end)
    return consistency(student, x_t, t, text, end), wanted


def pseudo_huber(difference, c):
    """sqrt(d^2 + c^2) - c, element by element: |d|, but smooth at zero."""
    return (difference.float().square() + c**2).sqrt() - c


# ---------------------------------------------------------------------------------------------
# LCM: latent consistency model
# ---------------------------------------------------------------------------------------------


def lcm_loss(student, target, teacher, real, text, null_text, config, generator=None):
    """A scalar: f must not change from one noise level to the next."""
    f, wanted = neighbours(student, target, teacher, real, text, null_text, (1, config.grid),
                           config, generator=generator)
    return pseudo_huber(f - wanted, config.huber).mean()


# ---------------------------------------------------------------------------------------------
# DCM: a semantic expert for the noisy part of the grid, a detail expert for the rest
# ---------------------------------------------------------------------------------------------


def temporal_coherence(f, wanted, lag):
    """How far the changes over `lag` frames differ, a scalar; 0 for shorter videos."""
    change = [(x[:, :, lag:] - x[:, :, :-lag]).float() for x in (f, wanted)]
    return F.mse_loss(*change) if change[0].numel() else change[0].sum()


def semantic_loss(student, teacher, real, text, null_text, config, generator=None):
    """Of the expert for noise levels above the split. Its f leads to the split, not to a video."""
    end = noise_levels(config, real)[config.split]
    f, wanted = neighbours(student, student, teacher, real, text, null_text,
                           (config.split + 1, config.grid), config, end, generator)
    return (pseudo_huber(f - wanted, config.huber).mean()
            + temporal_coherence(f, wanted, config.lag))


def features(teacher, x_t, t, text):
    """The teacher's tokens after every second block: `[b, dim, f, h, w]` each. And the velocities
    that its head would read from them."""
    tokens, velocities = [], []
    hooks = [block.register_forward_hook(lambda _, inputs, out: tokens.append(out))
             for block in teacher.blocks[::2]]
    # While the head runs, as only then are the weights of a sharded model there.
    hooks.append(teacher.head.register_forward_pre_hook(
        lambda head, inputs: velocities.extend(head.forward(x, inputs[1]) for x in tokens)))
    try:
        teacher(x_t, t, text)
    finally:
        for hook in hooks:
            hook.remove()
    f, h, w = (n // m for n, m in zip(x_t.shape[2:], teacher.config.patch_size))
    tokens = [rearrange(x, "b (f h w) d -> b d f h w", f=f, h=h, w=w) for x in tokens]
    return tokens, torch.stack(velocities)


class Heads(nn.ModuleList):
    """The discriminator: for each tapped block a small network that judges every token."""

    def __init__(self, dim, count, width):
        def layer(inputs):
            return nn.Sequential(nn.Conv2d(inputs, width, 1), nn.GroupNorm(32, width),
                                 nn.LeakyReLU())

        super().__init__(nn.ModuleList([layer(dim), layer(width), nn.Conv2d(width, 1, 1)])
                         for _ in range(count))

    def forward(self, tokens):
        """`tokens` from `features` -> verdicts `[heads, b f, 1, h, w]`: above 0 for real."""
        device, verdicts = "cuda" if tokens[0].is_cuda else "cpu", []
        with torch.autocast(device, torch.bfloat16, tokens[0].dtype == torch.bfloat16):
            for x, (enter, middle, leave) in zip(tokens, self):
                x = enter(rearrange(x.float(), "b d f h w -> (b f) d h w"))
                verdicts.append(leave(x + middle(x)))
        return torch.stack(verdicts).float()


def detail_loss(student, teacher, heads, real, text, null_text, config, generator=None):
    """Of the expert for noise levels up to the split; and the tokens for `discriminator_loss`.

    Real is to the discriminator what the student should have said: f of the neighbour. Both are
    noised alike before the teacher, through which the gradient flows, turns them into features.
    """
    f, wanted = neighbours(student, student, teacher, real, text, null_text, (1, config.split),
                           config, generator=generator)
    sigmas = noise_levels(config, real)
    k = (adavid.draw(torch.rand, real.shape[:1], real, generator) * config.split).long()
    noise, t = adavid.draw(torch.randn, real.shape, real, generator), 1000 * sigmas[k]
    fake, fake_velocities = features(teacher, adavid.add_noise(f, noise, t), t, text)
    with torch.no_grad():
        true, true_velocities = features(teacher, adavid.add_noise(wanted, noise, t), t, text)
    loss = (pseudo_huber(f - wanted, config.huber).mean()
            + config.adversarial_weight * F.relu(1 - heads(fake)).mean()
            + config.feature_weight * F.mse_loss(fake_velocities.float(), true_velocities.float()))
    return loss, ([x.detach() for x in fake], true)


def discriminator_loss(heads, fake, true):
    """Hinge loss, a scalar."""
    return F.relu(1 + heads(fake)).mean() + F.relu(1 - heads(true)).mean()


class Experts(nn.Module):
    """DCM's student: two models as one. All of a batch must have one `t`: above `split`, the
    semantic expert takes it."""

    def __init__(self, semantic, detail, split):
        super().__init__()
        self.semantic, self.detail, self.split = semantic, detail, split

    def forward(self, x_t, t, text):
        expert = self.detail if t[0] <= self.split else self.semantic
        return expert(x_t, t, text)


@torch.no_grad()
def euler_steps(model, noise, text, config, interpolator=None, generator=None):
    """DCM's sampler, with the arguments of `adavid.sample`, of which it ignores the last two.

    Euler steps through the config's timesteps and from the last one to zero, in float32.
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for t, t_next in zip(config.timesteps, (*config.timesteps[1:], 0)):
        v = model(x.to(noise.dtype), x.new_full((len(x),), t), text)
        x = x + (t_next - t) / 1000 * v
    return x.to(noise.dtype)


# ---------------------------------------------------------------------------------------------
# rCM: consistency between infinitely close neighbours, and distribution matching beside it
# ---------------------------------------------------------------------------------------------


class BlockAttention(torch.autograd.Function):
    """Attention with a forward-mode derivative, which scaled_dot_product_attention lacks.

    Queries go in blocks, so that Wan's 32,760 tokens never need a matrix of all scores.
    """

    block = 256

    @staticmethod
    def forward(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def jvp(ctx, dq, dk, dv):
        q, k, v, out = ctx.saved_tensors
        dk, dv = (torch.zeros_like(k) if d is None else d for d in (dk, dv))  # of the text
        parts, scale = [], q.shape[-1] ** -0.5
        for i in range(0, q.shape[-2], BlockAttention.block):
            rows = slice(i, i + BlockAttention.block)
            p = torch.softmax(scale * q[..., rows, :] @ k.mT, dim=-1)
            dp = p * (scale * (dq[..., rows, :] @ k.mT + q[..., rows, :] @ dk.mT))
            parts.append(p @ dv + dp @ v - dp.sum(-1, keepdim=True) * out[..., rows, :])
        return torch.cat(parts, dim=-2)


class Differentiable(TorchFunctionMode):
    """Within it, attention is BlockAttention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return BlockAttention.apply(*args)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def tangent(student, x_t, t, text, v, v_teacher):
    """v_teacher - v - sigma dv/dsigma along the teacher's ODE. Zero if f is constant along it.

    `v` and `v_teacher` are the student's and the guided teacher's velocities at `x_t`.
    """
    with Differentiable():
        _, derivative = torch.func.jvp(lambda x, t: student(x, t, text), (x_t, t),
                                       (v_teacher, torch.full_like(t, 1000)))
    return v_teacher - v - adavid.sigma_of(t) * derivative


def tangent_loss(v, slope, t):
    """L_sCM, a scalar: the velocity `v` shall move along the tangent, `slope`.

    The paper's loss in TrigFlow, with means for sums: there rho (v - v_detached) is the change of
    the network's output, and (1 - sigma) rho slope its tangent. It is divided by its norm (plus
    0.1), for each sample. So the loss is always about 1/2; log the size of the tangent instead.
    """
    sigma = adavid.sigma_of(t)
    rho = ((1 - sigma) ** 2 + sigma**2).sqrt()
    g = (1 - sigma) * rho * slope
    rms = g.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
    g = g / (rms + 0.1 / g[0].numel() ** 0.5)
    return 0.5 * (rho * (v - v.detach()) - g).square().mean()


def random_rollout(config, generator):
    """Timesteps of a rollout: 1000, and up to three random ones that never rise."""
    u = torch.rand(len(config.timesteps) - 1, generator=generator)
    count = torch.randint(len(config.timesteps), (), generator=generator).item()
    times = 1000 * adavid.shifted(u, config.shift).clamp(1e-3)
    return (1000.0, *times.cummin(0).values[:count].tolist())


def rcm_losses(student, teacher, critic, cache, real, text, null_text, timesteps, config,
               interpolator=None, generator=None):
    """Yield the consistency loss on real videos, then L_KL on the student's.

    The arguments are those of `dfd_losses`; there is no use for `cache` and `interpolator`.
    timesteps: of the student's rollout, from `random_rollout`; the same for the whole batch.
    """
    if config.tangent == "discrete":
        f, wanted = neighbours(student, student, teacher, real, text, null_text,
                               (1, config.grid), config, generator=generator)
        loss = F.mse_loss(f.float(), wanted.float())
        yield config.discrete_weight * loss, {"consistency": loss.detach()}
    else:
        z = adavid.draw(torch.randn, real.shape[:1], real, generator)
        t = 1000 * torch.sigmoid(config.time_mean + config.time_std * z)
        x_t = adavid.add_noise(real, adavid.draw(torch.randn, real.shape, real, generator), t)
        with torch.no_grad():
            v_teacher = adavid.guided_velocity(teacher, x_t, t, text, null_text,
                                               config.guidance_scale)
        v = student(x_t, t, text)
        slope = tangent(student, x_t, t, text, v.detach(), v_teacher)
        yield config.consistency_weight * tangent_loss(v, slope, t), {
            "tangent": slope.square().mean().sqrt()}

    noise = adavid.draw(torch.randn, real.shape, real, generator)
    x0 = adavid.few_steps(student, noise, text, timesteps, (1,) * len(timesteps),
                          generator=generator)
    dmd = adavid.distribution_matching_loss(x0, teacher, critic, text, null_text, config,
                                            generator)
    yield dmd, {"dmd": dmd.detach(), "x0": x0.detach()}


# ---------------------------------------------------------------------------------------------
# DFD: data-forcing distillation
# ---------------------------------------------------------------------------------------------


def data_forcing_loss(real, x0, teacher, critic, text, null_text, config, generator=None):
    """`adavid.distribution_matching_loss`, but for a share of the samples the teacher looks at the
    noised real video in place of the student's, at the same time and with the same noise.

    There it finds what the student has lost, and none of the student's faults.
    """
    with torch.no_grad():
        t = adavid.random_timesteps(x0, config, generator)
        noise = adavid.draw(torch.randn, x0.shape, x0, generator)
        forced = adavid.draw(torch.rand, x0.shape[:1], x0, generator) < config.share
        x_t = adavid.add_noise(x0, noise, t)
        seen = torch.where(forced.view(-1, 1, 1, 1, 1), adavid.add_noise(real, noise, t), x_t)
        x0_fake = adavid.predict_x0(critic, x_t, t, text)
        v_real = adavid.guided_velocity(teacher, seen, t, text, null_text, config.guidance_scale)
        gradient = adavid.dmd_gradient(x0, x0_fake, adavid.velocity_to_x0(v_real, seen, t))
    return adavid.dmd_loss(x0, gradient)


def dfd_losses(student, teacher, critic, cache, real, text, null_text, timesteps, config,
               interpolator=None, generator=None):
    """Yield AVD's two terms, each with values for the log, but with data forcing in the first."""
    step, noise = len(timesteps) - 1, adavid.draw(torch.randn, real.shape, real, generator)
    x0 = adavid.backward_simulation(student, noise, text, step, config, interpolator, generator)
    dmd = data_forcing_loss(real, x0, teacher, critic, text, null_text, config, generator)
    temp = adavid.temporal_loss(x0, config.temporal_eps, config.temporal_truncation)
    yield dmd + config.lambda_temp * temp, {
        "dmd": dmd.detach(), "temp": temp.detach(), "x0": x0.detach()}
    if config.lambda_reg:
        loss, reg_step, reg, weight = adavid.weighted_regression(
            student, cache, real, text, step, config, interpolator, generator)
        yield loss, {"reg_step": reg_step, "reg": reg, "weight": weight}


# ---------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------


@dataclass
class Baseline(Flags):
    method: tyro.conf.Suppress[str] = ""
    steps: cli.Count = 60
    batch_size: cli.Size = 16
    save_every: cli.Count = 10
    sample_every: cli.Count = 20
    model: Path = WEIGHTS
    """folder of the teacher"""
    data: Path | None = None
    """folder of shards from tools.encode; by default the toy world"""
    codec: Path | None = None
    """folder of Wan's VAE, for the pictures; by default the teacher's folder"""
    init_student: Path | None = None
    """folder of the student's initial weights; by default the teacher's"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype to compute in: auto is bfloat16 for Wan on a GPU that has it, from NVIDIA or AMD, and
    else float32"""
    numbers: Annotated[BaselineConfig, tyro.conf.arg(name="")] = BaselineConfig()

    @property
    def may_change(self):
        """Flags that may change on resuming. DCM spends half of its steps on each expert."""
        return Flags.may_change | {"codec"} | (set() if self.method == "dcm" else {"steps"})

    def retry_flags(self):
        return self.lower_rates(self.numbers, load_config(self.model))


@dataclass
class ModelFlag:
    """Parsed before the others: numbers have their defaults by method and teacher."""

    model: Path = WEIGHTS


def main(argv=None):
    argv, numbers = sys.argv[1:] if argv is None else argv, dict.fromkeys(METHODS, BaselineConfig())
    try:
        teacher, _ = tyro.cli(ModelFlag, args=argv, return_unknown_args=True, add_help=False,
                              console_outputs=False)
        numbers = {method: default_numbers(method, teacher.model) for method in METHODS}
    except (ValueError, OSError, SystemExit):
        pass  # reported later; --help works without a model
    except KeyboardInterrupt:
        return 130
    options = Union[tuple(Annotated[Baseline, tyro.conf.subcommand(  # noqa: UP007
        method, default=Baseline(tyro.MISSING, method=method, numbers=numbers[method]),
        description=text)] for method, (_, text) in METHODS.items())]
    return cli.run(lambda args: METHODS[args.method][0](args, Setup(args)), options, argv)


class Setup:
    """What every method needs: the device, the data, models, pictures, and how to save."""

    def __init__(self, args):
        self.args, self.device = args, init_distributed(args.device)
        self.data, self.start = open_data(args.data, args.seed), args.init_student or args.model
        check_fit(args.out, args.model, self.start, self.data)
        self.dtype = cli.pick_dtype(args.dtype, self.device, WanConfig.from_pretrained(args.model))
        cli.announce(self.device, self.dtype, args.device)
        exact = (args.method, args.numbers.tangent) == ("rcm", "jvp")
        if exact and self.dtype == torch.bfloat16 and torch.__version__ < "2.13":
            raise ValueError(f"--tangent jvp: in bfloat16 it needs torch 2.13 or later, and this "
                             f"is {torch.__version__}; use --dtype float32, or --tangent discrete")
        if not self.data.has_videos:
            raise ValueError(f"{args.data}: holds no videos, and these methods learn from them")
        self.null_text = self.data.null_text.to(self.device)
        self.fetch = Prefetch(lambda update: self.data.batch(sample_indices(
            update, args.batch_size)))
        self.pictures = open_pictures(self.data, args.model, args.codec, self.device)

    def load(self):
        """The teacher, frozen, and two models that start like the student."""
        recompute = self.args.data is not None
        teacher, *students = (load_trainable(path, self.dtype, self.device, recompute)
                              for path in (self.args.model, self.start, self.start))
        return teacher.requires_grad_(False), *students

    def batch(self, update):
        """Real videos, their text, the null text, and a generator for each sample."""
        real, text, _ = self.fetch(update)
        return real.to(self.device), text.to(self.device), self.null_text, make_generators(
            self.args.seed, "distill", sample_indices(update, self.args.batch_size))

    def end_step(self, run, step, metrics, model, sampler=adavid.sample, interpolator=None):
        """Draw pictures, log and save, each if it is due."""
        def sample(noise, text):
            return sampler(model, noise, text, self.args.numbers, interpolator,
                           torch.Generator().manual_seed(self.args.seed))

        if self.pictures and run.picture_due(step):
            metrics |= self.pictures.write(run.picture(step), sample)
        run.log(step, metrics, self.fetch.waited)
        run.save(step)

    def save(self, model, folder="", **metadata):
        """Write a student, with the numbers that `adavid.sample` needs."""
        numbers = vars(self.args.numbers)
        avd = AVDConfig(**{field.name: numbers[field.name] for field in fields(AVDConfig)})
        save_student(model, self.args.out / folder, asdict(model.config), metadata | {
            "method": self.args.method, "avd": avd.to_json(), "seed": str(self.args.seed)})


def descend(model, optimizer, loss, config, name="loss", norm_name="student_grad_norm"):
    """An update of the model by the loss; both in a dict, with the norm of the gradient."""
    loss.backward()
    norm = clip_and_step(model, [optimizer], config.grad_clip, loss.item())
    return {name: loss.item(), norm_name: norm}


def train_lcm(args, setup):
    config, (teacher, student, target) = args.numbers, setup.load()
    optimizer = adamw(student, config.lr, config)
    with Run(args, {"student": student, "target": target, "optimizer": optimizer}) as run:
        for step in run.steps():
            real, text, null_text, generators = setup.batch(step)
            loss = lcm_loss(student, target, teacher, real, text, null_text, config, generators)
            metrics = descend(student, optimizer, loss, config)
            if math.isfinite(metrics["student_grad_norm"]):
                with torch.no_grad():
                    for p, q in zip(target.parameters(), student.parameters()):
                        p.lerp_(q, 1 - config.target_ema)
            setup.end_step(run, step, metrics, student)
    setup.save(student)


def train_dcm(args, setup):
    """The first half of the steps trains the semantic expert, the second the detail expert."""
    config, (teacher, semantic, detail) = args.numbers, setup.load()
    torch.manual_seed(args.seed)
    heads = Heads(teacher.config.dim, len(teacher.blocks[::2]), config.heads_width)
    heads.to(setup.device)
    split = 1000 * noise_levels(config, setup.null_text)[config.split].item()
    experts = Experts(semantic, detail, split)
    semantic_optimizer, detail_optimizer = (adamw(model, config.lr, config)
                                            for model in (semantic, detail))
    heads_optimizer = adamw(heads, config.critic_lr, replace(config, betas=(0.0, config.betas[1])))
    if hasattr(teacher, "set_reshard_after_forward"):  # FSDP: `features` bypasses its output
        teacher.set_reshard_after_forward(False, recurse=False)
    with Run(args, {"experts": experts, "heads": heads, "heads_optimizer": heads_optimizer,
                    "semantic_optimizer": semantic_optimizer,
                    "detail_optimizer": detail_optimizer}) as run:
        for step in run.steps():
            real, text, null_text, generators = setup.batch(step)
            if step < args.steps // 2:
                loss = semantic_loss(semantic, teacher, real, text, null_text, config, generators)
                metrics = descend(semantic, semantic_optimizer, loss, config)
            else:
                if step == args.steps // 2:
                    detail.load_state_dict(semantic.state_dict())
                loss, tokens = detail_loss(detail, teacher, heads, real, text, null_text, config,
                                           generators)
                metrics = descend(detail, detail_optimizer, loss, config)
                heads.zero_grad()  # what the detail expert's loss has left there
                metrics |= descend(heads, heads_optimizer, discriminator_loss(heads, *tokens),
                                   config, "discriminator", "heads_grad_norm")
            setup.end_step(run, step, metrics, experts, euler_steps)
    setup.save(semantic, "semantic")
    setup.save(detail, "detail", split=str(split))


def train_rcm(args, setup):
    def rollout(update):
        return random_rollout(args.numbers, make_generator(args.seed, "rollout", update))

    train_with_critic(args, setup, rcm_losses, rollout)


def train_dfd(args, setup):
    timesteps, interpolator = args.numbers.timesteps, load_interpolator(args.model, setup.device)

    def rollout(update):
        generator = make_generator(args.seed, "step", update)
        return timesteps[:1 + torch.randint(len(timesteps), (), generator=generator).item()]

    train_with_critic(args, setup, dfd_losses, rollout, interpolator)
    if interpolator is not None:
        shutil.copy(checkpoint.home(args.model) / "interpolator.safetensors", args.out)


def train_with_critic(args, setup, losses, rollout, interpolator=None):
    """Cycles of one update of the student and several of the critic, as in train.py.

    rollout: gives the timesteps of the student's steps in an update.
    """
    config, (teacher, student, critic) = args.numbers, setup.load()
    student_optimizer = adamw(student, config.lr, config)
    critic_optimizer = adamw(critic, config.critic_lr, config)
    cache = adavid.LossMeanCache(len(config.timesteps), config.ema_decay, config.k)
    cache.to(setup.device)
    state = {"student": student, "critic": critic, "cache": cache,
             "student_optimizer": student_optimizer, "critic_optimizer": critic_optimizer}
    with Run(args, state) as run:
        for cycle in run.steps():
            first, values = cycle * max(1, config.critic_updates), {"loss": 0}
            real, text, null_text, generators = setup.batch(first)
            for term, new_values in losses(student, teacher, critic, cache, real, text, null_text,
                                           rollout(first), config, interpolator, generators):
                term.backward()
                values |= new_values | {"loss": values["loss"] + term.detach()}
            x0, loss = values.pop("x0"), values["loss"].item()
            values |= {"variance": kernels.temporal_variance(x0),
                       "data_variance": kernels.temporal_variance(real)}
            norm = clip_and_step(student, [student_optimizer], config.grad_clip, loss)
            if "reg" in values and math.isfinite(norm):
                cache.update(values["reg_step"], values["reg"])

            critic_metrics = []
            for update in range(first, first + config.critic_updates):
                if update > first:
                    real, text, null_text, generators = setup.batch(update)
                    noise = adavid.draw(torch.randn, real.shape, real, generators)
                    times = rollout(update)
                    with torch.no_grad():
                        x0 = adavid.few_steps(student, noise, text, times, config.train_strides,
                                              interpolator, generators)
                critic_metrics.append(descend(
                    critic, critic_optimizer, adavid.critic_loss(critic, x0, text, config,
                                                                 generators),
                    config, "critic", "critic_grad_norm"))
            metrics = {name: x.float().mean().item() for name, x in values.items()
                       if name != "reg_step"}
            setup.end_step(run, cycle, metrics | mean_metrics(critic_metrics) | {
                "student_grad_norm": norm}, student, interpolator=interpolator)
    setup.save(student)


def load_student(folder):
    """The student of any method, AVD too: a model, its sampler, which is called like
    `adavid.sample`, and its config."""
    experts = (folder / "detail").is_dir()
    detail = folder / "detail" if experts else folder
    model, config = WanModel.from_pretrained(detail, torch.float32).eval(), load_config(detail)
    if not experts:
        return model, adavid.sample, config
    semantic = WanModel.from_pretrained(folder / "semantic", torch.float32).eval()
    split = float(checkpoint.read_metadata(detail)["split"])
    return Experts(semantic, model, split), euler_steps, config


METHODS = {
    "lcm": (train_lcm, "Latent consistency: predict what the next noise level predicts."),
    "dcm": (train_dcm, "Dual-expert consistency: one model for coarse structure, one for detail."),
    "rcm": (train_rcm, "Score-regularised consistency: consistency and distribution matching."),
    "dfd": (train_dfd, "Data forcing: distribution matching that also looks at real videos.")}

if __name__ == "__main__":
    sys.exit(main())
