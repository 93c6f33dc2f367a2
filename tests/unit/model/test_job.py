"""Jobs: what may follow what, and who may be asked for what."""

from __future__ import annotations

import pytest

from migrated.errors import CommandError, LocalProtocolError
from migrated.model.job import TRANSITIONS, VERBS, JobStatus, JobVerb, check_job_id, check_transition, check_verb


@pytest.mark.parametrize("before", JobStatus)
@pytest.mark.parametrize("after", JobStatus)
def test_the_table_is_the_law(before: JobStatus, after: JobStatus) -> None:
    if after in TRANSITIONS[before]:
        check_transition(before, after)
    else:
        with pytest.raises(LocalProtocolError, match=f"invalid job status transition: '{before}' -> '{after}'"):
            check_transition(before, after)


def test_every_job_ends_and_nothing_follows_its_end() -> None:
    assert set(TRANSITIONS) == set(JobStatus)
    reached, ahead = set(), [JobStatus.CREATED]
    while ahead:
        reached.add(status := ahead.pop())
        ahead += TRANSITIONS[status] - reached
    assert reached == set(JobStatus)
    assert not TRANSITIONS[JobStatus.NULL]


@pytest.mark.parametrize("status", JobStatus)
@pytest.mark.parametrize("verb", JobVerb)
def test_verbs(status: JobStatus, verb: JobVerb) -> None:
    if status in VERBS[verb]:
        check_verb("a", status, verb)
    else:
        with pytest.raises(CommandError, match=f"Job 'a' in state '{status}' cannot accept command verb '{verb}'"):
            check_verb("a", status, verb)


@pytest.mark.parametrize("job_id", ["a", "Z9", "snap-1_b.c"])
def test_ids(job_id: str) -> None:
    check_job_id(job_id)


@pytest.mark.parametrize("job_id", ["", "1a", "-a", "a b", "a\n", "ä"])
def test_what_is_no_id(job_id: str) -> None:
    with pytest.raises(CommandError, match="Invalid job ID"):
        check_job_id(job_id)
