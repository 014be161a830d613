"""Wan2.1's architecture and files against diffusers, on the same weights, all of them random."""

import json
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests import miniature_wan
from tests.helpers import equal, random_model
from tiny_wan import PRESETS, WanConfig, WanModel, checkpoint
from tiny_wan.model import KEPT_PRECISE

SIZES = {  # of diffusers' transformer
    "narrow": {},
    "wide": {"num_attention_heads": 3, "attention_head_dim": 64, "ffn_dim": 100, "num_layers": 3},
    "wan-heads": {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 1},
}
SHAPES = [(1, 1, 2, 2, 1), (2, 3, 4, 6, 512), (1, 5, 8, 2, 77), (2, 2, 6, 6, 30)]  # b f h w l


def batch(b, f, h, w, l, text_dim=32):
    g = torch.Generator().manual_seed(f)
    text = torch.zeros(b, 512, text_dim)
    text[:, :l] = torch.randn(b, l, text_dim, generator=g)
    t = torch.tensor([757.0, 13.5])[:b]
    return torch.randn(b, 16, f, h, w, generator=g), t, text


def velocity(theirs, x, t, text):
    return theirs(x, t, text, return_dict=False)[0]


@pytest.fixture(scope="module", params=SIZES)
def theirs(request):
    return miniature_wan.transformer(**SIZES[request.param])


def ways_in(theirs, folder):
    """The paths of the same weights on disk, in each form that users have."""
    theirs.save_pretrained(folder / "pipeline" / "transformer")
    yield folder / "pipeline"
    yield folder / "pipeline" / "transformer"
    yield folder / "pipeline" / "transformer" / checkpoint.FILE
    theirs.save_pretrained(folder / "sharded", max_shard_size="300KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    yield folder / "sharded"
    tensors = miniature_wan.original(theirs)
    for name, prefix in {"bare": "", "comfyui": "model.diffusion_model."}.items():
        (folder / name).mkdir()
        save_file({prefix + n: t for n, t in tensors.items()}, folder / name / "wan.safetensors",
                  {"config": json.dumps({"num_heads": theirs.config.num_attention_heads})})
        yield folder / name
        yield folder / name / "wan.safetensors"


def test_velocity_and_gradients_equal_diffusers_from_every_layout(theirs, tmp_path):
    wanted = []
    for shape in SHAPES:
        x, t, text = batch(*shape)
        theirs.requires_grad_(True).zero_grad()
        v = velocity(theirs, x.requires_grad_(), t, text)
        v.square().mean().backward()
        assert v.std() >= 0.1
        wanted.append((v, x.grad, miniature_wan.original(theirs, gradients=True)))

    for path in ways_in(theirs, tmp_path):
        ours = WanModel.from_pretrained(path)
        for shape, (v, x_grad, grads) in zip(SHAPES, wanted):
            x, t, text = batch(*shape)
            ours.zero_grad()
            mine = ours(x.requires_grad_(), t, text[:, :shape[-1]])
            mine.square().mean().backward()
            assert (mine - v).abs().max() <= 2e-5
            assert (x.grad - x_grad).abs().max() <= 2e-5
            for name, p in ours.named_parameters():
                error = (p.grad - grads[name]).abs().max()
                assert error <= 1e-4 * grads[name].abs().max() + 1e-6, name


def test_bf16_is_within_bf16s_own_error_from_files_of_either_dtype(tmp_path):
    theirs = miniature_wan.transformer(**SIZES["wide"])
    theirs.save_pretrained(tmp_path / "exact")
    rough = WanTransformer3DModel.from_pretrained(tmp_path / "exact", torch_dtype=torch.bfloat16)
    rough.save_pretrained(tmp_path / "rough")
    for folder in ("exact", "rough"):
        ours, ratios = WanModel.from_pretrained(tmp_path / folder, torch.bfloat16), []
        for shape in SHAPES:
            x, t, text = batch(*shape)
            exact = velocity(theirs, x, t, text)
            own = velocity(rough, x.bfloat16(), t, text.bfloat16()).float() - exact
            ratios.append((ours(x, t, text) - exact).norm() / own.norm())
        assert max(ratios) < 1.5 and sum(ratios) / len(ratios) < 1.1  # diffusers' own is 1


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_what_we_save_is_read_by_diffusers(layout, tmp_path):
    config = WanConfig(48, 96, 2, 2, text_dim=32)
    ours = random_model(config)
    ours.save_pretrained(tmp_path / "wan", layout, {"method": "AVD"})
    if layout == "diffusers":
        theirs, info = WanTransformer3DModel.from_pretrained(tmp_path / "wan",
                                                             output_loading_info=True)
        assert not any(info.values())
    else:
        theirs = miniature_wan.transformer()
        file, = (tmp_path / "wan").glob("*.safetensors")
        prefix = "model.diffusion_model." if layout == "comfyui" else ""
        assert all(name.startswith(prefix) for name in load_file(file))
        convert = miniature_wan.convert_wan_transformer_to_diffusers
        theirs.load_state_dict(convert(load_file(file)))
    for shape in SHAPES:
        x, t, text = batch(*shape)
        assert (ours(x, t, text) - velocity(theirs, x, t, text)).abs().max() <= 2e-5
    again = WanModel.from_pretrained(tmp_path / "wan")
    assert again.config == config and checkpoint.read_metadata(tmp_path / "wan")["method"] == "AVD"
    assert equal(ours.state_dict(), again.state_dict())


PUBLISHED = {  # transformer/config.json of Wan-AI/Wan2.1-T2V-{1.3B,14B}-Diffusers
    "wan-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan-14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_models(preset):
    with torch.device("meta"):
        ours = WanModel(PRESETS[preset])
        theirs = WanTransformer3DModel(
            **PUBLISHED[preset], attention_head_dim=128, cross_attn_norm=True, eps=1e-6,
            freq_dim=256, in_channels=16, out_channels=16, patch_size=(1, 2, 2),
            qk_norm="rms_norm_across_heads", rope_max_seq_len=1024, text_dim=4096)
    shapes = {checkpoint.diffusers_name(n): p.shape for n, p in ours.state_dict().items()}
    assert shapes == {n: p.shape for n, p in theirs.state_dict().items()}


def test_large_models_are_saved_in_shards_and_read_by_diffusers(tmp_path, monkeypatch):
    ours = random_model(WanConfig(48, 96, 2, 2, text_dim=32))
    ours.save_pretrained(tmp_path, "diffusers")
    variant = tmp_path / checkpoint.FILE.replace(".", ".fp16.")
    variant.write_bytes(b"somebody's, which stays")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 300_000)
    ours.save_pretrained(tmp_path, "diffusers")
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors") if p != variant)
    assert len(shards) > 1 and shards[0].startswith("diffusion_pytorch_model-00001-of-")
    x, t, text = batch(*SHAPES[1])
    theirs = WanTransformer3DModel.from_pretrained(tmp_path)
    assert (ours(x, t, text) - velocity(theirs, x, t, text)).abs().max() <= 2e-5
    assert torch.equal(WanModel.from_pretrained(tmp_path)(x, t, text), ours(x, t, text))
    monkeypatch.undo()
    ours.save_pretrained(tmp_path, "diffusers")  # and no shard outlives its index
    assert {*tmp_path.glob("*.safetensors*")} == {variant, tmp_path / checkpoint.FILE}


def test_a_half_written_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 300_000)
    ours = random_model(WanConfig(48, 96, 2, 2, text_dim=32))
    ours.save_pretrained(tmp_path)
    moved, replace = [], checkpoint.os.replace

    def interrupted(old, new):
        moved.append(new)
        if len(moved) == 2:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(checkpoint.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_model(ours.config, seed=1).save_pretrained(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        WanModel.from_pretrained(tmp_path)


def test_bf16_keeps_in_float32_what_diffusers_keeps():
    theirs = re.compile("|".join(map(re.escape, WanTransformer3DModel._keep_in_fp32_modules)))
    with torch.device("meta"):
        names = WanModel(WanConfig(48, 96, 2, 2)).state_dict()
    for name in names:
        if theirs.search(checkpoint.diffusers_name(name)):
            assert KEPT_PRECISE.search(name), name
