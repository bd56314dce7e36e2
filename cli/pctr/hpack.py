"""HPACK, as much of it as a gRPC client needs (RFC 7541).

Encodes every field as a literal without indexing, so that an encoder has no state; decodes
everything a server may send: both tables, size updates, Huffman strings. A general-purpose
package is not used because importing one costs more than a whole call.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_STATIC = (
    ":authority|", ":method|GET", ":method|POST", ":path|/", ":path|/index.html", ":scheme|http", ":scheme|https",
    ":status|200", ":status|204", ":status|206", ":status|304", ":status|400", ":status|404", ":status|500",
    "accept-charset|", "accept-encoding|gzip, deflate", "accept-language|", "accept-ranges|", "accept|",
    "access-control-allow-origin|", "age|", "allow|", "authorization|", "cache-control|", "content-disposition|",
    "content-encoding|", "content-language|", "content-length|", "content-location|", "content-range|",
    "content-type|", "cookie|", "date|", "etag|", "expect|", "expires|", "from|", "host|", "if-match|",
    "if-modified-since|", "if-none-match|", "if-range|", "if-unmodified-since|", "last-modified|", "link|",
    "location|", "max-forwards|", "proxy-authenticate|", "proxy-authorization|", "range|", "referer|", "refresh|",
    "retry-after|", "server|", "set-cookie|", "strict-transport-security|", "transfer-encoding|", "user-agent|",
    "vary|", "via|", "www-authenticate|",
)
_DEFAULT_TABLE = 4096

# Length in bits of each symbol's Huffman code, "a" being 5 (appendix B). The code is canonical: within
# a length codes count up in the order of the symbols, so the lengths say everything.
_LENGTHS = (
    "isxxxxxxxtzxxzxxxxxxxxzxxxxxxxxxbffhibdgffdgdbbbaaabbbbbbbcdkbhfibccccccccccccccccccccccdcdioijbkaba"
    "babbbaccbbbabcbaabccccckgjixprpprrrsrssssststtrstssssqrsrsstrqprrssqsrrtqrssqqrqsrssprrrsrrsvvporsru"
    "vvvwwvtuoqvwwvwtqqvvxwwwptpqrqqsrruuttvsvwvvwwwwwxwwwwwvz"
)


class HpackError(Exception):
    """The peer's header block cannot be decoded; the connection is lost."""


def _huffman_codes() -> dict[tuple[int, int], int]:
    """(length in bits, code) to symbol."""
    codes: dict[tuple[int, int], int] = {}
    code = length = 0
    for bits, symbol in sorted((ord(letter) - 92, symbol) for symbol, letter in enumerate(_LENGTHS)):
        code <<= bits - length
        length = bits
        codes[length, code] = symbol
        code += 1
    return codes


_codes: dict[tuple[int, int], int] = {}


def huffman_decode(data: bytes) -> bytes:
    """The octets behind a Huffman string (section 5.2)."""
    if not _codes:
        _codes.update(_huffman_codes())
    result = bytearray()
    code = length = 0
    for octet in data:
        for shift in range(7, -1, -1):
            code = code << 1 | octet >> shift & 1
            length += 1
            symbol = _codes.get((length, code))
            if symbol is not None:
                if symbol == 256:
                    raise HpackError("end-of-string symbol inside a string")
                result.append(symbol)
                code = length = 0
            elif length > 30:
                raise HpackError("unknown huffman code")
    if length > 7 or code != (1 << length) - 1:
        raise HpackError("wrong huffman padding")
    return bytes(result)


def _integer(value: int, bits: int, first: int) -> bytes:
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((first | value,))
    result = bytearray((first | limit,))
    value -= limit
    while value >= 128:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


def encode(headers: Iterable[tuple[str, str]]) -> bytes:
    """A header block: each field a literal without indexing, no Huffman coding (section 6.2.2)."""
    result = bytearray()
    for name, value in headers:
        raw_name, raw_value = name.encode(), value.encode()
        result += b"\0" + _integer(len(raw_name), 7, 0) + raw_name + _integer(len(raw_value), 7, 0) + raw_value
    return bytes(result)


class Decoder:
    """Decodes one direction of a connection; holds its dynamic table."""

    def __init__(self, limit: int = _DEFAULT_TABLE) -> None:
        self._limit = limit
        self._capacity = limit
        self._size = 0
        self._table: list[tuple[str, str]] = []

    def decode(self, block: bytes) -> list[tuple[str, str]]:
        """The fields of a whole block in order. Raises `HpackError`."""
        try:
            return self._decode(block)
        except (IndexError, UnicodeDecodeError) as error:
            raise HpackError(f"damaged header block: {error}") from error

    def _decode(self, block: bytes) -> list[tuple[str, str]]:
        headers: list[tuple[str, str]] = []
        at = 0
        while at < len(block):
            octet = block[at]
            if octet & 0x80:
                index, at = self._read_integer(block, at, 7)
                headers.append(self._entry(index))
                continue
            if octet & 0xE0 == 0x20:
                capacity, at = self._read_integer(block, at, 5)
                if capacity > self._limit:
                    raise HpackError(f"table size {capacity} is above {self._limit}")
                self._capacity = capacity
                self._evict()
                continue
            indexed = octet & 0xC0 == 0x40
            index, at = self._read_integer(block, at, 6 if indexed else 4)
            if index:
                name = self._entry(index)[0]
            else:
                name, at = self._read_string(block, at)
            value, at = self._read_string(block, at)
            headers.append((name, value))
            if indexed:
                self._table.insert(0, (name, value))
                self._size += len(name) + len(value) + 32
                self._evict()
        return headers

    def _entry(self, index: int) -> tuple[str, str]:
        if index == 0:
            raise HpackError("index 0")
        if index <= len(_STATIC):
            name, _, value = _STATIC[index - 1].partition("|")
            return name, value
        return self._table[index - len(_STATIC) - 1]

    def _evict(self) -> None:
        while self._size > self._capacity:
            name, value = self._table.pop()
            self._size -= len(name) + len(value) + 32

    @staticmethod
    def _read_integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
        limit = (1 << bits) - 1
        value = block[at] & limit
        at += 1
        if value < limit:
            return value, at
        shift = 0
        while True:
            octet = block[at]
            at += 1
            value += (octet & 127) << shift
            shift += 7
            if not octet & 128:
                return value, at
            if shift > 35:
                raise HpackError("integer too long")

    def _read_string(self, block: bytes, at: int) -> tuple[str, int]:
        coded = block[at] & 0x80
        length, at = self._read_integer(block, at, 7)
        data = block[at:at + length]
        if len(data) < length:
            raise HpackError("string beyond the block")
        return (huffman_decode(data) if coded else data).decode("latin-1"), at + length
