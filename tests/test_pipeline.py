"""sample.py and tools/export.py on a miniature Wan2.1, against diffusers' WanPipeline."""

import json
import shutil
import sys
import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

import adavid
import sample
from runtime.models import load_config
from tests import miniature_wan
from tests.test_wan import complaint, edit_tensors
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
def folder(request, tmp_path_factory):
    return miniature_wan.make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """For what does not hang on the layout."""
    return miniature_wan.make(tmp_path_factory.mktemp("wan"), "original")


@pytest.fixture
def student(tmp_path):
    """A student as train.py leaves it: the transformer alone, in the original layout."""
    miniature_wan.transformer(seed=5).save_pretrained(tmp_path / "theirs")
    WanModel.from_pretrained(tmp_path / "theirs").save_pretrained(
        tmp_path / "student", metadata={"method": "AVD", "avd": adavid.AVDConfig().to_json()})
    return tmp_path / "student"


def latents(out, *args):
    args = ["--dtype", "float32", *args, "--out", out, "--save-latents", "--device", "cpu"]
    assert sample.main([str(a) for a in args]) == 0
    return load_file(out / "latents.safetensors")["latents"]


def theirs(pipe, prompt=PROMPT, negative=WanCodec.negative_prompt, seed=0, **options):
    return pipe(prompt, negative, **{"height": 64, "width": 96, "num_frames": 9} | options,
                generator=torch.Generator().manual_seed(seed), output_type="latent").frames


def test_the_teacher_is_diffusers_pipeline(pipe, folder, tmp_path):
    teacher = [PROMPT, "--teacher", "--model", folder]
    ours = latents(tmp_path, *teacher, *SIZE, "--seed", "3")
    assert (ours - theirs(pipe, seed=3)).abs().max() <= 2e-3  # all 50 steps of both

    ours = latents(tmp_path, *teacher, "--frames", "5", "--height", "32", "--width", "48",
                   "--steps", "6", "--guidance-scale", "3", "--negative-prompt", "static")
    other = theirs(pipe, negative="static", num_inference_steps=6, guidance_scale=3.0,
                   num_frames=5, height=32, width=48)
    assert ours.std() > 0.5 and (ours - other).abs().max() <= 2e-3


def test_shift_reaches_the_solver(pipe, folder, tmp_path):
    ours = latents(tmp_path, PROMPT, "--teacher", "--model", folder, *SIZE, "--steps", "4",
                   "--shift", "8")
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, flow_shift=8.0)
    other = theirs(pipe, num_inference_steps=4)
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, flow_shift=5.0)
    assert (ours - other).abs().max() <= 2e-3
    assert (ours - theirs(pipe, num_inference_steps=4)).abs().max() > 0.1


def test_prompts_are_encoded_as_diffusers_does(pipe, folder):
    codec = open_codec(folder, WanConfig.from_pretrained(folder), dtype=torch.float32)
    prompts = [PROMPT, "", "caf\u00c3\u00a9 &lt;3 \u7684", "long " * 300, WanCodec.negative_prompt]
    ours = codec.encode_text(prompts)
    other = pipe.encode_prompt(prompts, do_classifier_free_guidance=False,
                               max_sequence_length=512)[0]
    assert ours.shape == other.shape == (5, 512, 32)
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)
    assert (ours[1, 1:] == 0).all() and ours[1, 0].any()  # the empty prompt has its end alone


def test_the_text_encoder_is_gone_once_it_has_spoken(wan, monkeypatch):
    encoders, load = [], codec_module.load_text_encoder
    def remembered(*args):
        encoder = load(*args)
        encoders.append(weakref.ref(encoder))
        return encoder
    monkeypatch.setattr(codec_module, "load_text_encoder", remembered)
    codec_module.WanCodec(wan).encode_text(["a cat"])
    assert len(encoders) == 1 and encoders[0]() is None


def test_encode_and_decode_are_diffusers(pipe, folder):
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


def test_tiles_leave_the_picture_its_size(wan):
    codecs = [open_codec(wan, WanConfig.from_pretrained(wan), tiling=t) for t in (False, True)]
    x = torch.randn(1, 16, 1, 34, 34, generator=torch.Generator().manual_seed(0))
    whole, tiles = (codec.decode(x) for codec in codecs)
    assert whole.shape == tiles.shape == (1, 3, 1, 272, 272)
    assert not torch.equal(whole, tiles)


def test_bf16_lives_in_the_transformer(wan, tmp_path):
    args = [PROMPT, "--teacher", "--model", wan, *SIZE, "--steps", "3"]
    exact = latents(tmp_path, *args)
    rough = latents(tmp_path, *args, "--dtype", "bfloat16")
    assert 0 < (rough - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_compiled_blocks_say_the_same(wan, tmp_path, monkeypatch):
    compiled = []

    def without_inductor(block):  # which takes a minute to start
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager")

    args = [PROMPT, "--model", wan, "--frames", "1", "--height", "32", "--width", "32"]
    plain = latents(tmp_path, *args)
    monkeypatch.setattr(torch.nn.Module, "compile", without_inductor)
    torch.testing.assert_close(latents(tmp_path, *args, "--compile"), plain, atol=1e-5, rtol=0)
    assert len(compiled) == 2  # blocks of the miniature


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
    ours = adavid.sample(WanModel.from_pretrained(student), noise, text[0], adavid.AVDConfig())
    assert other.std() > 0.5 and (ours - other).abs().max() <= 1e-4


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui"])
def test_exports_sample_alike(layout, student, wan, tmp_path):
    adavid.FrameInterpolator(16, width=8).save_pretrained(student / "interpolator.safetensors")
    args = ["--codec", wan, PROMPT, "--frames", "17", "--height", "32", "--width", "32"]
    wanted = latents(tmp_path / "a", "--model", student, *args)
    assert export.main(["--model", str(student), "--out", str(tmp_path / "exported"),
                        "--layout", layout]) == 0
    exported = latents(tmp_path / "b", "--model", tmp_path / "exported", *args)
    torch.testing.assert_close(wanted, exported, atol=1e-5, rtol=0)
    full = latents(tmp_path / "c", "--model", tmp_path / "exported", *args, "--full-rate")
    assert (wanted - full).abs().max() > 0.1


def test_export_keeps_what_is_known_and_can_shorten_the_weights(student, tmp_path):
    file = tmp_path / "new" / "wan.safetensors"
    command = ["--model", str(student), "--layout", "comfyui", "--dtype", "bfloat16"]
    assert export.main([*command, "--out", str(file)]) == 0
    assert load_config(file) == adavid.AVDConfig()
    tensors = load_file(file)
    assert tensors["model.diffusion_model.blocks.0.self_attn.q.weight"].dtype == torch.bfloat16
    assert tensors["model.diffusion_model.head.modulation"].dtype == torch.float32


def test_a_student_is_not_exported_onto_itself(student, tmp_path, capsys):
    pipeline = tmp_path / "pipeline"
    assert export.main(["--model", str(student), "--out", str(pipeline)]) == 0
    for model, out, layout in ((student, student, "original"), (pipeline, pipeline, "diffusers"),
                               (student, student / "wan.safetensors", "comfyui"),
                               (pipeline, pipeline / "transformer", "original"),
                               (pipeline / "transformer" / FILE, pipeline, "diffusers")):
        before = (pipeline / "transformer" / "config.json").read_bytes()
        assert export.main(["--model", str(model), "--out", str(out), "--layout", layout]) == 2
        assert "choose another" in capsys.readouterr().err
        assert (pipeline / "transformer" / "config.json").read_bytes() == before


def test_an_export_always_has_the_step_schedule(tmp_path):
    """The shipped teacher's file stores only what differs from the paper's numbers."""
    assert export.main(["--model", str(WEIGHTS), "--out", str(tmp_path / "x")]) == 0
    numbers = checkpoint.read_metadata(tmp_path / "x")["avd"]
    assert json.loads(numbers)["timesteps"] == [1000, 900, 757, 522]
    assert load_config(tmp_path / "x") == load_config(WEIGHTS)


def test_a_file_in_a_pipeline_finds_what_lies_beside(wan, tmp_path):
    miniature_wan.make(tmp_path / "wan")
    miniature_wan.transformer(num_attention_heads=1, attention_head_dim=128).save_pretrained(
        tmp_path / "wan" / "transformer")
    args = ["a cat", "--frames", "1", "--height", "32", "--width", "32"]
    ways = [tmp_path / "wan", tmp_path / "wan" / "transformer",
            tmp_path / "wan" / "transformer" / FILE]
    first, *others = (latents(tmp_path / "out", *args, "--model", way) for way in ways)
    assert all(torch.equal(first, other) for other in others)


# --- what a wrong command says -----------------------------------------------------------------

@pytest.mark.parametrize("args, says", [
    (["--frames", "80"], "frames 80 does not fit; the nearest that do are 77 and 81"),
    (["--height", "100"], "height 100 does not fit; the nearest that do are 96 and 112"),
    (["--width", "8"], "width 8 does not fit; the nearest that do are 16"),
    (["--frames", "0"], "the nearest that do are 1"),
])
def test_sizes_that_do_not_fit(wan, capsys, args, says):
    assert says in complaint(capsys, "a cat", "--model", wan, *args)


def test_half_rate_steps_need_an_odd_number_of_latent_frames(student, wan, capsys):
    adavid.FrameInterpolator(16, width=8).save_pretrained(student / "interpolator.safetensors")
    line = complaint(capsys, "a cat", "--model", student, "--codec", wan, "--frames", "13")
    assert "9 and 17" in line


def garbage(file):
    file.write_bytes(file.read_bytes()[:100])


def infinite(tensors):
    tensors[min(tensors)].flatten()[0] = torch.inf


def rename_one(name):
    def change(tensors):
        tensors["odd"] = tensors.pop(name)
    return change


BROKEN_PARTS = {
    "original": [
        (lambda d: (d / "Wan2.1_VAE.pth").unlink(), "no VAE in it"),
        (lambda d: shutil.rmtree(d / "google"), "no tokenizer in it"),
        (lambda d: garbage(d / "Wan2.1_VAE.pth"), "Wan2.1_VAE.pth: cannot be loaded"),
        (lambda d: garbage(d / "models_t5_umt5-xxl-enc-bf16.pth"), "bf16.pth: cannot be loaded"),
        (lambda d: torch.save({"a": torch.zeros(1)}, d / "Wan2.1_VAE.pth"), "Wan2.1_VAE.pth: "),
        (lambda d: torch.save({"a": json.JSONDecoder}, d / "Wan2.1_VAE.pth"), "Wan2.1_VAE.pth: "),
        (lambda d: garbage(d / "google" / "umt5-xxl" / "tokenizer.json"), "umt5-xxl: cannot be"),
    ],
    "diffusers": [
        (lambda d: shutil.rmtree(d / "text_encoder"), "no text encoder in it"),
        (lambda d: garbage(d / "text_encoder" / "model.safetensors"), "text_encoder: cannot be"),
        (lambda d: edit_tensors(d / "text_encoder" / "model.safetensors", rename_one(
            "encoder.final_layer_norm.weight")), "'encoder.final_layer_norm.weight' is missing"),
        (lambda d: edit_tensors(d / "vae" / "diffusion_pytorch_model.safetensors", rename_one(
            "decoder.conv_in.bias")), "'decoder.conv_in.bias' is missing"),
        (lambda d: (d / "vae" / "config.json").write_text("{"), "vae: cannot be loaded"),
        *((lambda d, f=f: edit_tensors(d / f, infinite), "is not finite") for f in (
            "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")),
    ],
}


def test_a_broken_codec_gets_one_line(folder, tmp_path, capsys):
    layout = "diffusers" if (folder / "vae").exists() else "original"
    for i, (breaks, says) in enumerate(BROKEN_PARTS[layout]):
        broken = shutil.copytree(folder, tmp_path / str(i))
        breaks(broken)
        line = complaint(capsys, "a cat", "--model", broken, "--frames", "1", "--height", "32",
                         "--width", "32", "--out", tmp_path / "out")
        assert says in line and str(broken) in line, line


def test_a_student_alone_asks_for_a_codec(student, capsys):
    assert "--codec" in complaint(capsys, "a cat", "--model", student)


def test_another_vaes_latents_are_refused(tmp_path, capsys):
    miniature_wan.transformer(in_channels=48, out_channels=48).save_pretrained(tmp_path)
    assert "48 channels" in complaint(capsys, "a cat", "--model", tmp_path)


def test_a_tokenizer_of_another_encoder_is_refused(wan, tmp_path, capsys):
    other = shutil.copytree(wan, tmp_path / "wan")
    miniature_wan.T5Tokenizer(extra_ids=300).save_pretrained(other / "google" / "umt5-xxl")
    assert "they are no pair" in complaint(capsys, "a cat", "--model", other)


def test_a_missing_extra_is_named(wan, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    line = complaint(capsys, "a cat", "--model", wan, *SIZE)
    assert "ftfy" in line and "[wan]" in line


def test_a_model_that_is_not_distilled_is_noted(wan, student, tmp_path, capsys):
    size = ["--frames", "1", "--height", "32", "--width", "32"]
    latents(tmp_path, "a cat", "--model", wan, *size)
    assert "--teacher" in capsys.readouterr().out
    latents(tmp_path, "a cat", "--model", student, "--codec", wan, *size)
    said = capsys.readouterr().out
    assert "--teacher" not in said and "full rate" in said
