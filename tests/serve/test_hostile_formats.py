"""Formats and tools that are made to do harm: refused by name and in time, while others go on.

Time is counted in seconds of processor, since nobody knows how busy the machine is.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from agents import END, agent_server, ask
from agents import TOKENIZER as AGENT_TOKENIZER
from fakes import next_token
from served import LETTERS, MODEL, TOKENIZER, Served, served
from tool_replies import BAITS

from mlc_llm.text.grammars.limits import TIME_LIMIT_S

# Seconds of processor time that a refusal may take, beside those of the helper process.
MOST_S = 2.0 - TIME_LIMIT_S
# A wait that is longer than any busy machine needs.
GENEROUS_S = 60.0


class Bystander:
    """Streams long answers, one after the other, and checks each piece of them."""

    def __init__(self, server: Served) -> None:
        self.num_pieces = 0
        self.failure: BaseException | None = None
        self._server = server
        self._may_end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait_for_more(self) -> None:
        """Return when two further pieces have come."""
        first, deadline = self.num_pieces, time.monotonic() + GENEROUS_S
        while self.num_pieces < first + 2:
            assert self.failure is None, self.failure
            assert time.monotonic() < deadline, "the other stream stands still"
            time.sleep(0.005)

    def end(self) -> None:
        """Stop after the next piece."""
        self._may_end.set()
        self._thread.join(GENEROUS_S)
        assert self.failure is None, self.failure

    def _run(self) -> None:
        try:
            while not self._may_end.is_set():
                self._stream()
        except BaseException as failure:
            self.failure = failure

    def _stream(self) -> None:
        prompt = "hello others"
        tokens = TOKENIZER.encode(prompt)
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 900, "stream": True}
        with self._server.client.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.status_code == 200
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    for letter in json.loads(line[6:])["choices"][0]["text"]:
                        tokens.append(LETTERS[next_token(tokens) % len(LETTERS)])
                        assert TOKENIZER.decode(tokens[-1:]) == letter
                    self.num_pieces += 1
                if self._may_end.is_set():
                    return


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(context=1024, step_s=0.02) as server:
        yield server


@pytest.fixture(scope="module")
def bystander(server: Served) -> Iterator[Bystander]:
    bystander = Bystander(server)
    yield bystander
    bystander.end()


@contextmanager
def in_time(bystander: Bystander, most_s: float = MOST_S) -> Iterator[None]:
    """Check that what is done meanwhile takes little, and that the other stream goes on."""
    bystander.wait_for_more()
    wall, work = time.monotonic(), time.process_time()
    yield
    wall, work = time.monotonic() - wall, time.process_time() - work
    # The steps of the bystander, which take 20 ms, cost some work as well.
    assert work < most_s + 0.25 * wall, f"{work:.2f} s of work in {wall:.2f} s"
    assert wall < GENEROUS_S
    bystander.wait_for_more()
    print(f"{work:.2f} s of work in {wall:.2f} s")


def send(server: Served, path: str, body: Any) -> tuple[int, Any]:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"content-type": "application/json"}
    timeout = 2 * GENEROUS_S
    response = server.client.post(path, content=content, headers=headers, timeout=timeout)
    return response.status_code, response.json()


def check_refusal(status: int, body: Any, *params: str) -> None:
    """Check that an answer is a refusal as OpenAI has them, and names one of the fields."""
    assert status == 400, body
    assert body.keys() == {"error"} and body["error"].keys() >= {"message", "type", "param", "code"}
    error = body["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(params), error
    assert 10 < len(error["message"]) < 600, error["message"]


def nested(depth: int, inner: str = "{}") -> str:
    return '{"type": "array", "items": ' * depth + inner + "}" * depth


NESTED_GROUPS = "(" * 9000 + "a" + ")" * 9000


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def chain(count: int) -> dict[str, Any]:
    links = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(count)}
    return {"$defs": {**links, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


FORMATS: dict[str, Any] = {
    "nested groups": {"type": "regex", "regex": NESTED_GROUPS},
    "a loop of references": schema_format({"$ref": "#"}),
    "a longer loop": schema_format(
        {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}},
            "$ref": "#/$defs/a",
        }
    ),
    "values without end": schema_format(
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    ),
    "a loop that nothing needs": schema_format(
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "properties": {"b": {"$ref": "#/$defs/a"}}}
    ),
    "a chain of references": schema_format(chain(3000)),
    "products": schema_format(
        {
            "allOf": [
                {"anyOf": [{"type": "string", "pattern": f"a{i}b{j}.*"} for i in range(20)]}
                for j in range(12)
            ]
        }
    ),
    "a large divisor": schema_format({"type": "integer", "multipleOf": 999983}),
    "many properties": schema_format(
        {"type": "object", "properties": {f"p{i}": {} for i in range(9000)}}
    ),
    "a million values": schema_format({"enum": list(range(1_000_000))}),
    "a million texts": {"type": "choice", "choice": ["a"] * 1_000_000},
    "10,000 levels in a text": {"type": "json_object", "schema": nested(10_000)},
    "rules to the power": {
        "type": "grammar",
        "grammar": "start: r0\n"
        + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(3000))
        + '\nr3000: "a"',
    },
    "terms to the power": {
        "type": "grammar",
        "grammar": "start: T0\n"
        + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(90))
        + '\nT90: "a"',
    },
    "nested brackets": {
        "type": "grammar",
        "grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000,
    },
}


def tool(**schema: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "strict": True, "parameters": {"type": "object", **schema}}
    return [{"type": "function", "function": function}]


TOOLS: dict[str, Any] = {
    "an open group": tool(properties={"a": {"type": "string", "pattern": "(unclosed"}}),
    "nested groups": tool(properties={"a": {"type": "string", "pattern": NESTED_GROUPS}}),
    "a loop of references": tool(
        properties={"a": {"$ref": "#/$defs/a"}}, **{"$defs": {"a": {"$ref": "#/$defs/a"}}}
    ),
    "a million values": tool(properties={"a": {"enum": list(range(1_000_000))}}),
    "30,000 values": tool(properties={"a": {"enum": list(range(30_000))}}),
    "100 levels": tool(properties={"a": json.loads(nested(100))}),
    "many properties": tool(properties={f"p{n}": {"type": "string"} for n in range(5000)}),
    "a large divisor": tool(properties={"a": {"type": "integer", "multipleOf": 999983}}),
}
# Each may pass alone; all of them would keep the helper busy for many seconds.
TOOLS["many that take long"] = [
    {"type": "function", "function": {**one["function"], "name": f"f{number}"}}
    for number in range(60)
    for one in tool(properties={"a": {"type": "integer", "multipleOf": 29_000 + number}})
]
MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 30}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_refused(server: Served, bystander: Bystander, name: str) -> None:
    with in_time(bystander):
        status, body = send(
            server, "/v1/chat/completions", {**CHAT, "response_format": FORMATS[name]}
        )
    check_refusal(status, body, "response_format")


@pytest.mark.parametrize("name", TOOLS)
def test_tools_are_refused(server: Served, bystander: Bystander, name: str) -> None:
    # What passes in the helper process is read again here, beside everything else.
    with in_time(bystander, 2 * MOST_S):
        status, body = send(server, "/v1/chat/completions", {**CHAT, "tools": TOOLS[name]})
    check_refusal(status, body, "tools")


@pytest.mark.parametrize("schema", [nested(10_000), "{", json.dumps({"not": {}})])
def test_formats_are_refused_beside_tools(
    server: Served, bystander: Bystander, schema: str
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    wanted = {"type": "json_object", "schema": schema}
    with in_time(bystander):
        fields = {**CHAT, "tools": tools, "response_format": wanted}
        status, body = send(server, "/v1/chat/completions", fields)
    check_refusal(status, body, "response_format")


def test_other_doors_lead_to_the_same_refusals(server: Served, bystander: Bystander) -> None:
    schema = {"type": "integer", "multipleOf": 999961}
    text = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    with in_time(bystander):
        status, body = send(
            server, "/v1/responses", {"input": "hello", "text": text, "store": False}
        )
    check_refusal(status, body, "text.format")
    config = {"format": {"type": "json_schema", "schema": schema}}
    fields = {"messages": MESSAGES, "max_tokens": 5, "output_config": config}
    with in_time(bystander):
        status, body = send(server, "/v1/messages", fields)
    assert status == 400 and body["error"]["type"] == "invalid_request_error"
    assert "output_config.format" in body["error"]["message"]
    with in_time(bystander):
        fields = {"model": MODEL, "prompt": "a", "response_format": schema_format(schema)}
        status, body = send(server, "/v1/completions", fields)
    check_refusal(status, body, "response_format")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_deep_body_is_refused(server: Served, bystander: Bystander, path: str) -> None:
    deep = '{"model": "fake", "prompt": "a", "response_format": {"type": "json_object", "schema": '
    with in_time(bystander):
        status, body = send(server, path, deep + nested(10_000) + "}}")
    assert status == 400 and "the body is not JSON: recursion" in body["error"]["message"], body


EXPONENTIAL = {
    "ways": "(a+)+b",
    "ways that overlap": "(a|aa|a*)*c",
    "choices": "(a?){60}a{60}",
    "counts": "((((a{1,900}){1,900}){1,900}){1,900}){1,900}",
    "states": "(.*a.{12}){9}(b|c.*){20}[^d]{3,900}",
    "families of states": "("
    + "|".join(f"(.*{c}.{{{n}}})" for n in range(99) for c in "abc")
    + ")*",
}


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_expressions_to_the_power_are_no_work(
    server: Served, bystander: Bystander, name: str
) -> None:
    """They are little to an automaton that is made as it goes; else they are refused."""
    regex = {"type": "regex", "regex": EXPONENTIAL[name]}
    schema = schema_format({"type": "string", "pattern": f"^{EXPONENTIAL[name]}$"})
    for response_format in (regex, schema):
        with in_time(bystander):
            fields = {**CHAT, "response_format": response_format}
            status, body = send(server, "/v1/chat/completions", fields)
        if status != 200:
            check_refusal(status, body, "response_format")


def test_baits_in_tools_and_answers_are_text() -> None:
    """What looks like calls is content, and takes no more time than other text."""
    with agent_server("hermes", ["ok"]) as (client, runner):
        baits = [bait for bait in BAITS if bait.isprintable() or bait.isascii()]
        function = {"name": "other", "description": " ".join(baits)[:2000]}
        tools: Any = [{"type": "function", "function": function}]
        for bait in baits[:12]:
            runner.replies = [[*AGENT_TOKENIZER.encode(bait), END]]
            work = time.process_time()
            for stream in (False, True):
                message, reason = ask(client, MESSAGES, stream=stream, tools=tools)
                assert (message["content"], reason) == (bait, "stop")
            assert time.process_time() - work < 2 * MOST_S
