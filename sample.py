"""Prompts to videos: by a distilled student in four steps, or by its teacher in fifty.

    python sample.py "a red ball moving left fast" --model runs/demo/avd
    python sample.py --prompts-file prompts.txt --teacher --steps 50

Writes one mp4 for each prompt and a contact sheet of them all.
"""

import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import torch
import tyro
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import adavid
from tiny_wan import ToyCodec, WanModel, checkpoint
from tools import cli

WEIGHTS = Path(__file__).parent / "tiny_wan" / "weights"


@dataclass
class Sample:
    """Videos from prompts, by a 4-step student, or with --teacher by a guided ODE sampler."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """what to draw, each in quotes"""
    prompts_file: Path | None = None
    """a text file with one prompt on each line, after those of the command line"""
    model: Path = WEIGHTS
    """folder of a student, or of a teacher"""
    out: Path = Path("runs/samples")
    """folder for the videos and the contact sheet"""
    seed: int = 0
    """of the noise; video i has seed + i, whatever else is in the batch"""
    full_rate: bool = False
    """run every step at the full frame rate, without the interpolator"""
    teacher: bool = False
    """sample with guidance, in many small steps"""
    steps: int = 50
    """with --teacher: its steps"""
    guidance_scale: float | None = None
    """with --teacher: its guidance; by default the one that its students learn from"""
    batch_size: int = 16
    """videos at a time"""
    save_latents: bool = False
    """write latents.safetensors, too"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""


def main(argv=None):
    return cli.run(run, Sample, argv)


def run(args):
    device = cli.pick_device(args.device)
    prompts = list(args.prompts) + (read_prompts(args.prompts_file) if args.prompts_file else [])
    if not prompts:
        raise ValueError('no prompts; try: python sample.py "a red ball moving left fast"')
    args.out.mkdir(parents=True, exist_ok=True)

    with timed("load"):
        model = WanModel.from_pretrained(args.model, torch.float32, device).eval()
        config = load_config(args.model)
        if args.guidance_scale is not None:
            config = replace(config, guidance_scale=args.guidance_scale)
        interpolator = None if args.full_rate else load_interpolator(args.model, device)
        codec = ToyCodec()
        text, null_text = (codec.encode_text(p).to(device) for p in (prompts, [""]))

    def sampler(noise, text, generator):
        if args.teacher:
            return adavid.sample_teacher(model, noise, text, null_text, args.steps,
                                         config.guidance_scale)
        return adavid.sample(model, noise, text, config, interpolator, generator)

    batches = -(-len(prompts) // args.batch_size)
    forwards = batches * (2 * args.steps if args.teacher else len(config.timesteps))
    with timed("sample"), progress(model, forwards):
        latents = torch.cat([*sample_batches(sampler, text, codec.latent_shape, args.seed,
                                             args.batch_size)])
    with timed("decode and write"):
        videos = codec.decode(latents).cpu()
        for i, (prompt, video) in enumerate(zip(prompts, videos)):
            write_video(args.out / f"{file_name(prompt)}-{i}.mp4", video, codec.fps)
        write_contact_sheet(args.out / "contact_sheet.png", videos)
        if args.save_latents:
            save_file({"latents": latents.cpu().contiguous()}, args.out / "latents.safetensors")
    print(f"{len(prompts)} videos and contact_sheet.png are in {args.out}")


def read_prompts(path):
    """The non-empty lines of a text file. ValueError where it is not one."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    if not any(lines):
        raise ValueError(f"{path}: no prompts in it; write one on each line")
    return [line for line in lines if line]


def load_config(path):
    """The paper's AVDConfig, with what the weights at `path` say otherwise."""
    numbers = checkpoint.read_metadata(path).get("avd", "{}")
    try:
        return adavid.AVDConfig.from_json(numbers)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the numbers in its metadata make no sense ({error})") from None


def load_interpolator(path, device):
    """The interpolator that lies beside a model's weights, frozen, or None."""
    file = Path(path) / "interpolator.safetensors"
    if not file.exists():
        return None
    try:
        interpolator = adavid.FrameInterpolator.from_pretrained(file)
    except (SafetensorError, KeyError, RuntimeError):
        raise ValueError(f"{file}: damaged, or not a frame interpolator's file") from None
    return interpolator.to(device).requires_grad_(False)


@contextmanager
def timed(part):
    """Print how long a part took."""
    start = time.perf_counter()
    yield
    print(f"{part}: {time.perf_counter() - start:.1f} s")


@contextmanager
def progress(model, forwards):
    """A progress bar that counts the model's forwards."""
    with tqdm(desc="denoising", unit="forward", total=forwards, leave=False) as bar:
        def count(*_):  # returns None: anything else would replace the model's output
            bar.update()

        hook = model.register_forward_hook(count)
        yield
        hook.remove()


def sample_batches(sampler, text, latent_shape, seed, batch_size):
    """Latents of `sampler(noise, text, generator)`, a batch at a time. Video i has seed + i."""
    for batch in torch.arange(len(text)).split(batch_size):
        generator = [torch.Generator().manual_seed(seed + i) for i in batch.tolist()]
        noise = adavid.draw(torch.randn, (len(batch), *latent_shape), text, generator)
        yield sampler(noise, text[batch], generator)


def file_name(prompt):
    return re.sub(r"[^\w-]+", "_", prompt).strip("_")[:100]


def to_bytes(frames, height, least):
    """`... h w c` in [0, 1] -> bytes, each pixel repeated until a frame is `least` pixels high."""
    times = max(1, least // height)
    frames = (255 * frames).round().byte()
    return frames.repeat_interleave(times, -3).repeat_interleave(times, -2).numpy()


def write_video(path, video, fps):
    """An mp4 of one video `[3, f, h, w]` in [0, 1]."""
    frames = to_bytes(rearrange(video, "c f h w -> f h w c"), video.shape[-2], least=256)
    iio.imwrite(path, frames, fps=fps, codec="libx264", macro_block_size=2)


def write_contact_sheet(path, videos, columns=9):
    """A picture with a row for each video `[b, 3, f, h, w]` and a column for each frame."""
    frames = torch.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().long()
    sheet = rearrange(videos[:, :, frames], "b c f h w -> (b h) (f w) c")
    iio.imwrite(path, to_bytes(sheet, videos.shape[-2], least=64))


if __name__ == "__main__":
    sys.exit(main())
