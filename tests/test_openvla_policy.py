"""OpenVLA as a policy: transforms, tokens and commands, the base policy, adapters, checkpoints good and bad."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from robot_forgetting.engine.episode_rows import fingerprint
from robot_forgetting.errors import UserError
from robot_forgetting.policies.openvla import vla_checkpoint as openvla_checkpoint
from robot_forgetting.policies.openvla.processor import ActionBins, ImageProcessor, Statistics
from robot_forgetting.policies.openvla.prompt_tokenizer import PromptTokenizer, prompt, train_small_tokenizer
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy, new_nano
from robot_forgetting.policies.openvla.vla_checkpoint import Checkpoint
from robot_forgetting.policy import Action, ConventionSpec

INSTRUCTIONS = ["stack the red cube on top of the green cube", "push the blue cube to the goal"]
NORM_STATS = {"arm": {"action": {"q01": [-2.0] * 6 + [0.0], "q99": [2.0] * 6 + [1.0], "mask": [True] * 6 + [False]}}}


def small_nano(**options) -> OpenVLAPolicy:
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=8, dino_dim=16, dino_depth=2, siglip_dim=16, siglip_depth=2, vision_heads=2,
                 hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48)  # fmt: skip
    return new_nano(**sizes, instructions=INSTRUCTIONS, norm_stats=NORM_STATS, device="cpu", **options)


def observations(count: int = 4) -> dict:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return {"image": images, "instruction": [INSTRUCTIONS[index % 2] for index in range(count)]}


@pytest.fixture
def policy() -> OpenVLAPolicy:
    return small_nano()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    small_nano().save(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# ---- transforms


@pytest.mark.parametrize(
    "strategy, top, middle",
    [
        ("resize-naive", [10, 100, 200], [10, 100, 200]),  # everything, squeezed
        ("letterbox", [127, 127, 127], [10, 100, 200]),  # everything, between grey bars
        ("resize-crop", [100, 100, 100], [100, 100, 100]),  # the middle square only
    ],
)
def test_resize_strategies_on_three_stripes(strategy, top, middle):
    image = np.full((32, 64, 3), 100, np.uint8)
    image[:, :16], image[:, 48:] = 10, 200
    resized = ImageProcessor(16, strategy, [[0.5] * 3] * 2, [[0.5] * 3] * 2).resize(image)
    assert resized.shape == (16, 16, 3)
    # Bicubic overshoots by up to a tenth of a step within two pixels of it.
    np.testing.assert_allclose(resized[1, [1, 8, 14], 0].astype(int), top, atol=10)
    np.testing.assert_allclose(resized[8, [1, 8, 14], 0].astype(int), middle, atol=10)


def test_right_sized_pictures_take_the_fast_path_with_the_same_result():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    means, stds = [[0.4, 0.5, 0.6], [0.5] * 3], [[0.2, 0.3, 0.4], [0.5] * 3]
    fast = ImageProcessor(8, "resize-naive", means, stds)(images)
    by_hand = [(images / 255 - np.array(mean)) / np.array(std) for mean, std in zip(means, stds, strict=True)]
    np.testing.assert_allclose(fast.numpy(), np.concatenate(by_hand, -1).transpose(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 1), np.uint8)]
)
def test_other_pictures_are_refused(images):
    with pytest.raises(UserError, match="pictures must be uint8"):
        ImageProcessor(8, "resize-naive", [[0.5] * 3] * 2, [[0.5] * 3] * 2)(images)


def test_action_bins_by_hand():
    bins = ActionBins(256)
    assert bins.encode(np.array([-5.0, -1.0, -0.999, 0.0, 0.999, 1.0, 7.0])).tolist() == [0, 0, 0, 127, 254, 255, 255]
    np.testing.assert_allclose(
        bins.decode(np.array([0, 127, 254, 255])), [-254 / 255, 0, 254 / 255, 254 / 255], atol=1e-12
    )


def test_statistics_by_hand():
    table = {"q01": [-2.0, 0.0, 3.0], "q99": [2.0, 1.0, 3.0], "mask": [True, False, True]}
    statistics = Statistics({"arm": {"action": table}})
    normalised = statistics.normalise(np.array([[1.0, 0.75, 3.0], [-9.0, 0.0, 5.0]]), "arm")
    np.testing.assert_allclose(normalised, [[0.5, 0.75, 0.0], [-1.0, 0.0, 0.0]], atol=1e-7)
    np.testing.assert_allclose(statistics.unnormalise(np.array([[0.5, 0.75, 0.0]]), "arm"), [[1.0, 0.75, 3.0]])
    with pytest.raises(UserError, match="unknown statistics 'leg'; choose one of: arm"):
        statistics.normalise(normalised, "leg")


@pytest.mark.parametrize(
    "table",
    [{"q01": [0.0]}, {"q01": [0.0], "q99": [1.0, 2.0]}, {"q01": [2.0], "q99": [1.0]}, {"q01": ["a"], "q99": [1.0]}],
)
def test_broken_statistics(table):
    with pytest.raises(UserError, match="statistics 'arm'"):
        Statistics({"arm": {"action": table}})


def test_small_tokenizer_keeps_prompts_short_and_text_intact():
    tokenizer = train_small_tokenizer(INSTRUCTIONS)
    prompts = PromptTokenizer(tokenizer, pad_token_id=1024)
    assert tokenizer.get_vocab_size() == 1024
    assert tokenizer.token_to_id("<action_0>") == 1023 and tokenizer.token_to_id("<action_255>") == 768
    assert max(len(prompts.ids(instruction)) for instruction in INSTRUCTIONS) <= 8
    for text in ("Défaire le nœud 漢字", "tidy <action_3> up", "x"):
        ids = prompts.ids(text)
        assert tokenizer.decode(ids) == prompt(text) and max(ids) < 768
    ids, mask = prompts([INSTRUCTIONS[0], "x"])
    assert ids[1, -1] == ids[0, -1] and (ids[1] == 1024).tolist() == (~mask[1]).tolist()
    with pytest.raises(UserError, match="is empty"):
        prompts([" "])


# ---- the policy


def test_commands_survive_encoding_and_decoding(policy):
    rng = np.random.default_rng(0)
    commands = np.concatenate([rng.uniform(-2, 2, (50, 6)), rng.integers(0, 2, (50, 1))], axis=1)
    action = policy.encode(commands)
    back = policy.decode(action)
    assert back.dtype == np.float32 and np.abs(back - commands)[:, :6].max() <= 2 / 255 + 1e-6
    assert torch.equal(policy.encode(back, statistics="arm").tokens.clamp(max=254), action.tokens.clamp(max=254))
    with pytest.raises(UserError, match="choose one of: arm"):
        policy.decode(action, statistics="leg")
    with pytest.raises(UserError, match=r"commands must be \[N, 7\]"):
        policy.encode(commands[:, :3])


def test_act_gives_the_log_probabilities_of_logits(policy):
    action = policy.act(observations(), noise=torch.rand(4, 16))
    assert action.tokens.shape == action.mask.shape == action.log_prob.shape == (4, 7)
    torch.testing.assert_close(action.log_prob, policy.log_prob(observations(), action), atol=1e-5, rtol=1e-5)


def test_the_same_noise_gives_the_same_action_in_any_batch(policy):
    noise = torch.rand(4, 7)
    together = policy.act(observations(), noise=noise)
    for row in range(4):
        obs = {key: column[row : row + 1] for key, column in observations().items()}
        assert torch.equal(policy.act(obs, noise=noise[row : row + 1]).tokens[0], together.tokens[row])


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["full", "lora"])
def test_base_is_exactly_the_policy_before_training(checkpoint, lora):
    policy = OpenVLAPolicy(str(checkpoint), device="cpu", lora=lora)
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert names and all(("lora_" in name) == (lora is not None) for name in names)
    obs, action = observations(), policy.act(observations())
    before = policy.logits(obs, action).detach()
    optimiser = torch.optim.AdamW(policy.trainable_parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        policy.log_prob(obs, action).sum().backward()
        optimiser.step()
    after = policy.logits(obs, action)
    with policy.base():
        inside = policy.logits(obs, action)
        with policy.base():
            assert torch.equal(policy.logits(obs, action), before)
    assert torch.equal(inside, before) and not inside.requires_grad
    assert not torch.equal(after, before) and torch.equal(policy.logits(obs, action), after)
    after.sum().backward()  # the graph from before the visit is still good
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == names
    sampled = policy.act(obs)
    torch.testing.assert_close(sampled.log_prob, policy.log_prob(obs, sampled).detach(), atol=1e-5, rtol=1e-5)


def test_a_policy_that_does_not_see_is_refused(policy):
    blind = policy.model
    with torch.no_grad():
        blind.projector.fc3.weight.zero_()
    with pytest.raises(UserError, match="same action logits for a black and a white picture"):
        OpenVLAPolicy(Checkpoint(blind, policy.tokenizer), device="cpu")


def test_conventions_and_statistics(checkpoint):
    spec = small_nano(gripper="+1 opens").convention()
    assert (spec.action_dimensions, spec.statistics, spec.gripper, spec.image_size) == (7, "arm", "+1 opens", None)
    with pytest.raises(UserError, match="unknown statistics 'leg'; choose one of: arm"):
        OpenVLAPolicy(str(checkpoint), statistics="leg", device="cpu")
    edited = json.loads((checkpoint / "dataset_statistics.json").read_text())
    (checkpoint / "dataset_statistics.json").write_text(json.dumps({**edited, "other": edited["arm"]}))
    policy = OpenVLAPolicy(str(checkpoint), device="cpu")
    assert policy.convention().statistics is None
    with pytest.raises(UserError, match="several statistics.*arm, other"):
        policy.decode(Action(torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 7, dtype=torch.bool)))


# ---- checkpoints


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000], ids=["one file", "sharded"])
def test_save_and_load_keep_every_bit(policy, tmp_path, max_shard_bytes):
    openvla_checkpoint.save(tmp_path, policy.model, policy.tokenizer, max_shard_bytes=max_shard_bytes)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**9) == (tmp_path / "model.safetensors.index.json").exists()
    loaded = OpenVLAPolicy(str(tmp_path), device="cpu")
    assert loaded.config == policy.config
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    action = policy.act(observations())
    assert torch.equal(loaded.logits(observations(), action), policy.logits(observations(), action))


def test_saving_again_removes_stale_shards(policy, tmp_path):
    openvla_checkpoint.save(tmp_path, policy.model, policy.tokenizer, max_shard_bytes=50_000)
    openvla_checkpoint.save(tmp_path, policy.model, policy.tokenizer, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    half = OpenVLAPolicy(str(tmp_path), device="cpu", dtype="bfloat16")
    assert half.act(observations()).tokens.shape == (4, 7)


def test_every_wrong_tensor_is_named(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["extra"] = tensors.pop("projector.fc1.bias")
    tensors["projector.fc2.bias"] = torch.zeros(3)
    save_file(tensors, checkpoint / "model.safetensors")
    expected = r"missing projector\.fc1\.bias; unexpected extra; projector\.fc2\.bias has shape \[3\] instead of \[32\]"
    with pytest.raises(UserError, match=expected):
        openvla_checkpoint.load(checkpoint)


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_shard(folder):
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncate, "corrupt or truncated"),
        (pickle, r"pickled weights \(pytorch_model\.bin\)"),
        (lose_shard, r"lacks model-00001-of-00001\.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "has neither"),
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "not a readable JSON"),
        (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "not a readable tokenizer"),
        (lambda f: edit_config(f, model_type="llama"), "model_type 'llama'"),
        (lambda f: edit_config(f, n_action_bins=None), "lacks 'n_action_bins'"),
        (lambda f: edit_config(f, image_resize_strategy="zoom"), "image_resize_strategy"),
        (
            lambda f: (edit_config(f, norm_stats=None), (f / "dataset_statistics.json").unlink()),
            "has no action statistics",
        ),
    ],
)
def test_bad_checkpoints(checkpoint, spoil, message):
    spoil(checkpoint)
    with pytest.raises(UserError, match=message):
        openvla_checkpoint.load(checkpoint)


def head_file(folder):
    (folder / "action_head--150000_checkpoint.pt").write_bytes(b"")


def lora_folder(folder):
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    "mark, message",
    [
        (head_file, r"action_head--150000_checkpoint\.pt"),
        (lambda f: (f / "proprio_projector--latest_checkpoint.pt").write_bytes(b""), "proprio_projector--latest"),
        (lora_folder, "lora_adapter/adapter_config.json"),
        (lambda f: edit_config(f, num_images_in_input=2), "num_images_in_input in config.json"),
        (lambda f: edit_config(f, _name_or_path="moojink/openvla-7b-oft-finetuned-libero-goal"), "the name moojink"),
        (lambda f: (f / "modeling_prismatic.py").write_text("n = NUM_ACTIONS_CHUNK"), r"modeling_prismatic\.py"),
    ],
)
def test_checkpoints_of_openvla_oft_are_refused_by_name(checkpoint, mark, message):
    (checkpoint / "modeling_prismatic.py").write_text(
        "class OpenVLAForActionPrediction: ..."
    )  # as OpenVLA's own has it
    edit_config(checkpoint, _name_or_path="openvla/openvla-7b-soft")
    openvla_checkpoint.load(checkpoint)
    mark(checkpoint)
    with pytest.raises(
        UserError, match=f"is an OpenVLA-OFT checkpoint .*{message}.*; use a checkpoint of OpenVLA itself"
    ):
        openvla_checkpoint.load(checkpoint)


def test_openvla_oft_is_not_even_downloaded(monkeypatch):
    import huggingface_hub

    files = ["config.json", "model-00001-of-00004.safetensors", "action_head--150000_checkpoint.pt"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: pytest.fail("downloaded"))
    with pytest.raises(UserError, match="someone/chunks is an OpenVLA-OFT checkpoint"):
        openvla_checkpoint.load("someone/chunks")


def test_checkpoints_that_are_not_there(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, **options):
        assert not any(".bin" in pattern or ".py" in pattern for pattern in options["allow_patterns"])
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: offline(name, allow_patterns=[]))
    with pytest.raises(UserError, match=r"'openvla/openvla-9b'.*could not be fetched.*no route to host"):
        openvla_checkpoint.load("openvla/openvla-9b")
    with pytest.raises(UserError, match="no folder"):
        openvla_checkpoint.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="unknown dtype 'int8'; choose one of"):
        OpenVLAPolicy("x", dtype="int8")


def test_a_model_that_does_not_fit_in_memory_is_refused_before_loading(monkeypatch, capsys):
    with torch.device("meta"):
        model = openvla_checkpoint.OpenVLAModel(openvla_checkpoint.OpenVLAConfig())
    monkeypatch.setattr(openvla_checkpoint, "free_bytes", lambda device: 20 * 10**9)
    openvla_checkpoint._announce("folder", model, torch.bfloat16, torch.device("cpu"))
    assert "folder: 15.1 GB of weights in bfloat16 on cpu, 20.0 GB are free" in capsys.readouterr().err
    with pytest.raises(UserError, match="30.2 GB of weights in float32"):
        openvla_checkpoint._announce("folder", model, torch.float32, torch.device("cpu"))


def test_ranges_of_a_task_that_the_checkpoint_never_saw(saved, tmp_path):
    unit = {"panda": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}}
    policy = OpenVLAPolicy(str(saved), device="cpu", add_statistics=unit)
    highest = Action(torch.full((1, 7), 255), torch.ones(1, 7, dtype=torch.bool))
    own, added = (policy.decode(highest, statistics=key) for key in ("arm", "panda"))
    np.testing.assert_allclose(own[0, :6] / added[0, :6], 2.0, rtol=1e-6)
    policy.save(tmp_path / "both")
    assert OpenVLAPolicy(str(tmp_path / "both"), device="cpu").statistics.keys == ["arm", "panda"]


@pytest.mark.parametrize("chosen, used", [(None, "panda"), ("panda", "panda"), ("arm", "arm")])
def test_chosen_statistics_are_used_whatever_the_task_names(saved, chosen, used):
    unit = {"panda": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}}
    policy = OpenVLAPolicy(str(saved), device="cpu", statistics=chosen, add_statistics=unit)
    scale = {"panda": 1.0, "arm": 2.0}[used]
    bins = Action(torch.full((1, 7), 254), torch.ones(1, 7, dtype=torch.bool))
    command = policy.decode(bins, statistics="panda")  # as a task that names them asks
    np.testing.assert_allclose(command[0, :6], scale * 254 / 255, rtol=1e-6)
    assert torch.equal(policy.encode(command, statistics="panda").tokens[:, :6], bins.tokens[:, :6])
    assert policy.convention().mismatches(ConventionSpec(statistics="panda")) == []


def test_the_only_statistics_are_not_taken_for_another_robots(saved):
    panda, chosen = ConventionSpec(statistics="panda"), OpenVLAPolicy(str(saved), device="cpu", statistics="arm")
    assert OpenVLAPolicy(str(saved), device="cpu").convention().mismatches(panda) == [
        "statistics: 'arm' against 'panda'"
    ]
    assert chosen.convention().mismatches(panda) == []
    assert fingerprint(chosen, []) != fingerprint(OpenVLAPolicy(str(saved), device="cpu"), [])
