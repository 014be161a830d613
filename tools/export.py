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

from adavid import AnyNumber, Limits
from runtime import cli
from runtime.lora import FILE, check_loras, extract, load_merged
from runtime.models import check_out, checkpoint_to_model, find_interpolator, find_numbers
from tiny_wan import WanModel, checkpoint

STUDENT_SCHEDULER = {  # renoises each prediction, as adavid.sample does
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
    "stochastic_sampling": True}
TEACHER_SCHEDULER = {  # Wan2.1's own
    "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "flow_shift": 5.0,
    "prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass
class Export:
    """Write a model in another layout."""

    model: Path
    """student or teacher, in any layout, or a checkpoint of a training"""
    out: Path
    """folder to write; with --layout comfyui it may be a file, with a name in .safetensors"""
    layout: Literal[checkpoint.LAYOUTS] | None = None
    """of the files to write; by default diffusers"""
    lora: tuple[Path, ...] = ()
    """LoRAs of this model, files, their folders, or checkpoints of a training with --lora; they are
    merged into the weights"""
    lora_scale: tuple[AnyNumber, ...] = ()
    """the weight of each LoRA; by default 1"""
    lora_rank: Annotated[int, Limits(1, 2**12)] | None = None
    """write the difference between the model and its --base as a LoRA of this rank"""
    base: Path | None = None
    """with --lora-rank: the model that this one was distilled from"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """of the weights, by default the model's own; what Wan computes in float32 stays float32"""


def main(argv=None):
    return cli.run(run, Export, argv)


def run(args):
    if (args.lora_rank is None) != (args.base is None):
        raise ValueError("--lora-rank and --base go together")
    check_out(args.out, [args.model, *args.lora])
    args.model, *args.lora = map(checkpoint_to_model, (args.model, *args.lora))
    if args.base:
        if args.lora or args.layout or args.dtype:
            raise ValueError("--lora-rank writes one float32 file, which all programs read: leave "
                             "out --lora, --layout and --dtype")
        return export_lora(args)
    layout = args.layout or "diffusers"
    scales = args.lora_scale or (1.0,) * len(args.lora)
    if len(scales) != len(args.lora):
        raise ValueError(f"--lora-scale: {len(scales)} weights for {len(args.lora)} LoRA files")
    home = args.out.parent if args.out.suffix == ".safetensors" else args.out
    out = args.out / "transformer" if layout == "diffusers" else args.out
    interpolator = find_interpolator(*args.lora, args.model)
    check_out(args.out, [args.model, *args.lora], [
        *checkpoint.find_written(out, layout),
        *[args.out / "scheduler" / "scheduler_config.json"] * (layout == "diffusers"),
        *[home / "interpolator.safetensors"] * bool(interpolator)])

    numbers = find_numbers(args.model, args.lora)
    dtype = args.dtype and getattr(torch, args.dtype)
    if args.lora:
        check_loras(args.lora, WanModel.from_pretrained(args.model, device="meta"))
        model = load_merged(args.model, dtype, "cpu", zip(args.lora, scales))
        if model.blocks[0].ffn[0].weight.dtype != torch.float32:
            print("note: small changes of the adapter are lost to rounding in this dtype; use "
                  "--dtype float32, or the adapter with the unchanged model")
    else:
        model = WanModel.from_pretrained(args.model, dtype)
    model.save_pretrained(out, layout, kept_metadata(args.model, numbers))

    if layout == "diffusers":
        scheduler = STUDENT_SCHEDULER if numbers.distilled else TEACHER_SCHEDULER
        (args.out / "scheduler").mkdir(exist_ok=True)
        (args.out / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(scheduler, indent=2) + "\n")
    if interpolator:
        shutil.copy(interpolator, home)
    sigmas = ", ".join(f"{t / 1000:g}" for t in numbers.config.timesteps)
    print(f"{args.out}: written in the {layout} layout; " + (
        f"sample with the sigmas {sigmas}, 0" if numbers.distilled else
        "no steps of a student are stored, as no file says that it is one"))


def kept_metadata(model, numbers):
    """What an export's header says: what the model's and the distilled LoRA's say, in full."""
    metadata = checkpoint.read_metadata(model)
    metadata |= checkpoint.read_metadata(numbers.source) if numbers.source else {}
    kept = {name: text for name, text in metadata.items() if name not in ("format", "config")}
    if numbers.distilled or numbers.source:
        kept["avd"] = numbers.config.to_json()
    return kept


def export_lora(args):
    student, base = (WanModel.from_pretrained(path) for path in (args.model, args.base))
    if student.config != base.config:
        raise ValueError(f"{args.base}: its sizes are not those of {args.model}")
    check_out(args.out, [args.model, args.base],
              [args.out / FILE, args.out / "interpolator.safetensors"])
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
