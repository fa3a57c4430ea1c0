"""The published openpi checkpoints load by their address only; from a local mirror with tiny weights."""

import dataclasses
import http.server
import json
import pathlib
import shutil
import threading
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

import torchpi
from torchpi.checkpoints.address import PUBLISHED
from torchpi.config import PRESETS
from torchpi.convert import convert
from torchpi.robots import EMBODIMENTS

TUPPERWARE = "open the tupperware and put the food on the plate"
# openpi's training configs: model, horizon, state in prompt, robot, statistics, normalization, prompt.
PUBLISHED_POLICIES = {
    "pi0_aloha_towel": ("pi0", 50, False, 14, "trossen", "z_score", "fold the towel"),
    "pi0_aloha_tupperware": ("pi0", 50, False, 14, "trossen", "z_score", TUPPERWARE),
    "pi0_aloha_pen_uncap": ("pi0", 50, False, 14, "trossen", "z_score", "uncap the pen"),
    "pi0_aloha_sim": ("pi0", 50, False, 14, "lerobot/aloha_sim_transfer_cube_human", "z_score", "Transfer cube"),
    "pi0_droid": ("pi0", 10, False, 8, "droid", "z_score", None),
    "pi05_droid": ("pi05", 15, True, 8, "droid", "quantile", None),
    "pi05_libero": ("pi05", 10, False, 7, "physical-intelligence/libero", "quantile", None),
}  # fmt: skip
BASES = {"pi0_base": "pi0", "pi05_base": "pi05"}
BASE_ASSETS = (
    "trossen",
    "trossen_mobile",
    "droid",
    "franka",
    "ur5e",
    "ur5e_dual",
    "arx",
    "arx_mobile",
    "fibocom_mobile",
)


class Bucket(http.server.BaseHTTPRequestHandler):
    """Responses of the buckets' XML API: lists and objects."""

    root: pathlib.Path

    def do_GET(self):
        url = urlsplit(self.path)
        bucket, _, name = unquote(url.path).removeprefix("/").partition("/")
        folder = self.root / bucket
        if not name:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = [file.relative_to(folder).as_posix() for file in files]
            items = "".join(self.item(folder, name) for name in names if name.startswith(prefix))
            return self.answer(f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode())
        file = folder / name
        return self.answer(file.read_bytes()) if file.is_file() else self.send_error(404)

    do_HEAD = do_GET

    def item(self, folder, name):
        size = (folder / name).stat().st_size
        fields = f"<Key>{name}</Key><Size>{size}</Size><ETag>1</ETag>"
        return f"<Contents>{fields}<LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>"

    def answer(self, content):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.send_header("ETag", "1")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, golden_root):
    """A bucket with every published name, and the tokenizer's bucket."""
    root = tmp_path_factory.mktemp("buckets")
    checkpoints = root / "openpi-assets" / "checkpoints"
    checkpoints.mkdir(parents=True)
    names = {name: (kind, [asset]) for name, (kind, *_, asset, _, _) in PUBLISHED_POLICIES.items()}
    names |= {name: (kind, list(BASE_ASSETS)) for name, kind in BASES.items()}
    for kind in ("pi0", "pi05"):
        # Golden's π₀ has action_dim 7, the published models have 32.
        convert(
            golden_root / kind / "jax_ckpt_pure", root / kind, "openpi-jax",
            config=golden_root / kind / "model_config.json", sizes={"action_dim": 32}, check=False,
        )  # fmt: skip
    rng = np.random.default_rng(0)
    for name, (kind, assets) in names.items():
        (checkpoints / name).mkdir()
        shutil.copytree(root / kind / "params", checkpoints / name / "params")
        for asset in assets:
            file = checkpoints / name / "assets" / asset / "norm_stats.json"
            file.parent.mkdir(parents=True)
            low = rng.uniform(-2, -1, 32)
            entry = {"mean": [0.0] * 32, "std": [1.0] * 32, "q01": low.tolist(), "q99": (low + 2).tolist()}
            file.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    tokenizer = root / "big_vision" / "paligemma_tokenizer.model"
    tokenizer.parent.mkdir()
    tokenizer.write_bytes((golden_root / "tokenizer" / "tiny_spm.model").read_bytes())
    handler = type("Handler", (Bucket,), {"root": root})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def at_mirror(mirror, monkeypatch, golden_root, tmp_path):
    """Redirect the published addresses to the mirror, and their presets to its sizes."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", mirror)
    monkeypatch.setenv("TORCHPI_HOME", str(tmp_path / "cache"))
    for name, published in list(PRESETS.items()):
        if name in PUBLISHED_POLICIES or name in BASES:
            kind = "pi05" if published.pi05 else "pi0"
            tiny = torchpi.Pi0Config.from_json(golden_root / kind / "model_config.json")
            fields = ("action_dim", "action_horizon", "max_token_len", "discrete_state_input")
            said = {field: getattr(published, field) for field in fields}
            monkeypatch.setitem(PRESETS, name, dataclasses.replace(tiny, **said))


@pytest.mark.parametrize("name", PUBLISHED_POLICIES)
def test_published_policy_loads_by_address_only(at_mirror, name):
    kind, horizon, state_as_text, actions, _, normalization, prompt = PUBLISHED_POLICIES[name]
    policy = torchpi.load_policy(f"{PUBLISHED}{name}")
    config = policy.model.config
    assert config.pi05 == (kind == "pi05")
    assert (config.action_horizon, config.discrete_state_input) == (horizon, state_as_text)
    assert config.max_token_len == (200 if kind == "pi05" else 48)
    assert policy.embodiment.action_size == actions
    assert policy.embodiment == EMBODIMENTS[name]()
    assert {rule.kind for rule in policy.transforms.normalization.values()} == {normalization}
    assert policy.default_prompt == prompt
    if "aloha" in name and name != "pi0_aloha_sim":
        assert policy.metadata["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
    observation = policy.example_observation()
    assert policy.infer(observation, num_steps=1)["actions"].shape == (horizon, actions)


@pytest.mark.parametrize("name", BASES)
def test_base_checkpoint_requires_an_embodiment(at_mirror, name):
    with pytest.raises(ValueError, match="does not say which robot it is for: pass embodiment="):
        torchpi.load_policy(f"{PUBLISHED}{name}")
    with pytest.raises(ValueError, match=r"several: arx, arx_mobile, droid, .*choose with asset_id="):
        torchpi.load_policy(f"{PUBLISHED}{name}", embodiment="aloha")
    policy = torchpi.load_policy(f"{PUBLISHED}{name}", embodiment="aloha", asset_id="trossen")
    assert policy.model.config.action_horizon == 50
