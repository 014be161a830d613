"""Weights and LoRA files as people have them, against diffusers, peft and merging by hand."""

import json
import subprocess
import sys
from dataclasses import asdict

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from adavid import AVDConfig
from runtime import lora
from runtime.models import find_numbers, load_config
from tests import miniature_wan
from tests.helpers import CLIP, ROOT, complaint, equal
from tiny_wan import WanConfig, WanModel, checkpoint
from tiny_wan.checkpoint import FILE
from tiny_wan.dialects import diffusers_name
from tools import export, plan

G = torch.Generator().manual_seed(0)
X, T = torch.randn(1, 16, 2, 4, 6, generator=G), torch.tensor([522.0])
TEXT = torch.randn(1, 512, 32, generator=G)


@pytest.fixture(scope="module")
def wan(inputs):
    return inputs["original"]


@pytest.fixture(scope="module")
def matrices(wan):
    """{layer: (up, down)} for all large layers of the blocks."""
    return {name.removesuffix(".weight"): (draw(len(p), 4), draw(4, p.shape[1]))
            for name, p in WanModel.from_pretrained(wan).named_parameters()
            if name.startswith("blocks") and name.endswith(".weight") and p.ndim == 2}


def draw(*shape):
    return 0.2 * torch.randn(*shape, generator=G)


@torch.no_grad()
def velocity(model):
    return model(X, T, TEXT)


@torch.no_grad()
def add_by_hand(wan, changes):
    """The velocity of the model at `wan` after adding {parameter: change}."""
    model = WanModel.from_pretrained(wan)
    for name, p in model.named_parameters():
        if name in changes:
            p.data = p.data + changes[name]
    return velocity(model)


@torch.no_grad()
def theirs(transformer):
    return transformer(X, T, TEXT, return_dict=False)[0]


def is_the_same_change(wan, file, wanted):
    """Whether the LoRA changes the velocity to `wanted`, within 1e-5 of the change."""
    base, model = (WanModel.from_pretrained(wan) for _ in range(2))
    base, ours = velocity(base), velocity(lora.merge(model, file))
    assert (wanted - base).norm() > 0.1 * base.norm()
    return (ours - wanted).norm() < 1e-5 * (wanted - base).norm()


# ---------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------

KEYS = [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.default.weight", "lora_up.default.weight")]
LAYERS = {f"{prefix or 'no prefix'} {name.__name__}": lambda layer, prefix=prefix, name=name:
          prefix + name(layer)
          for prefix in ("", "diffusion_model.", "model.diffusion_model.", "transformer.",
                         "base_model.model.") for name in (str, diffusers_name)}
LAYERS |= {f"{prefix} {name.__name__}": lambda layer, prefix=prefix, name=name:
           prefix + name(layer).replace(".", "_")
           for prefix in ("lora_unet_", "lora_unet__") for name in (str, diffusers_name)}
LAYERS["lora_unet_ with dots"] = lambda layer: "lora_unet_" + layer.replace(".", "_", 1)


@pytest.mark.parametrize("spelling, keys", [
    (spelling, KEYS[i % len(KEYS)]) for i, spelling in enumerate(LAYERS)])
def test_every_spelling_is_the_same_lora(spelling, keys, wan, matrices, tmp_path):
    wanted, tensors = {}, {}
    for name, (up, down) in matrices.items():
        wanted[f"{name}.weight"] = up @ down
        for key, tensor in zip(keys, (down, up)):
            tensors[f"{LAYERS[spelling](name)}.{key}"] = tensor
    save_file(tensors, tmp_path / "lora.safetensors")
    assert is_the_same_change(wan, tmp_path, add_by_hand(wan, wanted))


def test_what_a_causvid_file_adds_to_biases_counts_as_in_diffusers(wan, matrices, tmp_path):
    tensors = {}
    for name, (up, down) in matrices.items():
        tensors |= {f"diffusion_model.{name}.lora_up.weight": up, f"diffusion_model.{name}."
                    "lora_down.weight": down, f"diffusion_model.{name}.diff_b": draw(len(up))}
    tensors |= {f"diffusion_model.blocks.{i}.{norm}.diff": torch.zeros(48)
                for i in range(2) for norm in ("norm3", "self_attn.norm_q", "cross_attn.norm_k")}
    save_file(tensors, tmp_path / "lora.safetensors")
    pipe = miniature_wan.pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert is_the_same_change(wan, tmp_path, theirs(pipe.transformer))


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_plain_additions_reach_weights_biases_norms_and_modulation(prefix, wan, tmp_path):
    shapes = {name: p.shape for name, p in WanModel.from_pretrained(wan).named_parameters()}
    ends = {"blocks.0.diff_m": "blocks.0.modulation", "head.diff_m": "head.modulation",
            "blocks.1.modulation.diff": "blocks.1.modulation",
            "blocks.0.norm3.diff": "blocks.0.norm3.weight",
            "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
            "blocks.1.self_attn.norm_q.w_norm": "blocks.1.self_attn.norm_q.weight",
            "patch_embedding.diff": "patch_embedding.weight",
            "head.head.diff": "head.head.weight", "head.head.diff_b": "head.head.bias",
            "time_projection.1.diff_b": "time_projection.1.bias"}
    changes = {name: draw(*shapes[name]) for name in ends.values()}
    save_file({prefix + key: changes[name] for key, name in ends.items()},
              tmp_path / "lora.safetensors")
    assert is_the_same_change(wan, tmp_path, add_by_hand(wan, changes))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_alpha_in_pefts_file_beside_it_counts_as_in_peft(use_rslora, wan, tmp_path):
    model = peft.get_peft_model(miniature_wan.transformer(), peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["to_q", "proj"], rank_pattern={"attn2.to_q": 2},
        alpha_pattern={r"1\.attn2.to_q": 5}, use_rslora=use_rslora))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = draw(*p.shape)
    model.save_pretrained(tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {
        file.name for file in tmp_path.iterdir()}
    assert is_the_same_change(wan, tmp_path, theirs(model))


@pytest.mark.parametrize("header", [True, False])
def test_an_alpha_in_the_header_or_in_a_tensor_scales_the_product(header, wan, matrices, tmp_path):
    layer = "blocks.0.ffn.2"
    up, down = matrices[layer]
    tensors = {f"{layer}.lora_A.weight": 5 * down, f"{layer}.lora_B.weight": 5 * up}
    save_file(tensors if header else tensors | {f"{layer}.alpha": torch.tensor(1.0)},
              tmp_path / "lora.safetensors", {"lora_alpha": "1"} if header else None)
    wanted = add_by_hand(wan, {f"{layer}.weight": 25 * up @ down / 4})
    assert is_the_same_change(wan, tmp_path, wanted)


def test_a_lora_without_effect_is_noted(wan, matrices, tmp_path, capsys):
    up, down = matrices["blocks.0.ffn.2"]
    for name, tensor in {"none": torch.zeros_like(up), "some": up}.items():
        save_file({"blocks.0.ffn.2.lora_A.weight": down, "blocks.0.ffn.2.lora_B.weight": tensor},
                  tmp_path / f"{name}.safetensors")
        lora.check_loras([tmp_path / f"{name}.safetensors"], WanModel.from_pretrained(wan))
    said = capsys.readouterr().out
    assert "none.safetensors: has no effect" in said and "some" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in another unit elsewhere")
def test_loading_with_a_lora_holds_the_model_little_more_than_once(tmp_path):
    config = WanConfig(1024, 4096, 8, 4, text_dim=64)
    with torch.device("meta"):
        shapes = WanModel(config).state_dict()
    checkpoint.write(tmp_path / "wan", asdict(config), {
        name: torch.ones(p.shape, dtype=torch.bfloat16) for name, p in shapes.items()})
    tensors = {}
    for name, p in shapes.items():
        if name.startswith("blocks.") and name.endswith(".weight") and p.ndim == 2:
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.lora_A.weight": draw(4, p.shape[1]).bfloat16(),
                        f"{layer}.lora_B.weight": draw(len(p), 4).bfloat16()}
    save_file(tensors, tmp_path / "lora.safetensors")
    program = """
import resource, sys, torch
from pathlib import Path
from runtime.lora import load_merged
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, folder = peak(), Path(sys.argv[1])
model = load_merged(folder / "wan", torch.bfloat16, "cpu", [(folder / "lora.safetensors", 1.0)])
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True,
                            text=True, cwd=ROOT, check=True)
    assert int(result.stdout) < 1.4 * (tmp_path / "wan" / FILE).stat().st_size


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------

WRAPPED = ["", "model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "net.", "pipe.dit.",
           "model.diffusion_model.", "module._orig_mod.", "generator.model._fsdp_wrapped_module."]


def write_with_config(wan, folder, tensors, name):
    """A folder with weights of any name, and the config.json of the model at `wan`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((wan / "config.json").read_text())
    save = save_file if name.endswith(".safetensors") else torch.save
    save(tensors, folder / name)
    return folder


@pytest.mark.parametrize("prefix", WRAPPED)
def test_wrappers_names_are_taken_off(prefix, wan, tmp_path):
    tensors = load_file(wan / FILE)
    for suffix in (".safetensors", ".pt"):
        wrapped = {f"{prefix}{name.replace('blocks.1.', 'blocks.1._checkpoint_wrapped_module.')}": x
                   for name, x in tensors.items()}
        folder = write_with_config(wan, tmp_path / suffix[1:], wrapped, f"model{suffix}")
        for path in (folder, folder / f"model{suffix}"):
            assert equal(WanModel.from_pretrained(path).state_dict(), tensors)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_average_of_a_checkpoint_is_read_and_named(legacy, wan, tmp_path, capsys):
    tensors = load_file(wan / FILE)
    content = {"step": 3, "critic": {"model.x": torch.ones(1)},
               "generator": {f"model.{name}": x + 1 for name, x in tensors.items()},
               "generator_ema": {f"model._fsdp_wrapped_module.{n}": x for n, x in tensors.items()}}
    folder = write_with_config(wan, tmp_path, {}, "model.pt")
    torch.save(content, folder / "model.pt", _use_new_zipfile_serialization=not legacy)
    assert equal(WanModel.from_pretrained(folder).state_dict(), tensors)
    find_numbers(folder)
    assert "model.pt: its generator_ema is read" in capsys.readouterr().out


def test_shards_need_no_index_if_all_are_there(wan, tmp_path):
    tensors = load_file(wan / FILE)
    names = sorted(tensors)
    for i in range(3):
        write_with_config(wan, tmp_path, {name: tensors[name] for name in names[i::3]},
                          f"wan-0000{i + 1}-of-00003.safetensors")
    for path in (tmp_path, tmp_path / "wan-00002-of-00003.safetensors"):
        assert equal(WanModel.from_pretrained(path).state_dict(), tensors)
    (tmp_path / "wan-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="wan-00002-of-00003"):
        WanModel.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------
# The method's numbers, and what is exported
# ---------------------------------------------------------------------------------------------

TWO_STEPS = AVDConfig((1000, 500), (1, 1), (1, 1))


@pytest.fixture
def student_and_style(wan, matrices, tmp_path):
    """A student of two steps, and a LoRA that knows nothing of steps."""
    WanModel.from_pretrained(wan).save_pretrained(
        tmp_path / "student", metadata={"method": "AVD", "avd": TWO_STEPS.to_json()})
    up, down = matrices["blocks.0.ffn.2"]
    save_file({"blocks.0.ffn.2.lora_A.weight": down, "blocks.0.ffn.2.lora_B.weight": up},
              tmp_path / "style.safetensors")
    return tmp_path / "student", tmp_path / "style.safetensors"


def latents(wan, out, *flags):
    assert sample.main(["a cat", *CLIP, "--codec", str(wan), "--save-latents", "--out", str(out),
                        *map(str, flags)]) == 0
    return load_file(out / "latents.safetensors")["latents"]


def test_a_student_with_styles_keeps_its_steps_in_sample_and_export(
        student_and_style, wan, tmp_path, capsys):
    student, style = student_and_style
    assert plan.main(["sample", "--model", str(student), "--lora", str(style)]) == 0
    assert "student, steps at strides 1 1, 1.000 of that" in capsys.readouterr().out
    loras = ["--lora", style, style, "--lora-scale", 1, -0.25]
    wanted = latents(wan, tmp_path / "a", "--model", student, *loras)
    assert f"timesteps 1000 500, strides 1 1, no guidance (from {student})" in (
        capsys.readouterr().out)
    assert export.main(["--model", str(student), "--layout", "original", *map(str, loras), "--out",
                        str(tmp_path / "merged")]) == 0
    assert load_config(tmp_path / "merged") == TWO_STEPS
    assert checkpoint.read_metadata(tmp_path / "merged")["method"] == "AVD"
    assert torch.equal(latents(wan, tmp_path / "b", "--model", tmp_path / "merged"), wanted)


def test_steps_of_another_project_can_be_given(wan, student_and_style, tmp_path, capsys,
                                               monkeypatch):
    _, style = student_and_style
    seen, forward = [], WanModel.forward
    monkeypatch.setattr(WanModel, "forward", lambda self, x, t, *args, **options: seen.append(
        t.item()) or forward(self, x, t, *args, **options))
    steps = [1000.0, 937.5, 833.0, 625.0]
    latents(wan, tmp_path / "a", "--model", wan, "--lora", style, "--timesteps", *steps)
    assert seen == steps and "timesteps 1000 937.5 833 625, strides 1 1 1 1" in (
        capsys.readouterr().out)
    latents(wan, tmp_path / "b", "--model", wan, "--teacher", "--steps", 1)
    assert "teacher: 1 steps at shift 5, guidance 5 (the paper's" in capsys.readouterr().out
    code = sample.main(["a cat", *CLIP, "--model", str(wan), "--out", str(tmp_path / "c"),
                        "--timesteps", "1000", "500", "--strides", "1"])
    assert "one stride for each of the 2 timesteps" in complaint(capsys, code)


def test_a_teachers_export_has_wans_scheduler_and_no_steps(wan, tmp_path):
    assert export.main(["--model", str(wan), "--out", str(tmp_path)]) == 0
    miniature_wan.pipeline().save_pretrained(tmp_path / "theirs")
    ours, wans = (json.loads((folder / "scheduler/scheduler_config.json").read_text())
                  for folder in (tmp_path, tmp_path / "theirs"))
    assert ours.items() <= wans.items()
    assert not {"avd", "method"} & checkpoint.read_metadata(tmp_path).keys()


def test_two_distilled_files_together_are_noted(student_and_style, tmp_path, capsys):
    student, style = student_and_style
    save_file(load_file(style), tmp_path / "few.safetensors", {
        "method": "AVD", "avd": AVDConfig().to_json()})
    numbers = find_numbers(student, [style, tmp_path / "few.safetensors"])
    assert numbers.source.name == "few.safetensors" and numbers.config == AVDConfig()
    assert "are all distilled" in capsys.readouterr().out
