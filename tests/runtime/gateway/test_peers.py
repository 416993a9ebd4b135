"""Clients that one host can pretend to be are one peer."""

import pytest

from mirror_runtime.gateway.peers import peer_of


@pytest.mark.parametrize(
    ("client", "peer"),
    [
        (("10.0.0.7", 80), "10.0.0.7"),
        (("::ffff:10.0.0.7", 80, 0, 0), "10.0.0.7"),
        (("2001:db8:1:2::1", 80), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::1", 80), "2001:db8:1:2::/64"),
        (("2001:db8:1:3::1", 80), "2001:db8:1:3::/64"),
        (("fe80::1%eth0", 80), "fe80::/64"),
        (("testclient", 80), "testclient"),
        (None, "unknown"),
    ],
)
def test_an_address_stands_for_its_host(client, peer):
    assert peer_of(client) == peer
