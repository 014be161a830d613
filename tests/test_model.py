"""The Wan architecture and its files."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from tests import helpers
from tiny_wan import WanConfig, WanModel
from tiny_wan.model import rope_table

SMALL = WanConfig(48, 96, 2, 2, in_dim=4, out_dim=4, text_dim=6, text_len=8)
random_model = partial(helpers.random_model, SMALL)


def inputs(h=4, config=SMALL):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(2, config.in_dim, 3, h, 6, generator=g), torch.tensor([900.0, 13.0]),
            torch.randn(2, 5, config.text_dim, generator=g))


def test_frame_stride_places_frames_at_0_2_4():
    full, half = rope_table(5, 2, 3, 24, 1, torch.device("cpu")), rope_table(
        3, 2, 3, 24, 2, torch.device("cpu"))
    for a, b in zip(full, half):
        assert torch.equal(a.unflatten(0, (5, 6))[::2].flatten(0, 1), b)
    model, (x, t, text) = random_model(), inputs()
    assert not torch.allclose(model(x, t, text), model(x, t, text, frame_stride=2))


def test_training_works_after_inference():
    x, t, text = inputs(h=8)
    with torch.inference_mode():
        random_model()(x, t, text)
    random_model()(x, t, text).sum().backward()


def test_wrong_shapes_are_named():
    model, (x, t, text) = random_model(), inputs()
    with pytest.raises(ValueError, match="x is"):
        model(x[:, :3], t, text)
    with pytest.raises(ValueError, match="x is"):
        model(x[..., :5], t, text)
    with pytest.raises(ValueError, match="text is"):
        model(x, t, text.repeat(1, 2, 1))


# --- files -------------------------------------------------------------------------------------

def test_a_saved_model_keeps_a_config_unlike_wans(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    assert WanModel.from_pretrained(tmp_path).config == model.config


def test_shapes_supply_what_a_bare_file_lacks(tmp_path):
    config = replace(SMALL, dim=256, num_heads=2, text_len=512)
    model = helpers.random_model(config)
    save_file({f"model.diffusion_model.{name}": p for name, p in model.state_dict().items()},
              tmp_path / "comfyui.safetensors")
    bare = WanModel.from_pretrained(tmp_path / "comfyui.safetensors")
    assert bare.config == config
    assert torch.equal(bare(*inputs(config=config)), model(*inputs(config=config)))
