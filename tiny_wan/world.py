"""The toy world: short videos of one ball, their prompts, and an oracle that measures videos.

A ball with one of six muted colours moves over a grey background of 16 x 16 pixels for 9 frames, at
any speed from nearly zero to fast. Every prompt names the colour. Some also name the direction, and
of these some name the speed. Where a prompt leaves them open, few-step students lose motion.

Videos are `b c f h w`, RGB in [0, 1]. Lengths are in pixels, speeds in pixels per frame.
"""

import math

import numpy as np
import torch

FRAMES, SIZE, RADIUS = 9, 16, 3.0
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # hues 0, 60, ..., 300 degrees
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}  # (x, y)
SLOW, FAST = 0.45, 0.7  # "slowly" is below the first speed, "fast" above the second
MAX_SPEED = 1.0
NOT_MOVING = 0.15  # below this speed, no direction can be seen
VOCABULARY = ("a", *COLOURS, "ball", "moving", *DIRECTIONS, "slowly", "fast")


def make(seed, indices):
    """Videos `[b, 3, 9, 16, 16]` and their prompts. Sample i of a seed is the same in any batch."""
    # NumPy seeds from any tuple of integers; torch's CPU generator uses only 32 bits of a seed.
    u = torch.from_numpy(np.stack([
        np.random.default_rng((seed, i)).random(11, dtype=np.float32) for i in indices]))
    (name_motion, name_speed, colour, hue, saturation, value, grey, speed, direction, along,
     across) = u.unbind(1)
    colour, direction, speed = (colour * 6).long(), (direction * 4).long(), MAX_SPEED * speed.sqrt()

    # The ball starts near the side that it moves away from, so its first place already shows its
    # direction. It stays inside the picture, so a fast ball starts closest to the edge.
    margin = RADIUS + 0.5
    heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[direction]
    along = margin + along * (SIZE - 2 * margin - speed * (FRAMES - 1)).clamp(0, 2)
    across = SIZE / 2 + 5 * (across - 0.5)
    start = torch.where(heading != 0, along[:, None], across[:, None])
    start = torch.where(heading < 0, SIZE - start, start)
    velocity = heading * speed[:, None]
    centre = start[:, None] + velocity[:, None] * torch.arange(FRAMES)[:, None]  # b f 2

    pixel = torch.arange(SIZE) + 0.5
    dx = pixel - centre[..., 0, None]
    dy = pixel - centre[..., 1, None]
    distance = (dx[:, :, None, :] ** 2 + dy[:, :, :, None] ** 2).sqrt()
    disc = (RADIUS - distance + 0.5).clamp(0, 1)[:, None]  # b 1 f h w

    ball = hsv_to_rgb(colour * 60 + 20 * (hue - 0.5), 0.4 + 0.2 * saturation, 0.6 + 0.2 * value)
    ground = 0.35 + 0.3 * grey
    video = (disc * ball[:, :, None, None, None]
             + (1 - disc) * ground[:, None, None, None, None])

    prompts = [
        prompt_of(COLOURS[c], list(DIRECTIONS)[d] if m < 0.8 and s > NOT_MOVING else None,
                  s if n < 0.7 else None)
        for c, d, s, m, n in zip(*(x.tolist() for x in (
            colour, direction, speed, name_motion, name_speed)))]
    return video, prompts


def prompt_of(colour, direction=None, speed=None):
    words = ["a", colour, "ball"]
    if direction:
        words += ["moving", direction]
        if speed is not None and not SLOW <= speed <= FAST:
            words.append("slowly" if speed < SLOW else "fast")
    return " ".join(words)


def without_motion(prompt):
    """The prompt without direction and speed."""
    return prompt.partition(" moving")[0]


def hsv_to_rgb(hue, saturation, value):
    """`hue` in degrees, `saturation` and `value` in [0, 1], all `[b]` -> RGB `[b, 3]`."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] / 60) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


# ---------------------------------------------------------------------------------------------
# The oracle: it measures videos from their pixels alone
# ---------------------------------------------------------------------------------------------

def read(video):
    """Measure videos `[b, 3, f, h, w]`; return a dict of `[b]` tensors.

    whole               the instance is preserved: the ball is always there and compact, keeps its
                        size and colour, and never jumps
    hue, saturation     of the ball, in HSV; hue in degrees
    red, green, blue    of the ball, in [0, 1]
    size                of the ball, its area in pixels
    ground              brightness of the background
    x, y                the ball's mean place
    vx, vy              the ball's mean velocity
    flicker             mean absolute second difference of the pixels in time
    """
    video = video.float().clamp(0, 1)
    chroma = video.amax(1) - video.amin(1)  # b f h w; zero on the grey background
    mask = (chroma > 0.12).float()
    area = mask.sum((2, 3))
    count = area.clamp(min=1)
    pixel = torch.arange(video.shape[-1], device=video.device) + 0.5
    weight = mask * chroma
    total = weight.sum((2, 3)).clamp(min=1e-6)
    x = (weight.sum(2) * pixel).sum(-1) / total  # b f
    y = (weight.sum(3) * pixel).sum(-1) / total
    spread = (mask * ((pixel - x[..., None, None]) ** 2
                      + (pixel[:, None] - y[..., None, None]) ** 2)).sum((2, 3)) / count
    compactness = area / (2 * math.pi * spread.clamp(min=1e-6))  # 1 for a disc, less if it is split

    rgb = (video * mask[:, None]).sum((3, 4)) / count[:, None]  # b 3 f
    hue, saturation = hue_and_saturation(rgb)
    video_hue, _ = hue_and_saturation(rgb.mean(2))
    step_x, step_y = x.diff(dim=1), y.diff(dim=1)
    jump = ((step_x - step_x.mean(1, keepdim=True)) ** 2
            + (step_y - step_y.mean(1, keepdim=True)) ** 2).amax(1).sqrt()
    time = torch.arange(x.shape[1], device=video.device) - (x.shape[1] - 1) / 2
    return {
        "whole": ((area > 12) & (area < 55) & (compactness > 0.8)).all(1)
        & (area.amax(1) < 1.6 * area.amin(1))
        & (hue_distance(hue, video_hue[:, None]) < 30).all(1) & (jump < 0.75),
        "hue": video_hue,
        "saturation": saturation.mean(1),
        **dict(zip(("red", "green", "blue"), rgb.mean(2).unbind(1))),
        "size": area.mean(1),
        "ground": (video.mean(1) * (1 - mask)).sum((1, 2, 3)) / (1 - mask).sum((1, 2, 3)).clamp(1),
        "x": x.mean(1),
        "y": y.mean(1),
        "vx": (x * time).sum(1) / (time ** 2).sum(),  # a least-squares fit: jitter is not motion
        "vy": (y * time).sum(1) / (time ** 2).sum(),
        "flicker": video.diff(n=2, dim=2).abs().mean((1, 2, 3, 4)),
    }


def hue_and_saturation(rgb):
    """`rgb` `[b, 3, ...]` -> hue in degrees and HSV saturation, both `[b, ...]`."""
    r, g, b = rgb.unbind(1)
    top, low = rgb.amax(1), rgb.amin(1)
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return hue, (top - low) / top.clamp(min=1e-6)


def hue_distance(a, b):
    return ((a - b + 180) % 360 - 180).abs()


def score(video, prompts):
    """Score videos against their prompts; return a dict of `[b]` float tensors.

    instance                1 if the instance is preserved (`whole` in `read`), else 0
    colour                  1 if it is the prompt's
    direction               1 if it is the prompt's; NaN if the prompt names none
    prompt                  1 if instance, colour, direction and speed are all right
    dynamic                 1 if the ball moves visibly
    speed                   of the ball
    open_speed              the same; NaN if the prompt names a direction
    saturation, flicker     as in `read`
    """
    r = read(video)
    speed = (r["vx"] ** 2 + r["vy"] ** 2).sqrt()
    colour = torch.tensor([60.0 * COLOURS.index(p.split()[1]) for p in prompts])
    named = [next((w for w in p.split() if w in DIRECTIONS), None) for p in prompts]
    heading = torch.tensor([DIRECTIONS.get(d, (0, 0)) for d in named], dtype=torch.float32)
    is_open = (heading == 0).all(1)
    forward = r["vx"] * heading[:, 0] + r["vy"] * heading[:, 1]
    right_colour = hue_distance(r["hue"], colour) < 30
    right_direction = is_open | ((forward > 0.5 * NOT_MOVING) & (forward > 0.8 * speed))
    middle = (SLOW + FAST) / 2
    right_speed = torch.tensor([
        ("fast" not in p or s > middle) and ("slowly" not in p or s < middle)
        for p, s in zip(prompts, speed.tolist())])
    nan = torch.tensor(float("nan"))
    return {
        "instance": r["whole"].float(),
        "colour": right_colour.float(),
        "direction": torch.where(is_open, nan, right_direction.float()),
        "prompt": (r["whole"] & right_colour & right_direction & right_speed).float(),
        "dynamic": (speed > 0.3).float(),
        "speed": speed,
        "open_speed": torch.where(is_open, speed, nan),
        "saturation": r["saturation"],
        "flicker": r["flicker"],
    }


def diversity(video, real):
    """Standard deviation over the videos, relative to real videos: a mean of five measurements."""
    names = ("x", "y", "vx", "vy", "saturation")
    ours, reals = read(video), read(real)
    return torch.stack([ours[name].std() / reals[name].std() for name in names]).mean().item()
