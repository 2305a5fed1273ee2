"""Tables are Markdown that can be read as plain text."""

from util.markdown import markdown_table


def test_table_is_markdown() -> None:
    assert markdown_table(["run", "AP"], [["a", "0.1"]]).splitlines() == [
        "| run | AP  |",
        "| --- | --- |",
        "| a   | 0.1 |",
    ]
