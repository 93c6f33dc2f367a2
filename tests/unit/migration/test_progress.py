"""What is remembered of a migration while the handlers count for something else."""

from __future__ import annotations

from migrated.migration.progress import Progress


def test_a_snapshot_leaves_the_figures_of_the_last_migration() -> None:
    progress = Progress(lambda: 5.0)
    counting = progress.stats
    counting.normal, counting.dirty_sync_count = 7, 3
    progress.sent(100)
    assert progress.synced(1)
    known = progress.stats.as_dict()
    with progress.kept():
        assert counting.normal == 0, "the handlers begin at nothing"
        counting.normal, counting.dirty_sync_count = 1000, 9
        assert not progress.synced(1000)
        assert progress.stats.as_dict() == known
    assert progress.stats is counting, "the handlers' own, again"
    assert counting.as_dict() == known
    assert len(progress.passes) == 1


def test_bytes_belong_to_the_phase_in_which_they_go() -> None:
    progress = Progress(lambda: 0.0)
    progress.begin()
    progress.sent(1)
    progress.ledger.begin(1.0)
    progress.sent(20)
    progress.ledger.end(2.0)
    progress.sent(300)
    stats = progress.stats
    assert (stats.precopy_bytes, stats.downtime_bytes, stats.postcopy_bytes, stats.transferred) == (1, 20, 300, 321)
    progress.begin()
    progress.sent(4000)
    assert (stats.precopy_bytes, stats.postcopy_bytes) == (4000, 0)
