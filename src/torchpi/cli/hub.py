"""Commands of the Hugging Face Hub: push, pull."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Annotated, Any

import tyro

from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class Push:
    """Upload a policy folder to the Hugging Face Hub, in one commit with a model card.

    Needs a token that may write: `hf auth login`, or HF_TOKEN. Only the files of the policy are uploaded; paths of this
    machine are left out of its provenance. The success of `train --env` is in the card.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """A policy folder, or "demo"."""
    repository: Annotated[str, tyro.conf.Positional]
    """ORG/NAME, where ORG is an organization or your user name; made if it is not there."""
    private: bool = False
    """Let only its owners see a new repository."""
    revision: str | None = None
    """A branch, made if it is not there; by default main."""
    create_pr: bool = False
    """Open a pull request, in a repository of others."""
    message: str | None = None
    """Message of the commit."""
    license: str | None = None
    """For the card, by its name on the Hub, for example apache-2.0; by default the card says what the weights begin
    from."""
    results: pathlib.Path | None = None
    """The output of eval --env … --json for this policy, for the card and policy.json."""
    dry_run: bool = False
    """Print the card and what would be uploaded, in place of uploading."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.checkpoints.publish import CARD, package, publish
        from torchpi.schema import read_json_object

        results = _of_run(pathlib.Path(self.policy)) if self.results is None else read_json_object(self.results)
        packed = package(self.policy, self.repository, license=self.license, results=results)
        if self.dry_run:
            card = packed.files[CARD]
            print(card.decode() if isinstance(card, bytes) else f"{CARD}: the folder's own")
            print("\n".join([*packed.notes, f"files: {', '.join(packed.files)}"]))
            return
        options: dict[str, Any] = {"private": self.private or None, "revision": self.revision}
        done = publish(packed, create_pr=self.create_pr, commit_message=self.message, **options)
        if self.json:
            return print_json(dataclasses.asdict(done))
        at = f" --revision {self.revision}" if self.revision else ""
        lines = [*done.notes, *(f"removed there: {file}" for file in done.removed)]
        print("\n".join([*lines, f"{len(done.files)} files: {done.url}", f"next: torchpi pull {packed.name}{at}"]))


def _of_run(policy: pathlib.Path) -> Mapping[str, Any] | None:
    """The success of a checkpoint in the metrics of its training run, as an evaluation's results."""
    from torchpi.training.run_folder import METRICS, RECIPE, read_metrics, resume_config, without_overtaken

    # RUN/checkpoints/STEP/policy
    step, run = policy.absolute().parent, policy.absolute().parent.parent.parent
    if not (run / RECIPE).is_file() or not step.name.isdecimal():
        return None
    for line in reversed(without_overtaken(read_metrics(run / METRICS))):
        if line["step"] == int(step.name) and isinstance(line.get("success"), Mapping):
            return {"env": resume_config(run).eval.env, "success_rate": line["success_rate"], "tasks": line["success"]}
    return None


@dataclasses.dataclass(frozen=True)
class Pull:
    """Download a policy or checkpoint of any format, in its newest version, and check it.

    It goes into the cache, from which every command reads it by its address. A private repository needs a token: `hf
    auth login`, or HF_TOKEN.
    """

    address: Annotated[str, tyro.conf.Positional]
    """ORG/NAME on the Hugging Face Hub, hf://… or gs://…."""
    revision: str | None = None
    """A branch, tag or commit; by default main."""
    out: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A new folder to copy it to."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.atomic import atomic_folder
        from torchpi.checkpoints.address import hub_address
        from torchpi.checkpoints.checkpoint import open_checkpoint
        from torchpi.checkpoints.formats import format_of
        from torchpi.checkpoints.hub import fetch_newest
        from torchpi.errors import CheckpointError

        if self.out is not None and self.out.exists():
            raise CheckpointError(f"{self.out} exists already; choose another folder for out=.")
        address = hub_address(self.address, self.revision)
        root, version = fetch_newest(address)
        if (kind := format_of(root)) == "torchpi":  # others may not say all that reading them needs
            open_checkpoint(address).require_intact()
        if self.out is not None:
            with atomic_folder(self.out) as beside:
                shutil.copytree(root, beside, dirs_exist_ok=True)
        place = root if self.out is None else self.out
        if self.json:
            return print_json({"folder": str(place), "format": kind, "version": version})
        print(f"{kind}{f', version {version}' if version else ''}: {place}")
        print(f"next: torchpi doctor {address if self.out is None else place}")
