"""The meter: a cap on requests and cost that holds over threads, retries, kills and processes."""

import itertools
import threading
import time

import pytest

from tempering.core.endpoint import EndpointSampler
from tempering.core.ledger import SPENT
from tempering.core.meter import Meter, Purse
from tempering.core.records import Prompt


@pytest.fixture
def server(loopback):
    """A loopback endpoint that fails every third request, and says what it used.

    Which prompt's it is depends on the order in which eight arrive, so one may fail many times in a row.
    """
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    told = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": usage}
    server = loopback(lambda body, count: (200 if count % 3 else 503, told, {}))
    return server.url, server.times


def prompts(n):
    return [Prompt(({"role": "user", "content": f"question {i}"},)) for i in range(n)]


def ask(url, count, **kw):
    return EndpointSampler(f"openai:m@{url}", backoff_s=0.001, retries=40, **kw)(prompts(count))


def test_the_cap_is_met_exactly_at_concurrency_8_with_retries_counted(server, tmp_path):
    url, times = server
    meter = Meter(tmp_path / "requests.jsonl", max_requests=40)
    groups = ask(url, 100, concurrency=8, meter=meter)
    assert len(times) == 40 == meter.count
    refused = [c for (c,) in groups if c.finish == "error"]
    assert all(SPENT in (c.error or "") for c in refused) and len(refused) == 100 - (40 - 40 // 3)


def test_a_second_process_goes_on_counting_and_a_torn_line_is_a_request(tmp_path):
    file = tmp_path / "requests.jsonl"
    first = Meter(file, max_requests=5)
    assert [first.take() for _ in range(2)] == [None, None]
    with file.open("ab") as torn:
        torn.write(b'{"requ')
    second = Meter(file, max_requests=5)
    assert second.count == 3
    assert [second.take() is None for _ in range(3)] == [True, True, False]
    assert Meter(file, max_requests=5).count == 5


def test_requests_keep_their_distance_also_over_a_restart(server, tmp_path):
    """600 a minute: 0.1 s apart."""
    url, times = server
    ask(url, 4, concurrency=4, meter=Meter(tmp_path / "r.jsonl", per_minute=600))
    ask(url, 2, concurrency=4, meter=Meter(tmp_path / "r.jsonl", per_minute=600), cache=None)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert min(gaps) > 0.05 and sum(gaps) > 0.095 * len(gaps)


def test_a_wait_for_the_turn_ends_with_an_interrupt():
    meter, stop = Meter(per_minute=1), threading.Event()
    assert meter.take() is None
    stop.set()
    assert meter.take(stop=stop) == "interrupted"


def test_a_purse_is_one_for_several_meters_and_sets_the_most_aside():
    purse = Purse(1.0)
    a, b = Meter(purse=purse), Meter(purse=purse)
    assert a.take(0.6) is None
    purse.settle(0.6, 0.3)
    assert b.take(0.7) is None
    purse.settle(0.7, 0.7)
    assert SPENT in str(a.take(0.1)) and SPENT in str(b.take(0.0)), "once refused, always refused"


def test_a_purse_waits_for_what_may_turn_out_cheap():
    purse, got = Purse(1.0), []
    assert purse.reserve(0.8) is None
    waiting = threading.Thread(target=lambda: got.append(purse.reserve(0.5)))
    waiting.start()
    time.sleep(0.02)
    assert not got
    purse.settle(0.8, 0.1)
    waiting.join()
    assert got == [None]


def test_the_cost_of_two_endpoints_stays_under_one_cap_and_counts_what_was_spent_before(server, tmp_path):
    """A request may cost 128 + bytes + 256 tokens and costs 15; at 1 a token the cap of 1000 is never passed."""
    url, times = server

    def both(max_cost):
        purse = Purse(max_cost)
        for name in ("a", "b"):
            settings = {"price_in": 1e6, "price_out": 1e6, "cache": tmp_path / "cache", "backoff_s": 0.001}
            sampler = EndpointSampler(f"openai:{name}@{url}", meter=Meter(purse=purse), **settings)
            sampler(prompts(30), max_new_tokens=256)
        return purse

    purse = both(1000.0)
    assert 600 < purse.spent <= 1000
    sent = len(times)
    again = both(1000.0)
    assert again.spent == purse.spent and len(times) == sent, "what the ledgers hold is spent already"
