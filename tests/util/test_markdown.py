"""Tables are Markdown that can be read as plain text."""

from util.markdown import markdown


def test_table_is_markdown() -> None:
    assert markdown(["run", "AP"], [["a", "0.1"]]).splitlines() == [
        "| run | AP  |",
        "| --- | --- |",
        "| a   | 0.1 |",
    ]
