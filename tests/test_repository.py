"""Promises about the code itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in ROOT.rglob("*.py")
         if not {".venv", "runs", "build"} & set(file.relative_to(ROOT).parts)}
PROGRAMS = ("train", "sample", "baselines")
BELOW = {  # what each layer may import, besides itself
    "kernels": set(),
    "tiny_wan": set(),
    "adavid": {"kernels"},
    "runtime": {"kernels", "tiny_wan", "adavid"},
    **dict.fromkeys(PROGRAMS, {"kernels", "tiny_wan", "adavid", "runtime"}),
    "tools": {"kernels", "tiny_wan", "adavid", "runtime", *PROGRAMS},
}


def layer(file):
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports(file):
    """What a file imports: lists of names, such as ["tools", "page", "write"]."""
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = [layer(file)] * node.level + (node.module or "").split(".")
            yield from ([*filter(None, module), alias.name] for alias in node.names)


def wrong_imports(name, is_wrong):
    """The imports of a layer that `is_wrong` complains about."""
    return [f"{file.relative_to(ROOT)} imports {'.'.join(names)}" for file in FILES
            if layer(file) == name for names in imports(file) if is_wrong(names)]


@pytest.mark.parametrize("name", BELOW)
def test_imports_run_downward(name):
    forbidden = BELOW.keys() - BELOW[name] - {name}
    assert wrong_imports(name, lambda names: names[0] in forbidden) == []


def test_commands_share_only_the_page_builder_and_the_counter_of_costs():
    assert not wrong_imports("tools", lambda names: names[0] == "tools"
                             and names[1] not in ("page", "costs"))


@pytest.mark.parametrize("name", BELOW)
def test_only_tests_replace_what_others_define(name):
    assert wrong_imports(name, lambda names: names[0] == "unittest") == []


def test_nothing_can_run_code_from_a_file():
    for file, tree in FILES.items():
        modules = {names[0] for names in imports(file)}
        assert not {"pickle", "dill", "shelve", "marshal"} & modules, file
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "os.system"), file
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("shell") != "True", file
                if name == "torch.load":
                    assert keywords.get("weights_only") == "True", file
