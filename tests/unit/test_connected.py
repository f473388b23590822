"""One connection a site, used by one call at a time: whichever is over is closed, and none in a call before its end."""

from __future__ import annotations

import socket

import pytest

from fedllm.federation.server.connected import Connected, Connection


@pytest.fixture
def connections():
    made = [Connection(socket.socket(), serial) for serial in "12"]
    yield made
    for each in made:
        each.socket.close()


def closed(connection):
    return connection.socket.fileno() == -1


def test_a_connection_is_used_by_one_call_at_a_time(connections):
    one, _ = connections
    connected = Connected()
    assert connected.take("a") is None and "a" not in connected
    connected.put("a", one)
    assert connected.take("a") is one and connected.take("a") is None and "a" in connected
    connected.give_back("a", one, whole=True)
    assert connected.take("a") is one and not closed(one)


def test_one_that_broke_within_a_message_is_used_no_more(connections):
    one, _ = connections
    connected = Connected()
    connected.put("a", one)
    connected.take("a")
    connected.give_back("a", one, whole=False)
    assert closed(one) and "a" not in connected


@pytest.mark.parametrize("in_a_call", [False, True])
def test_a_newer_one_takes_the_place_of_the_one_before_which_ends_with_its_call(connections, in_a_call):
    one, two = connections
    connected = Connected()
    connected.put("a", one)
    if in_a_call:
        connected.take("a")
    connected.put("a", two)
    assert closed(one) != in_a_call
    assert connected.take("a") is two
    if in_a_call:
        connected.give_back("a", one, whole=True)
        assert closed(one) and not closed(two)


@pytest.mark.parametrize("in_a_call", [False, True])
def test_once_it_is_over_all_are_closed_and_none_is_taken_in(connections, in_a_call):
    one, two = connections
    connected = Connected()
    connected.put("a", one)
    if in_a_call:
        connected.take("a")
    connected.close()
    assert closed(one) != in_a_call
    if in_a_call:
        connected.give_back("a", one, whole=True)
    connected.put("a", two)
    assert closed(one) and closed(two) and "a" not in connected
