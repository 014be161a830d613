"""Bad files and bad flags end in one line that names them, and change nothing."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import sample
import train
from adavid import AVDConfig, FrameInterpolator
from runtime.checkpoints import sha256
from tests import miniature_wan
from tests.helpers import FOUR_STEPS, complaint
from tests.torture.random_numbers import try_numbers, without_limits
from tests.torture.readers import ADAPTER, READERS, Reader
from tiny_wan import ToyCodec, checkpoint
from tiny_wan.checkpoint import FILE
from tools import demo, encode, export, gpu_check, plan

# ---------------------------------------------------------------------------------------------
# What breaks a file: each returns a function that is called in the working folder
# ---------------------------------------------------------------------------------------------


def find(pattern):
    file, = Path().glob(pattern)
    return file


def delete(pattern):
    def breaks():
        file = find(pattern)
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return breaks


def write(file, content):
    def breaks():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(content)
    return breaks


def cut(pattern, size=100):
    return lambda: find(pattern).write_bytes(find(pattern).read_bytes()[:size])


def replace(file, old, new):
    """Replace text, which must be in the file."""
    def breaks():
        text = Path(file).read_text()
        assert old in text
        Path(file).write_text(text.replace(old, new))
    return breaks


def edit_json(file, **values):
    return lambda: Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | values))


def edit_tensors(file, tensors, **metadata):
    """Replace tensors, or delete those that become None, and replace metadata."""
    def breaks():
        with checkpoint.open_weights(file) as weights:
            notes = weights.metadata() or {}
        edited = {name: x for name, x in (load_file(file) | tensors).items() if x is not None}
        save_file(edited, file, notes | metadata)
    return breaks


def edit_state(**values):
    """Replace what a checkpoint's state.json says, and its checksum."""
    def breaks():
        edit_json(f"{CHECKPOINT}/state.json", **values)()
        edit_json(SUMS, **{"state.json": sha256(f"{CHECKPOINT}/state.json")})()
    return breaks


def index_without_a_shard():
    index = Path("sharded") / f"{FILE}.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({
        "weight_map": {name: file for name, file in names.items() if "-00002-" not in file}}))


# ---------------------------------------------------------------------------------------------
# Bad input, by reader: what the line must name, then more flags or what breaks a file
# ---------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
TOY, INTERPOLATOR = f"toy/{FILE}", "toy/interpolator.safetensors"
WAN, CONFIG = f"diffusers/transformer/{FILE}", "diffusers/transformer/config.json"
HEAD, CONV, NORM = "proj_out.bias", "decoder.conv_in.bias", "encoder.final_layer_norm.weight"
VAE, TEXT_ENCODER = f"diffusers/vae/{FILE}", "diffusers/text_encoder/model.safetensors"
VAE_PTH, TOKENIZER = "original/Wan2.1_VAE.pth", "original/google/umt5-xxl"
INDEX, NULL_TEXT = "shards/index.json", "shards/null_text.safetensors"
SHARD = "shards/shard.safetensors"
WEIGHTS_INDEX = f"sharded/{FILE}.index.json"
CHECKPOINT = "run/checkpoints/000001"
SUMS = f"{CHECKPOINT}/checksums-0.json"
PIPELINE, MATRIX = "diffusers/model_index.json", "blocks.0.attn1.to_q.weight"
F8 = torch.float8_e4m3fn
ODD_FILES = {  # what the line must say, and what a file holds in place of weights
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64,
    "zeros": b"\0" * 1000, "empty": b"", "GGUF": b"GGUF\x03\0\0\0" + b"\0" * 100,
    "page": b"<!DOCTYPE html><html>", "damaged": b"PK\x03\x04" + b"x" * 100}
UP, DOWN = (f"diffusion_model.blocks.0.ffn.2.lora_{part}.weight" for part in "BA")

BAD_INPUT = {
    "sample nothing": [("prompts",)],
    "sample": [
        ("--steps 0", "--teacher --steps 0"),
        *((INTERPOLATOR, write(INTERPOLATOR, content)) for content in (
            b"", save({"patch_embedding.weight": torch.ones(32, 12, 1, 2, 2)}),
            save({"enter.0.weight": torch.zeros(10_000, 24, 1, 1)}),  # a network of 50 GB
            save(FrameInterpolator(16, width=8).state_dict()))),
        (INTERPOLATOR, edit_tensors(INTERPOLATOR, {"out.bias": torch.full((13,), INF)})),
    ],
    "sample prompts": [
        ("prompts.txt", delete("prompts.txt")),
        ("prompts.txt UTF-8", write("prompts.txt", b"\xff\xfe\x00bad")),
        ("/dev/zero file", "--prompts-file /dev/zero"),
        (". file", "--prompts-file ."),
        ("prompts.txt 100000000", lambda: os.truncate("prompts.txt", 10**8 + 1)),
        ("prompts.txt no prompts", write("prompts.txt", b"\n \n")),
        ("'purple'", write("prompts.txt", b"a purple ball\n")),
    ],
    "sample diffusers": [
        (f"{WAN} safetensors", cut(WAN, -9)),
        (f"{WAN} '{HEAD}' 'odd'", edit_tensors(WAN, {HEAD: None, "odd": torch.zeros(64)})),
        (f"{WAN} '{HEAD}' [3] [64]", edit_tensors(WAN, {HEAD: torch.zeros(3)})),
        (f"{WAN} '{HEAD}' empty", edit_tensors(WAN, {HEAD: torch.zeros(0, 3)})),
        (f"{WAN} '{HEAD}' torch.int32", edit_tensors(WAN, {HEAD: torch.zeros(64).int()})),
        (f"{WAN} '{HEAD}' finite", edit_tensors(WAN, {HEAD: torch.full((64,), NAN)})),
        (f"{WAN} 'patch_embedding.weight'", write(WAN, save({"x": torch.zeros(1)}))),
        (f"{CONFIG} text_len 1099511627776", edit_json(CONFIG, text_len=2**40)),
        (f"{CONFIG} ffn_dim 97 96", edit_json(CONFIG, ffn_dim=97)),
        (f"{CONFIG} num_layers 3 2", edit_json(CONFIG, num_layers=3)),
        (f"{WAN} blocks.1.", edit_json(CONFIG, num_layers=1)),
        ("diffusers num_heads 7 48", edit_json(CONFIG, num_attention_heads=7)),
        (f"{CONFIG} JSON", write(CONFIG, b"{")),
        (f"{PIPELINE} git-lfs", write(PIPELINE, ODD_FILES["git-lfs"])),
        (f"{CONFIG} i2v", edit_json(CONFIG, _class_name="WanModel", model_type="i2v")),
        ("diffusers 48 channels", lambda: miniature_wan.transformer(
            in_channels=48, out_channels=48).save_pretrained("diffusers/transformer")),
        *((f"diffusers experts {name}", breaks) for name, breaks in (
            ("transformer_2", lambda: Path("diffusers/transformer_2").mkdir()),
            ("transformer_2", edit_json(PIPELINE, transformer_2=["diffusers", "WanModel"])),
            ("boundary_ratio", edit_json(PIPELINE, boundary_ratio=0.9)))),
        *((f"{name} {what}", f"--model {name}", lambda name=name: shutil.copy(WAN, name))
          for name, what in (("wan2.2_t2v_high_noise_14B.safetensors", "experts"),
                             ("Wan2_2-T2V-A14B-HIGH.safetensors", "Wan2.2"))),
        (f"{WAN} 36 image-to-video", lambda: miniature_wan.transformer(
            in_channels=36).save_pretrained("diffusers/transformer")),
        *((f"{WAN} {kind} {name}", edit_tensors(WAN, {name: torch.ones(size)}))
          for kind, name, size in (
            ("image-to-video", "condition_embedder.image_embedder.norm1.bias", 4),
            ("VACE", "vace_blocks.0.proj_in.bias", 4), ("quantised", "scaled_fp8", 0),
            ("quantised", "blocks.0.attn1.to_q.scale_weight", 1))),
        (f"{WAN} quantised float8", edit_tensors(WAN, {HEAD: torch.ones(64).to(F8)})),
        (f"{WAN} LoRA --lora", write(WAN, save({"blocks.0.x.lora_A.weight": torch.ones(2, 2)}))),
        (f"{WAN} VAE", write(WAN, save({"encoder.conv1.weight": torch.ones(2, 2)}))),
        (f"{WAN} zeros '{MATRIX}'", edit_tensors(WAN, {MATRIX: torch.zeros(48, 48)})),
        (f"{WAN} 'model.{HEAD}' '{HEAD}' prefixes", edit_tensors(
            WAN, {f"model.{HEAD}": torch.ones(64)})),
        *((f"{file} {what}", write(file, content)) for file in (WAN, VAE, TEXT_ENCODER)
          for what, content in ODD_FILES.items()),
        ("Wan-AI/Wan2.1 hf download", "--model Wan-AI/Wan2.1"),
        ("hub/Wan2.1 hf download", "--codec hub/Wan2.1"),
        ("several x.safetensors y.safetensors", "--model .", write("x.safetensors", b"x"),
         write("y.safetensors", b"y")),
        ("latents finite", edit_tensors(
            WAN, {"blocks.0.ffn.net.2.weight": torch.full((48, 96), 1e30)})),
        ("pixels finite", edit_json("diffusers/vae/config.json", latents_std=[1e38] * 16)),
        ("--timesteps --teacher", "--teacher --timesteps 1000"),
        ("--out diffusers/vae", "--out diffusers/vae --codec diffusers/vae"),
        ("diffusers/text_encoder", cut(TEXT_ENCODER)),
        (f"diffusers/text_encoder '{NORM}'", edit_tensors(TEXT_ENCODER, {NORM: None})),
        (f"diffusers/text_encoder '{NORM}' finite",
         edit_tensors(TEXT_ENCODER, {NORM: torch.full((32,), INF)})),
        ("diffusers/vae/config.json", write("diffusers/vae/config.json", b'"x"')),
        ("diffusers/vae", edit_json("diffusers/vae/config.json", latents_mean=[0.0] * 15 + ["x"])),
        (f"diffusers/vae '{CONV}'", edit_tensors(VAE, {CONV: None})),
        (f"diffusers/vae '{CONV}' finite", edit_tensors(VAE, {CONV: torch.full((16,), INF)})),
        ("frames 80 77 81", "--frames 80"),
        ("width 8 16", "--width 8"),
        ("frames 13 9 17", "--frames 13", edit_tensors(WAN, {}, avd=FOUR_STEPS.to_json()),
         lambda: save_file(FrameInterpolator(16, width=8).state_dict(),
                           Path("diffusers/interpolator.safetensors"))),
    ],
    "sample original": [
        ("original VAE --codec", delete(VAE_PTH)),
        (VAE_PTH, cut(VAE_PTH)),
        (f"{VAE_PTH} json.decoder.JSONDecoder", lambda: torch.save(
            {"a": json.JSONDecoder}, VAE_PTH)),
        (TOKENIZER, cut(f"{TOKENIZER}/tokenizer.json")),
        (f"{TOKENIZER} tokenizer.json format", delete(f"{TOKENIZER}/tokenizer.json")),
        (f"{TOKENIZER} Unigram", edit_json(f"{TOKENIZER}/tokenizer.json", model={"type": "BPE"})),
        (f"{VAE_PTH} folder", delete(VAE_PTH), lambda: Path(VAE_PTH).mkdir()),
        *((f"{VAE_PTH} {what}", write(VAE_PTH, content)) for what, content in ODD_FILES.items()),
        (f"{TOKENIZER} 304 200", lambda: miniature_wan.T5Tokenizer(
            extra_ids=300).save_pretrained(TOKENIZER)),
    ],
    "sample shards": [
        ("-00002-of-", delete("sharded/*-00002-*")),
        (WEIGHTS_INDEX, write(WEIGHTS_INDEX, b"{}")),
        (f"{WEIGHTS_INDEX} '../b'", edit_json(WEIGHTS_INDEX, weight_map={"a": "../b"})),
        (f"bbb {FILE}.index.json", edit_json(WEIGHTS_INDEX, weight_map={"a": "b" * 5000})),
        ("sharded missing", index_without_a_shard),
    ],
    "sample checkpoint": [
        (CHECKPOINT, cut(f"{CHECKPOINT}/*.safetensors")),
        (f"{CHECKPOINT} train.py distill", edit_state(student=None)),
        (f"{CHECKPOINT} nowhere.safetensors", edit_state(student={
            "interpolator": "nowhere.safetensors"})),
    ],
    "train": [
        ("x/interpolator.safetensors replaced", "interpolator --out x --device cpu",
         write("x/interpolator.safetensors", b"somebody's")),
        ("--out", "distill"),
        ("mps", "interpolator --out out --device mps") if torch.cuda.is_available() else
        ("cuda", "interpolator --out out --device cuda"),
        ("texts", "interpolator --out out --device cpu --data @texts"),
    ],
    "distill": [
        ("--kk", "--kk 3"),
        ("strides", "--strides 1 2 1 1"),
        ("--lora -4", "--lora -4"),
        ("lr nan", "--lr nan"),
        ("betas 1.0", "--betas 0.9 1"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999"),
        ("--keep 2", "--keep 1"),
        ("--lora --ema", "--lora 4 --ema 0.9"),
        ("nowhere", "--model nowhere"),
        ("toy 12 16", "--model @diffusers"),
        ("--out toy", "--out toy"),
        ("out", write("out", b"")),
        *((f"--out out {name} replaced", write(f"out/{name}", b"somebody's")) for name in (
            FILE, "pytorch_lora_weights.safetensors", "interpolator.safetensors")),
        *((f"{TOY} {names}", edit_tensors(TOY, {}, avd=numbers)) for names, numbers in (
            ("'foo'", '{"foo": 1}'), ("list", "[1]"), ("", "{bad"), ("k -3", '{"k": -3}'),
            ("lr 'x'", '{"lr": "x"}'), ("betas", '{"betas": 1}'),
            ("", "[" * 100_000))),
    ],
    "distill shards": [
        (SHARD, delete(SHARD)),
        (INDEX, delete(INDEX)),
        (INDEX, write(INDEX, b"[]")),
        (INDEX, write(INDEX, b'{"shards": []}')),
        (f"{INDEX} '../x'", replace(INDEX, "shard.safetensors", "../x")),
        (f"{INDEX} 7", replace(INDEX, '"shard.safetensors"', "7")),
        ("xxx.safetensors", replace(INDEX, "shard.", "x" * 5000 + ".")),
        (SHARD, replace(INDEX, '"count": 5', f'"count": {2**70}')),
        (f"{INDEX} latent_shape", edit_json(INDEX, latent_shape=[-12, 9, 8, 8])),
        (NULL_TEXT, write(NULL_TEXT, b"")),
        (f"{NULL_TEXT} finite", edit_tensors(
            NULL_TEXT, {"null_text": torch.full((1, 1, ToyCodec.text_dim), NAN)})),
        (NULL_TEXT, write(NULL_TEXT, save({"x": torch.zeros(1)}))),
        (NULL_TEXT, write(NULL_TEXT, save({"null_text": torch.zeros(1, 2)}))),
        (SHARD, edit_tensors(SHARD, {"latents": None})),
        (f"{SHARD} finite", edit_tensors(
            SHARD, {"latents": torch.full((5, 12, 9, 8, 8), NAN)})),
        ("texts --lambda-reg", "--model @diffusers --data @texts"),
    ],
    "resume": [
        ("k 3.0 7.0", "--k 7"),
        (CHECKPOINT, cut(f"{CHECKPOINT}/*.safetensors")),
        (CHECKPOINT, write(SUMS, b"[1, 2]")),
        (CHECKPOINT, delete(SUMS)),
        ("run/metrics.jsonl", write("run/metrics.jsonl", b"\x00\n")),
        ("run/times.jsonl", write("run/times.jsonl", b"\x00\n")),
    ],
    "encode": [
        ("clips", lambda: [video.unlink() for video in Path("clips").glob("*.mp4")]),
    ],
    "measure": [
        ("clips .mp4", lambda: [video.unlink() for video in Path("clips").glob("*.mp4")]),
        ("clips/new.mp4", write("clips/new.mp4", b"no video")),
        ("nothing", "--against nothing"),
    ],
    "encode nothing": [
        ("--videos --captions",),
        ("gone", "--videos gone"),
    ],
    "encode prompts": [
        ("prompts.txt", write("prompts.txt", b"")),
        ("prompts.txt --videos", "--videos @clips"),
    ],
    "encode jsonl": [
        ("captions.jsonl 1", write("captions.jsonl", b'{"video": "x"}\n')),
        ("captions.jsonl 1", write("captions.jsonl", b"{bad\n")),
        ("/dev/zero file", "--captions /dev/zero"),
    ],
    "encode csv": [
        ("captions.csv UTF-8", write("captions.csv", b"\xff\xfe\x00")),
        ("captions.csv 1", write("captions.csv", b'video,caption\nx,"' + 140_000 * b"x" + b'"\n')),
        ("captions.csv 'x'", write("captions.csv", b"video,caption\nx,a\nx,b\n")),
    ],
    "encode more": [
        ("encoded/shard-000-00000.safetensors fps 16 8", "--fps 8"),
        ("encoded none of these", lambda: [f.rename(f.with_stem(f"new-{f.stem}"))
                                           for f in Path("clips").iterdir()]),
    ],
    "export": [
        ("toy", "--out toy --layout original"),
        ("toy/wan.safetensors", "--out toy/wan.safetensors --layout comfyui"),
        *((f"out {file} replaced", write(file, b"somebody's"), "--out out") for file in (
            f"out/transformer/{FILE}", "out/transformer/config.json",
            "out/scheduler/scheduler_config.json", "out/interpolator.safetensors")),
        ("a.safetensors replaced", write("a.safetensors", b"somebody's"),
         "--layout comfyui --out a.safetensors"),
        ("out/pytorch_lora_weights.safetensors", "--base @toy --lora-rank 2",
         write("out/pytorch_lora_weights.safetensors", b"somebody's")),
        *((f"--lora-rank {flag}", f"--base @toy --lora-rank 2 {flag} {value}") for flag, value in (
            ("--layout", "diffusers"), ("--dtype", "bfloat16"), ("--lora", "toy"))),
    ],
    "export diffusers": [
        ("diffusers/transformer", "--out diffusers/transformer --layout original"),
        ("diffusers", f"--model {WAN} --out diffusers"),
    ],
    "merge": [
        (ADAPTER, "--model @diffusers"),
        (ADAPTER, edit_tensors(ADAPTER, {UP: torch.full((32, 2), INF)})),
        (ADAPTER, edit_tensors(ADAPTER, {UP: torch.zeros(64, 2), DOWN: torch.zeros(2, 32)})),
        *((f"{ADAPTER} {key}", edit_tensors(ADAPTER, {key: torch.zeros(32)})) for key in (
            "diffusion_model.blocks.0.ffn.2.dora_scale", "lora_unet_blocks_0_img_q.alpha")),
        *((f"{ADAPTER} {kind} {key}", edit_tensors(ADAPTER, {key: torch.ones(2, 2)}))
          for kind, key in (
            ("LoKr", "blocks.0.ffn.2.lokr_w1"), ("LoHa", "lora_unet_blocks_0_ffn_2.hada_w1_a"),
            ("DoRA", "base_model.model.blocks.0.ffn.2.lora_magnitude_vector.weight"),
            ("image-to-video", "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight"),
            ("experts", "transformer_2.blocks.0.ffn.2.lora_A.weight"),
            ("lacks", "blocks.77.ffn.2.lora_A.weight"), ("understood", "blocks.0.ffn.2.odd"),
            ("twice", "diffusion_model.blocks.0.ffn.2.lora_down.weight"))),
        (f"{ADAPTER} x.y LoRA", write(ADAPTER, save({"x.y": torch.ones(2)}))),
        (f"{ADAPTER} head.head.weight understood", edit_tensors(
            ADAPTER, {"base_model.model.head.head.weight": torch.ones(48, 32)})),
        (f"{ADAPTER} LOHA", write("adapter_config.json", b'{"peft_type": "LOHA"}')),
        (f"{ADAPTER} quantised", edit_tensors(ADAPTER, {UP: torch.ones(32, 2).to(F8)})),
        (f"toy/{FILE} model --model", "--lora @toy"),
        *((f"{ADAPTER} {what}", write(ADAPTER, content)) for what, content in ODD_FILES.items()),
        ("not finite --lora-scale", "--lora-scale 1e30",
         edit_tensors(ADAPTER, {UP: torch.full((32, 2), 1e30)})),
        ("2 weights for 1 LoRA", "--lora-scale 1 2"),
        *((ADAPTER, edit_tensors(ADAPTER, {}, lora_adapter_metadata=settings)) for settings in (
            "{", '{"lora_alpha": "x"}', '{"alpha_pattern": 1}', '{"alpha_pattern": {"(": 1}}')),
    ],
}

# ---------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------

CASES = [pytest.param(reader, breaks, names.split(), id=f"{reader}: {names}"[:80])
         for reader, cases in BAD_INPUT.items() for names, *breaks in cases]


def contents():
    """All files of the working folder that are not empty."""
    files = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    return {file: content for file, content in files.items() if content}


@pytest.mark.parametrize("reader, breaks, names", CASES)
def test_one_line_names_what_is_wrong_and_no_file_changes(
        reader, breaks, names, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = READERS[reader].prepare(inputs, tmp_path)
    for change in breaks:
        if isinstance(change, str):
            arguments += Reader.arguments(change, inputs)
        else:
            change()
    before = contents()
    capsys.readouterr()
    line = complaint(capsys, READERS[reader].program(arguments))
    assert all(name in line for name in names), line
    assert contents() == before


@pytest.mark.parametrize("reader", [name for name in READERS if READERS[name].reads])
def test_the_same_input_is_accepted_when_nothing_is_wrong(reader, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert READERS[reader].program(READERS[reader].prepare(inputs, tmp_path)) == 0


def test_a_package_that_is_not_installed_is_named(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    reader = READERS["sample original"]
    line = complaint(capsys, reader.program(reader.prepare(inputs, tmp_path)))
    assert "ftfy" in line and "[wan]" in line


@pytest.mark.parametrize("program", [train.Interpolator, train.Distill, sample.Sample,
                                     encode.Encode, plan.Distill, demo.Demo, export.Export,
                                     gpu_check.Check, AVDConfig])
def test_every_number_has_limits(program):
    assert not without_limits(program)


@pytest.mark.parametrize("seed", range(15))
def test_no_number_leads_to_anything_bad(seed, toy_folder, tmp_path):
    flags, _, problem = try_numbers(random.Random(seed), toy_folder, tmp_path / "out")
    assert not problem, f"{flags}: {problem}"
