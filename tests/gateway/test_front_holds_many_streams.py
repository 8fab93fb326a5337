"""Many streams at once before a fast engine: all of them whole, and the front's memory does not grow.

The benchmark's own measure, made smaller: 2,000 streams for half a minute are ``python -m benchmarks.gateway``, whose
numbers stand in docs/explanation/measurements.md.
"""

import pytest
import uvloop

from benchmarks.gateway.__main__ import engine, front, held

pytestmark = pytest.mark.integration

STREAMS, SECONDS, INTERVAL_S = 600, 6.0, 0.25


def test_600_streams_twice_are_whole_and_memory_is_flat():
    with engine(INTERVAL_S) as behind, front(behind) as (port, process):
        found = uvloop.run(held(port, process, STREAMS, SECONDS, INTERVAL_S))
    print(found)
    assert [wave["whole"] for wave in found["waves"]] == [STREAMS, STREAMS]
    first, second = (wave["front_rss_mib_at_end"] for wave in found["waves"])
    assert second - first < 8  # MiB: what a wave took is used again by the next
    assert second - found["rss_mib_before"] < 60  # 0.03 MiB a stream were measured
