"""tools.encode, from videos and captions to shards, and what training draws from them."""

import json
import os
import re
import shutil
import signal
import weakref

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from runtime.data import Shards
from tests.helpers import CLIP, ROOT, complaint, distill, read_lines, torchrun, write_clips
from tiny_wan import WanCodec, checkpoint, codec
from tools import captions, encode


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
            (9, 32, 48, 16), (30, 64, 64, 30), (20, 48, 128, 24), (9, 128, 48, 16),
            (40, 32, 48, 60), (20, 96, 144, 25)]):
        clip(f"ok-{i}.mp4", frames, height, width, fps)
    clip("more/ok-6.mp4", 10, 32, 48, 16)
    clip("-odd name: 100%.mp4", 10, 40, 56, 16)
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
    clip("silent.mp4", 10, 32, 48, 16)
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
    assert skipped["short.mp4"] == "too short: 2 of 9 frames at 16 fps"
    assert skipped["silent.mp4"] == "no caption"
    assert all(re.match("cannot be read: .{9}", skipped[n])
               for n in ("concat.mp4", "cut.mp4", "cut-2.mp4", "empty.mp4", "playlist.mp4",
                         "text.mp4"))


def test_shards_hold_the_codecs_latents_and_embeddings(wan, clips, shards):
    wan_codec, found = WanCodec(wan), rows(shards)
    video = torch.from_numpy(iio.imread(clips / "ok-0.mp4", output_params=[
        "-vf", "scale=flags=accurate_rnd+full_chroma_int"])).permute(3, 0, 1, 2)[None] / 255
    caption, latents, text = found["ok-0.mp4"]
    assert (latents - wan_codec.encode(video)[0]).abs().max() < 0.02  # colours are rounded twice
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
        (1, 16, 3, 4, 6), 1e6))  # more than float16 holds
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


def test_prompts_alone_serve_distribution_matching_and_may_be_added_to(wan, tmp_path):
    out = tmp_path / "out"
    for prompts in (["a cat", "a dog that runs"], ["a bird", "a cat", "a dog that runs"]):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        assert run(wan, out, "--captions", tmp_path / "prompts.txt") == 0
        data = Shards(out, 0)
        latents, text, found = data.batch(range(len(prompts)))
        assert sorted(found) == prompts and text.any()
        assert not data.has_videos and not latents.any() and latents.shape[1:] == (16, 3, 4, 6)
    assert distill(wan, tmp_path / "run", "--data", out, "--lambda-reg", 0, steps=1) == 0


def test_captions_may_hold_any_kind_of_line_break(tmp_path):
    (tmp_path / "a.csv").write_text('video,caption\nx.mp4,"one\ntwo\u2028three"\n')
    (tmp_path / "a.jsonl").write_text('{"video": "x.mp4", "caption": "one two\u2028three"}\n')
    for name in ("a.csv", "a.jsonl"):
        assert captions.read_captions(tmp_path / name) == {"x.mp4": "one two three"}


# --- every file is accounted for, and what has changed is encoded again ------------------------

KINDS = {  # what spoils a video, given its file, that of its caption and a short clip; the reason
    "no caption": lambda video, text, short: text.unlink(),
    "its caption's file is not a text file in UTF-8":
        lambda video, text, short: text.write_bytes(b"caf\xe9"),
    "its caption is among the excluded prompts":
        lambda video, text, short: text.write_text("A benchmark's prompt of six words!"),
    "a link that leads nowhere":
        lambda video, text, short: (video.unlink(), video.symlink_to("gone.mp4")),
    "cannot be read": lambda video, text, short: video.write_bytes(video.read_bytes()[:1000]),
    "too short": lambda video, text, short: shutil.copy(short, video),
}


def make_all_kinds(folder, short):
    """60 videos in a folder, of which 24 can be used, among other files and a link to itself.

    Returns {name: reason} of the others.
    """
    write_clips(folder, 4)
    write_clips(short, 1, frames=5)
    bad = {}
    for number in range(4, 60):
        video, text = folder / f"{number:02}.mp4", folder / f"{number:02}.txt"
        shutil.copy(folder / f"{number % 4:02}.mp4", video)
        text.write_text(f"clip {number:02}")
        if number >= 24:
            bad[video.name] = list(KINDS)[number % len(KINDS)]
            KINDS[bad[video.name]](video, text, short / "00.mp4")
    (folder / "04.txt").rename(folder / "04.TXT")
    iio.imwrite(folder / "05.mp4", np.zeros((40, 32, 48, 3), np.uint8), fps=16)
    (folder / "around").symlink_to(folder)
    (folder / "cover.png").touch()
    (folder / "README").touch()
    return bad | {"around": "a link to a folder that is read already"}


def test_the_summary_accounts_for_every_file_and_what_has_changed_is_encoded_again(
        wan, tmp_path, capsys, monkeypatch):
    clips, out = tmp_path / "clips", tmp_path / "out"
    bad = make_all_kinds(clips, tmp_path / "short")
    tried = {name for name, why in bad.items() if why in ("cannot be read", "too short")}
    (tmp_path / "bench.txt").write_text("a benchmark’s prompt of six words")
    reads, read = [], encode.read_video
    monkeypatch.setattr(encode, "read_video", lambda f, *size: reads.append(f.name)
                        or read(f, *size))

    def encode_all():
        reads.clear()
        capsys.readouterr()
        assert run(wan, out, "--videos", clips, "--shard-size", 8, "--exclude-prompts",
                   tmp_path / "bench.txt") == 0
        return capsys.readouterr().out

    said = encode_all()
    assert "bench.txt: 6 of 42 captions" in said and "24 encoded in 3 shards, 37 skipped" in said
    assert bad == {e["video"]: e["reason"].partition(":")[0]
                   for e in read_lines(out / "skipped.jsonl")}
    for why in KINDS:
        assert re.search(rf"skipped +6  {why}\n", said)
    # This one stands still, but too few frames are read to refuse it.
    assert re.search(r"warned +1  repeated frames\n", said)
    assert [e["video"] for e in read_lines(out / "warnings.jsonl")] == ["05.mp4"]
    for suffix, number in {r"\.png": 1, "no suffix": 1, r"\.txt": 6}.items():
        assert re.search(rf"no videos +{number}  {suffix}\n", said)

    before = {file: file.read_bytes() for file in out.glob("shard-*")}
    assert encode_all().splitlines()[-12:] == said.splitlines()[-12:]
    assert set(reads) == tried  # what is broken may have been mended
    assert {file: file.read_bytes() for file in out.glob("shard-*")} == before

    old, touched = rows(out), [file for file in before if "00.mp4" in
                               json.loads(checkpoint.read_metadata(file)["videos"])]
    again = set(json.loads(checkpoint.read_metadata(touched[0])["videos"])) - {"01.mp4"}
    assert {"00.mp4", "02.mp4", "04.mp4"} < again and len(touched) == 1
    shutil.copy(clips / "21.mp4", clips / "00.mp4")  # replaced
    (clips / "01.mp4").unlink()
    (clips / "04.TXT").write_text("clip 04, corrected")
    said, new = encode_all(), rows(out)
    assert "1 of 3 shards hold something that has changed" in said and set(reads) - tried == again
    assert new.keys() == old.keys() - {"01.mp4"} and new["04.mp4"][0] == "clip 04, corrected"
    assert not torch.equal(new["00.mp4"][1], old["00.mp4"][1])
    assert torch.equal(new["02.mp4"][1], old["02.mp4"][1])
    for file in before.keys() - set(touched):
        assert file.read_bytes() == before[file]
    assert len(Shards(out, 0).items) == 23


def test_an_interrupted_repair_goes_on_and_leaves_the_old_index_until_the_end(
        wan, tmp_path, monkeypatch):
    clips, out = tmp_path / "clips", tmp_path / "out"
    write_clips(clips, 4)
    flags = ["--videos", clips, "--shard-size", 2]
    assert run(wan, out, *flags) == 0
    index = (out / "index.json").read_bytes()
    (clips / "00.txt").write_text("corrected")
    monkeypatch.setattr(encode, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(wan, out, *flags)
    assert (out / "index.json").read_bytes() == index and len(Shards(out, 0).items) == 4
    monkeypatch.undo()
    assert run(wan, out, *flags) == 0
    assert rows(out)["00.mp4"][0] == "corrected" and len(Shards(out, 0).items) == 4


@pytest.mark.parametrize("frames, why", [
    (81, "2 of 2 videos are too short for 81 frames at 16 fps; --frames 73 would take 2"),
    (77, "--frames 77: 20 latent frames cannot be halved.*73 and 81"),
    (80, "73 and 81"), (83, "81 and 89"), (5, "2 latent frames cannot be halved.*1 and 9")])
def test_lengths_are_checked_before_any_model_is_loaded(frames, why, wan, tmp_path, capsys,
                                                        monkeypatch):
    monkeypatch.setattr(codec, "load_vae", None)
    monkeypatch.setattr(codec, "load_text_encoder", None)
    write_clips(tmp_path / "clips", 2, frames=80)
    line = complaint(capsys, run(wan, tmp_path / "out", "--videos", tmp_path / "clips",
                                 "--frames", frames))
    assert re.search(why, line)


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


def test_data_that_grew_or_cannot_be_halved_are_named(wan, tmp_path, capsys):
    clips, out = tmp_path / "clips", tmp_path / "out"
    write_clips(clips, 2)
    assert run(wan, out, "--videos", clips) == 0

    def go_on(steps):
        capsys.readouterr()
        assert distill(wan, tmp_path / "run", "--data", out, "--critic-updates", 1,
                       "--sample-every", 1000, steps=steps, batch_size=1) == 0
        return capsys.readouterr().out

    assert "changed" not in go_on(1)
    (clips / "00.txt").write_text("corrected")
    assert run(wan, out, "--videos", clips) == 0
    assert f"note: {out} has changed since this run began" in go_on(2)
    assert "changed" not in go_on(3)
    assert checkpoint.read_metadata(tmp_path / "run")["fps"] == "16"

    file = next(out.glob("shard-*"))
    tensors, header = load_file(file), checkpoint.read_metadata(file)
    for frames, why in ((2, "2 latent frames cannot be halved"), (1, "3 latent frames or more")):
        save_file(tensors | {"latents": tensors["latents"][:, :, :frames].contiguous()}, file,
                  header)
        index = json.loads((out / "index.json").read_text())
        index["latent_shape"][1] = frames
        (out / "index.json").write_text(json.dumps(index))
        code = train.main(["interpolator", "--data", str(out), "--out", str(tmp_path / "i"),
                           "--device", "cpu", "--steps", "1"])
        line = complaint(capsys, code)
        assert str(out) in line and why in line
        if frames == 2:
            line = complaint(capsys, distill(wan, tmp_path / "new", "--data", out))
            assert str(out) in line and why in line and "1 and 9" in line
    assert not (tmp_path / "new").exists()
