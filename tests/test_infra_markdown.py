"""Prose that commands write: no word changes, no line turns into a list, and list items read back whole."""

from hypothesis import given
from hypothesis import strategies as st

from infra.markdown import WIDTH, read_items, wrap_prose

WORDS = st.lists(st.sampled_from(["-", "+", "*", "#", "1.", "2)", "|", ">x", "a", "`code`", "x" * 30]), max_size=60)


@given(st.lists(WORDS.map(lambda words: "- " + " ".join(["so", *words])), max_size=3))
def test_items_come_back_and_fit(items):
    text = wrap_prose("\n".join(items))
    assert read_items(text) == [item.removeprefix("- ") for item in items]
    assert all(line.startswith("- so") or line.lstrip()[:1] in "a`x" for line in text.split("\n"))
    assert wrap_prose(text) == text


def test_paragraphs_are_broken_and_tables_and_code_are_not():
    long = "word " * 40 + "end"
    broken = wrap_prose(long)
    assert broken.split() == long.split()
    assert [len(line) <= WIDTH for line in broken.split("\n")] == [True, True]
    kept = f"| {long} |\n![{long}](x.png)\n# {long}\n    {long}\n```\n{long}\n```"
    assert wrap_prose(kept) == kept
