"""Progress is a bar in a terminal and plain lines elsewhere; log lines do not break a bar."""

import io
import logging
import sys

import pytest

from util import logger
from util.logger import Progress, format_seconds, log, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _enabled() -> None:
    level = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(level)


def printed(capsys: pytest.CaptureFixture) -> list[str]:
    out = capsys.readouterr().out
    assert "\r" not in out
    return out.splitlines()


def test_a_log_file_gets_a_line_at_the_end(capsys: pytest.CaptureFixture) -> None:
    bar = Progress(3, "epoch 1/2")
    for loss in range(3):
        bar.step(f"loss {loss}")
    (line,) = printed(capsys)
    assert line.startswith("epoch 1/2: 3/3 [00:00<00:00, ")
    assert line.endswith("it/s, loss 2]")


def test_a_log_file_gets_lines_at_intervals(capsys: pytest.CaptureFixture) -> None:
    bar = Progress(4, "proposals", unit=" images", seconds_between_lines=0)
    bar.step()
    bar.step("1 unreadable", steps=2)
    bar.step()
    lines = printed(capsys)
    assert [line.split()[1] for line in lines] == ["1/4", "3/4", "4/4"]
    assert "unreadable" not in lines[0]
    assert all("1 unreadable" in line for line in lines[1:])
    assert all(" images/s" in line or "s/ images" in line for line in lines)


def test_an_unfinished_job_prints_no_empty_line(capsys: pytest.CaptureFixture) -> None:
    bar = Progress(3, "x", seconds_between_lines=0)
    bar.step()
    bar.close()
    assert len(printed(capsys)) == 1


def test_rate_includes_only_steps_of_this_process(capsys: pytest.CaptureFixture) -> None:
    """In a resumed job, earlier steps are done but took no time here."""
    bar = Progress(1000, "epoch 1/1", start=998)
    bar.start_t -= 2.0
    bar.step()
    bar.step()
    (line,) = printed(capsys)
    assert line.startswith("epoch 1/1: 1000/1000 [00:02<00:00, ")
    assert "1.00it/s" in line or "1.00s/it" in line


def test_will_display_is_true_only_for_displayed_steps(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Progress(3, "x")
    assert not bar.will_display()
    bar.last_print_t -= 16
    assert bar.will_display()
    bar.step()
    assert not bar.will_display()
    bar.step()
    assert bar.will_display(), "the last step is shown"
    monkeypatch.setattr(logger, "_is_main_process", lambda: False)
    silent = Progress(1, "x", seconds_between_lines=0)
    assert not silent.will_display()
    silent.step("text")
    assert len(printed(capsys)) == 1


def test_log_lines_in_a_terminal_are_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    handler = logger._ProgressBarHandler(terminal)
    log.addHandler(handler)
    try:
        bar = Progress(2, "epoch 1/1")
        bar.step()
        log.warning("an image is missing")
        bar.step("loss 1.5")
    finally:
        log.removeHandler(handler)
    lines = terminal.getvalue().split("\n")
    assert lines[0].rpartition("\r")[2] == "an image is missing"
    assert lines[1].rpartition("\r")[2].startswith("epoch 1/1: 100%|")
    assert "loss 1.5" in lines[1]
    assert lines[2:] == [""]


def test_a_notebook_gets_a_bar_that_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stream_class = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    output = stream_class()
    monkeypatch.setattr(sys, "stdout", output)
    bar = Progress(2, "epoch 1/1")
    bar.step()
    bar.step("loss 1.5")
    drawn = output.getvalue().split("\r")[-1]
    assert drawn.startswith("epoch 1/1: 100%|")
    assert drawn.endswith("loss 1.5]\n")


def test_the_logger_of_one_run_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "handlers", [])
    before = log.level, log.propagate, logger.tqdm.get_lock()
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    for _ in range(2):
        with logger.logging_to_stdout():
            log.info("h\u00e9")
        assert log.handlers == []
    assert (log.level, log.propagate, logger.tqdm.get_lock()) == before
    output.flush()
    assert output.buffer.getvalue() == b"h\\xe9\n" * 2
    assert output.errors == "strict"


def test_progress_of_a_sequence(capsys: pytest.CaptureFixture) -> None:
    assert list(progress(range(3), "x")) == [0, 1, 2]
    assert printed(capsys)[0].startswith("x: 3/3")


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (0.4, 65, 3725.2)] == ["00:00", "01:05", "1:02:05"]
