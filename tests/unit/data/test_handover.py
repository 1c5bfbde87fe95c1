"""A parcel's arrays lie in one buffer, side by side, and come out of a slot as they went in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm.data.handover import Label, Parcel, Slots
from megatron_mm.errors import UserError

dtypes = st.sampled_from(["uint8", "int32", "int64", "float32"]).map(np.dtype)
shapes = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(dtypes, st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)),
)


@given(
    st.lists(shapes, min_size=1, max_size=6), st.integers(1, 3), st.sampled_from([0, 100, 10_000]), st.integers(0, 99)
)
def test_what_went_in(all_shapes, count, size, seed):
    """Whether they fit into their slots or not, and whatever was in them before."""
    slots, rng = Slots(count, size), np.random.default_rng(seed)
    for number, shapes in enumerate(all_shapes, start=seed):
        label = Label(shapes, 3)
        contents = {name: rng.integers(0, 200, shape).astype(dtype) for name, (dtype, shape) in shapes.items()}
        parcel = slots.parcel(number, label)
        for name, array in parcel.arrays().items():
            assert array.ctypes.data % 4 == 0
            array[...] = contents[name]
        sent = slots.send(number, parcel)
        assert (sent.own is None) == (label.bytes <= -(-size // 64) * 64)
        received = slots.receive(sent, page_locked=False)
        parcel.buffer.fill_(0)
        found = received.arrays()
        assert found.keys() == contents.keys()
        for name, array in found.items():
            assert (array.dtype, array.shape) == (contents[name].dtype, contents[name].shape)
            np.testing.assert_array_equal(array, contents[name])


def test_a_slot_that_was_filled_again():
    slots, label = Slots(3, 8), Label({"a": (np.dtype("i8"), (1,))}, 0)
    sent = [slots.send(n, slots.parcel(n, label)) for n in range(3)]
    slots.receive(sent[0], page_locked=False)
    slots.parcel(3, label)
    slots.receive(sent[1], page_locked=False)
    with pytest.raises(AssertionError, match="microbatch 0 was overwritten by 3"):
        slots.receive(sent[0], page_locked=False)


def test_no_room_in_shared_memory():
    with pytest.raises(UserError, match=r"data.num_workers, data.prefetch: no room .*\n.*MiB asked for"):
        Slots(5, 1 << 50)


def test_a_microbatch_is_views_of_it():
    i64, f32, u8 = np.dtype("i8"), np.dtype("f4"), np.dtype("u1")
    shapes = dict.fromkeys(("tokens", "labels", "position_ids"), (i64, (2, 3)))
    shapes |= {"loss_mask": (f32, (2, 3)), "documents": (np.dtype("i4"), (2, 3)), "images": (u8, (1, 3, 2, 2))}
    shapes |= dict.fromkeys(("source_ids", "sample_ids", "encoded_ends", "encoded_places"), (i64, (2,)))
    label = Label(shapes | {"encoded": (u8, (5,))}, 3, ["a", "b"])
    parcel = Parcel(label, torch.empty(label.bytes, dtype=torch.uint8))
    arrays = parcel.arrays()
    for k, array in enumerate(arrays.values()):
        array[...] = k
    arrays["encoded"][:] = list(b"ABCDE")
    arrays["encoded_ends"][:], arrays["encoded_places"][:] = [2, 5], [0, 2]
    batch = parcel.microbatch()
    assert batch.num_images == 3
    assert (batch.loss_mask.dtype, batch.documents.dtype) == (torch.float32, torch.int32)
    assert torch.equal(batch.labels, torch.ones(2, 3, dtype=torch.int64))
    assert batch.images.untyped_storage().data_ptr() == parcel.buffer.untyped_storage().data_ptr()
    places, pictures = parcel.encoded()
    assert places == [0, 2]
    assert [(bytes(p.data), p.name) for p in pictures] == [(b"AB", "a"), (b"CDE", "b")]
