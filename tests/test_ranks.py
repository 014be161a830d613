"""Several ranks, accumulation, LoRA and averaged weights against one plain process."""

import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

import train
from runtime import lora
from runtime.checkpoints import list_checkpoints
from tests.test_train import complaint
from tiny_wan import WanModel
from tools import export

ROOT = Path(train.__file__).parent


def distill(teacher, out, *flags, ranks=1, batch=2, steps=3):
    """Run train.py in one process, or under torchrun."""
    args = ["distill", "--model", teacher, "--out", out, "--batch-size", batch, "--steps", steps,
            "--device", "cpu", "--sample-every", 100, *flags]
    args = [str(arg) for arg in args]
    if ranks == 1:
        assert train.main(args) == 0
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        subprocess.run([*torchrun, "train.py", *args], cwd=ROOT, check=True, timeout=120,
                       env={"OMP_NUM_THREADS": "1", "PATH": ""}, capture_output=True)
    return out


def state(out):
    """All tensors of a run's newest checkpoint, whole, by whichever ranks it was written."""
    reader = HuggingFaceStorageReader(str(list_checkpoints(out)[-1]))
    tensors = {name: torch.zeros(about.size, dtype=about.properties.dtype)
               for name, about in reader.read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def distance(a, b, part):
    """L2 distance of all tensors whose names begin so."""
    return torch.stack([(a[n].double() - b[n].double()).norm() for n in a
                        if n.startswith(part + ".")]).norm()


def same(a, b, teacher):
    """Whether two runs went the same way: weights by at most 1e-3 of the distance they moved."""
    a, b = state(a), state(b)
    assert a.keys() == b.keys()
    start = {f"{part}.{name}": p.float() for part in ("student", "critic")
             for name, p in WanModel.from_pretrained(teacher).state_dict().items()}
    for part in ("student", "critic"):
        assert distance(a, b, part) <= 1e-3 * distance(start, a, part)
    torch.testing.assert_close(a["cache.means"], b["cache.means"], rtol=1e-5, atol=1e-7)
    return True


@pytest.fixture(scope="module")
def one(toy_folder, tmp_path_factory):
    return distill(toy_folder, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def first_cycles(toy_folder, tmp_path_factory):
    """One cycle of batch 2, by one process and by two ranks."""
    out = tmp_path_factory.mktemp("first")
    return {1: distill(toy_folder, out / "one", steps=1),
            2: distill(toy_folder, out / "two", steps=1, ranks=2, batch=1)}


def test_two_ranks_have_one_processs_gradients(first_cycles):
    """Adam's first moment after one update is the gradient, but for a factor."""
    one, two = (state(first_cycles[ranks]) for ranks in (1, 2))
    zero = {name: torch.zeros_like(t) for name, t in one.items()}
    for optimizer in ("student_optimizer", "critic_optimizer"):
        moments = {n: t for n, t in one.items() if n.endswith("exp_avg")}
        assert distance(moments, two, optimizer) <= 1e-5 * distance(moments, zero, optimizer)
    torch.testing.assert_close(one["cache.means"], two["cache.means"], rtol=1e-5, atol=1e-7)
    logs = [json.loads((first_cycles[ranks] / "metrics.jsonl").read_text()) for ranks in (1, 2)]
    for name in ("loss", "dmd", "reg", "critic", "student_grad_norm", "variance"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name


@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2)])
def test_a_checkpoint_resumes_on_any_number_of_ranks(
        before, after, first_cycles, one, toy_folder, tmp_path):
    out = shutil.copytree(first_cycles[before], tmp_path / "run")
    flags = json.loads((list_checkpoints(out)[-1] / "state.json").read_text())
    assert flags["step"] == 1
    distill(toy_folder, out, ranks=after, batch=2 // after)
    assert same(one, out, toy_folder)
    student = WanModel.from_pretrained(out)  # gathered from the ranks
    for name, p in student.state_dict().items():
        assert torch.equal(p, state(out)["student." + name])


def test_two_accumulated_batches_are_one_of_twice_the_size(one, toy_folder, tmp_path):
    two = distill(toy_folder, tmp_path / "two", "--accumulate", 2, batch=1)
    assert same(one, two, toy_folder)


def test_averaged_weights_follow_the_students(toy_folder, one, tmp_path):
    out = distill(toy_folder, tmp_path / "run", "--ema", 0.5)
    tensors, teacher = state(out), WanModel.from_pretrained(toy_folder).state_dict()
    kept = WanModel.from_pretrained(out).state_dict()
    for name, p in kept.items():
        assert torch.equal(p, tensors["ema." + name])
        assert torch.equal(tensors["student." + name], state(one)["student." + name])
    assert any(not torch.equal(kept[n], tensors["student." + n])
               and not torch.equal(kept[n], teacher[n].float()) for n in kept)


def test_a_student_may_start_elsewhere(toy_folder, one, tmp_path):
    out = distill(toy_folder, tmp_path / "run", "--init-student", one, "--lr", 0, steps=1)
    for name, p in WanModel.from_pretrained(one).state_dict().items():
        assert torch.equal(p, state(out)["student." + name])
        assert torch.equal(p, WanModel.from_pretrained(out).state_dict()[name])


def test_recomputed_blocks_change_nothing(toy_folder, one, tmp_path):
    out = distill(toy_folder, tmp_path / "run", "--gradient-checkpointing", True)
    assert same(one, out, toy_folder)


def test_bf16_computes_on_two_ranks_with_float32_weights(toy_folder, tmp_path):
    out = distill(toy_folder, tmp_path / "run", "--dtype", "bfloat16", ranks=2, batch=1, steps=1)
    assert {t.dtype for n, t in state(out).items() if n.startswith("student.")} == {torch.float32}
    assert 0 < json.loads((out / "metrics.jsonl").read_text())["student_grad_norm"] < 1e3


# --- LoRA ----------------------------------------------------------------------------------

def test_lora_trains_adapters_of_one_base_that_stays(toy_folder, tmp_path):
    out = distill(toy_folder, tmp_path / "one", "--lora", 4)
    tensors = state(out)
    assert all("lora_" in n for n in tensors if n.startswith(("student.", "critic.")))
    ups = [t for n, t in tensors.items() if n.startswith(("student", "critic.")) and "lora_B" in n]
    assert all(t.any() for t in ups)  # both learnt, and in every layer
    assert not (out / "diffusion_pytorch_model.safetensors").exists()

    two = distill(toy_folder, tmp_path / "two", "--lora", 4, ranks=2, batch=1)
    for part in ("student", "critic"):
        zero = {n: torch.zeros_like(t) for n, t in tensors.items()}
        ups = {n: t for n, t in tensors.items() if "lora_B" in n}
        assert distance(ups, state(two), part) <= 1e-3 * distance(ups, zero, part)

    resumed = distill(toy_folder, tmp_path / "resumed", "--lora", 4, steps=1)
    distill(toy_folder, resumed, "--lora", 4, steps=3)
    assert all(torch.equal(t, state(resumed)[n]) for n, t in tensors.items())


def test_the_base_is_the_teacher_bit_for_bit_and_adapters_do_not_mix(toy_folder):
    plain, base = (WanModel.from_pretrained(toy_folder, torch.float32) for _ in range(2))
    base.gradient_checkpointing = True
    teacher, student, critic = lora.add_adapters(base, 4, ("student", "critic"))
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 12, 3, 8, 8, generator=g), torch.tensor([1000.0, 522.0])
    text = torch.randn(2, 3, 15, generator=g)
    assert all(torch.equal(m(x, t, text), plain(x, t, text)) for m in (teacher, student, critic))

    for p in student.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    v = student(x, t, text)
    with torch.no_grad():
        assert torch.equal(teacher(x, t, text), plain(x, t, text))
        assert torch.equal(critic(x, t, text), plain(x, t, text))
    assert (v - plain(x, t, text)).abs().max() > 0.01
    v.square().mean().backward()  # recomputes blocks, when another adapter was the last to work
    recomputed = [p.grad.clone() for p in student.parameters()]
    assert all(p.grad is None for p in critic.parameters())
    base.gradient_checkpointing = False
    for p in student.parameters():
        p.grad = None
    student(x, t, text).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(student.parameters(), recomputed))


def test_adapters_of_a_bf16_base_compute_in_bf16_and_learn_in_float32(toy_folder):
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 12, 3, 8, 8, generator=g), torch.tensor([757.0])
    text, runs = torch.randn(1, 3, 15, generator=g), []
    for dtype in (torch.float32, torch.bfloat16):
        base, g = WanModel.from_pretrained(toy_folder, dtype), g.manual_seed(0)
        _, student = lora.add_adapters(base, 4, ("student",))
        seen = set()
        for name, layer in base.named_modules():
            if name.endswith("lora_A.student"):
                layer.register_forward_hook(
                    lambda _, inputs, out: seen.add((inputs[0].dtype, out.dtype)))
        for p in student.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=g)
        v = student(x, t, text)
        v.square().mean().backward()
        assert seen == {(dtype, dtype)}
        assert {p.grad.dtype for p in student.parameters()} == {torch.float32}
        runs.append((v, torch.cat([p.grad.flatten() for p in student.parameters()])))
    for exact, rounded in zip(*runs):
        assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_an_adapter_is_diffusers_and_merges_into_its_model(tmp_path):
    from tests import miniature_wan

    pipe = miniature_wan.pipeline()
    pipe.transformer.save_pretrained(tmp_path / "wan")
    _, student, _ = lora.add_adapters(WanModel.from_pretrained(tmp_path / "wan"), 4,
                                 ("student", "critic"))
    g = torch.Generator().manual_seed(0)
    for p in student.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    student.save_adapter(tmp_path, {"method": "AVD"})
    x, t = torch.randn(1, 16, 3, 8, 8, generator=g), torch.tensor([522.0])
    text = torch.randn(1, 512, 32, generator=g)
    wanted = student(x, t, text)

    pipe.load_lora_weights(tmp_path, weight_name=lora.FILE)
    with torch.no_grad():
        theirs = pipe.transformer(x, t, text, return_dict=False)[0]
    assert (wanted - theirs).abs().max() < 2e-5
    assert export.main(["--model", str(tmp_path / "wan"), "--lora", str(tmp_path / lora.FILE),
                        "--out", str(tmp_path / "merged"), "--layout", "original"]) == 0
    merged = WanModel.from_pretrained(tmp_path / "merged")
    assert (merged(x, t, text) - wanted).abs().max() < 2e-5
    assert (WanModel.from_pretrained(tmp_path / "wan")(x, t, text) - wanted).abs().max() > 0.1


def test_an_adapter_of_another_model_is_named(toy_folder, tmp_path, capsys):
    from tests import miniature_wan

    miniature_wan.transformer().save_pretrained(tmp_path / "wan")
    out = distill(toy_folder, tmp_path / "run", "--lora", 4, steps=1)
    code = export.main(["--model", str(tmp_path / "wan"), "--lora", str(out / lora.FILE),
                        "--out", str(tmp_path / "merged")])
    assert lora.FILE in complaint(capsys, code)
    whole, wrong = load_file(out / lora.FILE), tmp_path / "wrong.safetensors"
    up, down = (f"transformer.blocks.0.ffn.net.2.lora_{part}.weight" for part in "BA")
    infinite = {name: x * torch.inf for name, x in whole.items()}
    turned = whole | {up: whole[down].T.contiguous(), down: whole[up].T.contiguous()}
    for tensors in (infinite, turned):
        save_file(tensors, wrong)
        line = complaint(capsys, export.main(["--model", str(toy_folder), "--lora", str(wrong),
                                              "--out", str(tmp_path / "y")]))
        assert str(wrong) in line and "of another shape, or not finite" in line
    assert "lora" in complaint(capsys, train.main([
        "distill", "--model", str(toy_folder), "--out", str(tmp_path / "x"), "--lora", "4",
        "--ema", "0.9"]))
    assert load_file(out / lora.FILE)


# --- what must not go wrong with several ranks -----------------------------------------------

def torchrun(*args, cwd=ROOT):
    env = {"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           *map(str, args)], cwd=cwd, env=env, timeout=120, capture_output=True,
                          text=True)


def test_saves_in_the_background_keep_out_of_the_loops_way(toy_folder, tmp_path):
    """Writing takes longer than a step, and on each rank another time."""
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
    result = torchrun(tmp_path / "slow.py", "distill", "--model", toy_folder, "--out", "run",
                      "--batch-size", 1, "--steps", 12, "--device", "cpu", "--sample-every", 100,
                      "--save-every", 2, "--critic-updates", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list_checkpoints(tmp_path / "run")[-1].name == "000012"
    seen = [line.split()[1:] for line in result.stdout.splitlines() if "checkpoints:" in line]
    assert "000002" in seen[3] + seen[4]  # named before the next one is begun, or soon after


def test_ranks_that_see_other_folders_are_told_at_once(toy_folder, tmp_path):
    (tmp_path / "apart.py").write_text("""
import os, sys, train
sys.exit(train.main([arg.replace("RANK", os.environ["RANK"]) for arg in sys.argv[1:]]))
""")
    result = torchrun(tmp_path / "apart.py", "distill", "--model", toy_folder, "--out",
                      tmp_path / "run-RANK", "--batch-size", 1, "--steps", 2, "--device", "cpu")
    assert result.returncode
    assert result.stderr.count("must be a folder that all nodes share") == 2


DIE = """
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
"""


def test_a_rank_that_dies_ends_the_others_and_torchrun_starts_all_again(toy_folder, tmp_path):
    (tmp_path / "die.py").write_text(DIE)
    flags = ["distill", "--model", toy_folder, "--batch-size", 1, "--steps", 4, "--device", "cpu",
             "--save-every", 1, "--sample-every", 100, "--critic-updates", 1, "--out"]
    began = time.perf_counter()
    died = torchrun(tmp_path / "die.py", *flags, tmp_path / "died")
    assert died.returncode and time.perf_counter() - began < 60
    assert died.stderr.count("error: the connection to another rank broke") == 1
    assert "rank      : 1" in died.stderr and "SIGKILL" in died.stderr

    again = torchrun("--max-restarts", 1, tmp_path / "die.py", *flags, tmp_path / "again")
    whole = torchrun(ROOT / "train.py", *flags, tmp_path / "whole")
    assert (again.returncode, whole.returncode) == (0, 0), again.stderr
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("again", "whole")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 4
    students = [load_file(tmp_path / run / "diffusion_pytorch_model.safetensors")
                for run in ("again", "whole")]
    assert all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())


def test_a_rank_that_hangs_is_named(tmp_path, monkeypatch):
    (tmp_path / "hang.py").write_text("""
import os, time
from runtime import distributed
distributed.BEAT, distributed.PATIENCE = 0.2, 2
distributed.init_distributed("cpu")
with distributed.Watchdog():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 19)
    time.sleep(30)
""")
    hung = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--shutdown-timeout",
         "1", str(tmp_path / "hang.py")], env={"OMP_NUM_THREADS": "1", "PATH": "",
                                               "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        text=True)
    _, said = hung.communicate(timeout=60)
    assert hung.returncode and "error: rank 1 has died, or hangs" in said


def test_a_bad_number_on_one_rank_skips_the_update_on_both(toy_folder, tmp_path):
    (tmp_path / "nan.py").write_text("""
import sys, torch, train
from runtime import data, distributed, run
batch = data.Toy.batch
def spoilt(self, numbers):
    latents, text, prompts = batch(self, numbers)
    if 11 in numbers:  # of the second student update, on the second rank
        latents[0, 0, 0, 0, 0] = float("nan")
    return latents, text, prompts
data.Toy.batch = spoilt
log = run.Run.log
def seen(self, *args):
    weights = [distributed.full_tensor(p).flatten() for p in self.state["student"].parameters()]
    with open(f"seen-{distributed.rank()}", "a") as file:
        print(self.state["cache"].means.tolist(), torch.cat(weights).tolist(), file=file)
    log(self, *args)
run.Run.log = seen
sys.exit(train.main(sys.argv[1:]))
""")
    result = torchrun(tmp_path / "nan.py", "distill", "--model", toy_folder, "--out", "run",
                      "--batch-size", 1, "--steps", 3, "--device", "cpu", "--sample-every", 100,
                      cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None, 1, None]
    assert lines[1]["reg"] is None and lines[1]["dmd"] is not None
    said, = (line for line in result.stdout.splitlines() if "skipped" in line)
    assert said.startswith("step 1: skipped") and "reg" in said and "student_grad_norm" in said
    seen, others = ((tmp_path / f"seen-{rank}").read_text().splitlines() for rank in range(2))
    assert seen == others and seen[0] == seen[1] != seen[2]  # the cache, and the student's weights
    tensors = load_file(next(list_checkpoints(tmp_path / "run")[-1].glob("shard-*1-of*")), "cpu")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
