"""Markdown tables that are aligned as plain text, too."""

from util.markdown import markdown_table


def test_markdown_table() -> None:
    assert markdown_table(["run", "AP"], [["a", "0.1"]]).splitlines() == [
        "| run | AP  |",
        "| --- | --- |",
        "| a   | 0.1 |",
    ]
