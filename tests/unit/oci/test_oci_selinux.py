"""SELinux: labels of the policy, categories, what a request changes, and labels of files."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisord_ctr import errors
from supervisord_ctr.oci import selinux
from supervisord_ctr.oci.selinux import Asked, Context

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"
PROCESS = Context("system_u", "system_r", "container_t", "s0")
FILE = Context("system_u", "object_r", "container_file_t", "s0")
DEFAULTS = selinux.Defaults(PROCESS, FILE)
CONTEXTS = """\
# what containers run as
; and another comment = "x"
process = "system_u:system_r:container_t:s0"
content = "system_u:object_r:virt_var_lib_t:s0"
file="system_u:object_r:container_file_t:s0"

  ro_file = system_u:object_r:container_ro_file_t:s0
nothing here
"""


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose kernel knows every label; its policy "strict" and the files of it."""
    for name in ("fs", "strict/contexts", "shared"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("enforce", "context"):
        (tmp_path / "fs" / name).touch()
    (tmp_path / "config").write_text('SELINUX=enforcing\n# SELINUXTYPE=mls\nSELINUXTYPE=strict\n')
    monkeypatch.setattr(selinux, "SELINUXFS", str(tmp_path / "fs"))
    monkeypatch.setattr(selinux, "CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(selinux, "POLICIES", str(tmp_path))
    monkeypatch.setattr(selinux, "CONTAINER_CONTEXTS", str(tmp_path / "shared" / "contexts"))
    selinux._tell_of_no_labels.cache_clear()
    return tmp_path


def state(host: Path, text: str) -> None:
    (host / "strict" / "contexts" / "lxc_contexts").write_text(text)


# -- the policy's labels -----------------------------------------------------------------------------


def test_labels_are_those_of_the_policy_in_force(host: Path) -> None:
    state(host, CONTEXTS)
    assert selinux.defaults() == DEFAULTS


def test_a_file_of_the_container_policy_comes_first(host: Path) -> None:
    state(host, CONTEXTS)
    (host / "shared" / "contexts").write_text(CONTEXTS.replace("container_t", "other_t"))
    found = selinux.defaults()
    assert found is not None
    assert found.process.type == "other_t"


@pytest.mark.parametrize("text", [None, "", "process = \"\"\n", "process = \"container_t\"\nfile = \"x_t\"\n",
                                  CONTEXTS.replace("\nfile", "\n#file")])
def test_a_policy_without_labels_for_containers_gives_them_none(
    host: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    if text is not None:
        state(host, text)
    with caplog.at_level(logging.WARNING):
        assert selinux.defaults() is None
        assert selinux.defaults() is None
    [message] = caplog.messages
    assert "containers run without selinux labels" in message
    assert str(host / "strict" / "contexts" / "lxc_contexts") in message


def test_labels_that_the_loaded_policy_lacks_are_not_given(
    host: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state(host, CONTEXTS)
    monkeypatch.setattr(selinux, "known", lambda label: "container_file_t" not in label)
    assert selinux.defaults() is None
    assert "system_u:object_r:container_file_t:s0, which the loaded policy does not have" in caplog.text


@pytest.mark.parametrize(("text", "expected"), [
    ("SELINUXTYPE=mls\n", "mls"), (" SELINUXTYPE = \"mls\" \n", "mls"), ("SELINUX=permissive\n", "targeted"),
    ("SELINUXTYPE=\n", "targeted"), (None, "targeted"),
])
def test_the_type_of_the_policy(host: Path, text: str | None, expected: str) -> None:
    (host / "config").unlink()
    if text is not None:
        (host / "config").write_text(text)
    assert selinux.policy_type() == expected


def test_a_kernel_with_selinux_is_known_by_its_file_system(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert selinux.enabled()
    monkeypatch.setattr(selinux, "SELINUXFS", str(host / "none"))
    assert not selinux.enabled()


@pytest.mark.parametrize(("number", "expected"), [(errno.EINVAL, False), (errno.EACCES, True), (errno.ENOENT, True)])
def test_only_the_kernel_can_say_that_a_label_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, number: int, expected: bool
) -> None:
    assert selinux.known(LABEL)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", refuse)
    assert selinux.known(LABEL) is expected


def test_a_label_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "known", lambda label: "nope_t" not in label)
    selinux.check_known("", LABEL)
    with pytest.raises(errors.InvalidArgument, match="a:b:nope_t:s0"):
        selinux.check_known(LABEL, "a:b:nope_t:s0")


# -- labels and what is asked for ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a:b:c", "a:b:c:s0", "a:b:c:s0-s0:c1,c2", "a:b:c:s0:c0.c1023"])
def test_labels_are_read_and_written_as_they_are(text: str) -> None:
    assert str(Context.parse(text)) == text


@pytest.mark.parametrize("text", ["", "a", "a:b", ":b:c", "a::c:s0"])
def test_what_is_no_label_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="is not an selinux label"):
        Context.parse(text)


@pytest.mark.parametrize("level", ["", "s0", "s0-s15", "s0:c1", "s0:c1,c2", "s0-s0:c0.c1023", "s1:c1.c3,c5"])
def test_levels(level: str) -> None:
    Asked(level=level).check()


@pytest.mark.parametrize("level", ["s0,c4,c5", "c1", "s", "s0:", "s0:c1,", "s0:c12345", "s0:c1 ", "s0:c1\n", "s0:c1:c2"])
def test_malformed_levels_are_refused(level: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="is malformed"):
        Asked(level=level).check()


@pytest.mark.parametrize("part", ["user", "role", "type"])
@pytest.mark.parametrize("value", ["a:b", 'a",upperdir=/etc,"', "a b", "a\n"])
def test_a_part_cannot_smuggle_in_another(part: str, value: str) -> None:
    Asked(**{part: "a-b.c_t"}).check()
    with pytest.raises(errors.InvalidArgument, match=f"selinux {part} .* is malformed"):
        Asked(**{part: value}).check()


def test_categories_are_two_and_in_order() -> None:
    for _ in range(200):
        sensitivity, categories = selinux.draw_level(()).split(":")
        low, high = (int(name.removeprefix("c")) for name in categories.split(","))
        assert sensitivity == "s0"
        assert 0 <= low < high < 1024


def test_every_pair_is_drawn_once_and_then_none_is_left() -> None:
    taken: set[str] = set()
    for _ in range(10):
        taken.add(selinux.draw_level(taken, 5))
    assert len(taken) == 10
    with pytest.raises(errors.ResourceExhausted, match="5 selinux categories"):
        selinux.draw_level(taken, 5)


@pytest.mark.parametrize(("asked", "expected"), [
    (Asked(), "system_u:system_r:container_t:s0:c1,c2"),
    (Asked(type="x_t"), "system_u:system_r:x_t:s0:c1,c2"),
    (Asked(level="s0:c9"), "system_u:system_r:container_t:s0:c9"),
    (Asked("a", "b", "c", "s1"), "a:b:c:s1"),
])
def test_a_pod_is_labelled_as_the_policy_says_but_for_what_it_asks(asked: Asked, expected: str) -> None:
    assert str(selinux.pod_label(DEFAULTS, asked, "s0:c1,c2")) == expected


def test_a_policy_without_levels_gets_none_drawn() -> None:
    plain = selinux.Defaults(Context("u", "r", "t"), Context("u", "o", "f"))
    pod = selinux.pod_label(plain, Asked(), "s0:c1,c2")
    assert str(pod) == "u:r:t"
    assert selinux.container_labels(plain, pod, Asked()) == selinux.Labels("u:r:t", "u:o:f")


@pytest.mark.parametrize(("asked", "process", "mount"), [
    (Asked(), "a:b:pod_t:s0:c1,c2", "a:object_r:container_file_t:s0:c1,c2"),
    (Asked(type="x_t"), "system_u:system_r:x_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"),
    (Asked(level="s0"), "system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0"),
    (Asked(user="me"), "me:system_r:container_t:s0:c1,c2", "me:object_r:container_file_t:s0:c1,c2"),
])
def test_a_container_has_the_categories_of_its_pod_unless_it_asks_for_others(
    asked: Asked, process: str, mount: str
) -> None:
    pod = Context("a", "b", "pod_t", "s0:c1,c2")
    assert selinux.container_labels(DEFAULTS, pod, asked) == selinux.Labels(process, mount)


# -- labels of files -------------------------------------------------------------------------------------


def label_of(path: Path) -> str:
    return os.getxattr(path, "security.selinux", follow_symlinks=False).rstrip(b"\0").decode()


def has_label(path: Path) -> bool:
    return "security.selinux" in os.listxattr(path, follow_symlinks=False) and label_of(path) == LABEL


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of everything, with a link that leaves it; skips where files cannot be labelled."""
    folder = tmp_path / "tree"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "file").write_text("x")
    os.mkfifo(folder / "a" / "fifo")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    (folder / "a" / "link").symlink_to(tmp_path / "outside")
    (folder / "dangling").symlink_to("nowhere")
    try:
        os.setxattr(folder, "security.selinux", b"other:object_r:thing_t:s0")
    except OSError as error:
        pytest.skip(f"files cannot be labelled here: {error}")
    return folder


def test_everything_below_is_labelled_and_no_link_is_followed(tree: Path) -> None:
    before = os.listdir("/proc/self/fd")
    selinux.relabel(str(tree), LABEL)
    assert has_label(tree)
    below = list(tree.rglob("*"))
    assert len(below) == 6
    assert [path for path in below if not has_label(path)] == []
    assert not has_label(tree.parent / "outside")
    assert not has_label(tree.parent / "outside" / "file")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    selinux.relabel(str(tree), LABEL)


def test_a_single_file_is_labelled(tree: Path) -> None:
    selinux.relabel(str(tree / "a" / "file"), LABEL)
    assert has_label(tree / "a" / "file")
    assert not has_label(tree / "a")


def test_a_path_through_a_link_is_refused(tree: Path) -> None:
    with pytest.raises(errors.Error, match="failed to relabel"):
        selinux.relabel(str(tree / "a" / "link" / "file"), LABEL)
    assert not has_label(tree.parent / "outside" / "file")


def test_what_has_the_label_is_not_written(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selinux.relabel(str(tree), LABEL)
    monkeypatch.setattr(os, "setxattr", lambda *_: pytest.fail("written"))
    selinux.relabel(str(tree), LABEL)


@pytest.mark.parametrize("path", ["/", "/etc", "/etc/", "/usr", "/var/lib", "/home", "/run", "//"])
def test_folders_of_the_host_are_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(os, "setxattr", lambda *_: pytest.fail("written"))
    with pytest.raises(errors.FailedPrecondition, match="is a folder of the host"):
        selinux.relabel(path, LABEL)


def test_the_home_of_the_daemon_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", f"{tree}/")
    with pytest.raises(errors.FailedPrecondition, match="is a folder of the host"):
        selinux.relabel(str(tree), LABEL)
    assert not has_label(tree)


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_file_systems_without_labels_are_left_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "setxattr", failing(errno.ENOTSUP))
    monkeypatch.setattr(os, "listdir", lambda *_: pytest.fail("looked into"))
    selinux.relabel(str(tree), LABEL)


def test_what_cannot_be_labelled_is_an_error_and_leaves_nothing_open(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "setxattr", failing(errno.EROFS))
    with pytest.raises(errors.Error, match="failed to relabel .*read-only file system"):
        selinux.relabel(str(tree), LABEL)
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before


def test_endless_nesting_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "_DEPTH", 2)
    with pytest.raises(errors.ResourceExhausted, match="nested deeper than 2"):
        selinux.relabel(str(tree), LABEL)
