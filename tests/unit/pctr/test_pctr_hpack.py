"""HPACK against the examples of RFC 7541 and against a general-purpose implementation."""

from __future__ import annotations

import hpack as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pctr.hpack import Decoder, HpackError, encode, huffman_decode

_TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=200)
_HEADERS = st.lists(st.tuples(st.text("abcdefghij-", min_size=1, max_size=40), _TEXT), max_size=8)


def test_reads_the_examples_of_the_rfc_with_their_dynamic_table() -> None:
    # RFC 7541, C.6: three responses on one connection with a table of 256 bytes.
    decoder = Decoder()
    first = bytes.fromhex(
        "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3")
    assert decoder.decode(first) == [
        (":status", "302"), ("cache-control", "private"), ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
        ("location", "https://www.example.com"),
    ]
    assert decoder.decode(bytes.fromhex("4883640effc1c0bf"))[0] == (":status", "307")


@given(blocks=st.lists(_HEADERS, max_size=6), huffman=st.booleans())
def test_reads_what_another_encoder_writes(blocks: list[list[tuple[str, str]]], huffman: bool) -> None:
    encoder, decoder = reference.Encoder(), Decoder()
    for headers in blocks:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        assert decoder.decode(encoder.encode(raw, huffman=huffman)) == headers


@given(headers=st.lists(st.tuples(st.text("abc-", min_size=1, max_size=300), st.text(max_size=300)), max_size=5))
def test_another_decoder_reads_what_is_written(headers: list[tuple[str, str]]) -> None:
    decoded = reference.Decoder(max_header_list_size=1 << 20).decode(encode(headers), raw=True)
    assert [(bytes(name).decode(), bytes(value).decode()) for name, value in decoded] == headers


@given(data=st.binary(max_size=64))
def test_garbage_is_an_error_and_nothing_else(data: bytes) -> None:
    try:
        Decoder().decode(data)
    except HpackError:
        pass


def test_huffman_padding_must_be_ones() -> None:
    assert huffman_decode(bytes.fromhex("f1e3c2e5f23a6ba0ab90f4ff")) == b"www.example.com"
    with pytest.raises(HpackError):
        huffman_decode(bytes.fromhex("f1e3c2e5f23a6ba0ab90f400"))


def test_a_table_larger_than_agreed_is_refused() -> None:
    with pytest.raises(HpackError):
        Decoder(limit=64).decode(b"\x3f\xe1\x1f")
