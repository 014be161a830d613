"""A folder of sampled videos: whose run it holds, and which of its videos are whole."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from tqdm import tqdm

from runtime.distributed import all_gather, broadcast, rank, world_size
from runtime.media import is_whole
from runtime.models import find_interpolator
from tiny_wan import checkpoint


def choose_folder(out, captions):
    """The folder for videos with these `captions`, the content of a file: `out`, or the first of
    runs/samples, runs/samples-2, ... that is free or has them.

    ValueError if `out` holds videos of other prompts, seeds, models or settings, as runs would be
    mixed.
    """
    numbered = (Path("runs", "samples" + f"-{n}" * (n > 1)) for n in count(1))
    for folder in [out] if out else numbered:
        file = folder / "captions.jsonl"
        if not file.exists() or checkpoint.read_text(file) == captions:
            return folder
    raise ValueError(f"--out {out}: holds videos of other prompts, another seed, another model or "
                     f"other settings; delete it, or choose another folder")


def settings_digest(args, scales, interpolator, *settings):
    """A digest of the settings that decide the pixels, and of when the weights were written."""
    files = [file for path in (args.model, *args.lora) for file in checkpoint.weight_files(path)]
    files += [] if interpolator is None else [find_interpolator(*args.lora, args.model)]
    times = [file.stat().st_mtime_ns for file in files]
    text = json.dumps([scales, str(args.codec), times, *settings])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_whole(out, names, frames, again):
    """The set of those videos that are whole, which ranks check together; deletes the others.

    again: make all again. So are those of an unknown run, without captions.jsonl.
    """
    known = broadcast(not again and (out / "captions.jsonl").exists())
    mine = [out / name for name in names[rank()::world_size()]]
    with ThreadPoolExecutor() as pool:
        checks = pool.map(lambda file: known and is_whole(file, frames), mine)
        checks = list(tqdm(checks, desc="check", unit="video", total=len(mine), leave=False,
                           disable=rank() > 0 or not known))
    for file, good in zip(mine, checks):
        if not good:
            file.unlink(missing_ok=True)
    return {file.name for some in all_gather([file for file, good in zip(mine, checks) if good])
            for file in some}


def write_captions(out, captions):
    """Write captions.jsonl, whole at once, unless it is there."""
    file = out / "captions.jsonl"
    if not file.exists():
        part = file.with_name(f"{file.name}-{rank()}.part")
        part.write_text(captions, encoding="utf-8")
        part.replace(file)
