"""The two operations: what the reference promises, and that the Triton kernels keep it.

The kernels run on the GPU if there is one, and otherwise in Triton's interpreter. That must be
chosen before Triton is imported, so it gets a process of its own.
"""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adavid
import kernels
from kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest value. bfloat16's is a whole unit: the interpreter truncates.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SIZES = (
    (1, 1, 1, 1, 1),
    (2, 3, 1, 5, 7),
    (1, 1, 2, 3, 3),
    (2, 2, 6, 17, 61),
    (1, 16, 9, 6, 8),
    (3, 5, 9, 1, 13),
)
LAYOUTS = {
    "contiguous": lambda rand, b, c, f, h, w: rand(b, c, f, h, w),
    "every_second_frame": lambda rand, b, c, f, h, w: rand(b, c, 2 * f, h, w)[:, :, ::2],
    "cropped": lambda rand, b, c, f, h, w: rand(b, c, f, h + 2, w + 3)[..., 1:-1, 2:-1],
    "channels_last": lambda rand, b, c, f, h, w: rand(b, f, h, w, c).permute(0, 4, 1, 2, 3),
    "of_a_unet": lambda rand, b, c, f, h, w: rand(b, f, c + 1, h, w).transpose(1, 2)[:, 1:],
    "transposed": lambda rand, b, c, f, h, w: rand(b, c, f, w, h).transpose(3, 4),
    "one_frame_expanded": lambda rand, b, c, f, h, w: rand(b, c, 1, h, w).expand(b, c, f, h, w),
    "one_row_expanded": lambda rand, b, c, f, h, w: rand(b, 1, f, 1, w).expand(b, c, f, h, w),
}


def case(operation, size, dtype=torch.float32, layout="contiguous"):
    """(operation, inputs, gradient of the result), all in one layout."""
    rand = lambda *shape: torch.rand(shape, dtype=dtype, device=DEVICE)
    video = lambda c, f: LAYOUTS[layout](rand, b, c, f, h, w)
    b, c, f, h, w = size
    if operation == "temporal_variance":
        grad = torch.rand(1, 2 * b, device=DEVICE) * c * h * w  # so that float16 holds the result
        return operation, [video(c, f)], grad[0, ::2]
    return operation, [video(c, f), video(1, f - 1), video(c, f - 1)], video(c, 2 * f - 1)


def run(ops, operation, inputs, grad):
    """[result, gradients of the inputs]."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = getattr(ops, operation)(*inputs)
    out.backward(grad)
    return [out.detach()] + [x.grad for x in inputs]


def run_kernels(operation, inputs, grad):
    """`run` on Triton, through the public functions, whose checks are part of the contract."""
    kernels.backend = lambda x: kernels.fused
    return run(kernels, operation, inputs, grad)


@pytest.fixture(scope="module")
def bench():
    return pytest.importorskip("kernels.bench")  # which imports Triton


@pytest.fixture(scope="module")
def run_triton():
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        assert kernels.backend(torch.ones(1, device="cuda")) is kernels.fused
        yield lambda *case: run(kernels, *case)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            process.submit(int).result()  # the process starts here
        yield lambda *case: process.submit(run_kernels, *case).result()


def assert_close(results, wanted):
    for result, exact in zip(results, wanted, strict=True):
        assert result.shape == exact.shape
        if result.numel():
            error = (result.double() - exact).abs().max()
            assert error <= TOLERANCE[result.dtype] * exact.abs().max()


def assert_triton_matches_reference(run_triton, operation, inputs, grad):
    exact = run(reference, operation, [x.double() for x in inputs], grad.double())
    results = run_triton(operation, inputs, grad)
    assert_close(results, exact)
    assert [x.dtype for x in results[1:]] == [x.dtype for x in inputs]
    return results


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("operation", ["temporal_variance", "interpolate_frames"])
def test_triton_and_reference_agree_in_values_and_gradients(run_triton, operation, dtype, size):
    result, *_ = assert_triton_matches_reference(run_triton, *case(operation, size, dtype))
    assert result.dtype == (torch.float32 if operation == "temporal_variance" else dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", ["temporal_variance", "interpolate_frames"])
def test_strides_change_nothing(run_triton, operation, layout):
    assert_triton_matches_reference(run_triton, *case(operation, (2, 3, 5, 6, 16), layout=layout))


def test_given_frames_are_kept_bit_for_bit(run_triton):
    operation, inputs, grad = case("interpolate_frames", (2, 3, 4, 5, 7), torch.bfloat16)
    out, *_ = run_triton(operation, inputs, grad)
    assert out[:, :, ::2].equal(inputs[0])
    assert reference.interpolate_frames(*inputs)[:, :, ::2].equal(inputs[0])


def test_mixed_precision_keeps_each_inputs_own(run_triton):
    operation, inputs, grad = case("interpolate_frames", (1, 4, 3, 5, 7), torch.bfloat16)
    inputs[1:3] = [x.float() for x in inputs[1:3]]  # a float32 interpolator on bfloat16 latents
    assert_triton_matches_reference(run_triton, operation, inputs, grad)


@pytest.mark.parametrize("first", [0.0, 1e4], ids=["all_frames_far_off", "first_frame_far_off"])
def test_large_means_cost_no_precision(run_triton, first):
    x = torch.randn(1, 2, 21, 8, 8, device=DEVICE) + 1e4
    x[:, :, 0] -= first
    grad = torch.ones(1, device=DEVICE)
    exact = run(reference, "temporal_variance", [x.double()], grad.double())
    assert_close(run_triton("temporal_variance", [x], grad), exact)
    # The reference's gradient is not as good: float32 holds a mean near 1e4 only to 1e-3.
    assert_close([reference.temporal_variance(x)], exact[:1])


def test_every_run_gives_the_same_bits(run_triton):
    for operation in ("temporal_variance", "interpolate_frames"):
        again = case(operation, (2, 3, 5, 40, 40))
        for one, two in zip(run_triton(*again), run_triton(*again)):
            assert one.equal(two)


def test_reference_gradients_are_those_of_its_values():
    for operation in ("temporal_variance", "interpolate_frames"):
        _, inputs, _ = case(operation, (2, 2, 3, 2, 3), torch.float64)
        inputs = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(getattr(kernels, operation), inputs)


def test_a_blend_of_one_is_the_left_neighbour():
    x0, residual = torch.rand(2, 3, 4, 5, 6), torch.rand(2, 3, 3, 5, 6)
    frames = kernels.interpolate_frames(x0, torch.ones(2, 1, 3, 5, 6), residual)
    torch.testing.assert_close(frames[:, :, 1::2], x0[:, :, :-1] + residual)


@pytest.mark.parametrize("wrong, name", [(0, "blend"), (1, "blend"), (2, "residual")])
def test_wrong_shapes_are_named(wrong, name):
    _, inputs, _ = case("interpolate_frames", (2, 3, 4, 5, 6))
    with pytest.raises(ValueError, match="x must be"):
        kernels.temporal_variance(inputs[0][:, :, :0])
    inputs[wrong] = inputs[wrong][..., :1]  # x0 is what the others must fit
    with pytest.raises(ValueError, match=f"{name} must "):
        kernels.interpolate_frames(*inputs)


def test_without_triton_the_reference_serves():
    code = ("import sys; sys.modules['triton'] = None; import kernels, torch; "
            "kernels.temporal_variance(torch.rand(1, 2, 3, 4, 5))")
    root = Path(kernels.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_kernels_compile_without_a_gpu(bench, target):
    for operation, inputs in bench.wan_inputs().items():
        compiled = bench.compiled(bench.TARGETS[target], operation, inputs)
        assert len(compiled) == 2  # one forward, one backward
        assert all("cubin" in kernel.asm or "hsaco" in kernel.asm for kernel in compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_aligned_videos_move_16_bytes_at_a_time_and_nothing_spills(bench, target, dtype):
    for operation, inputs in bench.wan_inputs(dtype=dtype).items():
        for kernel in bench.compiled(bench.TARGETS[target], operation, inputs):
            code = bench.machine_code(kernel)
            assert code["scratch"] == 0
            # The others are a scalar each (dL/dy and a partial sum), or blend and dL/dblend.
            assert code["loads_16"] >= max(4, code["loads"] - 1)
            assert code["stores_16"] >= max(2, code["stores"] - 1)


def test_the_frame_interpolators_call_copies_nothing(bench, monkeypatch):
    monkeypatch.setattr(kernels, "backend", lambda x: kernels.fused)
    model, video = adavid.FrameInterpolator(16, width=8), torch.rand(2, 16, 9, 8, 8)
    aten, ran = torch.ops.aten, []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if not op.is_view:
                ran.append(op)
            return op(*args, **(kwargs or {}))

    with bench.compile_only(bench.TARGETS["sm_90"]), Recorder():
        out = model(video[:, :, ::2])  # as in training; in sampling, x0 is dense
        last = len(ran) - ran[::-1].index(aten.convolution.default)
        assert ran[last:] == [aten.sigmoid.default, aten.new_empty.default]  # blend and the result
        grad = torch.ones_like(out)
        ran.clear()
        out.backward(grad)
    assert ran[:4] == [aten.new_empty.default] * 3 + [aten.slice_backward.default]


def test_benchmarks_have_the_frame_interpolators_inputs(bench, monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "interpolate_frames", lambda *inputs: calls.append(inputs))
    with torch.device("meta"):
        adavid.FrameInterpolator(16, width=8).half()(torch.empty(1, 16, 11, 60, 104))
    layout = lambda x: (x.dtype, x.shape, x.stride(), x.storage_offset())
    assert [*map(layout, *calls)] == [*map(layout, bench.wan_inputs()["interpolate_frames"])]


def test_benchmarks_count_the_bytes_that_must_move(bench):
    variance, frames = bench.wan_inputs().items()
    with bench.compile_only(bench.TARGETS["sm_90"]):
        counted = [bench.bytes_moved(*each) for each in (variance, frames)]
    x, mean, out = 16 * 21 * 6240 * 4, 16 * 6240 * 4, 4
    assert counted[0]["both"] == 3 * x + 2 * mean + 2 * out
    x0, blend, residual = 16 * 11 * 6240 * 4, 10 * 6240 * 4, 16 * 10 * 6240 * 4
    assert counted[1]["both"] == 3 * x0 + 3 * blend + 2 * residual + 2 * x
