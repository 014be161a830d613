"""The counter of costs: FLOPs and bytes of any function, counted on PyTorch's meta device.

A tensor on the meta device has a shape and no content, so a model of any size takes no memory and
runs at once. `tools.plan`, `tools.bench`, `tools.wan_check` and `tools.ablation` count with these
functions.
"""

import functools
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tiny_wan import WanCodec, WanModel
from tiny_wan.model import KEPT_PRECISE

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"  # shows what is counted and timed
# PyTorch's convolutions in float32 run in TF32 on an NVIDIA GPU. Its peak is half of bfloat16's on
# an A100, an H100 and an RTX 4090.
TF32 = 0.5


class Meter(TorchDispatchMode):
    """Counts FLOPs, by PyTorch's own formulas, and the bytes of meta tensors while they live.

    Tensors that existed before, such as weights, are not counted. (PyTorch's FlopCounterMode also
    counts FLOPs, but it leaves reference cycles behind, which keep tensors alive.)
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if formula := flop_registry.get(op.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for storage in storages(out) - storages((args, kwargs)):
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


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
            kept = meter.bytes
            if result.requires_grad:
                result.backward()
    finally:
        F.scaled_dot_product_attention = plain
    return np.array([meter.flops, kept, meter.peak], dtype=float)


@functools.cache
def count_forward(config, shape, batch_size=1, stride=1):
    """`count` of a forward at a frame stride, on latents of a full-rate `shape` (c f h w)."""
    def counted(config):
        model = build(config).requires_grad_(False)
        x, text = inputs(config, shape, batch_size)
        t = torch.empty(batch_size, device="meta")
        return count(lambda: model(x[:, :, ::stride], t, text, frame_stride=stride))

    return at_full_depth(config, counted)


@functools.cache
def count_text_encoder(tokens=512):
    """`count` of UMT5-XXL on one prompt."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        # Eager, as `flash_attention` takes no bias of positions. The FLOPs are the same.
        config = UMT5Config(**WanCodec.UMT5_XXL, attn_implementation="eager")
        encoder = UMT5EncoderModel(config).requires_grad_(False)
        prompt = torch.empty(1, tokens, dtype=torch.long)
    return count(lambda: encoder(prompt).last_hidden_state)


@functools.cache
def count_vae(method, shape, dtype=torch.float32):
    """`count` of the VAE's method "encode" or "decode", for a video with latents of `shape`.

    The VAE works through one latent frame after another, and each costs the same. The third is the
    first that has all earlier ones in its cache.
    """
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae = AutoencoderKLWan().requires_grad_(False)
    for p in vae.parameters():
        p.data = p.data.to(dtype)
    channels, total, height, width = shape

    def counted(frames):
        latents = torch.empty(1, channels, frames, height, width, dtype=dtype, device="meta")
        video = torch.empty(1, 3, 4 * frames - 3, 8 * height, 8 * width, dtype=dtype, device="meta")
        return count({"encode": lambda: vae.encode(video).latent_dist.mode(),
                      "decode": lambda: vae.decode(latents).sample}[method])

    low, high = counted(3), counted(4)
    return low + (total - 3) * (high - low)


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
