"""How both kernels address a video: planes of h * w positions, any strides, 64-bit offsets."""

import triton
import triton.language as tl

# A program handles tiles of 1024 values. With two warps that is 16 bytes of bfloat16 per thread on
# AMD, whose warps have 64 threads, and 32 bytes on NVIDIA. PyTorch rounds a product before it adds
# it to something; without fusion, the kernels do the same.
TILE = 1024
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}


def rows(*videos):
    """Each video as the pair (tensor, strides) that `locate` takes, and the length of a row.

    If the rows of every video follow one another in memory, a plane is treated as one long row.
    This holds even for `x[:, :, ::2]`. Triton moves 16 bytes at a time if the length of the row and
    the strides of b, c and f are multiples of 16, as they are for Wan's videos. Other videos move
    in smaller pieces.
    """
    h, w = videos[0].shape[3:]
    flat = all(x.stride(3) == w * x.stride(4) for x in videos)
    merged = lambda b, c, f, row, column: (b, c, f, 0 if flat else row, column)
    return [(x, merged(*x.stride())) for x in videos], h * w if flat else w


@triton.jit
def locate(video, b, c, position, row_length):
    """Pointers to the `position` in channel `c` of frame 0, and the stride from frame to frame."""
    tensor, strides = video
    row, column = (position // row_length).to(tl.int64), (position % row_length).to(tl.int64)
    channel = tensor + b.to(tl.int64) * strides[0] + c.to(tl.int64) * strides[1]
    return channel + row * strides[3] + column * strides[4], strides[2]


@triton.jit
def load(plane, frame, mask):
    pointers, stride = plane
    return tl.load(pointers + tl.cast(frame, tl.int64) * stride, mask, other=0).to(tl.float32)


@triton.jit
def store(plane, frame, value, mask):
    pointers, stride = plane
    tl.store(pointers + tl.cast(frame, tl.int64) * stride, value, mask)
