"""The plan, against what small models really cost, by PyTorch, and against published figures."""

import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

import adavid
from runtime.lora import add_adapters
from tests.helpers import FOUR_STEPS
from tiny_wan import PRESETS, WanCodec, WanConfig
from tools import costs, plan

NARROW = WanConfig(96, 240, 4, 2, in_dim=12, out_dim=12, text_dim=15, text_len=8)
WIDE = WanConfig(128, 640, 8, 2, text_dim=64, text_len=16)
MODELS = (NARROW, (12, 5, 8, 16)), (WIDE, (16, 3, 16, 16))


@pytest.fixture(autouse=True)
def four_steps(monkeypatch):
    monkeypatch.setattr(plan, "AVD", FOUR_STEPS)


class Real:
    """The updates of a cycle with checkpointing, on tensors with content."""

    def __init__(self, config, shape, lora):
        models = [plan.build(config).to_empty(device="cpu").init_weights()
                  for _ in range(1 if lora else 3)]
        for model in models:
            model.gradient_checkpointing = True
        if lora:
            models = add_adapters(models[0], lora, ("student", "critic"))
        else:
            models[0].requires_grad_(False)
        self.teacher, self.student, self.critic = models
        for p in [*self.student.parameters(), *self.critic.parameters()]:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        self.cache = adavid.LossMeanCache(3)
        self.real = torch.randn(1, *shape)
        self.text = torch.randn(1, config.text_len, config.text_dim)

    @torch.no_grad()
    def rollout(self):
        return adavid.backward_simulation(self.student, self.real, self.text, 1, plan.AVD)

    def critic_loss(self):
        return adavid.critic_loss(self.critic, self.real, self.text, plan.AVD)

    def matching_loss(self):
        noise = torch.randn_like(self.real)
        x0 = adavid.backward_simulation(self.student, noise, self.text, 1, plan.AVD)
        self.alive = noise, x0  # as in train.py's loop
        return adavid.matching_loss(x0, self.teacher, self.critic, self.text, self.text,
                                    plan.AVD)[0]

    def weighted_regression(self):
        return adavid.weighted_regression(self.student, self.cache, self.real, self.text, 1,
                                          plan.AVD)[0]


def allocated(function):
    """The bytes in use after each action of PyTorch's allocator; at the end, the result is kept."""
    with (torch.backends.mkldnn.flags(enabled=False),  # CPUs with bf16 units count its scratch
          profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler):
        result = function()  # noqa: F841
    return np.cumsum([event.nbytes() for event in profiler.profiler.kineto_results.events()
                      if event.name() == "[memory]"])


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("config, shape", MODELS, ids=["narrow", "wide"])
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_cycle_costs_what_real_tensors_cost(config, shape, lora, monkeypatch):
    # Of three steps, the second one's costs are the mean over all.
    monkeypatch.setattr(plan, "AVD", adavid.AVDConfig((1000, 900, 522), (2, 1, 1), (1, 1, 1)))
    real = Real(config, shape, lora)
    kept, peak = plan.cycle_activations(config, shape, lora)
    losses = real.matching_loss, real.weighted_regression
    states = config.num_layers * torch.get_rng_state().nbytes  # of checkpointing, in main memory
    assert kept == pytest.approx(
        max(allocated(loss)[-1] for loss in losses) - states, rel=0.1)
    working = (max(allocated(lambda: real.critic_loss().backward()))
               - allocated(real.critic_loss)[-1])
    assert peak - kept == pytest.approx(working, rel=0.1)

    critic = 5 * costs.count_flops(lambda: real.critic_loss().backward())
    rollouts = 4 * costs.count_flops(real.rollout)
    student = costs.count_flops(lambda: [loss().backward() for loss in losses])
    counted, sparing = (plan.cycle_flops(config, shape, lora, one) for one in (False, True))
    assert counted == pytest.approx(critic + rollouts + student, rel=0.01)
    assert counted - sparing == pytest.approx(rollouts, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("config, shape", MODELS, ids=["narrow", "wide"])
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_sampling_costs_what_real_tensors_cost(config, shape):
    model = plan.build(config).to_empty(device="cpu").init_weights()
    interpolator = adavid.FrameInterpolator(config.in_dim, 8)
    noise, text = torch.randn(1, *shape), torch.randn(1, config.text_len, config.text_dim)
    student = costs.count_flops(lambda: adavid.sample(model, noise, text, plan.AVD, interpolator))
    assert student - costs.count_flops(lambda: interpolator(noise[:, :, ::2])) == sum(
        costs.forward_flops(config, shape, stride=stride) for stride in plan.AVD.strides)
    teacher = costs.count_flops(lambda: adavid.sample_teacher(model, noise, text, text, steps=1))
    assert teacher == 2 * costs.forward_flops(config, shape)
    peak = max(allocated(lambda: model(noise, torch.ones(1), text)))
    assert costs.forward_activations(config, shape) == pytest.approx(peak, rel=0.05)


@torch.no_grad()
def test_the_text_encoder_costs_what_real_tensors_cost(monkeypatch):
    sizes = {"vocab_size": 200, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 3,
             "num_heads": 6}
    encoder = UMT5EncoderModel(UMT5Config(**sizes))
    real = costs.count_flops(lambda: encoder(torch.zeros(1, 40, dtype=torch.long)))
    monkeypatch.setattr(WanCodec, "UMT5_XXL", sizes)
    assert costs.text_encoder_flops(40) == real


class Live(costs.Flops):
    """Counts also the most bytes of new meta tensors at once."""

    bytes = peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(op, types, args, kwargs)
        for storage in storages(out) - storages((args, kwargs)):
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def storages(tree):
    """Of the tensors in `tree`; a view shares its base's."""
    return {t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}


@torch.no_grad()
def test_the_vae_costs_what_diffusers_costs():
    """On the meta device, whose tensors have a shape and no content: the VAE has its full size."""
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    for method, f, dtype in (("encode", 1, torch.float32), ("encode", 3, torch.float32),
                             ("decode", 1, torch.float32), ("decode", 3, torch.float32),
                             ("decode", 3, torch.bfloat16)):
        for p in vae.parameters():
            p.data = p.data.to(dtype)
        shape, video = (16, f, 2, 2), (3, 4 * f - 3, 16, 16)
        with Live() as counter:
            getattr(vae, method)(torch.empty(
                1, *(shape if method == "decode" else video), dtype=dtype, device="meta"))
        assert costs.vae_flops(method, shape) == pytest.approx(counter.flops, rel=0.002)
        if (method, f) == ("decode", 3):
            assert dtype.itemsize * costs.vae_activations(shape) == pytest.approx(
                counter.peak, rel=0.03)


@pytest.mark.parametrize("preset, billions, half_step, decoupled_steps", [
    ("wan-1.3b", 1.419, 0.35, 0.675), ("wan-14b", 14.288, 0.39, 0.70)])
def test_sizes_and_ratios_are_the_published_ones(preset, billions, half_step, decoupled_steps):
    config, shape = PRESETS[preset], (16, 21, 60, 104)
    assert plan.parameters(plan.build(config)) / 1e9 == pytest.approx(billions, abs=5e-4)
    full, half = (costs.forward_flops(config, shape, stride=stride) for stride in (1, 2))
    assert half / full == pytest.approx(half_step, abs=0.005)
    assert (2 * full + 2 * half) / (4 * full) == pytest.approx(decoupled_steps, abs=0.005)


def test_sharding_divides_the_weights_and_lora_the_frozen_base():
    config = replace(PRESETS["wan-1.3b"], num_layers=2)
    model = plan.build(config)
    total, blocks = plan.parameters(model), sum(p.nbytes for p in model.blocks.parameters())
    with torch.device("meta"):
        _, adapted = add_adapters(model, 64, ("student",))
    adapter = sum(p.numel() for p in adapted.parameters())
    for lora, everything in ((0, 32 * total), (64, pytest.approx(2 * total, rel=0.15))):
        one, many = (plan.memory(config, gpus, lora) for gpus in (1, 8))
        shared = [name for name in one if "sharded" in name.replace("unsharded", "")]
        assert sum(one[name] for name in shared) == everything
        assert all(many[name] == one[name] / 8 for name in shared)

    _, *others, unsharded = plan.memory(config, 8, lora=64).values()
    assert sum(others) == (8 + 4 + 16) * adapter
    assert unsharded == blocks
    assert list(plan.memory(config, 1, lora=64).values())[1:] == [*others, 0]


@pytest.fixture
def known_cycle(monkeypatch):
    """A cycle of 4 PFLOPs, with 1 + 2 GB of activations."""
    monkeypatch.setattr(plan, "cycle_flops", lambda *_: 4e15)
    monkeypatch.setattr(plan, "cycle_activations", lambda *_: (1e9, 3e9))


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
