"""CDI devices through CRI: described in folders of this test's own, injected by real runc."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until

KIND = "vendor.test/thing"
#: What runs on the host, beside the one that runs in the container.
HOST_HOOKS = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")


def note(folder: Path, name: str) -> dict[str, Any]:
    """A hook that leaves a file."""
    return {"hookName": name, "path": "/bin/sh", "args": ["sh", "-c", f"echo $WHO > {folder}/{name}"], "env": ["WHO=me"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vendor")
    (made / "cdi").mkdir()
    (made / "share").mkdir()
    (made / "share" / "file").write_text("of the vendor")
    (made / "cdi" / "vendor.json").write_text(json.dumps({
        "cdiVersion": "0.6.0", "kind": KIND, "containerEdits": {"env": ["ALL=for-all"]},
        "devices": [
            {"name": "first", "containerEdits": {
                "env": ["FIRST=one"], "deviceNodes": [{"path": "/dev/thing0", "hostPath": "/dev/null"}],
                "mounts": [{
                    "hostPath": str(made / "share"), "containerPath": "/opt/vendor", "options": ["ro", "nosuid", "bind"],
                }],
                "hooks": [note(made, name) for name in HOST_HOOKS] + [
                    {"hookName": "startContainer", "path": "/bin/touch", "args": ["touch", "/tmp/startContainer"]},
                ],
            }},
            {"name": "second", "containerEdits": {
                "env": ["SECOND=two"], "deviceNodes": [
                    {"path": "/dev/thing1", "type": "c", "major": 1, "minor": 11, "permissions": "r", "fileMode": 0o640},
                ],
            }},
        ],
    }))
    return made


@pytest.fixture(scope="module")
def cri(folder: Path) -> Iterator[Cri]:
    with running_cri(settings=f'cdi_dirs = ["{folder / "cdi"}", "{folder / "absent"}"]') as made:
        made.pull()
        yield made


def devices(*names: str) -> list[pb.CDIDevice]:
    return [pb.CDIDevice(name=f"{KIND}={name}") for name in names]


def test_a_cdi_device_comes_with_everything_that_it_states(cri: Cri, folder: Path) -> None:
    pod, config = cri.run_pod()
    script = (
        "echo $ALL $FIRST $SECOND; cat /opt/vendor/file; echo; echo x > /dev/thing0 && echo written;"
        "stat -c '%t:%T' /dev/thing0; ls /tmp; (echo x > /opt/vendor/file) 2>/dev/null || echo read-only"
    )
    container = cri.run(pod, config, script, CDI_devices=devices("first", "first"))
    assert cri.wait_exited(container).exit_code == 0
    assert [text for _, _, text in cri.log(config)] == [
        "for-all one", "of the vendor", "written", "1:3", "startContainer", "read-only",
    ]
    cri.remove(container)
    for name in HOST_HOOKS:
        wait_until(lambda name=name: (folder / name).exists(), f"hook {name} ran", 60)  # type: ignore[misc]
        assert (folder / name).read_text() == "me\n"


def test_cdi_devices_named_by_annotations_join_those_of_the_field(cri: Cri) -> None:
    pod, config = cri.run_pod()
    container = cri.run(
        pod, config, "echo $FIRST $SECOND; stat -c '%t:%T %a' /dev/thing1; (echo x > /dev/thing1) 2>&1 || true",
        CDI_devices=devices("second"), annotations={"cdi.k8s.io/plugin_x": f"{KIND}=first,{KIND}=second"},
    )
    assert cri.wait_exited(container).exit_code == 0
    lines = [text for _, _, text in cri.log(config)]
    assert lines[:2] == ["one two", "1:b 640"]
    assert "not permitted" in lines[2]


def test_a_cdi_device_belongs_to_the_containers_user(cri: Cri) -> None:
    pod, config = cri.run_pod()
    wanted = cri.container_config("stat -c '%u:%g' /dev/thing0 /dev/thing1", CDI_devices=devices("first", "second"))
    wanted.linux.security_context.run_as_user.value = 1000
    container = cri.create(pod, config, wanted)
    cri.start(container)
    assert cri.wait_exited(container).exit_code == 0
    assert [text for _, _, text in cri.log(config)] == ["1000:1000", "1000:1000"]


@pytest.mark.parametrize(("wanted", "message"), [
    ("vendor.test/thing=third", "unresolvable CDI devices vendor.test/thing=third"),
    ("other.test/thing=first", "unresolvable CDI devices other.test/thing=first"),
    ("first", "invalid CDI device reference"),
])
def test_a_cdi_device_that_nobody_describes_is_refused_by_name(cri: Cri, wanted: str, message: str) -> None:
    pod, config = cri.run_pod()
    for asked in ({"CDI_devices": [pb.CDIDevice(name=wanted)]}, {"annotations": {"cdi.k8s.io/x": wanted}}):
        with pytest.raises(grpc.RpcError) as caught:
            cri.create(pod, config, cri.container_config("true", **asked))
        assert message in caught.value.details()
    assert not cri.runtime.ListContainers(pb.ListContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=pod))).containers
