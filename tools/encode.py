"""Videos and captions to shards of latents and embeddings, which train.py draws from.

    python -m tools.encode --videos clips --captions captions.jsonl --model Wan2.1-T2V-1.3B \\
        --out shards
    torchrun --nproc_per_node 8 -m tools.encode ...          a share for each GPU

The same command again goes on where it stopped. What cannot be used is listed, with the reason, in
skipped.jsonl (to try broken videos once more, delete broken-*.jsonl). Without --videos, prompts
alone are encoded: enough for distribution matching.
"""

import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import imageio_ffmpeg
import torch
import torch.distributed as dist
from einops import rearrange
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from runtime import cli
from runtime.checkpoints import fsync
from runtime.data import INDEX, Prefetch
from runtime.distributed import init_distributed, rank, world_size
from runtime.run import stop_signals
from sample import LONGEST, read_prompts
from tiny_wan import ToyCodec, WanModel, checkpoint, open_codec

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
TIMEOUT = 300  # seconds for one video


@dataclass
class Encode:
    """Encode videos and their captions, or prompts alone, for train.py --data."""

    out: Path
    """folder of the shards; the same command again resumes what is there"""
    model: Path
    """Wan2.1, in any layout, with its text encoder and VAE"""
    videos: Path | None = None
    """folder of videos, searched throughout; without it, prompts alone are encoded"""
    captions: Path | None = None
    """.jsonl of {"video": ..., "caption": ...}, .csv with these columns, or .txt with a prompt on
    each line; by default a text file beside each video"""
    codec: Path | None = None
    """folder with the text encoder and the VAE, if they are not with the model"""
    exclude_prompts: Path | None = None
    """prompts, one on each line, that captions must not repeat: those of your benchmarks"""
    frames: int | None = None
    """of each video, from its start; by default 81"""
    height: int | None = None
    """in pixels, scaled and cropped to; by default 480"""
    width: int | None = None
    """in pixels; by default 832"""
    fps: int = 16
    """frames per second, resampled to"""
    negative_prompt: str | None = None
    """what guidance leads away from in training; by default Wan's own"""
    shard_size: int = 64
    """videos in a shard, and what `kill -9` loses at most; Ctrl-C loses none"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the text encoder; auto is bfloat16 on an NVIDIA or AMD GPU, elsewhere what its file has"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""


def main(argv=None):
    return cli.run(run, Encode, argv)


def run(args):
    device = init_distributed(args.device)
    # Some ranks may be done hours before others, and barriers give up after 10 to 30 minutes.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world_size() > 1 else None
    repeats = exclusion(args.exclude_prompts)
    items, left_out = find_items(args, repeats)
    config = WanModel.from_pretrained(args.model, device="meta").config
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16,
             "auto": torch.bfloat16 if device.type == "cuda" else None}[args.dtype]
    codec = open_codec(args.model, config, args.codec, device=device, dtype=dtype)
    if isinstance(codec, ToyCodec):
        raise ValueError(f"{args.model}: the toy needs no shards; its videos are made as it trains")
    shape = codec.latent_shape(args.frames, args.height, args.width)
    size = ((shape[1] - 1) * codec.time_factor + 1, *(n * codec.space_factor for n in shape[2:]))
    null_prompt = codec.negative_prompt if args.negative_prompt is None else args.negative_prompt
    has_videos = args.videos is not None
    settings = {"latent_shape": list(shape), "has_videos": has_videos, "fps": args.fps,
                "text_dim": config.text_dim, "null_prompt": null_prompt}
    if has_videos:
        codec.prepare()
    args.out.mkdir(parents=True, exist_ok=True)

    shards, broken = what_is_done(args.out, settings)
    done = {name: caption for captions in shards.values() for name, caption in captions.items()}
    stale = [name for name, caption in done.items()
             if repeats(caption) or items.get(name, caption) != caption]
    if stale:
        raise ValueError(f"{args.out}: {len(stale)} of its samples now have another caption, or an "
                         f"excluded one, such as {stale[0]!r}; choose another --out")
    todo = [item for item in items.items() if item[0] not in done and item[0] not in broken]
    if group:
        dist.barrier(group)  # all have looked before the first one writes
    mine = todo[rank()::world_size()]
    fetch = Prefetch(lambda i: read_video(args.videos / mine[i][0], *size, args.fps))
    log, pending = args.out / f"broken-{rank():03}.jsonl", []
    bar = tqdm(mine, desc="encode", unit="video" if has_videos else "prompt", disable=rank() > 0)
    with codec.text_encoder() as encode, stop_signals() as signals:
        null_text = encode(null_prompt)[None]
        try:
            for i, (name, caption) in enumerate(bar):
                if signals:
                    raise SystemExit(128 + signals[0])
                try:
                    latents = codec.encode(fetch(i)[None])[0].half().cpu() if has_videos else None
                    if has_videos and not latents.isfinite().all():
                        raise ValueError("its latents are not finite")
                except ValueError as error:
                    entry = {"video": name, "reason": str(error), "settings": settings}
                    with open(log, "a", encoding="utf-8") as file:
                        print(f"\n{json.dumps(entry)}", file=file)  # the last one may be cut
                    continue
                pending.append((name, caption, encode(caption), latents))
                if len(pending) == args.shard_size:
                    write_shard(args.out, pending, settings)
                    pending = []
        finally:  # Ctrl-C and SIGTERM lose nothing
            if pending:
                write_shard(args.out, pending, settings)
    if group:
        dist.barrier(group)
    if rank() == 0:
        finish(args.out, settings, items, left_out, null_text)


# ---------------------------------------------------------------------------------------------
# What there is to encode
# ---------------------------------------------------------------------------------------------


def find_items(args, repeats):
    """{name: caption} to encode, and {name: reason} of what is left out. A prompt is its own name.

    repeats: tells of a caption whether it is excluded.
    """
    captions = read_captions(args.captions) if args.captions else {}
    if args.videos is None:
        if not captions:
            raise ValueError("nothing to encode: give --videos, or --captions for prompts alone")
        names = list(captions)
    else:
        if not args.videos.is_dir():
            raise ValueError(f"{args.videos}: no such folder")
        if args.captions and args.captions.suffix == ".txt":
            raise ValueError(f"{args.captions}: has prompts alone, so leave out --videos; or give "
                             f".jsonl or .csv, which say which video each caption is of")
        there = sorted(f.relative_to(args.videos).as_posix() for f in args.videos.rglob("*")
                       if f.suffix.lower() in SUFFIXES)
        if not args.captions:
            captions = {name: sidecar(args.videos / name) for name in there}
        names = list(dict.fromkeys([*there, *captions]))
        if not names:
            raise ValueError(f"{args.videos}: no videos in it ({', '.join(sorted(SUFFIXES))})")

    items, left_out = {}, {}
    for name in names:
        caption = captions.get(name)
        if args.videos and (".." in Path(name).parts or Path(name).is_absolute()
                            or not os.path.isfile(args.videos / name)):
            left_out[name] = "no such file in the folder"
        elif not caption:
            left_out[name] = "no caption"
        elif len(caption) > LONGEST:
            left_out[name] = f"{len(caption)} characters are no caption"
        elif repeats(caption):
            left_out[name] = "its caption is among the excluded prompts"
        else:
            items[name] = caption
    return items, left_out


def exclusion(file):
    """A function that tells of a caption whether it equals one of the file's prompts, or contains
    one of four words or more."""
    prompts = {plain(prompt) for prompt in read_prompts(file)} if file else set()
    long_ones = [prompt for prompt in prompts if prompt.count(" ") >= 3]

    def repeats(caption):
        caption = plain(caption)
        return caption in prompts or any(prompt in caption for prompt in long_ones)

    return repeats


def plain(text):
    """For comparing: lower case, single spaces, no punctuation at the ends."""
    found = re.search(r"\w.*\w|\w", " ".join(text.lower().split()))
    return found[0] if found else ""


def read_captions(file):
    """{video: caption}, or for a .txt {prompt: prompt}. ValueError names a bad line."""
    if file.suffix == ".txt":
        return {prompt: prompt for prompt in read_prompts(file)}
    captions = {}
    try:
        # Not splitlines(), which also splits at what captions contain, such as U+2028.
        text = io.StringIO(file.read_text(encoding="utf-8-sig"), newline="")
        rows = csv.DictReader(text) if file.suffix == ".csv" else (
            json.loads(line) for line in text if line.strip())
        for row in rows:
            video, caption = str(row["video"]), " ".join(str(row["caption"] or "").split())
            if video in captions:
                raise ValueError(f"{file}: {video!r} is in it twice")
            captions[video] = caption
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file in UTF-8") from None
    except (json.JSONDecodeError, csv.Error, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file}: entry {len(captions) + 1} has no video and caption") from None
    return captions


def sidecar(video):
    """The caption in the text file beside a video, or None."""
    file = video.with_suffix(".txt")
    try:
        return " ".join(file.read_text(encoding="utf-8").split()) if file.is_file() else None
    except UnicodeDecodeError:
        return None


def read_video(file, frames, height, width, fps):
    """RGB in [0, 1] `[3, f, h, w]`: resampled, scaled and cropped. ValueError says why not."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin",
        "-protocol_whitelist", "file,pipe", "-max_pixels", str(2**26),
        "-i", f"file:{file.resolve()}", "-map", "0:v:0",
        "-vf", f"fps={fps},scale={width}:{height}:force_original_aspect_ratio=increase,"
               f"crop={width}:{height}",
        "-frames:v", str(frames), "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:"]
    with tempfile.TemporaryFile() as complaints:  # of a damaged file, they may have no end
        try:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=complaints,
                                    timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ValueError(f"not decoded within {TIMEOUT} s") from None
        complaints.seek(0)
        said = complaints.read(1000).decode(errors="replace")
    count = len(result.stdout) // (height * width * 3)
    if count < frames:
        if "matches no streams" in said:
            raise ValueError("no video in it")
        said = re.sub(r"^\[.*?\] ", "", said.partition("\n")[0])
        why = f" ({said.replace(f'file:{file.resolve()}', 'it')[:120]})" if said else ""
        raise ValueError(f"{count} of {frames} frames at {fps} fps{why}")
    video = torch.frombuffer(bytearray(result.stdout), dtype=torch.uint8)
    return rearrange(video, "(f h w c) -> c f h w", f=frames, h=height, w=width).float() / 255


# ---------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------


def write_shard(out, rows, settings):
    """Rows of name, caption, text `[l, d]` and latents become this rank's next file."""
    names, captions, text, latents = zip(*rows)
    tensors = {"text": pad_sequence(text, batch_first=True)}
    if latents[0] is not None:
        tensors["latents"] = torch.stack(latents)
    number = 0
    while (file := out / f"shard-{rank():03}-{number:05}.safetensors").exists():
        number += 1
    about = {"settings": settings, "videos": names, "prompts": captions}
    save_file(tensors, f"{file}.part", {key: json.dumps(value) for key, value in about.items()})
    fsync(Path(f"{file}.part"))
    os.replace(f"{file}.part", file)


def what_is_done(out, settings):
    """{shard: {name: caption}} and {name: reason} of the broken, from earlier runs of any ranks."""
    shards, broken = {}, {}
    for file in sorted(out.glob("shard-*.safetensors")):
        with checkpoint.open_weights(file) as shard:
            about = shard.metadata() or {}
        try:
            then, *rows = (json.loads(about[key]) for key in ("settings", "videos", "prompts"))
            changed = [f"{k} was {str(then.get(k)):.60}, now {str(settings[k]):.60}"
                       for k in settings if then.get(k) != settings[k]]
            shards[file.name] = {str(name): str(caption) for name, caption in zip(*rows)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{file}: not a shard of tools.encode; delete it, and what it held "
                             f"is encoded again") from None
        if changed:
            raise ValueError(f"{file}: was encoded with other settings ({'; '.join(changed)}); "
                             f"repeat them, or choose another --out")
    for file in sorted(out.glob("broken-*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["settings"] == settings:  # too short for others may be enough for these
                    broken[entry["video"]] = str(entry["reason"])
            except (ValueError, KeyError, TypeError, RecursionError):
                pass  # the line that an interruption cut: its video is tried again
    return shards, broken


def finish(out, settings, items, left_out, null_text):
    """The index, without which nothing trains, the list of what was skipped, and a summary."""
    shards, broken = what_is_done(out, settings)
    skipped = {name: why for name, why in broken.items() if name in items} | left_out
    lines = (json.dumps({"video": name, "reason": why}) + "\n" for name, why in skipped.items())
    (out / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    if not shards:
        raise ValueError(f"{out}: nothing could be encoded; see why in its skipped.jsonl")
    save_file({"null_text": null_text.contiguous()}, out / "null_text.safetensors")
    index = settings | {
        "shards": [{"file": file, "count": len(names)} for file, names in shards.items()]}
    (out / f"{INDEX}.part").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(out / f"{INDEX}.part", out / INDEX)
    count = sum(len(names) for names in shards.values())
    reasons = Counter(re.sub(r"^\d+ of.*", "broken or too short", why) for why in skipped.values())
    print(f"{count} encoded in {len(shards)} shards, {len(skipped)} skipped"
          + "".join(f"; {n}: {why}" for why, n in reasons.items()) + f" (see {out}/skipped.jsonl)")


if __name__ == "__main__":
    sys.exit(main())
