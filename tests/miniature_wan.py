"""A whole Wan2.1 of a few hundred kilobytes, made by diffusers' and transformers' own classes.

Its architecture is Wan's, its weights are random, and it lies on disk as Wan2.1 does.
"""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import save_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tiny_wan import PRESETS, WanModel

SIZES = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 2,
         "text_dim": 32}


def randomize(module, seed=0):
    """Every parameter random, scaled so that signals neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim == 1 or "gamma" in name:
            mean = 1.0 if name.endswith(("gamma", "weight")) else 0.0  # of a norm, or a bias
            torch.nn.init.normal_(p, mean, 0.3, generator=g)
        else:
            fan_in = p.shape[-1] if "scale_shift" in name else p[0].numel()
            torch.nn.init.normal_(p, std=fan_in ** -0.5, generator=g)
    return module.eval().requires_grad_(False)


def transformer(seed=0, **sizes):
    return randomize(WanTransformer3DModel(**SIZES | sizes), seed)


def text_encoder(seed=1):
    config = UMT5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                        tie_word_embeddings=False)  # so says the real one, with one table
    return randomize(UMT5EncoderModel(config), seed).bfloat16().float()  # fits its bf16 file


def vae(seed=2):
    return randomize(AutoencoderKLWan(base_dim=4), seed)


def tokenizer():
    letters = [chr(c) for c in range(33, 127)] + list("的静态")
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=special + [(c, -3.0) for c in letters], extra_ids=0)


def pipeline():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=5.0)
    return WanPipeline(tokenizer(), text_encoder(), vae(), scheduler, transformer())


def make(folder, layout="diffusers"):
    """Write a miniature to `folder` as Wan-AI/Wan2.1-T2V-1.3B[-Diffusers] lies on the hub."""
    folder, pipe = Path(folder), pipeline()
    if layout == "diffusers":
        pipe.save_pretrained(folder)
        return folder
    pipe.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")
    torch.save(original(pipe.text_encoder.bfloat16()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(original(pipe.vae), folder / "Wan2.1_VAE.pth")
    save_file(original(pipe.transformer), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(
        '{"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 48, "eps": 1e-06, '
        '"ffn_dim": 96, "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 2, '
        '"num_layers": 2, "out_dim": 16, "text_len": 512}')
    return folder


def original(module, gradients=False):
    """The module's tensors under the names of Wan's own code: diffusers' conversion, backwards."""
    tensors = {name: p.grad.clone() for name, p in module.named_parameters()} if gradients else {
        name: p.clone() for name, p in module.state_dict().items()}
    if isinstance(module, UMT5EncoderModel):
        return {t5_name(n): t for n, t in tensors.items() if n != "encoder.embed_tokens.weight"}
    if isinstance(module, WanTransformer3DModel):
        convert, names = convert_wan_transformer_to_diffusers, transformer_names(module)
    else:
        convert, names = convert_wan_vae_to_diffusers, vae_names()
    names = {theirs: ours for ours in names for theirs in convert({ours: None})}
    return {names[name]: tensor for name, tensor in tensors.items()}


def transformer_names(module):
    """Our names, which diffusers' conversion must know: those of Wan's own code."""
    config = replace(PRESETS["wan-1.3b"], num_layers=module.config.num_layers)
    with torch.device("meta"):
        return WanModel(config).state_dict()


def t5_name(name):
    for theirs, ours in {
            "shared": "token_embedding", "encoder.block": "blocks",
            "encoder.final_layer_norm": "norm", "layer.0.SelfAttention": "attn",
            "attn.relative_attention_bias": "pos_embedding.embedding",
            "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2",
            "layer.1.DenseReluDense": "ffn", "wi_0": "gate.0", "wi_1": "fc1", "wo": "fc2"}.items():
        name = name.replace(theirs, ours)
    return name


def vae_names():
    """All that the original VAE can hold."""
    residual = ["residual.0.gamma", "residual.2.weight", "residual.2.bias", "residual.3.gamma",
                "residual.6.weight", "residual.6.bias"]
    attention = ["norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"]
    levels = residual + ["shortcut.weight", "shortcut.bias", "resample.1.weight",
                         "resample.1.bias", "time_conv.weight", "time_conv.bias"]
    names = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    for half, kind in (("encoder", "downsamples"), ("decoder", "upsamples")):
        names += [f"{half}.conv1.weight", f"{half}.conv1.bias", f"{half}.head.0.gamma",
                  f"{half}.head.2.weight", f"{half}.head.2.bias"]
        names += [f"{half}.middle.{i}.{name}" for i in (0, 2) for name in residual]
        names += [f"{half}.middle.1.{name}" for name in attention]
        names += [f"{half}.{kind}.{i}.{name}" for i in range(15) for name in levels]
    return names
