"""Make videos from prompts, with a distilled student in four steps or with its teacher in fifty.

    python sample.py "a red ball moving left fast above a blue ball"
    python sample.py "a cat walks on grass" --model Wan2.1-T2V-1.3B --teacher
    torchrun --nproc_per_node 8 sample.py --prompts-file prompts.txt --model Wan2.1-T2V-1.3B ...

Writes an mp4 for each prompt, a contact sheet of the first ones, and captions.jsonl, which says
which video has which prompt; tools.encode reads it. torchrun shares the videos among GPUs. A run
that was stopped goes on with the same command: it checks the videos that are there, and makes the
others.
"""

import contextlib
import io
import json
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

import adavid
from adavid import AnyNumber, Limits, Positive, Stride, Timestep
from runtime import cli
from runtime.distributed import Watchdog, broadcast, init_distributed, rank, world_size
from runtime.lora import check_loras, load_merged
from runtime.media import (
    file_names,
    read_video,
    thumbnails,
    write_contact_sheet,
    write_video,
)
from runtime.models import (
    check_out,
    checkpoint_to_model,
    find_numbers,
    load_interpolator,
)
from runtime.run import check_shared, make_folder
from runtime.samples import choose_folder, find_whole, settings_digest, write_captions
from tiny_wan import STUDENT, WEIGHTS, WanModel, checkpoint, open_codec
from tiny_wan.codec import check_finite

FrameRate = Annotated[int, Limits(1, 1000)]
SHOWN, HEIGHT = 16, 128  # rows of the contact sheet, and their height in pixels
LONGEST = 10_000  # characters of a prompt


@dataclass
class Sample:
    """Make videos from prompts, with a 4-step student or (--teacher) a guided ODE sampler."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """what the videos show; put each prompt in quotes"""
    prompts_file: Path | None = None
    """a text file with a prompt on each line, added to those of the command line"""
    names_file: Path | None = None
    """a text file with a line for each prompt, after which its videos are named; for benchmarks
    with extended prompts. By default a video is named after its prompt"""
    videos_per_prompt: cli.Count = 1
    """how many videos of each prompt"""
    model: Path | None = None
    """student or teacher: a folder in the original or Diffusers' layout, a safetensors file, or a
    checkpoint of a training; by default the toy's student, or its teacher with --teacher"""
    lora: tuple[Path, ...] = ()
    """LoRAs to add to the model, such as a distilled one and a style: files, their folders, or
    checkpoints of a training with --lora"""
    lora_scale: tuple[AnyNumber, ...] = ()
    """the weight of each LoRA; by default 1"""
    codec: Path | None = None
    """folder with Wan's text encoder and VAE; by default the model's folder"""
    out: Path | None = None
    """folder for the videos and the contact sheet; by default runs/samples, or runs/samples-2 and
    so on while that holds those of other prompts, seeds, models or settings"""
    frames: cli.Size | None = None
    """of the video; by default 81 for Wan and 9 for the toy"""
    height: cli.Size | None = None
    """in pixels; by default 480 for Wan and 16 for the toy"""
    width: cli.Size | None = None
    """in pixels; by default 832 for Wan and 16 for the toy"""
    fps: FrameRate | None = None
    """frames per second of the files; by default those that the model was trained on"""
    seed: cli.Seed = 0
    """of the noise; video i has seed + i in any batch"""
    timesteps: tuple[Timestep, ...] = ()
    """of a student's steps, such as 1000 937.5 833.3 625; by default those that are stored with the
    student or its LoRA, else the paper's. Give them for a student of another project"""
    strides: tuple[Stride, ...] = ()
    """frame stride of each of these steps; by default the stored ones, or 1 with --timesteps"""
    full_rate: bool = False
    """run every step at the full frame rate, without the interpolator"""
    teacher: bool = False
    """sample in many small steps with guidance"""
    steps: cli.Count = 50
    """with --teacher: number of steps"""
    guidance_scale: AnyNumber | None = None
    """with --teacher: scale of the guidance; by default the one that students are distilled with"""
    negative_prompt: str | None = None
    """with --teacher: what guidance leads away from; by default Wan's own, or empty for the toy"""
    shift: Positive = 5.0
    """with --teacher: shifts the steps towards noise"""
    batch_size: cli.Size | None = None
    """videos at a time; by default 1 for Wan and 16 for the toy"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the transformer and the text encoder; auto is bfloat16 for Wan on a GPU that has it, from
    NVIDIA or AMD. Else it is float32 for the transformer, and for the text encoder the dtype of its
    file"""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """of Wan's VAE, whose activations take half of the memory in bfloat16; pixels change slightly.
    The toy has no VAE"""
    compile: bool = False
    """torch.compile the transformer's blocks: a minute to start, then faster"""
    save_latents: bool = False
    """also write latents.safetensors; not with torchrun, and all videos are made again"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""


def main(argv=None):
    first = os.environ.get("RANK", "0") == "0"  # which speaks for all
    with contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
        return cli.run(run, Sample, argv)


def run(args):
    device, watch = init_distributed(args.device), cli.Stopwatch()
    args.model = args.model or (WEIGHTS if args.teacher else STUDENT)
    prompts = list(args.prompts) + (read_prompts(args.prompts_file) if args.prompts_file else [])
    if not prompts:
        raise ValueError('no prompts; try: python sample.py "a red ball moving left fast"')
    titles = read_prompts(args.names_file) if args.names_file else prompts
    if len(titles) != len(prompts):
        raise ValueError(f"{args.names_file}: has {len(titles)} names for {len(prompts)} prompts")
    if args.save_latents and world_size() > 1:
        raise ValueError("--save-latents needs a single process; leave out torchrun")

    scales = args.lora_scale or (1.0,) * len(args.lora)
    if len(scales) != len(args.lora):
        raise ValueError(f"--lora-scale: {len(scales)} weights for {len(args.lora)} LoRA files")
    if args.out:
        check_out(args.out, [args.model, *args.lora, args.codec])
    args.model, *args.lora = map(checkpoint_to_model, (args.model, *args.lora))
    # All tensors are checked now, on the meta device, as the text encoder takes minutes. The
    # weights are loaded afterwards, when the text encoder has freed its memory.
    model = WanModel.from_pretrained(args.model, device="meta")
    architecture = model.config
    dtype = cli.pick_dtype(args.dtype, device, architecture)
    cli.announce(device, dtype, args.device)
    check_loras(args.lora, model)
    numbers = find_numbers(args.model, args.lora)
    config = choose_steps(args, numbers.config)
    interpolator = None
    if not (args.teacher or args.full_rate):
        interpolator = load_interpolator(args.model, device, *args.lora)
        if interpolator is None and config.strides[0] > 1:
            print("note: no interpolator.safetensors beside the model or its LoRA, so all steps "
                  "are full rate")
    print(describe(args, config, numbers, interpolator))
    codec = open_codec(args.model, architecture, args.codec, device=device, dtype=dtype,
                       vae_dtype=getattr(torch, args.vae_dtype))
    shape = codec.latent_shape(args.frames, args.height, args.width,
                               1 if interpolator is None else config.strides[0])
    codec.prepare()
    batch_size = args.batch_size or codec.batch_size
    fps = args.fps or stored_fps(numbers.source or args.model) or codec.fps
    negative = codec.negative_prompt if args.negative_prompt is None else args.negative_prompt
    prompts = [line for line in prompts for _ in range(args.videos_per_prompt)]
    names = list(file_names([line for line in titles for _ in range(args.videos_per_prompt)]))

    # What else decides the pixels, so that a run does not go on with other settings.
    settings = settings_digest(
        args, scales, interpolator, config.to_json(), shape, fps, str(dtype), args.vae_dtype,
        [args.steps, args.shift, negative] if args.teacher else [])
    model_name = " + ".join(str(path.resolve()) for path in (args.model, *args.lora))
    captions = broadcast("".join(
        json.dumps({"video": name, "caption": prompt, "seed": args.seed + i, "model": model_name,
                    "settings": settings})
        + "\n" for i, (name, prompt) in enumerate(zip(names, prompts))))
    out = broadcast(choose_folder(args.out, captions))
    make_folder(out)
    check_shared(out)

    # Ranks share whole batches, as a video's last bits depend on the size of its batch.
    whole = find_whole(out, names, (shape[1] - 1) * codec.time_factor + 1, args.save_latents)
    batches = [range(len(prompts))[i:i + batch_size] for i in range(0, len(prompts), batch_size)]
    batches = [batch for batch in batches if not all(names[i] in whole for i in batch)]
    mine = batches[rank()::world_size()]
    if whole:
        print(f"{len(whole)} of {len(prompts)} videos are there already")

    def counted(*inputs, **options):
        velocity = model(*inputs, **options)
        bar.update()
        return velocity

    def sampler(noise, text, generator):
        noise, text = noise.to(device), text.to(device)
        with watch("denoise"):
            if args.teacher:
                latents = adavid.sample_teacher(
                    counted, noise, text, null_text, steps=args.steps,
                    guidance_scale=config.guidance_scale, shift=args.shift,
                    solver=codec.solver)
            else:
                latents = adavid.sample(counted, noise, text, config, interpolator, generator)
            latents = latents.cpu()
        check_finite("the latents", latents)
        return latents

    kept = []
    try:
        if mine:
            with watch("encode prompts"):
                wanted = list(dict.fromkeys(prompts[i] for batch in mine for i in batch))
                *text, null_text = codec.encode_text([*wanted, negative])
                text, null_text = dict(zip(wanted, text)), null_text[None].to(device)
            with watch("load"):
                weights, loras = dtype or torch.float32, zip(args.lora, scales)
                model = (load_merged(args.model, weights, device, loras) if args.lora
                         else WanModel.from_pretrained(args.model, weights, device)).eval()
                if args.compile:
                    for block in model.blocks:
                        block.compile()
        forwards = 2 * args.steps if args.teacher else len(config.timesteps)
        share = f" (the first of {world_size()} ranks)" if world_size() > 1 else ""
        with Watchdog(), tqdm(desc=f"denoise{share}", unit="forward", disable=rank() > 0,
                              total=forwards * len(mine)) as bar:
            for batch in mine:
                latents = sample_batch(sampler, torch.stack([text[prompts[i]] for i in batch]),
                                       shape, args.seed, batch)
                with watch("decode and write"):
                    videos = codec.decode(latents).cpu()
                    # Not earlier, as a video that is not finite leaves no file.
                    write_captions(out, captions)
                    for i, video in zip(batch, videos):
                        write_video(out / names[i], video, fps)
                if args.save_latents:
                    kept.append(latents)
            if rank() > 0:
                return
            # Not in a collective, which times out: other ranks may take hours longer.
            while not all((out / names[i]).exists() for batch in batches for i in batch):
                time.sleep(0.2)
    except KeyboardInterrupt:
        if rank() == 0:
            print("stopped; the same command goes on with the remaining videos", file=sys.stderr)
        raise
    write_contact_sheet(out / "contact_sheet.png", [
        thumbnails(read_video(out / name, height=HEIGHT)) for name in names[:SHOWN]])
    if kept:
        checkpoint.write_files({out / "latents.safetensors": {"latents": torch.cat(kept)}})
    print(watch)
    print(f"{len(prompts)} videos and contact_sheet.png are in {out}")


def stored_fps(file):
    """The frame rate of what a model was trained on, or None. ValueError names a bad one."""
    fps = checkpoint.read_metadata(file).get("fps")
    if fps is not None and not (re.fullmatch("[0-9]{1,4}", fps) and 0 < int(fps) <= 1000):
        raise ValueError(f"{checkpoint.named(file)}: the fps in its metadata is {fps!r:.60}, not a "
                         f"frame rate; give --fps")
    return fps and int(fps)


def choose_steps(args, config):
    """The stored numbers, or those of the flags. ValueError if they do not fit together."""
    if args.teacher and (args.timesteps or args.strides):
        raise ValueError("--timesteps and --strides are a student's; --teacher has --steps")
    timesteps = args.timesteps or config.timesteps
    strides = args.strides or ((1,) * len(timesteps) if args.timesteps else config.strides)
    guidance = config.guidance_scale if args.guidance_scale is None else args.guidance_scale
    return replace(config, timesteps=timesteps, strides=strides, train_strides=strides,
                   guidance_scale=guidance)


def describe(args, config, numbers, interpolator):
    """A line: the steps, strides and guidance of this run, and where they come from."""
    stored = f"from {numbers.source}" if numbers.source else "the paper's, as no file stores any"
    if args.teacher:
        by = "from --guidance-scale" if args.guidance_scale is not None else stored
        return (f"teacher: {args.steps} steps at shift {args.shift:g}, guidance "
                f"{config.guidance_scale:g} ({by})")
    strides = config.strides if interpolator else (1,) * len(config.timesteps)
    by = "from --timesteps" if args.timesteps else stored if numbers.distilled else (
        f"{stored}; give others with --timesteps, or use --teacher if this is no student")
    return (f"student: timesteps {' '.join(f'{t:g}' for t in config.timesteps)}, strides "
            f"{' '.join(map(str, strides))}, no guidance ({by})")


def read_prompts(path):
    """The non-empty lines of a text file. ValueError if there are none."""
    lines = [line.strip() for line in checkpoint.read_text(path).splitlines()]
    if not any(lines):
        raise ValueError(f"{path}: contains no prompts; write one on each line")
    if (longest := max(map(len, lines))) > LONGEST:
        raise ValueError(f"{path}: a line has {longest} characters; at most {LONGEST} are allowed")
    return [line for line in lines if line]


def sample_batches(sampler, text, latent_shape, seed, batch_size):
    """Yield latents of `sampler(noise, text, generator)` in batches. Video i has seed + i."""
    for batch in torch.arange(len(text)).split(batch_size):
        yield sample_batch(sampler, text[batch], latent_shape, seed, batch.tolist())


def sample_batch(sampler, text, latent_shape, seed, batch):
    """Latents of `sampler(noise, text, generator)` for the videos with these numbers."""
    generator = [torch.Generator().manual_seed(seed + i) for i in batch]
    return sampler(adavid.draw(torch.randn, (len(batch), *latent_shape), text, generator), text,
                   generator)


if __name__ == "__main__":
    sys.exit(main())
