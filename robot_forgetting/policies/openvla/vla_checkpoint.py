"""OpenVLA checkpoints in the published layout.

A folder of config.json, preprocessor_config.json, dataset_statistics.json (optional where config.json has norm_stats),
tokenizer.json, and one or several safetensors files. Nothing pickled is ever read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from robot_forgetting.errors import UserError
from robot_forgetting.finite import misfits
from robot_forgetting.machine.files import disk, follow_umask, read_json, write_atomic, write_json
from robot_forgetting.policies.memory import free_bytes
from robot_forgetting.policies.openvla.processor import RESIZE_STRATEGIES
from robot_forgetting.policies.openvla.prompt_tokenizer import load_tokenizer
from robot_forgetting.policies.openvla.vision import DINOV2_LARGE, SIGLIP_SO400M, TowerConfig
from robot_forgetting.policies.openvla.vla_model import LLAMA, OpenVLAConfig, OpenVLAModel

TIMM_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": DINOV2_LARGE,
    "vit_so400m_patch14_siglip_224": SIGLIP_SO400M,
    "vit_so400m_patch14_siglip_384": SIGLIP_SO400M,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_FILES = ["*.json", "*.safetensors"]  # no code, nothing pickled
# What OpenVLA-OFT (arXiv:2502.19645) leaves in its checkpoints: files of its heads beside the model, settings of its
# inputs and chunks in config.json, and in the model's code, which is only looked at, their constant.
OFT_FILES = re.compile(
    r"(^|/)(action_head|noisy_action_projector|proprio_projector|vision_backbone)--|(^|/)lora_adapter/", re.IGNORECASE
)
OFT_SETTINGS = ("num_images_in_input", "use_proprio", "use_film", "use_l1_regression", "use_diffusion",
                "num_action_chunks", "action_chunk_size", "proprio_dim")  # fmt: skip
OFT_CODE = "NUM_ACTIONS_CHUNK"
OFT_NAME = re.compile(r"(?<![a-z])oft(?![a-z])", re.IGNORECASE)
ANNOUNCED_BYTES = 10**9


@dataclass
class Checkpoint:
    """What a checkpoint holds."""

    model: OpenVLAModel
    tokenizer: Tokenizer
    source: str = "new"


# ---- reading


def load(
    checkpoint: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Loads a Hub id or a folder; weights go to ``device`` in ``dtype`` one tensor at a time."""
    folder = locate(checkpoint)
    refuse_oft(str(checkpoint), folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, the model only {config.vocab_size}; "
            "they belong to different checkpoints"
        )
    shards = find_shards(folder)
    with torch.device("meta"):
        model = OpenVLAModel(config)
    compare_tensors(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, shards)
    _announce(checkpoint, model, dtype, torch.device(device))
    for name, tensor in _tensors(shards):
        parent, _, leaf = name.rpartition(".")
        # A copy in any case: the tensor as read may still be backed by the file.
        value = tensor.to(device=device, dtype=dtype, copy=True)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    rotary = model.language_model.model.rotary_emb  # its buffers are computed, not stored
    model.language_model.model.rotary_emb = type(rotary)(config.llama()).to(device)
    return Checkpoint(model.eval(), tokenizer, str(checkpoint))


def locate(checkpoint: str | Path) -> Path:
    """A local folder as it is; a bare name among the package's own weights; a Hub id ("org/name") downloaded."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    text = str(checkpoint)
    shipped = Path(__file__).parents[2] / "weights" / text
    if "/" not in text and shipped.is_dir():
        return shipped
    if folder.exists():
        raise UserError(f"{folder} is a file; give the folder that holds config.json and the safetensors files")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UserError(
            f"no folder {folder}; give an existing checkpoint folder or a Hub id such as openvla/openvla-7b"
        )
    from huggingface_hub import list_repo_files, snapshot_download

    listed = []
    with suppress(Exception):  # what cannot be listed may still be in the cache, and is looked at there
        listed = list_repo_files(text)
    _refuse_oft(text, _oft_files(listed))
    try:
        return Path(snapshot_download(text, allow_patterns=HUB_FILES))
    except Exception as error:  # requests, httpx, hub and OS errors alike: for the user all mean "not obtained"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"checkpoint '{text}' is no folder here and could not be fetched from the Hugging Face Hub ({reason}); "
            "check the name and the network, or download it elsewhere and give its folder"
        ) from error


def refuse_oft(checkpoint: str, folder: Path) -> None:
    """``UserError`` for a checkpoint of OpenVLA-OFT, whose weights fit OpenVLA's network and mean something else.

    It reads all actions of a chunk off in one pass that is not causal, most often through a head of its own. There is
    no one mark: those with a head have its file, those without have other code or settings.
    """
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    values = _json(folder, "config.json", needed=False)
    marks = _oft_files(files) + [f"{name} in config.json" for name in OFT_SETTINGS if values.get(name)]
    marks += [f"{path.name} (its code)" for path in folder.glob("*.py") if OFT_CODE in path.read_text(errors="replace")]
    said = checkpoint if not Path(checkpoint).is_dir() else str(values.get("_name_or_path", ""))
    marks += [f"the name {said}"] if OFT_NAME.search(said) else []
    _refuse_oft(checkpoint, marks)


def _oft_files(files: Iterable[str]) -> list[str]:
    return sorted(file for file in files if OFT_FILES.search(file))


def _refuse_oft(checkpoint: str, marks: list[str]) -> None:
    if marks:
        raise UserError(
            f"{checkpoint} is an OpenVLA-OFT checkpoint ({', '.join(marks[:3])}): it decodes in parallel, not token by "
            "token, which this policy would get wrong; use a checkpoint of OpenVLA itself, such as openvla/openvla-7b"
        )


def read_config(folder: Path) -> OpenVLAConfig:
    """Dimensions and conventions from the checkpoint's json files."""
    values, pictures = _json(folder, "config.json"), _json(folder, "preprocessor_config.json")
    if values.get("model_type") != "openvla":
        raise UserError(f"{folder}/config.json is of model_type {values.get('model_type')!r}, not 'openvla'")
    statistics = _json(folder, "dataset_statistics.json", needed=False) or values.get("norm_stats")
    if not statistics:
        raise UserError(f"{folder} has no action statistics; add dataset_statistics.json or norm_stats in config.json")
    try:
        text, standard = values["text_config"], OpenVLAConfig()
        dino, siglip = _towers(values)
        rope = (text.get("rope_parameters") or {}).get("rope_theta", text.get("rope_theta", standard.rope_theta))
        if text.get("num_key_value_heads", text.get("num_attention_heads")) != text.get("num_attention_heads"):
            raise UserError(
                f"{folder}/config.json: grouped key-value heads are not supported; use a Llama-2 checkpoint"
            )
        named = {"vocab_size": text["vocab_size"], "pad_token_id": values["pad_token_id"]}  # both must be there
        sizes = {ours: (text | named).get(name, getattr(standard, ours)) for name, ours in LLAMA.items()}
        config = OpenVLAConfig(
            **sizes,
            dino=dino,
            siglip=siglip,
            pad_to_multiple_of=values["pad_to_multiple_of"],
            rope_theta=rope,
            action_bins=values["n_action_bins"],
            image_resize_strategy=values["image_resize_strategy"],
            means=tuple(map(tuple, pictures["means"])),
            stds=tuple(map(tuple, pictures["stds"])),
            norm_stats=statistics,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind = "lacks" if isinstance(error, KeyError) else "cannot be read:"
        raise UserError(f"the configuration in {folder} {kind} {error}; download the checkpoint again") from error
    if config.image_resize_strategy not in RESIZE_STRATEGIES:
        raise UserError(f"{folder}/config.json: unknown image_resize_strategy '{config.image_resize_strategy}'")
    return config


def _towers(values: dict) -> tuple[TowerConfig, TowerConfig]:
    """Published checkpoints name timm models; ours, which have none, give the dimensions."""
    if "vision_towers" in values:
        towers = ({**tower, "channels": tuple(tower.get("channels", ()))} for tower in values["vision_towers"])
        dino, siglip = (TowerConfig(**tower) for tower in towers)
        return dino, siglip
    names = values["timm_model_ids"]
    if len(names) != 2 or any(name not in TIMM_TOWERS for name in names):
        raise UserError(f"vision towers {names} are not supported; OpenVLA has {list(TIMM_TOWERS)[:2]}")
    dino, siglip = (replace(TIMM_TOWERS[name], image_size=values["image_sizes"][0]) for name in names)
    return dino, siglip


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the weights."""
    if (folder / INDEX).exists():
        weight_map = _json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / INDEX} has no weight_map; download it again")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [path.name for path in shards if not path.exists()]
        if absent:
            raise UserError(f"{folder} lacks {', '.join(absent)}, which its index names; download the missing files")
        return shards
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} holds pickled weights ({', '.join(pickled)}), which can run code; convert to safetensors"
        )
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}; download the whole checkpoint")


def compare_tensors(folder: Path, expected: dict[str, tuple], shards: list[Path]) -> None:
    """``UserError`` that names every missing, unexpected and misshapen tensor; reads headers only."""
    found: dict[str, tuple] = {}
    for shard in shards:
        with _opened(shard) as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if problems := misfits(expected, found):
        raise UserError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")


def _tensors(shards: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in shards:
        with _opened(shard) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _opened(shard: Path):
    try:
        return safe_open(shard, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shard} is corrupt or truncated ({error}); download or save it again") from error


def _json(folder: Path, name: str, needed: bool = True) -> dict:
    if not (folder / name).exists():
        if needed:
            raise UserError(f"{folder} has no {name}; it is no OpenVLA checkpoint, or an incomplete one")
        return {}
    try:
        return read_json(folder / name)
    except UserError as error:
        raise UserError(f"{folder / name} is not a readable JSON object; download it again") from error


def _announce(checkpoint, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Says what a large load will take, and refuses one that cannot fit."""
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if needed < ANNOUNCED_BYTES:
        return
    free = free_bytes(device)
    known = "" if free is None else f", {free / 1e9:.1f} GB are free"
    line = f"{checkpoint}: {needed / 1e9:.1f} GB of weights in {str(dtype).removeprefix('torch.')} on {device}{known}"
    if free is not None and free < needed:
        raise UserError(f"{line}; use dtype=bfloat16, another device, or a machine with more memory")
    print(line, file=sys.stderr, flush=True)


# ---- writing


def save(
    folder: str | Path,
    model: OpenVLAModel,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the published layout; one shard at a time is converted and held besides the model."""
    folder = Path(folder)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    sizes = {name: torch.empty_like(tensor, dtype=dtype, device="meta") for name, tensor in state.items()}
    shards = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    for name, keys in shards.filename_to_tensors.items():
        part = folder / f".{name}.part"
        tensors = {key: state[key].detach().to("cpu", dtype).contiguous() for key in keys}
        try:
            with disk(folder / name):
                save_file(tensors, part, metadata={"format": "pt"})
                follow_umask(part)
                part.replace(folder / name)
        except SafetensorError as error:
            raise UserError(f"{folder / name} cannot be written ({error}); is the disk full?") from error
        finally:
            part.unlink(missing_ok=True)
    for path in [folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:  # of another save
        if path.name not in shards.filename_to_tensors:
            path.unlink(missing_ok=True)
    if shards.is_sharded:
        write_json(folder / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    config = model.config
    write_json(folder / "config.json", _config_values(config, dtype or next(model.parameters()).dtype))
    pictures = {
        "means": config.means,
        "stds": config.stds,
        "image_resize_strategy": config.image_resize_strategy,
        "input_sizes": [[3, config.image_size, config.image_size]] * 2,
        "interpolations": ["bicubic"] * 2,
        "use_fused_vision_backbone": True,
    }
    write_json(folder / "preprocessor_config.json", pictures)
    write_json(folder / "dataset_statistics.json", config.norm_stats)
    write_atomic(
        folder / "tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False) + "\n"
    )


def _config_values(config: OpenVLAConfig, dtype: torch.dtype) -> dict:
    """config.json: the published keys; ``vision_towers`` where timm has no name for the towers."""
    published = (replace(config.dino, image_size=224), replace(config.siglip, image_size=224))
    named = published == (DINOV2_LARGE, SIGLIP_SO400M) and config.image_size in (224, 384)
    size, name = config.image_size, str(dtype).removeprefix("torch.")
    towers = {"timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", f"vit_so400m_patch14_siglip_{size}"]}
    if not named:
        towers = {"vision_towers": [asdict(config.dino), asdict(config.siglip)]}
    llama_7b = (config.hidden_size, config.num_layers) == (4096, 32)
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": f"dinosiglip-vit-so-{size}px" if named else f"dinosiglip-vit-nano-{size}px",
        "llm_backbone_id": "llama2-7b-pure" if llama_7b else "llama-nano",
        "use_fused_vision_backbone": True,
        **towers,
        "image_sizes": [size, size],
        "image_resize_strategy": config.image_resize_strategy,
        "n_action_bins": config.action_bins,
        "pad_to_multiple_of": config.pad_to_multiple_of,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": name,
        "norm_stats": config.norm_stats,
        "text_config": {
            "model_type": "llama",
            **{theirs: getattr(config, ours) for theirs, ours in LLAMA.items()},
            "rope_theta": config.rope_theta,
            "torch_dtype": name,
        },
    }
