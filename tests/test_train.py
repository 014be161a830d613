"""Training: what each stage ends in, resuming, and what stops a run or must not."""

import errno
import math
import os
import shlex
import signal
import time
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

import adavid
import train
from adavid import AVDConfig, FrameInterpolator
from runtime import checkpoints, pictures, run
from runtime.checkpoints import list_checkpoints
from runtime.models import load_config
from tests.helpers import (
    Program,
    complaint,
    distill,
    equal,
    read_lines,
    resumes_to_the_same_bits,
    saved,
)
from tiny_wan import checkpoint


def steps_of_checkpoints(out):
    return [int(folder.name) for folder in list_checkpoints(out)]


# --- the stages --------------------------------------------------------------------------------

def train_interpolator(out, *flags):
    return train.main(["interpolator", "--steps", "120", "--save-every", "60", "--batch-size", "8",
                       "--lr", "3e-3", *flags, "--device", "cpu", "--out", str(out)])


@pytest.fixture(scope="module")
def interpolator(tmp_path_factory):
    """A whole run of the interpolator's stage."""
    folder = tmp_path_factory.mktemp("interpolator")
    assert train_interpolator(folder) == 0
    return folder


def test_the_interpolator_learns_to_beat_the_plain_mean(interpolator):
    last = read_lines(interpolator / "metrics.jsonl")[-20:]
    assert sum(m["loss"] for m in last) < 0.9 * sum(m["plain_mean"] for m in last)
    FrameInterpolator(12, 32).load_state_dict(load_file(interpolator / "interpolator.safetensors"))


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
    if name == "strides":  # they serve sampling alone
        runs = [(out / "samples" / "000004.png").read_bytes() for out in (unchanged, tmp_path)]
        assert runs[0] != runs[1]
    else:
        assert not equal(saved(unchanged), saved(tmp_path))


# --- resuming ----------------------------------------------------------------------------------

def test_a_run_that_ctrl_c_interrupts_resumes_to_the_same_bits(toy_folder, tmp_path):
    """Ctrl-C in a real process, then the same command again."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ["--save-every", 1000, "--critic-updates", 1, "--sample-every", 1000]
    assert distill(toy_folder, whole, *flags, steps=24) == 0

    program = Program("train.py", "distill", "--model", toy_folder, "--batch-size", 2,
                      "--steps", 24, *flags, "--device", "cpu", "--out", broken)
    log = broken / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert program.process.is_alive()
        time.sleep(0.05)
    os.kill(program.process.pid, signal.SIGINT)
    result = program.wait()
    assert result.returncode == 130 and "resume" in result.stderr
    assert 4 <= read_lines(log)[-1]["step"] < 23

    assert distill(toy_folder, broken, *flags, steps=24) == 0
    assert equal(saved(whole), saved(broken))
    assert log.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_the_interpolators_stage_resumes_to_the_same_bits(interpolator, tmp_path, monkeypatch):
    assert resumes_to_the_same_bits(train_interpolator, interpolator, tmp_path, monkeypatch)


# --- checkpoints -------------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(toy_folder, tmp_path, capsys):
    flags, whole, out = ["--save-every", 1], tmp_path / "whole", tmp_path / "out"
    distill(toy_folder, whole, *flags, steps=3)
    distill(toy_folder, out, *flags, steps=2)
    newest, = list_checkpoints(out)[-1].glob("*.safetensors")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert distill(toy_folder, out, *flags, steps=3) == 0
    said, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert str(newest) in said and "000001" in said
    assert equal(saved(out), saved(whole))
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_the_last_checkpoints_and_every_nth_are_kept(toy_folder, tmp_path):
    distill(toy_folder, tmp_path, "--save-every", 1, "--keep", 2, "--keep-every", 3, "--lambda-reg",
            0, "--sample-every", 100, "--critic-updates", 0, steps=8)
    assert steps_of_checkpoints(tmp_path) == [3, 6, 7, 8]


def test_a_damaged_checkpoint_of_a_later_step_displaces_none(toy_folder, tmp_path):
    flags = ["--lambda-reg", 0, "--critic-updates", 0, "--sample-every", 100]
    distill(toy_folder, tmp_path, *flags, "--save-every", 2, steps=4)
    (list_checkpoints(tmp_path)[-1] / "state.json").unlink()
    assert distill(toy_folder, tmp_path, *flags, "--save-every", 1, steps=3) == 0
    assert steps_of_checkpoints(tmp_path) == [2, 3, 4]
    assert distill(toy_folder, tmp_path, *flags, steps=3) == 0


@pytest.mark.parametrize("place", ["fsync", "write_data"])
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(
        place, toy_folder, tmp_path, capsys, monkeypatch):
    distill(toy_folder, tmp_path, steps=1)
    before = saved(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr({"fsync": checkpoint, "write_data": checkpoints.HuggingFaceStorageWriter}[
            place], place, full)
        line = complaint(capsys, distill(toy_folder, tmp_path))
    assert "000002.part" in line and os.strerror(errno.ENOSPC) in line and "000001" in line
    assert equal(saved(tmp_path), before)
    assert not list((tmp_path / "checkpoints").glob("*.part"))
    assert distill(toy_folder, tmp_path) == 0


def test_a_folder_that_vanishes_is_not_made_again(toy_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    distill(toy_folder, out, steps=1)
    monkeypatch.setattr(pictures.Pictures, "write", lambda *_: out.rename(tmp_path / "gone") and {})
    assert str(out) in complaint(capsys, distill(toy_folder, out))
    assert not out.exists() and list_checkpoints(tmp_path / "gone")


# --- what stops a run, and what a run reports --------------------------------------------------

@pytest.mark.parametrize("signals, code", [
    ([signal.SIGINT], "130"), ([signal.SIGTERM] * 2, "143")])  # torchrun sends it twice
def test_a_signal_while_pictures_are_drawn_spoils_no_save(
        signals, code, toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "write_contact_sheet",
                        lambda *_: [*map(signal.raise_signal, signals)])
    with pytest.raises(SystemExit, match=code):
        distill(toy_folder, tmp_path, "--sample-every", 1, "--save-every", 100, steps=3)
    assert steps_of_checkpoints(tmp_path) == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("parsing", ["the model's numbers", "all flags"])
def test_ctrl_c_while_flags_are_parsed_ends_without_a_traceback(parsing, monkeypatch):
    calls, parse = iter([parsing == "all flags"]), train.tyro.cli

    def interrupted(*args, **options):
        if next(calls, False):
            return parse(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.tyro, "cli", interrupted)
    assert train.main(["distill", "--out", "unused"]) == 130


def test_a_loss_that_is_not_finite_is_named_and_logged_as_null(toy_folder, tmp_path, capsys):
    assert distill(toy_folder, tmp_path, "--lr", "1e30", "--save-every", 100, steps=6) == 2
    said, = (line for line in capsys.readouterr().out.splitlines()
             if line.startswith("step 3: skipped"))
    assert "dmd" in said and "student_grad_norm" in said
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["skipped"] == 1


@pytest.mark.parametrize("cause", ["learning rate", "critic"])
def test_a_run_that_diverges_keeps_a_good_checkpoint_and_says_how_to_go_on(
        cause, toy_folder, tmp_path, capsys, monkeypatch):
    def go_on():
        losses, calls = adavid.critic_loss, []
        with monkeypatch.context() as patch:
            if cause == "critic":  # fails from the second update on
                patch.setattr(adavid, "critic_loss", lambda *args: losses(*args) * (
                    math.nan if calls.append(0) or len(calls) > 1 else 1))
            return complaint(capsys, distill(
                toy_folder, tmp_path, *flags, *["--lr", "1e30"] * (cause == "learning rate"),
                steps=20))

    flags = "--save-every", 1, "--critic-updates", 1, "--sample-every", 100
    assert distill(toy_folder, tmp_path, *flags, steps=3) == 0
    for _ in range(2):
        line = go_on()  # through step 4, whose checkpoint no update follows
        assert "checkpoint 000003 is good" in line and "10 updates in a row" in line
        assert steps_of_checkpoints(tmp_path)[-1] == 3

    command = line.partition("with: python ")[2].replace("--steps 20", "--steps 5")
    assert train.main(shlex.split(command)[1:]) == 0
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path).values())


def test_a_run_without_any_update_is_no_success(toy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(adavid, "critic_loss", lambda *_: torch.tensor(math.nan,
                                                                       requires_grad=True))
    line = complaint(capsys, distill(toy_folder, tmp_path, "--save-every", 1, steps=2))
    assert "critic" in line and "no checkpoint is good" in line
    assert not list_checkpoints(tmp_path) and not list(tmp_path.glob("*.safetensors"))


def test_no_tensor_that_is_not_finite_is_saved(toy_folder, tmp_path, capsys, monkeypatch):
    assert distill(toy_folder, tmp_path, steps=1) == 0
    monkeypatch.setattr(adavid.LossMeanCache, "update", lambda self, *_: self.means.fill_(math.inf))
    line = complaint(capsys, distill(toy_folder, tmp_path, steps=2))
    assert "step 1: cache.means is not finite" in line and "000001 is good" in line
    assert steps_of_checkpoints(tmp_path) == [1]
    with pytest.raises(ValueError, match="bias.* is not finite"):
        checkpoint.write_files({tmp_path / "x.safetensors": {"bias": torch.tensor([math.nan])}})
    assert not list(tmp_path.glob("x*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_what_is_saved_has_the_users_permissions(toy_folder, tmp_path):
    before = os.umask(0o027)
    try:
        assert distill(toy_folder, tmp_path / "run", steps=1) == 0
        assert train_interpolator(tmp_path / "interpolator", "--steps", "2") == 0
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    # shutil.copy keeps the permissions of the interpolator that it copies beside the student.
    modes = {file: file.stat().st_mode & 0o777 for file in files}
    assert {mode for file, mode in modes.items() if "run/interp" not in str(file)} == {0o640}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_a_folder_has_one_run_at_a_time(toy_folder, tmp_path, capsys):
    with run.lock_folder(tmp_path):
        assert "another process" in complaint(capsys, distill(toy_folder, tmp_path, steps=1))
    assert distill(toy_folder, tmp_path, steps=1) == 0


def test_a_critic_update_that_was_skipped_is_not_hidden_by_the_next(
        toy_folder, tmp_path, capsys, monkeypatch):
    losses, calls = adavid.critic_loss, []
    monkeypatch.setattr(adavid, "critic_loss", lambda *args: losses(*args) * (
        math.nan if calls.append(0) or len(calls) == 2 else 1))
    assert distill(toy_folder, tmp_path, steps=2) == 0
    line, _ = read_lines(tmp_path / "metrics.jsonl")
    assert line["critic"] is None and line["skipped"] == 1 and line["dmd"] is not None
    assert "critic" in next(line for line in capsys.readouterr().out.splitlines()
                            if line.startswith("step 0: skipped"))


def test_a_run_whose_motion_falls_says_so(toy_folder, tmp_path, capsys, monkeypatch):
    means = run.all_reduce_mean
    monkeypatch.setattr(run, "all_reduce_mean", lambda metrics: means(metrics) | {
        "variance": 0.3, "data_variance": 1.0})
    flags = ["--critic-updates", 0, "--sample-every", 100]
    assert distill(toy_folder, tmp_path, *flags, steps=21, batch_size=1) == 0
    assert capsys.readouterr().out.count("30% of the data's") == 1
