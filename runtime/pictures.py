"""Videos of fixed prompts, sampled now and then during training."""

import torch
from tqdm import tqdm

from runtime.data import Toy
from runtime.distributed import all_gather, broadcast, rank, world_size
from runtime.media import thumbnails, write_contact_sheet
from runtime.meter import mean_readings
from runtime.run import make_generator, naming_errors
from tiny_wan import ToyCodec, WanConfig, checkpoint, open_codec, world
from tiny_wan.codec import is_out_of_memory

GRID_SEED = 1000  # its prompts are for pictures and for choosing; no training run uses it


class Pictures:
    """Videos of fixed prompts, from fixed noise. `open_codec()` loads what decodes them."""

    def __init__(self, data, open_codec, device, count=8, batch_size=256):
        self.open_codec, self.device, self.batch_size = open_codec, device, batch_size
        real, self.text, self.prompts = data.batch(range(count))
        self.real = real if data.has_videos else None
        noise = make_generator(GRID_SEED, "grid")
        self.noise = torch.randn((count, *data.latent_shape), generator=noise)

    @classmethod
    def of_toy(cls, device, count=8):
        return cls(Toy(ToyCodec(), GRID_SEED), ToyCodec, device, count)

    def sample(self, sampler):
        """Latents of `sampler(noise, text)`, which the ranks share out. All of them get all."""
        batches = list(zip(self.noise.split(self.batch_size), self.text.split(self.batch_size)))
        each = -(-len(batches) // world_size())  # of equal number, as a sharded model needs
        ours = {}
        for i in range(rank() * each, (rank() + 1) * each):
            noise, text = batches[i % len(batches)]
            ours[i % len(batches)] = sampler(noise.to(self.device), text.to(self.device)).cpu()
        found = {i: latents for part in all_gather(ours) for i, latents in part.items()}
        return torch.cat([found[i] for i in range(len(batches))])

    def decode(self, latents, path):
        """Videos, or None with a message that `path` is not written."""
        try:
            return self.open_codec().decode(latents).cpu()
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            tqdm.write(f"{path}: not written ({error})")
            return None

    def write(self, path, sampler):
        """Write a contact sheet; the videos' readings, for the log. All ranks must call this."""
        latents = self.sample(sampler)
        videos = self.decode(latents, path) if rank() == 0 else None
        if videos is None:
            return {}
        write_contact_sheet(path, map(thumbnails, videos))
        return mean_readings(videos)

    def write_reference(self, file, teacher):
        """Write the prompts, and the readings of the teacher's videos and of real ones, unless the
        file has them already.

        teacher: its sampler. All ranks must call this.
        """
        there = file.exists() and checkpoint.read_json(file)
        if broadcast(there and there.get("prompts") == self.prompts):  # others, if data changed
            return
        if rank() == 0:
            tqdm.write(f"{file}: sampling the teacher's videos, once in a run")
        latents = {"teacher": self.sample(teacher), "real": self.real}
        if rank() == 0:
            videos = {name: self.decode(x, file) for name, x in latents.items() if x is not None}
            part = file.with_suffix(".part")
            with naming_errors(file):
                checkpoint.write_json(part, {"prompts": self.prompts, "readings": {
                    name: mean_readings(x) for name, x in videos.items() if x is not None}})
                part.replace(file)

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
