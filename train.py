"""Train, in three stages: a teacher, a frame interpolator, and the 4-step student.

    python train.py teacher      --out runs/teacher         flow matching on the toy world
    python train.py interpolator --out runs/interpolator    the frames between real frames
    python train.py distill      --out runs/student         adaptive video distillation
    torchrun --nproc_per_node 8 train.py distill --model Wan2.1-T2V-1.3B --data SHARDS ...

A run's folder holds its checkpoint, `metrics.jsonl` (one line a step; wall times apart, in
`times.jsonl`), pictures of fixed prompts in `samples/`, and at the end the model. Ctrl-C saves; the
same command again goes on where it stopped, and ends with the very weights of an unbroken run.
"""

import copy
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import adavid
import kernels
from adavid import AVDConfig, FrameInterpolator
from runtime.student import load_config, load_interpolator
from tiny_wan import PRESETS, WEIGHTS, ToyCodec, WanConfig, WanModel, checkpoint, open_codec, world
from runtime import cli
from runtime.data import Prefetch, Shards, Toy
from runtime.lora import add_adapters
from runtime.media import thumbnails, write_contact_sheet
from runtime.distributed import broadcast, full_tensor, init_distributed, rank, shard, world_size
from runtime.run import clip_and_step, loop, make_generator, make_generators

# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    out: Path
    """folder of the run; the same command again resumes what is there"""
    steps: int
    """updates in all"""
    batch_size: int
    """videos at a time, on each GPU"""
    seed: int = 0
    """of the data, the noise and the first weights"""
    save_every: int = 100
    """steps between checkpoints"""
    keep: int = 2
    """checkpoints to keep: where the newest is damaged, the one before is used"""
    keep_every: int | None = None
    """keep those of each such number of steps, too"""
    sample_every: int = 100
    """steps between pictures of the fixed prompts"""
    tensorboard: bool = False
    """log for TensorBoard, too, if it is installed"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""
    # These may change in a resumed run.
    free = {"out", "device", "save_every", "keep", "keep_every", "sample_every", "tensorboard"}


@dataclass
class Teacher(Run):
    """Flow matching on the toy world's real videos, with prompts dropped for guidance."""

    steps: int = 10_000
    batch_size: int = 32
    save_every: int = 500
    sample_every: int = 1000
    preset: Literal[tuple(PRESETS)] = "tiny"
    """architecture"""
    lr: float = 3e-3
    """peak learning rate: warmed up over 100 steps, then brought down to zero"""
    shift: float = 8.0
    """most timesteps fall at high noise, where a video's motion is decided"""
    sigma_floor: float = 0.3
    """below this sigma the loss is that of x0: a tiny network would drown in faint noise"""
    drop_prompt: float = 0.1
    """share of prompts left empty, which is what guidance contrasts with"""
    drop_motion: float = 0.4
    """share of prompts cut to their colour: where words say nothing of the motion, the network
    must read it off the other frames"""
    ema: float = 0.999
    """decay of the averaged weights that are kept"""
    compile: bool = False
    """torch.compile the model: a minute to start, then a quarter less time"""
    score_prompts: int = 256
    """fixed prompts that the finished teacher is scored on"""
    avd: AVDConfig = field(default_factory=lambda: AVDConfig(
        guidance_scale=3.0, lr=2e-4, critic_lr=4e-4, betas=(0.0, 0.99)))
    """what students of this teacher use in place of the paper's numbers, stored with the weights;
    the temporal truncation is measured on real videos"""
    free = Run.free | {"score_prompts", "avd"}


@dataclass
class Interpolator(Run):
    """A UNet that predicts every second frame of real latents from its neighbours."""

    steps: int = 2000
    batch_size: int = 32
    save_every: int = 500
    sample_every: int = 1000
    data: Path | None = None
    """folder of tools.encode's shards; by default the toy world"""
    lr: float = 1e-3
    """peak learning rate"""
    width: int = 32
    """channels of the UNet at full size; twice as many at half"""


@dataclass
class Distill(Run):
    """Distil a teacher into a few-step student."""

    steps: int = 60
    batch_size: int = 16
    save_every: int = 10
    sample_every: int = 20
    model: Path = WEIGHTS
    """the teacher, and beside it its interpolator"""
    data: Path | None = None
    """folder of tools.encode's shards; by default the toy world"""
    codec: Path | None = None
    """folder with Wan's VAE, for the pictures; by default the model's own"""
    init_student: Path | None = None
    """a model for the student to start from; by default the teacher"""
    accumulate: int = 1
    """batches whose gradients make one update"""
    one_rollout: bool = False
    """all critic updates of a cycle learn from the student update's videos: a fifth less time"""
    lora: int = 0
    """rank of adapters to train on one shared, frozen base, in place of whole models"""
    ema: float = 0.0
    """decay of averaged student weights, which are then the ones that are kept; 0 for none"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """to compute in; auto is bfloat16 on an NVIDIA or AMD GPU. Weights that learn are float32"""
    gradient_checkpointing: bool | None = None
    """recompute each block in backward: far less memory, a third more time; by default for Wan"""
    avd: Annotated[AVDConfig, tyro.conf.arg(name="")] = AVDConfig()
    free = Run.free | {"steps", "codec", "gradient_checkpointing"}  # the rate is constant


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = Annotated[Teacher, tyro.conf.subcommand("teacher")] | Annotated[
        Interpolator, tyro.conf.subcommand("interpolator")] | Annotated[
        Distill, tyro.conf.subcommand("distill", default=distill_defaults(argv))]
    stages = {Teacher: train_teacher, Interpolator: train_interpolator, Distill: distill}
    return cli.run(lambda args: stages[type(args)](args), options, argv)


def distill_defaults(argv):
    """Distill's flags, with the teacher's own numbers as the method's defaults."""
    given = [b for a, b in zip(argv, argv[1:]) if a == "--model"]
    given += [a.removeprefix("--model=") for a in argv if a.startswith("--model=")]
    model = Path(given[-1]) if given else WEIGHTS
    try:
        return Distill(tyro.MISSING, model=model, avd=load_config(model))
    except (ValueError, OSError):  # `distill` will say so; --help works without a model
        return Distill(tyro.MISSING, model=model)


# ---------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------


def train_teacher(args):
    device, codec = init_distributed(args.device), ToyCodec()
    data, pictures = Toy(codec, args.seed), Pictures(Toy(codec, GRID_SEED), ToyCodec)
    model = WanModel(PRESETS[args.preset]).init_weights(args.seed).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    # Muon learns the blocks' matrices in half the steps that AdamW takes; it is for matrices alone.
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    others = set(model.parameters()) - set(matrices)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p in others], betas=(0.9, 0.99))
    forward = torch.compile(model) if args.compile else model

    def update(step):
        numbers = sample_numbers(args, step)
        x0, _, prompts = data.batch(numbers)
        x0, generator = x0.to(device), make_generators(args.seed, "teacher", numbers)
        drop = adavid.draw(torch.rand, x0.shape[:1], x0, generator)
        text = codec.encode_text([
            "" if d < args.drop_prompt else world.without_motion(prompt)
            if d < args.drop_prompt + args.drop_motion else prompt
            for d, prompt in zip(drop.tolist(), prompts)]).to(device)
        u = adavid.draw(torch.rand, x0.shape[:1], x0, generator)
        noise = adavid.draw(torch.randn, x0.shape, x0, generator)
        sigma = adavid.shifted(u, args.shift)
        v = forward(adavid.add_noise(x0, noise, 1000 * sigma), 1000 * sigma, text)
        error = (v - (noise - x0)).square().mean(dim=(1, 2, 3, 4))
        loss = (error * (sigma / args.sigma_floor).clamp(max=1) ** 2).mean()

        loss.backward()
        lr = warmed_up_and_decayed(args, step)
        norm = clip_and_step(model, (muon, adamw), lr, 1.0, loss.item())
        decay = min(args.ema, (step + 1) / (step + 30))  # the first weights are soon forgotten
        if math.isfinite(norm):
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        return logged(norm, loss=loss.item(), grad_norm=norm, lr=lr)

    def sample(noise, text):
        return adavid.sample_teacher(ema, noise.to(device), text.to(device),
                                     data.null_text.to(device),
                                     guidance_scale=args.avd.guidance_scale)

    state = {"model": model, "ema": ema, "muon": muon, "adamw": adamw}
    minutes = loop(args, state, update, lambda path: pictures.draw(path, sample))
    if rank():
        return
    real = codec.encode(world.make(args.seed, range(4096))[0])
    level = -kernels.temporal_variance(real).mean().log().item()
    avd = replace(args.avd, temporal_truncation=round(level, 2))
    ema.half().float()  # what is scored is what is stored
    scores = Pictures(Toy(codec, GRID_SEED), ToyCodec, args.score_prompts).scores(sample)
    ema.half().save_pretrained(args.out, metadata={
        "avd": avd.to_json(), "seed": str(args.seed), "minutes": f"{minutes:.0f}",
        "scores": json.dumps(scores)})


def train_interpolator(args):
    device, data = init_distributed(args.device), open_data(args)
    if not data.has_videos:
        raise ValueError(f"{args.data}: has no videos; an interpolator needs them")
    torch.manual_seed(args.seed)
    model = FrameInterpolator(data.latent_shape[0], args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    fetch = Prefetch(lambda step: data.batch(sample_numbers(args, step)))

    def update(step):
        x0 = fetch(step)[0].to(device)
        loss = adavid.interpolation_loss(model, x0)
        loss.backward()
        mean = (x0[:, :, :-2:2] + x0[:, :, 2::2]) / 2
        lr = warmed_up_and_decayed(args, step)
        norm = clip_and_step(model, (optimizer,), lr, 1.0, loss.item())
        return logged(norm, loss=loss.item(), grad_norm=norm, lr=lr, waited=fetch.waited,
                      plain_mean=F.mse_loss(mean, x0[:, :, 1::2]).item())

    def show(path):
        if args.data:
            return
        real = Toy(ToyCodec(), GRID_SEED).batch(range(8))[0]
        with torch.no_grad():
            filled = model(real[:, :, ::2].to(device)).cpu()
        pairs = ToyCodec().decode(torch.stack([real, filled], dim=1).flatten(0, 1))
        write_contact_sheet(path, map(thumbnails, pairs))

    minutes = loop(args, {"model": model, "optimizer": optimizer}, update, show)
    if rank() == 0:
        model.half().save_pretrained(args.out / "interpolator.safetensors",
                                     {"seed": str(args.seed), "minutes": f"{minutes:.0f}"})


def distill(args):
    """Each step is a cycle: an update of the student, then `critic_updates` of the critic.

    The first of these learns from the student's own update's videos, the others from new ones.
    """
    config, device, data = args.avd, init_distributed(args.device), open_data(args)
    load_config(args.model)  # whose complaint `distill_defaults` has kept to itself
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
    if config.lambda_reg and not data.has_videos:
        raise ValueError(f"{args.data}: has no videos to learn from; --lambda-reg 0 does without")
    interpolator = load_interpolator(args.model, device)
    if interpolator is None and rank() == 0:
        print("note: no interpolator.safetensors beside the model, so all steps are full rate")
    teacher, student, critic = load_models(args, device)
    cache = adavid.LossMeanCache(len(config.timesteps), config.ema_decay, config.k).to(device)
    null_text = data.null_text.to(device)
    averaged = load_whole(args, args.init_student or args.model, device) if args.ema else student

    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                 betas=config.betas, weight_decay=config.weight_decay)

    student_optimizer, critic_optimizer = adamw(student), adamw(critic)
    fetch = Prefetch(lambda number: data.batch(sample_numbers(args, number)))

    def batches(number):
        """The batches of an update: real videos, text, step and random streams."""
        # Drawn once for all: samples and ranks must agree on the step, or they run apart.
        step = torch.randint(len(config.timesteps), (), generator=make_generator(args.seed, "step", number))
        for i in range(number * args.accumulate, (number + 1) * args.accumulate):
            real, text, _ = fetch(i)
            yield (real.to(device), text.to(device), step.item(),
                   make_generators(args.seed, "distill", sample_numbers(args, i)))

    def rollouts(number):
        """The student's videos for an update of the critic, with their text and random streams."""
        for real, text, step, generator in batches(number):
            with torch.no_grad():
                noise = adavid.draw(torch.randn, real.shape, real, generator)
                x0 = adavid.backward_simulation(student, noise, text, step, config, interpolator,
                                                generator)
            yield x0, text, generator

    def update_critic(videos):
        loss = 0
        for x0, text, generator in videos:
            part = adavid.critic_loss(critic, x0, text, config, generator) / args.accumulate
            part.backward()
            loss += part.item()
        norm = clip_and_step(critic, (critic_optimizer,), config.critic_lr, config.grad_clip, loss)
        return logged(norm, critic=loss, critic_grad_norm=norm)

    def update_student(number):
        """Its metrics, and its videos, which the critic learns from in turn."""
        means, parts, videos = copy.deepcopy(cache.state_dict()), [], []
        for real, text, step, generator in batches(number):
            cache.load_state_dict(means)  # all of an update's batches are weighed by the same
            part = {"loss": 0, "data_variance": kernels.temporal_variance(real).mean()}
            for loss, terms in adavid.student_losses(
                    student, teacher, critic, cache, real, text, null_text, step, config,
                    interpolator, generator):
                (loss / args.accumulate).backward()
                part |= terms | {"loss": part["loss"] + loss.detach()}
            videos.append((part.pop("x0"), text, generator))
            parts.append(part)
        parts = {name: torch.cat([part[name].view(-1) for part in parts]) for name in parts[0]}
        norm = clip_and_step(student, (student_optimizer,), config.lr, config.grad_clip,
                       parts["loss"].sum().item())
        cache.load_state_dict(means)
        metrics = logged(norm, student_grad_norm=norm, rollout_step=step)
        if not metrics.get("skipped"):
            if "reg" in parts:
                cache(parts["reg_step"], parts["reg"])  # one step of its mean for each update
            if args.ema:
                for p, q in zip(averaged.parameters(), student.parameters()):
                    p.detach().lerp_(q.detach(), 1 - args.ema)
        metrics |= {name: parts[name].mean().item() for name in parts if name != "reg_step"}
        for i, timestep in enumerate(config.timesteps if "reg" in parts else ()):
            here = parts["reg_step"] == i
            if here.any():
                metrics |= {f"reg_{timestep:g}": parts["reg"][here].mean().item(),
                            f"weight_{timestep:g}": parts["weight"][here].mean().item()}
            if here.sum() > 1:  # times k, it tells how far the weights can leave one half
                metrics[f"reg_std_{timestep:g}"] = parts["reg"][here].std().item()
            metrics[f"cache_{timestep:g}"] = cache.means[i].item()
        return metrics, videos

    def update(cycle):
        first = cycle * max(1, config.critic_updates)
        metrics, videos = update_student(first)
        for number in range(first, first + config.critic_updates):
            if number > first and not args.one_rollout:
                videos = rollouts(number)
            metrics |= {name: value for name, value in update_critic(videos).items()
                        if math.isfinite(metrics.get(name, 0))}  # one that is not finite stays
        return metrics | {"waited": fetch.waited}

    def sample(noise, text):
        generator = torch.Generator().manual_seed(args.seed)
        return adavid.sample(averaged, noise.to(device), text.to(device), config, interpolator,
                             generator)

    state = {"student": student, "critic": critic, "cache": cache,
             "student_optimizer": student_optimizer, "critic_optimizer": critic_optimizer}
    state |= {"ema": averaged} if args.ema else {}
    pictures = open_pictures(args, data, device)
    loop(args, state, update, lambda path: pictures and pictures.draw(path, sample))
    metadata = {"method": "AVD", "avd": config.to_json(), "seed": str(args.seed)}
    save_student(averaged, args.out, metadata)
    if interpolator is not None and rank() == 0:
        shutil.copy(checkpoint.home(args.model) / "interpolator.safetensors", args.out)


def load_models(args, device):
    """Teacher, student and critic: three models, or one base with no, one and another adapter."""
    if args.lora:
        base = WanModel.from_pretrained(args.model, compute_dtype(args, device) or torch.float32)
        base.gradient_checkpointing = recomputing(args)
        return add_adapters(base.to(device), args.lora, ("student", "critic"), args.seed)
    return (load_whole(args, args.model, device).requires_grad_(False),
            load_whole(args, args.init_student or args.model, device),
            load_whole(args, args.model, device))


def load_whole(args, path, device):
    """A model with weights in float32, in parts over the ranks."""
    model = WanModel.from_pretrained(path)
    model.gradient_checkpointing = recomputing(args)
    return shard(model, device, compute_dtype(args, device))


def compute_dtype(args, device):
    return {"float32": None, "bfloat16": torch.bfloat16,
            "auto": torch.bfloat16 if device.type == "cuda" else None}[args.dtype]


def recomputing(args):
    given = args.gradient_checkpointing
    return args.data is not None if given is None else given


def save_student(student, out, metadata):
    """What was learnt: the whole model, gathered from all ranks, or LoRA's adapter alone."""
    tensors = {}
    for name, tensor in student.state_dict().items():
        tensor = full_tensor(tensor)
        if rank() == 0:
            tensors[name] = tensor.cpu()
    if rank() == 0:
        if hasattr(student, "save_adapter"):
            student.save_adapter(out, metadata)
        else:
            checkpoint.write(out, asdict(student.config), tensors, metadata=metadata)


# ---------------------------------------------------------------------------------------------
# Data, pictures, learning rate
# ---------------------------------------------------------------------------------------------

GRID_SEED = 1000  # its prompts are for pictures and for choosing; no training run uses it


def open_data(args):
    return Shards(args.data, args.seed) if args.data else Toy(ToyCodec(), args.seed)


def sample_numbers(args, batch):
    """The numbers, in the whole run, of the samples in this rank's share of a batch."""
    first = (batch * world_size() + rank()) * args.batch_size
    return range(first, first + args.batch_size)


def open_pictures(args, data, device):
    """The toy's own prompts, or the data's first ones; None where there is no VAE to see them."""
    if not args.data:
        return Pictures(Toy(ToyCodec(), GRID_SEED), ToyCodec)
    config = WanConfig.from_pretrained(args.model)

    def codec():
        return open_codec(args.model, config, args.codec, device=device)

    problem = None
    if rank() == 0:
        try:
            codec().prepare()
        except (ValueError, OSError) as error:
            problem = f"note: no pictures, as {error}"
            print(problem)
    if broadcast(problem):
        return None
    return Pictures(data, codec, count=4, batch_size=1)


class Pictures:
    """Videos of fixed prompts from fixed noise. `codec()` opens what decodes them, for a while."""

    def __init__(self, data, codec, count=8, batch_size=256):
        self.codec, self.batch_size = codec, batch_size
        _, self.text, self.prompts = data.batch(range(count))
        self.noise = torch.randn((count, *data.latent_shape), generator=make_generator(GRID_SEED, "grid"))

    def latents(self, sample):
        batches = zip(self.noise.split(self.batch_size), self.text.split(self.batch_size))
        return torch.cat([sample(noise, text).cpu() for noise, text in batches])

    def draw(self, path, sample):
        """A contact sheet, and for the log how saturated it is. All ranks sample, one draws."""
        latents = self.latents(sample)
        if rank():
            return {}
        try:
            videos = self.codec().decode(latents).cpu()
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            tqdm.write(f"{path}: not drawn ({error})")
            return {}
        write_contact_sheet(path, map(thumbnails, videos))
        return {"saturation": (videos.amax(1) - videos.amin(1)).mean().item()}

    def scores(self, sample):
        """What the toy's oracle reads off the videos."""
        scores = world.score(self.codec().decode(self.latents(sample)), self.prompts)
        return {name: value.nanmean().item() for name, value in scores.items()}


def warmed_up_and_decayed(args, step):
    """The learning rate: up over 100 steps, down to zero over the last three quarters."""
    return args.lr * min(1, (step + 1) / 100, (1 - step / args.steps) / 0.75)


def logged(norm, **metrics):
    """The metrics of an update, which a norm that is not finite has skipped."""
    return metrics if math.isfinite(norm) else metrics | {"skipped": 1}


if __name__ == "__main__":
    sys.exit(main())
