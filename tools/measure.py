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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from runtime import cli
from runtime.media import SUFFIXES, read_video
from runtime.meter import HEIGHT, diversity, readings

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
    result = {}
    ordered = sorted(files, key=lambda file: prompt_of(file.name))
    # ffmpeg decodes in processes of its own. One thread of torch in each of ours keeps the numbers
    # the same on any machine.
    with ThreadPoolExecutor(initializer=partial(torch.set_num_threads, 1)) as pool:
        measured = tqdm(zip(ordered, pool.map(measure_video, ordered)), desc=folder,
                        unit="video", total=len(files))
        for _, some in groupby(measured, key=lambda pair: prompt_of(pair[0].name)):
            group, pairs = zip(*some)
            values, videos = zip(*pairs)
            shared = {"diversity": diversity(videos)}
            result |= {file.name: each | shared for file, each in zip(group, values)}
    return {file.name: result[file.name] for file in files}


def measure_video(file):
    """A video's readings, and the video. ValueError names the file."""
    try:
        video = read_video(file, height=HEIGHT)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if video.shape[1] < 3:
        raise ValueError(f"{file}: has {video.shape[1]} frames, and 3 are needed")
    return readings(video), video


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
