"""The browser of the tests marked ``browser``."""

from __future__ import annotations

import shutil
from pathlib import Path

from kailash_nb.__main__ import SetupError, apt_get_install

_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def chromium() -> Path | None:
    """The Chromium of this machine; as root on Debian it is installed where there is none.

    Returns None where there is none to be had: skip the test, and say ``apt-get install chromium``.
    """
    if not (found := _find()):
        try:
            apt_get_install("chromium")
        except SetupError:
            return None
        found = _find()
    return found


def _find() -> Path | None:
    commands = [*map(shutil.which, _COMMANDS), _MACOS]
    return next((Path(command) for command in commands if command and Path(command).exists()), None)
