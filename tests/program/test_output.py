"""What nodes print arrives whole and in order, marked, and never in floods."""

from __future__ import annotations

import contextlib
import io
import os
import time

from hypothesis import given
from hypothesis import strategies as st

from sparktf.cluster.control import ControlClient
from sparktf.program.output import (
    BURST_LINES,
    LINE_CHARACTERS,
    LINES_A_SECOND,
    LineReader,
    OutputForwarder,
    OutputPrinter,
)

_LINES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20), max_size=30)


@given(_LINES, st.data())
def test_lines_arrive_whole_however_their_bytes_are_cut(lines: list[str], data: st.DataObject) -> None:
    stream = "".join(f"{line}\n" for line in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    reader = LineReader()
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:stop])
    assert found + reader.end() == lines


def test_a_last_line_without_an_end_is_not_lost() -> None:
    reader = LineReader()
    assert reader.feed(b"one\ntw") == ["one"]
    assert reader.feed(b"o") == []
    assert reader.end() == ["two"]


def test_a_bar_that_moves_shows_its_last_state() -> None:
    assert LineReader().feed(b"\r1/3\r2/3\r3/3\r\n") == ["3/3"]


def test_a_long_line_is_cut_and_says_so() -> None:
    (line,) = LineReader().feed(b"x" * (LINE_CHARACTERS + 5) + b"\n")
    assert line.startswith("x" * 100)
    assert line.endswith("[5 characters more]")


def test_endless_output_without_line_ends_takes_no_memory() -> None:
    reader = LineReader()
    for _ in range(100):
        reader.feed(b"x" * 10_000)
    assert len(reader._rest) <= LINE_CHARACTERS


def test_a_flood_is_thinned_out_and_the_gap_is_told() -> None:
    now = [0.0]
    reader = LineReader(lambda: now[0])
    assert len(reader.feed(b"x\n" * (BURST_LINES + 500))) == BURST_LINES
    now[0] += 2 / LINES_A_SECOND
    assert reader.feed(b"later\n") == ["[500 lines left out here]", "later"]


def test_what_is_left_out_at_the_end_is_told_too() -> None:
    reader = LineReader(lambda: 0.0)
    reader.feed(b"x\n" * (BURST_LINES + 3))
    assert reader.end() == ["[3 lines left out here]"]


def test_what_is_printed_until_the_end_is_forwarded_whoever_holds_the_pipe() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    shown = io.StringIO()
    forwarder = OutputForwarder({"stdout": os.fdopen(reading, "rb", buffering=0)}, ControlClient(), "rank 0")
    os.write(writing, b"one\ntwo")
    ended = iter([False, False, True])
    started = time.monotonic()
    with contextlib.redirect_stderr(shown):
        forwarder.drain(30.0, lambda: next(ended))
    assert shown.getvalue() == "[rank 0] one\n[rank 0] two\n"
    assert time.monotonic() - started < 5
    os.close(writing)


def test_lines_are_marked_with_their_node() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    show = OutputPrinter(lambda rank: f"rank {rank} (worker 0)", stdout, stderr)
    show(1, {"stdout": ["a", "b"]})
    show(1, {"stderr": ["c"]})
    assert stdout.getvalue().splitlines() == [
        "[rank 1 (worker 0)] a",
        "[rank 1 (worker 0)] b",
    ]
    assert stderr.getvalue() == "[rank 1 (worker 0)] c\n"
