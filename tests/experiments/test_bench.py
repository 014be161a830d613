"""What the benchmark counts and times, and the blocks of docs/costs.md."""

import json

import pytest
import torch

import adavid
from experiments import bench
from tests.helpers import complaint
from tiny_wan import PRESETS, WanConfig, WanModel
from tools.costs import FLASH_BACKWARD, FORMULAS, count_flops, forward_flops


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_a_cycle_takes_fewer_forwards_than_the_released_schedule_at_wans_sizes(preset):
    cost = bench.forward_costs(PRESETS[preset])
    released, _, default, one_rollout, half_rate = (
        bench.forwards(cost, *schedule) for schedule in bench.SCHEDULES.values())
    assert 46 < released < 48
    assert default <= 36 and one_rollout <= 26 and half_rate <= 23


@pytest.mark.parametrize("name", bench.SCHEDULES)
def test_what_is_counted_is_what_runs(name, monkeypatch):
    ends_early, served, strides = bench.SCHEDULES[name]
    # Two steps and two updates of the critic, which show as much as four and five.
    schedule = ends_early, min(served, 2), strides[1:3]
    avd = adavid.AVDConfig((900, 757), (2, 1), strides[1:3], critic_updates=2)
    monkeypatch.setattr(adavid, "AVDConfig", lambda **_: avd)
    config = WanConfig(48, 96, 4, 1, in_dim=4, out_dim=4, text_dim=15, text_len=8)
    shape = (4, 5, 8, 8)
    real, text = torch.randn(1, *shape), torch.randn(1, 8, 15)
    models = [WanModel(config).init_weights() for _ in range(3)]
    models[1].requires_grad_(False)
    interpolator = adavid.FrameInterpolator(4, 8).requires_grad_(False)
    # Of the five products in flash attention's backward, one computes its scores again.
    flash = FORMULAS[FLASH_BACKWARD]
    monkeypatch.setitem(
        FORMULAS, FLASH_BACKWARD, lambda *args, **kwargs: 0.8 * flash(*args, **kwargs))
    two = count_flops(lambda: bench.cycles(models, interpolator, real, text, *schedule))
    counted = bench.forwards(bench.forward_costs(config, shape), *schedule)
    assert counted == pytest.approx(two / forward_flops(config, shape) / 2, rel=0.02)


def test_the_page_has_the_committed_figures():
    figures = json.loads(bench.RESULTS.read_text())
    assert set(figures) == set(bench.PARTS) and figures["kernels"]["scratch"] == 0
    page = bench.PAGE.read_text(encoding="utf-8")
    for name, block in bench.blocks(figures).items():
        assert f"<!-- {name} -->\n\n{block}\n\n<!-- end -->" in page


def test_a_part_replaces_its_own_figures(tmp_path, monkeypatch, capsys):
    figures = json.loads(bench.RESULTS.read_text())
    for name, text in (("RESULTS", json.dumps(figures)), ("PAGE", "<!-- others -->\n<!-- end -->")):
        monkeypatch.setattr(bench, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(bench, "bench_demo", lambda: {"minutes": 77})
    assert bench.main(["--parts", "demo"]) == 0
    new = json.loads(bench.RESULTS.read_text())
    assert new["demo"]["minutes"] == 77 and new | {"demo": figures["demo"]} == figures
    assert "`make demo` takes 77.0 minutes" in bench.PAGE.read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == new
    assert "nosuch" in complaint(capsys, bench.main(["--parts", "nosuch"]))


def test_what_is_outside_matrix_products_is_a_share_of_the_time():
    x = torch.randn(512, 512)
    product, sine = bench.profiled(lambda: x @ x), bench.profiled(lambda: x.sin())
    assert product["outside"] < 0.5 < sine["outside"] <= 1
    assert product["peak"] == sine["peak"] == x.nbytes
