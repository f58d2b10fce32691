"""LoRA adapters (Hu et al., 2021, arXiv:2106.09685) on a VLA or a language model, by peft; saved in peft's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from robot_forgetting.errors import UserError, one_line
from robot_forgetting.finite import check_finite, misfits
from robot_forgetting.machine.files import disk, follow_umask, read_json
from robot_forgetting.ranges import Range

ADAPTER = "default"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what peft puts before every name

# What a saved adapter's configuration may say besides its defaults: everything that samples, trains and merges alike.
# The rest computes something else than W + s B A, or changes more of the model than its adapters.
UNDERSTOOD = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "runtime_config",
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
_DEFAULTS = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # of init_lora_weights; others change the base's weights

WAYS_OUT = "add it to the model's weights with peft (merge_and_unload), save that, and give it as policy.checkpoint"


def add(
    model: nn.Module,
    *,
    rank: Annotated[int, Range(1, 65_536)] = 32,
    alpha: Annotated[float, Range(0, 1e6, above=True)] = 16,
    targets: list[str] | None = None,
    adapter: str | None = None,
) -> None:
    """Freezes the model and adds adapters in float32, initially without effect.

    targets: endings of layer names ("q_proj", "attn.qkv"); null: every linear layer that is computed, as OpenVLA's
        own fine-tuning does, except the head
    adapter: folder of a saved adapter to start from; rank, alpha and targets then come from it
    """
    if adapter is not None:
        config = _saved_config(Path(adapter))
    else:
        if rank < 1 or alpha <= 0:
            raise UserError(f"lora needs a rank of at least 1 and a positive alpha, not rank={rank}, alpha={alpha}")
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=_names(model, targets), bias="none")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:  # no such layer, or one of a kind that peft does not adapt
        raise UserError(
            f"the adapter {adapter or ''} does not fit this policy: {one_line(error)}"
        ) from error
    _check_layers(model)
    model.lora_config = config
    unused = set(map(id, getattr(model, "unused_parameters", list)()))
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            parameter.data = parameter.data.float()  # peft gives them the model's dtype; bfloat16 would lose updates
            parameter.requires_grad_(id(parameter) not in unused)
    if adapter is not None:
        load_weights(model, Path(adapter))


def _names(model: nn.Module, targets: list | None) -> list[str]:
    unused = {id(parameter) for parameter in getattr(model, "unused_parameters", list)()}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in unused
    ]
    if targets is None:
        return [name for name in linear if not name.endswith("lm_head")]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            endings = sorted({re.sub(r".*\.(\d+|language_model|model|projector)\.", "", name) for name in linear})
            raise UserError(f"lora.targets: no layer is called '{target}'; layers: {', '.join(endings)}")
    return [name for name in linear if any(name == target or name.endswith("." + target) for target in targets)]


def without_casts(model: nn.Module) -> None:
    """Adapters take their input as it is: peft converts it to float32, which would be kept for the backward pass."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters have no effect."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of the model without adapters that computes the same: W + s B A where they are enabled.

    In bfloat16 the sum is rounded, so that a change of less than 1/256 of a weight is lost.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, weight in model.state_dict().items():
        layer, base, leaf = name.rpartition(".base_layer.")
        if base:
            if leaf == "weight" and not layers[layer].disable_adapters:
                weight = (weight.float() + layers[layer].get_delta_weight(ADAPTER).float()).to(weight.dtype)
            yield f"{layer}.{leaf}", weight
        elif f".{ADAPTER}." not in name:
            yield name, weight


def save(folder: str | Path, model: nn.Module, *, base: str) -> None:
    """adapter_config.json and adapter_model.safetensors, as ``peft.PeftModel.from_pretrained`` reads them."""
    folder = Path(folder)
    tensors = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if f".{ADAPTER}." in name
    }
    model.lora_config.base_model_name_or_path = base
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        follow_umask(folder / WEIGHTS)
        model.lora_config.save_pretrained(folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Weights of a saved adapter into the adapters that the model has; every name must fit."""
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} is missing or corrupt ({error}); save the adapter again") from error
    expected = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in model.named_parameters()
        if f".{ADAPTER}." in name
    }
    if problems := misfits(*({name: one.shape for name, one in some.items()} for some in (expected, tensors))):
        raise UserError(f"the adapter in {folder} does not fit this policy: {'; '.join(problems)}")
    check_finite(tensors, f"the adapter in {folder}", "save the adapter again")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


def _check_layers(model: nn.Module) -> None:
    """``UserError`` for an adapter on anything but a matrix or a convolution."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, Linear | Conv2d):
            raise UserError(f"an adapter on '{name}' is not supported ({type(module).__name__}); {WAYS_OUT}")


def _saved_config(folder: Path) -> LoraConfig:
    """The configuration of an adapter that was saved by this package or by peft, without dropout.

    What is trained is the distribution that was sampled from, which has none.
    """
    file = folder / CONFIG
    if not file.exists():
        raise UserError(f"{folder} has no {CONFIG}; give the folder of a saved LoRA adapter")
    said = read_json(file)
    if said.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file}: adapters of type {said['peft_type']} are not supported, LORA's are; {WAYS_OUT}")
    for name, value in said.items():
        usual = value in PLAIN_STARTS if name == "init_lora_weights" else value == _DEFAULTS.get(name) or not value
        if name not in UNDERSTOOD and not usual:
            raise UserError(f"{file}: {name}={json.dumps(value)} is not supported; {WAYS_OUT}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no LoRA configuration ({error}); save the adapter again") from error
    config.lora_dropout = 0.0
    return config
