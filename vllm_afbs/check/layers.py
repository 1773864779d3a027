"""Plans the layers of a server as its workers would, without weights, cache or engine.

vLLM's own parser makes the configuration, its own model class makes the layers on torch's device
``meta``, which has shapes and no memory, and ``serving/plan.py`` plans them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from vllm_afbs import compat
from vllm_afbs.check.model import make_layers, only_rank, rank_counts
from vllm_afbs.check.plugins import one_line
from vllm_afbs.check.refusals import RefusedError, refusals_of_vllm
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission, configuration, eligibility, summary
from vllm_afbs.serving.plan import LayerPlan, plan_layer, plan_layers
from vllm_afbs.serving.summary import Summary

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


@dataclass(frozen=True)
class Answer:
    """What a server's layers would serve.

    Attributes:
        summary: Counts of layers and the lengths, as the server logs them.
        plans: The plan of each layer, by the layer's name.
        profile: The profile that the server would serve, if any.
        level: The level of it that the server would serve at start.
        notes: What the reader has to know about the answer, one line each.
    """

    summary: Summary
    plans: dict[str, LayerPlan]
    profile: Profile | None
    level: str | None
    notes: list[str]


def parse_serve_arguments(arguments: Sequence[str]) -> "Namespace":
    """Parses what follows ``vllm serve``, in the way in which that command does.

    Raises:
        RefusedError: vLLM does not accept the arguments.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_parser: Any = FlexibleArgumentParser
    parser = make_parser()
    command = ServeSubcommand()
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    for each in (parser, serve):
        _raise_errors(each)
    with refusals_of_vllm():
        options: Namespace = parser.parse_args([command.name, *arguments])
        command.validate(options)
    if getattr(options, "model_tag", None) is not None:
        options.model = options.model_tag
    return options


def _raise_errors(parser: "ArgumentParser") -> None:
    """Makes a parser raise where it would print its usage and end the process."""

    def error(message: str) -> NoReturn:
        raise RefusedError(f"vllm serve: {' '.join(message.split())}")

    parser.error = error  # type: ignore[method-assign]


def check_directory(model: str) -> None:
    """Refuses a model that is named as a directory and is none.

    Raises:
        RefusedError: There is no such directory.
    """
    if model.startswith(("/", "./", "../", "~")) and not Path(model).exists():
        raise RefusedError(f"{model}: no such directory")


def server_config(options: "Namespace") -> "VllmConfig":
    """The configuration of a server, with an admitted profile.

    Raises:
        RefusedError: vLLM or our admission refuses what was given.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    check_directory(options.model)
    try:
        with refusals_of_vllm():
            return as_served(AsyncEngineArgs.from_cli_args(options))
    except SystemExit as error:  # admission's one line
        raise RefusedError(str(error.code).removeprefix("vllm-afbs: ")) from None


def as_served(arguments: "EngineArgs") -> "VllmConfig":
    """The configuration of an engine whose steps are as large as a server's.

    VLLM chooses these sizes by who asks, if the user does not, and keeps them in the arguments.
    """
    from vllm.usage.usage_lib import UsageContext

    config: VllmConfig = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    return config


def plan_server(vllm_config: "VllmConfig") -> Answer:
    """Plans the layers that a server of this configuration has.

    If vLLM cannot make the model without its weights, the answer follows from the configuration
    and the profile alone, and a note says so.
    """
    profile = admission.admitted_profile(vllm_config)
    ranks = rank_counts(vllm_config)
    notes = notes_on(vllm_config, ranks)
    with only_rank(vllm_config):
        try:
            make_layers(vllm_config)
        except Exception as error:  # whatever a model's class does without memory
            notes.append(
                f"vLLM cannot make this model without its weights ({one_line(error)}); the answer "
                "follows from the configuration and the profile, and leaves out what single layers "
                "have, such as windows"
            )
            plans = _plan_by_configuration(vllm_config, profile)
        else:
            plans = _plan_layers(vllm_config, profile, ranks)
    level = None
    if profile is not None:
        if configuration.serves_adapters(vllm_config):
            notes.append(summary.adapters(profile))
        level = profile.levels[admission.start_level(vllm_config, profile)].name
    summed = Summary.of(vllm_config, profile, plans.values())
    return Answer(summed, plans, profile, level, notes)


def notes_on(vllm_config: "VllmConfig", ranks: Mapping[str, int]) -> list[str]:
    """What an answer leaves out, one line each.

    Args:
        vllm_config: The server's configuration.
        ranks: Number of ranks of each kind of parallelism.
    """
    notes = []
    if several := [f"{name}={count}" for name, count in ranks.items() if count > 1]:
        notes.append(
            f"{', '.join(several)}: planned as one rank that holds all heads and layers; ranks "
            "that get uneven shares of the heads run dense (head_shape)"
        )
    if vllm_config.speculative_config is not None:
        notes.append("layers of the drafter are not listed; they run dense (unknown_layer)")
    if vllm_config.device_config.device_type == "cuda":
        notes.append(
            "the server leaves a layer dense where it expects dense attention to be faster "
            "(dense_is_faster), which depends on each step"
        )
    return notes


def _plan_layers(
    vllm_config: "VllmConfig", profile: Profile | None, ranks: Mapping[str, int]
) -> dict[str, LayerPlan]:
    """Plans the layers that vLLM made, in the groups for which it makes metadata builders."""
    from vllm.v1.worker.utils import select_common_block_size

    layers = {
        name: layer
        for name, layer in compat.attention_layers(vllm_config, None).items()
        if compat.is_ours(layer)
    }
    for layer in layers.values():
        impl = compat.attention_impl(layer)
        impl.dcp_world_size = ranks["decode_context_parallel_size"]
        impl.pcp_world_size = ranks["prefill_context_parallel_size"]
    specs = compat.cache_specs(vllm_config)
    for group in compat.cache_groups(vllm_config):
        names = [
            name
            for name, layer in layers.items()
            if {name, layer.kv_sharing_target_layer_name} & set(group.layer_names)
        ]
        if not names:
            continue
        backends = list({layers[name].get_attn_backend() for name in names})
        with refusals_of_vllm():
            page_size = select_common_block_size(group.kv_cache_spec.block_size, backends)
        if vllm_config.device_config.device_type == "cpu":
            for name in names:
                spec = specs[layers[name].kv_sharing_target_layer_name or name]
                _build(vllm_config, layers[name], name, spec.copy_with_new_block_size(page_size))
        else:
            start = admission.start_level(vllm_config, profile)
            planned = plan_layers(vllm_config, profile, names, page_size)
            summary.report(vllm_config, profile, names, [plans[start] for _, plans in planned])
    return summary.plans(vllm_config)


def _build(vllm_config: "VllmConfig", layer: Any, name: str, spec: Any) -> None:
    """Makes a layer's metadata builder, which on the CPU also tries how keys are packed.

    On CUDA, a builder takes memory of the device and compiles kernels.
    """
    layer.get_attn_backend().get_builder_cls()(spec, [name], vllm_config, torch.device("cpu"))


def _plan_by_configuration(
    vllm_config: "VllmConfig", profile: Profile | None
) -> dict[str, LayerPlan]:
    """Plans the profile's full-attention layers by what makes all layers of a server dense."""
    if profile is None:
        return {}
    unsupported = eligibility.first_true(eligibility.server_obstacles(vllm_config))
    num_heads, start = profile.model.num_heads, admission.start_level(vllm_config, profile)
    return {
        f"layers.{index}": plan_layer(profile, index, num_heads, 0, unsupported, start)
        for index in profile.full_layers
    }
