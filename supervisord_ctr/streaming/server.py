"""The streaming server: URLs out, sessions in.

Owns the listening socket, the tokens and every session's task. Speaks to containers only through the
`Backend` that it is given.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from urllib.parse import urlsplit

from wsproto import WSConnection
from wsproto.connection import ConnectionType
from wsproto.events import AcceptConnection
from wsproto.events import Request as WebSocketRequest
from wsproto.utilities import RemoteProtocolError

from supervisord_ctr.aio import TaskOwner
from supervisord_ctr.settings import StreamingSettings
from supervisord_ctr.streaming import AttachParams, Backend, ExecParams, Params, PortForwardParams, portforward
from supervisord_ctr.streaming import remotecommand as command
from supervisord_ctr.streaming.front import Answer, Front, Request
from supervisord_ctr.streaming.spdy_session import SpdySession
from supervisord_ctr.streaming.tokens import TokenTable, fingerprint
from supervisord_ctr.streaming.websocket import ChannelSession, Tunnel, WebSocket
from supervisord_ctr.streaming.wire import Wire

log = logging.getLogger(__name__)

#: Connections that have not been upgraded yet, and sessions, at most.
MAX_FRONTS = 1024
MAX_SESSIONS = 4096

_PATHS: dict[str, type[Params]] = {"exec": ExecParams, "attach": AttachParams, "portforward": PortForwardParams}
_COMMAND_SUBPROTOCOLS = (
    *command.COMMAND_PROTOCOLS, "v4.base64.channel.k8s.io", "base64.channel.k8s.io",
)
_TUNNEL = "SPDY/3.1+portforward.k8s.io"
_PORT_SUBPROTOCOLS = (_TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io")


class StreamingServer:
    """Serves what CRI's Exec, Attach and PortForward promise. Implements `Urls` and `front.Router`."""

    def __init__(self, backend: Backend, settings: StreamingSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._tokens = TokenTable(settings.token_lifetime)
        self._owner = TaskOwner("streaming")
        self._fronts: set[Front] = set()
        self._server: asyncio.Server | None = None
        self._base = ""

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises `OSError` when the address cannot be had, `ssl.SSLError` for bad files."""
        context = _tls_context(self._settings)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Front(self), self._settings.address, self._settings.port, backlog=1024, ssl=context,
            ssl_handshake_timeout=10.0 if context else None,
        )
        address, port = self._server.sockets[0].getsockname()[:2]
        self._base = f"{'https' if context else 'http'}://{_url_host(address)}:{port}"
        log.info("streaming server listens at %s", self._base)

    async def close(self) -> None:
        """Stop listening and end every session; the backend ends what it started."""
        if self._server is not None:
            self._server.close()
        for front in list(self._fronts):
            front.abort()
        await self._owner.close()
        if self._server is not None:
            await self._server.wait_closed()

    @property
    def sessions(self) -> int:
        """How many sessions run."""
        return len(self._owner)

    @property
    def base_url(self) -> str:
        """Where the server listens, without a path."""
        return self._base

    # -- Urls ------------------------------------------------------------------------------------

    def exec_url(self, params: ExecParams) -> str:
        """See `Urls`."""
        return self._url("exec", params)

    def attach_url(self, params: AttachParams) -> str:
        """See `Urls`."""
        return self._url("attach", params)

    def port_forward_url(self, params: PortForwardParams) -> str:
        """See `Urls`."""
        return self._url("portforward", params)

    def _url(self, path: str, params: Params) -> str:
        params.validate()
        return f"{self._base}/{path}/{self._tokens.issue(params)}"

    # -- Router ----------------------------------------------------------------------------------

    def opened(self, front: Front) -> bool:
        """A connection came."""
        if len(self._fronts) >= MAX_FRONTS or len(self._owner) >= MAX_SESSIONS:
            return False
        self._fronts.add(front)
        return True

    def closed(self, front: Front) -> None:
        """A connection left the front."""
        self._fronts.discard(front)

    def route(self, request: Request, front: Front) -> Answer | None:
        """Take the token, and the connection if all is well."""
        parts = urlsplit(request.path).path.split("/")
        kind = _PATHS.get(parts[1]) if len(parts) == 3 and not parts[0] else None
        if kind is None:
            return Answer(404, "404 page not found")
        if request.method not in ("GET", "POST"):
            return Answer(405, "method not allowed", (("Allow", "GET, POST"),))
        params = self._tokens.consume(parts[2], kind)
        if params is None:
            log.info("refused a %s request: its token is used, expired or was never given out", parts[1])
            return Answer(404, "404 page not found")
        log.debug("token %s: %s", fingerprint(parts[2]), parts[1])
        if request.asks_upgrade("websocket"):
            return self._upgrade_websocket(request, front, params)
        return self._upgrade_spdy(request, front, params)

    # -- SPDY ------------------------------------------------------------------------------------

    def _upgrade_spdy(self, request: Request, front: Front, params: Params) -> Answer | None:
        forwarding = isinstance(params, PortForwardParams)
        accepted = portforward.PORT_FORWARD_PROTOCOLS if forwarding else command.COMMAND_PROTOCOLS
        offered = request.values("x-stream-protocol-version")
        if not offered:
            return Answer(400, "unable to upgrade: header X-Stream-Protocol-Version is missing or empty")
        chosen = next((name for name in offered if name in accepted), None)
        if chosen is None:
            lists = tuple(("X-Accepted-Stream-Protocol-Versions", name) for name in accepted)
            return Answer(403, f"unable to upgrade: unable to negotiate protocol: server accepts {accepted}", lists)
        if not request.asks_upgrade("spdy/3.1"):
            return Answer(400, "unable to upgrade: missing upgrade headers in request")
        transport, trailing = front.take_over((
            ("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", chosen),
        ))
        wire = Wire(transport, idle_timeout=self._settings.idle_timeout)
        self._serve_spdy(wire, wire.attach, params, chosen)
        if trailing:
            wire.data_received(trailing)
        return None

    def _serve_spdy(
        self,
        carrier: Wire | Tunnel,
        attach: Callable[[Callable[[bytes], None], Callable[[], None]], None],
        params: Params,
        protocol: str,
    ) -> None:
        """Join a SPDY session to its carrier and start its handler."""
        timeout = self._settings.creation_timeout
        work: Callable[[], Awaitable[None]]
        if isinstance(params, PortForwardParams):
            forwarder = portforward.PortForward(self._backend, params.sandbox_id, timeout)
            session = SpdySession(carrier, client=False, on_stream=forwarder.on_stream)
            forwarder.session = session
            work = forwarder.run
        else:
            gatherer = command.StreamGatherer(params, protocol)
            session = SpdySession(carrier, client=False, on_stream=gatherer.on_stream)
            gatherer.session = session
            work = partial(command.serve_spdy, carrier, gatherer, self._backend, params, timeout)
        task = self._start(work, session.close_soon)

        def lost() -> None:
            session.connection_lost()
            task.cancel()

        attach(session.received, lost)

    # -- WebSocket -------------------------------------------------------------------------------

    def _upgrade_websocket(self, request: Request, front: Front, params: Params) -> Answer | None:
        if request.method != "GET":
            return Answer(405, "websocket requests are GET requests", (("Allow", "GET"),))
        protocol = WSConnection(ConnectionType.SERVER)
        try:
            protocol.initiate_upgrade_connection(
                [(name.encode("ascii"), value.encode("latin-1")) for name, value in request.headers], request.path
            )
            opening = next(iter(protocol.events()))
        except RemoteProtocolError as error:
            return Answer(400, f"unable to upgrade websocket connection: {error}")
        assert isinstance(opening, WebSocketRequest)
        accepted = _PORT_SUBPROTOCOLS if isinstance(params, PortForwardParams) else _COMMAND_SUBPROTOCOLS
        chosen = next((name for name in opening.subprotocols if name in accepted), None)
        if chosen is None and opening.subprotocols:
            return Answer(403, f"unable to negotiate a websocket protocol: server accepts {', '.join(accepted)}")
        transport, trailing = front.take_over_raw(protocol.send(AcceptConnection(subprotocol=chosen)))
        wire = Wire(transport, idle_timeout=self._settings.idle_timeout)
        websocket = WebSocket(wire, protocol)
        if chosen == _TUNNEL:
            tunnel = Tunnel(websocket)
            self._serve_spdy(tunnel, tunnel.attach, params, chosen)
        else:
            self._serve_channels(websocket, params, chosen or "")
        if trailing:
            wire.data_received(trailing)
        return None

    def _serve_channels(self, websocket: WebSocket, params: Params, protocol: str) -> None:
        encoded = "base64." in protocol
        work: Callable[[], Awaitable[None]]
        if isinstance(params, PortForwardParams):
            kinds = [(True, True), (False, True)] * len(params.ports)
            session = ChannelSession(websocket, kinds, encoded=encoded, close_signal=False)
            work = partial(portforward.serve_websocket, session, self._backend, params.sandbox_id, params.ports)
        else:
            session = ChannelSession(
                websocket, command.channel_kinds(params), encoded=encoded, close_signal=protocol.startswith("v5.")
            )
            work = partial(command.serve_websocket, session, self._backend, params, protocol)
        task = self._start(work, websocket.close_soon)
        session.attach(lambda: _ignore(task.cancel()))

    def _start(self, work: Callable[[], Awaitable[None]], end: Callable[[], None]) -> asyncio.Task[None]:
        """Run a session's handler as a task of the server; the connection never outlives it.

        The task may be cancelled before its first step, when the client leaves at once.
        """

        async def run() -> None:
            try:
                await work()
            except Exception:
                log.exception("a streaming session failed")

        task = self._owner.start(run(), "session")
        task.add_done_callback(lambda _: end())
        return task


def _ignore(_value: object) -> None:
    return


def _url_host(address: str) -> str:
    """The host to write into a URL for an address that is listened on."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_unspecified:
        return "127.0.0.1" if parsed.version == 4 else "[::1]"
    return address if parsed.version == 4 else f"[{address}]"


def _tls_context(settings: StreamingSettings) -> ssl.SSLContext | None:
    if not settings.tls_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    if settings.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(settings.tls_client_ca)
    return context
