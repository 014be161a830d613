"""From prompts to files, and what a wrong command says."""

import shutil

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file, save

import sample
from adavid import FrameInterpolator
from runtime.media import file_names


def run(toy_folder, out, *args):
    return sample.main([*args, "--model", str(toy_folder), "--out", str(out), "--device", "cpu"])


def latents(out):
    return load_file(out / "latents.safetensors")["latents"]


def test_prompts_become_videos_and_a_contact_sheet(toy_folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a blue ball\n\na green ball moving up\n")
    assert run(toy_folder, tmp_path / "out", "a red ball", "--prompts-file", str(file)) == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["a blue ball-0.mp4", "a green ball moving up-0.mp4", "a red ball-0.mp4",
                     "contact_sheet.png"]
    assert iio.imread(tmp_path / "out" / "a red ball-0.mp4").shape == (9, 256, 256, 3)
    assert iio.imread(tmp_path / "out" / "contact_sheet.png").shape == (3 * 64, 9 * 64, 3)
    said = capsys.readouterr().out
    assert all(part in said for part in ("load: ", "denoise: ", "decode and write: "))


def test_a_seed_gives_the_same_video_in_any_batch(toy_folder, tmp_path):
    two = ["a red ball", "a blue ball", "--save-latents"]
    run(toy_folder, tmp_path / "a", *two)
    run(toy_folder, tmp_path / "b", *two, "--batch-size", "1")
    run(toy_folder, tmp_path / "c", "a blue ball", "--save-latents", "--seed", "1")
    a, b, c = (latents(tmp_path / name) for name in "abc")
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(a[1:], c, atol=1e-5, rtol=0)


def test_teacher_full_rate_and_decoupled_are_three_different_samplers(toy_folder, tmp_path):
    flags = {"teacher": ["--teacher", "--steps", "3"], "full": ["--full-rate"], "decoupled": []}
    results = []
    for name, extra in flags.items():
        assert run(toy_folder, tmp_path / name, "a red ball", "--save-latents", *extra) == 0
        results.append(latents(tmp_path / name))
    assert all(not torch.equal(results[i], results[i - 1]) for i in range(3))


def test_guidance_is_the_teachers_unless_it_is_given(toy_folder, tmp_path):
    teacher = ["a red ball", "--teacher", "--steps", "2", "--save-latents"]
    scales = {"a": [], "b": ["--guidance-scale", "5"], "c": ["--guidance-scale", "1"]}
    for name, extra in scales.items():
        run(toy_folder, tmp_path / name, *teacher, *extra)
    assert torch.equal(latents(tmp_path / "a"), latents(tmp_path / "b"))
    assert not torch.equal(latents(tmp_path / "a"), latents(tmp_path / "c"))


def test_file_names_are_the_prompts_and_never_collide(toy_folder, tmp_path):
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

    out = tmp_path / "out"  # as VBench wants them
    run(toy_folder, out, "a red ball", "a blue ball", "--videos-per-prompt", "3", "--seed", "5")
    assert sorted(p.name for p in out.glob("*.mp4")) == [
        f"a {colour} ball-{i}.mp4" for colour in ("blue", "red") for i in range(3)]


@pytest.mark.parametrize("args, says", [
    ([], "no prompts"),
    (["a purple ball"], "'purple'"),
    (["a red ball", "--steps", "x"], "x"),
    (["a red ball", "--teacher", "--steps", "0"], "steps"),
    (["--prompts-file", "missing.txt"], "missing.txt"),
])
def test_bad_input_gets_one_line(toy_folder, tmp_path, capsys, args, says):
    code = run(toy_folder, tmp_path / "out", *args)
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("content, says", [(b"\xff\xfe\x00bad", "UTF-8"), (b"\n \n", "no prompts")])
def test_a_bad_prompt_file_gets_one_line(toy_folder, tmp_path, capsys, content, says):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert run(toy_folder, tmp_path / "out", "--prompts-file", str(file)) == 2
    error = capsys.readouterr().err
    assert says in error and "prompts.txt" in error and error.count("\n") == 1


def test_a_damaged_interpolator_gets_one_line(toy_folder, tmp_path, capsys):
    model = shutil.copytree(toy_folder, tmp_path / "model")
    wide = {"enter.0.weight": torch.zeros(10_000, 24, 1, 1)}  # of which a network has 50 GB
    infinite = FrameInterpolator(12, width=8)
    torch.nn.init.constant_(infinite.leave[0].weight, torch.inf)
    for content in (b"", (model / "config.json").read_bytes(),
                    (model / "diffusion_pytorch_model.safetensors").read_bytes(), save(wide),
                    save(infinite.state_dict()), save(FrameInterpolator(16, width=8).state_dict())):
        (model / "interpolator.safetensors").write_bytes(content)
        assert run(model, tmp_path / "out", "a red ball") == 2
        error = capsys.readouterr().err
        assert "interpolator.safetensors" in error and error.count("\n") == 1
