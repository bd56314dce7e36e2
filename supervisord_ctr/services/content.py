"""containerd.services.content.v1.Content: blobs by digest and resumable ingests.

Owns the protocol of `Write` and the windows of `Read`. Memory stays flat: a message is written
before the next one is taken, and blobs are read in pieces.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from google.protobuf import empty_pb2

from supervisord_ctr.api.services.content.v1 import content_pb2 as pb
from supervisord_ctr.api.services.content.v1 import content_pb2_grpc
from supervisord_ctr.errors import AlreadyExists, InvalidArgument, NotFound, OutOfRange
from supervisord_ctr.metadata import Database
from supervisord_ctr.metadata.content import ContentWriter
from supervisord_ctr.model import ContentInfo, IngestStatus
from supervisord_ctr.names import check_digest
from supervisord_ctr.rpc import Context, lease_of, namespace_of, timestamp

#: Bytes in one message of Read: large enough that the interpreter's share of a message vanishes.
_PIECE = 1 << 20
#: Infos in one message of List.
_BATCH = 100


def _info(value: ContentInfo) -> pb.Info:
    return pb.Info(
        digest=value.digest, size=value.size, created_at=timestamp(value.created_at),
        updated_at=timestamp(value.updated_at), labels=dict(value.labels),
    )


def _status(value: IngestStatus) -> pb.Status:
    return pb.Status(
        ref=value.ref, offset=value.offset, total=value.total, expected=value.expected,
        started_at=timestamp(value.started_at), updated_at=timestamp(value.updated_at),
    )


@dataclass
class _Session:
    """What a Write stream has agreed on so far."""

    namespace: str
    ref: str
    writer: ContentWriter
    total: int
    expected: str
    lease: str | None
    committed: bool = field(default=False)


class ContentService(content_pb2_grpc.ContentServicer):
    """Content of a namespace."""

    def __init__(self, database: Database) -> None:
        self._content = database.content

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """NOT_FOUND; INVALID_ARGUMENT for what is no digest."""
        namespace, digest = namespace_of(context), check_digest(request.digest)
        return pb.InfoResponse(info=_info(await self._content.info(namespace, digest)))

    async def Update(self, request: pb.UpdateRequest, context: Context) -> pb.UpdateResponse:
        """Labels: those of the mask, or all."""
        check_digest(request.info.digest)
        wanted = ContentInfo(request.info.digest, request.info.size, labels=dict(request.info.labels))
        changed = await self._content.update(namespace_of(context), wanted, request.update_mask.paths)
        return pb.UpdateResponse(info=_info(changed))

    async def List(self, request: pb.ListContentRequest, context: Context) -> AsyncIterator[pb.ListContentResponse]:
        """Those that match the filters (digest, size, labels)."""
        found = await self._content.walk(namespace_of(context), request.filters)
        for start in range(0, len(found), _BATCH):
            yield pb.ListContentResponse(info=[_info(item) for item in found[start:start + _BATCH]])

    async def Delete(self, request: pb.DeleteContentRequest, context: Context) -> empty_pb2.Empty:
        """NOT_FOUND. The blob's space is given back by garbage collection."""
        await self._content.delete(namespace_of(context), check_digest(request.digest), lease=lease_of(context))
        return empty_pb2.Empty()

    async def Read(self, request: pb.ReadContentRequest, context: Context) -> AsyncIterator[pb.ReadContentResponse]:
        """The window from `offset`: `size` bytes, or to the end for 0; OUT_OF_RANGE beyond the end.

        Offsets in the answers count from the start of the window, as containerd's do.
        """
        namespace, digest = namespace_of(context), check_digest(request.digest)
        reader = await self._content.reader(namespace, digest)
        try:
            begin = offset = max(0, request.offset)
            if offset > reader.size:
                raise OutOfRange(f"read past object length {reader.size} bytes", kind="content", key=digest)
            end = reader.size
            if request.size > 0:
                end = min(end, offset + request.size)
            while offset < end:
                data = await reader.read_at(min(_PIECE, end - offset), offset)
                if not data:
                    raise OutOfRange(f"content {digest} ends at {offset} of {reader.size} bytes", key=digest)
                yield pb.ReadContentResponse(offset=offset - begin, data=data)
                offset += len(data)
        finally:
            reader.close()

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        """NOT_FOUND for a ref that nobody writes."""
        return pb.StatusResponse(status=_status(await self._content.status(namespace_of(context), request.ref)))

    async def ListStatuses(self, request: pb.ListStatusesRequest, context: Context) -> pb.ListStatusesResponse:
        """Ingests that match the filters (ref)."""
        found = await self._content.statuses(namespace_of(context), request.filters)
        return pb.ListStatusesResponse(statuses=[_status(item) for item in found])

    async def Abort(self, request: pb.AbortRequest, context: Context) -> empty_pb2.Empty:
        """NOT_FOUND. What was written is gone."""
        await self._content.abort(namespace_of(context), request.ref, lease=lease_of(context))
        return empty_pb2.Empty()

    async def Write(
        self, requests: AsyncIterator[pb.WriteContentRequest], context: Context
    ) -> AsyncIterator[pb.WriteContentResponse]:
        """One ingest. The first message names the ref; STAT tells how far it is, WRITE appends, COMMIT ends it.

        UNAVAILABLE while another stream holds the ref; ALREADY_EXISTS when the expected blob is there;
        OUT_OF_RANGE for an offset that is not the present one (0 begins again).
        """
        namespace = namespace_of(context)
        session: _Session | None = None
        try:
            async for request in requests:
                if session is None:
                    session = await self._begin(namespace, request, lease_of(context))
                yield await self._step(session, request)
                if session.committed:
                    return
        finally:
            if session is not None:
                await session.writer.close()

    async def _begin(self, namespace: str, request: pb.WriteContentRequest, lease: str | None) -> _Session:
        if not request.ref:
            raise InvalidArgument("first message must have a reference", kind="ingest")
        if request.expected:
            check_digest(request.expected)
        writer = await self._content.writer(
            namespace, request.ref, size=request.total, expected=request.expected, lease=lease
        )
        return _Session(namespace, request.ref, writer, request.total, request.expected, lease)

    async def _step(self, session: _Session, request: pb.WriteContentRequest) -> pb.WriteContentResponse:
        writer = session.writer
        if request.expected and request.expected != session.expected:
            await self._expect(session, check_digest(request.expected))
        if request.total > 0:
            session.total = request.total
        status = await writer.status()
        answer = pb.WriteContentResponse(action=request.action, offset=status.offset, total=session.total)
        if request.action == pb.WriteAction.STAT:
            answer.started_at.CopyFrom(timestamp(status.started_at))
            answer.updated_at.CopyFrom(timestamp(status.updated_at))
            answer.digest = writer.digest()
            return answer
        if request.action not in (pb.WriteAction.WRITE, pb.WriteAction.COMMIT):
            raise InvalidArgument(f"unknown action {request.action}", kind="ingest", key=session.ref)
        if request.offset > 0 and request.offset != status.offset:
            raise OutOfRange(
                f"write @{request.offset} must occur at current offset {status.offset}", kind="ingest", key=session.ref
            )
        if request.offset == 0 and status.offset > 0:
            await writer.truncate(0)
            answer.offset = 0
        if request.data:
            await writer.write(request.data)
            answer.offset += len(request.data)
        if request.action == pb.WriteAction.COMMIT:
            await writer.commit(session.total, session.expected, dict(request.labels))
            session.committed = True
        answer.digest = writer.digest()
        return answer

    async def _expect(self, session: _Session, digest: str) -> None:
        """A digest that is told only now: the blob may exist, then the ingest is pointless."""
        session.expected = digest
        try:
            await self._content.info(session.namespace, digest)
        except NotFound:
            return
        await session.writer.close()
        await self._content.abort(session.namespace, session.ref, lease=session.lease)
        raise AlreadyExists(f"blob with expected digest {digest} exists", kind="content", key=digest)
