"""LoRA: the teacher is a frozen base; the student and the critic are small adapters of it.

Files have the original code's names with a prefix, which both ComfyUI and diffusers'
`load_lora_weights` read.
"""

import re
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import nn

from tiny_wan import WanModel, checkpoint
from tiny_wan.model import KEPT_PRECISE

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

    def save_adapter(self, folder, metadata):
        """Write the adapter. Its alpha is its rank: scale 1."""
        tensors = {PREFIX + name: p.detach().cpu() for name, p in self.state_dict().items()}
        checkpoint.write_files({folder / FILE: tensors}, {"format": "pt"} | metadata)


def load_merged(path, dtype, device, loras):
    """The model at `path` with LoRAs, which are added in float32 before the cast to `dtype`.

    dtype: None for that of the model's file.
    loras: pairs of a file and a scale.
    """
    model = WanModel.from_pretrained(path)
    dtype = dtype or model.blocks[0].ffn[0].weight.dtype
    model.float()
    for file, scale in loras:
        merge(model, file, scale)
    for name, p in model.named_parameters():
        p.data = p.data.to(device, torch.float32 if KEPT_PRECISE.search(name) else dtype)
    return model


KINDS = {".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_B.weight": "up",
         ".lora_up.weight": "up", ".alpha": "alpha"}


def merge(model, file, scale=1.0):
    """Add `scale` times the LoRA in a file to the model's weights.

    Names may be the original ones, as here and in ComfyUI, diffusers', or musubi-tuner's.
    ValueError names the key that is not understood, or the layer that does not fit the model.
    """
    weights = {name.removesuffix(".weight"): p for name, p in model.named_parameters()
               if name.endswith(".weight")}
    layers = {name: p for layer, p in weights.items() for name in (
        PREFIX + layer, f"transformer.{checkpoint.diffusers_name(layer)}",
        f"lora_unet_{layer.replace('.', '_')}")}
    with checkpoint.open_weights(file) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        metadata = opened.metadata() or {}
    settings = checkpoint.read_json(file, metadata.get("lora_adapter_metadata", "{}"))
    settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    parts = defaultdict(dict)
    for name, tensor in tensors.items():
        kind = next(filter(name.endswith, KINDS), None)
        layer = name.removesuffix(kind or "")
        if kind is None or layer not in layers:
            raise ValueError(f"{file}: {name} is not understood, or is for another model; the keys "
                             f"of a LoRA end in {', '.join(KINDS)}")
        parts[layer][KINDS[kind]] = tensor.float()
    for layer, found in parts.items():
        try:
            if not {"up", "down"} <= found.keys():
                raise RuntimeError("one of its two matrices is missing")
            up, down = found["up"], found["down"]
            factor = (found["alpha"].item() / len(down) if "alpha" in found
                      else scaling(layer, len(down), settings))
            change = scale * factor * (up @ down)
            if change.shape != layers[layer].shape or not change.isfinite().all():
                raise RuntimeError("its shape differs, or it is not finite")
            layers[layer].data += change
        except (RuntimeError, TypeError, AttributeError, re.error) as error:
            raise ValueError(f"{file}: {layer} does not fit this model ({error})") from None
    return model


def scaling(layer, rank, settings):
    """The factor of a LoRA by peft's settings, which diffusers stores in the file; by default 1."""
    layer = layer.partition(".")[2]  # without the prefix, as peft names it
    alpha = next((alpha for pattern, alpha in settings.get("alpha_pattern", {}).items()
                  if re.fullmatch(rf"(.*\.)?({pattern})", layer)), settings.get("lora_alpha", rank))
    return alpha / (rank ** 0.5 if settings.get("use_rslora") else rank)


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
