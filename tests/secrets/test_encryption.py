"""The envelope: what opens, and all that does not."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kailash_nb.secrets.encryption import Key, Label, Plaintext, digest, packed

KEY = Key(bytes(range(32)))
LABEL = Label("store", "db_creds", 1, "[]")
ENVELOPE = (
    "6b6e314ba658da3167f167f64fed37af51cbb095894a7fa54e753a8fbee5dc2452d5f9e1735be542adc5967f91e7520f1a25"
    "ec56a28593397ff72a83b5024bc557e270555aca1ed5ba3838c19823323d1130df0c92858dd7fa00109cf6f6f8057b352d56"
    "1bbe28e8367d5880629b0ef67594e35305e4fa0b96"
)
FIELDS = {"user": "dbuser", "password": "pässword ☃", "port": 5432, "ssl": True, "factor": 0.5}


@pytest.fixture
def envelope():
    return KEY.seal(Plaintext.of(FIELDS), LABEL)


def test_what_was_sealed_opens_under_its_label(envelope):
    assert KEY.open(envelope, LABEL).fields() == FIELDS


def test_an_envelope_of_the_first_format_still_opens():
    envelope = bytes.fromhex(ENVELOPE)
    assert KEY.id == "4ba658da3167f167"
    assert KEY.open(envelope, LABEL).fields() == {"password": "of 2026"}


def test_a_sealed_value_is_nowhere_in_its_envelope_and_each_envelope_is_another(envelope):
    again = KEY.seal(Plaintext.of(FIELDS), LABEL)
    assert b"dbuser" not in envelope
    header = 3 + 8
    assert envelope[:header] == again[:header] == b"kn1" + bytes.fromhex(KEY.id)
    assert not any(envelope[i : i + 12] in again for i in range(header, len(envelope) - 12))


def test_no_envelope_with_one_flipped_bit_opens(envelope):
    for position in range(len(envelope)):
        for bit in range(8):
            flipped = bytearray(envelope)
            flipped[position] ^= 1 << bit
            assert KEY.open(bytes(flipped), LABEL) is None


def test_no_cut_or_lengthened_envelope_opens(envelope):
    assert all(KEY.open(envelope[:length], LABEL) is None for length in range(len(envelope)))
    assert KEY.open(envelope + b"\0", LABEL) is None


@pytest.mark.parametrize("part", [{"store": "other"}, {"name": "x"}, {"version": 2}, {"bindings": '[["a","b","off"]]'}])
def test_an_envelope_does_not_open_under_another_label(envelope, part):
    assert KEY.open(envelope, dataclasses.replace(LABEL, **part)) is None


def test_halves_of_two_envelopes_make_no_third(envelope):
    same_label = KEY.seal(Plaintext.of({"password": "newer"}), LABEL)
    key_and_value = 3 + 8 + 12 + 48
    assert KEY.open(envelope[:key_and_value] + same_label[key_and_value:], LABEL) is None
    assert KEY.open(same_label[:key_and_value] + envelope[key_and_value:], LABEL) is None


def test_another_key_does_not_open_it(envelope):
    other = Key(bytes(32))
    assert other.open(envelope, LABEL) is None
    renamed = envelope[:3] + bytes.fromhex(other.id) + envelope[11:]
    assert other.open(renamed, LABEL) is None


def test_a_tag_depends_on_every_part_where_it_ends_and_the_key():
    tags = {
        KEY.authenticated("ab", "c"),
        KEY.authenticated("a", "bc"),
        KEY.authenticated("abc"),
        KEY.authenticated("abc", ""),
        Key(bytes(32)).authenticated("abc"),
    }
    assert len(tags) == 5 and KEY.authenticated("abc") in tags


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_parts_are_packed_alike_only_when_they_are_the_same(one, other):
    assert (packed(*one) == packed(*other)) == (one == other)


def test_a_digest_tells_types_apart():
    assert len({digest([1]), digest(["1"]), digest([b"1"]), digest([1.0]), digest([None]), digest([[1]])}) == 6


@pytest.mark.parametrize("hidden", [KEY, Plaintext.of({"password": "CANARY"})], ids=["key", "plaintext"])
def test_keys_and_plaintexts_show_nothing_and_are_never_pickled_or_copied(hidden):
    assert "CANARY" not in f"{hidden} {hidden!r}" and bytes(range(32)).hex() not in repr(hidden)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled or copied"):
            leak(hidden)
