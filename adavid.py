"""Adaptive Video Distillation (AVD): a 50-step guided video diffusion model becomes a 4-step one.

The whole method, in the paper's order. A model is any callable

    velocity = model(x_t, t, text)

which, for steps at a lower frame rate, also takes `frame_stride`. So the same code serves a toy of
0.9M parameters, Wan2.1-14B, a sharded or a LoRA-wrapped model and, in the tests, a Gaussian whose
scores are known in closed form. Three diffusion models take part:

    student   G_omega   the few-step generator that we train; it starts as a copy of the teacher
    teacher   s_real    the pretrained model, frozen and guided
    critic    s_fake    is trained throughout on the student's latest videos; it starts as a copy
                        of the teacher, and is not guided: it must describe these videos as they are

Training repeats this cycle:

    x0 = the student's video, from noise, up to a random one of its steps      backward_simulation
    backward of L_KL(x0) + lambda_temp L_temp(x0)                                    matching_loss
    backward of lambda_reg w L_reg(a real video)                               weighted_regression
    update the student, and the running means that the weights w come from           LossMeanCache
    5 times: update the critic on videos of the student, first on x0                   critic_loss

Videos are latents `b c f h w`. `t` is `[b]` in [0, 1000], and sigma = t / 1000. `text` holds the
prompts' embeddings `[b, l, d]`. All randomness comes from the `generator` arguments: None for
torch's global generator, one torch.Generator for the whole batch, or a list with one per sample.

docs/method.md explains the ideas with pictures, and docs/minimal.py is the cycle as a program.
Adaptive Video Distillation, CVPR 2026, arXiv 2603.21864. DMD2: arXiv 2405.14867.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import kernels

# ---------------------------------------------------------------------------------------------
# Configuration: every number of the method, at the paper's value for Wan2.1
# ---------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """The least and the largest value of a number; both int for whole numbers."""

    low: float
    high: float

    def allow(self, number):
        return isinstance(number, (type(self.low), int)) and self.low <= number <= self.high

    def __str__(self):
        whole = "whole " if isinstance(self.low, int) else ""
        return f"a {whole}number from {self.low:.10g} to {self.high:.10g}"


AnyNumber = Annotated[float, Limits(-1e30, 1e30)]  # finite, also as float32
NotNegative = Annotated[float, Limits(0.0, 1e30)]
Positive = Annotated[float, Limits(1e-30, 1e30)]
Fraction = Annotated[float, Limits(0.0, 1.0)]
Decay = Annotated[float, Limits(0.0, 1 - 1e-9)]
Timestep = Annotated[float, Limits(1e-30, 1000.0)]
Stride = Annotated[int, Limits(1, 1024)]


@dataclass(frozen=True)
class AVDConfig:
    """The method's numbers. The paper's symbol is given where its name differs."""

    timesteps: tuple[Timestep, ...] = (1000, 900, 757, 522)
    """timesteps of the student's steps, noisiest first"""
    strides: tuple[Stride, ...] = (2, 2, 1, 1)
    """frame stride of each step in sampling: 2 keeps every second frame (section 3.3)"""
    train_strides: tuple[Stride, ...] = (1, 1, 1, 1)
    """frame stride of each step in training: the paper trains at the full frame rate"""
    guidance_scale: AnyNumber = 5.0
    """scale of the teacher's guidance: uncond + guidance_scale * (cond - uncond)"""
    shift: Positive = 5.0
    """how far the random timesteps of L_KL and of the critic are shifted towards noise"""
    t_range: tuple[Timestep, Timestep] = (20, 980)
    """bounds of the random timesteps of L_KL and of the critic"""
    lambda_reg: NotNegative = 2.0
    """weight of the adaptive regression (eq. 9)"""
    k: NotNegative = 3.0
    """how sharply the adaptive weight falls as a loss exceeds its mean (eq. 7)"""
    ema_decay: Fraction = 0.95
    """decay of the Loss Mean Cache (eq. 6; omega)"""
    lambda_temp: NotNegative = 0.05
    """weight of the temporal regularisation (eq. 9)"""
    temporal_eps: Positive = 1e-6
    """added inside the logarithm, so that a still video has a finite loss (eq. 8; theta)"""
    temporal_truncation: AnyNumber = 0.6
    """samples whose L_temp is at or below this level move enough and are left out"""
    critic_updates: Annotated[int, Limits(0, 1000)] = 5
    """updates of the critic after each update of the student"""
    lr: NotNegative = 2e-6
    """learning rate of the student (AdamW)"""
    critic_lr: NotNegative = 2e-6
    """learning rate of the critic (AdamW)"""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's moments"""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay"""
    grad_clip: Positive = 10.0
    """gradients are clipped to this norm, the student's and the critic's separately"""

    def __post_init__(self):
        check_limits(self)
        if not self.timesteps or any(a <= b for a, b in pairwise(self.timesteps)):
            raise ValueError(f"timesteps {self.timesteps}: there must be one or more, and they "
                             f"must decrease")
        if self.t_range[0] > self.t_range[1]:
            raise ValueError(f"t_range {self.t_range} must not decrease")
        for name in ("strides", "train_strides"):
            strides = getattr(self, name)
            if len(strides) != len(self.timesteps):
                raise ValueError(f"{name} {strides}: there must be one stride for each of the "
                                 f"{len(self.timesteps)} timesteps {self.timesteps}")
            if any(s & (s - 1) for s in strides) or any(a < b for a, b in pairwise(strides)):
                raise ValueError(f"{name} {strides} must be powers of two that never increase, as "
                                 f"the interpolator doubles the frame rate")

    def to_json(self):
        """All numbers in a string, which is stored in the metadata of weights."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text):
        """The config in a string of `to_json`. Numbers that are missing have their defaults."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value
                      for name, value in json.loads(text).items()})


def check_limits(options, named=str):
    """ValueError for a number in a dataclass that the Limits in its field's type do not allow.

    named: turns a field's name into what the user calls it.
    """
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        limits, value, parts = limits_of(kind), getattr(options, name), get_args(kind)
        if limits is None or value is None and type(None) in parts:
            continue
        if get_origin(kind) is not tuple:
            fits, wanted = limits.allow(value), limits
        else:
            count = "some" if ... in parts else len(parts)
            fits = isinstance(value, tuple) and count in ("some", len(value)) and all(
                map(limits.allow, value))
            wanted = f"{count} values, each {limits}"
        if not fits:
            raise ValueError(f"{named(name)} {value!r}: must be {wanted}")


def limits_of(kind):
    """The Limits in the type of a field; None if it has none."""
    if isinstance(kind, Limits):
        return kind
    return next(filter(None, map(limits_of, get_args(kind))), None)


# ---------------------------------------------------------------------------------------------
# Flow matching: x_t = (1 - sigma) x0 + sigma noise, and a model predicts v = noise - x0
# ---------------------------------------------------------------------------------------------


def sigma_of(t):
    """`t` `[b]` -> sigma `[b, 1, 1, 1, 1]`."""
    return (t / 1000).view(-1, 1, 1, 1, 1)


def add_noise(x0, noise, t):
    """The video noised to time t, x_t, in the dtype of `x0`."""
    return ((1 - sigma_of(t)) * x0 + sigma_of(t) * noise).to(x0.dtype)


def velocity_to_x0(v, x_t, t):
    """The clean video that the velocity implies, in the dtype of `x_t`."""
    return (x_t - sigma_of(t) * v).to(x_t.dtype)


def predict_velocity(model, x_t, t, text, stride=1):
    """The model's velocity. If `x_t` holds only every s-th frame, `frame_stride` tells it so."""
    return model(x_t, t, text) if stride == 1 else model(x_t, t, text, frame_stride=stride)


def predict_x0(model, x_t, t, text, stride=1):
    """The clean video that the model predicts."""
    return velocity_to_x0(predict_velocity(model, x_t, t, text, stride), x_t, t)


def shifted(u, shift):
    """Move u in [0, 1] towards 1, that is, towards noise."""
    return shift * u / (1 + (shift - 1) * u)


def draw(random, shape, like, generator=None):
    """Random numbers `random(shape)`, by torch.rand or torch.randn, on the device of `like`.

    They are float32, or wider if `like` is. With a list of generators, one for each sample, a
    sample gets the same numbers in any batch and on any rank. Numbers are drawn on the generator's
    device, then moved: a CPU generator gives the same numbers everywhere.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        return torch.cat([draw(random, (1, *shape[1:]), like, g) for g in generator])
    device = like.device if generator is None else generator.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    return random(shape, generator=generator, device=device, dtype=dtype).to(like.device)


def timesteps_like(timesteps, x):
    """The `timesteps` as a tensor beside `x`, at least float32: bfloat16 rounds 757 to 756."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.tensor(timesteps, dtype=dtype, device=x.device)


def random_timesteps(x0, config, generator=None):
    """Random t `[b]` for L_KL and for the critic: uniform, then shifted and clamped."""
    u = draw(torch.rand, x0.shape[:1], x0, generator)
    return (1000 * shifted(u, config.shift)).clamp(*config.t_range)


# ---------------------------------------------------------------------------------------------
# Distribution matching, L_KL (eq. 4): the student's distribution moves to the guided teacher's
# ---------------------------------------------------------------------------------------------


def guide(cond, uncond, scale):
    """Classifier-free guidance, of velocities or of predictions."""
    return uncond + scale * (cond - uncond)


def guided_velocity(model, x_t, t, text, null_text, scale):
    """The model's velocity with classifier-free guidance.

    null_text: the embedding of the empty or the negative prompt, `[1 or b, l', d]`.
    """
    null_text = null_text.expand(len(x_t), -1, -1)
    return guide(model(x_t, t, text), model(x_t, t, null_text), scale)


def dmd_gradient(x0, x0_fake, x0_real):
    """Eq. 4: the gradient with respect to the student's video `x0`. Descent moves against it.

        g = (x0_fake - x0_real) / mean_{c,f,h,w} |x0 - x0_real|

    `x0_fake` and `x0_real` are the critic's and the guided teacher's predictions from the same
    noised `x0`. A prediction of x0 is a score in other units: it says in which direction videos
    become more probable. The difference of both scores is the gradient of the KL divergence between
    the student's and the teacher's distributions, so one prediction of each is enough, and the
    teacher never has to sample. Moving against g leads away from what the student already generates
    and towards what the teacher would generate.

    The normaliser replaces the factor ((1 - sigma) / sigma)^2 of that divergence. It makes
    gradients comparable between timesteps: at high noise, predictions lie far from `x0` and from
    each other. Float32, one normaliser for each sample. 0 / 0 gives 0; NaN and inf pass through, so
    that the caller can report them and skip the update.
    """
    difference = x0_fake.float() - x0_real.float()
    normaliser = (x0.float() - x0_real.float()).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.where((difference == 0) & (normaliser == 0), 0.0, difference / normaliser)


def dmd_loss(x0, gradient):
    """A scalar for autograd, whose gradient with respect to `x0` is `gradient / x0.numel()`.

    Its value is half the mean square of `gradient`: by how much critic and teacher disagree. It is
    not the KL divergence. Float32, because bfloat16 rounds `x0 - gradient` to `x0`.
    """
    x0 = x0.float()
    return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())


def distribution_matching_loss(x0, teacher, critic, text, null_text, config, generator=None):
    """L_KL of the videos `x0`, a scalar. Its gradient is eq. 4's, divided by x0.numel()."""
    with torch.no_grad():
        t = random_timesteps(x0, config, generator)
        x_t = add_noise(x0, draw(torch.randn, x0.shape, x0, generator), t)
        x0_fake = predict_x0(critic, x_t, t, text)
        v_real = guided_velocity(teacher, x_t, t, text, null_text, config.guidance_scale)
        gradient = dmd_gradient(x0, x0_fake, velocity_to_x0(v_real, x_t, t))
    return dmd_loss(x0, gradient)


# ---------------------------------------------------------------------------------------------
# Adaptive regression, w L_reg (eqs. 5-7): real videos, to correct the colours
# ---------------------------------------------------------------------------------------------


def regression_loss(student, real, text, step, config, stride=1, generator=None):
    """L_reg (eq. 5) `[b]`: the velocity error on real videos, noised to the student's steps.

    `step` `[b]` indexes the student's timesteps. At stride s, only every s-th frame is used. The
    paper writes the error of epsilon; but at sigma = 1 the input is epsilon, and only the error of
    the velocity says something about x0.
    """
    real = real[:, :, ::stride]
    noise = draw(torch.randn, real.shape, real, generator)
    t = timesteps_like(config.timesteps, real)[step]
    v = predict_velocity(student, add_noise(real, noise, t), t, text, stride)
    return (v - (noise - real)).float().square().mean(dim=(1, 2, 3, 4))


def random_regression_steps(x0, step, strides, generator=None):
    """A random step `[b]` for each real video: any step, if all have the same stride.

    Otherwise one of those with the stride of `step`, so that the videos of a batch have one length.
    If `step` is uniform over all steps, so is each result.
    """
    candidates = torch.tensor([i for i, s in enumerate(strides) if s == strides[step]],
                              device=x0.device)
    u = draw(torch.rand, x0.shape[:1], x0, generator)
    return candidates[(u * len(candidates)).long()]


class LossMeanCache(nn.Module):
    """A running mean of the regression loss at each of the student's steps, and the weights.

    Eq. 6: Lbar <- omega Lbar + (1 - omega) L      Eq. 7: w = 1 - sigmoid(k (L - Lbar))

    A video whose loss exceeds its step's mean lies far from what the student can generate. Fitting
    it would pull the student to a compromise of two distributions, so it gets a smaller weight.
    """

    def __init__(self, num_steps, decay=0.95, k=3.0):
        super().__init__()
        self.decay, self.k = decay, k
        self.register_buffer("means", torch.zeros(num_steps))
        self.register_buffer("filled", torch.zeros(num_steps, dtype=torch.bool))

    @torch.no_grad()
    def weigh(self, step, loss):
        """Eq. 7: `step` (long) and `loss`, both `[b]` -> w `[b]`, without gradient.

        It is one half for a step that has no mean yet. Weigh first, then update.
        """
        excess = loss.float() - self.means[step]
        return 1 - torch.sigmoid(self.k * torch.where(self.filled[step], excess, 0.0))

    @torch.no_grad()
    def update(self, step, loss):
        """Eq. 6, once for each step that occurs, with that step's mean loss over all ranks.

        With accumulation, call it once, with the losses of all batches. The first mean loss of a
        step becomes the mean itself. A step that does not occur keeps its mean.
        """
        at_step = step[:, None] == torch.arange(len(self.means), device=step.device)
        sums_and_counts = torch.stack([torch.where(at_step, loss.float()[:, None], 0.0).sum(0),
                                       at_step.float().sum(0)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums_and_counts)
        sums, counts = sums_and_counts
        loss, present = sums / counts.clamp(min=1), counts > 0
        mean = torch.where(self.filled, self.decay * self.means + (1 - self.decay) * loss, loss)
        self.means.copy_(torch.where(present, mean, self.means))
        self.filled |= present


# ---------------------------------------------------------------------------------------------
# Temporal regularisation, L_temp (eq. 8): a penalty on videos that move too little
# ---------------------------------------------------------------------------------------------


def temporal_loss(x0, eps=1e-6, truncation=None, variance=None):
    """L_temp = -log(mean_{c,h,w} Var_f(x0) + eps) of each sample, then the mean over the batch.

    Var_f is the population variance over the frames. The paper's truncation is a gate: a sample
    whose loss is at or below it moves enough and contributes neither value nor gradient. A sample
    above it counts in full. Without the gate the loss would never be satisfied: variance over time
    can always grow, at last by flicker.

    variance: `kernels.temporal_variance(x0)`, if the caller has it.
    """
    variance = kernels.temporal_variance(x0) if variance is None else variance
    loss = -torch.log(variance + eps)
    if truncation is not None:
        loss = torch.where(loss <= truncation, 0.0, loss)  # `<=`, so that NaN stays
    return loss.mean()


# ---------------------------------------------------------------------------------------------
# The critic: a model of the student's current distribution
# ---------------------------------------------------------------------------------------------


def critic_loss(critic, x0, text, config, generator=None):
    """Flow matching on the student's videos `x0`, a scalar. Timesteps are drawn as for L_KL.

    The critic must keep up with the student. A critic that lags describes videos of the past, and
    L_KL then pushes the student on in a direction in which it may have gone too far already.
    """
    x0 = x0.detach()
    t = random_timesteps(x0, config, generator)
    noise = draw(torch.randn, x0.shape, x0, generator)
    return F.mse_loss(critic(add_noise(x0, noise, t), t, text).float(), (noise - x0).float())


# ---------------------------------------------------------------------------------------------
# The student's few steps: to sample (section 3.3), and to train on its own videos, which DMD2 calls
# backward simulation (section 4.5 there)
# ---------------------------------------------------------------------------------------------


def possible_strides(strides, interpolator):
    """The strides or, if there is no interpolator that could fill in frames, 1 for each step."""
    return strides if interpolator is not None else (1,) * len(strides)


def few_steps(model, noise, text, timesteps, strides, interpolator=None, generator=None):
    """Predict x0 at each of the `timesteps`, starting from pure noise; return the last prediction.

    Between steps, the prediction is renoised to the next timestep. A step with stride s sees every
    s-th frame. Where the next stride is smaller, the interpolator first fills in the frames between
    them. The returned video is always at the full frame rate. Gradients, if enabled, flow through
    the last step only.
    """
    strides = possible_strides(strides, interpolator)
    if (noise.shape[2] - 1) % strides[0]:
        raise ValueError(f"{noise.shape[2]} latent frames do not fit stride {strides[0]}: the "
                         f"number of frames must be 1 modulo {strides[0]}")
    times = timesteps_like(timesteps, noise)[:, None].repeat(1, len(noise))
    x_t, grad = noise[:, :, ::strides[0]], torch.is_grad_enabled()
    for i, t in enumerate(times):
        last = i + 1 == len(times)
        stride = strides[i]
        next_stride = 1 if last else strides[i + 1]
        with torch.set_grad_enabled(grad and last):
            x0 = predict_x0(model, x_t, t, text, stride)
            while stride > next_stride:  # each call doubles the frame rate
                x0, stride = interpolator(x0), stride // 2
        if not last:
            x_t = add_noise(x0, draw(torch.randn, x0.shape, noise, generator), times[i + 1])
    return x0


@torch.no_grad()
def sample(model, noise, text, config, interpolator=None, generator=None):
    """The student's sampler (section 3.3): the noisy steps run at a lower frame rate.

    By default, for nine latent frames (Wan has 21):

        t = 1000   frames 0   2   4   6   8    of pure noise; predicts x0, renoises it to 900
        t =  900   frames 0   2   4   6   8    predicts x0; the interpolator fills in 1, 3, 5, 7;
        t =  757   frames 0 1 2 3 4 5 6 7 8    renoised to 757; predicts x0, renoises it to 522
        t =  522   frames 0 1 2 3 4 5 6 7 8    predicts x0: the video

    noise: `[b, c, f, h, w]` at the full frame rate. With an interpolator, f must be 1 modulo the
        largest stride (else ValueError). Without one, every step runs at the full frame rate.
    generator: of the noise that is added between steps, one torch.randn of the next step's shape.
    """
    return few_steps(model, noise, text, config.timesteps, config.strides, interpolator, generator)


def backward_simulation(student, noise, text, step, config, interpolator=None, generator=None):
    """The student's video `b c f h w` as step number `step` predicts it, starting from pure noise.

    The student thus trains on its own predictions, as in sampling, though at `train_strides`. Each
    step, also the first, learns to predict a video of the teacher's distribution, not an average.
    Gradients flow through this step only, and through the interpolator if it follows the step.

    step: the same for the whole batch and on every rank, so that all take equally many forwards.
    """
    return few_steps(student, noise, text, config.timesteps[:step + 1],
                     config.train_strides[:step + 1], interpolator, generator)


# ---------------------------------------------------------------------------------------------
# One update of the student (eq. 9): L = L_KL + lambda_temp L_temp + lambda_reg w L_reg
#
# L has two terms, as x0 is the student's own video and L_reg looks at a real one. Call backward on
# each term as it comes: then only one term's activations are in memory.
# ---------------------------------------------------------------------------------------------


def matching_loss(x0, teacher, critic, text, null_text, config, generator=None):
    """L_KL + lambda_temp L_temp of the student's videos `x0`, a scalar, and its parts for the log.

    The parts are scalars without gradient: `dmd` (L_KL), `temp` (L_temp), and the videos' mean
    temporal `variance`.
    """
    dmd = distribution_matching_loss(x0, teacher, critic, text, null_text, config, generator)
    variance = kernels.temporal_variance(x0)
    temp = temporal_loss(x0, config.temporal_eps, config.temporal_truncation, variance)
    return dmd + config.lambda_temp * temp, {
        "dmd": dmd.detach(), "temp": temp.detach(), "variance": variance.detach().mean()}


def weighted_regression(student, cache, real, text, step, config, interpolator=None,
                        generator=None):
    """lambda_reg w L_reg of real videos, a scalar; and the step, L_reg and w of each, all `[b]`.

    real: `[b, c, f, h, w]`, of which `text` describes each.
    step: the step at which the student's rollout ended. Each real video gets a random step of its
        own, with the same stride.
    cache: the LossMeanCache, which is only read here. After the optimizer's step, unless it was
        skipped, call `cache.update` with the steps and the L_reg of all batches.
    """
    strides = possible_strides(config.train_strides, interpolator)
    reg_step = random_regression_steps(real, step, strides, generator)
    reg = regression_loss(student, real, text, reg_step, config, strides[step], generator)
    weight = cache.weigh(reg_step, reg)
    return config.lambda_reg * (weight * reg).mean(), reg_step, reg.detach(), weight


# ---------------------------------------------------------------------------------------------
# Frame interpolation (section 3.3): a small UNet predicts the frame between two neighbours
# ---------------------------------------------------------------------------------------------


class FrameInterpolator(nn.Module):
    """Doubles the frame rate of a clean latent: `b c f h w` -> `b c 2f-1 h w`, any h and w.

    The frame between two neighbours is blend * left + (1 - blend) * right + residual, where the
    UNet predicts blend and residual. Given frames are kept bit for bit. An untrained interpolator
    returns the mean of the neighbours, as its last layer starts at zero.
    """

    def __init__(self, channels, width=64):
        super().__init__()
        if width % 8:
            raise ValueError(f"width {width} must be a multiple of 8, the number of norm groups")

        def conv(inputs, outputs, stride=1):
            return nn.Conv2d(inputs, outputs, 3, stride, padding=1)

        def stage(inputs, outputs, stride=1):
            return nn.Sequential(conv(inputs, outputs, stride), nn.GroupNorm(8, outputs), nn.SiLU(),
                                 conv(outputs, outputs), nn.SiLU())

        self.enter = stage(2 * channels, width)
        self.down = stage(width, 2 * width, stride=2)
        self.up = conv(2 * width, width)
        self.leave = stage(2 * width, width)
        self.out = conv(width, channels + 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x0):
        b, c, _, h, w = x0.shape
        if c != self.out.out_channels - 1:
            raise ValueError(f"x0 has {c} channels, but must have {self.out.out_channels - 1}")
        pairs = torch.cat([x0[:, :, :-1], x0[:, :, 1:]], dim=1).to(self.out.weight.dtype)
        skip = self.enter(rearrange(pairs, "b c f h w -> (b f) c h w"))
        deep = self.up(F.interpolate(self.down(skip), size=(h, w)))
        out = self.out(self.leave(torch.cat([skip, deep], dim=1)))
        out = rearrange(out, "(b f) c h w -> b c f h w", b=b).to(x0.dtype)
        return kernels.interpolate_frames(x0, out[:, :1].sigmoid(), out[:, 1:])


def interpolation_loss(interpolator, x0):
    """Mean squared error of every second frame of real latents `x0` (f odd), when it is dropped."""
    return F.mse_loss(interpolator(x0[:, :, ::2])[:, :, 1::2], x0[:, :, 1::2])


# ---------------------------------------------------------------------------------------------
# The teacher's sampler: many guided steps
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_teacher(model, noise, text, null_text, steps=50, guidance_scale=5.0, shift=5.0,
                   solver="euler"):
    """The teacher's sampler: solve the flow's ODE with guidance, on shifted sigmas from 1 to 0.

    solver: "euler", or "unipc": diffusers' multistep scheduler, as in its WanPipeline.
    """
    # In low precision, the rounding errors of many small steps would add up.
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))

    def velocity(x, t):
        return guided_velocity(model, x.to(noise.dtype), x.new_full((len(x),), t), text, null_text,
                               guidance_scale).to(x.dtype)

    if solver == "euler":
        for sigma, next_sigma in pairwise(shifted(torch.linspace(1, 0, steps + 1), shift).tolist()):
            x = x + (next_sigma - sigma) * velocity(x, 1000 * sigma)
    elif solver == "unipc":
        from diffusers import UniPCMultistepScheduler  # installed by the extra [wan]
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(velocity(x, t), t, x).prev_sample
    else:
        raise ValueError(f"solver {solver!r} is unknown; choose 'euler' or 'unipc'")
    return x.to(noise.dtype)
