"""Encode videos and their captions to shards of latents and embeddings, for train.py --data.

    python -m tools.encode --videos clips --captions captions.jsonl --model Wan2.1-T2V-1.3B \\
        --out shards
    torchrun --nproc_per_node 8 -m tools.encode ...          shares the work among 8 GPUs

The same command resumes after an interruption, tries broken videos again, and encodes again what
has changed. skipped.jsonl lists the videos that cannot be used, with the reasons, warnings.jsonl
those that are odd. Without --videos, only prompts are encoded, which is enough for distribution
matching.
"""

import hashlib
import json
import os
import sys
import unicodedata
from collections import ChainMap, Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from adavid import Limits
from runtime import cli
from runtime.data import INDEX, Prefetch, check_halves
from runtime.distributed import all_gather, init_distributed, rank, world_size
from runtime.media import SUFFIXES, probe, read_video
from runtime.models import check_out, load_config
from runtime.run import lock_folder, stop_signals
from sample import LONGEST
from tiny_wan import ToyCodec, WanCodec, WanModel, checkpoint, open_codec
from tools.captions import ExcludedPrompts, read_captions
from tools.faults import find_faults


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
    """a .jsonl or .json of {"video": ..., "caption": ...}, a .csv with these columns, or a .txt
    with a prompt on each line; by default a .txt beside each video"""
    codec: Path | None = None
    """folder with Wan's text encoder and VAE; by default the model's folder"""
    exclude_prompts: Path | None = None
    """a text file with a prompt on each line, as of a benchmark, or VBench's .json; captions must
    not repeat one"""
    frames: cli.Size = WanCodec.frames
    """of each video, from its start; shorter videos are skipped"""
    height: cli.Size = WanCodec.height
    """in pixels; videos are scaled and cropped to it"""
    width: cli.Size = WanCodec.width
    """in pixels; videos are scaled and cropped to it"""
    fps: Annotated[int, Limits(1, 1000)] = WanCodec.fps
    """frames per second that videos are resampled to"""
    allow_still: bool = False
    """also take videos that stand still for most of the time"""
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
    inputs = find_inputs(args)
    config = WanModel.from_pretrained(args.model, device="meta").config
    dtype = cli.pick_dtype(args.dtype, device, config)
    cli.announce(device, dtype, args.device)
    codec = open_codec(args.model, config, args.codec, device=device, dtype=dtype)
    if isinstance(codec, ToyCodec):
        raise ValueError(f"{args.model}: the toy needs no shards; train.py makes its videos")
    stride = max(load_config(args.model).strides)
    check_halves(f"--frames {args.frames}", (args.frames - 1) // codec.time_factor + 1, stride)
    null_prompt = codec.negative_prompt if args.negative_prompt is None else args.negative_prompt
    settings = {  # the same for all shards of a folder
        "latent_shape": list(codec.latent_shape(args.frames, args.height, args.width, stride)),
        "has_videos": args.videos is not None, "fps": args.fps, "text_dim": config.text_dim,
        "null_prompt": null_prompt}
    check_out(args.out, [args.model, args.codec])
    args.out.mkdir(parents=True, exist_ok=True)
    with lock_folder(args.out):
        shards, stale = read_shards(args.out, settings, inputs.usable)
        if stale and not inputs.usable.keys() & names_in({**shards, **stale}):
            raise ValueError(f"{args.out}: holds none of these videos or prompts; choose another "
                             f"--out")
        done = names_in(shards)
        todo = [item for name, item in inputs.usable.items() if name not in done]
        if stale and rank() == 0:
            print(f"{len(stale)} of {len(shards) + len(stale)} shards hold something that has "
                  f"changed or is gone: their samples are encoded again")
        todo = todo[rank()::world_size()]
        # No rank writes before all have read what is done.
        lengths = sum(all_gather(count_frames(args, inputs.files, todo), group), [])
        report_lengths(lengths, args, codec.time_factor * stride, bool(done))
        if args.videos:
            codec.prepare()
        null_text, broken = encode(args, codec, todo, settings, inputs.files)
        all_broken = all_gather(broken, group)
        if rank() == 0:
            finish(args, settings, inputs, dict(ChainMap(inputs.skipped, *all_broken)), null_text)


def encode(args, codec, items, settings, files):
    """Write shards of `items`, which are Samples.

    Returns the null prompt's embedding and {name: reason} of the videos that cannot be used.
    """
    has_videos, rows, broken = settings["has_videos"], [], {}

    def load(i):
        video = read_video(files[items[i].name], args.frames, args.height, args.width, args.fps)
        return video, find_faults(video, args.allow_still)

    fetch = Prefetch(load)
    bar = tqdm(items, desc="encode", unit="video" if has_videos else "prompt", disable=rank() > 0)
    with codec.text_encoder() as encode_text, stop_signals() as signals:
        try:
            for i, item in enumerate(bar):
                if signals:
                    raise SystemExit(128 + signals[0])
                latents, faults = None, []
                try:
                    if has_videos:
                        video, faults = fetch(i)
                        latents = codec.encode(video[None])[0].half().cpu()
                        if not latents.isfinite().all():
                            raise ValueError("not finite: its latents")
                except ValueError as error:
                    broken[item.name] = str(error)
                    continue
                rows.append((item, faults, encode_text(item.caption), latents))
                if len(rows) == args.shard_size:
                    write_shard(args.out, rows, settings)
                    rows = []
        finally:  # Ctrl-C and SIGTERM lose nothing
            if rows:
                write_shard(args.out, rows, settings)
        return encode_text(settings["null_prompt"])[None], broken


# ---------------------------------------------------------------------------------------------
# Input: videos, and which of them can be used
# ---------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What is encoded, and by what it is known again."""

    name: str  # of a video, its path within the folder; of a prompt, the prompt
    caption: str
    source: list | None  # size and modification time of the video's file


class Inputs(NamedTuple):
    """All that was found: each file is usable, skipped, a caption beside a video, or no video."""

    usable: dict  # {name: Sample}
    files: dict  # {name: path}
    skipped: dict  # {name: reason}
    others: Counter  # {suffix: number of files}


def find_inputs(args):
    """What can be encoded, and what cannot. ValueError if there is nothing."""
    captions = read_captions(args.captions, args.videos) if args.captions else {}
    files, texts, skipped, others = {}, {}, {}, Counter()
    if args.videos is None:
        if not captions:
            raise ValueError("nothing to encode; give --videos, or only --captions for prompts")
    else:
        if not args.videos.is_dir():
            raise ValueError(f"{args.videos}: no such folder")
        if args.captions and args.captions.suffix.lower() == ".txt":
            raise ValueError(f"{args.captions}: contains only prompts; leave out --videos, or give "
                             f"a .jsonl or .csv, which name the video of each caption")
        found, skipped = list_files(args.videos)
        files = {name: file for name, file in found.items()
                 if file.suffix.lower() in SUFFIXES or name in captions}
        if not args.captions:
            texts = {stem(name): file for name, file in found.items()
                     if file.suffix.lower() == ".txt"}
        used = {texts[stem(name)] for name in files if stem(name) in texts}
        others = Counter(file.suffix.lower() or "no suffix" for name, file in found.items()
                         if name not in files and file not in used)
        if not {**files, **captions}:
            raise ValueError(f"{args.videos}: contains no videos ({', '.join(sorted(SUFFIXES))})")

    excluded, count, usable = ExcludedPrompts(args.exclude_prompts), 0, {}
    for name in sorted({**files, **captions}):
        try:
            if args.videos and name not in files:
                raise ValueError(skipped.get(name, "no such file in the folder"))
            caption = (read_sidecar(texts.get(stem(name))) if args.videos and not args.captions
                       else captions.get(name))
            if not caption:
                raise ValueError("no caption")
            if len(caption) > LONGEST:
                raise ValueError(f"its caption has more than {LONGEST} characters")
            if caption in excluded:
                count += 1
                raise ValueError("its caption is among the excluded prompts")
            file = args.videos and files[name].stat()
            usable[name] = Sample(name, caption, file and [file.st_size, file.st_mtime_ns])
        except (ValueError, OSError) as error:
            skipped[name] = str(error)
    if args.exclude_prompts and rank() == 0:
        print(f"{args.exclude_prompts}: {count} of {len(usable) + count} captions repeat one of "
              f"its prompts and are left out")
    return Inputs(usable, files, skipped, others)


def list_files(folder):
    """{name: path} of all files in a folder, and {name: reason} of what cannot be read there.

    Subfolders and links are followed.
    """
    files, bad, seen = {}, {}, set()

    def fail(error):
        raise error

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:  # or a link to a parent would lead round in a circle
            bad[name_within(folder, root)] = "a link to a folder that is read already"
            folders.clear()
            continue
        seen.add(place)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))
        for path in (Path(root, name) for name in names):
            if path.is_file():
                files[name_within(folder, path)] = path
            else:
                bad[name_within(folder, path)] = ("a link that leads nowhere" if path.is_symlink()
                                                  else "not a file")
    return files, bad


def name_within(folder, path):
    return unicodedata.normalize("NFC", Path(path).relative_to(folder).as_posix())


def stem(name):
    """A name without its suffix, by which a video and its caption belong together."""
    return os.path.splitext(name)[0]


def read_sidecar(file):
    """The caption in the .txt beside a video, or None. ValueError says what is wrong with it."""
    try:
        return file and " ".join(checkpoint.read_text(file, most=10**6).split())
    except ValueError as error:
        why = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"its caption's file is {why}") from None


# ---------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------


def count_frames(args, files, items):
    """How many frames each video has, if its file says how long it is."""
    def count(item):
        try:
            seconds = probe(files[item.name]).seconds
        except ValueError:  # found again, and listed, when it is read
            return None
        return seconds and round(seconds * args.fps)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world_size())) as pool:
        counts = list(pool.map(count, items if args.videos else []))
    return [n for n in counts if n]


def report_lengths(lengths, args, step, some_done):
    """Say how many videos are too short, and which --frames would take them.

    ValueError if no other video is left.
    """
    short = [n for n in lengths if n < args.frames]
    if not short:
        return
    # Of the counts that fit, the one that leaves most to train on.
    fit = max({(n - 1) // step * step + 1 for n in short}, key=lambda n: n * sum(
        length >= n for length in short))
    message = (f"{len(short)} of {len(lengths)} videos are too short for {args.frames} frames at "
               f"{args.fps} fps")
    if fit > 1:
        message += f"; --frames {fit} would take {sum(n >= fit for n in short)} of them"
    if len(short) == len(lengths) and not some_done:
        raise ValueError(message)
    if rank() == 0:
        print(message)


# ---------------------------------------------------------------------------------------------
# Output: shards and the index
# ---------------------------------------------------------------------------------------------


def write_shard(out, rows, settings):
    """Write rows of Sample, faults, text `[l, d]` and latents to this rank's next file."""
    items, faults, text, latents = zip(*rows)
    tensors = {"text": pad_sequence(text, batch_first=True)}
    if settings["has_videos"]:
        tensors["latents"] = torch.stack(latents)
    number = 0
    while (file := out / f"shard-{rank():03}-{number:05}.safetensors").exists():
        number += 1
    names, captions, sources = zip(*items)
    header = {"settings": settings, "videos": names, "prompts": captions, "sources": sources,
              "warnings": faults}
    checkpoint.write_files({file: tensors},
                           {key: json.dumps(value) for key, value in header.items()})


class Row(NamedTuple):
    """What a shard says of a sample."""

    sample: Sample
    faults: list


def names_in(shards):
    return {row.sample.name for rows in shards.values() for row in rows}


def read_shards(out, settings, usable):
    """{shard: its Rows}, of all ranks: those that are as `usable` wants them, and the others.

    A shard is stale if a sample of it has changed or is gone, or is in another shard as well.
    ValueError if one was encoded with other settings.
    """
    current, stale, seen = {}, {}, set()
    for file in sorted(out.glob("shard-*.safetensors")):
        with checkpoint.open_weights(file) as shard:
            header = shard.metadata() or {}
        try:
            then, names, captions = (json.loads(header[key]) for key in (
                "settings", "videos", "prompts"))
            nothing = json.dumps([None] * len(names))  # in shards of an earlier version
            sources, faults = (json.loads(header.get(key, nothing)) for key in (
                "sources", "warnings"))
            changed = [f"{k} was {then.get(k)!s:.60}, now {settings[k]!s:.60}"
                       for k in settings if then.get(k) != settings[k]]
            rows = [Row(Sample(str(name), str(caption), source), list(map(str, faults or [])))
                    for name, caption, source, faults in zip(names, captions, sources, faults,
                                                             strict=True)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{file}: not a shard of tools.encode; delete it to encode its videos "
                             f"again") from None
        if changed:
            raise ValueError(f"{file}: was encoded with other settings ({'; '.join(changed)}); "
                             f"repeat them, or choose another --out")
        if all(usable.get(row.sample.name) == row.sample and row.sample.name not in seen
               for row in rows):
            current[file] = rows
            seen |= names_in({file: rows})
        else:
            stale[file] = rows
    return current, stale


def finish(args, settings, inputs, skipped, null_text):
    """Write the lists, the null prompt and the index, without which nothing can train.

    Stale shards are deleted only when no index lists them any more.
    """
    shards, stale = read_shards(args.out, settings, inputs.usable)
    faults = {row.sample.name: row.faults for rows in shards.values() for row in rows}
    write_lines(args.out / "skipped.jsonl", (
        {"video": name, "reason": why} for name, why in skipped.items()))
    write_lines(args.out / "warnings.jsonl", (
        {"video": name, "warnings": found} for name, found in faults.items() if found))
    if not shards:
        raise ValueError(f"{args.out}: nothing could be encoded; skipped.jsonl gives the reasons")
    checkpoint.write_files({args.out / "null_text.safetensors": {"null_text": null_text}})
    index = settings | {"shards": [
        {"file": file.name, "count": len(rows), "digest": digest(rows)}
        for file, rows in shards.items()]}
    (args.out / f"{INDEX}.part").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(args.out / f"{INDEX}.part", args.out / INDEX)
    for file in stale:
        file.unlink()

    print(f"{len(faults)} encoded in {len(shards)} shards, {len(skipped)} skipped")
    for title, counts in (
            ("skipped", Counter(kind(why) for why in skipped.values())),
            ("warned", Counter(kind(why) for found in faults.values() for why in found)),
            ("no videos", inputs.others)):
        for what, number in counts.most_common():
            print(f"  {title:9} {number:7}  {what}")
    print(f"{args.out} has the details: skipped.jsonl, warnings.jsonl")


def kind(reason):
    """A reason without its details, which follow a colon."""
    return reason.partition(":")[0]


def digest(rows):
    """By which a changed sample of a shard can be told."""
    return hashlib.sha256(json.dumps([row.sample for row in rows]).encode()).hexdigest()[:16]


def write_lines(file, values):
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
