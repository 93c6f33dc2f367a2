"""How many channels with pages there are where nobody insists on a number."""

from __future__ import annotations

import pytest

from migrated.migration.data_channels import unasked_channels


@pytest.mark.parametrize(
    ("most", "processors", "works", "channels"),
    [
        (2, 1, False, 1),
        (2, 2, False, 1),
        (2, 4, False, 2),
        (2, 64, False, 2),
        (8, 6, False, 3),
        (1, 64, False, 1),
        (2, 1, True, 2),
        (255, 2, True, 255),
    ],
)
def test_half_of_the_processors_move_pages_and_all_may_pack(
    most: int, processors: int, works: bool, channels: int
) -> None:
    assert unasked_channels(most, processors, works=works) == channels
