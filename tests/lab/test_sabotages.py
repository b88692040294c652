"""Ten sabotages of two fleets beside each other: the verification fails on each, names its cause
first or second and no other, by the checks concerned; and all is green again once they are undone.

`make sabotage` tries all of them, with the whole verification.
"""

import pytest

from tests.sabotage.catalogue import CATALOGUE
from tests.sabotage.judging import tried, verify
from tests.sabotage.sabotage import Service
from tests.support.fleet import LAB_INVENTORY, PAIR, Fleet

ON_THE_LAB = (
    "stun dropped over ipv4",
    "certificate of turn expired",
    "a user of others",
    "the deny list emptied",
    "the turn secret one rotation behind",
)
ON_THE_PAIR = (
    "ipv6 media dropped",
    "large packets dropped before the host",
    "relay cut off from the sfu",
    "coturn hung",
    "our filter masked",
)


@pytest.fixture
def verified_pair(pair: Fleet) -> Service:
    """The pair, with the listeners that Debian 13 has by itself known to the verification."""
    # What tests before this one have restarted and killed is no fault.
    forget = "journalctl -q --rotate; journalctl -q --vacuum-time=1s; systemctl reset-failed"
    for host in PAIR:
        host.root(f"{forget} 'livekit-server*' 'turnserver@*'")
    pair.data["host"] = {"other_listeners": ["5355/tcp", "5355/udp"]}
    pair.write()
    return Service.of(str(pair.inventory))


def check(name: str, at: Service) -> None:
    result = tried([name], at, "-k", CATALOGUE[name].checks)
    assert result.is_right, result


def check_green(at: Service, *options: str) -> None:
    run = verify(at, (), *options)
    assert run.is_good, [(row.host, row.check, row.findings) for row in run.failed]


@pytest.mark.parametrize("name", ON_THE_LAB)
def test_one_of_the_lab_is_diagnosed(name: str, good: None) -> None:
    check(name, Service.of(LAB_INVENTORY))


@pytest.mark.parametrize("name", ON_THE_PAIR)
def test_one_of_the_pair_is_diagnosed(name: str, verified_pair: Service) -> None:
    check(name, verified_pair)


def test_the_lab_is_green_again(good: None) -> None:
    check_green(Service.of(LAB_INVENTORY))


def test_the_pair_is_green_again(verified_pair: Service) -> None:
    check_green(verified_pair, "-k", "test_hosts or test_paths")
