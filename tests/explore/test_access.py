"""Who is answered: names of this machine, holders of the token, pages of this server."""

import re

import pytest

from mediafm_ray.explore.access import is_loopback, token_of
from mediafm_ray.explore.queries import link
from tests.explore.made import FILM, client_of, config_of

TOKEN = "a token & more=1%"
TITLE, MEDIA, THUMBNAIL = link("/title", id=FILM), link("/media", id=FILM), link("/thumbnail", id=FILM, shot=0)
ADDRESSES = ["/", "/titles", TITLE, MEDIA, THUMBNAIL, "/static/explore.js", "/nothing"]
OWN = ["127.0.0.1:8642", "localhost:1", "LOCALHOST", "[::1]:8642"]
FOREIGN = ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.1", "[::2]"]
FOREIGN += ["127.0.0.1@evil.example", "evil.example#127.0.0.1", "2130706433", "[", "]"]


@pytest.fixture(scope="module")
def guarded(root):
    """A server that others can reach."""
    return client_of(config_of(root), host="0.0.0.0", hosts=("explore.example",), token=TOKEN)


@pytest.mark.parametrize(("host", "status"), [*((host, 200) for host in OWN), *((host, 421) for host in FOREIGN)])
def test_a_server_of_this_machine_answers_under_its_names_only(client, host, status):
    for address in ADDRESSES[:4]:
        answer = client.get(address, headers={"host": host})
        assert answer.status_code == status, (host, address)
        assert status == 200 or FILM not in answer.text


@pytest.mark.parametrize(
    ("host", "status"), [("192.0.2.7:8642", 403), ("explore.example", 403), ("[2001:db8::1]", 403), ("evil.example", 421)]
)
def test_a_server_that_others_reach_answers_to_addresses_and_given_names(guarded, host, status):
    assert guarded.get("/", headers={"host": host}).status_code == status


def test_without_the_token_nothing_is_answered(guarded):
    guarded.cookies.clear()
    for address in ADDRESSES:
        for extra in ({}, {"cookie": "mediafm_explore_8642=wrong"}, {"cookie": "mediafm_explore_8642="}, {"cookie": "\x01;;=="}):
            answer = guarded.get(address, headers=extra)
            assert (answer.status_code, FILM in answer.text) == (403, False)
    for token in ("", "wrong", TOKEN + "x", TOKEN[:-1], "\u2603"):
        assert guarded.get(link("/", token=token)).status_code == 403
    assert guarded.post("/export", content=b"format=csv&places=[]").status_code == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(guarded):
    guarded.cookies.clear()
    answer = guarded.get(link("/title", id="a & b", token=TOKEN))
    assert (answer.status_code, answer.headers["location"]) == (303, "/title?id=a+%26+b")
    cookie = answer.headers["set-cookie"]
    assert "; Path=/; HttpOnly; SameSite=Strict" in cookie
    for address in ADDRESSES[:-1]:
        assert guarded.get(address).status_code == 200
    guarded.cookies.clear()
    assert guarded.get(f"//evil.example/?token={re.escape('x')}").status_code in (403, 421)


def test_the_way_back_stays_on_this_server(guarded):
    for path in ("/%2Fevil.example", "/%5Cevil.example", "/%0d%0aset-cookie:a"):
        guarded.cookies.clear()
        location = guarded.get(f"{path}?token={TOKEN.replace('%', '%25').replace('&', '%26').replace(' ', '+')}").headers["location"]
        assert re.match(r"/[^/\\]", location), location
        assert "\n" not in location


def test_every_answer_is_bound_to_this_server(client):
    for address in ADDRESSES:
        headers = client.get(address).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["cross-origin-resource-policy"]) == ("nosniff", "same-origin")
        assert headers["referrer-policy"] == "no-referrer"


def test_forms_of_other_sites_are_refused(client):
    form = {"content": b'format=json&places=[["film",1]]'}
    assert client.post("/export", headers={"sec-fetch-site": "cross-site"}, **form).status_code == 403
    assert client.post("/export", headers={"sec-fetch-site": "same-origin"}, **form).status_code == 200
    assert client.post("/export", **form).status_code == 200


def test_a_token_is_made_where_others_can_reach_the_server():
    assert [token_of(host, "") for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2")] == [""] * 4
    made = {token_of(host, "") for host in ("0.0.0.0", "192.0.2.7", "::", "example.org") for _ in range(2)}
    assert len(made) == 8
    assert min(map(len, made)) >= 32
    assert token_of("127.0.0.1", "given") == token_of("0.0.0.0", "given") == "given"
    assert not is_loopback("127.0.0.1.evil.example")
