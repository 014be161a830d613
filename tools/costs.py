"""The counter of costs: FLOPs and bytes of any function, counted on PyTorch's meta device.

A tensor on the meta device has a shape and no content, so a model of any size takes no memory and
runs at once. `tools.plan`, `tools.bench` and `tools.ablation` count with these functions.
"""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tiny_wan import WanModel
from tiny_wan.model import KEPT_PRECISE

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"  # shows what is counted and timed


class Meter(TorchDispatchMode):
    """Counts FLOPs, by PyTorch's own formulas, and the bytes of meta tensors while they live.

    Tensors that existed before, such as weights, are not counted. (PyTorch's FlopCounterMode also
    counts FLOPs, but it leaves reference cycles behind, which keep tensors alive.)
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if formula := flop_registry.get(op.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        new = self.storages(out)
        if new.keys() - self.alive:
            for key in new.keys() - self.alive - self.storages((args, kwargs)).keys():
                self.alive.add(key)
                self.bytes += new[key].nbytes()
                weakref.finalize(new[key], self.free, key, new[key].nbytes())
            self.peak = max(self.peak, self.bytes)
        return out

    def storages(self, tree):
        """Of the meta tensors in `tree`, by identity: a view shares its base's."""
        storages = (t.untyped_storage() for t in tree_leaves(tree)
                    if isinstance(t, torch.Tensor) and t.is_meta)
        return {storage._cdata: storage for storage in storages}

    def free(self, key, size):
        self.alive.remove(key)
        self.bytes -= size


@contextmanager
def flash_attention():
    """In this block attention costs what it costs on a GPU.

    For backward a GPU keeps one number for each row of the l x l scores. On the meta device PyTorch
    would choose its plain attention, which keeps all scores. FLOPs are 4 l l d forward, and 2.5
    times that backward, which computes the scores again. (A TorchFunctionMode would not do: PyTorch
    switches it off in backward, where checkpointing runs the blocks again.)
    """
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v: (
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0])
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def count(function):
    """Of `function()` and, if it returns a loss, its backward: `[FLOPs, kept bytes, peak bytes]`.

    Kept are those that are alive between forward and backward.
    """
    with flash_attention(), Meter() as meter:
        result = function()
        kept = meter.bytes
        if result.requires_grad:
            result.backward()
    return np.array([meter.flops, kept, meter.peak], dtype=float)


def at_full_depth(config, counted, depth=1):
    """`counted(config)`, from models of `depth` blocks and one more: each block adds the same."""
    low, high = (counted(replace(config, num_layers=n)) for n in (depth, depth + 1))
    return low + (config.num_layers - depth) * (high - low)


def build(config):
    """A model as it computes on a GPU: in bfloat16, except for what Wan computes in float32."""
    with torch.device("meta"):
        model = WanModel(config).bfloat16()
    for name, p in model.named_parameters():
        if KEPT_PRECISE.search(name):
            p.data = p.data.float()
    return model


def inputs(config, shape, batch_size):
    """Latents `[b, c, f, h, w]` and text `[b, l, d]`."""
    with torch.device("meta"):
        return (torch.empty(batch_size, *shape),
                torch.empty(batch_size, config.text_len, config.text_dim))
