"""The planner against what really runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import adavid
from tests.test_train import complaint
from tiny_wan import PRESETS, WanConfig, WanModel
from tiny_wan.model import KEPT_PRECISE
from tools import plan

CONFIGS = {
    "toy": (WanConfig(96, 384, 4, 4, in_dim=12, out_dim=12, text_dim=15, text_len=8),
            (12, 5, 8, 8), 2),
    "wide": (WanConfig(256, 1024, 4, 3, text_dim=64, text_len=32), (16, 3, 8, 12), 1),
}
aten = torch.ops.aten
CPU_ATTENTION = {  # for which PyTorch's counter has no formula of its own
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])}


def real_models(config):
    for _ in range(3):
        model = WanModel(config).init_weights().bfloat16()
        for name, p in model.named_parameters():
            if KEPT_PRECISE.search(name):
                p.data = p.data.float()
        yield model


def saved_bytes(function, models):
    """What autograd's hooks see saved for backward, weights apart, each storage once."""
    own = {p.untyped_storage()._cdata for model in models for p in model.parameters()}
    storages = {}

    def keep(t):
        storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = function()  # its graph lives until all is counted
        total = sum(s.nbytes() for key, s in storages.items() if key not in own)
    del result
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_and_activations_are_those_of_a_real_cycle(name):
    config, shape, b = CONFIGS[name]
    planned = plan.count_cycle(config, shape, b)
    teacher, student, critic = models = list(real_models(config))
    teacher.requires_grad_(False)
    real, text = torch.randn(b, *shape), torch.randn(b, config.text_len, config.text_dim)
    cache = adavid.LossMeanCache(4)

    def student_loss(step=0):
        return adavid.student_loss(student, teacher, critic, cache, real, text, text[:1], step,
                                   plan.AVD)[0]

    for checkpointing, (flops, kept, _) in zip((False, True), planned):
        student.gradient_checkpointing = critic.gradient_checkpointing = checkpointing
        total = 0
        for step in range(4):  # all are equally likely
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                with torch.no_grad():
                    x0 = adavid.backward_simulation(student, real, text, step, plan.AVD)
                adavid.critic_loss(critic, x0, text, plan.AVD).backward()
            critic_update = counter.get_total_flops()
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                student_loss(step).backward()
            total += (plan.AVD.critic_updates * critic_update + counter.get_total_flops()) / 4
        assert flops == pytest.approx(total, rel=0.01)
        assert kept == pytest.approx(saved_bytes(student_loss, models), rel=0.1)


@pytest.mark.parametrize("preset, billions, half, decoupled", [
    ("wan-1.3b", 1.419, 0.35, 0.675), ("wan-14b", 14.288, 0.39, 0.70)])
def test_known_figures(preset, billions, half, decoupled):
    config = PRESETS[preset]
    assert plan.parameters(plan.build(config)) / 1e9 == pytest.approx(billions, rel=1e-3)
    one, half_rate, four, two_halves, guided, _ = plan.count_samplers(config, (16, 21, 60, 104))
    assert half_rate / one == pytest.approx(half, abs=0.005)
    assert two_halves / four == pytest.approx(decoupled, abs=0.005)
    assert four == pytest.approx(4 * one) and guided == pytest.approx(2 * one)


def test_a_plan_says_what_it_takes(capsys):
    flags = ["--preset", "tiny", "--gpus", "2"]
    assert plan.main(["distill", *flags]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("tokens", "PFLOPs", "optimiser", "hours", "not measured"))
    assert plan.main(["distill", *flags, "--lora", "4"]) == 0
    assert "frozen base" in capsys.readouterr().out
    assert plan.main(["sample", "--preset", "tiny"]) == 0
    assert "decoupled" in capsys.readouterr().out


@pytest.mark.parametrize("args, says", [
    (["--preset", "wan-2b"], "wan-2b"), (["--frames", "80"], "73 and 81"),
    (["--gpus", "0"], "gpus"), (["--utilisation", "2"], "utilisation"), (["--lora", "-1"], "lora")])
def test_bad_flags_get_one_line(args, says, capsys):
    assert says in complaint(capsys, plan.main(["distill", *args]))
