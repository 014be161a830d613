"""The files of a Wan transformer, in each layout that people have on disk.

original    config.json and diffusion_pytorch_model.safetensors, or its shards and their index
diffusers   the same files under Diffusers' names for tensors and settings; a pipeline's folder has
            them in transformer/
comfyui     one safetensors file; the original's names, often behind a prefix

Nothing here can run code from a file.
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

LAYOUTS = ("original", "diffusers", "comfyui")
FILE = "diffusion_pytorch_model.safetensors"
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
COMFYUI_PREFIX = "model.diffusion_model."
SHARD_BYTES = 5 * 10**9
MOST_JSON = 10**8  # bytes
MOST = 2**16  # of what config.json counts: a damaged one must not ask for terabytes

DIFFUSERS_NAMES = {  # the norms really do swap
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "self_attn": "attn1", "cross_attn": "attn2",
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
    "norm2": "norm3", "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    "head.head": "proj_out", "head.modulation": "scale_shift_table",
    "modulation": "scale_shift_table",
}
DIFFUSERS_SETTINGS = {
    "in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads",
    **{name: name for name in ("ffn_dim", "num_layers", "text_dim", "freq_dim", "patch_size",
                               "eps")}}


def rename(name, table):
    """Replace those whole parts of a dotted name that the table has, all at once."""
    parts = "|".join(map(re.escape, table))
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda match: table[match[0]], name)


def diffusers_name(name):
    """Diffusers' name of a tensor, from the original one."""
    return rename(name, DIFFUSERS_NAMES)


# ---------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------


def model_folder(path):
    """Where config.json and the weights lie: a pipeline's folder has them in transformer/."""
    inner = Path(path) / "transformer"
    return inner if inner.is_dir() else Path(path)


def home(path):
    """The folder for what goes with a transformer: that with transformer/, or a bare file's."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return folder.parent if folder.name == "transformer" else folder


def weight_files(path):
    """The safetensors files of a folder or of a bare file's path. FileNotFoundError names one."""
    path = model_folder(path)
    index = path / (FILE + ".index.json")
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{index}: no weight_map in it")
        files = []
        for name in sorted(set(map(str, names.values()))):
            if Path(name).name != name:
                raise ValueError(f"{index}: {name!r} is not the name of a file beside it")
            if not os.path.isfile(path / name):  # false, too, of a name that no disk can have
                raise FileNotFoundError(f"{path / name}: no such file, but {index.name} lists it")
            files.append(path / name)
    elif path.is_dir() and not (path / FILE).is_file():  # ComfyUI's one file has a name of its own
        files = [f for f in path.glob("*.safetensors")
                 if f.name not in ("interpolator.safetensors", "checkpoint.safetensors")]
        files = files if len(files) == 1 else [path / FILE]
    else:
        files = [path / FILE if path.is_dir() else path]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a model is a folder with config.json "
                                    f"and {FILE} (or all its shards), or one safetensors file")
    return files


def named(path):
    """What a complaint about a model's tensors names: its file, or the folder of its shards."""
    files = weight_files(path)
    return files[0] if len(files) == 1 else files[0].parent


def read_json(file, text=None):
    """The JSON object in a file, or in a text from it. ValueError where it holds none."""
    if text is None and file.stat().st_size > MOST_JSON:
        raise ValueError(f"{file}: larger than any such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8") if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object")
    return value


def open_weights(file):
    """A safetensors file, to be read tensor by tensor. ValueError where it is damaged."""
    try:
        weights = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    for name in weights.keys():
        if 0 in weights.get_slice(name).get_shape():
            raise ValueError(f"{file}: {name!r} is empty")
    return weights


def read_metadata(path):
    """What the safetensors header says beside the tensors: a dict of strings."""
    with open_weights(weight_files(path)[0]) as weights:
        return weights.metadata() or {}


def read_shapes(path):
    """{name: shape} of all tensors, by their names in the file less ComfyUI's prefix."""
    shapes = {}
    for file in weight_files(path):
        with open_weights(file) as weights:
            for name in weights.keys():
                shapes[name.removeprefix(COMFYUI_PREFIX)] = tuple(
                    weights.get_slice(name).get_shape())
    return shapes


def naming(shapes):
    """How this file names a tensor: a function of the original name."""
    diffusers = any(name.startswith("condition_embedder.") for name in shapes)
    return diffusers_name if diffusers else str


def read_config(path):
    """A dict of WanConfig's fields: what the shapes tell, and config.json for the rest.

    ValueError where the two contradict each other, or where this is another kind of model.
    """
    shapes = read_shapes(path)
    own_name = naming(shapes)

    def shape(name, ndim=2):
        found = shapes.get(own_name(name), ())
        if len(found) != ndim:
            raise ValueError(f"{named(path)}: tensor {own_name(name)!r} is missing or not of "
                             f"{ndim} dimensions; is this a Wan transformer?")
        return found

    dim, in_dim, *patch_size = shape("patch_embedding.weight", 5)
    told = {"dim": dim, "ffn_dim": shape("blocks.0.ffn.0.weight")[0], "in_dim": in_dim,
            "out_dim": shape("head.head.weight")[0] // torch.Size(patch_size).numel(),
            "text_dim": shape("text_embedding.0.weight")[1],
            "freq_dim": shape("time_embedding.0.weight")[1], "patch_size": tuple(patch_size)}
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    assumed = {"num_heads": dim // 128,  # all of Wan's heads are 128 wide
               "num_layers": blocks, "text_len": 512, "eps": 1e-6}

    file, folder = named(path), model_folder(path)
    given = read_json(file, read_metadata(path).get("config", "{}"))
    if folder.name == FILE:
        folder = folder.parent
    if (folder / "config.json").is_file():
        file = folder / "config.json"
        settings = read_json(file)
        kind = settings.get("_class_name", "WanModel"), settings.get("model_type", "t2v")
        if kind not in (("WanModel", "t2v"), ("WanTransformer3DModel", "t2v")):
            raise ValueError(f"{file}: a {' '.join(map(str, kind))} is not Wan's text-to-video "
                             f"transformer")
        diffusers = {n: settings[theirs] for n, theirs in DIFFUSERS_SETTINGS.items()
                     if theirs in settings}
        given |= settings | diffusers
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in told and value != told[name]:
            raise ValueError(f"{file}: {name} is {value}, but the tensors' shapes say {told[name]}")
        if name in assumed:
            if type(value) is not type(assumed[name]) or not 0 < value <= MOST:
                raise ValueError(f"{file}: {name} is {value!r}")
            assumed[name] = value
    if assumed["num_layers"] > blocks:
        raise ValueError(f"{file}: num_layers is {assumed['num_layers']}, but there are tensors of "
                         f"{blocks} blocks")
    return told | assumed


def read_weights(path, expected, convert):
    """{name: convert(name, tensor)} for all `expected` {name: shape}, by the original names.

    Tensors are memory-mapped until they are converted. ValueError names what does not fit.
    """
    shapes = read_shapes(path)
    original_name = {naming(shapes)(name): name for name in expected}
    wrong = [f"{n!r} is missing" for n in original_name if n not in shapes]
    wrong += [f"{n!r} has no place in this model" for n in shapes if n not in original_name]
    wrong += [f"{n!r} is {list(shapes[n])}, but must be {list(expected[original_name[n]])}"
              for n in original_name if n in shapes and shapes[n] != expected[original_name[n]]]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{named(path)}: tensor {'; '.join(wrong[:3])}{more}")
    tensors = {}
    for file in weight_files(path):
        with open_weights(file) as weights:
            for key in weights.keys():
                tensor = weights.get_tensor(key)
                if tensor.dtype not in DTYPES:
                    raise ValueError(f"{file}: {key!r} is {tensor.dtype}, not one of {DTYPES}")
                if not tensor.sum(dtype=torch.float32).isfinite():
                    raise ValueError(f"{file}: {key!r} is not finite")
                name = original_name[key.removeprefix(COMFYUI_PREFIX)]
                tensors[name] = convert(name, tensor)
    return tensors


# ---------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------


def write(path, config, tensors, layout="original", metadata=None):
    """Write a folder, or for ComfyUI one file. A folder that was left half-way does not load.

    path: a folder; for ComfyUI, where the file is named after it, or the name of the file.
    metadata: strings for the safetensors headers.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; there are {', '.join(LAYOUTS)}")
    path = Path(path)
    header = {"format": "pt", "config": json.dumps(config)} | (metadata or {})  # for bare files
    if layout == "comfyui":
        name = path.resolve().name
        file = path if path.suffix == ".safetensors" else path / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        return write_whole({file: {COMFYUI_PREFIX + n: t for n, t in tensors.items()}}, header)

    path.mkdir(parents=True, exist_ok=True)
    if layout == "original":
        settings = {"_class_name": "WanModel", "model_type": "t2v"} | config
    else:
        settings = {"_class_name": "WanTransformer3DModel",
                    "attention_head_dim": config["dim"] // config["num_heads"],
                    **{theirs: config[n] for n, theirs in DIFFUSERS_SETTINGS.items()}}
        tensors = {diffusers_name(name): tensor for name, tensor in tensors.items()}
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > SHARD_BYTES and shards[-1]:
            shards, size = [*shards, {}], tensor.nbytes
        shards[-1][name] = tensor
    names = [FILE] if len(shards) == 1 else [
        FILE.replace(".", f"-{i:05}-of-{len(shards):05}.") for i in range(1, len(shards) + 1)]
    ours = re.compile(FILE.replace(".", r"(-\d{5}-of-\d{5})?\.") + r"(\.index\.json)?")
    stale = [f for f in path.iterdir() if ours.fullmatch(f.name) and f.name not in names]
    write_whole({path / name: shard for name, shard in zip(names, shards)}, header, stale)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {n: name for name, shard in zip(names, shards) for n in shard}}
        part = path / (FILE + ".index.json.part")
        part.write_text(json.dumps(index, indent=2) + "\n")
        os.replace(part, part.with_suffix(""))
    (path / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_whole(files, header, stale=()):
    """Write {path: tensors} beside the old files; then these go, and all get their names."""
    for file, tensors in files.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
                  f"{file}.part", header)
    for file in stale:
        file.unlink()
    for file in files:
        os.replace(f"{file}.part", file)
