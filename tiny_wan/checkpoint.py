"""Reading and writing the files of a Wan transformer, in three layouts:

original    config.json and diffusion_pytorch_model.safetensors, or shards of it and their index
diffusers   the same files, with Diffusers' names for tensors and settings; in the folder of a
            pipeline they are in transformer/
comfyui     one safetensors file with the original names, often with a prefix

Files of torch.save are read too, with tensors alone. dialects.py knows the names that others use.
No file can make this module run code.
"""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tiny_wan.dialects import (
    AGAIN,
    AVERAGES,
    BLANK,
    CHANNELS,
    DIFFUSERS_SETTINGS,
    EXPERTS,
    FILE_NAMES,
    FIRST_BYTES,
    ONLY,
    OTHER_KINDS,
    OTHER_PARTS,
    QUANTISED,
    TRAINED_BESIDE,
    diffusers_name,
    explain,
    unwrap,
)

LAYOUTS = ("original", "diffusers", "comfyui")
FILE = "diffusion_pytorch_model.safetensors"
INDEX = FILE + ".index.json"
OURS = re.compile(FILE.replace(".", r"(-\d{5}-of-\d{5})?\.") + r"(\.index\.json)?|config\.json")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
MAY_BE_BLANK = re.compile(r"^head\.|modulation")  # before a model is trained
SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf"}
COMPANIONS = re.compile(  # weights beside a model that are not its own
    r"(interpolator|latents)\.safetensors|Wan2\.\d_VAE\.pth|models_(t5|clip)_.*|"
    r"(optimizer|scheduler|rng_state|training_args).*")
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
COMFYUI_PREFIX = "model.diffusion_model."
SHARD_BYTES = 5 * 10**9
MAX_TEXT_BYTES = 10**8
MAX_SETTING = 2**16  # so that a damaged config.json cannot ask for terabytes of memory

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
    """The files of the weights at `path`: a model's or a LoRA's folder, or one of these files.

    FileNotFoundError names a missing file. ValueError names a wrong index, or what else it is.
    """
    refuse_two_experts(path)
    files = find_files(model_folder(path))
    for file in files:
        if what := explain([file.name], FILE_NAMES):
            raise ValueError(f"{file}: {what}")
    return files


def refuse_two_experts(path):
    """ValueError if the model at `path` is, or lies beside, one of Wan2.2's two experts."""
    folder = home(path)
    index = folder / "model_index.json"
    parts = read_json(index) if index.is_file() else {}
    found = [name for name in EXPERTS if folder.name == name or (folder / name).is_dir()
             or parts.get(name) not in (None, [None, None])]
    found += ["boundary_ratio"] if parts.get("boundary_ratio") is not None else []
    if found:
        raise ValueError(f"{path}: a Wan2.2 model of two experts ({', '.join(found)}); {ONLY}")


def find_files(path):
    """`weight_files`, by the index, the usual name, complete shards, or as the only weights."""
    if path.is_file():
        return shards_with(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder{on_the_hub(path)}")
    if (path / INDEX).is_file():
        return files_of_index(path / INDEX)
    if (path / FILE).is_file():
        return [path / FILE]
    there = sorted(file for file in path.iterdir() if file.is_file()
                   and file.suffix in SUFFIXES and not COMPANIONS.fullmatch(file.name))
    if there and {*there} == {*shards_with(there[0])}:  # they can have any name
        return there
    names = ", ".join(file.name for file in there[:4])
    raise FileNotFoundError(
        f"{path}: holds several files ({names}); name one of them" if there else
        f"{path / FILE}: no such file; a model is a folder with config.json and {FILE} (or all its "
        f"shards), or one safetensors file")


def shards_with(file):
    """The shards that a file is one of, or the file alone. They must all be there."""
    shard = SHARD.fullmatch(file.name)
    if shard is None:
        return [file]
    stem, _, count, suffix = shard.groups()
    files = [file.with_name(f"{stem}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    if missing := [shard for shard in files if not shard.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file, but there are other shards; {AGAIN}")
    if parts := list(file.parent.glob("*.part")):  # some shards may be old and some new
        raise ValueError(f"{parts[0]}: not whole, so neither are the shards beside it")
    return files


def on_the_hub(path):
    """How to download what may be the name of a repository, else nothing."""
    owner, *rest = Path(path).parts
    if len(rest) != 1 or Path(owner).exists() or Path(path).is_absolute():
        return ""
    return (f"; if it is on Hugging Face's hub: hf download {path} --local-dir {rest[0]}, and then "
            f"give {rest[0]}")


def files_of_index(index):
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: has no weight_map")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} is not the name of a file beside it")
        file = index.parent / name
        if not os.path.isfile(file):  # Path.is_file raises if the name is too long
            raise FileNotFoundError(f"{file}: no such file, but {index.name} lists it")
        files.append(file)
    return files


def named(path):
    """The path for errors about a model's tensors: its file, or the folder of its shards."""
    files = weight_files(path)
    return files[0] if len(files) == 1 else files[0].parent


class FileError(ValueError):
    """A file is damaged, or not what is wanted. The message names it, or a tensor in it."""


def read_text(file, most=MAX_TEXT_BYTES):
    """The text in a UTF-8 file. FileError if it is no file, too large, or not UTF-8."""
    if file.exists() and not file.is_file():  # a folder, a device or a pipe, which may never end
        raise FileError(f"{file}: not a file")
    with open(file, "rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise FileError(f"{file}: has more than {most} bytes, too many for a text here")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileError(f"{file}: not a text file in UTF-8") from None


def read_json(file, text=None):
    """The JSON object in `file`, or in a `text` out of that file. FileError if there is none."""
    text = read_text(file) if text is None else text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse_other_files(file)
        raise FileError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileError(f"{file}: not a JSON object")
    return value


def refuse_other_files(file):
    """FileError unless a file may hold weights, by its first bytes."""
    if Path(file).is_dir():
        raise FileError(f"{file}: a folder, where a file is wanted")
    with open(file, "rb") as opened:
        first = opened.read(64)
    for pattern, what in FIRST_BYTES:
        if re.match(pattern, first):
            raise FileError(f"{file}: {what}")
    return first


def read_pth(file):
    """What torch.save has written to a file, memory-mapped if its format allows it.

    FileError if it is damaged, or holds anything else than tensors and plain containers of them.
    """
    refuse_other_files(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True,
                          mmap=zipfile.is_zipfile(file))
    except (OSError, MemoryError):
        raise
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise FileError(f"{file}: holds a Python object ({found[1]}), which could run code, so "
                            f"it is not read; save its tensors alone to a new file") from None
        raise FileError(f"{file}: damaged or cut off; {AGAIN}") from None


class Pickled:
    """The tensors in a file of torch.save, with the methods of safetensors' `safe_open`.

    Those of a dict inside a dict have its key before their own.
    """

    def __init__(self, file):
        self.tensors = dict(self.flatten(read_pth(file)))

    @classmethod
    def flatten(cls, tree, prefix=""):
        for name, value in tree.items() if isinstance(tree, dict) else ():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{name}", value
            yield from cls.flatten(value, f"{prefix}{name}.")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def keys(self):
        return self.tensors.keys()

    def get_tensor(self, name):
        return self.tensors[name]

    def get_slice(self, name):
        return SimpleNamespace(get_shape=lambda: self.tensors[name].shape)

    def metadata(self):
        return {}


def open_weights(file):
    """A file of safetensors or of torch.save, opened to read tensor by tensor.

    FileError if it is damaged, or another kind of file.
    """
    first = refuse_other_files(file)
    if first[:4] == b"PK\x03\x04" or (first[:1] == b"\x80" and first[8:9] != b"{"):
        weights = Pickled(file)
    else:
        try:
            weights = safe_open(file, framework="pt")
        except SafetensorError:
            raise FileError(f"{file}: not a whole safetensors file: damaged, cut off, or of "
                            f"another format; {AGAIN}") from None
    for name in weights.keys():
        if 0 in weights.get_slice(name).get_shape():
            raise FileError(f"{file}: " + (explain([name], OTHER_KINDS) or f"{name!r} is empty"))
    return weights


def read_metadata(path):
    """The metadata in the safetensors header of a model: a dict of strings."""
    with open_weights(weight_files(path)[0]) as weights:
        return weights.metadata() or {}


class Place(NamedTuple):
    """Where a tensor is, and its shape."""

    file: Path
    name: str
    shape: tuple


def find_average(names):
    """The prefix of a running average, if a file also has one of the weights it is of."""
    tops = {name.partition(".")[0] for name in names}
    return next((name for name in AVERAGES if name in tops), None)


def read_places(path):
    """{name: Place} of the tensors at `path`, by their names without wrappers and prefixes.

    Of a training's weights and their running average, it is the average; its optimizers and critic
    are left out. ValueError if two tensors have one name.
    """
    places = {}
    for file in weight_files(path):
        with open_weights(file) as weights:
            names = list(weights.keys())
            top = find_average(names)
            for name in names:
                if top and not name.startswith(f"{top}.") or TRAINED_BESIDE.match(name):
                    continue
                plain = unwrap(name.removeprefix(f"{top}."))
                if plain in places:
                    raise ValueError(f"{file}: {places[plain].name!r} and {name!r} have the same "
                                     f"name but for their prefixes; keep one of them")
                places[plain] = Place(file, name, tuple(weights.get_slice(name).get_shape()))
    return places


def read_shapes(path):
    """{name: shape} of the tensors at `path`. Names are the file's, without wrappers' prefixes."""
    return {name: place.shape for name, place in read_places(path).items()}


def read_tensors(places):
    """Yield the name and the tensor of each of these {name: Place}.

    Each tensor of safetensors is mapped by itself, so that its pages can leave memory with it.
    ValueError if it is of a wrong dtype, or not finite.
    """
    weights = {file: open_weights(file) for file in {place.file for place in places.values()}}
    for name, (file, key, _) in places.items():
        opened = weights[file]
        tensor = (opened if isinstance(opened, Pickled)
                  else safe_open(file, framework="pt")).get_tensor(key)
        if tensor.dtype not in DTYPES:
            small = tensor.dtype.itemsize == 1
            raise ValueError(f"{file}: {key!r} is {tensor.dtype}, " + (
                QUANTISED if small else f"not one of {DTYPES}"))
        if not is_finite(tensor):
            raise ValueError(f"{file}: {key!r} is not finite")
        yield name, tensor


def is_finite(tensor):
    low, high = tensor.detach().aminmax()  # both are NaN if one element is; makes no copy
    return (low.isfinite() & high.isfinite()).item()


def is_blank(tensor):
    """Whether a matrix holds zeros alone, as an unfinished download leaves it."""
    return tensor.ndim > 1 and not tensor[(0,) * tensor.ndim] and not tensor.any()


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
    # A config.json beside a file belongs to it, unless a model with the usual name is there too.
    own = folder.is_dir() or folder.name == FILE or not (folder.parent / FILE).exists()
    file = (folder if folder.is_dir() else folder.parent) / "config.json"
    if not own or not file.is_file():
        return settings, named(path)
    settings |= read_json(file)
    kind = settings.get("_class_name", "WanModel"), settings.get("model_type", "t2v")
    if kind not in (("WanModel", "t2v"), ("WanTransformer3DModel", "t2v")):
        raise ValueError(f"{file}: a {' '.join(map(str, kind))} is not Wan's text-to-video "
                         f"transformer; {ONLY}")
    return settings | {name: settings[theirs] for name, theirs in DIFFUSERS_SETTINGS.items()
                       if theirs in settings}, file


def read_config(path):
    """A dict of WanConfig's fields, from the tensors' shapes and the settings.

    What neither gives has Wan's usual value. ValueError if they contradict each other, or if this
    is not Wan's text-to-video transformer.
    """
    shapes = read_shapes(path)
    name_in_file = naming(shapes)
    whole = "patch_embedding.weight" in shapes
    if what := explain(shapes, OTHER_KINDS + (() if whole else OTHER_PARTS)):
        raise ValueError(f"{named(path)}: {what}")

    def shape(name, ndim=2):
        found = shapes.get(name_in_file(name), ())
        if len(found) != ndim:
            raise ValueError(f"{named(path)}: tensor {name_in_file(name)!r} is missing, or does "
                             f"not have {ndim} dimensions; is this a Wan transformer?")
        return found

    dim, in_dim, *patch_size = shape("patch_embedding.weight", 5)
    if in_dim in CHANNELS:
        raise ValueError(f"{named(path)}: takes {in_dim} channels, as for {CHANNELS[in_dim]}; "
                         f"{ONLY}")
    from_shapes = {
        "dim": dim, "ffn_dim": shape("blocks.0.ffn.0.weight")[0], "in_dim": in_dim,
        "out_dim": shape("head.head.weight")[0] // torch.Size(patch_size).numel(),
        "text_dim": shape("text_embedding.0.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1], "patch_size": tuple(patch_size)}
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    others = {"num_heads": dim // 128,  # the heads of all published models are 128 wide
              "num_layers": blocks, "text_len": 512, "eps": 1e-6}

    settings, file = read_settings(path)
    if "num_heads" not in settings and dim % 128:
        raise ValueError(f"{named(path)}: does not store its number of heads; put the model's "
                         f"config.json beside it")
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
    unknown or of another shape, and those with wrong numbers.
    """
    places = read_places(path)
    name_in_file = naming(places)
    original_name = {name_in_file(name): name for name in expected}
    wrong = [f"{n!r} is missing" for n in original_name if n not in places]
    wrong += [f"{n!r} has no place in this model" for n in places if n not in original_name]
    wrong += [f"{n!r} is {list(places[n].shape)}, but must be {list(expected[original_name[n]])}"
              for n in original_name
              if n in places and places[n].shape != expected[original_name[n]]]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{named(path)}: tensor {'; '.join(wrong[:3])}{more}")
    tensors = {}
    for key, tensor in read_tensors(places):
        name = original_name[key]
        if is_blank(tensor) and not MAY_BE_BLANK.search(name):
            raise ValueError(f"{places[key].file}: {places[key].name!r} is {BLANK}")
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
        file = comfyui_file(path)
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
    stale = [f for f in path.iterdir()
             if OURS.fullmatch(f.name) and f.name not in (*names, "config.json")]
    write_files({path / name: shard for name, shard in zip(names, shards)}, header, stale)
    if len(shards) > 1:
        write_json(path / INDEX, {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {n: name for name, shard in zip(names, shards) for n in shard}})
    write_json(path / "config.json", settings)


def comfyui_file(path):
    """The file that `write` makes for ComfyUI."""
    name = path.resolve().name
    return path if path.suffix == ".safetensors" else path / f"{name}.safetensors"


def find_written(path, layout="original"):
    """The files at `path` that `write` would replace or delete."""
    if layout == "comfyui":
        return [file for file in [comfyui_file(path)] if file.exists()]
    return [file for file in path.glob("*") if OURS.fullmatch(file.name)]


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
