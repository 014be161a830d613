"""Train, in three stages: a teacher, a frame interpolator, and the 4-step student.

    python train.py teacher      --out runs/teacher         flow matching on real videos
    python train.py interpolator --out runs/interpolator    the frames between real frames
    python train.py distill      --out runs/student         adaptive video distillation

A run's folder holds its checkpoint, `metrics.jsonl` (one line a step; wall times apart, in
`times.jsonl`), pictures of fixed prompts in `samples/`, and at the end the model. Ctrl-C saves; the
same command again goes on where it stopped, and ends with the very weights of an unbroken run.
"""

import copy
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import adavid
import kernels
from adavid import AVDConfig, FrameInterpolator
from sample import WEIGHTS, load_config, load_interpolator
from tiny_wan import PRESETS, ToyCodec, WanModel, checkpoint, world
from tools import cli
from tools.media import thumbnails, write_contact_sheet

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
    """videos in an update"""
    seed: int = 0
    """of the data, the noise and the first weights"""
    save_every: int = 100
    """steps between checkpoints"""
    sample_every: int = 100
    """steps between pictures of the fixed prompts"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""


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


@dataclass
class Interpolator(Run):
    """A UNet that predicts every second frame of real latents from its neighbours."""

    steps: int = 2000
    batch_size: int = 32
    save_every: int = 500
    sample_every: int = 1000
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
    """folder of the teacher, and of its interpolator"""
    avd: Annotated[AVDConfig, tyro.conf.arg(name="")] = AVDConfig()


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
    device, codec = cli.pick_device(args.device), ToyCodec()
    model = WanModel(PRESETS[args.preset]).init_weights(args.seed).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    # Muon learns the blocks' matrices in half the steps that AdamW takes; it is for matrices alone.
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    others = set(model.parameters()) - set(matrices)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p in others], betas=(0.9, 0.99))
    forward = torch.compile(model) if args.compile else model

    def update(step):
        first = step * args.batch_size
        video, prompts = world.make(args.seed, range(first, first + args.batch_size))
        generator = streams(args, "teacher", first)
        x0 = codec.encode(video).to(device)
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

        lr = warmed_up_and_decayed(args, step)
        norm = descend("model", loss, model, (muon, adamw), lr, max_norm=1.0)
        decay = min(args.ema, (step + 1) / (step + 30))  # the first weights are soon forgotten
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        return {"loss": loss.item(), "grad_norm": norm, "lr": lr}

    def sample(noise, text):
        return adavid.sample_teacher(ema, noise, text, codec.encode_text([""]).to(device),
                                     guidance_scale=args.avd.guidance_scale)

    state = {"model": model, "ema": ema, "muon": muon, "adamw": adamw}
    minutes = loop(args, state, update, lambda path: sample_grid(path, sample, codec, device))
    real = codec.encode(world.make(args.seed, range(4096))[0])
    level = -kernels.temporal_variance(real).mean().log().item()
    avd = replace(args.avd, temporal_truncation=round(level, 2))
    ema.half().float()  # what is scored is what is stored
    scores = sample_grid(None, sample, codec, device, prompts=args.score_prompts)
    ema.half().save_pretrained(args.out, metadata={
        "avd": avd.to_json(), "seed": str(args.seed), "minutes": f"{minutes:.0f}",
        "scores": json.dumps(scores)})


def train_interpolator(args):
    device, codec = cli.pick_device(args.device), ToyCodec()
    torch.manual_seed(args.seed)
    model = FrameInterpolator(codec.channels, args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))

    def update(step):
        first = step * args.batch_size
        video, _ = world.make(args.seed, range(first, first + args.batch_size))
        x0 = codec.encode(video).to(device)
        loss = adavid.interpolation_loss(model, x0)
        mean = (x0[:, :, :-2:2] + x0[:, :, 2::2]) / 2
        lr = warmed_up_and_decayed(args, step)
        norm = descend("interpolator", loss, model, (optimizer,), lr, max_norm=1.0)
        return {"loss": loss.item(), "plain_mean": F.mse_loss(mean, x0[:, :, 1::2]).item(),
                "grad_norm": norm, "lr": lr}

    def show(path):
        video = world.make(GRID_SEED, range(8))[0].to(device)
        with torch.no_grad():
            filled = codec.decode(model(codec.encode(video)[:, :, ::2]))
        pairs = torch.stack([video, filled], dim=1).flatten(0, 1).cpu()
        write_contact_sheet(path, map(thumbnails, pairs))

    minutes = loop(args, {"model": model, "optimizer": optimizer}, update, show)
    model.half().save_pretrained(args.out / "interpolator.safetensors",
                                 {"seed": str(args.seed), "minutes": f"{minutes:.0f}"})


def distill(args):
    """Each step is a cycle: `critic_updates` updates of the critic, then one of the student."""
    config, device, codec = args.avd, cli.pick_device(args.device), ToyCodec()
    load_config(args.model)  # whose complaint `distill_defaults` has kept to itself
    if args.out.resolve() == args.model.resolve():
        raise ValueError(f"--out {args.out} is the teacher's own folder; choose another")
    teacher = WanModel.from_pretrained(args.model, torch.float32, device).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    critic = copy.deepcopy(teacher).requires_grad_(True)
    interpolator = load_interpolator(args.model, device)
    cache = adavid.LossMeanCache(len(config.timesteps), config.ema_decay, config.k).to(device)
    null_text = codec.encode_text([""]).to(device)

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), betas=config.betas,
                                 weight_decay=config.weight_decay)

    student_optimizer, critic_optimizer = adamw(student), adamw(critic)

    def batch(number):
        first = number * args.batch_size
        video, prompts = world.make(args.seed, range(first, first + args.batch_size))
        generator = streams(args, "distill", first)
        # Drawn once for all: samples and ranks must agree on the step, or they run apart.
        step = torch.randint(len(config.timesteps), (), generator=stream(args.seed, "step", number))
        return (codec.encode(video).to(device), codec.encode_text(prompts).to(device),
                step.item(), generator)

    def update(cycle):
        metrics = {}
        first = cycle * (config.critic_updates + 1)
        for number in range(first, first + config.critic_updates):
            real, text, step, generator = batch(number)
            with torch.no_grad():
                noise = adavid.draw(torch.randn, real.shape, real, generator)
                x0 = adavid.backward_simulation(student, noise, text, step, config, interpolator,
                                                generator)
            loss = adavid.critic_loss(critic, x0, text, config, generator)
            norm = descend("critic", loss, critic, (critic_optimizer,), config.critic_lr,
                           config.grad_clip)
            metrics |= {"critic": loss.item(), "critic_grad_norm": norm}

        real, text, step, generator = batch(first + config.critic_updates)
        loss, parts = adavid.student_loss(student, teacher, critic, cache, real, text, null_text,
                                          step, config, interpolator, generator)
        norm = descend("student", loss, student, (student_optimizer,), config.lr,
                       config.grad_clip)
        metrics |= {"student_grad_norm": norm, "rollout_step": step,
                    "data_variance": kernels.temporal_variance(real).mean().item()}
        metrics |= {name: parts[name].mean().item() for name in parts if name != "reg_step"}
        for i, timestep in enumerate(config.timesteps if "reg_step" in parts else ()):
            here = parts["reg_step"] == i
            if here.any():
                metrics |= {f"reg_{timestep:g}": parts["reg"][here].mean().item(),
                            f"weight_{timestep:g}": parts["weight"][here].mean().item()}
            if here.sum() > 1:  # times k, it tells how far the weights can leave one half
                metrics[f"reg_std_{timestep:g}"] = parts["reg"][here].std().item()
            metrics[f"cache_{timestep:g}"] = cache.means[i].item()
        return metrics

    def sample(noise, text):
        generator = torch.Generator().manual_seed(args.seed)
        return adavid.sample(student, noise, text, config, interpolator, generator)

    state = {"student": student, "critic": critic, "cache": cache,
             "student_optimizer": student_optimizer, "critic_optimizer": critic_optimizer}
    loop(args, state, update, lambda path: sample_grid(path, sample, codec, device))
    student.save_pretrained(args.out, metadata={
        "method": "AVD", "avd": config.to_json(), "seed": str(args.seed)})
    if interpolator is not None:
        shutil.copy(args.model / "interpolator.safetensors", args.out)


def warmed_up_and_decayed(args, step):
    """The learning rate: up over 100 steps, down to zero over the last three quarters."""
    return args.lr * min(1, (step + 1) / 100, (1 - step / args.steps) / 0.75)


def descend(name, loss, model, optimizers, lr, max_norm):
    """One step down the gradient; its norm. FloatingPointError before a bad one is taken."""
    model.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if not norm.isfinite():
        raise FloatingPointError(f"the {name}'s loss is {loss.item():g}, its gradient {norm:g}")
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return norm.item()


# ---------------------------------------------------------------------------------------------
# Randomness, the loop and its checkpoints
# ---------------------------------------------------------------------------------------------


def stream(*key):
    """The random stream of a key, such as (seed, purpose, sample): there is no state to save."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def streams(args, purpose, first):
    """A stream for each sample of a batch, by its number in the whole run."""
    return [stream(args.seed, purpose, i) for i in range(first, first + args.batch_size)]


GRID_SEED = 1000  # its prompts are for pictures and for choosing; no training run uses it


def sample_grid(path, sample, codec, device, prompts=8):
    """Sample fixed prompts from fixed noise; draw them, if there is a path, and return scores."""
    names = world.make(GRID_SEED, range(prompts))[1]
    text = codec.encode_text(names).to(device)
    noise = torch.randn((prompts, *codec.latent_shape()), generator=stream(GRID_SEED, "grid"))
    videos = codec.decode(sample(noise.to(device), text)).cpu()
    if path:
        write_contact_sheet(path, map(thumbnails, videos))
    return {name: value.nanmean().item() for name, value in world.score(videos, names).items()}


def loop(args, state, update, show):
    """Run `update(step) -> metrics` up to `args.steps`, resuming and saving `state`; -> minutes.

    state: the modules and optimizers that make up the run, by name.
    show: draws the fixed prompts to a path.
    """
    (args.out / "samples").mkdir(parents=True, exist_ok=True)
    start = resume(args, state)
    for log in ("metrics.jsonl", "times.jsonl"):  # what came after the checkpoint is done again
        lines = (args.out / log).read_text().splitlines()[:start] if start else []
        (args.out / log).write_text("".join(line + "\n" for line in lines))

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.out.name)
    with open(args.out / "metrics.jsonl", "a") as metrics_log, \
            open(args.out / "times.jsonl", "a") as times_log, stop_requests() as requests:
        for step in bar:
            began = time.perf_counter()
            try:
                metrics = update(step)
            except FloatingPointError as error:
                raise ValueError(f"step {step}: {error}; the last checkpoint is untouched, and a "
                                 f"lower learning rate may help") from None
            done = step + 1
            print(json.dumps({"step": step} | metrics), file=metrics_log, flush=True)
            seconds = time.perf_counter() - began
            print(json.dumps({"step": step, "seconds": seconds}), file=times_log, flush=True)
            bar.set_postfix({name: f"{metrics[name]:.3g}" for name in
                             ("loss", "kl", "reg", "temp", "critic") if name in metrics})
            if done % args.sample_every == 0 or done == args.steps:
                show(args.out / "samples" / f"{done:06d}.png")
            stop = list(requests)
            if stop or done % args.save_every == 0 or done == args.steps:
                save(args, state, done)
            if stop:
                bar.close()
                print(f"stopped and saved at step {done} of {args.steps}; "
                      f"the same command resumes there", file=sys.stderr)
                raise SystemExit(128 + stop[0])
    seconds = [json.loads(line)["seconds"]
               for line in (args.out / "times.jsonl").read_text().splitlines()]
    return sum(seconds) / 60


@contextmanager
def stop_requests():
    """A list that collects SIGINT and SIGTERM, so that a step ends first. The second one kills."""
    requests = []

    def request(signum, _):
        requests.append(signum)
        signal.signal(signum, handlers[signum])

    handlers = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def flags(args):
    """What must not change while a run goes on.

    The teacher only carries its students' `avd`; distillation, at a constant rate, may go on.
    """
    free = ["out", "device", "save_every", "sample_every", "score_prompts"]
    free += {Teacher: ["avd"], Interpolator: [], Distill: ["steps"]}[type(args)]
    values = {k: v.resolve() if isinstance(v, Path) else v
              for k, v in asdict(args).items() if k not in free}
    return json.dumps(values | values.pop("avd", {}), default=str)


def save(args, state, step):
    """Write the whole state beside the last checkpoint, then put it in its place."""
    tensors = {}
    for name, part in state.items():
        if isinstance(part, torch.optim.Optimizer):
            for i, moments in part.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{key}": value for key, value in moments.items()}
        else:
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    part_file = args.out / "checkpoint.safetensors.part"
    save_file(tensors, part_file, {"step": str(step), "flags": flags(args)})
    with open(part_file, "r+b") as file:  # Windows syncs only what it may write
        os.fsync(file.fileno())
    os.replace(part_file, args.out / "checkpoint.safetensors")


def resume(args, state):
    """Load the folder's checkpoint into `state`, if there is one; the step to go on with."""
    file = args.out / "checkpoint.safetensors"
    if not file.exists():
        return 0
    with checkpoint.open_weights(file) as weights:
        metadata = weights.metadata() or {}
    if "flags" not in metadata:
        raise ValueError(f"{file}: not a checkpoint of this program; choose another --out")
    then, now = json.loads(metadata["flags"]), json.loads(flags(args))
    if changed := [f"{k} was {then.get(k)}, now {now[k]}" for k in now if now[k] != then.get(k)]:
        raise ValueError(f"{args.out} holds a run with other flags ({'; '.join(changed[:4])}); "
                         f"repeat them to resume, or choose another --out")
    tensors = load_file(file)
    for name, part in state.items():
        own = {key.removeprefix(name + "."): value for key, value in tensors.items()
               if key.startswith(name + ".")}
        if isinstance(part, torch.optim.Optimizer):
            moments = {}
            for key, value in own.items():
                i, kind = key.split(".")
                moments.setdefault(int(i), {})[kind] = value.clone()  # lets go of the file
            part.load_state_dict(part.state_dict() | {"state": moments})
        else:
            part.load_state_dict(own)
    return int(metadata["step"])


if __name__ == "__main__":
    sys.exit(main())
