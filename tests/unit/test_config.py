"""Configuration: types, origins, refusals (P21)."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from supervisord_ctr import __main__, config
from supervisord_ctr.errors import InvalidArgument


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_p21_every_value_tells_where_it_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, 'log_level = "debug"\n[cri.cni]\nmax_conf_num = 2\n[runtime.classes.crun]\nbinary = "/usr/bin/crun"\n')
    loaded = config.load(path, {"root": "/srv/x"})
    values = {value.key: value for value in loaded.values()}
    assert (values["root"].value, values["root"].origin) == ("/srv/x", "option --root")
    assert (values["log_level"].value, values["log_level"].origin) == ("debug", f"file {path}")
    assert values["cri.cni.max_conf_num"].value == 2
    assert values["runtime.classes.crun.binary"].value == "/usr/bin/crun"
    assert values["runtime.classes.runc.type"].origin == "default"
    assert all(value.help for value in values.values())


def test_what_show_prints_is_a_configuration_file_of_the_same_values(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, '[registry]\nretries = 9\n[proxy_plugins.soci]\naddress = "/run/s.sock"\n'))
    again = config.load(write(tmp_path, config.render(loaded)))
    assert again.settings == loaded.settings
    assert tomllib.loads(config.render(loaded))["registry"]["retries"] == 9


def test_a_moved_state_takes_the_socket_along(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, ""), {"state": "/srv/state"})
    assert loaded.settings.address == "/srv/state/supervisord-ctr.sock"
    assert config.load(write(tmp_path, ""), {"state": "/srv/state", "address": "/a.sock"}).settings.address == "/a.sock"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 1", "unknown key colour"),
        ("[cri.cni]\nmax_conf = 1", "unknown key cri.cni.max_conf"),
        ("root = 1", "root must be a string"),
        ("[grpc]\nuid = true", "grpc.uid must be an integer"),
        ('[cri.cni]\nbin_dirs = "x"', "must be a list of strings"),
        ("[restart]\ninterval = -0.5", "restart.interval must not be below 0, not -0.5"),
        ("[registry]\npush_chunk_size = -1", "registry.push_chunk_size must not be below 0"),
        ("[gc]\ninterval = nan", "gc.interval must not be below 0, not nan"),
        ('[content]\nsharing_policy = "some"', "content.sharing_policy 'some' must be shared or isolated"),
        ("cri = 1", "cri must be a table"),
        ('log_level = "loud"', "log_level 'loud'"),
        ('root = "relative"', "must be an absolute path"),
        ('root = "/x"\nstate = "/x"', "must differ"),
        ('[runtime]\ndefault = "kata"', "not one of runtime.classes"),
        ("root = ", "configuration file"),
        ('[proxy_plugins.x]\ntype = "snapshot"', "proxy_plugins.x needs an address"),
        ('[proxy_plugins.x]\ntype = "content"\naddress = "/s"', "type 'content' is not supported, only snapshot is"),
        ('[cri]\nselinux_category_range = 1', "cri.selinux_category_range 1 must be from 2 to 1024"),
        ('[cri]\nmax_log_line = 0', "cri.max_log_line 0 must be from 256"),
        ('[cri]\nsandbox_image = "pause"', "unknown key cri.sandbox_image"),
        (f'address = "/{"a" * 120}"', "107 bytes"),
    ],
)
def test_slips_are_refused_and_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        config.load(write(tmp_path, text))
    assert words in caught.value.message


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no configuration file"):
        config.load(tmp_path / "absent.toml")


def test_show_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main(["--config", str(write(tmp_path, "")), "config", "show", "--format", "json"])
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["gc.interval"]["value"] == 300.0


def test_a_bad_file_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(["--config", str(write(tmp_path, "x = 1")), "config", "show"])
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("supervisord-ctr: ")
    assert text.count("\n") == 1
