"""Reading videos; writing videos and pictures."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import imageio.v3 as iio
import imageio_ffmpeg
import torch
import torch.nn.functional as F
from einops import rearrange

from tiny_wan import checkpoint

SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif", ".ts", ".mts", ".m2ts", ".mpg",
            ".mpeg", ".vob", ".flv", ".wmv", ".asf", ".3gp", ".ogv"}  # of videos that can be read
TIMEOUT = 300  # seconds to decode one video

# ---------------------------------------------------------------------------------------------
# What a file says of itself
# ---------------------------------------------------------------------------------------------

STREAM = re.compile(  # "Stream #0:0: Video: h264, yuv420p(tv, bt709, top first), 640x360 [SAR ..."
    r"^ +Stream #\S+ Video: .*?, (\w+)(?:\((.*?)\))?, (\d+)x(\d+)(?!.*\(attached pic\))", re.M)
FIELDS = {"top first": "tff", "bottom coded first (swapped)": "tff",
          "bottom first": "bff", "top coded first (swapped)": "bff"}
HDR = {"arib-std-b67", "smpte2084"}  # HLG and PQ
WIDE = {"bt2020", "smpte431", "smpte432"}  # primaries of more colours than BT.709 has


@dataclass
class Source:
    """What ffmpeg says about a video's pictures; None stands for what the file does not say."""

    matrix: str | None  # from RGB to YUV; these four by the names of ffmpeg's setparams
    primaries: str | None
    transfer: str | None
    range: str | None
    field: str | None  # the first one, as bwdif calls it, if frames are interlaced
    yuv: bool  # not RGB or grey
    large: bool  # more than the 576 lines of standard television
    no_zeros: bool  # three bytes of zero in a row cannot be in its packets (H.264, H.265 in mp4)
    seconds: float | None


def probe(file):
    """The Source of a video's first stream of pictures that is no cover. ValueError if none is."""
    _, messages, _ = run_ffmpeg(*INPUT, f"file:{file.resolve()}", level="info")
    found = STREAM.search(messages)
    if not found:
        raise ValueError(f"cannot be read: {complaint(messages)}")
    if re.search(r"DOVI configuration record:.* profile: 5\b", messages):
        raise ValueError("cannot be read: ffmpeg cannot convert colours of Dolby Vision profile 5")
    pixels, about, width, height = found.groups(default="")
    words = about.split(", ")
    colours = next((word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]+){2}", word)), None)
    if not colours:  # one name for all three
        word = next((w for w in words if re.match(r"bt|smpte|gbr|fcc|yc|ic", w)), "unknown")
        colours = "/".join([word] * 3)
    matrix, primaries, transfer = (None if word.startswith(("unknown", "reserved")) else word
                                   for word in colours.split("/"))
    field = next((FIELDS[word] for word in words if word in FIELDS), None)
    if not field and pixels.startswith("yuv") and "progressive" not in words:
        field = "auto:interlaced"  # the frames that say so themselves
    time = re.search(r"Duration: (\d+):(\d+):([\d.]+)", messages)
    return Source(
        matrix, primaries, transfer, next((w for w in words if w in ("tv", "pc")), None),
        field, pixels.startswith("yuv"), int(height) > 576 or int(width) >= 1280,
        bool(re.search(r" \((avc|hvc|hev)\d / 0x", found[0])),
        sum(float(n) * unit for n, unit in zip(time.groups(), (3600, 60, 1))) if time else None)


# ---------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------

# No playlist under a video's name, which could name any other file.
INPUT = ["-format_whitelist", "mov,matroska,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg",
         "-protocol_whitelist", "file,pipe", "-max_pixels", str(2**26), "-i"]


def run_ffmpeg(*words, level="error"):
    """Run ffmpeg: the bytes of its output, its messages, and its exit code.

    ValueError if it takes too long.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-v", level, "-nostdin", *words]
    with tempfile.TemporaryFile() as log:  # not in memory: a damaged file's log may be endless
        try:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ValueError(f"cannot be read: not decoded within {TIMEOUT} s") from None
        log.seek(0)
        return result.stdout, log.read(100_000).decode(errors="replace"), result.returncode


def complaint(messages):
    """The first line that ffmpeg complained with, without the name of its part."""
    lines = [re.sub(r"^\[.*?\] ", "", line) for line in messages.splitlines()]
    usual = ("Input #", "At least one output")
    return next((line for line in lines if line[:1].strip() and not line.startswith(usual)),
                "it holds no pictures")


def conversion(source, height, width, fps):
    """ffmpeg's filters from a file's pictures to RGB of a size and a rate; see `read_video`."""
    chain = ["setpts=PTS-STARTPTS"]  # from the first picture, which may come after the sound
    if source.field:
        chain.append(f"bwdif=send_frame:{source.field}")
    if fps:
        chain.append(f"fps={fps}")
    # What the file does not say, as players guess it. Without the matrix, scale takes BT.601.
    matrix = source.matrix or ("bt2020nc" if source.transfer in HDR else
                               "bt709" if source.large else "smpte170m")
    chain.append(f"setparams=colorspace={matrix}:range={source.range or 'tv'}"
                 if source.yuv else "null")
    # dar is the shape of the picture as shown: pixels become square. Then RGB, exactly rounded.
    size = (f"w=max({width}\\,round({height}*dar)):h=max({height}\\,round({width}/dar))" if width
            else f"w=2*round({height}*dar/2):h={height}" if height else "w=round(ih*dar):h=ih")
    method = "area" if height and not width else "bicubic"
    hdr = source.transfer in HDR or source.primaries in WIDE
    chain += [f"scale={size}:flags={method}+accurate_rnd+full_chroma_int+full_chroma_inp",
              f"format={'yuv444p16|gbrp16' if hdr else 'rgb24'}", "setsar=1"]
    if width:
        chain.append(f"crop={width}:{height}")
    if hdr:  # to linear light, where 1 is the white of 203 nits; to BT.709's colours and curve
        chain += [f"setparams=color_primaries={source.primaries or 'bt2020'}"
                  f":color_trc={source.transfer or 'bt709'}",
                  "zscale=transfer=linear:npl=203:matrix=gbr", "format=gbrpf32",
                  "zscale=primaries=709", "tonemap=clip", "zscale=transfer=709",
                  "format=gbrp"]
    return ",".join([*chain, "format=rgb24"])


def has_hole(file, seconds=None):
    """Whether a hole of zeros is in a video's first `seconds`, which decoders may not notice."""
    packets, _, _ = run_ffmpeg(*INPUT, f"file:{file.resolve()}", "-map", "0:V:0", "-c", "copy",
                               *(["-t", str(seconds)] if seconds else []), "-f", "data", "pipe:")
    return bytes(64) in packets


def is_whole(file, frames):
    """Whether a video is there, has this number of frames, and all of them can be decoded."""
    if not file.exists():
        return False
    lines, _, code = run_ffmpeg(
        "-xerror", "-err_detect", "explode", *INPUT, f"file:{file.resolve()}", "-map", "0:V:0",
        "-fps_mode", "passthrough", "-f", "framecrc", "pipe:")
    return code == 0 and frames == sum(line[:1] != b"#" for line in lines.splitlines())


def read_video(file, frames=None, height=None, width=None, fps=None):
    """RGB in [0, 1] `[3, f, h, w]`: what is trained on and what is measured.

    frames: how many, from the start; by default all.
    height, width: the video is scaled and cropped to them, or with a height alone only scaled; by
        default its own. Pixels become square.
    fps: frames per second that it is resampled to; by default its own frames as they are.

    Colours become BT.709's, in full range, by what the file says: matrix, range, HLG and PQ. If it
    names no matrix, BT.601 is assumed up to 576 lines. Interlaced frames are deinterlaced.

    ValueError gives the reason why the video cannot be used, also if only a part of the frames that
    are read is damaged: its kind, a colon and the details.
    """
    source = probe(file)
    if source.no_zeros and has_hole(file, frames and fps and frames / fps + 1):
        raise ValueError("damaged: a part of the file is empty, as of a download that did not end")
    data, messages, code = run_ffmpeg(
        "-xerror", "-err_detect", "explode", *INPUT, f"file:{file.resolve()}", "-map", "0:V:0",
        "-vf", conversion(source, height, width, fps), "-fps_mode", "passthrough",
        *(["-frames:v", str(frames)] if frames else []), "-f", "image2pipe", "-c:v", "ppm", "pipe:")
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", data)  # of each frame
    w, h = map(int, header.groups()) if header else (0, 0)
    size = 3 * h * w
    count = len(data) // (len(header[0]) + size) if header else 0
    if not count:
        raise ValueError(f"cannot be read: {complaint(messages)}")
    if code and count != frames:
        raise ValueError(f"damaged: after {count} frames, {complaint(messages)}")
    if frames and count < frames:
        raise ValueError(f"too short: {count} of {frames} frames at {fps} fps")
    video = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    video = video[:count * (len(header[0]) + size)].view(count, -1)
    if (video[:, :-size] != video[0, :-size]).any():
        raise ValueError("cannot be read: the size of its frames changes")
    return rearrange(video[:, -size:], "f (h w c) -> c f h w", h=h, w=w).float().div_(255)


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


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
    """Write a video `[3, f, h, w]` in [0, 1] as mp4, in BT.709, as its tags tell the players.

    The file has its name only when it is whole.
    """
    frames = to_bytes(rearrange(video, "c f h w -> f h w c"), video.shape[-2], least=256)
    filters = ("scale=2*ceil(iw/2):2*ceil(ih/2):out_color_matrix=bt709:out_range=tv"
               ":flags=accurate_rnd+full_chroma_int+full_chroma_inp,format=yuv420p,"
               "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709")
    part = path.with_name(f"{path.name}.part")
    iio.imwrite(part, frames, extension=".mp4", fps=fps, codec="libx264", macro_block_size=1,
                output_params=["-vf", filters, "-f", "mp4"])
    checkpoint.fsync(part)
    os.replace(part, path)


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
