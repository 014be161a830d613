"""What training loops share: flags, random generators, the optimizer's step, a run's folder.

All ranks agree on whether an update is skipped, and on when to stop.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Literal

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

import torch
import torch.distributed as dist
from tqdm import tqdm

from adavid import Limits
from runtime import cli
from runtime.checkpoints import FOLLOWED, Checkpointer, find_not_finite, list_checkpoints
from runtime.distributed import (
    Watchdog,
    all_gather,
    all_reduce_mean,
    broadcast,
    full_tensor,
    rank,
    world_size,
)
from tiny_wan import checkpoint

MOST_SKIPS = 10  # a run gives up after so many skipped updates in a row


@dataclass
class Flags:
    """What every training program takes."""

    out: Path
    """folder of the run; repeat the command to resume it"""
    steps: cli.Count
    """how many updates; for distill, cycles of one student and several critic updates"""
    batch_size: cli.Size
    """videos in a batch, on each GPU"""
    seed: cli.Seed = 0
    """random seed of the data, the noise and the initial weights"""
    save_every: cli.Count = 100
    """steps between checkpoints"""
    keep: Annotated[int, Limits(2, 2**31 - 1)] = 2
    """how many of the newest checkpoints to keep, at least 2: the newest is trusted only after a
    further update has succeeded, and a damaged one is passed over"""
    keep_every: cli.Count | None = None
    """also keep every checkpoint whose step is a multiple of this"""
    sample_every: cli.Count = 100
    """steps between pictures of a fixed set of prompts"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """device to run on"""
    may_change = {"out", "device", "save_every", "keep", "keep_every", "sample_every",
                  "lr", "critic_lr"}  # when a run is resumed

    def retry_flags(self):
        """Flags with which a run that has diverged may go on."""
        return self.lower_rates(self, type(self))

    @staticmethod
    def lower_rates(numbers, usual):
        """A tenth of the learning rates, or the usual ones if these are lower still, as flags."""
        flags = []
        for name in ("lr", "critic_lr"):
            if hasattr(numbers, name):
                rate = min(getattr(numbers, name) / 10, getattr(usual, name))
                flags += [cli.flag(name), f"{rate:g}"]
        return flags


# ---------------------------------------------------------------------------------------------
# Randomness, and a step of the optimizer
# ---------------------------------------------------------------------------------------------


def make_generator(*key):
    """A torch.Generator seeded by its key, such as (seed, purpose, sample).

    A resumed run makes the same generators again, so there is no random state to save.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def make_generators(seed, purpose, indices):
    """A generator for each sample, by its index in the whole run, in any batch and on any rank."""
    return [make_generator(seed, purpose, i) for i in indices]


def adamw(model, lr, config):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr,
                             betas=config.betas, weight_decay=config.weight_decay)


def clip_and_step(model, optimizers, max_norm, loss):
    """Average gradients over ranks, clip, step, zero them. Returns their norm before clipping.

    If the norm or any rank's `loss` (a float) is not finite, no weight changes and nan is returned.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    for p in parameters:
        sharded = hasattr(p, "full_tensor")  # FSDP averages the gradients of these itself
        if world_size() > 1 and not sharded:
            dist.all_reduce(p.grad)
            p.grad /= world_size()
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()
    bad = torch.tensor(not math.isfinite(norm + loss), dtype=torch.float)
    if world_size() > 1:
        dist.all_reduce(bad)
    for optimizer in optimizers:
        if not bad:
            optimizer.step()
        optimizer.zero_grad()
    return math.nan if bad else norm


# ---------------------------------------------------------------------------------------------
# A run's folder
# ---------------------------------------------------------------------------------------------


class Run:
    """A run's folder `args.out`: resumes `state` (modules and optimizers by name), logs and saves.

        with Run(args, state) as run:
            for step in run.steps():
                ...
                run.log(step, metrics)
                run.save(step)
    """

    def __init__(self, args, state, student=None):
        self.args, self.state = args, state
        make_folder(args.out)
        (args.out / "samples").mkdir(exist_ok=True)
        with ExitStack() as stack:  # an error in here must free the folder
            # First, as two runs would confuse each other's checks.
            stack.enter_context(lock_folder(args.out))
            check_shared(args.out)
            self.checkpointer = Checkpointer(args.out, fixed_flags(args), args.keep,
                                             args.keep_every, student)
            self.start = self.checkpointer.load(state)
            if rank() == 0:
                for log in ("metrics.jsonl", "times.jsonl"):  # steps after the checkpoint run again
                    truncate_log(args.out / log, self.start)
            self.stack = stack.pop_all()
        self.skips, self.waited = 0, 0.0

    def __enter__(self):
        args = self.args
        self.bar = self.stack.enter_context(tqdm(
            range(self.start, args.steps), initial=self.start, total=args.steps,
            desc=args.out.name, disable=rank() > 0))
        self.signals = self.stack.enter_context(stop_signals())
        self.stack.enter_context(Watchdog())
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def steps(self):
        """The remaining steps, with a progress bar."""
        for step in self.bar:
            self.began = time.perf_counter()
            yield step

    def picture_due(self, step):
        return (step + 1) % self.args.sample_every == 0 or step + 1 == self.args.steps

    def report_due(self, step):
        """With each picture, but not in a run that is too short for a curve."""
        return self.picture_due(step) and step + 1 >= self.args.sample_every

    def picture(self, step):
        return self.args.out / "samples" / f"{step + 1:06d}.png"

    def log(self, step, metrics, waited=0.0):
        """Append the metrics to metrics.jsonl, averaged over ranks, and return these averages.

        waited: seconds spent waiting for data so far.
        `Diverged` after MOST_SKIPS steps in a row that skipped an update.
        """
        metrics = all_reduce_mean(metrics)
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        metrics |= dict.fromkeys(bad)  # JSON has no NaN
        skipped = any(name.endswith("grad_norm") for name in bad)
        self.skips = self.skips + 1 if skipped else 0
        if skipped:
            metrics["skipped"] = 1
            self.warn(f"step {step}: skipped, as these are not finite: {', '.join(bad)}")
            self.reason = f"{', '.join(bad[:4])} were not finite"
        if self.skips == MOST_SKIPS:
            self.give_up(step)
        if rank() == 0:
            append(self.args.out / "metrics.jsonl", {"step": step} | metrics)
            append(self.args.out / "times.jsonl", {
                "step": step, "seconds": time.perf_counter() - self.began,
                "waited": waited - self.waited})
            self.bar.set_postfix({name: f"{metrics[name]:.3g}" for name in (
                "loss", "dmd", "reg", "temp", "critic") if metrics.get(name) is not None})
        self.waited = waited
        return metrics

    def warn(self, message):
        if rank() == 0:
            tqdm.write(message)

    def save(self, step):
        """Save a checkpoint if one is due: every `save_every` steps, at the last one, or to stop.

        While updates are skipped nothing is saved, and nothing older is deleted. `Diverged` if the
        last step was skipped, or if a tensor is not finite. SystemExit after SIGINT or SIGTERM.
        """
        done, stop = step + 1, stop_requested(self.signals)
        last = done == self.args.steps
        if not self.skips:
            self.checkpointer.followed()
            self.checkpointer.poll()
            if stop or last or done % self.args.save_every == 0:
                if bad := find_not_finite(self.state):
                    self.reason = f"{bad} is not finite"
                    self.give_up(step)
                self.checkpointer.save(self.state, done)
        if stop or last:
            self.checkpointer.wait()
        if stop:
            self.bar.close()
            if rank() == 0:
                print(f"stopped at step {done} of {self.args.steps}, "
                      + ("not saved as this step was skipped" if self.skips else "saved")
                      + "; run the same command to resume", file=sys.stderr)
            raise SystemExit(128 + stop)
        if last and self.skips:
            self.give_up(step)

    def give_up(self, step):
        """Raise `Diverged`, with the way to go on from the newest checkpoint that is good.

        That is one which an accepted update has followed. A newer one is deleted, as the numbers
        may have left their range there.
        """
        self.checkpointer.wait()
        found = broadcast(list_checkpoints(self.args.out, step + 1))
        if found and not broadcast((found[-1] / FOLLOWED).exists()):
            doubtful = found.pop()
            if rank() == 0:
                shutil.rmtree(doubtful)
        where = f"checkpoint {found[-1].name} is good" if found else "no checkpoint is good"
        skipped = f" ({self.skips} updates in a row were skipped)" if self.skips else ""
        raise cli.Diverged(f"step {step}: {self.reason}{skipped}; {where}, go on from "
                           f"{'it' if found else 'the start'} with", self.args.retry_flags())

    def minutes(self):
        """The minutes that all steps took, in earlier calls too; prints them."""
        log = (self.args.out / "times.jsonl").read_text()
        times = [json.loads(line) for line in log.splitlines()]
        seconds, waited = (sum(line[name] for line in times) for name in ("seconds", "waited"))
        if seconds:
            print(f"{self.args.out}: {seconds / 60:.1f} minutes, {waited / seconds:.1%} of them "
                  f"waiting for data")
        return seconds / 60


def fixed_flags(args):
    """The flags that must not change on resuming, and the videos in an update over all ranks."""
    values = {k: v.resolve() if isinstance(v, Path) else v for k, v in vars(args).items()}
    for name in [name for name, value in values.items() if is_dataclass(value)]:
        values |= vars(values.pop(name))
    for name in {"batch_size", "accumulate"} | args.may_change:
        values.pop(name, None)
    values["videos in an update"] = args.batch_size * getattr(args, "accumulate", 1) * world_size()
    return json.loads(json.dumps(values, default=str))


def make_folder(folder):
    """Make a folder and its parents, and flush their names to the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        checkpoint.fsync(folder.parent)


def check_shared(folder):
    """ValueError, on all ranks, unless they all see the same folder."""
    if world_size() > 1:
        file, token = folder / "ranks", broadcast(os.urandom(8).hex())
        if rank() == 0:
            file.write_text(token)
        dist.barrier()
        seen = all_gather(file.is_file() and file.read_text() == token)
        if rank() == 0:
            file.unlink()
        if not all(seen):
            raise ValueError(f"--out {folder} must be a folder that all nodes share")


@contextmanager
def lock_folder(folder):
    """A context in which rank 0 has the lock on a folder. ValueError, on all ranks, if another
    process has it.
    """
    problem = None
    with open(folder / "lock", "w") if rank() == 0 and fcntl else nullcontext() as lock:
        if lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = (f"--out {folder}: another process is writing there; wait for it, or "
                           f"stop it")
            except OSError:  # some network file systems have no locks
                pass
        if problem := broadcast(problem):
            raise ValueError(problem)
        yield


def truncate_log(log, count):
    """Keep a log's first `count` lines. ValueError if there are fewer, or if one is damaged."""
    with naming_errors(log), open(log, "a+b") as file:
        file.seek(0)
        kept = [line for line, _ in zip(file, range(count)) if line.endswith(b"\n")]
        for line in kept:
            checkpoint.read_json(log, line)
        if len(kept) < count:
            raise ValueError(f"{log}: has {len(kept)} lines, but the checkpoint is of step {count}")
        file.truncate(sum(map(len, kept)))


def append(log, line):
    """Append a line of JSON. On a full disk this often fails first."""
    with naming_errors(log), open(log, "a") as file:
        print(json.dumps(line), file=file)


@contextmanager
def naming_errors(log):
    """OSError names the log; that of a write or a truncation has no name of its own."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{log}: {error.strerror}; the last checkpoint is untouched") from None


@contextmanager
def stop_signals():
    """A list that collects SIGINT and SIGTERM, so that the current step can end first.

    A second Ctrl-C kills. A second SIGTERM does not, as torchrun and a job's scheduler may each
    send one.
    """
    signals = []

    def request(signum, _):
        signals.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, handlers[signum])

    handlers = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def stop_requested(signals):
    """The signal that any rank has received, on all ranks, or 0."""
    stop = torch.tensor(max(signals, default=0))
    if world_size() > 1:
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    return stop.item()
