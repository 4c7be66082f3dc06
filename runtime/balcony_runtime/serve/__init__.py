"""``balcony-edge serve``: an HTTP server in OpenAI's shapes with a budget for each request (extra ``[serve]``)."""

from importlib import import_module

from balcony_edge.errors import MissingDependencyError

for _name in ("prometheus_client", "starlette", "uvicorn"):
    try:
        import_module(_name)
    except ImportError as missing:
        raise MissingDependencyError(
            f"{missing.name} is not installed: pip install 'balcony-edge[serve]' for the server"
        ) from missing
