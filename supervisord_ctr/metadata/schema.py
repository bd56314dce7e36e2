"""The schema, drawn; and the migrations that lead to it.

    namespaces          name*                                        a tenancy and its labels
    containers          namespace* id*                               labels, image, runtime, spec, extensions, snapshot
    images              namespace* name*                             a name for a target descriptor
    blobs               namespace* digest*                           who may see a blob of the content store
    ingests             namespace* ref*                              a client's ref → the ref in the content store
    snapshots           namespace* snapshotter* key*                 a client's key → the key in the snapshotter, parent
    leases              namespace* id*
    lease_resources     namespace* lease* type* id*                  what a lease protects
    sandboxes           namespace* id*
    snapshot_records    snapshotter* id*                             what a local snapshotter knows of its directories
    cri_records         kind* id*                                    the Kubernetes face's own records, opaque
    addresses           network* address*                            leases of the embedded bridge
    activations         namespace* name*                             mounts that the mount service activated
    facts               key*                                         single values: uuid, sequence

`*` marks the primary key; every table is WITHOUT ROWID, so a row is one look-up in one tree. Times are
seconds since the epoch (REAL). Labels, annotations and extensions are JSON texts, NULL when empty. A
google.protobuf.Any is two columns, `…_url` and `…`, and is never looked into.

A migration never changes after it was released; the next one follows it. `PRAGMA user_version` says how
many have run.
"""

from __future__ import annotations

import sqlite3

from supervisord_ctr.errors import FailedPrecondition

_FIRST = """
CREATE TABLE namespaces (name TEXT PRIMARY KEY, labels TEXT) WITHOUT ROWID;
CREATE TABLE containers (
    namespace TEXT, id TEXT, created REAL, updated REAL, labels TEXT, image TEXT,
    runtime TEXT, options_url TEXT, options BLOB, spec_url TEXT, spec BLOB,
    snapshotter TEXT, snapshot_key TEXT, extensions TEXT, sandbox TEXT,
    PRIMARY KEY (namespace, id)
) WITHOUT ROWID;
CREATE TABLE images (
    namespace TEXT, name TEXT, created REAL, updated REAL, labels TEXT,
    media_type TEXT, digest TEXT, size INTEGER, annotations TEXT,
    PRIMARY KEY (namespace, name)
) WITHOUT ROWID;
CREATE TABLE blobs (
    namespace TEXT, digest TEXT, size INTEGER, created REAL, updated REAL, labels TEXT,
    PRIMARY KEY (namespace, digest)
) WITHOUT ROWID;
CREATE INDEX blobs_by_digest ON blobs (digest);
CREATE TABLE ingests (
    namespace TEXT, ref TEXT, backend TEXT, expires REAL, expected TEXT,
    PRIMARY KEY (namespace, ref)
) WITHOUT ROWID;
CREATE TABLE snapshots (
    namespace TEXT, snapshotter TEXT, key TEXT, backend TEXT, parent TEXT, created REAL, updated REAL, labels TEXT,
    intent TEXT,
    PRIMARY KEY (namespace, snapshotter, key)
) WITHOUT ROWID;
CREATE INDEX snapshots_by_parent ON snapshots (namespace, snapshotter, parent);
CREATE TABLE leases (
    namespace TEXT, id TEXT, created REAL, labels TEXT,
    PRIMARY KEY (namespace, id)
) WITHOUT ROWID;
CREATE TABLE lease_resources (
    namespace TEXT, lease TEXT, type TEXT, id TEXT,
    PRIMARY KEY (namespace, lease, type, id)
) WITHOUT ROWID;
CREATE TABLE sandboxes (
    namespace TEXT, id TEXT, created REAL, updated REAL, labels TEXT,
    runtime TEXT, options_url TEXT, options BLOB, spec_url TEXT, spec BLOB, extensions TEXT, sandboxer TEXT,
    PRIMARY KEY (namespace, id)
) WITHOUT ROWID;
CREATE TABLE snapshot_records (
    snapshotter TEXT, id INTEGER, key TEXT, parent INTEGER, kind INTEGER, created REAL, updated REAL, labels TEXT,
    size INTEGER, inodes INTEGER,
    PRIMARY KEY (snapshotter, id)
) WITHOUT ROWID;
CREATE TABLE cri_records (kind TEXT, id TEXT, value BLOB, PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE TABLE addresses (network TEXT, address TEXT, owner TEXT, PRIMARY KEY (network, address)) WITHOUT ROWID;
CREATE UNIQUE INDEX addresses_by_owner ON addresses (network, owner);
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""

_ACTIVATIONS = """
CREATE TABLE activations (
    namespace TEXT, name TEXT, value TEXT,
    PRIMARY KEY (namespace, name)
) WITHOUT ROWID;
"""

#: Each brings a database from the version before it to its own number (its place, counted from 1).
MIGRATIONS: tuple[str, ...] = (_FIRST, _ACTIVATIONS)
VERSION = len(MIGRATIONS)

#: Tables and their key columns, for salvage and for `doctor`.
TABLES: dict[str, tuple[str, ...]] = {
    "namespaces": ("name",),
    "containers": ("namespace", "id"),
    "images": ("namespace", "name"),
    "blobs": ("namespace", "digest"),
    "ingests": ("namespace", "ref"),
    "snapshots": ("namespace", "snapshotter", "key"),
    "leases": ("namespace", "id"),
    "lease_resources": ("namespace", "lease", "type", "id"),
    "sandboxes": ("namespace", "id"),
    "snapshot_records": ("snapshotter", "id"),
    "cri_records": ("kind", "id"),
    "addresses": ("network", "address"),
    "activations": ("namespace", "name"),
    "facts": ("key",),
}


def version(connection: sqlite3.Connection) -> int:
    """How many migrations the database has seen."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection, *, upto: int = VERSION) -> int:
    """Run what is missing, each migration in a transaction of its own; returns how many ran.

    FailedPrecondition for a database that a newer release wrote: it is left alone.
    """
    found = version(connection)
    if found > VERSION:
        raise FailedPrecondition(
            f"metadata database has schema version {found}, this release knows {VERSION}: it was written by a newer one"
        )
    for number in range(found + 1, upto + 1):
        # executescript would commit on its own; this keeps script and version in one transaction.
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in MIGRATIONS[number - 1].split(";"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
    return max(0, upto - found)
