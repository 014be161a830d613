"""Between people and tensors: prompts to embeddings, videos to latents and back."""

import torch
from einops import rearrange

from tiny_wan import world


class ToyCodec:
    """The toy world's stand-in for UMT5 and the VAE: one-hot words, and lossless 2 x 2 patches.

    The factor 8 brings latents to about unit variance, as the VAE's normalisation does for Wan.
    """

    in_dim, text_dim, fps = 12, len(world.VOCABULARY), 8
    latent_shape = (in_dim, world.FRAMES, world.SIZE // 2, world.SIZE // 2)

    def encode_text(self, prompts):
        """Prompts -> `[b, l, text_dim]`, zeros after a prompt's end. ValueError on other words."""
        for prompt in prompts:
            if unknown := [w for w in prompt.split() if w not in world.VOCABULARY]:
                raise ValueError(f"prompt {prompt!r}: the toy does not know {unknown[0]!r}; "
                                 f"its words are: {', '.join(world.VOCABULARY)}")
        text = torch.zeros(len(prompts), max((len(p.split()) for p in prompts), default=0),
                           self.text_dim)
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
