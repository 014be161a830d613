"""Train a step with random numbers in the flags: none may leave anything bad behind."""

from dataclasses import fields
from types import UnionType
from typing import Annotated, get_args, get_origin, get_type_hints

import train
from adavid import AVDConfig, limits_of
from runtime import cli
from runtime.checkpoints import list_checkpoints
from tests.helpers import read_lines
from tests.helpers import saved as newest
from tiny_wan import checkpoint

VALUES = ("nan", "inf", "-inf", "-1", "1e31", "1e308", "1e999", "65536", "1000000000000",
          str(2**63), "9" * 30, "x", "", "0x10", "1_0", "None", "True")
PLAUSIBLE = ("-0.0", "0", "0.5", "0.9", "1", "2", "1e-40", "1e-300", "1000", "1e6", "1e30")
LONG = {"steps", "batch_size", "accumulate", "critic_updates", "width", "score_prompts"}


def numbers(program):
    """The names of the fields that hold numbers, or tuples of them."""
    def is_number(kind):
        if get_origin(kind) in (tuple, UnionType, Annotated):
            return any(map(is_number, get_args(kind)))
        return kind in (int, float)

    hints = get_type_hints(program)
    return [field.name for field in fields(program) if is_number(hints[field.name])]


def without_limits(program):
    """The fields that hold numbers, but have no Limits in their type."""
    hints = get_type_hints(program, include_extras=True)
    return [name for name in numbers(program) if not limits_of(hints[name])]


def random_flags(rng):
    """A stage of train.py with one to three numbers that may be anything."""
    stage = rng.choice(["distill"] * 18 + ["interpolator"] * 2)
    program = {"distill": train.Distill, "interpolator": train.Interpolator}[stage]
    names = numbers(program) + numbers(AVDConfig) * (stage == "distill")
    flags, value = [], lambda: rng.choice(VALUES if rng.random() < 0.2 else PLAUSIBLE)
    for name in rng.sample(names, rng.randint(1, 3)):
        usual = getattr(AVDConfig, name, None)
        words = [value() for _ in (usual if isinstance(usual, tuple) else "1")]
        if rng.random() < 0.05:
            words.append("1")  # one too many
        if name in LONG and any(word.isdecimal() and int(word) > 2 for word in words):
            words = ["-1"]  # others would be accepted, and take hours
        flags += [cli.flag(name), *words]
    return [stage, *flags]


def try_numbers(rng, model, out):
    """Train one step with random numbers: the flags, the exit code, and what went wrong."""
    stage, *flags = random_flags(rng)
    usual = {"distill": ["--steps", 1, "--batch-size", 2, "--model", model],
             "interpolator": ["--steps", 1, "--batch-size", 2]}[stage]
    code = train.main([stage, *map(str, usual), *flags, "--device", "cpu", "--out", str(out)])
    problem = None
    if code not in (0, 2):
        problem = f"code {code}"
    tensors = newest(out) if list_checkpoints(out) else {}
    for file in out.glob("*.safetensors"):
        with checkpoint.open_weights(file) as weights:
            tensors |= {name: weights.get_tensor(name) for name in weights.keys()}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        problem = f"{bad[0]} is not finite"
    if code == 0 and all("skipped" in line for line in read_lines(out / "metrics.jsonl")):
        problem = "a success without an update"
    return [stage, *flags], code, problem
