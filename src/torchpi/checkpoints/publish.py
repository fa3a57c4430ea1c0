"""Policy folders on the Hugging Face Hub: exactly the files of a policy, in one commit, with a model card."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchpi.checkpoints.address import REMOTE
from torchpi.checkpoints.card import model_card
from torchpi.checkpoints.checkpoint import Checkpoint, open_checkpoint
from torchpi.checkpoints.formats import is_plugin_config
from torchpi.checkpoints.layout import own_table
from torchpi.checkpoints.sources import token_hint
from torchpi.errors import CheckpointError, TorchpiError, first_of
from torchpi.rates import rates_of
from torchpi.schema import parse_json, read_json_object

CARD = "README.md"
_NAME = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])(?<!\.git)", re.ASCII)
_FILES = re.compile(
    r"(policy|norm_stats|adapter)\.json|tokenizer\.(model|json)|robots/[^/]+/(embodiment|norm_stats)\.json"
    r"|(model|adapter)\.safetensors(\.index\.json|\.checksums\.json)?|model-\d+-of-\d+\.safetensors"
)
_FOREIGN = re.compile(r"config\.json|adapter_config\.json|params/.*|[^/]+\.(safetensors|npz)")
_MARK = "\n<!-- Written by torchpi; the next push replaces it, unless it is edited: {} -->\n"
_RESULTS = ("env", "seed", "success_rate", "interval", "tasks", "num_steps", "execute_steps", "max_steps")
# Of this machine: credentials; the folders of a path that is the whole text, is in quotes, or stands in a text.
_SECRET = re.compile(r"(?<=://)[^/\s@]+@|\bhf_\w{20,}|file://")
_PLACE = r"(?:~[\w.-]*[\\/]|\.{0,2}/|[A-Za-z]:[\\/]|\\\\)"
_WHOLE = re.compile(rf"{_PLACE}(?:[^\n]*[\\/])?([^\\/\n]+)[\\/]*")
_QUOTED = re.compile(rf"(['\"]){_PLACE}(?:[^'\"\n]*[\\/])?([^\\/'\"\n]+)[\\/]*\1")
_BARE = re.compile(rf"(?<![\w/.~\\-]){_PLACE}(?!/)(?:[^\s'\",;:]*[\\/])?(?=[^\s'\",;:\\/])")


@dataclasses.dataclass(frozen=True)
class Package:
    """The files of a policy as they are uploaded, by their names."""

    name: str
    """Of the repository."""
    files: dict[str, pathlib.Path | bytes]
    has_own_card: bool
    """The folder has a README.md, which is no card of ours."""
    robot: str
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Published:
    """The outcome of a push."""

    url: str
    """The page of the commit, or of the pull request."""
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    """Files of an earlier policy, which the repository has no longer."""
    notes: tuple[str, ...]


def package(
    path: str | pathlib.Path, repo_id: str, *, license: str | None = None, results: Mapping[str, Any] | None = None
) -> Package:
    """Collect what is uploaded of a policy folder, without what its provenance says of this machine.

    Args:
        results: of `torchpi eval --env … --json`, for policy.json and the card.

    Raises:
        ValueError: it is no policy folder, or damaged, or needs files that only this machine has.
    """
    name = repo_id.removeprefix("hf://")
    if not _NAME.fullmatch(name) or len(name) > 96:
        raise CheckpointError(
            f"{repo_id!r} is no name of a repository; expected ORG/NAME of letters, digits, '-', '_' and '.'; ORG is "
            "an organization's name, or yours (`hf auth whoami`)."
        )
    checkpoint = open_checkpoint(path)
    if checkpoint.policy_file is None:
        raise CheckpointError(
            f"{path} is a checkpoint in the format {checkpoint.format}; expected a policy folder. Write one "
            f"first: torchpi convert {path} FOLDER --to torchpi."
        )
    if checkpoint.adapter is not None and not checkpoint.adapter.base.address.startswith((*REMOTE, "demo")):
        raise CheckpointError(
            f"{path} holds the changes of a LoRA training to {checkpoint.adapter.base.address}, which only this "
            f"machine has. Write the whole weights first: torchpi convert {path} FOLDER --to torchpi."
        )
    checkpoint.require_intact()
    return _packed(checkpoint, name, license, results)


def _packed(checkpoint: Checkpoint, name: str, license: str | None, results: Mapping[str, Any] | None) -> Package:
    root, spec = checkpoint.root, checkpoint.spec()
    there = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}
    files: dict[str, pathlib.Path | bytes] = {file: at for file, at in there.items() if _FILES.fullmatch(file)}
    document, notes = read_json_object(root / "policy.json", error=CheckpointError), list[str]()
    stated = document["provenance"]
    if results is not None:
        rates_of(results, "results")
        stated = {**stated, "results": {key: results[key] for key in _RESULTS if key in results}}
    provenance, removed = without_places(stated, "provenance")
    if removed:
        notes.append(f"policy.json is uploaded without what it says of this machine: {first_of(removed, 12, '; ')}")
    if provenance != document["provenance"]:
        files["policy.json"] = f"{json.dumps({**document, 'provenance': provenance}, indent=2)}\n".encode()
    for part in ("metadata", "embodiment"):
        if places := without_places(document[part], part)[1]:
            notes.append(f"uploaded as it is, and may be of this machine: {first_of(places, 12, '; ')}")
    if others := [file for file in there if file not in files and file != CARD]:
        notes.append(f"not uploaded, since it is no part of a policy: {first_of(others)}")
    if CARD in there and license is not None:
        raise CheckpointError(f"{there[CARD]} is uploaded as it is; state the license {license!r} in it.")
    if CARD in there:
        files[CARD] = there[CARD]
    else:
        count = sum(math.prod(array.shape) for array in own_table(checkpoint.config).values())
        stated_there = dataclasses.replace(spec, provenance=provenance)
        card = model_card(name, stated_there, checkpoint.config, num_parameters=count, license=license)
        files[CARD] = f"{card}{_MARK.format(_digest(card))}".encode()
    assert spec.embodiment is not None
    return Package(name, files, CARD in there, spec.embodiment.name, notes)


def without_places(value: Any, where: str) -> tuple[Any, list[str]]:
    """A JSON value without credentials, and with the last part of each path on this machine; and what is removed."""
    removed: list[str] = []

    def clean(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            return {clean(key, where): clean(item, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        text = _SECRET.sub("", value.replace(str(pathlib.Path.home()), "~"))
        whole = _WHOLE.fullmatch(text)
        text = whole[1] if whole else _BARE.sub("", _QUOTED.sub(r"\1\2\1", text))
        if text != value:
            removed.append(f"{where} is {text!r}")
        return text

    return clean(value, where), removed


def publish(
    package: Package,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> Published:
    """Upload a policy to the Hugging Face Hub, in one commit; the arguments are those of `Policy.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    name, files, notes = package.name, dict(package.files), list(package.notes)
    if token is None and get_token() is None:
        raise CheckpointError(
            f"To write {name}, the Hub needs a token that may write: run `hf auth login`, or set HF_TOKEN "
            "(https://huggingface.co/settings/tokens)."
        )
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    with _explained(name):
        head, there = _prepared(api, name, private=private, revision=revision, create_pr=create_pr)
        removed = [file for file in there if _FILES.fullmatch(file) and file not in files]
        if CARD in there and not _is_written(api, name, head):
            if package.has_own_card:
                notes.append(f"{CARD} of {name} is replaced by that of the folder; its history keeps it")
            else:
                del files[CARD]
                notes.append(f"{CARD} of {name} stays as it is: somebody has written it")
        commit = api.create_commit(
            name,
            [
                *(CommitOperationAdd(file, content) for file, content in files.items()),
                *(CommitOperationDelete(file) for file in removed),
            ],
            commit_message=commit_message or f"Policy of {package.robot}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
        arrived = _sizes(api, name, commit.oid)
    sizes = {file: len(at) if isinstance(at, bytes) else at.stat().st_size for file, at in files.items()}
    if lost := [file for file, size in sizes.items() if arrived.get(file) != size]:
        raise CheckpointError(
            f"{commit.commit_url} lacks {first_of(lost)}, so that the policy can't be loaded; look at the repository's "
            ".gitignore, and push again."
        )
    return Published(commit.pr_url or commit.commit_url, commit.oid, tuple(files), tuple(removed), tuple(notes))


def _prepared(
    api: Any, name: str, *, private: bool | None, revision: str | None, create_pr: bool
) -> tuple[str, dict[str, int]]:
    """Make the repository and the branch, where they are not there; the branch's commit and the sizes of its files."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = api.repo_info(name).private
    except RepositoryNotFoundError:
        if create_pr:
            raise
        api.create_repo(name, private=private)
        is_private = private
    if private and not is_private:
        raise CheckpointError(f"{name} exists, and is public: make it private in its settings, or push elsewhere.")
    if revision is not None and not revision.startswith("refs/") and not api.revision_exists(name, revision):
        api.create_branch(name, branch=revision)  # which not everybody may who may write
    head = str(api.repo_info(name, revision=revision).sha)
    there = _sizes(api, name, head)
    foreign = [file for file in there if _FOREIGN.fullmatch(file) and not _FILES.fullmatch(file)]
    if foreign == ["config.json"]:
        text, where = _text(api, name, "config.json", head), f"{name}/config.json"
        foreign = [] if is_plugin_config(parse_json(text, where, error=CheckpointError)) else foreign
    if foreign:
        raise CheckpointError(
            f"{name} has {first_of(foreign)}, of another checkpoint, with which nobody could read the policy: push "
            "it to another name, or delete them there first."
        )
    return head, there


def _sizes(api: Any, name: str, commit: str) -> dict[str, int]:
    """The files of a commit."""
    entries = api.list_repo_tree(name, recursive=True, revision=commit)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def _text(api: Any, name: str, file: str, commit: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(name, file, revision=commit, cache_dir=cache)
        return pathlib.Path(path).read_text("utf-8", "replace")


def _is_written(api: Any, name: str, commit: str) -> bool:
    """True if the repository's card is ours, and nobody has edited it."""
    text = _text(api, name, CARD, commit)
    begin, *rest = text.rsplit(_MARK.partition("{")[0], 1)
    return bool(rest) and text == begin + _MARK.format(_digest(begin))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise the error that tells a user what to do after a request that has failed."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    before = f"Nothing is committed before all is there: {name} is as it was"
    try:
        yield
    except TorchpiError:
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{before}; what has arrived is not sent again") from None
    except OfflineModeIsEnabled as error:
        raise CheckpointError(f"HF_HUB_OFFLINE is set, and nothing can be pushed to {name}: unset it.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        answered: Any = error
        while getattr(answered, "response", None) is None and answered.__cause__ is not None:
            answered = answered.__cause__
        status = getattr(getattr(answered, "response", None), "status_code", None)
        cause = " ".join(f"{type(answered).__name__}: {answered}".split())
        if status in (401, 403, 404):
            owner = name.partition("/")[0]
            message = f"{name} can't be written; {token_hint(answered, right=f'write what belongs to {owner}')}"
        elif status in (409, 412):
            message = f"Somebody else has written to {name} meanwhile: push again"
        else:
            message = f"Pushing to {name} has failed. {before}. Push again: what has arrived is not sent again"
        raise CheckpointError(f"{message} ({cause}).") from error


def push_to_hub(
    policy: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
    dtype: torch.dtype | None = None,
    token: str | None = None,
) -> Published:
    """Upload a policy to the Hugging Face Hub in one commit, with a model card; see docs/hub.md.

    Args:
        repo_id: ORG/NAME; made if it is not there.
        private: whether only its owners see a new repository; an existing public one is an error.
        revision: a branch, made if it is not there; by default main.
        create_pr: open a pull request instead.
        license: for the card, by its name on the Hub, as "apache-2.0".
        dtype: of the weights; by default their own.
        token: by default that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: the repository can't be written, or holds another checkpoint.
    """
    options: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    with tempfile.TemporaryDirectory() as folder:
        policy.save(path := pathlib.Path(folder) / "policy", dtype=dtype, max_shard_bytes=5 * 10**9)
        return publish(package(path, repo_id, license=license), commit_message=commit_message, **options)
