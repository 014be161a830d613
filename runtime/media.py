"""Reading videos; writing videos and pictures."""

import re
import subprocess
import tempfile
from collections import Counter

import imageio.v3 as iio
import imageio_ffmpeg
import torch
import torch.nn.functional as F
from einops import rearrange

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}  # of videos that can be read
TIMEOUT = 300  # seconds to decode one video


def decode(file, filters, *output):
    """Decode a video with ffmpeg's `filters`: the bytes of its output, and what it complained of.

    ValueError if it takes too long.
    """
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin",
        # No playlist under a video's name, which could name any other file.
        "-format_whitelist", "mov,matroska,avi", "-protocol_whitelist", "file,pipe",
        "-max_pixels", str(2**26),
        "-i", f"file:{file.resolve()}", "-map", "0:v:0", "-vf", filters, *output, "pipe:"]
    with tempfile.TemporaryFile() as log:  # not in memory: a damaged file's log may be endless
        try:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ValueError(f"not decoded within {TIMEOUT} s") from None
        log.seek(0)
        messages = re.sub(r"^\[.*?\] ", "", log.read(1000).decode(errors="replace"))
    return result.stdout, next(iter(messages.splitlines()), "too short")


def read_video(file, frames=None, height=None, width=None, fps=None):
    """RGB in [0, 1] `[3, f, h, w]`: what is trained on and what is measured.

    frames: how many, from the start; by default all.
    height, width: the video is scaled and cropped to them, or with a height alone only scaled; by
        default its own.
    fps: frames per second that it is resampled to; by default its own.

    ValueError gives the reason why the video cannot be used.
    """
    filters = [f"fps={fps}"] if fps else []
    if width:
        filters += [f"scale={width}:{height}:force_original_aspect_ratio=increase",
                    f"crop={width}:{height}"]
    elif height:
        filters += [f"scale=-2:{height}:flags=area"]
    data, reason = decode(file, ",".join(filters or ["null"]),
                          *(["-frames:v", str(frames)] if frames else []),
                          "-f", "image2pipe", "-c:v", "ppm")
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", data)  # of each frame
    w, h = map(int, header.groups()) if header else (0, 0)
    size = 3 * h * w
    count = len(data) // (len(header[0]) + size) if header else 0
    if frames and count < frames:
        raise ValueError(f"{count} of {frames} frames at {fps} fps ({reason})")
    if not count:
        raise ValueError(f"not a video that can be decoded ({reason})")
    video = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    video = video[:count * (len(header[0]) + size)].view(count, -1)[:, -size:]
    return rearrange(video, "f (h w c) -> c f h w", h=h, w=w).float() / 255


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
