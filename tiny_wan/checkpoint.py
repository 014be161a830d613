"""Reading and writing the files of a Wan transformer, in three layouts:

original    config.json and diffusion_pytorch_model.safetensors, or shards of it and their index
diffusers   the same files, with Diffusers' names for tensors and settings; in the folder of a
            pipeline they are in transformer/
comfyui     one safetensors file with the original names, often with a prefix

No file can make this module run code.
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
INDEX = FILE + ".index.json"
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
COMFYUI_PREFIX = "model.diffusion_model."
SHARD_BYTES = 5 * 10**9
MAX_TEXT_BYTES = 10**8
MAX_SETTING = 2**16  # so that a damaged config.json cannot ask for terabytes of memory

DIFFUSERS_NAMES = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "self_attn": "attn1", "cross_attn": "attn2",
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
    "norm2": "norm3", "norm3": "norm2",  # Diffusers numbers them in order of use
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    "head.head": "proj_out", "head.modulation": "scale_shift_table",
    "modulation": "scale_shift_table",
}
DIFFUSERS_SETTINGS = {
    "in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads",
    **{name: name for name in ("ffn_dim", "num_layers", "text_dim", "freq_dim", "patch_size",
                               "eps")}}


def rename(name, table):
    """Replace the dotted parts of a name that are keys of the table, all in one pass."""
    parts = "|".join(map(re.escape, table))
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda match: table[match[0]], name)


def diffusers_name(name):
    """Diffusers' name of a tensor, given the original one."""
    return rename(name, DIFFUSERS_NAMES)


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def model_folder(path):
    """`path`, or its subfolder transformer/ if it is the folder of a pipeline."""
    inner = Path(path) / "transformer"
    return inner if inner.is_dir() else Path(path)


def home(path):
    """The folder for files that accompany a model, such as its interpolator.

    It is the pipeline's folder if the model is in transformer/, else the model's own.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return folder.parent if folder.name == "transformer" else folder


def weight_files(path):
    """The safetensors files of the model at `path`, a folder or one of these files.

    FileNotFoundError names a missing file, ValueError a wrong index.
    """
    path = model_folder(path)
    index = path / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{index}: has no weight_map")
        files = []
        for name in sorted(set(map(str, names.values()))):
            if Path(name).name != name:
                raise ValueError(f"{index}: {name!r} is not the name of a file beside it")
            if not os.path.isfile(path / name):  # Path.is_file raises if the name is too long
                raise FileNotFoundError(f"{path / name}: no such file, but {index.name} lists it")
            files.append(path / name)
        return files
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():  # a ComfyUI file can have any name
        found = [f for f in path.glob("*.safetensors") if f.name != "interpolator.safetensors"]
        file = found[0] if len(found) == 1 else file
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a model is a folder with config.json and "
                                f"{FILE} (or all its shards), or one safetensors file")
    return [file]


def named(path):
    """The path for errors about a model's tensors: its file, or the folder of its shards."""
    files = weight_files(path)
    return files[0] if len(files) == 1 else files[0].parent


def read_text(file, most=MAX_TEXT_BYTES):
    """The text in a UTF-8 file. ValueError if it is no file, too large, or not UTF-8."""
    if file.exists() and not file.is_file():  # a folder, a device or a pipe, which may never end
        raise ValueError(f"{file}: not a file")
    with open(file, "rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{file}: has more than {most} bytes, too many for a text here")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file in UTF-8") from None


def read_json(file, text=None):
    """The JSON object in `file`, or in a `text` out of that file. ValueError if there is none."""
    text = read_text(file) if text is None else text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object")
    return value


def open_weights(file):
    """A safetensors file, opened to read tensor by tensor. ValueError if it is damaged."""
    try:
        weights = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    for name in weights.keys():
        if 0 in weights.get_slice(name).get_shape():
            raise ValueError(f"{file}: {name!r} is empty")
    return weights


def read_metadata(path):
    """The metadata in the safetensors header of a model: a dict of strings."""
    with open_weights(weight_files(path)[0]) as weights:
        return weights.metadata() or {}


def read_shapes(path):
    """{name: shape} of a model's tensors. Names are the file's, without ComfyUI's prefix."""
    shapes = {}
    for file in weight_files(path):
        with open_weights(file) as weights:
            for name in weights.keys():
                shapes[name.removeprefix(COMFYUI_PREFIX)] = tuple(
                    weights.get_slice(name).get_shape())
    return shapes


def naming(shapes):
    """A function from a tensor's original name to its name in a file with these `shapes`."""
    diffusers = any(name.startswith("condition_embedder.") for name in shapes)
    return diffusers_name if diffusers else str


def read_settings(path):
    """The settings stored with a model, by the original names, and the file that they come from.

    They are in config.json and, in the files that `write` makes, in the safetensors header too.
    ValueError if the model is of another kind.
    """
    settings = read_json(named(path), read_metadata(path).get("config", "{}"))
    folder = model_folder(path)
    file = (folder.parent if folder.name == FILE else folder) / "config.json"
    if not file.is_file():
        return settings, named(path)
    settings |= read_json(file)
    kind = settings.get("_class_name", "WanModel"), settings.get("model_type", "t2v")
    if kind not in (("WanModel", "t2v"), ("WanTransformer3DModel", "t2v")):
        raise ValueError(f"{file}: a {' '.join(map(str, kind))} is not Wan's text-to-video "
                         f"transformer")
    return settings | {name: settings[theirs] for name, theirs in DIFFUSERS_SETTINGS.items()
                       if theirs in settings}, file


def read_config(path):
    """A dict of WanConfig's fields, from the tensors' shapes and the settings.

    What neither gives has Wan's usual value. ValueError if they contradict each other, or if this
    is not Wan's text-to-video transformer.
    """
    shapes = read_shapes(path)
    name_in_file = naming(shapes)

    def shape(name, ndim=2):
        found = shapes.get(name_in_file(name), ())
        if len(found) != ndim:
            raise ValueError(f"{named(path)}: tensor {name_in_file(name)!r} is missing, or does "
                             f"not have {ndim} dimensions; is this a Wan transformer?")
        return found

    dim, in_dim, *patch_size = shape("patch_embedding.weight", 5)
    from_shapes = {
        "dim": dim, "ffn_dim": shape("blocks.0.ffn.0.weight")[0], "in_dim": in_dim,
        "out_dim": shape("head.head.weight")[0] // torch.Size(patch_size).numel(),
        "text_dim": shape("text_embedding.0.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1], "patch_size": tuple(patch_size)}
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    others = {"num_heads": dim // 128,  # the heads of all published models are 128 wide
              "num_layers": blocks, "text_len": 512, "eps": 1e-6}

    settings, file = read_settings(path)
    for name, value in settings.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in from_shapes and value != from_shapes[name]:
            raise ValueError(f"{file}: {name} is {value}, but by the tensors' shapes it is "
                             f"{from_shapes[name]}")
        if name in others:
            if type(value) is not type(others[name]) or not 0 < value <= MAX_SETTING:
                raise ValueError(f"{file}: {name} is {value!r}, which is not valid")
            others[name] = value
    if others["num_layers"] > blocks:
        raise ValueError(f"{file}: num_layers is {others['num_layers']}, but the weights have only "
                         f"{blocks} blocks")
    return from_shapes | others


def read_weights(path, expected, convert):
    """{name: convert(name, tensor)} for all `expected` {name: shape}, by the original names.

    Tensors are memory-mapped until they are converted. ValueError names those that are missing,
    unknown or of another shape, and those with numbers that are not finite.
    """
    shapes = read_shapes(path)
    name_in_file = naming(shapes)
    original_name = {name_in_file(name): name for name in expected}
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
# Writing
# ---------------------------------------------------------------------------------------------


def write(path, config, tensors, layout="original", metadata=None):
    """Write a model to a folder, or for ComfyUI to one file.

    path: the folder. For ComfyUI, it may be the name of the file, in .safetensors; otherwise the
        file gets the folder's name.
    config: a dict of WanConfig's fields.
    metadata: strings for the safetensors headers.

    After an interruption, no mixture of old and new weights loads.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; the layouts are {', '.join(LAYOUTS)}")
    path = Path(path)
    # With its config in the header, a file can also be read without config.json.
    header = {"format": "pt", "config": json.dumps(config)} | (metadata or {})
    if layout == "comfyui":
        name = path.resolve().name
        file = path if path.suffix == ".safetensors" else path / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_files({file: {COMFYUI_PREFIX + n: t for n, t in tensors.items()}}, header)
        return

    path.mkdir(parents=True, exist_ok=True)
    if layout == "original":
        settings = {"_class_name": "WanModel", "model_type": "t2v"} | config
    else:
        settings = {"_class_name": "WanTransformer3DModel",
                    "attention_head_dim": config["dim"] // config["num_heads"],
                    **{theirs: config[n] for n, theirs in DIFFUSERS_SETTINGS.items()}}
        tensors = {diffusers_name(name): tensor for name, tensor in tensors.items()}
    shards = split_into_shards(tensors)
    names = [FILE] if len(shards) == 1 else [
        FILE.replace(".", f"-{i:05}-of-{len(shards):05}.") for i in range(1, len(shards) + 1)]
    ours = re.compile(FILE.replace(".", r"(-\d{5}-of-\d{5})?\.") + r"(\.index\.json)?")
    stale = [f for f in path.iterdir() if ours.fullmatch(f.name) and f.name not in names]
    write_files({path / name: shard for name, shard in zip(names, shards)}, header, stale)
    if len(shards) > 1:
        write_json(path / INDEX, {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {n: name for name, shard in zip(names, shards) for n in shard}})
    write_json(path / "config.json", settings)


def split_into_shards(tensors):
    """Split a dict of tensors into a list of dicts of at most SHARD_BYTES (or one tensor) each."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > SHARD_BYTES and shards[-1]:
            shards, size = [*shards, {}], tensor.nbytes
        shards[-1][name] = tensor
    return shards


def write_files(files, header=None, stale=()):
    """Write {path: tensors} under temporary names; then delete the `stale` files and rename.

    ValueError, before anything is replaced, if a tensor is not finite.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file, tensors in files.items():
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{file}: not written, as tensor {bad[0]!r} is not finite")
        part = f"{file}.part"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, header)
        os.chmod(part, 0o666 & ~umask)  # safetensors lets nobody else read its files
        fsync(Path(part))
    for file in stale:
        file.unlink()
    for file in files:
        os.replace(f"{file}.part", file)


def fsync(path):
    """Flush a file to the disk, or the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    opened = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)  # Windows wants to write
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_json(file, value):
    file.write_text(json.dumps(value, indent=2) + "\n")
