"""The Wan architecture and its files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_wan import PRESETS, WanConfig, WanModel
from tiny_wan.model import rope_table

SMALL = WanConfig(48, 96, 2, 2, in_dim=4, out_dim=4, text_dim=6, text_len=8)


def random_model(config=SMALL, seed=0):
    """Every parameter random: the original initialisation zeroes the head and would hide all."""
    g = torch.Generator().manual_seed(seed)
    model = WanModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5, generator=g)
    return model


def inputs(b=2, f=3, h=4, w=6, l=5, config=SMALL):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(b, config.in_dim, f, h, w, generator=g), torch.tensor([900.0, 13.0])[:b],
            torch.randn(b, l, config.text_dim, generator=g))


@pytest.mark.parametrize("name, billions", [("wan-1.3b", 1.419), ("wan-14b", 14.288)])
def test_presets_have_wans_published_sizes(name, billions):
    with torch.device("meta"):
        model = WanModel(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_output_is_a_velocity_of_the_inputs_shape_and_not_trivial():
    model = random_model()
    for f, h, w, l in [(3, 4, 6, 5), (1, 2, 2, 0), (2, 6, 2, 8)]:
        x, t, text = inputs(f=f, h=h, w=w, l=l)
        v = model(x, t, text)
        assert v.shape == x.shape and v.std() > 0.1


def test_a_sample_does_not_depend_on_its_batch():
    model, (x, t, text) = random_model(), inputs()
    torch.testing.assert_close(model(x, t, text)[1:], model(x[1:], t[1:], text[1:]),
                               atol=1e-5, rtol=1e-5)


def test_text_is_zero_padded_to_its_full_length():
    model, (x, t, text) = random_model(), inputs(l=5)
    padded = torch.cat([text, torch.zeros(2, 3, 6)], dim=1)
    assert torch.equal(model(x, t, text), model(x, t, padded))


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


def test_inference_first_does_not_spoil_training_later():
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


def test_bf16_is_within_its_own_error():
    model, (x, t, text) = random_model(), inputs()
    exact = model(x, t, text)
    rough = model.bfloat16()(x, t, text)
    assert rough.dtype == x.dtype and (rough - exact).abs().max() < 0.1 * exact.std()


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


def test_a_published_config_and_a_bare_file_need_no_more_than_the_shapes(tmp_path):
    config = replace(SMALL, dim=256, num_heads=2, text_len=512)
    model = random_model(config)
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


def test_shards_are_found_by_their_index(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = sorted(load_file(file).items())
    file.unlink()
    parts = {"a.safetensors": dict(tensors[:20]), "b.safetensors": dict(tensors[20:])}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(WanModel.from_pretrained(tmp_path)(*inputs()), model(*inputs()))

    other = random_model(seed=1)
    other.save_pretrained(tmp_path)  # and no old index leads to the old shards
    assert torch.equal(WanModel.from_pretrained(tmp_path)(*inputs()), other(*inputs()))


@pytest.mark.parametrize("change, complaint", [
    (lambda t: t.pop("head.head.bias"), "'head.head.bias' is missing"),
    (lambda t: t.update(extra=torch.zeros(1)), "'extra' has no place"),
    (lambda t: t.update({"head.head.bias": torch.zeros(3)}), r"'head.head.bias' is \[3\]"),
    (lambda t: t.clear() or t.update(x=torch.zeros(1)), "is this a Wan transformer"),
])
def test_tensors_that_do_not_fit_are_named(tmp_path, change, complaint):
    random_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=complaint):
        WanModel.from_pretrained(tmp_path)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        WanModel.from_pretrained(tmp_path / "nowhere")
    random_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        WanModel.from_pretrained(tmp_path)
