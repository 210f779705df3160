"""Which open links end, and which are replaced, given the files on disk and the date: no socket, no clock."""

from __future__ import annotations

import base64
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from splitproto import pki
from splitproto.errors import CertificateEnded, IdentityError, LocalError
from splitproto.identity import Credentials, read_identity
from splitproto.recheck import Made, Recheck, files_digest

from .test_partners import listed

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
DAY, HOUR, MINUTE, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)
EVERY = 30.0


@dataclass(frozen=True)
class Hub:
    """The coordinator's files; sites dial it."""

    folder: Path
    own: Credentials

    def link(self, site: str = "north", since: datetime = NOW) -> Made:
        path = self.folder / f"{site}.crt"
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        return Made(self.own.identity, files_digest(self.own), read_identity(path), certificate, since)

    def issue(self, site: str, days: float = 100, start: datetime = NOW) -> None:
        for ending in ("crt", "key"):
            (self.folder / f"{site}.{ending}").unlink(missing_ok=True)
        role, hosts = ("coordinator", ["127.0.0.1"]) if site == "hub" else ("client", [])
        pki.issue(self.folder, role, site, hosts=hosts, days=days, now=start, not_before=start)


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    pki.create_ca(tmp_path, "test", now=NOW)
    made = Hub(tmp_path, Credentials.__new__(Credentials))
    for site in ("hub", "north", "south"):
        made.issue(site)
    crl = pki.write_crl(tmp_path, now=NOW)
    return Hub(tmp_path, Credentials(tmp_path / "ca.crt", tmp_path / "hub.crt", tmp_path / "hub.key", crl))


@pytest.fixture
def recheck(hub: Hub) -> Recheck:
    made = Recheck(hub.own)
    made.look(NOW)
    return made


def test_nothing_happened(hub: Hub, recheck: Recheck) -> None:
    assert recheck.must_end(hub.link(), NOW + DAY) is None
    assert recheck.should_rotate(hub.link(), NOW + DAY, EVERY) == ""


# --- revoked -------------------------------------------------------------------------------------------------


def test_a_revoked_peer_and_no_other(hub: Hub, recheck: Recheck) -> None:
    north, south = hub.link("north"), hub.link("south")
    pki.revoke(hub.folder, "north", now=NOW)
    assert recheck.must_end(north, NOW) is None, "not looked yet"
    recheck.look(NOW)
    error = recheck.must_end(north, NOW)
    assert type(error) is IdentityError and not error.retry
    assert "client north" in error.reason and "revoked" in error.reason and str(hub.folder) not in str(error)
    assert recheck.must_end(south, NOW) is None
    hub.issue("north")
    assert recheck.must_end(hub.link("north"), NOW) is None, "a new certificate for the same name"


def test_what_an_outdated_list_names_is_revoked_all_the_same(hub: Hub, recheck: Recheck) -> None:
    north = hub.link("north")
    pki.revoke(hub.folder, "north", now=NOW, days=1)
    recheck.look(NOW + 2 * DAY)
    assert isinstance(recheck.must_end(north, NOW + 2 * DAY), IdentityError)


def test_a_delta_list_does_not_take_the_place_of_the_complete_one(hub: Hub, recheck: Recheck) -> None:
    north = hub.link("north")
    base = pki.revoke(hub.folder, "north", now=NOW)
    delta = listed(hub.folder, NOW + HOUR, x509.DeltaCRLIndicator(1))
    base.write_bytes(base.read_bytes() + delta)
    recheck.look(NOW + 2 * HOUR)
    assert isinstance(recheck.must_end(north, NOW + 2 * HOUR), IdentityError)


def test_a_serial_number_counts_only_with_its_issuer(hub: Hub, recheck: Recheck, tmp_path: Path) -> None:
    """Another CA in the list of CAs may use the same numbers."""
    other = tmp_path / "other"
    pki.create_ca(other, "elsewhere", now=NOW)
    link = hub.link("north")
    pki.write_crl(other, now=NOW, revoked=[link.certificate.serial_number])
    with hub.own.ca.open("ab") as file:
        file.write((other / "ca.crt").read_bytes())
    assert hub.own.crl is not None
    with hub.own.crl.open("ab") as file:
        file.write((other / "ca.crl").read_bytes())
    recheck.look(NOW)
    assert recheck.must_end(link, NOW) is None
    foreign = replace(link, certificate=x509.load_pem_x509_certificate((other / "ca.crt").read_bytes()))
    pki.write_crl(other, now=NOW, revoked=[foreign.certificate.serial_number])
    hub.own.crl.write_bytes(hub.own.crl.read_bytes() + (other / "ca.crl").read_bytes())
    recheck.look(NOW)
    assert isinstance(recheck.must_end(foreign, NOW), IdentityError), "both lists of one file are read"


@pytest.mark.parametrize("damage", ["gone", "garbage", "another CA's", "outdated", "empty"])
def test_a_list_that_cannot_be_used_ends_no_link_asks_for_none_and_is_told_once(
    damage: str, hub: Hub, recheck: Recheck, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crl, when, link = hub.own.crl, NOW, hub.link()
    assert crl is not None
    if damage == "gone":
        crl.unlink()
    elif damage == "garbage":
        crl.write_text("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
    elif damage == "another CA's":
        pki.create_ca(tmp_path / "other", "test", now=NOW)
        crl.write_bytes(
            pki.write_crl(tmp_path / "other", now=NOW, revoked=[link.certificate.serial_number]).read_bytes()
        )
    elif damage == "empty":
        crl.write_text("")
    else:
        when = NOW + (pki.CRL_DAYS + 1) * DAY
    hub.issue("hub")  # would be a reason to rotate
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            recheck.look(when)
    assert recheck.must_end(link, when) is None
    if damage != "another CA's":  # that is found out only at the next handshake
        assert recheck.should_rotate(link, when, EVERY) == ""
    about = [record.message for record in caplog.records if str(crl) in record.message]
    assert about and len(about) == len(set(about)) <= 2
    assert all("open links stay" in line for line in about)


def test_no_damage_to_a_list_ends_the_vigil_or_undoes_a_revocation(hub: Hub, recheck: Recheck) -> None:
    """What a parser raises is more than ValueError, and some of it only when a field is looked at."""
    north, crl = hub.link("north"), hub.own.crl
    assert crl is not None
    pki.revoke(hub.folder, "north", now=NOW)
    good = crl.read_bytes()
    recheck.look(NOW)
    der = x509.load_pem_x509_crl(good).public_bytes(serialization.Encoding.DER)
    for position in range(len(der)):
        for bit in (0x01, 0x80):
            damaged = bytearray(der)
            damaged[position] ^= bit
            crl.write_bytes(
                b"-----BEGIN X509 CRL-----\n" + base64.encodebytes(damaged) + b"-----END X509 CRL-----\n"
            )
            recheck.look(NOW)
            assert recheck.must_end(north, NOW) is not None, position
            with suppress(LocalError):
                hub.own.server_context()
    crl.write_bytes(crl.read_bytes() + good)
    fresh = Recheck(hub.own)
    fresh.look(NOW)
    assert fresh.must_end(north, NOW) is not None, "the good list behind a damaged one"


def test_an_older_list_undoes_no_revocation(
    hub: Hub, recheck: Recheck, caplog: pytest.LogCaptureFixture
) -> None:
    north, crl = hub.link("north"), hub.own.crl
    assert crl is not None
    before = crl.read_bytes()
    pki.revoke(hub.folder, "north", now=NOW + HOUR)
    recheck.look(NOW + HOUR)
    assert recheck.must_end(north, NOW + HOUR) is not None
    crl.unlink()
    crl.write_bytes(before)
    with caplog.at_level(logging.WARNING):
        recheck.look(NOW + HOUR)
    assert recheck.must_end(north, NOW + HOUR) is not None
    assert any("older revocation list" in record.message for record in caplog.records)


def test_a_list_that_was_damaged_counts_again_when_it_is_repaired(hub: Hub, recheck: Recheck) -> None:
    north, crl = hub.link("north"), hub.own.crl
    assert crl is not None
    crl.write_text("half of")
    recheck.look(NOW)
    crl.unlink()
    pki.revoke(hub.folder, "north", now=NOW)
    recheck.look(NOW)
    assert recheck.must_end(north, NOW) is not None


# --- ended ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["north", "hub"])
def test_a_certificate_that_has_ended_ends_the_link_and_who_has_a_new_one_may_dial(
    whose: str, hub: Hub, recheck: Recheck
) -> None:
    hub.issue(whose, days=2)
    link = hub.link()
    recheck.look(NOW)
    assert recheck.must_end(link, NOW + 2 * DAY - SECOND) is None
    error = recheck.must_end(link, NOW + 2 * DAY)
    assert isinstance(error, CertificateEnded) and error.retry
    assert f" {whose} ended at 2026-11-23 12:00:00 UTC" in error.reason


@pytest.mark.parametrize(("days", "near"), [(20, HOUR), (1, HOUR), (0.5, 36 * MINUTE)])
def test_a_peer_whose_certificate_ends_soon_is_given_the_chance_to_show_a_new_one(
    days: float, near: timedelta, hub: Hub, recheck: Recheck
) -> None:
    hub.issue("north", days=days)
    link, ends = hub.link(), NOW + days * DAY
    assert recheck.should_rotate(link, ends - near - SECOND, EVERY) == ""
    assert "ends soon" in recheck.should_rotate(link, ends - near, EVERY)


def test_a_peer_that_has_no_new_certificate_does_not_dial_for_ever(hub: Hub, recheck: Recheck) -> None:
    hub.issue("north", days=1)
    ends, now, dialled = NOW + DAY, NOW, []
    link = hub.link()
    while now < ends:
        now += timedelta(seconds=EVERY)
        if recheck.should_rotate(link, now, EVERY):
            dialled.append(now)
            link = hub.link(since=now)  # with the same certificates
            assert recheck.should_rotate(link, now, EVERY) == ""
    assert 3 <= len(dialled) <= 8, dialled
    assert dialled[0] == ends - HOUR


# --- replaced ------------------------------------------------------------------------------------------------


def test_a_new_certificate_or_ca_list_asks_for_a_new_link_and_that_has_peace(
    hub: Hub, recheck: Recheck
) -> None:
    link = hub.link()
    hub.issue("hub")
    recheck.look(NOW)
    assert "replaced" in recheck.should_rotate(link, NOW, EVERY)
    link = hub.link()
    hub.own.ca.write_bytes(hub.own.ca.read_bytes() * 2)
    assert recheck.should_rotate(link, NOW, EVERY) == ""
    recheck.look(NOW)
    assert "replaced" in recheck.should_rotate(link, NOW, EVERY)
    link = hub.link()
    for minutes in range(60):
        recheck.look(NOW + minutes * MINUTE)
        assert recheck.should_rotate(link, NOW + minutes * MINUTE, EVERY) == ""


def test_the_same_octets_written_again_are_no_reason(hub: Hub, recheck: Recheck) -> None:
    link = hub.link()
    for path in (hub.own.certificate, hub.own.ca):
        path.write_bytes(path.read_bytes())
    recheck.look(NOW)
    assert recheck.should_rotate(link, NOW, EVERY) == ""


@pytest.mark.parametrize("wrong", ["half replaced", "garbage", "gone", "not yet valid", "over"])
def test_files_that_would_not_serve_a_new_link_wait_until_they_do(
    wrong: str, hub: Hub, recheck: Recheck, caplog: pytest.LogCaptureFixture
) -> None:
    link, key, certificate = hub.link(), hub.own.key.read_bytes(), hub.own.certificate.read_bytes()
    later = {"not yet valid": NOW + HOUR, "over": NOW - 2 * DAY}.get(wrong, NOW)
    hub.issue("hub", start=later, days=1)
    good = hub.own.certificate.read_bytes(), hub.own.key.read_bytes()
    if wrong == "half replaced":
        hub.own.key.write_bytes(key)
    elif wrong == "garbage":
        hub.own.certificate.write_text("x")
    elif wrong == "gone":
        hub.own.certificate.unlink()
    for _ in range(3):
        recheck.look(NOW)
        assert recheck.should_rotate(link, NOW, EVERY) == "" and recheck.must_end(link, NOW) is None
    assert len(caplog.records) == 1 and "open links stay" in caplog.records[0].message
    if wrong == "over":
        hub.own.certificate.write_bytes(certificate)
        hub.own.key.write_bytes(key)
        recheck.look(NOW)
        assert recheck.should_rotate(link, NOW, EVERY) == "", "the old pair is back"
        return
    if wrong != "not yet valid":  # that one only waits for its time
        hub.own.certificate.write_bytes(good[0])
        hub.own.key.write_bytes(good[1])
    recheck.look(NOW + HOUR)
    assert "replaced" in recheck.should_rotate(link, NOW + HOUR, EVERY)
