"""LoRA: the teacher is a frozen base; the student and the critic are small adapters of it.

Files have the original code's names with a prefix, which both ComfyUI and diffusers'
`load_lora_weights` read. Those of others are read in all spellings of `tiny_wan/dialects.py`.
"""

import math
import re
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tiny_wan import WanConfig, WanModel, checkpoint
from tiny_wan.dialects import A_MODEL, LORA_KEYS, OTHER_KINDS, diffusers_name, explain

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "diffusion_model."
TARGETS = ["q", "k", "v", "o", "ffn.0", "ffn.2"]


def add_adapters(base, rank, names, seed=0):
    """Models that share the frozen base: the base alone, then with each of the named adapters.

    An adapter starts as no change. Its weights are float32, and it computes in the base's dtype.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    base.requires_grad_(False)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    for name in names:
        base.__dict__.pop("peft_config", None)  # peft warns of a second adapter otherwise
        peft.inject_adapter_in_model(config, base, adapter_name=name)
    for layer in (m for m in base.modules() if isinstance(m, BaseTunerLayer)):
        layer.cast_input_dtype_enabled = False  # peft computes in float32 otherwise
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.__class__ = MasterLinear
            part.float()
    return [Adapted(base, name) for name in (None, *names)]


def rate_factor(dim, rank):
    """How much higher LoRA's learning rates are than those of whole models.

    With it, the first step of AdamW changes the weights of a model of width `dim` by the same root
    mean square. A weight's change is a sum over the rank of (up: a learning rate, with a random
    sign) times (down: as it was initialised, with variance 1 / (3 dim)).
    """
    return (3 * dim / rank) ** 0.5


class MasterLinear(nn.Linear):
    """Computes in its input's dtype. Its weight is float32, in which small updates add up."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Adapted:
    """The base with one adapter, or with none if `name` is None."""

    def __init__(self, base, name):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.base, self.name, self.config = base, name, base.config
        self.layers = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]

    def __call__(self, *inputs, **options):
        self.activate()
        v = self.base(*inputs, **options)
        if v.requires_grad:  # backward may recompute blocks while another adapter is active
            v.register_hook(lambda _: self.activate())
        return v

    def activate(self):
        for layer in self.layers:
            layer.enable_adapters(self.name is not None)
            if self.name is not None:
                layer.set_adapter([self.name])
        for name, p in self.base.named_parameters():
            if "lora_" in name:  # peft freezes inactive adapters, which a graph may still need
                p.requires_grad_(True)

    def state_dict(self):
        """The adapter's tensors, named after the layers that they belong to."""
        return {name.replace(f".{self.name}.", "."): p for name, p in self.base.named_parameters()
                if f".{self.name}." in name}

    def parameters(self):
        return list(self.state_dict().values())


def write_adapter(folder, tensors, metadata):
    """Write an adapter's tensors. Its alpha is its rank: scale 1."""
    tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
    checkpoint.write_files({folder / FILE: tensors}, {"format": "pt"} | metadata)


def load_merged(path, dtype, device, loras):
    """The model at `path` with LoRAs, which are added in float32 before the cast to `dtype`.

    dtype: None for that of the model's file.
    loras: pairs of a file and a scale.
    """
    with torch.device("meta"):
        model = WanModel(WanConfig.from_pretrained(path))
    loras = [(read_changes(file, model), scale) for file, scale in loras]
    return WanModel.from_pretrained(path, dtype, device, partial(add, loras=loras))


def merge(model, file, scale=1.0):
    """Add `scale` times the LoRA in a file to a model in memory, and return the model."""
    loras = [(read_changes(file, model), scale)]
    for name, p in model.named_parameters():
        p.data = add(name, p.data, loras).to(p.dtype)
    return model


def add(name, weight, loras):
    """A parameter with what LoRAs add to it, in float32 if they do.

    loras: pairs of what `read_changes` returns, and a scale. ValueError if numbers overflow.
    """
    changes = [change(scale) for lora, scale in loras for change in lora.get(name, ())]
    for change in changes:
        weight = weight.float() + change.reshape(weight.shape)
    if changes and not weight.isfinite().all():
        raise ValueError(f"{name} is not finite once the LoRA is added; use a lower --lora-scale")
    return weight


class Change(NamedTuple):
    """What a LoRA adds to a parameter: a product of two matrices, or one tensor."""

    factor: float
    up: torch.Tensor
    down: torch.Tensor | None = None

    def __call__(self, scale):
        """In float32."""
        up = self.up.float()
        whole = up if self.down is None else up.flatten(1) @ self.down.float().flatten(1)
        return scale * self.factor * whole

    @property
    def shape(self):
        return (*self.up.shape[:1], *self.down.shape[1:]) if self.down is not None else (
            self.up.shape)

    def acts(self):
        return bool(self.factor and self.up.any() and (self.down is None or self.down.any()))


def read_changes(path, model):
    """What the LoRA at `path` adds to a model: {name of a parameter: its Changes}.

    path: a file, or a folder with one.
    model: a WanModel, which may be on the meta device.

    ValueError names the key that is not understood, or the layer that does not fit the model.
    """
    file, places = checkpoint.named(path), checkpoint.read_places(path)
    parameters = {name: p.shape for name, p in model.named_parameters()}
    if what := explain([place.name for place in places.values()], OTHER_KINDS):
        raise ValueError(f"{file}: {what}")
    if places and not any(split_key(key)[1] for key in places):
        raise ValueError(f"{file}: {A_MODEL}" if places.keys() & {
            *parameters, *map(diffusers_name, parameters)} else
            f"{file}: no LoRA of Wan; its keys are like {next(iter(places))}")
    names = {name.replace(".", "_"): original for original in parameters
             for name in (original, diffusers_name(original))}
    layers = defaultdict(dict)
    for key, tensor in checkpoint.read_tensors(places):
        layer, kind, parameter = split_key(key)
        name = names.get((layer + parameter).replace(".", "_"), names.get(layer.replace(".", "_")))
        if kind is None or name is None:
            why = "is for a layer that this model lacks" if kind else (
                "is not understood: keys of a LoRA end in .lora_A.weight and .lora_B.weight, say")
            raise ValueError(f"{file}: {places[key].name} {why}")
        parts = layers[name.rpartition(".")[0]]
        if kind in parts:
            raise ValueError(f"{file}: {places[key].name} is there twice, in two spellings")
        parts[kind] = name, layer, tensor
    if not layers:
        raise ValueError(f"{file}: holds no tensors")
    settings, changes = read_settings(path, file), defaultdict(list)
    for layer, parts in layers.items():
        try:
            for name, change in combine(parts, settings):
                if squeezed(change.shape) != squeezed(parameters[name]):
                    raise ValueError(f"its shape is {list(change.shape)}, but that of {name} is "
                                     f"{list(parameters[name])}")
                changes[name].append(change)
        except (ValueError, RuntimeError, TypeError, AttributeError, re.error) as error:
            raise ValueError(f"{file}: {layer} does not fit this model ({error})") from None
    return changes


def split_key(key):
    """A LoRA's key -> layer, kind and parameter, as in LORA_KEYS. The kind is None for others."""
    for pattern, kind, parameter in LORA_KEYS:
        if found := re.fullmatch(f"(.+?){pattern}", key):
            return found[1], kind, parameter
    return key, None, ""


def squeezed(shape):
    return [n for n in shape if n > 1]


def combine(parts, settings):
    """Yield the name of a parameter and its Change, for all that is there of a layer.

    parts: {kind: (name of the parameter, name of the layer in the file, tensor)}.
    """
    tensors = {kind: tensor for kind, (*_, tensor) in parts.items()}
    factor = 1.0
    if tensors.keys() & {"up", "down", "alpha", "up_bias"}:
        if not {"up", "down"} <= tensors.keys():
            raise ValueError("one of its two matrices is missing")
        up, down = tensors["up"], tensors["down"]
        if up.ndim < 2 or up[0].numel() != len(down):
            raise ValueError(f"its matrices are {list(up.shape)} and {list(down.shape)}")
        factor = (tensors["alpha"].item() / len(down) if "alpha" in tensors
                  else scaling(parts["down"][1], len(down), settings))
        if not math.isfinite(factor):
            raise ValueError("its alpha is not finite")
        yield parts["up"][0], Change(factor, up, down)
    for kind in tensors.keys() & {"diff", "diff_b", "diff_m", "up_bias"}:
        yield parts[kind][0], Change(factor if kind == "up_bias" else 1.0, tensors[kind])


def read_settings(path, file):
    """peft's settings of a LoRA: in its header as diffusers stores them, or in a file beside it."""
    metadata = checkpoint.read_metadata(path)
    beside = file.parent / "adapter_config.json"
    if "lora_adapter_metadata" in metadata:
        settings = checkpoint.read_json(file, metadata["lora_adapter_metadata"])
    elif beside.is_file():
        settings = checkpoint.read_json(beside)
    else:
        alphas = [metadata[key] for key in ("lora_alpha", "alpha") if key in metadata]
        settings = {"lora_alpha": alphas[0]} if alphas else {}
    settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(f"{file}: a {kind}, by its settings; only LoRA is supported")
    return settings


def scaling(layer, rank, settings):
    """The factor of a LoRA by peft's settings; by default 1."""
    alpha = next((alpha for pattern, alpha in settings.get("alpha_pattern", {}).items()
                  if re.fullmatch(rf"(.*\.)?({pattern})", layer)), settings.get("lora_alpha", rank))
    return float(alpha) / (rank ** 0.5 if settings.get("use_rslora") else rank)


def check_loras(files, model):
    """ValueError unless LoRAs fit a model, which may be on the meta device.

    A note names those without any effect.
    """
    for file in files:
        changes = read_changes(file, model)
        if not any(change.acts() for added in changes.values() for change in added):
            print(f"note: {file}: has no effect, as all that it adds is zero")


def extract(student, base, rank):
    """What distinguishes the student from its base, as a LoRA -> tensors, and two shares in [0, 1].

    The shares are of the norm of the whole difference: what the rank leaves of the layers that a
    LoRA covers, and what lies in biases, norms and embeddings, which it does not cover.
    """
    tensors, whole, missed, others = {}, 0.0, 0.0, 0.0
    torch.manual_seed(0)  # svd_lowrank draws random numbers
    for (name, new), old in zip(student.named_parameters(), base.parameters()):
        change, layer = new.float() - old.float(), name.removesuffix(".weight")
        whole += change.square().sum().item()
        if not name.startswith("blocks.") or not name.endswith(
                tuple(f".{target}.weight" for target in TARGETS)):
            others += change.square().sum().item()
            continue
        u, s, v = torch.svd_lowrank(change, min(rank + 8, *change.shape), niter=4)
        root = s[:rank].sqrt()
        up, down = u[:, :rank] * root, (v[:, :rank] * root).T
        missed += (change - up @ down).square().sum().item()
        tensors |= {f"{PREFIX}{layer}.lora_B.weight": up, f"{PREFIX}{layer}.lora_A.weight": down}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return tensors, *((part / whole) ** 0.5 if whole else 0.0 for part in (missed, others))
