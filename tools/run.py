"""What every training run needs: random streams, ranks, the loop, and checkpoints.

Under torchrun each process is a rank; alone, there is one. All ranks take the same decisions:
which step is drawn, whether an update is skipped, when to stop.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from tiny_wan import checkpoint
from tools import cli

MOST_SKIPS = 10  # updates in a row that may be skipped before a run gives up

# ---------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------


def stream(*key):
    """The random stream of a key, such as (seed, purpose, sample): there is no state to save."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def streams(seed, purpose, numbers):
    """A stream for each sample, by its number in the whole run: no batch or rank changes them."""
    return [stream(seed, purpose, i) for i in numbers]


# ---------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------


def start(device_name):
    """Join the other ranks, if there are any; the device of this one."""
    device = cli.pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"more processes than this machine has GPUs "
                             f"({torch.cuda.device_count()}); lower --nproc_per_node")
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif device.type == "cuda":  # a group of one: FSDP is what computes in bfloat16
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(model, device, dtype=None):
    """FSDP2: each rank keeps a part of every tensor and gathers one block's at a time. -> model

    dtype: to compute in, by default float32, which the parts are in. Norms and modulation are
    rounded to it as well. Gradients are averaged over the ranks, in float32. Without a process
    group, the model just moves to the device.
    """
    if not dist.is_initialized():
        return model.to(device, torch.float32)
    mesh = init_device_mesh(device.type, (ranks(),))
    precise = [model.time_embedding, model.time_projection]  # as Wan computes them
    for part in [*precise, *model.blocks, model]:
        # Inputs stay as they are: in bfloat16 there is no timestep 757.
        policy = MixedPrecisionPolicy(None if part in precise else dtype, torch.float32,
                                      cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model.float()  # only now, so that no rank ever holds all of it in float32


def agreed(value):
    """The first rank's value, on all of them."""
    values = [value]
    if ranks() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def whole(tensor):
    """All of a tensor that may be in parts; every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_over_ranks(metrics):
    """Each metric's mean over those ranks that have it."""
    if ranks() == 1:
        return metrics
    everyones = [None] * ranks()
    dist.all_gather_object(everyones, metrics)
    values = {name: [m[name] for m in everyones if name in m] for m in everyones for name in m}
    return {name: sum(v) / len(v) for name, v in values.items()}


def descend(model, optimizers, lr, max_norm):
    """One step down the gradients that are there -> their norm; none where that is not finite."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    for p in parameters:
        if ranks() > 1 and not hasattr(p, "full_tensor"):  # FSDP has averaged its own
            dist.all_reduce(p.grad)
            p.grad /= ranks()
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()
    for optimizer in optimizers if torch.tensor(norm).isfinite() else ():
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return norm


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
            lines = (args.out / log).read_text().splitlines()[:start] if start else []
            (args.out / log).write_text("".join(line + "\n" for line in lines))

    board = None
    if args.tensorboard and first:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(args.out)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.out.name,
               disable=not first)
    saving, skips, waited = Saving(args), 0, 0
    motion = deque(maxlen=20)  # against the data's
    with bar, stop_requests() as requests:
        for step in bar:
            began = time.perf_counter()
            metrics = mean_over_ranks(update(step))
            done = step + 1
            skips = skips + 1 if metrics.get("skipped") else 0
            if skips == MOST_SKIPS:
                saving.finish()
                raise ValueError(
                    f"step {step}: {skips} updates in a row had a loss or a gradient that is not "
                    f"finite; the last checkpoint is untouched, and a lower learning rate may help")
            if "variance" in metrics:
                motion.append(metrics["variance"] / max(metrics["data_variance"], 1e-9))
                if (share := sum(motion) / 20) < 0.5 and len(motion) == 20:
                    if first:
                        tqdm.write(f"step {step}: motion has fallen to {share:.0%} of the data's")
                    motion.clear()
            if done % args.sample_every == 0 or done == args.steps:
                metrics |= show(args.out / "samples" / f"{done:06d}.png") or {}
            before, waited = waited, metrics.pop("waited", 0)
            times = {"step": step, "seconds": time.perf_counter() - began,
                     "waited": waited - before}  # of these, for data
            if board:
                for name, value in metrics.items():
                    board.add_scalar(name, value, step)
            if first:
                append(args.out / "metrics.jsonl", {"step": step} | metrics)
                append(args.out / "times.jsonl", times)
                bar.set_postfix({name: f"{metrics[name]:.3g}" for name in
                                 ("loss", "kl", "reg", "temp", "critic") if name in metrics})
            saving.poll()
            stop = signalled(requests)
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
    seconds, waited = (sum(line[name] for line in times) for name in ("seconds", "waited"))
    if seconds:
        print(f"{args.out}: {seconds / 60:.1f} minutes, {waited / seconds:.1%} of them waiting for "
              f"data")
    return seconds / 60


def check_shared(folder):
    """ValueError, on all ranks, if they do not see one and the same folder."""
    if ranks() > 1:
        file, token, seen = folder / "ranks", agreed(os.urandom(8).hex()), [None] * ranks()
        if rank() == 0:
            file.write_text(token)
        dist.barrier()
        dist.all_gather_object(seen, file.is_file() and file.read_text() == token)
        if rank() == 0:
            file.unlink()
        if not all(seen):
            raise ValueError(f"--out {folder} must be a folder that all nodes share")


def append(log, line):
    with open(log, "a") as file:
        print(json.dumps(line), file=file)


@contextmanager
def stop_requests():
    """A list that collects SIGINT and SIGTERM, so that a step ends first. The second one kills."""
    requests = []

    def request(signum, _):
        requests.append(signum)
        signal.signal(signum, handlers[signum])

    handlers = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def signalled(requests):
    """The signal that any rank was sent, or 0, on all of them."""
    stop = torch.tensor(max(requests, default=0))
    if ranks() > 1:
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    return stop.item()


# ---------------------------------------------------------------------------------------------
# Checkpoints: one folder for each, `checkpoints/000123`, of safetensors files and state.json
# ---------------------------------------------------------------------------------------------


def named_tensors(state):
    """{name: tensor} of all modules and optimizers: the very tensors, so that loading fills them.

    A rank holds its parts of them.
    """
    tensors = {}
    for name, part in state.items():
        if isinstance(part, torch.optim.Optimizer):
            for i, moments in part.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{key}": value for key, value in moments.items()}
        else:
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    return tensors


class Saving:
    """Writes checkpoints; with several ranks in the background, each its own parts."""

    def __init__(self, args):
        self.args, self.pending = args, None
        # With a group of its own, or the loop's messages and a save's would be mistaken.
        self.group = dist.new_group(backend="gloo") if ranks() > 1 else None

    def begin(self, state, step):
        self.finish()
        folder = self.args.out / "checkpoints" / f"{step:06d}"
        part = folder.with_suffix(".part")
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            (part / "state.json").write_text(json.dumps({"step": step} | flags(self.args)))
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        if ranks() > 1:
            dist.barrier()
            self.pending = dcp.async_save(named_tensors(state), storage_writer=writer,
                                          process_group=self.group), folder
        else:
            with warnings.catch_warnings(action="ignore"):  # of having one process
                dcp.save(named_tensors(state), storage_writer=writer, no_dist=True)
            self.publish(folder)

    def poll(self):
        """Publish what has been written meanwhile."""
        if self.pending and self.pending[0].done():
            self.finish()

    def finish(self):
        """Wait for what is being written."""
        if self.pending:
            written, folder = self.pending
            written.result()
            self.pending = None
            self.publish(folder)

    def publish(self, folder):
        """The whole checkpoint gets its name, and the older ones go."""
        if rank() == 0:
            part = folder.with_suffix(".part")
            for file in part.iterdir():
                with open(file, "r+b") as opened:  # Windows syncs only what it may write
                    os.fsync(opened.fileno())
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
            for old in checkpoints(self.args.out)[:-1]:
                shutil.rmtree(old)


def checkpoints(out):
    """The folders of a run's whole checkpoints, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit())


def flags(args):
    """What must not change while a run goes on, with the videos of an update on all ranks."""
    values = {k: v.resolve() if isinstance(v, Path) else v for k, v in vars(args).items()
              if k not in args.free}
    if "avd" in values:
        values |= vars(values.pop("avd"))
    for name in ("batch_size", "accumulate"):
        values.pop(name, None)
    values["videos in an update"] = args.batch_size * getattr(args, "accumulate", 1) * ranks()
    return {"flags": json.loads(json.dumps(values, default=str))}


def resume(args, state):
    """Load the newest checkpoint into `state`, if there is one; the step to go on with."""
    if not (found := agreed(checkpoints(args.out))):
        return 0
    folder = found[-1]
    try:
        saved = checkpoint.read_json(folder / "state.json")
        then, now = saved["flags"], flags(args)["flags"]
        if changed := [f"{k} was {then.get(k)}, now {now[k]}" for k in now
                       if now[k] != then.get(k)]:
            raise ValueError(f"{args.out} holds a run with other flags ({'; '.join(changed[:4])}); "
                             f"repeat them to resume, or choose another --out")
        reader = HuggingFaceStorageReader(str(folder))
        there = reader.read_metadata().state_dict_metadata
        for name, part in state.items():
            if isinstance(part, torch.optim.Optimizer):
                make_moments(name, part, there)
        with warnings.catch_warnings(action="ignore"):  # of having one process
            dcp.load(named_tensors(state), storage_reader=reader, no_dist=ranks() == 1)
    except (KeyError, AttributeError, SafetensorError, dcp.api.CheckpointException,
            RuntimeError) as error:
        raise ValueError(f"{folder}: damaged, or not a checkpoint of this run "
                         f"({str(error).splitlines()[0]}); delete it to start anew") from None
    return saved["step"]


def make_moments(name, optimizer, there):
    """Empty moments, as the optimizer would make them at its first step, to be filled."""
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
