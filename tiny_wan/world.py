"""The toy world: short videos of one soft disc, their prompts, and an oracle that reads them back.

A ball of one of six natural colours crosses a grey background of 16 x 16 pixels within 9 frames, at
any speed from nearly still to fast. Prompts always name the colour; direction and speed are named
in a part of them and left open in the rest, which is where few-step students lose motion.
A video is `b c f h w`, RGB in [0, 1]. Lengths are in pixels, speeds in pixels per frame.
"""

import math

import numpy as np
import torch

FRAMES, SIZE, RADIUS = 9, 16, 3.0
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # hues 0, 60, ..., 300 degrees
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}  # (x, y)
SLOW, FAST = 0.45, 0.7  # below one a ball moves slowly, above the other fast
MAX_SPEED = 1.0
NOT_MOVING = 0.15  # slower than this, nobody can name a direction
VOCABULARY = ("a", *COLOURS, "ball", "moving", *DIRECTIONS, "slowly", "fast")


def make(seed, indices):
    """Videos `[b, 3, 9, 16, 16]` and their prompts. Sample i of a seed is the same in any batch."""
    # NumPy's seeds take any number of words; torch's generator looks at 32 bits alone.
    u = torch.from_numpy(np.stack([
        np.random.default_rng((seed, i)).random(11, dtype=np.float32) for i in indices]))
    (name_motion, name_speed, colour, hue, saturation, value, grey, speed, direction, along,
     across) = u.unbind(1)
    colour, direction, speed = (colour * 6).long(), (direction * 4).long(), MAX_SPEED * speed.sqrt()

    # The ball comes in at one side, so that its direction shows in its place from the first frame
    # on; and it stays inside, so that a fast one starts close to the edge.
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
    """The prompt with direction and speed left open."""
    return prompt.partition(" moving")[0]


def hsv_to_rgb(hue, saturation, value):
    """`hue` in degrees, the rest in [0, 1], each `[b]` -> RGB `[b, 3]`."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] / 60) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


# ---------------------------------------------------------------------------------------------
# The oracle: it sees pixels alone
# ---------------------------------------------------------------------------------------------

def read(video):
    """Read videos `[b, 3, f, h, w]`: a dict of `[b]` tensors.

    whole       the ball is there, compact, of one size and colour, and never jumps: the instance
                is preserved
    hue         of the ball, degrees; `saturation`, its HSV saturation; `red`, `green`, `blue`
    size        of the ball, in pixels
    ground      brightness of what is around it
    x, y        its place in the middle of the video; `vx`, `vy`, its velocity, pixels per frame
    flicker     mean absolute second difference of the pixels in time
    """
    video = video.float().clamp(0, 1)
    chroma = video.amax(1) - video.amin(1)  # b f h w: the background is grey
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
    compactness = area / (2 * math.pi * spread.clamp(min=1e-6))  # one for a disc, less if split

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
        "vx": (x * time).sum(1) / (time ** 2).sum(),  # least squares: jitter is not motion
        "vy": (y * time).sum(1) / (time ** 2).sum(),
        "flicker": video.diff(n=2, dim=2).abs().mean((1, 2, 3, 4)),
    }


def hue_and_saturation(rgb):
    """`rgb` `[b, 3, ...]` -> hue in degrees and HSV saturation, each `[b, ...]`."""
    r, g, b = rgb.unbind(1)
    top, low = rgb.amax(1), rgb.amin(1)
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return hue, (top - low) / top.clamp(min=1e-6)


def hue_distance(a, b):
    return ((a - b + 180) % 360 - 180).abs()


def score(video, prompts):
    """Oracle scores of videos against their prompts: a dict of `[b]` float tensors.

    instance    1 where the instance is preserved         colour, direction, prompt: 1 where right
    dynamic     1 where the ball really moves             speed: pixels per frame
    saturation, flicker: as read. `direction` is NaN where the prompt leaves it open, and so is
    `open_speed` where the prompt names a direction.
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
    """How widely readings vary over a set of videos, as a share of how they do over real ones."""
    names = ("x", "y", "vx", "vy", "saturation")
    ours, theirs = map(read, (video, real))
    return torch.stack([ours[name].std() / theirs[name].std() for name in names]).mean().item()
