"""Parts of the pages that the commands write: tables, videos and charts in HTML, and markdown.

An HTML page is one file: videos and charts are inside it, and it loads nothing.
A table is a list of lines of text cells. The first line holds the heads.
"""

import base64
import re
from html import escape
from io import StringIO

import imageio.v3 as iio
import matplotlib.style
from einops import rearrange

from runtime.media import to_bytes

DURATIONS = [125] * 8 + [625]  # milliseconds of a toy video's frames: the last one rests
INK = "#010203"  # in a chart: stands for the page's text colour, which may be light or dark

matplotlib.style.use({
    "svg.fonttype": "none", "svg.hashsalt": "constant", "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.5, "legend.fontsize": "small",
    "legend.frameon": False} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK))

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #6b7078; --line: #e3e5e8 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #131519; --ink: #e4e6ea; --soft: #969ca6; --line: #2b2f36 } }
body { max-width: 92rem; margin: 0 auto; padding: 2rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 1rem 0 .5rem }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem } h3 { font-size: .95rem; margin: 0 0 .25rem }
p { max-width: 48rem }
th { font-weight: 400; text-align: left; vertical-align: top }
.note, figcaption, thead { font-size: .8rem; line-height: 1.4; color: var(--soft) }
.wide { overflow-x: auto }
.numbers { width: 100%; border-collapse: collapse; font-size: .8rem; line-height: 1.4 }
.numbers th, .numbers td { padding: .35rem .4rem; border-bottom: 1px solid var(--line) }
.numbers th:first-child { padding-left: 0; min-width: 8rem }
.numbers th:not(:first-child), .numbers td { text-align: right }
.numbers td { white-space: nowrap; font-variant-numeric: tabular-nums; vertical-align: top }
.words th, .words td { text-align: left !important; white-space: normal }
.videos { width: 100%; max-width: 60rem; table-layout: fixed; border-spacing: 0 }
.videos thead th { position: sticky; top: 0; padding: .5rem .5rem .5rem 0; white-space: pre-line;
  background: var(--paper) }
.videos tbody th { padding: .7rem 0 .2rem } .videos td { padding: 0 4px 0 0 }
.videos img { display: block; width: 100%; border-radius: 4px; image-rendering: pixelated }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 2rem }
figure { margin: 1rem 0; max-width: 60rem } svg { width: 100%; height: auto }
svg text { font-family: inherit !important }
@media (max-width: 40rem) { body { padding: .5rem .75rem 3rem } h1 { font-size: 1.6rem }
  .videos thead { font-size: .6rem } }
"""


# ---------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------


def html(title, body):
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1>
{body}
</body></html>
"""


def table(lines, kind="numbers"):
    """kind: "numbers" aligns the cells to the right, "numbers words" to the left."""
    def cells(line, tag, scope):
        first, *rest = map(escape, map(str, line))
        return f"<tr><th scope={scope}>{first}</th>" + "".join(
            f"<{tag}>{cell}</{tag}>" for cell in rest) + "</tr>"

    heads, *rows = lines
    rows = "".join(cells(row, "td", "row") for row in rows)
    return (f'<div class=wide><table class="{kind}"><thead>{cells(heads, "th", "col")}</thead>'
            f"<tbody>{rows}</tbody></table></div>")


def video_table(columns, rows):
    """Videos side by side: a column for each sampler, a row for each prompt.

    columns: the text below each sampler's name.
    rows: for each prompt, a picture of each sampler, from `moving_picture`.
    """
    heads = "".join(f"<th scope=col><b>{escape(name)}</b>\n{escape(text)}</th>"
                    for name, text in columns.items())
    body = ""
    for prompt, pictures in rows.items():
        images = "".join(
            f'<td><img src="data:image/webp;base64,{picture}" alt="{escape(f"{prompt}: {name}")}">'
            f"</td>" for name, picture in zip(columns, pictures))
        body += (f"<tr><th scope=rowgroup colspan={len(columns)}>{escape(prompt)}</th></tr>"
                 f"<tr>{images}</tr>")
    return f"<table class=videos><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def shown(prompts):
    """The numbers of at most eight prompts of the toy world that are worth showing.

    They alternate: one of each colour that leaves the motion open, and one of each direction.
    """
    open_prompts, named_prompts = {}, {}
    for i, words in enumerate(prompt.split() for prompt in prompts):
        kinds, kind = (named_prompts, words[4]) if len(words) > 3 else (open_prompts, words[1])
        kinds.setdefault(kind, i)
    return [i for pair in zip(open_prompts.values(), named_prompts.values()) for i in pair]


def moving_picture(video):
    """A video `[3, f, h, w]` in [0, 1] as an endless lossless WebP, in base64."""
    frames = to_bytes(rearrange(video, "c f h w -> f h w c"), video.shape[-2], least=1)
    data = iio.imwrite("<bytes>", frames, extension=".webp", duration=DURATIONS, loop=0,
                       lossless=True)
    return base64.b64encode(data).decode()


def chart(figure, title="", caption=""):
    """A matplotlib figure as inline SVG, in the page's font and colours."""
    svg = StringIO()
    figure.savefig(svg, format="svg", transparent=True,
                   metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    _, tag, rest = svg.getvalue().replace(INK, "currentColor").partition("<svg")
    return (f"<figure><h3>{escape(title)}</h3>{tag}{rest}"
            f"<figcaption>{escape(caption)}</figcaption></figure>")


# ---------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------


def markdown(lines):
    heads, *rows = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([heads, "|---" * len(lines[0]) + "|", *rows])


def fill(text, blocks):
    """Replace what stands between `<!-- name -->` and `<!-- end -->` by `blocks[name]`."""
    def filled(match):
        start, name, end = match.groups()
        return f"{start}\n{blocks[name]}\n\n{end}" if name in blocks else match[0]

    return re.sub("(<!-- (.+?) -->\n).*?(<!-- end -->)", filled, text, flags=re.DOTALL)
