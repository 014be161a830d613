"""Train the toy's teacher: flow matching on the toy world.

    python -m experiments.teacher --out runs/teacher --compile      about an hour on two cores

Checkpoints, logs and pictures are those of train.py.
"""

import copy
import json
import math
import sys
from dataclasses import dataclass, replace
from typing import Annotated

import torch

import adavid
import kernels
from adavid import AVDConfig, Limits, NotNegative
from runtime import cli
from runtime.data import Toy, sample_indices
from runtime.distributed import init_distributed, rank
from runtime.pictures import Pictures
from runtime.run import Flags, Run, clip_and_step, make_generators
from tiny_wan import PRESETS, ToyCodec, WanModel, world
from train import learning_rate

DROP_PROMPT, DROP_MOTION = 0.1, 0.4  # shares of prompts left empty, and cut to their colour
TEACHER_SHIFT = 8.0  # most timesteps fall at high noise, where a video's motion is decided
SIGMA_FLOOR = 0.3  # below this sigma errors weigh less: faint noise is too hard for a tiny net
TEACHER_EMA = 0.999  # decay of the averaged weights, which are the ones that are kept
# What students of the toy use instead of the paper's numbers; stored with the teacher's weights.
TOY_NUMBERS = AVDConfig(guidance_scale=3.0, lr=2e-4, critic_lr=4e-4, betas=(0.0, 0.99))


@dataclass
class Teacher(Flags):
    """Train the toy's teacher: flow matching on real videos, with some prompts left empty."""

    steps: cli.Count = 16_000
    batch_size: cli.Size = 32
    save_every: cli.Count = 500
    sample_every: cli.Count = 1000
    lr: NotNegative = 3e-3
    """peak learning rate: warmed up over 100 steps, then decayed to zero"""
    compile: bool = False
    """torch.compile the model: about a minute to compile, then faster steps"""
    score_prompts: Annotated[int, Limits(1, 2**20)] = 256
    """how many fixed prompts the finished teacher is scored on"""
    may_change = Flags.may_change | {"score_prompts"}


def main(argv=None):
    return cli.run(train_teacher, Teacher, argv)


def train_teacher(args):
    device, codec = init_distributed(args.device), ToyCodec()
    cli.announce(device, None, args.device)
    data, pictures = Toy(codec, args.seed), Pictures.of_toy(device)
    model = WanModel(PRESETS["tiny"]).init_weights(args.seed).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    # Muon learns the blocks' matrices in half the steps that AdamW takes; it is for matrices alone.
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    muon = Muon(matrices, {"lr": args.lr, "momentum": 0.95, "weight_decay": 0.01})
    others = set(model.parameters()) - set(matrices)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p in others], betas=(0.9, 0.99))
    forward = torch.compile(model) if args.compile else model

    def sample(noise, text):
        return adavid.sample_teacher(ema, noise, text, data.null_text.to(device),
                                     guidance_scale=TOY_NUMBERS.guidance_scale)

    state = {"model": model, "ema": ema, "muon": muon, "adamw": adamw}
    with Run(args, state) as run:
        for step in run.steps():
            indices = sample_indices(step, args.batch_size)
            x0, _, prompts = data.batch(indices)
            x0, generator = x0.to(device), make_generators(args.seed, "teacher", indices)
            drop = adavid.draw(torch.rand, x0.shape[:1], x0, generator).tolist()
            text = codec.encode_text(list(map(drop_words, prompts, drop))).to(device)

            u = adavid.draw(torch.rand, x0.shape[:1], x0, generator)
            noise = adavid.draw(torch.randn, x0.shape, x0, generator)
            sigma = adavid.shifted(u, TEACHER_SHIFT)
            v = forward(adavid.add_noise(x0, noise, 1000 * sigma), 1000 * sigma, text)
            error = (v - (noise - x0)).square().mean(dim=(1, 2, 3, 4))
            loss = (error * (sigma / SIGMA_FLOOR).clamp(max=1) ** 2).mean()
            loss.backward()
            lr = learning_rate(args, step)
            muon.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = lr
            norm = clip_and_step(model, (muon, adamw), max_norm=1.0, loss=loss.item())
            if math.isfinite(norm):
                decay = min(TEACHER_EMA, (step + 1) / (step + 30))  # smaller at first
                with torch.no_grad():
                    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                                         1 - decay)

            metrics = {"loss": loss.item(), "grad_norm": norm, "lr": lr}
            if run.picture_due(step):
                metrics |= pictures.write(run.picture(step), sample)
            run.log(step, metrics)
            run.save(step)

    if rank() == 0:
        real = codec.encode(world.make(args.seed, range(4096))[0])
        level = -kernels.temporal_variance(real).mean().log().item()
        numbers = replace(TOY_NUMBERS, temporal_truncation=round(level, 2))
        ema.half().float()  # what is scored is what is stored
        scores = Pictures.of_toy(device, args.score_prompts).score(sample)
        ema.half().save_pretrained(args.out, metadata={
            "avd": numbers.to_json(), "seed": str(args.seed), "minutes": f"{run.minutes():.0f}",
            "scores": json.dumps(scores)})


class Muon(torch.optim.Optimizer):
    """Muon for matrices (arXiv 2502.16982), with updates as large as AdamW's.

    Like torch.optim.Muon with "match_rms_adamw", but in float32. That one orthogonalises in
    bfloat16, which made half of a step's time on CPUs without bfloat16 units.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalised(p.grad.lerp(average, momentum))  # Nesterov's
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-0.2 * lr * max(p.shape) ** 0.5)


def orthogonalised(matrix, iterations=5):
    """A matrix with the same singular vectors, and singular values near one (Newton-Schulz)."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def drop_words(prompt, u):
    """The prompt or, depending on the random `u` in [0, 1], an empty one or one without motion.

    Guidance contrasts with the empty prompt. Where the prompt leaves the motion open, the network
    must learn to read it from the other frames.
    """
    if u < DROP_PROMPT:
        return ""
    return world.without_motion(prompt) if u < DROP_PROMPT + DROP_MOTION else prompt


if __name__ == "__main__":
    sys.exit(main())
