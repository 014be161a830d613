"""tools.encode, from videos and captions to shards, and what training draws from them."""

import json
import os
import shutil
import signal
import weakref

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.data import Shards
from tests.helpers import CLIP, ROOT, complaint, distill, read_lines, torchrun
from tiny_wan import WanCodec, checkpoint, codec
from tools import encode


@pytest.fixture(scope="module")
def wan(inputs):
    return inputs["diffusers"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Files as people have them. Eight of them can be used."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)

    def clip(name, frames, height, width, fps):
        image = rng.integers(0, 255, (1, height // 8, width // 8, 3), dtype=np.uint8)
        video = np.roll(image.repeat(8, 1).repeat(8, 2), 1, axis=2).repeat(frames, 0)
        for i in range(frames):
            video[i] = np.roll(video[i], 2 * i, axis=1)
        iio.imwrite(folder / name, video, fps=fps, codec="libx264", macro_block_size=2)
        (folder / name).with_suffix(".txt").write_text(f"a pattern, take {name}\n")

    for i, (frames, height, width, fps) in enumerate([
            (5, 32, 48, 16), (30, 64, 64, 30), (20, 48, 128, 24), (9, 128, 48, 16),
            (40, 32, 48, 60), (12, 96, 144, 25)]):
        clip(f"ok-{i}.mp4", frames, height, width, fps)
    clip("more/ok-6.mp4", 8, 32, 48, 16)
    clip("-odd name: 100%.mp4", 8, 40, 56, 16)
    clip("short.mp4", 4, 32, 48, 30)
    for name, share in {"cut.mp4": 0.1, "cut-2.mp4": 0.8}.items():
        clip(name, 100, 128, 128, 16)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:int(share * len(whole))])
    (folder / "empty.mp4").touch()
    (folder / "empty.txt").write_text("nothing at all")
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    (folder / "text.txt").write_text("a text")
    # A playlist and a concat file under a video's name, which point to a video elsewhere.
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.mp4"
    shutil.copy(folder / "ok-0.mp4", elsewhere)
    (folder / "playlist.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{elsewhere}\n#EXT-X-ENDLIST\n")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {elsewhere}\n")
    (folder / "playlist.txt").write_text("a playlist")
    (folder / "concat.txt").write_text("a list")
    clip("silent.mp4", 8, 32, 48, 16)
    (folder / "silent.txt").unlink()
    return folder


def run(wan, out, *args):
    return encode.main([str(a) for a in ("--model", wan, "--out", out, *CLIP, *args)])


@pytest.fixture(scope="module")
def shards(wan, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    assert run(wan, out, "--videos", clips, "--shard-size", 3) == 0
    return out


def rows(out):
    """{video: (caption, latents, text)} of all shards."""
    found = {}
    for file in sorted(out.glob("shard-*.safetensors")):
        tensors = load_file(file)
        about = checkpoint.read_metadata(file)
        for i, name in enumerate(json.loads(about["videos"])):
            assert name not in found
            found[name] = (json.loads(about["prompts"])[i], tensors["latents"][i],
                           tensors["text"][i])
    return found


def test_usable_videos_are_encoded_and_the_others_are_listed_with_reasons(shards):
    assert sorted(rows(shards)) == sorted(
        ["-odd name: 100%.mp4", "more/ok-6.mp4", *(f"ok-{i}.mp4" for i in range(6))])
    skipped = {e["video"]: e["reason"] for e in read_lines(shards / "skipped.jsonl")}
    assert sorted(skipped) == ["concat.mp4", "cut-2.mp4", "cut.mp4", "empty.mp4", "playlist.mp4",
                               "short.mp4", "silent.mp4", "text.mp4"]
    assert skipped["short.mp4"].startswith(("2 of 5", "3 of 5"))
    assert skipped["silent.mp4"] == "no caption"
    assert all(skipped[n].startswith("0 of 5 frames") and "(" in skipped[n]
               for n in ("concat.mp4", "cut.mp4", "cut-2.mp4", "empty.mp4", "playlist.mp4",
                         "text.mp4"))


def test_shards_hold_the_codecs_latents_and_embeddings(wan, clips, shards):
    wan_codec, found = WanCodec(wan), rows(shards)
    video = torch.from_numpy(iio.imread(clips / "ok-0.mp4")).permute(3, 0, 1, 2)[None] / 255
    caption, latents, text = found["ok-0.mp4"]
    assert (latents - wan_codec.encode(video)[0]).abs().max() < 0.05  # colours are rounded twice
    assert caption == "a pattern, take ok-0.mp4"
    wanted = wan_codec.encode_text([caption])[0]
    torch.testing.assert_close(text[:len(wanted)], wanted)
    assert not text[len(wanted):].any()
    null_text = load_file(shards / "null_text.safetensors")["null_text"]
    torch.testing.assert_close(null_text, wan_codec.encode_text([WanCodec.negative_prompt]))


def test_an_interrupted_run_loses_nothing_and_encodes_nothing_twice(
        wan, clips, shards, tmp_path, monkeypatch, capsys):
    (tmp_path / "shard-000-00000.safetensors.part").write_bytes(b"what `kill -9` left")
    reads, read = [], encode.read_video

    def stops(file, *size):
        reads.append(file)
        if len(reads) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(file, *size)

    monkeypatch.setattr(encode, "read_video", stops)
    with pytest.raises(SystemExit, match="143"):
        run(wan, tmp_path, "--videos", clips, "--shard-size", 3)
    assert not (tmp_path / "index.json").exists()

    monkeypatch.setattr(encode, "read_video", lambda f, *size: reads.append(f) or read(f, *size))
    assert run(wan, tmp_path, "--videos", clips, "--shard-size", 3) == 0
    again = {file for file in reads if reads.count(file) > 1}
    assert len(again & {clips / name for name in rows(shards)}) <= 1  # read ahead as it stopped
    assert rows(tmp_path).keys() == rows(shards).keys() and not list(tmp_path.glob("*.part"))
    for name, (caption, latents, _) in rows(shards).items():
        assert rows(tmp_path)[name][0] == caption and torch.equal(rows(tmp_path)[name][1], latents)
    reads.clear()
    capsys.readouterr()
    assert run(wan, tmp_path, "--videos", clips, "--shard-size", 3) == 0
    assert len(reads) == 7 and "8 encoded" in capsys.readouterr().out  # the broken ones


def test_latents_that_are_not_finite_are_left_out(wan, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(WanCodec, "encode", lambda self, video: torch.full(
        (1, 16, 2, 4, 6), 1e6))  # more than float16 holds
    assert "nothing could" in complaint(capsys, run(wan, tmp_path, "--videos", clips / "more"))
    assert "not finite" in (tmp_path / "skipped.jsonl").read_text()


def test_two_ranks_share_the_work(wan, clips, shards, tmp_path):
    args = ["--videos", clips, "--model", wan, "--out", tmp_path, *CLIP]
    result = torchrun(ROOT / "tools" / "encode.py", *args)
    assert result.returncode == 0, result.stderr
    assert {f.name[:9] for f in tmp_path.glob("shard-*")} == {"shard-000", "shard-001"}
    assert rows(tmp_path).keys() == rows(shards).keys() and len(Shards(tmp_path, 0).items) == 8


def test_captions_come_from_a_file_without_a_benchmarks_prompts(wan, clips, tmp_path):
    entries = {"ok-0.mp4": "A cat walks on green grass, slowly", "ok-3.mp4": "a boat",
               "../ok.mp4": "outside", "gone.mp4": "gone", "more/ok-6.mp4": "a red bird",
               "x" * 5000: "a name that no disk can have", "ok-1.mp4": "no end " * 2000}
    jsonl, table = tmp_path / "captions.jsonl", tmp_path / "captions.csv"
    jsonl.write_text("".join(json.dumps({"video": v, "caption": c}) + "\n"
                             for v, c in entries.items()))
    table.write_text("video,caption\n" + "".join(f'{v},"{c}"\n' for v, c in entries.items()))
    (tmp_path / "bench.txt").write_text("a cat walks on green grass\n“A boat…”\nbird\n")
    for file in (jsonl, table):
        out = tmp_path / file.suffix[1:]
        assert run(wan, out, "--videos", clips, "--captions", file,
                   "--exclude-prompts", tmp_path / "bench.txt") == 0
        skipped = {e["video"]: e["reason"] for e in read_lines(out / "skipped.jsonl")}
        assert "characters" in skipped["ok-1.mp4"] and len(skipped) == 18
        assert skipped["ok-0.mp4"] == skipped["ok-3.mp4"] and "excluded" in skipped["ok-0.mp4"]
        assert skipped["../ok.mp4"] == skipped["gone.mp4"] == skipped["x" * 5000]
        assert {n: r[0] for n, r in rows(out).items()} == {"more/ok-6.mp4": "a red bird"}


def test_prompts_are_compared_without_case_and_punctuation():
    assert encode.plain("  “A boat…”\n sails! ") == "a boat…” sails"
    long = "a" + "." * 10**6 + "b"  # in linear time
    assert encode.plain(long + "?") == long and encode.plain("?!") == ""


def test_prompts_alone_serve_distribution_matching_and_may_be_added_to(wan, tmp_path):
    out = tmp_path / "out"
    for prompts in (["a cat", "a dog that runs"], ["a bird", "a cat", "a dog that runs"]):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        assert run(wan, out, "--captions", tmp_path / "prompts.txt") == 0
        data = Shards(out, 0)
        latents, text, found = data.batch(range(len(prompts)))
        assert sorted(found) == prompts and text.any()
        assert not data.has_videos and not latents.any() and latents.shape[1:] == (16, 2, 4, 6)
    assert distill(wan, tmp_path / "run", "--data", out, "--lambda-reg", 0, steps=1) == 0


def test_captions_may_hold_any_kind_of_line_break(tmp_path):
    (tmp_path / "a.csv").write_text('video,caption\nx.mp4,"one\ntwo\u2028three"\n')
    (tmp_path / "a.jsonl").write_text('{"video": "x.mp4", "caption": "one two\u2028three"}\n')
    for name in ("a.csv", "a.jsonl"):
        assert encode.read_captions(tmp_path / name) == {"x.mp4": "one two three"}


# --- what training draws -----------------------------------------------------------------------

def test_each_epoch_has_every_sample_once_whatever_the_batches(shards):
    data = Shards(shards, seed=3)
    whole = data.batch(range(16))[2]
    assert sorted(whole[:8]) == sorted(whole[8:]) and len(set(whole)) == 8
    assert whole[:8] != whole[8:] != Shards(shards, seed=4).batch(range(8, 16))[2]
    assert [data.batch([i])[2][0] for i in (11, 3, 7)] == [whole[i] for i in (11, 3, 7)]
    latents, text, _ = data.batch([0, 1])
    assert latents.shape == (2, *data.latent_shape) and latents.dtype == text.dtype == torch.float32


def test_training_never_holds_a_text_encoder_and_the_vae_only_for_pictures(
        wan, shards, tmp_path, monkeypatch):
    vaes, load_vae = [], codec.load_vae

    def remembered(path):
        vae = load_vae(path)
        vaes.append(weakref.ref(vae))
        return vae

    monkeypatch.setattr(codec, "load_vae", remembered)
    monkeypatch.setattr(codec, "load_text_encoder", None)
    assert distill(wan, tmp_path, "--data", shards, batch_size=1) == 0
    assert len(vaes) == 2 and not any(vae() for vae in vaes)  # tried at first, then for a picture
    assert (tmp_path / "samples" / "000002.png").exists()


def test_a_vae_that_fails_costs_only_the_pictures(wan, shards, tmp_path, monkeypatch, capsys):
    broken = shutil.copytree(wan, tmp_path / "broken")
    [vae] = (broken / "vae").glob("*.safetensors")
    vae.write_bytes(vae.read_bytes()[:-1000])
    assert distill(broken, tmp_path / "a", "--data", shards, steps=1, batch_size=1) == 0
    assert "note: no pictures" in capsys.readouterr().out

    def fails(self, latents):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(WanCodec, "decode", fails)
    assert distill(wan, tmp_path / "b", "--data", shards, steps=1, batch_size=1) == 0
    assert "not written (out of memory)" in capsys.readouterr().out
    assert (tmp_path / "b" / "diffusion_pytorch_model.safetensors").exists()
