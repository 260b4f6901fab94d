"""What `bench load` reads: pictures like photographs, the same from a folder, a tar and ArrayRecord."""

import numpy as np
import pytest

from cir_jax.bench.load import Load, _readers, draw, write_pictures
from cir_jax.data.images import jpeg, open_image


def test_pictures_are_as_hard_to_code_as_photographs():
    picture = draw(np.random.default_rng(1))
    assert picture.shape == (375, 500, 3) and picture.dtype == np.uint8
    assert 30_000 < len(jpeg(picture)) < 90_000
    assert np.asarray(open_image(jpeg(picture))).shape == picture.shape


def test_every_reader_gives_the_same_batches(tmp_path):
    write_pictures(tmp_path / "pictures", 5)
    command = Load(folder=tmp_path / "pictures", epochs=2, batch=4)
    readers = _readers(command, tmp_path)
    first, *others = [
        np.concatenate([batch.copy() for batch in make()])
        for title, make in readers.items()
        if "DataLoader" not in title
    ]
    assert first.shape == (10, 224, 224, 3) and len(others) == 2
    np.testing.assert_array_equal(first[:5], first[5:])
    for each in others:
        np.testing.assert_array_equal(each, first)


def test_numbers_too_small_are_refused():
    with pytest.raises(ValueError, match="--repeat is 0; it must be at least 1"):
        Load(repeat=0)
