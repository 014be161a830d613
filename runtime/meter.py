"""The meter: what a video's pixels say about its colours and its motion."""

import math

import torch
import torch.nn.functional as F

HEIGHT = 32  # in pixels, to which frames are shrunk before they are read
LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue (Rec. 709)
FASTEST = 0.05  # share of pixels whose speed is the motion, as in VBench's dynamic degree
STILL = 0.25  # a video with less motion is still


def readings(video):
    """What a video `[3, f, h, w]` in [0, 1] shows, as a dict of floats:

    saturation    the largest of R, G and B less the smallest; pixels count as much as they have
    contrast      standard deviation of luma over the pixels of a frame
    motion        speed of the fastest 5% of all pixels, in percent of the height for each frame
    flicker       mean absolute second difference of luma in time, relative to contrast
    still         1 if there is no motion, else 0
    """
    chroma = video.amax(0) - video.amin(0)
    luma = (video * video.new_tensor(LUMA).view(3, 1, 1, 1)).sum(0)
    contrast = luma.var((1, 2), correction=0).mean().sqrt()
    speed = flow(video).flatten()
    motion = 100 / HEIGHT * speed.topk(math.ceil(FASTEST * len(speed))).values.mean()
    flicker = luma.diff(n=2, dim=0).abs().mean() / contrast.clamp(min=1 / 255)
    return {"saturation": (chroma.square().sum() / chroma.sum().clamp(min=1e-6)).item(),
            "contrast": contrast.item(), "motion": motion.item(), "flicker": flicker.item(),
            "still": float(motion < STILL)}


def mean_readings(videos):
    """The means of the first four over videos `[b, 3, f, h, w]` of any size and length."""
    *_, f, h, w = videos.shape
    videos = videos.float().clamp(0, 1)
    if f < 4:  # the last frame is repeated, as that of a picture that stands still
        videos = F.pad(videos, (0, 0, 0, 0, 0, 4 - f), mode="replicate")
    size = len(videos[0, 0]), HEIGHT, max(2, 2 * round(HEIGHT * w / h / 2))  # as in `read_video`
    each = list(map(readings, F.interpolate(videos, size, mode="area")))
    return {name: sum(one[name] for one in each) / len(each) for name in each[0] if name != "still"}


def flow(video):
    """The speed of each pixel of a video `[3, f, h, w]`, in pixels for each frame: `[f-3, h, w]`.

    Optical flow by the method of Lucas and Kanade: in windows of 5 x 5 pixels, the shift that best
    explains the change from one frame to the next by the gradients of all three colours. Smoothing
    over space and three frames keeps noise and flicker from passing for motion.
    """
    frames = (video[:, :-2] + 2 * video[:, 1:-1] + video[:, 2:]).transpose(0, 1) / 4  # f 3 h w
    kernel = video.new_tensor([[1, 4, 6, 4, 1]]) / 16
    kernel = (kernel * kernel.T).expand(3, 1, 5, 5)
    frames = F.conv2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)

    def window(product):  # sum over the colours, mean over a window
        return F.avg_pool2d(product.sum(1, keepdim=True), 5, stride=1, padding=2)[:, 0]

    dt = frames.diff(dim=0)
    dy, dx = torch.gradient((frames[1:] + frames[:-1]) / 2, dim=(2, 3))
    xx, xy, yy = window(dx * dx) + 1e-4, window(dx * dy), window(dy * dy) + 1e-4
    xt, yt = window(dx * dt), window(dy * dt)
    return torch.hypot(yy * xt - xy * yt, xx * yt - xy * xt) / (xx * yy - xy * xy)


def diversity(videos):
    """Standard deviation over videos of one prompt, relative to contrast; NaN for a single one."""
    if len({video.shape for video in videos}) != 1 or len(videos) == 1:
        return math.nan
    videos = torch.stack(videos)
    return (videos.var(0).mean() / videos.var((3, 4), correction=0).mean()).sqrt().item()
