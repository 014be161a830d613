"""Adaptive Video Distillation in one loop: 50 guided steps of a toy teacher become 4 steps.

    python docs/minimal.py

It takes about two minutes on a laptop and writes minimal.gif: the teacher's videos above the
student's. `python train.py distill --steps 30` trains the same student, bit for bit. That program
adds what is around this loop: flags, checkpoints, logs, several GPUs, LoRA, and Wan2.1. Training is
at the full frame rate, so only the videos at the end need the interpolator.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's folder

import imageio.v3 as iio
import torch
from einops import rearrange
from tqdm import tqdm

import adavid
from runtime.models import load_config, load_interpolator
from runtime.run import make_generator, make_generators
from tiny_wan import WEIGHTS, ToyCodec, WanModel, world

SEED = 0
codec = ToyCodec()  # videos to latents and back, prompts to embeddings
null_text = codec.encode_text([""])  # of the teacher's guidance


def load_batch(config, number, batch_size):
    """Real videos, their text, the step at which the student's rollout ends, random generators."""
    samples = range(number * batch_size, (number + 1) * batch_size)
    video, prompts = world.make(SEED, samples)
    step = torch.randint(len(config.timesteps), (), generator=make_generator(SEED, "step", number))
    return (codec.encode(video), codec.encode_text(prompts), step.item(),
            make_generators(SEED, "distill", samples))


def descend(model, optimizer, config):
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()


def distil(model=WEIGHTS, cycles=30, batch_size=16):
    """Train a student. Each cycle has one update of the student, then several of the critic."""
    config = load_config(model)  # the toy's numbers: section 10 of method.md lists them
    teacher, student, critic = (WanModel.from_pretrained(model, torch.float32) for _ in range(3))
    teacher.requires_grad_(False)
    student_optimizer, critic_optimizer = (
        torch.optim.AdamW(network.parameters(), lr, betas=config.betas,
                          weight_decay=config.weight_decay)
        for network, lr in ((student, config.lr), (critic, config.critic_lr)))
    cache = adavid.LossMeanCache(len(config.timesteps), config.ema_decay, config.k)

    for cycle in tqdm(range(cycles)):
        # Batches are numbered through: with five critic updates, cycle c has 5c to 5c + 4. The
        # student's update uses the first of them.
        first = cycle * config.critic_updates
        real, text, step, generators = load_batch(config, first, batch_size)
        noise = adavid.draw(torch.randn, real.shape, real, generators)
        x0 = adavid.backward_simulation(student, noise, text, step, config, generator=generators)
        loss, _ = adavid.matching_loss(x0, teacher, critic, text, null_text, config, generators)
        loss.backward()
        loss, reg_step, reg, _ = adavid.weighted_regression(student, cache, real, text, step,
                                                            config, generator=generators)
        loss.backward()
        descend(student, student_optimizer, config)
        cache.update(reg_step, reg)

        # The critic learns from these videos first, then from new ones.
        for number in range(first, first + config.critic_updates):
            if number > first:  # of these real videos, only the shape and the prompts are used
                real, text, step, generators = load_batch(config, number, batch_size)
                noise = adavid.draw(torch.randn, real.shape, real, generators)
                with torch.no_grad():
                    x0 = adavid.backward_simulation(student, noise, text, step, config,
                                                    generator=generators)
            adavid.critic_loss(critic, x0, text, config, generators).backward()
            descend(critic, critic_optimizer, config)
    return student


def main():
    student, config = distil(), load_config(WEIGHTS)
    _, prompts = world.make(1000, range(8))
    text, random = codec.encode_text(prompts), torch.Generator().manual_seed(0)
    noise = torch.randn(len(prompts), *codec.latent_shape(), generator=random)
    teacher = WanModel.from_pretrained(WEIGHTS, torch.float32)
    slow = adavid.sample_teacher(teacher, noise, text, null_text, 50, config.guidance_scale)
    fast = adavid.sample(student, noise, text, config, load_interpolator(WEIGHTS, "cpu"), random)
    rows = codec.decode(torch.cat([slow, fast])).repeat_interleave(8, 3).repeat_interleave(8, 4)
    picture = rearrange(rows, "(row column) c f h w -> f (row h) (column w) c", row=2)
    iio.imwrite("minimal.gif", (255 * picture).round().byte().numpy(), duration=125, loop=0)
    print("minimal.gif: 50 guided steps of the teacher, and below 4 steps of the student")


if __name__ == "__main__":
    main()
