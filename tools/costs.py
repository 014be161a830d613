"""The counter of costs: FLOPs and bytes of any function, counted on PyTorch's meta device.

A tensor on the meta device has a shape and no content, so a model of any size takes no memory and
runs at once. `tools.plan`, `tools.bench` and `tools.ablation` count with these functions.
"""

from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

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
        self.flops, self.peak, self.alive = 0, 0, WeakSet()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if formula := flop_registry.get(op.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        self.alive |= storages(out) - storages((args, kwargs))
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self):
        return sum(storage.nbytes() for storage in self.alive)


def storages(tree):
    """Of the meta tensors in `tree`; a view shares its base's."""
    return {t.untyped_storage() for t in tree_leaves(tree)
            if isinstance(t, torch.Tensor) and t.is_meta}


def flash_attention(q, k, v):
    """Attention as on a GPU: for backward it keeps one number for each row of the l x l scores.

    The meta device's own keeps all scores. FLOPs are 4 l l d forward, and 2.5 times that backward,
    which computes the scores again.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def count(function):
    """Of `function()` and, if it returns a loss, its backward: `[FLOPs, kept bytes, peak bytes]`.

    Kept are those that are alive between forward and backward.
    """
    # A TorchFunctionMode would be off in backward, where checkpointing runs the blocks again.
    plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, flash_attention
    try:
        with Meter() as meter:
            result = function()
            kept = meter.bytes()
            if result.requires_grad:
                result.backward()
    finally:
        F.scaled_dot_product_attention = plain
    return np.array([meter.flops, kept, meter.peak], dtype=float)


def count_forward(config, shape, batch_size=1, stride=1):
    """`count` of a forward at a frame stride, on latents of a full-rate `shape` (c f h w)."""
    def counted(config):
        model = build(config).requires_grad_(False)
        x, text = inputs(config, shape, batch_size)
        t = torch.empty(batch_size, device="meta")

        def forward():
            return model(x[:, :, ::stride], t, text, frame_stride=stride)

        forward()  # makes the RoPE table, which stays
        return count(forward)

    return at_full_depth(config, counted)


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
