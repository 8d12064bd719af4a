"""The tests stay on this machine: whatever reaches for another host fails, and is remembered."""

import ipaddress
import socket

attempts: list[str] = []
"""Where anything wanted to connect to but this machine: none, however the tests went."""


class NetworkError(AssertionError):
    """Something reached out to the network."""


def guarded(inner, place):
    """``inner``, refused where the host at ``place`` of its arguments is not this machine."""

    def outer(*arguments, **options):
        host = place(*arguments)
        try:
            here = host in (None, "", "localhost", b"localhost") or ipaddress.ip_address(host).is_loopback
        except ValueError:
            here = False
        if not here:
            attempts.append(str(host))
            raise NetworkError(f"something reached out to {host}")
        return inner(*arguments, **options)

    return outer


def address(connection, to, *_):
    return to[0] if connection.family in (socket.AF_INET, socket.AF_INET6) else None


def close():
    """From here on nothing but this machine is reached."""
    socket.socket.connect = guarded(socket.socket.connect, address)
    socket.socket.connect_ex = guarded(socket.socket.connect_ex, address)
    socket.getaddrinfo = guarded(socket.getaddrinfo, lambda host, *_: host)
