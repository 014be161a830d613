"""What distilling or sampling a model will cost: FLOPs, memory and hours, before there is a GPU.

    python -m tools.plan distill --preset wan-14b --gpus 24
    python -m tools.plan distill --preset wan-1.3b --lora 64
    python -m tools.plan sample --preset wan-1.3b
    python -m tools.plan tables                             the README's two tables

Nothing is allocated, and nothing is measured: the very functions that training and sampling call
run on PyTorch's meta device, whose tensors have a shape but no content, and every matrix product
and every live byte is counted. One block is like another, so shallow models tell of deep ones.
"""

import math
import sys
import weakref
from dataclasses import dataclass, replace
from typing import Annotated, Literal
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import adavid
from tiny_wan import PRESETS, ToyCodec, WanCodec, WanModel
from tiny_wan.model import KEPT_PRECISE
from tools import cli
from tools.lora import adapted

AVD = adavid.AVDConfig()
CARDS = (16, 24, 32, 48, 80, 96, 141, 192)  # GB of the GPUs that there are
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL and fragmentation


@dataclass
class Plan:
    preset: Literal[tuple(PRESETS)] = "wan-1.3b"
    """architecture"""
    frames: int | None = None
    """of the video; by default 81 for Wan, and 9 for the toy"""
    height: int | None = None
    """in pixels; by default 480, and 16"""
    width: int | None = None
    """in pixels; by default 832, and 16"""
    batch_size: int = 1
    """videos at a time, on each GPU"""
    tflops: float = 989.0
    """the GPU's peak, dense, in bfloat16, in TFLOP/s: 989 for H100 and H200, 312 for A100"""
    utilisation: float = 0.4
    """share of that peak that is reached: an assumption, until you have measured yours"""


@dataclass
class Distill(Plan):
    """Training: the FLOPs of a cycle, the memory of each GPU, the hours of the whole recipe."""

    gpus: int = 1
    """how many, each with videos of its own"""
    lora: int = 0
    """rank of adapters to train on one shared, frozen base, in place of whole models"""
    accumulate: int = 1
    """batches whose gradients make one update"""
    videos: int = 150_000
    """real videos of the recipe, each seen once by the student's updates"""
    updates: int | None = None
    """of the student; by default as many as those videos need"""
    memory: float = 80.0
    """of each GPU, in GB"""


@dataclass
class Sample(Plan):
    """Sampling: the FLOPs and seconds of student and teacher, and the memory."""


@dataclass
class Tables:
    """Distillation of Wan2.1-1.3B and 14B on 1, 8 and 24 GPUs, in markdown."""


def main(argv=None):
    options = Annotated[Distill, tyro.conf.subcommand("distill")] | Annotated[
        Sample, tyro.conf.subcommand("sample")] | Annotated[
        Tables, tyro.conf.subcommand("tables")]
    programs = {Distill: plan_distill, Sample: plan_sample, Tables: tables}
    return cli.run(lambda args: programs[type(args)](args), options, argv)


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Counts FLOPs, by PyTorch's own formulas, and the bytes of meta tensors while they live.

    What was there before, such as weights, is not counted. (FlopCounterMode would do for the FLOPs,
    but it leaves reference cycles behind, which keep tensors alive.)
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if formula := flop_registry.get(op.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        made = self.storages(out)
        if not made.keys() <= self.alive:
            for key in made.keys() - self.alive - self.storages((args, kwargs)).keys():
                self.alive.add(key)
                self.bytes += made[key].nbytes()
                weakref.finalize(made[key], self.free, key, made[key].nbytes())
            self.peak = max(self.peak, self.bytes)
        return out

    def storages(self, tree):
        """Those of the meta tensors in `tree`, by identity: a view shares its base's."""
        storages = (t.untyped_storage() for t in tree_leaves(tree)
                    if isinstance(t, torch.Tensor) and t.is_meta)
        return {storage._cdata: storage for storage in storages}

    def free(self, key, size):
        self.alive.remove(key)
        self.bytes -= size


def flash_attention(q, k, v):
    """What a GPU runs: of the l x l scores it keeps one number a row, and no matrix.

    On the meta device PyTorch picks its plain attention, which saves that matrix for backward.
    FLOPs are 4 l l d forward, and 2.5 times that backward: flash attention scores anew.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def count(function):
    """Of `function()` and, if it returns a loss, its backward: `[FLOPs, kept bytes, peak bytes]`.

    Kept are those that are alive between forward and backward.
    """
    with mock.patch.object(F, "scaled_dot_product_attention", flash_attention), Meter() as meter:
        result = function()
        kept = meter.bytes
        if result.requires_grad:
            result.backward()
    return np.array([meter.flops, kept, meter.peak], dtype=float)


def at_full_depth(config, counted, depth=1):
    """What `counted(config)` would be, from models of `depth` and one more blocks: it is linear."""
    low, high = (counted(replace(config, num_layers=n)) for n in (depth, depth + 1))
    return low + (config.num_layers - depth) * (high - low)


def build(config):
    """A model as it computes on a GPU, in bfloat16 but for what Wan computes in float32."""
    with torch.device("meta"):
        model = WanModel(config).bfloat16()
    for name, p in model.named_parameters():
        if KEPT_PRECISE.search(name):
            p.data = p.data.float()
    return model


def inputs(config, shape, batch_size):
    """A batch of latents, and of text."""
    with torch.device("meta"):
        return (torch.empty(batch_size, *shape),
                torch.empty(batch_size, config.text_len, config.text_dim))


def count_cycle(config, shape, batch_size=1, lora=0):
    """A cycle on one GPU, without and with checkpointing: `[FLOPs, kept bytes, working bytes]`.

    The bytes are those of activations in the student's update. Kept for backward are those of its
    two graphs, of its own video and of the regression; a block's backward works in the others,
    counted in the critic's update, as in two graphs plain autograd, but not FSDP, hoards gradients.
    """
    def counted(config):
        if lora:
            base = build(config)
            with torch.device("meta"):
                teacher, student, critic = adapted(base, lora, ("student", "critic"))
            student.activate()
            learning = [base]
        else:
            teacher, student, critic = (build(config) for _ in range(3))
            teacher.requires_grad_(False)
            learning = [student, critic]
        for p in (p for model in learning for p in model.parameters() if p.requires_grad):
            # Weights' gradients are no activations; `memory` has them.
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        cache = adavid.LossMeanCache(len(AVD.timesteps)).to("meta")
        real, text = inputs(config, shape, batch_size)

        def rollout(step):
            with torch.no_grad():
                return count(lambda: adavid.backward_simulation(student, real, text, step, AVD))[0]

        # All steps are equally likely, and each adds one forward. The first is counted before any
        # memory is: it makes the RoPE table, which stays.
        first, last = rollout(0), rollout(len(AVD.timesteps) - 1)
        mean = (first + last) / 2
        costs = []
        for checkpointing in (False, True):
            for model in learning:
                model.gradient_checkpointing = checkpointing
            flops, kept, peak = count(lambda: adavid.critic_loss(critic, real, text, AVD))
            student_flops, student_kept, _ = count(lambda: adavid.student_loss(
                student, teacher, critic, cache, real, text, text, 0, AVD)[0])
            costs.append([AVD.critic_updates * (mean + flops) + mean - first + student_flops,
                          student_kept, peak - kept])
        return np.array(costs)

    # LoRA's backward ends within the first block, which is therefore unlike the others.
    return at_full_depth(config, counted, depth=2 if lora else 1)


def count_samplers(config, shape, batch_size=1):
    """FLOPs of a forward at full and at half rate, of the student's four steps at full rate and
    decoupled, of one guided step of the teacher; and bytes of a forward's activations."""
    def counted(config):
        model = build(config).requires_grad_(False)
        noise, text = inputs(config, shape, batch_size)
        with torch.device("meta"):
            t = torch.empty(batch_size)
            interpolator = adavid.FrameInterpolator(shape[0], width=32)  # as train.py makes it
        return np.array([
            count(lambda: model(noise, t, text))[0],
            count(lambda: model(noise[:, :, ::2], t, text, frame_stride=2))[0],
            count(lambda: adavid.sample(model, noise, text, AVD))[0],
            count(lambda: adavid.sample(model, noise, text, AVD, interpolator))[0],
            count(lambda: adavid.sample_teacher(model, noise, text, text, steps=1))[0],
            count(lambda: model(noise, t, text))[2]])

    return at_full_depth(config, counted)


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------


def memory(config, gpus=1, lora=0):
    """Bytes on each GPU, by component, of all but activations.

    Student and critic take turns: one's gradients are gone before the other's come.
    """
    model = build(config)
    total, block = parameters(model), parameters(model.blocks[0])
    if lora:
        adapter = config.num_layers * sum(p.numel() for p in adapted(
            build(replace(config, num_layers=1)), lora, ("student",))[1].parameters())
        return {"weights: one frozen base in bfloat16": sum(p.nbytes for p in model.parameters()),
                "weights: two adapters in float32": 2 * 4 * adapter,
                "gradients, float32": 4 * adapter,
                "optimiser: AdamW's two moments of two adapters": 2 * 8 * adapter}
    root = total - block * config.num_layers
    return {"weights: teacher, student, critic in float32, sharded": 3 * 4 * total / gpus,
            # One block is at work, the next one on its way; gradients leave in float32.
            "gathered in bfloat16: root, two blocks; a block's gradients": 2 * root + 10 * block,
            "gradients, float32, sharded": 4 * total / gpus,
            "optimiser: AdamW's two moments of two models, sharded": 2 * 8 * total / gpus}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def latent_shape(args):
    """Of the videos. ValueError where they do not fit, or where another flag is out of range."""
    for name in ("tflops", "utilisation", "gpus", "accumulate", "videos", "updates", "memory"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: must be above 0")
    if args.utilisation > 1:
        raise ValueError(f"--utilisation {args.utilisation}: must be at most 1")
    if getattr(args, "lora", 0) < 0:
        raise ValueError(f"--lora {args.lora}: must be a rank, or 0 to train whole models")
    codec = ToyCodec if args.preset == "tiny" else WanCodec
    # Called on the class, which has the sizes: an instance would open Wan's files.
    return codec.latent_shape(codec, args.frames, args.height, args.width, AVD.strides[0])


def introduce(args, config, shape):
    c, f, h, w = shape
    full, half = (len(range(0, f, stride)) * h * w // math.prod(config.patch_size)
                  for stride in (1, AVD.strides[0]))
    print(f"{args.preset}: {parameters(build(config)) / 1e9:.3f} billion parameters\n"
          f"a video: {c} x {f} x {h} x {w} latents, {full:,} tokens, {half:,} at half the "
          f"frame rate\nCounted, not measured on any GPU; seconds are those at "
          f"{args.utilisation:.0%} of {args.tflops:g} TFLOP/s.")


def seconds(args, flops):
    return flops / (args.tflops * 1e12 * args.utilisation)


def print_rows(title, rows):
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"{value:12,.3f}  {name}")


def plan_distill(args):
    config, shape = PRESETS[args.preset], latent_shape(args)
    (plain, *everything), (flops, *activations) = count_cycle(config, shape, args.batch_size,
                                                              args.lora)
    plain, flops = args.accumulate * plain, args.accumulate * flops
    parts = memory(config, args.gpus, args.lora) | {
        "activations, with checkpointing": sum(activations)}
    needed = sum(parts.values())
    updates = args.updates or -(-args.videos // (args.gpus * args.batch_size * args.accumulate))
    hours = updates * seconds(args, flops) / 3600

    introduce(args, config, shape)
    print_rows(
        f"PFLOPs of a cycle on each GPU: {AVD.critic_updates} updates of the critic, then one of "
        f"the student, each of {args.accumulate} x {args.batch_size} videos", {
            "forwards and backwards, over rollouts of every length": plain / 1e15,
            "again, as checkpointing recomputes each block in backward": (flops - plain) / 1e15,
            f"in all, {seconds(args, flops):,.1f} seconds": flops / 1e15})
    how = f"LoRA of rank {args.lora}" if args.lora else "whole models"
    fits = "fits" if needed <= USABLE * args.memory * 1e9 else "does not fit"
    print_rows(
        f"GB of memory on each of {args.gpus} GPUs, training {how}",
        {name: size / 1e9 for name, size in parts.items()}
        | {f"in all, which {fits} {args.memory:g} GB (of which {USABLE:.0%} are taken as usable)":
           needed / 1e9,
           "activations without checkpointing": sum(everything) / 1e9})
    seen = (f"{args.videos:,} real videos, each seen once by the student's updates: "
            if args.updates is None else "")
    print(f"\nThe recipe, on {args.gpus} GPUs\n  {seen}{updates:,} cycles\n  {hours:,.0f} hours, "
          f"{args.gpus * hours:,.0f} GPU hours; waiting for data or other GPUs is not counted")


def plan_sample(args):
    config, shape = PRESETS[args.preset], latent_shape(args)
    full, half, four, decoupled, guided, activations = count_samplers(
        config, shape, args.batch_size)
    introduce(args, config, shape)
    steps = len(AVD.timesteps)
    costs = {"one forward at the full frame rate": full,
             f"one at half the frame rate: {half / full:.2f} of it": half,
             f"student, {steps} steps at the full rate": four,
             f"student, {steps} decoupled steps: {decoupled / four:.3f} of that": decoupled,
             "teacher, 50 guided steps": 50 * guided}
    print_rows(f"PFLOPs for {args.batch_size} videos at a time", {
        f"{name}, {seconds(args, flops):,.2f} seconds": flops / 1e15
        for name, flops in costs.items()})
    weights = sum(p.nbytes for p in build(config).parameters())
    print_rows("GB of memory; text encoder and VAE are not in this", {
        "weights in bfloat16": weights / 1e9,
        "activations of a forward at their peak, roughly": activations / 1e9})


def tables(args):
    """Two markdown tables, for videos of Wan's own size and the flags' defaults."""
    for preset, name in (("wan-1.3b", "Wan2.1-1.3B"), ("wan-14b", "Wan2.1-14B")):
        print(f"\n| {name} | GPUs | GB on each | smallest card | PFLOPs of a cycle | hours |\n"
              "|---|---|---|---|---|---|")
        for lora, how in ((0, "whole models"), (64, "LoRA of rank 64")):
            args = Distill(preset, lora=lora)
            _, (flops, *activations) = count_cycle(PRESETS[preset], latent_shape(args), lora=lora)
            for gpus in (1, 8, 24):
                needed = sum(activations) + sum(memory(PRESETS[preset], gpus, lora).values())
                card = next((f"{gb} GB" for gb in CARDS if needed <= USABLE * gb * 1e9), "none")
                hours = args.videos / gpus * seconds(args, flops) / 3600
                print(f"| {how} | {gpus} | {needed / 1e9:.1f} | {card} | {flops / 1e15:.1f} "
                      f"| {hours:,.0f} |")


if __name__ == "__main__":
    sys.exit(main())
