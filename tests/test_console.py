"""What a person sees: rows that fit, a bar that moves, an output that may go away."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import sys
import time

import pytest
import rich.console

from maxlm import surroundings
from maxlm.observe.console import Console


def test_what_a_model_writes_cannot_drive_the_terminal_or_break_its_encoding():
    raw = io.BytesIO()
    output = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(output=rich.console.Console(file=output, width=100))
    console.say("red \x1b[31m, bell \x07, tab\t, \ud800, 日本")
    assert raw.getvalue().decode() == "red \\x1b[31m, bell \\x07, tab\t, \\ud800, \\u65e5\\u672c\n"


def test_a_terminal_gets_a_status_line_that_goes_away():
    output = io.StringIO()
    terminal = rich.console.Console(file=output, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Console(output=terminal) as console:
        console.start(20, 4, ["header"], memory_limit=16 << 30)
        console.log(
            {
                "step": 10,
                "loss": 2.5,
                "tokens": 640,
                "tokens_per_s": 64.0,
                "step_time_s": 1.0,
                "mfu": 0.412,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "memory_bytes": 3 << 30,
            }
        )
    text = output.getvalue()
    assert "continuing after step 4 of 20" in text and "step 10/20" in text
    assert "MFU 41.2 %" in text and "3.00 GiB of 16.00 GiB" in text and "10 s left" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is shown again


@pytest.mark.parametrize(
    "more",
    [{}, {"mfu": 0.412}, {"mfu": 0.412, "skipped_steps": 12345, "z_loss": 1e-4},
     {"mfu": 0.5, "moe_load_entropy": [0.9] * 4, "moe_dropped_share": [0.01] * 4, "z_loss": 1e-4}],
)  # fmt: skip
@pytest.mark.parametrize(("step", "total", "seconds"), [(1, 20, 0.1), (1_234_567, 2_000_000, 12.3)])
def test_a_row_fits_80_columns_and_keeps_what_matters(more, step, total, seconds):
    output = io.StringIO()
    console = Console(output=rich.console.Console(file=output))
    console.start(total, 0, [])
    row = {
        "step": step, "loss": 12.3456, "tokens": 1, "tokens_per_s": 123456.0, "step_time_s": seconds, "mfu": None,
        "learning_rate": 1.25e-3, "grad_norm": 123.456, "memory_bytes": 1, **more,
    }  # fmt: skip
    console.log(row)
    line = output.getvalue()
    assert len(line.rstrip()) <= 80
    assert f"{step:,}/{total:,}  loss 12.3456  123k tokens/s" in line and line.rstrip().endswith("left")
    assert ("skipped 12345" in line) == ("skipped_steps" in more)


def test_the_bar_moves_with_every_step_and_waiting_shows_its_time():
    output = io.StringIO()
    terminal = rich.console.Console(file=output, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with Console(output=terminal) as console:
        console.start(20, 4, ["header"])
        with console.waiting("compiling"):
            assert "compiling, 0 s" in shown(console)
        console.progress(4)
        time.sleep(0.02)
        console.progress(5)
        assert "step 5/20" in shown(console) and " left" in shown(console)


def shown(console: Console) -> str:
    plain = rich.console.Console(file=io.StringIO(), width=80)
    plain.print(console._status())
    return plain.file.getvalue()


def test_without_a_terminal_waiting_says_now_and_then_that_it_goes_on(monkeypatch):
    monkeypatch.setattr("maxlm.observe.console._WAIT_LINE_S", 0.05)
    output = io.StringIO()
    console = Console(output=rich.console.Console(file=output))
    with console.waiting("compiling the train step"):
        time.sleep(0.3)
    lines = output.getvalue().splitlines()
    assert lines[0] == "compiling the train step ..." and 2 <= len(lines) <= 8
    assert all(line == "compiling the train step ... 0 s" for line in lines[1:])


def test_an_output_that_goes_away_silences_the_console_alone(capfd):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        console = Console(output=rich.console.Console(file=gone))
        for text in ("one", "two"):
            console.say(text)
    assert capfd.readouterr().err.count("no more output here") == 1


def test_a_terminal_that_goes_away_silences_the_console_and_gives_standard_error_back(capfd):
    """rich makes a SystemExit of a broken pipe, and holds standard error while there is a status line."""
    read, write = os.pipe()
    before = sys.stderr
    with os.fdopen(write, "w") as gone:
        terminal = rich.console.Console(file=gone, force_terminal=True, width=80, _environ={"TERM": "xterm"})
        with Console(output=terminal) as console:
            console.start(20, 4, ["header"])
            os.close(read)
            for step in (5, 6):
                console.progress(step)
                console.say("a row")
            assert sys.stderr is before
            print("a later message", file=sys.stderr)
    told = capfd.readouterr().err
    assert told.count("no more output here") == 1 and "a later message" in told


def test_a_console_whose_output_is_gone_starts_and_stops():
    read, write = os.pipe()
    os.close(read)
    gone = os.fdopen(write, "w")
    terminal = rich.console.Console(file=gone, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with Console(output=terminal) as console:
        console.start(20, 0, [])
        console.stop()
    with contextlib.suppress(BrokenPipeError):  # what rich left in it
        gone.close()


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="only Linux makes a pipe of a chosen size")
def test_who_reads_on_later_gets_what_was_kept_for_him(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "PATIENCE_S", 0.1)
    reading, writing = os.pipe()
    console = Console(output=rich.console.Console(file=os.fdopen(writing, "w"), width=100))
    pending = 1000
    room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    began = time.monotonic()
    for i in range(2 * pending):
        console.say(f"line {i:_>90}")
    assert time.monotonic() - began < 5  # one wait, not two thousand
    with os.fdopen(reading) as reader:
        shown = [reader.readline() for _ in range(pending)]
        console.say("the last")
        while "the last" not in shown[-1]:
            shown.append(reader.readline())
    *lines, gap, last = shown
    assert lines == [f"line {i:_>90}\n" for i in range(len(lines))]
    assert pending < len(lines) <= pending + 1 + room // 90
    assert gap == f"... {2 * pending - len(lines):,} lines are missing here, as nobody read on\n"
    assert last == "the last\n"
