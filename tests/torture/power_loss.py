"""Cut the power, or let the disk fail, at every file operation of a run that saves.

The operations of a tiny run are recorded, of one process or of two ranks. The power may be cut
after any of them. Then a file holds what it held at its last fsync, and a folder has the names that
it had at its own last fsync; of what came later the disk has all, some or nothing. A run that
resumes there must find the last checkpoint that was published, or a newer one. Linux only.

    python -m tests.torture.power_loss FOLDER    records a run, also under torchrun
"""

import _pyio
import builtins
import errno
import io
import json
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import train
from runtime.checkpoints import Checkpointer, find_damage, list_checkpoints, named_tensors
from runtime.distributed import full_tensor, init_distributed, rank, world_size
from runtime.run import Run
from tests.helpers import equal, torchrun

OUT = Path("runs/out")  # on a disk that is empty before the run
STEPS, SAVE_EVERY, KEEP = 6, 2, 2
BEFORE = STEPS - SAVE_EVERY  # the step of the last checkpoint but one


def check(folder, seed):
    """Cut the power and let the disk fail: what went wrong."""
    for ranks in (1, 2):
        yield from cut_power(folder / f"power-{ranks}", ranks, seed)
    for error in (errno.ENOSPC, errno.EIO):
        yield from fail_disk(folder / f"disk-{error}", error)


# ---------------------------------------------------------------------------------------------
# A tiny run
# ---------------------------------------------------------------------------------------------


def make_state():
    """A model with a buffer, and its optimizer, split over the ranks."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    model.register_buffer("means", torch.zeros(4))
    if world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}


def flags(disk):
    return train.Interpolator(disk / OUT, steps=STEPS, batch_size=2 // world_size(),
                              save_every=SAVE_EVERY, keep=KEEP)


def go_on(disk, copies=None, until=STEPS):
    """Start a run or resume it. The tensors of each checkpoint also go to the folder `copies`.

    If it ends before its last step, its last log lines have no checkpoint.
    """
    state = make_state()
    model, optimizer = state.values()
    with redirect_stderr(io.StringIO()), Run(flags(disk), state) as run:  # the progress bar
        for step in run.steps():
            for p in model.parameters():
                p.grad = torch.full_like(p, step + 1)
            optimizer.step()
            model.means += step
            run.log(step, {"loss": 1 / (step + 1)})
            if step + 1 == until < STEPS:
                return run.checkpointer.wait()
            if copies and (step + 1) % SAVE_EVERY == 0:
                tensors = {name: full_tensor(t) for name, t in named_tensors(state).items()}
                if rank() == 0:
                    save_file(tensors, copies / f"{step + 1}.safetensors")
            run.save(step)


def load_copies(folder):
    """{step: tensors} of all that a run may resume from."""
    copies = {step: load_file(folder / f"{step}.safetensors")
              for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)}
    return {0: named_tensors(make_state())} | copies


def resume(disk, copies, least):
    """Resume a run: its step, and what is wrong or None. `least` is the step that it must reach."""
    state, said = make_state(), io.StringIO()
    try:
        with redirect_stdout(said):
            step = Run(flags(disk), state).start
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    if step < least:
        return step, f"resumed at step {step}, but {least} was published"
    if not equal(named_tensors(state), copies[step]):
        return step, f"the tensors of step {step} are not those that were saved"
    return step, said.getvalue() or None  # as it says if a checkpoint is damaged


def finish(disk, copies):
    """Resume a run, and let it go on to its end: what is wrong then or None."""
    go_on(disk)
    return resume(disk, copies, STEPS)[1]


# ---------------------------------------------------------------------------------------------
# Its operations
# ---------------------------------------------------------------------------------------------

CALLS = "open", "write", "ftruncate", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"
MAKES, EMPTIES = os.O_CREAT, os.O_TRUNC  # what opening a file can do to it


def path_of(file, dir_fd=None):
    """The path of a file that is given to a function of `os` by its descriptor or its name."""
    if isinstance(file, int):
        return Path(os.readlink(f"/proc/self/fd/{file}"))
    return Path(os.getcwd() if dir_fd is None else path_of(dir_fd), file)


def details_of(call, file, args):
    if call == "open":
        return [args[0] & (MAKES | EMPTIES)]
    if call == "write":  # what appends to a file has moved to its end
        return [os.lseek(file, 0, os.SEEK_CUR), bytes(args[0]).decode("latin1")]
    if call in ("rename", "replace"):
        return [Path(args[0]).name]
    return list(args) if call == "ftruncate" else []


@contextmanager
def recorded(disk, failing=None, error=None):
    """Record what Python does to the files below a folder; a list of [time, call, path, *details].

    The call number `failing` fails with `error`, and if that is ENOSPC, so do all later calls that
    need space. Also yields a list of the calls that have failed.
    """
    disk, lock, count = disk.resolve(), threading.RLock(), 0
    operations, failed = [], []

    def watch(call, real):
        def watched(file, *args, **kwargs):
            nonlocal count
            path = path_of(file, kwargs.get("dir_fd"))
            if not path.is_relative_to(disk):
                return real(file, *args, **kwargs)
            with lock:
                details = details_of(call, file, args)
                grows = call in ("write", "mkdir") or call == "open" and details[0]
                operation = [time.monotonic_ns(), call, str(path.relative_to(disk)), *details]
                count += 1
                if count == failing or failed and grows and error == errno.ENOSPC:
                    failed.append(operation)
                    if call == "write":
                        real(file, bytes(args[0])[:len(args[0]) // 2])
                    names = [] if isinstance(file, int) else [str(path)]
                    raise OSError(error, os.strerror(error), *names)
                result = real(file, *args, **kwargs)
                if call != "open" or details[0]:
                    operations.append(operation)
                return result

        return mock.patch.object(os, call, watched)

    with ExitStack() as stack:
        for call in CALLS:
            stack.enter_context(watch(call, getattr(os, call)))
        for module in (io, builtins):
            stack.enter_context(mock.patch.object(module, "open", _pyio.open))  # calls os.open
        yield operations, failed


def record(folder):
    """Record a run that ends early and is resumed, and when it has published its checkpoints."""
    init_distributed("cpu")
    disk, publish = folder / "disk", Checkpointer.publish
    disk.mkdir(exist_ok=True)

    def publish_and_record(self, checkpoint):
        publish(self, checkpoint)
        if rank() == 0:
            operations.append([time.monotonic_ns(), "published", checkpoint.name])

    with recorded(disk) as (operations, _), mock.patch.object(
            Checkpointer, "publish", publish_and_record):
        go_on(disk, folder, until=STEPS - 1)
        go_on(disk, folder)
    (folder / f"rank-{rank()}.json").write_text(json.dumps(operations))


# ---------------------------------------------------------------------------------------------
# A disk whose power is cut
# ---------------------------------------------------------------------------------------------


class File:
    """What a file holds now, and what it held when it was last synced."""

    def __init__(self):
        self.now = self.synced = b""

    def sync(self):
        self.synced = self.now

    def left(self, how, rng):
        """The bytes after a power cut."""
        same = len(os.path.commonprefix([self.now, self.synced]))
        cut = self.now[:rng.randint(same, len(self.now))]
        torn = rng.choice((cut, cut.ljust(len(self.now), b"\0")))
        return {"all": self.now, "synced": self.synced, "torn": torn,
                "mixed": rng.choice((self.now, self.synced, torn))}[how]


class Folder:
    """{name: File or Folder} now and when it was last synced, and the changes in between."""

    def __init__(self):
        self.now, self.synced, self.changes = {}, {}, []

    def sync(self):
        self.synced, self.changes = self.now, []

    def change(self, names):
        """Change some names at once; None deletes."""
        self.changes.append(names)
        self.now = {name: node for name, node in (self.now | names).items() if node}

    def left(self, how, rng):
        """{name: bytes or such a dict} after a power cut."""
        names = self.synced if how == "synced" else self.now
        if how == "mixed":
            names = dict(self.synced)
            for change in self.changes[:rng.randint(0, len(self.changes))]:
                names |= change
        return {name: node.left(how, rng) for name, node in names.items() if node}

    def find(self, path):
        node = self
        for name in path.parts:
            node = node.now[name]
        return node

    def perform(self, call, path, *details):
        """Do what was recorded."""
        folder, name = self.find(path.parent), path.name
        file = folder.now.get(name)
        if call == "fsync":
            self.find(path).sync()
        elif call == "mkdir":
            folder.change({name: Folder()})
        elif call in ("unlink", "rmdir"):
            folder.change({name: None})
        elif call in ("rename", "replace"):  # within the folder
            folder.change({name: None, details[0]: file})
        elif call == "open" and not file:
            folder.change({name: File()})
        elif call == "open" and details[0] & EMPTIES:
            file.now = b""
        elif call == "ftruncate":
            file.now = file.now[:details[0]]
        elif call == "write":
            start, new = details[0], details[1].encode("latin1")
            file.now = file.now[:start] + new + file.now[start + len(new):]


def read_tree(path):
    return path.read_bytes() if path.is_file() else {p.name: read_tree(p) for p in path.iterdir()}


def write_tree(tree, path):
    if isinstance(tree, bytes):
        path.write_bytes(tree)
    else:
        path.mkdir()
        for name in tree:
            write_tree(tree[name], path / name)


def cut_power(folder, ranks, seed=0, variants=3):
    """Cut the power after each operation of a run, and resume it: what went wrong."""
    folder.mkdir()
    if ranks == 1:
        record(folder)
    elif (result := torchrun("-m", "tests.torture.power_loss", folder)).returncode:
        return [result.stderr]
    operations = sorted(sum((json.loads(f.read_text()) for f in folder.glob("*.json")), []))
    copies, again, disk, least = load_copies(folder), folder / "again", Folder(), 0
    seen, steps, failures = set(), Counter(), Counter()
    for n, (_, call, path, *details) in enumerate(operations):
        if call == "published":
            least = int(path)
        else:
            disk.perform(call, Path(path), *details)
        for i, how in enumerate(["all", "synced", *["mixed", "torn"] * variants]):
            tree = disk.left(how, random.Random(f"{seed} {n} {i}"))
            if (key := repr((tree, least))) in seen:
                continue
            seen.add(key)
            write_tree(tree, again)
            step, problem = resume(again, copies, least)
            if i == 2 and not problem:
                problem = finish(again, copies)
            steps[step] += 1
            failures[problem] += 1
            shutil.rmtree(again)
    if disk.left("all", random) != read_tree(folder / "disk"):
        failures["what was recorded is not all that happened"] += 1
    print(f"power cut (ranks: {ranks}) after each of {len(operations)} operations: {len(seen)} "
          f"disks,", ", ".join(f"{steps[step]} resumed at step {step}" for step in copies))
    return [f"power cut (ranks: {ranks}), {count} times: {problem}"
            for problem, count in failures.items() if problem]


# ---------------------------------------------------------------------------------------------
# A disk that fails
# ---------------------------------------------------------------------------------------------


def fail_disk(folder, error, every=1):
    """Let a call fail while a run resumes and saves, each in turn: what went wrong."""
    disk, again, ends, failures = folder / "disk", folder / "again", Counter(), []
    folder.mkdir()
    go_on(disk, folder, until=STEPS - 1)
    shutil.copytree(disk, again)
    go_on(again, folder)
    copies, failed = load_copies(folder), True
    while failed:
        shutil.rmtree(again)
        shutil.copytree(disk, again)
        line, said = None, io.StringIO()
        with recorded(again, 1 + every * ends.total(), error) as (_, failed), redirect_stdout(said):
            try:
                go_on(again)
            except OSError as raised:
                line = str(raised)
        problems = [find_damage(f) for f in list_checkpoints(again / OUT)[-KEEP:]]
        problems.append(resume(again, copies, BEFORE if line else STEPS)[1])
        problems.append(finish(again, copies))
        if line and not (os.strerror(error) in line and str(again / OUT) in line and (
                ".part" not in line or f"checkpoint {BEFORE:06} is untouched" in line)):
            problems.append(f"the run says {line!r}")
        failures += [f"{os.strerror(error)} in {failed[0][1:3]}: {p}" for p in problems if p]
        ends[("one line" if line else "success") if failed else "none failed"] += 1
    print(f"{os.strerror(error)} in each of {ends.total() - 1} calls: {ends['one line']} end the "
          f"run in one line, {ends['success']} do not")
    return failures


if __name__ == "__main__":
    record(Path(sys.argv[1]))
