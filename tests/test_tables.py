"""Tables as text."""

from __future__ import annotations

from mvision.evaluation.tables import figure_text, markdown_table, markdown_text, text_table


def test_text_table_aligns_the_first_column_left_and_the_others_right() -> None:
    rows = [["class", "objects", "AP"], ["cat", "7", "0.500"], ["a long name", "12345", "-"]]
    assert text_table(rows) == [
        "class        objects     AP",
        "cat                7  0.500",
        "a long name    12345      -",
    ]
    assert text_table([["a"]]) == ["a"]
    assert text_table([]) == []


def test_markdown_table() -> None:
    assert markdown_table(["a", "b"], [["1", "2"], ["3", "4"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |", "| 3 | 4 |"]


def test_figures_have_three_decimals_and_a_dash_where_there_are_no_objects() -> None:
    assert [figure_text(value) for value in (0.12351, 0.0, 1.0, -1.0)] == ["0.124", "0.000", "1.000", "-"]


def test_names_cannot_break_a_table() -> None:
    lines = text_table([["class", "AP"], ["two\nlines \x1b[31m", "1"]])
    assert lines == ["class                AP", r"two\nlines \x1b[31m   1"]


def test_markdown_shows_text_as_it_is() -> None:
    assert markdown_text("plain text, 1.5-2") == "plain text, 1.5-2"
    assert markdown_text("a|b `c` [d](e) <f> *g* #h_i\n\x1b") == (r"a\|b \`c\` \[d\](e) \<f\> \*g\* \#h\_i\\n\\x1b")
