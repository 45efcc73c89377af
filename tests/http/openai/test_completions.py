"""``/v1/completions``: what is answered, and what the engine is asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from timbre_server.http.logprobs import TextOffsets
from timbre_server.http.text import TextCodec

PATH = "/v1/completions"


async def test_a_completion_has_openais_form_and_says_that_the_base_answered(rig: Any) -> None:
    body = await rig.complete(max_tokens=100)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny-base"
    assert body["adapter"] is None
    [choice] = body["choices"]
    assert choice["text"] == "hello wörld 😀!"
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "stop", None)
    assert choice["logprobs"] is None
    tokens = len(rig.engine.reply(None)) + 1
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": tokens,
        "total_tokens": 2 + tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_sixteen_tokens_are_the_default_and_length_the_reason(rig: Any) -> None:
    rig.engine.text = "x" * 100
    [choice] = (await rig.complete())["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("x" * 16, "length")


async def test_sampling_fields_reach_the_engine(rig: Any) -> None:
    await rig.complete(
        temperature=0.5, top_p=0.25, top_k=-1, min_p=0.125, repetition_penalty=1.5, presence_penalty=-1,
        frequency_penalty=2, logit_bias={"7": -100}, seed=-1, stop_token_ids=[4, 4], min_tokens=2,
        max_tokens=9, cache_salt="mine",
    )  # fmt: skip
    [submit] = rig.engine.submitted
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 0, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -1.0)
    assert (sampling.frequency_penalty, sampling.logit_bias) == (2.0, {7: -100.0})
    assert (sampling.seed, sampling.min_tokens, sampling.max_tokens) == (2**63 - 1, 2, 9)
    assert sampling.stop_token_ids == (4, rig.engine.eos)
    assert submit.cache_salt == "mine"
    assert submit.adapters == ()


async def test_ignore_eos_leaves_the_models_end_token_out_of_the_stops(rig: Any) -> None:
    await rig.complete(ignore_eos=True)
    assert rig.engine.submitted[0].sampling.stop_token_ids == ()


async def test_null_is_as_good_as_leaving_a_field_out(rig: Any) -> None:
    body = await rig.complete(temperature=None, stop=None, logit_bias=None, max_tokens=None, suffix=None)
    assert body["choices"][0]["text"] == "hello wörld 😀!"
    assert rig.engine.submitted[0].sampling.temperature == 1.0


async def test_n_choices_of_each_prompt_come_in_order_with_seeds_counted_up(rig: Any) -> None:
    rig.engine.reply = lambda submit: rig.context.text.encode(
        f"{submit.prompt_token_ids[-1]}:{submit.sampling.seed}", add_special_tokens=False
    )
    body = await rig.complete(prompt=[[5], [6]], n=3, seed=40)
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == ["5:40", "5:41", "5:42", "6:40", "6:41", "6:42"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 6 * 5
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    assert len({submit.request_id for submit in rig.engine.submitted}) == 6


async def test_without_a_seed_every_choice_draws_its_own(rig: Any) -> None:
    await rig.complete(n=8)
    assert len({submit.sampling.seed for submit in rig.engine.submitted}) == 8


@pytest.mark.parametrize("prompt", ["hell", ["hell"], [3, 4], [[3, 4]]], ids=str)
async def test_a_prompt_may_be_text_or_ids_alone_or_in_a_list(rig: Any, prompt: Any) -> None:
    await rig.complete(prompt=prompt)
    expected = rig.context.text.encode("hell", add_special_tokens=True) if "hell" in prompt else [3, 4]
    assert rig.engine.submitted[0].prompt_token_ids == expected


async def test_a_prompt_is_cut_to_its_last_tokens_on_request(rig: Any) -> None:
    body = await rig.complete(prompt=[1, 2, 3, 4], truncate_prompt_tokens=2, echo=True, return_token_ids=True)
    assert rig.engine.submitted[0].prompt_token_ids == [3, 4]
    assert body["choices"][0]["prompt_token_ids"] == [3, 4]


async def test_a_text_to_be_cut_is_cut_before_it_is_divided(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, lengths = rig.context.text.encode, []

    def counting(text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return list(encode(text, **options))

    monkeypatch.setattr(rig.context.text, "encode", counting)
    await rig.complete(prompt="x" * 2_000_000 + "hi", truncate_prompt_tokens=2)
    longest = rig.context.engine.info.max_model_len * rig.context.text.max_chars_per_token
    assert lengths[0] == longest
    assert rig.engine.submitted[0].prompt_token_ids == encode("hi", add_special_tokens=True)


async def test_stop_strings_are_cut_and_abort_the_engines_work(rig: Any) -> None:
    body = await rig.complete(stop=["wör", "zzz"], max_tokens=100)
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello ", "stop", "wör")
    assert rig.engine.aborted == [rig.engine.submitted[0].request_id]
    assert rig.records[0].finish_reason == "stop"
    assert body["usage"]["completion_tokens"] < len(rig.engine.reply(None))


async def test_a_stop_string_may_be_kept_in_the_text(rig: Any) -> None:
    body = await rig.complete(stop="wör", include_stop_str_in_output=True)
    assert body["choices"][0]["text"] == "hello wör"


async def test_the_clients_own_stop_token_is_named_and_the_models_is_not(rig: Any) -> None:
    token = rig.context.text.encode("w", add_special_tokens=False)[0]
    [choice] = (await rig.complete(stop_token_ids=[token]))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello ", "stop", token)


async def test_special_tokens_are_shown_on_request(rig: Any) -> None:
    body = await rig.complete(skip_special_tokens=False, include_stop_str_in_output=True, max_tokens=100)
    assert body["choices"][0]["text"] == "hello wörld 😀!<|im_end|>"


async def test_echo_repeats_the_prompt_as_it_was_written(rig: Any) -> None:
    texts = await rig.complete(prompt=["say hé ", "b"], echo=True, max_tokens=2)
    assert [choice["text"] for choice in texts["choices"]] == ["say hé hello", "bhello"]
    ids = rig.context.text.encode("hé", add_special_tokens=False)
    assert (await rig.complete(prompt=ids, echo=True, max_tokens=0))["choices"][0]["text"] == "hé"


async def test_logprobs_have_openais_four_lists_that_fit_the_text(rig: Any) -> None:
    rig.engine.text = "hell\nyou"
    [choice] = (await rig.complete(logprobs=2, max_tokens=4))["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hell\nyo"
    assert logprobs["tokens"] == ["hell", "\n", "y", "o"]
    assert logprobs["text_offset"] == [0, 4, 5, 6]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 4
    assert logprobs["top_logprobs"][0]["hell"] == -0.5


async def test_echo_with_logprobs_begins_with_null_and_counts_on_from_the_prompt(rig: Any) -> None:
    [choice] = (await rig.complete(prompt="abc", echo=True, logprobs=1, max_tokens=1))["choices"]
    assert choice["text"] == "abchell"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "hell"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert rig.engine.submitted[0].sampling.prompt_logprobs == 1


@pytest.mark.parametrize(
    ("as_text", "skip", "echoed"),
    [(True, True, "a<|im_start|>b"), (False, True, "ab"), (False, False, "a<|im_start|>b")],
)
async def test_special_tokens_of_an_echoed_prompt_take_the_room_that_they_have_there(
    rig: Any, as_text: bool, skip: bool, echoed: str
) -> None:
    text = "a<|im_start|>b"
    prompt: Any = text if as_text else rig.context.text.encode(text, add_special_tokens=False)
    fields = {"echo": True, "logprobs": 0, "max_tokens": 1, "skip_special_tokens": skip}
    [choice] = (await rig.complete(prompt=prompt, **fields))["choices"]
    assert choice["text"] == echoed + "hell"
    assert choice["logprobs"]["tokens"] == ["a", "<|im_start|>", "b", "hell"]
    assert choice["logprobs"]["text_offset"] == [0, 1, echoed.index("b"), len(echoed)]


def test_a_special_token_that_the_tokenizer_added_takes_no_room(codec: TextCodec) -> None:
    offsets = TextOffsets(codec, skip_special_tokens=True, echoed="ab")
    token_ids = codec.encode("<|im_start|>ab", add_special_tokens=False)
    assert [offsets.next(token_id) for token_id in token_ids] == [0, 0, 1]


async def test_scoring_a_prompt_asks_for_no_output(rig: Any) -> None:
    body = await rig.complete(prompt="abc", echo=True, logprobs=0, max_tokens=0)
    assert body["choices"][0]["text"] == "abc"
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert body["usage"]["completion_tokens"] == 0


async def test_parts_of_characters_are_shown_as_bytes_and_begin_where_the_character_does(rig: Any) -> None:
    rig.engine.text = "a😀b"
    [choice] = (await rig.complete(logprobs=0))["choices"]
    assert choice["logprobs"]["tokens"] == ["a", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "b", "<|im_end|>"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 3]


async def test_tokens_may_be_named_by_their_ids(rig: Any) -> None:
    rig.engine.reply = lambda _: [7]
    [choice] = (await rig.complete(logprobs=1, return_tokens_as_token_ids=True, max_tokens=1))["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:7"]
    assert choice["logprobs"]["top_logprobs"] == [{"token_id:7": -0.5}]


async def test_minus_infinity_becomes_a_number_that_json_has(rig: Any) -> None:
    original = rig.engine._logprobs

    def unlikely(token: int, wanted: int) -> Any:
        entry = original(token, wanted)
        return type(entry)(token, -math.inf, 9, entry.top)

    rig.engine._logprobs = unlikely
    [choice] = (await rig.complete(logprobs=0, max_tokens=1))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]


async def test_prompt_logprobs_have_vllms_form(rig: Any) -> None:
    [choice] = (await rig.complete(prompt="ab", prompt_logprobs=1, max_tokens=1))["choices"]
    token = str(rig.context.text.encode("b", add_special_tokens=False)[0])
    assert choice["prompt_logprobs"] == [
        None,
        {token: {"logprob": -0.5, "rank": 1, "decoded_token": "b"}},
    ]
    assert choice["logprobs"] is None


async def test_the_whole_vocabulary_is_given_where_the_setting_allows_it(rig: Any) -> None:
    status, error = await rig.refused(logprobs=-1)
    assert (status, error["param"]) == (400, "logprobs")
    assert "max_logprobs = -1" in error["message"]
    rig.with_limits(max_logprobs=-1)
    [choice] = (await rig.complete(logprobs=-1, max_tokens=1, return_tokens_as_token_ids=True))["choices"]
    assert len(choice["logprobs"]["top_logprobs"][0]) == rig.engine.info.vocab_size


async def test_return_token_ids_gives_prompt_and_output(rig: Any) -> None:
    [choice] = (await rig.complete(prompt=[3, 4], return_token_ids=True, max_tokens=100))["choices"]
    assert choice["prompt_token_ids"] == [3, 4]
    assert choice["token_ids"] == [*rig.engine.reply(None), rig.engine.eos]


async def test_a_model_without_a_tokenizer_serves_ids_and_refuses_text(rig_without_text: Any) -> None:
    rig = rig_without_text
    body = await rig.complete(prompt=[3, 4], return_token_ids=True, logprobs=1, max_tokens=2)
    assert body["choices"][0]["text"] == ""
    assert body["choices"][0]["token_ids"] == rig.engine.reply(None)[:2]
    assert body["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
    for path, fields in ((PATH, {}), (PATH, {"prompt": [1], "stop": "x"}), ("/v1/chat/completions", {})):
        status, error = await rig.refused(path, **fields)
        assert status == 400
        assert "no tokenizer" in error["message"]


async def test_room_is_held_for_all_choices_while_they_run_and_given_back(rig: Any) -> None:
    held: list[Any] = []
    rig.engine.reply = lambda _: held.extend(rig.gate.held) or [5]
    await rig.complete(prompt=[[1, 2], [3]], n=2, max_tokens=7)
    assert held[0] == (4, 2 * (2 + 7) + 2 * (1 + 7))
    assert rig.gate.held == []


async def test_a_full_server_refuses_before_anything_runs(rig: Any) -> None:
    rig.gate.is_full = True
    for stream in (False, True):
        status, error = await rig.refused(stream=stream)
        assert (status, error["code"]) == (503, "queue_full")
    assert rig.engine.submitted == []


async def test_every_sequence_leaves_one_record(rig: Any) -> None:
    rig.shelf.add("pirate")
    await rig.complete(model="pirate", n=2, max_tokens=3)
    first, second = rig.records
    assert (first.adapters, first.n, first.finish_reason) == (("pirate",), 2, "length")
    assert (first.prompt_tokens, first.generation_tokens, first.cached_tokens) == (2, 3, 3)
    assert first.arrived_s <= first.first_token_s <= first.finished_s
    assert first.request_id != second.request_id
