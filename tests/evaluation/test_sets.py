"""Evaluation sets in the layouts in which they are published."""

from pathlib import Path

import pytest

from evaluation.sets import read_sets, read_texts
from mirror_runtime.errors import InputError

GENRE = "main-captions\tMSRvid\t2012test\t"


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("sts.tsv", "subset\tscore\tsentence1\tsentence2\nx\t{}\tA\tB\n", "A"),
        ("glue.tsv", "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tA\tB\t{}\n", "A"),
        ("SICK_test_annotated.txt", "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tj\n6\tA\tB\t{}\tX\n", "A"),
        ("SimLex-999.txt", "word1\tword2\tPOS\tSimLex999\tconc(w1)\nA\tB\tA\t{}\t2.7\n", "A"),
        ("combined.csv", "Word 1,Word 2,Human (mean)\nA,B,{}\n", "A"),
        ("comma.csv", 'sentence1,sentence2,score\n"A, quoted",B,{}\n', "A, quoted"),
        ("sts-test.csv", GENRE + '0001\t{}\tA "half quote\tB\n', 'A "half quote'),
        ("sts-test9.csv", GENRE + "0001\t{}\tA\tB\tlicence\tmore\n", "A"),
        ("2012.test.tsv", "{}\tA\tB\n", "A"),
        ("rg-65.txt", "A\tB\t{}\n", "A"),
        ("rg65.csv", "A;B;{}\n", "A"),
        ("MEN.txt", "A B {}\n", "A"),
        ("SimVerb.txt", "A\tB\tV\t{}\tSYNONYMS\n", "A"),
        ("ENG-SimLex.csv", "Word 1,Word 2,Annotator 1,Annotator 2\nA,B,{},\n", "A"),
        ("windows.tsv", "\ufeffscore\tsentence1\tsentence2\r\n{}\tA\tB\r\n", "A"),
    ],
)
def test_published_layouts(tmp_path: Path, name: str, content: str, first: str) -> None:
    lines = content.splitlines(keepends=True)
    row = lines.pop()
    path = tmp_path / name
    rows = [row.format(score) for score in (4.5, 0, 2)]
    path.write_text("".join((*lines, *rows, "\n")), encoding="utf-8", newline="")
    (found,) = read_sets(str(path))
    assert found.name == path.stem
    assert (found.first, found.second) == ((first,) * 3, ("B",) * 3)
    assert found.scores.tolist() == [4.5, 0, 2]
    assert read_texts(str(path))[:1] == ([first] if "\t" in content or ".csv" in name else ["A B 4.5"])


def test_annotators_are_averaged_and_of_a_file_with_parts_only_the_test_part_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("Word 1,Word 2,Annotator 1,Annotator 2\na,b,1,2\nc,d,3,\ne,f,5,5\n")
    assert read_sets(str(path))[0].scores.tolist() == [1.5, 3, 5]
    path = tmp_path / "SICK.txt"
    head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tSemEval_set\n"
    rows = [f"{i}\tA{i}\tB\t{i}\t{'TRAIN' if i < 4 else 'TEST'}\n" for i in range(1, 8)]
    path.write_text(head + "".join(rows))
    assert read_sets(str(path))[0].first == ("A4", "A5", "A6", "A7")


def test_a_senteval_folder_is_one_set_without_unscored_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "STS15-en-test"
    folder.mkdir()
    (folder / "STS.input.a.txt").write_text("A1\tB1\nA2\tB2\nA3\tB3\n")
    (folder / "STS.gs.a.txt").write_text("1\n\n3\n")
    (folder / "STS.input.b.txt").write_text("A4\tB4\textra\n")
    (folder / "STS.gs.b.txt").write_text("5.0\n")
    (folder / "STS.gs.ALL.txt").write_text("1\n")
    (found,) = read_sets(str(folder))
    assert (found.name, found.first, found.scores.tolist()) == ("STS15-en-test", ("A1", "A3", "A4"), [1, 3, 5])
    assert found.skipped == 1
    assert read_texts(str(folder)) == ["A1", "A3", "A4", "B1", "B3", "B4"]
    (folder / "STS.gs.b.txt").write_text("5.0\n1\n")
    with pytest.raises(InputError, match=r"STS.input.b.txt has 1 lines and STS.gs.b.txt 2"):
        read_sets(str(folder))
    (folder / "STS.gs.b.txt").unlink()
    with pytest.raises(InputError, match=r"STS.gs.b.txt cannot be read: No such file"):
        read_sets(str(folder))


def test_multi_simlex_gives_one_language_or_all(tmp_path: Path) -> None:
    (tmp_path / "translation.csv").write_text("ID,ENG 1,ENG 2,FRA 1,FRA 2\n1,a,b,à,é\n2,c,d,ç,ù\n3,e,f,ê,ô\n")
    (tmp_path / "scores.csv").write_text("ID,ENG,FRA\n1,0.5,1\n2,6,5\n3,2,4\n")
    english, french = read_sets(str(tmp_path))
    assert (english.name, english.first, english.second) == ("multisimlex-ENG", ("a", "c", "e"), ("b", "d", "f"))
    assert (french.name, french.scores.tolist()) == ("multisimlex-FRA", [1, 5, 4])
    assert [found.name for found in read_sets(f"{tmp_path}:FRA")] == ["multisimlex-FRA"]
    with pytest.raises(InputError, match="has no language EST: it has ENG, FRA"):
        read_sets(f"{tmp_path}:EST")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("just words here\nand more\n", "line 1: no number and no known header"),
        ("a\tb\t1\nc\td\tmuch\ne\tf\t2\n", "line 2: the score must be a number: 'much'"),
        ("a\tb\t1\nc\td\nc\td\t3\n", "line 2: 2 columns, expected at least 3"),
        ("a\tb\t1\n\td\t2\nc\td\t3\n", "line 2: a text is empty"),
        ("a\tb\tinf\n", "line 1: no number and no known header"),
        ("1\tb\t2\n1\tc\t2\n", "line 1: the columns of texts and score are ambiguous"),
        ("a\tb\t1\nc\td\t2\n", "has 2 scored pairs: at least 3 are needed"),
        ("a\tb\t1\nc\td\t1\ne\tf\t1\n", "scores every pair 1: scores must differ"),
        ("a\tb\t1\nd\xe9\td\t1\n", "is not UTF-8 in line 2"),
    ],
)
def test_a_malformed_file_is_one_error_that_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "set.tsv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        read_sets(str(path))
    assert "set" in str(caught.value)


def test_an_absent_file_and_another_folder_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation set .*absent.tsv cannot be read: No such file"):
        read_sets(str(tmp_path / "absent.tsv"))
    with pytest.raises(InputError, match=r"holds neither STS\.input"):
        read_sets(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_texts(str(tmp_path / "absent.txt"))


def test_the_sets_at_hand_are_read_whole(shared: Path) -> None:
    data = shared / "data"
    sizes = {path.stem: len(read_sets(str(path))[0].scores) for path in sorted(data.glob("[sw]*/*[vt]"))}
    assert sizes == {
        **{"sts2012": 2358, "sts2013": 1500, "sts2014": 3750, "stsb-dev": 1500, "stsb-test": 1379},
        **{"rg-65": 65, "simlex-999": 999, "ws-353-sim": 203},
    }
