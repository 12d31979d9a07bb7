"""The list of revoked certificates: whose, of whom, and later than the one before."""

import datetime

from cryptography import x509

from cloud.trust.crl import make_crl
from edgefl.protocols.tls import NO_END, load_ca


def test_a_list_by_hand(fleet_ca):
    crl = x509.load_pem_x509_crl(make_crl(fleet_ca.folder, ["ff", "10"]))
    ca, key = load_ca(fleet_ca.folder)
    assert crl.is_signature_valid(key.public_key())
    assert crl.issuer == ca.subject
    assert sorted(entry.serial_number for entry in crl) == [16, 255]
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3
    assert crl.last_update_utc == datetime.datetime(1970, 1, 1, 0, 0, 3, tzinfo=datetime.UTC)
    assert crl.next_update_utc == NO_END  # a broker that is never told again goes on


def test_each_list_begins_later_than_the_one_before(fleet_ca):
    first, second = (x509.load_pem_x509_crl(make_crl(fleet_ca.folder, serials)) for serials in ([], ["1"]))
    assert first.last_update_utc < second.last_update_utc
