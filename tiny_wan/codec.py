"""Between people and tensors: prompts to embeddings, videos to latents and back.

`open_codec(path, config)` picks the toy's own codec, or Wan's text encoder and VAE through
transformers and diffusers, from the Diffusers layout or from the original one.
"""

import gc
import html
import logging
import zipfile
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from einops import rearrange
from tqdm import tqdm

from tiny_wan import checkpoint, world


class Codec:
    """What both codecs share: the sizes of videos."""

    def prepare(self):
        """Load what decoding needs, so that a bad file is found before there is work to lose."""

    def latent_shape(self, frames=None, height=None, width=None, stride=1):
        """`(c, f, h, w)` of the latents of a video, by default of the size Wan (or the toy) is for.

        f is 1 modulo `stride`. ValueError names the nearest sizes that fit.
        """
        given = {"frames": (self.frames if frames is None else frames, 1,
                            self.time_factor * stride),
                 "height": (self.height if height is None else height, 0, 2 * self.space_factor),
                 "width": (self.width if width is None else width, 0, 2 * self.space_factor)}
        for name, (size, rest, step) in given.items():
            below = (size - rest) // step * step + rest
            if size < 1 or size != below:
                fit = [n for n in (below, below + step) if n >= 1]
                raise ValueError(f"{name} {size} does not fit; the nearest that do are "
                                 f"{' and '.join(map(str, fit))}")
        (frames, *_), (height, *_), (width, *_) = given.values()
        return (self.channels, (frames - 1) // self.time_factor + 1, height // self.space_factor,
                width // self.space_factor)


class ToyCodec(Codec):
    """The toy world's stand-in for UMT5 and the VAE: one-hot words, and lossless 2 x 2 patches.

    The factor 8 brings latents to about unit variance, as the VAE's normalisation does for Wan.
    """

    frames, height, width, fps = world.FRAMES, world.SIZE, world.SIZE, 8
    channels, time_factor, space_factor = 12, 1, 2
    text_dim, negative_prompt = len(world.VOCABULARY), ""
    solver, batch_size = "euler", 16  # what suits sampling

    def encode_text(self, prompts):
        """Prompts -> `[b, l, text_dim]`, l at least 1, zeros after a prompt's end.

        ValueError on words that the world does not have.
        """
        for prompt in prompts:
            if unknown := [w for w in prompt.split() if w not in world.VOCABULARY]:
                raise ValueError(f"prompt {prompt!r}: the toy does not know {unknown[0]!r}; "
                                 f"its words are: {', '.join(world.VOCABULARY)}")
        longest = max([1, *(len(p.split()) for p in prompts)])
        text = torch.zeros(len(prompts), longest, self.text_dim)
        for row, prompt in zip(text, prompts):
            for place, word in enumerate(prompt.split()):
                row[place, world.VOCABULARY.index(word)] = 1
        return text

    def encode(self, video):
        """RGB video in [0, 1] `[b, 3, f, h, w]` -> latents `[b, 12, f, h/2, w/2]`."""
        return rearrange(8 * (video - 0.5), "b c f (h p) (w q) -> b (c p q) f h w", p=2, q=2)

    def decode(self, latents):
        """Latents -> RGB video, clamped to [0, 1]."""
        video = rearrange(latents, "b (c p q) f h w -> b c f (h p) (w q)", p=2, q=2)
        return (video / 8 + 0.5).clamp(0, 1)


class WanCodec(Codec):
    """Wan's UMT5-XXL and causal VAE, from a Diffusers folder or from an original one.

    ValueError says what is not in the folder.
    dtype: of the text encoder, by default the file's own. The VAE works in float32.
    tiling: decode the picture in tiles: slower, for cards with little memory.
    """

    frames, height, width, fps = 81, 480, 832, 16
    channels, time_factor, space_factor = 16, 4, 8
    solver, batch_size = "unipc", 1
    negative_prompt = (  # Wan's own
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
        "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
        "杂乱的背景，三条腿，背景人很多，倒着走")
    NAMES = {"text encoder": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
             "tokenizer": ("tokenizer", "google/umt5-xxl"), "VAE": ("vae", "Wan2.1_VAE.pth")}

    def __init__(self, folder, device="cpu", dtype=None, tiling=False):
        self.device, self.dtype, self.tiling = torch.device(device), dtype, tiling
        self.parts = {}
        for part, names in self.NAMES.items():
            found = [Path(folder) / name for name in names if (Path(folder) / name).exists()]
            if not found:
                raise ValueError(f"{folder}: no {part} in it ({' or '.join(names)}); give the "
                                 f"folder of a whole Wan2.1 with --codec")
            self.parts[part] = found[0]

    def encode_text(self, prompts):
        """Prompts -> `[b, l, 4096]` on the CPU, zeros after each prompt's end, l at most 512."""
        with self.text_encoder() as encode:
            rows = [encode(prompt) for prompt in
                    tqdm(prompts, desc="encode prompts", unit="prompt", leave=False)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @contextmanager
    def text_encoder(self):
        """A function from a prompt to `[l, 4096]`. The encoder is in memory within the block alone.

        It has 11 GB in bfloat16, and runs on a GPU if it fits there, else on the CPU.
        """
        import ftfy
        from transformers import AutoTokenizer

        with blaming(self.parts["tokenizer"]):
            tokenizer = AutoTokenizer.from_pretrained(
                self.parts["tokenizer"], local_files_only=True, trust_remote_code=False)
        with blaming(self.parts["text encoder"]):
            encoder = finite(load_text_encoder(self.parts["text encoder"], self.dtype))
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(f"{self.parts['tokenizer']}: {len(tokenizer)} tokens, but the text "
                             f"encoder knows {encoder.config.vocab_size}; they are no pair")
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
        del encoder, encode
        gc.collect()
        torch.cuda.empty_cache()

    def prepare(self):
        return self.vae

    @cached_property
    def vae(self):
        with blaming(self.parts["VAE"]):
            vae = finite(load_vae(self.parts["VAE"])).requires_grad_(False).to(self.device)
        if self.tiling:
            vae.enable_tiling()
        return vae

    def statistics(self):
        """The mean and the deviation of each latent channel, `[16, 1, 1, 1]`."""
        return (torch.tensor(numbers, device=self.device).view(-1, 1, 1, 1) for numbers in
                (self.vae.config.latents_mean, self.vae.config.latents_std))

    def encode(self, video):
        """RGB video in [0, 1] `[b, 3, 4f-3, 8h, 8w]` -> normalised latents `[b, 16, f, h, w]`."""
        mean, std = self.statistics()
        with torch.no_grad():
            latents = [self.vae.encode(2 * v[None].to(self.device) - 1).latent_dist.mode()
                       for v in video.float()]
        return (torch.cat(latents) - mean) / std

    def decode(self, latents):
        """Normalised latents -> RGB video in [0, 1], one after the other to save memory."""
        mean, std = self.statistics()
        with torch.no_grad():
            videos = [self.vae.decode((x[None].to(self.device) * std + mean)).sample
                      for x in latents.float()]
        return (torch.cat(videos) / 2 + 0.5).clamp(0, 1)


def open_codec(path, config, other=None, **options):
    """The codec for the transformer at `path`; `other` is a folder with Wan's text encoder and VAE.

    options: WanCodec's.
    """
    if (config.in_dim, config.text_dim) == (ToyCodec.channels, ToyCodec.text_dim):
        return ToyCodec()
    if config.in_dim != WanCodec.channels:
        raise ValueError(f"{path}: its latents have {config.in_dim} channels, but those of "
                         f"Wan2.1's VAE have {WanCodec.channels}")
    return WanCodec(other or checkpoint.home(path), **options)


@contextmanager
def blaming(path):
    """Turn whatever a library says about a bad file into a ValueError that names the file."""
    logging.disable(logging.WARNING)  # they would say it on twenty lines first
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from error
    finally:
        logging.disable(logging.NOTSET)


def complete(model, info):
    """The model, if all of its tensors were in the file: the libraries would invent the rest."""
    if info["missing_keys"]:
        raise ValueError(f"tensor {sorted(info['missing_keys'])[0]!r} is missing")
    return model


def finite(model):
    """The model, if all of its numbers are: or each video and prompt would seem to be at fault."""
    for name, p in model.named_parameters():
        if not p.detach().sum(dtype=torch.float32).isfinite():
            raise ValueError(f"tensor {name!r} is not finite")
    return model


def read_pth(file):
    """The tensors of a torch file, memory-mapped where its format allows."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


T5_NAMES = {  # the original code's, and transformers'
    "token_embedding": "shared", "blocks": "encoder.block", "norm": "encoder.final_layer_norm",
    "norm1": "layer.0.layer_norm", "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm", "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1", "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def load_text_encoder(path, dtype=None):
    """UMT5's encoder from a folder of transformers, or from the original code's file."""
    from transformers import UMT5Config, UMT5EncoderModel

    if path.is_dir():
        return complete(*UMT5EncoderModel.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True))
    original = read_pth(path)
    tensors = {checkpoint.rename(name, T5_NAMES): tensor.to(dtype=dtype)
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
    encoder.set_input_embeddings(encoder.shared)  # one table again, not two
    return encoder.eval()


def load_vae(path):
    """Wan's VAE in float32 from a folder of diffusers, or from the original code's file."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    if path.is_dir():
        return complete(*AutoencoderKLWan.from_pretrained(
            path, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True))
    tensors = convert_wan_vae_to_diffusers(read_pth(path))
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=tensors["encoder.conv_in.weight"].shape[0],
                               z_dim=tensors["post_quant_conv.weight"].shape[0])
    vae.load_state_dict(tensors, assign=True)
    return vae.float().eval()
