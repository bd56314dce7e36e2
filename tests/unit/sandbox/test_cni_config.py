"""Reading CNI configurations and noticing their changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from supervisord_ctr.errors import FailedPrecondition, InvalidArgument
from supervisord_ctr.sandbox.cni_config import ConfigFolder, NetworkList, parse_file, version_of


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def conflist(name: str, **extra: object) -> dict[str, object]:
    return {"cniVersion": "1.0.0", "name": name, "plugins": [{"type": "bridge"}, {"type": "portmap"}], **extra}


def test_a_list_keeps_the_order_of_its_plugins(tmp_path: Path) -> None:
    network = parse_file(write(tmp_path / "a.conflist", conflist("n")))
    assert (network.name, network.version) == ("n", "1.0.0")
    assert [plugin["type"] for plugin in network.plugins] == ["bridge", "portmap"]


def test_a_single_plugin_becomes_a_list_of_one(tmp_path: Path) -> None:
    network = parse_file(write(tmp_path / "a.conf", {"cniVersion": "0.4.0", "name": "n", "type": "bridge", "mtu": 1400}))
    assert network.plugins == ({"type": "bridge", "mtu": 1400},)


def test_the_newest_version_spoken_on_both_sides_is_taken() -> None:
    network = NetworkList.from_json(conflist("n", cniVersion="0.4.0", cniVersions=["0.4.0", "1.1.0", "9.0.0"]))
    assert network.version == "1.1.0"
    assert network.supports("1.1.0")
    assert not NetworkList.from_json(conflist("n", cniVersion="0.4.0")).supports("1.0.0")


@pytest.mark.parametrize(("value", "word"), [
    ("{", "a.conflist"), ([], "not an object"), ({"plugins": []}, "name"), ({"name": "n", "plugins": []}, "no plugins"),
    ({"name": "n", "plugins": [{}]}, "no type"), (conflist("n", cniVersion="7.0.0"), "7.0.0"),
])
def test_what_is_wrong_is_told_with_the_file(tmp_path: Path, value: object, word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        parse_file(write(tmp_path / "a.conflist", value))


def test_versions_compare_as_numbers() -> None:
    assert version_of("0.10.0") > version_of("0.9.9")
    with pytest.raises(InvalidArgument):
        version_of("one")


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"no network configuration in .*"):
        ConfigFolder(tmp_path).load()
    with pytest.raises(FailedPrecondition):
        ConfigFolder(tmp_path / "missing").load()


def test_the_first_files_count_and_others_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "20-b.conflist", conflist("b"))
    write(tmp_path / "10-a.conflist", conflist("a"))
    write(tmp_path / "05-note.txt", "not a configuration")
    assert [network.name for network in ConfigFolder(tmp_path).load()] == ["a"]
    assert [network.name for network in ConfigFolder(tmp_path, 0).load()] == ["a", "b"]


def test_changes_are_noticed_without_being_told(tmp_path: Path) -> None:
    folder = ConfigFolder(tmp_path)
    with pytest.raises(FailedPrecondition):
        folder.load()
    path = write(tmp_path / "a.conflist", conflist("first"))
    assert folder.load()[0].name == "first"
    write(path, conflist("second-name"))
    assert folder.load()[0].name == "second-name"
    os.unlink(path)
    with pytest.raises(FailedPrecondition):
        folder.load()


def test_a_broken_edit_does_not_take_the_network_away(tmp_path: Path) -> None:
    folder = ConfigFolder(tmp_path)
    path = write(tmp_path / "a.conflist", conflist("good"))
    folder.load()
    write(path, "{ broken")
    assert folder.load()[0].name == "good"
    assert "a.conflist" in folder.error


def test_what_is_written_down_reads_back() -> None:
    network = NetworkList.from_json(conflist("n", disableCheck=True))
    assert NetworkList.from_json(network.to_json()) == network
