"""Which addresses are public, and what a user can allow."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from deepgen.config import UserError, load_settings
from deepgen.reading.reach import Reach, is_public


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.100.100.200", "168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "239.1.1.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
        *("::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("64:ff9b:1::a9fe:a9fe", "::ffff:0:169.254.169.254"),
        *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:80ff:fffe"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(PermissionError, match="no public address"):
        Reach().check_address("some.host", address)


@pytest.mark.parametrize("address", ["8.8.8.8", "151.101.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    Reach().check_address("some.host", address)


def test_the_user_allows_networks_addresses_and_hosts() -> None:
    reach = Reach.of([], ["10.0.0.0/8", "127.0.0.1", "Minio.internal", "fd00::/8"])
    for address in ("10.1.2.3", "127.0.0.1", "::ffff:10.0.0.1", "fd00::5"):
        reach.check_address("some.host", address)
    for address in ("127.0.0.2", "192.168.0.1", "169.254.169.254", "fe80::1"):
        reach.check_address("minio.internal.", address)
        with pytest.raises(PermissionError, match="no public address"):
            reach.check_address("minio.internal.evil.test", address)


def test_the_setting_takes_folders_hosts_and_networks(tmp_path: Path) -> None:
    allow = [str(tmp_path), "minio", "my-store.internal", "127.0.0.1", "::1", "10.0.0.0/8"]
    settings = load_settings(None, [f"data.allow=[{', '.join(repr(one) for one in allow)}]"])
    assert settings.data.allow == allow
    for wrong in ("http://minio", "minio:9000", "user@host", "", "10.0.0.0/99", "a b"):
        with pytest.raises(
            UserError, match=r"data\.allow: got .*; allowed: absolute folders, host names, IP addresses"
        ):
            load_settings(None, [f"data.allow=[{wrong!r}]"])
