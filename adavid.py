"""Adaptive Video Distillation (AVD): a 50-step guided video diffusion model becomes a 4-step one.

The whole method, in the paper's order. A model is anything with

    velocity = model(x_t, t, text)

so the same lines serve a toy of 0.7M parameters, Wan2.1-14B, a sharded or a LoRA-wrapped model, and
a Gaussian whose scores are known in closed form. Three models take part:

    student   G_omega   the few-step generator that we train; it starts as a copy of the teacher
    teacher   s_real    the pretrained model, frozen
    critic    s_fake    learns the scores of the student's own videos as the student changes; it
                        starts as a copy of the teacher, too

Videos are latents `b c f h w`. `t` is `[b]` in [0, 1000], and sigma = t / 1000. `text` is the
prompts' embeddings `[b, l, d]`. All randomness comes from the `generator` arguments: one
torch.Generator for the whole batch, or a list with one for each sample.

Adaptive Video Distillation, CVPR 2026, arXiv 2603.21864. DMD2: arXiv 2405.14867.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn

import kernels

# ---------------------------------------------------------------------------------------------
# Configuration: every number of the method, at the paper's value for Wan2.1
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AVDConfig:
    """The method's numbers, with the paper's symbols."""

    timesteps: tuple[float, ...] = (1000, 900, 757, 522)
    """the student's steps, from noise to video"""
    strides: tuple[int, ...] = (2, 2, 1, 1)
    """for sampling: at stride s, a step sees every s-th frame (section 3.3)"""
    train_strides: tuple[int, ...] = (1, 1, 1, 1)
    """for training; the paper trains at the full frame rate"""
    guidance_scale: float = 5.0
    """of the teacher: uncond + guidance_scale * (cond - uncond)"""
    shift: float = 5.0
    """shifts the random timesteps of distribution matching and of the critic towards noise"""
    t_range: tuple[float, float] = (20, 980)
    """range that these timesteps are clamped to"""
    lambda_reg: float = 2.0
    """lambda_reg: weight of the adaptive regression (eq. 9)"""
    k: float = 3.0
    """k: how sharply the weight falls as a loss exceeds its mean (eq. 7); in units of 1 / loss"""
    ema_decay: float = 0.95
    """omega: decay of the Loss Mean Cache (eq. 6)"""
    lambda_temp: float = 0.05
    """lambda_temp: weight of the temporal regularisation (eq. 9)"""
    temporal_eps: float = 1e-6
    """theta: keeps the logarithm of a still video finite (eq. 8)"""
    temporal_truncation: float = 0.6
    """a sample whose L_temp is at or below this counts zero, any other in full"""
    critic_updates: int = 5
    """critic updates after each update of the student"""
    lr: float = 2e-6
    """learning rate of the student (AdamW)"""
    critic_lr: float = 2e-6
    """learning rate of the critic (AdamW)"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's first and second moment"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    grad_clip: float = 10.0
    """gradients are clipped to this norm"""

    def __post_init__(self):
        if not self.timesteps or list(self.timesteps) != sorted(set(self.timesteps), reverse=True) \
                or not 0 < self.timesteps[-1] <= self.timesteps[0] <= 1000:
            raise ValueError(f"timesteps {self.timesteps} must decrease within (0, 1000]")
        for name in ("strides", "train_strides"):
            strides = getattr(self, name)
            if len(strides) != len(self.timesteps):
                raise ValueError(f"{name} {strides}: there must be one stride for each of the "
                                 f"{len(self.timesteps)} timesteps {self.timesteps}")
            if any(s < 1 or s & (s - 1) for s in strides) or sorted(strides)[::-1] != list(strides):
                raise ValueError(f"{name} {strides} must be powers of two that never increase")
        low, high = self.t_range
        for name, ok in {"t_range": 0 < low <= high <= 1000, "ema_decay": 0 <= self.ema_decay <= 1,
                         "k": self.k >= 0, "critic_updates": self.critic_updates >= 0}.items():
            if not ok:
                raise ValueError(f"{name} {getattr(self, name)} is out of range")

    def to_json(self):
        """All numbers as a string, to be stored in the metadata of weights."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text):
        return cls(**{name: tuple(value) if isinstance(value, list) else value
                      for name, value in json.loads(text).items()})


# ---------------------------------------------------------------------------------------------
# Flow matching: x_t = (1 - sigma) x0 + sigma noise, and a model predicts v = noise - x0
# ---------------------------------------------------------------------------------------------


def sigma_of(t):
    """`t` `[b]` -> sigma `[b, 1, 1, 1, 1]`."""
    return (t / 1000).view(-1, 1, 1, 1, 1)


def add_noise(x0, noise, t):
    """x_t, the video noised to time t, in the dtype of `x0`."""
    return ((1 - sigma_of(t)) * x0 + sigma_of(t) * noise).to(x0.dtype)


def velocity_to_x0(v, x_t, t):
    """The clean video that the velocity implies, in the dtype of `x_t`."""
    return (x_t - sigma_of(t) * v).to(x_t.dtype)


def predict_velocity(model, x_t, t, text, stride=1):
    """The model's velocity. At stride s, `x_t` holds every s-th frame; the model is told s."""
    return model(x_t, t, text) if stride == 1 else model(x_t, t, text, frame_stride=stride)


def predict_x0(model, x_t, t, text, stride=1):
    """The clean video that the model predicts."""
    return velocity_to_x0(predict_velocity(model, x_t, t, text, stride), x_t, t)


def shifted(u, shift):
    """Move u in [0, 1] towards 1, that is, towards noise: s u / (1 + (s - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def draw(random, shape, like, generator=None):
    """`random(shape)` (torch.rand or torch.randn) on the device of `like`, float32 at least.

    With a list of generators, one for each sample, a sample gets the same numbers in any batch and
    on any rank. Numbers are drawn on the generator's device, then moved.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        return torch.cat([draw(random, (1, *shape[1:]), like, g) for g in generator])
    device = like.device if generator is None else generator.device
    dtype = torch.promote_types(like.dtype, torch.float32)  # bfloat16 has no 757: it rounds to 756
    return random(shape, generator=generator, device=device, dtype=dtype).to(like.device)


def draw_timesteps(x0, config, generator=None):
    """Random times `[b]` for comparing distributions: uniform, then shifted and clamped."""
    u = draw(torch.rand, x0.shape[:1], x0, generator)
    return (1000 * shifted(u, config.shift)).clamp(*config.t_range)


# ---------------------------------------------------------------------------------------------
# Distribution matching, L_KL (eq. 4): the student's videos become those that the teacher draws
# ---------------------------------------------------------------------------------------------


def guide(cond, uncond, scale):
    """Classifier-free guidance."""
    return uncond + scale * (cond - uncond)


def guided_velocity(model, x_t, t, text, null_text, scale):
    """`null_text` `[1 or b, l', d]` is the embedding of the empty (or the negative) prompt."""
    null_text = null_text.expand(len(x_t), -1, -1)
    return guide(model(x_t, t, text), model(x_t, t, null_text), scale)


def dmd_gradient(x0, x0_fake, x0_real):
    """Eq. 4: the gradient in the student's video `x0`; descent moves against it.

        g = (x0_fake - x0_real) / mean_{c,f,h,w} |x0 - x0_real|

    `x0_fake` and `x0_real` are the critic's and the guided teacher's predictions from one noised
    `x0`. A step against g leads away from what the student's videos look like and towards what the
    teacher would have drawn. Computed in float32, with one normaliser for each sample. 0 / 0 is 0.
    A value that is not finite stays so.
    """
    difference = x0_fake.float() - x0_real.float()
    normaliser = (x0.float() - x0_real.float()).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.where((difference == 0) & (normaliser == 0), 0.0, difference / normaliser)


def dmd_loss(x0, gradient):
    """A loss whose gradient in `x0` is `gradient / x0.numel()`.

    Its value, half the mean square of `gradient`, is not the KL divergence that descent lowers. It
    tells by how much critic and teacher disagree. In bfloat16, `x0 - gradient` would round to `x0`.
    """
    x0 = x0.float()
    return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())


def distribution_matching_loss(x0, teacher, critic, text, null_text, config, generator=None):
    """L_KL of the student's videos `x0`: a scalar with the gradient of eq. 4."""
    with torch.no_grad():
        t = draw_timesteps(x0, config, generator)
        x_t = add_noise(x0, draw(torch.randn, x0.shape, x0, generator), t)
        x0_fake = predict_x0(critic, x_t, t, text)
        v_real = guided_velocity(teacher, x_t, t, text, null_text, config.guidance_scale)
        gradient = dmd_gradient(x0, x0_fake, velocity_to_x0(v_real, x_t, t))
    return dmd_loss(x0, gradient)


# ---------------------------------------------------------------------------------------------
# Adaptive regression, w L_reg (eqs. 5-7): real videos correct the colours
# ---------------------------------------------------------------------------------------------


def regression_loss(student, x0, text, step, config, stride=1, generator=None):
    """L_reg (eq. 5), `[b]`: the velocity error on real videos `x0`, noised to the student's steps.

    `step` `[b]` indexes the timesteps. The paper writes the error of epsilon, which at sigma = 1
    says nothing about x0; that of the velocity does. At stride s, only every s-th frame takes part.
    """
    x0 = x0[:, :, ::stride]
    noise = draw(torch.randn, x0.shape, x0, generator)
    t = torch.tensor(config.timesteps, dtype=noise.dtype, device=x0.device)[step]
    v = predict_velocity(student, add_noise(x0, noise, t), t, text, stride)
    return (v - (noise - x0)).float().square().mean(dim=(1, 2, 3, 4))


def draw_regression_steps(x0, step, strides, generator=None):
    """A step `[b]` for each real video, among the steps with the same stride as `step`.

    So all videos of the batch have the same length. As `step` is uniform, each of these is as well.
    """
    candidates = torch.tensor([i for i, s in enumerate(strides) if s == strides[step]],
                              device=x0.device)
    u = draw(torch.rand, x0.shape[:1], x0, generator)
    return candidates[(u * len(candidates)).long()]


class LossMeanCache(nn.Module):
    """A running mean of the regression loss at each of the student's steps, and the weights.

    Eq. 6: Lbar <- omega Lbar + (1 - omega) L      Eq. 7: w = 1 - sigmoid(k (L - Lbar))

    A video whose loss exceeds its step's mean lies far from what the student can draw. Fitting it
    would pull the student to the middle between two distributions, so it gets a smaller weight.
    """

    def __init__(self, num_steps, decay=0.95, k=3.0):
        super().__init__()
        self.decay, self.k = decay, k
        self.register_buffer("means", torch.zeros(num_steps))
        self.register_buffer("filled", torch.zeros(num_steps, dtype=torch.bool))

    def forward(self, step, loss):
        """Weigh, then update: `step` (long) and `loss`, both `[b]` -> w `[b]`."""
        weight = self.weigh(step, loss)
        self.update(step, loss)
        return weight

    @torch.no_grad()
    def weigh(self, step, loss):
        """Eq. 7: w `[b]`, without gradient; one half for a step that has no mean yet."""
        excess = loss.float() - self.means[step]
        return 1 - torch.sigmoid(self.k * torch.where(self.filled[step], excess, 0.0))

    @torch.no_grad()
    def update(self, step, loss):
        """Eq. 6, once for each step that occurs, with its mean loss over the batches of all ranks.

        A step's first loss becomes its mean.
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


def temporal_loss(x0, eps=1e-6, truncation=None):
    """L_temp = -log(mean_{c,h,w} Var_f(x0) + eps) of each sample, then the mean over the batch.

    The truncation is a gate: a sample at or below it moves enough and adds neither value nor
    gradient. A sample above it counts in full.
    """
    loss = -torch.log(kernels.temporal_variance(x0) + eps)
    if truncation is not None:
        loss = torch.where(loss <= truncation, 0.0, loss)  # in this order NaN is not hidden
    return loss.mean()


# ---------------------------------------------------------------------------------------------
# The critic: a model of the student's current distribution
# ---------------------------------------------------------------------------------------------


def critic_loss(critic, x0, text, config, generator=None):
    """Flow matching on the student's videos `x0`, with timesteps drawn as for L_KL: a scalar."""
    x0 = x0.detach()
    t = draw_timesteps(x0, config, generator)
    noise = draw(torch.randn, x0.shape, x0, generator)
    return F.mse_loss(critic(add_noise(x0, noise, t), t, text).float(), (noise - x0).float())


# ---------------------------------------------------------------------------------------------
# Backward simulation (DMD2, section 4.5): the student trains on videos from its own few steps
# ---------------------------------------------------------------------------------------------


def few_steps(model, noise, text, timesteps, strides, interpolator=None, generator=None):
    """Predict x0 at each of the `timesteps`, starting from pure noise; return the last prediction.

    Between steps, the prediction is renoised to the next timestep. A step with stride s sees every
    s-th frame. Where the next stride is smaller, the interpolator fills in the frames
    between; the result is at the full rate. Without an interpolator, every step is at the full
    rate. Gradients, if enabled, flow through the last step only.
    """
    strides = strides if interpolator is not None else (1,) * len(timesteps)
    if (noise.shape[2] - 1) % strides[0]:
        raise ValueError(f"{noise.shape[2]} latent frames do not fit stride {strides[0]}: the "
                         f"number of frames must be 1 modulo {strides[0]}")
    t_dtype = torch.promote_types(noise.dtype, torch.float32)
    times = [torch.full((len(noise),), t, dtype=t_dtype, device=noise.device) for t in timesteps]
    x_t, grad = noise[:, :, ::strides[0]], torch.is_grad_enabled()
    for i, t in enumerate(times):
        last = i + 1 == len(times)
        stride, next_stride = strides[i], 1 if last else strides[i + 1]
        with torch.set_grad_enabled(grad and last):
            x0 = predict_x0(model, x_t, t, text, stride)
            while stride > next_stride:  # each call doubles the frame rate
                x0, stride = interpolator(x0), stride // 2
        if not last:
            x_t = add_noise(x0, draw(torch.randn, x0.shape, noise, generator), times[i + 1])
    return x0


def backward_simulation(student, noise, text, step, config, interpolator=None, generator=None):
    """The student's video `b c f h w` as step number `step` predicts it, starting from pure noise.

    In training, the student thus sees what it will see in sampling. Only `step` has gradients; they
    flow through the interpolator as well if that step runs at a lower frame rate.
    """
    return few_steps(student, noise, text, config.timesteps[:step + 1],
                     config.train_strides[:step + 1], interpolator, generator)


# ---------------------------------------------------------------------------------------------
# One update of the student (eq. 9): L = L_KL + lambda_reg w L_reg + lambda_temp L_temp
# ---------------------------------------------------------------------------------------------


def student_losses(student, teacher, critic, cache, real, text, null_text, step, config,
                   interpolator=None, generator=None):
    """Yield the loss of one batch in two terms, each with a dict of its detached parts.

    Call backward on each term as it comes: then only one term's activations are in memory.
    real: real videos `[b, c, f, h, w]`; `text` holds the embeddings of their prompts.
    step: number of the step to train, the same for the whole batch and on every rank.
    cache: the LossMeanCache, which weighs here and is not changed. After the optimizer's step, call
        `cache.update(reg_step, reg)` with these parts of all the update's batches.
    """
    noise = draw(torch.randn, real.shape, real, generator)
    x0 = backward_simulation(student, noise, text, step, config, interpolator, generator)
    dmd = distribution_matching_loss(x0, teacher, critic, text, null_text, config, generator)
    temp = temporal_loss(x0, config.temporal_eps, config.temporal_truncation)
    yield dmd + config.lambda_temp * temp, {
        "dmd": dmd.detach(), "temp": temp.detach(), "x0": x0.detach(),
        "variance": kernels.temporal_variance(x0.detach()).mean()}

    if config.lambda_reg:
        strides = config.train_strides if interpolator is not None else (1,) * len(config.timesteps)
        steps = draw_regression_steps(real, step, strides, generator)
        reg = regression_loss(student, real, text, steps, config, strides[step], generator)
        weight = cache.weigh(steps, reg)
        yield config.lambda_reg * (weight * reg).mean(), {
            "reg": reg.detach(), "weight": weight, "reg_step": steps}


# ---------------------------------------------------------------------------------------------
# Frame interpolation (section 3.3): a small UNet predicts the frame between two neighbours
# ---------------------------------------------------------------------------------------------


class FrameInterpolator(nn.Module):
    """Doubles the frame rate of a clean latent: `b c f h w` -> `b c 2f-1 h w`, any h and w.

    The frame between two neighbours is blend * left + (1 - blend) * right + residual, where the
    UNet predicts blend and residual. Given frames are kept bit for bit. An untrained interpolator
    returns the mean of the neighbours.
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

    @classmethod
    def from_pretrained(cls, path):
        """Load a file that `save_pretrained` wrote. The sizes follow from the tensors' shapes."""
        tensors = load_file(path)
        width, inputs = tensors["enter.0.weight"].shape[:2]
        with torch.device("meta"):  # a damaged file must not allocate memory
            model = cls(inputs // 2, width)
        model.load_state_dict(tensors, assign=True)
        return model

    def save_pretrained(self, path, metadata=None):
        save_file(self.state_dict(), path, metadata)


def interpolation_loss(interpolator, x0):
    """Drop every second frame of real latents `x0` (f odd), predict it: the mean squared error."""
    return F.mse_loss(interpolator(x0[:, :, ::2])[:, :, 1::2], x0[:, :, 1::2])


# ---------------------------------------------------------------------------------------------
# The samplers: the student's few steps, and the teacher's many
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, noise, text, config, interpolator=None, generator=None):
    """The decoupled few-step sampler (section 3.3): noisy steps at a fraction of the frame rate.

    noise: `[b, c, f, h, w]` at the full rate. With an interpolator f must be 1 modulo the largest
        stride (else ValueError); without one, every step runs at the full rate.
    generator: draws one torch.randn for each renoising, of the next step's shape.
    """
    return few_steps(model, noise, text, config.timesteps, config.strides, interpolator, generator)


@torch.no_grad()
def sample_teacher(model, noise, text, null_text, steps=50, guidance_scale=5.0, shift=5.0,
                   solver="euler"):
    """Solve the flow's ODE with guidance, on a shifted grid of sigmas from 1 to 0.

    solver: "euler", or "unipc": diffusers' multistep scheduler, as in its WanPipeline.
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))  # many small steps add up

    def velocity(t):
        return guided_velocity(model, x.to(noise.dtype), x.new_full((len(x),), t), text, null_text,
                               guidance_scale).to(x.dtype)

    if solver == "euler":
        for sigma, next_sigma in pairwise(shifted(torch.linspace(1, 0, steps + 1), shift).tolist()):
            x = x + (next_sigma - sigma) * velocity(1000 * sigma)
    elif solver == "unipc":
        from diffusers import UniPCMultistepScheduler  # in the extra [wan]
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(velocity(t), t, x).prev_sample
    else:
        raise ValueError(f"solver {solver!r} is unknown; there are 'euler' and 'unipc'")
    return x.to(noise.dtype)
