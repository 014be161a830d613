"""Loading models with what belongs to them (the method's numbers, the interpolator); saving one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import adavid
from runtime.checkpoints import STATE, SUMS, find_damage, load_student
from runtime.distributed import (
    all_gather,
    apply_fsdp,
    broadcast,
    full_tensor,
    rank,
    world_size,
)
from runtime.lora import FILE as LORA_FILE
from runtime.lora import add_adapters, rate_factor, write_adapter
from tiny_wan import WanConfig, WanModel, checkpoint


def load_config(path):
    """The method's numbers stored with the weights at `path`; the paper's where it has none."""
    metadata = checkpoint.read_metadata(path)
    try:
        return adavid.AVDConfig.from_json(metadata.get("avd", "{}"))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{checkpoint.named(path)}: the method's numbers in its metadata are "
                         f"wrong ({error})") from None


class Numbers(NamedTuple):
    """The method's numbers for a model with LoRAs, and where they come from."""

    config: adavid.AVDConfig
    source: Path | None  # None if no file has any: they are the paper's
    distilled: bool  # whether one of the files is known to be distilled


def find_numbers(model, loras=()):
    """The method's Numbers: the model's, unless a LoRA was distilled with its own.

    Notes say if several of the files are distilled, and if an average of the weights is read.
    """
    note_average(model)
    headers = {file: checkpoint.read_metadata(file) for file in (*loras, model)}
    source = next((file for file, header in headers.items() if "avd" in header), None)
    students = [str(file) for file, header in headers.items() if "method" in header]
    if len(students) > 1:
        print(f"note: {' and '.join(students)} are all distilled; has one been added to another "
              f"already?")
    return Numbers(load_config(source or model), source, bool(students))


def note_average(model):
    """Print which of a training's weights are read, if the file holds several."""
    file = checkpoint.weight_files(model)[0]
    with checkpoint.open_weights(file) as weights:
        if name := checkpoint.find_average(weights.keys()):
            print(f"note: {file}: its {name} is read, a running average of the weights")


def default_config(model, lora=0):
    """The numbers stored with the teacher `model`, with learning rates for LoRA of this rank."""
    numbers = load_config(model)
    if lora < 1:
        return numbers
    factor = rate_factor(WanConfig.from_pretrained(model).dim, lora)
    return replace(numbers, lr=factor * numbers.lr, critic_lr=factor * numbers.critic_lr)


def find_interpolator(*paths):
    """The file of the interpolator beside the first of these models or LoRAs that has one."""
    files = (checkpoint.home(path) / "interpolator.safetensors" for path in paths)
    return next((file for file in files if file.exists()), None)


def load_interpolator(path, device, *loras):
    """The interpolator beside a model's LoRAs or its weights, frozen; None if there is none."""
    file = find_interpolator(*loras, path)
    if file is None:
        return None
    with checkpoint.open_weights(file) as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}
    try:
        width, inputs = tensors["enter.0.weight"].shape[:2]
        with torch.device("meta"):  # a damaged file must not allocate memory
            interpolator = adavid.FrameInterpolator(inputs // 2, width)
        interpolator.load_state_dict(tensors, assign=True)
        sound = all(p.isfinite().all() for p in interpolator.parameters())
    except (KeyError, RuntimeError, ValueError):
        sound = False
    if not sound or interpolator.out.out_channels - 1 != checkpoint.read_config(path)["out_dim"]:
        raise ValueError(f"{file}: damaged, or not a frame interpolator for this model")
    return interpolator.to(device).requires_grad_(False)


def check_out(out, inputs, replaced=()):
    """ValueError if a command would write to an input's folder, or over a file that is there.

    out: the folder or the file of its flag --out.
    inputs: paths of models, LoRAs and other folders that it reads; None is left out.
    replaced: files and folders that it would write, or delete.
    """
    folder = (out.parent if out.suffix == ".safetensors" else out).resolve()
    for path in filter(None, inputs):
        own = path if path.is_dir() else path.parent
        if folder in {p.resolve() for p in (own, checkpoint.home(path),
                                            checkpoint.model_folder(own))}:
            raise ValueError(f"--out {out} would write to the folder of {path}, which is read; "
                             f"choose another")
    if there := [file for file in replaced if file.exists()]:
        raise ValueError(f"--out {out}: {there[0]} is there already and would be replaced; choose "
                         f"another folder, or delete it")


def check_run_out(out, inputs, results):
    """`check_out` for a training run, which may replace its own results when it is resumed."""
    check_out(out, inputs, () if (out / "checkpoints").exists() else results)


class Models(NamedTuple):
    """The models of a distillation. Without an interpolator, all steps are at the full rate."""

    teacher: torch.nn.Module
    student: torch.nn.Module
    critic: torch.nn.Module
    interpolator: adavid.FrameInterpolator | None


def check_fit(out, teacher, student, data):
    """ValueError unless the folder `out`, both models' files and the data fit together."""
    load_config(teacher)  # raises the error that `main` ignored
    check_run_out(out, [teacher, student, getattr(data, "folder", None)], [
        *checkpoint.find_written(out), out / LORA_FILE, out / "interpolator.safetensors"])
    if rank() == 0:
        for model in {teacher, student}:
            note_average(model)
    there = data.latent_shape[0], data.null_text.shape[-1]
    for model in (teacher, student):
        takes = WanConfig.from_pretrained(model)
        if (takes.in_dim, takes.text_dim) != there:
            raise ValueError(
                f"{data} has {there[0]} channels and text of width {there[1]}, but {model} takes "
                f"{takes.in_dim} and {takes.text_dim}")


def load_models(teacher, student, dtype, device, recompute):
    """Models for distillation: three transformers, from the files of two."""
    interpolator = open_interpolator(teacher, device)
    return Models(load_trainable(teacher, dtype, device, recompute).requires_grad_(False),
                  load_trainable(student, dtype, device, recompute),
                  load_trainable(teacher, dtype, device, recompute), interpolator)


def load_adapters(teacher, lora, seed, dtype, device, recompute):
    """Models for distillation: one frozen transformer, and two adapters of rank `lora` on it."""
    interpolator = open_interpolator(teacher, device)
    base = WanModel.from_pretrained(teacher, dtype or torch.float32)
    base.gradient_checkpointing = recompute
    # Sharded before it has adapters, so that these stay whole on each rank. On one GPU, FSDP would
    # only make copies: the base is in the dtype that it computes in.
    base = apply_fsdp(base, device) if world_size() > 1 else base.to(device)
    return Models(*add_adapters(base, lora, ("student", "critic"), seed), interpolator)


def open_interpolator(model, device):
    """`load_interpolator`, with a note if there is none."""
    interpolator = load_interpolator(model, device)
    if interpolator is None and rank() == 0:
        print("note: no interpolator.safetensors beside the model, so the student will sample at "
              "the full frame rate")
    return interpolator


def load_trainable(path, dtype, device, recompute):
    """A model with weights in float32, sharded over the ranks, that computes in `dtype`.

    recompute: blocks in backward, rather than keep their activations.
    """
    model = WanModel.from_pretrained(path)
    model.gradient_checkpointing = recompute
    model = apply_fsdp(model, device, dtype)
    return model.float()  # after sharding, so that no rank ever holds a whole float32 model


def save_student(student, out, config, metadata, interpolator=None):
    """`write_student` with a model's tensors, gathered from all ranks."""
    tensors = {}
    for name, tensor in student.state_dict().items():
        tensor = full_tensor(tensor)
        if rank() == 0:
            tensors[name] = tensor.detach().cpu()
    if rank() == 0:
        write_student(out, tensors, config, metadata, interpolator)


def write_student(out, tensors, config, metadata, interpolator=None):
    """Write a whole model, or LoRA's adapter alone, with a copy of the interpolator's file.

    config: a dict of WanConfig's fields.
    """
    if any("lora_" in name for name in tensors):
        write_adapter(out, tensors, metadata)
    else:
        checkpoint.write(out, config, tensors, metadata=metadata)
    if interpolator:
        shutil.copy(interpolator, out)


def checkpoint_to_model(path):
    """The folder of a training checkpoint's student; any other path as it is.

    It is `model` in the checkpoint, and holds what the run would have written if it had ended
    there. The first call writes it. All ranks must call this. ValueError if the checkpoint is
    damaged, or has no student.
    """
    if not any(path.glob(SUMS.format("*"))):
        return path
    model, part = path / "model", path / f"model-{os.getpid()}.part"
    if broadcast(model.exists()):
        return model
    if problem := find_damage(path):
        raise ValueError(problem)
    student = checkpoint.read_json(path / STATE).get("student")
    if student is None:
        raise ValueError(f"{path}: a checkpoint of another training than train.py distill, or of "
                         f"an older version; let its run end, and give the run's folder")
    interpolator = student["interpolator"]
    if interpolator and not Path(interpolator).exists():
        raise ValueError(f"{path}: {interpolator}, which its run samples with, is gone; put it "
                         f"back")
    if rank() == 0:
        print(f"note: the student of {path} is written to {model}")
        try:
            part.mkdir()
            write_student(part, load_student(path), **student)
            os.replace(part, model)
        except OSError:
            if not model.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    all_gather(None)  # wait for the first rank
    return model
