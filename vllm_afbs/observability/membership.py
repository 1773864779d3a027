"""How a server begins, and how its workers become part of it."""

from typing import TYPE_CHECKING

from vllm_afbs.observability import instance, kill_switch, metrics, served_level
from vllm_afbs.serving import admission, configuration

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_afbs.profile.schema import Profile


def begin_server(vllm_config: "VllmConfig") -> None:
    """Switches a server on, at its first level, and sends its id and directory to the workers.

    They go with the configuration, because Ray's workers do not inherit the environment. A worker
    that copies the configuration, for a part of the model, does not begin another server.
    """
    if "server_id" in configuration.handed_over(vllm_config):
        return
    kill_switch.begin()
    if (profile := admission.admitted_profile(vllm_config)) is not None:
        served_level.Levels.of(vllm_config, profile).begin()
    server = instance.current()
    configuration.hand_over(vllm_config, server_id=server.server_id, directory=server.directory)


def join_server(vllm_config: "VllmConfig") -> "Profile | None":
    """Makes a worker one of its server's, and shows on ``/metrics`` what it serves.

    Returns:
        The admitted profile, if any.

    Raises:
        ProfileError: The profile's file changed since it was checked.
    """
    handed = configuration.handed_over(vllm_config)
    if "server_id" in handed:
        instance.join(instance.Instance(handed["server_id"], handed["directory"]))
    profile = admission.admitted_profile(vllm_config)
    metrics.report_profile(profile, admission.known_weights(vllm_config))
    return profile
