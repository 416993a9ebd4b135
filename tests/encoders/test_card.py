"""Model cards: what is kept of the base's, and what cannot be read."""

import logging

import pytest
import yaml

from encoders.card import RUN_MARK, TERMS, Card, front_matter, read_card
from encoders.reference import Reference
from encoders.source import resolve
from encoders.write import write_layout
from mirror_runtime.bundle import Pooling


def test_the_license_and_the_story_go_from_base_to_run_to_bundle(tiny_bert, tmp_path):
    terms = {"license": "other", "license_name": "ours: 2", "license_link": "LICENSE.md", "language": ["en", "no"]}
    source = resolve(str(tiny_bert), pooling=Pooling.MEAN)
    reference = Reference.load(source)
    kept, card = terms, f"# Tuned\n\nIt helped.\n\n{RUN_MARK}\n\n![loss](loss.png)\n"
    for name in ("run", "bundle"):
        write_layout(
            tmp_path / name,
            model=reference.model,
            tokenizer=reference.tokenizer,
            spec=reference.spec,
            card=card,
            terms=kept,
        )
        found = resolve(str(tmp_path / name)).card
        kept, card = dict(found.terms), found.story
        assert kept == terms
    assert found.body.strip() == "# Tuned\n\nIt helped."
    front = (tmp_path / "bundle" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["tags"]
    assert set(TERMS) <= set(yaml.safe_load(front))


@pytest.mark.parametrize(
    ("content", "card", "warned"),
    [
        (None, Card(), ""),
        (b"# No front matter", Card(body="# No front matter"), ""),
        (b"---\nlicense: mit\ntags: [a]\n---\nbody", Card({"license": "mit"}, "body"), ""),
        (b"---\n- a list\n---\nbody", Card(body="body"), ""),
        (b"---\nlicense: mit", Card(body="---\nlicense: mit"), ""),
        (b"---\nlicense: mit\n---", Card({"license": "mit"}), ""),
        (b"\xef\xbb\xbf\n--- \r\nlicense: mit\r\n--- \r\nbody", Card({"license": "mit"}, "body"), ""),
        (b"---\nlanguage: [en, no]\ndate: 2026-13-45\n---\n", Card({"language": ["en", "no"]}), ""),
        (b"---\nlicense: [mit\n---\nbody", Card(body="body"), "not YAML"),
        (b"\xff", Card(), "cannot be read"),
    ],
)
def test_a_card_that_cannot_be_read_stops_nothing(content, card, warned, tmp_path, caplog):
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_card(tmp_path) == card
    assert warned in caplog.text
    assert bool(caplog.text) == bool(warned)


def test_front_matter_can_be_read_again(tmp_path):
    (tmp_path / "README.md").write_text(front_matter({"license": "mit", "language": "no"}) + "body\n")
    assert read_card(tmp_path) == Card({"license": "mit", "language": "no"}, "\nbody\n")
