"""Sample and train a Wan2.1-1.3B of random weights: seconds and peak memory.

    make bench-1.3b

The first call writes 3.5 GB to runs/wan-1.3b-random. The transformer and the VAE have Wan's sizes;
the text encoder has only its width. For Linux, on the CPU.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

import adavid
from tests import miniature_wan
from tests.helpers import read_lines
from tiny_wan import PRESETS, WanCodec, WanModel, checkpoint

FOLDER = Path("runs/wan-1.3b-random")
SAMPLE = ["sample.py", "a cat walks on grass", "--model", FOLDER, "--dtype", "bfloat16",
          "--device", "cpu", "--frames", 9, "--height", 128, "--width", 192,
          "--out", "runs/wan-1.3b-samples"]
SHARDS, RUN = FOLDER / "shards", Path("runs/wan-1.3b-lora")
# SHARDS holds no VAE, so training draws no pictures.
TRAIN = ["train.py", "distill", "--model", FOLDER, "--data", SHARDS, "--out", RUN, "--lora", 16,
         "--steps", 1, "--batch-size", 1, "--device", "cpu", "--codec", SHARDS]


def main():
    if not (FOLDER / "interpolator.safetensors").exists():
        write()
    size = (FOLDER / checkpoint.FILE).stat().st_size
    print(f"weights: {size / 1e9:.2f} GB in bfloat16; {torch.get_num_threads()} threads")
    seconds, peak, said = measure(SAMPLE)
    print(f"sample.py, 9 frames of 128 x 192 in four decoupled steps: {seconds:.0f} s in all, "
          f"anonymous memory at most {peak / 1e9:.2f} GB ({peak / size:.2f} x the weights)\n{said}")
    print(compare_vae())
    shutil.rmtree(RUN, ignore_errors=True)
    write_shards()
    seconds, peak, _ = measure(TRAIN)
    cycle = read_lines(RUN / "times.jsonl")[0]["seconds"]
    print(f"train.py, one cycle with LoRA of rank 16 in float32, of 9 frames of 64 x 96: "
          f"{cycle:.0f} s, anonymous memory at most {peak / 1e9:.2f} GB")


def compare_vae():
    """A line: how far a VAE in bfloat16 is from one in float32, in the levels of 8-bit pixels."""
    latents = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    exact, rough = ((255 * WanCodec(FOLDER, vae_dtype=dtype).decode(latents)).round()
                    for dtype in (torch.float32, torch.bfloat16))
    error = exact - rough
    psnr = 20 * torch.log10(255 / error.square().mean().sqrt())
    return (f"the VAE in bfloat16, 9 frames of 64 x 96: {psnr:.0f} dB from float32, "
            f"{error.abs().max():.0f} levels of 255 at most")


def write():
    torch.manual_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    miniature_wan.tokenizer().save_pretrained(FOLDER / "tokenizer")
    UMT5EncoderModel(UMT5Config(vocab_size=200, d_model=4096, d_kv=64, d_ff=64, num_layers=1,
                                num_heads=1)).save_pretrained(FOLDER / "text_encoder")
    AutoencoderKLWan().save_pretrained(FOLDER / "vae")
    with torch.device("meta"):
        shapes = WanModel(PRESETS["wan-1.3b"]).state_dict()
    tensors = {name: torch.randn(p.shape, dtype=torch.bfloat16) * p[0].numel() ** -0.5
               for name, p in shapes.items()}
    checkpoint.write(FOLDER, asdict(PRESETS["wan-1.3b"]), tensors,
                     metadata={"method": "none: random weights"})
    save_file(adavid.FrameInterpolator(16).state_dict(), FOLDER / "interpolator.safetensors")


def write_shards():
    """Two random clips, as tools.encode writes them."""
    SHARDS.mkdir(exist_ok=True)
    shape = (16, 3, 8, 12)
    save_file({"latents": torch.randn(2, *shape), "text": torch.randn(2, 9, 4096)},
              SHARDS / "shard.safetensors", {"prompts": '["a cat", "a dog"]'})
    save_file({"null_text": torch.randn(1, 9, 4096)}, SHARDS / "null_text.safetensors")
    (SHARDS / "index.json").write_text(json.dumps({
        "latent_shape": shape, "has_videos": True,
        "shards": [{"file": "shard.safetensors", "count": 2}]}))


def measure(command):
    """Run Python in a process of its own: seconds, its largest anonymous memory, its output."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                          text=True) as child:
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            if found := re.search(r"RssAnon:\s+(\d+) kB", status):
                peak = max(peak, int(found[1]) * 1024)
            time.sleep(0.01)
        if child.returncode:
            raise SystemExit(child.returncode)
        return time.perf_counter() - start, peak, child.stdout.read().strip()


if __name__ == "__main__":
    main()
