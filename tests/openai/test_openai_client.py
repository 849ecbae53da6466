"""The `openai` package against a cluster of SmolLM2 with itself: HEADSTART_URL is its HTTP door.

Greedy answers, so that streamed and whole answers can be compared.
"""

import asyncio
import os
import re
import time
import unittest
import urllib.request

import openai

URL = os.environ["HEADSTART_URL"]
MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a long story about a fox and a crow."}]
CLIENT = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)


def ask(messages=QUESTION, **options):
    options = {"model": MODEL, "temperature": 0, "max_tokens": 48, **options}
    return CLIENT.chat.completions.create(messages=messages, **options)


def joined(stream):
    """A stream's text, sources, last finish reason and chunks, for its only choice."""
    text, sources, finish, chunks = "", [], None, []
    for chunk in stream:
        chunks.append(chunk)
        for choice in chunk.choices:
            assert choice.index == 0
            if choice.delta.content:
                text += choice.delta.content
                sources.append(choice.source)
            finish = choice.finish_reason or finish
    return text, sources, finish, chunks


def in_use():
    """What the nodes' gauges say is in use: slots and KV tokens, drafter and base."""
    with urllib.request.urlopen(f"{URL}/metrics", timeout=30) as response:
        lines = response.read().decode()
    found = re.findall(r"^headstart_(\w+?)_(slots|kv_tokens)_used(?:{[^}]*})? (\S+)$", lines, re.M)
    assert {(tier, what) for tier, what, _ in found} >= {
        (tier, what) for tier in ("base", "drafter") for what in ("slots", "kv_tokens")
    }, found
    return sum(float(value) for _, _, value in found)


def decided(summary):
    """What a draft's summary says but for how far the drafter had come, which is a matter of time."""
    return {key: value for key, value in summary.items() if key != "drafted_tokens"}


class Models(unittest.TestCase):
    def test_the_base_and_the_pair_are_listed(self):
        ids = {model.id for model in CLIENT.models.list()}
        self.assertLessEqual({MODEL, f"{MODEL}@{MODEL}"}, ids)

    def test_the_pair_answers_as_the_base_does(self):
        pair = ask(model=f"{MODEL}@{MODEL}").choices[0].message.content
        self.assertEqual(pair, ask().choices[0].message.content)


class Answers(unittest.TestCase):
    def test_an_answer_tells_its_draft(self):
        answer = ask()
        choice = answer.choices[0]
        self.assertIn("Paris", choice.message.content)
        self.assertEqual(choice.message.role, "assistant")
        self.assertIn(choice.finish_reason, ("stop", "length"))
        usage = answer.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        self.assertLessEqual(usage.completion_tokens, 48)
        told = answer.headstart
        self.assertEqual((told["drafter"], told["base"]), (MODEL, MODEL))
        self.assertEqual(told["kept_tokens"], told["switch_index"] + 1)
        self.assertLessEqual(told["kept_tokens"], told["drafted_tokens"])
        self.assertEqual((told["window"], round(told["threshold"], 6)), (6, 0.8))

    def test_text_parts_are_text(self):
        parts = [{"type": "text", "text": QUESTION[0]["content"]}]
        whole = ask().choices[0].message.content
        self.assertEqual(ask([{"role": "user", "content": parts}]).choices[0].message.content, whole)

    def test_a_completion_prompt_is_a_user_message(self):
        completion = CLIENT.completions.create(
            model=MODEL, prompt=QUESTION[0]["content"], temperature=0, max_tokens=48
        )
        self.assertEqual(completion.choices[0].text, ask().choices[0].message.content)

    def test_the_switch_follows_the_request(self):
        eager = ask(extra_body={"headstart": {"window": 1, "threshold": 1e-6}}).headstart
        self.assertEqual((eager["switched"], eager["switch_index"], eager["window"]), (True, 0, 1))
        whole = {"headstart": {"threshold": 1.0, "draft_tokens_max": 12}}
        never = ask(STORY, extra_body=whole).headstart
        self.assertEqual((never["switched"], never["kept_tokens"]), (False, 12))

    def test_a_seed_makes_sampling_repeatable(self):
        options = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 40}
        options["extra_body"] = {"headstart": {"window": 1, "threshold": 1e-6}}
        one, two = (ask(STORY, seed=7, **options).choices[0].message.content for _ in range(2))
        other = ask(STORY, seed=8, **options).choices[0].message.content
        self.assertEqual(one, two)
        self.assertNotEqual(one, other)

    def test_token_ids_come_when_asked_for(self):
        answer = ask(extra_body={"return_token_ids": True})
        self.assertEqual(len(answer.choices[0].token_ids), answer.usage.completion_tokens)
        self.assertEqual(len(answer.prompt_token_ids), answer.usage.prompt_tokens)


class Streams(unittest.TestCase):
    def test_a_stream_is_the_whole_answer_in_pieces(self):
        whole = ask(STORY)
        stream = ask(STORY, stream=True, stream_options={"include_usage": True})
        text, sources, finish, chunks = joined(stream)
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(finish, whole.choices[0].finish_reason)
        self.assertEqual(chunks[-1].usage, whole.usage)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertGreater(len(sources), 1)
        # The drafter begins; once the base writes, it goes on to the end.
        self.assertEqual(sources, sorted(sources, reverse=True))
        self.assertEqual(sources[0], "drafter")
        self.assertLessEqual(set(sources), {"drafter", "base"})
        told = [chunk.headstart for chunk in chunks if "headstart" in (chunk.model_extra or {})]
        self.assertEqual([decided(last) for last in told[-1:]], [decided(whole.headstart)])

    def test_a_completion_streams_too(self):
        stream = CLIENT.completions.create(
            model=MODEL, prompt=QUESTION[0]["content"], temperature=0, max_tokens=48, stream=True
        )
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        self.assertEqual(text, ask().choices[0].message.content)

    def test_many_at_once_answer_as_one_alone(self):
        client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)
        questions = [f"Name {n} colours." for n in range(2, 10)]

        async def one(question):
            message = {"role": "user", "content": question}
            answer = await client.chat.completions.create(
                model=MODEL, messages=[message], temperature=0, max_tokens=24
            )
            return answer.choices[0].message.content

        async def all_of_them():
            async with client:
                return await asyncio.gather(*map(one, questions))

        together = asyncio.run(all_of_them())
        alone = [
            ask([{"role": "user", "content": q}], max_tokens=24).choices[0].message.content
            for q in questions
        ]
        self.assertEqual(together, alone)


class Choices(unittest.TestCase):
    def test_two_greedy_choices_are_the_same(self):
        choices = ask(n=2).choices
        self.assertEqual([choice.index for choice in choices], [0, 1])
        self.assertEqual(choices[0].message.content, choices[1].message.content)

    def test_two_sampled_choices_differ(self):
        eager = {"headstart": {"window": 1, "threshold": 1e-6}}
        answer = ask(STORY, n=2, temperature=1.0, seed=3, extra_body=eager)
        texts = [choice.message.content for choice in answer.choices]
        self.assertNotEqual(texts[0], texts[1])

    def test_streamed_choices_keep_apart(self):
        texts, finished = {}, set()
        for chunk in ask(n=2, stream=True):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                if choice.finish_reason:
                    finished.add(choice.index)
        whole = ask().choices[0].message.content
        self.assertEqual(texts, {0: whole, 1: whole})
        self.assertEqual(finished, {0, 1})


class Logprobs(unittest.TestCase):
    def check(self, tokens, text, completion_tokens):
        self.assertEqual(len(tokens), completion_tokens)
        joined_bytes = b"".join(bytes(token.bytes) for token in tokens)
        self.assertEqual(joined_bytes.decode(errors="replace").strip(), text.strip())
        for token in tokens:
            self.assertLessEqual(token.logprob, 0)
            self.assertEqual(len(token.top_logprobs), 3)
            likeliest = [top.logprob for top in token.top_logprobs]
            self.assertEqual(likeliest, sorted(likeliest, reverse=True))
            self.assertGreaterEqual(likeliest[0], token.logprob)

    def test_every_token_has_its_own_and_the_likeliest(self):
        answer = ask(logprobs=True, top_logprobs=3)
        choice = answer.choices[0]
        self.check(choice.logprobs.content, choice.message.content, answer.usage.completion_tokens)
        # Greedy: what the base wrote itself was the likeliest.
        for token in choice.logprobs.content[answer.headstart["kept_tokens"] :]:
            self.assertEqual(token.logprob, token.top_logprobs[0].logprob)

    def test_a_stream_has_them_too(self):
        whole = ask(logprobs=True, top_logprobs=3)
        text, _, _, chunks = joined(ask(logprobs=True, top_logprobs=3, stream=True))
        tokens = [
            token
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs
            for token in choice.logprobs.content
        ]
        self.check(tokens, text, whole.usage.completion_tokens)
        self.assertEqual(tokens, whole.choices[0].logprobs.content)


class Stops(unittest.TestCase):
    def test_an_answer_ends_before_the_stop_string(self):
        whole = ask(STORY).choices[0].message.content
        words = whole.split()
        for stop in (words[3], whole[20:29], whole[-12:-6]):
            before = whole[: whole.index(stop)]
            choice = ask(STORY, stop=stop).choices[0]
            self.assertEqual((choice.message.content or "", choice.finish_reason), (before, "stop"))
            text, _, finish, _ = joined(ask(STORY, stop=["never this", stop], stream=True))
            self.assertEqual((text, finish), (before, "stop"))

    def test_sixteen_are_taken_and_seventeen_refused(self):
        stops = [f"stop {n}" for n in range(16)]
        self.assertTrue(ask(stop=stops).choices[0].message.content)
        with self.assertRaisesRegex(openai.BadRequestError, "stop"):
            ask(stop=[*stops, "one more"])


class HangUps(unittest.TestCase):
    def wait_until(self, wanted, seconds=10):
        deadline = time.monotonic() + seconds
        while not wanted(used := in_use()):
            self.assertLess(time.monotonic(), deadline, f"in use: {used}")
            time.sleep(0.02)

    def wait_until_busy(self):
        """The answers are long: they are still being written when the gauges tell of them."""
        self.wait_until(lambda used: used > 0)

    def wait_until_idle(self):
        self.wait_until(lambda used: used == 0)

    def test_a_client_that_hangs_up_gives_everything_back(self):
        self.wait_until_idle()
        for read in (1, 2, 12):
            stream = ask(STORY, max_tokens=2000, stream=True)
            for _, chunk in zip(range(read), stream):
                self.assertTrue(chunk.id)
            self.wait_until_busy()
            stream.close()
            self.wait_until_idle()

    def test_many_who_hang_up_block_nobody(self):
        streams = [ask(STORY, max_tokens=2000, stream=True) for _ in range(10)]
        for stream in streams:
            next(iter(stream))
        self.wait_until_busy()
        for stream in streams:
            stream.close()
        self.wait_until_idle()
        self.assertIn("Paris", ask().choices[0].message.content)


class Refusals(unittest.TestCase):
    def refused(self, kind, status, param, **options):
        with self.assertRaises(kind) as raised:
            ask(**options)
        error = raised.exception
        self.assertEqual(error.status_code, status)
        self.assertEqual(error.param, param)
        self.assertTrue(error.code)
        return error

    def test_bad_values_are_named(self):
        for param, value in [
            ("temperature", -1),
            ("temperature", 3),
            ("top_p", 0),
            ("top_p", 1.5),
            ("max_tokens", -1),
            ("n", 0),
            ("n", 17),
            ("presence_penalty", 3),
            ("top_logprobs", 21),
        ]:
            with self.subTest(param=param, value=value):
                options = {"logprobs": True} if param == "top_logprobs" else {}
                error = self.refused(openai.BadRequestError, 400, param, **options, **{param: value})
                self.assertIn(param, str(error))

    def test_bad_extensions_are_named(self):
        for param, value in [("window", 0), ("threshold", 1.5), ("threshold", 0), ("windows", 6)]:
            with self.subTest(param=param, value=value):
                body = {"headstart": {param: value}}
                error = self.refused(
                    openai.BadRequestError, 400, f"headstart.{param}", extra_body=body
                )
                self.assertIn(param, str(error))

    def test_bad_messages_are_named(self):
        for messages in (
            [],
            [{"role": "wizard", "content": "Hi"}],
            [{"role": "user", "content": ""}],
        ):
            with self.subTest(messages=messages):
                with self.assertRaises(openai.BadRequestError) as raised:
                    ask(messages)
                self.assertIn("messages", str(raised.exception))

    def test_an_unknown_model_or_drafter_is_not_found(self):
        self.refused(openai.NotFoundError, 404, "model", model="nothing")
        with self.assertRaises(openai.NotFoundError):
            ask(model=f"{MODEL}@nobody")
        with self.assertRaises(openai.NotFoundError):
            ask(extra_body={"headstart": {"drafter": "nobody"}})

    def test_a_prompt_longer_than_the_context_is_refused(self):
        long = [{"role": "user", "content": "word " * 20_000}]
        with self.assertRaisesRegex(openai.BadRequestError, "context"):
            ask(long)

    def test_what_is_not_supported_is_refused_by_name(self):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        for param, value in [("tools", [tool]), ("logit_bias", {"5": 1})]:
            with self.subTest(param=param):
                self.refused(openai.BadRequestError, 400, param, **{param: value})
        error = self.refused(openai.BadRequestError, 400, "beam", extra_body={"beam": 4})
        self.assertIn("beam", str(error))


if __name__ == "__main__":
    unittest.main(verbosity=2)
