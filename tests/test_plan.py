"""The counter and the plan, against what real tensors on the CPU cost and published figures."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import UMT5Config, UMT5EncoderModel

import adavid
from tests.helpers import FOUR_STEPS, complaint
from tiny_wan import PRESETS, WanCodec, WanConfig
from tools import costs, plan

TOY = WanConfig(96, 384, 4, 3, in_dim=12, out_dim=12, text_dim=15, text_len=8)
WIDE = WanConfig(256, 1024, 4, 3, text_dim=64, text_len=32)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS = {  # which FlopCounterMode has for a GPU's flash attention, and not for a CPU's
    FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    FLASH_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}


@pytest.fixture(autouse=True)
def four_steps(monkeypatch):
    monkeypatch.setattr(plan, "AVD", FOUR_STEPS)


class Real:
    """The updates of a cycle with checkpointing, on tensors with content."""

    def __init__(self, config, shape):
        self.models = self.teacher, self.student, self.critic = [
            costs.build(config).to_empty(device="cpu").init_weights() for _ in range(3)]
        self.teacher.requires_grad_(False)
        for model in self.models[1:]:
            model.gradient_checkpointing = True
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        self.cache = adavid.LossMeanCache(4)
        self.real = torch.randn(1, *shape)
        self.text = torch.randn(1, config.text_len, config.text_dim)

    def rollout(self, step):
        with torch.no_grad():
            return adavid.backward_simulation(self.student, self.real, self.text, step, plan.AVD)

    def critic_loss(self):
        return adavid.critic_loss(self.critic, self.real, self.text, plan.AVD)

    def student_losses(self, step=0):
        return adavid.student_losses(
            self.student, self.teacher, self.critic, self.cache, self.real, self.text, self.text,
            step, plan.AVD)

    def update_student(self, step):
        for loss, _ in self.student_losses(step):
            loss.backward()


def flops(function):
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        function()
    return counter.get_total_flops()


def allocated(function):
    """The bytes in use after each action of PyTorch's allocator; at the end, the result is kept."""
    with (torch.backends.mkldnn.flags(enabled=False),  # CPUs with bf16 units count its scratch
          profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler):
        result = function()  # noqa: F841
    return np.cumsum([event.nbytes() for event in profiler.profiler.kineto_results.events()
                      if event.name() == "[memory]"])


@pytest.mark.parametrize("config, shape, steps", [
    (TOY, (12, 5, 4, 8), (0, 3)), (WIDE, (16, 3, 8, 16), (1, 2))], ids=["toy", "wide"])
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_cycle_costs_what_real_tensors_cost(config, shape, steps):
    counted, real = plan.count_cycle(config, shape), Real(config, shape)
    losses = real.student_losses()
    kept = max(allocated(lambda: next(losses)[0])[-1] for _ in range(2))
    kept -= config.num_layers * torch.get_rng_state().nbytes  # in main memory
    working = (max(allocated(lambda: real.critic_loss().backward()))
               - allocated(real.critic_loss)[-1])
    assert counted[1] == pytest.approx(kept, rel=0.001)
    assert counted[2] == pytest.approx(working, rel=0.001)

    critic = 5 * flops(lambda: real.critic_loss().backward())
    rollout, student = (sum(flops(lambda: f(step)) for step in steps) / len(steps)
                        for f in (real.rollout, real.update_student))
    assert counted[0] == pytest.approx(critic + 4 * rollout + student, rel=0.01)
    sparing = plan.count_cycle(config, shape, one_rollout=True)
    assert counted[0] - sparing[0] == pytest.approx(4 * rollout, rel=0.01)


@torch.no_grad()
def test_the_text_encoder_and_the_vae_cost_what_real_tensors_cost(monkeypatch):
    vae, shape = AutoencoderKLWan(), (16, 5, 2, 2)
    inputs = {"encode": torch.zeros(1, 3, 17, 16, 16), "decode": torch.zeros(1, *shape)}
    for method, x in inputs.items():
        real = flops(lambda: getattr(vae, method)(x))
        assert costs.count_vae(method, shape)[0] == pytest.approx(real, rel=0.01)

    sizes = {"vocab_size": 200, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 3,
             "num_heads": 8}
    encoder = UMT5EncoderModel(UMT5Config(**sizes))
    real = flops(lambda: encoder(torch.zeros(1, 40, dtype=torch.long)))
    monkeypatch.setattr(WanCodec, "UMT5_XXL", sizes)
    assert costs.count_text_encoder(40)[0] == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("preset, billions, half_step, decoupled_steps", [
    ("wan-1.3b", 1.419, 0.35, 0.675), ("wan-14b", 14.288, 0.39, 0.70)])
def test_sizes_and_ratios_are_the_published_ones(preset, billions, half_step, decoupled_steps):
    config, shape = PRESETS[preset], (16, 21, 60, 104)
    assert plan.parameters(costs.build(config)) / 1e9 == pytest.approx(billions, abs=5e-4)
    (full, _, activations), (half, *_) = (
        costs.count_forward(config, shape, stride=stride) for stride in (1, 2))
    assert half / full == pytest.approx(half_step, abs=0.005)
    hidden = 32760 * config.ffn_dim * 2
    assert hidden < activations < 5 * hidden

    def samplers(config):
        model, (noise, text) = costs.build(config).requires_grad_(False), costs.inputs(
            config, shape, 1)
        interpolator = adavid.FrameInterpolator(16, width=32).to("meta")
        return np.array([costs.count(function)[0] for function in (
            lambda: adavid.sample(model, noise, text, plan.AVD, interpolator),
            lambda: adavid.sample(model, noise, text, plan.AVD),
            lambda: adavid.sample_teacher(model, noise, text, text, steps=1))])

    decoupled, four, guided = costs.at_full_depth(config, samplers)
    assert decoupled == pytest.approx(2 * full + 2 * half, rel=1e-3)
    assert decoupled / four == pytest.approx(decoupled_steps, abs=0.005)
    assert four == 4 * full and guided == 2 * full


def test_sharding_divides_the_weights_and_lora_the_frozen_base():
    config = replace(PRESETS["wan-1.3b"], num_layers=2)
    total = plan.parameters(costs.build(config))
    adapter = 2 * 64 * (8 * 2 * 1536 + 2 * (1536 + 8960))
    for lora, everything in ((0, 32 * total), (64, pytest.approx(2 * total, rel=0.15))):
        one, many = (plan.memory(config, gpus, lora) for gpus in (1, 8))
        shared = [name for name in one if "sharded" in name.replace("unsharded", "")]
        assert sum(one[name] for name in shared) == everything
        assert all(many[name] == one[name] / 8 for name in shared)

    _, *others, unsharded = plan.memory(config, 8, lora=64).values()
    assert sum(others) == (8 + 4 + 16) * adapter
    assert unsharded == sum(p.nbytes for p in costs.build(config).blocks.parameters())
    assert list(plan.memory(config, 1, lora=64).values())[1:] == [*others, 0]


@pytest.fixture
def known_cycle(monkeypatch):
    """A cycle of 4 PFLOPs, with 1 + 2 GB of activations."""
    monkeypatch.setattr(plan, "count_cycle", lambda *_, **__: np.array([4e15, 1e9, 2e9]))


def test_distill_tells_whether_it_fits_and_how_long_it_takes(known_cycle, capsys):
    command = ["distill", "--tflops", "1000", "--utilisation", "0.5", "--videos", "14400"]
    assert plan.main([*command, "--gpus", "2", "--accumulate", "2"]) == 0
    said = capsys.readouterr().out
    assert "1.419 billion parameters" in said and "latents, 32,760 tokens" in said
    assert "8  PFLOPs on each GPU" in said and "16  seconds of a cycle" in said
    assert "fits 80 GB" in said and "3600  cycles" in said and "16  hours" in said
    assert "32  GPU hours" in said
    assert plan.main([*command, "--memory", "24"]) == 0
    assert "does not fit 24 GB" in capsys.readouterr().out
    assert plan.main([*command, "--memory", "24", "--lora", "16"]) == 0
    assert "fits 24 GB" in capsys.readouterr().out


def test_sample_compares_the_samplers(capsys):
    assert plan.main(["sample", "--preset", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "frame stride 1: 144 tokens, 1.00 of" in said and "frame stride 2: 80 tokens" in said
    assert "steps at strides 2 2 1 1" in said and "teacher, 50 guided steps" in said


def test_the_whole_wait_is_the_sum_of_its_parts(capsys):
    size = ["--frames", "17", "--height", "64", "--width", "96", "--batch-size", "2"]
    assert plan.main(["sample", "--preset", "wan-1.3b", *size]) == 0
    said = capsys.readouterr().out
    found = re.findall(r"^ *([\d.e-]+)  (.*): ([\d.e-]+) seconds$", said, re.MULTILINE)
    wait = {name: np.array([float(flop), float(seconds)]) for flop, name, seconds in found}
    vae, rough = wait["VAE in float32, as TF32 at half the peak"], wait["VAE in bfloat16"]
    rest = wait["text encoder, 512 tokens"] + wait["student, steps at strides 2 2 1 1"]
    np.testing.assert_allclose(wait["in all"], rest + vae, rtol=0.01)
    np.testing.assert_allclose(
        wait["in all, with --vae-dtype bfloat16"], rest + rough, rtol=0.01)
    assert vae / rough == pytest.approx([1, 2], rel=0.01)
    assert rough[1] == pytest.approx(rough[0] * 1e15 / (0.4 * 989e12), rel=0.01)


def test_without_the_extra_the_plan_of_sampling_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    costs.count_vae.cache_clear()
    assert plan.main(["sample", "--preset", "tiny"]) == 0
    code = plan.main(["sample", "--preset", "wan-1.3b", "--frames", "9"])
    assert complaint(capsys, code).endswith(
        "diffusers is not installed; python -m pip install -e '.[wan]'")


def test_tables_name_the_smallest_card_that_fits(known_cycle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "table_of_waits", lambda: "the waits")
    monkeypatch.setattr(plan, "PAGE", tmp_path / "costs.md")
    plan.PAGE.write_text("<!-- plan -->\n<!-- end --><!-- wait -->\n<!-- end -->")
    monkeypatch.setattr(plan, "memory", lambda config, gpus, lora: {"weights": 240e9 / gpus})
    assert plan.main(["tables"]) == 0
    *tables, waits = capsys.readouterr().out.strip().split("\n\n")
    assert waits == "the waits" and waits in plan.PAGE.read_text()
    for table in tables:
        lines = [line.split("|") for line in table.splitlines()]
        assert lines[2][3:6] == [" 243.0 ", " none ", " 96 "]
        assert lines[4][3:6] == [" 13.0 ", " 16 GB ", " 4 "]


@pytest.mark.parametrize("flags, complaint", [
    (["distill", "--gpus", "0"], "--gpus 0"),
    (["distill", "--lora", "-1"], "--lora -1"),
    (["distill", "--frames", "80"], "73 and 81"),
    (["sample", "--utilisation", "40"], "--utilisation 40"),
])
def test_bad_flags_end_in_one_line(flags, complaint, capsys):
    assert plan.main(flags) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1
