"""What a command says comes once, whatever libraries do to the root logger."""

import logging

import pytest

from lowpass.pipeline.base.progress import logger, show_on_console


def test_each_line_comes_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with show_on_console():
        logging.info("a library's, unasked for")  # gives a root logger without handlers one
        logger.info("exported")
        logging.getLogger("somebody").warning("worth a look")
    said = capsys.readouterr().err
    assert said.count("exported") == 1
    assert "worth a look" in said and "unasked for" not in said
    assert not logging.getLogger().handlers
