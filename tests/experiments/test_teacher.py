"""The training of the toy's teacher."""

from functools import partial

import pytest
import torch

import adavid
from experiments import teacher
from runtime.models import load_config
from tests.helpers import resumes_to_the_same_bits
from tests.torture.random_numbers import without_limits
from tiny_wan import WanModel, checkpoint


def train(out):
    """Four steps. Pictures are drawn in 2 steps, not 50."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adavid, "sample_teacher", partial(adavid.sample_teacher, steps=2))
        return teacher.main(["--steps", "4", "--save-every", "2", "--batch-size", "2",
                             "--score-prompts", "2", "--device", "cpu", "--out", str(out)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    assert train(folder) == 0
    return folder


@pytest.mark.long
def test_it_ends_in_a_scored_model_in_half_precision(whole):
    model = WanModel.from_pretrained(whole)
    assert model.head.head.weight.dtype == torch.float16
    metadata = checkpoint.read_metadata(whole)
    assert {"avd", "seed", "minutes", "scores"} <= metadata.keys()
    config = load_config(whole)
    assert config.lr == 2e-4 and 2 < config.temporal_truncation < 3 and config.k == 3.0
    assert (whole / "samples" / "000004.png").exists()


@pytest.mark.long
def test_it_resumes_to_the_same_bits(whole, tmp_path, monkeypatch):
    assert resumes_to_the_same_bits(train, whole, tmp_path, monkeypatch)


def test_every_number_has_limits():
    assert not without_limits(teacher.Teacher)


def test_muon_is_torchs_up_to_its_bfloat16():
    g = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=g))
            for shape in ((8, 8), (24, 8), (8, 24))]
    start = [p.detach().clone() for p in ours]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    optimizers = [
        teacher.Muon(ours, {"lr": 1e-2, "momentum": 0.95, "weight_decay": 0.01}),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn(p.shape, generator=g)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - before).norm()
