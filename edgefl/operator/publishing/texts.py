"""Publish a language model: its first stage, or the whole, as a release that devices generate texts with."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.models.adapters.patch import Move
from edgefl.offload.generation.stage_info import (
    CHANGES_FILE,
    CUT_FORMATS,
    STAGE_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    StageInfo,
    check_first,
    read_stage,
)
from edgefl.operator.adapters import base_release, patch_of
from edgefl.operator.client import CloudClient, Json
from edgefl.operator.run import download, upload_file
from edgefl.protocols.fields import to_json
from edgefl.protocols.inference.placement import split_address
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.manifest import check_model_name
from edgefl.protocols.messages import BlobRef
from edgefl.trees import Factors, SpooledTree, Tree, factors_of
from edgefl.trees.factors import MARK

MOST = 0.5  # of the bytes of a model with adapters that may differ from its base beside them


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextRelease:
    """A stage that was checked, and how it is published; raises ConfigError, ProtocolError or BlobDamaged."""

    folder: Path  # that `edgefl offload split-decoder` wrote
    name: str = ""  # of the release; empty = the model's
    tail: str = ""  # HOST:PORT of `edgefl cloud generate`, as devices reach it; empty = the whole model
    form: str = "fp16"  # wire format
    base: int | None = None  # version of the release to whose weights this one's adapters were added
    info: StageInfo = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", read_stage(self.folder))
        check_first(self.info, self.tail, "--tail")
        if self.tail:
            split_address(self.tail)
        if self.form not in CUT_FORMATS:
            raise ConfigError(f"--format {self.form!r} is not one of: {', '.join(CUT_FORMATS)}")
        check_model_name(self.release_name)

    @property
    def release_name(self) -> str:
        """The release's name; clients of the API use the model's."""
        return self.name or self.info.name.lower()


def publish_text(client: CloudClient, release: TextRelease) -> Json:
    """Upload and sign; return the release, with a note for the operator. Raises ConfigError for another base."""
    on_base, note = _on_base(client, release)
    weights, record, tokenizer = (
        upload_file(client, release.folder / name) for name in (WEIGHTS_FILE, STAGE_FILE, TOKENIZER_FILE)
    )
    text = TextStage(record=record, tokenizer=tokenizer, tail=release.tail, form=release.form)
    return client.publish(release.release_name, weights, {}, text=to_json(text), **on_base) | {"note": note}


def _on_base(client: CloudClient, release: TextRelease) -> tuple[dict[str, BlobRef], str]:
    """Upload the patch of a release on a base; return what the release says of it, and a note."""
    if release.base is None:
        return {}, ""
    changes = release.folder / CHANGES_FILE  # there is none if all adapters are in other stages
    base = base_release(client, release.release_name, release.base)
    if base.text is None:
        raise ConfigError(f"--base: version {release.base} of {base.model} is no language model")
    with tempfile.TemporaryDirectory(prefix="edgefl-patch-") as folder:
        before = Path(folder) / "base"
        download(client, base.blob.sha256, before)
        weights = SpooledTree(before)
        moves = []
        for name, pair in _factors(SpooledTree(changes)) if changes.is_file() else ():
            if name not in weights or weights[name].shape != pair.shape:
                raise ConfigError(f"--base: version {release.base} of {base.model} has no weight {name!r} {pair.shape}")
            moves.append(Move(name, weights[name], pair))
        try:
            patch, note = patch_of(before, release.folder / WEIGHTS_FILE, moves, base.version, Path(folder), MOST)
        except ConfigError as cause:
            raise ConfigError(
                f"--base: {release.folder} is not version {release.base} of {base.model} with adapters added to it: "
                "name the version of the same model, cut at the same block, or publish without --base"
            ) from cause
        return {"base": base.blob, "patch": upload_file(client, patch)}, note


def _factors(changes: Tree) -> Iterator[tuple[str, Factors]]:
    for name in changes:
        pair = factors_of(changes, name)
        if pair is not None:
            yield name.removesuffix(MARK), pair
