"""Does it work with the real Wan2.1 on your GPU, and what does it take? No videos are needed.

    make wan-check DIR=Wan2.1-T2V-1.3B            (python -m tools.wan_check --model ...)

Meant for a card of 24 GB, where it takes about 20 minutes. The stages are the commands of
docs/wan.md at a small size: the teacher, its latents beside those of diffusers' WanPipeline, its
videos encoded, three cycles of LoRA on them, the student merged, reloaded and sampled, and the
kernels' tests and times. It prints one block to paste, and keeps all pictures in --out.
"""

import gc
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from adavid import Positive
from runtime import cli
from tiny_wan import WanCodec, WanConfig, WanModel, open_codec
from tiny_wan.codec import empty_cache
from tools import costs

ROOT = Path(__file__).parents[1]
PROMPTS = ("A red kite flies over a beach, waves roll in", "A cat walks on the grass, realistic")


@dataclass
class WanCheck:
    """Run every stage from the teacher to a sampled student, and print one block to paste."""

    model: Path
    """Wan2.1, in the original or in Diffusers' layout, with its text encoder and VAE"""
    out: Path = Path("runs/wan-check")
    """folder for everything that is written: about 12 GB for 1.3B"""
    frames: cli.Size = 33
    """frames of each video"""
    height: cli.Size = 480
    """in pixels"""
    width: cli.Size = 832
    """in pixels"""
    steps: cli.Count = 8
    """guided steps of the teacher"""
    tflops: Positive = 165.0
    """the card's dense bfloat16 peak in TFLOP/s, for the planned minutes: 165 for an RTX 4090"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to run"""


def main(argv=None):
    return cli.run(run, WanCheck, argv)


def run(args):
    device, out = cli.pick_device(args.device), args.out
    config = WanConfig.from_pretrained(args.model)
    cli.announce(device, cli.pick_dtype("auto", device, config), args.device)
    size = ["--frames", args.frames, "--height", args.height, "--width", args.width]
    where = ["--device", device.type]
    teacher = ["--model", args.model, "--codec", args.model, "--teacher", "--steps", args.steps]
    stages = {
        "teacher": ["sample.py", *PROMPTS, *teacher, *size, *where, "--save-latents",
                    "--out", out / "teacher"],
        "encode": ["-m", "tools.encode", "--videos", out / "teacher", "--captions",
                   out / "teacher" / "captions.jsonl", "--model", args.model, *size, *where,
                   "--out", out / "shards"],
        "distil": ["train.py", "distill", "--model", args.model, "--codec", args.model, "--data",
                   out / "shards", "--lora", 16, "--batch-size", 1, "--steps", 3, *where,
                   "--out", out / "lora"],
        "merge": ["-m", "tools.export", "--model", args.model, "--lora",
                  out / "lora" / "pytorch_lora_weights.safetensors", "--layout", "original",
                  "--dtype", "float32", "--out", out / "merged"],
        "student": ["sample.py", *PROMPTS, "--model", out / "merged", "--codec", args.model,
                    *size, *where, "--out", out / "student"]}
    planned = plan(args)
    minutes = {name: sum(parts.values()) / 60 for name, parts in planned.items()}
    print(f"planned: {sum(minutes.values()):.0f} minutes at 40% of {args.tflops:g} TFLOP/s; "
          f"loading comes on top")

    lines = [f"{platform.system()}, torch {torch.__version__}, {device.type}"
             + (f", {torch.cuda.get_device_name()}" if device.type == "cuda" else "")]
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "merged", ignore_errors=True)  # an earlier one, as exports replace nothing
    for name, words in stages.items():
        seconds, peak = measure(words, out / f"{name}.log", device)
        line = f"{name}: {seconds / 60:.1f} min ({minutes.get(name, 0):.1f} planned)"
        news = [line + (f", {peak / 1e9:.1f} GB of the card in use" if peak else "")]
        if words[0] == "sample.py":
            *_, took, _ = (out / f"{name}.log").read_text(encoding="utf-8").splitlines()
            parts = ", ".join(f"{part}: {time:.1f} s" for part, time in planned[name].items())
            news += [f"  took {took}", f"  planned {parts}"]
        if name == "teacher":
            news.append(compare(args, device))
            gc.collect()  # of diffusers' pipeline; the next stages need its memory
            empty_cache()
        print(*news, sep="\n", flush=True)
        lines += news
    steps = (out / "lora" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for step in map(json.loads, steps):
        lines.append(", ".join(f"{name} {step[name]:.3g}" for name in (
            "loss", "dmd", "reg", "weight", "variance", "data_variance", "critic",
            "student_grad_norm", "critic_grad_norm") if step.get(name) is not None))
    if device.type == "cuda":
        measure(["-m", "tools.gpu_check"], out / "gpu_check.log", device)
        lines += (out / "gpu_check.log").read_text(encoding="utf-8").splitlines()[1:-1]
    sheets = [iio.imread(out / name / "contact_sheet.png") for name in ("teacher", "student")]
    iio.imwrite(out / "contact_sheet.png", np.concatenate(sheets))
    print("```", *lines, "```", f"{out}/contact_sheet.png: the teacher's videos, and the student's",
          sep="\n")


def plan(args):
    """Seconds of each stage's parts, which have sample.py's names. Loading is left out."""
    config = WanConfig.from_pretrained(args.model)
    shape = WanCodec.latent_shape(WanCodec, args.frames, args.height, args.width, 2)
    speed, videos = args.tflops * 1e12 * 0.4, len(PROMPTS)
    forward, text, encode, decode = (flops / speed for flops in (
        costs.forward_flops(config, shape), costs.text_encoder_flops(),
        costs.vae_flops("encode", shape), costs.vae_flops("decode", shape)))
    text *= videos + 1  # the negative prompt
    encode, decode = (videos * seconds / costs.TF32 for seconds in (encode, decode))
    return {
        "teacher": {"encode prompts": text, "denoise": videos * 2 * args.steps * forward,
                    "decode and write": decode},
        "encode": {"encode prompts": text, "encode videos": encode},
        "distil": {"cycles": 3 * (35.5 + 8) * forward},  # 8 are computed again in backward
        "student": {"encode prompts": text, "denoise": videos * 4 * forward,
                    "decode and write": decode}}


def measure(words, log, device):
    """Run a command of the project -> its seconds, and the most memory of the card in use.

    ValueError with the last line that the command printed if it fails.
    """
    print("python", *words, flush=True)
    start, peak = time.perf_counter(), [0]

    def watch():
        while process.poll() is None:
            free, total = torch.cuda.mem_get_info()
            peak[0] = max(peak[0], total - free)
            time.sleep(0.2)

    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT)
        if device.type == "cuda":
            threading.Thread(target=watch).start()
        code = process.wait()
    if code:
        *_, last = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        raise ValueError(f"python {words[0]} {words[1]}: {last} (more in {log})")
    return time.perf_counter() - start, peak[0]


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
        num_frames=args.frames, height=args.height, width=args.width, guidance_scale=5.0,
        num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0),
        output_type="latent").frames.float().cpu()
    return (f"latents beside WanPipeline's: {(ours - latents).norm() / latents.norm():.2g} "
            f"relative error, {(ours - latents).abs().max():.2g} at most")


if __name__ == "__main__":
    sys.exit(main())
