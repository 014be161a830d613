"""Encode videos and their captions to shards of latents and embeddings, for train.py --data.

    python -m tools.encode --videos clips --captions captions.jsonl --model Wan2.1-T2V-1.3B \\
        --out shards
    torchrun --nproc_per_node 8 -m tools.encode ...          shares the work among 8 GPUs

The same command resumes after an interruption, and tries broken videos again. skipped.jsonl lists
the videos that cannot be used, with the reasons. Without --videos, only prompts are encoded, which
is enough for distribution matching.
"""

import csv
import io
import json
import os
import re
import sys
from collections import ChainMap, Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from adavid import Limits
from runtime import cli
from runtime.data import INDEX, Prefetch
from runtime.distributed import init_distributed, rank, world_size
from runtime.media import SUFFIXES, read_video
from runtime.run import lock_folder, stop_signals
from sample import LONGEST, read_prompts
from tiny_wan import ToyCodec, WanCodec, WanModel, checkpoint, open_codec


@dataclass
class Encode:
    """Encode videos and their captions, or only prompts, for train.py --data."""

    out: Path
    """folder for the shards; if it has some already, the same command resumes"""
    model: Path
    """Wan2.1, in any layout, with its text encoder and VAE"""
    videos: Path | None = None
    """folder of videos, searched with its subfolders; without it, only prompts are encoded"""
    captions: Path | None = None
    """a .jsonl of {"video": ..., "caption": ...}, a .csv with these columns, or a .txt with a
    prompt on each line; by default a .txt beside each video"""
    codec: Path | None = None
    """folder with Wan's text encoder and VAE; by default the model's folder"""
    exclude_prompts: Path | None = None
    """a text file with a prompt on each line, as of a benchmark; captions must not repeat one"""
    frames: cli.Size = WanCodec.frames
    """of each video, from its start; shorter videos are skipped"""
    height: cli.Size = WanCodec.height
    """in pixels; videos are scaled and cropped to it"""
    width: cli.Size = WanCodec.width
    """in pixels; videos are scaled and cropped to it"""
    fps: Annotated[int, Limits(1, 1000)] = WanCodec.fps
    """frames per second that videos are resampled to"""
    negative_prompt: str | None = None
    """what guidance leads away from in training; by default Wan's own"""
    shard_size: cli.Count = 64
    """videos in a shard, and the most that `kill -9` can lose; Ctrl-C loses none"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the text encoder; auto is bfloat16 on an NVIDIA or AMD GPU, elsewhere that of its file"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to run"""


def main(argv=None):
    return cli.run(run, Encode, argv)


def run(args):
    device = init_distributed(args.device)
    # Ranks may finish hours apart, and an ordinary barrier gives up after 10 to 30 minutes.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world_size() > 1 else None
    excluded = read_prompts(args.exclude_prompts) if args.exclude_prompts else []
    excluded = {plain(prompt) for prompt in excluded}
    captions, skipped = find_captions(args, excluded)
    config = WanModel.from_pretrained(args.model, device="meta").config
    dtype = cli.pick_dtype(args.dtype, device, config)
    cli.announce(device, dtype, args.device)
    codec = open_codec(args.model, config, args.codec, device=device, dtype=dtype)
    if isinstance(codec, ToyCodec):
        raise ValueError(f"{args.model}: the toy needs no shards; train.py makes its videos")
    null_prompt = codec.negative_prompt if args.negative_prompt is None else args.negative_prompt
    settings = {  # the same for all shards of a folder
        "latent_shape": list(codec.latent_shape(args.frames, args.height, args.width)),
        "has_videos": args.videos is not None, "fps": args.fps, "text_dim": config.text_dim,
        "null_prompt": null_prompt}
    if args.videos:
        codec.prepare()
    args.out.mkdir(parents=True, exist_ok=True)
    with lock_folder(args.out):
        done = {name: caption for shard in read_shards(args.out, settings).values()
                for name, caption in shard.items()}
        stale = [name for name, caption in done.items()
                 if is_excluded(caption, excluded) or captions.get(name, caption) != caption]
        if stale:
            raise ValueError(f"{args.out}: {len(stale)} of its samples, such as {stale[0]!r}, now "
                             f"have another caption or an excluded one; choose another --out")
        todo = [item for item in captions.items() if item[0] not in done]
        if group:
            dist.barrier(group)  # no rank writes before all have read what is done
        null_text, broken = encode(args, codec, todo[rank()::world_size()], settings)
        all_broken = [broken]
        if group:
            all_broken = [None] * world_size()
            dist.all_gather_object(all_broken, broken, group)
        if rank() == 0:
            finish(args.out, settings, dict(ChainMap(skipped, *all_broken)), null_text)


def encode(args, codec, items, settings):
    """Write shards of `items`, pairs of name and caption.

    Returns the null prompt's embedding and {name: reason} of the videos that cannot be used.
    """
    has_videos, rows, broken = settings["has_videos"], [], {}
    fetch = Prefetch(lambda i: read_video(args.videos / items[i][0], args.frames, args.height,
                                          args.width, args.fps))
    bar = tqdm(items, desc="encode", unit="video" if has_videos else "prompt", disable=rank() > 0)
    with codec.text_encoder() as encode_text, stop_signals() as signals:
        try:
            for i, (name, caption) in enumerate(bar):
                if signals:
                    raise SystemExit(128 + signals[0])
                try:
                    latents = codec.encode(fetch(i)[None])[0].half().cpu() if has_videos else None
                    if has_videos and not latents.isfinite().all():
                        raise ValueError("its latents are not finite")
                except ValueError as error:
                    broken[name] = str(error)
                    continue
                rows.append((name, caption, encode_text(caption), latents))
                if len(rows) == args.shard_size:
                    write_shard(args.out, rows, settings)
                    rows = []
        finally:  # Ctrl-C and SIGTERM lose nothing
            if rows:
                write_shard(args.out, rows, settings)
        return encode_text(settings["null_prompt"])[None], broken


# ---------------------------------------------------------------------------------------------
# Input: captions and videos
# ---------------------------------------------------------------------------------------------


def find_captions(args, excluded):
    """{name: caption} of what to encode, and {name: reason} of what is skipped.

    A video's name is its path within the folder. Without videos, a prompt is its own name.
    """
    captions = read_captions(args.captions) if args.captions else {}
    if args.videos is None:
        if not captions:
            raise ValueError("nothing to encode; give --videos, or only --captions for prompts")
        names = captions
    else:
        if not args.videos.is_dir():
            raise ValueError(f"{args.videos}: no such folder")
        if args.captions and args.captions.suffix == ".txt":
            raise ValueError(f"{args.captions}: contains only prompts; leave out --videos, or give "
                             f"a .jsonl or .csv, which name the video of each caption")
        found = sorted(f.relative_to(args.videos).as_posix() for f in args.videos.rglob("*")
                       if f.suffix.lower() in SUFFIXES)
        if not args.captions:
            captions = {name: sidecar(args.videos / name) for name in found}
        names = dict.fromkeys([*found, *captions])
        if not names:
            raise ValueError(f"{args.videos}: contains no videos ({', '.join(sorted(SUFFIXES))})")

    usable, skipped = {}, {}
    for name in names:
        caption = captions.get(name)
        if args.videos and (Path(name).is_absolute() or ".." in Path(name).parts
                            or not os.path.isfile(args.videos / name)):
            skipped[name] = "no such file in the folder"
        elif not caption:
            skipped[name] = "no caption"
        elif len(caption) > LONGEST:
            skipped[name] = f"its caption has more than {LONGEST} characters"
        elif is_excluded(caption, excluded):
            skipped[name] = "its caption is among the excluded prompts"
        else:
            usable[name] = caption
    return usable, skipped


def is_excluded(caption, prompts):
    """Whether the caption is one of the plain `prompts`, or contains one of four words or more."""
    caption = plain(caption)
    return any(p == caption or p in caption and p.count(" ") >= 3 for p in prompts)


def plain(text):
    """The text in lower case, with single spaces and without punctuation at its ends."""
    found = re.search(r"\w.*\w|\w", " ".join(text.lower().split()))
    return found[0] if found else ""


def read_captions(file):
    """{video: caption} or, for a .txt, {prompt: prompt}. ValueError names a bad line."""
    if file.suffix == ".txt":
        return {prompt: prompt for prompt in read_prompts(file)}
    captions = {}
    # Not splitlines(), which also splits at characters inside captions, such as U+2028.
    text = io.StringIO(checkpoint.read_text(file, most=10**9), newline="")
    try:
        rows = csv.DictReader(text) if file.suffix == ".csv" else (
            json.loads(line) for line in text if line.strip())
        for row in rows:
            video, caption = str(row["video"]), " ".join(str(row["caption"] or "").split())
            if video in captions:
                raise ValueError(f"{file}: {video!r} occurs twice")
            captions[video] = caption
    except (json.JSONDecodeError, csv.Error, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file}: entry {len(captions) + 1} has no video and caption") from None
    return captions


def sidecar(video):
    """The caption in the .txt beside a video, or None."""
    file = video.with_suffix(".txt")
    try:
        return " ".join(checkpoint.read_text(file, most=10**6).split()) if file.exists() else None
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------
# Output: shards and the index
# ---------------------------------------------------------------------------------------------


def write_shard(out, rows, settings):
    """Write rows of name, caption, text `[l, d]` and latents to this rank's next file."""
    names, captions, text, latents = zip(*rows)
    tensors = {"text": pad_sequence(text, batch_first=True)}
    if settings["has_videos"]:
        tensors["latents"] = torch.stack(latents)
    number = 0
    while (file := out / f"shard-{rank():03}-{number:05}.safetensors").exists():
        number += 1
    header = {"settings": settings, "videos": names, "prompts": captions}
    checkpoint.write_files({file: tensors},
                           {key: json.dumps(value) for key, value in header.items()})


def read_shards(out, settings):
    """{shard: {name: caption}} of all ranks. ValueError if one was encoded with other settings."""
    shards = {}
    for file in sorted(out.glob("shard-*.safetensors")):
        with checkpoint.open_weights(file) as shard:
            header = shard.metadata() or {}
        try:
            then, *rows = (json.loads(header[key]) for key in ("settings", "videos", "prompts"))
            changed = [f"{k} was {then.get(k)!s:.60}, now {settings[k]!s:.60}"
                       for k in settings if then.get(k) != settings[k]]
            shards[file.name] = {str(name): str(caption) for name, caption in zip(*rows)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{file}: not a shard of tools.encode; delete it to encode its videos "
                             f"again") from None
        if changed:
            raise ValueError(f"{file}: was encoded with other settings ({'; '.join(changed)}); "
                             f"repeat them, or choose another --out")
    return shards


def finish(out, settings, skipped, null_text):
    """Write skipped.jsonl, the null prompt and the index, without which nothing can train."""
    lines = (json.dumps({"video": name, "reason": why}) + "\n" for name, why in skipped.items())
    (out / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    shards = read_shards(out, settings)
    if not shards:
        raise ValueError(f"{out}: nothing could be encoded; skipped.jsonl gives the reasons")
    checkpoint.write_files({out / "null_text.safetensors": {"null_text": null_text}})
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
