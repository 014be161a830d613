"""Students of every method, as sample.py and the tools draw from them: a model and its sampler.

DCM's student (see baselines.py) is two models: the semantic expert takes the noisy steps, the
detail expert the others, and its sampler adds no noise between them.
"""

import torch
from torch import nn

import adavid
from runtime.lora import load_merged
from tiny_wan import WanModel, checkpoint


class Experts(nn.Module):
    """Two models as one. All of a batch must have one `t`: above `split`, `semantic` takes it."""

    def __init__(self, semantic, detail, split):
        super().__init__()
        self.semantic, self.detail, self.split = semantic, detail, split

    @property
    def blocks(self):
        return [*self.semantic.blocks, *self.detail.blocks]

    def forward(self, x_t, t, text):
        expert = self.detail if t[0] <= self.split else self.semantic
        return expert(x_t, t, text)


@torch.no_grad()
def euler_steps(model, noise, text, config, interpolator=None, generator=None):
    """DCM's sampler, with the arguments of `adavid.sample`, of which it ignores the last two.

    Euler steps through the config's timesteps and from the last one to zero, in float32.
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for t, t_next in zip(config.timesteps, (*config.timesteps[1:], 0)):
        v = model(x.to(noise.dtype), x.new_full((len(x),), t), text)
        x = x + (t_next - t) / 1000 * v
    return x.to(noise.dtype)


def load_student(path, dtype, device, loras=()):
    """The model at `path`, and its sampler: `adavid.sample`, or one that is called like it.

    loras: pairs of a file and a scale, as `load_merged` takes them.
    """
    model = (load_merged(path, dtype, device, loras) if loras
             else WanModel.from_pretrained(path, dtype, device)).eval()
    metadata = checkpoint.read_metadata(path)
    if metadata.get("method") != "dcm":
        return model, adavid.sample
    semantic = WanModel.from_pretrained(checkpoint.home(path) / "semantic", dtype, device).eval()
    return Experts(semantic, model, float(metadata["split"])), euler_steps
