"""The toy world and its oracle: each metric fails on a video made to fail it."""

import pytest
import torch
import torch.nn.functional as F

from tiny_wan import ToyCodec, world

VIDEOS, PROMPTS = world.make(999, range(512))
TWO = [i for i, p in enumerate(PROMPTS) if p.count("ball") == 2]
ONE = [i for i, p in enumerate(PROMPTS) if p.count("ball") == 1]
COLOURED = (VIDEOS.amax(1, keepdim=True) - VIDEOS.amin(1, keepdim=True)) > world.CHROMA


def scores(video, prompts=PROMPTS):
    """The mean of each score."""
    return {name: s.nanmean().item() for name, s in world.score(video, prompts).items()}


def pick(indices, video=VIDEOS):
    return video[indices], [PROMPTS[i] for i in indices]


def naming(words):
    """Real videos whose prompts name this, and their prompts."""
    return pick([i for i, p in enumerate(PROMPTS) if words in p])


def test_real_videos_pass():
    s = scores(VIDEOS)
    assert s["instance"] >= 0.99 and s["prompt"] >= 0.99 and s["relation"] == 1
    assert s["dynamic"] == pytest.approx(0.91, abs=0.04)
    assert all(s[failure] == 0 for failure in world.FAILURES)


@pytest.mark.parametrize("video", [
    0.5 + 0.3 * torch.randn(VIDEOS.shape, generator=torch.Generator().manual_seed(0)),
    torch.rand(VIDEOS.shape, generator=torch.Generator().manual_seed(0)),
    torch.full_like(VIDEOS, 0.5), (VIDEOS + VIDEOS.roll(1, 0)) / 2,
], ids=["normal noise", "uniform noise", "nothing", "blends of two videos"])
def test_what_is_no_video_fails(video):
    s = scores(video)
    assert s["instance"] <= 0.01 and s["prompt"] <= 0.01


def vanish(v):
    v[:, :, 5] = v[:, :, 5].where(~COLOURED[:, :, 5], 0.5)


def jump(v):
    v[:, :, 4] = v[:, :, 4].roll(4, dims=-1)


def blur(v):
    v[:] = F.avg_pool3d(F.pad(v, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)


def recolour(v):
    v[:, :, 5:] = v[:, [1, 2, 0], 5:]


@pytest.mark.parametrize("spoil, failure", [
    (vanish, "missing"), (recolour, "missing"), (recolour, "extra"), (blur, "blurred"),
    (jump, "jumps")])
def test_each_failure_of_a_ball_is_told(spoil, failure):
    video = VIDEOS.clone()
    spoil(video)
    s = scores(video)
    assert s[failure] > 0.95 and s["instance"] <= 0.01
    assert s["fused"] == 0


def test_colour_too_faint_to_see_is_no_failure():
    noise = torch.randn(VIDEOS.shape, generator=torch.Generator().manual_seed(0))
    s = scores(VIDEOS + 0.01 * noise)
    assert s["instance"] >= 0.99 and s["prompt"] >= 0.99


def test_a_ball_in_two_places_is_split():
    away = [i for i in ONE if not (COLOURED[i] & COLOURED[i].flip(-1, -2)).any()]
    v = VIDEOS[away]
    twice = torch.where(COLOURED[away].flip(-1, -2), v.flip(-1, -2), v)
    s = scores(twice, [PROMPTS[i] for i in away])
    assert s["split"] == 1 and s["instance"] == 0 and s["extra"] == s["blurred"] == 0


def test_a_ball_that_the_prompt_does_not_name_is_extra():
    video, prompts = pick(TWO)
    s = scores(video, [p.split(" above ")[0].split(" beside ")[0] for p in prompts])
    assert s["extra"] == 1 and s["instance"] == 0 and s["split"] == s["missing"] == 0


def test_balls_that_touch_are_fused():
    place = world.read(*pick(TWO))["x"]
    chosen = [i for i, x in zip(TWO, place) if "above" in PROMPTS[i] and (x[0] - x[1]).abs() < 1]
    video, prompts = pick(chosen)
    rows = [0, 0, 0, *range(6), *range(10, 15), 15, 15]  # without the four between the lanes
    s = scores(video[:, :, :, rows], prompts)
    assert len(chosen) > 10 and s["fused"] > 0.95 and s["instance"] <= 0.05 and s["extra"] == 0


def test_a_still_video_is_not_dynamic():
    s = scores(VIDEOS[:, :, :1].expand_as(VIDEOS))
    assert s["dynamic"] == 0 and s["instance"] >= 0.99


def test_jitter_is_not_motion():
    video = VIDEOS[:, :, :1].repeat(1, 1, 9, 1, 1)
    video[:, :, 1::2] = video[:, :, 1::2].roll(2, dims=-1)
    s = scores(video)
    assert s["dynamic"] < 0.02 and s["flicker"] > 3 * scores(VIDEOS)["flicker"]


def test_the_wrong_colour_breaks_instance_and_prompt():
    s = scores(VIDEOS[:, [1, 2, 0]])
    assert s["prompt"] == 0 and s["instance"] <= 0.05 and s["missing"] > 0.95


def test_the_wrong_place_breaks_the_prompt_alone():
    video, prompts = pick(TWO)
    swapped = [" above ".join(reversed(p.split(" above "))) if "above" in p
               else " beside ".join(reversed(p.split(" beside "))) for p in prompts]
    s = scores(video, swapped)
    assert s["relation"] == s["prompt"] == 0 and s["instance"] == s["direction"] == 1


def test_the_wrong_direction_breaks_the_prompt_alone():
    video, prompts = naming("moving")
    s = scores(video.flip(2), prompts)
    assert s["direction"] == s["prompt"] == 0 and s["instance"] >= 0.99


def test_the_wrong_speed_breaks_the_prompt_alone():
    video, prompts = naming("fast")
    s = scores(video, [p.replace("fast", "slowly") for p in prompts])
    assert s["prompt"] == 0 and s["direction"] == 1


def test_speed_is_open_for_each_ball_whose_direction_is_not_named():
    video, _ = pick(TWO)
    read = world.read(video, [PROMPTS[i] for i in TWO])
    speed = torch.hypot(read["vx"], read["vy"])
    prompts = [world.without_motion(PROMPTS[i]) for i in TWO]
    torch.testing.assert_close(world.score(video, prompts)["open_speed"], speed.mean(1))
    assert world.score(*naming("fast beside"))["open_speed"].isnan().any()


def test_saturation_grows_with_the_colours():
    grey = VIDEOS.mean(1, keepdim=True)
    real = scores(VIDEOS)["saturation"]
    more = scores((grey + 1.3 * (VIDEOS - grey)).clamp(0, 1))["saturation"]
    assert real == pytest.approx(0.45, abs=0.05) and more > 1.1 * real


def test_diversity_is_one_for_real_videos_and_zero_for_one_video_repeated():
    mirrored = VIDEOS.flip(-1)
    assert world.diversity(mirrored, VIDEOS, PROMPTS) == pytest.approx(1, abs=0.02)
    same = VIDEOS[:1].expand(64, -1, -1, -1, -1)
    assert world.diversity(same, VIDEOS[:64], PROMPTS[:1] * 64) == pytest.approx(0, abs=1e-3)


def test_a_sample_is_the_same_in_any_batch():
    video, prompts = world.make(999, [7, 300])
    assert torch.equal(video, VIDEOS[[7, 300]]) and prompts == [PROMPTS[7], PROMPTS[300]]
    assert not torch.equal(world.make(1, [7])[0], video[:1])


def test_videos_differ_in_how_much_grain_they_have():
    ground = VIDEOS[:, 0, 0].where(~COLOURED[:, 0, 0], torch.nan)
    grain = ground.diff(n=2, dim=-1).square().nanmean((1, 2)).sqrt() / 6 ** 0.5
    assert grain.min() < 0.005 and grain.max() > 0.09


def test_prompts_name_the_colours_and_often_the_motion():
    share = lambda word: sum(p.count(word) for p in PROMPTS) / sum(p.count("ball") for p in PROMPTS)
    assert share("moving") == pytest.approx(0.78, abs=0.06)
    assert 0.05 < share("slowly") < share("fast") < share("moving")
    assert len(TWO) / len(PROMPTS) == pytest.approx(0.6, abs=0.06)
    assert all(world.without_motion(p) == world.without_motion(world.without_motion(p))
               and "moving" not in world.without_motion(p) for p in PROMPTS)


def test_codec_is_lossless():
    codec = ToyCodec()
    latents = codec.encode(VIDEOS)
    assert latents.shape[1:] == codec.latent_shape()
    assert 0.95 < latents.std() < 1.1
    torch.testing.assert_close(codec.decode(latents), VIDEOS, atol=1e-6, rtol=0)


def test_text_tells_which_ball_a_word_is_about():
    codec, size = ToyCodec(), len(world.VOCABULARY)
    text = codec.encode_text(["a red ball above a red ball", "a blue ball moving left fast", ""])
    assert text.shape == (3, 7, 2 * size)
    assert text.sum((1, 2)).tolist() == [7, 6, 0]
    torch.testing.assert_close(text[0, :3, :size], text[0, 4:, size:])  # equal words, of each ball
    assert codec.encode_text([""]).shape == (1, 1, 2 * size)
