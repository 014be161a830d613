"""Kill runs, fill the disk, feed damaged files to every reader, and cut the power.

    make torture                                  about 15 minutes on two cores
    make torture-ranks                            kills one of two ranks, in about 15 minutes
    python -m tests.torture --seed 1 --kills 5 --files 200

A run that is killed with -9 at random moments, also while it saves, must end bit for bit like one
that nobody touched. A damaged file must end its reader with code 0, or with code 2 and one line
that names the file, its folder or the value. Runs and readers are forks, so Linux only.
power_loss.py describes the power cuts.
"""

import errno
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed import run as torchrun
from tqdm import tqdm

import train
from runtime import cli
from runtime.checkpoints import find_damage, list_checkpoints
from tests.helpers import MAKERS, ROOT, Inputs, write_clips
from tests.torture import power_loss
from tests.torture.random_numbers import try_numbers
from tests.torture.readers import READERS
from tiny_wan import checkpoint
from tools import encode

LIMIT_SECONDS, LIMIT_BYTES = 20, 2e9
STAGES = {
    "distill": (train.main, "distill --model toy --batch-size 2 --steps 40 --save-every 2 "
                            "--sample-every 4 --device cpu"),
    "encode": (encode.main, "--model diffusers --videos many --frames 9 --height 32 --width 48 "
                            "--shard-size 2 --device cpu"),
    "ranks": (lambda argv: torchrun.main(argv) or 0,
              f"--nproc_per_node 2 --max-restarts 1000 {shlex.quote(str(ROOT / 'train.py'))} "
              "distill --model toy --batch-size 1 --critic-updates 2 --steps 20 --save-every 2 "
              "--sample-every 4 --device cpu"),
}
STARTS = {
    "train.py": STAGES["distill"][1],
    "sample.py": "'a red ball' --model toy --teacher --steps 1000 --device cpu",
}


@dataclass
class Torture:
    """Kill runs, fill the disk, feed damaged files to every reader, and cut the power."""

    seed: int = 0
    """of all random moments and damages"""
    kills: int = 20
    """how often to kill each stage's run"""
    signals: int = 12
    """how often to interrupt each program while it starts"""
    numbers: int = 1000
    """how often to train with random numbers in the flags"""
    files: int = 800
    """how many damaged files to read"""
    ranks: bool = False
    """instead of all this, kill one of two ranks again and again"""


def main(argv=None):
    return cli.run(run, Torture, argv)


def run(args):
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)  # or each fork would print what is in the buffer
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also when started in the background
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        inputs = make_inputs(folder)
        if args.ranks:
            failures += kill_ranks(args)
        else:
            failures += kill("distill", args) + kill("encode", args)
            failures += start_twice()
            for program in STARTS:
                failures += interrupt(program, args)
            failures += fill_disk()
            failures += try_all_numbers(args, inputs)
            failures += damage_files(args, inputs)
            failures += power_loss.check(Path(folder), args.seed)  # last, as it may leave threads
    for failure in failures:
        print("FAILED", failure)
    print(f"seed {args.seed}: {len(failures)} failures")
    return int(bool(failures))


def make_inputs(folder):
    """All small inputs, and more clips. In a fork, as threads that stay could block later forks."""
    inputs = Inputs(folder)

    def make_all(_):
        for name in MAKERS:
            inputs[name]
        write_clips(Path("many"), 24)
        return 0

    code, _ = wait(fork(make_all, [], "log"))
    if code:
        raise ChildProcessError(Path("log").read_text())
    return inputs


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


def fork(program, argv, log, limit=None):
    """Start `program(argv)` with its output in `log`; the process's id.

    limit: how many bytes it may write to one file.
    """
    pid = os.fork()
    if pid:
        with suppress(OSError):  # the child may have done this already, or have ended
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)  # so that a kill also reaches the processes that it starts
        tqdm.set_lock(threading.RLock())  # forks share tqdm's own: one that dies with it stops all
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = program([str(arg) for arg in argv])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 99
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 98)


def start(stage, out, log, *flags, limit=None):
    """Start a stage's run, or resume it."""
    program, stage_flags = STAGES[stage]
    return fork(program, [*shlex.split(stage_flags), "--out", out, *flags], log, limit)


def wait(pid, seconds=600):
    """The exit code, or minus the signal, and the peak memory in bytes. Kills after `seconds`."""
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
    """Kill a process and those that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------
# Kills at any moment
# ---------------------------------------------------------------------------------------------


def kill(stage, args):
    """Run a stage to the end, and run it again with kills in between: what differs.

    If that run ends before it has been killed often enough, another one begins.
    """
    outs, whole = [Path(f"{stage}-killed-0")], Path(f"{stage}-whole")
    began = time.monotonic()
    code, _ = wait(start(stage, whole, "whole.log"))
    length = time.monotonic() - began
    if code:
        return [f"{stage}: {Path('whole.log').read_text()[-300:]}"]
    random_moment, in_saves, codes = random.Random(f"{args.seed} {stage}"), 0, Counter()
    while codes[-9] < args.kills or not in_saves:
        before = half_written(outs[-1])
        pid = start(stage, outs[-1], "killed.log")
        if codes.total() % 4 == 3:
            until = time.monotonic() + length
            while half_written(outs[-1]) <= before and time.monotonic() < until:
                time.sleep(0.0005)
        else:
            time.sleep(random_moment.uniform(0, 2.5 * length / args.kills))
        kill_group(pid)
        code, _ = wait(pid)
        codes[code] += 1
        in_saves += code == -9 and not half_written(outs[-1]) <= before
        if code == 0:
            outs.append(Path(f"{stage}-killed-{len(outs)}"))
        elif code != -9 or codes.total() > 10 * args.kills:
            break
    code, _ = wait(start(stage, outs[-1], "killed.log"))
    print(f"{stage}: killed {codes[-9]} times, {in_saves} of them while it saved")
    if code or codes.keys() - {0, -9} or not in_saves:
        return [f"{stage} after kills: {codes}, {Path('killed.log').read_text()[-300:]}"]
    return [f"{stage}: {problem}" for out in outs for problem in differences(whole, out)]


def kill_ranks(args):
    """Run two ranks to the end, and again while one of them is killed now and then: what differs.

    torchrun restarts both. If the run ends before it has had enough kills, another one begins.
    """
    outs, whole = [], Path("ranks-whole")
    began = time.monotonic()
    code, _ = wait(start("ranks", whole, "whole.log"))
    length = time.monotonic() - began
    if code:
        return [f"ranks: {Path('whole.log').read_text()[-1000:]}"]
    rng, kills, in_saves, slowest = random.Random(args.seed), 0, 0, 0
    while kills < args.kills or in_saves < args.kills / 4:
        outs.append(out := Path(f"ranks-killed-{len(outs)}"))
        pid = start("ranks", out, "killed.log")
        ranks = new_ranks(pid)
        while ranks and (kills < args.kills or in_saves < args.kills / 4):
            before, until = half_written(out), time.monotonic() + rng.uniform(0, length / 2)
            while time.monotonic() < until and ranks == children(pid):
                time.sleep(0.01)
            while kills % 2 and half_written(out) <= before and ranks == children(pid):
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.1))
            if ranks == children(pid):
                os.kill(rng.choice(sorted(ranks)), signal.SIGKILL)
                began, saving = time.monotonic(), not half_written(out) <= before
                ranks = new_ranks(pid, ranks)
                slowest = max(slowest, time.monotonic() - began)
                kills, in_saves = kills + bool(ranks), in_saves + bool(ranks and saving)
            else:
                ranks = set()
        code, _ = wait(pid)
        if code:
            return [f"ranks, after {kills} kills: code {code}, "
                    f"{Path('killed.log').read_text()[-3000:]}"]
    print(f"ranks: killed one of two {kills} times, {in_saves} of them while they saved, in "
          f"{len(outs)} runs; both ran again within {slowest:.0f} seconds")
    return [f"ranks: {problem}" for out in outs for problem in differences(whole, out)] + (
        ["ranks: slow to restart"] if slowest > 60 else [])


def children(pid):
    """The processes that a process has started and not yet waited for."""
    with suppress(FileNotFoundError):
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return set()


def new_ranks(pid, old=frozenset()):
    """Wait until torchrun has started two ranks that are not the old ones: their ids.

    Or until it has ended: an empty set.
    """
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if len(ranks := children(pid)) == 2 and ranks.isdisjoint(old):
            return ranks
        time.sleep(0.01)
    return set()


def half_written(out):
    """The unfinished files of a save, which may be going on or may have been killed."""
    found = set()
    with suppress(FileNotFoundError):  # it may get its name meanwhile
        for part in out.glob("**/*.part"):
            found.add((part, part.stat().st_ctime_ns))
    return found


def differences(whole, out):
    """Compare two runs' files, except for times and for the random order within headers."""
    if (whole / "checkpoints").exists():
        for run in (whole, out):  # a run that repeated its last save may have kept others
            for folder in list_checkpoints(run)[:-1]:
                shutil.rmtree(folder)
    files = [{file.relative_to(run) for file in run.rglob("*") if file.is_file()}
             for run in (whole, out)]
    if stray := [str(name) for name in files[0] ^ files[1] if name.suffix != ".part"]:
        yield f"files in one alone: {stray}"
    for name in files[0] & files[1]:
        a, b = whole / name, out / name
        if name.suffix == ".safetensors":
            if ("checkpoints" not in name.parts  # those have random order, and may have no elements
                    and checkpoint.read_metadata(a) != checkpoint.read_metadata(b)):
                yield f"metadata of {name}"
            a, b = load_file(a), load_file(b)
            if a.keys() != b.keys() or any(not torch.equal(a[key], b[key]) for key in a):
                yield f"tensors of {name}"
        elif not re.match(r"times|checksums", name.name) and a.read_bytes() != b.read_bytes():
            yield f"{name}"


def start_twice():
    """Start two runs at the same moment on one folder: what goes wrong."""
    wait(start("distill", "once", "once.log", "--steps", 8))
    for number in range(3):
        out, logs = Path(f"twice-{number}"), [Path(f"twice-{i}.log") for i in range(2)]
        pids = [start("distill", out, log, "--steps", 8) for log in logs]
        (first, _), (second, said) = sorted((wait(pid)[0], log.read_text())
                                            for pid, log in zip(pids, logs))
        if (first, second, said.count("\n")) != (0, 2, 1) or "another process" not in said:
            yield f"two runs on one folder: codes {first} and {second}, {said[-500:]}"
        yield from (f"two runs on one folder: {problem}"
                    for problem in differences(Path("once"), out))
    print("two runs on one folder: three times")


def interrupt(program, args):
    """Send SIGINT or SIGTERM to a program before its first step has ended: what goes wrong."""
    rng, codes, log = random.Random(f"{args.seed} {program}"), Counter(), Path("interrupted.log")

    def begin(out):
        command = [sys.executable, ROOT / program, *shlex.split(STARTS[program]), "--out", out]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(log, "w") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=one_thread)

    began, process = time.monotonic(), begin(f"{program}-whole")
    while process.poll() is None and not re.search(r" [1-9]\d*/\d+ \[", log.read_text()):
        time.sleep(0.01)
    length = time.monotonic() - began
    process.kill(), process.wait()
    for number in range(args.signals):
        out, moment = Path(f"{program}-{number}"), rng.uniform(0, length)
        process = begin(out)
        time.sleep(moment)
        process.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM)))
        try:
            code = process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill(), process.wait()
            code = "hang"
        codes[code] += 1
        said, saves = log.read_text(), list_checkpoints(out)
        left = [str(file) for file in out.rglob("*") if file.is_file() and file.stat().st_size]
        importing = said.endswith("KeyboardInterrupt\n") and re.search(r"\n +(from|import) ", said)
        if (code not in (0, 130, 143, -signal.SIGINT, -signal.SIGTERM)
                or "Traceback" in said and not importing
                or code and left and (not saves or any(map(find_damage, saves)))
                or any(".part" in file for file in left)):
            yield f"{program} after {moment:.2f} seconds: code {code}, left {left}, {said[-2000:]}"
    print(f"{program}: interrupted {args.signals} times in its first {length:.1f} seconds, "
          f"codes {', '.join(f'{n} x {code}' for code, n in codes.items())}")


def fill_disk():
    """Limit the size of files, which stands in for a full disk: what goes wrong."""
    out, log = Path("full"), Path("full.log")
    wait(start("distill", out, log, "--steps", 4))
    size = max(file.stat().st_size for file in out.glob("checkpoints/*/*"))
    for limit in (size // 2, (out / "metrics.jsonl").stat().st_size + 100, size // 100):
        code, _ = wait(start("distill", out, log, limit=limit))
        *_, last = log.read_text().splitlines()
        if code != 2 or "error: full/" not in last or os.strerror(errno.EFBIG) not in last:
            yield f"a full disk, after {limit} bytes: code {code}, {last}"
    code, _ = wait(start("distill", out, log))
    yield from (f"after a full disk: {problem}" for problem in (
        [f"code {code}"] if code else differences(Path("distill-whole"), out)))

    code, _ = wait(start("encode", "full-encode", log, limit=1000))
    if code != 2 or "Traceback" in log.read_text():
        yield f"a full disk while encoding: code {code}, {log.read_text()[-500:]}"
    print("disk full: three times while training, then to the end; once while encoding")


def try_all_numbers(args, inputs):
    """Train a step with random numbers in the flags, many times: what went wrong."""
    model, codes = inputs["toy"], Counter()

    def try_one(argv):
        flags, code, problem = try_numbers(random.Random(f"{args.seed} {number}"), model, out)
        print(f"{flags}: {problem}") if problem else None
        return 97 if problem else code

    for number in tqdm(range(args.numbers), "numbers"):
        out = Path(f"numbers-{number}")
        code, _ = wait(fork(try_one, [], "log"), seconds=60)
        codes[code] += 1
        if code not in (0, 2):
            yield f"numbers {number}: code {code}, {Path('log').read_text()[-800:]}"
        shutil.rmtree(out, ignore_errors=True)
    print(f"{args.numbers} times random numbers: {codes[0]} runs, {codes[2]} complaints")


# ---------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------


def damage_bytes(content, rng):
    """Cut, overwrite, lengthen, shorten, replace or flip bytes."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    run = bytes([rng.choice((0, 255))]) * rng.randrange(1, 4096)  # 255s make a float NaN
    return rng.choice((
        lambda: content[:start],
        lambda: content[:start] + run + content[start + len(run):],
        lambda: content + run,
        lambda: content[:start] + content[end:],
        lambda: rng.randbytes(rng.randrange(4096)),
        lambda: bytes(rng.choice((0, 1, 8, 100))),
        lambda: flip_bits(content, len(content), rng),
        lambda: flip_bits(content, min(len(content), 256), rng)))()  # where headers are


def flip_bits(content, size, rng):
    content = bytearray(content)
    for _ in range(rng.choice((1, 8, 64)) if size else 0):
        content[rng.randrange(size)] ^= 1 << rng.randrange(8)
    return bytes(content)


ODD = (None, -1, 0, 1, 2**70, 1e308, "", "x", "../../etc/passwd", "\0", "\ud800", [], {}, [[]],
       True, "x" * 100_000, [0] * 1000, {"a": {"b": []}},
       "F16", "I32", "I64", "BOOL", "F8_E4M3", [0], [-1], [1.5], [2**62, 4], [8, 0],
       "{", "[" * 100_000, '{"k": "x"}', '{"timesteps": []}', '{"lr": 1e999}', "null")


def damage_json(content, rng):
    """Replace, delete or rename a value at any depth, or damage the text."""
    if rng.random() < 0.3:
        return rng.choice((
            b"[" * 200_000, b"null", b"3", b'"x"', b"[]", b"{}", b"NaN", b"", b"\xff\xfe",
            b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"),
            damage_bytes(content, rng)))
    value = here = json.loads(content)
    while isinstance(here, (dict, list)) and here:
        holder, key = here, rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = here[key]
        if rng.random() < 0.2:
            break
    way = rng.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x" * 100_000, "../x"))] = holder.pop(key)
    else:
        holder[key] = rng.choice(ODD)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damage_safetensors(content, rng):
    """Damage the header, which is JSON, or its length, or any bytes."""
    size = int.from_bytes(content[:8], "little")
    header, body = content[8:8 + size], content[8 + size:]
    way = rng.randrange(8)
    if way < 2:
        return damage_bytes(content, rng)
    if way == 2:
        return rng.choice((2**63, 2**40, 99_000_000, 3)).to_bytes(8, "little") + header + body
    header = damage_json(header, rng)
    return len(header).to_bytes(8, "little") + header + body


def damage_lines(content, rng):
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damage_json(lines[at], rng)
    return b"\n".join(lines)


DAMAGES = {".safetensors": damage_safetensors, ".json": damage_json, ".jsonl": damage_lines}
# What a complaint may name in place of the damaged file and its folders.
VALUES = r"num_heads|text_len|prompt ['\"]|skipped\.jsonl"


def damage_files(args, inputs):
    """Read `args.files` damaged files: what went wrong."""
    outcomes, failures, worst = defaultdict(Counter), [], 0
    numbers, running = iter(tqdm(range(args.files), "files")), deque()
    while True:
        while len(running) < 2 and (number := next(numbers, None)) is not None:
            running.append(start_reading(args.seed, number, inputs))
        if not running:
            break
        reader, folder, file, began, pid = running.popleft()
        code, peak = wait(pid, began + LIMIT_SECONDS - time.monotonic())
        said = (folder / "log").read_text(errors="replace")
        problem = judge(file.relative_to(folder), code, peak, said)
        if problem:
            failures.append(f"{reader}, {file}: {problem}: {said[-1500:]}")
        outcomes[reader][problem or f"code {code}"] += 1
        worst = max(worst, peak)
        shutil.rmtree(folder)
    for reader, counts in outcomes.items():
        print(f"{reader}: " + ", ".join(f"{n} x {outcome}" for outcome, n in counts.items()))
    print(f"{args.files} damaged files, at most {worst / 1e6:.0f} MB")
    return failures


def start_reading(seed, number, inputs):
    """Start a reader in a folder of its own, where one of its files is damaged."""
    rng, readers = random.Random(f"{seed} {number}"), [r for r in READERS if READERS[r].reads]
    reader = readers[number % len(readers)]
    folder = Path(f"file-{number}").resolve()
    folder.mkdir()
    argv = READERS[reader].prepare(inputs, folder)
    file = rng.choice(sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size))
    file.write_bytes(DAMAGES.get(file.suffix, damage_bytes)(file.read_bytes(), rng))

    def read(argv):
        os.chdir(folder)
        return READERS[reader].program(argv)

    return reader, folder, file, time.monotonic(), fork(read, argv, folder / "log")


def judge(file, code, peak, said):
    """What is wrong with the way in which a reader ended, or None."""
    errors = [line for line in re.split("[\r\n]", said) if "error: " in line]
    if "Traceback" in said:
        return "traceback"
    if code == -signal.SIGKILL:
        return "hang"
    if code not in (0, 2):
        return f"code {code}"
    if peak > LIMIT_BYTES:
        return "memory"
    if code == 2 and len(errors) != 1:
        return "no line"
    if code == 2 and not any(part in errors[0] for part in file.parts) and not re.search(
            VALUES, errors[0]):
        return "no name"
    return None


if __name__ == "__main__":
    sys.exit(main())
