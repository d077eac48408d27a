"""Optional encryption of the sockets between ranks: mutual TLS whose certificates the handshake has vouched for.

Each rank makes a key and a self-signed certificate for one group. The certificate is part of the identity that it
proves by the job's secret (`sparktf.transport.handshake`), and TLS then accepts exactly the proven certificate, in
both directions. So there is no authority, no name to check, and nothing to configure or to renew.
"""

from __future__ import annotations

import base64
import os
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from socket import IPPROTO_TCP, MSG_DONTWAIT, SHUT_RDWR, TCP_NODELAY, socket

from sparktf.errors import HandshakeError, ProtocolError
from sparktf.transport.channel import WAITS, Channel, Outbox
from sparktf.transport.contract import Stats
from sparktf.transport.handshake import Identity

# Clocks of machines differ, and a certificate is used only while its group connects.
_VALID = timedelta(days=2)
# One record at most; a longer write would hide its progress from the deadlines.
_RECORD_BYTES = 16 * 1024


class Credentials:
    """A rank's certificate and key for one group.

    Raises
    ------
    ProtocolError
        The `cryptography` package is missing.
    """

    def __init__(self) -> None:
        certificate, pem = _self_signed()
        self.certificate = base64.b64encode(certificate).decode()
        self._pem = pem

    def wrap(self, sock: socket, theirs: Identity, deadline: float, *, server: bool) -> socket:
        """Encrypt a connection whose peer has proven its identity.

        Parameters
        ----------
        sock : socket
            Connected, and through the handshake; it lives on in what is returned. The caller closes it where this
            raises.
        theirs : dict
            The proven identity, with the certificate.
        deadline : float
            Absolute time, as of ``time.monotonic()``.
        server : bool
            Whether this side was connected to.

        Raises
        ------
        HandshakeError
            The other end is not the one that has proven itself, or was too slow.
        """
        try:
            proven = base64.b64decode(str(theirs.get("certificate")), validate=True)
            context = self._context(proven, server=server)
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            return context.wrap_socket(sock, server_side=server, suppress_ragged_eofs=False)
        except (ValueError, OSError) as exc:
            raise HandshakeError(f"Expected the certificate that rank {theirs.get('rank')} has proven. {exc}") from exc

    def _context(self, proven: bytes, *, server: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The certificate itself was proven; it names nobody.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=proven)
        if server:
            # Nobody resumes, and a ticket would be written while another thread reads.
            context.num_tickets = 0
        # Python takes a key from a file only; this one is in memory, and no other process has it.
        descriptor = os.memfd_create("sparktf-key", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, self._pem)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return context


def _self_signed() -> tuple[bytes, bytes]:
    """Return a new certificate as DER, and the certificate with its key as PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as exc:
        raise ProtocolError(
            "Expected the package cryptography, which makes the certificates of tls=True. "
            "Install it on every node: pip install 'sparktf[tls]'."
        ) from exc
    key = ec.generate_private_key(ec.SECP256R1())
    # OpenSSL finds the issuer by name, so two certificates must not share one.
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, os.urandom(16).hex())])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID)
        .not_valid_after(now + _VALID)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.DER), secret + certificate.public_bytes(
        serialization.Encoding.PEM
    )


class TlsChannel(Channel):
    """A channel over two encrypted connections, one for each direction.

    An OpenSSL connection must not be read by one thread while another writes to it, and a rank may send and receive at
    the same time. So each of the two connections carries data one way.

    Parameters
    ----------
    outgoing, incoming : socket
        To the same peer, where they are the incoming and the outgoing one; both belong to the channel from now on.
    peer, timeout, on_quiet, outbox, stats
        As for `Channel`.
    """

    def __init__(
        self,
        outgoing: socket,
        incoming: socket,
        peer: int,
        timeout: float,
        on_quiet: Callable[[], None],
        outbox: Outbox,
        stats: Stats,
    ) -> None:
        super().__init__(incoming, peer, timeout, on_quiet, outbox, stats)
        self._incoming, self._outgoing = incoming, outgoing
        self._prepare(outgoing, timeout / WAITS)

    def _prepare(self, sock: socket, wait: float) -> None:
        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        sock.settimeout(wait)

    def _write(self, parts: list[memoryview]) -> int:
        try:
            return self._outgoing.send(parts[0][:_RECORD_BYTES])
        except TimeoutError as exc:
            raise BlockingIOError from exc

    def _read(self, view: memoryview, flags: int) -> int:
        # Waiting awake is for the fastest answers, which nobody expects who encrypts.
        if flags == MSG_DONTWAIT:
            raise BlockingIOError
        try:
            return self._incoming.recv_into(view)
        except TimeoutError as exc:
            raise BlockingIOError from exc

    def set_timeout(self, seconds: float) -> None:
        """Wait for so many seconds from now on; see `Link`."""
        super().set_timeout(seconds)
        with suppress(OSError):
            self._prepare(self._outgoing, seconds / WAITS)

    def shutdown(self) -> None:
        """End both connections; see `Link`."""
        for sock in (self._incoming, self._outgoing):
            end(sock)

    def close(self) -> None:
        """Give both sockets back; see `Link`."""
        self._incoming.close()
        self._outgoing.close()


class TlsControl:
    """An encrypted control connection with the few methods of a socket that `sparktf.transport.watch.Watch` uses.

    Parameters
    ----------
    sock : socket
        Encrypted; belongs to this object from now on.
    """

    def __init__(self, sock: socket) -> None:
        self._sock = sock
        # Several threads tell, one listens, and OpenSSL takes one at a time; nobody waits inside.
        self._lock = threading.Lock()
        self.fileno = sock.fileno
        self.setblocking = sock.setblocking
        self.setsockopt = sock.setsockopt
        self.close = sock.close

    def send(self, data: bytes) -> int:
        """Send, or raise `BlockingIOError` where the peer has not read for long."""
        with self._lock:
            try:
                return self._sock.send(data)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                raise BlockingIOError from exc

    def recv(self, nbytes: int) -> bytes:
        """Return everything that has come: a selector does not see what OpenSSL has read ahead."""
        received = bytearray()
        with self._lock:
            # The last bytes before an end count: they may say why it ends.
            while data := self._receive(nbytes, received):
                received += data
        return bytes(received)

    def _receive(self, nbytes: int, received: bytearray) -> bytes:
        try:
            return self._sock.recv(nbytes)
        except ssl.SSLWantReadError as exc:
            if received:
                return b""
            raise BlockingIOError from exc
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""


def end(sock: socket) -> None:
    """Shut a connection down under whoever uses it.

    Not by ``SSLSocket.shutdown``, after which another thread's data would leave in clear text.
    """
    with suppress(OSError):
        socket.shutdown(sock, SHUT_RDWR)
