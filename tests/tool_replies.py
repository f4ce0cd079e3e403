"""Replies of models that call tools, a table for each format: what they say and what it means.

The replies are written by hand after the formats' published descriptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"type": "object"},
    },
    "required": ["city"],
}
ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
    "required": ["a", "b"],
}
TOOLS = {"get_weather": WEATHER, "add": ADD, "now": {"type": "object", "properties": {}}}


@dataclass(frozen=True)
class Reply:
    """A reply, the content and reasoning in it, and its calls as (name, arguments)."""

    text: str
    content: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    reasoning: str = ""


def _token(name: str) -> str:
    return "<\uff5c" + name.replace(" ", "\u2581") + "\uff5c>"


CALLS, CALL, SEP = _token("tool calls begin"), _token("tool call begin"), _token("tool sep")
CALL_END, CALLS_END = _token("tool call end"), _token("tool calls end")
PARIS = ("get_weather", {"city": "Paris"})
SUM = ("add", {"a": 1, "b": -2.5e3})
HARD = (
    "get_weather",
    {"city": 'a "b" \\ {}]</tool_call>\n\u2603 ', "units": {"x": [1, {}, [], None]}},
)
HARD_JSON = (
    '{"city": "a \\"b\\" \\\\ {}]</tool_call>\\n\\u2603 ", "units": {"x": [1, {}, [], null]}}'
)
NOW = ("now", {})
PLAIN = Reply("It is sunny. ", "It is sunny. ")


def _json_call(call: tuple[str, dict[str, Any]], key: str = "arguments") -> str:
    import json

    return json.dumps({"name": call[0], key: call[1]})


REPLIES: dict[str, list[Reply]] = {
    "hermes": [
        PLAIN,
        Reply(f"<tool_call>\n{_json_call(PARIS)}\n</tool_call>", "", (PARIS,)),
        Reply(f"<tool_call>{_json_call(PARIS)}", "", (PARIS,)),
        Reply(
            f"Let me see.\n<tool_call>\n{_json_call(PARIS)}\n</tool_call>\n"
            f"<tool_call>\n{_json_call(SUM)}\n</tool_call>\n",
            "Let me see.",
            (PARIS, SUM),
        ),
        Reply(f"<tool_call>[{_json_call(SUM)}, {_json_call(NOW)}]</tool_call>", "", (SUM, NOW)),
        Reply(
            f'<tool_call>{{"name": "get_weather", "arguments": {HARD_JSON}}}</tool_call>Done.',
            "Done.",
            (HARD,),
        ),
        Reply('<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}', "", (PARIS,)),
        Reply('<tool_call>{"name": "now"}</tool_call>', "", (NOW,)),
        Reply('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", (NOW,)),
        Reply(
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}'
            "</tool_call>",
            "",
            (PARIS,),
        ),
        Reply(
            '<tool_call>{"id": 3, "type": "function", "function": '
            '{"name": "get_weather", "arguments": {"city": "Paris"}}}</tool_call>',
            "",
            (PARIS,),
        ),
        # What models get wrong and what can be understood in one way only.
        Reply(
            '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb\\d"}}</tool_call>',
            "",
            (("get_weather", {"city": "a\nb\\d"}),),
        ),
        Reply('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}', "", (PARIS,)),
    ],
    "qwen_xml": [
        PLAIN,
        Reply(
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
            "</function>\n</tool_call>",
            "",
            (PARIS,),
        ),
        Reply(
            "I look.\n\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
            "<parameter=b>\n-2.5e3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n"
            "<function=now>\n</function>\n</tool_call>",
            "I look.",
            (SUM, NOW),
        ),
        Reply(
            '<tool_call><function=get_weather><parameter=city>1 <b>\n"x" </para\n</parameter>'
            '<parameter=units>{"x": "y"}</parameter><parameter=days>soon</parameter></function>',
            "",
            (("get_weather", {"city": '1 <b>\n"x" </para', "units": {"x": "y"}, "days": "soon"}),),
        ),
        Reply(f"<tool_call>\n{_json_call(PARIS)}\n</tool_call>", "", (PARIS,)),
    ],
    "glm_tags": [
        PLAIN,
        Reply(
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
            "</tool_call>",
            "",
            (PARIS,),
        ),
        Reply(
            "I look.\n<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value>"
            "<arg_key>b</arg_key><arg_value>-2.5e3</arg_value></tool_call>\n"
            "<tool_call>now\n</tool_call>",
            "I look.",
            (SUM, NOW),
        ),
        Reply(
            '<tool_call>get_weather\n<arg_key>city</arg_key><arg_value>1 <b>\n"x" </arg_val'
            '</arg_value><arg_key>units</arg_key><arg_value>{"x": "y"}</arg_value></tool_call>',
            "",
            (("get_weather", {"city": '1 <b>\n"x" </arg_val', "units": {"x": "y"}}),),
        ),
        Reply(f"<tool_call>\n{_json_call(PARIS)}\n</tool_call>", "", (PARIS,)),
    ],
    "llama": [
        PLAIN,
        Reply(_json_call(PARIS, "parameters"), "", (PARIS,)),
        Reply(f"<|python_tag|>{_json_call(SUM, 'parameters')}", "", (SUM,)),
        Reply(
            f"{_json_call(PARIS, 'parameters')}; {_json_call(NOW, 'parameters')}", "", (PARIS, NOW)
        ),
        Reply(
            '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
            "",
            (PARIS,),
        ),
        Reply('<|python_tag|>brave.call(query="x")', '<|python_tag|>brave.call(query="x")'),
    ],
    "mistral": [
        PLAIN,
        Reply(f"[TOOL_CALLS][{_json_call(PARIS)}]", "", (PARIS,)),
        Reply(f"[TOOL_CALLS] [{_json_call(SUM)}, {_json_call(PARIS)}]", "", (SUM, PARIS)),
        Reply(
            'Well. [TOOL_CALLS][{"name": "now", "arguments": {}, "id": "abcdefghi"}]',
            "Well.",
            (NOW,),
        ),
        Reply('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", (PARIS,)),
    ],
    "mistral_args": [
        PLAIN,
        Reply(
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}',
            "",
            (PARIS, NOW),
        ),
        Reply(f"Hm.[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{HARD_JSON}", "Hm.", (HARD,)),
    ],
    "phi": [
        PLAIN,
        Reply(f"<|tool_call|>[{_json_call(PARIS)}]<|/tool_call|>", "", (PARIS,)),
        Reply(
            f"<|tool_call|>{_json_call(SUM)}<|/tool_call|><|tool_call|>{_json_call(NOW)}",
            "",
            (SUM, NOW),
        ),
        Reply(f"functools[{_json_call(PARIS)}, {_json_call(SUM)}]", "", (PARIS, SUM)),
        Reply("import functools\nfunctools.wraps(f)", "import functools\nfunctools.wraps(f)"),
    ],
    "gemma": [
        PLAIN,
        Reply('```tool_code\nget_weather(city="Paris")\n```', "", (PARIS,)),
        Reply(
            "Sure:\n```tool_code\nprint(get_weather(city='Paris'))\nadd(a=1, b=-2.5e3)\n```",
            "Sure:",
            (PARIS, SUM),
        ),
        Reply("```tool_code\n[now(), add(a = 1, b = -2.5e3,)]\n```", "", (NOW, SUM)),
        Reply(
            '```tool_code\nget_weather(city="""a "q" \\\\ \\x41\\u2603\n""", '
            "days=None, units={'x': [1, (), True, ''], \"y\": {}})\n```",
            "",
            (
                (
                    "get_weather",
                    {
                        "city": 'a "q" \\ A\u2603\n',
                        "days": None,
                        "units": {"x": [1, [], True, ""], "y": {}},
                    },
                ),
            ),
        ),
        Reply(f"```json\n[{_json_call(PARIS, 'parameters')}]\n```", "", (PARIS,)),
        Reply(f"```tool_code\n{_json_call(PARIS, 'parameters')}\n```", "", (PARIS,)),
        Reply(_json_call(SUM, "parameters"), "", (SUM,)),
        Reply('```json\n{"a": 1}\n```', '```json\n{"a": 1}\n```'),
        Reply("```tool_code\nimport os\n```", "```tool_code\nimport os\n```"),
    ],
    "deepseek": [
        PLAIN,
        Reply(
            f'{CALLS}{CALL}function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```{CALL_END}'
            f"{CALLS_END}",
            "",
            (PARIS,),
        ),
        Reply(
            f'I see.{CALLS}{CALL}function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```'
            f"{CALL_END}\n{CALL}function{SEP}now\n```json\n{{}}\n```{CALL_END}{CALLS_END}",
            "I see.",
            (PARIS, NOW),
        ),
    ],
    "deepseek_v31": [
        PLAIN,
        Reply(
            f'{CALLS}{CALL}get_weather{SEP}{{"city": "Paris"}}{CALL_END}{CALL}now{SEP}{{}}'
            f"{CALL_END}{CALLS_END}",
            "",
            (PARIS, NOW),
        ),
        Reply(f'{CALL}get_weather{SEP}{{"city": "Paris"}}{CALL_END}', "", (PARIS,)),
    ],
    "gpt_oss": [
        PLAIN,
        Reply("<|channel|>final<|message|>It is sunny.<|return|>", "It is sunny."),
        Reply(
            "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant"
            "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
            '{"city": "Paris"}<|call|>',
            "",
            (PARIS,),
            "Need the weather.",
        ),
        Reply(
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
            "<|message|>I look.<|end|><|start|>assistant to=functions.now<|channel|>commentary "
            "json<|message|>{}",
            "I look.",
            (NOW,),
            "Hm.",
        ),
        Reply(
            ' to=functions.add<|channel|>commentary<|message|>{"a": 1, "b": -2.5e3}',
            "",
            (SUM,),
        ),
    ],
    "json": [
        PLAIN,
        Reply(_json_call(PARIS), "", (PARIS,)),
        Reply(f"[{_json_call(SUM)},\n {_json_call(NOW)}]", "", (SUM, NOW)),
        Reply(f"\n{_json_call(PARIS)}\n{_json_call(SUM)}", "", (PARIS, SUM)),
        Reply(f"I call it:\n```json\n{_json_call(PARIS)}\n```", "I call it:", (PARIS,)),
        Reply(f"<tool_call>[{_json_call(PARIS)}]</tool_call>", "", (PARIS,)),
        Reply('{"answer": 42}', '{"answer": 42}'),
        Reply('{"name": "now"}', '{"name": "now"}'),
    ],
}

# Texts that look like calls and are none: what is said must come out as it went in.
BAITS = [
    "Use the <tool_call> tag, as in <tool_call>{...}</tool_call>, to call.",
    '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>',
    '<tool_call>{"name": ["get_weather"], "arguments": {}}</tool_call>',
    '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "get_weather", "arguments": {"city": Paris}}</tool_call>',
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
    '<tool_call>{"name": "get_weather", "arguments": "not json"}</tool_call>',
    "<tool_call><tool_call><tool_call>",
    "<tool_call>{{{{{{{{",
    "<tool_call>\n<function=nothing>\n</function>\n</tool_call>",
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis",
    '{"name": "get_weather"',
    '{"name": "get_weather", "parameters": {"city": ',
    "{",
    "[[[[",
    "[1, 2, 3]",
    "<|python_tag|>import os; os.system('ls')",
    "[TOOL_CALLS]",
    "[TOOL_CALLS][]",
    "[TOOL_CALLS]get_weather[ARGS]{",
    "[TOOL_CALLS]get_weather(city='Paris')",
    "[TOOL_CALLS][TOOL_CALLS][ARGS]",
    "<|tool_call|>[]<|/tool_call|>",
    "functools[0]",
    "```tool_code\nget_weather('Paris')\n```",
    "```tool_code\nget_weather(city=open('/etc/passwd'))\n```",
    "```tool_code\nget_weather(city=[[[[",
    "```tool_code\nprint(print(get_weather(city='x')))\n```",
    "```tool_code\nget_weather(days=0x10)\n```",
    "```tool_code\nget_weather(city='\\ud800')\n```",
    "```json\n[1]\n```",
    "```json",
    f"{CALLS}{CALLS_END}",
    f"{CALLS}{CALL}function{SEP}other\n```json\n{{}}\n```",
    f"{CALLS}{CALL}get_weather",
    f"{CALL}{SEP}{{}}",
    "a <|constrain|> b <",
    "\ud83d\ude00 </tool_call> <tool_",
]
