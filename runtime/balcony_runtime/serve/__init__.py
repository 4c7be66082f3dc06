"""``balcony-edge serve``: an HTTP server in OpenAI's shapes with a budget for each request (extra ``[serve]``)."""

import sys
from importlib import import_module

from balcony_edge.errors import InputError, MissingDependencyError

if sys.platform == "win32":  # no SIGHUP, no handlers of signals in its event loop, no limit on files
    raise InputError("serve: does not run on Windows: run it under WSL, or use the Python API")
for _name in ("prometheus_client", "starlette", "uvicorn"):
    try:
        import_module(_name)
    except ImportError as missing:
        raise MissingDependencyError(
            f"{missing.name} is not installed: pip install 'balcony-edge[serve]' for the server"
        ) from missing
