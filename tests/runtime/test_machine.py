"""The tests run without a network and with libraries that have no known holes."""

from __future__ import annotations

import socket
from importlib.metadata import version

import offline
import pytest

MINIMUM_VERSIONS = {"torch": (2, 10), "Pillow": (13, 0, 0), "safetensors": (0, 8)}


@pytest.mark.parametrize("name", MINIMUM_VERSIONS)
def test_minimum_versions(name):
    """Older versions have known holes in reading pickles, images or headers."""
    assert tuple(int(part) for part in version(name).split("+")[0].split(".")[:3]) >= MINIMUM_VERSIONS[name]


@pytest.mark.parametrize("address", [("192.0.2.1", 9), ("2001:db8::1", 9, 0, 0)])
def test_other_hosts_are_refused(address):
    family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
    with socket.socket(family) as connection:
        for connect in (connection.connect, connection.connect_ex):
            with pytest.raises(offline.NetworkError, match=address[0]):
                connect(address)
    with pytest.raises(offline.NetworkError):
        socket.create_connection(("example.org", 80), timeout=1)
    assert len(offline.attempts) == 3
    offline.attempts.clear()


def test_this_machine_is_allowed():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        socket.create_connection(listener.getsockname(), timeout=5).close()
    assert not offline.attempts
