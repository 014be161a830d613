"""The toy world and its oracle: each metric fails on a video made to fail it."""

import pytest
import torch

from tiny_wan import ToyCodec, world

VIDEOS, PROMPTS = world.make(999, range(512))


def scores(video, prompts=PROMPTS):
    return world.score(video, prompts)


def mean(values):
    return values.nanmean().item()


def moving(prompt_part="moving"):
    """Real videos whose ball moves well, and their prompts."""
    chosen = [i for i, p in enumerate(PROMPTS) if prompt_part in p]
    return VIDEOS[chosen], [PROMPTS[i] for i in chosen]


def test_real_videos_pass():
    s = scores(VIDEOS)
    assert mean(s["instance"]) >= 0.99 and mean(s["prompt"]) >= 0.99
    assert mean(s["dynamic"]) == pytest.approx(0.91, abs=0.04)


@pytest.mark.parametrize("noise", [torch.rand, torch.randn])
def test_noise_fails(noise):
    s = scores(0.5 + 0.3 * noise(VIDEOS.shape, generator=torch.Generator().manual_seed(0)))
    assert mean(s["instance"]) <= 0.01 and mean(s["prompt"]) <= 0.01 and mean(s["dynamic"]) <= 0.01


@pytest.mark.parametrize("name, spoil", {
    "nothing on a still background": lambda v: v[:].fill_(0.5),
    "a ball that vanishes": lambda v: v[:, :, 5].fill_(0.5),
    "a ball that jumps": lambda v: v[:, :, 4].copy_(v[:, :, 4].roll(4, dims=-1)),
    "a ball that changes its colour": lambda v: v[:, :, 5:].copy_(v[:, [1, 2, 0], 5:]),
}.items())
def test_a_broken_ball_is_no_instance(name, spoil):
    video = VIDEOS.clone()
    spoil(video)
    assert mean(scores(video)["instance"]) < 0.01, name


def test_a_split_ball_is_no_instance():
    video = torch.maximum(VIDEOS, VIDEOS.flip(-1).flip(-2))
    centred = (world.read(VIDEOS)["x"] - 8).abs() + (world.read(VIDEOS)["y"] - 8).abs() < 3
    assert mean(scores(video)["instance"][~centred]) < 0.05


def test_a_still_video_is_not_dynamic():
    s = scores(VIDEOS[:, :, :1].expand_as(VIDEOS))
    assert mean(s["dynamic"]) == 0 and mean(s["instance"]) >= 0.99


def test_jitter_is_not_motion():
    video = VIDEOS[:, :, :1].repeat(1, 1, 9, 1, 1)
    video[:, :, 1::2] = video[:, :, 1::2].roll(2, dims=-1)
    s = scores(video)
    assert mean(s["dynamic"]) < 0.01 and mean(s["flicker"]) > 3 * mean(scores(VIDEOS)["flicker"])


def test_a_wrong_colour_breaks_the_prompt_and_not_the_instance():
    s = scores(VIDEOS[:, [1, 2, 0]])
    assert mean(s["colour"]) == 0 and mean(s["prompt"]) == 0 and mean(s["instance"]) >= 0.99


def test_a_wrong_direction_breaks_the_prompt():
    video, prompts = moving()
    s = scores(video.flip(2), prompts)
    assert mean(s["direction"]) == 0 and mean(s["prompt"]) == 0 and mean(s["instance"]) >= 0.99


def test_a_wrong_speed_breaks_the_prompt():
    video, prompts = moving("fast")
    s = scores(video, [p.replace("fast", "slowly") for p in prompts])
    assert mean(s["prompt"]) == 0 and mean(s["direction"]) == 1


def test_saturation_grows_with_the_colours():
    grey = VIDEOS.mean(1, keepdim=True)
    real = mean(scores(VIDEOS)["saturation"])
    more = mean(scores((grey + 1.3 * (VIDEOS - grey)).clamp(0, 1))["saturation"])
    assert real == pytest.approx(0.45, abs=0.05) and more > 1.1 * real


def test_diversity_is_one_for_real_videos_and_zero_for_one_video_repeated():
    other = world.make(998, range(512))[0]
    assert world.diversity(other, VIDEOS) == pytest.approx(1, abs=0.1)
    same = VIDEOS[:1].expand(64, -1, -1, -1, -1)
    assert world.diversity(same, VIDEOS) == pytest.approx(0, abs=1e-3)


def test_a_sample_is_the_same_in_any_batch():
    video, prompts = world.make(999, [7, 300])
    assert torch.equal(video, VIDEOS[[7, 300]]) and prompts == [PROMPTS[7], PROMPTS[300]]
    assert not torch.equal(world.make(1, [7])[0], video[:1])


def test_prompts_name_the_colour_and_often_the_motion():
    share = lambda word: sum(word in p for p in PROMPTS) / len(PROMPTS)
    assert all(p.split()[1] in world.COLOURS for p in PROMPTS)
    assert share("moving") == pytest.approx(0.78, abs=0.06)
    assert 0.05 < share("slowly") < share("fast") < share("moving")


def test_codec_is_lossless():
    codec = ToyCodec()
    latents = codec.encode(VIDEOS)
    assert latents.shape[1:] == codec.latent_shape()
    assert 0.5 < latents.std() < 1.5
    torch.testing.assert_close(codec.decode(latents), VIDEOS, atol=1e-6, rtol=0)


def test_text_is_one_hot_and_the_empty_prompt_is_zero():
    text = ToyCodec().encode_text(["a red ball", "a blue ball moving left fast", ""])
    assert text.shape == (3, 6, len(world.VOCABULARY))
    assert text.sum((1, 2)).tolist() == [3, 6, 0]
    assert ToyCodec().encode_text([""]).shape == (1, 1, len(world.VOCABULARY))
