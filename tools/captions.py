"""The text that tools.encode reads: captions of videos, and prompts that they must not repeat."""

import csv
import io
import json
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from runtime.media import SUFFIXES
from sample import read_prompts
from tiny_wan import checkpoint

OTHER_NAMES = {  # that other trainers give to our two columns
    "video": ("file_name", "file_path", "video_path", "media_path", "filename", "path", "file"),
    "caption": ("text", "prompt", "cap", "prompt_en", "description")}

# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


def read_captions(file, folder=None):
    """{name of the video: caption} or, for a .txt, {prompt: prompt}. ValueError names a bad line.

    folder: that of the videos, within which their names are paths.
    """
    if file.suffix.lower() == ".txt":
        return {prompt: prompt for prompt in read_prompts(file)}
    reader = {".csv": csv_rows, ".jsonl": jsonl_rows, ".json": json_rows}.get(file.suffix.lower())
    if not reader:
        raise ValueError(f"{file}: captions are read from .jsonl, .json, .csv and .txt files only")
    captions = {}
    for place, row in reader(file, checkpoint.read_text(file, most=10**9)):
        check_row(f"{file}: {place}", row)
        name = relative_name(row["video"], folder or Path())
        if name in captions:
            raise ValueError(f"{file}: {place}: {name!r} occurs twice")
        captions[name] = " ".join(row["caption"].split())
    return captions


def csv_rows(file, text):
    """Yield a description of the place and the row, as a dict, of each row of a CSV file."""
    reader, start = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True), 1
    try:
        header = [name.strip() for name in next(reader, [])]
        check_row(f"{file}: line 1", dict.fromkeys(header, ""))
        start = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise ValueError(f"{file}: line {start}: {len(fields)} fields under {len(header)} "
                                 f"columns; put a caption that has commas in double quotes")
            if any(re.search(rf"\n[^\n,]*({'|'.join(map(re.escape, SUFFIXES))})\s*,", field, re.I)
                   for field in fields):
                raise ValueError(f"{file}: line {start}: a field holds the next lines as well; is "
                                 f"its closing quote missing?")
            if fields:
                yield f"line {start}", dict(zip(header, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}: line {start}: not valid CSV ({error}); is a closing quote "
                         f"missing?") from None


def jsonl_rows(file, text):
    # Not splitlines(), which also splits at characters inside captions, such as U+2028.
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield f"line {number}", parse_json(f"{file}: line {number}", line)


def json_rows(file, text):
    rows = parse_json(file, text)
    if not isinstance(rows, list):
        raise ValueError(f"{file}: must hold a list of objects")
    for number, row in enumerate(rows, start=1):
        yield f"entry {number}", row


def parse_json(place, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from None


def check_row(place, row):
    """ValueError unless a row has a video and a caption, both text."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {row!r:.60} is no object with a video and a caption")
    if missing := [key for key in OTHER_NAMES if key not in row]:
        there = ", ".join(map(repr, row)) or "nothing"
        renames = [f"{other!r} to {key!r}" for key in missing for other in OTHER_NAMES[key]
                   if other in row]
        raise ValueError(f"{place}: has {there:.200}, and must have 'video' and 'caption'"
                         + f"; rename {' and '.join(renames)}" * bool(renames))
    for key in OTHER_NAMES:
        if not isinstance(row[key], str):
            raise ValueError(f"{place}: its {key} is {row[key]!r:.60}, not text")


def relative_name(name, folder):
    """A video's name: its path within the folder, in the normal form of Unicode (NFC)."""
    path = Path(name.strip())
    for root in (folder.absolute(), folder.resolve()):
        if path.is_relative_to(root):
            path = path.relative_to(root)
    return unicodedata.normalize("NFC", path.as_posix())


# ---------------------------------------------------------------------------------------------
# Excluded prompts
# ---------------------------------------------------------------------------------------------

CHINESE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # and Japanese, which set no spaces either


class ExcludedPrompts:
    """The prompts of a benchmark; `caption in prompts` tells whether a caption repeats one.

    Only words count: no case, punctuation or quotes. A prompt of four words, or of six Chinese
    characters, must not be a part of a caption either.
    """

    def __init__(self, file=None):
        self.whole, self.starts = set(), defaultdict(list)
        for prompt in read_excluded(file) if file else ():
            words = words_of(prompt)
            self.whole.add(words)
            if len(words) >= (6 if re.search(f"[{CHINESE}]", prompt) else 4):
                self.starts[words[:4]].append(words)

    def __contains__(self, caption):
        words = words_of(caption)
        return words in self.whole or any(
            words[i:i + len(prompt)] == prompt
            for i in range(len(words) - 3) for prompt in self.starts.get(words[i:i + 4], ()))


def words_of(text):
    """The words of a text, in lower case; each Chinese character is one."""
    text = re.sub(r"(?<=\w)['’ʼ`](?=\w)", "", unicodedata.normalize("NFKC", text).casefold())
    return tuple(re.findall(rf"[{CHINESE}]|[^\W_{CHINESE}]+", text))


def read_excluded(file):
    """The prompts in a file of plain lines or in VBench's JSON. ValueError for other formats."""
    if file.suffix.lower() == ".json":
        rows = parse_json(file, checkpoint.read_text(file))
        prompts = [row.get("prompt_en", row.get("prompt")) if isinstance(row, dict) else row
                   for row in (rows if isinstance(rows, list) else [None])]
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError(f"{file}: must be a list of prompts, or of objects with a prompt_en "
                             f"as in VBench's")
        return prompts
    prompts = read_prompts(file)
    formats = {"CSV": file.suffix.lower() in (".csv", ".tsv"), "JSON": prompts[0][0] in "[{",
               "a numbered list": sum(map(bool, map(NUMBERED.match, prompts))) > len(prompts) / 2}
    for name, found in formats.items():
        if found:
            raise ValueError(f"{file}: seems to be {name}; --exclude-prompts takes a prompt on "
                             f"each line and nothing else, or VBench's .json")
    return prompts


NUMBERED = re.compile(r"\d+\s*[.):,\t]")
