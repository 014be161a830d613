"""One self-contained page of the ablation: tables, claims with their verdicts, plots and videos.

    python -m tools.ablation_report

Reads what tools.ablation measured, and the videos that its students drew on this machine.
"""

import json
import sys
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from safetensors import safe_open

from tools import cli
from tools.ablation import (
    COLUMNS, CONDITIONS, RESULTS, Measurements, read_conditions, read_result, verdict)
from tools.report import CHART_STYLE, INK, STYLE, moving_picture, shown_first, table

COLOURS = ("#9b5de5", "#3b82d6", "#12a594", "#e0a030", "#e0722f", "#d6336c")


@dataclass
class Page:
    """Write report.html and figure.png beside the measurements."""

    conditions: Path = CONDITIONS
    """what was trained and sampled"""
    results: Path = RESULTS
    """folder of the measurements"""
    out: Path = Path("runs/ablation")
    """folder of the students and their videos"""


def main(argv=None):
    return cli.run(run, Page, argv)


def run(args):
    conditions = read_conditions(args.conditions)
    measured = Measurements(conditions, args.results)
    first, *others = [q for q in conditions["questions"] if measured.has(q["rows"])]
    draw(measured, first["rows"], first["plots"]).savefig(args.results / "figure.png", dpi=110)
    sections = "".join(f"<h2>{escape(q['asks'])}</h2><p>{escape(q['answer'])}</p>"
                       + numbers(measured, q["rows"], q["columns"])
                       + svg(draw(measured, q["rows"], q["plots"])) for q in others)
    page = args.results / "report.html"
    page.write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>The ablation in the toy world</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{escape(first["asks"])}</h1><p>{escape(first["answer"])}</p>
{numbers(measured, first["rows"], first["columns"])}
<p class=note>Means and half of the 95% interval, over {len(conditions["seeds"])} seeds and
{conditions["prompts"]} prompts. Motion, saturation and flicker are shares of real data's.</p>
{svg(draw(measured, first["rows"], first["plots"]))}
<h2>The paper's claims</h2>{claims(measured)}
<h2>The same prompts, the same noise</h2>{videos(args, conditions, first["rows"])}
<h2>What makes a video hard</h2>{hardness(measured, first["rows"])}
{sections}</body></html>
""", encoding="utf-8")
    print(f"open {page}")


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def titles(measured, rows):
    return [measured.conditions["rows"][row]["title"] for row in rows]


def numbers(measured, rows, columns):
    cells = [[escape(title), *(measured.cell(row, column) for column in columns)]
             for row, title in zip(rows, titles(measured, rows))]
    heads = ["", *(COLUMNS[column][0] for column in columns)]
    return f"<div class=wide>{table('numbers', heads, cells)}</div>"


def claims(measured):
    rows = []
    for claim in measured.conditions["claims"]:
        if measured.has([test[side] for test in claim["tests"] for side in ("row", "against")]):
            said, test, difference = verdict(measured, claim)
            rows.append([escape(claim["says"]), f"<b>{escape(said)}</b>",
                         f"{COLUMNS[test['column']][0]}: {difference}<br><small>"
                         + " against ".join(map(escape, titles(
                             measured, (test["row"], test["against"])))) + "</small>"])
    return f"<div class=wide>{table('numbers', ['', 'verdict', 'difference'], rows)}</div>"


def videos(args, conditions, rows):
    """Each row's videos of the first seed."""
    columns = []
    for row in rows:
        file = args.out / f"{row}-{conditions['seeds'][0]}.safetensors"
        if file.is_file():
            with safe_open(file, "pt") as opened:
                prompts = json.loads(opened.metadata()["prompts"])
                shown, words, count = shown_first(opened.get_tensor("video").float() / 255, prompts)
            columns.append([conditions["rows"][row]["title"], shown])
    if not columns:
        return "<p class=note>Drawn where the students are, which is not here.</p>"
    cells = [[escape(words[i])] + [moving_picture(shown[i], f"{words[i]}: {title}")
                                   for title, shown in columns] for i in range(count)]
    style = f"<style>.videos tr {{ grid-template-columns: repeat({len(columns)}, 1fr) }}</style>"
    return style + table("videos", ["", *(escape(title) for title, _ in columns)], cells)


# ---------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------


def draw(measured, rows, columns):
    """A panel for each column: means of the rows with their intervals."""
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(1.6 + 2.2 * len(columns), 0.6 + 0.28 * len(rows)),
                        layout="constrained")
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, columns):
            for y, row in enumerate(rows):
                mean, low, high = measured.of(row, column)
                colour = COLOURS[1] if "student" in measured.conditions["rows"][row] else "#8a8f98"
                axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour,
                              markersize=4, capsize=2)
            axes.set_title(COLUMNS[column][0], loc="left", fontsize="medium")
        panels[0].set_yticks(range(len(rows)), titles(measured, rows))
        panels[0].invert_yaxis()
        return figure


def hardness(measured, rows):
    """How the weights of the first row that has some depend on what a video is."""
    conditions = measured.conditions
    for row in rows:
        results = [read_result(measured.folder, conditions, row, seed)
                   for seed in conditions["seeds"]]
        if results[0].get("weights"):
            break
    else:
        return ""
    timesteps = [f"t = {t:g}" for t in (1000, 900, 757, 522)]
    mean = {kind: torch.tensor([r["weights"][kind] if kind in ("speed", "saturation")
                                else r["weights"][kind]["weight"] for r in results]).mean(0)
            for kind in results[0]["weights"]}
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        kinds, *by_value = figure.subplots(1, 3, sharey=True)
        names = [kind for kind in mean if mean[kind].ndim == 1]
        for colour, kind in zip(COLOURS, names):
            kinds.plot(timesteps, mean[kind], "o-", color=colour, label=kind)
        kinds.legend(frameon=False)
        kinds.set_title("weight w, by kind of video", loc="left", fontsize="medium")
        for axes, value in zip(by_value, ("speed", "saturation")):
            for colour, timestep, fifths in zip(COLOURS, timesteps, mean[value]):
                axes.plot(range(1, 6), fifths, "o-", color=colour, label=timestep)
            axes.set_title(f"by fifths of {value}", loc="left", fontsize="medium")
        by_value[0].legend(frameon=False)
    return svg(figure) + f"<p class=note>{escape(titles(measured, [row])[0])}, after training.</p>"


def svg(figure):
    """Inline, in the page's own font and colours."""
    out = StringIO()
    with matplotlib.rc_context(CHART_STYLE):
        figure.savefig(out, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    _, tag, rest = out.getvalue().replace(INK, "currentColor").partition("<svg")
    return f"<figure>{tag}{rest}</figure>"


if __name__ == "__main__":
    sys.exit(main())
