"""What one video costs in Wan2.1's three networks: FLOPs and bytes, by formulas of their sizes.

FLOPs are those of matrix products, convolutions and attention. A multiplication and an addition are
two. `shape` is that of the video's latents at the full frame rate, `(c, f, h, w)`. `tools.plan`,
`tools.gpu_check` and `experiments.bench` compute with these functions. `count_flops` counts what
runs.
"""

import math
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tiny_wan import WanCodec

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"  # shows what is computed and timed
# PyTorch's convolutions in float32 run in TF32 on an NVIDIA GPU. Its peak is half of bfloat16's on
# an A100, an H100 and an RTX 4090.
TF32 = 0.5
# Of the VAE for each latent pixel, counted once on diffusers' code: GFLOPs of the convolutions in
# the first latent frame and in each other one, and the most numbers in memory while decoding one.
VAE_GFLOPS = {"encode": (0.426, 1.281), "decode": (0.688, 2.162)}
VAE_PEAK = 317_000


def tokens(config, shape, stride=1):
    """The transformer's tokens for a video at a frame stride."""
    _, f, h, w = shape
    return len(range(0, f, stride)) * h * w // math.prod(config.patch_size)


def linear_layers(config, l):
    """A block's linear layers, for a video of `l` tokens: `(rows, inputs, outputs)` of each."""
    d, hidden = config.dim, config.ffn_dim
    return [*6 * [(l, d, d)], *2 * [(config.text_len, d, d)],  # keys and values of the text
            (l, d, hidden), (l, hidden, d)]


def forward_parts(config, shape, stride=1):
    """FLOPs of a forward: the products of all blocks, their attention, and all the rest."""
    c, l, patch = config, tokens(config, shape, stride), math.prod(config.patch_size)
    products = sum(2 * rows * i * o for rows, i, o in linear_layers(c, l))
    attention = 4 * l * (l + c.text_len) * c.dim  # to the video and to the text
    rest = 2 * c.dim * (l * patch * (c.in_dim + c.out_dim)  # patch embedding and head
                        + c.text_len * (c.text_dim + c.dim) + c.freq_dim + 7 * c.dim)
    return c.num_layers * products, c.num_layers * attention, rest


def forward_flops(config, shape, stride=1):
    return sum(forward_parts(config, shape, stride))


def forward_activations(config, shape):
    """The most bytes that a forward without gradients needs, beside the weights.

    They are either in a feed-forward network, with its hidden layer before and after GELU and four
    tensors of width dim, all bfloat16, or where queries and keys are rotated in float32.
    """
    d, hidden = config.dim, config.ffn_dim
    rotations = 8 * d // config.num_heads  # cosines and sines
    return tokens(config, shape) * (max(8 * d + 4 * hidden, 24 * d) + rotations)


def text_encoder_flops(l=512):
    """Of UMT5-XXL on a prompt of `l` tokens."""
    sizes = WanCodec.UMT5_XXL
    d, inner = sizes["d_model"], sizes["num_heads"] * sizes["d_kv"]
    products = 4 * d * inner + 3 * d * sizes["d_ff"]
    return sizes["num_layers"] * (2 * l * products + 4 * l * l * inner)


def vae_flops(method, shape):
    """Of the VAE's method "encode" or "decode".

    Each latent frame stands for four frames of the video, the first one for a single frame. One
    layer of attention, 384 channels wide, is among the latent pixels of a frame.
    """
    _, f, h, w = shape
    first, other = VAE_GFLOPS[method]
    return 1e9 * h * w * (first + (f - 1) * other) + 4 * f * (h * w) ** 2 * 384


def vae_activations(shape):
    """The most numbers in memory while a video is decoded, beside the weights; an estimate.

    The frames that are done wait in memory, with 3 colours of 4 x 8 x 8 pixels for a latent pixel.
    """
    _, f, h, w = shape
    return h * w * (VAE_PEAK + 768 * f)


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS = flop_registry | {  # PyTorch has them for a GPU's flash attention, but not for a CPU's
    FLASH: lambda *args, **_: sdpa_flop_count(*(x.shape for x in args[:3])),
    FLASH_BACKWARD: lambda *args, **_: sdpa_backward_flop_count(*(x.shape for x in args[:4]))}


class Flops(TorchDispatchMode):
    """Counts FLOPs by the formulas of PyTorch's FlopCounterMode, in a third of its time."""

    flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if formula := FORMULAS.get(op.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(function):
    with Flops() as counter:
        function()
    return counter.flops
