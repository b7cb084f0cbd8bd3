"""Channels to sidecars and VMMs, and the options that servers need to match them.

The option names are those of gRPC core's `grpc/impl/channel_arg_names.h`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import grpc

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason
from pageferry.tls import TlsFiles, channel_credentials

if TYPE_CHECKING:
    from collections.abc import Sequence

Options = tuple[tuple[str, int | str], ...]

# Above a device state of 64 MiB and a push message of 16 MiB, with their framing.
MAX_MESSAGE_BYTES: Final = 80 * 1024 * 1024
# A dead peer is noticed within their sum; a guest waits that long at most before its migration counts as paused.
KEEPALIVE_TIME_MS: Final = 10_000
KEEPALIVE_TIMEOUT_MS: Final = 5_000

# Of one connection: a peer has a connection for each lane, an operator's may watch as many migrations.
MAX_STREAMS: Final = 256
# Of a server: whoever opens more is hung up on, while descriptors are left for what is under way.
MAX_CONNECTIONS: Final = 4_096
HANDSHAKE_TIMEOUT_MS: Final = 10_000

_MESSAGES: Final[Options] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_KEEPALIVE: Final[Options] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    # A lane may be silent for long while the other works: pings go on without data.
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: Final[Options] = (
    *_MESSAGES,
    *_KEEPALIVE,
    # Two channels to one host are two connections: demand never waits behind push in one TCP stream.
    ("grpc.use_local_subchannel_pool", 1),
    # Guest memory goes straight to the peer, whatever http_proxy says.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
SERVER_OPTIONS: Final[Options] = (
    *_MESSAGES,
    *_KEEPALIVE,
    # Half of what clients use: without it a server answers their keepalive with GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    # A second sidecar on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    # Who connects and says nothing is hung up on.
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
)


def open_channel(
    address: str,
    tls: TlsFiles | None,
    expected_name: str | None = None,
    options: Sequence[tuple[str, int | str]] = (),
) -> grpc.aio.Channel:
    """Return a channel to `HOST:PORT` or `unix:/path`; it connects when first used.

    With `tls` both sides prove who they are, and the server's certificate must bear `expected_name`, or the host of
    the address when it is None or empty. Without `tls` nothing is encrypted, and `expected_name` is ignored: what may
    be reached that way is the caller's decision. `options` win over the common ones. To be called in the event loop
    that uses the channel. Raises FerryError: INVALID_ARGUMENT for the address, CONFIG_INVALID for the TLS files.
    """
    target = addresses.normalise(address)
    # Merged here: of two options with one name gRPC takes the first.
    merged = {**dict(CHANNEL_OPTIONS), **dict(options)}
    if tls is None:
        return grpc.aio.insecure_channel(target, options=tuple(merged.items()))
    if not expected_name and addresses.is_unix(target):
        raise FerryError(
            Reason.INVALID_ARGUMENT, f"{target} has no host name to check a certificate against; give the expected name"
        )
    if expected_name:
        merged["grpc.ssl_target_name_override"] = expected_name
    return grpc.aio.secure_channel(target, channel_credentials(tls), options=tuple(merged.items()))
