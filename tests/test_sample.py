"""From prompts to files."""

import os
import shutil
from pathlib import Path

import imageio.v3 as iio
import torch
from safetensors.torch import load_file, save_file

import sample
from runtime.media import file_names, write_video
from tests.helpers import complaint, read_lines
from tiny_wan import ToyCodec, checkpoint
from tiny_wan.checkpoint import FILE


def run(toy_folder, out, *args):
    return sample.main([*args, "--model", str(toy_folder), "--out", str(out), "--device", "cpu"])


def latents(out):
    return load_file(out / "latents.safetensors")["latents"]


def test_prompts_become_videos_and_a_contact_sheet(toy_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a blue ball\n\na green ball moving up\n")
    assert run(toy_folder, tmp_path / "out", "a red ball", "--prompts-file", str(file)) == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["a blue ball-0.mp4", "a green ball moving up-0.mp4", "a red ball-0.mp4",
                     "captions.jsonl", "contact_sheet.png"]
    assert [line["caption"] for line in read_lines(tmp_path / "out" / "captions.jsonl")] == [
        "a red ball", "a blue ball", "a green ball moving up"]
    assert iio.imread(tmp_path / "out" / "a red ball-0.mp4").shape == (9, 256, 256, 3)
    assert iio.imread(tmp_path / "out" / "contact_sheet.png").shape == (3 * 128, 9 * 128, 3)


def test_a_seed_gives_the_same_video_in_any_batch(toy_folder, tmp_path):
    two = ["a red ball", "a blue ball", "--save-latents"]
    run(toy_folder, tmp_path / "a", *two)
    run(toy_folder, tmp_path / "b", *two, "--batch-size", "1")
    run(toy_folder, tmp_path / "c", "a blue ball", "--save-latents", "--seed", "1")
    a, b, c = (latents(tmp_path / name) for name in "abc")
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(a[1:], c, atol=1e-5, rtol=0)


def test_the_toy_has_no_vae_whose_dtype_would_matter(toy_folder, tmp_path):
    run(toy_folder, tmp_path / "a", "a red ball")
    assert run(toy_folder, tmp_path / "b", "a red ball", "--vae-dtype", "bfloat16") == 0
    a, b = (iio.imread(tmp_path / name / "contact_sheet.png") for name in "ab")
    assert (a == b).all()


def test_files_can_be_named_after_other_prompts(toy_folder, tmp_path, capsys):
    prompts, names = tmp_path / "extended.txt", tmp_path / "prompts.txt"
    prompts.write_text("a red ball moving left fast\na blue ball moving up\n")
    names.write_text("red\nblue\n")
    files = ["--prompts-file", str(prompts), "--names-file", str(names)]
    assert run(toy_folder, tmp_path / "out", *files, "--videos-per-prompt", "2") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.mp4")) == [
        "blue-0.mp4", "blue-1.mp4", "red-0.mp4", "red-1.mp4"]
    line = read_lines(tmp_path / "out" / "captions.jsonl")[3]
    assert line.pop("settings") and line == {
        "video": "blue-1.mp4", "caption": "a blue ball moving up", "seed": 3,
        "model": str(toy_folder.resolve())}
    code = run(toy_folder, tmp_path / "out", "a red ball", *files)
    assert "prompts.txt: has 2 names for 3 prompts" in complaint(capsys, code)


def test_a_run_is_not_mixed_with_another_in_a_folder(toy_folder, tmp_path, monkeypatch, capsys):
    first = ["a red ball", "a blue ball"]
    for _ in range(2):
        assert run(toy_folder, tmp_path / "out", *first) == 0
    other = shutil.copytree(toy_folder, tmp_path / "other")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for model, words in ((toy_folder, [*first, "--seed", "1"]), (other, first),
                         (toy_folder, first[:1]), (toy_folder, [*first, "a green ball"])):
        line = complaint(capsys, run(model, tmp_path / "out", *words))
        assert f"--out {tmp_path / 'out'}: holds videos of other prompts, another seed" in line
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before

    monkeypatch.chdir(tmp_path)
    for prompt, folder in zip(("red", "blue", "green", "red"), ("", "-2", "-3", "")):
        assert sample.main([f"a {prompt} ball", "--model", str(toy_folder), "--device", "cpu"]) == 0
        assert f"are in {Path(f'runs/samples{folder}')}\n" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_what_is_not_whole(toy_folder, tmp_path, monkeypatch, capsys):
    model, out, written = shutil.copytree(toy_folder, tmp_path / "toy"), tmp_path / "out", []
    words = ["a red ball", "a blue ball", "a green ball", "--batch-size", "1"]

    def write_two(path, *video):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write_video(path, *video)

    monkeypatch.setattr(sample, "write_video", write_two)
    assert run(model, out, *words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    os.truncate(out / "a red ball-0.mp4", 1000)
    written.clear()
    assert run(model, out, *words) == 0
    assert written == ["a red ball-0.mp4", "a green ball-0.mp4"]
    assert run(model, out, *words) == 0
    assert "3 of 3 videos are there already" in capsys.readouterr().out

    for flags in (["--full-rate"], ["--height", "32"], ["--teacher"], ["--fps", "9"]):
        assert "other settings" in complaint(capsys, run(model, out, *words, *flags))
    os.utime(model / FILE, (0, 0))  # as if it had been trained again
    assert "another model" in complaint(capsys, run(model, out, *words))


def test_the_frame_rate_travels_with_the_model(toy_folder, tmp_path, capsys):
    model = shutil.copytree(toy_folder, tmp_path / "model")
    file = model / FILE

    def rate(*flags):
        (tmp_path / "out" / "captions.jsonl").unlink(missing_ok=True)
        assert run(model, tmp_path / "out", "a red ball", *flags) == 0
        return iio.immeta(tmp_path / "out" / "a red ball-0.mp4")["fps"]

    assert rate() == ToyCodec.fps == 8
    tensors, header = load_file(file), checkpoint.read_metadata(file)
    save_file(tensors, file, header | {"fps": "24"})
    assert rate() == 24 and rate("--fps", "12") == 12
    for fps in ("0", "nan", "-8", "10000", ""):
        save_file(tensors, file, header | {"fps": fps})
        line = complaint(capsys, run(model, tmp_path / "out-2", "a red ball"))
        assert str(file) in line and f"fps in its metadata is {fps!r}" in line


def test_file_names_are_the_prompts_and_never_collide(tmp_path):
    prompts = ["A cat, running.", "a/../b: \"c\"?", "--help", "..", "", "x" * 500, "x" * 400,
               "🐈" * 100, "A cat, running.", "a CAT, running.", "two\nlines\0", "\udcff"]
    names = list(file_names(prompts))
    assert names[:5] == ["A cat, running.-0.mp4", "a_.._b_ _c__-0.mp4", "help-0.mp4",
                         "video-0.mp4", "video-1.mp4"]
    assert names[8:10] == ["A cat, running.-1.mp4", "a CAT, running.-2.mp4"]
    assert len({name.casefold() for name in names}) == len(prompts)
    for name in names:
        (tmp_path / name).touch()
        assert (tmp_path / name).parent == tmp_path and not name.startswith(("-", "."))
