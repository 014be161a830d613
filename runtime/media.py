"""Writing videos and pictures."""

import re
from collections import Counter

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from einops import rearrange


def file_names(prompts):
    """`{prompt}-{index}.mp4` for each prompt, as VBench expects; the index counts equal prompts.

    Characters that file systems forbid become underscores; a long prompt is cut.
    """
    seen = Counter()
    for prompt in prompts:
        name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "_", prompt).strip().lstrip("-.")
        name = name.encode(errors="ignore")[:240].decode(errors="ignore") or "video"
        yield f"{name}-{seen[name.casefold()]}.mp4"
        seen[name.casefold()] += 1


def to_bytes(frames, height, least):
    """`... h w c` in [0, 1] -> bytes. Pixels are repeated until a frame is `least` pixels high."""
    times = max(1, least // height)
    frames = (255 * frames).round().byte()
    return frames.repeat_interleave(times, -3).repeat_interleave(times, -2).numpy()


def write_video(path, video, fps):
    """Write a video `[3, f, h, w]` in [0, 1] as mp4."""
    frames = to_bytes(rearrange(video, "c f h w -> f h w c"), video.shape[-2], least=256)
    iio.imwrite(path, frames, fps=fps, codec="libx264", macro_block_size=2)


def thumbnails(video, columns=9, height=128):
    """A few frames of a video `[3, f, h, w]` side by side, shrunk to a height: `[3, h', w']`."""
    frames = torch.linspace(0, video.shape[1] - 1, min(columns, video.shape[1])).round().long()
    frames = rearrange(video[:, frames], "c f h w -> f c h w")
    if (factor := height / frames.shape[-2]) < 1:
        frames = F.interpolate(frames, scale_factor=factor, mode="area")
    return rearrange(frames, "f c h w -> c h (f w)")


def write_contact_sheet(path, rows):
    """Write a picture of rows of `thumbnails`, one below the other."""
    rows = torch.stack(list(rows))
    iio.imwrite(path, to_bytes(rearrange(rows, "b c h w -> (b h) w c"), rows.shape[-2], least=64))
