"""The command that measures the toy world for docs/world.md."""

from functools import partial

from experiments import world as tool


def test_the_command_measures_oracle_teacher_and_hardness(
        toy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "hardness", partial(tool.hardness, count=64))
    copy = tmp_path / "page.md"
    copy.write_text(tool.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    assert tool.main(["--model", str(toy_folder), "--prompts", "8", "--steps", "2", "--page",
                      str(copy), "--device", "cpu"]) == 0
    (device, _, said), text = capsys.readouterr().out.partition("\n"), copy.read_text("utf-8")
    assert device.startswith("device: cpu, float32")
    tables = [table.splitlines() for table in said.strip().split("\n\n")]
    assert all("\n".join(table) in text for table in tables)
    (_, _, real, noise, blends, teacher), (_, _, *timesteps) = tables
    assert "| 1.000 (1.000 to 1.000) | 1.000 (1.000 to 1.000) | 0.000" in real
    assert all("| 0.000 (0.000 to 0.000) | 0.000 (0.000 to 0.000) |" in row
               for row in (noise, blends, teacher))
    assert [row.split()[1] for row in timesteps] == ["1000", "900", "757", "522"]
