"""Policies on the Hugging Face Hub, pushed to and pulled from a server in this process that speaks its protocol."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hub_server import Repository, running_hub
from huggingface_hub import constants

import torchpi
from torchpi import Embodiment, GemmaConfig, Pi0Config, Policy, VisionConfig
from torchpi.checkpoints.adapter import save_adapter
from torchpi.checkpoints.hub import fetch
from torchpi.checkpoints.publish import package, publish, strip_local_paths
from torchpi.cli import main
from torchpi.model.lora import LoraConfig, attach_lora, is_lora
from torchpi.transforms import NormStats

GEMMA = GemmaConfig(width=64, depth=1, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
CONFIG = Pi0Config(
    pi05=True,
    paligemma_variant=GEMMA,
    action_expert_variant=GEMMA,
    siglip_variant=VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=14),
    action_dim=3,
    action_horizon=4,
    max_token_len=80,
    vocab_size=512,
    image_size=28,
)
ROBOT = Embodiment.generic(
    "two_joints", cameras={"base_0_rgb": "front"}, state=["shoulder", "elbow"], actions=["shoulder", "elbow"],
    control_hz=20, execute_steps=2, default_prompt="pick up the cube",
)  # fmt: skip
STATS = NormStats(np.zeros(2), np.ones(2), -np.ones(2), np.ones(2))
FILES = ["model.safetensors", "model.safetensors.checksums.json", "norm_stats.json", "policy.json", "tokenizer.model"]
# A warning inside huggingface_hub, for uploads without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
RATE = {"success_rate": 0.9, "interval": [0.6, 0.98], "episodes": 10}


@pytest.fixture(scope="module")
def make(golden_root):
    def make(robot=ROBOT, **fields):
        torch.manual_seed(0)
        tokenizer = golden_root / "tokenizer" / "tiny_spm.model"
        stats = {"state": STATS, "actions": STATS}
        return Policy(torchpi.Pi0(CONFIG), robot, norm_stats=stats, tokenizer=tokenizer, **fields)

    return make


@pytest.fixture(scope="module")
def saved(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "policy"
    make(provenance={"source": "a test"}).save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A policy folder for tests that change it."""
    return shutil.copytree(saved, tmp_path / "policy")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub(tmp_path, monkeypatch) as server:
        yield server


def push(folder, name="org/name", **options):
    own = {key: options.pop(key) for key in ("license", "results") if key in options}
    return publish(package(folder, name, **own), **options)


def edit(folder, **fields):
    file = folder / "policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def actions(policy):
    noise = np.ones((4, 3), np.float32)
    return policy.infer(policy.example_observation(), noise=noise, num_steps=1)["actions"]


# Push and pull


def test_pushed_policy_is_pulled_byte_for_byte(hub, saved, tmp_path, capsys):
    done = push(saved)
    assert sorted(done.files) == sorted([*FILES, "README.md"])
    assert hub.repositories["org/name"].messages == ["Policy of two_joints"]
    main(["pull", "org/name", "--out", str(tmp_path / "pulled")])
    printed = capsys.readouterr().out
    assert (
        f"torchpi, version {done.commit}: {tmp_path / 'pulled'}\nnext: torchpi doctor {tmp_path / 'pulled'}" in printed
    )
    assert {file.name: file.read_bytes() for file in (tmp_path / "pulled").iterdir()} == {
        name: (saved / name).read_bytes() for name in FILES
    }
    policy = Policy.from_pretrained("org/name", device="cpu")
    assert (actions(policy) == actions(torchpi.load_policy(saved, device="cpu"))).all()


def test_policy_push_to_hub(hub, make):
    policy = make()
    done = policy.push_to_hub("org/name", private=True, commit_message="better", dtype=torch.float32)
    assert hub.repositories["org/name"].private
    assert hub.repositories["org/name"].messages == ["better"]
    assert done.url == f"https://huggingface.co/org/name/commit/{done.commit}"
    assert (actions(Policy.from_pretrained("org/name", device="cpu")) == actions(policy)).all()


def test_second_push_removes_old_files_and_pull_replaces_them(hub, make, saved, tmp_path, capsys):
    make().save(tmp_path / "shards", max_shard_bytes=100_000)
    push(tmp_path / "shards")
    main(["pull", "org/name"])
    capsys.readouterr()
    done = push(saved)
    assert [file for file in done.removed if re.fullmatch(r"model-0000\d-of-\d+\.safetensors", file)]
    assert sorted(hub.repositories["org/name"].files()) == sorted([*FILES, "README.md", ".gitattributes"])
    main(["pull", "org/name", "--json"])
    pulled = json.loads(capsys.readouterr().out)
    assert pulled["version"] == done.commit
    assert sorted(file.name for file in fetch("hf://org/name").iterdir()) == FILES
    assert "a test" in (fetch("hf://org/name") / "policy.json").read_text()


def test_pull_downloads_only_changed_files(hub, folder, capsys):
    push(folder)
    main(["pull", "org/name"])
    edit(folder, num_steps=7)
    push(folder)
    hub.requests.clear()
    main(["pull", "org/name"])
    assert not [path for _, path in hub.requests if path.endswith("model.safetensors")]
    assert Policy.from_pretrained("org/name", device="cpu").num_steps == 7


def test_pull_without_connection_notes_missing_comparison(hub, saved, monkeypatch, capsys):
    push(saved)
    main(["pull", "org/name"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    capsys.readouterr()
    main(["pull", "org/name"])
    printed = capsys.readouterr()
    assert "is not compared with hf://org/name: OfflineModeIsEnabled" in printed.err
    assert "version" in printed.out


def test_damaged_folder_is_neither_pushed_nor_pulled(hub, folder, capsys):
    push(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="is damaged, or of another checkpoint"):
        push(folder)
    files = hub.repositories["org/name"].files()
    hub.repositories["org/name"].add("main", files | {"model.safetensors": bytes(weights)})
    with pytest.raises(SystemExit):
        main(["pull", "org/name"])
    assert "is damaged, or of another checkpoint" in capsys.readouterr().err


def test_push_to_branch_and_pull_request(hub, saved):
    hub.repositories["others/name"] = Repository()
    done = push(saved, "others/name", create_pr=True)
    assert done.url == "https://huggingface.co/others/name/discussions/1"
    assert hub.repositories["others/name"].files() == {}
    push(saved, revision="for/two_arms")
    assert list(hub.repositories["org/name"].files()) == [".gitattributes"]
    assert Policy.from_pretrained("org/name", revision="for/two_arms", device="cpu").embodiment.name == "two_joints"


def test_local_folder_has_priority_over_repository(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.move(folder, tmp_path / "org/name")
    policy = Policy.from_pretrained("org/name", device="cpu")
    policy.save_pretrained("again")
    assert Policy.from_pretrained("again", device="cpu").provenance["source"] == "a test"
    with pytest.raises(ValueError, match=r"revision='main' belongs to a repository of the Hugging Face Hub"):
        Policy.from_pretrained("org/name", revision="main")


# Uploaded contents


def test_local_paths_in_provenance_are_not_uploaded(hub, folder):
    recipe = {"data": {"dataset": "/home/alice/lab/set"}, "model": {"init": "~alice/secret/pi05"}}
    command = "torchpi sim record --out '/home/alice/My Data/set6' --seed 0"
    edit(folder, provenance={"recipe": recipe, "dataset": {"command": command}, "converted": {"source": "../al/x"}})
    done = push(folder)
    everything = b"".join(hub.repositories["org/name"].files().values())
    for secret in (b"alice", b"/home", b"My Data", b"secret", b"../al"):
        assert secret not in everything
    stated = json.loads(hub.repositories["org/name"].files()["policy.json"])["provenance"]
    assert stated["dataset"]["command"] == "torchpi sim record --out 'set6' --seed 0"
    assert "provenance.recipe.data.dataset is 'set'; provenance.recipe.model.init is 'pi05'" in done.notes[0]
    assert json.loads((folder / "policy.json").read_text())["provenance"]["recipe"] == recipe


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/data/set/", "set"), ("C:\\Users\\al\\set", "set"), ("\\\\server\\al\\set", "set"), ("file:///al/set", "set"),
        ("see (/home/al/x), ok", "see (x), ok"), ("--x=/a/b:/c/d", "--x=b:d"), ("https://al:pw@host/x", "https://host/x"),
        ("https://t0ken@host/x", "https://host/x"),
        ("hf_abcdefghijklmnopqrstuvwxyz", ""), ("hf://org/name@v1/sub", None), ("gs://a/b", None), ("m/s, 1/2", None),
        ("a / b", None), ("lerobot/set", None),
    ],
)  # fmt: skip
def test_strip_local_paths_keeps_last_part_and_addresses(text, left):
    cleaned, removed = strip_local_paths([text], "x")
    assert cleaned == [text if left is None else left]
    assert bool(removed) == (left is not None)


def test_local_paths_in_metadata_are_uploaded_and_noted(hub, folder):
    edit(folder, metadata={"calibration": "/home/alice/arm.json"})
    (note,) = push(folder).notes
    assert note == "uploaded unchanged, with what may be local paths or credentials: metadata.calibration is 'arm.json'"


def test_only_policy_files_are_uploaded_and_others_noted(hub, folder):
    (folder / "state").mkdir()
    for name in ("state/optimizer.safetensors", "notes.txt", ".tmp"):
        (folder / name).write_text("x")
    (note,) = push(folder).notes
    assert sorted(hub.repositories["org/name"].files()) == sorted([*FILES, "README.md", ".gitattributes"])
    assert note == "not uploaded, since it is no part of a policy: .tmp, notes.txt, state/optimizer.safetensors"


def test_edited_card_is_kept(hub, saved, folder):
    push(saved)
    repository = hub.repositories["org/name"]
    assert not push(saved).notes  # a generated card is replaced
    repository.add("main", repository.files() | {"README.md": repository.files()["README.md"] + b"And mine."})
    assert push(saved).notes == ("README.md of org/name stays as it is: it was written or edited by hand",)
    assert repository.files()["README.md"].endswith(b"And mine.")
    (folder / "README.md").write_text("# Mine")
    assert push(folder).notes == ("README.md of org/name is replaced by the folder's; its history keeps the old one",)
    assert repository.files()["README.md"] == b"# Mine"
    with pytest.raises(ValueError, match=r"README\.md is uploaded as it is; state the license 'mit' in it"):
        push(folder, license="mit")


def test_card_states_the_policys_facts(hub, folder):
    recipe = {"data": {"dataset": "hf://org/set@v2"}, "model": {"init": "hf://lerobot/pi05_base"}, "batch_size": 8}
    edit(folder, provenance={"source": "torchpi train", "recipe": recipe, "step": 300})
    push(folder, license="gemma", results={"env": "so101", "tasks": {"lift": RATE}, "episodes": ["/home/x"]})
    card = hub.repositories["org/name"].files()["README.md"].decode()
    front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert json.loads(front["base_model"]) == ["lerobot/pi05_base"]
    assert json.loads(front["datasets"]) == ["org/set"]
    assert json.loads(front["license"]) == "gemma"
    assert json.loads(front["tags"])[-1] == "two_joints"
    for text in (
        "| front | uint8, hwc | required |", "| success, so101: lift | 90% of 10 episodes, 95 % interval 60% – 98% |",
        "300 steps of 8 samples, from hf://lerobot/pi05\\_base", "Chunks of 4 actions, at 20 Hz; 2 of them",
        "“pick up the cube”", 'from_pretrained("org/name")', "torchpi serve hf://org/name", "--to lerobot",
        "gemma, as stated by the uploader. The weights derive from hf://lerobot/pi05\\_base",
    ):  # fmt: skip
        assert text in card
    stated = json.loads(hub.repositories["org/name"].files()["policy.json"])["provenance"]
    assert stated["results"] == {"env": "so101", "tasks": {"lift": RATE}}


def test_untrusted_names_are_plain_text_in_the_card(make, hub):
    name = 'x"]\nlicense: mit\n---\n<script>|'
    policy = make(Embodiment.generic(name, cameras={"base_0_rgb": "a|b"}, state=["s", "t"], actions=["s", "t"]))
    policy.push_to_hub("org/name")
    card = hub.repositories["org/name"].files()["README.md"].decode()
    assert "\nlicense:" not in card
    assert "<script>" not in re.sub(r"\\<script\\>", "", card.partition("---\n\n")[2])
    assert "| a\\|b |" in card


def test_invalid_results_are_an_error(saved):
    with pytest.raises(ValueError, match="results is not an output of `torchpi eval --json`: expected tasks"):
        package(saved, "org/name", results={"chunks": 3})


def test_checkpoint_of_a_run_includes_its_success_rate(hub, saved, tmp_path, capsys):
    policy = shutil.copytree(saved, tmp_path / "run/checkpoints/00000020/policy")
    (tmp_path / "run/train.json").write_text('{"eval": {"env": "metaworld"}}')
    lines = [{"step": step, "success_rate": rate, "success": {"push": RATE | {"success_rate": rate}}}
             for step, rate in ((10, 0.1), (20, 0.9))]  # fmt: skip
    (tmp_path / "run/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    main(["push", str(policy), "org/name", "--dry-run"])
    printed = capsys.readouterr().out
    assert "| success, metaworld: push | 90% of 10 episodes" in printed
    assert "files: model.safetensors, " in printed
    assert not hub.requests


def test_push_prints_url_and_next_command(hub, saved, capsys):
    main(["push", str(saved), "hf://org/name", "--private"])
    assert re.search(r"6 files: https://\S+\nnext: torchpi pull org/name\n", capsys.readouterr().out)
    main(["push", str(saved), "org/name", "--json"])
    assert json.loads(capsys.readouterr().out)["files"][-1] == "README.md"


# Refused pushes


@pytest.mark.parametrize(
    "name", ["name", "org/name/sub", "org/na me", "org/na--me", "org/name.git", "../x", "org/.", ""]
)
def test_invalid_repository_names_are_refused(name, saved):
    with pytest.raises(ValueError, match=rf"{re.escape(repr(name))} is no name of a repository; expected ORG/NAME"):
        package(saved, name)


def test_push_without_token_makes_no_request(hub, saved, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"needs a token that can write: run `hf auth login`, or set HF_TOKEN"):
        push(saved)
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("org/name", "hf_wrong", "the token that was sent is not valid: set HF_TOKEN or run `hf auth login`"),
        (
            "org/name",
            "hf_bob",
            "lacks the permission: set HF_TOKEN .* with a token that can write to the repositories of org",
        ),
        ("bob/secret", "hf_alice", "bob/secret can't be written; the token that was sent lacks the permission"),
        ("bob/public", "hf_alice", "bob/public can't be written; the token that was sent lacks the permission"),
    ],
)
def test_push_without_write_permission_is_an_error(name, token, message, hub, saved):
    hub.repositories |= {"bob/secret": Repository(private=True), "bob/public": Repository()}
    with pytest.raises(ValueError, match=message):
        push(saved, name, token=token)


def test_push_offline_is_an_error(hub, saved, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set, and nothing can be pushed to org/name: unset it"):
        push(saved)


def test_private_push_to_public_repository_is_an_error(hub, saved):
    push(saved)
    with pytest.raises(ValueError, match="org/name exists, and is public"):
        push(saved, private=True)
    assert len(hub.repositories["org/name"].messages) == 1


@pytest.mark.parametrize("file", ["config.json", "params/_METADATA", "diffusion_pytorch_model.safetensors"])
def test_repository_with_another_checkpoint_is_refused(file, hub, saved):
    hub.repositories["org/name"] = Repository(files={file: b"{}", "README.md": b"# Other"})
    with pytest.raises(ValueError, match=rf"org/name has {file}, of another checkpoint"):
        push(saved)
    assert not hub.repositories["org/name"].messages


def test_push_keeps_options_of_the_lerobot_plugin(hub, saved):
    written = {"config.json": b'{"type": "torchpi", "n_action_steps": 2}', "policy_preprocessor.json": b"{}"}
    hub.repositories["org/name"] = Repository(files=written)
    push(saved)
    assert hub.repositories["org/name"].files().items() >= written.items()
    assert (actions(Policy.from_pretrained("org/name", device="cpu")) == actions(torchpi.load_policy(saved))).all()
    hub.repositories["org/pi0"] = Repository(files={"config.json": b'{"type": "pi0"}'})
    with pytest.raises(ValueError, match=r"org/pi0 has config\.json, of another checkpoint"):
        push(saved, "org/pi0")


def test_token_that_can_write_but_not_create(hub, saved):
    hub.repositories["org/name"] = repository = Repository()
    repository.branches["robots/left"] = repository.branches["main"]
    hub.writes_only = True
    push(saved)
    push(saved, revision="robots/left")
    assert all("policy.json" in repository.files(branch) for branch in ("main", "robots/left"))
    for options in ({"revision": "other"}, {"name": "org/other"}):
        with pytest.raises(ValueError, match="lacks the permission"):
            push(saved, **options)


def test_failed_upload_changes_nothing_and_can_be_repeated(hub, saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.breaks = 100
    with pytest.raises(ValueError, match=r"Files are committed only after .*: org/name is unchanged\. Push again"):
        push(saved)
    assert not hub.repositories["org/name"].messages
    hub.breaks = 1
    push(saved)
    assert "policy.json" in hub.repositories["org/name"].files()


def test_files_ignored_by_gitignore_are_an_error(hub, saved):
    hub.repositories["org/name"] = Repository(files={".gitignore": b"model.safetensors"})
    with pytest.raises(ValueError, match=r"lacks model\.safetensors, so that .* can't be loaded; .*\.gitignore"):
        push(saved)


def test_other_checkpoints_and_runs_are_refused_with_advice(golden_root, saved, tmp_path):
    with pytest.raises(ValueError, match=r"openpi-jax; expected a policy folder.* convert \S+ FOLDER --to torchpi"):
        package(golden_root / "pi05/jax_ckpt_pure", "org/name")
    shutil.copytree(saved, tmp_path / "run/checkpoints/00000020/policy")
    with pytest.raises(ValueError, match=r"is not a checkpoint itself; the last one in it is .*/00000020/policy"):
        package(tmp_path / "run", "org/name")


def test_adapter_is_pushed_only_if_its_base_is_remote(hub, make, saved, folder):
    model = make().model
    attach_lora(model, LoraConfig())
    for name, parameter in model.named_parameters():
        if is_lora(name):
            torch.nn.init.normal_(parameter, std=0.02)
    adapter = folder.parent / "adapter"
    for base, others_have_it in ((str(saved), False), ("hf://org/base", True)):
        save_adapter(model, adapter, base={"address": base, "dtype": "float32"}, trained=[], overwrite=True)
        for file in adapter.iterdir():
            shutil.copy(file, folder)
        for file in folder.glob("model.safetensors*"):
            file.unlink()
        if others_have_it:
            push(saved, "org/base")
            assert "adapter.safetensors" in push(folder).files
            assert actions(Policy.from_pretrained("org/name", device="cpu")).shape == (4, 2)
        else:
            with pytest.raises(ValueError, match=r"which only this machine has. Write the whole weights first"):
                push(folder)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "is private or does not exist: .* no token was sent: set HF_TOKEN or run `hf auth login`"),
        ("hf_wrong", "is private or does not exist: .* the token that was sent is not valid"),
        (
            "hf_bob",
            r"does not exist; check its parts\. If it is private, ask for access on https://huggingface.co/org/name",
        ),
    ],
)
def test_pull_of_private_repository_requires_its_owners_token(token, message, hub, saved, monkeypatch):
    push(saved, private=True)
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(FileNotFoundError, match=message):
        Policy.from_pretrained("org/name")


def test_gated_repository_names_the_page_of_its_terms(hub, saved, monkeypatch):
    push(saved)
    hub.repositories["org/name"].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(FileNotFoundError, match=r"is gated: accept its terms on https://huggingface\.co/org/name"):
        Policy.from_pretrained("org/name")


@pytest.mark.parametrize(("kind", "format_"), [("lerobot", "lerobot"), ("openpi_pytorch", "openpi-pytorch")])
def test_other_checkpoint_formats_are_pulled(kind, format_, hub, golden_root, capsys):
    root = golden_root / "pi05" / kind
    files = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    hub.repositories["other/name"] = Repository(files=files)
    main(["pull", "other/name"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{format_}, version {'0' * 40}: ")
    assert "next: torchpi doctor hf://other/name" in printed
