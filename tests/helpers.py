"""What the tests share: running programs, reading what they leave, and small inputs for them."""

import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

import train
from adavid import AVDConfig, FrameInterpolator
from runtime import lora
from runtime.checkpoints import Checkpointer, list_checkpoints
from runtime.data import write_toy_shards
from tiny_wan import PRESETS, ToyCodec, WanModel, checkpoint
from tools import encode

ROOT = Path(train.__file__).parent
CLIP = ["--frames", "9", "--height", "32", "--width", "48", "--device", "cpu"]
# For tests that expect these steps, whatever the defaults are: exercises change those.
FOUR_STEPS = AVDConfig((1000, 900, 757, 522), (2, 2, 1, 1), (1, 1, 1, 1))

# ---------------------------------------------------------------------------------------------
# Programs, and what they leave
# ---------------------------------------------------------------------------------------------


def distill(model, out, *flags, steps=2, batch_size=2):
    """The exit code of train.py distill on the CPU."""
    return train.main(["distill", "--model", str(model), "--out", str(out), "--steps", str(steps),
                       "--batch-size", str(batch_size), "--device", "cpu", *map(str, flags)])


# Importing PyTorch takes seconds. On Linux, where fork is safe, a server does it once for all.
FORK = sys.platform == "linux"
PROCESSES = multiprocessing.get_context("forkserver" if FORK else "spawn")
# The first is the module of what the processes run. The last three are imported only when the first
# optimizer, sharded model or adapter is made.
PROCESSES.set_forkserver_preload([
    "tests.helpers", "torch.distributed.run", "torch._dynamo", "torch.distributed.fsdp", "peft"])
STREAMS = ("stdout", "stderr")


class Program:
    """`python *words` in a process of its own, as a shell would start it."""

    def __init__(self, *words, cwd=ROOT):
        self.words, self.output = list(map(str, words)), tempfile.TemporaryDirectory()
        self.process = PROCESSES.Process(
            target=run_program, args=(self.words, Path(cwd).resolve(), Path(self.output.name)))
        with contextlib.chdir(ROOT):  # where the server finds what it imports
            self.process.start()

    def wait(self):
        """Wait for its end. -> subprocess.CompletedProcess"""
        self.process.join(timeout=200)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"{self.words} takes more than 200 seconds")
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *(
            Path(self.output.name, stream).read_text(encoding="utf-8") for stream in STREAMS))


def run_program(words, cwd, output):
    for number, stream in enumerate(STREAMS, start=1):
        with open(output / stream, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(cwd)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def torchrun(*words, cwd=ROOT):
    """Run two ranks to the end. -> subprocess.CompletedProcess"""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    # The static rendezvous, because the usual one calls inspect.stack() for seconds.
    ranks = ["--nproc_per_node=2", "--rdzv-backend=static", f"--master-port={port}", "--run-path",
             f"--start-method={'fork' if FORK else 'spawn'}"]
    return Program("-m", "torch.distributed.run", *ranks, *words, cwd=cwd).wait()


def complaint(capsys, code):
    """The one line (after any progress bar) of a program that has ended with code 2."""
    *_, last = error = capsys.readouterr().err.splitlines()
    assert code == 2 and last.startswith("error: "), error
    assert sum("error" in line.lower() for line in error) == 1 and "Traceback" not in str(error)
    return last


def read_lines(file):
    """The objects of a file with JSON on each line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def saved(out):
    """All tensors of a run's newest checkpoint, whole, whichever ranks have written it."""
    reader = HuggingFaceStorageReader(str(list_checkpoints(out)[-1]))
    tensors = {name: torch.zeros(about.size, dtype=about.properties.dtype)
               for name, about in reader.read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings(action="ignore"):  # of having one process
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def equal(a, b):
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumes_to_the_same_bits(train, whole, out, monkeypatch):
    """Whether `train(out)`, interrupted at its first checkpoint, ends like the run `whole`."""
    save = Checkpointer.save

    def save_and_stop(self, state, step):
        save(self, state, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "save", save_and_stop)
    assert train(out) == 130
    monkeypatch.undo()
    assert train(out) == 0
    return equal(saved(whole), saved(out))


def weigh_and_update(cache, step, loss):
    """What an update with one batch asks of the LossMeanCache: the weights, then the new means."""
    weight = cache.weigh(step, loss)
    cache.update(step, loss)
    return weight


def random_model(config, seed=0):
    """A WanModel with all parameters random: the usual initialisation zeroes the head."""
    g = torch.Generator().manual_seed(seed)
    model = WanModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5, generator=g)
    return model


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


class Inputs:
    """Small files of all kinds, each made when it is first asked for: `inputs["toy"]` is a path."""

    def __init__(self, folder):
        self.folder = Path(folder).resolve()

    def __getitem__(self, name):
        path = self.folder / name
        if not path.exists():
            MAKERS[name](path, self)
        return path


def make_toy(folder, _):
    """A teacher of the toy world, random and very small, with an interpolator beside it."""
    torch.manual_seed(0)
    model = WanModel(replace(PRESETS["tiny"], dim=32, ffn_dim=64, num_heads=2, num_layers=1))
    model.init_weights()
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    config = replace(FOUR_STEPS, guidance_scale=3.0, lr=1e-3, critic_lr=1e-3,
                     critic_updates=2, temporal_truncation=-5.0)
    model.save_pretrained(folder, metadata={"avd": config.to_json()})
    interpolator = FrameInterpolator(12, width=8)
    torch.nn.init.normal_(interpolator.out.weight, std=0.05)
    checkpoint.write_files({folder / "interpolator.safetensors": interpolator.state_dict()})


def make_wan(folder, inputs):
    """A miniature of Wan2.1 in the layout that the folder is named after."""
    from tests import miniature_wan  # diffusers takes seconds to import

    miniature_wan.make(folder, folder.name)


def make_sharded(folder, inputs):
    """A toy model in Diffusers' layout, in shards."""
    from tests import miniature_wan

    model = miniature_wan.transformer(in_channels=12, out_channels=12, text_dim=ToyCodec.text_dim)
    model.save_pretrained(folder, max_shard_size="200KB")


def make_shards(folder, _):
    write_toy_shards(folder, 0, 5)


def make_texts(folder, inputs):
    """Prompts without videos, encoded by Wan."""
    encode_to(folder, inputs, "--captions", inputs["prompts.txt"])


def make_encoded(folder, inputs):
    """Videos with captions, encoded by Wan."""
    encode_to(folder, inputs, "--videos", inputs["clips"])


def encode_to(folder, inputs, *flags):
    args = ["--model", inputs["diffusers"], "--out", folder, *CLIP, *flags]
    assert encode.main(list(map(str, args))) == 0


def make_run(folder, inputs):
    """A distillation after one step."""
    assert distill(inputs["toy"], folder, "--critic-updates", 1, steps=1, batch_size=1) == 0


def make_adapter(file, inputs):
    """What one step of LoRA has learnt."""
    out = file.with_suffix("")
    assert distill(inputs["toy"], out, "--lora", 2, "--critic-updates", 1, steps=1) == 0
    shutil.copy(out / lora.FILE, file)


def make_clips(folder, _):
    write_clips(folder, 4)


def write_clips(folder, count, frames=10):
    """Videos of noise, each with a caption in a text file beside it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        video = rng.integers(0, 255, (frames, 32, 48, 3), dtype=np.uint8)
        iio.imwrite(folder / f"{i:02}.mp4", video, fps=16, codec="libx264", macro_block_size=2)
        (folder / f"{i:02}.txt").write_text(f"clip {i:02}")


def make_text(file, _):
    file.write_text(TEXTS[file.name])


CAPTIONS = [(f"{i:02}.mp4", f"caption {i}") for i in range(4)]
TEXTS = {
    "prompts.txt": "a red ball\na blue ball moving left\n",
    "captions.csv": "video,caption\n" + "".join(f"{name},{text}\n" for name, text in CAPTIONS),
    "captions.jsonl": "".join(
        json.dumps({"video": name, "caption": text}) + "\n" for name, text in CAPTIONS),
}
MAKERS = {
    "toy": make_toy, "diffusers": make_wan, "original": make_wan, "sharded": make_sharded,
    "shards": make_shards, "texts": make_texts, "run": make_run,
    "adapter.safetensors": make_adapter, "clips": make_clips, "encoded": make_encoded,
    **dict.fromkeys(TEXTS, make_text),
}
