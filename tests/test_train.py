"""Training to the end, resuming, and what a wrong command says."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adavid
import train
from adavid import AVDConfig, FrameInterpolator
from runtime import checkpoints, pictures, run
from runtime.checkpoints import list_checkpoints
from runtime.models import load_config
from tiny_wan import WanModel, checkpoint

ROOT = Path(train.__file__).parent


def distill(toy_folder, out, *flags, steps=2):
    return train.main(["distill", "--model", str(toy_folder), "--out", str(out), "--steps",
                       str(steps), "--batch-size", "2", "--device", "cpu", *map(str, flags)])


def checkpoint_file(out):
    """The one file of a run's newest checkpoint."""
    file, = list_checkpoints(out)[-1].glob("*.safetensors")
    return file


def tensors(out):
    return load_file(checkpoint_file(out))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def complaint(capsys, code):
    """What a refused command said: one line (after any progress bar), and code 2."""
    *_, last = error = capsys.readouterr().err.splitlines()
    assert code == 2 and last.startswith("error: "), error
    assert sum("error" in line.lower() for line in error) == 1 and "Traceback" not in str(error)
    return last


# --- the stages --------------------------------------------------------------------------------

def test_teacher_stage_ends_in_a_model_that_loads(tmp_path):
    assert train.main(["teacher", "--out", str(tmp_path), "--steps", "3", "--batch-size", "4",
                       "--device", "cpu", "--score-prompts", "2"]) == 0
    model = WanModel.from_pretrained(tmp_path)
    assert model.head.head.weight.dtype == torch.float16
    metadata = checkpoint.read_metadata(tmp_path)
    assert {"avd", "seed", "minutes", "scores"} <= metadata.keys()
    config = load_config(tmp_path)
    assert config.lr == 2e-4 and 2 < config.temporal_truncation < 3 and config.k == 3.0
    assert (tmp_path / "samples" / "000003.png").exists()


def test_interpolator_stage_learns_to_beat_the_plain_mean(tmp_path):
    assert train.main(["interpolator", "--out", str(tmp_path), "--steps", "120", "--batch-size",
                       "8", "--lr", "3e-3", "--device", "cpu"]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines[-20:]]
    assert sum(m["loss"] for m in last) < 0.9 * sum(m["plain_mean"] for m in last)
    FrameInterpolator.from_pretrained(tmp_path / "interpolator.safetensors")


def test_distill_trains_student_and_critic_and_logs_what_health_needs(toy_folder, tmp_path):
    assert distill(toy_folder, tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert {"loss", "dmd", "reg", "temp", "weight", "critic", "variance", "data_variance",
            "student_grad_norm", "critic_grad_norm", "cache_1000", "cache_522"} <= lines[-1].keys()
    assert not any("seconds" in line for line in lines)
    assert len((tmp_path / "times.jsonl").read_text().splitlines()) == 2
    teacher, state = WanModel.from_pretrained(toy_folder).state_dict(), tensors(tmp_path)
    for model in ("student", "critic"):
        assert any(not torch.equal(state[f"{model}.{name}"], p) for name, p in teacher.items())
    assert load_config(tmp_path) == load_config(toy_folder)
    assert (tmp_path / "interpolator.safetensors").exists()


CHANGES = {
    "timesteps": (1000, 800, 600, 400), "strides": (1, 1, 1, 1), "train_strides": (2, 2, 2, 2),
    "guidance_scale": 1.0, "shift": 1.0, "t_range": (400, 500), "lambda_reg": 1.0, "k": 30.0,
    "ema_decay": 0.1, "lambda_temp": 1.0, "temporal_eps": 1.0, "temporal_truncation": 100.0,
    "critic_updates": 1, "lr": 1e-2, "critic_lr": 1e-2, "betas": (0.5, 0.5), "weight_decay": 0.5,
    "grad_clip": 1e-8}


@pytest.fixture(scope="module")
def unchanged(toy_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("unchanged")
    distill(toy_folder, out, steps=4)
    return out


@pytest.mark.parametrize("name", [field.name for field in fields(AVDConfig)])
def test_every_number_of_the_method_changes_behaviour(name, toy_folder, unchanged, tmp_path):
    value = CHANGES[name]
    values = value if isinstance(value, tuple) else (value,)
    distill(toy_folder, tmp_path, "--" + name.replace("_", "-"), *values, steps=4)
    assert getattr(load_config(tmp_path), name) == value
    if name == "strides":  # sampling's alone
        runs = [(out / "samples" / "000004.png").read_bytes() for out in (unchanged, tmp_path)]
        assert runs[0] != runs[1]
    else:
        assert not equal(tensors(unchanged), tensors(tmp_path))


# --- resuming ----------------------------------------------------------------------------------

def test_an_interrupted_run_ends_with_the_weights_of_an_unbroken_one(toy_folder, tmp_path):
    """Ctrl-C in a real process, then the same command again."""
    command = [sys.executable, "train.py", "distill", "--model", str(toy_folder), "--batch-size",
               "2", "--steps", "40", "--save-every", "1000", "--device", "cpu", "--out"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, env=env, check=True)

    broken = tmp_path / "broken"
    process = subprocess.Popen([*command, str(broken)], cwd=ROOT, env=env, stderr=subprocess.PIPE)
    log = broken / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1].decode()
    assert process.returncode == 130 and "run the same command to resume" in error
    assert 5 <= int(json.loads(log.read_text().splitlines()[-1])["step"]) < 39

    subprocess.run([*command, str(broken)], cwd=ROOT, env=env, check=True)
    assert equal(tensors(tmp_path / "whole"), tensors(broken))
    assert log.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stage", ["teacher", "interpolator"])
def test_the_other_stages_resume_exactly_too(stage, tmp_path, monkeypatch):
    command = [stage, "--steps", "4", "--batch-size", "2", "--save-every", "2", "--device", "cpu",
           *["--score-prompts", "1"] * (stage == "teacher")]
    assert train.main([*command, "--out", str(tmp_path / "whole")]) == 0

    save = checkpoints.Checkpointer.save

    def save_and_die(self, state, step):
        save(self, state, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpointer, "save", save_and_die)
    assert train.main([*command, "--out", str(tmp_path / "broken")]) == 130
    monkeypatch.undo()
    assert train.main([*command, "--out", str(tmp_path / "broken")]) == 0
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "broken"))


def test_metrics_after_the_last_checkpoint_are_written_once(toy_folder, tmp_path):
    distill(toy_folder, tmp_path, steps=2)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2}\n')
    assert distill(toy_folder, tmp_path, steps=2) == 0
    assert (tmp_path / "metrics.jsonl").read_text() == whole


# --- bad input ---------------------------------------------------------------------------------

def test_a_bad_flag_gets_one_line(capsys):
    assert "--kk" in complaint(capsys, train.main(["distill", "--out", "x", "--kk", "3"]))
    assert "abc" in complaint(capsys, train.main(["distill", "--out", "x", "--k", "abc"]))
    assert "--out" in complaint(capsys, train.main(["distill"]))
    assert "teacher" in complaint(capsys, train.main(["distil"]))
    assert "strides" in complaint(
        capsys, train.main(["distill", "--out", "x", "--strides", "1", "2", "1", "1"]))
    if not torch.cuda.is_available():
        assert "cuda" in complaint(
            capsys, train.main(["interpolator", "--out", "x", "--device", "cuda"]))


def test_a_missing_or_damaged_teacher_gets_one_line(toy_folder, tmp_path, capsys):
    assert "nowhere" in complaint(capsys, distill(tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"not a model")
    assert "safetensors" in complaint(capsys, distill(tmp_path, tmp_path / "out"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(toy_folder, tmp_path, capsys):
    flags = ["--save-every", 1, "--sample-every", 100]
    distill(toy_folder, tmp_path / "whole", *flags, steps=3)
    distill(toy_folder, tmp_path, *flags, steps=2)
    newest = checkpoint_file(tmp_path)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert distill(toy_folder, tmp_path, *flags, steps=3) == 0
    said, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert f"{newest}: damaged" in said and said.endswith("going on from checkpoint 000001")
    assert equal(tensors(tmp_path), tensors(tmp_path / "whole"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("damage", [
    lambda folder: next(folder.glob("*.safetensors")).unlink(),
    lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"short"),
    lambda folder: (folder / "state.json").write_text("{"),
    lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 1', '"step": 0')),
    lambda folder: (folder / "checksums-0.json").write_text("[1, 2]"),
    lambda folder: (folder / "checksums-0.json").write_text('{"../../metrics.jsonl": "0"}'),
    lambda folder: (folder / "checksums-0.json").unlink()])
def test_where_no_checkpoint_is_whole_they_are_named_and_stay(damage, toy_folder, tmp_path, capsys):
    distill(toy_folder, tmp_path, steps=1)
    damage(folder := list_checkpoints(tmp_path)[-1])
    line = complaint(capsys, distill(toy_folder, tmp_path, steps=1))
    assert line.startswith(f"error: {folder}") and "delete them to start anew" in line
    assert folder.exists()


def test_the_last_checkpoints_and_every_nth_are_kept(toy_folder, tmp_path):
    distill(toy_folder, tmp_path, "--save-every", 1, "--keep", 2, "--keep-every", 3, "--lambda-reg",
            0, "--sample-every", 100, "--critic-updates", 0, steps=8)
    assert [int(f.name) for f in list_checkpoints(tmp_path)] == [3, 6, 7, 8]


def test_a_damaged_checkpoint_of_a_later_step_pushes_none_out(toy_folder, tmp_path):
    flags = ["--keep", 1, "--lambda-reg", 0, "--critic-updates", 0, "--sample-every", 100]
    distill(toy_folder, tmp_path, *flags, "--keep-every", 1, "--save-every", 2, steps=4)
    (list_checkpoints(tmp_path)[-1] / "state.json").unlink()
    assert distill(toy_folder, tmp_path, *flags, "--save-every", 1, steps=3) == 0
    assert [int(f.name) for f in list_checkpoints(tmp_path)] == [3, 4]
    assert distill(toy_folder, tmp_path, *flags, steps=3) == 0


def test_a_disk_that_is_full_is_named_and_the_last_checkpoint_stays(
        toy_folder, tmp_path, capsys, monkeypatch):
    distill(toy_folder, tmp_path / "out", steps=1)
    before = tensors(tmp_path / "out")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in ("fsync", "sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, broken, full if broken == "fsync" else checkpoints.sha256)
            if broken == "sha256":  # in the middle of a file
                patch.setattr(checkpoints.HuggingFaceStorageWriter, "write_data", full)
            line = complaint(capsys, distill(toy_folder, tmp_path / "out", steps=2))
        assert "No space left on device" in line and "checkpoint 000001 is untouched" in line
        assert equal(tensors(tmp_path / "out"), before)
        assert not list((tmp_path / "out" / "checkpoints").glob("*.part"))
    assert distill(toy_folder, tmp_path / "out", steps=2) == 0


def test_a_folder_that_vanishes_is_not_made_again(toy_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    distill(toy_folder, out, steps=1)
    monkeypatch.setattr(pictures.Pictures, "write", lambda *_: out.rename(tmp_path / "gone") and {})
    assert str(out) in complaint(capsys, distill(toy_folder, out, steps=2))
    assert not out.exists() and list_checkpoints(tmp_path / "gone")


def test_a_distillation_may_go_on_longer_and_never_into_its_teachers_folder(
        toy_folder, tmp_path, capsys):
    distill(toy_folder, tmp_path, steps=1)
    assert distill(toy_folder, tmp_path, steps=2) == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert "teacher's own folder" in complaint(capsys, distill(toy_folder, toy_folder))


def test_ctrl_c_while_pictures_are_drawn_is_saved_too(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "write_contact_sheet",
                        lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        distill(toy_folder, tmp_path, "--sample-every", 1, "--save-every", 100, steps=3)
    assert checkpoint_file(tmp_path).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_sigterm_as_torchrun_sends_one_spoils_no_save(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "write_contact_sheet", lambda *_: [
        signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGTERM)])
    with pytest.raises(SystemExit, match="143"):
        distill(toy_folder, tmp_path, "--sample-every", 1, steps=3)
    assert [int(f.name) for f in list_checkpoints(tmp_path)] == [1]


def test_numbers_that_make_no_sense_are_named_with_their_file(toy_folder, tmp_path, capsys):
    model = WanModel.from_pretrained(toy_folder)
    for i, numbers in enumerate(('{"foo": 1}', "[1]", "{bad", '{"k": -3}', '{"lr": "x"}',
                                 '{"timesteps": []}', '{"betas": [0.9]}', "[" * 100_000)):
        model.save_pretrained(tmp_path / str(i), metadata={"avd": numbers})
        code = distill(tmp_path / str(i), tmp_path / "out")
        file = tmp_path / str(i) / "diffusion_pytorch_model.safetensors"
        assert f"{file}: the method's numbers" in complaint(capsys, code)


def test_other_flags_do_not_resume_a_run(toy_folder, tmp_path, capsys):
    distill(toy_folder, tmp_path, steps=1)
    code = distill(toy_folder, tmp_path, "--k", 7, steps=1)
    assert "k was 3.0, now 7.0" in complaint(capsys, code)


def test_an_output_folder_that_is_a_file_gets_one_line(toy_folder, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert "out" in complaint(capsys, distill(toy_folder, tmp_path / "out"))


def test_a_loss_that_is_not_finite_stops_the_run_and_says_so(toy_folder, tmp_path, capsys):
    code = distill(toy_folder, tmp_path, "--lr", "1e30", steps=20)
    error = capsys.readouterr()
    last = error.err.splitlines()[-1]
    assert code == 2 and "10 updates in a row" in last and "not finite" in last
    said, = (line for line in error.out.splitlines() if line.startswith("step 3: skipped"))
    assert "dmd" in said and "student_grad_norm" in said
    log = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in log and json.loads(log.splitlines()[-1])["skipped"] == 1


def test_a_critic_update_that_was_skipped_is_not_hidden_by_the_next(
        toy_folder, tmp_path, capsys, monkeypatch):
    losses, calls = adavid.critic_loss, []
    monkeypatch.setattr(adavid, "critic_loss", lambda *args: losses(*args) * (
        math.nan if calls.append(0) or len(calls) == 2 else 1))
    assert distill(toy_folder, tmp_path, steps=1) == 0
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["critic"] is None and line["skipped"] == 1 and line["dmd"] is not None
    assert "critic" in next(line for line in capsys.readouterr().out.splitlines()
                            if line.startswith("step 0: skipped"))


def test_a_log_that_is_damaged_is_named(toy_folder, tmp_path, capsys):
    for log in ("metrics.jsonl", "times.jsonl"):
        out = tmp_path / log
        distill(toy_folder, out, steps=1)
        (out / log).write_bytes(b"\x00\n")
        assert str(out / log) in complaint(capsys, distill(toy_folder, out, steps=1))


def test_help_explains_every_flag(capsys):
    for stage in ("teacher", "interpolator", "distill"):
        assert train.main([stage, "--help"]) == 0
        assert "resume" in capsys.readouterr().out


@pytest.mark.parametrize("flags, says", [
    (["--accumulate", "0"], "--accumulate 0"), (["--ema", "2"], "--ema 2"),
    (["--lora", "-4"], "--lora -4")])
def test_flags_out_of_range_get_one_line(flags, says, toy_folder, tmp_path, capsys):
    run = ["distill", "--model", str(toy_folder), "--out", str(tmp_path / "x"), "--device", "cpu"]
    assert says in complaint(capsys, train.main([*run, *flags]))


def test_a_model_of_another_world_is_named_before_anything_is_loaded(toy_folder, tmp_path, capsys):
    from tests import miniature_wan

    miniature_wan.transformer().save_pretrained(tmp_path / "wan")
    line = complaint(capsys, train.main(["distill", "--model", str(tmp_path / "wan"), "--out",
                                         str(tmp_path / "x"), "--device", "cpu"]))
    assert "the toy world has 12 channels" in line and "takes 16" in line


def test_a_run_whose_motion_falls_says_so(toy_folder, tmp_path, capsys, monkeypatch):
    means = run.all_reduce_mean
    monkeypatch.setattr(run, "all_reduce_mean", lambda metrics: means(metrics) | {
        "variance": 0.3, "data_variance": 1.0})
    assert train.main(["distill", "--model", str(toy_folder), "--out", str(tmp_path / "x"),
                       "--device", "cpu", "--steps", "21", "--batch-size", "1",
                       "--critic-updates", "0"]) == 0
    assert capsys.readouterr().out.count("motion has fallen to 30% of the data's") == 1


def test_tensorboard_that_is_not_installed_is_named_with_its_own_package(
        toy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    line = complaint(capsys, train.main([
        "distill", "--model", str(toy_folder), "--out", str(tmp_path / "x"), "--device", "cpu",
        "--tensorboard"]))
    assert line.endswith("pip install tensorboard")
