"""Promises about the code itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {  # what each layer may import of ours, besides itself
    "kernels": "",
    "adavid": "kernels",
    "tiny_wan": "",
    "runtime": "tiny_wan adavid kernels",
    "train": "runtime tiny_wan adavid kernels",
    "sample": "runtime tiny_wan adavid kernels",
    "tools": "train sample runtime tiny_wan adavid kernels",
    "experiments": "tools train sample runtime tiny_wan adavid kernels",
    "tests": "tools train sample runtime tiny_wan adavid kernels",
    "tests/experiments": "experiments tools train sample runtime tiny_wan adavid kernels",
}


def files_of(layer):
    """The Python files of a layer: one at the top, or those of a folder and its subfolders."""
    folder = ROOT / layer
    files = folder.rglob("*.py") if folder.is_dir() else [ROOT / f"{layer}.py"]
    return [file for file in files if file.exists() and (
        layer != "tests" or not file.is_relative_to(ROOT / "tests" / "experiments"))]


def imported(file):
    """The first names of the modules that a file imports. Relative imports stay in their layer."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_downward_and_nothing_needs_the_experiments(layer):
    if not files_of(layer):
        pytest.skip("the folder has been deleted, which breaks nothing")
    for file in files_of(layer):
        ours = {name for name in imported(file) if name in LAYERS}
        assert ours <= {layer.split("/")[0], *LAYERS[layer].split()}, file
