"""HTTP/3 over aioquic, for the tests: a server of random bytes, and a client that fetches them.

http3.py serve PORT CERTIFICATE KEY BYTES    says the SHA-256 of what it serves, then serves until killed
http3.py fetch PORT AUTHORITY                says the SHA-256 and the number of bytes of what it was given
"""

import asyncio
import hashlib
import os
import sys

from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent

HOST = "127.0.0.1"
RUN_S = 60


class Server(QuicConnectionProtocol):
    """Answers every request with ``content``."""

    content = b""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._http = H3Connection(self._quic)

    def quic_event_received(self, event: QuicEvent) -> None:
        for each in self._http.handle_event(event):
            if isinstance(each, HeadersReceived):
                self._http.send_headers(each.stream_id, [(b":status", b"200")])
                self._http.send_data(each.stream_id, self.content, end_stream=True)
                self.transmit()


class Client(QuicConnectionProtocol):
    """Makes one request."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._http = H3Connection(self._quic)
        self._done = asyncio.get_running_loop().create_future()
        self._hash = hashlib.sha256()
        self._size = 0

    async def fetch(self) -> str:
        stream = self._quic.get_next_available_stream_id()
        names = (b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/")
        self._http.send_headers(stream, list(names), end_stream=True)
        self.transmit()
        return await asyncio.wait_for(self._done, RUN_S)

    def quic_event_received(self, event: QuicEvent) -> None:
        for each in self._http.handle_event(event):
            if isinstance(each, DataReceived):
                self._hash.update(each.data)
                self._size += len(each.data)
                if each.stream_ended:
                    self._done.set_result(f"{self._hash.hexdigest()} {self._size}")


async def run_server(port: str, certificate: str, key: str, size: str) -> None:
    Server.content = os.urandom(int(size))
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(certificate, key)
    await serve(HOST, int(port), configuration=configuration, create_protocol=Server)
    print(hashlib.sha256(Server.content).hexdigest(), flush=True)
    await asyncio.Event().wait()


async def run_client(port: str, authority: str) -> None:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name="localhost")
    configuration.load_verify_locations(authority)
    async with connect(HOST, int(port), configuration=configuration, create_protocol=Client) as client:
        print(await client.fetch(), flush=True)


if __name__ == "__main__":
    asyncio.run({"serve": run_server, "fetch": run_client}[sys.argv[1]](*sys.argv[2:]))
