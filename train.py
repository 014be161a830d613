"""Train, in two stages: a frame interpolator, and the 4-step student.

    python train.py interpolator --out runs/interpolator    the frames between real frames
    python train.py distill      --out runs/student         adaptive video distillation
    torchrun --nproc_per_node 8 train.py distill --model Wan2.1-T2V-1.3B --data SHARDS ...

A run's folder holds checkpoints, `metrics.jsonl` with a line for each step, `times.jsonl` with each
step's duration, pictures of fixed prompts in `samples/`, a page about them and the curves in
`report.html`, and at the end the model. Ctrl-C saves a checkpoint. The same command resumes, and
gives the same weights as an uninterrupted run.
"""

import math
import sys
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

import adavid
import kernels
from adavid import AVDConfig, Decay, FrameInterpolator, NotNegative
from runtime import cli
from runtime.data import (
    Prefetch,
    Toy,
    check_halves,
    note_changes,
    open_data,
    sample_indices,
)
from runtime.distributed import init_distributed, mean_metrics, rank
from runtime.media import thumbnails, write_contact_sheet
from runtime.models import (
    check_fit,
    check_out,
    check_run_out,
    default_config,
    find_interpolator,
    load_adapters,
    load_models,
    load_trainable,
    save_student,
)
from runtime.pictures import GRID_SEED, open_pictures
from runtime.run import Flags, Run, adamw, clip_and_step, make_generator, make_generators
from tiny_wan import WEIGHTS, ToyCodec, WanConfig, checkpoint
from tiny_wan.codec import codec_class

# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------


@dataclass
class Interpolator(Flags):
    """Train the frame interpolator: a UNet that predicts dropped frames of real latents."""

    steps: cli.Count = 2000
    batch_size: cli.Size = 32
    save_every: cli.Count = 500
    sample_every: cli.Count = 1000
    data: Path | None = None
    """folder of shards from tools.encode; by default the toy world"""
    lr: NotNegative = 1e-3
    """peak learning rate: warmed up over 100 steps, then decayed to zero"""
    width: cli.Size = 32
    """channels of the UNet at full resolution; twice as many at half resolution"""


@dataclass
class Distill(Flags):
    """Distil a teacher into a student. The teacher's weights hold the defaults of the method's
    numbers: the toy's differ from the paper's."""

    steps: cli.Count = 60
    batch_size: cli.Size = 16
    save_every: cli.Count = 10
    sample_every: cli.Count = 20
    model: Path = WEIGHTS
    """folder of the teacher; an interpolator.safetensors beside it is used"""
    data: Path | None = None
    """folder of shards from tools.encode; by default the toy world"""
    codec: Path | None = None
    """folder of Wan's VAE, for the pictures; by default the teacher's folder"""
    init_student: Path | None = None
    """folder of the student's initial weights; by default the teacher's"""
    accumulate: cli.Size = 1
    """batches in an update (gradient accumulation)"""
    one_rollout: bool = False
    """use the videos of the student's update for all critic updates of the cycle: faster"""
    lora: cli.Rank = 0
    """rank of LoRA adapters on one shared, frozen base; 0 trains whole models"""
    ema: Decay = 0.0
    """decay of an average of the student's weights, which is then what is saved; 0 for none"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype to compute in: auto is bfloat16 for Wan on a GPU that has it, from NVIDIA or AMD, and
    else float32"""
    gradient_checkpointing: bool | None = None
    """recompute blocks in backward: less memory, more time; by default if --data is given"""
    avd: Annotated[AVDConfig, tyro.conf.arg(name="")] = AVDConfig()
    # The learning rate is constant, so the first cycles do not depend on --steps.
    may_change = Flags.may_change | {"steps", "codec", "gradient_checkpointing"}

    def retry_flags(self):
        return self.lower_rates(self.avd, default_config(self.model, self.lora))


@dataclass
class FirstFlags:
    """Parsed before the others: they decide the defaults of the method's numbers."""

    model: Path = WEIGHTS
    lora: int = 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        first, _ = tyro.cli(FirstFlags, args=argv, return_unknown_args=True, add_help=False,
                            console_outputs=False)
        defaults = Distill(tyro.MISSING, avd=default_config(first.model, first.lora))
    except (ValueError, OSError, SystemExit):  # reported later; --help works without a model
        defaults = Distill(tyro.MISSING)
    except KeyboardInterrupt:
        return 130
    options = Annotated[Interpolator, tyro.conf.subcommand("interpolator")] | Annotated[
        Distill, tyro.conf.subcommand("distill", default=defaults)]
    stages = {Interpolator: train_interpolator, Distill: distill}
    return cli.run(lambda args: stages[type(args)](args), options, argv)


# ---------------------------------------------------------------------------------------------
# The frame interpolator
# ---------------------------------------------------------------------------------------------


def train_interpolator(args):
    device, data = init_distributed(args.device), open_data(args.data, args.seed)
    check_run_out(args.out, [args.data], [args.out / "interpolator.safetensors"])
    cli.announce(device, None, args.device)
    check_halves(f"{data}", data.latent_shape[1], 2)
    if not data.has_videos or data.latent_shape[1] < 3:
        raise ValueError(f"{args.data}: holds no videos of 3 latent frames or more, and an "
                         f"interpolator needs them")
    torch.manual_seed(args.seed)
    model = FrameInterpolator(data.latent_shape[0], args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    fetch = Prefetch(lambda step: data.batch(sample_indices(step, args.batch_size)))

    with Run(args, {"model": model, "optimizer": optimizer}) as run:
        note_changes(data, args.out)
        for step in run.steps():
            x0 = fetch(step)[0].to(device)
            loss = adavid.interpolation_loss(model, x0)
            loss.backward()
            optimizer.param_groups[0]["lr"] = lr = learning_rate(args, step)
            norm = clip_and_step(model, [optimizer], max_norm=1.0, loss=loss.item())

            mean = (x0[:, :, :-2:2] + x0[:, :, 2::2]) / 2  # what the untrained UNet returns
            run.log(step, {"loss": loss.item(), "grad_norm": norm, "lr": lr,
                           "plain_mean": F.mse_loss(mean, x0[:, :, 1::2]).item()}, fetch.waited)
            if run.picture_due(step) and not args.data:
                write_interpolated(run.picture(step), model, device)
            run.save(step)

    if rank() == 0:
        checkpoint.write_files(
            {args.out / "interpolator.safetensors": model.half().state_dict()},
            {"seed": str(args.seed), "minutes": f"{run.minutes():.0f}"})


def learning_rate(args, step):
    """Up over 100 steps, and down to zero over the last three quarters."""
    return args.lr * min(1, (step + 1) / 100, (1 - step / args.steps) / 0.75)


@torch.no_grad()
def write_interpolated(path, model, device):
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

    The first of these reuses the videos of the student's update. The others generate new ones, or
    with --one-rollout reuse them too.
    """
    config, device = args.avd, init_distributed(args.device)
    data = open_data(args.data, args.seed)
    student_path = args.init_student or args.model
    check_flags(args, data, student_path)
    dtype = cli.pick_dtype(args.dtype, device, WanConfig.from_pretrained(args.model))
    cli.announce(device, dtype, args.device)
    recompute = args.gradient_checkpointing
    recompute = args.data is not None if recompute is None else recompute
    models = (load_adapters(args.model, args.lora, args.seed, dtype, device, recompute)
              if args.lora else load_models(args.model, student_path, dtype, device, recompute))
    averaged = load_trainable(student_path, dtype, device, recompute) if args.ema else None
    student_optimizer = adamw(models.student, config.lr, config)
    critic_optimizer = adamw(models.critic, config.critic_lr, config)
    cache = adavid.LossMeanCache(len(config.timesteps), config.ema_decay, config.k).to(device)
    null_text = data.null_text.to(device)
    fetch = Prefetch(lambda number: data.batch(sample_indices(number, args.batch_size)))
    pictures = open_pictures(data, args.model, args.codec, device)

    def random_rollout_step(update):
        """The student's step at which an update's rollouts end.

        All ranks must agree on it: with other numbers of forwards, sharded models would deadlock.
        """
        generator = make_generator(args.seed, "step", update)
        return torch.randint(len(config.timesteps), (), generator=generator).item()

    def load_batches(update):
        """Yield an update's batches: real videos, text, a generator for each sample."""
        for number in range(update * args.accumulate, (update + 1) * args.accumulate):
            real, text, _ = fetch(number)
            yield (real.to(device), text.to(device), make_generators(
                args.seed, "distill", sample_indices(number, args.batch_size)))

    def sample(noise, text):
        return adavid.sample(averaged or models.student, noise, text, config, models.interpolator,
                             torch.Generator().manual_seed(args.seed))

    def sample_teacher(noise, text):
        return adavid.sample_teacher(
            models.teacher, noise, text, null_text, guidance_scale=config.guidance_scale,
            solver=codec_class(models.teacher.config).solver)

    state = {"student": models.student, "critic": models.critic, "cache": cache,
             "student_optimizer": student_optimizer, "critic_optimizer": critic_optimizer}
    state |= {"ema": averaged} if args.ema else {}
    metadata = {"method": "AVD", "avd": config.to_json(), "seed": str(args.seed)}
    metadata |= {"fps": str(data.fps)} if data.fps else {}
    interpolator = find_interpolator(args.model)
    about = {"config": asdict(models.student.config), "metadata": metadata,
             "interpolator": interpolator and str(interpolator.resolve())}
    motion = Motion()
    with Run(args, state, about) as run:
        note_changes(data, args.out)
        for cycle in run.steps():
            # Updates with batches of their own are numbered through the whole run. The student and
            # the first critic update of a cycle share one number.
            first = cycle * (1 if args.one_rollout else max(1, config.critic_updates))
            metrics, videos = update_student(
                models, student_optimizer, cache, load_batches(first), random_rollout_step(first),
                args.accumulate, null_text, config)
            if args.ema and math.isfinite(metrics["student_grad_norm"]):
                with torch.no_grad():
                    for p, q in zip(averaged.parameters(), models.student.parameters()):
                        p.lerp_(q, 1 - args.ema)

            critic_metrics = []
            for i in range(config.critic_updates):
                if i > 0 and not args.one_rollout:
                    videos = generate_videos(  # batch by batch, to save memory
                        models, load_batches(first + i), random_rollout_step(first + i), config)
                critic_metrics.append(update_critic(models.critic, critic_optimizer, videos,
                                                    args.accumulate, config))
            metrics |= mean_metrics(critic_metrics)

            if pictures and run.report_due(cycle):
                pictures.write_reference(args.out / "reference.json", sample_teacher)
            if pictures and run.picture_due(cycle):
                metrics |= pictures.write(run.picture(cycle), sample)
            metrics = run.log(cycle, metrics, fetch.waited)  # means over the ranks
            motion.watch(run, cycle, metrics)
            if rank() == 0 and run.report_due(cycle):
                from runtime.report import write_report  # matplotlib takes a second to import
                write_report(args.out)
            run.save(cycle)

    save_student(averaged or models.student, args.out, **about)


def update_student(models, optimizer, cache, batches, rollout_step, accumulate, null_text, config):
    """One update of the student (eq. 9). Returns its metrics, and its videos for the critic.

    rollout_step: the student's step at which its rollouts end.

    The videos are a list with (x0, text, generators) of each batch. The critic's update on them
    draws on from these generators.
    """
    batch_values, videos = defaultdict(list), []
    for real, text, generators in batches:
        noise = adavid.draw(torch.randn, real.shape, real, generators)
        x0 = adavid.backward_simulation(models.student, noise, text, rollout_step, config,
                                        models.interpolator, generators)
        loss, parts = adavid.matching_loss(x0, models.teacher, models.critic, text, null_text,
                                           config, generators)
        (loss / accumulate).backward()
        parts["loss"] = loss.detach()
        if config.lambda_reg:
            loss, reg_step, reg, weight = adavid.weighted_regression(
                models.student, cache, real, text, rollout_step, config, models.interpolator,
                generators)
            (loss / accumulate).backward()
            parts |= {"loss": parts["loss"] + loss.detach(), "reg_step": reg_step, "reg": reg,
                      "weight": weight}
        parts["data_variance"] = kernels.temporal_variance(real).mean()
        for name, value in parts.items():
            batch_values[name].append(value.view(-1))
        videos.append((x0.detach(), text, generators))
    values = {name: torch.cat(parts) for name, parts in batch_values.items()}

    metrics = {name: x.mean().item() for name, x in values.items() if name != "reg_step"}
    norm = clip_and_step(models.student, [optimizer], config.grad_clip, metrics["loss"])
    # The norm is nan if the update was skipped, as a number was not finite on some rank.
    if "reg" in values:
        if math.isfinite(norm):
            cache.update(values["reg_step"], values["reg"])
        metrics |= metrics_by_timestep(values, cache, config)
    return metrics | {"student_grad_norm": norm, "rollout_step": rollout_step}, videos


def metrics_by_timestep(values, cache, config):
    """The regression's metrics at each of the student's timesteps."""
    metrics = {}
    for i, t in enumerate(config.timesteps):
        at_step = values["reg_step"] == i
        if at_step.any():
            metrics[f"reg_{t:g}"] = values["reg"][at_step].mean().item()
            metrics[f"weight_{t:g}"] = values["weight"][at_step].mean().item()
        if at_step.sum() > 1:  # k times this is the spread of the sigmoid's input in eq. 7
            metrics[f"reg_std_{t:g}"] = values["reg"][at_step].std().item()
        metrics[f"cache_{t:g}"] = cache.means[i].item()
    return metrics


def update_critic(critic, optimizer, videos, accumulate, config):
    """One update of the critic on videos of the student. Returns its metrics."""
    loss = 0
    for x0, text, generators in videos:
        term = adavid.critic_loss(critic, x0, text, config, generators) / accumulate
        term.backward()
        loss += term.item()
    norm = clip_and_step(critic, [optimizer], config.grad_clip, loss)
    return {"critic": loss, "critic_grad_norm": norm}


def generate_videos(models, batches, rollout_step, config):
    """Yield new videos of the student, as (x0, text, generators) of each batch."""
    for real, text, generators in batches:
        with torch.no_grad():
            noise = adavid.draw(torch.randn, real.shape, real, generators)
            x0 = adavid.backward_simulation(models.student, noise, text, rollout_step, config,
                                            models.interpolator, generators)
        yield x0, text, generators


class Motion:
    """Warns if the student's videos have moved less than half as much as real ones for a while."""

    def __init__(self, window=20):
        self.shares = deque(maxlen=window)

    def watch(self, run, cycle, metrics):
        if None not in (metrics["variance"], metrics["data_variance"]):  # None: not finite
            self.shares.append(metrics["variance"] / max(metrics["data_variance"], 1e-9))
        share = sum(self.shares) / self.shares.maxlen
        if share < 0.5 and len(self.shares) == self.shares.maxlen:
            run.warn(f"step {cycle}: motion has fallen to {share:.0%} of the data's")
            self.shares.clear()


def check_flags(args, data, student_path):
    """ValueError unless the flags, the models and the data fit together."""
    check_fit(args.out, args.model, student_path, data)
    check_out(args.out, [args.codec])
    check_halves(f"{data}", data.latent_shape[1],
                 math.lcm(*args.avd.strides, *args.avd.train_strides))
    if args.lora and (args.ema or args.init_student):
        raise ValueError("--lora cannot be combined with --ema or --init-student")
    if args.avd.lambda_reg and not data.has_videos:
        raise ValueError(f"{args.data}: has no videos to learn from; use --lambda-reg 0 to train "
                         f"without them")


if __name__ == "__main__":
    sys.exit(main())
