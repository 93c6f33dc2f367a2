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
