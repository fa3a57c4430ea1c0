"""Checksums of weights: damaged files are errors that name the file."""

import json
import pathlib
import shutil

import pytest
import torch

import torchpi
from torchpi.checkpoints import checksums
from torchpi.checkpoints.adapter import load_adapter, save_adapter
from torchpi.config import LoraConfig
from torchpi.convert import convert
from torchpi.engine.quantize import quantize_model
from torchpi.errors import CheckpointError
from torchpi.model.lora import attach_lora

DEMO = pathlib.Path(torchpi.__file__).parent / "assets/demo_policy"


def flip(file, place=-1000):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.fixture
def demo(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "demo")


def test_embedded_policy_has_the_checksums_of_its_weights(demo):
    found = (demo / "model.safetensors.checksums.json").read_text()
    checksums.write_checksums(demo, "model.safetensors", ["model.safetensors"])
    assert (demo / "model.safetensors.checksums.json").read_text() == found


def test_flipped_bit_is_an_error_that_names_the_file(demo):
    flip(demo / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*from byte 0 on.*--no-verify"):
        torchpi.load_policy(demo)
    with pytest.raises(CheckpointError, match="is damaged"):
        torchpi.load_model(demo)
    torchpi.load_policy(demo, verify=False)


def test_folder_without_checksums_loads(demo):
    (demo / "model.safetensors.checksums.json").unlink()
    flip(demo / "model.safetensors")
    torchpi.load_model(demo)


def test_shard_of_another_checkpoint_is_an_error(tmp_path):
    policy = torchpi.load_policy("demo")
    policy.save(tmp_path / "old", max_shard_bytes=4_000_000)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1)
    policy.save(tmp_path / "new", max_shard_bytes=4_000_000)
    shards = sorted((tmp_path / "old").glob("model-*.safetensors"))
    assert len(shards) > 1
    shutil.copy(shards[-1], tmp_path / "new")
    with pytest.raises(CheckpointError, match=f"new/{shards[-1].name} is damaged, or of another checkpoint"):
        torchpi.load_model(tmp_path / "new")


def test_error_names_the_damaged_or_missing_block(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_BLOCK_BYTES", 1000)
    file = tmp_path / "a.safetensors"
    file.write_bytes(bytes(range(256)) * 10)
    checksums.write_checksums(tmp_path, file.name, [file.name])
    document = json.loads((tmp_path / "a.safetensors.checksums.json").read_text())
    assert len(document["crc32"][file.name]) == 3
    (tmp_path / "a.safetensors.checksums.json").write_text(json.dumps({**document, "block_bytes": 67_108_864}))
    checksums.require_intact(file, [file.name])
    flip(file, 1500)
    with pytest.raises(CheckpointError, match="from byte 1000 on"):
        checksums.require_intact(file, [file.name])
    flip(file, 1500)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="from byte 2000 on"):
        checksums.require_intact(file, [file.name])
    with pytest.raises(CheckpointError, match="from byte 0 on"):  # a file without checksums in the document
        checksums.require_intact(file, [shutil.copy(file, tmp_path / "b.safetensors").name])


@pytest.mark.parametrize("text", ["[1]", "{}", '{"block_bytes": 1, "crc32": {}}', '{"crc32": 1', '{"crc32": {"a": 1}}'])
def test_damaged_checksums_file_is_named(demo, text):
    (demo / "model.safetensors.checksums.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.checksums\.json"):
        torchpi.load_model(demo)


def test_quantized_folders_and_lerobot_conversions_have_checksums(tmp_path):
    policy = torchpi.load_policy("demo")
    config = policy.model.config  # no array determines the numbers of heads
    convert("demo", tmp_path / "lerobot", "lerobot", check=False)
    quantize_model(policy.model, "int8")
    policy.save(tmp_path / "int8")
    for name in ("int8", "lerobot"):
        torchpi.load_model(tmp_path / name, config=config)
        flip(tmp_path / name / "model.safetensors")
        with pytest.raises(CheckpointError, match="is damaged"):
            torchpi.load_model(tmp_path / name, config=config)


def test_adapters_have_checksums(tmp_path):
    model = torchpi.load_model("demo")
    attach_lora(model, LoraConfig(backbone_rank=2, expert_rank=2))
    save_adapter(model, tmp_path / "adapter", base={"address": "demo", "dtype": "float32"}, trained=())
    base = torchpi.load_model("demo")
    flip(tmp_path / "adapter/adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors is damaged"):
        load_adapter(tmp_path / "adapter", base)
