"""What is found of a path, against something on loopback that answers connectivity checks."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
from aioice import stun as messages

from callready.probes import ice, legs
from callready.probes.legs import Leg
from callready.probes.webrtc import seconds

OFFER = ice.Offer("theirs", "planted-9f3b-in-no-output", "ours", ())


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legs, "_AGAIN", (0.1, 0.2))


class Answering(asyncio.DatagramProtocol):
    """Answers checks, of those only that `lets_through` (by number and size)."""

    def __init__(self, lets_through: Callable[[int, int], bool]) -> None:
        self.lets_through = lets_through
        self.count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.count += 1
        if not self.lets_through(self.count, len(data)):
            return
        asked = messages.parse_message(data)
        assert asked.check_message_integrity(OFFER.password.encode())
        answer = messages.Message(
            messages.Method.BINDING, messages.Class.RESPONSE, asked.transaction_id
        )
        answer.add_message_integrity(OFFER.password.encode())
        self.transport.sendto(bytes(answer), addr)


def leg(lets_through: Callable[[int, int], bool]) -> Leg:
    async def attempt() -> Leg:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: Answering(lets_through), local_addr=("127.0.0.1", 0)
        )
        candidate = ice.Candidate("udp", *transport.get_extra_info("sockname"))
        try:
            (found,) = await legs._each([candidate], partial(legs._direct, OFFER), legs.MAX_LOSS)
        finally:
            transport.close()
        return found

    return asyncio.run(attempt())


def test_a_good_path_has_its_steps_and_no_loss() -> None:
    sizes: set[int] = set()

    def note(_: int, size: int) -> bool:
        sizes.add(size)
        return True

    found = leg(note)
    assert [step.name for step in found.steps] == ["ICE", "ICE 600 B", "ICE 1200 B"]
    assert (found.way, found.family, found.failed, found.loss) == ("UDP", 4, "", 0)
    assert found.rtt is not None
    assert min(sizes) < 150
    assert {600, 1200} <= set(sizes)


@pytest.mark.parametrize(("limit", "step"), [(1000, "ICE 1200 B"), (500, "ICE 600 B"), (0, "ICE")])
def test_what_is_too_large_for_a_path_is_named(limit: int, step: str) -> None:
    found = leg(lambda _, size: size <= limit)
    assert found.failed == step
    assert found.error
    assert found.error.evidence.startswith(f"{step}: ")
    assert step not in [each.name for each in found.steps]


def test_loss_fails_a_path_and_one_packet_does_not() -> None:
    assert leg(lambda count, _: count != 9).failed == ""
    found = leg(lambda count, _: count < 4 or count % 2 == 0)
    assert found.failed == legs.LOSS
    assert found.loss
    assert 0.4 < found.loss < 0.6


def test_a_closed_port_is_known_at_once() -> None:
    async def attempt() -> Leg:
        candidate = ice.Candidate("tcp", "127.0.0.1", 1)
        (found,) = await legs._each([candidate], partial(legs._direct, OFFER), legs.MAX_LOSS)
        return found

    found = asyncio.run(attempt())
    assert found.error
    assert (found.failed, found.error.evidence) == ("TCP", "TCP: Connection refused")
    assert OFFER.password not in repr(found)


def test_times_are_read_as_people_write_them() -> None:
    assert [seconds(each) for each in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]
