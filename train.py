"""Train, in three stages: a teacher, a frame interpolator, and the 4-step student.

    python train.py teacher      --out runs/teacher         flow matching on the toy world
    python train.py interpolator --out runs/interpolator    the frames between real frames
    python train.py distill      --out runs/student         adaptive video distillation
    torchrun --nproc_per_node 8 train.py distill --model Wan2.1-T2V-1.3B --data SHARDS ...

A run's folder holds its checkpoints, `metrics.jsonl` with a line for each step, `times.jsonl` with
the seconds that it took, pictures of fixed prompts in `samples/`, and at the end the model. Ctrl-C
saves a checkpoint. The same command resumes, and ends with the weights of an unbroken run.
"""

import copy
import json
import math
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

import adavid
import kernels
from adavid import AVDConfig, FrameInterpolator
from runtime import cli
from runtime.data import Prefetch, Toy, open_data, sample_indices
from runtime.distributed import init_distributed, mean_metrics, rank
from runtime.media import thumbnails, write_contact_sheet
from runtime.models import load_config, load_interpolator, load_models, load_sharded, save_student
from runtime.pictures import GRID_SEED, Pictures, open_pictures
from runtime.run import Run, clip_and_step, make_generator, make_generators
from tiny_wan import PRESETS, WEIGHTS, ToyCodec, WanConfig, WanModel, checkpoint, world

# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------


@dataclass
class Flags:
    out: Path
    """folder of the run; the same command again resumes it"""
    steps: int
    """updates in all; for distill, cycles"""
    batch_size: int
    """videos at a time, on each GPU"""
    seed: int = 0
    """of the data, the noise and the first weights"""
    save_every: int = 100
    """steps between checkpoints"""
    keep: int = 2
    """checkpoints to keep; if the newest is damaged, the one before it is used"""
    keep_every: int | None = None
    """also keep the checkpoints of every such number of steps"""
    sample_every: int = 100
    """steps between pictures of the fixed prompts"""
    tensorboard: bool = False
    """also log for TensorBoard, if it is installed"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""
    # These may change when a run is resumed.
    free = {"out", "device", "save_every", "keep", "keep_every", "sample_every", "tensorboard"}


@dataclass
class Teacher(Flags):
    """Flow matching on the toy world's real videos, with some prompts dropped for guidance."""

    steps: int = 10_000
    batch_size: int = 32
    save_every: int = 500
    sample_every: int = 1000
    lr: float = 3e-3
    """peak learning rate: warmed up over 100 steps, then brought down to zero"""
    compile: bool = False
    """torch.compile the model: a minute to start, then a quarter less time"""
    score_prompts: int = 256
    """fixed prompts that the finished teacher is scored on"""
    free = Flags.free | {"score_prompts"}


@dataclass
class Interpolator(Flags):
    """A UNet that predicts every second frame of real latents from its neighbours."""

    steps: int = 2000
    batch_size: int = 32
    save_every: int = 500
    sample_every: int = 1000
    data: Path | None = None
    """folder of shards from tools.encode; by default the toy world"""
    lr: float = 1e-3
    """peak learning rate: warmed up over 100 steps, then brought down to zero"""
    width: int = 32
    """channels of the UNet at full size; it has twice as many at half size"""


@dataclass
class Distill(Flags):
    """Distil a teacher into a few-step student. Defaults of the method are the teacher's own."""

    steps: int = 60
    batch_size: int = 16
    save_every: int = 10
    sample_every: int = 20
    model: Path = WEIGHTS
    """the teacher, with its interpolator beside it"""
    data: Path | None = None
    """folder of shards from tools.encode; by default the toy world"""
    codec: Path | None = None
    """folder with Wan's VAE, for the pictures; by default the teacher's own"""
    init_student: Path | None = None
    """a model for the student to start from; by default the teacher"""
    accumulate: int = 1
    """batches whose gradients make one update"""
    one_rollout: bool = False
    """all critic updates of a cycle learn from the student update's videos, which saves time"""
    lora: int = 0
    """rank of adapters to train on one shared, frozen base, instead of whole models"""
    ema: float = 0.0
    """decay of averaged student weights, which are then the ones that are kept; 0 for none"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """to compute in; auto is bfloat16 on an NVIDIA or AMD GPU. Trained weights are float32"""
    gradient_checkpointing: bool | None = None
    """recompute each block in backward: far less memory, more time; by default for shards"""
    avd: Annotated[AVDConfig, tyro.conf.arg(name="")] = AVDConfig()
    # With a constant learning rate, more steps change no earlier one.
    free = Flags.free | {"steps", "codec", "gradient_checkpointing"}


@dataclass
class OfTeacher:
    """The one flag of `distill` that decides what the others default to."""

    model: Path = WEIGHTS


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        of, _ = tyro.cli(OfTeacher, args=argv, return_unknown_args=True, add_help=False,
                         console_outputs=False)
        defaults = Distill(tyro.MISSING, avd=load_config(of.model))
    except (ValueError, OSError, SystemExit):  # `distill` reports it; --help needs no model
        defaults = Distill(tyro.MISSING)
    options = Annotated[Teacher, tyro.conf.subcommand("teacher")] | Annotated[
        Interpolator, tyro.conf.subcommand("interpolator")] | Annotated[
        Distill, tyro.conf.subcommand("distill", default=defaults)]
    stages = {Teacher: train_teacher, Interpolator: train_interpolator, Distill: distill}
    return cli.run(lambda args: stages[type(args)](args), options, argv)


# ---------------------------------------------------------------------------------------------
# The teacher: flow matching on real videos
# ---------------------------------------------------------------------------------------------

DROP_PROMPT, DROP_MOTION = 0.1, 0.4  # shares of prompts left empty, and cut to what moves
TEACHER_SHIFT = 8.0  # most timesteps fall at high noise, where a video's motion is decided
SIGMA_FLOOR = 0.3  # below it the loss is that of x0: a tiny network would drown in faint noise
TEACHER_EMA = 0.999  # decay of the averaged weights, which are the ones that are kept
# What students of the toy use instead of the paper's numbers; stored with the teacher's weights.
TOY_NUMBERS = AVDConfig(guidance_scale=3.0, lr=2e-4, critic_lr=4e-4, betas=(0.0, 0.99))


def train_teacher(args):
    device, codec = init_distributed(args.device), ToyCodec()
    data, pictures = Toy(codec, args.seed), Pictures.of_toy(device)
    model = WanModel(PRESETS["tiny"]).init_weights(args.seed).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    # Muon learns the blocks' matrices in half the steps that AdamW takes; it is for matrices alone.
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    others = set(model.parameters()) - set(matrices)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p in others], betas=(0.9, 0.99))
    forward = torch.compile(model) if args.compile else model

    def sample(noise, text):
        return adavid.sample_teacher(ema, noise, text, data.null_text.to(device),
                                     guidance_scale=TOY_NUMBERS.guidance_scale)

    state = {"model": model, "ema": ema, "muon": muon, "adamw": adamw}
    with Run(args, state) as run:
        for step in run.steps():
            indices = sample_indices(args, step)
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
            norm = clip_and_step(model, (muon, adamw), lr, max_norm=1.0, loss=loss.item())
            if math.isfinite(norm):
                decay = min(TEACHER_EMA, (step + 1) / (step + 30))  # soon forgets the first weights
                with torch.no_grad():
                    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                                         1 - decay)

            metrics = {"loss": loss.item(), "grad_norm": norm, "lr": lr}
            if run.draws(step):
                metrics |= pictures.draw(run.picture(step), sample)
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


def drop_words(prompt, u):
    """The prompt, or by the random number `u` in [0, 1] nothing of it, or its motion left open.

    The empty prompt is what guidance contrasts with. Where words say nothing of the motion, the
    network must read it off the other frames.
    """
    if u < DROP_PROMPT:
        return ""
    return world.without_motion(prompt) if u < DROP_PROMPT + DROP_MOTION else prompt


def learning_rate(args, step):
    """Up over 100 steps, and down to zero over the last three quarters."""
    return args.lr * min(1, (step + 1) / 100, (1 - step / args.steps) / 0.75)


# ---------------------------------------------------------------------------------------------
# The frame interpolator
# ---------------------------------------------------------------------------------------------


def train_interpolator(args):
    device, data = init_distributed(args.device), open_data(args)
    if not data.has_videos:
        raise ValueError(f"{args.data}: holds no videos, and an interpolator needs them")
    torch.manual_seed(args.seed)
    model = FrameInterpolator(data.latent_shape[0], args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    fetch = Prefetch(lambda step: data.batch(sample_indices(args, step)))

    with Run(args, {"model": model, "optimizer": optimizer}) as run:
        for step in run.steps():
            x0 = fetch(step)[0].to(device)
            loss = adavid.interpolation_loss(model, x0)
            loss.backward()
            lr = learning_rate(args, step)
            norm = clip_and_step(model, [optimizer], lr, max_norm=1.0, loss=loss.item())

            mean = (x0[:, :, :-2:2] + x0[:, :, 2::2]) / 2  # what the untrained UNet returns
            run.log(step, {"loss": loss.item(), "grad_norm": norm, "lr": lr,
                           "plain_mean": F.mse_loss(mean, x0[:, :, 1::2]).item()}, fetch.waited)
            if run.draws(step) and not args.data:
                draw_interpolated(run.picture(step), model, device)
            run.save(step)

    if rank() == 0:
        model.half().save_pretrained(args.out / "interpolator.safetensors",
                                     {"seed": str(args.seed), "minutes": f"{run.minutes():.0f}"})


@torch.no_grad()
def draw_interpolated(path, model, device):
    """A contact sheet of real videos, each above its half-rate version with frames filled in."""
    codec = ToyCodec()
    real = Toy(codec, GRID_SEED).batch(range(8))[0]
    filled = model(real[:, :, ::2].to(device)).cpu()
    pairs = codec.decode(torch.stack([real, filled], dim=1).flatten(0, 1))
    write_contact_sheet(path, map(thumbnails, pairs))


# ---------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------


def distill(args):
    """Each cycle: one update of the student, then `critic_updates` updates of the critic.

    The critic learns first from the videos of the student's own update, then from new ones.
    """
    config, device, data = args.avd, init_distributed(args.device), open_data(args)
    check(args, data)
    teacher, student, critic = load_models(args, device)
    averaged = load_sharded(args, args.init_student or args.model, device) if args.ema else student
    interpolator = load_interpolator(args.model, device)
    if interpolator is None and rank() == 0:
        print("note: no interpolator.safetensors beside the model, so all steps are full rate")
    cache = adavid.LossMeanCache(len(config.timesteps), config.ema_decay, config.k).to(device)
    student_optimizer, critic_optimizer = adamw(student, config), adamw(critic, config)
    null_text = data.null_text.to(device)
    fetch = Prefetch(lambda batch: data.batch(sample_indices(args, batch)))
    pictures = open_pictures(args, data, device)

    def sample(noise, text):
        return adavid.sample(averaged, noise, text, config, interpolator,
                             torch.Generator().manual_seed(args.seed))

    state = {"student": student, "critic": critic, "cache": cache,
             "student_optimizer": student_optimizer, "critic_optimizer": critic_optimizer}
    state |= {"ema": averaged} if args.ema else {}
    with Run(args, state) as run:
        for cycle in run.steps():
            first = cycle * max(1, config.critic_updates)  # an update's number decides its data
            metrics, videos = update_student(
                args, student, student_optimizer, teacher, critic, cache, interpolator, null_text,
                draw_step(args, first), batches(args, fetch, first, device))
            if args.ema and math.isfinite(metrics["student_grad_norm"]):
                for p, q in zip(averaged.parameters(), student.parameters()):
                    p.detach().lerp_(q.detach(), 1 - args.ema)

            critic_metrics = []
            for update in range(first, first + config.critic_updates):
                if update > first and not args.one_rollout:
                    videos = rollouts(args, student, interpolator, draw_step(args, update),
                                      batches(args, fetch, update, device))
                critic_metrics.append(update_critic(args, critic, critic_optimizer, videos))
            metrics |= mean_metrics(critic_metrics)

            if pictures and run.draws(cycle):
                metrics |= pictures.draw(run.picture(cycle), sample)
            run.log(cycle, metrics, fetch.waited)
            run.save(cycle)

    save_student(averaged, args.out, {
        "method": "AVD", "avd": config.to_json(), "seed": str(args.seed)})
    if interpolator is not None and rank() == 0:
        shutil.copy(checkpoint.home(args.model) / "interpolator.safetensors", args.out)


def batches(args, fetch, update, device):
    """The `accumulate` batches of an update: real videos, text, and a generator for each sample."""
    for batch in range(update * args.accumulate, (update + 1) * args.accumulate):
        real, text, _ = fetch(batch)
        yield (real.to(device), text.to(device),
               make_generators(args.seed, "distill", sample_indices(args, batch)))


def draw_step(args, update):
    """The student's step that an update trains. All ranks must agree on it, or they deadlock."""
    generator = make_generator(args.seed, "step", update)
    return torch.randint(len(args.avd.timesteps), (), generator=generator).item()


def update_student(args, student, optimizer, teacher, critic, cache, interpolator, null_text, step,
                   batches):
    """One update of the student (eq. 9): its metrics, and its videos, for the critic to learn from.

    The videos are a list of (x0, text, generators), one for each of the `batches`.
    """
    config, terms, videos = args.avd, defaultdict(list), []
    for real, text, generators in batches:
        loss = 0
        for part, new_terms in adavid.student_losses(
                student, teacher, critic, cache, real, text, null_text, step, config,
                interpolator, generators):
            (part / args.accumulate).backward()
            loss = loss + part.detach()
            for name, value in new_terms.items():
                terms[name].append(value)
        videos.append((terms["x0"].pop(), text, generators))
        terms["loss"].append(loss)
        terms["data_variance"].append(kernels.temporal_variance(real).mean())
    del terms["x0"]
    terms = {name: torch.cat([value.view(-1) for value in values])
             for name, values in terms.items()}
    norm = clip_and_step(student, [optimizer], config.lr, config.grad_clip,
                         terms["loss"].sum().item())
    if "reg" in terms and math.isfinite(norm):
        cache.update(terms["reg_step"], terms["reg"])
    metrics = {name: values.mean().item() for name, values in terms.items() if name != "reg_step"}
    metrics |= {"student_grad_norm": norm, "rollout_step": step}
    return metrics | by_timestep(terms, cache, config), videos


def by_timestep(terms, cache, config):
    """The metrics of the regression at each of the student's timesteps."""
    metrics = {}
    for i, t in enumerate(config.timesteps if "reg" in terms else ()):
        here = terms["reg_step"] == i
        if here.any():
            metrics[f"reg_{t:g}"] = terms["reg"][here].mean().item()
            metrics[f"weight_{t:g}"] = terms["weight"][here].mean().item()
        if here.sum() > 1:  # times k, it tells how far the weights can leave one half
            metrics[f"reg_std_{t:g}"] = terms["reg"][here].std().item()
        metrics[f"cache_{t:g}"] = cache.means[i].item()
    return metrics


def rollouts(args, student, interpolator, step, batches):
    """New videos of the student for an update of the critic: (x0, text, generators) by batch."""
    for real, text, generators in batches:
        with torch.no_grad():
            noise = adavid.draw(torch.randn, real.shape, real, generators)
            x0 = adavid.backward_simulation(student, noise, text, step, args.avd, interpolator,
                                            generators)
        yield x0, text, generators


def update_critic(args, critic, optimizer, videos):
    """One update of the critic on the student's videos: its metrics."""
    config, loss = args.avd, 0
    for x0, text, generators in videos:
        part = adavid.critic_loss(critic, x0, text, config, generators) / args.accumulate
        part.backward()
        loss += part.item()
    norm = clip_and_step(critic, [optimizer], config.critic_lr, config.grad_clip, loss)
    return {"critic": loss, "critic_grad_norm": norm}


def adamw(model, config):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                             betas=config.betas, weight_decay=config.weight_decay)


def check(args, data):
    """ValueError unless the flags, the models and the data go together."""
    load_config(args.model)  # reports what `main` has passed over
    if args.out.resolve() == checkpoint.home(args.model).resolve():
        raise ValueError(f"--out {args.out} is the teacher's own folder; choose another")
    if args.lora and (args.ema or args.init_student):
        raise ValueError("--lora goes with neither --ema nor --init-student")
    if args.lora < 0 or not 0 <= args.ema < 1:
        raise ValueError(f"--lora {args.lora}, --ema {args.ema}: a rank, and a decay below 1")
    for model in (args.model, args.init_student or args.model):
        takes, there = WanConfig.from_pretrained(model), (data.latent_shape[0],
                                                          data.null_text.shape[-1])
        if (takes.in_dim, takes.text_dim) != there:
            raise ValueError(
                f"{args.data or 'the toy world'} has {there[0]} channels and text of {there[1]}, "
                f"but {model} takes {takes.in_dim} and {takes.text_dim}")
    if args.avd.lambda_reg and not data.has_videos:
        raise ValueError(f"{args.data}: has no videos to learn from; --lambda-reg 0 does without")


if __name__ == "__main__":
    sys.exit(main())
