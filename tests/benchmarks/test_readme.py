"""The README's table is the report's, or the check fails."""

import dataclasses

import pytest

from benchmarks.readme_table import NO_REPORT, main, render_table
from mirror_runtime.errors import InputError


@pytest.fixture
def readme(report, save, tmp_path):
    save(report, tmp_path / "benchmarks" / "reports" / "a-day")
    file = tmp_path / "README.md"
    file.write_text(f"before\n<!-- benchmark: {NO_REPORT} -->\nold\n<!-- /benchmark -->\nafter\n")
    return file


def test_the_table_is_written_and_checked(readme, capsys):
    options = ["--readme", str(readme)]
    assert main(["--check", *options]) == 0
    assert "of no report yet" in capsys.readouterr().err
    assert main([str(readme.parent / "benchmarks/reports/a-day"), *options]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmark: benchmarks/reports/a-day -->\n100 texts (mean 15.0 tokens), m, ")
    assert text.endswith("<!-- /benchmark -->\nafter\n")
    assert "| **Mirror Runtime, openvino bf16** | bf16 | **2.11 x** | 78.00 |" in text
    assert "| st 5, torch | float32 | 1.00 x | 78.25 |" in text
    assert main(["--check", *options]) == 0
    readme.write_text(text.replace("**2.11 x**", "**2.12 x**"))
    assert main(["--check", *options]) == 1
    assert "is not that of benchmarks/reports/a-day" in capsys.readouterr().err


def test_what_cannot_be_written_is_named(report, readme, tmp_path, capsys):
    assert main(["--readme", str(readme)]) == 2
    assert main([str(tmp_path / "absent"), "--readme", str(readme)]) == 2
    bare = tmp_path / "bare.md"
    bare.write_text("no table\n")
    assert main(["--check", "--readme", str(bare)]) == 2
    assert "has no table" in capsys.readouterr().err
    with pytest.raises(InputError, match="has no peers"):
        render_table(dataclasses.replace(report, peers=()))
