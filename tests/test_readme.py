"""The README's chapters on Wan2.1, word for word, on a miniature."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

import adavid
import sample
import train
from tests import miniature_wan
from tiny_wan import WanModel
from tools import encode, export, plan

ROOT = Path(__file__).parents[1]
PROGRAMS = {"sample.py": sample.main, "train.py": train.main, "tools.encode": encode.main,
            "tools.export": export.main, "tools.plan": plan.main}
SIZE = ["--frames", "17", "--height", "32", "--width", "48", "--device", "cpu"]
SMALL = {"sample.py": SIZE, "tools.encode": SIZE,
         "train.py": ["--steps", "2", "--batch-size", "1", "--device", "cpu"]}


def blocks(chapter, language):
    text = re.search(rf"\n## {chapter}\n(.*?)\n## ", (ROOT / "README.md").read_text("utf-8"), re.S)
    return re.findall(rf"```{language}\n(.*?)```", text[1], re.S)


def commands(chapter):
    """Each command's program and arguments, without the Python or torchrun that starts it."""
    for line in (line for block in blocks(chapter, "sh") for line in block.splitlines()):
        words = shlex.split(re.sub(r"--accumulate \d+", "--accumulate 1", line))
        for i, word in enumerate(words):
            if word.startswith(("sample.py", "train.py", "tools.")):
                yield words[:i], word, words[i + 1:] + SMALL.get(word, [])
                break
        else:
            yield words, None, []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader might stand, with the folders that the chapter names."""
    folder = tmp_path_factory.mktemp("reader")
    miniature_wan.make(folder / "Wan2.1-T2V-1.3B", "original")
    miniature_wan.make(folder / "Wan2.1-T2V-1.3B-Diffusers", "diffusers")
    WanModel.from_pretrained(folder / "Wan2.1-T2V-1.3B").save_pretrained(
        folder / "runs" / "student", metadata={"method": "AVD"})
    adavid.FrameInterpolator(16, width=8).save_pretrained(
        folder / "runs" / "student" / "interpolator.safetensors")
    (folder / "prompts.txt").write_text("a dog runs\na bird\n")
    return folder


def test_sampling_and_export(folder, monkeypatch):
    monkeypatch.chdir(folder)
    seen = []
    for _, program, args in commands("Wan2.1"):
        if program:
            assert PROGRAMS[program](args) == 0, args
            seen.append(program)
    assert seen == ["sample.py"] * 3 + ["tools.export"]
    video = iio.imread("runs/samples/A cat walks on the grass, realistic-0.mp4")
    assert video.shape == (17, 256, 384, 3)
    assert sorted(p.name for p in Path("runs/vbench").glob("*.mp4")) == [
        f"{prompt}-{i}.mp4" for prompt in ("a bird", "a dog runs") for i in range(5)]
    assert Path("runs/exported/transformer/config.json").exists()
    assert Path("runs/exported/scheduler/scheduler_config.json").exists()
    assert Path("runs/exported/interpolator.safetensors").exists()


def test_training_from_videos_to_a_student(tmp_path, monkeypatch, capsys):
    """Videos, shards, interpolator, distillation on two ranks and with LoRA, samples."""
    monkeypatch.chdir(tmp_path)
    miniature_wan.make(tmp_path / "Wan2.1-T2V-1.3B", "original")
    Path("prompts.txt").write_text("a dog runs\n")
    Path("clips").mkdir()
    with open("captions.jsonl", "w") as file:
        for i, caption in enumerate(["a bird", "A dog runs.", "a car", "a boat", "a tree"]):
            rows = torch.arange(32).view(1, 32, 1, 1) * (i + 2)
            video = (rows + 5 * torch.arange(20).view(20, 1, 1, 1)) % 256
            iio.imwrite(f"clips/{i}.mp4", video.expand(20, 32, 48, 3).byte().numpy(), fps=16)
            print(json.dumps({"video": f"{i}.mp4", "caption": caption}), file=file)

    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seen = []
    for start, program, args in commands("Scaling to Wan2.1"):
        if program is None:
            assert start[0] == "cp"
            shutil.copy(*start[1:])
        elif not start[0].endswith("torchrun"):
            assert PROGRAMS[program](args) == 0, args
            seen.append(program)
            said = capsys.readouterr().out
            if program == "tools.encode":
                assert "4 encoded" in said and "1: its caption" in said
        else:  # two ranks on the one node that is here
            here = {"8": "2", "3": "1", "HOST:29500": "localhost:0"}
            torchrun = ["torch.distributed.run", *(here.get(word, word) for word in start[1:])]
            script = str(ROOT / program) if program.endswith(".py") else program
            result = subprocess.run([sys.executable, "-m", *torchrun, script, *args],
                                    env=env, capture_output=True, text=True, timeout=200)
            assert result.returncode == 0, (args, result.stderr)
            seen.append(program)
    assert seen == ["tools.plan"] * 3 + ["tools.encode"] * 2 + ["train.py"] * 4 + [
        "tools.export", "sample.py"]
    log = [json.loads(line) for line in open("runs/student/metrics.jsonl")]
    assert len(log) == 2 and "saturation" in log[-1] and Path("runs/student/samples").is_dir()
    assert WanModel.from_pretrained("runs/merged").config == WanModel.from_pretrained(
        "runs/student").config
    assert Path("runs/student/interpolator.safetensors").exists()
    assert Path("runs/vbench/a dog runs-4.mp4").exists()

    miniature_wan.make(tmp_path / "Wan2.1-T2V-1.3B-Diffusers")  # and on, in stock diffusers
    assert export.main(["--model", "runs/student", "--out", "runs/exported"]) == 0
    stock, _ = blocks("Wan2.1", "python")
    assert run_python(stock, "video", tmp_path) == "(5, 32, 48, 3)"


def run_python(code, shown, cwd):
    """A block of the README, but for its sizes and its GPU -> the shape of what it makes."""
    small = {"torch.bfloat16": "torch.float32", '"cuda"': '"cpu"', "21, 60, 104": "3, 4, 6",
             "guidance_scale=1.0": "guidance_scale=1.0, num_frames=5, height=32, width=48",
             ".cuda()": ""}
    for theirs, tiny in small.items():
        code = code.replace(theirs, tiny)
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(tuple({shown}.shape))"], cwd=cwd,
        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[-2]


def test_python(folder):
    stock, ours = blocks("Wan2.1", "python")
    assert run_python(stock, "video", folder) == "(5, 32, 48, 3)"
    assert run_python(ours, "latents", folder) == "(1, 16, 3, 4, 6)"
