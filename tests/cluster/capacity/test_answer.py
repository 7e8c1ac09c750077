"""A promise is kept by replicas that hold less, of the modality that needs it, and by no more than it takes."""

from dataclasses import replace

import pytest

from cluster.capacity.answer import Answer, Question, Unreachable, alone_s, answer, replica_hardware, saving
from cluster.capacity.prices import Prices, load_prices
from cluster.capacity.service_times import Hardware, load_service_times
from cluster.capacity.simulation import Shape
from cluster.capacity.traces import Mix, Trace
from serve_apps.config_files import load_serve_config

QUICK = {"upscale_delay_s": 5, "downscale_delay_s": 20, "look_back_s": 10, "metrics_interval_s": 2}


@pytest.fixture(scope="module")
def question() -> Question:
    parts = ("clip", "whisper", "phi")
    changes = {f"{part}.autoscaling.{key}": value for part in parts for key, value in QUICK.items()}
    trace = Trace("steady", 6.0, Mix(0.5, 0.3, 0.2), 200.0)
    times = load_service_times("embedded-cpu")
    return Question(load_serve_config("embedded", changes), times, trace, Shape(120, 60, 1, 4.0), Prices(load_prices()))


@pytest.fixture(scope="module")
def plain(question: Question) -> Answer:
    return answer(question)


@pytest.mark.lengthy
def test_a_promise_that_the_configs_targets_miss_is_kept_by_lower_ones(question: Question, plain: Answer) -> None:
    least = alone_s(question)["audio"]
    slow = plain.outcome.ttft(0.95) or 0
    assert least < slow
    promise = least + 0.6 * (slow - least)
    hard = answer(replace(question, ttft_s=promise))
    assert hard.keeps is True
    assert hard.outcome.share_within(promise) > plain.outcome.share_within(promise)
    assert hard.target_shares["text"] < 1
    assert hard.target_shares["vision"] == 1  # one replica has time enough


def test_what_no_request_has_even_alone_is_refused_before_anything_is_simulated(question: Question) -> None:
    with pytest.raises(Unreachable, match="no number of replicas keeps it"):
        answer(replace(question, ttft_s=0.9 * alone_s(question)["text"]))


def test_refused_requests_break_a_promise_and_more_replicas_are_not_tried_where_there_may_be_none(
    question: Question,
) -> None:
    few = replace(question, ttft_s=60.0, max_replicas=1, trace=replace(question.trace, peak_rps=40.0))
    found = answer(few)
    assert found.outcome.refused > 0.05 * found.outcome.arrived
    assert found.keeps is False
    assert "text" in found.capped
    assert set(found.target_shares.values()) == {1.0}


def test_a_replica_that_packs_its_models_takes_what_the_largest_does(question: Question) -> None:
    times = question.times
    lm = times.text.model_copy(update={"hardware": Hardware(cpus=2, gpus=1, gpu="H100")})
    of = replica_hardware(times.model_copy(update={"text": lm}), "packed")
    assert of["text"].amounts == {"cpu": 2, "H100": 1}
    assert of["vision"].amounts == of["audio"].amounts == {}


@pytest.mark.lengthy
def test_models_in_turns_cost_less_than_a_share_each_and_never_less_than_the_work_takes(
    question: Question, plain: Answer
) -> None:
    whole, packed = answer(question, "whole"), answer(question, "packed")
    assert saving(plain, whole)[0] > saving(plain, packed)[0]
    mix, times, shape = question.trace.mix, question.times, question.shape
    of_text = shape.answer_tokens * (times.text.seconds_per_step / 16 + times.text.seconds_per_answer)
    of_audio = mix.audio * times.audio.seconds_per_second * shape.audio_seconds  # core seconds of a request, at least
    assert packed.outcome.replicas["text"].mean() > question.trace.peak_rps * (of_audio + of_text)
