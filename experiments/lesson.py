"""The pictures of docs/method.md, and the code that it quotes from adavid.py.

    python -m experiments.lesson        about two minutes on two cores

The pictures come from two worlds: the toy, and a world of one or two numbers for a video, where the
teacher is a mixture of normal distributions whose scores are known in closed form.
"""

import ast
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from tqdm import tqdm

import adavid
from runtime import cli, page
from runtime.models import load_config, load_interpolator
from tiny_wan import STUDENT, WEIGHTS, ToyCodec, WanModel, world

PAGE = Path(__file__).parents[1] / "docs" / "method.md"
FIGURES = PAGE.parent / "figures" / "lesson"
SEED = 1002  # of the toy's videos, prompts and noise
ORANGE, BLUE, GREEN = "#e0722f", "#3b82d6", "#2e9e6b"  # student or DMD, teacher or AVD, real videos


@dataclass
class Lesson:
    """Draw the pictures of docs/method.md again, and quote adavid.py again."""

    only: tuple[str, ...] = ()
    """pictures to draw; by default all"""


def main(argv=None):
    return cli.run(run, Lesson, argv)


def run(args):
    if unknown := set(args.only) - set(PICTURES):
        raise ValueError(f"{min(unknown)}: no such picture; there are {', '.join(PICTURES)}")
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in tqdm(args.only or PICTURES, unit="picture"):
        torch.manual_seed(0)
        picture = PICTURES[name]()
        pixels = any(axes.images for axes in picture.axes)
        file = FIGURES / f"{name}.{'png' if pixels else 'svg'}"
        picture.savefig(file, dpi=110, transparent=True, bbox_inches="tight",
                        metadata={"Date": None} if file.suffix == ".svg" else None)
    page.fill(PAGE, quotes(PAGE.read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------
# Quotes
# ---------------------------------------------------------------------------------------------


def quotes(text):
    """The code that `<!-- code: NAME ... -->` in the page asks for: functions of adavid.py, without
    their docstrings, and a link to the first one's line."""
    blocks = {}
    for marker in re.findall("<!-- (code: .+?) -->", text):
        names = marker.removeprefix("code: ").split()
        links = ", ".join(f"[`{name}`](../adavid.py#L{line(name)})" for name in names)
        code = "\n\n\n".join(map(source, names))
        blocks[marker] = f"{links}:\n\n```python\n{code}\n```"
    return blocks


def find(name):
    found = adavid
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.unwrap(found)


def line(name):
    """The number of the line where a function is defined, below its decorators."""
    lines, first = inspect.getsourcelines(find(name))
    return first + next(i for i, text in enumerate(lines) if text.lstrip().startswith("def "))


def source(name):
    """A function's lines as they stand in the file, less its docstring."""
    code = textwrap.dedent(inspect.getsource(find(name))).rstrip()
    function = ast.parse(code).body[0]
    lines = code.splitlines()
    if ast.get_docstring(function):
        docstring = function.body[0]
        del lines[docstring.lineno - 1:docstring.end_lineno]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# The toy
# ---------------------------------------------------------------------------------------------


def toy(count):
    """`count` real videos of one or two balls, their prompts, and noise like their latents."""
    real, prompts = world.make(SEED, range(count))
    noise = torch.randn(count, *ToyCodec().latent_shape(),
                        generator=torch.Generator().manual_seed(SEED))
    return real, prompts, noise


def load(path=WEIGHTS):
    return WanModel.from_pretrained(path, torch.float32).eval()


def saturation(video, prompts):
    return world.score(video, prompts)["saturation"].nanmean().item()


def show(axes, rows, titles, columns=()):
    """Rows of frames `[n, 3, h, w]`, with titles at the left and below; NaN is transparent."""
    frames = F.pad(torch.stack(list(rows)), (0, 1, 0, 1), value=torch.nan)  # a gap between frames
    picture = rearrange(frames, "r n c h w -> (r h) (n w) c")
    opaque = ~picture[..., :1].isnan()
    axes.imshow(torch.cat([picture.nan_to_num().clamp(0, 1), opaque], dim=2).numpy())
    _, _, _, h, w = frames.shape
    axes.set_yticks([h * (i + 0.5) for i in range(len(rows))], titles, fontsize="small")
    axes.set_xticks([w * (i + 0.5) for i in range(len(columns))], columns, fontsize="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def strips(rows, titles, columns=(), width=9.0):
    """A figure of `show`."""
    figure = Figure(figsize=(width, 0.4 + len(rows) * (width - 1.5) / len(rows[0])),
                    layout="constrained")
    show(figure.subplots(), rows, titles, columns)
    return figure


@torch.no_grad()
def noise():
    """A real video at rising noise, and what the teacher predicts from it."""
    (real, prompts, noise), teacher, codec = toy(9), load(), ToyCodec()
    sigmas, which = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0), 8
    x0, text = codec.encode(real[which:which + 1]), codec.encode_text(prompts[which:which + 1])
    noisy, clean = [], []
    for sigma in sigmas:
        t = torch.tensor([1000 * sigma])
        x_t = adavid.add_noise(x0, noise[which:which + 1], t)
        noisy.append(codec.decode(x_t)[0, :, 4])
        clean.append(codec.decode(adavid.predict_x0(teacher, x_t, t, text))[0, :, 4])
    return strips([torch.stack(noisy), torch.stack(clean)], ["$x_t$", "predicted $x_0$"],
                  [f"$\\sigma$ = {sigma:g}" for sigma in sigmas])


def guidance():
    """The teacher's videos at four scales of guidance."""
    (real, prompts, noise), teacher, codec = toy(10), load(), ToyCodec()
    rows, titles = [real.unbind(2)[4]], ["real videos\nsaturation 1.00"]
    for scale in (1, 3, 5, 8):
        video = codec.decode(adavid.sample_teacher(
            teacher, noise, codec.encode_text(prompts), codec.encode_text([""]), 50, scale))
        rows.append(video[:, :, 4])
        relative = saturation(video, prompts) / saturation(real, prompts)
        titles.append(f"guidance {scale}\nsaturation {relative:.2f}")
    return strips(rows, titles)


def steps():
    """The same prompts and noise: 50 steps, 4 steps without training, and 4 steps with it."""
    (_, prompts, noise), codec, config = toy(4), ToyCodec(), load_config(WEIGHTS)
    text, full_rate = codec.encode_text(prompts), replace(config, strides=(1, 1, 1, 1))
    videos = {
        "teacher,\n50 x 2 forwards": adavid.sample_teacher(
            load(), noise, text, codec.encode_text([""]), 50, config.guidance_scale),
        "teacher,\n4 forwards": adavid.sample(
            load(), noise, text, full_rate, None, torch.Generator().manual_seed(0)),
        "student,\n4 forwards": adavid.sample(
            load(STUDENT), noise, text, full_rate, None, torch.Generator().manual_seed(0))}
    return strips([rearrange(codec.decode(x0)[:, :, ::4], "b c f h w -> (b f) c h w")
                   for x0 in videos.values()], videos)


@torch.no_grad()
def half_rate():
    """The frames that the student sees and predicts at each of its steps."""
    (_, prompts, noise), codec, config = toy(3), ToyCodec(), load_config(STUDENT)
    student, seen = load(STUDENT), []

    def model(x_t, t, text, frame_stride=1):
        v = student(x_t, t, text, frame_stride=frame_stride)
        seen.append((t[0].item(), frame_stride, x_t, adavid.velocity_to_x0(v, x_t, t)))
        return v

    adavid.sample(model, noise[2:], codec.encode_text(prompts[2:]), config,
                  load_interpolator(STUDENT, "cpu"), torch.Generator().manual_seed(0))
    rows, titles = [], []
    for t, stride, x_t, x0 in seen:
        for name, latents in (("sees", x_t), ("predicts", x0)):
            frames = torch.full((world.FRAMES, 3, world.SIZE, world.SIZE), torch.nan)
            frames[::stride] = codec.decode(latents)[0].transpose(0, 1)
            rows.append(frames)
            titles.append(f"t = {t:g}: {name}")
    return strips(rows, titles, width=6.5)


def gate():
    """L_temp of real videos by their speed, and what descent on it does to a slow video."""
    real, prompts = world.make(SEED, range(300))
    codec, level = ToyCodec(), load_config(WEIGHTS).temporal_truncation
    speed = world.score(real, prompts)["speed"]
    loss = torch.stack([adavid.temporal_loss(x0[None]) for x0 in codec.encode(real)])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    left.scatter(speed, loss, s=6, color=GREEN)
    left.axhline(level, color=ORANGE)
    left.text(1, 7, "below the line, a video\nmoves enough", color=ORANGE, ha="right", va="top")
    left.set(xlabel="pixels per frame", title="$L_{temp}$ of real videos")

    slow = int(speed.argmin())
    rows = [real[slow]]
    for truncation in (level, None):
        x0 = codec.encode(real[slow:slow + 1]).requires_grad_()
        for _ in range(300):
            gradient, = torch.autograd.grad(adavid.temporal_loss(x0, truncation=truncation), x0)
            x0 = (x0 - 10 * gradient).detach().requires_grad_()
        rows.append(codec.decode(x0.detach())[0])
    show(right, [row.transpose(0, 1) for row in rows],
         ["a slow video", "after descent\nwith the gate", "and without it"])
    return figure


# ---------------------------------------------------------------------------------------------
# The closed-form world: a "video" is a few numbers, `[b, c, 1, 1, 1]`
# ---------------------------------------------------------------------------------------------

ONE_STEP = adavid.AVDConfig(
    timesteps=(1000,), strides=(1,), train_strides=(1,), guidance_scale=1.0, lambda_temp=0.0)
ONE_STEP_DMD = replace(ONE_STEP, lambda_reg=0.0)
TEXT = torch.zeros(1, 1, 1)  # there are no prompts
SIZE = 16  # numbers of a "video" where one number would be too noisy; all of them are alike


class Mixture:
    """The exact model of a mixture of round normal distributions of one standard deviation."""

    def __init__(self, means, weights, std):
        self.means, self.std = torch.tensor(means), std
        self.weights = torch.tensor(weights)

    def __call__(self, x_t, t, text):
        sigma, x = t[:, None, None] / 1000, x_t.flatten(1)[:, None]  # b 1 1 and b 1 c
        variance = (1 - sigma) ** 2 * self.std**2 + sigma**2
        away = x - (1 - sigma) * self.means  # b k c
        share = torch.softmax(self.weights.log() - away.square().sum(2) / (2 * variance[..., 0]), 1)
        x0 = self.means + (1 - sigma) * self.std**2 / variance * away
        return ((x - (share[..., None] * x0).sum(1, keepdim=True)) / sigma).view_as(x_t)

    def sample(self, count):
        means = self.means[torch.multinomial(self.weights, count, replacement=True)]
        return (means + self.std * torch.randn_like(means))[..., None, None, None]

    def density(self, x, sigma=0.0):
        """Of one number, noised."""
        variance = (1 - sigma) ** 2 * self.std**2 + sigma**2
        away = x[:, None] - (1 - sigma) * self.means[:, 0]
        return (self.weights * normal(away, variance)).sum(1)


class Student(torch.nn.Module):
    """A generator of one step, x0 = mean + A noise: normal distributions, whatever it learns."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))
        self.matrix = torch.nn.Parameter(std * torch.eye(len(mean)))

    def forward(self, x_t, t, text):
        x = x_t.flatten(1)
        return (x - self.mean - x @ self.matrix.T).view_as(x_t)

    def std(self):
        """Over the videos, on average over their numbers."""
        return self.matrix.square().sum(1).mean().sqrt().item()

    def critic(self):
        """The exact model of the student's present distribution."""
        mean, covariance = self.mean.detach().clone(), (self.matrix @ self.matrix.T).detach()

        def velocity(x_t, t, text):
            sigma, x = t[:, None] / 1000, x_t.flatten(1)
            noisy = (1 - sigma[..., None]) ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(
                len(mean))
            away = torch.linalg.solve(noisy, (x - (1 - sigma) * mean)[..., None])
            x0 = mean + ((1 - sigma[..., None]) * covariance @ away)[..., 0]
            return ((x - x0) / sigma).view_as(x_t)

        return velocity


def normal(x, variance):
    return torch.exp(-x.square() / (2 * variance)) / (2 * torch.pi * variance) ** 0.5


def distil(student, teacher, config, real=None, updates=300, late=0, lr=0.02):
    """Train a student with adavid's losses. Yields before each update, and once at the end.

    late: by how many updates the critic lags behind.
    """
    optimizer = torch.optim.Adam(student.parameters(), lr, betas=(0.0, 0.99))
    cache = adavid.LossMeanCache(1, config.ema_decay, config.k)
    critics = [student.critic()] * (late + 1)
    for _ in range(updates):
        yield
        critics = [*critics[1:], student.critic()]
        videos = (real or teacher).sample(512)
        optimizer.zero_grad()
        noise = adavid.draw(torch.randn, videos.shape, videos)
        x0 = adavid.backward_simulation(student, noise, TEXT, 0, config)
        loss, _ = adavid.matching_loss(x0, teacher, critics[0], TEXT, TEXT, config)
        loss.backward()
        if config.lambda_reg:
            loss, step, reg, _ = adavid.weighted_regression(student, cache, videos, TEXT, 0, config)
            loss.backward()
            cache.update(step, reg)
        optimizer.step()
    yield


def matching():
    """Two scores at one noise level, and the path of a student over updates."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)

    teacher, student, sigma = Mixture([[1.2]], [1.0], 0.5), Student([-1.0], 0.6), 0.5
    x = torch.linspace(-3, 3, 200)
    noisy = lambda mean, std: normal(x - (1 - sigma) * mean, ((1 - sigma) * std) ** 2 + sigma**2)
    left.fill_between(x, teacher.density(x, sigma), color=BLUE, alpha=0.3, label="teacher")
    left.fill_between(x, noisy(-1.0, 0.6), color=ORANGE, alpha=0.3, label="student")
    points = torch.tensor([-1.6, -0.9, -0.3, 0.3])[:, None, None, None, None]
    t = torch.full((4,), 1000 * sigma)
    with torch.no_grad():
        real, fake = (adavid.predict_x0(model, points, t, TEXT) for model in
                      (teacher, student.critic()))
    for i, (p, r, f) in enumerate(zip(points.flatten(), real.flatten(), fake.flatten())):
        height = -0.1 * (i + 1)
        left.plot(p, height, ".", color=page.INK)
        left.annotate("", (r, height), (f, height),
                      arrowprops={"arrowstyle": "->", "color": page.INK})
        left.plot(r, height, "|", color=BLUE, markersize=9)
        left.plot(f, height, "|", color=ORANGE, markersize=9)
    left.axhline(0, color=page.INK, linewidth=0.5)
    left.set(title=f"one noise level, $\\sigma$ = {sigma}", yticks=[])
    left.legend(loc="upper left")

    teacher = Mixture([[-1.6, -0.6], [1.4, 1.0]], [0.5, 0.5], 0.5)
    shown = teacher.sample(600).flatten(1)
    right.scatter(*shown.T, s=3, color=BLUE, alpha=0.3)
    student, path = Student([0.4, -1.8], 0.3), []
    circle = torch.stack([f(torch.linspace(0, 2 * torch.pi, 60)) for f in (torch.cos, torch.sin)])
    for update, _ in enumerate(distil(student, teacher, ONE_STEP_DMD, updates=400)):
        mean, matrix = student.mean.detach().clone(), student.matrix.detach().clone()
        path.append(mean)
        if update in (0, 20, 60, 120, 400):
            right.plot(*(mean[:, None] + 2 * matrix @ circle), color=ORANGE,
                       alpha=0.4 + 0.6 * update / 400)
            right.annotate(str(update), mean, color=ORANGE)
    right.plot(*torch.stack(path).T, color=ORANGE, linewidth=0.8)
    right.set(title="the student after some updates", aspect="equal", xticks=[], yticks=[])
    return figure


def critic():
    """The student's way to the teacher with critics that are late."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    teacher = Mixture([[1.2] * SIZE], [1.0], 0.5)
    for late, colour, title in ((0, GREEN, "follows"), (10, BLUE, "is 10 updates late"),
                                (40, ORANGE, "is 40 updates late"), (999, page.INK, "never moves")):
        torch.manual_seed(0)
        student, means, stds = Student([-1.0] * SIZE, 0.6), [], []
        for _ in distil(student, teacher, ONE_STEP_DMD, updates=400, late=late):
            means.append(student.mean.mean().item())
            stds.append(student.std())
        left.plot(means, color=colour, label=f"the critic {title}")
        right.plot(stds, color=colour)
    for axes, value, title in ((left, 1.2, "the student's mean"), (right, 0.5, "its spread")):
        axes.axhline(value, color=page.INK, linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="updates")
    left.set_ylim(-1.5, 4)
    right.set(yscale="log", yticks=[0.2, 0.5, 1, 2, 4], yticklabels=[0.2, 0.5, 1, 2, 4])
    right.minorticks_off()
    left.legend()
    return figure


def middle():
    """Regression on real videos, of which some are far from the teacher, and the weights."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    teacher = Mixture([[-1.0] * SIZE], [1.0], 0.4)
    real = Mixture([[-1.0] * SIZE, [2.5] * SIZE], [0.75, 0.25], 0.4)
    strengths = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    for title, colour, k in (("plain", ORANGE, 0.0), ("adaptive", BLUE, 3.0)):
        means, stds = [], []
        for strength in strengths:
            torch.manual_seed(0)
            student = Student([-1.0] * SIZE, 0.4)
            list(distil(student, teacher, replace(ONE_STEP, lambda_reg=strength, k=k), real))
            means.append(student.mean.mean().item())
            stds.append(student.std())
        means, stds = torch.tensor(means), torch.tensor(stds)
        left.plot(strengths, means, color=colour, label=f"{title} regression")
        left.fill_between(strengths, means - stds, means + stds, color=colour, alpha=0.2)
    for level, title in ((-1.0, "teacher's mean"), (-0.125, "mean of all real videos")):
        left.axhline(level, color=page.INK, linewidth=0.8, linestyle=":")
        left.text(16, level + 0.03, title, ha="right", va="bottom", fontsize="small")
    left.set(title="the student's mean and spread", xlabel="$\\lambda_{reg}$")
    left.legend(loc="upper left")

    loss = torch.linspace(0, 3, 200)
    for k in (1.0, 3.0, 8.0):
        cache = adavid.LossMeanCache(1, k=k)
        cache.update(torch.zeros(1, dtype=torch.long), torch.tensor([1.0]))
        right.plot(loss, cache.weigh(torch.zeros(200, dtype=torch.long), loss), label=f"k = {k:g}")
    right.axvline(1, color=page.INK, linewidth=0.5)
    right.set(title="weight w of a video against its loss L", xlabel="L, where the mean is 1")
    right.legend()
    return figure


# ---------------------------------------------------------------------------------------------
# The diagram
# ---------------------------------------------------------------------------------------------


def cycle():
    """Who sees which tensor in a cycle."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.2, 19), ylim=(0, 9.4))
    axes.axis("off")

    def box(x, y, text, colour=page.INK, width=3.0, height=1.0):
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.1",
                                      facecolor="none", edgecolor=colour))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=colour,
                  fontsize="small")

    def arrow(start, end, text="", colour=page.INK, side=0.25, style="-"):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour,
                                                  "linestyle": style})
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + side, text, ha="center",
                  color=colour, fontsize="x-small")

    axes.text(0, 9.0, "one update of the student", color=ORANGE)
    box(0, 7, "noise, text")
    box(4.6, 7, "student\nup to step i", ORANGE)
    box(9.2, 7, "$x_0$, a video", ORANGE)
    box(13.8, 8.0, "teacher, guided", BLUE)
    box(13.8, 6.4, "critic", GREEN)
    arrow((3.1, 7.5), (4.5, 7.5))
    arrow((7.7, 7.5), (9.1, 7.5))
    arrow((12.3, 7.7), (13.7, 8.5), "noised", side=0.35)
    arrow((12.3, 7.3), (13.7, 6.9), "noised", side=-0.55)
    axes.text(17.1, 7.55, "difference:\n$L_{KL}$", color=ORANGE, fontsize="small", va="center",
              ha="left")
    arrow((10.7, 6.9), (10.7, 6.2))
    axes.text(10.7, 5.75, "does it move? $L_{temp}$", color=ORANGE, fontsize="small", ha="center")
    box(0, 4.0, "real video, text", GREEN)
    box(4.6, 4.0, "student at\none step", ORANGE)
    box(9.2, 4.0, "loss L of\nthis video", ORANGE)
    box(13.8, 4.0, "cache: mean\nof the losses")
    arrow((3.1, 4.5), (4.5, 4.5), "noised")
    arrow((7.7, 4.5), (9.1, 4.5))
    arrow((13.7, 4.7), (12.3, 4.7), "weight w")
    arrow((12.3, 4.3), (13.7, 4.3), "L", side=-0.5)
    axes.text(17.1, 4.5, "$w L_{reg}$", color=ORANGE, fontsize="small", va="center")
    axes.text(0, 2.6, "then five updates of the critic", color=GREEN)
    box(0, 0.8, "noise, text")
    box(4.6, 0.8, "student\nwithout gradient", ORANGE)
    box(9.2, 0.8, "$x_0$, a video", ORANGE)
    box(13.8, 0.8, "critic", GREEN)
    arrow((3.1, 1.3), (4.5, 1.3))
    arrow((7.7, 1.3), (9.1, 1.3))
    arrow((12.3, 1.3), (13.7, 1.3), "noised")
    axes.text(17.1, 1.3, "flow\nmatching", color=GREEN, fontsize="small", va="center")
    return figure


PICTURES = {function.__name__: function for function in (
    noise, guidance, steps, matching, critic, middle, gate, half_rate, cycle)}

if __name__ == "__main__":
    sys.exit(main())
