"""The long half of the tests: runs that are killed, disks that fill, files that lie.

    make torture                                  about ten minutes on two cores
    python -m tests.torture --seed 1 --kills 5 --files 200

Runs are killed with -9 at random moments, in the middle of saves too, and must end bit for bit as
those that nobody touched. Malformed files of every kind that the programs read go through their
`main(argv)`, and must end in code 0, or in code 2 and one line. Workers are forks: Linux alone.
"""

import csv
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import imageio.v3 as iio
import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import sample
import train
from adavid import AVDConfig, FrameInterpolator
from runtime import cli, lora
from runtime.checkpoints import list_checkpoints
from runtime.data import write_toy_shards
from tests import miniature_wan
from tiny_wan import WanConfig, WanModel, checkpoint
from tools import encode, export

LIMIT_SECONDS, LIMIT_BYTES = 20, 2e9
STAGES = {
    "distill": (train.main, ["distill", "--model", "toy", "--batch-size", "2", "--steps", "40",
                             "--save-every", "2", "--sample-every", "4", "--device", "cpu"]),
    "teacher": (train.main, ["teacher", "--steps", "60", "--batch-size", "2", "--save-every", "3",
                             "--sample-every", "50", "--score-prompts", "4", "--device", "cpu"]),
    "interpolator": (train.main, ["interpolator", "--steps", "200", "--batch-size", "2", "--width",
                                  "8", "--save-every", "5", "--sample-every", "90", "--device",
                                  "cpu"]),
    "encode": (encode.main, ["--model", "wan", "--videos", "clips", "--frames", "5", "--height",
                             "32", "--width", "48", "--shard-size", "2", "--device", "cpu"]),
}


@dataclass
class Torture:
    """Kill, fill up and feed garbage."""

    seed: int = 0
    """of every moment and every mutation"""
    kills: int = 20
    """of each stage's run"""
    files: int = 2000
    """that are malformed"""
    workers: int = 2
    """at a time"""


def main(argv=None):
    return cli.run(run, Torture, argv)


def run(args):
    torch.set_num_threads(1)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        for stage in STAGES:
            failures += killed(stage, args)
        failures += disk_full()
        failures += malformed(args)
    for failure in failures:
        print("FAILED", failure)
    print(f"seed {args.seed}: {len(failures)} failures")
    return int(bool(failures))


def prepare():
    """A toy teacher and a miniature Wan2.1 with their interpolators, clips, and shards."""
    torch.manual_seed(0)
    toy = WanConfig(32, 64, 2, 1, in_dim=12, out_dim=12, text_dim=15, text_len=8)
    WanModel(toy).init_weights().save_pretrained("toy", metadata={"avd": AVDConfig().to_json()})
    FrameInterpolator(12, width=8).save_pretrained("toy/interpolator.safetensors")
    miniature_wan.make(Path("wan"))
    Path("clips").mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        write_clip(f"clips/{i:02}", rng.integers(0, 255, (6, 32, 48, 3), dtype=np.uint8))
    write_toy_shards(Path("shards"), seed=0, count=8)


def write_clip(name, video):
    """A video and its caption."""
    iio.imwrite(f"{name}.mp4", video, fps=16, codec="libx264", macro_block_size=2)
    Path(f"{name}.txt").write_text(f"clip {name[-2:]}")


# ---------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------


def fork(program, argv, log, limit=None):
    """The process id of `program(argv)`, whose output goes to `log`.

    limit: of bytes that it may write to one file.
    """
    pid = os.fork()
    if pid:
        with suppress(OSError):  # it may have done so itself, or be gone
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)  # so that a kill reaches its helpers, too
        tqdm.set_lock(threading.RLock())  # forks share tqdm's own: who dies with it stops them all
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = program([str(arg) for arg in argv])
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 98)


def ended(pid, seconds=600):
    """Exit code, or minus the signal, and peak bytes; a process that takes longer is killed."""
    until = time.monotonic() + seconds
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            kill_group(pid)
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        if time.monotonic() > until:
            kill_group(pid)
            until += 60
        time.sleep(0.005)


def kill_group(pid):
    """Kill -9, and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------
# Killed at any moment
# ---------------------------------------------------------------------------------------------


def killed(stage, args):
    """Run once to the end, and once more with kills in between: what differs.

    Where that ends before it has been killed often enough, another one begins.
    """
    program, flags = STAGES[stage]
    outs, whole = [Path(f"{stage}-killed-0")], Path(f"{stage}-whole")
    began = time.monotonic()
    code, _ = ended(fork(program, [*flags, "--out", whole], "whole.log"))
    length = time.monotonic() - began
    if code:
        return [f"{stage}: {Path('whole.log').read_text()[-300:]}"]
    random_moment, in_saves, codes = random.Random(f"{args.seed} {stage}"), 0, Counter()
    while codes[-9] < args.kills or not in_saves:
        before = half_written(outs[-1])
        pid = fork(program, [*flags, "--out", outs[-1]], "killed.log")
        if codes.total() % 4 == 3:
            until = time.monotonic() + length
            while half_written(outs[-1]) <= before and time.monotonic() < until:
                time.sleep(0.0005)
        else:
            time.sleep(random_moment.uniform(0, 2.5 * length / args.kills))
        kill_group(pid)
        code, _ = ended(pid)
        codes[code] += 1
        in_saves += code == -9 and not half_written(outs[-1]) <= before
        if code == 0:
            outs.append(Path(f"{stage}-killed-{len(outs)}"))
        elif code != -9 or codes.total() > 10 * args.kills:
            break
    code, _ = ended(fork(program, [*flags, "--out", outs[-1]], "killed.log"))
    print(f"{stage}: killed {codes[-9]} times, {in_saves} of them while it saved")
    if code or codes.keys() - {0, -9} or not in_saves:
        return [f"{stage} after kills: {codes}, {Path('killed.log').read_text()[-300:]}"]
    return [f"{stage}: {problem}" for out in outs for problem in differences(whole, out)]


def half_written(out):
    """What a save is at, or what one that was killed left behind."""
    found = set()
    for part in out.glob("**/*.part"):
        with suppress(FileNotFoundError):
            found.add((part, part.stat().st_ctime_ns))
    return found


def differences(whole, out):
    """Of two runs' files, but for times and for what a header's random order makes of them."""
    if (whole / "checkpoints").exists():
        for run in (whole, out):  # the one whose last save was redone may have kept others
            for folder in list_checkpoints(run)[:-1]:
                shutil.rmtree(folder)
    files = [{file.relative_to(run) for file in run.rglob("*") if file.is_file()}
             for run in (whole, out)]
    if stray := [str(name) for name in files[0] ^ files[1] if name.suffix != ".part"]:
        yield f"files in one alone: {stray}"
    for name in files[0] & files[1]:
        a, b = whole / name, out / name
        if name.suffix == ".safetensors":
            notes = [checkpoint.read_metadata(file) for file in (a, b)]
            if notes[0] != notes[1] and "checkpoints" not in name.parts:  # these tell of the order
                yield f"metadata of {name}"
            a, b = load_file(a), load_file(b)
            if a.keys() != b.keys() or any(not torch.equal(a[key], b[key]) for key in a):
                yield f"tensors of {name}"
        elif name.name not in ("times.jsonl", "checksums-0.json"):
            if a.read_bytes() != b.read_bytes():
                yield f"{name}"


def disk_full():
    """A limit on the size of files stands in for a full disk."""
    program, flags = STAGES["distill"]
    out, log = Path("full"), Path("full.log")
    code, _ = ended(fork(program, [*flags, "--steps", "4", "--out", out], log))
    size = max(file.stat().st_size for file in out.glob("checkpoints/*/*"))
    metrics = (out / "metrics.jsonl").read_bytes()
    for limit in (size // 2, len(metrics) + 100, size // 100):
        code, _ = ended(fork(program, [*flags, "--out", out], log, limit))
        *_, last = log.read_text().splitlines()
        if code != 2 or "error: full/" not in last or os.strerror(errno.EFBIG) not in last:
            yield f"a full disk, after {limit} bytes: code {code}, {last}"
    program_2, flags_2 = STAGES["encode"]
    code, _ = ended(fork(program_2, [*flags_2, "--out", "full-encode"], log, 1000))
    if code != 2 or "Traceback" in log.read_text():
        yield f"a full disk while encoding: code {code}, {log.read_text()[-500:]}"
    code, _ = ended(fork(program, [*flags, "--out", out], log))
    yield from (f"after a full disk: {problem}" for problem in (
        [f"code {code}"] if code else differences(Path("distill-whole"), out)))
    print("disk full: three times, and then to the end")


# ---------------------------------------------------------------------------------------------
# Files that lie
# ---------------------------------------------------------------------------------------------


def damaged_bytes(content, rng):
    """Cut, flipped, overwritten, or something else altogether."""
    content, size = bytearray(content), max(1, len(content))
    way = rng.randrange(8)
    if way == 0:
        return content[:rng.randrange(size)]
    if way == 1:
        for _ in range(rng.choice((1, 8, 64))):
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return content
    if way == 2:  # where headers are
        for _ in range(rng.choice((1, 8))):
            content[rng.randrange(min(size, 256))] = rng.randrange(256)
        return content
    if way == 3:
        start = rng.randrange(size)
        content[start:start + rng.randrange(1, 4096)] = bytes(rng.randrange(1, 4096))
        return content
    if way == 4:
        return content + bytes(rng.randrange(1, 4096))
    if way == 5:
        return rng.randbytes(rng.randrange(4096))
    if way == 6:
        return bytes(rng.choice((0, 1, 8, 100)))
    start, end = sorted(rng.randrange(size) for _ in range(2))
    return content[:start] + content[end:]


def damaged_safetensors(content, rng):
    """Headers that promise too much, wrong types and shapes, and numbers that are none."""
    way = rng.randrange(8)
    if way < 2:
        return damaged_bytes(content, rng)
    if way == 2:
        return rng.choice((2**63, 2**40, 99_000_000, 3)).to_bytes(8, "little") + content[8:]
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:8 + length]), content[8 + length:]
    name = rng.choice([key for key in header if key != "__metadata__"])
    if way == 3:
        header[name]["dtype"] = rng.choice(
            ("F16", "BF16", "F64", "I16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X"))
    elif way == 4:
        header[name]["shape"] = rng.choice(([], [0], [2**62, 4], [-1], "x", [1.5], [2**31] * 3,
                                              [*header[name]["shape"][:-1], 0]))
    elif way == 5:
        header[name]["data_offsets"] = rng.choice(([0, 2**62], [-4, 0], [8, 0], [0], "x"))
    elif way == 6:
        if rng.random() < 0.5:
            header[rng.choice(("", "x" * 100_000, "../x"))] = header.pop(name)
        else:
            metadata = header.setdefault("__metadata__", {})
            metadata[rng.choice((*metadata, "avd", "prompts"))] = rng.choice((
                "{", "[" * 100_000, '{"k": "x"}', '{"timesteps": []}', '{"lr": 1e999}', "null", ""))
    else:
        start, end = header[name]["data_offsets"]
        number = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff"))
        body = body[:start] + (number * (end - start))[:end - start] + body[end:]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


ODD = (None, -1, 0, 1, 2**70, 1e308, "", "x", "../../etc/passwd", "\0", "\ud800", [], {}, [[]],
       True, "x" * 100_000, [0] * 1000, {"a": {"b": []}})


def damaged_json(content, rng):
    """Any value in any place becomes another, or the text itself is damaged."""
    way = rng.randrange(6)
    if way == 0:
        return damaged_bytes(content, rng)
    if way == 1:
        return rng.choice((b"[" * 200_000, b"null", b"3", b'"x"', b"[]", b"{}", b"NaN", b"",
                           b"\xff\xfe", b"\xef\xbb\xbf" + content,
                           content.decode().encode("utf-16")))
    value = json.loads(content)
    here, parents = value, []
    while isinstance(here, (dict, list)) and here and (not parents or rng.random() < 0.8):
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        parents.append((here, key))
        here = here[key]
    holder, key = parents[-1]
    if way == 2:
        del holder[key]
    else:
        holder[key] = rng.choice(ODD)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damaged_text(content, rng):
    """Prompts and captions as people paste them, and as nobody does."""
    return rng.choice((
        lambda: damaged_bytes(content, rng),
        lambda: b"x" * 10_000_000,
        lambda: b"a ball\n" * 3 + rng.randbytes(1000),
        lambda: content.decode().encode("utf-16"),
        lambda: content.decode().encode("latin-1") + b"caf\xe9",
        lambda: "\n".join(["../../../tmp/x", "/etc/passwd", "-rf", "a/b\\c", "\u202e.mp4", "..",
                           "x" * 500, "\U0001f408" * 200, "CON", ".", "a\tb\x07c", "a  ball",
                           "a ball"]).encode(),
        lambda: b"\n\n \n", lambda: b"\0" * 1000, lambda: content * 50))()


def damaged_lines(content, rng):
    """A jsonl or csv of captions."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.5:
        lines[at] = damaged_text(lines[at], rng)
    else:
        lines[at] = rng.choice((
            b'{"video": "../../etc/passwd", "caption": "x"}', b'{"video": 3, "caption": 4}', b"[]",
            b'{"video": "00.mp4"}', b'{"video": "00.mp4", "caption": null}', b'"' * 1001, b",,,,",
            b'{"video": "/etc/passwd", "caption": "x"}', lines[0], b"[" * 100_000,
            b'{"video": "\\u0000", "caption": "\\ud800"}',
            b'{"video": "' + b"x" * 5000 + b'", "caption": "y"}'))
    return b"\n".join(lines)


def readers():
    """Of each kind of file: an example, how it is damaged, and the program that reads it."""
    shutil.rmtree("clips"), Path("clips").mkdir()
    for i in range(4):
        write_clip(f"clips/{i:02}", np.full((6, 32, 48, 3), 40 * i, np.uint8))
    toy = ["a red ball", "--model", "model", "--out", "out", "--device", "cpu"]
    distill = ["distill", "--out", "out", "--device", "cpu", "--batch-size", "1", "--steps", "1",
               "--critic-updates", "1"]
    size = ["--out", "out", "--device", "cpu", "--frames", "5", "--height", "32", "--width", "48"]
    clips = [*size, "--model", "wan", "--videos", "clips"]
    whole = [*size, "--model", Path("wan").resolve()]
    captions = [{"video": f"{i:02}.mp4", "caption": f"clip {i}"} for i in range(4)]
    Path("captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    with open("captions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["video", "caption"])
        writer.writeheader(), writer.writerows(captions)
    Path("prompts.txt").write_text("a red ball\na blue ball moving left\n")
    run = [*distill, "--model", Path("toy").resolve()]  # the same from every folder
    for program, flags, there in ((train.main, run, "run"),
                                  (train.main, [*run, "--lora", "2"], "adapter"),
                                  (encode.main, [*whole, "--videos", "clips"], "encoded")):
        code, _ = ended(fork(program, flags, "log"))
        if code:
            raise ChildProcessError(Path("log").read_text())
        shutil.move("out", there)
    miniature_wan.make(Path("original").absolute(), "original")
    with patch.object(checkpoint, "SHARD_BYTES", 50_000):
        WanModel.from_pretrained("toy").save_pretrained("sharded")
    name = checkpoint.FILE
    return {
        # what: (files in the working folder, the damaged one, its damage, program, flags)
        "weights": (["toy:model"], f"model/{name}", damaged_safetensors, sample.main, toy),
        "weights' index": (["sharded:model"], f"model/{name}.index.json", damaged_json, sample.main,
                           toy),
        "adapter": (["toy", "adapter"], "adapter/*.safetensors", damaged_safetensors, export.main,
                    ["--model", "toy", "--lora", f"adapter/{lora.FILE}", "--out", "out"]),
        "weights to train": (["toy:model"], f"model/{name}", damaged_safetensors, train.main,
                             [*distill, "--model", "model"]),
        "weights to export": (["toy:model"], f"model/{name}", damaged_safetensors, export.main,
                              ["--model", "model", "--out", "out", "--layout", "diffusers"]),
        "config.json": (["toy:model"], "model/config.json", damaged_json, sample.main, toy),
        "interpolator": (["toy:model"], "model/interpolator.safetensors", damaged_safetensors,
                         sample.main, toy),
        "shard": (["shards"], "shards/shard.safetensors", damaged_safetensors, train.main,
                  [*run, "--data", "shards"]),
        "null text": (["shards"], "shards/null_text.safetensors", damaged_safetensors,
                      train.main, [*run, "--data", "shards"]),
        "index": (["shards"], "shards/index.json", damaged_json, train.main,
                  [*run, "--data", "shards"]),
        "checkpoint": (["run:out"], "out/checkpoints/000001/*.safetensors", damaged_bytes,
                       train.main, [*run, "--steps", "2"]),
        "state": (["run:out"], "out/checkpoints/000001/state.json", damaged_json,
                  train.main, [*run, "--steps", "2"]),
        "checksums": (["run:out"], "out/checkpoints/000001/checksums-0.json", damaged_json,
                      train.main, [*run, "--steps", "2"]),
        "metrics": (["run:out"], "out/metrics.jsonl", damaged_bytes, train.main,
                    [*run, "--steps", "2"]),
        "times": (["run:out"], "out/times.jsonl", damaged_bytes, train.main,
                  [*run, "--steps", "2"]),
        "prompts": (["toy:model", "prompts.txt"], "prompts.txt", damaged_text, sample.main,
                    [*toy[1:], "--prompts-file", "prompts.txt"]),
        "captions.jsonl": (["wan", "clips", "captions.jsonl"], "captions.jsonl", damaged_lines,
                           encode.main, [*clips, "--captions", "captions.jsonl"]),
        "captions.csv": (["wan", "clips", "captions.csv"], "captions.csv", damaged_lines,
                         encode.main, [*clips, "--captions", "captions.csv"]),
        "captions.txt": (["prompts.txt"], "prompts.txt", damaged_text, encode.main,
                         [*whole, "--captions", "prompts.txt"]),
        "what is encoded": (["clips", "encoded:out"], "out/shard-*.safetensors",
                            damaged_safetensors, encode.main, [*whole, "--videos", "clips"]),
        "a caption": (["wan", "clips"], "clips/00.txt", damaged_text, encode.main, clips),
        "video": (["wan", "clips"], "clips/00.mp4", damaged_bytes, encode.main, clips),
        "Wan's config.json": (["wan"], "wan/transformer/config.json", damaged_json, encode.main,
                              [*size, "--model", "wan", "--captions", "../prompts.txt"]),
        "Wan's VAE.pth": (["original:wan", "clips"], "wan/*VAE.pth", damaged_bytes, encode.main,
                          clips),
        "Wan's text encoder": (["original:wan", "clips"], "wan/*t5*.pth", damaged_bytes,
                               encode.main, clips),
        "Wan's tokenizer": (["wan", "clips"], "wan/tokenizer/tokenizer.json", damaged_json,
                            encode.main, clips),
        "Wan's VAE": (["wan", "clips"], "wan/vae/*.safetensors", damaged_safetensors, encode.main,
                      clips),
    }


NAMED = {  # what a complaint may name in place of the damaged file: a folder, a value, a list
    "weights' index": r"model: tensor", "config.json": r"num_heads|text_len",
    "Wan's config.json": r"num_heads|text_len|has no place", "null text": r"shard\.safetensors",
    "index": r"shards", "checksums": r"000001", "prompts": r"prompt '|prompt \"",
    "captions.jsonl": r"skipped\.jsonl", "captions.csv": r"skipped\.jsonl",
    "what is encoded": r"of its samples", "Wan's tokenizer": r"wan/tokenizer",
    "Wan's VAE": r"wan/vae",
}


def malformed(args):
    """`args.files` of them, spread over the readers: what went wrong, and a summary."""
    kinds, root = readers(), Path.cwd()
    outcomes, failures, worst = {kind: Counter() for kind in kinds}, [], 0

    def begin(number):
        kind = list(kinds)[number % len(kinds)]
        there, target, damage, program, flags = kinds[kind]
        folder = root / f"case-{number}"
        folder.mkdir()
        for name in there:
            source, _, name = name.partition(":")
            source = root / source
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / (name or source.name))
        file, *_ = folder.glob(target)
        file.write_bytes(damage(file.read_bytes(), random.Random(f"{args.seed} {number}")))

        def program_there(argv):
            os.chdir(folder)
            return program(argv)

        pid = fork(program_there, flags, folder / "log")
        return number, kind, folder, file.name, pid, time.monotonic()

    def end(number, kind, folder, name, pid, began):
        code, peak = ended(pid, LIMIT_SECONDS)
        seconds, said = time.monotonic() - began, (folder / "log").read_text(errors="replace")
        errors = [line for line in re.split("[\r\n]", said) if "error: " in line]
        problem = ("traceback" if "Traceback" in said else "hang" if seconds > LIMIT_SECONDS
                   else f"code {code}" if code not in (0, 2) else "memory" if peak > LIMIT_BYTES
                   else "no line" if code == 2 and len(errors) != 1
                   else "no name" if code == 2 and name not in errors[0]
                   and not re.search(NAMED.get(kind, "^$"), errors[0]) else None)
        if problem:
            failures.append(f"{kind}, file {number}: {problem}: {said[-1500:]}")
        shutil.rmtree(folder)
        return kind, problem or f"code {code}", peak

    numbers, running = iter(tqdm(range(args.files), "files")), deque()
    with ThreadPoolExecutor(args.workers) as pool:  # they only wait: a fork inherits held locks
        while True:
            for number in islice(numbers, args.workers - len(running)):
                running.append(pool.submit(end, *begin(number)))
            if not running:
                break
            kind, outcome, peak = running.popleft().result()
            outcomes[kind][outcome] += 1
            worst = max(worst, peak)
    for kind, counts in outcomes.items():
        print(f"{kind}: " + ", ".join(f"{n} x {outcome}" for outcome, n in counts.items()))
    print(f"{args.files} malformed files, at most {worst / 1e6:.0f} MB")
    return failures


if __name__ == "__main__":
    sys.exit(main())
