"""Chat templates: what models' templates rely on, and what hostile ones must not get."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
import small_tokenizers

from mlc_llm.errors import CorruptFile, RequestError, TemplateError
from mlc_llm.text.chat_template import ChatTemplate, find_chat_template

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "mlc_llm" / "text" / "template_worker.py"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe <b> & 'it'?"},
]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def template(request: pytest.FixtureRequest) -> Iterator[ChatTemplate]:
    made = ChatTemplate(request.param, {"bos_token": "<s>"}, timeout_s=1, max_output_chars=10_000)
    yield made
    made.close()


def render(source: str, messages: list[dict[str, Any]] = MESSAGES, **kwargs: Any) -> str:
    made = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    try:
        return made.render(messages, **kwargs)
    finally:
        made.close()


def test_chatml_template() -> None:
    assert render(small_tokenizers.CHATML_TEMPLATE) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nGröße <b> & 'it'?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(
        small_tokenizers.CHATML_TEMPLATE, MESSAGES[:1], add_generation_prompt=False
    ).endswith("<|im_end|>\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ unk_token }}", "<s></s>"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ add_generation_prompt }}", "True"),
        ("{{ enable_thinking }}", "False"),
        ("a\n{% if true %}\nb\n{% endif %}\n  {% if true %}\nc{% endif %}", "a\nb\nc"),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "system"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m['role'] }}"
         "{% endfor %}", "user"),
        ("{{ {'k': '<é>\\'&'} | tojson }}", '{"k": "<é>\'&"}'),
        ("{{ [1, {'a': none}] | tojson(indent=2) }}", '[\n  1,\n  {\n    "a": null\n  }\n]'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}",
         '{"a":2,"b":1}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("[{% generation %}{{ messages[0].content }}{% endgeneration %}]", "[Be brief.]"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "2"),
        ("{{ messages[1]['content'].split('<')[0].strip() | upper }}", "GRÖSSE"),
        ("{{ messages | length }}{{ messages[0].get('x', '-') }}{{ '%05.1f' % 2 }}", "2-002.0"),
    ],
)  # fmt: skip
def test_what_templates_rely_on(source: str, expected: str) -> None:
    assert render(source, enable_thinking=False) == expected


def test_tools_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    assert render("{{ tools[0].function.name }}", tools=tools) == "now"


def test_strftime_now_gives_the_date() -> None:
    before = datetime.now().strftime("%d %b %Y")
    shown = render("{{ strftime_now('%d %b %Y') }}")
    assert shown in (before, datetime.now().strftime("%d %b %Y"))


def test_refusals_are_given_in_the_template_s_words() -> None:
    source = "{{ raise_exception('Roles must alternate, got ' + messages[0].role) }}"
    with pytest.raises(TemplateError, match="refuses the messages: Roles must alternate, got sys"):
        render(source)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of a str"),
        ("{{ cycler.__init__.__globals__ }}", "__init__"),
        ("{{ lipsum.__globals__['os'] }}", "__globals__"),
        ("{{ lipsum.__globals__ }}", "__globals__"),
        ("{{ messages | map(attribute='__class__') | list }}", "__class__"),
        ("{{ '' | attr('__class__') }}", "__class__"),
        ("{{ '{0.__class__}'.format(1) }}", "__class__"),
        ("{{ raise_exception.__globals__ }}", "__globals__"),
        ("{{ self.__init__.__globals__ }}", "__init__"),
        ("{{ messages.append(1) }}", "append"),
        ("{% include '/etc/passwd' %}", "failed"),
        ("{% import 'os' as os %}", "failed"),
        (ENDLESS, "still running after 1 s"),
        ("{% for x in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ("{{ " + "(" * 50_000, "without end"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ [0] * 10**10 }}", "memory"),
        ("{{ 'a'.center(10**10) }}", "memory"),
        ("{{ '%10000000000d' % 1 }}", "memory"),
        ("{{ '{:>10000000000}'.format(1) }}", "memory"),
        ("{{ 'x' | indent(10**10) }}", "memory"),
        ("{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
         "{% endfor %}", "memory|stopped"),
        ("{{ 9 ** (9 ** 9) }}", "failed|stopped"),
        ("{{ lipsum(n=10**9) }}", "failed|stopped"),
        ("{% for i in range(10001) %}x{% endfor %}", "more than 10,000 characters"),
        ("{{ 'x' * 10001 }}", "more than 10,000 characters"),
        ("{{ raise_exception('x' * 10**7) }}", "refuses"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("text\n{% if %}", "line 2"),
        ("{% nosuchtag %}", "nosuchtag"),
        ("{{ x | nosuchfilter }}", "nosuchfilter"),
    ],
    indirect=["template"],
)  # fmt: skip
def test_hostile_and_broken_templates_end_with_an_error(
    template: ChatTemplate, message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError, match=message) as caught:
        template.render(MESSAGES)
    assert len(str(caught.value)) < 3000
    assert time.monotonic() - started < 30  # Python's start on a busy machine included


@pytest.mark.parametrize("template", ["{% if spin %}" + ENDLESS + "{% endif %}ok"], indirect=True)
def test_next_call_works_after_a_timeout(template: ChatTemplate) -> None:
    with pytest.raises(TemplateError, match="still running"):
        template.render(MESSAGES, spin=True)
    assert template.render(MESSAGES) == "ok"


def child_of(template: ChatTemplate) -> subprocess.Popen[bytes]:
    assert template._child._child is not None
    return template._child._child._process


@pytest.mark.parametrize("template", ["ok"], indirect=True)
def test_a_process_that_died_is_replaced(template: ChatTemplate) -> None:
    template.start()
    child_of(template).kill()
    child_of(template).wait()
    assert template.render(MESSAGES) == "ok"


@pytest.mark.parametrize("template", [ENDLESS], indirect=True)
def test_a_process_that_dies_while_rendering_is_an_error(template: ChatTemplate) -> None:
    template._timeout_s = 30
    template.start()
    killer = threading.Timer(0.5, child_of(template).kill)
    killer.start()
    with pytest.raises(TemplateError, match="ended with code"):
        template.render(MESSAGES)
    killer.join()


@pytest.mark.parametrize("template", ["ok"], indirect=True)
def test_one_process_serves_all_calls_until_close(template: ChatTemplate) -> None:
    template.start()
    child = child_of(template)
    assert [template.render(MESSAGES) for _ in range(3)] == ["ok"] * 3
    assert child_of(template) is child
    template.close()
    assert child.returncode is not None
    template.close()
    assert template.render(MESSAGES) == "ok"


@pytest.mark.parametrize("template", ["{{ n }}"], indirect=True)
def test_threads_get_their_own_answers(template: ChatTemplate) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = template.render(MESSAGES, n=number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(20)}


def test_messages_that_are_no_json_are_a_request_error() -> None:
    with pytest.raises(RequestError, match="JSON"):
        ChatTemplate("ok").render([{"role": "user", "content": object()}])


def test_a_system_that_starts_no_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(TemplateError, match="cannot be started"):
        ChatTemplate("ok").start()


def run_parent(code: str, **options: Any) -> "subprocess.Popen[str]":
    prelude = "import sys, time\nfrom mlc_llm.text.chat_template import ChatTemplate\n"
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", prelude + code],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_until_gone(pid: int, seconds: float) -> bool:
    """Wait for a process that is not our child; a zombie nobody reaps counts as gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            status = Path(f"/proc/{pid}/status")
            if status.exists() and "State:\tZ" in status.read_text():
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("source", ["ok", ENDLESS])
def test_the_child_ends_with_its_parent(source: str) -> None:
    code = (
        f"t = ChatTemplate({source!r}, timeout_s=1)\nt.start()\n"
        "print(t._child._child._process.pid, flush=True)\nt.render([])\ntime.sleep(60)"
    )
    parent = run_parent(code)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.communicate()
    assert wait_until_gone(child_pid, 20)


def test_leaving_without_close_is_silent_and_needs_no_stdin() -> None:
    code = "import os\nos.close(0)\nt = ChatTemplate('ok')\nprint(t.render([]))"
    parent = run_parent(code, env={"PATH": ""})
    assert parent.communicate(timeout=60) == ("ok\n", "")
    assert parent.returncode == 0


def test_the_child_forgets_the_environment() -> None:
    code = (
        "import os, runpy, sys; sys.argv[1:] = [str(1 << 30), *sys.argv[1:]]\n"
        f"runpy.run_path({str(WORKER)!r}, run_name='__main__')\n"
        "sys.stderr.write(repr(dict(os.environ)))"
    )
    packages = str(Path(jinja2.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-c", code, packages],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"HF_TOKEN": "secret"},
        timeout=60,
    )
    assert (child.returncode, child.stderr) == (0, "{}")
    assert "ready" in child.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads another process's limits")
@pytest.mark.parametrize("template", ["ok"], indirect=True)
def test_the_child_has_limits_of_memory_and_files(template: ChatTemplate) -> None:
    import resource

    template.render(MESSAGES)
    pid = child_of(template).pid
    assert resource.prlimit(pid, resource.RLIMIT_AS) == (512 << 20, 512 << 20)
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "with_tools", "expected"),
    [
        ({}, False, None),
        ({"chat_template": None}, False, None),
        ({"chat_template": []}, False, None),
        ({"chat_template": "one"}, True, "one"),
        ({"chat_template": [{"name": "default", "template": "d"}]}, True, "d"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "t"},
                    {"name": "default", "template": "d"},
                ]
            },
            False,
            "d",
        ),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "t"},
                    {"name": "default", "template": "d"},
                ]
            },
            True,
            "t",
        ),
    ],
)
def test_template_is_found_in_the_settings(
    tmp_path: Path, settings: dict[str, Any], with_tools: bool, expected: str | None
) -> None:
    assert find_chat_template(tmp_path, settings, with_tools=with_tools) == expected
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert find_chat_template(tmp_path, settings, with_tools=with_tools) == "file"


@pytest.mark.parametrize("value", [7, [7], [{"name": "x"}], {"default": "d"}])
def test_other_templates_in_the_settings_are_a_corrupt_file(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CorruptFile, match=r"tokenizer_config\.json"):
        find_chat_template(tmp_path, {"chat_template": value})


def test_unreadable_and_ambiguous_templates_are_a_corrupt_file(tmp_path: Path) -> None:
    settings = json.loads('{"chat_template": [{"name": "rag", "template": "r"}]}')
    with pytest.raises(CorruptFile, match="rag but no 'default'"):
        find_chat_template(tmp_path, settings)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptFile, match="UTF-8"):
        find_chat_template(tmp_path, settings)


def test_templates_of_models_that_see_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert find_chat_template(tmp_path, {"chat_template": "setting"}) == "of the processor"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_chat_template(tmp_path, {}) == "file"
