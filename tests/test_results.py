"""The results table, on a small scale: what it measures, and that it does not measure twice."""

import json

import numpy as np
import pytest

from tools import results


def test_every_row_is_scored_on_the_same_prompts_and_kept(toy_folder, tmp_path, capsys):
    run = ["--model", str(toy_folder), "--out", str(tmp_path), "--seeds", "2", "--prompts", "8",
           "--steps", "1", "--device", "cpu"]
    assert results.main(run) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in results.ROWS.values())
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["rows"]["real"]["prompt"]["mean"] == 1 and report["seeds"] == 2
    assert report["rows"]["real"]["saturation"]["mean"] == pytest.approx(1)
    scores = {row: json.loads((tmp_path / f"{row}-0.json").read_text()) for row in results.ROWS}
    assert all(len(s["instance"]) == 8 for s in scores.values())
    assert len({json.dumps(s["flicker"]) for s in scores.values()}) == len(scores)

    (tmp_path / "real-0.json").write_text(json.dumps(scores["real"] | {"instance": [0.0] * 8}))
    assert results.main([*run, "--rows", "real"]) == 0  # read back, not measured again
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["rows"]["real"]["instance"]["mean"] == 0.5


def test_the_interval_covers_seeds_as_well_as_prompts():
    """Seeds that differ widely make a wide interval, however many prompts each has."""
    rng = np.random.default_rng(0)
    scores = [{name: list(rng.normal(mean, 0.1, 500)) for name in results.COLUMNS}
              | {"diversity": 1.0} for mean in (0.2, 0.5, 0.8)]
    cell = results.summary(scores, scores)["instance"]
    assert cell["mean"] == pytest.approx(0.5, abs=0.02)
    assert cell["low"] < 0.31 and cell["high"] > 0.69
