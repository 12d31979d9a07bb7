"""A batch as a list of tensors, and back."""

import torch

from edgefl.simulation.steps.batch import Batch

A, B = torch.zeros(4, 2), torch.zeros(4)


def test_a_structure_is_found_again():
    batch = Batch.of({"x": (A, B)}, [B])
    assert all(one is other for one, other in zip(batch.tensors, (A, B, B), strict=True))
    inputs, targets = batch.structures([1, 2, 3])
    assert (inputs, targets) == ({"x": (1, 2)}, [3])
    assert Batch.of(A, B).structures([1, 2]) == (1, 2)


def test_one_recording_serves_batches_of_one_form_shape_and_dtype():
    key = Batch.of({"x": A}, B).key()
    assert Batch.of({"x": A + 1}, B).key() == key
    others = [Batch.of({"y": A}, B), Batch.of({"x": A[:2]}, B[:2]), Batch.of({"x": A.double()}, B), Batch.of((A,), B)]
    assert all(one.key() != key for one in others)
    assert Batch.of(A, B).key() == Batch.of(A + 1, B).key() != Batch.of(A.T.contiguous().T, B).key()


def test_the_width_leaves_out_the_number_of_samples():
    assert Batch.of(A, B).width() == Batch.of(A[:1], B[:1]).width() != Batch.of(A[:, :1], B).width()


def test_a_packed_sequence_is_no_tensor():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3)])
    assert not Batch.of(packed, B).is_tensors()
    assert Batch.of({"x": A}, B).is_tensors()
    assert Batch.of(packed, B).key() is not None
