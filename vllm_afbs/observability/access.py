"""Who may change what a server does: whoever has its API key or, where there is none, this machine.

vLLM's own middleware guards ``/v1`` and its like, not the routes of plugins, so they guard
themselves.
"""

import hashlib
import ipaddress
import secrets
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request, status
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
"""A proxy adds these for the one it speaks for, and anybody may send them. uvicorn takes the
address from them where FORWARDED_ALLOW_IPS lets it, so with one of them it proves nothing."""

Credentials = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False, description="vLLM's API key, where one is set.")),
]


def authorise(request: Request, credentials: Credentials) -> None:
    """Lets a request pass that may change what the server does; a FastAPI dependency.

    The server's keys are read from ``request.app.state.afbs.api_keys``.

    Raises:
        HTTPException: 401 without the server's API key; 403 where it has none and the request
            does not come from this machine.
    """
    keys = request.app.state.afbs.api_keys
    if keys:
        if credentials is None or not _is_key(credentials.credentials, keys):
            raise HTTPException(
                status.HTTP_401_UNAUTHORIZED,
                "The server's API key expected: Authorization: Bearer KEY.",
                {"WWW-Authenticate": "Bearer"},
            )
    elif not _is_local(request):
        raise HTTPException(
            status.HTTP_403_FORBIDDEN,
            "Without an API key (vllm serve --api-key) only the server's own machine may do this.",
        )


def _is_key(token: str, keys: Sequence[str]) -> bool:
    """Compares with every key, in a time that tells nothing about them."""
    digest = _digest(token)
    matches = [secrets.compare_digest(digest, _digest(key)) for key in keys]
    return any(matches)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_local(request: Request) -> bool:
    if request.client is None or not _is_loopback(request.client.host):
        return False
    if any(name in request.headers for name in _FORWARDED):
        return False
    # A page from elsewhere, open in a browser on this machine, comes from this machine too: its
    # origin gives it away or, if its name was made to point here, the host it asks for.
    names = [request.url.hostname]
    if (origin := request.headers.get("origin")) is not None:
        names.append(urlsplit(origin).hostname)
    return all(name == "localhost" or _is_loopback(name) for name in names)


def _is_loopback(host: str | None) -> bool:
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
