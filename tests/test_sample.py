"""From prompts to files."""

import imageio.v3 as iio
import torch
from safetensors.torch import load_file

import sample
from runtime.media import file_names
from tests.helpers import complaint, read_lines


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
    assert iio.imread(tmp_path / "out" / "contact_sheet.png").shape == (3 * 64, 9 * 64, 3)


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
    assert read_lines(tmp_path / "out" / "captions.jsonl")[3] == {
        "video": "blue-1.mp4", "caption": "a blue ball moving up"}
    code = run(toy_folder, tmp_path / "out", "a red ball", *files)
    assert "prompts.txt: has 2 names for 3 prompts" in complaint(capsys, code)


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
