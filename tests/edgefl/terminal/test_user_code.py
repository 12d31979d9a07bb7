"""An error of the user's code is one short message with the user's file and line, however the code was called."""

import sys

import pytest
import torch

from edgefl.bundle import load_bundle, pack_bundle, unpack_bundle
from edgefl.errors import TaskError
from edgefl.terminal.user_code import MAX_QUOTED, UserCode, quoted


def test_user_code_names_the_deepest_line_of_the_users_and_not_a_librarys():
    import json

    with (
        pytest.raises(TaskError, match=rf"train_data raised JSONDecodeError: .* \({__file__}:\d+\)"),
        UserCode("t", "train_data"),
    ):
        json.loads("{")


def test_user_code_lets_interrupts_and_task_errors_pass():
    with pytest.raises(KeyboardInterrupt), UserCode("t", "x"):
        raise KeyboardInterrupt
    with pytest.raises(TaskError, match=r"^mine$"), UserCode("t", "x"):
        raise TaskError("mine")


def test_user_code_shortens_a_long_message():
    with pytest.raises(TaskError) as caught, UserCode("t", "x"):
        raise ValueError("y" * 100_000)
    assert len(str(caught.value)) < MAX_QUOTED + 200


def test_what_torch_says_of_its_tracing_is_left_out():
    said = 'shapes differ: [2] and [3]\n\nfrom user code:\n   File "x.py", line 3\n\nSet TORCHDYNAMO_VERBOSE=1 for more'
    assert quoted(RuntimeError(said)) == "RuntimeError: shapes differ: [2] and [3]"
    native = "expected a float\nException raised from check at ../aten/x.cpp:7 (most recent call first):\nframe #0: ..."
    assert quoted(RuntimeError(native)) == "RuntimeError: expected a float"


def test_a_message_of_the_users_own_is_kept_with_its_lines():
    assert quoted(ValueError("two lines:\n1. from here")) == "ValueError: two lines:\n1. from here"
    assert quoted(KeyError()) == "KeyError"


def branches(inputs):
    return inputs * 2 if inputs.sum() > 0 else inputs


@pytest.mark.parametrize(
    "call",
    [
        torch.func.vmap(branches),
        lambda inputs: torch.export.export(Branching(), (inputs,)),
    ],
    ids=["mapped", "exported"],
)
def test_a_branch_on_a_value_is_told_in_the_same_words_with_its_line(call):
    line = branches.__code__.co_firstlineno + 1
    with pytest.raises(TaskError) as caught, UserCode("t", "training"):
        call(torch.ones(3))
    message = str(caught.value)
    assert "a tensor's value decides what is computed (if, float(), .item()), which cannot be traced" in message
    assert message.endswith(f" ({__file__}:{line})")
    assert "\n" not in message


class Branching(torch.nn.Module):
    def forward(self, inputs):
        return branches(inputs)


def test_a_file_of_a_bundle_is_named_as_in_the_bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "broken_for_test:task"\n')
    (folder / "broken_for_test.py").write_text("\n1 / 0\n")
    packed = pack_bundle(str(folder))
    (tmp_path / "bundle").write_bytes(packed.data)
    unpack_bundle(tmp_path / "bundle", tmp_path / "device" / "0123")
    with pytest.raises(TaskError, match=r"ZeroDivisionError: division by zero \(broken_for_test\.py:2\)$"):
        load_bundle(tmp_path / "device" / "0123", packed.task)
