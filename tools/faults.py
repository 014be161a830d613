"""What is wrong with a video that only its decoded frames tell.

    share of frames that repeat the one before   above 50%, and 16 or more: refused
                                                 above 10%: a warning
    hard cuts                                    a warning
    black borders on two opposite sides          above 4% of the size together: a warning
    begins or ends in black                      a warning

A frame repeats the one before if no block of about 18 x 18 pixels (of 480 lines) has changed by 4
of 255 on average. A cut is a change of 25 of 255 on average, over three times as large as any other
within three frames. A border is darker than 24 of 255 in all frames.
"""

import torch.nn.functional as F

MOST_REPEATS, LEAST_REPEATS, SOME_REPEATS = 0.5, 16, 0.1
BORDERS = 0.04
REPEATED, CUT, BLACK, DARK = 4 / 255, 25 / 255, 24 / 255, 8 / 255
LINES = 80  # to which frames are thinned out, as whole ones would take a second


def find_faults(video, allow_still=False):
    """Warnings about a video `[3, f, h, w]` in [0, 1], a list of texts: a kind, a colon, details.

    ValueError for a video that stands still for most of the time, unless `allow_still`.
    """
    step = max(1, video.shape[2] // LINES)
    video = video[:, :, ::step, ::step].contiguous()
    change = video.diff(dim=1).abs().amax(0)  # f-1 h w
    faults = []

    repeats = (F.avg_pool2d(change, 3, ceil_mode=True).flatten(1).amax(1) < REPEATED).sum().item()
    share = repeats / max(1, len(change))
    details = f"{repeats} of {len(change)} frames repeat the one before"
    if share > MOST_REPEATS and repeats >= LEAST_REPEATS and not allow_still:
        raise ValueError(f"stands still: {details} (--allow-still takes such videos)")
    if share > SOME_REPEATS:
        faults.append(f"repeated frames: {details}")

    change = change.mean((1, 2)).tolist()
    cuts = [i + 1 for i, x in enumerate(change) if x > CUT and x > 3 * max(
        [0, *change[max(0, i - 3):i], *change[i + 1:i + 4]])]
    if cuts:
        faults.append(f"hard cuts: at frame {', '.join(map(str, cuts))}")

    brightest = video.amax((0, 1))  # h w
    for where, lines in (("above and below", brightest.amax(1)),
                         ("left and right", brightest.amax(0))):
        lit = (lines > BLACK).nonzero().flatten().tolist() or [0, len(lines) - 1]
        borders = lit[0], len(lines) - 1 - lit[-1]
        if min(borders) and sum(borders) > len(lines) * BORDERS:
            faults.append(f"black borders: {sum(borders) / len(lines):.0%} {where}")

    light = video.mean((0, 2, 3)).tolist()
    if min(light[0], light[-1]) < DARK and max(light) > 5 * DARK:
        faults.append(f"black {'start' if light[0] < DARK else 'end'}: fades, most likely")
    return faults
