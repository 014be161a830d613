"""What is counted and timed, and the README's tables of it."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import adavid
from tests.test_plan import FLASH_BACKWARD, FORMULAS
from tests.test_train import complaint
from tiny_wan import WanConfig, WanModel
from tools import bench, gpu_check, report


def test_a_cycle_takes_fewer_forwards_than_the_released_schedule_at_wans_sizes():
    forwards = bench.count_cycles(("wan-1.3b", "wan-14b"))
    for counted in forwards.values():
        released, _, default, one_rollout, half_rate = counted.values()
        assert 46 < released < 48
        assert default <= 36 and one_rollout <= 26 and half_rate <= 23


@pytest.mark.parametrize("name", bench.SCHEDULES)
def test_what_is_counted_is_what_runs(name):
    config = WanConfig(48, 96, 4, 1, in_dim=4, out_dim=4, text_dim=15, text_len=8)
    shape, calls = (4, 5, 8, 8), bench.calls_of(bench.SCHEDULES[name])
    counted = sum(n * cost for n, cost in zip(calls, bench.prices(config, shape)))
    models = [WanModel(config).init_weights() for _ in range(3)]
    models[1].requires_grad_(False)
    interpolator = adavid.FrameInterpolator(4, 32).requires_grad_(False)
    # Of the five products in flash attention's backward, one computes its scores again.
    flash = FORMULAS[FLASH_BACKWARD]
    plain = {FLASH_BACKWARD: lambda *args, **kwargs: 0.8 * flash(*args, **kwargs)}
    with FlopCounterMode(display=False, custom_mapping=FORMULAS | plain) as counter:
        bench.cycles(models, interpolator, torch.randn(1, *shape), torch.randn(1, 8, 15),
                     *bench.SCHEDULES[name])
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_readme_has_the_committed_figures():
    figures = json.loads(bench.RESULTS.read_text())
    assert set(figures) == {*bench.PARTS, "large", "machine"}
    assert all(row["scratch"] == 0 for row in figures["kernels"]["compile_report"])
    readme = bench.Bench.readme.read_text(encoding="utf-8")
    assert readme.count("<!-- bench: ") == len(bench.tables(figures)) == 4
    assert report.filled(readme, bench.tables(figures)) == readme


def test_a_part_replaces_its_own_figures(tmp_path, monkeypatch, capsys):
    results, readme = tmp_path / "bench.json", tmp_path / "README.md"
    results.write_text('{"demo": {"minutes": 2}, "data": {"seconds": 70, "waited": 7}}')
    readme.write_text("text\n")
    monkeypatch.setattr(bench, "bench_demo", lambda: {"minutes": 3})
    flags = ["--results", str(results), "--readme", str(readme), "--parts"]
    assert bench.main([*flags, "demo"]) == 0
    figures = json.loads(results.read_text())
    assert figures["demo"]["minutes"] == 3 and figures["data"] == {"seconds": 70, "waited": 7}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert "nosuch" in complaint(capsys, bench.main([*flags, "nosuch"]))


def test_medians_are_of_runs_in_turn():
    log = []
    calls = {name: lambda name=name: log.append(name) or [len(log)] for name in "ab"}
    assert bench.in_turn(calls, runs=3) == {"a": [5], "b": [6]} and log == list("abababab")


def test_the_gpu_check_says_that_there_is_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "no NVIDIA or AMD GPU" in complaint(capsys, gpu_check.main([]))


def test_the_gpu_check_sums_up(tmp_path):
    rows = [{"operation": "temporal_variance", "size": "720p", "way": "triton", "ms": 0.5,
             "GB/s": 1.0, "of_copy": 0.9}]
    said = gpu_check.speeds("noise\n" + json.dumps({"timed": rows}))
    assert said.endswith("\n  temporal_variance, 720p, triton: 0.500 ms, 90%")
    (tmp_path / "times.jsonl").write_text('{"seconds": 1}\n{"seconds": 0.25}\n')
    (tmp_path / "metrics.jsonl").write_text('{}\n{"kl": 0.5, "reg": 1, "temp": 0, "critic": 2}\n')
    said = gpu_check.third_cycle(tmp_path)
    assert said == "0.25 s for the third cycle, kl 0.5, reg 1, temp 0, critic 2"
