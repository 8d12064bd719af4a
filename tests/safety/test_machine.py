"""What the tests stand on: no network, and libraries new enough to be safe."""

from __future__ import annotations

import socket
from importlib.metadata import version

import offline
import pytest

FLOORS = {"torch": (2, 10), "Pillow": (13, 0, 0), "safetensors": (0, 8)}


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name):
    """Older ones have known holes: in reading pickles, in image decoders, in headers."""
    assert tuple(int(part) for part in version(name).split("+")[0].split(".")[:3]) >= FLOORS[name]


@pytest.mark.parametrize("address", [("192.0.2.1", 9), ("2001:db8::1", 9, 0, 0)])
def test_nothing_reaches_out(address):
    family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
    with socket.socket(family) as connection:
        for connect in (connection.connect, connection.connect_ex):
            with pytest.raises(offline.NetworkError, match=address[0]):
                connect(address)
    with pytest.raises(offline.NetworkError):
        socket.create_connection(("example.org", 80), timeout=1)
    assert len(offline.attempts) == 3
    offline.attempts.clear()


def test_this_machine_may_be_reached():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        socket.create_connection(listener.getsockname(), timeout=5).close()
    assert not offline.attempts
