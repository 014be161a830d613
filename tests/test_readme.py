"""The README's chapter on Wan2.1, word for word, on a miniature."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest

import adavid
import sample
from tests import miniature_wan
from tiny_wan import WanModel
from tools import export

ROOT = Path(__file__).parents[1]
CHAPTER = re.search(r"\n## Wan2.1\n(.*?)\n## ", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
SMALL = {"sample.py": ["--frames", "17", "--height", "32", "--width", "48", "--device", "cpu"]}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", CHAPTER, re.S)


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


def test_commands(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    programs = {"sample.py": sample.main, "tools.export": export.main}
    seen = []
    for line in lines:
        program, args = (line[2], line[3:]) if line[1] == "-m" else (line[1], line[2:])
        if program in programs:
            assert programs[program]([*args, *SMALL.get(program, ())]) == 0, line
            seen.append(program)
    assert seen == ["sample.py"] * 3 + ["tools.export"]
    video = iio.imread("runs/samples/A cat walks on the grass, realistic-0.mp4")
    assert video.shape == (17, 256, 384, 3)
    assert sorted(p.name for p in Path("runs/vbench").glob("*.mp4")) == [
        f"{prompt}-{i}.mp4" for prompt in ("a bird", "a dog runs") for i in range(5)]
    assert Path("runs/exported/transformer/config.json").exists()
    assert Path("runs/exported/scheduler/scheduler_config.json").exists()
    assert Path("runs/exported/interpolator.safetensors").exists()


def test_python(folder):
    stock, ours = blocks("python")
    small = {"torch.bfloat16": "torch.float32", '"cuda"': '"cpu"', "21, 60, 104": "3, 4, 6",
             "guidance_scale=1.0": "guidance_scale=1.0, num_frames=5, height=32, width=48",
             ".cuda()": ""}
    for code, shape in ((stock, "video"), (ours, "latents")):
        for theirs, tiny in small.items():
            code = code.replace(theirs, tiny)
        result = subprocess.run(
            [sys.executable, "-c", f"{code}\nprint(tuple({shape}.shape))"], cwd=folder,
            env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split("\n")[-2] in ("(5, 32, 48, 3)", "(1, 16, 3, 4, 6)")
