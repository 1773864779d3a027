"""Who may change what a server does: clients with its API key or, without one, this machine.

vLLM's own middleware guards ``/v1`` and a few other routes. It does not guard the routes of
plugins, so ours check for themselves.
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
"""Proxies add these headers, and anybody can send them. uvicorn may take the client's address from
them (FORWARDED_ALLOW_IPS), so a request that has one of them does not prove where it comes from."""

Credentials = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False, description="vLLM's API key, if one is set.")),
]


def authorise(request: Request, credentials: Credentials) -> None:
    """Refuses a request that may not change what the server does; a FastAPI dependency.

    The server's keys are read from ``request.app.state.afbs.api_keys``.

    Raises:
        HTTPException: 401 if the server has API keys and the request has none of them. 403 if the
            server has no key and the request does not come from this machine.
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
    """Compares with every key, in a time that does not depend on the keys."""
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
    # Requests of a foreign page in a browser on this machine come from this machine too. Their
    # origin reveals them or, if the page's name was made to resolve to this machine, their host.
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
