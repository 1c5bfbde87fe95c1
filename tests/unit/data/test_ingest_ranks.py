"""A rank's last words reach the launcher before the rank ends all of them."""

import os
import sys
import threading

import pytest

from megatron_mm.data.ingest.ranks import hand_over_messages


def test_waits_until_the_message_is_read(monkeypatch):
    launchers, ours = os.pipe()
    with os.fdopen(launchers, "rb", buffering=0) as read, os.fdopen(ours, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        print("error: said", file=stderr)
        waiting = threading.Thread(target=hand_over_messages, daemon=True)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert read.read(100) == b"error: said\n"
        waiting.join(9)
        assert not waiting.is_alive()


def test_a_file_and_a_reader_that_sleeps_hold_nobody_up(monkeypatch, tmp_path):
    monkeypatch.setattr("megatron_mm.data.ingest.ranks._HAND_OVER", 0.1)
    launchers, ours = os.pipe()
    with (tmp_path / "out").open("w") as stdout, os.fdopen(launchers), os.fdopen(ours, "w") as stderr:
        for name, stream in (("stdout", stdout), ("stderr", stderr)):
            monkeypatch.setattr(sys, name, stream)
            print("said", file=stream)
        hand_over_messages()
        assert (tmp_path / "out").read_text() == "said\n"


def test_a_reader_that_goes_away_ends_the_wait(monkeypatch):
    monkeypatch.setattr("megatron_mm.data.ingest.ranks._HAND_OVER", 600)
    launchers, ours = os.pipe()
    with os.fdopen(ours, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        print("error: said", file=stderr, flush=True)
        waiting = threading.Thread(target=hand_over_messages, daemon=True)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        os.close(launchers)
        waiting.join(60)
        assert not waiting.is_alive()


def test_a_reader_that_is_gone(monkeypatch):
    launchers, ours = os.pipe()
    os.close(launchers)
    stderr = os.fdopen(ours, "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    print("said", file=stderr)
    hand_over_messages()
    with pytest.raises(BrokenPipeError):
        stderr.close()
