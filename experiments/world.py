"""How good the toy world's oracle and teacher are, and how hard its videos are to regress on.

    python -m experiments.world        fills the tables of docs/world.md, in about ten minutes
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import adavid
from runtime import cli, page
from runtime.models import load_config
from sample import sample_batches
from tiny_wan import WEIGHTS, ToyCodec, WanModel, world

PAGE = Path(__file__).parents[1] / "docs" / "world.md"
SEEDS = (7001, 7002, 7003)  # of prompts and noise: nothing was chosen or trained with these


@dataclass
class World:
    """Measure the toy's oracle, its teacher, and how far the losses of its videos differ."""

    model: Path = WEIGHTS
    """folder of the teacher"""
    prompts: cli.Count = 512
    """prompts for each of three seeds"""
    steps: cli.Count = 50
    """guided steps of the teacher"""
    page: Path = PAGE
    """page whose tables are filled"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to sample"""


def main(argv=None):
    return cli.run(run, World, argv)


def run(args):
    device, codec = cli.pick_device(args.device), ToyCodec()
    cli.announce(device, None, args.device)
    teacher = WanModel.from_pretrained(args.model, torch.float32, device).eval()
    config = load_config(args.model)
    blocks = {"bars": page.markdown(bars(args, teacher, config, codec, device)),
              "hardness": page.markdown(hardness(teacher, config, codec, device))}
    page.fill(args.page, blocks)
    print("\n\n".join(blocks.values()))


def bars(args, teacher, config, codec, device):
    """A table of what the oracle says about videos of known kinds, and about the teacher's."""
    null_text = codec.encode_text([""]).to(device)

    def sampler(noise, text, generator):
        return adavid.sample_teacher(teacher, noise.to(device), text.to(device), null_text,
                                     args.steps, config.guidance_scale).cpu()

    kinds = {"real videos": [], "uniform noise": [], "blends of two videos": [],
             f"teacher, {args.steps} guided steps": []}
    for seed in SEEDS:
        real, prompts = world.make(seed, range(args.prompts))
        noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(seed))
        latents = sample_batches(sampler, codec.encode_text(prompts), codec.latent_shape(),
                                 seed << 16, batch_size=64)
        drawn = codec.decode(torch.cat(list(latents)))
        blends = (real + real.roll(1, 0)) / 2
        for scores, video in zip(kinds.values(), (real, noise, blends, drawn)):
            scores.append({name: s.nanmean().item() for name, s in
                           world.score(video, prompts).items()})
    names = {"instance": "instance preservation", "prompt": "prompt accuracy",
             **{name: name for name in world.FAILURES}}
    return [["", *names.values()], *(
        [kind, *(f"{sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (
            [s[name] for s in scores] for name in names))] for kind, scores in kinds.items())]


@torch.no_grad()
def hardness(teacher, config, codec, device, count=2048):
    """A table of the losses of real videos at each of the student's steps, and their correlations.

    The teacher is where every student starts. k times the spread is by how much the input of
    eq. 7's sigmoid varies.
    """
    video, prompts = world.make(SEEDS[0], range(count))
    traits = world.traits(video, prompts)
    rows = [["t", "mean loss", "spread", "k x spread",
             *(f"correlation with {trait}" for trait in traits)]]
    for step, t in enumerate(config.timesteps):
        losses = []
        for part in torch.arange(count).split(256):
            text = codec.encode_text([prompts[i] for i in part]).to(device)
            generators = [torch.Generator().manual_seed(i) for i in part.tolist()]
            losses.append(adavid.regression_loss(
                teacher, codec.encode(video[part]).to(device), text,
                torch.full((len(part),), step), config, generator=generators).cpu())
        loss = torch.cat(losses)
        rows.append([f"{t:g}", f"{loss.mean():.3f}", f"{loss.std():.3f}",
                     f"{config.k * loss.std():.2f}", *(
                         f"{torch.corrcoef(torch.stack([loss, values]))[0, 1]:+.2f}"
                         for values in traits.values())])
    return rows


if __name__ == "__main__":
    sys.exit(main())
