"""The README's table matches the report, or the check fails."""

import re

import pytest

from benchmarks.readme_table import main, render_table
from mirror_runtime.errors import InputError
from tests.benchmarks.conftest import PEER


@pytest.fixture
def readme(report, save, tmp_path):
    save(report, tmp_path / "benchmarks" / "reports" / "a-day")
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- benchmark: none -->\nold\n<!-- /benchmark -->\nafter\n")
    return file


def test_the_table_is_written_and_checked(readme, capsys):
    options = ["--readme", str(readme)]
    assert main([str(readme.parent / "benchmarks/reports/a-day"), *options]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmark: benchmarks/reports/a-day -->\n100 texts (mean 15.0 tokens), m, ")
    assert text.endswith("<!-- /benchmark -->\nafter\n")
    assert "| **Mirror Runtime, openvino bf16** | bf16 | **2.11 x** | 78.00 | 0.999700 |" in text
    assert "| st 5, torch | float32 | 1.00 x | 78.25 | 0.999900 |" in text
    assert main(["--check", *options]) == 0
    readme.write_text(text.replace("**2.11 x**", "**2.12 x**"))
    assert main(["--check", *options]) == 1
    assert "differs from benchmarks/reports/a-day" in capsys.readouterr().err


def test_no_column_mixes_references_of_agreement_and_none_has_absolute_rates(report, change):
    without = change(report, "worst cosine to fp32", lambda one: None if one.party == PEER else one)
    assert "worst cosine" not in render_table(without)
    assert not {"200", "95", "200.0", "95.0"} & set(re.findall(r"\| ([\d.,]+) ", render_table(report)))


def test_what_cannot_be_written_is_named(report, change, readme, tmp_path, capsys):
    assert main(["--readme", str(readme)]) == 2
    assert main([str(tmp_path / "absent"), "--readme", str(readme)]) == 2
    bare = tmp_path / "bare.md"
    bare.write_text("no table\n")
    assert main(["--check", "--readme", str(bare)]) == 2
    assert "has no table" in capsys.readouterr().err
    with pytest.raises(InputError, match="has no peers"):
        render_table(change(report, "texts per second", lambda one: None if one.party == PEER else one))
