"""What training draws from: the toy world, or shards of encoded videos (see tools/encode.py).

Both are a function of a sample's number in the whole run, and so know nothing of ranks, batches
and resuming.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from tiny_wan import ToyCodec, checkpoint, world

INDEX = "index.json"


class Toy:
    """The toy world's videos, without end."""

    has_videos = True

    def __init__(self, codec, seed):
        self.codec, self.seed = codec, seed
        self.latent_shape = codec.latent_shape()
        self.null_text = codec.encode_text([codec.negative_prompt])

    def batch(self, numbers):
        """Sample numbers -> latents `[b, c, f, h, w]`, text `[b, l, d]`, and the prompts."""
        video, prompts = world.make(self.seed, numbers)
        return self.codec.encode(video), self.codec.encode_text(prompts), prompts


class Shards:
    """A folder of encoded videos, in a new order in each epoch.

    Where there are prompts alone, latents are zeros. ValueError names a file that is damaged.
    """

    def __init__(self, folder, seed):
        self.folder, self.seed = Path(folder), seed
        file = self.folder / INDEX
        if not file.is_file():
            raise ValueError(f"{file}: no such file; run tools.encode again if it has not ended")
        index = checkpoint.read_json(file)
        try:
            self.latent_shape = tuple(index["latent_shape"])
            self.has_videos = bool(index["has_videos"])
            counts = {shard["file"]: int(shard["count"]) for shard in index["shards"]}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file}: not an index of tools.encode ({error!r})") from None
        if [type(n) for n in self.latent_shape] != [int] * 4 or not all(
                0 < n < 2**16 for n in self.latent_shape):
            raise ValueError(f"{file}: latent_shape is {self.latent_shape}, not c f h w")
        if not counts:
            raise ValueError(f"{file}: there is nothing in these shards")
        [null_shape] = self.shapes("null_text.safetensors", "null_text")
        for name, count in counts.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{file}: {name!r} is not the name of a file beside it")
            text, *latents = self.shapes(name, "text", *["latents"] * self.has_videos)
            if [text[0], *text[2:]] != [count, null_shape[2]] or any(
                    shape != [count, *self.latent_shape] for shape in latents):
                raise ValueError(f"{self.folder / name}: does not hold what {INDEX} says; its "
                                 f"text is {text}" + "".join(f", latents {x}" for x in latents))
        with checkpoint.open_weights(self.folder / "null_text.safetensors") as tensors:
            self.null_text = tensors.get_tensor("null_text").float()
        if len(self.null_text) != 1 or not self.null_text.isfinite().all():
            raise ValueError(f"{self.folder}/null_text.safetensors: not one finite embedding")
        self.items = [(name, i) for name, count in counts.items() for i in range(count)]
        self.orders = {}

    def shapes(self, name, *tensors):
        """Of a file's tensors. ValueError where it is not there, or lacks one."""
        file = self.folder / name
        if not os.path.isfile(file):  # false, too, of a name that no disk can have
            raise ValueError(f"{file}: no such file; copy the whole folder, or encode it again")
        with checkpoint.open_weights(file) as shard:
            if missing := set(tensors) - set(shard.keys()):
                raise ValueError(f"{file}: has no tensor {missing.pop()!r}")
            shapes = [shard.get_slice(tensor).get_shape() for tensor in tensors]
        if len(shapes[0]) != 3:
            raise ValueError(f"{file}: its {tensors[0]} is {shapes[0]}, not b l d")
        return shapes

    def item(self, number):
        """Latents, text and prompt of a sample."""
        epoch, place = divmod(number, len(self.items))
        if epoch not in self.orders:
            g = torch.Generator().manual_seed(self.seed * 2**20 + epoch)
            self.orders = {epoch: torch.randperm(len(self.items), generator=g).tolist()}
        name, i = self.items[self.orders[epoch][place]]
        file = self.folder / name
        with checkpoint.open_weights(file) as shard:
            try:
                text = shard.get_slice("text")[i].float()
                latents = (shard.get_slice("latents")[i].float() if self.has_videos
                           else torch.zeros(self.latent_shape))
                prompt = json.loads(shard.metadata()["prompts"])[i]
            except Exception as error:  # safetensors raises many kinds
                raise ValueError(f"{file}: no sample {i} in it ({error})") from None
        if latents.shape != self.latent_shape or not latents.isfinite().all() \
                or not text.isfinite().all():
            raise ValueError(f"{file}: sample {i} is not finite, or not {self.latent_shape}")
        return latents, text, prompt

    def batch(self, numbers):
        """As Toy's; texts end in zeros where another of the batch is longer."""
        latents, text, prompts = zip(*map(self.item, numbers))
        return torch.stack(latents), pad_sequence(text, batch_first=True), list(prompts)


def write_toy_shards(folder, seed, count, spoil=lambda video: video, null_prompt=""):
    """Write `count` of the toy world's videos as one shard, in the format of tools.encode.

    spoil: changes the videos `[b, 3, f, h, w]` before they are encoded; their prompts stay.
    """
    codec, (video, prompts) = ToyCodec(), world.make(seed, range(count))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"latents": codec.encode(spoil(video)).half(), "text": codec.encode_text(prompts)},
              folder / "shard.safetensors", {"prompts": json.dumps(prompts)})
    save_file({"null_text": codec.encode_text([null_prompt])}, folder / "null_text.safetensors")
    (folder / INDEX).write_text(json.dumps({
        "latent_shape": codec.latent_shape(), "has_videos": True,
        "shards": [{"file": "shard.safetensors", "count": count}]}))


class Prefetch:
    """`load(number)`, with the next number's load already under way while the caller computes."""

    def __init__(self, load):
        self.load, self.pool, self.coming = load, ThreadPoolExecutor(1), {}
        self.waited = 0.0  # seconds in all, for data

    def __call__(self, number):
        start = time.perf_counter()
        coming = self.coming.pop(number, None) or self.pool.submit(self.load, number)
        result = coming.result()
        self.waited += time.perf_counter() - start
        self.coming = {number + 1: self.pool.submit(self.load, number + 1)}
        return result
