"""sample.py and tools/export.py on a miniature Wan2.1, against diffusers' WanPipeline."""

import json
import weakref
from functools import partialmethod

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import adavid
import sample
from runtime.models import load_config
from tests import miniature_wan
from tests.helpers import FOUR_STEPS
from tiny_wan import WEIGHTS, WanCodec, WanConfig, WanModel, checkpoint, open_codec
from tiny_wan import codec as codec_module
from tiny_wan.checkpoint import FILE
from tools import export

PROMPT = "A cat &amp; a dog,\t  running"
SIZE = ["--frames", "9", "--height", "64", "--width", "96"]


@pytest.fixture(scope="module")
def pipe():
    pipe = miniature_wan.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["original", "diffusers"])
def folder(request, inputs):
    """A miniature of Wan2.1 in each layout."""
    return inputs[request.param]


@pytest.fixture(scope="module")
def wan(inputs):
    """A miniature in one layout, where the layout does not matter."""
    return inputs["original"]


@pytest.fixture
def student(tmp_path):
    """A student as train.py leaves it: the transformer alone, in the original layout."""
    miniature_wan.transformer(seed=5).save_pretrained(tmp_path / "theirs")
    WanModel.from_pretrained(tmp_path / "theirs").save_pretrained(
        tmp_path / "student", metadata={"method": "AVD", "avd": FOUR_STEPS.to_json()})
    return tmp_path / "student"


def latents(out, *args):
    args = ["--dtype", "float32", *args, "--out", out, "--save-latents", "--device", "cpu"]
    (out / "captions.jsonl").unlink(missing_ok=True)  # of a run with other flags
    assert sample.main([str(a) for a in args]) == 0
    return load_file(out / "latents.safetensors")["latents"]


def theirs(pipe, prompt=PROMPT, negative=WanCodec.negative_prompt, seed=0, **options):
    return pipe(prompt, negative, **{"height": 64, "width": 96, "num_frames": 9} | options,
                generator=torch.Generator().manual_seed(seed), output_type="latent").frames


def test_the_teacher_samples_like_diffusers_pipeline(pipe, folder, tmp_path):
    teacher = [PROMPT, "--teacher", "--model", folder]
    ours = latents(tmp_path, *teacher, *SIZE, "--seed", "3")
    assert (ours - theirs(pipe, seed=3)).abs().max() <= 2e-3  # all 50 steps of both

    ours = latents(tmp_path, *teacher, "--frames", "5", "--height", "32", "--width", "48",
                   "--steps", "6", "--guidance-scale", "3", "--shift", "8", "--negative-prompt",
                   "static")
    shift5 = pipe.scheduler
    pipe.scheduler = shift5.from_config(shift5.config, flow_shift=8.0)
    other = theirs(pipe, negative="static", num_inference_steps=6, guidance_scale=3.0,
                   num_frames=5, height=32, width=48)
    pipe.scheduler = shift5
    assert ours.std() > 0.5 and (ours - other).abs().max() <= 2e-3


def test_prompts_are_encoded_as_diffusers_does(pipe, folder):
    codec = open_codec(folder, WanConfig.from_pretrained(folder), dtype=torch.float32)
    prompts = [PROMPT, "", "caf\u00c3\u00a9 &lt;3 \u7684", "long " * 300, WanCodec.negative_prompt]
    ours = codec.encode_text(prompts)
    other = pipe.encode_prompt(prompts, do_classifier_free_guidance=False,
                               max_sequence_length=512)[0]
    assert ours.shape == other.shape == (5, 512, 32)
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)
    assert (ours[1, 1:] == 0).all() and ours[1, 0].any()  # the empty prompt is only an end token


def test_the_text_encoder_leaves_memory_after_use(wan, monkeypatch):
    encoders, load = [], codec_module.load_text_encoder
    def remembered(*args):
        encoder = load(*args)
        encoders.append(weakref.ref(encoder))
        return encoder
    monkeypatch.setattr(codec_module, "load_text_encoder", remembered)
    codec_module.WanCodec(wan).encode_text(["a cat"])
    assert len(encoders) == 1 and encoders[0]() is None


def test_videos_are_encoded_and_decoded_as_diffusers_does(pipe, folder):
    codec = open_codec(folder, WanConfig.from_pretrained(folder))
    video = torch.rand(2, 3, 9, 64, 48, generator=torch.Generator().manual_seed(0))
    ours = codec.encode(video)
    assert ours.shape == (2, *codec.latent_shape(9, 64, 48))
    mean, std = (torch.tensor(n).view(1, 16, 1, 1, 1) for n in (
        pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    with torch.no_grad():
        other = (pipe.vae.encode(2 * video - 1).latent_dist.mode() - mean) / std
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)
        decoded = pipe.video_processor.postprocess_video(
            pipe.vae.decode(other * std + mean).sample, output_type="pt").transpose(1, 2)
    torch.testing.assert_close(codec.decode(ours), decoded, atol=1e-5, rtol=0)


def test_a_vae_in_bf16_decodes_as_diffusers_own_and_nearly_as_in_float32(wan):
    latents = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    exact, codec = WanCodec(wan).decode(latents), WanCodec(wan, vae_dtype=torch.bfloat16)
    rough = codec.decode(latents)
    with torch.no_grad():
        theirs = miniature_wan.vae().bfloat16().decode(
            (latents * codec.std + codec.mean).bfloat16()).sample.float() / 2 + 0.5
    assert rough.dtype == torch.float32 and torch.equal(rough, theirs)
    error = 255 * (rough - exact)
    assert 0 < error.abs().max() < 20 and error.square().mean().sqrt() < 1.5


@pytest.mark.parametrize("flags, dtype", [
    ([], torch.float32), (["--vae-dtype", "bfloat16"], torch.bfloat16)])
def test_sampling_decodes_in_the_vae_dtype_that_is_asked_for(
        wan, flags, dtype, tmp_path, monkeypatch):
    vaes, load = [], codec_module.load_vae
    monkeypatch.setattr(codec_module, "load_vae", lambda path: vaes.append(load(path)) or vaes[0])
    latents(tmp_path, PROMPT, "--model", wan, "--frames", "1", "--height", "32", "--width", "32",
            *flags)
    assert {p.dtype for p in vaes[0].parameters()} == {dtype}


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_the_vae_goes_on_in_tiles_when_memory_has_run_out(wan, method, monkeypatch, capsys):
    codec = open_codec(wan, WanConfig.from_pretrained(wan))
    shape = (1, 3, 1, 272, 264) if method == "encode" else (1, 16, 1, 34, 33)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    whole = getattr(codec, method)(x)
    usual, calls = getattr(codec.vae, method), []

    def full(*inputs):
        calls.append(codec.vae.use_tiling)
        if not codec.vae.use_tiling:
            raise torch.OutOfMemoryError("out of memory")
        return usual(*inputs)

    monkeypatch.setattr(codec.vae, method, full)
    tiled = getattr(codec, method)(x)
    assert calls == [False, True] and tiled.shape == whole.shape
    assert (tiled - whole).norm() < 0.3 * whole.norm() and not torch.equal(tiled, whole)


def test_bf16_samples_nearly_as_float32_does(wan, tmp_path):
    args = [PROMPT, "--teacher", "--model", wan, *SIZE, "--steps", "3"]
    exact = latents(tmp_path, *args)
    rough = latents(tmp_path, *args, "--dtype", "bfloat16")
    assert 0 < (rough - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_compiled_blocks_give_the_same_video(wan, tmp_path, monkeypatch):
    graphs = []
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(  # inductor takes a minute
        torch.nn.Module.compile, backend=lambda graph, _: graphs.append(graph) or graph))
    args = [PROMPT, "--model", wan, "--frames", "1", "--height", "32", "--width", "32"]
    plain = latents(tmp_path, *args)
    torch.testing.assert_close(latents(tmp_path, *args, "--compile"), plain, atol=1e-5, rtol=0)
    assert graphs


def test_an_exported_student_runs_in_stock_diffusers(pipe, student, tmp_path):
    assert export.main(["--model", str(student), "--out", str(tmp_path / "exported")]) == 0
    stock = WanPipeline(
        pipe.tokenizer, pipe.text_encoder, pipe.vae,
        FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "exported" / "scheduler"),
        WanTransformer3DModel.from_pretrained(tmp_path / "exported", subfolder="transformer"))
    set_timesteps = stock.scheduler.set_timesteps
    stock.scheduler.set_timesteps = lambda steps, device: set_timesteps(
        sigmas=[1.0, 0.9, 0.757, 0.522], device=device)
    torch.manual_seed(7)  # of the renoising, which diffusers draws from the global generator
    other = theirs(stock, num_inference_steps=4, guidance_scale=1.0)

    text = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    ours = adavid.sample(WanModel.from_pretrained(student), noise, text[0], FOUR_STEPS)
    assert other.std() > 0.5 and (ours - other).abs().max() <= 1e-4


def test_exports_in_every_layout_sample_like_the_student(student, wan, tmp_path):
    save_file(adavid.FrameInterpolator(16, width=8).state_dict(),
              student / "interpolator.safetensors")
    args = ["--codec", wan, PROMPT, "--frames", "17", "--height", "32", "--width", "32"]
    wanted = latents(tmp_path / "wanted", "--model", student, *args)
    for layout in checkpoint.LAYOUTS:
        exported = tmp_path / layout
        assert export.main(["--model", str(student), "--out", str(exported),
                            "--layout", layout]) == 0
        ours = latents(tmp_path / "out", "--model", exported, *args)
        torch.testing.assert_close(wanted, ours, atol=1e-5, rtol=0)
    full = latents(tmp_path / "full", "--model", student, *args, "--full-rate")
    assert (wanted - full).abs().max() > 0.1


def test_an_export_has_all_numbers_and_can_round_the_weights(tmp_path):
    """The shipped teacher's file stores only the numbers that differ from the paper's."""
    file = tmp_path / "new" / "wan.safetensors"
    command = ["--model", str(WEIGHTS), "--layout", "comfyui", "--dtype", "bfloat16"]
    assert export.main([*command, "--out", str(file)]) == 0
    assert json.loads(checkpoint.read_metadata(file)["avd"])["timesteps"] == [1000, 900, 757, 522]
    assert load_config(file) == load_config(WEIGHTS)
    tensors = load_file(file)
    assert tensors["model.diffusion_model.blocks.0.self_attn.q.weight"].dtype == torch.bfloat16
    assert tensors["model.diffusion_model.head.modulation"].dtype == torch.float32


def test_a_file_inside_a_pipeline_finds_the_rest_of_it(wan, tmp_path):
    miniature_wan.make(tmp_path / "wan")
    miniature_wan.transformer(num_attention_heads=1, attention_head_dim=128).save_pretrained(
        tmp_path / "wan" / "transformer")
    args = ["a cat", "--frames", "1", "--height", "32", "--width", "32"]
    ways = [tmp_path / "wan", tmp_path / "wan" / "transformer",
            tmp_path / "wan" / "transformer" / FILE]
    first, *others = (latents(tmp_path / "out", *args, "--model", way) for way in ways)
    assert all(torch.equal(first, other) for other in others)
