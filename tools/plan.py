"""What distilling or sampling a model will cost, in FLOPs, memory and hours, before there is a GPU.

    python -m tools.plan distill --preset wan-14b --gpus 24
    python -m tools.plan distill --preset wan-1.3b --lora 64
    python -m tools.plan sample --preset wan-1.3b
    python -m tools.plan tables                             the README's two

Nothing is allocated, and nothing is measured: the very functions that training and sampling call
run on PyTorch's meta device, whose tensors have a shape and no content, while every matrix product
and every live byte is counted. One block is like another: shallow models tell of deep ones.
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
from runtime import cli
from runtime.lora import add_adapters

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
    one_rollout: bool = False
    """as train.py's: all critic updates of a cycle learn from the student update's videos"""
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
        new = self.storages(out)
        if new.keys() - self.alive:
            for key in new.keys() - self.alive - self.storages((args, kwargs)).keys():
                self.alive.add(key)
                self.bytes += new[key].nbytes()
                weakref.finalize(new[key], self.free, key, new[key].nbytes())
            self.peak = max(self.peak, self.bytes)
        return out

    def storages(self, tree):
        """Of the meta tensors in `tree`, by identity: a view shares its base's."""
        storages = (t.untyped_storage() for t in tree_leaves(tree)
                    if isinstance(t, torch.Tensor) and t.is_meta)
        return {storage._cdata: storage for storage in storages}

    def free(self, key, size):
        self.alive.remove(key)
        self.bytes -= size


def flash_attention(q, k, v):
    """What GPUs run. Of the l x l scores, it keeps no more than a number for each row.

    On the meta device PyTorch would take its plain attention, which saves that matrix for backward.
    FLOPs are 4 l l d forward, and 2.5 times that backward, where scores are computed again.
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
    """What `counted(config)` would be, from `depth` and one more blocks: each adds the same."""
    low, high = (counted(replace(config, num_layers=n)) for n in (depth, depth + 1))
    return low + (config.num_layers - depth) * (high - low)


def build(config):
    """A model as it computes on a GPU: in bfloat16, but for what Wan computes in float32."""
    with torch.device("meta"):
        model = WanModel(config).bfloat16()
    for name, p in model.named_parameters():
        if KEPT_PRECISE.search(name):
            p.data = p.data.float()
    return model


def inputs(config, shape, batch_size):
    """Latents and text."""
    with torch.device("meta"):
        return (torch.empty(batch_size, *shape),
                torch.empty(batch_size, config.text_len, config.text_dim))


def count_cycle(config, shape, batch_size=1, lora=0, one_rollout=False):
    """A cycle on one GPU, without and with checkpointing: `[FLOPs, kept bytes, working bytes]`.

    Kept for backward is what the larger of the student's two graphs needs, one after the other in
    memory; what backward works in comes on top. This is a little too much on the meta device, where
    RMSNorm is several operations, on GPUs one.
    """
    def counted(config):
        if lora:
            base = build(config)
            with torch.device("meta"):
                teacher, student, critic = add_adapters(base, lora, ("student", "critic"))
            student.activate()
            learning = [base]
        else:
            teacher, student, critic = (build(config) for _ in range(3))
            teacher.requires_grad_(False)
            learning = [student, critic]
        for p in (p for model in learning for p in model.parameters() if p.requires_grad):
            # Gradients of weights are no activations; `memory` has them.
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        cache = adavid.LossMeanCache(len(AVD.timesteps)).to("meta")
        real, text = inputs(config, shape, batch_size)

        # Rollouts to each of the steps are equally likely, and each step adds one forward. They are
        # counted before memory is, as the first forward makes the RoPE table, which stays.
        with torch.no_grad():
            first, last = (count(lambda: adavid.backward_simulation(
                student, real, text, step, AVD))[0] for step in (0, len(AVD.timesteps) - 1))
        rollout = (first + last) / 2
        costs = []
        for checkpointing in (False, True):
            for model in learning:
                model.gradient_checkpointing = checkpointing
            critic_flops, kept, peak = count(
                lambda: adavid.critic_loss(critic, real, text, AVD))
            terms = adavid.student_losses(
                student, teacher, critic, cache, real, text, text, 0, AVD)
            matching, regression = (count(lambda: next(terms)[0]) for _ in range(2))
            rollouts = 1 if one_rollout else AVD.critic_updates  # the student's own is one of them
            flops = (AVD.critic_updates * critic_flops + rollouts * rollout - first
                     + matching[0] + regression[0])
            costs.append([flops, max(matching[1], regression[1]), peak - kept])
        return np.array(costs)

    # LoRA's backward ends within the first block, which is therefore unlike the others.
    return at_full_depth(config, counted, depth=2 if lora else 1)


def count_samplers(config, shape, batch_size=1):
    """FLOPs of six things that samplers do, and the peak bytes of activations of a forward."""
    def counted(config):
        model = build(config).requires_grad_(False)
        noise, text = inputs(config, shape, batch_size)
        with torch.device("meta"):
            t = torch.empty(batch_size)
            interpolator = adavid.FrameInterpolator(shape[0], width=32)  # train.py's default
        costs = [count(function) for function in (
            lambda: adavid.sample(model, noise, text, AVD, interpolator),
            lambda: adavid.sample(model, noise, text, AVD),
            lambda: adavid.sample_teacher(model, noise, text, text, steps=1),
            lambda: model(noise[:, :, ::2], t, text, frame_stride=2),
            lambda: model(noise, t, text))]
        return np.array([flops for flops, _, _ in costs] + [costs[-1][2]])

    return at_full_depth(config, counted)


def memory(config, gpus=1, lora=0):
    """Bytes on each GPU of all but activations, by component.

    Student and critic take turns: the gradients of one are gone before the other's come.
    """
    model = build(config)
    total, block = parameters(model), parameters(model.blocks[0])
    if lora:
        adapter = config.num_layers * sum(p.numel() for p in add_adapters(
            build(replace(config, num_layers=1)), lora, ("student",))[1].parameters())
        return {"weights: one frozen base, bfloat16": sum(p.nbytes for p in model.parameters()),
                "weights: two adapters, float32": 2 * 4 * adapter,
                "gradients of one adapter, float32": 4 * adapter,
                "optimiser: AdamW's two moments for two adapters": 2 * 8 * adapter}
    root = total - block * config.num_layers
    return {"weights: teacher, student, critic, float32, sharded": 3 * 4 * total / gpus,
            "gradients of one model, float32, sharded": 4 * total / gpus,
            "optimiser: AdamW's two moments for two models, sharded": 2 * 8 * total / gpus,
            # One block is at work and the next on its way; gradients go to their shards in float32.
            "unsharded: root, two blocks, a block's gradients": 2 * root + 4 * block + 6 * block}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------


def latent_shape(args):
    """Of a video. ValueError where its sizes do not fit, or where another flag is out of range."""
    for name in ("tflops", "utilisation", "gpus", "accumulate", "videos", "updates", "memory"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: must be above 0")
    if args.utilisation > 1:
        raise ValueError(f"--utilisation {args.utilisation}: must be at most 1")
    if getattr(args, "lora", 0) < 0:
        raise ValueError(f"--lora {args.lora}: must be a rank, or 0 for whole models")
    codec = ToyCodec if args.preset == "tiny" else WanCodec
    # Asked of the class, which has the sizes: an instance would open Wan's files.
    return codec.latent_shape(codec, args.frames, args.height, args.width, AVD.strides[0])


def seconds(args, flops):
    return flops / (args.tflops * 1e12 * args.utilisation)


def introduce(args, config, shape):
    c, f, h, w = shape
    full, half = (len(range(0, f, stride)) * h * w // math.prod(config.patch_size)
                  for stride in (1, AVD.strides[0]))
    print(f"{args.preset}, {parameters(build(config)) / 1e9:.3f} billion parameters\n"
          f"a video: {c} x {f} x {h} x {w} latents, {full:,} tokens, {half:,} at half the frame "
          f"rate\nCounted, not measured on a GPU; times are for {args.utilisation:.0%} of "
          f"{args.tflops:g} TFLOP/s.")


def plural(number, thing):
    return f"{number:,} {thing}{'s' * (number != 1)}"


def print_rows(title, rows):
    print(f"\n{title}")
    for name, value in rows.items():
        digits = np.format_float_positional(value, 4, fractional=False, trim="-")
        print(f"{digits:>12}  {name}")


def plan_distill(args):
    config, shape = PRESETS[args.preset], latent_shape(args)
    (plain, *all_activations), (flops, kept, working) = count_cycle(
        config, shape, args.batch_size, args.lora, args.one_rollout)
    plain, flops = args.accumulate * plain, args.accumulate * flops
    parts = memory(config, args.gpus, args.lora) | {
        "activations kept for backward: inputs of blocks": kept,
        "activations of the block that backward is in, recomputed": working}
    needed = sum(parts.values())
    fit = "fits" if needed <= USABLE * args.memory * 1e9 else "does not fit"
    updates = args.updates or -(-args.videos // (args.gpus * args.batch_size * args.accumulate))
    hours = updates * seconds(args, flops) / 3600
    gpus, videos = plural(args.gpus, "GPU"), args.accumulate * args.batch_size
    trained = f"adapters of rank {args.lora}" if args.lora else f"whole models over {gpus}"
    seen = "" if args.updates else f"{args.videos:,} videos, each seen once by the student: "

    introduce(args, config, shape)
    print_rows(
        f"PFLOPs on each GPU in a cycle of 1 student update and {AVD.critic_updates} critic "
        f"updates, each of {plural(videos, 'video')}",
        {"forwards and backwards": plain / 1e15,
         "blocks recomputed in backward (activation checkpointing)": (flops - plain) / 1e15,
         f"in all: {seconds(args, flops):,.1f} seconds": flops / 1e15})
    print_rows(
        f"GB of memory on each GPU, training {trained}",
        {name: size / 1e9 for name, size in parts.items()}
        | {f"in all: {fit} {args.memory:g} GB, with {1 - USABLE:.0%} left to CUDA": needed / 1e9,
           "activations without checkpointing": sum(all_activations) / 1e9})
    print(f"\n{seen}{plural(updates, 'cycle')}\n"
          f"{hours:12,.0f}  hours on {gpus}, if none waits for data or another GPU\n"
          f"{args.gpus * hours:12,.0f}  GPU hours")


def plan_sample(args):
    config, shape = PRESETS[args.preset], latent_shape(args)
    decoupled, four, guided, half, full, activations = count_samplers(
        config, shape, args.batch_size)
    introduce(args, config, shape)
    steps = len(AVD.timesteps)
    rows = {"a forward at the full frame rate": full,
            f"a forward at half the frame rate, {half / full:.2f} of that": half,
            f"student, {steps} steps at the full rate": four,
            f"student, {steps} decoupled steps, {decoupled / four:.3f} of that": decoupled,
            "teacher, 50 guided steps": 50 * guided}
    print_rows(f"PFLOPs for {plural(args.batch_size, 'video')}", {
        f"{name}: {seconds(args, flops):,.3g} seconds": flops / 1e15
        for name, flops in rows.items()})
    print_rows("GB of memory, beside the text encoder and the VAE", {
        "weights, bfloat16": sum(p.nbytes for p in build(config).parameters()) / 1e9,
        "activations of a forward at their peak (an estimate)": activations / 1e9})


def tables(_):
    """Videos of Wan's own size, and the paper's 24 of them in each update."""
    for preset, name in (("wan-1.3b", "Wan2.1-1.3B"), ("wan-14b", "Wan2.1-14B")):
        print(f"\n| {name} | GPUs | GB on each | smallest card | PFLOPs of a cycle, on each "
              "| hours |\n|---|---|---|---|---|---|")
        for lora, how in ((0, "whole models"), (64, "LoRA, rank 64")):
            args = Distill(preset, lora=lora)
            _, (flops, *activations) = count_cycle(PRESETS[preset], latent_shape(args), lora=lora)
            for gpus in (1, 8, 24):
                needed = sum(memory(PRESETS[preset], gpus, lora).values()) + sum(activations)
                card = next((f"{gb} GB" for gb in CARDS if needed <= USABLE * gb * 1e9), "none")
                cycle = 24 // gpus * flops
                hours = args.videos / 24 * seconds(args, cycle) / 3600
                print(f"| {how} | {gpus} | {needed / 1e9:.1f} | {card} | {cycle / 1e15:,.0f} "
                      f"| {hours:,.0f} |")


if __name__ == "__main__":
    sys.exit(main())
