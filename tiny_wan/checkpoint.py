"""The files of a Wan transformer: folders and safetensors files in the original code's layout.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`, or its shards and their
index. A bare file may carry ComfyUI's prefix. Nothing here can run code from a file.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FILE = "diffusion_pytorch_model.safetensors"
COMFYUI_PREFIX = "model.diffusion_model."


def weight_files(path):
    """The safetensors files of a folder or of a bare file's path. FileNotFoundError names it."""
    path = Path(path)
    if path.is_dir():
        index = path / (FILE + ".index.json")
        if index.exists():
            if not (shards := read_json(index).get("weight_map")):
                raise ValueError(f"{index}: no weight_map in it")
            return [path / name for name in sorted(set(shards.values()))]
        path = path / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model is a folder with config.json and "
                                f"{FILE}, or one safetensors file")
    return [path]


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def open_weights(file):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def read_metadata(path):
    """What the safetensors header says beside the tensors: a dict of strings."""
    with open_weights(weight_files(path)[0]) as weights:
        return weights.metadata() or {}


def read_weights(path, dtype=None, device=None):
    """All tensors, memory-mapped until converted, by the original code's names."""
    tensors = {}
    for file in weight_files(path):
        with open_weights(file) as weights:
            for name in weights.keys():
                tensors[name.removeprefix(COMFYUI_PREFIX)] = weights.get_tensor(name).to(
                    device=device, dtype=dtype)
    return tensors


def read_config(path, tensors):
    """A dict of WanConfig's fields: what `config.json` says, and for the rest the shapes."""
    def shape(name):
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name!r} is missing; is this a Wan transformer?")
        return tensors[name].shape

    dim, in_dim, *patch_size = shape("patch_embedding.weight")
    config = {
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "num_heads": dim // 128,  # all of Wan's heads are 128 wide
        "num_layers": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "in_dim": in_dim,
        "out_dim": shape("head.head.weight")[0] // torch.Size(patch_size).numel(),
        "text_dim": shape("text_embedding.0.weight")[1],
        "text_len": 512,
        "freq_dim": shape("time_embedding.0.weight")[1],
        "patch_size": tuple(patch_size),
        "eps": 1e-6,
    }
    file = Path(path) / "config.json"
    given = json.loads(read_metadata(path).get("config", "{}"))
    given |= read_json(file) if file.is_file() else {}
    config |= {name: given[name] for name in config if name in given}
    return config | {"patch_size": tuple(config["patch_size"])}


def write(path, config, tensors, metadata):
    """Write a folder that the original code reads; the weights appear whole or not at all."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "config": json.dumps(config)} | metadata  # for the bare file
    save_file(tensors, path / (FILE + ".part"), metadata)
    os.replace(path / (FILE + ".part"), path / FILE)
    (path / (FILE + ".index.json")).unlink(missing_ok=True)  # of shards that lay here before
    (path / "config.json").write_text(json.dumps({"model_type": "t2v"} | config, indent=2) + "\n")
