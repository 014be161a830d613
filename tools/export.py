"""Export a model for other software: the original code, Diffusers or ComfyUI.

    python -m tools.export --model runs/student --out exported --layout diffusers
    python -m tools.export --model runs/student --base Wan2.1-T2V-1.3B --lora-rank 64 --out lora
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from adavid import Limits
from runtime import cli
from runtime.lora import FILE, extract, load_merged
from runtime.models import find_interpolator, load_config
from tiny_wan import WanModel, checkpoint

SCHEDULER = {  # the one that renoises each prediction, as adavid.sample does
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
    "stochastic_sampling": True}


@dataclass
class Export:
    """Write a model in another layout."""

    model: Path
    """student or teacher, in any layout"""
    out: Path
    """folder to write; with --layout comfyui it may be a file, with a name in .safetensors"""
    layout: Literal[checkpoint.LAYOUTS] | None = None
    """of the files to write; by default diffusers"""
    lora: Path | None = None
    """a LoRA of this model, in a file; it is merged into the weights"""
    lora_rank: Annotated[int, Limits(1, 2**12)] | None = None
    """write the difference between the model and its --base as a LoRA of this rank"""
    base: Path | None = None
    """with --lora-rank: the model that this one was distilled from"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """of the weights, by default the model's own; what Wan computes in float32 stays float32"""


def main(argv=None):
    return cli.run(run, Export, argv)


def run(args):
    home = args.out.parent if args.out.suffix == ".safetensors" else args.out
    layout = args.layout or "diffusers"
    out = args.out / "transformer" if layout == "diffusers" else args.out
    own = {checkpoint.home(args.model), checkpoint.weight_files(args.model)[0].parent}
    if {folder.resolve() for folder in own} & {home.resolve(), out.resolve()}:
        raise ValueError(f"--out {args.out} would write to the model's own folder; choose another")

    if (args.lora_rank is None) != (args.base is None):
        raise ValueError("--lora-rank and --base go together")
    if args.base:
        if args.lora or args.layout or args.dtype:
            raise ValueError("--lora-rank writes one float32 file, which all programs read: leave "
                             "out --lora, --layout and --dtype")
        return export_lora(args)
    distilled = args.lora or args.model  # the file with the method's numbers
    config, metadata = load_config(distilled), checkpoint.read_metadata(distilled)
    dtype = args.dtype and getattr(torch, args.dtype)
    if args.lora:
        model = load_merged(args.model, dtype, "cpu", [(args.lora, 1.0)])
        if model.blocks[0].ffn[0].weight.dtype != torch.float32:
            print("note: small changes of the adapter are lost to rounding in this dtype; use "
                  "--dtype float32, or the adapter with the unchanged model")
    else:
        model = WanModel.from_pretrained(args.model, dtype)
    kept = {k: v for k, v in metadata.items() if k not in ("format", "config")}
    model.save_pretrained(out, layout, kept | {"avd": config.to_json()})

    if layout == "diffusers":
        (args.out / "scheduler").mkdir(exist_ok=True)
        (args.out / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(SCHEDULER, indent=2) + "\n")
    interpolator = find_interpolator(distilled, args.model)
    if interpolator and interpolator.parent.resolve() != home.resolve():
        shutil.copy(interpolator, home)
    sigmas = ", ".join(f"{t / 1000:g}" for t in config.timesteps)
    print(f"{args.out}: written in the {layout} layout; sample with the sigmas {sigmas}, 0")


def export_lora(args):
    student, base = (WanModel.from_pretrained(path) for path in (args.model, args.base))
    if student.config != base.config:
        raise ValueError(f"{args.base}: its sizes are not those of {args.model}")
    with torch.no_grad():
        tensors, missed, others = extract(student, base, args.lora_rank)
    kept = {k: v for k, v in checkpoint.read_metadata(args.model).items() if k != "config"}
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_files({args.out / FILE: tensors}, kept | {"format": "pt"})
    if interpolator := find_interpolator(args.model):
        shutil.copy(interpolator, args.out)
    print(f"{args.out / FILE}: of the norm of all changes, rank {args.lora_rank} leaves out "
          f"{missed:.1%}, and {others:.1%} are in biases, norms and embeddings, which it lacks")


if __name__ == "__main__":
    sys.exit(main())
