"""Commands for the Hugging Face Hub: push, pull."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Annotated, Any

import tyro

from torchpi.cli.common import Json
from torchpi.ui.format import print_json


@dataclasses.dataclass(frozen=True)
class Push:
    """Upload a policy folder to the Hugging Face Hub, in one commit with a model card.

    This needs a token with write permission: run `hf auth login` or set HF_TOKEN. Only the policy's files are uploaded,
    and local paths are removed from its provenance. The card includes the success rates measured by `train --env`.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """Policy folder, or "demo"."""
    repository: Annotated[str, tyro.conf.Positional]
    """ORG/NAME, where ORG is an organization or your user name; created if it does not exist."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch, created if it does not exist; by default main."""
    create_pr: bool = False
    """Open a pull request instead of committing, for a repository you do not own."""
    message: str | None = None
    """Commit message."""
    license: str | None = None
    """License for the card, such as apache-2.0; by default the card states which weights the policy started from."""
    results: pathlib.Path | None = None
    """Output of eval --env … --json for this policy, to include in the card and policy.json."""
    dry_run: bool = False
    """Print the card and the files instead of uploading."""
    json: Json = False

    def run(self) -> None:
        from torchpi.checkpoints.publish import CARD, package, publish
        from torchpi.schema import read_json_object

        results = (
            _training_results(pathlib.Path(self.policy)) if self.results is None else read_json_object(self.results)
        )
        packed = package(self.policy, self.repository, license=self.license, results=results)
        if self.dry_run:
            card = packed.files[CARD]
            print(card.decode() if isinstance(card, bytes) else f"{CARD}: the folder's own")
            print("\n".join([*packed.notes, f"files: {', '.join(packed.files)}"]))
            return
        options: dict[str, Any] = {"private": self.private or None, "revision": self.revision}
        published = publish(packed, create_pr=self.create_pr, commit_message=self.message, **options)
        if self.json:
            return print_json(dataclasses.asdict(published))
        revision = f" --revision {self.revision}" if self.revision else ""
        for line in (*published.notes, *(f"removed from the repository: {file}" for file in published.removed)):
            print(line)
        print(f"{len(published.files)} files: {published.url}\nnext: torchpi pull {packed.name}{revision}")


def _training_results(policy: pathlib.Path) -> Mapping[str, Any] | None:
    """Success rates of a checkpoint, from the metrics of its training run, in the form of evaluation results."""
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
    """Download a policy or checkpoint, and verify it.

    Any format is supported, and the newest version is downloaded. It is stored in the cache, from which every command
    reads it by its address. A private repository needs a token: run `hf auth login` or set HF_TOKEN.
    """

    address: Annotated[str, tyro.conf.Positional]
    """ORG/NAME on the Hugging Face Hub, hf://… or gs://…."""
    revision: str | None = None
    """Branch, tag or commit; by default main."""
    out: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """New folder to copy it to."""
    json: Json = False

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
        checkpoint_format = format_of(root)
        if checkpoint_format == "torchpi":  # other formats may need further options to be opened
            open_checkpoint(address).require_intact()
        if self.out is not None:
            with atomic_folder(self.out) as temporary:
                shutil.copytree(root, temporary, dirs_exist_ok=True)
        folder = root if self.out is None else self.out
        if self.json:
            return print_json({"folder": str(folder), "format": checkpoint_format, "version": version})
        print(f"{checkpoint_format}{f', version {version}' if version else ''}: {folder}")
        print(f"next: torchpi doctor {address if self.out is None else folder}")
