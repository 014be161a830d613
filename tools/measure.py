"""Measure colours and motion of any videos: the two faults that this method cures in DMD.

    python -m tools.measure runs/mine
    python -m tools.measure runs/mine --against runs/teacher      differences, prompt by prompt

Videos are named as sample.py and VBench name them, `{prompt}-{index}.mp4`. Numbers are means over
prompts, with 95% intervals that are bootstrapped over prompts. Every reading is taken after
shrinking the frames to a height of 32 pixels, so neither size nor compression matters much.
"""

import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from runtime import cli
from runtime.media import SUFFIXES, decode

HEIGHT = 32  # in pixels
LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue (Rec. 709)
FASTEST = 0.05  # share of pixels whose speed is the motion, as in VBench's dynamic degree
STILL = 0.25  # a video with less motion is still
COLUMNS = ("saturation", "contrast", "motion", "flicker", "still", "diversity")


@dataclass
class Measure:
    """Measure the videos of a folder, and how they differ from those of another folder."""

    folder: tyro.conf.Positional[Path]
    """folder of videos"""
    against: Path | None = None
    """folder of videos to compare with; prompts are matched by the files' names"""
    out: Path | None = None
    """file for all numbers, as JSON"""


def main(argv=None):
    return cli.run(run, Measure, argv)


def run(args):
    folders = [folder for folder in (args.folder, args.against) if folder]
    files = {str(folder): find_videos(folder) for folder in folders}
    videos = {folder: measure_videos(folder, some) for folder, some in files.items()}
    prompts = [by_prompt(readings) for readings in videos.values()]
    rows = {name: list(values.values()) for name, values in zip(videos, prompts)}
    if args.against:
        ours, theirs = prompts
        if not (both := ours.keys() & theirs.keys()):
            raise ValueError(f"{args.folder} and {args.against} have no prompt in common; the "
                             f"names of their files must match up to the last -number")
        rows["difference"] = [ours[prompt] - theirs[prompt] for prompt in sorted(both)]
    summary = {name: interval(np.array(values)) for name, values in rows.items()}

    width = max(map(len, rows))
    print(f"{'':{width}} {'prompts':>7}", *(f"{column:>17}" for column in COLUMNS))
    for name, numbers in summary.items():
        sign = "+" if name == "difference" else ""
        print(f"{name:{width}} {len(rows[name]):7}", *(said(*number, sign) for number in numbers))
    if args.out:
        args.out.write_text(json.dumps({
            "videos": {folder: {name: dict(zip(values, map(finite, values.values())))
                                for name, values in readings.items()}
                       for folder, readings in videos.items()},
            "means": {name: {column: dict(zip(("mean", "low", "high"), map(finite, number)))
                             for column, number in zip(COLUMNS, numbers)}
                      for name, numbers in summary.items()}}, indent=1), encoding="utf-8")


def find_videos(folder):
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: contains no videos ({', '.join(sorted(SUFFIXES))})")
    return files


def measure_videos(folder, files):
    """{name: readings} of each video. Videos of one prompt share their diversity."""
    result, seeds = {}, defaultdict(list)
    for file in tqdm(files, desc=folder, unit="video"):
        video = read_video(file)
        result[file.name] = readings(video)
        seeds[prompt_of(file.name)].append((file.name, video))
    for some in seeds.values():
        names, videos = zip(*some)
        for name in names:
            result[name]["diversity"] = diversity(videos)
    return result


def read_video(file):
    """RGB in [0, 1] `[3, f, h, w]`, all frames, shrunk to HEIGHT. ValueError if it is damaged."""
    try:
        data, reason = decode(file, f"scale=-2:{HEIGHT}:flags=area", "-f", "image2pipe", "-c:v",
                              "ppm")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", data)
    if not header:
        raise ValueError(f"{file}: not a video that can be decoded ({reason})")
    width, height = int(header[1]), int(header[2])
    frames = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    frames = frames.view(-1, len(header[0]) + 3 * height * width)[:, len(header[0]):]
    if len(frames) < 3:
        raise ValueError(f"{file}: has {len(frames)} frames, and 3 are needed")
    return frames.reshape(-1, height, width, 3).permute(3, 0, 1, 2).float() / 255


# ---------------------------------------------------------------------------------------------
# Readings
# ---------------------------------------------------------------------------------------------


def readings(video):
    """What a video `[3, f, h, w]` in [0, 1] shows, as a dict of floats:

    saturation    the largest of R, G and B less the smallest; pixels count as much as they have
    contrast      standard deviation of luma over the pixels of a frame
    motion        speed of the fastest 5% of all pixels, in percent of the height for each frame
    flicker       mean absolute second difference of luma in time, relative to contrast
    still         1 if there is no motion, else 0
    """
    chroma = video.amax(0) - video.amin(0)
    luma = (video * video.new_tensor(LUMA).view(3, 1, 1, 1)).sum(0)
    contrast = luma.var((1, 2), correction=0).mean().sqrt()
    speed = flow(video).flatten()
    motion = 100 / HEIGHT * speed.topk(math.ceil(FASTEST * len(speed))).values.mean()
    flicker = luma.diff(n=2, dim=0).abs().mean() / contrast.clamp(min=1 / 255)
    return {"saturation": (chroma.square().sum() / chroma.sum().clamp(min=1e-6)).item(),
            "contrast": contrast.item(), "motion": motion.item(), "flicker": flicker.item(),
            "still": float(motion < STILL)}


def flow(video):
    """The speed of each pixel of a video `[3, f, h, w]`, in pixels for each frame: `[f-3, h, w]`.

    Optical flow by the method of Lucas and Kanade: in windows of 5 x 5 pixels, the shift that best
    explains the change from one frame to the next by the gradients of all three colours. Smoothing
    over space and three frames keeps noise and flicker from passing for motion.
    """
    frames = (video[:, :-2] + 2 * video[:, 1:-1] + video[:, 2:]).transpose(0, 1) / 4  # f 3 h w
    kernel = video.new_tensor([[1, 4, 6, 4, 1]]) / 16
    kernel = (kernel * kernel.T).expand(3, 1, 5, 5)
    frames = F.conv2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)

    def window(product):  # sum over the colours, mean over a window
        return F.avg_pool2d(product.sum(1, keepdim=True), 5, stride=1, padding=2)[:, 0]

    dt = frames.diff(dim=0)
    dy, dx = torch.gradient((frames[1:] + frames[:-1]) / 2, dim=(2, 3))
    xx, xy, yy = window(dx * dx) + 1e-4, window(dx * dy), window(dy * dy) + 1e-4
    xt, yt = window(dx * dt), window(dy * dt)
    return torch.hypot(yy * xt - xy * yt, xx * yt - xy * xt) / (xx * yy - xy * xy)


def diversity(videos):
    """Standard deviation over videos of one prompt, relative to contrast; NaN for a single one."""
    if len({video.shape for video in videos}) != 1 or len(videos) == 1:
        return math.nan
    videos = torch.stack(videos)
    return (videos.var(0).mean() / videos.var((3, 4), correction=0).mean()).sqrt().item()


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------


def prompt_of(name):
    """A file's prompt: its name up to the index."""
    return re.sub(r"-\d+$", "", Path(name).stem)


def by_prompt(readings):
    """{prompt: mean over its videos of each column}."""
    prompts = defaultdict(list)
    for name, values in readings.items():
        prompts[prompt_of(name)].append([values[column] for column in COLUMNS])
    return {prompt: np.mean(values, axis=0) for prompt, values in prompts.items()}


def interval(values, number=2000):
    """Mean and 95% interval of each column of `values` `[prompts, columns]`: `[columns, 3]`.

    Bootstrapped over prompts; NaN in a column stands for a prompt that says nothing.
    """
    rng, result = np.random.default_rng(0), []
    for column in values.T:
        column = column[~np.isnan(column)]
        if not len(column):
            result.append([math.nan] * 3)
            continue
        means = rng.choice(column, (number, len(column))).mean(axis=1)
        result.append([column.mean(), *np.quantile(means, [0.025, 0.975])])
    return result


def said(mean, low, high, sign=""):
    if math.isnan(mean):
        return f"{'-':>17}"
    return f"{f'{mean:{sign}.3f} ± {(high - low) / 2:.3f}':>17}"


def finite(number):
    """The number as JSON can have it."""
    return None if math.isnan(number) else round(number, 6)


if __name__ == "__main__":
    sys.exit(main())
