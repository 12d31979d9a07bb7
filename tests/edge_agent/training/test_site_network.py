"""Addresses of a site's machines."""

from __future__ import annotations

import pytest

from edge_agent.training.site_network import endpoint, interface_of, own_address, require_machines
from edgefl.errors import ConfigError


def test_the_agents_machine_has_the_rendezvous_and_another_the_address_on_the_way_to_it():
    assert endpoint("[::1]:29400") == ("::1", 29400)
    assert own_address("127.0.0.1:29400", leads=True) == "127.0.0.1"
    assert own_address("127.0.0.9:29400", leads=False) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") == "lo"


@pytest.mark.parametrize("text", ["here", "here:", ":29400", "here:many", "here:70000"])
def test_what_is_no_rendezvous_is_refused(text):
    with pytest.raises(ConfigError, match=r"is not HOST:PORT, e\.g\. 10\.0\.0\.1:29400"):
        own_address(text, leads=True)


def test_a_rendezvous_elsewhere_is_refused_on_the_agents_machine():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is not an address of this machine, where the agent runs"):
        own_address("192.0.2.1:29400", leads=True)
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid cannot be reached"):
        own_address("no-such-host.invalid:29400", leads=False)


@pytest.mark.parametrize("number", [1, 0, 257])
def test_a_site_has_two_machines_or_more(number):
    with pytest.raises(ConfigError, match=f"--site-machines {number} must be 2 or more"):
        require_machines(number)
