"""How a language model is released: what a device needs besides its weights, and where its tail is."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgefl.errors import ProtocolError
from edgefl.offload.generation.stage_info import CUT_FORMATS
from edgefl.protocols.fields import Checked, limited
from edgefl.protocols.inference.placement import split_address
from edgefl.protocols.messages import MAX_NAME_CHARS, BlobRef


@dataclass(frozen=True, kw_only=True, slots=True)
class TextStage(Checked):
    """The first stage of a language model, or a whole one. Its weights are the release's own file."""

    record: BlobRef  # its stage.json (`edgefl.offload.generation.stage_info`)
    tokenizer: BlobRef
    tail: str = field(default="", metadata=limited(max_chars=MAX_NAME_CHARS))  # host:port of `edgefl cloud generate`
    form: str = field(default="fp16", metadata=limited(max_chars=16))  # wire format

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.tail:
            split_address(self.tail)
        if self.form not in CUT_FORMATS:
            raise ProtocolError(f"TextStage: form is {self.form!r}, expected one of: {', '.join(CUT_FORMATS)}")
