import pytest

from serve_apps.work_in_flight import RECENT, WorkInFlight


def test_work_counts_while_it_is_held() -> None:
    work = WorkInFlight("vision", "images")
    with work.request(3), work.request(3):
        assert work.stats() == {"work": 6, "requests": 2, "unweighed": 0}
    assert work.stats() == {"work": 0, "requests": 0, "unweighed": 0, "work_per_request": 3}


def test_work_that_shows_later_is_told_apart_until_then() -> None:
    work = WorkInFlight("audio", "seconds")
    with work.request() as request:
        assert work.stats() == {"work": 0, "requests": 1, "unweighed": 1}
        request.amount = 7.5
        assert work.stats() == {"work": 7.5, "requests": 1, "unweighed": 0}


def test_a_request_that_fails_is_let_go_and_one_of_unknown_work_is_not_averaged() -> None:
    work = WorkInFlight("audio", "seconds")
    with pytest.raises(ValueError, match="broken"), work.request():
        raise ValueError("broken clip")
    assert work.stats() == {"work": 0, "requests": 0, "unweighed": 0}


def test_of_two_equal_requests_the_one_that_ended_is_let_go() -> None:
    work = WorkInFlight("text", "tokens")
    with work.request(5) as longer:
        with work.request(5):
            pass
        longer.amount = 8
        assert work.stats()["work"] == 8


def test_the_mean_follows_recent_requests() -> None:
    work = WorkInFlight("text", "tokens")
    for amount in [1000] * RECENT + [10] * RECENT:
        with work.request(amount):
            pass
    assert work.stats()["work_per_request"] == 10
