"""The Wan architecture and its files."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import helpers
from tiny_wan import WanConfig, WanModel
from tiny_wan.model import rope_table

SMALL = WanConfig(48, 96, 2, 2, in_dim=4, out_dim=4, text_dim=6, text_len=8)
random_model = partial(helpers.random_model, SMALL)


def inputs(b=2, f=3, h=4, w=6, l=5, config=SMALL):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(b, config.in_dim, f, h, w, generator=g), torch.tensor([900.0, 13.0])[:b],
            torch.randn(b, l, config.text_dim, generator=g))


def test_output_is_a_velocity_of_the_inputs_shape_and_not_trivial():
    model = random_model()
    for f, h, w, l in [(3, 4, 6, 5), (1, 2, 2, 0), (2, 6, 2, 8)]:
        x, t, text = inputs(f=f, h=h, w=w, l=l)
        v = model(x, t, text)
        assert v.shape == x.shape and v.std() > 0.1


def test_frame_stride_places_frames_at_0_2_4():
    full, half = rope_table(5, 2, 3, 24, 1, torch.device("cpu")), rope_table(
        3, 2, 3, 24, 2, torch.device("cpu"))
    for a, b in zip(full, half):
        assert torch.equal(a.unflatten(0, (5, 6))[::2].flatten(0, 1), b)


def test_frame_stride_changes_the_answer_only_where_there_are_several_frames():
    model, (x, t, text) = random_model(), inputs()
    assert not torch.allclose(model(x, t, text), model(x, t, text, frame_stride=2))
    still = x[:, :, :1]
    assert torch.equal(model(still, t, text), model(still, t, text, frame_stride=2))


def test_training_works_after_inference():
    x, t, text = inputs(h=8)
    with torch.inference_mode():
        random_model()(x, t, text)
    random_model()(x, t, text).sum().backward()


def test_checkpointing_changes_no_gradient():
    x, t, text = inputs()
    grads = []
    for recompute in (False, True):
        model = random_model()
        model.gradient_checkpointing = recompute
        model(x, t, text).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_wrong_shapes_are_named():
    model, (x, t, text) = random_model(), inputs()
    with pytest.raises(ValueError, match="x is"):
        model(x[:, :3], t, text)
    with pytest.raises(ValueError, match="x is"):
        model(x[..., :5], t, text)
    with pytest.raises(ValueError, match="text is"):
        model(x, t, text.repeat(1, 2, 1))


# --- files -------------------------------------------------------------------------------------

def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model, batch = random_model(), inputs()
    model.save_pretrained(tmp_path, metadata={"note": "x"})
    again = WanModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(model(*batch), again(*batch))
    file = WanModel.from_pretrained(tmp_path / "diffusion_pytorch_model.safetensors")
    assert file.config == model.config and torch.equal(model(*batch), file(*batch))
    rough = WanModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rough.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert rough.blocks[0].modulation.dtype == rough.time_embedding[0].weight.dtype == torch.float32


def test_shapes_supply_what_a_published_config_and_a_bare_file_lack(tmp_path):
    config = replace(SMALL, dim=256, num_heads=2, text_len=512)
    model = helpers.random_model(config)
    model.save_pretrained(tmp_path)
    published = {"model_type": "t2v", "dim": 256, "eps": 1e-6, "ffn_dim": 96, "freq_dim": 256,
                 "in_dim": 4, "num_heads": 2, "num_layers": 2, "out_dim": 4, "text_len": 512}
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert WanModel.from_pretrained(tmp_path).config == config
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in load_file(file).items()},
              tmp_path / "comfyui.safetensors")
    bare = WanModel.from_pretrained(tmp_path / "comfyui.safetensors")
    assert bare.config == config
    assert torch.equal(bare(*inputs(config=config)), model(*inputs(config=config)))
