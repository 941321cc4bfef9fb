"""Whether a cluster to join is there, and whether it wants a token: the cluster decides, whoever started it."""

from __future__ import annotations

import os
import socket

from deepgen.cluster.private import reread_authentication
from deepgen.errors import UserError

REACH_DEADLINE_S = 10.0
WHERE = "RAY_AUTH_TOKEN, a file named by RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"


def check_reachable(address: str) -> str:
    """The host of HOST:PORT. Raises UserError unless a server listens there: Ray would end the process without one."""
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        raise UserError(
            f"cluster.address: got {address!r}; allowed: auto-local, local, auto, or HOST:PORT of a head node"
        )
    host = host.strip("[]")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_DEADLINE_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cluster.address: no Ray cluster answers at {address} ({reason})") from error
    return host


def use_what_it_takes(address: str) -> None:
    """Use a token if the cluster wants one, and none if it takes none, whatever RAY_AUTH_MODE says.

    Raises UserError if no Ray cluster answers, or if it wants a token that is not here or is another one.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # Ray's own settings decide; what is asked below would need its certificates
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

    tokens = AuthenticationTokenLoader.instance()
    if not _refuses(address, {}):
        if not tokens.has_token(ignore_auth_mode=True):
            _set_mode("disabled")
        return
    if not tokens.has_token(ignore_auth_mode=True):
        raise UserError(
            f"cluster.address: the Ray cluster at {address} wants a token (RAY_AUTH_MODE=token), here is none; "
            f"allowed: its token in {WHERE}"
        )
    _set_mode("token")
    if _refuses(address, tokens.get_token_for_http_header()):
        raise UserError(
            f"cluster.address: the Ray cluster at {address} refuses the token that is here (RAY_AUTH_MODE=token); "
            f"allowed: its own in {WHERE}"
        )


def _set_mode(mode: str) -> None:
    os.environ["RAY_AUTH_MODE"] = mode
    reread_authentication()


def _refuses(address: str, header: dict[str, str]) -> bool:
    """Whether the cluster refuses a call with this header. Raises UserError if what answers is no Ray cluster."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        metadata = [(key.lower(), value) for key, value in header.items()]
        try:
            nodes.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=REACH_DEADLINE_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return True
            reason = error.code().name.lower().replace("_", " ")
            raise UserError(f"cluster.address: what answers at {address} is no Ray cluster ({reason})") from error
    return False
