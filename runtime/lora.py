"""LoRA: the teacher is a frozen base; the student and the critic are small adapters of it.

Files have the format of diffusers' `load_lora_weights`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tiny_wan import checkpoint

FILE = "pytorch_lora_weights.safetensors"
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
        """Write the adapter for diffusers' `load_lora_weights`. Its alpha is its rank: scale 1."""
        tensors = {"transformer." + checkpoint.diffusers_name(name): p.detach().cpu()
                   for name, p in self.state_dict().items()}
        checkpoint.write_files({folder / FILE: tensors}, {"format": "pt"} | metadata)


def merge(model, file):
    """Add the adapter in a file to the model's weights. ValueError if it does not fit."""
    layers = {"transformer." + checkpoint.diffusers_name(name).removesuffix(".weight"): p
              for name, p in model.named_parameters() if name.endswith(".weight")}
    with checkpoint.open_weights(file) as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}
    for name in {name.rsplit(".lora_", 1)[0] for name in tensors}:
        try:
            up, down = tensors[name + ".lora_B.weight"], tensors[name + ".lora_A.weight"]
            change = up.float() @ down.float()
            if change.shape != layers[name].shape or not change.isfinite().all():
                raise RuntimeError("its shape differs, or it is not finite")
            layers[name].data += change.to(layers[name].dtype)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{file}: {name} does not fit this model ({error})") from None
    return model
