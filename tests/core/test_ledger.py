import json
import os
import threading
import time

import pytest

from tempering.core.ledger import NONE, SPENT, Answer, Ledger, Tokens, read_tokens, tokens_about, tokens_at_most

ANSWER = Answer("yes", "stop")
USED = Tokens(10, 20)


def ledger(folder=None, **limits):
    return Ledger(folder, "org/m", "http://host/v1", **limits)


def ask(book, key, used=USED, answer=ANSWER):
    assert book.reserve(used) is None
    book.settle(used, used, {"key": key, "id": key, "index": 0}, answer)


def test_what_one_wrote_another_reads_with_its_cost(tmp_path):
    ask(ledger(tmp_path), "a")
    other = ledger(tmp_path, price_in=1.0, price_out=10.0)
    other.read()
    assert other.answers == {"a": ANSWER._replace(used=Tokens(10, 20))}
    assert other.spent == Tokens(10, 20)
    assert other.cost(other.spent) == pytest.approx((10 * 1 + 20 * 10) / 1e6)


def test_two_that_are_open_at_once_see_each_others_lines_once(tmp_path):
    one, two = ledger(tmp_path), ledger(tmp_path)
    for round_ in range(3):
        ask(one, f"one{round_}")
        ask(two, f"two{round_}")
        one.read()
        two.read()
        assert one.answers == two.answers
        assert one.spent == two.spent == Tokens(20 * (round_ + 1), 40 * (round_ + 1))


@pytest.mark.parametrize("size", [1, 20, -1])
def test_a_line_torn_by_a_kill_is_skipped_and_what_follows_is_not(tmp_path, size):
    book = ledger(tmp_path)
    ask(book, "a")
    ask(book, "b")
    content = book.path.read_bytes()
    torn = content.rstrip(b"\n").rfind(b"\n") + 1
    os.truncate(book.path, torn + size if size > 0 else len(content) + size)
    resumed = ledger(tmp_path)
    resumed.read()
    assert set(resumed.answers) == {"a"}
    ask(resumed, "c")
    last = ledger(tmp_path)
    last.read()
    # Without its end of line a whole line could be half of a longer one until something follows it.
    assert set(last.answers) == ({"a", "b", "c"} if size == -1 else {"a", "c"})


def test_endpoints_have_files_of_their_own(tmp_path):
    ask(ledger(tmp_path), "a")
    other = Ledger(tmp_path, "org/m", "http://elsewhere/v1")
    other.read()
    assert other.answers == {}


def test_a_lost_reply_is_paid_for_and_is_no_answer(tmp_path):
    ask(ledger(tmp_path), "a", answer=None)
    book = ledger(tmp_path)
    book.read()
    assert book.answers == {}
    assert book.spent == Tokens(10, 20)


def test_what_cost_nothing_and_said_nothing_leaves_no_line(tmp_path):
    book = ledger(tmp_path)
    ask(book, "a", NONE, None)
    assert not book.path.exists()


def test_a_limit_holds_over_what_earlier_processes_spent(tmp_path):
    for i in range(3):
        ask(ledger(tmp_path), str(i))
    book = ledger(tmp_path, max_tokens_total=119)
    book.read()
    assert "90 of max_tokens_total=119" in book.reserve(Tokens(10, 20))
    book = ledger(tmp_path, max_tokens_total=120)
    book.read()
    assert book.reserve(Tokens(10, 20)) is None


def test_a_budget_is_in_the_currency_of_the_prices():
    book = ledger(price_in=1e6, price_out=2e6, budget=100)  # 1 and 2 a token
    ask(book, "a", Tokens(10, 40))
    reason = book.reserve(Tokens(9, 1))
    assert SPENT in reason
    assert "90 of budget=100 is spent, one more request may cost 11" in reason
    assert book.reserve(Tokens(0, 1)) == reason, "once refused, always refused"


def test_a_request_waits_for_one_under_way_that_may_turn_out_cheaper():
    book = ledger(max_tokens_total=100)
    assert book.reserve(Tokens(0, 80)) is None
    said = []
    waiting = threading.Thread(target=lambda: said.append(book.reserve(Tokens(0, 60))))
    waiting.start()
    time.sleep(0.05)
    assert said == []
    book.settle(Tokens(0, 80), Tokens(0, 40), {"key": "a"}, ANSWER)
    waiting.join(5)
    assert said == [None]


def test_no_more_than_the_limit_is_ever_set_aside():
    book, most, lock = ledger(max_tokens_total=1000), [0], threading.Lock()
    under_way = [0]

    def work():
        while book.reserve(Tokens(3, 7)) is None:
            with lock:
                under_way[0] += 10
                most[0] = max(most[0], sum(book.spent) + under_way[0])
            time.sleep(0.0005)
            with lock:
                under_way[0] -= 10
            book.settle(Tokens(3, 7), Tokens(3, 2), {"key": "a"}, ANSWER)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most[0] <= 1000
    assert 990 < sum(book.spent) <= 1000


@pytest.mark.parametrize(
    "usage",
    [None, [], "many", {}, {"prompt_tokens": -1, "completion_tokens": 1e300}, {"prompt_tokens": True},
     {"prompt_tokens": float("nan"), "completion_tokens": 10**400}],
)  # fmt: skip
def test_a_count_that_cannot_be_is_taken_at_its_bound(usage):
    assert read_tokens(usage, Tokens(5, 6)) == Tokens(5, 6)


def test_the_bound_counts_bytes_and_the_guess_a_quarter_of_them():
    turns = [{"role": "user", "content": "häh" * 10}]  # 40 bytes
    assert tokens_at_most(turns, 7).prompt >= 40
    assert tokens_about(turns, 7) == Tokens(14, 7)


def test_half_a_surrogate_pair_survives_the_file(tmp_path):
    ask(ledger(tmp_path), "a", answer=Answer("\ud83d", "stop"))
    book = ledger(tmp_path)
    book.read()
    assert book.answers["a"].text == "\ud83d"
    assert json.loads(book.path.read_text())
