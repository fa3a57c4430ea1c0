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
_POLICY_FILES = re.compile(
    r"(policy|norm_stats|adapter)\.json|tokenizer\.(model|json)|robots/[^/]+/(embodiment|norm_stats)\.json"
    r"|(model|adapter)\.safetensors(\.index\.json|\.checksums\.json)?|model-\d+-of-\d+\.safetensors"
)
_FOREIGN_FILES = re.compile(r"config\.json|adapter_config\.json|params/.*|[^/]+\.(safetensors|npz)")
_CARD_FOOTER = "\n<!-- Written by torchpi; the next push replaces it, unless it is edited: {} -->\n"
"""Marks a generated card, with a digest of the text above it."""
_RESULTS = ("env", "seed", "success_rate", "interval", "tasks", "num_steps", "execute_steps", "max_steps")
# Local details that are not uploaded: credentials, and the folders of local paths (a path that is the whole text, a
# path in quotes, and a path without spaces inside a text).
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@|\bhf_\w{20,}|file://")
_ROOT = r"(?:~[\w.-]*[\\/]|\.{0,2}/|[A-Za-z]:[\\/]|\\\\)"
_WHOLE_PATH = re.compile(rf"{_ROOT}(?:[^\n]*[\\/])?([^\\/\n]+)[\\/]*")
_QUOTED_PATH = re.compile(rf"(['\"]){_ROOT}(?:[^'\"\n]*[\\/])?([^\\/'\"\n]+)[\\/]*\1")
_PATH_IN_TEXT = re.compile(rf"(?<![\w/.~\\-]){_ROOT}(?!/)(?:[^\s'\",;:]*[\\/])?(?=[^\s'\",;:\\/])")


@dataclasses.dataclass(frozen=True)
class Package:
    """The files to upload."""

    name: str
    """Repository, ORG/NAME."""
    files: dict[str, pathlib.Path | bytes]
    """By the name in the repository: a local file, or its contents."""
    has_own_card: bool
    """The folder has a README.md, which is uploaded in place of a generated card."""
    robot: str
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Published:
    """Outcome of a push."""

    url: str
    """Page of the commit, or of the pull request."""
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    """Files of an earlier policy that the push deleted from the repository."""
    notes: tuple[str, ...]


def package(
    path: str | pathlib.Path, repo_id: str, *, license: str | None = None, results: Mapping[str, Any] | None = None
) -> Package:
    """Collect the files of a policy folder to upload, without local paths and credentials in its provenance.

    Args:
        license: for the card, by its name on the Hub.
        results: printed by `torchpi eval --env … --json`, for policy.json and the card.

    Raises:
        ValueError: the path is no policy folder, or is damaged, or needs files that only this machine has.
    """
    name = repo_id.removeprefix("hf://")
    if not _NAME.fullmatch(name) or len(name) > 96:
        raise CheckpointError(
            f"{repo_id!r} is no name of a repository; expected ORG/NAME of letters, digits, '-', '_' and '.'; ORG is "
            "an organization, or your user name (`hf auth whoami`)."
        )
    checkpoint = open_checkpoint(path)
    if checkpoint.policy_file is None:
        raise CheckpointError(
            f"{path} is a checkpoint in the format {checkpoint.format}; expected a policy folder. Write one "
            f"first: torchpi convert {path} FOLDER --to torchpi."
        )
    if checkpoint.adapter is not None and not checkpoint.adapter.base.address.startswith((*REMOTE, "demo")):
        raise CheckpointError(
            f"{path} holds only a LoRA adapter for {checkpoint.adapter.base.address}, which only this machine has. "
            f"Write the whole weights first: torchpi convert {path} FOLDER --to torchpi."
        )
    checkpoint.require_intact()
    return _collect(checkpoint, name, license, results)


def _collect(checkpoint: Checkpoint, name: str, license: str | None, results: Mapping[str, Any] | None) -> Package:
    root, spec = checkpoint.root, checkpoint.spec()
    assert spec.embodiment is not None
    local_files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}
    files: dict[str, pathlib.Path | bytes] = {n: file for n, file in local_files.items() if _POLICY_FILES.fullmatch(n)}
    document, notes = read_json_object(root / "policy.json", error=CheckpointError), list[str]()
    provenance = document["provenance"]
    if results is not None:
        rates_of(results, "results")  # raises if they are no results
        provenance = {**provenance, "results": {key: results[key] for key in _RESULTS if key in results}}
    provenance, removed = strip_local_paths(provenance, "provenance")
    if removed:
        notes.append(f"policy.json is uploaded without local paths and credentials: {first_of(removed, 12, '; ')}")
    if provenance != document["provenance"]:
        files["policy.json"] = f"{json.dumps({**document, 'provenance': provenance}, indent=2)}\n".encode()
    for field in ("metadata", "embodiment"):
        if local := strip_local_paths(document[field], field)[1]:
            notes.append(
                f"uploaded unchanged, with what may be local paths or credentials: {first_of(local, 12, '; ')}"
            )
    if skipped := [file for file in local_files if file not in files and file != CARD]:
        notes.append(f"not uploaded, since it is no part of a policy: {first_of(skipped)}")
    has_own_card = CARD in local_files
    if has_own_card and license is not None:
        raise CheckpointError(f"{local_files[CARD]} is uploaded as it is; state the license {license!r} in it.")
    if has_own_card:
        files[CARD] = local_files[CARD]
    else:
        num_parameters = sum(math.prod(array.shape) for array in own_table(checkpoint.config).values())
        card = model_card(
            name,
            dataclasses.replace(spec, provenance=provenance),
            checkpoint.config,
            num_parameters=num_parameters,
            license=license,
        )
        files[CARD] = f"{card}{_CARD_FOOTER.format(_digest(card))}".encode()
    return Package(name, files, has_own_card, spec.embodiment.name, notes)


def strip_local_paths(value: Any, location: str) -> tuple[Any, list[str]]:
    """Remove credentials, and the folders of local paths, from the texts in a JSON value.

    Returns the value, and a description of each changed text, which begins with `location`.
    """
    changes: list[str] = []

    def strip(value: Any, location: str) -> Any:
        if isinstance(value, Mapping):
            return {strip(key, location): strip(item, f"{location}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strip(item, f"{location}[{i}]") for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        text = _CREDENTIALS.sub("", value.replace(str(pathlib.Path.home()), "~"))
        if match := _WHOLE_PATH.fullmatch(text):
            text = match[1]
        else:
            text = _PATH_IN_TEXT.sub("", _QUOTED_PATH.sub(r"\1\2\1", text))
        if text != value:
            changes.append(f"{location} is {text!r}")
        return text

    return strip(value, location), changes


def publish(
    package: Package,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> Published:
    """Upload a policy to the Hugging Face Hub in one commit; for the arguments see `push_to_hub`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    name, files, notes = package.name, dict(package.files), list(package.notes)
    if token is None and get_token() is None:
        raise CheckpointError(
            f"To push to {name}, the Hub needs a token that can write: run `hf auth login`, or set HF_TOKEN "
            "(https://huggingface.co/settings/tokens)."
        )
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    with _explain_errors(name):
        head, hub_files = _prepare(api, name, private=private, revision=revision, create_pr=create_pr)
        removed = [file for file in hub_files if _POLICY_FILES.fullmatch(file) and file not in files]
        if CARD in hub_files and not _is_generated(_read_text(api, name, CARD, head)):
            if package.has_own_card:
                notes.append(f"{CARD} of {name} is replaced by the folder's; its history keeps the old one")
            else:
                del files[CARD]
                notes.append(f"{CARD} of {name} stays as it is: it was written or edited by hand")
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
        uploaded = _file_sizes(api, name, commit.oid)
    sizes = {file: len(data) if isinstance(data, bytes) else data.stat().st_size for file, data in files.items()}
    if missing := [file for file, size in sizes.items() if uploaded.get(file) != size]:
        raise CheckpointError(
            f"{commit.commit_url} lacks {first_of(missing)}, so that the policy can't be loaded; check the "
            "repository's .gitignore, and push again."
        )
    return Published(commit.pr_url or commit.commit_url, commit.oid, tuple(files), tuple(removed), tuple(notes))


def _prepare(
    api: Any, name: str, *, private: bool | None, revision: str | None, create_pr: bool
) -> tuple[str, dict[str, int]]:
    """Create the repository and the branch if needed; return the branch's commit and the sizes of its files."""
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
        api.create_branch(name, branch=revision)  # needs more rights than writing to a branch
    head = str(api.repo_info(name, revision=revision).sha)
    sizes = _file_sizes(api, name, head)
    foreign = [file for file in sizes if _FOREIGN_FILES.fullmatch(file) and not _POLICY_FILES.fullmatch(file)]
    if foreign == ["config.json"]:
        config = parse_json(_read_text(api, name, "config.json", head), f"{name}/config.json", error=CheckpointError)
        foreign = [] if is_plugin_config(config) else foreign
    if foreign:
        raise CheckpointError(
            f"{name} has {first_of(foreign)}, of another checkpoint; with both in one repository, the policy can't be "
            "loaded. Push to another name, or delete these files there first."
        )
    return head, sizes


def _file_sizes(api: Any, name: str, commit: str) -> dict[str, int]:
    entries = api.list_repo_tree(name, recursive=True, revision=commit)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}  # folders have none


def _read_text(api: Any, name: str, file: str, commit: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(name, file, revision=commit, cache_dir=cache)
        return pathlib.Path(path).read_text("utf-8", "replace")


def _is_generated(card: str) -> bool:
    """True if torchpi wrote this card, and nobody has edited it."""
    text, *footer = card.rsplit(_CARD_FOOTER.partition("{")[0], 1)
    return bool(footer) and card == text + _CARD_FOOTER.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    """Turn the errors of failed requests into errors that tell the user what to do."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    unchanged = f"Files are committed only after all are uploaded: {name} is unchanged"
    try:
        yield
    except TorchpiError:
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{unchanged}; the next push skips files that are already uploaded") from None
    except OfflineModeIsEnabled as error:
        raise CheckpointError(f"HF_HUB_OFFLINE is set, and nothing can be pushed to {name}: unset it.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        root: Any = error  # the one that has the server's response, if any
        while getattr(root, "response", None) is None and root.__cause__ is not None:
            root = root.__cause__
        status = getattr(getattr(root, "response", None), "status_code", None)
        cause = " ".join(f"{type(root).__name__}: {root}".split())
        if status in (401, 403, 404):
            hint = token_hint(root, permission=f"write to the repositories of {name.partition('/')[0]}")
            message = f"{name} can't be written; {hint}"
        elif status in (409, 412):
            message = f"Somebody else has written to {name} in the meantime: push again"
        else:
            message = f"Pushing to {name} has failed. {unchanged}. Push again: files already uploaded are skipped"
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
        repo_id: ORG/NAME; created if it does not exist.
        private: create a private repository; an existing public one is an error.
        revision: a branch, created if it does not exist; by default main.
        create_pr: open a pull request instead.
        license: for the card, by its name on the Hub, such as "apache-2.0".
        dtype: dtype of the uploaded weights; by default their own.
        token: access token; by default the one from `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: the repository can't be written, or holds another checkpoint.
    """
    options: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    with tempfile.TemporaryDirectory() as folder:
        policy.save(path := pathlib.Path(folder) / "policy", dtype=dtype, max_shard_bytes=5 * 10**9)
        return publish(package(path, repo_id, license=license), commit_message=commit_message, **options)
