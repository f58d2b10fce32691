"""`robot-forgetting assets`: what can be typed wrong is one line, and an offline folder works."""

import pytest

from robot_forgetting.cli import command_line as cli


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name one family of assets: bridge"),
        (["bridgge"], "unknown family of assets 'bridgge'"),
        (["bridge", "speed=fast"], "assets does not know 'speed'"),
        (["bridge", "--no"], "assets does not know '--no'"),
        (["bridge", "folder=/no/such/folder"], "/no/such/folder does not exist"),
    ],
)
def test_what_can_be_typed_wrong(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    assert cli.main(["assets", *arguments]) == 2
    assert words in capsys.readouterr().err
