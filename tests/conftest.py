import signal

import pytest
import torch

from adavid import AVDConfig, FrameInterpolator
from tiny_wan import WanConfig, WanModel

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread():
    """Results must not hang on the number of cores, nor tests on each other's threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A teacher for the toy world, random and very small, with an interpolator beside it."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    model = WanModel(WanConfig(32, 64, 2, 1, in_dim=12, out_dim=12, text_dim=15, text_len=8))
    model.init_weights()
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    config = AVDConfig(lr=1e-3, critic_lr=1e-3, temporal_truncation=-5.0)
    model.save_pretrained(folder, metadata={"avd": config.to_json()})
    interpolator = FrameInterpolator(12, width=8)
    torch.nn.init.normal_(interpolator.out.weight, std=0.05)
    interpolator.save_pretrained(folder / "interpolator.safetensors")
    return folder
