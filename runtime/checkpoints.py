"""Checkpoints that survive kills, full disks and damaged files.

A checkpoint is a folder, `checkpoints/000123`: safetensors files of torch.distributed.checkpoint,
which any number of ranks can load; `state.json` with the step, the flags, and what a student's file
holds beside its weights; and checksums of all of these. It is written as `000123.part`, synced to
the disk and then renamed. So a folder with its final name was whole when it was written, and the
checksums tell whether it still is. A file `followed` says that an update has followed, so that the
checkpoint is no dead end.
"""

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from runtime.distributed import all_gather, broadcast, rank, world_size
from tiny_wan import checkpoint


def named_tensors(state):
    """{name: tensor} of all modules and optimizers, this rank's parts of them. Not copies: loading
    fills them.
    """
    tensors = {}
    for name, part in state.items():
        if isinstance(part, torch.optim.Optimizer):
            for i, moments in part.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{key}": value for key, value in moments.items()}
        else:
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    return tensors


@torch.no_grad()
def find_not_finite(state):
    """The name of a tensor that is not finite on some rank, or None."""
    local = {name: getattr(tensor, "to_local", lambda t=tensor: t)()
             for name, tensor in named_tensors(state).items()}
    # Both ends are NaN if one element is. This reads each tensor once, makes no copy, and waits for
    # each device once.
    finite = defaultdict(dict)
    for name, tensor in local.items():
        if tensor.numel():
            low, high = tensor.aminmax()
            finite[tensor.device][name] = low.isfinite() & high.isfinite()
    bad = next((name for flags in finite.values()
                for name, good in zip(flags, torch.stack(list(flags.values())).tolist())
                if not good), None)
    return next(filter(None, all_gather(bad)), None)


class Checkpointer:
    """Saves and loads a run's checkpoints. Several ranks save in the background, each its part."""

    def __init__(self, out, flags, keep, keep_every=None, student=None):
        """flags: what must not change when the run in the folder `out` is resumed.
        student: what `runtime.models.write_student` takes beside the tensors, if there is one.
        """
        self.out, self.flags, self.keep, self.keep_every = out, flags, keep, keep_every
        self.student = student
        self.newest = self.pending = None
        self.pool = ThreadPoolExecutor(1)
        # A group of its own keeps a save's messages apart from the training loop's.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def load(self, state):
        """Fill `state` from the newest whole checkpoint; the step to go on with, 0 without any.

        ValueError where there are checkpoints, but every one of them is damaged.
        """
        found, problems = broadcast(list_checkpoints(self.out)), []
        for folder in reversed(found):
            if problem := find_damage(folder):
                problems.append(problem)
                continue
            if problems and rank() == 0:
                print(f"note: {'; '.join(problems)}; going on from checkpoint {folder.name}")
            self.newest = folder
            return load(self.flags, state, folder)
        if problems:
            raise ValueError(f"{problems[0]}; no checkpoint in {self.out / 'checkpoints'} is "
                             f"whole: delete them to start anew")
        return 0

    def save(self, state, step):
        """Start to write a checkpoint. OSError says what the disk said, and what is still there."""
        self.wait()
        folder = self.out / "checkpoints" / f"{step:06d}"
        part = folder.with_suffix(".part")
        with self.naming_errors(part):
            if rank() == 0:
                for left in part.parent.glob("*.part"):
                    shutil.rmtree(left, ignore_errors=True)
                for log in self.out.glob("*.jsonl"):  # no checkpoint may outlive its lines
                    checkpoint.fsync(log)
                part.parent.mkdir(exist_ok=True)  # not its parents: the disk may be gone
                checkpoint.fsync(self.out)  # the names of the logs and of `checkpoints`
                part.mkdir()
                (part / STATE).write_text(json.dumps({
                    "step": step, "flags": self.flags, "student": self.student}))
            writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
            if world_size() > 1:
                dist.barrier()
                written = dcp.async_save(named_tensors(state), storage_writer=writer,
                                         process_group=self.group)
                self.pending = self.pool.submit(seal, part, written.result), folder
            else:
                with warnings.catch_warnings(action="ignore"):  # of having one process
                    dcp.save(named_tensors(state), storage_writer=writer, no_dist=True)
                seal(part)
                self.publish(folder)

    def followed(self):
        """An update was accepted: the newest checkpoint is no dead end."""
        if self.newest and rank() == 0:
            (self.newest / FOLLOWED).touch()
        self.newest = None

    def poll(self):
        """Publish a checkpoint that has been written meanwhile."""
        if self.pending and self.pending[0].done():
            self.wait()

    def wait(self):
        """Wait for the checkpoint that is being written, and publish it."""
        if self.pending:
            (sealed, folder), self.pending = self.pending, None
            with self.naming_errors(folder.with_suffix(".part")):
                sealed.result()
                self.publish(folder)

    def publish(self, folder):
        """Once all ranks have sealed their parts, give the checkpoint its name; delete old ones."""
        if rank() == 0:
            part = folder.with_suffix(".part")
            while len(list(part.glob(SUMS.format("*")))) < world_size():
                time.sleep(0.1)
            checkpoint.fsync(part)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
            checkpoint.fsync(folder.parent)
            self.newest = folder
            # Those of later steps are damaged, or this one would not have been written.
            for old in list_checkpoints(self.out, int(folder.name))[:-self.keep]:
                if not self.keep_every or int(old.name) % self.keep_every:
                    shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def naming_errors(self, part):
        """What goes wrong in writing becomes one line on every rank, and no half is left behind."""
        try:
            yield
        except (OSError, dcp.api.CheckpointException) as error:
            error = cause(error)
            shutil.rmtree(part, ignore_errors=True)
            there = [f.name for f in list_checkpoints(self.out, int(part.stem) - 1)]
            kept = f"checkpoint {there[-1]} is untouched" if there else "there is no earlier one"
            raise OSError(f"{part}: not written ({getattr(error, 'strerror', None) or error}); "
                          f"{kept}") from None


SUMS, STATE, FOLLOWED = "checksums-{}.json", "state.json", "followed"


def cause(error):
    """The error that torch.distributed.checkpoint has wrapped, which may be a Ctrl-C."""
    if isinstance(error, dcp.api.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, KeyboardInterrupt):
        raise error
    return error


def seal(part, wait=lambda: None):
    """Sync this rank's files of a checkpoint once they are written, and write their checksums."""
    wait()
    ours = [*part.glob(f"shard-{rank() + 1:05d}-*"), *[part / STATE] * (rank() == 0)]
    for file in ours:
        checkpoint.fsync(file)
    sums = part / SUMS.format(rank())
    sums.with_suffix(".part").write_text(json.dumps({file.name: sha256(file) for file in ours}))
    checkpoint.fsync(sums.with_suffix(".part"))
    os.replace(sums.with_suffix(".part"), sums)


def sha256(file):
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def list_checkpoints(out, last=math.inf):
    """The folders of a run's checkpoints up to a step, oldest first."""
    folders = (f for f in (out / "checkpoints").glob("*") if f.name.isdecimal())
    return sorted((f for f in folders if int(f.name) <= last), key=lambda f: int(f.name))


def find_damage(folder):
    """What is wrong with a checkpoint's files, or None. Each rank checks a share of them."""
    problem = None
    try:
        sums = {}
        for file in folder.glob(SUMS.format("*")):
            sums |= checkpoint.read_json(file)
        names = sorted({STATE, *(file.name for file in folder.glob("*.safetensors"))})
        if sorted(sums) != names:
            problem = f"{folder}: its files are not those that its checksums list"
        for name in names[rank()::world_size()]:
            if sha256(folder / name) != sums.get(name):
                problem = problem or f"{folder / name}: damaged, its checksum has changed"
    except (OSError, ValueError) as error:
        problem = f"{folder}: damaged ({error})"
    return next(filter(None, all_gather(problem)), None)


def load(flags, state, folder):
    """Fill `state` from a checkpoint; its step. ValueError unless it is of a run with `flags`."""
    try:
        saved = checkpoint.read_json(folder / STATE)
        then = saved["flags"]
        if changed := [f"{k} was {then.get(k)}, now {flags[k]}" for k in flags
                       if flags[k] != then.get(k)]:
            raise ValueError(f"{folder.parents[1]} holds a run with other flags "
                             f"({'; '.join(changed[:4])}); repeat them to resume, or choose "
                             f"another --out")
        reader = HuggingFaceStorageReader(str(folder))
        there = reader.read_metadata().state_dict_metadata
        for name, part in state.items():
            if isinstance(part, torch.optim.Optimizer):
                make_moments(name, part, there)
        with warnings.catch_warnings(action="ignore"):  # of having one process
            dcp.load(named_tensors(state), storage_reader=reader, no_dist=world_size() == 1)
    except (KeyError, AttributeError, SafetensorError, dcp.api.CheckpointException,
            RuntimeError) as error:
        if isinstance(error := cause(error), OSError):
            raise error from None
        why, *_ = str(error).splitlines() or [repr(error)]
        raise ValueError(f"{folder}: not a checkpoint of this run ({why}); delete it to start "
                         f"anew") from None
    return saved["step"]


def load_student(folder):
    """The tensors of a checkpoint's student, or of its running average, whole and by their own
    names. Nothing else is loaded.
    """
    reader = HuggingFaceStorageReader(str(folder))
    there = reader.read_metadata().state_dict_metadata
    part = "ema." if any(name.startswith("ema.") for name in there) else "student."
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype)
               for name, about in there.items() if name.startswith(part)}
    with warnings.catch_warnings(action="ignore"):  # of having one process
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(part): tensor for name, tensor in tensors.items()}


def make_moments(name, optimizer, there):
    """Make the moments that the optimizer would make at its first step, for `load` to fill."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for key, about in there.items():
        if key.startswith(name + "."):
            i, kind = key.removeprefix(name + ".").split(".")
            like = parameters[int(i)]
            moments.setdefault(int(i), {})[kind] = (
                torch.zeros_like(like) if about.size == like.shape and like.ndim
                else torch.zeros(about.size))
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
