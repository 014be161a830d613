"""Adaptive Video Distillation (AVD): a 50-step guided video diffusion model becomes a 4-step one.

The whole method, in the paper's order. A model is anything with

    velocity = model(x_t, t, text)

so a toy of 0.7M parameters, Wan2.1-14B, a sharded or LoRA-wrapped one, and a Gaussian whose scores
are known in closed form all pass through these lines. Three of them take part:

    student   G_omega   the few-step generator that we train, a copy of the teacher at first
    teacher   s_real    the frozen pretrained model
    critic    s_fake    learns, online, the scores of the student's own videos; a copy, too

Tensors are video latents `b c f h w`. `t` is `[b]` in [0, 1000] and sigma = t / 1000. `text` is
`[b, l, d]`, embeddings of the prompts. All randomness comes from the `generator` arguments: one
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
    """The method's numbers, with the paper's symbols. They stand nowhere else."""

    timesteps: tuple[float, ...] = (1000, 900, 757, 522)
    """the student's steps, from noise to video"""
    strides: tuple[int, ...] = (2, 2, 1, 1)
    """sampling: at stride s a step sees every s-th frame (section 3.3)"""
    train_strides: tuple[int, ...] = (1, 1, 1, 1)
    """the same in training; the paper trains at the full rate"""
    guidance_scale: float = 5.0
    """of the teacher: uncond + scale * (cond - uncond)"""
    shift: float = 5.0
    """moves the timesteps that DMD and the critic draw towards noise"""
    t_range: tuple[float, float] = (20, 980)
    """those timesteps are clamped to this range"""
    lambda_reg: float = 2.0
    """lambda_reg: weight of the adaptive regression (eq. 9)"""
    k: float = 3.0
    """k: how sharply a loss above its mean is mistrusted (eq. 7); its unit is 1 / loss"""
    ema_decay: float = 0.95
    """omega: decay of the Loss Mean Cache (eq. 6)"""
    lambda_temp: float = 0.05
    """lambda_temp: weight of the temporal regularisation (eq. 9)"""
    temporal_eps: float = 1e-6
    """theta: keeps the logarithm of a still video finite (eq. 8)"""
    temporal_truncation: float = 0.6
    """a sample whose L_temp is at or below this level moves enough and counts 0; else in full"""
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
    """largest norm of a gradient"""

    def __post_init__(self):
        if not self.timesteps or list(self.timesteps) != sorted(set(self.timesteps), reverse=True) \
                or not 0 < self.timesteps[-1] <= self.timesteps[0] <= 1000:
            raise ValueError(f"timesteps {self.timesteps} must fall, within (0, 1000]")
        for name in ("strides", "train_strides"):
            strides = getattr(self, name)
            if len(strides) != len(self.timesteps):
                raise ValueError(f"{name} {strides}: one stride is needed for each of the "
                                 f"{len(self.timesteps)} timesteps {self.timesteps}")
            if any(s < 1 or s & (s - 1) for s in strides) or sorted(strides)[::-1] != list(strides):
                raise ValueError(f"{name} {strides}: powers of two are needed that never rise")
        low, high = self.t_range
        for name, ok in {"t_range": 0 < low <= high <= 1000, "ema_decay": 0 <= self.ema_decay <= 1,
                         "k": self.k >= 0, "critic_updates": self.critic_updates >= 0}.items():
            if not ok:
                raise ValueError(f"{name} {getattr(self, name)} is out of range")

    def to_json(self):
        """All numbers, to be stored with weights."""
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
    """The clean video that a velocity points to, in the dtype of `x_t`."""
    return (x_t - sigma_of(t) * v).to(x_t.dtype)


def predict_velocity(model, x_t, t, text, stride=1):
    """The model's velocity. At stride s, `x_t` holds every s-th frame, and the model is told so."""
    return model(x_t, t, text) if stride == 1 else model(x_t, t, text, frame_stride=stride)


def predict_x0(model, x_t, t, text, stride=1):
    """The model's idea of the clean video."""
    return velocity_to_x0(predict_velocity(model, x_t, t, text, stride), x_t, t)


def shifted(u, shift):
    """Move u in [0, 1] towards one, where large latents need their steps: s u / (1 + (s-1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def draw(random, shape, like, generator=None):
    """`random(shape)` (torch.rand or torch.randn) on the device of `like`, float32 at least.

    A list of generators, one for each sample, makes every sample's numbers its own, whatever the
    batch or the rank it is in. Numbers are drawn on the generator's device, then moved.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        return torch.cat([draw(random, (1, *shape[1:]), like, g) for g in generator])
    device = like.device if generator is None else generator.device
    dtype = torch.promote_types(like.dtype, torch.float32)  # bfloat16 has no 757: it rounds to 756
    return random(shape, generator=generator, device=device, dtype=dtype).to(like.device)


def draw_timesteps(x0, config, generator=None):
    """Times `[b]` at which the distributions are compared: uniform, shifted, clamped."""
    u = draw(torch.rand, x0.shape[:1], x0, generator)
    return (1000 * shifted(u, config.shift)).clamp(*config.t_range)


# ---------------------------------------------------------------------------------------------
# Distribution matching, L_KL (eq. 4): details from the teacher, and with them its excesses
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
    teacher would have drawn. In float32, one normaliser for each sample. 0 / 0 is 0; a value that
    is not finite stays so.
    """
    difference = x0_fake.float() - x0_real.float()
    normaliser = (x0.float() - x0_real.float()).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.where((difference == 0) & (normaliser == 0), 0.0, difference / normaliser)


def dmd_loss(x0, gradient):
    """A loss whose gradient in `x0` is `gradient / x0.numel()`. In float32, or it rounds away.

    Its value is half the mean square of the gradient: it tells how far critic and teacher differ;
    it is not the KL divergence that descent along the gradient lowers.
    """
    x0 = x0.float()
    return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())


def distribution_matching_loss(x0, teacher, critic, text, null_text, config, generator=None):
    """L_KL of the student's videos `x0`: a scalar, of which only the gradient means something."""
    with torch.no_grad():
        t = draw_timesteps(x0, config, generator)
        x_t = add_noise(x0, draw(torch.randn, x0.shape, x0, generator), t)
        x0_fake = predict_x0(critic, x_t, t, text)
        v_real = guided_velocity(teacher, x_t, t, text, null_text, config.guidance_scale)
        gradient = dmd_gradient(x0, x0_fake, velocity_to_x0(v_real, x_t, t))
    return dmd_loss(x0, gradient)


# ---------------------------------------------------------------------------------------------
# Adaptive regression, w L_reg (eqs. 5-7): real videos bring the colours back
# ---------------------------------------------------------------------------------------------


def regression_loss(student, x0, text, step, config, stride=1, generator=None):
    """L_reg (eq. 5), `[b]`: the velocity error on real videos `x0`, noised to the student's steps.

    `step` `[b]` numbers the timesteps. The paper writes epsilon; but at sigma = 1 an epsilon error
    says nothing about x0, and the velocity's does. At stride s only every s-th frame takes part.
    """
    x0 = x0[:, :, ::stride]
    noise = draw(torch.randn, x0.shape, x0, generator)
    t = torch.tensor(config.timesteps, dtype=noise.dtype, device=x0.device)[step]
    v = predict_velocity(student, add_noise(x0, noise, t), t, text, stride)
    return (v - (noise - x0)).float().square().mean(dim=(1, 2, 3, 4))


def draw_regression_steps(x0, step, strides, generator=None):
    """A step `[b]` for each real video, among those that run at the rate of the shared `step`.

    A batch then has one length, and as `step` is uniform over all steps, so is each of these.
    """
    candidates = torch.tensor([i for i, s in enumerate(strides) if s == strides[step]],
                              device=x0.device)
    u = draw(torch.rand, x0.shape[:1], x0, generator)
    return candidates[(u * len(candidates)).long()]


class LossMeanCache(nn.Module):
    """A running mean of the regression loss at each of the student's steps, and the weights.

    Eq. 6: Lbar <- omega Lbar + (1 - omega) L      Eq. 7: w = 1 - sigmoid(k (L - Lbar))

    A video that is harder than its step's mean lies far from what the student can draw: fitting it
    would pull towards a middle between two distributions, so it counts for less.
    """

    def __init__(self, num_steps, decay=0.95, k=3.0):
        super().__init__()
        self.decay, self.k = decay, k
        self.register_buffer("means", torch.zeros(num_steps))
        self.register_buffer("filled", torch.zeros(num_steps, dtype=torch.bool))

    def forward(self, step, loss):
        """Weigh by the means as they are, then update them: `step` long, `loss` -> w, all `[b]`."""
        weight = self.weigh(step, loss)
        self.update(step, loss)
        return weight

    @torch.no_grad()
    def weigh(self, step, loss):
        """Eq. 7 -> w `[b]`, without gradient: one half where the step has no mean yet."""
        excess = loss.float() - self.means[step]
        return 1 - torch.sigmoid(self.k * torch.where(self.filled[step], excess, 0.0))

    @torch.no_grad()
    def update(self, step, loss):
        """Eq. 6: one EMA step for each timestep that occurs, with its mean loss over all ranks.

        A step's first mean is its first loss.
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
# Temporal regularisation, L_temp (eq. 8): a penalty on still videos
# ---------------------------------------------------------------------------------------------


def temporal_loss(x0, eps=1e-6, truncation=None):
    """L_temp = -log(mean_{c,h,w} Var_f(x0) + eps) of each sample, then the mean over the batch.

    The truncation is a gate: a sample at or below it moves enough, and adds neither value nor
    gradient; a sample above it counts in full.
    """
    loss = -torch.log(kernels.temporal_variance(x0) + eps)
    if truncation is not None:
        loss = torch.where(loss <= truncation, 0.0, loss)  # in this order NaN is not hidden
    return loss.mean()


# ---------------------------------------------------------------------------------------------
# The critic: an online score model of the student's distribution
# ---------------------------------------------------------------------------------------------


def critic_loss(critic, x0, text, config, generator=None):
    """Flow matching on the student's videos `x0`, with timesteps drawn as for L_KL: a scalar."""
    x0 = x0.detach()
    t = draw_timesteps(x0, config, generator)
    noise = draw(torch.randn, x0.shape, x0, generator)
    return F.mse_loss(critic(add_noise(x0, noise, t), t, text).float(), (noise - x0).float())


# ---------------------------------------------------------------------------------------------
# Backward simulation (DMD2, section 4.5): the student learns on videos from its own few steps
# ---------------------------------------------------------------------------------------------


def few_steps(model, noise, text, timesteps, strides, interpolator=None, generator=None):
    """Walk down `timesteps` from pure noise; gradients, if enabled, flow through the last one only.

    At each: renoise the last prediction to it, predict x0, bring that to the next one's frame rate.
    Returns the last x0, at the full rate. `strides` thin the frames of the full-rate `noise`; where
    they fall, the interpolator fills in. Without an interpolator, every step is full rate.
    """
    strides = strides if interpolator is not None else (1,) * len(timesteps)
    if (noise.shape[2] - 1) % strides[0]:
        raise ValueError(f"{noise.shape[2]} latent frames do not fit stride {strides[0]}: their "
                         f"number must be 1 modulo {strides[0]}")
    t_dtype = torch.promote_types(noise.dtype, torch.float32)
    x_t, grad = noise[:, :, ::strides[0]], torch.is_grad_enabled()
    for i, (timestep, stride, next_stride) in enumerate(zip(timesteps, strides, (*strides[1:], 1))):
        t = torch.full((len(noise),), timestep, dtype=t_dtype, device=noise.device)
        if i > 0:
            x_t = add_noise(x0, draw(torch.randn, x0.shape, noise, generator), t)
        with torch.set_grad_enabled(grad and i + 1 == len(timesteps)):
            x0 = predict_x0(model, x_t, t, text, stride)
            while stride > next_stride:  # each pass doubles the frame rate
                x0, stride = interpolator(x0), stride // 2
    return x0


def backward_simulation(student, noise, text, step, config, interpolator=None, generator=None):
    """The student's video as step number `step` predicts it, from pure noise: `b c f h w`.

    What training shows the student is what sampling will show it. It stops at `step`, the only one
    with gradients, which flow through the interpolator too where that step runs at a lower rate.
    """
    return few_steps(student, noise, text, config.timesteps[:step + 1],
                     config.train_strides[:step + 1], interpolator, generator)


# ---------------------------------------------------------------------------------------------
# One update of the student (eq. 9): L = L_KL + lambda_reg w L_reg + lambda_temp L_temp
# ---------------------------------------------------------------------------------------------


def student_losses(student, teacher, critic, cache, real, text, null_text, step, config,
                   interpolator=None, generator=None):
    """The two terms of the loss on one batch, in turn, each with a dict of its detached parts.

    A backward on each as it comes leaves the activations of only one at a time in memory.
    real: real videos `[b, c, f, h, w]` with the embeddings `text` of their prompts.
    step: number of the step to train, the same for the whole batch and on every rank.
    cache: a LossMeanCache, which weighs here. Call `cache.update(reg_step, reg)` with these parts
        after the optimizer's step: once for all batches of an update, and not if it was skipped.
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
# Frame interpolation (section 3.3): a small UNet between each two neighbouring frames
# ---------------------------------------------------------------------------------------------


class FrameInterpolator(nn.Module):
    """Doubles the frame rate of a clean latent: `b c f h w` -> `b c 2f-1 h w`, any h and w.

    The frame between two neighbours is blend * left + (1 - blend) * right + residual. Given frames
    come through bit for bit. Untrained, it returns the mean of the neighbours.
    """

    def __init__(self, channels, width=64):
        super().__init__()
        if width % 8:
            raise ValueError(f"width {width} must be a multiple of 8, for the group norms")

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
        """From a safetensors file of `save_pretrained`; the tensors' shapes tell the size."""
        tensors = load_file(path)
        width, inputs = tensors["enter.0.weight"].shape[:2]
        with torch.device("meta"):  # a damaged file's width takes no memory
            model = cls(inputs // 2, width)
        model.load_state_dict(tensors, assign=True)
        return model

    def save_pretrained(self, path, metadata=None):
        save_file(self.state_dict(), path, metadata)


def interpolation_loss(interpolator, x0):
    """Squared error of the frames that were dropped from real latents `x0` (f odd): a scalar."""
    return F.mse_loss(interpolator(x0[:, :, ::2])[:, :, 1::2], x0[:, :, 1::2])


# ---------------------------------------------------------------------------------------------
# The samplers: the student's few steps, and the teacher's many
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, noise, text, config, interpolator=None, generator=None):
    """The decoupled few-step sampler (section 3.3): noisy steps at a fraction of the frame rate.

    noise: `[b, c, f, h, w]` at the full rate. With an interpolator f must be 1 modulo the largest
        stride (else ValueError); without one, every step runs at the full rate.
    generator: one torch.randn for each renoising, of the next step's shape.
    """
    return few_steps(model, noise, text, config.timesteps, config.strides, interpolator, generator)


@torch.no_grad()
def sample_teacher(model, noise, text, null_text, steps=50, guidance_scale=5.0, shift=5.0,
                   solver="euler"):
    """Guided steps down the flow's ODE, on a shifted grid of sigmas from 1 to 0.

    solver: "euler", or "unipc", diffusers' multistep scheduler, stepping as its WanPipeline does.
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
