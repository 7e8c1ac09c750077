"""Which addresses belong to anybody on the internet, and not to this machine, its network or a protocol.

In: an address as a resolver gives it. Out: whether it may be connected to for a stranger. Addresses that carry an IPv4
address inside (mapped, NAT64, 6to4, Teredo) are refused whatever they carry: nothing public needs them. Follows IANA's
special-purpose registries (RFC 6890). Does not know names.
"""

import ipaddress

_PUBLIC_V6 = ipaddress.ip_network("2000::/3")
"""All that was ever given out; NAT64, mapped, link-local, unique local and multicast addresses lie outside."""
_SPECIAL_V6 = tuple(
    ipaddress.ip_network(network)
    for network in (
        "2001::/23",  # protocols: Teredo, ORCHID, benchmarks, ...
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112: answers for private reverse names
        "3fff::/20",  # documentation
    )
)
_SPECIAL_V4 = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by carriers' customers
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local: clouds' metadata services
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocols
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
_CLOUD_METADATA = frozenset({ipaddress.ip_address("168.63.129.16")})
"""Public by number, and yet a service inside of Azure's machines."""


def is_public(address: str) -> bool:
    """Whether an address, without brackets, is one that anybody may be sent to."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not parsed.is_global or parsed.is_multicast or parsed in _CLOUD_METADATA:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _SPECIAL_V4)
    return parsed.scope_id is None and parsed in _PUBLIC_V6 and not any(parsed in network for network in _SPECIAL_V6)
