"""What a data set may name: files in its own folders, public addresses, and what the user allows besides.

A data set comes from others. A name in it could lead to a file that is none of its own (`/etc/passwd`, `../private`, a
symbolic link), or to a server that only this machine reaches (loopback, a private network, a cloud's metadata).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
ALLOWED = "absolute folders, host names, IP addresses and networks, as in [/mnt/images, minio.internal, 10.0.0.0/8]"
_LONGEST = 4096  # bytes of a path in Linux
_HOST = re.compile(r"(?!-)[\w-]+(\.[\w-]+)*\.?")
# Metadata of Azure and Oracle, NAT64 of a private network: `is_global` counts these as public.
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "64:ff9b:1::/48")))
# NAT64, IPv4-compatible, IPv4-translated
_WITH_IPV4_INSIDE = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")))


@dataclass(frozen=True)
class Reach:
    """What may be read: files under `folders`, public addresses, addresses in `networks`, any address of `hosts`.

    Without folders no file may be read.
    """

    folders: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, folders: Iterable[Path], allow: Sequence[str] = ()) -> Reach:
        """The reach of a data set in `folders`. allow: as `check_allowed` takes it."""
        more, networks, hosts = [], [], []
        for entry in allow:
            network = _network(entry)
            if network is not None:
                networks.append(network)
            elif entry.startswith(("/", "~")):
                more.append(os.path.expanduser(entry))
            else:
                hosts.append(_bare(entry))
        own = [os.path.abspath(folder) for folder in folders]
        return cls(tuple(dict.fromkeys([*own, *more])), tuple(networks), frozenset(hosts))

    def file(self, path: str) -> str:
        """The path with all symbolic links resolved. Raises PermissionError if it is not in one of the folders."""
        if not self.folders:
            raise PermissionError("is a file, and no folder is known that it may lie in")
        if len(os.fsencode(path)) > _LONGEST:  # a picture in base64 has thousands of "/" to resolve
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        real = os.path.realpath(path)
        if any(_lies_in(real, os.path.realpath(folder)) for folder in self.folders):
            return real
        own = " or ".join(self.folders)
        link = "" if real == os.path.abspath(path) else f" (it is {real!r})"
        raise PermissionError(f"lies outside of {own}{link}; allowed: files in there, or in a folder of data.allow")

    def check_address(self, host: str, address: str) -> None:
        """Raise PermissionError unless `host`, whose IP address this is, may be asked."""
        found = _plain(ipaddress.ip_address(address.partition("%")[0]))
        if self.allows_host(host) or is_public(found) or any(found in network for network in self.networks):
            return
        raise PermissionError(
            f"leads to '{found}', which is no public address; allowed: public ones, or a host, address or network that "
            "data.allow lists"
        )

    def allows_host(self, host: str) -> bool:
        """Whether the user allows this host by name, or by an address or network if it is an address."""
        network = _network(host)
        inside = network is not None and any(
            network.version == one.version and network.subnet_of(one)  # type: ignore[arg-type]
            for one in self.networks
        )
        return inside or _bare(host) in self.hosts


def check_allowed(entry: str) -> None:
    """Raise ValueError unless it is an absolute folder, a host's name, an IP address or a network."""
    if entry.startswith(("/", "~")) or _network(entry) is not None or _HOST.fullmatch(entry):
        return
    raise ValueError(f"got {entry!r}; allowed: {ALLOWED}")


def is_public(address: Address) -> bool:
    """Whether the address belongs to the public internet, also by the IPv4 address that it may stand for."""
    address = _plain(address)
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    excepted = address.is_multicast or site_local or any(address in network for network in _NOT_PUBLIC)
    return address.is_global and not excepted


def _plain(address: Address) -> Address:
    """The IPv4 address inside an IPv6 address that stands for one; any other address unchanged."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    embedded = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
    if embedded:
        return embedded
    if int(address) > 1 and any(address in network for network in _WITH_IPV4_INSIDE):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _network(entry: str) -> Network | None:
    try:
        return ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return None


def _bare(host: str) -> str:
    return host.rstrip(".").lower()


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
