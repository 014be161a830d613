"""The programs that read files, with the flags and files that they read.

test_bad_input.py breaks one thing at a time; this folder's program damages the files at random.
"""

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import sample
import train
from tools import encode, export, measure


@dataclass
class Reader:
    """A program, its flags, and the inputs that it finds in the working folder.

    A flag such as @toy stands for the path of an input that stays elsewhere.
    """

    program: Callable
    flags: str
    reads: str = ""

    def prepare(self, inputs, folder):
        """Copy what is read to the folder; the arguments to call the program with there."""
        for name in self.reads.split():
            copy = shutil.copytree if inputs[name].is_dir() else shutil.copy
            copy(inputs[name], folder / name)
        return self.arguments(self.flags, inputs)

    @staticmethod
    def arguments(flags, inputs):
        return [str(inputs[word[1:]]) if word.startswith("@") else word
                for word in shlex.split(flags)]


CPU = "--out out --device cpu"
CLIP = f"{CPU} --frames 9 --height 32 --width 48"
PIXEL = f"'a cat' {CPU} --frames 1 --height 32 --width 32"
DISTILL = "distill --device cpu --batch-size 1 --critic-updates 1 --steps"
ADAPTER = "adapter.safetensors"

READERS = {
    "sample": Reader(sample.main, f"'a red ball' --model toy {CPU}", "toy"),
    "sample prompts": Reader(
        sample.main, f"--prompts-file prompts.txt --model @toy {CPU}", "prompts.txt"),
    "sample nothing": Reader(sample.main, f"--model @toy {CPU}"),
    "sample shards": Reader(sample.main, f"'a red ball' --model sharded {CPU}", "sharded"),
    "sample diffusers": Reader(sample.main, f"{PIXEL} --model diffusers", "diffusers"),
    "sample original": Reader(sample.main, f"{PIXEL} --model original", "original"),
    "sample checkpoint": Reader(
        sample.main, f"'a red ball' --model run/checkpoints/000001 {CPU}", "run"),
    "train": Reader(train.main, ""),
    "distill": Reader(train.main, f"{DISTILL} 1 --model toy --out out", "toy"),
    "distill shards": Reader(
        train.main, f"{DISTILL} 1 --model @toy --data shards --out out", "shards"),
    "resume": Reader(train.main, f"{DISTILL} 2 --model @toy --out run", "run"),
    "encode": Reader(encode.main, f"--videos clips --model @diffusers {CLIP}", "clips"),
    "encode nothing": Reader(encode.main, f"--model @diffusers {CLIP}"),
    "encode prompts": Reader(
        encode.main, f"--captions prompts.txt --model @diffusers {CLIP}", "prompts.txt"),
    "encode jsonl": Reader(
        encode.main, f"--captions captions.jsonl --videos @clips --model @diffusers {CLIP}",
        "captions.jsonl"),
    "encode csv": Reader(
        encode.main, f"--captions captions.csv --videos @clips --model @diffusers {CLIP}",
        "captions.csv"),
    "encode more": Reader(
        encode.main, f"--videos clips --model @diffusers {CLIP} --out encoded", "encoded clips"),
    "measure": Reader(measure.main, "clips", "clips"),
    "export": Reader(export.main, "--model toy --out out", "toy"),
    "export diffusers": Reader(export.main, "--model diffusers --out out", "diffusers"),
    "merge": Reader(export.main, f"--model @toy --lora {ADAPTER} --out out", ADAPTER),
}
