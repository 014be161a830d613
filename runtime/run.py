"""What every training run needs: random streams, a step down the gradients, and the loop.

All ranks take the same decisions: which step is drawn, whether an update is skipped, when to stop.
"""

import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from tiny_wan import checkpoint
from runtime.distributed import Watchdog, all_gather, all_reduce_mean, broadcast, full_tensor, rank, world_size
from runtime.checkpoints import Saving, resume

MOST_SKIPS = 10  # updates in a row that may be skipped before a run gives up

# ---------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------


def make_generator(*key):
    """The random stream of a key, such as (seed, purpose, sample): there is no state to save."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def make_generators(seed, purpose, numbers):
    """A stream for each sample, by its number in the whole run: no batch or rank changes them."""
    return [make_generator(seed, purpose, i) for i in numbers]


def clip_and_step(model, optimizers, lr, max_norm, loss):
    """One step down the gradients that are there -> their norm.

    Where that, or any rank's loss, is not finite, nothing changes, and the norm is nan.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    for p in parameters:
        if world_size() > 1 and not hasattr(p, "full_tensor"):  # FSDP has averaged its own
            dist.all_reduce(p.grad)
            p.grad /= world_size()
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()
    bad = torch.tensor(not math.isfinite(norm + loss), dtype=torch.float)
    if world_size() > 1:
        dist.all_reduce(bad)
    for optimizer in optimizers:
        if not bad:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        optimizer.zero_grad()
    return math.nan if bad else norm


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


def loop(args, state, update, show):
    """Run `update(step) -> metrics` up to `args.steps`, resuming and saving `state`.

    Returns the minutes that all steps took, on the first rank.

    state: the modules and optimizers that make up the run, by name.
    update: its "skipped" metric tells that the step changed nothing, as a number was not finite.
    show: draws the fixed prompts to a path, and returns what else is worth logging.
    """
    (args.out / "samples").mkdir(parents=True, exist_ok=True)
    check_shared(args.out)
    start = resume(args, state)
    first = rank() == 0
    if first:
        for log in ("metrics.jsonl", "times.jsonl"):  # what came after the checkpoint is redone
            keep_lines(args.out / log, start)

    board = None
    if args.tensorboard and first:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(args.out)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.out.name,
               disable=not first)
    saving, skips, waited = Saving(args), 0, 0
    motion = deque(maxlen=20)  # against the data's
    with bar, stop_requests() as requests, Watchdog():
        for step in bar:
            began = time.perf_counter()
            metrics, done = all_reduce_mean(update(step)), step + 1
            if done % args.sample_every == 0 or done == args.steps:
                metrics |= show(args.out / "samples" / f"{done:06d}.png") or {}
            bad = [name for name, value in metrics.items() if not math.isfinite(value)]
            metrics |= dict.fromkeys(bad)  # JSON has no NaN
            skips = skips + 1 if metrics.get("skipped") else 0
            if skips and first:
                tqdm.write(f"step {step}: skipped, as this is not finite: {', '.join(bad)}")
            if skips == MOST_SKIPS:
                saving.finish()
                raise ValueError(
                    f"step {step}: {skips} updates in a row had a loss or a gradient that is not "
                    f"finite; the last checkpoint is untouched, and a lower learning rate may help")
            if "variance" in metrics and not bad:
                motion.append(metrics["variance"] / max(metrics["data_variance"], 1e-9))
                if (share := sum(motion) / 20) < 0.5 and len(motion) == 20:
                    if first:
                        tqdm.write(f"step {step}: motion has fallen to {share:.0%} of the data's")
                    motion.clear()
            before, waited = waited, metrics.pop("waited", 0)
            times = {"step": step, "seconds": time.perf_counter() - began,
                     "waited": waited - before}  # of these, for data
            if board:
                for name, value in metrics.items():
                    board.add_scalar(name, math.nan if value is None else value, step)
            if first:
                append(args.out / "metrics.jsonl", {"step": step} | metrics)
                append(args.out / "times.jsonl", times)
                bar.set_postfix({name: f"{metrics[name]:.3g}" for name in (
                    "loss", "kl", "reg", "temp", "critic") if metrics.get(name) is not None})
            saving.poll()
            stop = stop_signal(requests)
            if stop or done % args.save_every == 0 or done == args.steps:
                saving.begin(state, done)
            if stop or done == args.steps:
                saving.finish()
            if stop:
                bar.close()
                if first:
                    print(f"stopped and saved at step {done} of {args.steps}; "
                          f"the same command resumes there", file=sys.stderr)
                raise SystemExit(128 + stop)
    if not first:
        return 0
    times = [json.loads(line) for line in (args.out / "times.jsonl").read_text().splitlines()]
    seconds, waited = (sum(line.get(name, 0) for line in times) for name in ("seconds", "waited"))
    if seconds:
        print(f"{args.out}: {seconds / 60:.1f} minutes, {waited / seconds:.1%} of them waiting for "
              f"data")
    return seconds / 60


def check_shared(folder):
    """ValueError, on all ranks, if they do not see one and the same folder."""
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


def keep_lines(log, count):
    """Cut a log behind its first `count` lines. ValueError where it has fewer, or damaged ones."""
    with open(log, "a+b") as file:
        file.seek(0)
        kept = [line for line, _ in zip(file, range(count)) if line.endswith(b"\n")]
        for line in kept:
            checkpoint.read_json(log, line)
        if len(kept) < count:
            raise ValueError(f"{log}: has {len(kept)} lines, but its checkpoint is of step {count}")
        file.truncate(sum(map(len, kept)))


def append(log, line):
    """OSError names the log: on a full disk it is often the first to fail."""
    try:
        with open(log, "a") as file:
            print(json.dumps(line), file=file)
    except OSError as error:
        raise OSError(f"{log}: {error.strerror}; the last checkpoint is untouched") from None


@contextmanager
def stop_requests():
    """A list that collects SIGINT and SIGTERM, so that a step ends first.

    A second Ctrl-C kills; of SIGTERM, torchrun and whoever ends a job often send one each.
    """
    requests = []

    def request(signum, _):
        requests.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, handlers[signum])

    handlers = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def stop_signal(requests):
    """The signal that any rank was sent, or 0, on all of them."""
    stop = torch.tensor(max(requests, default=0))
    if world_size() > 1:
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    return stop.item()
