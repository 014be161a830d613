"""A student for everybody else's software: the original code, Diffusers or ComfyUI.

    python -m tools.export --model runs/student --out exported --layout diffusers
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from runtime import cli
from runtime.lora import merge
from runtime.models import load_config
from tiny_wan import WanModel, checkpoint

SCHEDULER = {  # it noises each prediction anew, as this project's sampler does
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
    "stochastic_sampling": True}


@dataclass
class Export:
    """Write a model in another layout."""

    model: Path
    """student or teacher, in any layout"""
    out: Path
    """folder to write; for comfyui, a name in .safetensors gives the file"""
    layout: Literal[checkpoint.LAYOUTS] = "diffusers"
    """whose names for tensors and settings"""
    lora: Path | None = None
    """an adapter that train.py has made of this model, to be merged into it"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """of the weights, by default as they are; what Wan computes in float32 stays float32"""


def main(argv=None):
    return cli.run(run, Export, argv)


def run(args):
    home = args.out.parent if args.out.suffix == ".safetensors" else args.out
    out = args.out / "transformer" if args.layout == "diffusers" else args.out
    own = {checkpoint.home(args.model), checkpoint.weight_files(args.model)[0].parent}
    if {folder.resolve() for folder in own} & {home.resolve(), out.resolve()}:
        raise ValueError(f"--out {args.out} lies in the model's own folder; choose another")
    source = args.lora or args.model  # of the numbers
    config, metadata = load_config(source), checkpoint.read_metadata(source)
    model = WanModel.from_pretrained(args.model, args.dtype and getattr(torch, args.dtype))
    if args.lora:
        merge(model, args.lora)
        if model.blocks[0].ffn[0].weight.dtype != torch.float32:
            print("note: this dtype rounds an adapter's small changes away; --dtype float32 keeps "
                  "them, and so does the adapter beside its model")
    notes = {k: v for k, v in metadata.items() if k not in ("format", "config")}
    model.save_pretrained(out, args.layout, notes | {"avd": config.to_json()})
    if args.layout == "diffusers":
        (args.out / "scheduler").mkdir(exist_ok=True)
        (args.out / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(SCHEDULER, indent=2) + "\n")
    interpolator = checkpoint.home(args.model) / "interpolator.safetensors"
    if interpolator.exists():
        shutil.copy(interpolator, home)
    sigmas = ", ".join(f"{t / 1000:g}" for t in config.timesteps)
    print(f"{args.out}: {args.layout} layout; a few-step sampler's sigmas are {sigmas}, 0")


if __name__ == "__main__":
    sys.exit(main())
