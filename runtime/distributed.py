"""Several processes under torchrun: collectives, sharding, and a watchdog for ranks that die.

Everything here also works in a single process, without torchrun.
"""

import atexit
import os
import re
import threading
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from runtime import cli


def init_distributed(device_name):
    """Join the process group, under torchrun; this rank's device."""
    device = cli.pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes than this machine's "
                             f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # torchrun's store survives a restart, so it still holds the addresses of dead ranks.
        store, rank, ranks = next(dist.rendezvous("env://"))
        join(device, dist.PrefixStore(restart_count(), store), rank, ranks)
    return device


def join(device, store, rank=0, ranks=1):
    """Join a process group. ValueError if this torch cannot have one for the device."""
    if device.type == "mps" or device.type == "cuda" and not dist.is_nccl_available():
        raise ValueError("this torch has no NCCL, as on Windows and macOS. Several GPUs need it, "
                         "and one GPU to train whole models in bfloat16; use Linux (or WSL2), or "
                         "on one GPU --lora, --dtype float32 or --device cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store,
                            rank=rank, world_size=ranks)
    atexit.register(leave)


def leave():
    """Leave the process group, before Python ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads may still be freeing the last collective's tensors, for which they need
        # Python's lock. One that asks for it after Python has ended aborts the process.
        time.sleep(0.5)


def restart_count():
    """How often torchrun has restarted all ranks, as a string."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def apply_fsdp(model, device, dtype=None):
    """Shard a model with FSDP2: each rank keeps a part of every tensor. -> model

    The matrices of one block at a time are gathered, in `dtype`, to compute with; None is their
    own. Gradients are averaged over the ranks in float32.
    A single process only moves the model to the device, unless it is to compute in bfloat16 with
    weights in float32: that, too, is FSDP's work.
    """
    if dtype == torch.bfloat16 and not dist.is_initialized():
        join(device, dist.HashStore())
    if dist.is_initialized():
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes seconds

        # The model never changes a layer's output in place, of which newer versions warn.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(device.type, (world_size(),))
        matrices = [[layer for layer in block.modules() if isinstance(layer, nn.Linear)]
                    for block in model.blocks]
        for compute_dtype, parts in (
                (dtype, [model.patch_embedding, model.text_embedding, *matrices, model.head.head]),
                # As Wan computes them. The last group has what is left: norms and modulation.
                (None, [model.time_embedding, model.time_projection, model])):
            policy = MixedPrecisionPolicy(compute_dtype, torch.float32)
            for part in parts:
                fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model.to(device)


def broadcast(value):
    """The first rank's value (any object), on all ranks."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_gather(value, group=None):
    """The list of all ranks' values (any objects), on all ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group)
    return values


def full_tensor(tensor):
    """The whole of a tensor that may be sharded. All ranks must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_metrics(metrics):
    """The mean of each metric over the dicts that contain it."""
    values = {name: [m[name] for m in metrics if name in m] for m in metrics for name in m}
    return {name: sum(v) / len(v) for name, v in values.items()}


def all_reduce_mean(metrics):
    """The mean of each metric over the ranks that have it."""
    return mean_metrics(all_gather(metrics))


# ---------------------------------------------------------------------------------------------
# Ranks that die
# ---------------------------------------------------------------------------------------------

BEAT, PATIENCE = 5, 40  # seconds between a rank's heartbeats, and without one until it is dead
DONE = 2**40  # added to the heartbeats of a rank that has finished


class Watchdog:
    """Within its context, this process exits if another rank dies, rather than wait for it forever.

    Each rank counts heartbeats in torchrun's store. When one rank's count has not changed for
    PATIENCE seconds, the others name it and exit, so that torchrun can end or restart them all.

    A rank whose own heartbeat was late has no right to judge. Something held Python's lock, such as
    safetensors while it writes a checkpoint, and the others may be at the same. So it restarts
    their clocks, and grants them the time that it took itself.
    """

    def __enter__(self):
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if "MASTER_PORT" in os.environ and world_size() > 1:
            self.thread.start()

    def __exit__(self, kind, error, _):
        """Report a failed collective in one line as well: gloo's fail at once."""
        if isinstance(error, RuntimeError) and re.search("gloo|NCCL|c10d", str(error)):
            self.exit("the connection to another rank broke; torchrun says below which one failed")
        if error is None or isinstance(error, SystemExit):  # all ranks end: not a failure
            self.ended.set()
            if self.thread.is_alive():
                self.thread.join()

    def watch(self):
        keys = [f"beat/{restart_count()}/{i}" for i in range(world_size())]
        seen = {key: (0, time.monotonic()) for key in keys}
        try:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            last = time.monotonic()
            while not self.ended.wait(BEAT):
                store.add(keys[rank()], 1)
                now = time.monotonic()
                late, last = now - last - BEAT, now
                for i, key in enumerate(keys):
                    beats = store.add(key, 0)
                    if late > BEAT:
                        seen[key] = beats, now + late
                    elif beats != seen[key][0]:
                        seen[key] = beats, now
                    elif now - seen[key][1] > PATIENCE and beats < DONE:
                        self.exit(f"rank {i} has died, or hangs")
            store.add(keys[rank()], DONE)
        except RuntimeError:
            if not self.ended.is_set():
                self.exit("torchrun's store is gone, and with it the first node")

    def exit(self, why):
        cli.fail(f"{why}; the same command resumes")
        time.sleep(1)  # torchrun names the rank that it sees end first: let that be the dead one
        os._exit(1)  # the main thread waits in a collective, which nothing interrupts
