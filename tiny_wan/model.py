"""The Wan2.1 text-to-video transformer: one class, from a toy of 0.9M parameters to 14B.

    model = WanModel(PRESETS["tiny"]).init_weights()      # or WanModel.from_pretrained(folder)
    velocity = model(x_t, t, text)

Parameter names and numerics are those of the original code (github.com/Wan-Video/Wan2.1), so the
published checkpoints load without conversion. Reference: "Wan: Open and Advanced Large-Scale Video
Generative Models", arXiv 2503.20314.

A model that is loaded in bfloat16 runs its large matrix products and its attention in bfloat16. The
time embedding, norms, modulation, gated residuals and rotations are computed in float32: they are
cheap, and bfloat16 keeps only 8 significant bits (757 becomes 756).
"""

import math
import re
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from tiny_wan import checkpoint


@dataclass(frozen=True)
class WanConfig:
    """The sizes of a model. Field names are those of the original `config.json`."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256  # width of the sinusoidal timestep embedding
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, height, width
    eps: float = 1e-6

    def __post_init__(self):
        if self.num_heads < 1 or self.dim % (2 * self.num_heads):
            raise ValueError(f"num_heads {self.num_heads} does not split dim {self.dim} into heads "
                             f"of equal, even width")

    @classmethod
    def from_pretrained(cls, path):
        """The sizes of the model at `path`, without loading its weights."""
        fields = checkpoint.read_config(path)
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{checkpoint.named(path)}: {error}") from None


PRESETS = {  # dim, ffn_dim, num_heads, num_layers
    "tiny": WanConfig(96, 384, 4, 5, in_dim=12, out_dim=12, text_dim=34, text_len=16),
    "wan-1.3b": WanConfig(1536, 8960, 12, 30),
    "wan-14b": WanConfig(5120, 13824, 40, 40),
}
KEPT_PRECISE = re.compile(r"time_embedding|time_projection|modulation|norm")  # loaded in float32


def sinusoidal_embedding(t, dim):
    """`t` `[b]` in [0, 1000] -> `[b, dim]`: cosines, then sines. In float32, as in diffusers."""
    channel = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * channel / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rope_table(f, h, w, head_dim, frame_stride, device):
    """Cosines and signed sines `[f*h*w, 1, head_dim]` of the 3D rotary embedding, for `rotate`.

    The channels of each head are divided among the three axes, in the order time, height, width.
    Of d channels, height and width get `2 (d // 6)` each, and time gets the rest. Each pair of an
    axis's channels is rotated by the position on that axis times the pair's frequency.

    At frame stride s, frames have positions 0, s, 2s, ... in time, as in the full-rate video.
    Renumbered 0, 1, 2, ..., they would pass for adjacent frames, and the video would move less.
    """
    home = "cpu" if device.type == "mps" else device  # MPS has no float64
    arange = partial(torch.arange, dtype=torch.float64, device=home)
    split = 2 * (head_dim // 6)
    angles = []
    for n, dim, stride in (
            (f, head_dim - 2 * split, frame_stride), (h, split, 1), (w, split, 1)):
        freqs = 10000.0 ** -(arange(0, dim, 2) / dim)
        angles.append(arange(n)[:, None] * stride * freqs)
    frames, rows, columns = angles
    angles = torch.cat([
        frames[:, None, None].expand(f, h, w, -1),
        rows[None, :, None].expand(f, h, w, -1),
        columns[None, None, :].expand(f, h, w, -1),
    ], dim=-1).flatten(0, 2)
    cos, sin = angles.cos(), angles.sin()
    return tuple(torch.stack(pair, dim=-1).flatten(1)[:, None].float().to(device)
                 for pair in ((cos, cos), (-sin, sin)))


def rotate(x, rope):
    """Rotate each pair of neighbouring channels of `x` `[b, tokens, heads, d]` by its angle.

    (a, b) -> (a cos - b sin, b cos + a sin). The roll swaps each pair to (b, a), and the table's
    sines have the signs (-, +).
    """
    cos, sin = rope
    swapped = x.float().unflatten(-1, (-1, 2)).roll(1, -1).flatten(-2)
    return (x.float() * cos).addcmul_(swapped, sin).type_as(x)


class RMSNorm(nn.Module):
    """Normalises over the full width, all heads together, and computes in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that computes in float32, whatever the dtype of `x`."""

    def forward(self, x):
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class Attention(nn.Module):
    """Multi-head attention of `x` to `context`, or to itself.

    x: `[b, tokens, dim]`; context: `[b, l, dim]`; rope: what `rope_table` returns.
    """

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, context=None, rope=None):
        source = x if context is None else context
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulate(x, shift, scale):
    """Adaptive layer norm: scale and shift the normalised `x`, in float32."""
    return (x.float() * (1 + scale)).add_(shift).type_as(x)


def add_gated(x, y, gate):
    """The residual `x + gate * y`, summed in float32."""
    return (y.float() * gate).add_(x).type_as(x)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, and a feed-forward network.

    The norms are in order of use: the original names them norm1, norm3, norm2.
    """

    def __init__(self, c):
        super().__init__()
        self.norm1 = LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.self_attn = Attention(c.dim, c.num_heads, c.eps)
        self.norm3 = LayerNorm(c.dim, c.eps)
        self.cross_attn = Attention(c.dim, c.num_heads, c.eps)
        self.norm2 = LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, c.dim))

    def forward(self, x, e, text, rope):
        """`x` `[b, tokens, dim]`, `text` `[b, text_len, dim]` -> `[b, tokens, dim]`.

        e: `[b, 6, dim]`, float32, from the time and the same for all blocks: shift, scale and gate
            of the self-attention, then of the feed-forward network. Each block adds its own
            `modulation`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + e).chunk(6, dim=1)
        y = self.self_attn(modulate(self.norm1(x), shift1, scale1), rope=rope)
        x = add_gated(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x), context=text)
        y = self.ffn(modulate(self.norm2(x), shift2, scale2))
        return add_gated(x, y, gate2)


class Head(nn.Module):
    """Maps each token to the velocity of its patch."""

    def __init__(self, c):
        super().__init__()
        self.norm = LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.head = nn.Linear(c.dim, math.prod(c.patch_size) * c.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, c.dim))

    def forward(self, x, e):
        """`x` `[b, tokens, dim]`, `e` `[b, dim]` float32 -> `[b, tokens, patch * out_dim]`."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)
        return self.head(modulate(self.norm(x), shift, scale))


class WanModel(nn.Module):
    """Predicts the velocity `noise - x0` of a noised video latent. See `forward` for shapes."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.gradient_checkpointing = False  # recompute blocks in backward: less memory, more time
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, stride=c.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(
            nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)

    def forward(self, x, t, text, frame_stride=1):
        """The velocity at time `t`, in the shape and dtype of `x`.

        x: noised latents `[b, c, f, h, w]`, with f, h and w multiples of the patch size.
        t: `[b]` in [0, 1000].
        text: `[b, l, text_dim]` with l <= text_len; it is padded with zeros to text_len.
        frame_stride: s, if `x` holds every s-th frame of the video (see `rope_table`).

        Raises ValueError if the shape of `x` or `text` does not fit.
        """
        c = self.config
        dtype = self.patch_embedding.weight.dtype
        p, q, r = c.patch_size
        if x.ndim != 5 or x.shape[1] != c.in_dim or any(
                n % m for n, m in zip(x.shape[2:], c.patch_size)):
            raise ValueError(f"x is {list(x.shape)}, but must be [b, {c.in_dim}, f, h, w] with f, "
                             f"h and w multiples of the patch size {c.patch_size}")
        if text.ndim != 3 or text.shape[2] != c.text_dim or text.shape[1] > c.text_len:
            raise ValueError(f"text is {list(text.shape)}, but must be [b, l, {c.text_dim}] with "
                             f"l at most {c.text_len}, the model's text_len")

        f, h, w = (n // m for n, m in zip(x.shape[2:], c.patch_size))
        places = rope_table(f, h, w, c.dim // c.num_heads, frame_stride, x.device)
        tokens = rearrange(self.patch_embedding(x.to(dtype)), "b d f h w -> b (f h w) d")
        tokens = tokens.contiguous()  # otherwise the norms of every layer would copy them
        if text.shape[1] < c.text_len:
            text = F.pad(text, (0, 0, 0, c.text_len - text.shape[1]))
        text = self.text_embedding(text.to(dtype))

        # e `[b, dim]` embeds the time and goes to the head; e6 `[b, 6, dim]` goes to all blocks
        precise = self.time_embedding[0].weight.dtype
        e = self.time_embedding(sinusoidal_embedding(t.to(x.device), c.freq_dim).to(precise))
        e6 = self.time_projection(e.to(self.time_projection[1].weight.dtype))
        e, e6 = e.float(), e6.float().unflatten(1, (6, c.dim))

        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = recompute(block, tokens, e6, text, places, use_reentrant=False)
            else:
                tokens = block(tokens, e6, text, places)
        return rearrange(self.head(tokens, e), "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
                         f=f, h=h, w=w, p=p, q=q, r=r).to(x.dtype)

    def init_weights(self, seed=0):
        """Draw random weights, to train from scratch; return the model.

        This is Wan's own scheme, except for the gates. Wan draws all modulation near zero, so a
        block adds almost nothing for thousands of steps. With gates that start at one, a tiny
        network learns coherent motion within minutes.
        """
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("modulation"):
                nn.init.normal_(p, std=self.config.dim ** -0.5, generator=g)
                if p.shape[1] == 6:  # of a block, where 2 and 5 are the gates
                    p.data[:, [2, 5]] += 1
            elif name.startswith("head.") or name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(p, std=0.02, generator=g)
            elif p.ndim > 1:
                nn.init.xavier_uniform_(p.data.flatten(1), generator=g)
        return self

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, merge=None):
        """The model in a folder or a file of weights, in any layout of `checkpoint.py`.

        dtype: of the weights; by default the file's own, and then they stay memory-mapped. If one
            is given, the time embedding, modulation and norms are still loaded in float32.
        merge: a function from a parameter's name and value to the value that it is to have. One
            value after the other is converted, so that memory holds the model once.

        Raises ValueError or FileNotFoundError, which name the file and the tensors at fault.
        """
        def convert(name, tensor):
            precise = KEPT_PRECISE.search(name) and (dtype or merge)
            kept = torch.float32 if precise else dtype or tensor.dtype
            return (merge(name, tensor) if merge else tensor).to(device, kept)

        with torch.device("meta"):
            model = cls(WanConfig.from_pretrained(path))
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        model.load_state_dict(checkpoint.read_weights(path, shapes, convert), assign=True)
        return model

    def save_pretrained(self, path, layout="original", metadata=None):
        """Write the model for `from_pretrained`, and for other software that uses the layout.

        layout: "original" and "diffusers" write to the folder `path`, in shards above 5 GB.
            "comfyui" writes one file: `path` if it ends in .safetensors, else a file in the
            folder `path`, named after it.
        metadata: strings for the headers of the safetensors files.
        """
        checkpoint.write(path, asdict(self.config), self.state_dict(), layout, metadata)
