"""Routes under ``/afbs`` on vLLM's own API server: its profile, status, kill switch and level.

Anybody who can read ``/metrics`` can read these. Changing something is restricted; see ``access``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from vllm_afbs import compat
from vllm_afbs.observability import kill_switch, served_level, status
from vllm_afbs.observability.access import authorise
from vllm_afbs.profile.adapters import AdapterProfile
from vllm_afbs.serving import admission, configuration
from vllm_afbs.serving.settings import read_settings

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.datastructures import State

_PAGE = Path(__file__).with_name("status.html").read_text(encoding="utf-8")
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
)
"""The page loads nothing from other servers and sends requests only to its own."""


ANSWER_SECONDS = 5.0
"""How long the POST routes wait for the workers, which look at the switch twice a second."""


@dataclass(frozen=True)
class Server:
    """What the routes know about their server. It is kept in ``app.state.afbs``.

    Attributes:
        api_keys: Keys with which a client may change what the server does; empty if none is set.
        profile: The served profile; None if every layer runs dense.
        levels: The levels of it that may be served.
        backend: Whether the server runs our attention backend.
        per_head: Whether block products are also counted for each head.
        num_workers: Number of workers that look at the kill switch and the level.
        weights: Whether the model has the weights that the profile was tuned on.
        adapters: LoRA adapters that may run sparse.
    """

    api_keys: list[str] = field(repr=False)
    profile: status.ServedProfile | None
    backend: bool
    per_head: bool
    levels: served_level.Levels | None = None
    num_workers: int = 0
    weights: str = "unknown"
    adapters: list[AdapterProfile] = field(default_factory=list)


def _server(request: Request) -> Server:
    server: Server = request.app.state.afbs
    return server


def _profile(server: Annotated[Server, Depends(_server)]) -> status.ServedProfile:
    if server.profile is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "This server serves no profile.")
    return server.profile


def _levels(server: Annotated[Server, Depends(_server)]) -> served_level.Levels:
    if server.levels is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "This server serves no profile.")
    return server.levels


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str


class LevelRequest(BaseModel):
    """Which level to serve."""

    level: str = Field(description="The name of one of the profile's levels.")


_NO_PROFILE: dict[int | str, dict[str, Any]] = {404: {"model": Refusal}}
_GUARDED: dict[str, Any] = {
    "dependencies": [Depends(authorise)],
    "responses": {code: {"model": Refusal} for code in (401, 403, 500)},
}
_TURNED: dict[str, Any] = _GUARDED | {
    "responses": {code: {"model": Refusal} for code in (400, 401, 403, 404, 500)}
}
router = APIRouter(prefix="/afbs", tags=["vllm-afbs"])


@router.get("/", response_class=HTMLResponse)
def get_page() -> HTMLResponse:
    """The page that shows the status and the layers, and keeps them up to date."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@router.get("/profile", responses=_NO_PROFILE)
def get_profile(
    profile: Annotated[status.ServedProfile, Depends(_profile)],
) -> status.ServedProfile:
    """The whole served profile."""
    return profile


@router.get("/status")
def get_status(server: Annotated[Server, Depends(_server)]) -> status.Status:
    """What the server has done since it started, over all its workers."""
    return status.read_status(
        server.profile,
        server.levels,
        server.backend,
        server.num_workers,
        server.weights,
        server.adapters,
    )


@router.get("/layers", responses=_NO_PROFILE)
def get_layers(
    server: Annotated[Server, Depends(_server)],
    profile: Annotated[status.ServedProfile, Depends(_profile)],
    levels: Annotated[served_level.Levels, Depends(_levels)],
) -> list[status.Layer]:
    """What each layer was tuned to, and what it has done since the server started.

    What it was tuned to is that of the level that is served now. What it has done may have been
    done at several levels.
    """
    level = profile.profile.level_index(levels.read())
    return status.read_layers(profile.profile, level, server.per_head)


@router.post("/disable", **_GUARDED)
def disable(server: Annotated[Server, Depends(_server)]) -> status.SwitchState:
    """Makes all workers run every prefill dense from their next step on.

    Waits until all workers have acknowledged it, up to 5 seconds, and says how many have.
    """
    return _switch(False, server.num_workers)


@router.post("/enable", **_GUARDED)
def enable(server: Annotated[Server, Depends(_server)]) -> status.SwitchState:
    """Lets layers run sparse again; waits and answers as ``/afbs/disable`` does."""
    return _switch(True, server.num_workers)


@router.post("/level", **_TURNED)
def set_level(
    request: LevelRequest,
    server: Annotated[Server, Depends(_server)],
    levels: Annotated[served_level.Levels, Depends(_levels)],
) -> status.LevelState:
    """Makes all workers serve a level of the profile from their next step on.

    Waits until all workers have acknowledged it, up to 5 seconds, and says how many have.
    """
    if request.level not in levels.names:
        detail = f"level: one of {', '.join(levels.names)} expected, got {request.level[:64]!r}."
        raise HTTPException(HTTPStatus.BAD_REQUEST, detail)
    _tell_workers(
        "level",
        lambda: served_level.set_level(request.level),
        lambda: served_level.count_acknowledged(request.level) >= server.num_workers,
    )
    return status.level_state(levels, server.num_workers)


def _switch(enabled: bool, num_workers: int) -> status.SwitchState:
    _tell_workers(
        "switch",
        lambda: kill_switch.set_enabled(enabled),
        lambda: kill_switch.count_acknowledged(enabled) >= num_workers,
    )
    return status.switch_state(num_workers)


def _tell_workers(what: str, tell: Callable[[], None], have_all: Callable[[], bool]) -> None:
    """Writes a file for the workers, and waits until all of them have acknowledged it."""
    try:
        tell()
    except OSError as error:
        detail = f"The {what} is unchanged, its file cannot be written: {error}."
        raise HTTPException(HTTPStatus.INTERNAL_SERVER_ERROR, detail) from None
    deadline = time.monotonic() + ANSWER_SECONDS
    while not have_all() and time.monotonic() < deadline:
        time.sleep(0.05)


class RoutesPlugin:
    """The ``vllm.endpoint_plugins`` entry point. vLLM loads it if ``VLLM_PLUGINS`` names it."""

    name = "afbs"
    required_tasks: tuple[Any, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: "State", args: "Namespace") -> None:
        """Stores what the routes need to know about the server.

        Args:
            engine_client: vLLM's engine; None in a server without one.
            state: The app's state, whose ``afbs`` is set.
            args: The server's parsed command line.
        """
        api_keys = compat.api_keys(args)
        state.afbs = Server(api_keys, profile=None, backend=False, per_head=False)
        if engine_client is None:
            return
        config = engine_client.vllm_config
        if compat.chooses_afbs(config):
            profile = admission.admitted_profile(config)
            per_head = read_settings(config).per_head_metrics
            served = status.ServedProfile.of(profile) if profile else None
            serves_adapters = configuration.serves_adapters(config)
            state.afbs = Server(
                api_keys,
                served,
                backend=True,
                per_head=per_head,
                levels=served_level.Levels.of(config, profile) if profile else None,
                num_workers=configuration.num_workers(config),
                weights=admission.known_weights(config),
                adapters=profile.adapters if profile and serves_adapters else [],
            )
