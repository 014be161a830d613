"""Does it work on your GPU, and how fast?

    make gpu-check                              the toy and the kernels: two minutes
    python -m tools.gpu_check --wan             and a Wan2.1-1.3B of random weights: seven minutes
    make gpu-check DIR=Wan2.1-T2V-1.3B          and the real weights: 20 minutes on a card of 24 GB

Prints one block to paste, each stage's lines as it ends. A stage that does not fit the card, or
needs a package that is not there, is skipped; one that fails says why, and the others go on.
"""

import functools
import gc
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import adavid
import kernels
import train
from adavid import Positive
from runtime import cli
from runtime.distributed import apply_fsdp
from runtime.lora import FILE as LORA_FILE
from runtime.lora import add_adapters
from runtime.models import Models
from runtime.run import adamw, make_generators
from tiny_wan import PRESETS, WanCodec, WanConfig, WanModel, open_codec
from tiny_wan.codec import empty_cache, is_out_of_memory
from tiny_wan.model import KEPT_PRECISE
from tools import costs, plan

ROOT = Path(__file__).parents[1]
PROMPTS = ("A red kite flies over a beach, waves roll in", "A cat walks on the grass, realistic")
AVD = adavid.AVDConfig()


@dataclass
class Check:
    """Test and time the project on this machine's GPU. Prints one block to paste."""

    wan: bool = False
    """also time a Wan2.1 of random weights, made on the card, at 81 frames of 480 x 832"""
    model: Path | None = None
    """also run every command of docs/wan.md with the real Wan2.1 in this folder"""
    only: tuple[str, ...] = ()
    """names of the stages to run; by default all of them"""
    out: Path | None = None
    """folder for all that is written, 12 GB with --model; by default a temporary one, and
    runs/gpu-check with --model"""
    preset: Literal[tuple(PRESETS)] = "wan-1.3b"
    """with --wan: the architecture"""
    frames: cli.Size | None = None
    """frames of Wan's videos; by default 81 with --wan, and 33 with --model"""
    height: cli.Size = 480
    """in pixels"""
    width: cli.Size = 832
    """in pixels"""
    steps: cli.Count = 8
    """with --model: guided steps of the teacher"""
    tflops: Positive = 989.0
    """the card's dense bfloat16 peak in TFLOP/s, of which the planned times assume 40%: 989 for an
    H100 or H200, 165 for an RTX 4090"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""


class Skipped(Exception):
    """A stage that this machine cannot run, and why."""


def main(argv=None):
    return cli.run(run, Check, argv)


def run(args):
    device = cli.pick_device(args.device)
    if device.type == "cpu" and args.device == "auto":
        raise ValueError(f"torch finds no GPU ({cli.why_no_gpu() or 'there seems to be none'}); "
                         f"--device cpu runs the check without one, slowly")
    stages = TOY | (WAN if args.wan else {}) | (REAL if args.model else {})
    if unknown := set(args.only) - stages.keys():
        raise ValueError(f"--only {sorted(unknown)[0]}: choose from {', '.join(stages)}")
    if args.model:
        WanConfig.from_pretrained(args.model)  # raises if it cannot be read
        args.out = args.out or Path("runs/gpu-check")
    with tempfile.TemporaryDirectory() as folder:
        args.out = args.out or Path(folder)
        args.out.mkdir(parents=True, exist_ok=True)
        print("```", introduce(device), sep="\n", flush=True)
        results = [run_stage(name, stages[name], args, device)
                   for name in args.only or stages]
        print("```")
    return int(not all(results))


def introduce(device):
    """A line: the card and the versions."""
    triton = "no triton"
    if kernels.import_error is None:
        triton = f"triton {importlib.metadata.version('triton')}"
    card = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return f"{card}, torch {torch.__version__}, {triton}, {platform.system()}"


def run_stage(name, stage, args, device):
    """Print a stage's result. Returns whether it did not fail."""
    began, good = time.perf_counter(), True
    with card_memory(device) as used:
        try:
            lines = list(stage(args, device))
        except Skipped as why:
            lines = [f"skipped: {why}"]
        except ModuleNotFoundError as error:
            lines = [f"skipped: {error.name} is not installed"]
        except Exception as error:  # the other stages' results are worth having
            if good := is_out_of_memory(error):
                lines = ["skipped: it does not fit the card's memory"]
            else:
                *_, last = ["", *str(error).strip().splitlines()]
                lines = [f"FAILED: {type(error).__name__}: {last}"]
    gc.collect()
    empty_cache()
    memory = f", {max(used) / 1e9:.1f} GB of the card in use" if used else ""
    print(f"{name}: {time.perf_counter() - began:.0f} s{memory}",
          *(f"  {line}" for line in lines), sep="\n", flush=True)
    return good


@contextmanager
def card_memory(device):
    """Yields a list that grows by the bytes of the card in use, by any process, now and then."""
    used, done = [], threading.Event()

    def watch():
        while not done.wait(0.2):
            free, total = torch.cuda.mem_get_info()
            used.append(total - free)

    thread = threading.Thread(target=watch) if device.type == "cuda" else None
    if thread:
        thread.start()
    try:
        yield used
    finally:
        done.set()
        if thread:
            thread.join()


def python(words, log):
    """Run a command of the project -> its seconds and its lines, which also go to the file `log`.

    ChildProcessError with the last line if it fails.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True,
                          encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log.write_text(done.stdout, encoding="utf-8")
    lines = done.stdout.splitlines() or ["no output"]
    if done.returncode:
        raise ChildProcessError(f"python {' '.join(map(str, words[:3]))}: {lines[-1]}")
    return time.perf_counter() - began, lines


# ---------------------------------------------------------------------------------------------
# The toy and the kernels
# ---------------------------------------------------------------------------------------------


def check_kernels(args, device):
    """The kernels' tests. On the CPU they run in Triton's interpreter."""
    if kernels.import_error:
        raise Skipped(kernels.reason(kernels.import_error))
    _, lines = python(["-m", "pytest", "-q", "tests/test_kernels.py"], args.out / "kernels.log")
    yield lines[-1]


def time_kernels(args, device):
    if device.type != "cuda" or kernels.import_error:
        raise Skipped("the kernels need a GPU with Triton")
    from kernels import bench

    for row in bench.time_all():
        yield " ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value)
                       for key, value in row.items())


def distil_toy(args, device):
    """Ten cycles in both dtypes, and the first beside the CPU's."""
    curves = {}
    for where, dtype in ((device.type, "float32"), (device.type, "bfloat16"), ("cpu", "float32")):
        if (where, dtype) in curves:  # on the CPU
            continue
        out = args.out / f"toy-{where}-{dtype}"
        seconds, _ = python(["train.py", "distill", "--out", out, "--steps", 10, "--batch-size", 8,
                             "--device", where, "--dtype", dtype], args.out / f"{out.name}.log")
        curve = curves[where, dtype] = [step["critic"] for step in read_lines(out, "metrics")]
        times = [step["seconds"] for step in read_lines(out, "times")]
        yield (f"{where}, {dtype}: {seconds:.0f} s in all, {np.median(times):.3f} s a cycle; "
               f"critic {' '.join(f'{value:.4f}' for value in curve)}")
    pairs = zip(curves[device.type, "float32"], curves["cpu", "float32"])
    yield f"critic, here beside the CPU: {max(abs(a / b - 1) for a, b in pairs):.2g} apart at most"


def read_lines(folder, name):
    return map(json.loads, (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())


def sample_toy(args, device):
    _, lines = python(["sample.py", "a red ball moving left fast above a blue ball", "--device",
                       device.type, "--out", args.out / "toy"], args.out / "toy.log")
    yield lines[-2]  # the seconds of its parts


# ---------------------------------------------------------------------------------------------
# Wan2.1 of random weights
# ---------------------------------------------------------------------------------------------


def wan_inputs(args, device):
    """Architecture, latent shape, noise and text of a video."""
    config = PRESETS[args.preset]
    shape = WanCodec.latent_shape(WanCodec, args.frames or 81, args.height, args.width, 2)
    shape = (config.in_dim, *shape[1:])
    return (config, shape, torch.randn(1, *shape, device=device),
            torch.randn(1, config.text_len, config.text_dim, device=device))


def fits(needed, device):
    """Skipped if the card has less memory than planned."""
    if device.type == "cuda" and needed > (total := torch.cuda.mem_get_info()[1]):
        raise Skipped(f"it needs {needed / 1e9:.0f} GB, and the card has {total / 1e9:.0f}")


def random_model(config, device, dtype):
    """A model with random weights on the device, in `dtype` but for what Wan has in float32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanModel(config)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p.data, std=0.02)
        p.data = p.data.to(torch.float32 if KEPT_PRECISE.search(name) else dtype)
    return model.requires_grad_(False)


def computing_dtype(device):
    return cli.pick_dtype("auto", device, PRESETS["wan-1.3b"]) or torch.float32


def seconds_of(function, device, runs=2):
    """The least seconds of a call, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def planned(args, flops):
    return flops / (args.tflops * 1e12 * 0.4)


@torch.no_grad()
def sample_wan(args, device):
    """A forward, the four steps at both rates, and the teacher's guided step."""
    config, shape, noise, text = wan_inputs(args, device)
    fits(1.2 * (2 * plan.parameters(plan.build(config)) + costs.forward_activations(config, shape)),
         device)
    model = random_model(config, device, computing_dtype(device))
    interpolator = adavid.FrameInterpolator(config.in_dim).to(device)
    t = torch.tensor([757.0], device=device)
    flops = [costs.forward_flops(config, shape, stride) for stride in (1, *AVD.strides)]
    forward, share = planned(args, flops[0]), sum(flops[1:]) / (len(AVD.strides) * flops[0])
    eager = seconds_of(lambda: model(noise, t, text), device)
    yield f"a forward: {eager:.3g} s (planned {forward:.3g})"
    full, half = (seconds_of(functools.partial(adavid.sample, model, noise, text, AVD, filler),
                             device, runs=1) for filler in (None, interpolator))
    yield (f"four steps: {full:.3g} s at the full rate (planned {4 * forward:.3g}), {half:.3g} s "
           f"at half rate, {half / full:.3f} of it (planned {share:.3f})")
    guided = seconds_of(lambda: adavid.guided_velocity(model, noise, t, text, text, 5.0), device, 1)
    yield f"the teacher's 50 guided steps: {50 * guided:.3g} s (planned {100 * forward:.3g})"
    for block in model.blocks:  # as sample.py --compile does
        block.compile()
    began = time.perf_counter()
    compiled = seconds_of(lambda: model(noise, t, text), device)
    yield f"a forward, compiled: {compiled:.3g} s, after {time.perf_counter() - began:.0f} s"


def random_vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan()


@torch.no_grad()
def decode_wan(args, device):
    _, shape, *_ = wan_inputs(args, device)
    latents = torch.randn(1, WanCodec.latent_shape(WanCodec)[0], *shape[1:], device=device)
    vae = random_vae().to(device)
    for dtype, size, peak in ((torch.float32, 4, costs.TF32), (torch.bfloat16, 2, 1)):
        vae.to(dtype)
        seconds = seconds_of(lambda: vae.decode(latents.to(dtype)), device, runs=1)  # noqa: B023
        yield (f"the VAE decodes in {str(dtype).removeprefix('torch.')}: {seconds:.3g} s (planned "
               f"{planned(args, costs.vae_flops('decode', shape)) / peak:.3g}, and "
               f"{size * costs.vae_activations(shape) / 1e9:.1f} GB)")


def train_lora(args, device):
    config, shape, *_ = wan_inputs(args, device)
    yield from plan_cycle(args, device, 16)
    base = random_model(config, device, computing_dtype(device))
    base.gradient_checkpointing = True
    models = Models(*add_adapters(base, 16, ("student", "critic")), None)
    yield time_cycle(args, device, models)


def train_whole(args, device):
    config, *_ = wan_inputs(args, device)
    yield from plan_cycle(args, device, 0)

    def trainable():
        model = random_model(config, device, torch.float32)
        model.gradient_checkpointing = True
        dtype = computing_dtype(device)
        return apply_fsdp(model, device, None if dtype == torch.float32 else dtype)

    teacher, student, critic = trainable(), trainable(), trainable()
    yield time_cycle(args, device, Models(teacher, student.requires_grad_(),
                                          critic.requires_grad_(), None))


def plan_cycle(args, device, lora):
    """A line with what `tools.plan` says of a cycle. Skipped if that does not fit."""
    config, shape, *_ = wan_inputs(args, device)
    needed = sum(plan.memory(config, lora=lora).values()) + plan.cycle_activations(
        config, shape, lora)[1]
    fits(needed, device)
    yield (f"planned: {planned(args, plan.cycle_flops(config, shape, lora)):.3g} s, "
           f"{needed / 1e9:.1f} GB")


def time_cycle(args, device, models):
    """A line: the seconds and the memory of a training cycle on one random video.

    Its five rollouts end at steps 3, 1, 2, 3 and 4, of which the mean is near the usual 2.5.
    """
    _, shape, real, text = wan_inputs(args, device)
    cache = adavid.LossMeanCache(len(AVD.timesteps)).to(device)
    student, critic = (adamw(model, AVD.lr, AVD) for model in (models.student, models.critic))

    def batches():
        return [(real, text, make_generators(0, "check", [0]))]

    def cycle():
        metrics, videos = train.update_student(models, student, cache, batches(), 2, 1, text, AVD)
        for step in (None, 0, 1, 2, 3):
            if step is not None:
                videos = train.generate_videos(models, batches(), step, AVD)
            metrics |= train.update_critic(models.critic, critic, videos, 1, AVD)
        return metrics

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cycle()  # the first allocates the optimizers' state
    began = time.perf_counter()
    metrics = cycle()
    synchronize(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return (f"measured: {seconds:.3g} s, {peak:.1f} GB; loss {metrics['loss']:.3g}, "
            f"critic {metrics['critic']:.3g}")


# ---------------------------------------------------------------------------------------------
# The real Wan2.1: the commands of docs/wan.md at a small size
# ---------------------------------------------------------------------------------------------


def real(name):
    """The stage that runs a command with the real weights, beside its planned minutes."""
    def stage(args, device):
        if name == "merge":  # an earlier one, as exports replace nothing
            shutil.rmtree(args.out / "merged", ignore_errors=True)
        seconds, lines = python(real_commands(args, device)[name], args.out / f"{name}.log")
        parts = real_plan(args).get(name, {})
        yield f"{seconds / 60:.1f} min ({sum(parts.values()) / 60:.1f} planned, without loading)"
        if parts and name in ("teacher", "student"):
            yield f"took {lines[-2]}"
            yield "planned " + ", ".join(f"{part}: {time:.1f} s" for part, time in parts.items())
        if name == "teacher":
            yield compare(args, device)
        if name == "distil":
            for step in read_lines(args.out / "lora", "metrics"):
                yield ", ".join(f"{key} {step[key]:.3g}" for key in (
                    "loss", "dmd", "reg", "weight", "variance", "data_variance", "critic",
                    "student_grad_norm", "critic_grad_norm") if step.get(key) is not None)
        if name == "student":
            sheets = [iio.imread(args.out / run / "contact_sheet.png")
                      for run in ("teacher", "student")]
            iio.imwrite(args.out / "contact_sheet.png", np.concatenate(sheets))
            yield f"{args.out / 'contact_sheet.png'}: the teacher's videos, and the student's"
    return stage


def real_commands(args, device):
    out, model = args.out, args.model
    size = ["--frames", args.frames or 33, "--height", args.height, "--width", args.width]
    where = ["--device", device.type]
    return {
        "teacher": ["sample.py", *PROMPTS, "--model", model, "--codec", model, "--teacher",
                    "--steps", args.steps, *size, *where, "--save-latents",
                    "--out", out / "teacher"],
        "encode": ["-m", "tools.encode", "--videos", out / "teacher", "--captions",
                   out / "teacher" / "captions.jsonl", "--model", model, *size, *where,
                   "--out", out / "shards"],
        "distil": ["train.py", "distill", "--model", model, "--codec", model, "--data",
                   out / "shards", "--lora", 16, "--batch-size", 1, "--steps", 3, *where,
                   "--out", out / "lora"],
        "merge": ["-m", "tools.export", "--model", model, "--lora", out / "lora" / LORA_FILE,
                  "--layout", "original", "--dtype", "float32", "--out", out / "merged"],
        "student": ["sample.py", *PROMPTS, "--model", out / "merged", "--codec", model, *size,
                    *where, "--out", out / "student"]}


def real_plan(args):
    """Seconds of each stage's parts, which have sample.py's names."""
    config = WanConfig.from_pretrained(args.model)
    shape = WanCodec.latent_shape(WanCodec, args.frames or 33, args.height, args.width, 2)
    forward, text, encode, decode = (planned(args, flops) for flops in (
        costs.forward_flops(config, shape), costs.text_encoder_flops(),
        costs.vae_flops("encode", shape) / costs.TF32,
        costs.vae_flops("decode", shape) / costs.TF32))
    videos = len(PROMPTS)
    text *= videos + 1  # the negative prompt
    return {
        "teacher": {"encode prompts": text, "denoise": videos * 2 * args.steps * forward,
                    "decode and write": videos * decode},
        "encode": {"encode prompts": text, "encode videos": videos * encode},
        "distil": {"cycles": 3 * planned(args, plan.cycle_flops(config, shape, 16))},
        "student": {"encode prompts": text, "denoise": videos * 4 * forward,
                    "decode and write": videos * decode}}


@torch.no_grad()
def compare(args, device):
    """A line: the teacher's latents of the first prompt beside those of diffusers' pipeline."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    ours = load_file(args.out / "teacher" / "latents.safetensors")["latents"][:1]
    config = WanConfig.from_pretrained(args.model)
    dtype = cli.pick_dtype("auto", device, config)
    codec = open_codec(args.model, config, device=device, dtype=dtype)
    dtype = dtype or torch.float32
    text = codec.encode_text([PROMPTS[0], codec.negative_prompt])
    text = F.pad(text, (0, 0, 0, config.text_len - text.shape[1]))  # as the pipeline would
    model = WanModel.from_pretrained(args.model, dtype)
    model.save_pretrained(args.out / "diffusers", "diffusers")
    theirs = WanTransformer3DModel.from_pretrained(args.out / "diffusers", torch_dtype=dtype)
    del model
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=theirs.to(device),
                       scheduler=UniPCMultistepScheduler(
                           prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0))
    latents = pipe(
        prompt_embeds=text[:1].to(device, dtype), negative_prompt_embeds=text[1:].to(device, dtype),
        num_frames=args.frames or 33, height=args.height, width=args.width, guidance_scale=5.0,
        num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0),
        output_type="latent").frames.float().cpu()
    return (f"latents beside WanPipeline's: {(ours - latents).norm() / latents.norm():.2g} "
            f"relative error, {(ours - latents).abs().max():.2g} at most")


TOY = {"kernels": check_kernels, "speed": time_kernels, "toy": distil_toy, "video": sample_toy}
WAN = {"sampling": sample_wan, "vae": decode_wan, "lora": train_lora, "whole": train_whole}
REAL = {name: real(name) for name in ("teacher", "encode", "distil", "merge", "student")}

if __name__ == "__main__":
    sys.exit(main())
