"""Bad files and bad flags end in one line that names them, and change nothing."""

import sys
from pathlib import Path

import pytest

from tests.bad_input import BAD_INPUT, READERS, Reader
from tests.helpers import complaint

CASES = [pytest.param(reader, breaks, names.split(), id=f"{reader}: {names}"[:80])
         for reader, cases in BAD_INPUT.items() for names, *breaks in cases]


def contents():
    """All files of the working folder that are not empty."""
    files = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    return {file: content for file, content in files.items() if content}


@pytest.mark.parametrize("reader, breaks, names", CASES)
def test_one_line_names_what_is_wrong_and_no_file_changes(
        reader, breaks, names, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = READERS[reader].prepare(inputs, tmp_path)
    for change in breaks:
        if isinstance(change, str):
            arguments += Reader.arguments(change, inputs)
        else:
            change()
    before = contents()
    capsys.readouterr()
    line = complaint(capsys, READERS[reader].program(arguments))
    assert all(name in line for name in names), line
    assert contents() == before


@pytest.mark.parametrize("reader", [name for name in READERS if READERS[name].reads])
def test_the_same_input_is_accepted_when_nothing_is_wrong(reader, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert READERS[reader].program(READERS[reader].prepare(inputs, tmp_path)) == 0


def test_a_package_that_is_not_installed_is_named(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    reader = READERS["sample original"]
    line = complaint(capsys, reader.program(reader.prepare(inputs, tmp_path)))
    assert "ftfy" in line and "[wan]" in line
