"""Our OpenVLA against tensors of the original code: `robot-forgetting check policy=openvla golden=FOLDER`.

The folder holds config.json, model.safetensors, golden.npz, processor.npz and, optionally, the names and shapes of the
real checkpoint in openvla_7b_state_dict.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.policies.openvla.processor import RESIZE_STRATEGIES, ActionBins, ImageProcessor, Statistics
from robot_forgetting.policies.openvla.vision import dinov2_tower, siglip_tower
from robot_forgetting.policies.openvla.vla_checkpoint import compare_tensors
from robot_forgetting.policies.openvla.vla_model import OpenVLAConfig, OpenVLAModel

RELATIVE = 5e-5  # of the largest reference value (at least 1): float32 sums in another order
HALF = 2e-3  # processor references are stored in half precision, values up to 2.7
COMMANDS = 1e-9  # doubles through the same formula


@dataclass(frozen=True)
class GoldenRow:
    """One compared tensor; for token rows the error is the number of tokens that differ."""

    tensor: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def check_golden(folder: str | Path) -> list[GoldenRow]:
    """All rows; ``UserError`` where the folder is not in the layout."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "golden.npz", "processor.npz"):
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}; golden= takes a folder of reference tensors, see the README")
    values = json.loads((folder / "config.json").read_text())
    config = golden_config(values)
    golden = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(folder / "golden.npz").items()}
    with torch.no_grad():
        model = load_golden_model(folder, config)
        rows = _model_rows(model, golden)
    rows += _action_rows(config, golden)
    rows += _processor_rows(config, folder)
    names = folder / "openvla_7b_state_dict.json"
    if names.exists():
        rows.append(GoldenRow("tensor names and shapes at 7B", float(_name_differences(names)), 0.0))
    return rows


def golden_config(values: dict) -> OpenVLAConfig:
    try:
        sizes = values["config"]
        dino, siglip = sizes["dino"], sizes["siglip"]
        return OpenVLAConfig(
            dino=dinov2_tower(
                dino["embed_dim"], dino["depth"], dino["num_heads"], dino["patch"], dino["img"],
                int(dino["embed_dim"] * dino["mlp"]), registers=dino["reg"],
            ),
            siglip=siglip_tower(
                siglip["embed_dim"], siglip["depth"], siglip["num_heads"], siglip["patch"], siglip["img"],
                int(siglip["embed_dim"] * siglip["mlp"]),
            ),
            hidden_size=sizes["hidden"],
            num_layers=sizes["layers"],
            num_heads=sizes["heads"],
            intermediate_size=sizes["inter"],
            vocab_size=values["vocab_size"],
            pad_to_multiple_of=values["pad_to_multiple_of"],
            rms_norm_eps=values["rms_norm_eps"],
            action_bins=values["action_bins"],
            means=tuple(map(tuple, values["means"])),
            stds=tuple(map(tuple, values["stds"])),
            norm_stats=values["norm_stats"],
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"the golden folder's config.json lacks or misspells {error}") from error


def load_golden_model(folder: Path, config: OpenVLAConfig) -> OpenVLAModel:
    model = OpenVLAModel(config).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_tensors(folder, shapes, [folder / "model.safetensors"])
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model


def _model_rows(model: OpenVLAModel, golden: dict[str, Tensor]) -> list[GoldenRow]:
    ids, pixels = golden["input_ids"], golden["pixel_values"]
    features = model.vision_backbone(pixels)
    rows = [_close("vision_features", features, golden["vision_features"])]
    rows.append(_close("projector_features", model.projector(features), golden["projector_features"]))
    rows.append(_close("logits_last", model(ids, None, pixels)[:, -1], golden["logits_last"]))

    # Teacher forcing: the sequence ends with the action tokens and </s>; labels do not cover the patches.
    sequence, labels = golden["teacher_input_ids"], golden["teacher_labels"]
    logits = model(sequence, None, pixels)
    patches = logits.shape[1] - sequence.shape[1]
    labels = torch.cat([labels[:, :1], torch.full((len(labels), patches), -100), labels[:, 1:]], dim=1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    rows.append(_close("teacher_loss", loss, golden["teacher_loss"]))
    tokens = golden["teacher_action_logits"].shape[1]
    start = int((golden["teacher_labels"][0] != -100).int().argmax())
    bins = model.ids_to_bins(sequence[:, start : start + tokens])
    ours = model.action_logits(sequence[:, :start], None, pixels, bins).flip(-1)  # bins count ids downwards
    rows.append(_close("teacher_action_logits", ours, golden["teacher_action_logits"]))

    greedy = golden["greedy_tokens"]
    bins, _ = model.generate_actions(ids, None, pixels, temperature=0.0, tokens=greedy.shape[1])
    rows.append(_equal("greedy_tokens", model.bins_to_ids(bins), greedy))
    forced = model.action_logits(ids, None, pixels, model.ids_to_bins(greedy)).argmax(-1)
    rows.append(_equal("greedy_tokens without cache", model.bins_to_ids(forced), greedy))
    return rows


def _action_rows(config: OpenVLAConfig, golden: dict[str, Tensor]) -> list[GoldenRow]:
    bins, statistics = ActionBins(config.action_bins), Statistics(config.norm_stats)

    def values(ids: Tensor) -> np.ndarray:
        return bins.decode(np.clip(config.text_vocab_size - 1 - ids.numpy(), 0, config.action_bins - 1))

    rows = [_close("detok_normalized", values(golden["detok_tokens"]), golden["detok_normalized"], COMMANDS)]
    for key in statistics.keys:
        if f"actions_{key}" in golden:
            ours = statistics.unnormalise(values(golden["greedy_tokens"]), key)
            rows.append(_close(f"actions_{key}", ours, golden[f"actions_{key}"], COMMANDS))
    return rows


def _processor_rows(config: OpenVLAConfig, folder: Path) -> list[GoldenRow]:
    arrays = dict(np.load(folder / "processor.npz"))
    rows = []
    for strategy in RESIZE_STRATEGIES:
        for name in sorted(name for name in arrays if name.startswith("image_")):
            reference = arrays[name.replace("image", strategy)]
            processor = ImageProcessor(reference.shape[-1], strategy, config.means, config.stds)
            rows.append(_close(f"{strategy} {name}", processor([arrays[name]])[0], reference.astype(np.float32), HALF))
    return rows


def _name_differences(path: Path) -> int:
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in OpenVLAModel(OpenVLAConfig()).state_dict().items()}
    theirs = json.loads(path.read_text())
    return sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())


def _close(name: str, ours, reference, tolerance: float | None = None) -> GoldenRow:
    ours, reference = torch.as_tensor(ours).double(), torch.as_tensor(reference).double()
    if ours.shape != reference.shape:
        raise UserError(f"golden tensor '{name}' has shape {list(reference.shape)}, ours {list(ours.shape)}")
    error = float((ours - reference).abs().max())
    return GoldenRow(name, error, tolerance or RELATIVE * max(1.0, float(reference.abs().max())))


def _equal(name: str, ours: Tensor, reference: Tensor) -> GoldenRow:
    return GoldenRow(name, float((ours != reference).sum()), 0.0)
