"""Parts of the pages that the commands write: tables, videos and charts in HTML, and markdown.

An HTML page is one file: its videos and charts are inside it, and it loads nothing.
A table is a list of rows of cells. The first row holds the heads.
"""

import base64
import re
from html import escape
from io import StringIO
from itertools import zip_longest

import imageio.v3 as iio
import matplotlib.style
from einops import rearrange

from runtime.media import to_bytes

DURATIONS = [125] * 8 + [625]  # milliseconds of a toy video's frames: the last one rests
INK = "#777777"  # of a chart's text and lines: legible on a light and on a dark page

matplotlib.style.use({
    "svg.fonttype": "none", "svg.hashsalt": "constant", "axes.spines.top": False,
    "axes.spines.right": False, "legend.fontsize": "small", "legend.frameon": False,
    "axes.titlesize": "medium", "axes.titlelocation": "left"} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK))

STYLE = """
:root { color-scheme: light dark }
body { max-width: 92rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif }
h2 { margin: 3rem 0 1rem; font-size: 1.25rem }
p { max-width: 48rem }
.note, figcaption, table { font-size: .8rem; line-height: 1.4 }
.note, figcaption, thead { color: GrayText }
.wide { overflow-x: auto }
table { width: 100%; border-collapse: collapse }
th, td { padding: .35rem .4rem; vertical-align: top; text-align: left; font-weight: 400 }
.numbers th, .numbers td { border-bottom: 1px solid #7774 }
.numbers :is(td, thead th + th) { text-align: right; font-variant-numeric: tabular-nums }
.numbers td { white-space: nowrap }
.numbers tbody th { min-width: 8rem }
.videos { max-width: 60rem }
.videos td { min-width: 5rem }
.videos tbody th { min-width: 8rem }
.videos thead th { white-space: pre-line }
.videos img { display: block; width: 100%; image-rendering: pixelated }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)) }
figure { margin: 1rem 0; max-width: 60rem }
figure img { max-width: 100% }
svg { width: 100%; height: auto }
"""


class Html(str):
    """A cell of a table that is HTML already, and is not escaped."""


def write(file, title, body):
    """Write an HTML page."""
    file.write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
""", encoding="utf-8")


def table(rows, kind="numbers"):
    """kind: "numbers" aligns the cells to the right, "videos" does not."""
    heads, *body = ([cell if isinstance(cell, Html) else escape(str(cell)) for cell in row]
                    for row in rows)
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
                   for first, *cells in body)
    return (f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def video_table(heads, rows):
    """Videos side by side: a column for each sampler, a row for each prompt.

    rows: for each prompt, a picture of each sampler, from `moving_picture`.
    """
    return table([["", *heads], *(
        [prompt, *(Html(f'<img src="data:image/webp;base64,{picture}" alt="{escape(prompt)}">')
                   for picture in pictures)] for prompt, pictures in rows.items())], "videos")


def shown(prompts):
    """The numbers of at most eight prompts of the toy world that are worth showing.

    They alternate: one that leaves all motion open, and one that names the motion of all balls.
    Both kinds alternate between one ball and two.
    """
    kinds = {}
    for i, prompt in enumerate(prompts):
        balls, moving = prompt.count("ball"), prompt.count("moving")
        if moving in (0, balls):
            kinds.setdefault((balls, moving > 0), []).append(i)
    order = [kinds.get(kind, []) for kind in ((1, False), (1, True), (2, False), (2, True))]
    return [i for group in zip_longest(*order) for i in group if i is not None][:8]


def moving_picture(video):
    """A video `[3, f, h, w]` in [0, 1] as an endless lossless WebP, in base64."""
    frames = to_bytes(rearrange(video, "c f h w -> f h w c"), video.shape[-2], least=1)
    data = iio.imwrite("<bytes>", frames, extension=".webp", duration=DURATIONS, loop=0,
                       lossless=True)
    return base64.b64encode(data).decode()


def chart(figure, caption=""):
    """A matplotlib figure as inline SVG."""
    svg = StringIO()
    figure.savefig(svg, format="svg", transparent=True,
                   metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    _, tag, rest = svg.getvalue().partition("<svg")
    return f"<figure>{tag}{rest}<figcaption>{escape(caption)}</figcaption></figure>"


def markdown(rows):
    heads, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([heads, "|---" * len(rows[0]) + "|", *body])


def fill(file, blocks):
    """Replace what a file has between `<!-- name -->` and `<!-- end -->` by `blocks[name]`."""
    def filled(match):
        start, name, end = match.groups()
        return f"{start}\n{blocks[name]}\n\n{end}" if name in blocks else match[0]

    text = re.sub("(<!-- (.+?) -->\n).*?(<!-- end -->)", filled,
                  file.read_text(encoding="utf-8"), flags=re.DOTALL)
    file.write_text(text, encoding="utf-8")
