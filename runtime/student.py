"""What lies beside a student's weights: the method's numbers, and the frame interpolator."""

from dataclasses import asdict

from safetensors import SafetensorError

import adavid
from tiny_wan import checkpoint


def load_config(path):
    """The paper's AVDConfig, with what the weights at `path` say otherwise."""
    numbers = checkpoint.read_metadata(path).get("avd", "{}")
    try:
        config = adavid.AVDConfig.from_json(numbers)
        for name, value in asdict(config).items():
            like = getattr(adavid.AVDConfig, name)
            if not same_kind(value, like):
                raise ValueError(f"{name} is {value}, where {like} would do")
        return config
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{checkpoint.named(path)}: the numbers in its metadata make no sense "
                         f"({error})") from None


def same_kind(value, like):
    """Whether a number stands where there was one, a pair for a pair, more for more than two."""
    if isinstance(like, tuple):
        return (isinstance(value, tuple) and (len(value) == len(like) or len(like) > 2)
                and all(same_kind(number, 0.5) for number in value))
    return type(value) in (int, type(like)) and abs(value) < 1e9


def load_interpolator(path, device):
    """The interpolator that lies beside a model's weights, frozen, or None."""
    file = checkpoint.home(path) / "interpolator.safetensors"
    if not file.exists():
        return None
    try:
        interpolator = adavid.FrameInterpolator.from_pretrained(file)
        sound = all(p.isfinite().all() for p in interpolator.parameters())
    except (SafetensorError, KeyError, RuntimeError, ValueError):
        sound = False
    if not sound or interpolator.out.out_channels - 1 != checkpoint.read_config(path)["out_dim"]:
        raise ValueError(f"{file}: damaged, or not a frame interpolator for this model")
    return interpolator.to(device).requires_grad_(False)
