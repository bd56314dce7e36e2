"""`hosts.toml`: who is asked for a repository, in which order, and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.images.hosts import PULL, HostsConfig, is_loopback, seconds
from supervisord_ctr.images.http import Http, Timeouts
from supervisord_ctr.images.reference import parse
from supervisord_ctr.images.registry import Registry


def config(folder: Path, name: str, text: str) -> HostsConfig:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "hosts.toml").write_text(text)
    return HostsConfig(str(folder))


@pytest.mark.parametrize(("domain", "url"), [
    ("docker.io", "https://registry-1.docker.io"), ("quay.io", "https://quay.io"),
    ("localhost:5000", "http://localhost:5000"), ("127.0.0.1:5000", "http://127.0.0.1:5000"),
    ("localhost", "https://localhost"), ("localhost:443", "https://localhost:443"), ("[::1]:5000", "http://[::1]:5000"),
])
def test_without_configuration(domain: str, url: str) -> None:
    (host,) = HostsConfig().lookup(domain, "pull")
    assert (host.url, host.path) == (url, "/v2")


def test_the_scheme_can_be_asked_for() -> None:
    (host,) = HostsConfig().overridden(default_scheme="http").lookup("quay.io", "pull")
    assert host.url == "http://quay.io"


def test_a_pull_keeps_to_the_hosts_that_it_began_with(tmp_path: Path) -> None:
    hosts = config(tmp_path, "quay.io", '[host."http://mirror:1"]')
    http = Http(Timeouts())
    began = Registry(parse("quay.io/a/b:c"), hosts, http)
    urls = [host.url for host in began.hosts(PULL)]
    assert urls[0] == "http://mirror:1"
    config(tmp_path, "quay.io", "broken")
    assert [host.url for host in began.hosts(PULL)] == urls
    with pytest.raises(InvalidArgument):
        Registry(parse("quay.io/a/b:c"), hosts, http).hosts(PULL)


def test_mirrors_come_first_in_the_order_of_the_file(tmp_path: Path) -> None:
    hosts = config(tmp_path, "quay.io", """
server = "https://real.quay.io"
[host."https://z-mirror:1"]
  capabilities = ["pull", "resolve"]
  dial_timeout = "1m30s"
[host."http://a-mirror:2/prefix"]
  capabilities = ["pull"]
  override_path = true
  skip_verify = true
  [host."http://a-mirror:2/prefix".header]
    X-One = "1"
    X-Two = ["2", "3"]
[host."plain-mirror"]
""")
    pull = hosts.lookup("quay.io", "pull")
    assert [h.url for h in pull] == [
        "https://z-mirror:1", "http://a-mirror:2", "https://plain-mirror", "https://real.quay.io"
    ]
    assert [h.path for h in pull] == ["/v2", "/prefix", "/v2", "/v2"]
    assert [h.is_mirror for h in pull] == [True, True, True, False]
    assert pull[0].dial_timeout == 90
    assert pull[1].headers == {"X-One": ("1",), "X-Two": ("2", "3")}
    assert pull[1].skip_verify
    assert [h.url for h in hosts.lookup("quay.io", "resolve")] == [
        "https://z-mirror:1", "https://plain-mirror", "https://real.quay.io"
    ]
    assert [h.url for h in hosts.lookup("quay.io", "push")] == ["https://plain-mirror", "https://real.quay.io"]


def test_certificates_are_relative_to_the_file(tmp_path: Path) -> None:
    (host,) = config(tmp_path, "quay.io", """
ca = ["ca.pem", "/abs/ca.pem"]
client = [["client.cert", "client.key"], "both.pem"]
""").lookup("quay.io", "pull")
    assert host.ca == (f"{tmp_path}/quay.io/ca.pem", "/abs/ca.pem")
    assert host.client == (
        (f"{tmp_path}/quay.io/client.cert", f"{tmp_path}/quay.io/client.key"), (f"{tmp_path}/quay.io/both.pem", "")
    )


@pytest.mark.parametrize("name", ["localhost_5000_", "localhost:5000", "_default"])
def test_folders_with_ports_and_the_default_one(tmp_path: Path, name: str) -> None:
    hosts = config(tmp_path, name, '[host."http://mirror"]')
    assert hosts.lookup("localhost:5000", "pull")[0].url == "http://mirror"


def test_docker_s_layout_of_certificates(tmp_path: Path) -> None:
    folder = tmp_path / "quay.io"
    folder.mkdir()
    for name in ("a.crt", "b.cert", "b.key"):
        (folder / name).write_text("")
    (host,) = HostsConfig(str(tmp_path)).lookup("quay.io", "pull")
    assert host.ca == (str(folder / "a.crt"),)
    assert host.client == ((str(folder / "b.cert"), str(folder / "b.key")),)


def test_p18_no_fallback_can_be_said(tmp_path: Path) -> None:
    hosts = config(tmp_path, "quay.io", 'fallback = false\n[host."https://only"]')
    assert [h.url for h in hosts.lookup("quay.io", "pull")] == ["https://only"]


@pytest.mark.parametrize("text", [
    "server = ", 'capabilities = ["fly"]', "ca = 5", 'client = [["a","b","c"]]', 'dial_timeout = "soon"',
    'server = "ftp://x"', "host = 3", '[host."https://x"]\nheader = {"A" = "b\\r\\nC: d"}',
])
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"hosts\.toml"):
        config(tmp_path, "quay.io", text).lookup("quay.io", "pull")


def test_s11_a_domain_never_leaves_the_folder(tmp_path: Path) -> None:
    (tmp_path / "hosts").mkdir()
    (tmp_path / "hosts.toml").write_text('server = "https://evil"')
    assert HostsConfig(str(tmp_path / "hosts")).lookup("..", "pull")[0].url == "https://.."


def test_durations_and_loopback() -> None:
    assert (seconds("1h"), seconds("500ms"), seconds("1.5s")) == (3600, 0.5, 1.5)
    assert [is_loopback(h) for h in ("127.9.9.9:1", "localhost", "[::1]:5", "10.0.0.1", "localhost.evil")] == [
        True, True, True, False, False
    ]
