"""The lesson: its quotes are of the code as it is, and its pictures come from one command."""

import json
import re

import pytest
import torch

import adavid
from experiments import gallery, lesson
from runtime import page
from tests.helpers import ROOT, complaint
from tiny_wan import WEIGHTS

FAST = ("noise", "gate", "half_rate", "cycle")


def test_the_lesson_quotes_the_code_as_it_is(tmp_path):
    text = lesson.PAGE.read_text(encoding="utf-8")
    copy = tmp_path / "method.md"
    copy.write_text(text, encoding="utf-8")
    page.fill(copy, lesson.quotes(text))
    assert copy.read_text(encoding="utf-8") == text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        whole = (ROOT / "adavid.py").read_text(encoding="utf-8")
        assert all(line.strip() in whole for line in code.splitlines())


def test_the_lesson_lists_the_numbers_in_which_the_toy_differs_from_the_paper():
    text = lesson.PAGE.read_text(encoding="utf-8")
    toy, paper = lesson.load_config(WEIGHTS), adavid.AVDConfig()
    changed = {name for name in vars(paper) if getattr(toy, name) != getattr(paper, name)}
    assert changed == {"guidance_scale", "lr", "critic_lr", "betas", "temporal_truncation"}
    for title, number in {
            "guidance of the teacher": "{guidance_scale:g}",
            "learning rate of the student": "{lr:g}",
            "learning rate of the critic": "{critic_lr:g}",
            "AdamW's betas": "{betas[0]:g}, {betas[1]:g}",
            "norm to which gradients are clipped": "{grad_clip:g}",
            "level of the gate": "{temporal_truncation:g}"}.items():
        row = [number.format(**vars(config)) for config in (paper, toy)]
        assert f"| {title} | {row[0]} | {row[1]} |" in text


def test_every_picture_of_the_lesson_is_shown_and_none_is_left_over():
    shown = re.findall(r"figures/lesson/(\w+\.\w+)", lesson.PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(file.name for file in lesson.FIGURES.iterdir())
    assert {name.split(".")[0] for name in shown} == set(lesson.PICTURES)


def test_a_picture_is_the_same_twice(tmp_path, monkeypatch, capsys):
    committed = lesson.FIGURES
    for name, copy in (("FIGURES", tmp_path), ("PAGE", tmp_path / "method.md")):
        monkeypatch.setattr(lesson, name, copy)
    lesson.PAGE.write_text("nothing to quote")
    pictures = []
    for _ in range(2):
        assert lesson.main(["--only", *FAST]) == 0
        files = sorted(tmp_path.glob("*.*g"))
        pictures.append([file.read_bytes() for file in files])
    assert {file.name for file in files} <= {file.name for file in committed.iterdir()}
    assert pictures[0] == pictures[1] and len(set(pictures[0])) == len(FAST)
    assert "no such picture" in complaint(capsys, lesson.main(["--only", "nosuch"]))


@pytest.mark.parametrize("sigma", [0.2, 0.7])
def test_the_closed_form_models_are_those_of_their_samples(sigma):
    """Over noised samples, the mean of x0 in a narrow window of x_t is the predicted one."""
    torch.manual_seed(0)
    mixture = lesson.Mixture([[-1.0], [2.0]], [0.3, 0.7], 0.5)
    student = lesson.Student([0.5], 0.8)
    noise = torch.randn(200_000, 1, 1, 1, 1)
    t = torch.tensor([1000 * sigma])
    for model, x0 in ((mixture, mixture.sample(200_000)),
                      (student.critic(), (0.5 + 0.8 * torch.randn_like(noise)))):
        x_t = adavid.add_noise(x0, noise, t)
        for value in (-0.5, 0.3, 1.0):
            near = (x_t - value).abs().flatten() < 0.03
            point = torch.full((1, 1, 1, 1, 1), value)
            with torch.no_grad():
                predicted = adavid.predict_x0(model, point, t, lesson.TEXT).item()
            assert x0[near].mean().item() == pytest.approx(predicted, abs=0.05)


def test_the_gallerys_curves_are_of_the_committed_logs():
    lines = [json.loads(line) for line in gallery.LOGS.read_text().splitlines()]
    assert {line["run"] for line in lines} == set(gallery.RUNS)
    figure = gallery.draw_curves(lines)
    assert len(figure.axes) == len(gallery.RUNS) * len(gallery.METRICS)
