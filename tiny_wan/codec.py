"""Codecs: prompts to embeddings, videos to latents, and latents to videos.

`open_codec(path, config)` returns the codec that fits a transformer: the toy's own, or Wan's text
encoder and VAE. These run in transformers and diffusers, from either layout of the files.
"""

import gc
import html
import logging
import os
import re
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from einops import rearrange
from tqdm import tqdm

from tiny_wan import checkpoint, world
from tiny_wan.dialects import AGAIN, BLANK, rename


class Codec:
    """What both codecs have in common."""

    def prepare(self):
        """Load what `decode` needs, so that a damaged file is found before any work is done."""

    def latent_shape(self, frames=None, height=None, width=None, stride=1):
        """The shape `(c, f, h, w)` of a video's latents; by default, of the codec's usual video.

        f must be 1 modulo `stride`, and h and w even, as patches are 2 x 2 latents. ValueError
        names the nearest sizes that fit.
        """
        frames = self.frames if frames is None else frames
        height = self.height if height is None else height
        width = self.width if width is None else width
        check_size("frames", frames, self.time_factor * stride, remainder=1)
        check_size("height", height, 2 * self.space_factor)
        check_size("width", width, 2 * self.space_factor)
        return (self.channels, (frames - 1) // self.time_factor + 1, height // self.space_factor,
                width // self.space_factor)


def check_size(name, size, step, remainder=0):
    """ValueError unless `size` is positive and equals `remainder` modulo `step`."""
    below = (size - remainder) // step * step + remainder
    if size < 1 or size != below:
        fit = [n for n in (below, below + step) if n >= 1]
        raise ValueError(f"{name} {size} does not fit; the nearest that do are "
                         f"{' and '.join(map(str, fit))}")


class ToyCodec(Codec):
    """The toy world's counterpart of UMT5 and the VAE: one-hot words, and lossless 2 x 2 patches.

    Cross-attention sees no order of words. So words after "above" or "beside" get numbers of their
    own, or no model could tell which of two balls a word is about. The factor 9 gives latents about
    unit variance, as the VAE's normalisation does for Wan.
    """

    frames, height, width, fps = world.FRAMES, world.SIZE, world.SIZE, 8
    channels, time_factor, space_factor = 12, 1, 2
    text_dim, negative_prompt = 2 * len(world.VOCABULARY), ""
    solver, batch_size = "euler", 16  # defaults for sampling

    def encode_text(self, prompts):
        """Prompts -> `[b, l, text_dim]`, with l at least 1 and zeros after the end of a prompt.

        ValueError names a word that is not in the vocabulary.
        """
        for prompt in prompts:
            if unknown := [w for w in prompt.split() if w not in world.VOCABULARY]:
                raise ValueError(f"prompt {prompt!r}: the toy does not know {unknown[0]!r}; "
                                 f"its words are {', '.join(world.VOCABULARY)}")
        longest = max([1, *(len(p.split()) for p in prompts)])
        text = torch.zeros(len(prompts), longest, self.text_dim)
        for row, prompt in zip(text, prompts):
            offset = 0
            for place, word in enumerate(prompt.split()):
                row[place, offset + world.VOCABULARY.index(word)] = 1
                if word in world.RELATIONS:
                    offset = len(world.VOCABULARY)
        return text

    def encode(self, video):
        """RGB videos in [0, 1] `[b, 3, f, h, w]` -> latents `[b, 12, f, h/2, w/2]`."""
        return rearrange(9 * (video - 0.5), "b c f (h p) (w q) -> b (c p q) f h w", p=2, q=2)

    def decode(self, latents):
        """Latents -> RGB videos, clamped to [0, 1]."""
        check_finite("the latents", latents)
        video = rearrange(latents, "b (c p q) f h w -> b c f (h p) (w q)", p=2, q=2)
        return (video / 9 + 0.5).clamp(0, 1)


class WanCodec(Codec):
    """Wan's text encoder (UMT5-XXL) and causal VAE, from a folder in Diffusers' or Wan's layout.

    dtype: of the text encoder; by default its file's own.
    vae_dtype: of the VAE. Pixels and latents are float32 in either case.

    Raises ValueError if the folder lacks one of the parts.
    """

    frames, height, width, fps = 81, 480, 832, 16
    channels, time_factor, space_factor = 16, 4, 8
    solver, batch_size = "unipc", 1  # defaults for sampling
    negative_prompt = (  # Wan's own
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
        "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
        "杂乱的背景，三条腿，背景人很多，倒着走")
    NAMES = {"text encoder": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
             "tokenizer": ("tokenizer", "google/umt5-xxl"), "VAE": ("vae", "Wan2.1_VAE.pth")}
    UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
                "num_heads": 64}  # the sizes of Wan's VAE are diffusers' defaults

    def __init__(self, folder, device="cpu", dtype=None, vae_dtype=torch.float32):
        self.device, self.dtype, self.vae_dtype = torch.device(device), dtype, vae_dtype
        self.parts = {}
        for part, names in self.NAMES.items():
            found = [Path(folder) / name for name in names if (Path(folder) / name).exists()]
            if not Path(folder).exists():
                raise ValueError(f"{folder}: no such folder{checkpoint.on_the_hub(folder)}")
            if not found:
                raise ValueError(f"{folder}: contains no {part} ({' or '.join(names)}); use "
                                 f"--codec to give a folder with all parts of Wan2.1")
            self.parts[part] = found[0]

    def encode_text(self, prompts):
        """Prompts -> `[b, l, 4096]` on the CPU, with l <= 512 and zeros after a prompt's end."""
        with self.text_encoder() as encode:
            rows = [encode(prompt) for prompt in
                    tqdm(prompts, desc="encode prompts", unit="prompt", leave=False,
                         disable=os.environ.get("RANK", "0") != "0")]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @contextmanager
    def text_encoder(self):
        """A context with a function from a prompt to its embedding `[l, 4096]` on the CPU.

        The text encoder takes 11 GB in bfloat16. It runs on the GPU if it fits there, else on the
        CPU, and is freed at the end of the context.
        """
        import ftfy
        from transformers import AutoTokenizer

        with loading(self.parts["tokenizer"]):
            check_tokenizer(self.parts["tokenizer"])
            tokenizer = AutoTokenizer.from_pretrained(
                self.parts["tokenizer"], local_files_only=True, trust_remote_code=False)
        with loading(self.parts["text encoder"]):
            encoder = load_text_encoder(self.parts["text encoder"], self.dtype)
            check_numbers(encoder)
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(f"{self.parts['tokenizer']}: has {len(tokenizer)} tokens, but the "
                             f"text encoder {encoder.config.vocab_size}; they do not fit together")
        size = sum(p.nbytes for p in encoder.parameters())
        fits = self.device.type == "cuda" and size < 0.9 * torch.cuda.mem_get_info(self.device)[0]
        device = self.device if fits else torch.device("cpu")
        encoder.to(device)

        def encode(prompt):
            clean = " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
            tokens = tokenizer(clean, truncation=True, max_length=512, return_tensors="pt")
            with torch.no_grad():
                return encoder(tokens.input_ids.to(device)).last_hidden_state[0].cpu()

        yield encode
        encoder = None  # otherwise the caller's `encode` would keep it in memory
        gc.collect()
        empty_cache()

    def prepare(self):
        return self.vae

    @cached_property
    def vae(self):
        with loading(self.parts["VAE"]):
            vae = load_vae(self.parts["VAE"]).requires_grad_(False)
            vae.to(self.device, self.vae_dtype)
            check_numbers(vae)
            # Of each latent channel, both `[16, 1, 1, 1]`.
            self.mean, self.std = (
                torch.tensor(numbers, device=self.device).view(self.channels, 1, 1, 1)
                for numbers in (vae.config.latents_mean, vae.config.latents_std))
        return vae

    @torch.no_grad()
    def encode(self, video):
        """RGB videos in [0, 1] `[b, 3, 4f-3, 8h, 8w]` -> normalised latents `[b, 16, f, h, w]`."""
        latents = [self.run_vae("encode", 2 * v[None] - 1).latent_dist.mode()
                   for v in video.float()]
        return (torch.cat(latents) - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """Normalised latents -> RGB videos in [0, 1]. Decodes one at a time, to save memory."""
        check_finite("the latents", latents)
        self.prepare()  # which loads the statistics as well
        videos = [self.run_vae("decode", x[None].to(self.device) * self.std + self.mean)
                  .sample.float() for x in latents.float()]
        check_finite("the VAE's pixels", *videos)
        return (torch.cat(videos) / 2 + 0.5).clamp(0, 1)

    def run_vae(self, method, x):
        """Once memory has run out, the VAE works in tiles of the picture, which takes longer."""
        try:
            return getattr(self.vae, method)(x.to(self.device, self.vae_dtype))
        except (RuntimeError, MemoryError) as error:
            if self.vae.use_tiling or not is_out_of_memory(error):
                raise
        tqdm.write("note: memory ran out in the VAE, which goes on in tiles")
        empty_cache()
        self.vae.enable_tiling()
        return self.run_vae(method, x)


def check_finite(what, *tensors):
    """ValueError unless all numbers are finite. As pixels, the others would be black or white."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{what} are not finite: numbers overflow in this dtype, or in these "
                         f"weights; try float32 if it was bfloat16, and LoRAs at a lower scale")


def is_toy(config):
    """Whether a transformer with this WanConfig is of the toy world."""
    return (config.in_dim, config.text_dim) == (ToyCodec.channels, ToyCodec.text_dim)


def codec_class(config):
    """The class of the codec for a transformer with this WanConfig."""
    return ToyCodec if is_toy(config) else WanCodec


def open_codec(path, config, other=None, **options):
    """The codec for the transformer at `path`.

    config: the transformer's WanConfig.
    other: a folder with Wan's text encoder and VAE; by default the transformer's own.
    options: WanCodec's arguments; the toy's codec has none.
    """
    if is_toy(config):
        return ToyCodec()
    if config.in_dim != WanCodec.channels:
        raise ValueError(f"{path}: its latents have {config.in_dim} channels, but those of "
                         f"Wan2.1's VAE have {WanCodec.channels}")
    return WanCodec(other or checkpoint.home(path), **options)


def empty_cache():
    """Give the GPU's memory that PyTorch keeps for later back, if there is a GPU."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


# On MPS and on the CPU, running out of memory is a plain RuntimeError.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|Invalid buffer size")


def is_out_of_memory(error):
    """Whether an exception says that memory has run out, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None)


@contextmanager
def loading(path):
    """A context in which any error of a library becomes a ValueError that names the file.

    The libraries' own words would advise what does not help here.
    """
    logging.disable(logging.WARNING)  # the libraries would log twenty lines before they raise
    try:
        for file in path.glob("*.safetensors") if path.is_dir() else ():
            checkpoint.open_weights(file)
        yield
    except (ModuleNotFoundError, MemoryError):
        raise
    except checkpoint.FileError as error:
        named = str(path) in str(error)
        raise ValueError(str(error) if named else f"{path}: {error}") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path}: damaged, or not that of Wan2.1 ({type(error).__name__} while it "
                         f"was loaded); {AGAIN}") from error
    finally:
        logging.disable(logging.NOTSET)


def complete(model, info):
    """The model. FileError if its file lacks tensors, which the libraries draw at random."""
    if info["missing_keys"]:
        raise checkpoint.FileError(f"tensor {min(info['missing_keys'])!r} is missing")
    return model


def check_numbers(model):
    """FileError names a tensor of wrong numbers. Unchecked, the inputs would seem at fault."""
    for name, p in model.named_parameters():
        if not checkpoint.is_finite(p):
            raise checkpoint.FileError(f"tensor {name!r} is not finite")
        if checkpoint.is_blank(p):
            raise checkpoint.FileError(f"tensor {name!r} is {BLANK}")


def check_tokenizer(folder):
    """FileError unless a folder has UMT5's tokenizer, in the format that transformers reads."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise checkpoint.FileError("holds no tokenizer.json: a tokenizer in another format; take "
                                   "Wan2.1's google/umt5-xxl or tokenizer")
    checkpoint.refuse_other_files(file)
    kind = checkpoint.read_json(file).get("model")
    if not isinstance(kind, dict) or kind.get("type", "Unigram") != "Unigram":
        raise checkpoint.FileError("not UMT5's tokenizer, whose tokenizer.json is of type Unigram")


T5_NAMES = {  # from the original code's to those of transformers
    "token_embedding": "shared", "blocks": "encoder.block", "norm": "encoder.final_layer_norm",
    "norm1": "layer.0.layer_norm", "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm", "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1", "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def load_text_encoder(path, dtype=None):
    """UMT5's encoder, from a folder of transformers or a file of the original code."""
    from transformers import UMT5Config, UMT5EncoderModel

    if path.suffix != ".pth":
        return complete(*UMT5EncoderModel.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True))
    original = checkpoint.read_pth(path)
    tensors = {rename(name, T5_NAMES): tensor.to(dtype=dtype)
               for name, tensor in original.items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    buckets, heads = original["blocks.0.pos_embedding.embedding.weight"].shape
    vocabulary, dim = tensors["shared.weight"].shape
    inner = original["blocks.0.attn.q.weight"].shape[0]
    config = UMT5Config(
        vocab_size=vocabulary, d_model=dim, d_kv=inner // heads,
        d_ff=original["blocks.0.ffn.fc1.weight"].shape[0], num_heads=heads,
        num_layers=len({name.split(".")[1] for name in original if name.startswith("blocks.")}),
        relative_attention_num_buckets=buckets)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    encoder.load_state_dict(tensors, assign=True)
    encoder.set_input_embeddings(encoder.shared)  # `assign` made two tables of the shared one
    return encoder.eval()


def load_vae(path):
    """Wan's VAE in float32, from a folder of diffusers or a file of the original code."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    if path.suffix != ".pth":
        checkpoint.read_json(path / "config.json")  # diffusers would look on the hub for a string
        return complete(*AutoencoderKLWan.from_pretrained(
            path, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True))
    tensors = convert_wan_vae_to_diffusers(checkpoint.read_pth(path))
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=tensors["encoder.conv_in.weight"].shape[0],
                               z_dim=tensors["post_quant_conv.weight"].shape[0])
    vae.load_state_dict(tensors, assign=True)
    return vae.float().eval()
