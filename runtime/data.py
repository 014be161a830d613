"""Training data: the toy world, or shards of encoded videos (see tools/encode.py).

Both map a sample's index in the whole run to the sample. So a resumed run, or one with more ranks,
sees the same samples.
"""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from runtime.distributed import rank, world_size
from tiny_wan import ToyCodec, WanCodec, checkpoint, world

INDEX = "index.json"


def open_data(folder, seed):
    """The encoded videos in a folder; without one, the toy world."""
    return Shards(folder, seed) if folder else Toy(ToyCodec(), seed)


def sample_indices(batch, batch_size):
    """The indices, in the whole run, of this rank's samples in a batch."""
    first = (batch * world_size() + rank()) * batch_size
    return range(first, first + batch_size)


class Toy:
    """The toy world's videos, made as they are needed."""

    has_videos, fps = True, ToyCodec.fps

    def __init__(self, codec, seed):
        self.codec, self.seed = codec, seed
        self.latent_shape = codec.latent_shape()
        self.null_text = codec.encode_text([codec.negative_prompt])

    def __str__(self):
        return "the toy world"

    def batch(self, indices):
        """Latents `[b, c, f, h, w]`, text `[b, l, d]` and the prompts of samples."""
        video, prompts = world.make(self.seed, indices)
        return self.codec.encode(video), self.codec.encode_text(prompts), prompts


class Shards:
    """A folder of encoded videos, in a new order in each epoch.

    In a folder of prompts without videos, latents are zeros. ValueError names a damaged file.
    """

    def __init__(self, folder, seed):
        self.folder, self.seed = Path(folder), seed
        file = self.folder / INDEX
        if not file.is_file():
            raise ValueError(f"{file}: no such file; tools.encode writes it when it has finished")
        index = checkpoint.read_json(file)
        try:
            self.latent_shape = tuple(index["latent_shape"])
            self.has_videos = bool(index["has_videos"])
            self.fps = index.get("fps")
            counts = {shard["file"]: int(shard["count"]) for shard in index["shards"]}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file}: not an index from tools.encode ({error!r})") from None
        if [type(n) for n in self.latent_shape] != [int] * 4 or not all(
                0 < n < 2**16 for n in self.latent_shape):
            raise ValueError(f"{file}: latent_shape is {self.latent_shape}, not c f h w")
        if not counts:
            raise ValueError(f"{file}: lists no shards")
        if self.fps is not None and (type(self.fps) is not int or not 0 < self.fps <= 1000):
            raise ValueError(f"{file}: fps is {self.fps!r}, not a frame rate")
        [null_shape] = self.shapes("null_text.safetensors", "null_text")
        for name, count in counts.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{file}: {name!r} is not the name of a file beside it")
            text, *latents = self.shapes(name, "text", *["latents"] * self.has_videos)
            if [text[0], *text[2:]] != [count, null_shape[2]] or any(
                    shape != [count, *self.latent_shape] for shape in latents):
                raise ValueError(f"{self.folder / name}: does not match {INDEX}; its text is "
                                 f"{text}" + "".join(f", its latents {x}" for x in latents))
        with checkpoint.open_weights(self.folder / "null_text.safetensors") as tensors:
            self.null_text = tensors.get_tensor("null_text").float()
        if len(self.null_text) != 1 or not self.null_text.isfinite().all():
            raise ValueError(f"{self.folder}/null_text.safetensors: not one finite embedding")
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.items = [(name, i) for name, count in counts.items() for i in range(count)]
        self.orders = {}

    def __str__(self):
        return str(self.folder)

    def shapes(self, name, *tensors):
        """The shapes of a file's tensors. ValueError if the file or a tensor is missing."""
        file = self.folder / name
        if not os.path.isfile(file):  # false, too, of a name that no disk can have
            raise ValueError(f"{file}: no such file; copy the whole folder, or encode again")
        with checkpoint.open_weights(file) as shard:
            if missing := set(tensors) - set(shard.keys()):
                raise ValueError(f"{file}: has no tensor {missing.pop()!r}")
            shapes = [shard.get_slice(tensor).get_shape() for tensor in tensors]
        if len(shapes[0]) != 3:
            raise ValueError(f"{file}: its {tensors[0]} is {shapes[0]}, not b l d")
        return shapes

    def item(self, index):
        """Latents, text and prompt of a sample."""
        epoch, place = divmod(index, len(self.items))
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
                raise ValueError(f"{file}: sample {i} cannot be read ({error})") from None
        if not latents.isfinite().all() or not text.isfinite().all():
            raise ValueError(f"{file}: sample {i} is not finite")
        return latents, text, prompt

    def batch(self, indices):
        """Like `Toy.batch`. Texts are padded with zeros to the longest of the batch."""
        latents, text, prompts = zip(*map(self.item, indices))
        return torch.stack(latents), pad_sequence(text, batch_first=True), list(prompts)


def write_toy_shards(folder, seed, count, spoil=lambda video: video, null_prompt=""):
    """Write `count` of the toy world's videos as one shard, in the format of tools.encode.

    spoil: changes the videos `[b, 3, f, h, w]` before they are encoded; their prompts stay.
    """
    codec, (video, prompts) = ToyCodec(), world.make(seed, range(count))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_files({folder / "shard.safetensors": {
        "latents": codec.encode(spoil(video)).half(), "text": codec.encode_text(prompts)}},
        {"prompts": json.dumps(prompts)})
    checkpoint.write_files({folder / "null_text.safetensors": {
        "null_text": codec.encode_text([null_prompt])}})
    (folder / INDEX).write_text(json.dumps({
        "latent_shape": codec.latent_shape(), "has_videos": True,
        "shards": [{"file": "shard.safetensors", "count": count}]}))


def check_halves(what, frames, stride):
    """ValueError unless steps of a stride can drop some of the latent frames; it names `what`."""
    if (frames - 1) % stride:
        low = (frames - 1) // stride * stride
        fit = " and ".join(str(n * WanCodec.time_factor + 1) for n in (low, low + stride))
        raise ValueError(f"{what}: {frames} latent frames cannot be halved, as half-rate steps and "
                         f"the interpolator do; the nearest --frames of tools.encode are {fit}")


def note_changes(data, out):
    """Print a note if the data have changed since the run in the folder `out` saw them last."""
    digest = getattr(data, "digest", None)
    if rank() == 0 and digest:
        file = out / "data.sha256"
        if file.exists() and file.read_bytes() != digest.encode():
            print(f"note: {data} has changed since this run began; it goes on with the new "
                  f"samples, in another order")
        file.write_text(digest)


class Prefetch:
    """`load(index)`, while a thread already loads the next index."""

    def __init__(self, load):
        self.load, self.pool, self.futures = load, ThreadPoolExecutor(1), {}
        self.waited = 0.0  # seconds, in all

    def __call__(self, index):
        start = time.perf_counter()
        future = self.futures.pop(index, None) or self.pool.submit(self.load, index)
        result = future.result()
        self.waited += time.perf_counter() - start
        self.futures = {index + 1: self.pool.submit(self.load, index + 1)}
        return result
