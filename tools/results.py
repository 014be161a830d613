"""The README's table: samplers and students, read by the oracle over fresh prompts and seeds.

    python -m tools.results                          everything, about 25 minutes on two cores
    python -m tools.results --rows teacher-50        the shipped teacher alone

Seed s trains its students as the demo does, with `train.py distill --seed s`; every row then draws
the same prompts from the same noise. Those prompts are used for nothing else. Scores are kept in
the output folder, one file for each row and seed: a second call goes on where the first stopped.
"""

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import adavid
from sample import WEIGHTS, load_config, load_interpolator, sample_batches
from tiny_wan import ToyCodec, WanModel, checkpoint, world
from tools import cli, demo

EVALUATION_SEED = 2000  # of the prompts; seed s takes EVALUATION_SEED + s
ROWS = {
    "real": "real videos",
    "teacher-50": "teacher, 50 guided steps",
    "teacher-4": "teacher, 4 steps, not distilled",
    "dmd": "DMD, 4 steps",
    "avd-full": "AVD, 4 steps, full rate",
    "avd": "AVD, 4 steps, decoupled",
}
COLUMNS = {"instance": "instance", "prompt": "prompt", "dynamic": "dynamic",
           "open_speed": "speed, open prompts", "saturation": "saturation", "flicker": "flicker"}


@dataclass
class Results:
    """Train students with several seeds, score every sampler, print the table."""

    out: Path = Path("runs/results")
    """folder of the students and their scores"""
    model: Path = WEIGHTS
    """folder of the teacher"""
    rows: tuple[Literal[tuple(ROWS)], ...] = tuple(ROWS)
    """what to score"""
    seeds: int = 3
    """seeds 0, 1, ... of training, prompts and noise"""
    prompts: int = 512
    """prompts for each seed"""
    steps: int = 60
    """updates of each student"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""


def main(argv=None):
    return cli.run(run, Results, argv)


def run(args):
    device = cli.pick_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    if {"dmd", "avd", "avd-full"} & set(args.rows):
        for seed in range(args.seeds):
            demo.distil(demo.Demo(args.out / f"seed-{seed}", args.model, args.steps, seed=seed,
                                  device=args.device))
    scores = {row: [scored(args, row, seed, device) for seed in range(args.seeds)]
              for row in args.rows}
    real = [scored(args, "real", seed, device) for seed in range(args.seeds)]
    table = {row: summary(scores[row], real) for row in args.rows}
    (args.out / "results.json").write_text(json.dumps(
        {"rows": table, "seeds": args.seeds, "prompts": args.prompts, "updates": args.steps,
         "torch": torch.__version__, "machine": platform.platform()}, indent=1))
    print(markdown(table))


def scored(args, row, seed, device):
    """Oracle scores of a row's videos for one seed, `{name: [prompts]}`, from its file if there."""
    folder = args.model if row.startswith(("real", "teacher")) else (
        args.out / f"seed-{seed}" / row.removesuffix("-full"))
    file = args.out / f"{row}-{seed}.json"
    if file.exists() and file.stat().st_mtime > (folder / checkpoint.FILE).stat().st_mtime:
        scores = json.loads(file.read_text())
        if len(scores["instance"]) == args.prompts:
            return scores

    codec = ToyCodec()
    real, prompts = world.make(EVALUATION_SEED + seed, range(args.prompts))
    model = WanModel.from_pretrained(folder, torch.float32, device)
    text, null_text = (codec.encode_text(p).to(device) for p in (prompts, [""]))
    config = load_config(folder)
    interpolator = load_interpolator(folder, device) if row == "avd" else None

    def sampler(noise, text, generator):
        if row == "teacher-50":
            return adavid.sample_teacher(model, noise, text, null_text,
                                         guidance_scale=config.guidance_scale)
        return adavid.sample(model, noise, text, config, interpolator, generator)

    video = real
    if row != "real":
        batches = sample_batches(sampler, text, codec.latent_shape(),
                                 (EVALUATION_SEED + seed) << 16, batch_size=32)
        video = torch.cat([codec.decode(latents).cpu() for latents in tqdm(
            batches, desc=f"{row}, seed {seed}", total=-(-args.prompts // 32))])
    scores = {name: values.tolist() for name, values in world.score(video, prompts).items()}
    scores["diversity"] = world.diversity(video, real)
    file.write_text(json.dumps(scores))
    return scores


def summary(scores, real, draws=2000):
    """Mean, 95% interval and each seed's mean of every column.

    The interval is bootstrapped over seeds and, within each, over prompts: a student's luck with
    its seed counts, not only the prompts'.
    """
    rng, result = np.random.default_rng(0), {}
    for name in COLUMNS:
        values = [np.array(s[name]) / (np.nanmean(r[name]) if name == "saturation" else 1)
                  for s, r in zip(scores, real)]
        values = [v[~np.isnan(v)] for v in values]
        means = [np.mean([rng.choice(values[i], len(values[i])).mean()
                          for i in rng.integers(len(values), size=len(values))])
                 for _ in range(draws)]
        result[name] = {"mean": float(np.mean([v.mean() for v in values])),
                        "low": float(np.quantile(means, 0.025)),
                        "high": float(np.quantile(means, 0.975)),
                        "seeds": [float(v.mean()) for v in values]}
    diversity = [s["diversity"] for s in scores]
    result["diversity"] = {"mean": float(np.mean(diversity)), "low": min(diversity),
                           "high": max(diversity), "seeds": diversity}
    return result


def markdown(table):
    columns = COLUMNS | {"diversity": "diversity"}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, cells in table.items():
        text = ("{mean:.3f} ({low:.3f}-{high:.3f})".format(**cells[name]) for name in columns)
        lines.append(f"| {ROWS[row]} | " + " | ".join(text) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
