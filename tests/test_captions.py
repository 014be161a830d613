"""Captions and excluded prompts as people have them: read as they are meant, or refused."""

import json
import re
import time
import unicodedata

import pytest

from tools.captions import ExcludedPrompts, read_captions, read_excluded

ONE = {"a.mp4": "A cat, on grass"}
FILES = {  # the file, its content, and its captions or what the error says
    "comma.csv": ("video,caption\na.mp4,A cat, on grass\n", "line 2: 3 fields under 2 columns"),
    "few.csv": ("video,caption\na.mp4,x\nb.mp4\n", "line 3: 1 fields under 2 columns"),
    "quoted.csv": ('video,caption\na.mp4,"A cat, on grass"\n', ONE),
    "space.csv": ('video, caption\na.mp4, "A cat, on grass"\n', ONE),
    "more.csv": ('id,video,caption\n\n7,a.mp4,"A cat, on\ngrass"\n', ONE),
    "UPPER.CSV": ('video,caption\na.mp4,"A cat, on grass"\n', ONE),
    "open.csv": ('video,caption\na.mp4,"A cat\nb.mp4,A dog\n', "line 2: not valid CSV"),
    "open-2.csv": ('video,caption\nb.mp4,x\na.mp4,"A cat\nb.mp4,A dog\nc.mp4,"A bird"\n', "line 3"),
    "open-3.csv": ('video,caption\na.mp4,"A cat\nb.mp4,A dog"\n', "line 2.*closing quote"),
    "inside.csv": ('video,caption\na.mp4,"A "big" cat"\n', "line 2: not valid CSV"),
    "semicolon.csv": ("video;caption\na.mp4;x\n", "line 1: has 'video;caption', and must have"),
    "no-rows.csv": ("file_name,text\n", "line 1.*'file_name' to 'video' and 'text' to 'caption'"),
    "keys.jsonl": ('{"file_path": "a.mp4", "cap": ["x"]}', "'file_path' to 'video' and 'cap' to"),
    "path.jsonl": ('\n{"video_path": "a.mp4", "caption": "x"}', "line 2.*'video_path' to 'video'$"),
    "list.jsonl": ('{"video": "a.mp4", "caption": ["x"]}', "line 1: its caption is \\['x'\\], not"),
    "null.jsonl": ('{"video": "a.mp4", "caption": null}', "line 1: its caption is None, not text"),
    "number.jsonl": ('{"video": 7, "caption": "x"}', "line 1: its video is 7, not text"),
    "row.jsonl": ('"a.mp4"', "line 1: 'a.mp4' is no object"),
    "damaged.jsonl": ('{"video": "a.mp4", "caption": "x"}\n{"video', "line 2: not valid JSON"),
    "twice.jsonl": ('{"video": "a.mp4", "caption": "x"}\n' * 2, "line 2: 'a.mp4' occurs twice"),
    "same.jsonl": ('{"video": "a.mp4", "caption": "x"}\n{"video": "./a.mp4", "caption": "y"}',
                   "line 2: 'a.mp4' occurs twice"),
    "absolute.jsonl": ('{"video": "FOLDER/a.mp4", "caption": "A cat, on grass"}', ONE),
    "list.json": ('[{"video": "a.mp4",\n "caption": "A cat, on grass"}]', ONE),
    "object.json": ('{"a.mp4": "A cat"}', "must hold a list"),
    "latin.csv": ("video,caption\na.mp4,caf\udce9\n", "not a text file in UTF-8"),
    "table.tsv": ("video\tcaption\na.mp4\tx\n", "read from .jsonl, .json, .csv and .txt"),
    "decomposed.jsonl": (f'{{"video": "{unicodedata.normalize("NFD", "é.mp4")}", "caption": "x"}}',
                         {unicodedata.normalize("NFC", "é.mp4"): "x"}),
}


@pytest.mark.parametrize("name", FILES)
def test_captions_are_read_as_they_are_meant_or_refused_by_line(name, tmp_path):
    content, wanted = FILES[name]
    file = tmp_path / name
    file.write_text(content.replace("FOLDER", str(tmp_path)), "utf-8", errors="surrogateescape")
    if isinstance(wanted, dict):
        assert read_captions(file, tmp_path) == wanted
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: .*{wanted}"):
            read_captions(file, tmp_path)


PROMPTS = ["In a still frame, a stop sign", "a person's hand holding a cup of tea", "bird",
           "A cat waiting for treats, happy and humorous", "雪山上空飞翔的一只鸟"]


@pytest.mark.parametrize("caption, found", [
    ("in a still frame a stop sign", True), ("In a still frame - a stop sign!", True),
    ("A persons hand holding a cup of tea", True), ("A person’s hand holding a “cup” of tea", True),
    ("Bird.", True), ("Two birds", False),
    ("a cat waiting for treats happy and humorous, in the evening", True), ("a bird", False),
    ("高清视频，雪山上空飞翔的一只鸟，慢镜头", True), ("一只鸟", False), ("ＢＩＲＤ", True),
    ("a cat waiting for treats, happy", False), ("in a still frame, a stop signal", False)])
def test_prompts_are_compared_by_words(caption, found, tmp_path):
    (tmp_path / "plain.txt").write_text("\n".join(PROMPTS), "utf-8")
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(
        [{"prompt_en": prompt, "dimension": ["x"]} for prompt in PROMPTS]), "utf-8")
    for file in tmp_path.iterdir():
        assert (caption in ExcludedPrompts(file)) == found


@pytest.mark.parametrize("name, content, why", [
    ("a.csv", "id,prompt\n0,a cat\n", "seems to be CSV"),
    ("a.jsonl", '{"prompt": "a cat"}\n', "seems to be JSON"),
    ("a.txt", '["a cat"]', "seems to be JSON"),
    ("b.txt", "1. a cat\n2. a dog\n", "seems to be a numbered list"),
    ("a.json", '{"a cat": 1}', "must be a list"), ("b.json", '[{"text": "a cat"}]', "must be"),
    ("c.json", "[]", "must be a list"), ("d.json", "[", "not valid JSON")])
def test_a_list_of_prompts_that_is_not_understood_is_refused(name, content, why, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: .*{why}"):
        read_excluded(tmp_path / name)


def test_many_captions_are_compared_with_many_prompts_in_seconds(tmp_path):
    words = [f"word{i}" for i in range(200)]
    lines = [" ".join(words[i * k * k % 199] for k in range(1, 13)) for i in range(1, 1001)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    prompts, start = ExcludedPrompts(tmp_path / "prompts.txt"), time.perf_counter()
    found = sum(f"a shot of {' '.join(words[(7 * i - k) % 200] for k in range(60))}, then "
                f"{lines[i % 1000] if i % 10 == 0 else ''}" in prompts for i in range(10_000))
    assert found == 1000 and time.perf_counter() - start < 3  # a tenth of a data set
