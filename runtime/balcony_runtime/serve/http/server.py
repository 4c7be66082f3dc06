"""The process around the application: sockets, TLS, signals, readiness.

Owns the order of starting and stopping. The port opens first, so that ``/health`` can say that the model is loading. SIGTERM
and Ctrl-C stop new requests and wait for those in progress; SIGHUP reads the budget files and the certificate again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvicorn

from balcony_edge.errors import BalconyError, InputError
from balcony_runtime.llm import LLM
from balcony_runtime.serve.bodies.named import budget_files
from balcony_runtime.serve.http.app import make_app
from balcony_runtime.serve.http.connections import KEEP_ALIVE_S, Connection, bounded
from balcony_runtime.serve.http.guard import is_loopback
from balcony_runtime.serve.work.service import Limits, Service

_log = logging.getLogger(__name__)
#: Bytes that the kernel keeps for a client that does not read; by default it keeps megabytes, and slow readers are seen late.
SEND_BUFFER = 128 << 10
#: Connections that the kernel holds until they are accepted. The event loop accepts so many at once, before it counts them.
BACKLOG = 256
#: Time between two looks at whether the last reply has ended, while the server stops.
DRAIN_LOOK_S = 0.05
#: Longest time for sending the ends of answers, after they were told to end. Clients that do not read are cut off.
LAST_S = 5
#: File descriptors of the process that are no connections.
OTHER_FILES = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """Where and how to serve.

    Attributes:
        host, port: address to listen on; port 0 takes a free one.
        name: name of the model; None for the bundle's.
        budget: file of the server's own budget, which is read again with the others.
        budgets: directory of budget files whose names become models.
        api_key: key that requests must bring.
        ssl_certfile, ssl_keyfile: certificate and key for TLS.
        limits: bounds.
        drain_s: longest wait for requests in progress when the server stops.
        origins: origins of other pages that may use the server; ``*`` for all.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    name: str | None = None
    budget: Path | None = None
    budgets: Path | None = None
    api_key: str | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 30.0
    origins: Sequence[str] = ()


class Server:
    """One server. :meth:`run` serves until it is told to stop.

    Args:
        open_llm: loads the bundle.
        settings: where and how to serve.

    Raises:
        InputError: the address or the directory of budgets cannot be used, or a key without a certificate was given.
        BudgetError: a file of that directory is refused.
    """

    def __init__(self, open_llm: Callable[[], LLM], settings: Settings) -> None:
        self._open, self._settings = open_llm, settings
        if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
            raise InputError("--ssl-certfile and --ssl-keyfile: TLS needs both; give the other one, too")
        _refuse_wrong_origins(settings.origins)
        if settings.ssl_certfile is not None and settings.ssl_keyfile is not None:
            _refuse_wrong_files(settings.ssl_certfile, settings.ssl_keyfile)
        budget_files(settings.budgets)  # refuses them now, and not when the bundle is loaded
        self._sockets = _listen(settings.host, settings.port)
        self.service = Service(settings.name, settings.budget, settings.budgets, settings.limits)
        self._uvicorn = _Uvicorn(self._config(), self)
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._stale = False  # whether a SIGHUP came while the bundle was loading

    @property
    def url(self) -> str:
        """Address of the server."""
        scheme = "http" if self._settings.ssl_certfile is None else "https"
        host, port = self._sockets[0].getsockname()[:2]
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Serve until a signal or :meth:`stop`.

        Raises:
            BalconyError: the bundle cannot be loaded, or a budget file is refused.
        """
        try:
            asyncio.run(self._serve())
        finally:
            for one in self._sockets:
                one.close()
            self.service.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Take no more requests, wait for those in progress, and return from :meth:`run`. For any thread.

        Until then the port stays open: ``/health`` says 503 to balancers, and ``/metrics`` goes on.
        """
        self.service.draining = True
        if self._loop is None:
            self._uvicorn.should_exit = True
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        until_s = time.monotonic() + self._settings.drain_s
        while self.service.busy and time.monotonic() < until_s:
            await asyncio.sleep(DRAIN_LOOK_S)
        self.service.abort()
        self._uvicorn.should_exit = True

    @property
    def ready(self) -> bool:
        """Whether the bundle is loaded and the port is open."""
        return self.service.ready and self._uvicorn.started

    def reload(self) -> None:
        """Read budget files and certificate again; what is refused stays as it is, and the log says so."""
        if not self.service.ready:
            self._stale = True  # the load may have read its files before they changed
            return
        _notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self._reload_certificate()
        except BalconyError as error:
            _log.error("the certificate is as before: %s", error)
        try:
            self.service.reload()
            _log.info("budget files: %s", ", ".join(self.service.names.budgets))
        except BalconyError as error:
            _log.error("budget files are as before: %s", error)
        _notify("READY=1")

    def _reload_certificate(self) -> None:
        """Read certificate and key again, for the connections to come: certificates are renewed more often than servers."""
        certificate, key, context = self._settings.ssl_certfile, self._settings.ssl_keyfile, self._uvicorn.config.ssl
        if certificate is not None and key is not None and context is not None:
            _refuse_wrong_files(certificate, key)  # before the context in use has a half of them
            context.load_cert_chain(certificate, key)

    def _config(self) -> uvicorn.Config:
        settings = self._settings
        host = settings.host
        loopback = all(is_loopback(one.getsockname()[0].partition("%")[0]) for one in self._sockets)
        if not loopback and settings.api_key is None:
            _log.warning("%s: anyone in the network may use this server: set --api-key", host)
        elif settings.api_key is None and {"*", "null"} & set(settings.origins):
            _log.warning("--allow-origin: any page that is open in a browser here may use this server: set --api-key")
        return uvicorn.Config(
            make_app(self.service, settings.api_key, loopback=loopback, origins=settings.origins),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            http=_connection_class(settings.limits),
            ws="none",
            # A socket for both IPv4 and IPv6 has the last of these for IPv4. The variable is uvicorn's own.
            forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1,::1,::ffff:127.0.0.1"),
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_S,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._settings.ssl_certfile is not None:
            # Uvicorn has no option for it. Asyncio waits for a minute, and no other bound counts these connections.
            listen = partial(self._loop.create_server, ssl_handshake_timeout=self._settings.limits.head_s)
            vars(self._loop)["create_server"] = listen
        loading = asyncio.create_task(self._load())
        await self._uvicorn.serve(sockets=self._sockets)
        await loading
        if self._watched is not None:
            self._watched.cancel()

    async def _load(self) -> None:
        begin = time.monotonic()
        try:
            await asyncio.to_thread(self.service.load, self._open, asyncio.get_running_loop())
        except BaseException as error:
            self._failure = error
            self._uvicorn.should_exit = True
            return
        if self.service.draining:  # a signal came meanwhile
            return
        _log.info("ready after %.1f s on %s", time.monotonic() - begin, self.url)
        _notify("READY=1\nSTATUS=Serving " + self.url)
        if self._stale:
            self.reload()
        self._watched = asyncio.create_task(self._tell_watchdog())

    async def _tell_watchdog(self) -> None:
        """Tell systemd's watchdog that the event loop runs and replies are made (sd_watchdog_enabled)."""
        period_us, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
        if not period_us.isdigit() or process != str(os.getpid()):
            return
        # A turn may take the whole period: it is told for half of that, and a notification holds for the period.
        half_s = int(period_us) / 2e6
        while True:
            if self.service.stuck_s < half_s:
                _notify("WATCHDOG=1")
            await asyncio.sleep(half_s / 2)


class _Uvicorn(uvicorn.Server):
    """Uvicorn with our signals: its own would end the process before the engine is freed."""

    def __init__(self, config: uvicorn.Config, owner: Server) -> None:
        super().__init__(config)
        self._owner = owner

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._owner.reload)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        if self._owner.service.draining:
            self._owner.service.abort()
            self.should_exit = True
            return
        _notify("STOPPING=1")
        if not self._owner.service.ready:
            _log.info("stopping: the model was still loading")
            logging.shutdown()
            os._exit(0)  # nothing interrupts a load, and it has no requests to wait for
        _log.info("stopping: waiting for requests in progress; another signal ends them")
        self._owner.stop()


def _refuse_wrong_origins(origins: Sequence[str]) -> None:
    """Refuse what no browser sends, and would never match."""
    for origin in origins:
        default = re.fullmatch("http:.*:80|https:.*:443", origin)
        if origin not in ("*", "null", "file://") and (  # file:// is what Electron sends for the pages of an app
            default or not re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+", origin)
        ):
            raise InputError(
                f"--allow-origin {origin}: is not an origin as browsers send it: give scheme and host in small letters, and a "
                "port that is not the scheme's own, such as http://localhost:3000; or *"
            )


def _refuse_wrong_files(certificate: Path, key: Path) -> None:
    """Refuse files of TLS that cannot be used, before the bundle is loaded."""
    for option, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise InputError(f"{option} {path}: cannot be read ({error.strerror}): name a PEM file") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise InputError(
            f"--ssl-certfile {certificate} with --ssl-keyfile {key}: cannot be used ({error.reason or error}): "
            "name the PEM files of a certificate and of its key"
        ) from error


def _connection_class(limits: Limits) -> type[Connection]:
    """The connections; no more than the process may have files, so that accepting one does not fail.

    Connections in a TLS handshake are not counted: asyncio tells of a connection after it.
    """
    wanted = limits.connections + BACKLOG + OTHER_FILES
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < wanted:
        files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    most = limits.connections if files == resource.RLIM_INFINITY else min(wanted, files) - BACKLOG - OTHER_FILES
    return bounded(limits.head_s, limits.unread_s, max(most, 1))


def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on all addresses of a name: clients may take any of them. With port 0 all have the free port of the first."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host}: is not an address of this machine ({reason}): give another") from error
    addresses = sorted(dict.fromkeys(found), key=lambda one: one[0] != socket.AF_INET)
    sockets: list[socket.socket] = []
    missing = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    with contextlib.ExitStack() as held:
        for family, kind, protocol, _, address in addresses:
            try:
                # Without the protocol asyncio does not set TCP_NODELAY, and a token waits for the client's next ACK (40 ms).
                one = held.enter_context(socket.socket(family, kind, protocol))
            except OSError as error:  # a kernel without IPv6
                missing = error
                continue
            try:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
                if family == socket.AF_INET6 and len(addresses) > 1:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
                taken = sockets[0].getsockname()[1] if sockets else port
                one.bind((address[0], taken, *address[2:]))
                one.listen(BACKLOG)  # until then another server that starts now can bind the same port
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise _not_listened(host, port, error) from error
                one.close()  # the hosts file may name an address that no interface has
                missing = error
            else:
                sockets.append(one)
        if not sockets:
            raise _not_listened(host, port, missing) from missing
        held.pop_all()
    return sockets


def _not_listened(host: str, port: int, error: OSError) -> InputError:
    option = "--host" if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) else "--port"
    return InputError(f"{host}:{port}: cannot be listened on ({error.strerror}): give another {option}")


def _notify(state: str) -> None:
    """Tell systemd, if it started this process (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # The socket as well: clients may hold all files for a while, and the watchdog's task must outlive that.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
        to.setblocking(False)  # a reader that does not keep up must not hold the event loop
        to.sendto(state.encode(), address)
