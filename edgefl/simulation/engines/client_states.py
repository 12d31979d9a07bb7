"""What simulated clients keep between rounds, as devices do: one file per client and round, in a folder.

Worker processes write and read them, so a client's next round may be trained by another worker. Files of earlier
rounds stay until `settle`: a client that is trained again, because its worker died or the simulation continues from an
earlier state, starts from the same state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

from edgefl.config import TrainConfig
from edgefl.records import Answer, Evaluated, Failure, Partial, Plan, Update
from edgefl.trees import EncodedTree, SpooledTree, Tree, encoded_bytes, file_bytes, spec_of, write_tree
from edgefl.trees.fragments import changed_part, sent_part
from edgefl.trees.narrow import narrowed_spec

FOLDER = "client-states"  # beside a checkpoint


class ClientStates:
    """The states of one simulation's clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before(self, client: str, round_number: int) -> Tree | None:
        """Return what a client kept after its last round before this one; None if there is nothing."""
        earlier = [one for one in _rounds(self._of(client)) if one < round_number]
        return SpooledTree(self._of(client) / str(max(earlier))) if earlier else None

    def has(self, client: str, round_number: int) -> bool:
        """Whether a client kept something after this round."""
        return (self._of(client) / str(round_number)).exists()

    def keep(self, client: str, round_number: int, state: Tree) -> None:
        """Store what a client keeps after a round."""
        folder = self._of(client)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{round_number}"
        with part.open("wb") as file:
            write_tree(state, file)
        part.replace(folder / str(round_number))

    def settle(self, round_number: int) -> None:
        """Delete what is older than the states after this round: no earlier round will be trained again."""
        for folder in self.folder.iterdir():
            for one in sorted(one for one in _rounds(folder) if one <= round_number)[:-1]:
                (folder / str(one)).unlink()

    def _of(self, client: str) -> Path:
        return self.folder / hashlib.sha256(client.encode()).hexdigest()[:32]  # a name may not be a valid file name


class RoundBytes:
    """What a round transfers for one client: with fragments, one of them, to a client that was in the round before."""

    def __init__(self, plan: Plan, states: ClientStates | None = None) -> None:
        self._states, self._before = states, plan.round - 1
        self.whole = self._changed = encoded_bytes(plan.parameters)
        part = spec_of(sent_part(plan.parameters, plan.train) if plan.fit else plan.parameters)
        self.exact_up = file_bytes(part)  # of one update as it is; with adapters, the most that it may have
        self.up = file_bytes(narrowed_spec(part, plan.train.wire))
        self._has_fragments = plan.fit and plan.train.fragments > 1
        if self._has_fragments:
            self._changed = encoded_bytes(changed_part(plan.parameters, plan.train))

    def sent(self, answer: Answer) -> int:
        """Return the bytes of the updates in an answer."""
        if isinstance(answer, Failure | Evaluated):
            return 0
        if isinstance(answer, Update) and isinstance(answer.tree, EncodedTree):
            return encoded_bytes(answer.tree)  # ranks differ
        return self.up * (len(answer.contributors) if isinstance(answer, Partial) else 1)

    def down(self, client: str) -> int:
        """Return the bytes of the parameters that a client receives."""
        is_part = self._has_fragments and self._states is not None and self._states.has(client, self._before)
        return self._changed if is_part else self.whole

    def down_all(self, clients: Collection[str]) -> int:
        """Return the bytes of the parameters that all these clients receive."""
        return sum(map(self.down, clients)) if self._has_fragments else len(clients) * self.whole


@contextmanager
def open_states(
    train: TrainConfig, checkpoint: Path | None, resume: Path | None, known: str = ""
) -> Iterator[ClientStates | None]:
    """Yield where clients keep their states: beside the checkpoint, else in a temporary folder; None if nowhere.

    Those of `resume` are copied if it is another folder. `known` is the temporary folder of a process that was lost.
    """
    if not train.keeps_state:
        yield None
        return
    if beside := checkpoint or resume:
        folder = beside / FOLDER
        folder.mkdir(exist_ok=True)
        if resume is not None and not resume.samefile(beside) and (resume / FOLDER).is_dir():
            copytree(resume / FOLDER, folder, dirs_exist_ok=True)
        yield ClientStates(folder)
        return
    with TemporaryDirectory(prefix="edgefl-") as name:
        if known and Path(known).is_dir():
            Path(name).rmdir()
            Path(known).rename(name)
        yield ClientStates(Path(name))


def _rounds(folder: Path) -> Iterator[int]:
    """Yield the rounds of a client's states."""
    if folder.is_dir():
        yield from (int(file.name) for file in folder.iterdir() if file.name.isdecimal())
