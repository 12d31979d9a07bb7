"""Publish a language model: its first stage, or the whole, as a release that devices generate texts with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.offload.generation.stage_info import (
    CUT_FORMATS,
    STAGE_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    StageInfo,
    check_first,
    read_stage,
)
from edgefl.operator.client import CloudClient, Json
from edgefl.operator.run import upload_file
from edgefl.protocols.fields import to_json
from edgefl.protocols.inference.placement import split_address
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.manifest import check_model_name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextRelease:
    """A stage that was checked, and how it is published; raises ConfigError, ProtocolError or BlobDamaged."""

    folder: Path  # that `edgefl offload split-decoder` wrote
    name: str = ""  # of the release; empty = the model's
    tail: str = ""  # HOST:PORT of `edgefl cloud generate`, as devices reach it; empty = the whole model
    form: str = "fp16"  # wire format
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
    """Upload and sign; return the release."""
    weights, record, tokenizer = (
        upload_file(client, release.folder / name) for name in (WEIGHTS_FILE, STAGE_FILE, TOKENIZER_FILE)
    )
    text = TextStage(record=record, tokenizer=tokenizer, tail=release.tail, form=release.form)
    return client.publish(release.release_name, weights, {}, text=to_json(text))
