"""One self-contained page of the ablation: tables, claims with their verdicts, plots and videos.

    python -m tools.ablation_report

Reads what tools.ablation measured, and the videos that its students drew on this machine.
"""

import json
import re
import sys
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors import safe_open

from adavid import AVDConfig
from runtime import cli
from tools import report
from tools.ablation import (
    COLUMNS, CONDITIONS, RESULTS, Measurements, cells, markdown, read_conditions, title, told,
    verdicts)
from tools.report import CHART_STYLE, INK, STYLE, moving_picture, shown_first, table

WIDER = """body { max-width: 92rem } body > p { max-width: 48rem }
figure svg { max-width: 60rem } .numbers { font-size: .75rem } .numbers th { min-width: 0 }
.numbers td { padding: .35rem .3rem; white-space: nowrap } .words td { white-space: normal }
.words th:not(:first-child), .words td { text-align: left }"""
VIDEOS = re.compile(r"<style>\.videos tr.*?</table>", re.DOTALL)
COLOURS = ("#9b5de5", "#3b82d6", "#12a594", "#e0a030", "#e0722f", "#d6336c")


@dataclass
class Page:
    """Write report.html and figure.png beside the measurements, and their tables into the README.
    """

    conditions: Path = CONDITIONS
    """what was trained and sampled"""
    results: Path = RESULTS
    """folder of the measurements"""
    out: Path = Path("runs/ablation")
    """folder of the students and their videos"""
    readme: Path = Path(__file__).parents[1] / "README.md"
    """what lies between its comments <!-- ablation: ... --> and <!-- end --> is replaced"""


def main(argv=None):
    return cli.run(run, Page, argv)


def run(args):
    conditions = read_conditions(args.conditions)
    measured = Measurements(conditions, args.results)
    questions = answered(measured)
    args.readme.write_text(filled(args.readme.read_text(encoding="utf-8"), measured),
                           encoding="utf-8")
    draw(measured, questions[0]).savefig(args.results / "figure.png", dpi=110)
    first, *others = (section(measured, question) for question in questions)
    page = args.results / "report.html"
    page.write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>The ablation in the toy world</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}
{WIDER}</style></head><body><h1>The ablation in the toy world</h1>
<p class=note>Means and half of the 95% interval, over {len(conditions["seeds"])} seeds and
{conditions["prompts"]} prompts. Motion, saturation and flicker are shares of real data's.</p>
{first}
<h2>The paper's claims</h2>{grid(verdicts(measured), "words")}
<h2>The same prompts, the same noise</h2>
{videos(args, conditions, questions[0]["rows"])}
<h2>What makes a video hard</h2>{hardness(measured)}{grid(spreads(measured))}
<p class=note>At each step: the spread of the regression's loss over videos, k times that, and the
mean weight, averaged over training.</p>
{"".join(others)}</body></html>
""", encoding="utf-8")
    print(f"open {page}")


def answered(measured):
    """The questions whose rows are all measured. ValueError where the main one is not among them.
    """
    main, *others = measured.conditions["questions"]
    if not measured.has(main["rows"]):
        raise ValueError(f"{measured.folder}: not all of the main rows are measured there; "
                         f"`python -m tools.ablation` goes on with them")
    return [main, *(question for question in others if measured.has(question["rows"]))]


def filled(readme, measured):
    """The text with its three blocks as the measurements have them."""
    questions = answered(measured)
    return report.filled(readme, {
        "ablation: table": markdown(lines(measured, questions[0])),
        "ablation: claims": markdown(verdicts(measured)),
        "ablation: answers": "\n".join(f"- **{q['asks']}** {told(measured, q['answer'])}"
                                       for q in questions)})


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def lines(measured, question):
    return cells(measured, question["rows"], question["columns"], question.get("differences", ()))


def grid(lines, kind=""):
    heads, *rows = ([escape(cell) for cell in line] for line in lines)
    return f"<div class='wide {kind}'>{table('numbers', heads, rows)}</div>"


def spreads(measured):
    """How far k tells the videos apart, for every student that learns by regression."""
    conditions, timesteps = measured.conditions, [f"{t:g}" for t in AVDConfig.timesteps]
    table = [["", *(f"t = {t}" for t in timesteps)]]
    for row in conditions["rows"]:
        if not measured.has([row]) or "reg" not in (measured.results(row)[0].get("training") or {}):
            continue
        k = float((re.findall(r"--k (\S+)", conditions["students"][
            conditions["rows"][row]["student"]].get("flags", "")) or [AVDConfig.k])[0])
        means = [[np.mean([result["training"].get(f"{name}_{t}", np.nan)
                           for result in measured.results(row)])
                  for name in ("reg_std", "weight")] for t in timesteps]
        table.append([title(measured, row), *(
            f"{std:.3f}, {k * std:.2f}, {weight:.2f}" for std, weight in means)])
    return table


def section(measured, question):
    answer = escape(told(measured, question["answer"]))
    return (f"<h2>{escape(question['asks'])}</h2><p>{answer}</p>"
            f"{grid(lines(measured, question))}{svg(draw(measured, question))}")


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
    if not columns:  # drawn where the students were: the page keeps them
        page = args.results / "report.html"
        kept = page.is_file() and VIDEOS.search(page.read_text(encoding="utf-8"))
        return kept[0] if kept else "<p class=note>There are none on this machine.</p>"
    cells = [[escape(words[i])] + [moving_picture(shown[i], f"{words[i]}: {title}")
                                   for title, shown in columns] for i in range(count)]
    style = f"<style>.videos tr {{ grid-template-columns: repeat({len(columns)}, 1fr) }}</style>"
    return style + table("videos", ["", *(escape(title) for title, _ in columns)], cells)


# ---------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------


def draw(measured, question):
    """A panel for each column: means of the rows with their intervals.

    Where the question says which column is `x`, rows are points along it, and not lines.
    """
    rows, columns, along = question["rows"], question["plots"], question.get("x")
    with matplotlib.rc_context(CHART_STYLE):
        height = 2.6 if along else 0.6 + 0.28 * len(rows)
        figure = Figure(figsize=(1.6 + 2.2 * len(columns), height), layout="constrained")
        panels = figure.subplots(1, len(columns), sharey=not along, squeeze=False)[0]
        for axes, column in zip(panels, columns):
            for i, row in enumerate(rows):
                mean, low, high = measured.of(row, column)
                error = [[mean - low], [high - mean]]
                if along:
                    x = measured.of(row, along)[0]
                    axes.errorbar(x, mean, error, fmt="o", color=COLOURS[i], markersize=4,
                                  capsize=2, label=title(measured, row))
                else:
                    student = "student" in measured.conditions["rows"][row]
                    axes.errorbar(mean, i, xerr=error, fmt="o", markersize=4, capsize=2,
                                  color=COLOURS[1] if student else "#8a8f98")
            axes.set_title(COLUMNS[column][0], loc="left", fontsize="medium")
        if along:
            panels[0].set_xlabel(COLUMNS[along][0], fontsize="small", loc="right")
            panels[-1].legend(frameon=False, fontsize="small")
        else:
            panels[0].set_yticks(range(len(rows)), [title(measured, row) for row in rows])
            panels[0].invert_yaxis()
        return figure


def hardness(measured):
    """How the weights of the full method's student, after training, depend on what a video is."""
    if not measured.has(["avd"]):
        return ""
    weights = [result["weights"] for result in measured.results("avd")]
    timesteps = [f"t = {t:g}" for t in AVDConfig.timesteps]
    mean = {kind: torch.tensor([w[kind] if kind in ("speed", "saturation") else w[kind]["weight"]
                                for w in weights]).mean(0) for kind in weights[0]}
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        kinds, *by_value = figure.subplots(1, 3, sharey=True)
        for colour, kind in zip(COLOURS, (k for k in mean if mean[k].ndim == 1)):
            kinds.plot(timesteps, mean[kind], "o-", color=colour, label=kind)
        kinds.legend(frameon=False, ncols=2, fontsize="x-small")
        kinds.set_ylim(0, 1)
        kinds.set_title("weight w, by kind of video", loc="left", fontsize="medium")
        for axes, value in zip(by_value, ("speed", "saturation")):
            for colour, timestep, fifths in zip(COLOURS, timesteps, mean[value]):
                axes.plot(range(1, 6), fifths, "o-", color=colour, label=timestep)
            axes.set_title(f"by fifths of {value}", loc="left", fontsize="medium")
        by_value[0].legend(frameon=False)
    return svg(figure)


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
