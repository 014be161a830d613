"""The toy world: short videos of one or two balls, their prompts, and an oracle that measures them.

One or two balls of muted colours move over a lit, grainy floor of 16 x 16 pixels for 9 frames. Each
has a size, a direction and a speed of its own, from nearly still to fast. Two balls run in parallel
lanes, one above or beside the other. Every prompt names the colours. Of each ball it may also name
the direction, and then the speed. Where prompts leave motion open, few-step students lose it.

Videos differ in how hard they are: the floor's grain, different in each video, is between
invisible and strong.

Videos are `b c f h w`, RGB in [0, 1]. Lengths are in pixels, speeds in pixels per frame.
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F

FRAMES, SIZE = 9, 16
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # hues 0, 60, ..., 300 degrees
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}  # (x, y)
RELATIONS = ("above", "beside")  # of the ball named first; "beside" means to the left of
SLOW, FAST = 0.45, 0.7  # "slowly" is below the first speed, "fast" above the second
MAX_SPEED = 1.0
NOT_MOVING = 0.15  # below this speed, no direction can be seen
GRAIN = 0.12  # the floor's strongest grain, as a standard deviation
VOCABULARY = ("a", *COLOURS, "ball", "moving", *DIRECTIONS, "slowly", "fast", *RELATIONS)


def make(seed, indices):
    """Videos `[b, 3, 9, 16, 16]` and their prompts. Sample i of a seed is the same in any batch."""
    videos, prompts = zip(*(make_one(np.random.default_rng((seed, i))) for i in indices))
    return torch.from_numpy(np.stack(videos)), list(prompts)


def make_one(rng):
    """A video `[3, 9, 16, 16]` as a NumPy array, and its prompt."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    lamp = 0.2 * (y / SIZE - 0.5) + 0.1 * (x / SIZE - 0.5)  # the floor is brightest at bottom right
    grain = GRAIN * rng.random() * rng.standard_normal((SIZE, SIZE)).clip(-2, 2)
    video = np.empty((3, FRAMES, SIZE, SIZE))
    video[:] = 0.42 + 0.16 * rng.random() + lamp + grain

    count = 2 if rng.random() < 0.6 else 1
    across = rng.integers(2)  # the axis across the lanes: 0 is x, 1 is y
    colours = rng.choice(len(COLOURS), count, replace=False)
    phrases = []
    for lane, colour in enumerate(colours):
        radius = 2.1 + 0.5 * rng.random() + 0.4 * (count == 1)
        speed = MAX_SPEED * math.sqrt(rng.random())
        direction = [d for d, step in DIRECTIONS.items() if step[across] == 0][rng.integers(2)]
        heading = DIRECTIONS[direction][1 - across]

        # A ball starts near the side that it moves away from, so its first place already shows
        # its direction. It stays inside the picture, so a fast ball starts closest to the edge.
        margin = radius + 0.5
        room = min(max(SIZE - 2 * margin - speed * (FRAMES - 1), 0), 2)
        along = margin + room * rng.random() + speed * np.arange(FRAMES)
        centre = np.empty((2, FRAMES))
        centre[1 - across] = along if heading > 0 else SIZE - along
        centre[across] = (SIZE / 2 + 5 * (rng.random() - 0.5) if count == 1
                          else (4.3, 11.7)[lane] + 0.4 * (rng.random() - 0.5))

        cx, cy = centre[:, :, None, None]
        disc = (radius + 0.5 - np.hypot(x - cx, y - cy)).clip(0, 1)  # f h w; the edge is soft
        ball = hsv_to_rgb(60 * colour + 20 * (rng.random() - 0.5), 0.4 + 0.2 * rng.random(),
                          0.6 + 0.2 * rng.random())
        video += disc * (ball[:, None, None, None] - video)

        name_motion, name_speed = rng.random() < 0.8 and speed > NOT_MOVING, rng.random() < 0.7
        phrases.append(phrase(COLOURS[colour], direction if name_motion else None,
                              speed if name_speed else None))
    relation = RELATIONS[1 - across]  # lanes on top of each other, or side by side
    return video.astype(np.float32), f" {relation} ".join(phrases)


def phrase(colour, direction=None, speed=None):
    """A ball in words, such as "a red ball moving left fast"."""
    words = ["a", colour, "ball"]
    if direction:
        words += ["moving", direction]
        if speed is not None and not SLOW <= speed <= FAST:
            words.append("slowly" if speed < SLOW else "fast")
    return " ".join(words)


def without_motion(prompt):
    """The prompt without directions and speeds."""
    return re.sub(r" moving \w+( slowly| fast)?", "", prompt)


def hsv_to_rgb(hue, saturation, value):
    """`hue` in degrees, `saturation` and `value` in [0, 1] -> RGB `[3]`."""
    k = (np.array([5, 3, 1]) + hue / 60) % 6
    return value * (1 - saturation * np.minimum(k, 4 - k).clip(0, 1))


# ---------------------------------------------------------------------------------------------
# The oracle: it measures videos from their pixels alone
# ---------------------------------------------------------------------------------------------

BALL = re.compile(r"a (\w+) ball(?: moving (\w+))?(?: (slowly|fast))?")
FAILURES = ("missing", "split", "blurred", "jumps", "extra", "fused")  # of an instance
CHROMA = 0.12  # a pixel with more is coloured; a ball has 0.24 to 0.48, the floor none
FAINT = 0.03  # colour that is fainter cannot be seen
NAN = float("nan")


def read(video, prompts):
    """Measure the balls that `prompts` name in videos `[b, 3, f, h, w]`; return a dict of `[b, 2]`.

    The second column is NaN where a prompt names one ball. All coloured pixels of its hue are a
    ball's.

    missing             1 if in some frame the ball is not there
    split               1 if in some frame its pixels are not one compact piece
    blurred             1 if it has no sharp edge, or covers too much
    jumps               1 if it leaves its track, or its size changes
    x, y                mean place
    vx, vy              mean velocity
    size                area in pixels
    red, green, blue    in [0, 1]
    saturation          in HSV
    """
    video = video.float().clamp(0, 1)
    chroma, own = chroma_of(video)[:, None], own_pixels(video, prompts)
    mask = (own & (chroma > CHROMA)).float()  # b 2 f h w
    area = mask.sum((3, 4))
    count = area.clamp(min=1)

    pixel = torch.arange(video.shape[-1]) + 0.5
    total = (mask * chroma).sum((3, 4)).clamp(min=1e-6)
    x = ((mask * chroma).sum(3) * pixel).sum(-1) / total  # b 2 f
    y = ((mask * chroma).sum(4) * pixel).sum(-1) / total
    distance2 = (pixel - x[..., None, None]) ** 2 + (pixel[:, None] - y[..., None, None]) ** 2
    # The area of a disc is 2 pi times the mean square distance from its centre. That of an
    # elongated or split shape is less. So is that of a spot without an edge, if weighted by chroma.
    compactness = area ** 2 / (2 * math.pi * (mask * distance2).sum((3, 4))).clamp(min=1e-6)
    spot = (chroma - FAINT).clamp(min=0) * (own & (distance2 < 25))
    sharpness = spot.sum((3, 4)) ** 2 / (
        2 * math.pi * spot.amax((3, 4)) * (spot * distance2).sum((3, 4))).clamp(min=1e-6)

    there = area > 5
    split = (there & (compactness < 0.8)).any(2)
    step = torch.stack((x, y)).diff(dim=-1)
    jump = (step - step.mean(-1, keepdim=True)).norm(dim=0).amax(-1)
    time = torch.arange(x.shape[-1]) - (x.shape[-1] - 1) / 2
    rgb = (video[:, :, None] * mask[:, None]).sum((3, 4, 5)) / count.sum(2)[:, None]  # b 3 2
    measured = {
        "missing": ~there.all(2),
        "split": split,
        "blurred": ((sharpness.mean(2) < 0.81) | (area > 45).any(2)) & ~split,
        "jumps": (jump > 0.75) | (area.amax(2) > 1.6 * area.amin(2)),
        "x": x.mean(2),
        "y": y.mean(2),
        "vx": (x * time).sum(2) / (time ** 2).sum(),  # a least-squares fit: jitter is not motion
        "vy": (y * time).sum(2) / (time ** 2).sum(),
        "size": area.mean(2),
        **dict(zip(("red", "green", "blue"), rgb.unbind(1))),
        "saturation": (rgb.amax(1) - rgb.amin(1)) / rgb.amax(1).clamp(min=1e-6),
    }
    absent = hues(prompts).isnan()
    return {name: values.float().masked_fill(absent, NAN) for name, values in measured.items()}


def hues(prompts):
    """The hue in degrees of each named ball, `[b, 2]`; NaN if there is no second ball."""
    named = [[60.0 * COLOURS.index(colour) for colour, *_ in BALL.findall(p)] for p in prompts]
    return torch.tensor([(row + [NAN])[:2] for row in named])


def own_pixels(video, prompts):
    """Which pixels of videos `b 3 f h w` are within 30 degrees of each ball's hue, `b 2 f h w`."""
    r, g, b = video.unbind(1)
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b))[:, None]
    return ((hue - hues(prompts)[..., None, None, None] + 180) % 360 - 180).abs() < 30


def chroma_of(video):
    """RGB `[b, 3, f, h, w]` -> the largest channel less the smallest, `[b, f, h, w]`."""
    return video.amax(1) - video.amin(1)


def score(video, prompts):
    """Score videos against their prompts; return a dict of `[b]` float tensors.

    instance                1 if the instances are preserved: none of the next six failures
    missing, split, blurred, jumps      1 if this happens to a named ball; see `read`
    extra                   1 if in some frame coloured pixels have the hue of no named ball
    fused                   1 if in some frame the two named balls touch
    relation                1 if the first ball is above, or left of, the second; NaN for one ball
    direction               1 if all named directions are right; NaN if the prompt names none
    prompt                  1 if instance, relation, directions and speeds are all right
    dynamic                 share of the balls that move visibly
    speed                   mean of the balls
    open_speed              mean of the balls without a named direction; NaN if there are none
    saturation              mean of the balls
    ground                  mean brightness of what has no colour
    flicker                 mean absolute second difference of the pixels in time
    """
    r, video = read(video, prompts), video.float().clamp(0, 1)
    result = {name: r[name].nansum(1).clamp(max=1)
              for name in ("missing", "split", "blurred", "jumps")}
    coloured, own = chroma_of(video) > CHROMA, own_pixels(video, prompts)
    stray = (coloured & ~own.any(1)).sum((2, 3))
    result["extra"] = (stray > 3).any(1).float()
    result["fused"] = connected(own & coloured[:, None], coloured).any(1).float()
    instance = torch.stack(list(result.values())).amax(0) == 0

    named = [(BALL.findall(prompt) + [("", "", "")])[:2] for prompt in prompts]
    heading = torch.tensor([[DIRECTIONS.get(direction, (NAN, NAN)) for _, direction, _ in balls]
                            for balls in named])  # b 2 (x, y)
    speed = torch.hypot(r["vx"], r["vy"])
    forward = r["vx"] * heading[..., 0] + r["vy"] * heading[..., 1]
    right_way = (forward > 0.5 * NOT_MOVING) & (forward > 0.8 * speed)
    is_open = heading.isnan().any(2)
    middle = (SLOW + FAST) / 2
    right_speed = torch.tensor([[word == "" or (s > middle) == (word == "fast")
                                 for (*_, word), s in zip(*row)]
                                for row in zip(named, speed.tolist())]).all(1)
    beside = torch.tensor(["beside" in prompt for prompt in prompts])
    place = torch.where(beside[:, None], r["x"], r["y"])
    relation = place[:, 0] < place[:, 1]
    return {
        "instance": instance.float(),
        **result,
        "relation": relation.float().masked_fill(place[:, 1].isnan(), NAN),
        "direction": (right_way | is_open).all(1).float().masked_fill(is_open.all(1), NAN),
        "prompt": (instance & (relation | place[:, 1].isnan()) & (right_way | is_open).all(1)
                   & right_speed).float(),
        "dynamic": (speed > 0.3).float().masked_fill(speed.isnan(), NAN).nanmean(1),
        "speed": speed.nanmean(1),
        "open_speed": speed.masked_fill(~is_open, NAN).nanmean(1),
        "saturation": r["saturation"].nanmean(1),
        "ground": video.mean(1).masked_fill(coloured, NAN).flatten(1).nanmean(1),
        "flicker": video.diff(n=2, dim=2).abs().mean((1, 2, 3, 4)),
    }


def traits(video, prompts):
    """What may make real videos hard to learn from, `[b]` each."""
    r, first = read(video, prompts), video[:, :, 0]
    floor = first[:, 0].masked_fill(chroma_of(first) > CHROMA, NAN)
    return {"two balls": r["x"].isnan().logical_not().sum(1) - 1.0,
            "size": r["size"].nanmean(1),
            "speed": torch.hypot(r["vx"], r["vy"]).nanmean(1),
            "grain": floor.diff(n=2, dim=-1).square().nanmean((1, 2)).sqrt()}


def connected(balls, coloured):
    """Whether a path of `coloured` pixels `b f h w` leads from one of `balls` `b 2 f h w` to the
    other, in each frame: `[b, f]`."""
    reached = balls[:, 0].float()
    for _ in range(2 * SIZE):  # pixels of path
        reached = F.max_pool2d(reached, 3, stride=1, padding=1) * coloured
    return (reached.bool() & balls[:, 1]).any(3).any(2)


def diversity(video, real, prompts):
    """Standard deviation over the first balls, relative to real videos: mean of five readings."""
    ours, reals = read(video, prompts), read(real, prompts)
    return torch.stack([ours[name][:, 0].std() / reals[name][:, 0].std()
                        for name in ("x", "y", "vx", "vy", "saturation")]).mean().item()
