"""Promises about the code itself."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train", "sample", "baselines")
BELOW = {  # what each layer may import, besides itself
    "kernels": set(),
    "tiny_wan": set(),
    "adavid": {"kernels"},
    "runtime": {"kernels", "tiny_wan", "adavid"},
    **dict.fromkeys(PROGRAMS, {"kernels", "tiny_wan", "adavid", "runtime"}),
    "tools": {"kernels", "tiny_wan", "adavid", "runtime", *PROGRAMS},
}


def imports(file, layer):
    """What a file imports: lists of names, such as ["tools", "page", "write"]."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = [layer] * node.level + (node.module or "").split(".")
            yield from ([*filter(None, module), alias.name] for alias in node.names)


def test_imports_run_downward_and_commands_share_only_page_and_costs():
    for layer, below in BELOW.items():
        for file in [ROOT / f"{layer}.py", *(ROOT / layer).rglob("*.py")]:
            for first, *rest in imports(file, layer) if file.exists() else ():
                assert first in {layer} | below or first not in BELOW, (file, first)
                assert first != "tools" or rest[0] in ("page", "costs"), (file, rest)
