"""Videos of fixed prompts, sampled now and then during training."""

import torch
from tqdm import tqdm

from runtime.data import Toy
from runtime.distributed import broadcast, rank
from runtime.media import thumbnails, write_contact_sheet
from runtime.run import make_generator
from tiny_wan import ToyCodec, WanConfig, open_codec, world
from tiny_wan.codec import is_out_of_memory

GRID_SEED = 1000  # its prompts are for pictures and for choosing; no training run uses it


class Pictures:
    """Videos of fixed prompts, from fixed noise. `open_codec()` loads what decodes them."""

    def __init__(self, data, open_codec, device, count=8, batch_size=256):
        self.open_codec, self.device, self.batch_size = open_codec, device, batch_size
        _, self.text, self.prompts = data.batch(range(count))
        noise = make_generator(GRID_SEED, "grid")
        self.noise = torch.randn((count, *data.latent_shape), generator=noise)

    @classmethod
    def of_toy(cls, device, count=8):
        return cls(Toy(ToyCodec(), GRID_SEED), ToyCodec, device, count)

    def sample(self, sampler):
        """Latents of `sampler(noise, text)`."""
        batches = zip(self.noise.split(self.batch_size), self.text.split(self.batch_size))
        return torch.cat([sampler(noise.to(self.device), text.to(self.device)).cpu()
                          for noise, text in batches])

    def write(self, path, sampler):
        """Write a contact sheet; the videos' saturation, for the log. All ranks must call this."""
        latents = self.sample(sampler)
        if rank() > 0:
            return {}
        try:
            videos = self.open_codec().decode(latents).cpu()
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            tqdm.write(f"{path}: not written ({error})")
            return {}
        write_contact_sheet(path, map(thumbnails, videos))
        return {"saturation": (videos.amax(1) - videos.amin(1)).mean().item()}

    def score(self, sampler):
        """What the toy's oracle reads off the videos: the mean of each score."""
        scores = world.score(self.open_codec().decode(self.sample(sampler)), self.prompts)
        return {name: value.nanmean().item() for name, value in scores.items()}


def open_pictures(data, model, codec_folder, device):
    """Pictures of the toy's own prompts, or of the data's first ones. None without a VAE.

    The VAE is in `codec_folder` or, if that is None, beside the transformer `model`.
    """
    if isinstance(data, Toy):
        return Pictures.of_toy(device)
    config = WanConfig.from_pretrained(model)

    def codec():
        return open_codec(model, config, codec_folder, device=device)

    problem = None
    if rank() == 0:
        try:
            codec().prepare()
        except (ValueError, OSError) as error:
            problem = f"note: no pictures, as {error}"
            print(problem)
    return None if broadcast(problem) else Pictures(data, codec, device, count=4, batch_size=1)
