"""What is read from videos of all kinds, and what is written, against values worked out by hand."""

import math
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from runtime.media import probe, read_video, write_video
from tools.faults import find_faults

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
LOSSLESS = ["-c:v", "libx264", "-qp", "0", "-preset", "ultrafast"]
W, H = 96, 64


def ffmpeg(*words, input=None):
    subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, words)], input=input, check=True)


def raw(frames, pixels, width=W, height=H, rate=16):
    """Arguments and input of ffmpeg for frames as bytes."""
    return {"input": b"".join(frames)}, ["-f", "rawvideo", "-pix_fmt", pixels, "-s",
                                         f"{width}x{height}", "-r", rate, "-i", "pipe:"]


def write_frames(file, frames, *output, pixels="rgb24", width=W, height=H, rate=16):
    data, words = raw([f.tobytes() for f in frames], pixels, width, height, rate)
    ffmpeg(*words, *output, file, **data)
    return file


# ---------------------------------------------------------------------------------------------
# Colours
# ---------------------------------------------------------------------------------------------

CHART = np.random.default_rng(0).integers(20, 236, (4, 6, 3))  # patches of 16 x 16 pixels
LUMA = {"bt709": (0.2126, 0.7152, 0.0722), "smpte170m": (0.299, 0.587, 0.114),
        "bt2020nc": (0.2627, 0.6780, 0.0593)}


def to_yuv(rgb, matrix, full, bits=8):
    """RGB in [0, 1] `[..., 3]` -> YUV, by the definition of the standards."""
    r, g, b = LUMA[matrix]
    y = rgb @ np.array(LUMA[matrix])
    u, v = (rgb[..., 2] - y) / (2 - 2 * b), (rgb[..., 0] - y) / (2 - 2 * r)
    unit, top = 2 ** (bits - 8), 2**bits - 1
    luma, chroma, low = (top, top, 0) if full else (219 * unit, 224 * unit, 16 * unit)
    planes = low + luma * y, 128 * unit + chroma * u, 128 * unit + chroma * v
    return [np.clip(plane, 0, top).round().astype("u1" if bits == 8 else "<u2")
            for plane in planes]


def write_yuv(file, rgb, matrix, full, *output, bits=8, frames=6, height=H):
    """A still video in YUV 4:4:4 of a picture `[h, w, 3]` in [0, 1]."""
    frame = np.stack(to_yuv(rgb, matrix, full, bits))
    return write_frames(file, [frame] * frames, *output, height=height,
                        pixels="yuv444p" if bits == 8 else "yuv444p10le")


@pytest.mark.parametrize("name, matrix, full, tagged, suffix", [
    ("BT.601", "smpte170m", False, True, "mp4"), ("BT.709", "bt709", False, True, "mp4"),
    ("BT.601 full", "smpte170m", True, True, "mp4"), ("BT.709 full", "bt709", True, True, "mkv"),
    ("BT.2020 matrix", "bt2020nc", False, True, "mp4"), ("small", "smpte170m", False, False, "mp4"),
    ("large", "bt709", False, False, "mp4")])
def test_colours_are_read_as_the_file_means_them(name, matrix, full, tagged, suffix, tmp_path):
    times = 10 if name == "large" else 1  # so that it has more than 576 lines
    rgb = (CHART / 255).repeat(16 * times, 0).repeat(16, 1)
    tags = ["-vf", f"setparams=colorspace={matrix}:range={'pc' if full else 'tv'}"] * tagged
    file = write_yuv(tmp_path / f"a.{suffix}", rgb, matrix, full, *tags, *LOSSLESS,
                     height=H * times)
    read = 255 * read_video(file, 5, H * times, W, 16)[:, 4].numpy()
    patches = read.reshape(3, 4, 16 * times, 6, 16).mean((2, 4)).transpose(1, 2, 0)
    assert np.abs(patches - CHART).mean() < 0.6 and np.abs(read - 255 * rgb.transpose(
        2, 0, 1)).mean() < 1


def test_what_is_written_says_that_it_is_bt709_and_is_read_with_the_same_colours(tmp_path):
    chart = torch.tensor(CHART / 255).repeat_interleave(64, 0).repeat_interleave(64, 1)
    video = chart.permute(2, 0, 1)[:, None].expand(3, 9, 256, 384).float()
    write_video(tmp_path / "a.mp4", video, 16)
    source = probe(tmp_path / "a.mp4")
    assert (source.matrix, source.primaries, source.transfer, source.range) == (
        "bt709", "bt709", "bt709", "tv")
    for size in ((), (9, 256, 384, 16)):
        error = 255 * (read_video(tmp_path / "a.mp4", *size) - video)
        assert error.reshape(3, 9, 4, 64, 6, 64).mean((1, 3, 5)).abs().mean() < 0.8


def nits_of_pq(e):
    """SMPTE ST 2084."""
    p = np.asarray(e) ** (32 / 2523)
    return 10000 * (np.maximum(p - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * p)) ** (
        16384 / 2610)


def nits_of_hlg(e):
    """ITU-R BT.2100, on a display of 1000 nits. But its gamma of 1.2 is applied to each colour, as
    zscale does, and not to the luminance."""
    scene = np.array([x * x / 3 if x <= 0.5 else (math.exp((x - 0.55991073) / 0.17883277)
                                                  + 0.28466892) / 12 for x in e])
    return 1000 * scene ** 1.2


TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083],
                   [-0.0182, -0.1006, 1.1187]])  # from BT.2020's primaries


@pytest.mark.parametrize("transfer, nits", [
    ("arib-std-b67", nits_of_hlg), ("smpte2084", nits_of_pq)])
def test_hdr_becomes_what_a_display_of_sdr_shows_of_it(transfer, nits, tmp_path):
    for e in ((0.5, 0.5, 0.5), (0.5, 0.4, 0.45), (0.48, 0.33, 0.3), (0.9, 0.9, 0.9)):
        linear = TO_709 @ nits(e) / 203
        wanted = 255 * np.clip(linear / max(1, linear.max()), 0, 1) ** (1 / 2.4)  # BT.1886
        file = write_yuv(
            tmp_path / "a.mp4", np.broadcast_to(e, (H, W, 3)), "bt2020nc", False, "-c:v", "libx265",
            "-x265-params", f"log-level=none:lossless=1:colorprim=bt2020:transfer={transfer}"
            ":colormatrix=bt2020nc", bits=10)
        read = 255 * read_video(file, 5, H, W, 16).mean((1, 2, 3)).numpy()
        assert np.abs(read - wanted).max() < 1.2, (e, read, wanted)


# ---------------------------------------------------------------------------------------------
# Time and shape
# ---------------------------------------------------------------------------------------------

COUNTED = [np.full((H, W, 3), 20 + 5 * n, np.uint8) for n in range(40)]


def numbers(video):
    """The numbers of the frames of COUNTED."""
    return [round((255 * x - 20) / 5) for x in video.mean((0, 2, 3)).tolist()]


SOUND = ["-f", "lavfi", "-i", "sine=d=3"]
TIMINGS = {  # arguments before and after the file with the frames, and their first number
    "mkv": ("mkv", [], [], 0),
    "ts": ("ts", [], [], 0),
    "starts late": ("mp4", ["-itsoffset", "0.9"], [], 0),
    "sound starts first": ("mp4", [*SOUND, "-itsoffset", "0.9"], ["-map", "1:v", "-map", "0:a"], 0),
    "cut within a group of pictures": ("mp4", ["-ss", "0.3"], ["-map", "0:v"], 5),
    "cut, sound at once": ("mp4", SOUND, ["-map", "1:v", "-map", "0:a", "-ss", "0.3"], 8)}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("counted") / "a.mp4", COUNTED, *LOSSLESS, "-g", 8,
                        "-keyint_min", 8)


@pytest.mark.parametrize("name", TIMINGS)
def test_frame_n_of_the_file_is_frame_n_read(name, counted, tmp_path):
    suffix, before, after, first = TIMINGS[name]
    file = tmp_path / f"a.{suffix}"
    ffmpeg(*before, "-i", counted, *after, "-c:v", "copy", file)
    wanted = list(range(first, first + 17))
    assert numbers(read_video(file, 17, H, W, 16)) == wanted
    assert numbers(read_video(file, 17)) == wanted


def test_a_pause_is_filled_at_a_frame_rate_and_left_out_without_one(counted, tmp_path):
    ffmpeg("-i", counted, "-vf", "setpts=if(lt(N\\,8)\\,N\\,N+16)/16/TB", "-fps_mode", "vfr",
           *LOSSLESS, tmp_path / "a.mkv")
    assert numbers(read_video(tmp_path / "a.mkv")) == list(range(40))
    assert numbers(read_video(tmp_path / "a.mkv", 26, H, W, 16)) == [*range(8), *[7] * 16, 8, 9]


CIRCLE = ["-f", "lavfi", "-i", "color=black:s={}:r=16:d=0.6,format=gray,"
          "geq=lum='255*lt(hypot(X-W/2+0.5\\,(Y-H/2+0.5)*{})\\,{})',format=yuv420p"]


@pytest.mark.parametrize("size, squeeze, radius, output", [
    ("160x120", 1, 40, []), ("120x160", 1, 40, []),
    ("180x144", 0.9375, 45, ["-aspect", "4:3"]),  # PAL's pixels, which are 16/15 wide
    ("160x120", 2, 40, ["-vf", "setsar=1/2"]),
    ("160x120", 1, 40, ["-metadata:s:v", "rotate=0"])])
def test_a_circle_stays_round(size, squeeze, radius, output, tmp_path):
    words = [word.format(size, squeeze, radius) for word in CIRCLE]
    ffmpeg(*words, *output, *LOSSLESS, tmp_path / "a.mp4")
    for read in (read_video(tmp_path / "a.mp4", 5, 96, 96, 16), read_video(tmp_path / "a.mp4")):
        lit = read[0, 0] > 0.5
        assert abs(lit.any(0).sum() - lit.any(1).sum()) <= 2


def test_a_turned_video_is_read_upright(tmp_path):
    frame = np.zeros((H, W, 3), np.uint8)
    frame[:, :W // 2] = 255  # white on the left
    write_frames(tmp_path / "a.mp4", [frame] * 6, *LOSSLESS)
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    video = read_video(tmp_path / "b.mp4", 5, W, H, 16)  # turned against the clock
    assert video[:, :, :W // 2 - 2].mean() < 0.02 and video[:, :, W // 2 + 2:].mean() > 0.98


@pytest.mark.parametrize("codec", [["libx264", "-qp", "0"], ["mpeg2video", "-q:v", "2"]])
def test_fields_of_two_moments_become_whole_frames(codec, tmp_path):
    ffmpeg("-f", "lavfi", "-i", f"color=black:s={W}x{H}:r=32:d=1.5,format=gray,"
           "geq=lum='255*between(X\\,3*N\\,3*N+24)',format=yuv420p", "-vf", "interlace=lowpass=0",
           "-flags", "+ilme+ildct", "-c:v", *codec, tmp_path / "a.mkv")
    video = read_video(tmp_path / "a.mkv", 9, H, W, 16)[0]
    combing = (video[:, 1:-1] - (video[:, :-2] + video[:, 2:]) / 2).abs().mean()
    assert combing < 0.01  # 0.03 without


# ---------------------------------------------------------------------------------------------
# Damage, and what only decoded frames tell
# ---------------------------------------------------------------------------------------------


def test_damage_is_found_where_frames_are_read_and_not_behind_them(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "mandelbrot=s=320x180:r=16", "-t", 6, "-g", 250, *LOSSLESS[:2],
           tmp_path / "good.mp4")
    data = bytearray((tmp_path / "good.mp4").read_bytes())
    rng = np.random.default_rng(0)
    good = read_video(tmp_path / "good.mp4", 17, 180, 320, 16)
    for place, error in ((0.1, "damaged: after|cannot be read: "), (0.9, None)):
        broken = bytearray(data)
        for i in rng.integers(0, len(data) // 20, 40):
            broken[int(place * len(data)) + i] ^= 0xFF
        (tmp_path / "a.mp4").write_bytes(broken)
        if error:
            with pytest.raises(ValueError, match=error):
                read_video(tmp_path / "a.mp4", 17, 180, 320, 16)
        else:
            assert torch.equal(read_video(tmp_path / "a.mp4", 17, 180, 320, 16), good)
            with pytest.raises(ValueError, match="damaged: after"):
                read_video(tmp_path / "a.mp4")


def test_a_hole_that_decoders_do_not_notice_is_damage(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "mandelbrot=s=320x180:r=16", "-t", 2, "-c:v", "libx264", "-g", 250,
           tmp_path / "a.mp4")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    place = data.find(b"mdat") + len(data) // 3
    data[place:place + 2000] = bytes(2000)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(ValueError, match="damaged: "):
        read_video(tmp_path / "a.mp4", 17, 180, 320, 16)


def test_a_cover_is_no_video(counted, tmp_path):
    write_frames(tmp_path / "cover.png", COUNTED[:1])
    ffmpeg("-i", tmp_path / "cover.png", "-i", counted, "-map", "0", "-map", "1", "-c", "copy",
           "-disposition:v:0", "attached_pic", tmp_path / "a.mp4")
    assert numbers(read_video(tmp_path / "a.mp4", 17, H, W, 16)) == list(range(17))


TEST = "testsrc2=s=208x120:r=16:d=3"
FAULTS = {  # ffmpeg's filters, and the kinds of what is found
    "plain": (TEST, set()),
    "4 frames a second": (TEST.replace("r=16", "r=4"), {"refused"}),
    "12 frames a second": (TEST.replace("r=16", "r=12"), {"repeated frames"}),
    "still": ("smptebars=s=208x120:r=16:d=3", {"refused"}),
    "starts frozen": (f"{TEST},tpad=start=24:start_mode=clone", {"refused"}),
    "stops for half a second": (f"{TEST},loop=8:1:20", {"repeated frames"}),
    "a small bird": ("color=blue:s=208x120:r=16:d=3[b];color=white:s=8x8:r=16:d=3[w];"
                     "[b][w]overlay=x=4*n:y=50", set()),
    "a cut": (f"{TEST.replace('d=3', 'd=1')}[a];mandelbrot=s=208x120:r=16,trim=duration=2[b];"
              "[a][b]concat", {"hard cuts"}),
    "letterbox": (f"{TEST},pad=208:160:0:20", {"black borders"}),
    "pillarbox": (f"{TEST},pad=260:120:26:0", {"black borders"}),
    "a black stripe on one side": (f"{TEST},pad=208:140:0:20", set()),
    "from black": (f"{TEST},fade=d=1", {"black start"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_frames_is_found_and_no_other(name, tmp_path):
    graph, wanted = FAULTS[name]
    ffmpeg("-f", "lavfi", "-i", graph, "-c:v", "libx264", "-crf", 23, "-pix_fmt", "yuv420p",
           tmp_path / "a.mp4")
    video = read_video(tmp_path / "a.mp4", 33, fps=16)
    try:
        found = {fault.partition(":")[0] for fault in find_faults(video)}
    except ValueError as error:
        assert re.match(r"stands still: \d+ of 32 frames", str(error))
        found = {"refused"}
        assert "repeated frames" in str(find_faults(video, allow_still=True))
    assert found == wanted
