import pytest

from service.access.hosts import Hosts


def foreign(hosts, name):
    return hosts.foreign([(b"accept", b"*/*"), (b"host", name.encode())]) is not None


@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("localhost", True), ("localhost:3000", True), ("LOCALHOST:3000", True), ("localhost.", True),
        ("127.0.0.1:3000", True), ("[::1]:3000", True), ("10.1.2.3", True),
        ("evil.example", False), ("evil.example:3000", False), ("localhost.evil.example", False), ("", False),
        ("127.0.0.1.evil.example", False), ("[evil]", False),
    ],
)  # fmt: skip
def test_on_a_loopback_address_a_web_page_cannot_reach_it_under_its_own_name(bound, name, known):
    assert foreign(Hosts(bound, ()), name) is not known


def test_a_service_that_is_open_to_the_network_answers_to_any_name():
    assert not foreign(Hosts("0.0.0.0", ()), "models.example")


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_the_operators_names_are_answered_and_no_others(bound):
    hosts = Hosts(bound, ("Models.example",))
    assert not foreign(hosts, "models.example:443")
    assert not foreign(hosts, "127.0.0.1")
    assert foreign(hosts, "other.example")


def test_the_refusal_says_what_to_do():
    assert "MODEPATH_HOSTS" in (Hosts("127.0.0.1", ()).foreign([(b"host", b"a.example")]) or "")


def test_a_request_without_the_header_is_not_a_browsers():
    assert Hosts("127.0.0.1", ()).foreign([]) is None
