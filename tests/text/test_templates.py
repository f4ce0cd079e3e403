"""The prompt of every named template for a chat of two turns, and what old artifacts say of them.

The expected texts are written by hand from the rules of interface_facts.md B3: system template,
then role, separator, content and end of turn, then the role of the answer.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlc_llm.artifact import ChatConfig
from mlc_llm.errors import CorruptFile, OptionError
from mlc_llm.text.conversation import Conversation, conversation_names, get_conversation
from mlc_llm.text.formats.byte_level import recipe_names

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
EXPECTED = {
    "aya-23": (
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>one<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>two<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>three<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "deepseek_v3": (
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>S<\uff5cUser\uff5c>one<\uff5cAssistant\uff5c>two"
        "<\uff5cend\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>three<\uff5cAssistant\uff5c>"
    ),
    "gemma3_instruction": (
        "S<start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n"
        "<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\n"
    ),
    "glm": "S问: one\n\n答: two\n\n问: three\n\n答:",
    "gorilla-openfunctions-v2": (
        "S### Instruction: <<function>>\n<<question>>one\n### Response: two<|EOT|>"
        "### Instruction: <<function>>\n<<question>>three\n### Response: "
    ),
    "hermes2_pro_llama3": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama-3_1": (
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "codellama_instruct": "S[INST] one [/INST] two [INST] three [/INST] ",
    "llava": "Sone ASSISTANT: two USER: three ASSISTANT:",
    "llm-jp": "S\n\n### 指示:\none\n\n### 応答:\ntwo</s>\n\n### 指示:\nthree\n\n### 応答:\n",
    "nemotron": (
        "<extra_id_0>System\nS\n\n<extra_id_1>User\none\n<extra_id_1>Assistant\ntwo\n"
        "<extra_id_1>User\nthree\n<extra_id_1>Assistant\n"
    ),
    "oasst": (
        "S<|prompter|>: one<|endoftext|><|assistant|>: two<|endoftext|>"
        "<|prompter|>: three<|endoftext|><|assistant|>: "
    ),
    "olmo2": (
        "<|system|>\nS\n<|user|>\none<|endoftext|>\n<|assistant|>\ntwo<|endoftext|>\n"
        "<|user|>\nthree<|endoftext|>\n<|assistant|>\n"
    ),
    "phi-2": "SInstruct: one\nOutput: two\nInstruct: three\nOutput:",
    "phi-3": (
        "<|system|>\nS<|user|>\none<|end|>\n<|assistant|>\ntwo<|end|>\n"
        "<|user|>\nthree<|end|>\n<|assistant|>\n"
    ),
    "qwen3_5_nothink": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "redpajama_chat": "S<human>: one\n<bot>: two\n<human>: three\n<bot>:",
    "rwkv_world": (
        "User: hi\n\nAssistant: SUser: one\n\nAssistant: two\n\nUser: three\n\nAssistant: "
    ),
    "stablelm-2": (
        "S<|user|>\none<|endoftext|><|assistant|>\ntwo<|endoftext|>"
        "<|user|>\nthree<|endoftext|><|assistant|>\n"
    ),
    "tinyllama_v1_0": (
        "<|system|>\nS</s><|user|>\none</s><|assistant|>\ntwo</s><|user|>\nthree</s><|assistant|>\n"
    ),
    "wizardlm_7b": "SUser: one###Response: two###User: three###Response:",
    "wizard_coder_or_math": (
        "SInstruction:\none\n\n### Response:\ntwo\n\n### Instruction:\nthree\n\n### Response:\n"
    ),
}
# Template -> ids before the prompt, ids that end an answer, texts that do.
ENDS: dict[str, tuple[list[int], list[int], list[str]]] = {
    "aya-23": ([5], [6, 255001], ["<|END_OF_TURN_TOKEN|>"]),
    "deepseek_v2": ([100000], [100001], ["<\uff5cend\u2581of\u2581sentence\uff5c>"]),
    "deepseek_r1_qwen": ([], [151643], []),
    "gemma3_instruction": ([2], [1, 106], ["<end_of_turn>"]),
    "glm": ([64790, 64792], [2], ["</s>"]),
    "hermes3_llama-3_1": ([], [128001, 128008, 128009, 128040], ["<|im_end|>"]),
    "llama-4": ([200000], [200001, 200007, 200008], []),
    "llama-3": ([128000], [128001, 128009], ["<|end_of_text|>", "<|eot_id|>"]),
    "llama-2": ([1], [2], ["[INST]"]),
    "olmo": ([50279], [50279], []),
    "phi-3-vision": ([1], [2, 32000, 32001, 32007], ["<|endoftext|>"]),
    "phi-4": ([200022], [199999, 200020], ["<|endoftext|>", "<|end|>"]),
    "qwen3_5": ([], [248046, 248044], ["<|endoftext|>", "<|im_end|>"]),
    "stablelm": ([], [50278, 50279, 50277, 1, 0], [""]),
    "stablelm-2": ([], [100257], ["<|endoftext|>"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_of_two_turns(name: str) -> None:
    assert get_conversation(name).render(CHAT) == EXPECTED[name]


@pytest.mark.parametrize("name", conversation_names())
def test_prompt_follows_the_rules(name: str) -> None:
    """Join the parts by the fields alone, in the plainest way."""
    fields = get_conversation(name).to_json()
    chat = CHAT if "{system_message}" in fields["system_template"] else CHAT[1:]
    ends = {"user": fields["seps"][0], "assistant": fields["seps"][-1]}
    expected = fields["system_template"].replace("{system_message}", "S")
    expected = expected.replace("{function_string}", "")
    for number, turn in enumerate(chat[-3:]):
        role = turn["role"]
        if fields["add_role_after_system_message"] or number > 0 or not expected:
            expected += fields["roles"][role] + fields["role_content_sep"]
        text = fields["role_templates"][role].replace("{function_string}", "")
        expected += text.replace(f"{{{role}_message}}", turn["content"]) + ends[role]
    expected += fields["roles"]["assistant"] + fields["role_empty_sep"]
    assert get_conversation(name).render(chat) == expected
    assert expected.count("one") == expected.count("two") == expected.count("three") == 1


@pytest.mark.parametrize("name", ENDS)
def test_ids_and_texts_at_both_ends(name: str) -> None:
    conversation = get_conversation(name)
    found = (
        conversation.system_prefix_token_ids,
        conversation.stop_token_ids,
        conversation.stop_str,
    )
    assert found == ENDS[name]


def test_the_docs_name_every_template_and_pre_tokenizer() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "tokenizers.md"
    words = set(re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")))
    assert not {*conversation_names(), *recipe_names()} - words


def test_results_of_tools_have_their_own_role() -> None:
    chat = [*CHAT[:3], {"role": "tool", "content": "{}"}]
    assert (
        get_conversation("llama-3_1")
        .render(chat)
        .endswith(
            "two<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n{}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
    )
    assert get_conversation("ministral3").render(chat) == (
        "[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]one[/INST]two</s>[TOOL_RESULTS]{}[/TOOL_RESULTS]"
    )


def old_config(**changes: Any) -> ChatConfig:
    """Return a chat config as read from an old repository."""
    data = {
        "model_type": "llama",
        "quantization": "q4f16_1",
        "model_config": {"context_window_size": 64, "prefill_chunk_size": 64},
        "vocab_size": 32000,
        "conv_template": "llama-2",
        "mean_gen_len": 128,
        "max_gen_len": 512,
        "shift_fill_factor": 0.3,
        "local_id": "Llama-2-7b",
        "model_lib": "llama_q4f16_1",
        **changes,
    }
    return ChatConfig.from_json(json.loads(json.dumps(data)), "old")


def conversation_of(config: ChatConfig) -> Conversation:
    return Conversation.from_json(config.conv_template, "old")


@pytest.mark.parametrize("name", conversation_names())
def test_name_instead_of_a_template(name: str) -> None:
    assert conversation_of(old_config(conv_template=name)) == get_conversation(name)


def test_name_that_is_not_known() -> None:
    with pytest.raises(OptionError, match=r"no conversation template 'llama_default'; use one of"):
        conversation_of(old_config(conv_template="llama_default"))


def test_conv_config_changes_a_named_template() -> None:
    config = old_config(
        conv_template="LM",
        conv_config={
            "name": "mine",
            "system": "Be brief. ",
            "roles": ["U", "A"],
            "messages": [],
            "offset": 0,
            "separator_style": 0,
            "seps": [" ", "</s>"],
            "role_msg_sep": ": ",
            "role_empty_sep": ":",
            "stop_str": "</s>",
            "stop_tokens": [2],
            "prefix_tokens": [1],
            "add_bos": True,
        },
    )
    conversation = conversation_of(config)
    assert conversation.render(CHAT[1:2]) == "Be brief. U: one A:"
    assert conversation.render(CHAT) == "SU: one A: two</s>U: three A:"
    assert (conversation.stop_str, conversation.stop_token_ids) == (["</s>"], [2])
    assert conversation.system_prefix_token_ids == [1]


def test_conv_config_with_names_of_today() -> None:
    config = old_config(conv_config={"system_message": "Be brief.", "stop_token_ids": [2, 7]})
    text = conversation_of(config).render(CHAT[1:2])
    assert text == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\none [/INST] "
    assert conversation_of(config).stop_token_ids == [2, 7]


def test_system_text_of_old_takes_the_place_of_the_template() -> None:
    config = old_config(conv_config={"system": "[INST] Be brief. "})
    assert conversation_of(config).render(CHAT[1:2]) == "[INST] Be brief. one [/INST] "


@pytest.mark.parametrize(
    ("conv_config", "message"),
    [
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"stop_tokens": "2"}, "'stop_token_ids' must be"),
        ([1], "conv_config must be an object"),
    ],
)
def test_bad_conv_config(conv_config: Any, message: str) -> None:
    with pytest.raises(CorruptFile, match=f"old: .*{message}"):
        conversation_of(old_config(conv_config=conv_config))


def test_old_name_of_the_decoding_method() -> None:
    old = old_config(token_table_postproc_method="byte-fallback")
    assert old.tokenizer_info == {"token_postproc_method": "byte_fallback"}
    info = {"token_postproc_method": "byte_level", "prepend_space_in_encode": False}
    new = old_config(token_table_postproc_method="byte-fallback", tokenizer_info=info)
    assert new.tokenizer_info == info
