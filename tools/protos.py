#!/usr/bin/env python3
"""Generate `supervisord_ctr/api` from `protos/`, or show that it is what the sources make.

    tools/protos.py            write the generated modules
    tools/protos.py --check    write nothing; exit 1 when a committed module differs, or when the
                               definitions differ from the published interfaces

The published interfaces (names, numbers, types and labels: what two programs must agree on) are
data in `tests/conformance/wire.json`.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ROOT / "protos"
REFERENCE = ROOT / "tests" / "conformance" / "wire.json"
FIELD = descriptor_pb2.FieldDescriptorProto


def include_paths() -> list[str]:
    """Where protoc finds google/protobuf and google/rpc: inside the installed packages."""
    paths = [str(SOURCES)]
    for package, below in (("grpc_tools", "_proto"), ("google.rpc", "../..")):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            sys.exit(f"python package {package} is not installed: run 'make setup'")
        paths.append(str((pathlib.Path(next(iter(spec.submodule_search_locations))) / below).resolve()))
    return paths


def protoc(*arguments: str) -> None:
    """Run protoc over every source; its own messages say what is wrong."""
    files = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", *(f"-I{path}" for path in include_paths())]
    plugins = pathlib.Path(sys.executable).parent
    for name in ("mypy", "mypy_grpc"):
        command.append(f"--plugin=protoc-gen-{name}={plugins / f'protoc-gen-{name}'}")
    if subprocess.run([*command, *arguments, *files], check=False, cwd=SOURCES).returncode:
        sys.exit("protoc failed")


def generate(target: pathlib.Path) -> None:
    """Write every generated module and its type stub below `target`."""
    target.mkdir(parents=True, exist_ok=True)
    protoc(f"--python_out={target}", f"--grpc_python_out={target}",
           f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}")
    for stub in target.rglob("*_pb2_grpc.py*"):
        if "class " not in stub.read_text():
            stub.unlink()
    api = target / "supervisord_ctr" / "api"
    for folder in [api, *(path for path in api.rglob("*") if path.is_dir())]:
        if folder.name != "__pycache__":
            text = '"""Generated from protos/ by `make protos`; not edited by hand."""\n'
            (folder / "__init__.py").write_text(text)


def generated_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Generated modules below `root`/supervisord_ctr/api by relative path."""
    api = root / "supervisord_ctr" / "api"
    return {str(path.relative_to(api)): path for path in api.rglob("*") if path.suffix in (".py", ".pyi")}


def stale_modules() -> Iterator[str]:
    """One line for each committed module that the sources would make differently."""
    with tempfile.TemporaryDirectory() as folder:
        fresh_root = pathlib.Path(folder)
        generate(fresh_root)
        fresh, committed = generated_files(fresh_root), generated_files(ROOT)
        for name in sorted(fresh.keys() | committed.keys()):
            if name not in committed:
                yield f"supervisord_ctr/api/{name}: missing"
            elif name not in fresh:
                yield f"supervisord_ctr/api/{name}: no source makes it"
            elif not filecmp.cmp(fresh[name], committed[name], shallow=False):
                yield f"supervisord_ctr/api/{name}: not what the sources make"


def field_facts(field: FIELD, message: descriptor_pb2.DescriptorProto) -> dict[str, Any]:
    """What the wire shows of one field, in the form of the reference."""
    facts: dict[str, Any] = {
        "number": field.number,
        "type": field.type_name.lstrip(".") or FIELD.Type.Name(field.type).removeprefix("TYPE_").lower(),
    }
    if field.label == FIELD.LABEL_REPEATED:
        facts["repeated"] = True
    if field.proto3_optional:
        facts["optional"] = True
    elif field.HasField("oneof_index"):
        facts["oneof"] = message.oneof_decl[field.oneof_index].name
    return facts


def collect(messages: Any, enums: Any, prefix: str, facts: dict[str, Any]) -> None:
    """Add messages and enums, nested ones under dotted names."""
    for enum in enums:
        facts["enums"][prefix + enum.name] = {value.name: value.number for value in enum.value}
    for message in messages:
        name = prefix + message.name
        facts["messages"][name] = {field.name: field_facts(field, message) for field in message.field}
        collect(message.nested_type, message.enum_type, name + ".", facts)


def defined_interfaces() -> dict[str, Any]:
    """Every package that `protos/` defines: {package: {services, messages, enums}}."""
    with tempfile.NamedTemporaryFile() as handle:
        protoc("--include_imports", f"--descriptor_set_out={handle.name}")
        files = descriptor_pb2.FileDescriptorSet.FromString(pathlib.Path(handle.name).read_bytes())
    packages: dict[str, Any] = {}
    for file in files.file:
        facts = packages.setdefault(file.package, {"services": {}, "messages": {}, "enums": {}})
        collect(file.message_type, file.enum_type, "", facts)
        for service in file.service:
            facts["services"][service.name] = {
                method.name: {
                    "input": method.input_type.lstrip("."),
                    "output": method.output_type.lstrip("."),
                    **({"client_streaming": True} if method.client_streaming else {}),
                    **({"server_streaming": True} if method.server_streaming else {}),
                }
                for method in service.method
            }
    return packages


def interface_differences(wanted: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """One line for each fact of `wanted` that `found` lacks or contradicts, and each extra member."""
    for package, parts in wanted.items():
        for part, entries in parts.items():
            for name, members in entries.items():
                have = found.get(package, {}).get(part, {}).get(name)
                if have is None:
                    yield f"{package}.{name}: missing from {part}"
                    continue
                for member in sorted(members.keys() | have.keys()):
                    if members.get(member) != have.get(member):
                        yield f"{package}.{name}.{member}: {have.get(member)}, published {members.get(member)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    wanted = json.loads(REFERENCE.read_text())
    problems = [*stale_modules(), *interface_differences(wanted, defined_interfaces())]
    print("\n".join(problems) if problems else f"generated code is current; {len(wanted)} packages agree")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
