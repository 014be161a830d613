"""Several ranks, accumulation, LoRA and averaged weights against one plain process."""

import re
import shutil
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import adavid
import sample
import train
from runtime import lora
from runtime.checkpoints import list_checkpoints
from runtime.models import default_config
from runtime.run import lock_folder
from tests import miniature_wan
from tests.helpers import (
    ROOT,
    complaint,
    distill,
    equal,
    random_model,
    read_lines,
    saved,
    torchrun,
)
from tiny_wan import WEIGHTS, ToyCodec, WanModel, checkpoint, world
from tools import export

SMALL = ["--sample-every", 100]


def on_two_ranks(teacher, out, *flags, steps=3, script="train.py", launcher=(), cwd=ROOT):
    """Distil with one video in each rank's batch."""
    return torchrun(*launcher, script, "distill", "--model", teacher, "--out", out, "--batch-size",
                    1, "--steps", steps, "--device", "cpu", *SMALL, *flags, cwd=cwd)


def trained(teacher, out, *flags, ranks=1, steps=3, batch_size=2):
    """Distil with two videos in each batch, by one process or shared by two ranks."""
    if ranks == 1:
        assert distill(teacher, out, *SMALL, *flags, steps=steps, batch_size=batch_size) == 0
    else:
        result = on_two_ranks(teacher, out, *flags, steps=steps)
        assert result.returncode == 0, result.stderr
    return out


def distance(a, b, part):
    """The L2 distance of those tensors whose names begin with `part`."""
    return torch.stack([(a[n].double() - b[n].double()).norm() for n in a
                        if n.startswith(part + ".")]).norm()


def agree(a, b, teacher):
    """Whether two runs' weights differ by at most 1e-3 of the distance that they have moved."""
    a, b = saved(a), saved(b)
    assert a.keys() == b.keys()
    start = {f"{part}.{name}": p.float() for part in ("student", "critic")
             for name, p in WanModel.from_pretrained(teacher).state_dict().items()}
    for part in ("student", "critic"):
        assert distance(a, b, part) <= 1e-3 * distance(start, a, part)
    torch.testing.assert_close(a["cache.means"], b["cache.means"], rtol=1e-5, atol=1e-7)
    return True


EACH_STEP = ["--save-every", 1, "--keep", 3]


@pytest.fixture(scope="module")
def whole(toy_folder, tmp_path_factory):
    """Three steps by one process and by two ranks, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("whole")
    return {ranks: trained(toy_folder, out / f"{ranks}", *EACH_STEP, ranks=ranks)
            for ranks in (1, 2)}


@pytest.fixture
def first(whole, tmp_path):
    """Copies of these runs after their first step."""
    copies = {ranks: shutil.copytree(out, tmp_path / f"first-{ranks}")
              for ranks, out in whole.items()}
    for out in copies.values():
        for folder in list_checkpoints(out)[1:]:
            shutil.rmtree(folder)
    return copies


def test_two_ranks_have_one_processs_gradients_and_weights(first, whole, toy_folder):
    """Adam's first moment after one update is the gradient, up to a factor."""
    one, two = (saved(first[ranks]) for ranks in (1, 2))
    zero = {name: torch.zeros_like(t) for name, t in one.items()}
    for optimizer in ("student_optimizer", "critic_optimizer"):
        moments = {n: t for n, t in one.items() if n.endswith("exp_avg")}
        assert distance(moments, two, optimizer) <= 1e-5 * distance(moments, zero, optimizer)
    torch.testing.assert_close(one["cache.means"], two["cache.means"], rtol=1e-5, atol=1e-7)
    logs = [read_lines(first[ranks] / "metrics.jsonl")[0] for ranks in (1, 2)]
    for name in ("loss", "dmd", "reg", "critic", "student_grad_norm", "variance"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name
    assert agree(whole[1], whole[2], toy_folder)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(before, after, first, whole, toy_folder):
    out = trained(toy_folder, first[before], ranks=after)
    assert len(read_lines(out / "times.jsonl")) == 3
    assert agree(whole[1], out, toy_folder)
    tensors = saved(out)
    for name, p in WanModel.from_pretrained(out).state_dict().items():  # gathered from all ranks
        assert torch.equal(p, tensors["student." + name])


@pytest.mark.parametrize("flags, batch_size, ranks", [
    (("--accumulate", 2), 1, 1), (("--gradient-checkpointing", True), 2, 1),
    (("--gradient-checkpointing", True), 1, 2)])
def test_accumulation_and_recomputed_blocks_change_nothing(
        flags, batch_size, ranks, whole, toy_folder, tmp_path):
    out = trained(toy_folder, tmp_path, *flags, batch_size=batch_size, ranks=ranks)
    assert agree(whole[1], out, toy_folder)


def test_averaged_weights_follow_the_students(whole, toy_folder, tmp_path):
    out = trained(toy_folder, tmp_path, "--ema", 0.5)
    tensors, plain = saved(out), saved(whole[1])
    kept = WanModel.from_pretrained(out).state_dict()
    teacher = WanModel.from_pretrained(toy_folder).state_dict()
    for name, p in kept.items():
        assert torch.equal(p, tensors["ema." + name])
        assert torch.equal(tensors["student." + name], plain["student." + name])
    assert any(not torch.equal(kept[n], tensors["student." + n])
               and not torch.equal(kept[n], teacher[n].float()) for n in kept)


@pytest.mark.parametrize("flags, ranks", [
    ([], 1), ([], 2), (["--ema", 0.5], 1), (["--lora", 4], 1)])
def test_any_checkpoint_is_the_model_that_its_run_would_have_written(
        flags, ranks, whole, toy_folder, tmp_path, capsys):
    run = trained(toy_folder, tmp_path / "run", *flags, *EACH_STEP) if flags else whole[ranks]
    *_, middle, last = list_checkpoints(run)
    models = [(last, run)]
    if ranks == 1:
        models.append((middle, trained(toy_folder, tmp_path / "short", *flags, steps=2)))
    file = lora.FILE if "--lora" in flags else checkpoint.FILE
    for number, paths in enumerate(models):
        videos = []
        for path in paths:
            out = tmp_path / f"{number}-{path.name}"
            model = ["--model", toy_folder, "--lora", path] if "--lora" in flags else [
                "--model", path]
            assert sample.main(["a red ball", *map(str, model), "--out", str(out), "--device",
                                "cpu", "--save-latents"]) == 0
            video, = out.glob("*.mp4")
            videos.append((video.read_bytes(), (out / "latents.safetensors").read_bytes()))
        assert videos[0] == videos[1]
        kept, ended = paths[0] / "model", paths[1]
        assert equal(load_file(kept / file), load_file(ended / file))
        assert checkpoint.read_metadata(kept) == checkpoint.read_metadata(ended)
        for name in ("config.json", "interpolator.safetensors"):
            if (ended / name).exists():
                assert (kept / name).read_bytes() == (ended / name).read_bytes()
    assert not list(run.rglob("*.part"))
    if "--lora" in flags:
        assert "a LoRA" in complaint(capsys, sample.main(["a red ball", "--model", str(last)]))


def test_a_student_may_start_elsewhere(whole, toy_folder, tmp_path):
    trained(toy_folder, tmp_path, "--init-student", whole[1], "--lr", 0, steps=1)
    start = WanModel.from_pretrained(whole[1]).state_dict()
    assert equal(start, WanModel.from_pretrained(tmp_path).state_dict())


def test_bf16_computes_on_two_ranks_with_float32_weights(toy_folder, tmp_path):
    out = trained(toy_folder, tmp_path, "--dtype", "bfloat16", ranks=2, steps=1)
    assert {t.dtype for n, t in saved(out).items() if n.startswith("student.")} == {torch.float32}
    assert 0 < read_lines(out / "metrics.jsonl")[0]["student_grad_norm"] < 1e3


@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_bf16_has_wans_float32_parts_and_the_bits_of_a_model_loaded_in_bf16(
        ranks, tmp_path):
    (tmp_path / "bf16.py").write_text("""
import torch
from runtime.distributed import apply_fsdp, init_distributed
from tiny_wan import WEIGHTS, WanModel
from tiny_wan.model import KEPT_PRECISE
device, g = init_distributed("cpu"), torch.Generator().manual_seed(0)
x, text = torch.randn(4, 12, 5, 8, 8, generator=g), torch.randn(4, 8, 34, generator=g)
t, dtypes = torch.tensor([1000.0, 900.0, 757.0, 522.0]), {}
exact, loaded, rounded, sharded = (
    WanModel.from_pretrained(WEIGHTS, dtype).requires_grad_(False)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float32))
for name, p in rounded.named_parameters():
    p.data = p.data if name.startswith("time_") else p.data.bfloat16()
for name, module in sharded.named_modules():
    module.register_forward_hook(lambda module, *_, name=name: dtypes.update(
        {f"{name}.{n}": p.dtype for n, p in module.named_parameters(recurse=False)}))
v, v_loaded, v_rounded, v_sharded = (model(x, t, text) for model in (
    exact, loaded, rounded, apply_fsdp(sharded, device, torch.bfloat16)))
assert dtypes == {name: torch.float32 if KEPT_PRECISE.search(name) else torch.bfloat16
                  for name, _ in exact.named_parameters()}
assert torch.equal(v_sharded, v_loaded)
assert (v_sharded - v).norm() < 0.98 * (v_rounded - v).norm()
""")
    result = torchrun(f"--nproc_per_node={ranks}", tmp_path / "bf16.py")
    assert result.returncode == 0, result.stderr


# --- LoRA ----------------------------------------------------------------------------------

def test_lora_trains_adapters_alike_on_two_ranks_and_resumes_to_the_same_bits(toy_folder, tmp_path):
    out = trained(toy_folder, tmp_path / "one", "--lora", 4)
    tensors = saved(out)
    assert all("lora_" in n for n in tensors if n.startswith(("student.", "critic.")))
    ups = {n: t for n, t in tensors.items() if "lora_B" in n}
    assert all(t.any() for n, t in ups.items() if n.startswith(("student.", "critic.")))
    assert not (out / "diffusion_pytorch_model.safetensors").exists()

    zero = {n: torch.zeros_like(t) for n, t in tensors.items()}
    for recomputed in (False, True):
        two = saved(trained(toy_folder, tmp_path / f"two-{recomputed}", "--lora", 4,
                            "--gradient-checkpointing", recomputed, ranks=2))
        for part in ("student", "critic"):
            assert distance(ups, two, part) <= 1e-3 * distance(ups, zero, part)

    for steps in (1, 3):
        trained(toy_folder, tmp_path / "resumed", "--lora", 4, steps=steps)
    assert equal(tensors, saved(tmp_path / "resumed"))


def test_each_of_two_ranks_holds_half_of_loras_base_and_whole_adapters(toy_folder, tmp_path):
    (tmp_path / "hold.py").write_text("""
import sys, train
from runtime import run
log = run.Run.log
def seen(self, *args):
    parts = [getattr(p, "to_local", lambda p=p: p)().numel() if "lora_" not in name else 0
             for name, p in self.state["student"].base.named_parameters()]
    adapter = sum(p.numel() for p in self.state["student"].parameters())
    print("holds", sum(parts), adapter)
    return log(self, *args)
run.Run.log = seen
sys.exit(train.main(sys.argv[1:]))
""")
    result = on_two_ranks(toy_folder, "run", "--lora", 4, steps=1, script="hold.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    held = [line.split()[1:] for line in result.stdout.splitlines() if "holds" in line]
    base, adapter = zip(*(map(int, numbers) for numbers in held))
    model = WanModel.from_pretrained(toy_folder)
    whole = sum(p.numel() for p in model.parameters())
    assert sum(base) == whole and max(base) <= 0.51 * whole
    assert {*adapter} == {sum(4 * sum(p.shape) for name, p in model.named_parameters()
                              if re.search(r"blocks.*(attn\.[qkvo]|ffn\.[02])\.weight", name))}


def test_the_base_is_the_teacher_bit_for_bit_and_adapters_do_not_mix(toy_folder):
    plain, base = (WanModel.from_pretrained(toy_folder, torch.float32) for _ in range(2))
    base.gradient_checkpointing = True
    teacher, student, critic = lora.add_adapters(base, 4, ("student", "critic"))
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 12, 3, 8, 8, generator=g), torch.tensor([1000.0, 522.0])
    text = torch.randn(2, 3, ToyCodec.text_dim, generator=g)
    assert all(torch.equal(m(x, t, text), plain(x, t, text)) for m in (teacher, student, critic))

    for p in student.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    v = student(x, t, text)
    with torch.no_grad():
        assert torch.equal(teacher(x, t, text), plain(x, t, text))
        assert torch.equal(critic(x, t, text), plain(x, t, text))
    assert (v - plain(x, t, text)).abs().max() > 0.01
    v.square().mean().backward()  # recomputes blocks after another adapter was active
    recomputed = [p.grad.clone() for p in student.parameters()]
    assert all(p.grad is None for p in critic.parameters())
    base.gradient_checkpointing = False
    for p in student.parameters():
        p.grad = None
    student(x, t, text).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(student.parameters(), recomputed))


def test_adapters_of_a_bf16_base_compute_in_bf16_and_learn_in_float32(toy_folder):
    base, seen = WanModel.from_pretrained(toy_folder, torch.bfloat16), set()
    _, student = lora.add_adapters(base, 4, ("student",))
    for name, layer in base.named_modules():
        if name.endswith("lora_A.student"):
            layer.register_forward_hook(
                lambda _, inputs, out: seen.add((inputs[0].dtype, out.dtype)))
    v = student(torch.randn(1, 12, 3, 8, 8), torch.tensor([757.0]),
                torch.randn(1, 3, ToyCodec.text_dim))
    v.square().mean().backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert {p.grad.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_loras_first_step_is_as_large_as_that_of_whole_models_at_the_default_rates(rank):
    whole, base = (WanModel.from_pretrained(WEIGHTS, torch.float32) for _ in range(2))
    _, student = lora.add_adapters(base, rank, ("student",))
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    video, prompts = world.make(11, range(8))
    x0, text = ToyCodec().encode(video), ToyCodec().encode_text(prompts)
    for model, config in (whole, default_config(WEIGHTS)), (student, default_config(WEIGHTS, rank)):
        generator = torch.Generator().manual_seed(0)
        adavid.critic_loss(model, x0, text, config, generator).backward()
        torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0).step()

    adapter, steps = student.state_dict(), []
    for name, p in whole.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in adapter:
            step = adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
            steps.append([(p - before[name]).norm().item(), step.norm().item()])
    whole_step, lora_step = torch.tensor(steps).norm(dim=0)
    assert lora_step / whole_step == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("flags, factor", [
    ([], 1), (["--lora", "16"], 18 ** 0.5), (["--lora", "16", "--lr", "2e-4"], 1)])
def test_lora_has_learning_rates_of_its_own_unless_they_are_given(flags, factor, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "distill", seen.append)
    assert train.main(["distill", "--out", "x", *flags]) == 0
    assert seen[0].avd.lr == pytest.approx(factor * 2e-4)
    assert seen[0].avd.critic_lr == pytest.approx(4e-4 * (18 ** 0.5 if flags else 1))


# A LoRA in a table of ComfyUI's loader: `load_lora` in comfy/lora.py looks up a weight's key
# `diffusion_model.{name}` for each parameter of the model, and its LoRA reader takes
# `{key}.lora_B.weight` and `{key}.lora_A.weight`, with `{key}.alpha` if there is one.
COMFYUI = re.compile(r"diffusion_model\.(blocks\.\d+\.\w+\.\w+)\.lora_[AB]\.weight")


def test_diffusers_and_comfyui_read_our_adapter_and_we_merge_it(tmp_path):
    pipe = miniature_wan.pipeline()
    pipe.transformer.save_pretrained(tmp_path / "wan")
    base = WanModel.from_pretrained(tmp_path / "wan")
    _, student, _ = lora.add_adapters(base, 4, ("student", "critic"))
    g = torch.Generator().manual_seed(0)
    for p in student.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    lora.write_adapter(tmp_path, student.state_dict(), {"method": "AVD"})
    x, t = torch.randn(1, 16, 3, 8, 8, generator=g), torch.tensor([522.0])
    text = torch.randn(1, 512, 32, generator=g)
    wanted = student(x, t, text)

    names = load_file(tmp_path / lora.FILE)
    assert {COMFYUI.fullmatch(name)[1] + ".weight" for name in names} <= set(
        WanModel.from_pretrained(tmp_path / "wan").state_dict())
    pipe.load_lora_weights(tmp_path, weight_name=lora.FILE)
    with torch.no_grad():
        theirs = pipe.transformer(x, t, text, return_dict=False)[0]
    assert (wanted - theirs).abs().max() < 2e-5
    assert export.main(["--model", str(tmp_path / "wan"), "--lora", str(tmp_path / lora.FILE),
                        "--out", str(tmp_path / "merged"), "--layout", "original"]) == 0
    merged = WanModel.from_pretrained(tmp_path / "merged")
    assert (merged(x, t, text) - wanted).abs().max() < 2e-5
    adapter = next(iter(pipe.transformer.peft_config))
    pipe.save_lora_weights(tmp_path / "theirs", get_peft_model_state_dict(
        pipe.transformer, adapter_name=adapter))
    theirs = WanModel.from_pretrained(tmp_path / "wan")
    lora.merge(theirs, tmp_path / "theirs" / lora.FILE)
    assert (theirs(x, t, text) - wanted).abs().max() < 2e-5
    assert (WanModel.from_pretrained(tmp_path / "wan")(x, t, text) - wanted).abs().max() > 0.1


def merges_as_diffusers(pipe, folder):
    """Whether the LoRA in a folder, merged, gives the velocity of the pipeline that has it."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 16, 3, 8, 8, generator=g), torch.tensor([522.0])
    text = torch.randn(1, 512, 32, generator=g)
    base, model = (WanModel.from_pretrained(folder / "wan") for _ in range(2))
    with torch.no_grad():
        theirs = pipe.transformer(x, t, text, return_dict=False)[0]
        ours = lora.merge(model, folder / lora.FILE)(x, t, text)
        assert (theirs - base(x, t, text)).abs().max() > 0.1
    return (ours - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("layer_name, down, up", [
    ("diffusion_model.{}", "lora_A", "lora_B"), ("diffusion_model.{}", "lora_down", "lora_up"),
    ("lora_unet_{}", "lora_down", "lora_up")])
def test_an_alpha_that_is_not_the_rank_counts_as_in_diffusers(layer_name, down, up, tmp_path):
    pipe, tensors, g = miniature_wan.pipeline(), {}, torch.Generator().manual_seed(0)
    pipe.transformer.save_pretrained(tmp_path / "wan")
    for name, p in WanModel.from_pretrained(tmp_path / "wan").named_parameters():
        if re.fullmatch(r"blocks.*(attn\.[qkvo]|ffn\.[02])\.weight", name):
            layer = name.removesuffix(".weight")
            layer = layer_name.format(layer.replace(".", "_") if "unet" in layer_name else layer)
            tensors |= {f"{layer}.{down}.weight": 0.2 * torch.randn(4, p.shape[1], generator=g),
                        f"{layer}.{up}.weight": 0.2 * torch.randn(len(p), 4, generator=g),
                        f"{layer}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / lora.FILE)
    pipe.load_lora_weights(tmp_path, weight_name=lora.FILE)
    assert merges_as_diffusers(pipe, tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pefts_alphas_and_ranks_in_the_header_count_as_in_diffusers(use_rslora, tmp_path):
    pipe = miniature_wan.pipeline()
    pipe.transformer.save_pretrained(tmp_path / "wan")
    pipe.transformer.add_adapter(LoraConfig(
        r=4, lora_alpha=3, target_modules=["to_q", "ffn.net.2"], rank_pattern={"attn2.to_q": 2},
        alpha_pattern={r"1\.attn2.to_q": 5}, use_rslora=use_rslora))
    tensors = get_peft_model_state_dict(pipe.transformer, adapter_name="default")
    g = torch.Generator().manual_seed(0)
    tensors = {name: 0.2 * torch.randn(p.shape, generator=g) for name, p in tensors.items()}
    set_peft_model_state_dict(pipe.transformer, tensors, adapter_name="default")
    pipe.save_lora_weights(
        tmp_path, tensors, transformer_lora_adapter_metadata=pipe.transformer.peft_config[
            "default"].to_dict())
    assert merges_as_diffusers(pipe, tmp_path)


def test_export_merges_to_the_bits_that_sample_computes_with(inputs, tmp_path):
    model = random_model(WanModel.from_pretrained(inputs["toy"]).config)
    model.save_pretrained(tmp_path / "base")
    _, student = lora.add_adapters(model, 4, ("student",))
    g = torch.Generator().manual_seed(0)
    for p in student.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    lora.write_adapter(tmp_path, student.state_dict(), {"method": "AVD"})
    assert export.main(["--model", str(tmp_path / "base"), "--lora", str(tmp_path / lora.FILE),
                        "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    sampled = lora.load_merged(tmp_path / "base", torch.bfloat16, "cpu",
                               [(tmp_path / lora.FILE, 1.0)])
    exported = WanModel.from_pretrained(tmp_path / "out").state_dict()
    assert equal(exported, sampled.state_dict())
    assert {p.dtype for p in exported.values()} == {torch.bfloat16, torch.float32}


def test_a_lora_of_the_difference_takes_the_base_to_the_student(toy_folder, tmp_path, capsys):
    student = WanModel.from_pretrained(toy_folder, torch.float32)
    g = torch.Generator().manual_seed(0)
    for name, p in student.named_parameters():
        if name.endswith((".q.weight", "ffn.2.weight")):  # of rank 3
            up, down = torch.randn(len(p), 3, generator=g), torch.randn(3, p.shape[1], generator=g)
            p.data += 0.02 * up @ down
        elif name == "head.modulation":
            p.data += 0.01
    student.save_pretrained(tmp_path / "student", metadata={
        "method": "AVD", "avd": adavid.AVDConfig(guidance_scale=3.0).to_json()})
    shutil.copy(toy_folder / "interpolator.safetensors", tmp_path / "student")
    WanModel.from_pretrained(toy_folder).save_pretrained(tmp_path / "base")
    for rank in (3, 2):
        assert export.main(["--model", str(tmp_path / "student"), "--base", str(toy_folder),
                            "--lora-rank", str(rank), "--out", str(tmp_path / str(rank))]) == 0
    exact, rough = re.findall(r"leaves out ([\d.]+)%", capsys.readouterr().out)
    assert float(exact) == 0 and 20 < float(rough) < 70

    videos = {}
    for name, flags in {"student": ["--model", tmp_path / "student"], "lora": [
            "--model", tmp_path / "base", "--lora", tmp_path / "3" / lora.FILE], "half": [
            "--model", toy_folder, "--lora", tmp_path / "3" / lora.FILE, "--lora-scale", 0.5],
            "base": ["--model", toy_folder]}.items():
        assert sample.main(["a red ball", *map(str, flags), "--out", str(tmp_path / f"{name}-out"),
                            "--device", "cpu", "--save-latents"]) == 0
        assert "no interpolator" not in capsys.readouterr().out  # it comes with the LoRA
        videos[name] = load_file(tmp_path / f"{name}-out" / "latents.safetensors")["latents"]
    away = {name: (x - videos["student"]).norm().item() for name, x in videos.items()}
    assert away["lora"] < 0.3 * away["half"] and away["half"] < away["base"]
    code = sample.main(["a red ball", "--model", str(toy_folder), "--lora", str(
        tmp_path / "3" / lora.FILE), "--lora-scale", "1", "2", "--out", str(tmp_path / "x")])
    assert "2 weights for 1 LoRA" in complaint(capsys, code)


# --- sampling --------------------------------------------------------------------------------

@pytest.mark.long
def test_two_ranks_that_are_killed_twice_make_one_processs_videos(toy_folder, tmp_path):
    (tmp_path / "die.py").write_text("""
import os, random, signal, sys, threading, time, sample
from pathlib import Path
def die():
    while len(list(Path("two").glob("*.mp4"))) < int(os.environ["TORCHELASTIC_RESTART_COUNT"]) * \
            20 + 10:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["TORCHELASTIC_RESTART_COUNT"] < "2":
    threading.Thread(target=die, daemon=True).start()
sys.exit(sample.main(sys.argv[1:]))
""")
    words = ["a red ball", "a blue ball", "--videos-per-prompt", "32", "--batch-size", "4",
             "--frames", "3", "--model", str(toy_folder), "--device", "cpu", "--out"]
    assert sample.main([*words, str(tmp_path / "one")]) == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert len(whole) == 64 + 2

    ended, seen, wrong = threading.Event(), set(), []

    def watch():
        while not ended.wait(0.005):
            for file in (tmp_path / "two").glob("*.mp4"):
                if file not in seen:
                    seen.add(file)
                    wrong.extend([file] * (file.read_bytes() != whole[file.name]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = torchrun("--max-restarts", 2, "die.py", *words, "two", cwd=tmp_path)
    ended.set()
    watcher.join()
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^[1-6]\d of 64 videos are there already", result.stdout, re.M)) == 2
    assert len(seen) == 64 and not wrong
    made = {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    assert made.keys() == whole.keys()
    assert [name for name in whole if made[name] != whole[name]] == []


# --- what must not go wrong with several ranks -----------------------------------------------

@pytest.mark.long
def test_saves_in_the_background_do_not_stop_the_loop(toy_folder, tmp_path):
    """Writing takes longer than a step, and takes each rank another time."""
    (tmp_path / "slow.py").write_text("""
import sys, time, train
from pathlib import Path
from runtime import distributed, run
from runtime.checkpoints import list_checkpoints
from torch.distributed.checkpoint import HuggingFaceStorageWriter as Writer
write = Writer.write_data
def slowly(self, *args):
    time.sleep(0.4 if distributed.rank() else 0.1)
    return write(self, *args)
Writer.write_data = slowly
update = run.all_reduce_mean
def seen(metrics):
    if distributed.rank() == 0:
        print("checkpoints:", *(c.name for c in list_checkpoints(Path("run"))))
    return update(metrics)
run.all_reduce_mean = seen
sys.exit(train.main(sys.argv[1:]))
""")
    result = on_two_ranks(toy_folder, "run", "--save-every", 2, steps=6, script="slow.py",
                          cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list_checkpoints(tmp_path / "run")[-1].name == "000006"
    seen = [line.split()[1:] for line in result.stdout.splitlines() if "checkpoints:" in line]
    assert "000002" in seen[3] + seen[4]  # it has its name before the next save, or soon after


def test_ranks_that_do_not_share_a_folder_are_told_at_once(toy_folder, tmp_path):
    (tmp_path / "apart.py").write_text("""
import os, sys, train
sys.exit(train.main([arg.replace("RANK", os.environ["RANK"]) for arg in sys.argv[1:]]))
""")
    result = on_two_ranks(toy_folder, "run-RANK", script="apart.py", cwd=tmp_path)
    assert result.returncode
    assert result.stderr.count("must be a folder that all nodes share") == 2


@pytest.mark.long
def test_a_second_run_leaves_the_first_ones_folder_alone(toy_folder, tmp_path):
    token = tmp_path / "ranks"
    token.write_text("of the first run, which checks that its nodes share the folder")
    with lock_folder(tmp_path):
        result = on_two_ranks(toy_folder, tmp_path)
    assert result.returncode and result.stderr.count("another process is writing") == 2
    assert token.read_text().startswith("of the first run")


@pytest.mark.long
def test_torchrun_names_a_dead_rank_and_restarts_all_to_the_same_bits(whole, toy_folder, tmp_path):
    (tmp_path / "die.py").write_text("""
import os, signal, sys, train
from runtime import run
means, steps = run.all_reduce_mean, []
def dying(metrics):
    steps.append(metrics)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if len(steps) == 3 and os.environ["RANK"] == "1" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return means(metrics)
run.all_reduce_mean = dying
sys.exit(train.main(sys.argv[1:]))
""")
    result = on_two_ranks(toy_folder, "run", *EACH_STEP, script="die.py", cwd=tmp_path,
                          launcher=["--max-restarts", 1])
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("error: the connection to another rank broke") == 1
    assert "(exitcode: -9) local_rank: 1" in result.stderr
    assert equal(saved(whole[2]), saved(tmp_path / "run"))
    logs = [(out / "metrics.jsonl").read_text() for out in (whole[2], tmp_path / "run")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 3


def test_a_rank_that_hangs_is_named(tmp_path):
    (tmp_path / "hang.py").write_text("""
import os, signal, subprocess, sys, time
from runtime import distributed
distributed.BEAT, distributed.PATIENCE = 0.2, 2
distributed.init_distributed("cpu")
with distributed.Watchdog():
    if os.environ["RANK"] == "1":
        # Stopped, it ignores torchrun's SIGTERM for 30 seconds, so something must wake it.
        wake = f"import os, time; time.sleep(5); os.kill({os.getpid()}, {signal.SIGCONT})"
        subprocess.Popen([sys.executable, "-c", wake], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(30)
""")
    hung = torchrun(tmp_path / "hang.py")
    assert hung.returncode and "error: rank 1 has died, or hangs" in hung.stderr


def test_a_bad_number_on_one_rank_skips_the_update_on_both(toy_folder, tmp_path):
    (tmp_path / "nan.py").write_text("""
import sys, torch, train
from runtime import data, distributed, run
batch = data.Toy.batch
def spoilt(self, numbers):
    latents, text, prompts = batch(self, numbers)
    if 5 in numbers:  # in the second student update, on the second rank
        latents[0, 0, 0, 0, 0] = float("nan")
    return latents, text, prompts
data.Toy.batch = spoilt
log = run.Run.log
def seen(self, *args):
    weights = [distributed.full_tensor(p).flatten() for p in self.state["student"].parameters()]
    with open(f"seen-{distributed.rank()}", "a") as file:
        print(self.state["cache"].means.tolist(), torch.cat(weights).tolist(), file=file)
    return log(self, *args)
run.Run.log = seen
sys.exit(train.main(sys.argv[1:]))
""")
    result = on_two_ranks(toy_folder, "run", script="nan.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("skipped") for line in lines] == [None, 1, None]
    assert lines[1]["reg"] is None and lines[1]["dmd"] is not None
    said, = (line for line in result.stdout.splitlines() if "skipped" in line)
    assert said.startswith("step 1: skipped") and "reg" in said and "student_grad_norm" in said
    seen, others = ((tmp_path / f"seen-{rank}").read_text().splitlines() for rank in range(2))
    assert seen == others and seen[0] == seen[1] != seen[2]  # the cache, and the student's weights
    tensors = load_file(next(list_checkpoints(tmp_path / "run")[-1].glob("shard-*1-of*")), "cpu")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
