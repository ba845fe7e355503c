"""Ctrl-C in any command: exit code 130 and a word on what to do, no traceback."""

import signal

import pytest
import typer

from nemotron_dspark import cli


def test_an_interrupted_command_says_that_it_goes_on(monkeypatch, capsys):
    app = typer.Typer()

    @app.command()
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("sys.argv", ["nds"])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert signal.signal(signal.SIGINT, handler) == signal.SIG_IGN  # a second Ctrl-C brings no traceback
    assert leaving.value.code == 130
    assert "goes on from there" in capsys.readouterr().err
