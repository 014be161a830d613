"""Several processes as one: ranks, what they share, and what happens when one dies.

Under torchrun each process is a rank; alone, there is one.
"""

import os
import re
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from runtime import cli


def init_distributed(device_name):
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
        # torchrun's store outlives a restart, with the addresses of ranks that are gone.
        store, rank, ranks = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=dist.PrefixStore(restart_count(), store), rank=rank,
                                world_size=ranks)
    elif device.type == "cuda":  # a group of one: FSDP is what computes in bfloat16
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def restart_count():
    """The number of times that torchrun has started all ranks again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(model, device, dtype=None):
    """FSDP2: each rank keeps a part of every tensor and gathers one block's at a time. -> model

    dtype: to compute in, by default float32, which the parts are in. Norms and modulation are
    rounded to it as well. Gradients are averaged over the ranks, in float32. Without a process
    group, the model just moves to the device.
    """
    if not dist.is_initialized():
        return model.to(device, torch.float32)
    mesh = init_device_mesh(device.type, (world_size(),))
    precise = [model.time_embedding, model.time_projection]  # as Wan computes them
    for part in [*precise, *model.blocks, model]:
        # Inputs stay as they are: in bfloat16 there is no timestep 757.
        policy = MixedPrecisionPolicy(None if part in precise else dtype, torch.float32,
                                      cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model.float()  # only now, so that no rank ever holds all of it in float32


def broadcast(value):
    """The first rank's value, on all of them."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_gather(value):
    """A list of all ranks' values, on all of them."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def full_tensor(tensor):
    """All of a tensor that may be in parts; every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_metrics(metrics):
    """Each metric's mean over those dicts of the list that have it."""
    values = {name: [m[name] for m in metrics if name in m] for m in metrics for name in m}
    return {name: sum(v) / len(v) for name, v in values.items()}


def all_reduce_mean(metrics):
    """Each metric's mean over those ranks that have it."""
    return mean_metrics(all_gather(metrics))


# ---------------------------------------------------------------------------------------------
# Ranks that die
# ---------------------------------------------------------------------------------------------

BEAT, PATIENCE, DONE = 5, 40, 2**40  # seconds, seconds, and beats of a rank that has ended


class Watchdog:
    """Around the loop: ends this process when another rank has died, for which it would wait.

    Each rank beats, by a counter of its own in torchrun's store. Once one stands still for
    PATIENCE seconds the others name it and leave, so that torchrun can end, or start all anew.
    """

    def __enter__(self):
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if "MASTER_PORT" in os.environ and world_size() > 1:
            self.thread.start()

    def __exit__(self, kind, error, _):
        """A collective that fails, as gloo's do at once, is one line as well."""
        if isinstance(error, RuntimeError) and re.search("gloo|NCCL|c10d", str(error)):
            self.leave("the connection to another rank broke; torchrun says below which one failed")
        if error is None or isinstance(error, SystemExit):  # as on all ranks: none need wait for us
            self.ended.set()
            if self.thread.is_alive():
                self.thread.join()

    def watch(self):
        keys = [f"beat/{restart_count()}/{i}" for i in range(world_size())]
        seen = {key: (0, time.monotonic()) for key in keys}
        try:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            while not self.ended.wait(BEAT):
                store.add(keys[rank()], 1)
                now = time.monotonic()
                for i, key in enumerate(keys):
                    beats = store.add(key, 0)
                    if beats != seen[key][0]:
                        seen[key] = beats, now
                    elif now - seen[key][1] > PATIENCE and beats < DONE:
                        self.leave(f"rank {i} has died, or hangs")
            store.add(keys[rank()], DONE)
        except RuntimeError:
            if not self.ended.is_set():
                self.leave("torchrun's store is gone, and with it the first node")

    def leave(self, why):
        cli.fail(f"{why}; the same command goes on from the last checkpoint")
        os._exit(1)  # the main thread waits in a collective, which nothing interrupts
