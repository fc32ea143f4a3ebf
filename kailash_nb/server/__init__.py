"""The server door: the workflows of a core over HTTP, from a thread of its own.

``app.py`` is the ASGI application, ``auth.py`` decides who may ask, ``problems.py`` says why something did not start,
``protocol.py`` limits what a connection may do before it has asked, ``background.py`` keeps it all running beside the
kernel. A new way in (keys, a console) is a route in ``app.py`` or a principal in ``auth.py``; the path of a run is
:meth:`Core.execute`, as everywhere.
"""

from __future__ import annotations

from .app import build_app
from .background import Server, serve

__all__ = ["Server", "build_app", "serve"]
